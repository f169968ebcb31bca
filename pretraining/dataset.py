# SPDX-License-Identifier: Apache-2.0
"""The sequences of a plan as tensors, for a PyTorch `DataLoader` or a transformers `Trainer`.

    corpus = PackedCorpus.open("runs/packed")
    corpus.check_tokenizer(model_name, tokenizer)
    plan = SequencePlan(corpus, 4096, strategy="xlda", seed=42)
    plan.check_lasts(steps * batch_sequences)
    dataset = PackedSequences(plan)          # train_dataset of a Trainer with a sequential sampler, default collator

Step s trains on the sequences from s·B until before (s+1)·B, B being those of all ranks and accumulated batches. That
is what Accelerate makes of a sequential sampler, whatever the ranks, and skipping what is done costs nothing: the
sampler counts numbers, no sequence is read. With a batch that grows, a step begins where the one before it ends. Save
`plan.identity()` in a checkpoint and ask `check_same_plan` before going on; `plan.tokens_seen(sequences)` is what has
been seen of each source. A model does not take `language_ids`: pop it for loss by language (`plan.languages`).
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from jai.errors import UserError
from jai.pretraining.plan import AnyPlan, SequencePlan

IGNORED = -100  # the label on which there is no loss


class PackedSequences(Dataset):
    """The sequences of a plan by number, all of the same length: a batch is a stack of them.

    Read in the order of the numbers (a sequential sampler) it is the same run on however many ranks: Accelerate gives
    each rank every n-th batch of that order. Each item has, as int64 of shape `(context,)`:

    - `input_ids`
    - `position_ids`: where documents are isolated they begin anew with each, which is how transformers' attention keeps
      them apart (give no `attention_mask`); else they count through.
    - `labels`: `input_ids`, but -100 on padding and, where documents are isolated, on the first token of each, which no
      token before it may predict. They are not shifted: models of transformers shift them.
    - `language_ids`: index in `plan.languages` of each token's language, -1 on padding.
    """

    def __init__(self, plan: AnyPlan):
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.sequences

    def __getitem__(self, sequence: int) -> dict[str, torch.Tensor]:
        """
        Raises:
            UserError: for a shard that cannot be read, or holds what no tokenizer wrote.
        """
        plan, number = self.plan.part(sequence)
        pieces = plan.pieces(number)
        lengths = pieces.lengths
        begins = np.cumsum(lengths) - lengths
        ids = np.empty(plan.context, np.int64)
        columns = (pieces.source, pieces.document, pieces.start, pieces.stop, begins)
        for source, document, start, stop, begin in zip(*(column.tolist() for column in columns)):
            if source < 0:
                ids[begin : begin + stop - start] = plan.corpus.eos_token_id
                continue
            ids[begin : begin + stop - start] = plan.sources[source].read(document, start, stop)
        vocabulary = plan.corpus.tokenizer["vocabulary"]
        if ids.max() >= vocabulary:
            piece = int(begins.searchsorted(ids.argmax(), "right")) - 1
            fault = f"it has the id {ids.max():,}, and the tokenizer has {vocabulary:,}"
            raise _damaged(plan, int(pieces.source[piece]), int(pieces.document[piece]), fault)
        positions = np.arange(plan.context)
        labels = ids.copy()
        languages = pieces.language.repeat(lengths)
        if plan.is_isolated:
            positions -= begins.repeat(lengths)
            labels[begins] = IGNORED
        if pieces.source[-1] < 0:
            labels[begins[-1] :] = IGNORED
        arrays = {"input_ids": ids, "position_ids": positions, "labels": labels, "language_ids": languages}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _damaged(plan: SequencePlan, source: int, document: int, fault: str) -> UserError:
    of = plan.sources[source]
    return UserError(
        f"The shard {of.file_of(document)} is damaged: in document {document:,} of {of.name}, {fault}. Pack the corpus "
        "again, or fetch the folder again; `verify_packed: true` compares all of it with its hashes before a run."
    )

# SPDX-License-Identifier: Apache-2.0
"""What TRL's trainers of pairs without a reference (CPO with SimPO, and ORPO) need for a JAI.

Both are experimental in TRL and differ from its others in three ways that no message tells, which are mended here:

- Their auxiliary loss of routers is off unless the configuration has `output_router_logits: true`, which it has not.
- Their tokens are others: `<s>` stands before every prompt, where the chat template (and so `generate`) has none, and
  tools are left out. Here they are those of all stages, which `--preview` shows.
- A prompt that fills `max_length` leaves answers without a token, whose mean is NaN. Such pairs are left out.
"""

import warnings
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import is_conversational
from trl.import_utils import TRLExperimentalWarning

from jai.errors import UserError
from jai.trainers.arguments import StageArguments, max_length_of
from jai.trainers.checks import refuse_without_effect
from jai.trainers.data import CATEGORY, LANGUAGE
from jai.trainers.messages import RowFault
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.pair_figures import PAIR_GROUPS, PairFigures
from jai.trainers.router_losses import balance_weight
from jai.trainers.tokens import IGNORED, RowTokenizer

with warnings.catch_warnings():  # that they may change, which docs/post-training.md says, too
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

__all__ = ["CPOConfig", "CPOTrainer", "ORPOConfig", "ORPOTrainer", "ReferenceFreeMixin", "check_reference_free_options"]


def check_reference_free_options(arguments: StageArguments) -> None:
    """Refuse options that these trainers of TRL's have no code for, or pass over.

    Raises:
        UserError: naming the option.
    """
    training = arguments.training
    if arguments.script.dataset_streaming:
        raise UserError("`dataset_streaming` is on, and this trainer of TRL's needs all pairs at once. Leave it out.")
    if max_length_of(training) is None:
        raise UserError("`max_length` is null, for which this trainer of TRL's takes 512. Give a number of tokens.")
    if arguments.jai.linear_cross_entropy:
        raise UserError(
            "`linear_cross_entropy` is about TRL's fused head, which this trainer of TRL's does not use. Leave it out."
        )
    encoders = (False, "encoder-decoder models")
    effective = {"max_completion_length": encoders, "is_encoder_decoder": encoders}
    effective["generate_during_eval"] = (False, "TRL's own trainers (here, `jai generate` shows answers)")
    if isinstance(training, CPOConfig):
        is_sigmoid = training.loss_type in ("sigmoid", "simpo")
        effective["simpo_gamma"] = (training.loss_type == "simpo", "`loss_type: simpo`")
        effective["label_smoothing"] = (is_sigmoid, "`loss_type` sigmoid or simpo")
    refuse_without_effect(training, effective)


class ReferenceFreeMixin(JaiTrainerMixin):
    """Put before TRL's CPOTrainer or ORPOTrainer."""

    # TRL's, which its classes do not declare.
    aux_loss_enabled: bool
    aux_loss_coef: float

    def __init__(self, *args: Any, **kwargs: Any):
        config, tokenizer = kwargs["args"], kwargs["processing_class"]
        loading = {"device_map": None, **(config.model_init_kwargs or {})}  # TRL's "auto" splits over all GPUs
        if (quantization := kwargs.pop("quantization_config", None)) is not None:
            loading["quantization_config"] = quantization
        config.model_init_kwargs = loading
        for name in ("train_dataset", "eval_dataset"):
            if (rows := kwargs.get(name)) is not None:
                kwargs[name] = tokenize_pairs(rows, tokenizer, config.max_length, config.dataset_num_proc)
        super().__init__(*args, **kwargs)
        model = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model)).config
        self.aux_loss_coef = balance_weight(config.router_aux_loss_coef, model)
        self.aux_loss_enabled = self.aux_loss_coef > 0 and getattr(model, "num_local_experts", 1) > 1
        self._rewards: tuple[torch.Tensor, torch.Tensor] | None = None
        self._aux_loss: torch.Tensor | None = None

    def tokenize_row(self, feature: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
        """Nothing: the rows come as tokens."""
        return {}

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        """TRL's; the auxiliary loss is kept for the logs."""
        found = cast(tuple[Any, ...], super().concatenated_forward(model, batch))  # type: ignore[misc]
        self._aux_loss = found[5].detach() if self.aux_loss_enabled else None
        return found

    def get_batch_loss_metrics(self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
        """TRL's loss and figures, with the auxiliary loss among them; rewards are counted by the pairs' groups."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)  # type: ignore[misc]
        if self._aux_loss is not None:
            mean = cast(torch.Tensor, self.accelerator.gather_for_metrics(self._aux_loss)).mean()
            metrics[f"{'eval_' if train_eval == 'eval' else ''}aux_loss"] = mean.item()
        if isinstance(self._group_figures, PairFigures) and self._rewards is not None:
            self._group_figures.add(batch[PAIR_GROUPS], *self._rewards, training=train_eval == "train")
        return loss, metrics


def tokenize_pairs(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Dataset:
    """Pairs as the tokens that TRL's collator takes, without those that have no token of an answer left.

    Args:
        rows: with prompt, chosen and rejected, as messages or as strings; category and language stay.
        tokenizer: of the model.
        max_length: of a sequence; what is longer loses its end.
        num_proc: how many processes do it.

    Raises:
        UserError: for a row that does not fit the chat template.
    """
    encoder = RowTokenizer(tokenizer, is_conversational(rows[0]), "text", False, True, None)

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            sequences = encoder.encode_pair(row)
        except RowFault as fault:
            raise UserError(f"Pair {index + 1:,} cannot be trained on: {fault.text}.") from fault
        found: dict[str, Any] = {}
        for name, (ids, labels) in sequences.items():
            found[f"{name}_input_ids"], found[f"{name}_labels"] = ids[:max_length], labels[:max_length]
            found[f"{name}_attention_mask"] = [1] * len(ids[:max_length])
        return found

    columns = [name for name in rows.column_names if name not in (CATEGORY, LANGUAGE)]
    tokens = rows.map(encode, with_indices=True, remove_columns=columns, num_proc=num_proc, desc="Tokenizing")
    # Both answers begin at the same token, so that one has none left where the other has none.
    return tokens.filter(lambda row: any(label != IGNORED for label in row["chosen_labels"]))

# SPDX-License-Identifier: Apache-2.0
"""What a reward model gives to answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jai.errors import UserError
from jai.evaluation.progress import counted_progress
from jai.evaluation.reply_cache import Message
from jai.hub import METADATA_PATTERNS, WEIGHTS_PATTERN, local_folder
from jai.tokenization.chat import check_chat
from jai.tokenization.loading import load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console


class RewardModel:
    """A sequence classifier with one label, as TRL's RewardTrainer makes it.

    Args:
        model: folder or Hub id.
        device: such as "cuda:1"; None is a GPU where there is one.
        trust_remote_code: whether its own code may run.

    Raises:
        UserError: if it cannot be loaded, has more labels than one, or no chat template.
    """

    def __init__(self, model: str, *, device: str | None = None, trust_remote_code: bool = False):
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        folder = local_folder(model, [*METADATA_PATTERNS, WEIGHTS_PATTERN])
        self._tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        if self._tokenizer.chat_template is None:
            raise UserError(f"The reward model {model} has no chat template, so it cannot read conversations.")
        check_chat(model, self._tokenizer)
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UserError(
                f"{model} is a LoRA adapter without its model. Train it with `merge_adapter: true` to get a full "
                "checkpoint."
            )
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            vocab_size = config.vocab_size
        except Exception as error:
            raise _cannot_be_loaded(model, error) from error
        if config.num_labels != 1:  # before its weights are loaded
            raise UserError(
                f"{model} has {config.num_labels} labels, where a reward model has one. Give a reward model, such as "
                "the output of `jai reward`."
            )
        if (largest := max(self._tokenizer.get_vocab().values(), default=-1)) >= vocab_size:
            raise UserError(
                f"The tokenizer of {model} has ids up to {largest:,}, and the reward model a vocabulary of "
                f"{vocab_size:,}. Give it the tokenizer that it was trained with."
            )
        try:
            loaded = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=trust_remote_code, dtype="auto"
            )
        except Exception as error:  # of many kinds: OSError, ValueError, JSON's, safetensors', KeyError
            raise _cannot_be_loaded(model, error) from error
        if loaded.config.pad_token_id is None:
            loaded.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    def scores(
        self, conversations: Sequence[Sequence[Message]], *, batch_size: int, console: "Console | None" = None
    ) -> list[float]:
        """The logit of each conversation, which ends with the answer that is scored.

        Args:
            conversations: messages with role and content.
            batch_size: how many at a time.
            console: where progress is shown.

        Raises:
            UserError: if one is no finite number.
        """
        import torch

        ids = [
            self._tokenizer.apply_chat_template(list(map(dict, each)), return_dict=True)["input_ids"]
            for each in conversations
        ]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        scores = [0.0] * len(ids)
        with counted_progress(console, "Scoring", len(ids)) as tell, torch.inference_mode():
            for start in range(0, len(order), batch_size):
                some = order[start : start + batch_size]
                batch = self._tokenizer.pad({"input_ids": [ids[number] for number in some]}, return_tensors="pt")
                logits = self._model(**batch.to(self._model.device)).logits[:, 0].float().tolist()
                for number, score in zip(some, logits):
                    scores[number] = score
                tell(start + len(some))
        if not all(map(torch.isfinite, torch.tensor(scores))):
            raise UserError("The reward model gives rewards that are not finite. Load it in float32, or train it anew.")
        return scores


def _cannot_be_loaded(model: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"The reward model {model} cannot be loaded: {reason}")

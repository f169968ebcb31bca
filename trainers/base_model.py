# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a stage starts from: opened and checked, its weights not read yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig
from trl.chat_template_utils import get_training_chat_template

from jai.configuration_jai import JaiConfig
from jai.errors import UserError
from jai.provenance import Step, read_step
from jai.tokenization.chat import with_chat_template
from jai.tokenization.loading import load_tokenizer
from jai.tokenization.stops import END_OF_TURN
from jai.trainers.arguments import StageConfig
from jai.trainers.data import TrainingData
from jai.trainers.first_look import check_model_files
from jai.trainers.rows import DatasetType

_CHAT_TOKENS = ("<|user|>", "<|assistant|>", END_OF_TURN)


@dataclass(frozen=True)
class BaseModel:
    """The checkpoint that a stage starts from.

    Attributes:
        name: folder or Hub id.
        folder: where its files lie: the folder itself, or the commit's in the Hub's cache.
        loading: what `from_pretrained` needs beside the name: revision and trust_remote_code, and what the stage sets
            in its configuration.
        config: its configuration, as the stage trains it.
        tokenizer: its tokenizer.
        made_by: the step that made it, None where it has no record.
        given_config: its configuration as it was, where the stage has changed it.
    """

    name: str
    folder: Path
    loading: dict[str, Any]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    made_by: Step | None
    given_config: PreTrainedConfig | None = None

    @property
    def is_jai(self) -> bool:
        """Whether it is a JAI, whose classes come from this package and never from the checkpoint."""
        return self.config.model_type == JaiConfig.model_type

    @property
    def loses_mtp(self) -> bool:
        """Whether it has layers for multi-token prediction, which do not learn and are left out."""
        return "num_mtp_layers" in self.loading

    def file(self, name: str) -> Path | None:
        """A small file of the checkpoint, or None where it has no such file."""
        path = self.folder / name
        return path if path.is_file() else None


def open_base_model(model_args: ModelConfig, training_args: StageConfig) -> BaseModel:
    """Read the configuration and the tokenizer of the model to train; its weights are left for the trainer.

    Raises:
        UserError: if the model is not there, is an adapter alone, has no tokenizer, a tokenizer that is larger than
            the model's vocabulary, or a damaged `provenance.json`.
    """
    folder = check_model_files(model_args.model_name_or_path, model_args.model_revision)
    name = str(model_args.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=training_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model {name} cannot be loaded: {_first_line(error)} Give an existing checkpoint folder, or a Hub id."
        ) from error
    tokenizer = load_tokenizer(folder, trust_remote_code=training_args.trust_remote_code)
    if tokenizer.eos_token is None:
        raise UserError(
            f"The tokenizer of {name} has no end-of-text token, which ends every example. Set `eos_token` in its "
            "tokenizer_config.json."
        )
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"The tokenizer of {name} has ids up to {largest}, but the model has a vocabulary of {config.vocab_size}. "
            f"Convert its phi-3 base again with `jai convert BASE OUT --tokenizer {name}`, which makes rows for all of "
            "them; training never resizes a vocabulary."
        )
    loading: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
    }
    is_jai = config.model_type == JaiConfig.model_type
    if is_jai and config.num_mtp_layers and not getattr(training_args, "mtp_weight", 0):
        config.num_mtp_layers = loading["num_mtp_layers"] = None
    return BaseModel(name, folder, loading, config, tokenizer, read_step(folder))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def prepare_chat(base: BaseModel, data: TrainingData, training_args: StageConfig) -> None:
    """See to it that the tokenizer can render the data's conversations.

    The template in `chat_template_path` is put into the tokenizer; a tokenizer with phi-3's special tokens and no
    template gets JAI's.

    Raises:
        UserError: if there is no template, `eos_token` is no token, the loss is to be taken on completions that there
            are not, or the template does not mark the assistant's turns
            where the loss needs it.
    """
    tokenizer = base.tokenizer
    assistant_only_loss = getattr(training_args, "assistant_only_loss", False)
    chat_template_path = getattr(training_args, "chat_template_path", None)
    if chat_template_path is not None:
        if not Path(chat_template_path).is_file():
            raise UserError(
                f"`chat_template_path` names {chat_template_path}, which is not a file. Give a .jinja file; templates "
                "of other models are not taken over, because their tokens would resize the vocabulary."
            )
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        cast(SFTConfig, training_args).chat_template_path = None  # the tokenizer has it now
    if (end := getattr(training_args, "eos_token", None)) is not None:
        if end not in tokenizer.get_vocab():
            raise UserError(f"`eos_token` is {end!r}, which the vocabulary of {base.name} does not have.")
        tokenizer.eos_token = end
    if getattr(training_args, "completion_only_loss", None) and data.type is not DatasetType.PROMPT_COMPLETION:
        advice = "For conversations set `assistant_only_loss: true`" if data.conversational else "Leave it out"
        raise UserError(
            f"`completion_only_loss` is on, and {data.name} has no `prompt` and `completion`: the loss would be taken "
            f"on every token. {advice}, or give data with these columns."
        )
    if not data.conversational:
        if assistant_only_loss:
            raise UserError(
                f"`assistant_only_loss` is on, but {data.name} holds plain strings. Switch it off, or give data with "
                "`messages`."
            )
        return
    if tokenizer.chat_template is None:
        missing = [token for token in _CHAT_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"{data.name} holds conversations, but the tokenizer of {base.name} has no chat template, and lacks "
                f"{', '.join(missing)} of phi-3's. Set `chat_template_path` to a .jinja file made for its tokens."
            )
        with_chat_template(tokenizer)
    if assistant_only_loss:
        try:
            get_training_chat_template(tokenizer)  # None, or a marked variant of a template that TRL knows
        except ValueError:
            raise UserError(
                f"`assistant_only_loss` needs {{% generation %}} marks in the chat template, and the one of "
                f"{base.name} has none. Set `chat_template_path` to a marked template (JAI's is "
                "tokenization/chat_template.jinja), or `assistant_only_loss: false`."
            ) from None

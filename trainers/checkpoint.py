# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a stage starts from, and the one that it leaves."""

import json
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.utils import cached_file
from trl import ModelConfig
from trl.chat_template_utils import get_training_chat_template

from jai.configuration_jai import AUTO_MAP, JaiConfig
from jai.errors import UserError
from jai.tokenization.chat import with_chat_template
from jai.trainers.data import TrainingData
from jai.version import __version__

RECORD_FILE = "training.json"
CONVERSION_FILE = "conversion.json"
LOGS_FOLDER = "training_logs"
END_OF_TURN = "<|end|>"
_CHAT_TOKENS = ("<|user|>", "<|assistant|>", END_OF_TURN)

# TRL and transformers set these for the training; the model that comes out has the values that went in.
_TRAINING_ONLY = ("use_cache", "output_router_logits", "router_aux_loss_coef")


@dataclass(frozen=True)
class Source:
    """The checkpoint that a stage starts from.

    Attributes:
        name: folder or Hub id.
        loading: what `from_pretrained` needs beside the name: revision and trust_remote_code.
        config: its configuration.
        tokenizer: its tokenizer.
    """

    name: str
    loading: dict[str, Any]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def is_jai(self) -> bool:
        """Whether it is a JAI, whose classes come from this package and never from the checkpoint."""
        return self.config.model_type == JaiConfig.model_type

    def file(self, name: str) -> Path | None:
        """A small file of the checkpoint, or None where it has no such file."""
        found = cached_file(
            self.name,
            name,
            revision=self.loading["revision"],
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def open_source(model_args: ModelConfig, training_args: TrainingArguments) -> Source:
    """Read the configuration and the tokenizer of the model to train; its weights are left for the trainer.

    Raises:
        UserError: if the model is not there, is an adapter alone, has no tokenizer, or a tokenizer that is larger than
            the model's vocabulary.
    """
    name = model_args.model_name_or_path
    if not name:
        raise UserError("No model is given. Set `model_name_or_path` to a checkpoint folder or a Hub id.")
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(
                f"{name} has no config.json"
                + (
                    ": it is a LoRA adapter without its model. Train the earlier stage with `merge_adapter: true`, and "
                    "give its output here."
                    if (folder / "adapter_config.json").exists()
                    else ", so it is no checkpoint. Give a folder that `jai convert` or an earlier stage wrote."
                )
            )
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{name} has no safetensors weights. Give a folder that holds a whole checkpoint.")
    else:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise UserError(
                f"The model folder {name} does not exist. Give an existing checkpoint folder, or a Hub id (owner/name)."
            ) from None
    loading = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **loading)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model {name} cannot be loaded: {_first_line(error)} Give an existing checkpoint folder, or a Hub id."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **loading)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The model {name} has no tokenizer that can be loaded ({_first_line(error)}). Convert it with "
            "`jai convert --tokenizer`, or put the tokenizer's files into its folder."
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"The tokenizer of {name} has ids up to {largest}, but the model has a vocabulary of {config.vocab_size}. "
            "Convert the model with this tokenizer (`jai convert --tokenizer`); training never resizes a vocabulary."
        )
    return Source(name, loading, config, tokenizer)


def prepare_chat(
    source: Source, data: TrainingData, *, assistant_only_loss: bool = False, chat_template_path: str | None = None
) -> None:
    """See to it that the tokenizer can render the data's conversations.

    A tokenizer with phi-3's special tokens and no template gets JAI's.

    Raises:
        UserError: if there is no template, or it does not mark the assistant's turns where the loss needs it.
    """
    tokenizer = source.tokenizer
    if chat_template_path is not None:
        if not Path(chat_template_path).is_file():
            raise UserError(
                f"`chat_template_path` names {chat_template_path}, which is no file. Give a .jinja file; templates of "
                "other models are not taken over, because their tokens would resize the vocabulary."
            )
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
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
                f"{data.name} holds conversations, but the tokenizer of {source.name} has no chat template, and lacks "
                f"{', '.join(missing)} of phi-3's. Set `chat_template_path` to a .jinja file made for its tokens."
            )
        with_chat_template(tokenizer)
    if assistant_only_loss:
        try:
            get_training_chat_template(tokenizer)  # None, or a marked variant of a template that TRL knows
        except ValueError:
            raise UserError(
                f"`assistant_only_loss` needs {{% generation %}} marks in the chat template, and the one of "
                f"{source.name} has none. Set `chat_template_path` to a marked template (JAI's is "
                "tokenization/chat_template.jinja), or `assistant_only_loss: false`."
            ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def write_record(
    out: Path, source: Source, data: TrainingData, trainer: Trainer, stage: str, options: dict[str, Any], metrics: dict
) -> None:
    """Complete a saved checkpoint: its configuration as it was, its history, and nothing that belongs to the run alone.

    Args:
        out: the folder that the trainer saved the model in.
        source: the checkpoint that the stage started from; its `training.json`, logs and `conversion.json` come along.
        data: what was trained on.
        trainer: the trainer, after training.
        stage: "sft", "dpo" or "pretrain".
        options: the options worth recording.
        metrics: what `train` returned.
    """
    # It is a pickle, it holds the Hub token if one was given, and nothing needs it.
    (out / "training_args.bin").unlink(missing_ok=True)
    _restore_config(out, source)
    _stop_at_end_of_turn(out, trainer.processing_class)
    if (conversion := source.file(CONVERSION_FILE)) is not None:
        shutil.copyfile(conversion, out / CONVERSION_FILE)

    earlier = source.file(RECORD_FILE)
    records: list[dict[str, Any]] = json.loads(earlier.read_text(encoding="utf-8")) if earlier is not None else []
    (out / LOGS_FOLDER).mkdir(exist_ok=True)
    for record in records:
        if (log := source.file(record["log_history"])) is not None:
            shutil.copyfile(log, out / record["log_history"])
    log_history = f"{LOGS_FOLDER}/{len(records) + 1:02}_{stage}.json"
    _write_json(out / log_history, trainer.state.log_history)
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    device = trainer.args.device
    records.append(
        {
            "stage": stage,
            # Names without folders: the record travels to the Hub, and paths say more than the user may want to.
            "model": {"name": Path(source.name).name if Path(source.name).is_dir() else source.name},
            "dataset": {"name": Path(data.name).name if Path(data.name).exists() else data.name, "rows": data.rows},
            "options": options,
            "metrics": {**metrics, **(evaluations[-1] if evaluations else {})},
            "steps": trainer.state.global_step,
            "hardware": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "processes": trainer.args.world_size,
            },
            "versions": {
                "jai": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")},
            },
            "log_history": log_history,
        }
    )
    _write_json(out / RECORD_FILE, records)


def _restore_config(out: Path, source: Source) -> None:
    path = out / "config.json"
    if not path.exists():  # an adapter alone
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    original = source.config.to_dict()
    config |= {key: original[key] for key in _TRAINING_ONLY if key in original}
    if source.is_jai:
        config["auto_map"] = AUTO_MAP
    _write_json(path, config)


def _stop_at_end_of_turn(out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`generate` must stop where a chat model ends its turn, which for phi-3 is before the end of text."""
    path = out / "generation_config.json"
    if not path.exists() or END_OF_TURN not in (tokenizer.chat_template or ""):
        return
    generation = json.loads(path.read_text(encoding="utf-8"))
    stops = generation.get("eos_token_id") or []
    stops = [stops] if isinstance(stops, int) else stops
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end_of_turn not in stops:
        generation["eos_token_id"] = [*stops, end_of_turn]
        _write_json(path, generation)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

# SPDX-License-Identifier: Apache-2.0
"""What must agree with the model that is trained: its reference, and the checkpoint that a run goes on from.

Both are compared by small files, before any weights are read.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig, PreTrainedTokenizerBase

from jai.errors import UserError
from jai.files import read_json
from jai.tokenization.loading import has_tokenizer, load_tokenizer
from jai.trainers.base_model import BaseModel
from jai.trainers.first_look import check_model_files

# What decides the shapes of weights.
_SHAPES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
)
_ADAPTER_OPTIONS = {
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_dora": "use_dora",
}


def check_reference(name: str, base: BaseModel, *, conversational: bool) -> None:
    """See that a reference reads the same tokens as the model, before the weights of either are read.

    Args:
        name: folder or Hub id of the reference.
        base: the model, whose tokenizer has the chat template that it is trained with.
        conversational: whether the data are rendered by that template.

    Raises:
        UserError: if vocabularies, tokenizers or chat templates differ.
    """
    folder = check_model_files(name)
    trusts = base.loading["trust_remote_code"]
    vocab_size = AutoConfig.from_pretrained(folder, trust_remote_code=trusts).vocab_size
    if vocab_size != base.config.vocab_size:
        raise UserError(
            f"The reference {name} has a vocabulary of {vocab_size:,}, and {base.name} one of "
            f"{base.config.vocab_size:,}: their log-probabilities are not of the same tokens. Give the checkpoint that "
            "the model was trained from."
        )
    reference = load_tokenizer(folder, trust_remote_code=trusts)
    difference = tokenizer_difference(base.tokenizer, reference, template=conversational)
    if difference is not None:
        raise UserError(
            f"The reference {name} reads other tokens than {base.name}: {difference}. Give the checkpoint that the "
            "model was trained from."
        )


def tokenizer_difference(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, template: bool
) -> str | None:
    """How another tokenizer differs from ours, for a message; None where both read the same tokens.

    Args:
        ours: of the model.
        theirs: of a checkpoint that must agree with it.
        template: whether the chat template counts, too; one that is missing is no other one.
    """
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    different = sorted(token for token in vocabulary.keys() | other.keys() if vocabulary.get(token) != other.get(token))
    if different:
        token = different[0]
        ids = [f"is {ids[token]}" if token in ids else "is none" for ids in (other, vocabulary)]
        return f"{len(different):,} tokens differ, such as {token!r}, which {ids[0]} there and {ids[1]} here"
    if template and theirs.chat_template is not None and theirs.chat_template != ours.chat_template:
        return "its chat template is another one"
    return None


def check_resumption(checkpoint: Path, base: BaseModel, lora: LoraConfig | None) -> None:
    """See that the checkpoint that a run goes on from is of the model, the tokenizer and the adapter that it has now.

    Args:
        checkpoint: a folder checkpoint-N.
        base: the model, whose tokenizer has the chat template that it is trained with.
        lora: the adapter, if there is one.

    Raises:
        UserError: if they differ.
    """
    if (checkpoint / "adapter_config.json").is_file():
        if lora is None:
            raise UserError(
                f"{checkpoint} is of a run with an adapter, and `use_peft` is off. Resume with the options of that run."
            )
        adapter = read_json(checkpoint / "adapter_config.json")
        for name, option in _ADAPTER_OPTIONS.items():
            before, now = _plain(adapter.get(name)), _plain(getattr(lora, name, None))
            if before != now and now != "all-linear":  # PEFT writes down which modules those were
                raise UserError(
                    f"{checkpoint} is of a run with another adapter: `{option}` was {before}, and is {now}. Resume "
                    "with the `trainable` and the LoRA options of that run."
                )
    elif (checkpoint / "config.json").is_file():
        if lora is not None:
            raise UserError(
                f"{checkpoint} is of a run without an adapter, and `use_peft` is on. Resume with the options of that "
                "run."
            )
        config = read_json(checkpoint / "config.json")
        for name in _SHAPES:
            before, now = config.get(name), getattr(base.config, name, None)
            if name in config and before != now:
                raise UserError(
                    f"{checkpoint} is of another model than {base.name}: its `{name}` is {before}, and not {now}. Give "
                    "the model that the run began with."
                )
    if has_tokenizer(checkpoint):
        difference = tokenizer_difference(base.tokenizer, load_tokenizer(checkpoint), template=True)
        if difference is not None:
            raise UserError(
                f"{checkpoint} is of a run that read other tokens than {base.name} does: {difference}. Resume with the "
                "model and the `chat_template_path` of that run."
            )


def _plain(value: Any) -> Any:
    """Sets and lists alike, nothing for none."""
    return sorted(value) if isinstance(value, Iterable) and not isinstance(value, str) and value else value or None

# SPDX-License-Identifier: Apache-2.0
"""What an ablation compares: the YAML file of `jai tokenizer ablate`."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.options import option, options_of, read_value, read_yaml, refuse_unknown
from jai.small_model_options import ModelShape, Training
from jai.tokenization.units import Unit, check_script


@dataclass(frozen=True)
class Language:
    """Text of one language."""

    name: str = option(help="As reports show it.")
    texts: list[str] = option([], help="Files, folders or Hub datasets, as `jai tokenizer train` takes them.")
    weight: float = option(
        1.0, help="Its share of the characters that are trained on, against the other languages' weights.", above=0
    )


@dataclass(frozen=True)
class Arm:
    """A tokenizer to compare: the base (only a name), a folder or Hub id (`tokenizer`), or options to train one."""

    name: str = option(help="As reports show it.")
    tokenizer: str | None = option(None, help="A tokenizer that exists.")
    vocab_size: int | None = option(None, help="Of `jai tokenizer train`.", at_least=1)
    unit: Unit = option("run", help="Of `jai tokenizer train`.")
    max_token_chars: int = option(16, help="Of `jai tokenizer train`.", at_least=2)


@dataclass(frozen=True)
class AblationConfig:
    """What `recipes/tokenizer_ablation.yaml` holds; it explains each key."""

    languages: list[Language] = option(help="What is read.")
    arms: list[Arm] = option(help="The tokenizers that are compared; the first is the reference.")
    training: Training = option(help="Of the small phi-3.")
    model: ModelShape = option(ModelShape(), help="The small phi-3.")
    base: str | None = option(None, help="Folder or Hub id of the tokenizer that is extended.")
    script: str = option("Thai", help="Unicode name of the script that arms add.")
    seeds: list[int] = option([0, 1, 2], help="One run of each arm for each.")
    heldout_every: int = option(20, help="Every 20th document is held out.", at_least=2)
    heldout_characters: int = option(60_000, help="Characters of each language to evaluate on.", at_least=1)
    piece_characters: int = option(2_000, help="Longer documents are cut.", at_least=1)

    def __post_init__(self) -> None:
        for part in (self, self.training, self.model, *self.languages, *self.arms):
            for each in options_of(type(part)).values():
                read_value(each, getattr(part, each.name))
        for kind, names in (
            ("languages", [language.name for language in self.languages]),
            ("arms", [arm.name for arm in self.arms]),
            ("seeds", self.seeds),
        ):
            if not names:
                raise UserError(f"The configuration has no {kind}. Give at least one.")
            double = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if double is not None:
                raise UserError(f"The configuration has two {kind} of the name {double!r}. Give each its own.")
        check_script(self.script, "run")
        for arm in self.arms:
            if not arm.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or arm.name.startswith("."):
                raise UserError(f"The arm {arm.name!r} names files. Use letters, digits, '-', '_' and '.'.")
            if arm.tokenizer and arm.vocab_size:
                raise UserError(f"The arm {arm.name} has a tokenizer and options to train one. Give one of the two.")
            if not arm.vocab_size and arm != Arm(arm.name, arm.tokenizer):
                raise UserError(f"The arm {arm.name} has options to train a tokenizer, but no vocab_size. Give one.")
        if self.training.rows < 1:
            raise UserError(
                f"{self.training.tokens} tokens in rows of {self.training.context} and steps of "
                f"{self.training.batch_rows} rows are too few to train on. Give more tokens."
            )
        if self.model.hidden_size % self.model.num_attention_heads:
            raise UserError(
                f"hidden_size {self.model.hidden_size} does not divide into {self.model.num_attention_heads} heads. "
                "Give a multiple."
            )


def read_ablation_config(
    path: Path, base: str | None = None, texts: Mapping[str, Sequence[str]] | None = None
) -> AblationConfig:
    """Parse the YAML of an ablation.

    Args:
        path: YAML file. Paths in it are taken from the current folder.
        base: tokenizer to extend, instead of the file's.
        texts: texts by language, instead of the file's.

    Raises:
        UserError: for a file that cannot be read, unknown keys, values that do not fit, a language that the file does
            not have, or when base or texts are given nowhere.
    """
    config: AblationConfig = _read(AblationConfig, read_yaml(path), str(path))
    unknown = (texts or {}).keys() - {language.name for language in config.languages}
    if unknown:
        known = ", ".join(language.name for language in config.languages)
        raise UserError(f"{path} has no language {sorted(unknown)[0]!r}, but: {known}. Give text for these.")
    languages = [
        Language(language.name, list((texts or {}).get(language.name, language.texts)), language.weight)
        for language in config.languages
    ]
    for language in languages:
        if not language.texts:
            raise UserError(
                f"No {language.name} text is given. Give --text {language.name}=FILE, or `texts` in {path}."
            )
    if not (base or config.base):
        raise UserError(f"No base tokenizer is given. Give --base TOKENIZER, or `base` in {path}.")
    return replace(config, languages=languages, base=base or config.base)


_PARTS = {"languages": Language, "arms": Arm, "training": Training, "model": ModelShape}


def _read(kind: type, values: Any, where: str) -> Any:
    """A dataclass of options from what YAML gave, with the dataclasses inside it."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}. Give options and their values; see recipes/tokenizer_ablation.yaml.")
    known = options_of(kind)
    refuse_unknown(values.keys(), known.keys(), where)
    lacking = [name for name, each in known.items() if each.default is MISSING and name not in values]
    if lacking:
        raise UserError(f"{where} lacks {lacking[0]!r}. See recipes/tokenizer_ablation.yaml.")
    parts = _PARTS if kind is AblationConfig else {}
    read = {}
    for name, value in values.items():
        place = f"{where}: {name}"
        if name in parts and known[name].element is None:
            value = _read(parts[name], value, place)
        elif name in parts:
            if not isinstance(value, list):
                raise UserError(f"{place} is {value!r}; expected a list.")
            value = [_read(parts[name], item, f"{place}[{i}]") for i, item in enumerate(value)]
        try:
            read[name] = read_value(known[name], value)
        except UserError as error:
            raise UserError(f"In {where}, {error}") from None
    return kind(**read)

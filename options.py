# SPDX-License-Identifier: Apache-2.0
"""Options, each written once: the field of a dataclass is the option of the command line, the key of a YAML file, the
check of its value, and a line of docs/options.md.

    @dataclass(kw_only=True)
    class ScaleOptions:
        model: str = argument("CKPT", help="Folder or Hub id.")
        factor: float = option(1.0, help="What every weight is multiplied by.", above=0)

        def __post_init__(self) -> None:
            check_values(self)

The kinds of value are bool, int, float, str, Path, Size, a `Literal`, lists of these, and `X | None`. Numbers are
finite.
"""

import dataclasses
import difflib
import os
import re
import reprlib
import sys
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from jai.errors import UserError
from jai.files import parse_size, read_text

Size = NewType("Size", int)  # bytes; written as a number or as "5GB"

_METADATA_KEY = "jai"
_DEEPEST_YAML = 50  # a curve of a merge has 4 levels; 500 take 12 seconds to be refused
_LONGEST_LIST = 100_000  # numbers that one range on the command line may stand for


@dataclass(frozen=True, kw_only=True)
class OptionInfo:
    """What is known of an option beside its name, its kind and its default.

    Attributes:
        help: one or two sentences.
        metavar: how its value is called in the help; None is the kind's name.
        shown_default: the default in words, where it follows from something else.
        positional: whether it is an argument of the command line, which a YAML file cannot have.
        spread: whether a list's values follow the option, as in `--models A B`, instead of repeating it.
        at_least, above, at_most: the range of a number, or of each number of a list.
        parse: reads the text of the command line; None goes by the kind.
    """

    help: str
    metavar: str | None = None
    shown_default: str | None = None
    positional: bool = False
    spread: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    parse: Callable[[str], Any] | None = None


def option(default: Any = MISSING, *, help: str, **info: Any) -> Any:
    """A field that is an option; `info` is that of `OptionInfo`. A list is a default as it stands."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={_METADATA_KEY: OptionInfo(help=help, **info)})
    return field(default=default, metadata={_METADATA_KEY: OptionInfo(help=help, **info)})


def argument(metavar: str, default: Any = MISSING, *, help: str, **info: Any) -> Any:
    """A field that is a positional argument of the command line."""
    return option(default, help=help, metavar=metavar, positional=True, **info)


@dataclass(frozen=True)
class Option:
    """An option of a dataclass, as `options_of` finds it.

    Attributes:
        name: of the field, and key of a YAML file.
        kind: the type of a value that is not None.
        optional: whether None is a value: it stands for a default that follows from something else.
        default: its default, `MISSING` where it must be given.
        info: the rest.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    info: OptionInfo

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[Any, ...]:
        """Its values, where they can be listed."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def element(self) -> Any:
        """The kind of a list's elements, None where it is no list."""
        return get_args(self.kind)[0] if get_origin(self.kind) is list else None


def options_of(options: type) -> dict[str, Option]:
    """The options of a dataclass by name: its own in their order, then those that it inherits."""
    hints = get_type_hints(options)
    own = [name for owner in options.__mro__ for name in get_annotations(owner)]
    found = {}
    for each in sorted(dataclasses.fields(options), key=lambda each: own.index(each.name)):
        if _METADATA_KEY in each.metadata:
            kind, optional = _without_none(hints[each.name])
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            found[each.name] = Option(each.name, kind, optional, default, each.metadata[_METADATA_KEY])
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return kind, len(kinds) > 1


# --- Values ---


def check_values(options: Any) -> None:
    """Check every option of a dataclass instance, and turn the forms that YAML has for a value into the value.

    Raises:
        UserError: naming the option, what it is and what was expected.
    """
    for name, each in options_of(type(options)).items():
        setattr(options, name, read_value(each, getattr(options, name)))


def read_value(option: Option, given: Any) -> Any:
    """A value of the option's kind, from what a caller or a YAML file gives.

    Raises:
        UserError: naming the option, what it is and what was expected.
    """
    if given is None and option.optional:
        return None
    try:
        if option.element is None:
            return _read_one(option, option.kind, given)
        if not isinstance(given, list | tuple):
            if not isinstance(given, str) or option.element is str:
                raise ValueError
            given = option_text_parser(option)(given)
        return [_read_one(option, option.element, value) for value in given]
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{option.name} is {_shown(given)}; expected {expected_text(option)}.") from None


def _read_one(option: Option, kind: Any, given: Any) -> Any:
    value = _converted(kind, given)
    if get_origin(kind) is Literal:
        fits = isinstance(value, str) and value in get_args(kind)
    elif kind in (int, float):
        fits = type(value) is kind and _in_range(option, value)  # True is an int to isinstance
    else:
        fits = kind is Any or isinstance(value, int if kind is Size else kind)
    if not fits:
        raise ValueError
    return value


def _converted(kind: Any, given: Any) -> Any:
    """The forms that YAML has for a value; anything else as it is."""
    if kind is Size and type(given) in (int, str):
        return parse_size(str(given))
    if kind is Path and isinstance(given, str | Path):
        return Path(os.path.expanduser(given))  # a shell leaves `--out=~/model` as it is, and YAML has no shell
    # YAML 1.1 reads 1e-5, which has no point, as a string.
    is_exponent = isinstance(given, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", given)
    return float(given) if kind is float and (type(given) is int or is_exponent) else given


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number that a float can hold; True is none."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _in_range(option: Option, number: float) -> bool:
    info = option.info
    return (
        is_number(number)
        and (info.at_least is None or number >= info.at_least)
        and (info.above is None or number > info.above)
        and (info.at_most is None or number <= info.at_most)
    )


def _shown(value: Any) -> str:
    """A value for a message: a few lines of YAML can make one that would fill the memory as text."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxlong = short.maxother = 200
    return short.repr(value)


# What a value is, and an example of it.
_KIND_TEXTS = {
    bool: ("true or false", ""),
    int: ("a whole number", ""),
    float: ("a number", ""),
    str: ("text", ""),
    Path: ("a path", ""),
    Size: ("a size", "such as 500MB, 2GiB or a number of bytes"),
}
_LIST_TEXTS = {
    int: ("a list of whole numbers", "such as [1, 2, 1]"),
    float: ("a list of numbers", "such as [0.7, 0.3]"),
    str: ("a list of names", ""),
    Any: ("a list", ""),
}
_COMMAND_LINE_LIST_TEXTS = {
    int: ("whole numbers with commas between", "such as 1,2,1 or 0-3,2-5"),
    float: ("numbers with commas between", "such as 0.7,0.3"),
    Any: ("numbers with commas between", "such as 0.7,0.3"),
}


def expected_text(option: Option, *, on_command_line: bool = False) -> str:
    """What values an option takes, for people."""
    if option.choices:
        return f"one of {', '.join(option.choices)}"
    if option.element is None:
        text, example = _KIND_TEXTS.get(option.kind, ("a number", ""))
    else:
        texts = _COMMAND_LINE_LIST_TEXTS if on_command_line else _LIST_TEXTS
        text, example = texts[option.element]
    info = option.info
    bounds = [
        f" {words} {bound}"
        for words, bound in (("from", info.at_least), ("above", info.above), ("up to", info.at_most))
        if bound is not None
    ]
    return "".join([text, *bounds, f", {example}" if example else ""])


def default_text(option: Option) -> str:
    """The default of an option for people, empty where it has none."""
    if option.info.shown_default is not None:
        return option.info.shown_default
    if any(option.default is nothing for nothing in (MISSING, None, False)) or option.default == []:
        return ""
    if option.default is True:
        return "on"
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def option_text_parser(option: Option) -> Callable[[str], Any]:
    """Reads an option's value as the command line writes it, where that is more than a word."""
    if option.info.parse is not None:
        return option.info.parse
    return {int: parse_integers, float: parse_numbers}[option.element]


def parse_integers(text: str) -> list[int]:
    """Whole numbers and ranges with both ends.

    >>> parse_integers("0-3,2-5")
    [0, 1, 2, 3, 2, 3, 4, 5]
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        listed = range(int(first), int(last or first) + 1)
        if not 0 < len(listed) <= _LONGEST_LIST:
            raise ValueError
        numbers += listed
    return numbers


def parse_numbers(text: str) -> list[float]:
    """Numbers with commas between.

    >>> parse_numbers("0.7,0.3")
    [0.7, 0.3]
    """
    return [float(part) for part in text.split(",")]


# --- YAML ---


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of options: keys and values, no key twice.

    Raises:
        UserError: if there is no such file, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"The configuration file {path} does not exist. Give the path of a YAML file.")
    import yaml  # here, for `jai --help` needs none

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML would keep the last in silence, and deep nesting."""

        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            self.depth += 1
            if self.depth > _DEEPEST_YAML:
                raise yaml.composer.ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    def construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            mapping[key] = loader.construct_object(value_node, deep=True)
        return mapping

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct_mapping)
    try:
        values = yaml.load(read_text(path), Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} is not a list of options. Write one option a line, as in `seed: 0`.")
    return values


def refuse_unknown(
    names: Collection[str], known: Collection[str], where: str, renamed: Mapping[str, str] | None = None
) -> None:
    """Refuse names that are no options, with the one that was probably meant.

    Args:
        names: that were given.
        known: all that there are.
        where: they were given, for the message.
        renamed: of names that once were options, what is to be given today.

    Raises:
        UserError: naming the first.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        with_underscores = unknown[0].replace("-", "_")
        close = difflib.get_close_matches(with_underscores, known, n=1)
        advice = f"Known are: {', '.join(sorted(known))}." if len(known) <= 100 else "`--help` lists them all."
        if unknown[0] in (renamed or {}):
            advice = f"Today it is {(renamed or {})[unknown[0]]}."
        elif with_underscores in known:
            advice = f"Did you mean {with_underscores!r}?"
        elif len(unknown) > max(1, len(set(names)) // 2):
            count = f"{len(unknown)} of its {len(set(names))} options"
            advice = f"{count} are unknown here: is it meant for another command?"
        elif close:
            advice = f"Did you mean {close[0]!r}?"
        raise UserError(f"{where} has the option {unknown[0]!r}, which does not exist. {advice}")


def read_options_file(path: Path, options: type) -> dict[str, Any]:
    """The values of a YAML file, each checked against its option.

    Raises:
        UserError: as `read_yaml`; for a key that is no option, and for a value that is none of its option's.
    """
    known = {name: each for name, each in options_of(options).items() if not each.info.positional}
    values = read_yaml(path)
    refuse_unknown(values.keys(), known.keys(), str(path))
    try:
        return {name: read_value(known[name], value) for name, value in values.items()}
    except UserError as error:
        raise UserError(f"In {path}, {error}") from None

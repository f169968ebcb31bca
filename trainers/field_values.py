# SPDX-License-Identifier: Apache-2.0
"""Values from YAML for the fields of TRL's and transformers' dataclasses, which check few of them.

`jai.options` reads the values of options that are ours, with one kind each. Here a field may be a `SchedulerType | str`
or a `dict | str | None`, and the words of the command line are values too.
"""

import difflib
import json
import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jai.errors import UserError

# YAML 1.1 reads these words as true and false, and so does transformers' command line.
_SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Fields of other kinds that have a switch among their values.
_SWITCHES: dict[str, dict[bool, Any]] = {
    "resume_from_checkpoint": {True: "true", False: "false"},
    "fsdp": {True: True, False: False},
    "report_to": {False: "none"},
}
_WORDS_BESIDE_NUMBERS = {"pad_to_multiple_of": "auto"}
_FIELDS_OF_JSON_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
_KIND_TEXTS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


def read_field(name: str, value: Any, hint: Any, choices: Sequence[Any] | None) -> Any:
    """A value as the field's type wants it.

    `no`, which YAML reads as false, is the word where the field has it, and 1e-4, which YAML reads as text, the number.

    Args:
        name: of the field.
        value: from YAML or the command line.
        hint: type of the field.
        choices: the field's values, where its metadata list them.

    Raises:
        UserError: naming the field, what it is and what was expected.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    if isinstance(value, bool) and value in _SWITCHES.get(name, {}):
        return _SWITCHES[name][value]
    if isinstance(value, str) and (
        value == _WORDS_BESIDE_NUMBERS.get(name) or (name in _FIELDS_OF_JSON_FILES and Path(value).is_file())
    ):
        return value
    # In `SchedulerType | str`, `dict | str` and `int | str`, text is how the command line writes the other.
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    written_as_text = any((get_origin(kind) or kind) in (dict, int) for kind in kinds)
    others = [kind for kind in kinds if kind is not NoneType and not (kind is str and written_as_text)]
    for kind in enums or sorted(others, key=lambda kind: kind is str):  # all text is text, so that comes last
        try:
            read = _read_kind(value, kind)
        except (ValueError, TypeError, OverflowError):  # the last for an integer that no float can hold
            continue
        if choices is None or read in choices:
            return read
    names = choices or [member.value for kind in enums for member in kind]
    expected = f"one of {', '.join(names)}" if names else " or ".join(dict.fromkeys(map(_kind_text, others)))
    close = difflib.get_close_matches(str(value), names, n=1)
    advice = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"`{name}` is {_shown(value)}; expected {expected}.{advice}")


def _read_kind(value: Any, kind: Any) -> Any:
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        return [_read_kind(item, element) for item in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        return get_args(kind)[get_args(kind).index(value)]
    kind = get_origin(kind) or kind
    if kind is bool and str(value).lower() in _SWITCH_WORDS:
        return _SWITCH_WORDS[str(value).lower()]
    if kind is int and type(value) in (int, str):
        return int(value)
    if kind is float and type(value) in (int, float, str) and math.isfinite(float(value)):
        return float(value)
    if issubclass(kind, Enum):
        return kind("no" if value is False else value).value
    if kind is dict and isinstance(value, str):
        return _read_kind(json.loads(value), dict)
    if kind not in (bool, int, float) and isinstance(value, kind):
        return value
    raise TypeError


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list, each {_kind_text(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(str(value).lower() for value in get_args(kind))
    kind = get_origin(kind) or kind
    return _KIND_TEXTS.get(kind, kind.__name__)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value)

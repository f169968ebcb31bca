# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that a stage trains, by name, and the parameters that they are.

A part is whole parameters, or entries of one along its first dimension: the rows of new tokens in the embeddings, the
experts after the first in a layer's experts.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from jai.errors import UserError
from jai.options import parse_integers

ALL = "all"
PART_TEXTS = {
    ALL: "every weight (not with `use_peft`)",
    "attention": "its projections",
    "experts": "the experts, or a dense model's MLP",
    "router": "the routers",
    "alphas": "the skip alphas",
    "new_rows": "the rows of new tokens, in the embeddings and in the head",
    "new_layers": "every weight of the added copies of repeated layers",
    "new_experts": "the experts after the first",
}
PARTS = tuple(PART_TEXTS)

# What conversion makes to be taught.
NEW_PARTS = ("router", "alphas", "new_rows")
# What learns with `use_peft` where nothing is said.
ADAPTER_PARTS = ("attention", "experts", *NEW_PARTS)

# Kinds of parameters, beside the parts of the same name.
EMBEDDINGS, NEW_ROWS, TASK_HEAD, OTHER = "embeddings", "new_rows", "task_head", "other"
KIND_TEXTS = {
    "attention": "attention",
    "experts": "experts (or MLP)",
    "router": "routers",
    "alphas": "skip alphas",
    NEW_ROWS: "rows of new tokens",
    EMBEDDINGS: "other rows of embeddings and head",
    TASK_HEAD: "task head",
    OTHER: "norms and the rest",
}

IN_PEFT = "base_model.model."  # what PEFT puts before the name of a parameter

_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<inner>.+)")
_WHY_MISSING = {
    "experts": "it has no feed-forward layers under the name `mlp`",
    "router": "it is dense, with one expert and no router",
    "alphas": "it has no skip alphas that can learn (no layer is repeated, or `skip_alpha_trainable` is false)",
    "new_layers": "it repeats no layer",
    "new_experts": "it is dense, with one expert",
}

Entries = tuple[range, ...]  # along the first dimension, in ascending order, apart from each other


@dataclass(frozen=True)
class TrainableParts:
    """What of a model learns.

    Attributes:
        names: the parts.
        entries: the parameters that learn, by name: which entries along the first dimension, None for all of them.
        new_rows: ids of the new tokens, None where they are not known.
    """

    names: tuple[str, ...]
    entries: Mapping[str, Entries | None]
    new_rows: Entries | None = field(default=None)

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.entries

    def masked(self, in_adapter: bool) -> list[str]:
        """The parameters whose gradient is cleared in part. New rows in an adapter are none: PEFT keeps them apart."""
        return [
            name
            for name, entries in self.entries.items()
            if entries is not None and not (in_adapter and entries == self.new_rows)
        ]


def check_part_names(names: Iterable[str]) -> None:
    """Refuse names that are no parts.

    Raises:
        UserError: for the first, with the one that was probably meant.
    """
    for name in names:
        if name not in PARTS:
            close = difflib.get_close_matches(name, PARTS, n=1)
            advice = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"`trainable` names {name!r}; expected some of {', '.join(PARTS)}.{advice}")


def read_entries(text: str, option: str) -> Entries:
    """Ranges of ids, from text such as "32064-63999" or "32000,32064-63999".

    Raises:
        UserError: naming the option, if it is something else.
    """
    try:
        return _as_ranges(parse_integers(text))
    except ValueError:
        raise UserError(f"`{option}` is {text!r}; expected ids of tokens, such as 32064-63999.") from None


def count_entries(entries: Entries) -> int:
    return sum(map(len, entries))


def select_parts(
    names: Sequence[str], model: PreTrainedModel, new_rows: Entries | None, *, required: bool = True
) -> TrainableParts:
    """Find the parameters of parts.

    Args:
        names: of the parts.
        model: any causal language model; weights are not read, so that it may be on the meta device.
        new_rows: ids of the new tokens, None where they are not known.
        required: whether a part that the model does not have is an error; if not, it is left out.

    Raises:
        UserError: for a part that the model does not have, and for new rows that are not known or not there.
    """
    rows = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if new_rows and new_rows[-1][-1] >= rows:
        raise UserError(
            f"`new_row_ids` goes up to {new_rows[-1][-1]}, and the model has rows 0 to {rows - 1}. Give ids of its "
            "tokens."
        )
    kinds = part_kinds(model)
    # A head for another task than language is drawn at random: without learning it is of no use.
    selected: dict[str, Entries | None] = {name: None for name, kind in kinds.items() if kind == TASK_HEAD}
    found = []
    for part in names:
        of_part = dict(_entries_of(part, model, kinds, new_rows))
        if of_part:
            found.append(part)
        elif required:
            why = _why_no_new_rows(new_rows) if part == "new_rows" else _WHY_MISSING.get(part, "it has none")
            raise UserError(f"`trainable` names {part}, and there is none in this model: {why}. Leave it out.")
        for name, entries in of_part.items():
            selected[name] = _united(selected[name], entries) if name in selected else entries
    return TrainableParts(tuple(found), selected, new_rows)


def part_kinds(model: PreTrainedModel) -> dict[str, str]:
    """The kind of every parameter of a model, by name (`kind_of`)."""
    return {name: kind_of(name, model) for name, _ in model.named_parameters()}


def kind_of(parameter: str, model: PreTrainedModel) -> str:
    """The kind of a parameter: "attention", "experts", "router", "alphas", `EMBEDDINGS`, `TASK_HEAD` or `OTHER`.

    Args:
        parameter: its name in the model, or that of what PEFT has put in its place.
        model: the model, with or without PEFT's modules in it.
    """
    name = parameter.removeprefix(IN_PEFT)
    if match := _LAYER.fullmatch(name):
        return _kind_in_layer(match["inner"])
    for embedding in _embedding_modules(model):
        if name.startswith(f"{embedding}."):
            return EMBEDDINGS
    return OTHER if name.startswith(f"{model.base_model_prefix}.") else TASK_HEAD


@functools.lru_cache(maxsize=8)
def _embedding_modules(model: PreTrainedModel) -> tuple[str, ...]:
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    return tuple(name for name, module in model.named_modules() if module in embeddings)


def _kind_in_layer(inner: str) -> str:
    if inner == "skip_alpha":
        return "alphas"
    if "norm" in inner:
        return OTHER
    if inner.startswith("mlp.gate."):
        return "router"
    return "attention" if "attn" in inner else "experts" if inner.startswith("mlp.") else OTHER


def without_layer(name: str) -> str:
    """The name inside of its layer: model.layers.3.self_attn.q_proj is self_attn.q_proj."""
    match = _LAYER.fullmatch(name)
    return match["inner"] if match else name


def later_copies(config: PreTrainedConfig) -> frozenset[int]:
    """The layers that are not the first copy of their block; none for a model that is no JAI."""
    return frozenset(planned.layer for planned in getattr(config, "running_plan", ()) if planned.copy > 0)


def _entries_of(
    part: str, model: PreTrainedModel, kinds: Mapping[str, str], new_rows: Entries | None
) -> Iterator[tuple[str, Entries | None]]:
    new_layers = later_copies(model.config)
    for name, parameter in model.named_parameters():
        match = _LAYER.fullmatch(name)
        if part in (ALL, kinds[name]) or (part == "new_layers" and match and int(match["layer"]) in new_layers):
            yield name, None
        elif part == "new_rows" and kinds[name] == EMBEDDINGS and new_rows:
            yield name, new_rows
        elif part == "new_experts" and kinds[name] == "experts" and parameter.ndim == 3 and len(parameter) > 1:
            yield name, (range(1, len(parameter)),)


def _why_no_new_rows(new_rows: Entries | None) -> str:
    if new_rows is None:
        return "no record says which of its rows are new (`new_row_ids` can, as in 32064-63999)"
    return "its conversion kept the base's vocabulary"


def _united(one: Entries | None, other: Entries | None) -> Entries | None:
    return None if one is None or other is None else _as_ranges(chain(*one, *other))


def _as_ranges(numbers: Iterable[int]) -> Entries:
    runs: list[range] = []
    for number in sorted(set(numbers)):
        if number < 0:
            raise ValueError
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return tuple(runs)

# SPDX-License-Identifier: Apache-2.0
"""The loss of each category and each language, in the logs of one and the same training.

TRL drops every column but the tokens, and packing puts rows of all categories into one sequence. So a document is known
by its tokens: their hash is looked up in a table that is made before training.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from jai.trainers.arguments import StageConfig, max_length_of
from jai.trainers.data import CATEGORY, LANGUAGE, TrainingData

_ATTRIBUTES = (CATEGORY, LANGUAGE)
Group: TypeAlias = tuple[str | None, ...]  # a row's category and language


class GroupLosses:
    """Sums up the losses of tokens by the category and the language of their document, until `pop` reads them.

    Documents are found by where positions begin anew (packed without padding) or by the attention mask (padded). Of two
    documents with the same tokens the first decides the group of both.
    """

    def __init__(self, data: TrainingData, training: StageConfig):
        """
        Args:
            data: tokenised, with the columns `category` and `language`, or one of them.
            training: TRL's options, which decide what of a document is trained on.
        """
        self._groups: list[Group] = []
        self._group_of: dict[bytes, int] = {}
        # training? -> (2, groups + 1): losses and tokens; the last group is of documents that are not known
        self._sums: dict[bool, torch.Tensor] = {}
        numbers: dict[Group, int] = {}
        packing = getattr(training, "packing", False)
        eval_packing = getattr(training, "eval_packing", None)
        for rows, packs in (
            (data.train, packing),
            (data.evaluation, packing if eval_packing is None else eval_packing),
        ):
            if isinstance(rows, Dataset):
                names = [name for name in _ATTRIBUTES if name in rows.column_names]
                for row in rows.select_columns(["input_ids", *names]):
                    group = tuple(row.get(name) for name in _ATTRIBUTES)
                    number = numbers.setdefault(group, len(numbers))
                    for ids in _as_trained(np.asarray(row["input_ids"], dtype=np.int64), training, packs):
                        self._group_of.setdefault(_key(ids), number)
        self._groups = list(numbers)

    @staticmethod
    def can_tell(data: TrainingData, training: StageConfig) -> bool:
        """Whether there are groups, and documents that keep their ends: `wrapped` packing takes those away."""
        is_wrapped = getattr(training, "packing", False) and getattr(training, "packing_strategy", "") == "wrapped"
        has_groups = isinstance(data.train, Dataset) and bool({*_ATTRIBUTES} & {*data.train.column_names})
        return has_groups and not is_wrapped and "input_ids" in (data.train.column_names or [])

    def watch(self, model: nn.Module) -> None:
        """Read the losses of a model's forward passes with `fused_lm_head`, which is TRL's SFT."""
        model.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None:
            return
        with torch.no_grad():
            groups = self._token_groups(kwargs)[:, : log_probs.shape[1]].to(log_probs.device)
            values = torch.stack([-log_probs.detach().float(), output.label_mask.float()]).flatten(1)
            sums = values.new_zeros(2, len(self._groups) + 1).index_add_(1, groups.flatten(), values)
        before = self._sums.get(model.training)
        self._sums[model.training] = sums if before is None else before + sums

    def _token_groups(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """The group of each token, the number of groups where it is not known. Shape (batch, tokens)."""
        ids = kwargs["input_ids"].cpu().numpy()
        groups = np.full(ids.shape, len(self._groups), dtype=np.int64)
        for row, start, end in _documents(kwargs):
            groups[row, start:end] = self._group_of.get(_key(ids[row, start:end]), len(self._groups))
        return torch.from_numpy(groups)

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> dict[str, float]:
        """Mean losses per token since the last call, as logging keys. All ranks must call it together.

        `loss/category/chat` and `loss/language/th` are means over the labelled tokens of those documents, whatever
        packing and accumulation did with them. Documents without a category or a language are in none.

        Args:
            reduce: sums a tensor over the ranks.
            training: of training, or else of evaluation.
        """
        sums = self._sums.pop(training, None)
        if sums is None:
            return {}
        losses, tokens = reduce(sums)[:, :-1].cpu().double()
        return {f"loss/{name}": mean for name, mean in means_of_groups(self._groups, losses, tokens)}


def means_of_groups(groups: Sequence[Group], sums: torch.Tensor, counts: torch.Tensor) -> Iterator[tuple[str, float]]:
    """The mean of each category and of each language, by names such as `category/chat`.

    Args:
        groups: what the places in both tensors stand for.
        sums: of what the mean is taken of. Shape (groups,).
        counts: what it is divided by; what has none is left out. Shape (groups,).
    """
    for index, name in enumerate(_ATTRIBUTES):
        for value in sorted({group[index] for group in groups if group[index] is not None}, key=str):
            members = [number for number, group in enumerate(groups) if group[index] == value]
            if count := counts[members].sum().item():
                yield f"{name}/{value}", sums[members].sum().item() / count


def _as_trained(ids: np.ndarray, training: StageConfig, packing: bool) -> Iterator[np.ndarray]:
    """The parts of a document that training sees: cut off, or split, as packing and `max_length` say."""
    limit = max_length_of(training)
    if limit is None:
        yield ids
    elif packing and getattr(training, "packing_strategy", "") == "bfd_split":
        yield from (ids[start : start + limit] for start in range(0, len(ids), limit))
    elif not packing and getattr(training, "truncation_mode", "keep_start") == "keep_end":
        yield ids[-limit:]
    else:
        yield ids[:limit]


def _documents(kwargs: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of each document in a batch."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        yield from ((row, 0, int(length)) for row, length in enumerate(mask.sum(1).tolist()))
        return
    assert positions is not None
    for row, position_ids in enumerate(positions.cpu().numpy()):
        starts = np.flatnonzero(position_ids == 0)
        yield from ((row, int(start), int(end)) for start, end in zip(starts, [*starts[1:], len(position_ids)]))


def _key(ids: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()

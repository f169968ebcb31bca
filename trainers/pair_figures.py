# SPDX-License-Identifier: Apache-2.0
"""Margins and accuracies of preference pairs by category and language, in the logs of one and the same training.

A pair keeps the number of its group beside its tokens, from the rows to the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig

from jai.trainers.arguments import StageConfig
from jai.trainers.data import CATEGORY, LANGUAGE, TrainingData
from jai.trainers.group_losses import Group, means_of_groups
from jai.trainers.rows import DatasetType

PAIR_GROUPS = "pair_groups"  # in a batch: the number of each pair's group


class PairFigures:
    """Sums up what pairs are told apart by, until `pop` reads it.

    Args:
        data: with the columns `category` and `language`, or one of them.
    """

    def __init__(self, data: TrainingData):
        numbers: dict[Group, int] = {}
        for rows in (data.train, data.evaluation):
            if isinstance(rows, Dataset):
                columns = [_values(rows, name) for name in (CATEGORY, LANGUAGE)]
                for group in zip(*columns):
                    numbers.setdefault(group, len(numbers))
        self._numbers = numbers
        # training? -> (3, groups + 1): margins, pairs whose chosen answer has the higher reward, pairs; the last group
        # is of rows that were not there
        self._sums: dict[bool, torch.Tensor] = {}

    @staticmethod
    def can_tell(data: TrainingData, training: StageConfig) -> bool:
        """Whether they are pairs with a category or a language, whose implicit rewards are sums over tokens."""
        has_groups = isinstance(data.train, Dataset) and bool({CATEGORY, LANGUAGE} & {*data.train.column_names})
        has_rewards = not isinstance(training, RewardConfig) and getattr(training, "ld_alpha", None) is None
        return data.type is DatasetType.PREFERENCE and has_groups and has_rewards

    def number_of(self, row: dict[str, Any]) -> int:
        """The number of a row's group, the number of groups where it is not known."""
        return self._numbers.get((row.get(CATEGORY), row.get(LANGUAGE)), len(self._numbers))

    def add(self, groups_B: torch.Tensor, chosen_B: torch.Tensor, rejected_B: torch.Tensor, *, training: bool) -> None:
        """Count a batch.

        Args:
            groups_B: the number of each pair's group.
            chosen_B, rejected_B: the implicit rewards of both answers.
            training: whether it is a batch of training, or else of evaluation.
        """
        margins_B = (chosen_B - rejected_B).detach().float()
        values = torch.stack([margins_B, (margins_B > 0).float(), torch.ones_like(margins_B)])
        sums = values.new_zeros(3, len(self._numbers) + 1).index_add_(1, groups_B.to(values.device), values)
        before = self._sums.get(training)
        self._sums[training] = sums if before is None else before + sums

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> dict[str, float]:
        """Means since the last call, as logging keys. All ranks must call it together.

        `rewards/margins/category/chat` is the mean difference of the rewards of those pairs, in nats times beta, and
        `rewards/accuracies/language/th` the share of those pairs whose chosen answer has the higher one. Pairs without
        a category or a language are in none.

        Args:
            reduce: sums a tensor over the ranks.
            training: of training, or else of evaluation.
        """
        sums = self._sums.pop(training, None)
        if sums is None:
            return {}
        margins, right, pairs = reduce(sums)[:, :-1].cpu().double()
        groups = list(self._numbers)
        return {
            f"rewards/{figure}/{name}": mean
            for figure, values in (("margins", margins), ("accuracies", right))
            for name, mean in means_of_groups(groups, values, pairs)
        }


def _values(rows: Dataset, name: str) -> Sequence[str | None]:
    if name not in rows.column_names:
        return [None] * len(rows)
    return list(rows.select_columns([name]).to_dict()[name])


@dataclass(frozen=True)
class GroupingCollator:
    """A trainer's collator whose batches also have the number of each pair's group."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    figures: PairFigures

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([self.figures.number_of(row) for row in rows])
        return {**self.collator(rows), PAIR_GROUPS: numbers}

# SPDX-License-Identifier: Apache-2.0
"""Verbs that make preference data, and judge data by a model of preferences."""

import typer

from jai.cli.verb import verb
from jai.preferences.options import DifficultyOptions, PairsOptions, ScoreOptions

app = typer.Typer()


@verb(
    app,
    PairsOptions,
    config="recipes/pairs.yaml",
    examples=(
        "jai pairs prompts.jsonl pairs --model sft --by reward --reward-model reward",
        "jai pairs prompts.jsonl pairs --model sft --judge-model gpt-4o-2024-08-06 \\\n    --judge-url https://api.openai.com/v1",
    ),
)
def pairs(options: PairsOptions) -> None:
    """Make preference pairs from a model's own answers.

    The best of several answers to each prompt is paired with the worst. If interrupted, run the same command
    again to resume."""
    options.check()
    from jai.preferences.command import make_pairs

    make_pairs(options)


@verb(
    app,
    ScoreOptions,
    examples=("jai score chats.jsonl scored --model reward --keep-above 0.9",),
)
def score(options: ScoreOptions) -> None:
    """Score conversations with a reward model and filter them.

    If interrupted, run the same command again to resume."""
    options.check()
    from jai.preferences.scoring import score_file

    score_file(options)


@verb(
    app,
    DifficultyOptions,
    config="recipes/difficulty.yaml",
    examples=("jai difficulty prompts.jsonl selected --model sft --candidates 8",),
)
def difficulty(options: DifficultyOptions) -> None:
    """Select prompts that a model solves some of the time.

    `jai grpo` learns nothing from prompts that are always solved or never. If interrupted, run the same command
    again to resume."""
    options.check()
    from jai.preferences.difficulty import select_prompts

    select_prompts(options)

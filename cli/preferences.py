# SPDX-License-Identifier: Apache-2.0
"""Verbs that make preference data, and judge data by a model of preferences."""

import typer

from jai.cli.verb import verb
from jai.preferences.options import DifficultyOptions, PairsOptions, ScoreOptions

app = typer.Typer()


@verb(app, PairsOptions, config="recipes/pairs.yaml")
def pairs(options: PairsOptions) -> None:
    """Make preference pairs of a model's own answers.

    Of several answers to each prompt, the best is paired with the worst. If it is interrupted, the same command
    goes on."""
    options.check()
    from jai.preferences.command import make_pairs

    make_pairs(options)


@verb(app, ScoreOptions)
def score(options: ScoreOptions) -> None:
    """Score conversations with a reward model, and filter them.

    If it is interrupted, the same command goes on."""
    options.check()
    from jai.preferences.scoring import score_file

    score_file(options)


@verb(app, DifficultyOptions, config="recipes/difficulty.yaml")
def difficulty(options: DifficultyOptions) -> None:
    """Keep the prompts that a model answers right now and then.

    A prompt whose answers are all right or all wrong teaches `jai grpo` nothing. If it is interrupted, the same command
    goes on."""
    options.check()
    from jai.preferences.difficulty import select_prompts

    select_prompts(options)

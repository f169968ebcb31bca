# SPDX-License-Identifier: Apache-2.0
"""Verbs that train; their options are TRL's and JAI's own.

The names of options, the model, the data and the output folder are looked at before TRL and PyTorch are imported, which
takes seconds.
"""

import typer

from jai.cli.verb import PASS_THROUGH, verb
from jai.trainers.first_look import look_at_arguments
from jai.trainers.run_report_options import RunReportOptions

app = typer.Typer()


@app.command(**PASS_THROUGH)
def pretrain(context: typer.Context) -> None:
    """Pre-train on text packed by jai pack.

    Give --config FILE, then any of transformers' options."""
    look_at_arguments("pretrain", context.args, reads_packed_text=True)
    from jai.trainers.pretrain import main

    main(context.args)


@app.command(**PASS_THROUGH)
def sft(context: typer.Context) -> None:
    """Fine-tune on chats or plain text, with TRL's SFTTrainer.

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("sft", context.args)
    from jai.trainers.sft import main

    main(context.args)


@app.command(**PASS_THROUGH)
def dpo(context: typer.Context) -> None:
    """Align with preference pairs, with TRL's DPOTrainer.

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("dpo", context.args)
    from jai.trainers.dpo import main

    main(context.args)


@app.command(**PASS_THROUGH)
def kto(context: typer.Context) -> None:
    """Align with single answers rated good or bad (KTO).

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("kto", context.args)
    from jai.trainers.kto import main

    main(context.args)


@app.command(**PASS_THROUGH)
def cpo(context: typer.Context) -> None:
    """Align with pairs but no reference model (CPO, SimPO).

    With TRL's CPOTrainer. Give --config FILE, then any of TRL's options."""
    look_at_arguments("cpo", context.args)
    from jai.trainers.cpo import main

    main(context.args)


@app.command(**PASS_THROUGH)
def orpo(context: typer.Context) -> None:
    """Fine-tune and align on pairs in one stage (ORPO).

    With TRL's ORPOTrainer. Give --config FILE, then any of TRL's options."""
    look_at_arguments("orpo", context.args)
    from jai.trainers.orpo import main

    main(context.args)


@app.command(**PASS_THROUGH)
def reward(context: typer.Context) -> None:
    """Train a reward model on preference pairs and calibrate it.

    With TRL's RewardTrainer. Give --config FILE, then any of TRL's options."""
    look_at_arguments("reward", context.args)
    from jai.trainers.reward import main

    main(context.args)


@app.command(**PASS_THROUGH)
def grpo(context: typer.Context) -> None:
    """Train on answers that a program checks (GRPO).

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("grpo", context.args)
    from jai.trainers.grpo import main

    main(context.args)


@verb(
    app,
    RunReportOptions,
    name="report",
    config=None,
    examples=("jai report runs/phase-1",),
)
def report(options: RunReportOptions) -> None:
    """Write an HTML page on a training run, with alarms.

    Alarms: training turns unstable, a router starves an expert, the base's language does not recover. The run may still
    be in progress."""
    from jai.trainers.run_report import report_run

    report_run(options)

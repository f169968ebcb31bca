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
    """Pre-train on text that jai pack wrote.

    Give --config FILE, then any of transformers' options."""
    look_at_arguments("pretrain", context.args, reads_packed_text=True)
    from jai.trainers.pretrain import main

    main(context.args)


@app.command(**PASS_THROUGH)
def sft(context: typer.Context) -> None:
    """Fine-tune on chats or plain text with TRL's SFTTrainer.

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("sft", context.args)
    from jai.trainers.sft import main

    main(context.args)


@app.command(**PASS_THROUGH)
def dpo(context: typer.Context) -> None:
    """Align with preference pairs, using TRL's DPOTrainer.

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("dpo", context.args)
    from jai.trainers.dpo import main

    main(context.args)


@app.command(**PASS_THROUGH)
def kto(context: typer.Context) -> None:
    """Align with single answers, good or bad, by KTOTrainer.

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("kto", context.args)
    from jai.trainers.kto import main

    main(context.args)


@app.command(**PASS_THROUGH)
def cpo(context: typer.Context) -> None:
    """Align with pairs without a reference: CPO and SimPO.

    With TRL's CPOTrainer. Give --config FILE, then any of TRL's options."""
    look_at_arguments("cpo", context.args)
    from jai.trainers.cpo import main

    main(context.args)


@app.command(**PASS_THROUGH)
def orpo(context: typer.Context) -> None:
    """Fine-tune and align with pairs in one: ORPO.

    With TRL's ORPOTrainer. Give --config FILE, then any of TRL's options."""
    look_at_arguments("orpo", context.args)
    from jai.trainers.orpo import main

    main(context.args)


@app.command(**PASS_THROUGH)
def reward(context: typer.Context) -> None:
    """Train a reward model on preference pairs, and calibrate it.

    With TRL's RewardTrainer. Give --config FILE, then any of TRL's options."""
    look_at_arguments("reward", context.args)
    from jai.trainers.reward import main

    main(context.args)


@app.command(**PASS_THROUGH)
def grpo(context: typer.Context) -> None:
    """Reinforce verifiable answers, using TRL's GRPOTrainer.

    Give --config FILE, then any of TRL's options."""
    look_at_arguments("grpo", context.args)
    from jai.trainers.grpo import main

    main(context.args)


@verb(app, RunReportOptions, name="report", config=None)
def report(options: RunReportOptions) -> None:
    """Draw one page of a training run, with alarms.

    Alarms are for a run that turns unstable, a router that starves an expert, and an old language that does not come
    back. The run may still be going on."""
    from jai.trainers.run_report import report_run

    report_run(options)

# SPDX-License-Identifier: Apache-2.0
"""The verb that publishes to the Hub."""

import typer

from jai.cli.verb import verb
from jai.hub_card.options import PublishOptions

app = typer.Typer()


@verb(
    app,
    PublishOptions,
    examples=(
        "jai publish dpo your-org/your-jai --dry-run",
        "jai publish dpo your-org/your-jai --private",
    ),
)
def publish(options: PublishOptions) -> None:
    """Check a checkpoint or adapter and upload it to the Hub.

    Loads it in a clean process, writes its model card, and uploads everything in one commit."""
    from jai.hub_card.publish import publish

    publish(options)

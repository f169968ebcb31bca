# SPDX-License-Identifier: Apache-2.0
"""The verb that publishes to the Hub."""

import typer

from jai.cli.verb import verb
from jai.hub_card.options import PublishOptions

app = typer.Typer()


@verb(app, PublishOptions)
def publish(options: PublishOptions) -> None:
    """Check a checkpoint or an adapter, and upload it to the Hub.

    It is loaded in a clean process, its model card is written, and everything is uploaded in one commit."""
    from jai.hub_card.publish import publish

    publish(options)

# SPDX-License-Identifier: Apache-2.0
"""The verb that publishes to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a JAI checkpoint, or of an adapter.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub; made if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", show_default="main")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="An adapter's base model on the Hub, if it names a folder.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; upload nothing.")] = False,
    no_forward: Annotated[
        bool, typer.Option("--no-forward", help="Check names and shapes only, for models larger than memory.")
    ] = False,
) -> None:
    """Check a checkpoint or an adapter, and upload it to the Hub.

    It is loaded in a clean process; the model card is written; all is uploaded in one commit."""
    from jai.hub_card.publish import publish as run

    run(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        base=base,
        commit_message=message,
        dry_run=dry_run,
        forward=not no_forward,
    )

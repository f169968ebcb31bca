# SPDX-License-Identifier: Apache-2.0
"""What `jai publish` can be asked for."""

from dataclasses import dataclass
from pathlib import Path

from jai.errors import UserError
from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class PublishOptions:
    """What `jai publish` uploads, and where to."""

    folder: Path = argument("FOLDER", help="Folder of a JAI checkpoint or of an adapter.")
    repo_id: str = argument(
        "REPO_ID", help="owner/name on the Hub, or name in your own namespace. A new repository is created."
    )
    private: bool = option(False, help="Make the repository private if it is new.")
    revision: str | None = option(None, help="Branch to push to, created if it is new.", shown_default="main")
    create_pr: bool = option(
        False, help="Open a pull request instead of pushing to the branch, or add to your open one with the same title."
    )
    base: str | None = option(
        None, help="For an adapter that names a local folder: Hub id of its base model.", metavar="REPO_ID"
    )
    commit_message: str | None = option(
        None, help="Title of the commit.", metavar="TEXT", shown_default="Upload FOLDER with jai publish"
    )
    dry_run: bool = option(False, help="Check the files and print the plan; load and upload nothing.")
    forward: bool = option(
        True,
        help="Load the weights and run a forward pass before uploading. With --no-forward, only names and shapes "
        "are checked, for models larger than memory.",
    )

    def __post_init__(self) -> None:
        """Check every value, and refuse options that contradict each other.

        Raises:
            UserError: naming the option.
        """
        check_values(self)
        if self.create_pr and self.revision is not None:
            raise UserError("--create-pr opens a pull request to main. Leave --revision out.")

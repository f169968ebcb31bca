# SPDX-License-Identifier: Apache-2.0
"""What `jai inspect` can be asked for."""

from dataclasses import dataclass

from jai.options import argument, check_values
from jai.planning.options import PlanOptions

PAPERS_JAI = "jai-1"


@dataclass(kw_only=True)
class InspectOptions(PlanOptions):
    """What `jai inspect` shows."""

    model: str = argument("CKPT", help=f"Folder or Hub id of a JAI, or {PAPERS_JAI} for the paper's, without weights.")

    def __post_init__(self) -> None:
        check_values(self)
        self.check_plan()

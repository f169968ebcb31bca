# SPDX-License-Identifier: Apache-2.0
"""The options of `jai report`."""

from dataclasses import dataclass
from pathlib import Path

from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class RunReportOptions:
    """What `jai report` takes."""

    run: Path = argument("RUN", help="Output folder of a training stage, finished or still running.")
    out: Path | None = option(None, help="HTML file to write.", shown_default="RUN/report.html")
    language: str = option("en", help="The base's language, whose loss should recover.")

    def __post_init__(self) -> None:
        check_values(self)

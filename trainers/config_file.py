# SPDX-License-Identifier: Apache-2.0
"""`--config FILE.yaml` of a training stage, read before PyTorch and TRL are imported, which takes seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.options import read_yaml


def read_config_file(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options in the configuration file (none without one), and the arguments beside `--config FILE`.

    Raises:
        UserError: if the file is missing, or no YAML mapping of options to values.
    """
    argv = [part for argument in argv for part in _split_config(argument)]
    if "--config" not in argv:
        return {}, argv
    position = argv.index("--config")
    if position + 1 == len(argv):
        raise UserError("`--config` is given without a file. Give a YAML file, for example recipes/sft.yaml.")
    return read_yaml(Path(argv[position + 1])), [*argv[:position], *argv[position + 2 :]]


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]

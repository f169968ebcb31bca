# SPDX-License-Identifier: Apache-2.0
"""The command line `jai`: one file a group of verbs, each verb the thin face of one function that can be imported."""

from jai.cli.app import main

__all__ = ["main"]

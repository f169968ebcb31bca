# SPDX-License-Identifier: Apache-2.0
"""`python -m jai`."""

from jai.cli import main

main()

# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` for a JAI: `python -m jai.serve MODEL`, and the options of `transformers serve`.

That server looks for a checkpoint's class among the names of transformers itself, so it finds no class from outside
(transformers 5.16 to 5.23): neither a registered one nor, with `--trust-remote-code`, one in the repository. Here the
name leads to AutoModelForCausalLM, which finds both. A copy of this file runs without the package, as
`python serve.py MODEL --trust-remote-code`.
"""

import sys
from collections.abc import Sequence

from transformers import AutoModelForCausalLM
from transformers.cli.transformers import app


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted.

    Args:
        arguments: a model and the options of `transformers serve`; None is the command line.
    """
    # Not at the top: what the imports there import puts another module in the place of `transformers`.
    import transformers

    transformers.JaiForCausalLM = AutoModelForCausalLM  # type: ignore[attr-defined]
    app(["serve", *(sys.argv[1:] if arguments is None else arguments)], prog_name="jai")


if __name__ == "__main__":
    main()

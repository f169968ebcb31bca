# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` for a JAI: `python -m jai.serve MODEL`, and the options of `transformers serve`.

That server looks for a checkpoint's class among the names of transformers itself, so it finds no class from outside
(transformers 5.16 to 5.23): neither a registered one nor, with `--trust-remote-code`, one in the repository. Here the
name leads to AutoModelForCausalLM, which finds both. A copy of this file runs without the package, as
`python serve.py MODEL --trust-remote-code`.

That server also takes a temperature and goes on to answer greedily, where the checkpoint's generation config does not
sample: five answers to one prompt are then one and the same. Here a request with a temperature above 0 is sampled, as
by any other server with this API. With `--continuous-batching` the first request decides for all.
"""

import sys
from collections.abc import Sequence
from functools import wraps
from typing import Any

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
    _sample_where_asked()
    app(["serve", *(sys.argv[1:] if arguments is None else arguments)], prog_name="jai")


def _sample_where_asked() -> None:
    from transformers.cli.serving.utils import BaseHandler

    build = BaseHandler._build_generation_config  # there is no public way to what a request becomes

    @wraps(build)
    def build_and_sample(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = build(self, body, *args, **kwargs)
        temperature = body.get("temperature")
        if isinstance(temperature, int | float) and temperature > 0:
            config.do_sample = True
        return config

    BaseHandler._build_generation_config = build_and_sample  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

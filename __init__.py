# SPDX-License-Identifier: Apache-2.0
"""JAI: grow phi-3 into a Thai-centric mixture of experts.

Importing this package registers the classes with transformers' Auto classes; nothing else happens. Imports are
absolute because the repository's root is the package: its folder may have any name.
"""

import os
from importlib import import_module
from typing import Any

from jai.version import __version__

_HOME_OF = {
    "JaiConfig": "jai.configuration_jai",
    "JaiForCausalLM": "jai.modeling_jai",
    "JaiForQuestionAnswering": "jai.modeling_jai",
    "JaiForSequenceClassification": "jai.modeling_jai",
    "JaiForTokenClassification": "jai.modeling_jai",
    "JaiModel": "jai.modeling_jai",
}
__all__ = [
    "JaiConfig",
    "JaiForCausalLM",
    "JaiForQuestionAnswering",
    "JaiForSequenceClassification",
    "JaiForTokenClassification",
    "JaiModel",
    "__version__",
]

# The shell sets this at every TAB: completion needs no model, and answers in half a second instead of four.
if "_JAI_COMPLETE" not in os.environ:
    import_module("jai.auto")


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'jai' has no attribute {name!r}")

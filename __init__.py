# SPDX-License-Identifier: Apache-2.0
"""JAI: grow phi-3 into a Thai-centric mixture of experts.

Importing this package registers the classes with transformers' Auto classes, whenever those are imported; nothing else
happens. Imports are
absolute because the repository's root is the package: its folder may have any name.
"""

from importlib import import_module
from typing import Any

from jai.auto import register
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

register()


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'jai' has no attribute {name!r}")

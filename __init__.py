# SPDX-License-Identifier: Apache-2.0
"""JAI: grow phi-3 into a Thai-centric mixture of experts.

Importing this package registers the classes with transformers' Auto classes; nothing else happens. Imports are
absolute because the repository's root is the package: its folder may have any name.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from jai.configuration_jai import JaiConfig
from jai.modeling_jai import JaiForCausalLM, JaiForSequenceClassification, JaiModel
from jai.version import __version__

AutoConfig.register(JaiConfig.model_type, JaiConfig, exist_ok=True)
AutoModel.register(JaiConfig, JaiModel, exist_ok=True)
AutoModelForCausalLM.register(JaiConfig, JaiForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(JaiConfig, JaiForSequenceClassification, exist_ok=True)

__all__ = ["JaiConfig", "JaiForCausalLM", "JaiForSequenceClassification", "JaiModel", "__version__"]

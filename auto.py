# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers' Auto classes, so that a JAI folder loads without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from jai.configuration_jai import JaiConfig
from jai.modeling_jai import JaiForCausalLM, JaiForSequenceClassification, JaiModel

AutoConfig.register(JaiConfig.model_type, JaiConfig, exist_ok=True)
AutoModel.register(JaiConfig, JaiModel, exist_ok=True)
AutoModelForCausalLM.register(JaiConfig, JaiForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(JaiConfig, JaiForSequenceClassification, exist_ok=True)

# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers' Auto classes, so that a JAI folder loads without remote code."""

import transformers
from transformers import AutoConfig

from jai import modeling_jai
from jai.configuration_jai import AUTO_MAP, JaiConfig

AutoConfig.register(JaiConfig.model_type, JaiConfig, exist_ok=True)
for auto_class, target in AUTO_MAP.items():
    if auto_class != "AutoConfig":
        model_class = getattr(modeling_jai, target.partition(".")[2])
        getattr(transformers, auto_class).register(JaiConfig, model_class, exist_ok=True)

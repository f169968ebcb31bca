# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA on experts in four bits: its files, its names and its initial values, beside the packed bytes.

    model = AutoModelForCausalLM.from_pretrained(…, quantization_config=BitsAndBytesConfig(load_in_4bit=True, …))
    config = LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], …)
    model = get_peft_model(model, adapting_four_bits(config))
    model = PeftModel.from_pretrained(model, adapter, config=adapting_four_bits(PeftConfig.from_pretrained(adapter)))

transformers' `model.load_adapter(adapter)` and `AutoModelForCausalLM.from_pretrained(adapter)` need none of it.
"""

from peft import LoraConfig, PeftConfig

from jai.errors import UserError
from jai.quantization_jai import lora_reaching_four_bits


def adapting_four_bits(config: PeftConfig) -> LoraConfig:
    """A LoRA configuration whose `target_parameters` reach experts in four bits; elsewhere it is as it was.

    Args:
        config: it is changed; what is registered is not saved with it.

    Raises:
        UserError: if it is no configuration of LoRA.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(f"Experts in four bits take LoRA alone; given a configuration of {config.peft_type}.")
    lora_reaching_four_bits(config)
    return config

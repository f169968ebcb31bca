# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA on experts in four bits: its files, its names and its initial values, beside the packed bytes.

    model = AutoModelForCausalLM.from_pretrained(…, quantization_config=BitsAndBytesConfig(load_in_4bit=True, …))
    config = LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], …)
    model = get_peft_model(model, adapting_four_bits(config))
    model = PeftModel.from_pretrained(model, adapter, config=adapting_four_bits(PeftConfig.from_pretrained(adapter)))

PEFT's own class for `target_parameters` adds the product of its factors to the parameter, which here is packed bytes.
"""

from contextlib import ExitStack
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import layer
from peft.tuners.tuners_utils import check_adapters_to_merge

from jai.errors import UserError
from jai.quantization_jai import JaiExperts4bit, Lora4bit


class ParamWrapper(layer.ParamWrapper):
    """PEFT's, for experts in four bits: the factors multiply the rows beside the frozen matrices.

    PEFT knows a wrapper by the name of its class, so that is the name of its own.
    """

    def get_param(self) -> torch.Tensor:
        """What PEFT reads the shape, device and dtype of: a single 0 that stands for the whole matrix."""
        experts = cast(JaiExperts4bit, self.get_base_layer())
        packed, shape = getattr(experts, self.parameter_name), experts.shapes[self.parameter_name]
        return torch.zeros((), dtype=experts.compute_dtype, device=packed.device).expand(len(packed), *shape)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        with ExitStack() as stack:
            if active:
                experts = cast(JaiExperts4bit, self.get_base_layer())
                stack.enter_context(experts.adapted(self.parameter_name, self._lora(active)))
            return self.base_layer(x, *args, **kwargs)

    def _lora(self, adapters: list[str]) -> Lora4bit:
        """The active adapters' as one, side by side along the rank."""
        factors = [self.get_delta_factors(adapter) for adapter in adapters]
        if len(factors) == 1:
            b_ERR, a_ERC, scale = factors[0]
            return Lora4bit(a_ERC, b_ERR, scale)
        a_ERC = torch.cat([a for _, a, _ in factors], dim=1)
        return Lora4bit(a_ERC, torch.cat([b * scale for b, _, scale in factors], dim=2), 1.0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if check_adapters_to_merge(self, adapter_names):
            raise UserError(
                "An adapter cannot be merged into experts in four bits. Merge it into the checkpoint in 16 bits that "
                "they were made of: jai merge-adapter ADAPTER OUT"
            )


def adapting_four_bits(config: PeftConfig) -> LoraConfig:
    """A LoRA configuration whose `target_parameters` reach experts in four bits; elsewhere it is as it was.

    Args:
        config: it is changed; what is registered is not saved with it.

    Raises:
        UserError: if it is no configuration of LoRA.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(f"Experts in four bits take LoRA alone; given a configuration of {config.peft_type}.")
    config._register_custom_module({JaiExperts4bit: ParamWrapper})
    return config

# SPDX-License-Identifier: Apache-2.0
"""Makes chosen parts of a model learn, and nothing else, in any of transformers' trainers.

In full, a parameter learns or is frozen. Where only some of its entries learn (rows of new tokens, new experts), the
gradient of the others is cleared after every backward pass, and weight decay leaves the parameter alone: their
moments stay 0, and an optimiser that works element by element leaves them as they are, to the bit.

Through an adapter, `jai.trainers.lora` says which form each part has. Skip alphas are parameters of a layer itself,
which PEFT can neither wrap nor copy alone. They learn as they are, as biases do under PEFT's `bias="all"`, and lie in
the adapter's file under their own names, from where PEFT and transformers load them into the model.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from jai.trainers.parts import IN_PEFT, Entries, TrainableParts, count_entries

ADAPTER_WEIGHTS = "adapter_model.safetensors"
Key = TypeVar("Key", bound=Hashable)


@dataclass
class PartlyTrained:
    """A parameter of which some entries are frozen.

    Attributes:
        owner: the module that has it. Held, and not the parameter itself: FSDP2 puts another in its place.
        name: in its owner.
        frozen: where it is frozen, of a shape that broadcasts over the dimensions after the first.
        trained: how many numbers learn.
    """

    owner: nn.Module
    name: str
    frozen: torch.Tensor
    trained: int

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.owner, self.name))

    @torch.no_grad()
    def clear_frozen_gradient(self) -> None:
        """Set the frozen entries of the gradient to 0, be they NaN or infinite."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        self.frozen = self.frozen.to(gradient.device)
        if isinstance(gradient, DTensor):
            if not isinstance(self.frozen, DTensor):
                self.frozen = distribute_tensor(self.frozen, gradient.device_mesh, gradient.placements)
            gradient.to_local().masked_fill_(self.frozen.to_local(), 0)
        else:
            gradient.masked_fill_(self.frozen, 0)


@dataclass
class TrainedModel:
    """A model of which parts learn.

    Attributes:
        partial: parameters with frozen entries.
        alphas: of a model with an adapter: name in the adapter's file and owner of each skip alpha that learns.
    """

    partial: list[PartlyTrained] = field(default_factory=list)
    alphas: dict[str, nn.Module] = field(default_factory=dict)

    def clear_frozen_gradients(self) -> None:
        for each in self.partial:
            each.clear_frozen_gradient()

    def is_partial(self, parameter: nn.Parameter) -> bool:
        return any(each.parameter is parameter for each in self.partial)

    def alpha_values(self) -> dict[str, torch.Tensor]:
        """The skip alphas for the adapter's file. All ranks must call it together."""
        return whole_alphas(self.alphas)

    def set_alphas(self, values: dict[str, torch.Tensor]) -> None:
        """Give the skip alphas the values that `alpha_values` had."""
        for name, owner in self.alphas.items():
            local = _local(owner)
            local.copy_(values[name][: len(local)])  # a rank of FSDP2 has all of it, or nothing


def whole_alphas(owners: Mapping[Key, nn.Module]) -> dict[Key, torch.Tensor]:
    """Skip alphas as they are, on the CPU; of shards, whole. All ranks must call it together.

    Args:
        owners: the layers that have them.
    """
    alphas = {key: cast(nn.Parameter, owner.skip_alpha) for key, owner in owners.items()}
    with gather_params_ctx(list(alphas.values()), modifier_rank=None):  # ZeRO-3 may leave nothing of them here
        return {
            key: (alpha.full_tensor() if isinstance(alpha, DTensor) else alpha).detach().cpu().clone()
            for key, alpha in alphas.items()
        }


def train_parts(model: nn.Module, parts: TrainableParts) -> TrainedModel:
    """Let the parts of a model learn and freeze the rest. Call it before an optimiser is made.

    What an adapter holds is trained in fp32, as PEFT has it of LoRA's factors: in bf16, in which TRL puts them beside
    quantised weights, most steps are smaller than the distance to the next number, and would be lost. What it copied
    from the model, routers and rows, begins with the model's own values and not with those that TRL rounded.

    Args:
        model: a causal language model, or PEFT's model around one, whose adapter was made for these parts.
        parts: of the causal language model.
    """
    if isinstance(model, PeftModel):
        return _train_adapter(model, parts)
    trained = TrainedModel()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parts)
        if (entries := parts.entries.get(name)) is not None:
            frozen = _frozen(entries, len(parameter)).view(-1, *[1] * (parameter.ndim - 1))
            numbers = count_entries(entries) * parameter.numel() // len(parameter)
            trained.partial.append(PartlyTrained(*_owner(model, name), frozen, numbers))
    return trained


def _train_adapter(model: PeftModel, parts: TrainableParts) -> TrainedModel:
    trained = TrainedModel()
    for name in parts.entries:
        if name.endswith(".skip_alpha"):
            owner, attribute = _owner(model, IN_PEFT + name)
            cast(nn.Parameter, getattr(owner, attribute)).requires_grad_(True)
            trained.alphas[IN_PEFT + name] = owner
    for copied, original in _copies(model):
        is_narrower = copied.dtype.itemsize < original.dtype.itemsize
        if copied.requires_grad and is_narrower and torch.equal(copied, original.to(copied.dtype)):
            copied.data = original.detach().clone()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            module.register_parameter("bias", None)  # TRL asks a head for it, and PEFT hands on the weight alone
        if isinstance(module, ParamWrapper):
            parameter_name = f"{name.replace('.base_layer', '').removeprefix(IN_PEFT)}.{module.parameter_name}"
            if (entries := parts.entries.get(parameter_name)) is not None:
                trained.partial += _partial_lora(module, entries)
    return trained


def _copies(model: PeftModel) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """What adapters learn that is a copy of something of the model, and that, which is frozen."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            originals = dict(module.original_module.named_parameters())
            for copy in module.modules_to_save.values():
                yield from ((parameter, originals[name]) for name, parameter in copy.named_parameters())
        elif isinstance(module, TrainableTokensLayer):
            for adapter, rows in module.trainable_tokens_delta.items():
                yield rows, module.trainable_tokens_original[adapter]


def _partial_lora(lora: ParamWrapper, entries: Entries) -> Iterator[PartlyTrained]:
    """LoRA's two factors for all experts of a layer: what belongs to a frozen expert is frozen.

    The second factor begins at 0, so that a frozen expert gets an exact 0. PEFT reshapes the first to (experts, rank,
    in) and the second to (out, rank, experts).
    """
    frozen_E = _frozen(entries, lora.num_experts)
    for adapter in lora.lora_A:
        rank = lora.r[adapter]
        down, up = cast(nn.Linear, lora.lora_A[adapter]), cast(nn.Linear, lora.lora_B[adapter])
        learn = count_entries(entries) * rank
        yield PartlyTrained(down, "weight", frozen_E.repeat_interleave(rank)[:, None], learn * down.in_features)
        yield PartlyTrained(
            up, "weight", frozen_E.repeat(rank)[None].expand(up.out_features, -1), learn * up.out_features
        )


def _frozen(entries: Entries, length: int) -> torch.Tensor:
    frozen = torch.ones(length, dtype=torch.bool, device="cpu")
    for run in entries:
        frozen[run.start : run.stop] = False
    return frozen


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def add_to_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put further tensors into the file of a saved adapter, under names of the model that it is for."""
    path = folder / ADAPTER_WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {**{name: file.get_tensor(name) for name in file.keys()}, **tensors}  # noqa: SIM118
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata)
    unfinished.replace(path)


def alphas_follow_adapter(model: PeftModel, trained: TrainedModel) -> None:
    """While the adapter is switched off, as for the reference of DPO, the skip alphas are what they were before.

    PEFT switches off its own modules alone. Call it before training.
    """
    if not trained.alphas:
        return
    before = [cast(torch.Tensor, owner.skip_alpha).detach().clone() for owner in trained.alphas.values()]
    switch = next(module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper))
    held: list[torch.Tensor] = []

    def go_back(backbone: nn.Module, args: tuple) -> None:
        if switch.disable_adapters and not held:
            for owner, alpha in zip(trained.alphas.values(), before):
                local = _local(owner)
                held.append(local.clone())
                local.copy_(alpha.to(local.device)[: len(local)])  # a rank of FSDP2 has all of it, or nothing

    def come_back(backbone: nn.Module, args: tuple, output: object) -> None:
        for owner, alpha in zip(trained.alphas.values(), held):
            _local(owner).copy_(alpha)
        held.clear()

    backbone = cast(PreTrainedModel, model.get_base_model()).base_model
    backbone.register_forward_pre_hook(go_back)
    backbone.register_forward_hook(come_back, always_call=True)


def _local(owner: nn.Module) -> torch.Tensor:
    """A skip alpha's numbers on this rank. Writing to them does not disturb a backward pass that is to come."""
    alpha = cast(nn.Parameter, owner.skip_alpha).data
    return alpha.to_local() if isinstance(alpha, DTensor) else alpha

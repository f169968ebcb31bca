# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of training on many GPUs, and what limits them."""

from dataclasses import dataclass

from jai.configuration_jai import JaiConfig
from jai.planning.count import count_parameters, head_widths
from jai.planning.flops import FROZEN, LEARNS, attention_flops
from jai.planning.memory import Setup, lora_parameters, trained_parameters, weight_bytes

GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Device:
    """A GPU, from its maker's data sheet.

    Attributes:
        memory: bytes; a GB is 10^9 here as in "80 GB".
        flops: bf16 operations a second, dense.
        link: bytes a second to the other GPUs of its node, in one direction.
        network: bytes a second to other nodes: 400 Gbit/s a GPU, and 200 Gbit/s for A100.
    """

    memory: float
    flops: float
    link: float
    network: float


DEVICES = {
    "A100": Device(80e9, 312e12, 300e9, 25e9),
    "H100": Device(80e9, 989e12, 450e9, 50e9),
    "H200": Device(141e9, 989e12, 450e9, 50e9),
    "B200": Device(180e9, 2250e12, 900e9, 50e9),
}
_SLOWER = ("H100 PCIe", "NVL", "MIG")  # forms with fewer or slower units than the table's


def peak_flops(name: str) -> float | None:
    """bf16 operations a second of a device by the name that CUDA gives it, None where they are not known."""
    if any(form in name for form in _SLOWER):
        return None
    return next((device.flops for known, device in DEVICES.items() if known in name), None)


@dataclass(frozen=True)
class StepTime:
    """What a step of one micro-batch on every GPU takes.

    Attributes:
        flops: operations a token, without what checkpointing computes again.
        computing: seconds, at the utilisation.
        sent: bytes that each GPU sends.
        sending: seconds of it.
        tokens: a second, over all GPUs.
    """

    flops: float
    computing: float
    sent: float
    sending: float
    tokens: float

    @property
    def limit(self) -> str:
        return "computing" if self.computing >= self.sending else "communication"

    def utilisation(self, device: Device, gpus: int) -> float:
        """Share of the peak that is left where communication takes longer than computing."""
        return self.tokens * self.flops / (device.flops * gpus)


def planned_flops(config: JaiConfig, setup: Setup) -> float:
    """Operations of training on a token, from the configuration alone.

    The embeddings are looked up and not multiplied, and so do not count.
    """
    count = count_parameters(config)
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norms = count.norms
    used = count.active - lookup - norms
    flops = attention_flops(len(config.running_plan), head_widths(config)[0], setup.length)
    if setup.learns == "full":
        return flops + LEARNS * used
    return flops + FROZEN * used + LEARNS * lora_parameters(config, setup, config.num_experts_per_tok or 1)


def communication(config: JaiConfig, setup: Setup) -> float:
    """Bytes that each GPU sends in a micro-batch.

    FSDP gathers the weights for the forward pass and again for the backward pass, and cuts the gradients up: three
    times the weights, less its own share. HSDP adds the mean of the gradients over its groups, and DDP has that alone.
    """
    count = count_parameters(config)
    whole = count.total + count.skip_alphas
    shards, groups = setup.shards, setup.gpus // setup.shards
    is_quantised = setup.weights in ("nf4", "nf4-double")
    weights = weight_bytes(config, setup) if is_quantised else float(setup.compute * whole)
    trained = trained_parameters(config, setup)
    gradients = float(setup.compute * whole) if setup.learns == "full" else 4.0 * sum(trained.values())
    cut = (2 * weights + gradients) * (shards - 1) / shards
    return cut + 2 * gradients / shards * (groups - 1) / groups


def speed(config: JaiConfig, setup: Setup, device: Device, utilisation: float) -> StepTime:
    """Tokens a second where computing runs at a share of the device's peak, and communication beside it.

    Args:
        config: of the model.
        setup: how it is trained.
        device: on what.
        utilisation: model FLOPs utilisation of computing alone.
    """
    flops = planned_flops(config, setup)
    computing = setup.tokens * flops / (utilisation * device.flops)
    sent = communication(config, setup)
    sending = sent / (device.link if setup.gpus <= GPUS_OF_A_NODE else device.network)
    return StepTime(flops, computing, sent, sending, setup.tokens * setup.gpus / max(computing, sending))

# SPDX-License-Identifier: Apache-2.0
"""The arms of `forgetting.py`: what a model starts as, what of it learns, from which text, and what a token costs."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from jai.small_model import flops_per_token
from jai.small_model_options import ModelShape

ENGLISH, THAI, PARALLEL = "english", "thai", "parallel"
# Text that people have edited; what is left out is social media, lists of sentences, and machine translation.
EDITED = ("government news", "law", "encyclopedia", "health news", "diplomatic news", "literature", "handbook")
NEW_CAPACITY = ("new_layers", "new_rows", "alphas")

_SHAPE = ModelShape(64, 176, 6, 4, initializer_range=0.05)


@dataclass(frozen=True)
class Arm:
    """What a model starts as, what of it learns, and from which text.

    Attributes:
        start: of `STARTS`.
        thai: share of the tokens.
        trainable: parts, as `jai pretrain` names them.
        strategy: how documents share a sequence.
        parallel: half of the Thai is of translations of English, which stand beside it.
        mtp: weight of multi-token prediction.
        annealing: None for a learning rate that stays; else the mixture of the last tenth, in which it decays: "same",
            "more" (three times the Thai), "better" (edited text alone) or "both".
        longer: go on until the FLOPs of the most costly arm are spent.
    """

    start: str = "deep"
    thai: float = 0.1
    trainable: tuple[str, ...] = ("all",)
    strategy: str = "isolated"
    parallel: bool = False
    mtp: float = 0.0
    annealing: str | None = None
    longer: bool = False


@dataclass(frozen=True)
class Settings:
    """Sizes of a whole run.

    Attributes:
        seeds: of the order of the text and of the routers. All begin from one base.
        base_vocabulary: entries of the base's tokenizer, which is of English; `vocabulary` with Thai pieces.
        shape: of the base; `block_repeats` repeats its layers, one by one.
        base_tokens: English that the base learns from.
        steps: of an arm, of `batch` sequences of `context` tokens.
        points: parts of `steps` after which is measured.
        heldout_characters: of each language; `heldout_pairs`, of translations.
        piece_characters: longer documents are cut.
        rows_mb: megabytes of text of each language that are read.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    base_vocabulary: int = 1280
    vocabulary: int = 2048
    tokenizer_characters: int = 1_000_000
    shape: ModelShape = _SHAPE
    block_repeats: tuple[int, ...] = (1, 2, 3, 2, 1, 1)
    base_tokens: int = 2_000_000
    base_learning_rate: float = 3e-3
    steps: int = 150
    context: int = 256
    batch: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    points: tuple[float, ...] = (0, 1 / 15, 1 / 5, 1 / 2, 1)
    heldout_characters: int = 12_000
    heldout_pairs: int = 120
    piece_characters: int = 400
    rows_mb: float = 20.0


QUICK = Settings(
    seeds=(0, 1),
    base_vocabulary=400,
    vocabulary=600,
    tokenizer_characters=20_000,
    shape=ModelShape(16, 32, 2, 2, 0.1),
    block_repeats=(1, 2),
    base_tokens=400,
    steps=4,
    context=32,
    batch=2,
    warmup_steps=1,
    points=(0, 1),
    heldout_characters=300,
    heldout_pairs=4,
    piece_characters=100,
    rows_mb=3.0,
)

# What of the base is made, by options of `jai convert`.
STARTS: dict[str, dict[str, Any]] = {
    "plain": {"experts": 1},
    "deep": {"experts": 1, "duplicate_init": "identity"},
    "deep-copy-0.1": {"experts": 1, "duplicate_init": "copy", "skip_alpha": 0.1},
    "deep-normalised": {"experts": 1, "duplicate_init": "copy", "skip_alpha": 1.0, "skip_alpha_normalize": True},
    "moe": {"experts": 4, "duplicate_init": "identity"},
}
GROUPS: dict[str, dict[str, Arm]] = {
    "forgetting": {
        f"{name}, {share}": replace(arm, thai=thai)
        for share, thai in (("100 % Thai", 1.0), ("27 % Thai", 0.27))
        for name, arm in {
            "plain": Arm("plain", longer=True),
            "upscaled": Arm("deep"),
            "upscaled, only what is new": Arm("deep", trainable=NEW_CAPACITY),
            "upscaled, four experts": Arm("moe"),
        }.items()
    },
    "starts": {
        "not upscaled": Arm("plain", thai=0.0),
        "identity": Arm("deep", thai=0.0),
        "copies, alpha 0.1": Arm("deep-copy-0.1", thai=0.0),
        "copies, normalised, alpha 1": Arm("deep-normalised", thai=0.0),
    },
    "shares": {f"{round(100 * thai)} % Thai": Arm("deep", thai=thai) for thai in (0.0, 0.1, 0.27, 0.5)},
    "documents": {
        "isolated": Arm(),
        "concatenated": Arm(strategy="concatenated"),
        "paired-isolated": Arm(strategy="paired-isolated"),
        "xlda": Arm(strategy="xlda"),
        "isolated, with translations": Arm(parallel=True),
        "xlda, with translations": Arm(strategy="xlda", parallel=True),
    },
    "second token": {"without": Arm(), "with": Arm(mtp=0.2)},
    "annealing": {name: Arm(annealing=name) for name in ("same", "more", "better", "both")},
}


def flops_of_token(arm: Arm, settings: Settings) -> float:
    """Floating-point operations of training on one token: matrix products, forwards and backwards.

    Of the six operations a weight, the two of its own gradient are left out where it is frozen. The gradient of both
    matrices of the vocabulary is made in every arm, since their new rows always learn. Routers, norms and the layer of
    multi-token prediction are not counted.
    """
    repeats = settings.block_repeats if arm.start != "plain" else (1,) * len(settings.block_repeats)
    experts_per_token = 2 if arm.start == "moe" else 1
    shape = replace(
        settings.shape,
        num_hidden_layers=sum(repeats),
        intermediate_size=experts_per_token * settings.shape.intermediate_size,
    )
    body, head = flops_per_token(shape, settings.vocabulary, settings.context)
    if arm.trainable == NEW_CAPACITY:
        frozen = len(repeats) / sum(repeats)
        weights = body - 6.0 * shape.num_hidden_layers * shape.hidden_size * settings.context
        body -= frozen * weights / 3
    return body + head


def measured_steps(name: str, group: str, settings: Settings) -> list[int]:
    """Steps of an arm after which is measured: the points, and for an arm that goes on those of equal FLOPs."""
    arm = GROUPS[group][name]
    steps = {round(part * settings.steps) for part in settings.points}
    if arm.longer:
        steps |= {equal_flops_step(arm, other, settings) for other in GROUPS[group].values()}
    return sorted(steps)


def equal_flops_step(arm: Arm, other: Arm, settings: Settings) -> int:
    """The step at which an arm has spent what the other spends in `steps`."""
    return ceil(settings.steps * flops_of_token(other, settings) / flops_of_token(arm, settings))

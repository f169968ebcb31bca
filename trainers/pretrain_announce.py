# SPDX-License-Identifier: Apache-2.0
"""What `jai pretrain` says of a run before it begins: which text, in which steps, and what would have no effect."""

from collections.abc import Iterator

from rich.markup import escape
from transformers import SchedulerType

from jai.pretraining.plan import MIXED_STRATEGIES, AnyPlan
from jai.trainers.base_model import BaseModel
from jai.trainers.engine import batches_at_once
from jai.trainers.parameters import TrainedParameters
from jai.trainers.pretrain_config import PretrainConfig
from jai.trainers.router_losses import balance_weight
from jai.trainers.schedules import annealing_begins
from jai.trainers.steps import StepLayout


def text_rows(config: PretrainConfig, plan: AnyPlan, layout: StepLayout) -> Iterator[tuple[str, str]]:
    """The text that the steps take, and what of it no sequence holds or no position sees."""
    sequences = layout.first_sequence(layout.steps)
    seen = plan.tokens_seen(sequences)
    strategy = config.packing_strategy
    if strategy in MIXED_STRATEGIES:
        strategy += f", rho {config.rho:g}"
    yield (
        "text",
        f"{escape(str(config.packed))}: {sequences:,} of {len(plan):,} sequences of {config.max_length:,} tokens, "
        f"{escape(strategy)}",
    )
    yield "tokens", escape(listed_tokens(seen))
    for number, line in enumerate(_left_out(plan)):
        yield "" if number else "left out", escape(line)
    if plan.is_isolated:
        longest = max(order.longest() for part in plan.parts for order in part.orders)
        if longest < config.max_length:
            beyond = "[yellow]positions beyond learn nothing[/]"
            yield "positions", f"documents are apart, and the longest has {longest:,} tokens: {beyond}"


def _left_out(plan: AnyPlan) -> Iterator[str]:
    """What no sequence can hold of the packed text: sources, documents; and where equal scores keep more of these."""
    used = {share.packed or name for part in plan.parts for name, share in part.shares.sources.items()}
    yield from (f"{source.name}: not in the mixture" for source in plan.corpus.sources if source.name not in used)
    for when, part in zip(("", "in the annealing, "), plan.parts):
        for order in part.orders:
            documents = order.source.documents
            if left := documents - order.documents:
                yield (
                    f"{when}{order.source.name}: {left:,} of {documents:,} documents, by `keep_best`, `min_tokens` or "
                    "`max_tokens`"
                )
            asked = order.choice.keep_best
            if order.documents > round(asked * documents) + len(order.source.entry.languages):
                yield (
                    f"{when}{order.source.name}: {order.documents:,} of {documents:,} documents are kept, and not "
                    f"{asked:.0%}, because the lowest score that is kept is that of many"
                )


def listed_tokens(tokens: dict[str, int]) -> str:
    """Tokens of all sources together, and of each."""
    total = sum(tokens.values())
    parts = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in tokens.items())
    return f"{total:,}: {parts}"


def step_rows(config: PretrainConfig, base: BaseModel, layout: StepLayout) -> Iterator[tuple[str, str]]:
    """What a step takes, and how the learning rate and the annealing go."""
    batch = config.per_device_train_batch_size, batches_at_once(config)
    accumulated = str(layout.accumulation)
    if layout.first_accumulation < layout.accumulation:
        accumulated = f"{layout.first_accumulation} to {layout.accumulation}, growing over {layout.ramp_steps:,} steps,"
    yield (
        "steps",
        f"{layout.steps:,}, the last on {layout.accumulation * layout.batch_sequences:,} sequences ({batch[0]} a "
        f"device x {accumulated} accumulated x {batch[1]} processes)",
    )
    if config.mtp_weight:
        goes_on = bool(getattr(base.config, "num_mtp_layers", None))
        whose = "the model's layer for it is trained further" if goes_on else "a new layer learns to predict it"
        end = "kept for `generate(use_mtp=True)`" if config.keep_mtp else "dropped at the end"
        yield "second token", f"{whose}, weight {config.mtp_weight:g}; the layer is {end}"
    begins = annealing_begins(layout.steps, config.annealing)
    schedule = SchedulerType(config.lr_scheduler_type)
    text = f"{config.learning_rate:g}, {schedule.value}"
    if schedule is SchedulerType.WARMUP_STABLE_DECAY and not config.lr_scheduler_kwargs:
        final = config.learning_rate * config.annealing_learning_rate
        warmup = config.get_warmup_steps(layout.steps)
        text = f"{config.learning_rate:g} after {warmup:,} steps"
        if warmup > begins:
            text = f"rises over {warmup:,} steps; [yellow]its peak, {config.learning_rate:g}, is never reached[/]"
        if begins < layout.steps:
            text += f"; from step {begins:,}, decays to {final:g}"
    yield "learning rate", text
    if config.annealing:
        changes = [
            f"{what} {value}"
            for what, value in (
                ("text by", config.annealing_mixture),
                ("weight decay", config.annealing_weight_decay),
                ("the second next token's weight", config.annealing_mtp_weight),
            )
            if value is not None
        ]
        if changes and begins < layout.steps:
            yield "annealing", escape(f"from step {begins:,}: {', '.join(changes)}")
        elif changes:
            no_step = f"none: {config.annealing:g} of {layout.steps:,} steps is less than one step"
            yield "annealing", f"[yellow]{no_step}, and without effect are {escape(', '.join(changes))}[/]"


def router_rows(config: PretrainConfig, base: BaseModel, parameters: TrainedParameters) -> Iterator[tuple[str, str]]:
    """The weights of the routers' losses, or that there are no routers for them."""
    given = {name: getattr(config, name) for name in ("router_aux_loss_coef", "router_z_loss_coef")}
    if any(each.kind == "router" for each in parameters.kinds):
        balance = balance_weight(config.router_aux_loss_coef, base.config)
        yield "routers", f"load-balancing loss x {balance:g}, z-loss x {config.router_z_loss_coef:g}"
    elif named := [f"`{name}`" for name, value in given.items() if value]:
        yield (
            "routers",
            f"[yellow]none: {' and '.join(named)} {'have' if len(named) > 1 else 'has'} no effect[/]",
        )

# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning with rewards that can be verified: TRL's GRPOTrainer on a JAI.

jai grpo --config recipes/grpo.yaml
accelerate launch -m jai.trainers.grpo --config recipes/grpo.yaml
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel, get_model_status
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from jai.errors import UserError
from jai.trainers.arguments import StageArguments
from jai.trainers.data import TrainingData
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.rewards import REWARD_NAMES, check_reward_columns, reward_functions
from jai.trainers.routing_replay import RoutingReplay
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command
from jai.trainers.whole_checkpoints import KeptWithCheckpoints, kept_with

_EXPERT_IDS = "expert_ids"  # in the trainer's batches, beside TRL's own tensors
_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


@dataclass
class JaiGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig with rewards by name, and with the routers' choices replayed if that is wanted."""

    vllm_model_impl: str = field(
        default="transformers",
        metadata={
            "help": "With `use_vllm`: how vLLM runs the model. Its own implementations know no JAI; `transformers` "
            "runs the installed package's.",
            "choices": ["vllm", "transformers", "auto"],
        },
    )
    rewards: list[str] = field(
        default_factory=lambda: ["final_answer"],
        metadata={
            "help": f"What a completion is rewarded for, by name: {', '.join(REWARD_NAMES)}. `reward_weights` has a "
            "number for each."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "The system turn of every prompt that has none of its own."}
    )
    routing_replay: bool = field(
        default=False,
        metadata={
            "help": "Train through the experts that the routers chose in the rollout, with weights from the live "
            "logits. The share of choices in which rollout and training disagree is logged either way "
            "(`routing/disagreement`)."
        },
    )

    def __post_init__(self) -> None:
        if self.num_generations is None or self.num_generations < 2:  # TRL divides by it before it looks at it
            raise UserError(f"`num_generations` is {self.num_generations}; expected 2 or more answers to compare.")
        super().__post_init__()
        if not self.rewards:
            raise UserError(f"`rewards` is empty. Name some of {', '.join(REWARD_NAMES)}.")
        reward_functions(self.rewards)
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise UserError(
                f"`reward_weights` has {len(self.reward_weights)} numbers, and `rewards` {len(self.rewards)} names. "
                "Give one for each."
            )
        if self.loss_type not in _LOSSES:
            raise UserError(f"`loss_type` is {self.loss_type!r}; expected one of {', '.join(_LOSSES)}.")
        if self.routing_replay and self.use_vllm:
            raise UserError(
                "`routing_replay` and `use_vllm` are on, and TRL's client of vLLM does not hand on which experts were "
                "chosen. Switch one of them off."
            )
        if self.routing_replay and self.use_transformers_continuous_batching:
            raise UserError(
                "`routing_replay` and `use_transformers_continuous_batching` are on, and continuous batching mixes the "
                "tokens of all rows. Switch one of them off."
            )


@dataclass
class RewardCounts(KeptWithCheckpoints):
    """What rewards could not teach, over the whole run, however often it was resumed.

    Attributes:
        groups: answers to one prompt, as many as were generated together.
        equal: groups whose rewards were all equal, so that no answer is better than another.
        completions: all of them.
        unscored: those that no reward scored.
        latest: what the latest rollout added to each.
    """

    groups: int = 0
    equal: int = 0
    completions: int = 0
    unscored: int = 0
    latest: dict[str, int] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """What transformers saves of it."""
        return {"args": {}, "attributes": asdict(self)}

    def add(self, rewards: torch.Tensor, num_generations: int) -> None:
        """Count a rollout.

        Args:
            rewards: weighted sums, NaN where no reward scored. Shape (groups * num_generations,).
            num_generations: completions of a group.
        """
        grouped = rewards.view(-1, num_generations)
        filled = grouped.nan_to_num(nan=float("-inf"))
        lowest = grouped.nan_to_num(nan=float("inf")).amin(dim=1)
        self.latest = {
            "groups": len(grouped),
            "equal": int((filled.amax(dim=1) <= lowest).sum()),
            "completions": rewards.numel(),
            "unscored": int(rewards.isnan().sum()),
        }
        for name, count in self.latest.items():
            setattr(self, name, getattr(self, name) + count)

    def take_back_latest(self) -> None:
        """Leave out the latest rollout, which is made anew."""
        for name, count in self.latest.items():
            setattr(self, name, getattr(self, name) - count)
        self.latest = {}


class JaiGRPOTrainer(JaiTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer with rewards by name, counts of what they could not teach, and routing replay.

    Of TRL it overrides three methods that are not public: where completions are generated, where they are scored, and
    where log-probabilities are computed (`tests/test_trainers_rewarded.py` names them).
    """

    args: JaiGRPOConfig

    def __init__(self, *args: Any, **kwargs: Any):
        config = cast(JaiGRPOConfig, kwargs.get("args"))
        kwargs.setdefault("reward_funcs", reward_functions(config.rewards))
        super().__init__(*args, **kwargs)
        self.reward_counts = RewardCounts()
        self.add_callback(self.reward_counts)
        model = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))
        has_routers = getattr(model.config, "num_local_experts", 1) > 1
        can_record = not (config.use_vllm or config.use_transformers_continuous_batching)
        self._routing: RoutingReplay | None = None
        self._routes: torch.Tensor | None = None
        self._is_scoring = False
        if config.routing_replay or (has_routers and can_record):
            self._routing = RoutingReplay(model, replays=config.routing_replay)

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Count steps and rewards from where a checkpoint's run was: rollouts are made where that run would make them.

        Of a checkpoint amid the steps on one rollout, its prompts are answered anew.
        """
        super().go_on_from(state)
        self._step = state.get("global_step", 0) * self.args.gradient_accumulation_steps
        for name, count in kept_with(state, RewardCounts).items():
            setattr(self.reward_counts, name, count)
        if self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations):
            self.reward_counts.take_back_latest()

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._routing is None else self._routing.recording():
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's rewards, (completions, functions), of all processes; what is infinite counts as no reward."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
        unscored = rewards.isnan().all(dim=1)
        total = (rewards * self.reward_weights.to(rewards)).nansum(dim=1).masked_fill(unscored, torch.nan)
        if cast(nn.Module, self.model).training:
            self.reward_counts.add(total, cast(int, self.num_generations))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._routes, self._is_scoring = None, True
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._is_scoring = False
        if self._routing is not None:
            sequences = [
                torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask")
            ]
            if (routes := self._routes_of(*sequences)) is not None:
                batch[_EXPERT_IDS] = routes
        return batch

    def _routes_of(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """The choices of the last rollout, (B, S, layers, K)."""
        if self._routes is None and self._routing is not None:
            self._routes = self._routing.recorded(input_ids, attention_mask)
            if self._routes is None and self.args.routing_replay:
                raise UserError(
                    "The rollout's choice of experts cannot be matched with its tokens: it was not made by plain "
                    "sampling. Leave out `generation_kwargs`, or set `routing_replay: false`."
                )
        return self._routes

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's, in which the policy as it was at the rollout takes the rollout's experts; a reference has its own."""
        compute = partial(super()._get_per_token_logps_and_entropies, model, input_ids, attention_mask, *args, **kwargs)
        is_policy = model is self.model and not _is_adapter_off(self.accelerator.unwrap_model(model))
        if not self._is_scoring or self._routing is None or not is_policy:
            return compute()
        if (routes := self._routes_of(input_ids, attention_mask)) is not None:
            self._routing.follow(routes, counts=False)
        try:
            return compute()
        finally:
            self._routing.stop()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss; the experts of the rollout are followed until the backward pass has ended."""
        routes = inputs.get(_EXPERT_IDS)
        if self._routing is not None and routes is not None:
            self._routing.follow(routes, counts=model.training)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A forward and a backward pass, after which the routers choose by themselves again."""
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._stop_following()

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The same for an evaluation."""
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self._stop_following()

    def _stop_following(self) -> None:
        if self._routing is not None:
            self._routing.stop()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._routing is not None and "loss" in logs:
            logs.update(self._routing.pop(lambda sums: self.accelerator.reduce(sums, "sum")))
        super().log(logs, start_time)


def _is_adapter_off(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and get_model_status(model).enabled is False


def prepare_prompts(arguments: StageArguments, data: TrainingData) -> TrainingData:
    """Put the system prompt before the prompts, and see that each reward has what it needs.

    Raises:
        UserError: for columns that a reward needs and no row has, or values that it cannot read.
    """
    training = cast(JaiGRPOConfig, arguments.training)
    if arguments.data.drop_wrong_language:
        raise UserError("`drop_wrong_language` is about answers, and prompts have none. Leave it out.")
    for rows in filter(None, (data.train, data.evaluation)):
        if isinstance(rows, Dataset):
            check_reward_columns(training.rewards, rows, data.name)
    if training.system_prompt is None:
        return data
    turn = {"role": "system", "content": training.system_prompt}

    def with_system(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        return {"prompt": prompt if prompt[0]["role"] == "system" else [turn, *prompt]}

    evaluation = None if data.evaluation is None else data.evaluation.map(with_system)
    return replace(data, train=data.train.map(with_system), evaluation=evaluation)


def say_what_was_rewarded(trainer: JaiTrainerMixin, data: TrainingData, out: Path, console: Console) -> None:
    """Say how many groups had equal rewards, and how many completions none, after the run."""
    counts = cast(JaiGRPOTrainer, trainer).reward_counts
    if not counts.groups:
        return
    console.print(
        f"Rewards: {counts.equal:,} of {counts.groups:,} groups had equal ones and taught nothing; "
        f"{counts.unscored:,} of {counts.completions:,} completions had none."
    )
    if counts.equal == counts.groups:
        console.print(
            "[bold yellow]No group had different rewards, so the rewards taught nothing.[/] Take prompts that the "
            "model answers right now and then, more `num_generations`, or another `temperature`."
        )


GRPO = Stage(
    verb="grpo",
    title="Reinforcement learning with verifiable rewards",
    trainer_class=JaiGRPOTrainer,
    config_class=JaiGRPOConfig,
    dataset_types=(DatasetType.PROMPT,),
    prepare_data=prepare_prompts,
    finish=say_what_was_rewarded,
)


def main(argv: Sequence[str]) -> Path:
    """`jai grpo`; returns and raises what `run_command` does."""
    return run_command(GRPO, argv)


if __name__ == "__main__":
    run_as_script(main)

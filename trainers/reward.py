# SPDX-License-Identifier: Apache-2.0
"""A reward model from ranked pairs: TRL's RewardTrainer on a JAI with a linear head (paper, section 6.1.2).

jai reward --config recipes/reward.yaml
accelerate launch -m jai.trainers.reward --config recipes/reward.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import RewardConfig, RewardTrainer

from jai.conversion.adapter.files import CALIBRATION_FILE
from jai.preferences.calibration import calibration_error, fit_calibration
from jai.trainers.data import CATEGORY, LANGUAGE, TrainingData
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.router_losses import RouterLossOptions, balance_weight
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command


@dataclass
class JaiRewardConfig(RouterLossOptions, RewardConfig):
    """TRL's RewardConfig with the router's auxiliary loss, for which its trainer has no code."""


class JaiRewardTrainer(JaiTrainerMixin, RewardTrainer):
    """TRL's RewardTrainer with the router's auxiliary loss, as TRL's other trainers add it."""

    args: JaiRewardConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))
        weight = balance_weight(self.args.router_aux_loss_coef, model.config)
        self._aux_weight = weight if getattr(model.config, "num_local_experts", 1) > 1 else 0.0
        self._router_logits: tuple[torch.Tensor, ...] = ()
        if self._aux_weight:
            inner = model.get_base_model() if isinstance(model, PeftModel) else model
            inner.base_model.register_forward_hook(self._keep_router_logits)

    def _keep_router_logits(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._router_logits = output.router_logits or ()  # the classifier around it drops them

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's loss, and the auxiliary one of the routers."""
        if not self._aux_weight:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        inputs["output_router_logits"] = True
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        config = cast(PreTrainedModel, self.accelerator.unwrap_model(model)).config
        aux_loss = cast(
            torch.Tensor,
            load_balancing_loss_func(
                cast(Any, self._router_logits),
                config.num_local_experts,
                config.num_experts_per_tok,
                inputs["attention_mask"],
            ),
        )
        self._router_logits = ()
        mode = "train" if model.training else "eval"
        mean = cast(torch.Tensor, self.accelerator.gather_for_metrics(aux_loss.detach())).mean()
        self._metrics[mode]["aux_loss"].append(mean.item())
        loss = loss + self._aux_weight * aux_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def pair_logits(self, rows: Dataset) -> torch.Tensor:
        """Logits of both answers of each pair, (rows, 2), the chosen one first, in every process.

        Args:
            rows: tokenised, as the trainer's own.
        """
        loader = self.accelerator.prepare(
            DataLoader(
                cast(Any, rows.select_columns(["chosen_ids", "rejected_ids"])),
                batch_size=self.args.per_device_eval_batch_size,
                collate_fn=self.data_collator,
            )
        )
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        logits = []
        for batch in loader:
            with self.compute_loss_context_manager():
                both = model(**batch, use_cache=False).logits.float().view(2, -1).T
            logits.append(cast(torch.Tensor, self.accelerator.gather_for_metrics(both.contiguous())).cpu())
        model.train(was_training)
        return torch.cat(logits)


def measure_reward_model(trainer: JaiTrainerMixin, data: TrainingData, out: Path, console: Console) -> None:
    """Measure the accuracy on held-out pairs, and write the calibration beside the checkpoint.

    Accuracy is also given by which answer is the longer one, and by the pairs' category and language.
    """
    rows = trainer.eval_dataset
    if not isinstance(rows, Dataset):
        console.print(
            "[yellow]No calibration was written[/]: there are no held-out pairs. `test_split_size` with "
            "`eval_strategy` cuts some; `jai score` needs it for probabilities."
        )
        return
    logits = cast(JaiRewardTrainer, trainer).pair_logits(rows).tolist()
    if not trainer.is_world_process_zero():
        return
    chosen, rejected = [pair[0] for pair in logits], [pair[1] for pair in logits]
    fitted = fit_calibration(chosen, rejected)
    groups: dict[str, list[bool]] = {"all pairs": [better > worse for better, worse in logits]}
    for row, is_right in zip(rows, groups["all pairs"].copy()):
        for name in _groups_of(row):
            groups.setdefault(name, []).append(is_right)
    accuracy = {name: {"accuracy": sum(right) / len(right), "pairs": len(right)} for name, right in groups.items()}
    error = calibration_error(chosen, rejected)
    fitted.save(out, {"held_out": accuracy, "expected_calibration_error": None if error != error else error})
    for name, figures in accuracy.items():
        console.print(f"  {escape(name)}: {figures['accuracy']:.1%} of {figures['pairs']:,} held-out pairs")
    console.print(
        f"{CALIBRATION_FILE}: probability = sigmoid({fitted.slope:.4g} x logit {fitted.intercept:+.4g}), fitted to "
        f"{fitted.pairs:,} pairs"
        + ("" if error != error else f"; expected calibration error {error:.3f} (each half by the other)")
    )


def _groups_of(row: dict[str, Any]) -> list[str]:
    longer = len(row["chosen_ids"]) - len(row["rejected_ids"])
    length = "longer" if longer > 0 else "shorter" if longer < 0 else "as long"
    named = [f"{name} {row[name]}" for name in (CATEGORY, LANGUAGE) if row.get(name) is not None]
    return [f"the chosen answer {length}", *named]


REWARD = Stage(
    verb="reward",
    title="Reward model",
    trainer_class=JaiRewardTrainer,
    config_class=JaiRewardConfig,
    dataset_types=(DatasetType.PREFERENCE,),
    auto_class=AutoModelForSequenceClassification,
    finish=measure_reward_model,
)


def main(argv: Sequence[str]) -> Path:
    """`jai reward`; returns and raises what `run_command` does."""
    return run_command(REWARD, argv)


if __name__ == "__main__":
    run_as_script(main)

# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation: TRL's DPOTrainer on a JAI.

jai dpo --config recipes/dpo.yaml
accelerate launch -m jai.trainers.dpo --config recipes/dpo.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from jai.errors import UserError
from jai.provenance import checkpoint_revision
from jai.trainers.arguments import StageArguments
from jai.trainers.checks import refuse_without_effect
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.pair_figures import PAIR_GROUPS, PairFigures
from jai.trainers.reference import KeptLogProbs, log_probs_folder, pair_keys
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command

_OF_A_REFERENCE = ("dtype", "attn_implementation", "experts_implementation", "trust_remote_code", "use_safetensors")


@dataclass
class JaiDPOConfig(DPOConfig):
    """TRL's DPOConfig, in which the reference may be another checkpoint."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the reference. It is held in memory beside the model, unless "
            "`precompute_ref_log_probs` is on. Default: the model itself, as it was before training."
        },
    )


class JaiDPOTrainer(JaiTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with skip alphas left out of weight decay, a reference whose log-probabilities outlive the
    process, and more in its logs: router statistics, and margins and accuracies of each category and language.

    Of TRL it overrides one method that is not public: where the reference's log-probabilities are computed beforehand
    (`tests/test_trainers_preferences.py` names it).
    """

    args: DPOConfig

    def __init__(self, *args: Any, **kwargs: Any):
        config, model = kwargs.get("args"), kwargs.get("model")
        name = getattr(config, "ref_model_name_or_path", None)
        self._reference_name: str | None = name or (model if isinstance(model, str) else None)
        loading = dict(getattr(config, "model_init_kwargs", None) or {})
        # The revision is the model's own; what else is set for it, such as a longer context, is no other checkpoint's.
        loading = {key: loading[key] for key in _OF_A_REFERENCE if key in loading} if name else loading
        if (quantization := kwargs.get("quantization_config")) is not None:
            loading["quantization_config"] = quantization
        self._reference_loading = loading
        if name:
            kwargs["ref_model"] = AutoModelForCausalLM.from_pretrained(name, **loading)
        super().__init__(*args, **kwargs)
        if name and self.precompute_ref_logps:
            self.ref_model = None  # what it had to say is in the rows
        self._log_probs: list[torch.Tensor] = []  # of a batch's sequences: the policy's, then the reference's
        if isinstance(self._group_figures, PairFigures):
            for each in filter(None, (self.model, self.ref_model)):
                cast(nn.Module, self.accelerator.unwrap_model(each)).register_forward_hook(self._keep_log_probs)

    def _keep_log_probs(self, model: nn.Module, args: tuple, output: Any) -> None:
        if (log_probs := getattr(output, "log_probs", None)) is not None:
            self._log_probs.append(log_probs.detach().sum(dim=1))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; the rewards that it is made of are counted by the pairs' groups."""
        groups = inputs.pop(PAIR_GROUPS, None)
        self._log_probs.clear()
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if groups is not None and isinstance(self._group_figures, PairFigures):
            policy = self._log_probs[0].chunk(2)
            reference: Any
            if self.precompute_ref_logps:
                reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                reference = self._log_probs[1].chunk(2)
            chosen, rejected = (self.beta * (ours - theirs) for ours, theirs in zip(policy, reference))
            self._group_figures.add(groups, chosen, rejected, training=cast(nn.Module, self.model).training)
        self._log_probs.clear()
        return result

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's columns of the reference's log-probabilities, of which those that are kept are not computed again.

        With DeepSpeed, whose engine TRL makes for it, it is TRL's own, which a killed run begins anew.
        """
        if self.is_deepspeed_enabled or not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        keys, kept = pair_keys(dataset), None
        # What is known, or why nothing can be: the main process alone reads and writes.
        shared: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                kept = KeptLogProbs(self._log_probs_folder())
                shared[0] = kept.read(keys)
            except UserError as error:
                shared[1] = str(error)
        broadcast_object_list(shared)
        values, obstacle = shared
        if obstacle is not None:
            raise UserError(obstacle)
        missing = np.flatnonzero(np.isnan(values).any(axis=1))
        if kept is not None and len(missing) < len(keys):
            print(f"Log-probabilities of the reference: {len(keys) - len(missing):,} of {len(keys):,} pairs are kept.")
        try:
            if len(missing):
                self._compute_missing(dataset, missing, values, keys, kept, f"Reference ({name})", batch_size)
        finally:
            if kept is not None:
                kept.close()
        columns = {"ref_chosen_logps": values[:, 0], "ref_rejected_logps": values[:, 1]}
        for column, numbers in columns.items():
            dataset = dataset.add_column(column, numbers.tolist())
        return dataset

    def _compute_missing(
        self,
        dataset: Dataset,
        missing: np.ndarray,
        values: np.ndarray,
        keys: list[bytes],
        kept: KeptLogProbs | None,
        title: str,
        batch_size: int,
    ) -> None:
        rows = cast(Any, dataset.select(missing))
        loader = self.accelerator.prepare(DataLoader(rows, batch_size=batch_size, collate_fn=self.data_collator))
        model, done = self.ref_model or self.model, 0
        bar = tqdm(loader, desc=title, disable=self.args.disable_tqdm or not self.accelerator.is_main_process)
        for batch in bar:
            found = torch.stack(self.compute_ref_log_probs(model, batch), dim=1).float()
            found = cast(torch.Tensor, self.accelerator.gather_for_metrics(found)).cpu()
            places = missing[done : done + len(found)]
            done += len(found)
            values[places] = found.numpy()
            if not np.isfinite(values[places]).all():
                raise UserError(
                    "The reference gives log-probabilities that are not finite, first in pair "
                    f"{places[0] + 1:,} or soon after it. Load it in another `dtype` (float32, bfloat16), or check its "
                    "weights."
                )
            if kept is not None:
                kept.add((keys[place] for place in places), values[places])

    def _log_probs_folder(self) -> Path:
        """Where the reference's log-probabilities are kept: by its weights, and by how they are computed."""
        args = self.args
        loading = dict(self._reference_loading)
        reference = self._precompute_model_hash
        if self._reference_name is not None:
            reference = checkpoint_revision(self._reference_name, loading.pop("revision", None))
        return log_probs_folder(
            reference=reference,
            loading=loading,
            dtype=cast(PreTrainedModel, self.ref_model or self.model).dtype,
            autocast=(args.bf16, args.fp16),
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            ld_alpha=args.ld_alpha,
        )


def check_dpo_options(arguments: StageArguments) -> None:
    """Refuse options of one loss beside another, and of a reference that there is not.

    Raises:
        UserError: naming the option.
    """
    training = cast(JaiDPOConfig, arguments.training)
    losses = set(training.loss_type)
    refuse_without_effect(
        training,
        {
            "label_smoothing": (
                bool(losses & {"exo_pair", "robust", "aot", "aot_unpaired"}),
                "`loss_type` exo_pair, robust, aot or aot_unpaired",
            ),
            "discopop_tau": ("discopop" in losses, "`loss_type` discopop"),
            "f_alpha_divergence_coef": (
                training.f_divergence_type == "alpha_divergence",
                "`f_divergence_type: alpha_divergence`",
            ),
            "ref_model_mixup_alpha": (training.sync_ref_model, "`sync_ref_model: true`"),
            "ref_model_sync_steps": (training.sync_ref_model, "`sync_ref_model: true`"),
            "padding_free": (False, "a TRL whose DPOTrainer has it again (1.16 falls back to padding)"),
            "precompute_ref_batch_size": (training.precompute_ref_log_probs, "`precompute_ref_log_probs: true`"),
        },
    )
    if "robust" in losses and not training.label_smoothing < 0.5:
        raise UserError(
            f"`label_smoothing` is {training.label_smoothing}, the share of pairs whose answers are the wrong way "
            "round; the robust loss needs less than 0.5."
        )
    if training.precompute_ref_log_probs and arguments.script.dataset_streaming:
        raise UserError(
            "`precompute_ref_log_probs` needs all pairs at once, and `dataset_streaming` is on. Leave out one of them."
        )
    if training.sync_ref_model:
        if training.precompute_ref_log_probs:
            raise UserError(
                "`sync_ref_model` moves the reference, and `precompute_ref_log_probs` needs one that stays. Leave out "
                "one of the two."
            )
        if arguments.model.use_peft and training.ref_model_name_or_path is None:
            raise UserError(
                "`sync_ref_model` needs a reference of its own, and with `use_peft` it is the model with its adapter "
                "off. Leave it out, or set `use_peft: false`."
            )


DPO = Stage(
    verb="dpo",
    title="Direct preference optimisation",
    trainer_class=JaiDPOTrainer,
    config_class=JaiDPOConfig,
    check_options=check_dpo_options,
    dataset_types=(DatasetType.PREFERENCE,),
)


def main(argv: Sequence[str]) -> Path:
    """`jai dpo`; returns and raises what `run_command` does."""
    return run_command(DPO, argv)


if __name__ == "__main__":
    run_as_script(main)

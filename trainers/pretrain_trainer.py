# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on packed text: the loss, what is logged of it, and what stops a run."""

import time
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCardData
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from jai.configuration_jai import JaiConfig
from jai.errors import UserError
from jai.planning.flops import model_flops
from jai.planning.time import peak_flops
from jai.pretraining.plan import AnyPlan
from jai.trainers.engine import batches_at_once
from jai.trainers.figures import MeanFigures
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.pretrain_config import PretrainConfig
from jai.trainers.router_losses import RouterLosses, balance_weight, mean_of
from jai.trainers.run_identity import RunIdentity
from jai.trainers.schedules import AnnealedWeightDecay, annealing_begins, inverse_decay_schedule
from jai.trainers.second_token import add_second_token_layer
from jai.trainers.steps import SEQUENCE, StepLayout, StepSequences, collate_present, is_absent

TOKENS_SEEN = "tokens_seen"  # in the logs, and before the name of a source


class JaiPretrainTrainer(JaiTrainerMixin, Trainer):
    """Trains on the sequences of a plan, in the order of their numbers.

    Args:
        model: a causal language model, or PEFT's around one.
        args: the options.
        plan: the sequences.
        layout: which of them each step takes.
        identity: what decides the run; goes into its checkpoints.
        kwargs: further arguments of `Trainer` and `JaiTrainerMixin`.
    """

    weighs_tokens_alike = True
    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        args: PretrainConfig,
        *,
        plan: AnyPlan,
        layout: StepLayout,
        identity: dict[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        inner = cast(PreTrainedModel, getattr(model, "get_base_model", lambda: model)())
        config = inner.config.get_text_config()
        config.output_router_logits = False  # the routers' losses are ours, by layer
        add_fused_lm_head(inner)
        second = add_second_token_layer(inner, args.seed, plan.corpus.eos_token_id) if args.mtp_weight else None
        self.plan, self.layout = plan, layout
        self.languages = plan.languages
        self.annealing_step = annealing_begins(layout.steps, args.annealing)
        callbacks = [*(callbacks or []), RunIdentity(identity), FiniteGradients()]
        if args.annealing_weight_decay is not None:
            callbacks.append(AnnealedWeightDecay(self.annealing_step, args.annealing_weight_decay))
        super().__init__(
            model=model,
            args=args,
            train_dataset=StepSequences(plan, layout),
            data_collator=collate_present,
            callbacks=callbacks,
            **kwargs,
        )
        if second is not None:
            second.requires_grad_(True)  # it is no part of the model that `trainable` could name
        self._balance_weight = balance_weight(args.router_aux_loss_coef, config)
        self._z_weight = args.router_z_loss_coef
        self._router_losses = RouterLosses(cast(nn.Module, self.model))
        self._figures = MeanFigures()
        self._present = 1  # batches of the running step that hold sequences
        self._flops, self._peak = _flops_of(inner, args)
        self._since = (time.perf_counter(), 0)  # of the last log: when, and tokens seen

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Warmup, stable, inverse-proportional decay, unless the options name another schedule."""
        args = cast(PretrainConfig, self.args)
        is_ours = SchedulerType(args.lr_scheduler_type) is SchedulerType.WARMUP_STABLE_DECAY
        if self.lr_scheduler is not None or not is_ours or args.lr_scheduler_kwargs:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = inverse_decay_schedule(
            optimizer or cast(Optimizer, self.optimizer),
            warmup=args.get_warmup_steps(num_training_steps),
            decay=self.annealing_step,
            steps=num_training_steps,
            final=args.annealing_learning_rate,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """The batches of a step, some of which are absent while the batch grows, and their labels' count."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._present = max(1, sum(not is_absent(batch) for batch in batches))
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A forward and a backward pass; nothing for an absent batch.

        Raises:
            UserError: if the loss is not finite, before any weight has changed by it.
        """
        if is_absent(inputs):
            return torch.zeros((), device=self.args.device)
        sequences = inputs[SEQUENCE].tolist()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss of step {self.state.global_step + 1:,} is {loss.item()}, in {_named(self.plan, sequences)}. "
                f"{self._how_to_go_on()}"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the next token over all of the step's labels, and the routers' losses over its batches."""
        args = cast(PretrainConfig, self.args)
        # Gradients are means over processes, and the count of labels is of all of them.
        processes = batches_at_once(args) if args.average_tokens_across_devices else 1
        languages = inputs.pop("language_ids")
        inputs.pop(SEQUENCE)
        if self._router_monitor is not None:
            self._router_monitor.language_T = languages.flatten()
        outputs = model(**inputs, fused_lm_head=True)
        losses = -outputs.log_probs
        loss = losses.sum() / cast(torch.Tensor, num_items_in_batch) * processes
        self._figures.add("loss/next_token", losses.sum(), outputs.label_mask.sum())
        self._add_language_losses(losses, outputs.label_mask, languages)
        balance, z = self._router_losses.pop((languages >= 0).flatten())
        if balance:
            self._add_router_losses(balance, z)
            if self._balance_weight:
                loss = loss + self._balance_weight * mean_of(balance).to(loss.device) / self._present
            if self._z_weight:
                loss = loss + self._z_weight * mean_of(z).to(loss.device) / self._present
        if args.mtp_weight:
            self._figures.add("loss/second_token", outputs.second_loss, outputs.second_tokens)
            second = outputs.second_loss / cast(torch.Tensor, num_items_in_batch)
            loss = loss + self.mtp_weight * second.to(loss.device) * processes
        return (loss, outputs) if return_outputs else loss

    @property
    def mtp_weight(self) -> float:
        """Weight of the second next token's loss in the running step."""
        args = cast(PretrainConfig, self.args)
        is_annealed = self.state.global_step >= self.annealing_step and args.annealing_mtp_weight is not None
        return cast(float, args.annealing_mtp_weight) if is_annealed else args.mtp_weight

    def _add_language_losses(self, losses: torch.Tensor, mask: torch.Tensor, languages: torch.Tensor) -> None:
        with torch.no_grad():
            of_label = languages[:, 1:].to(losses.device)
            for number, language in enumerate(self.plan.languages):
                counted = mask[:, : of_label.shape[1]] & (of_label == number)
                self._figures.add(
                    f"loss/language/{language}", (losses[:, : of_label.shape[1]] * counted).sum(), counted.sum()
                )

    def _add_router_losses(self, balance: dict[int, torch.Tensor], z: dict[int, torch.Tensor]) -> None:
        for name, by_layer in (("aux_loss", balance), ("z_loss", z)):
            one = torch.ones((), device=self.args.device)
            for layer, loss in by_layer.items():
                self._figures.add(f"router/{name}/layer_{layer:02}", loss, one)
            self._figures.add(f"router/{name}/mean", mean_of(by_layer), one)

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """For `push_to_hub`. transformers' card would say "trained from scratch on an unknown dataset"."""
        if not self.is_world_process_zero():
            return
        name = get_config_model_id(cast(PreTrainedModel, self.model).config)
        base = None if not name or Path(name).exists() else name
        data = ModelCardData(base_model=base, library_name="transformers", tags=["generated_from_trainer"])
        of = f" of [{base}](https://huggingface.co/{base})" if base else ""
        text = (
            f"# {model_name}\n\nContinued pre-training{of} with `jai pretrain`; "
            "`provenance.json` says with which text and options. `jai publish` puts a model card in place of this "
            "page.\n"
        )
        (Path(str(self.args.output_dir)) / "README.md").write_text(f"---\n{data}\n---\n\n{text}", encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with losses by language and by layer, tokens seen by source, and tokens a second."""
        if "loss" in logs:
            logs.update(self._figures.pop(lambda sums: self.accelerator.reduce(sums, "sum")))
            seen = self.plan.tokens_seen(self.layout.first_sequence(self.state.global_step))
            total, now = sum(seen.values()), time.perf_counter()
            logs[TOKENS_SEEN] = total
            logs.update({f"{TOKENS_SEEN}/{source}": tokens for source, tokens in seen.items()})
            before, tokens_before = self._since
            if tokens_before:  # not the first, which would count what came before a resumed run
                logs["tokens_per_second"] = (total - tokens_before) / (now - before)
                if self._flops is not None and self._peak is not None:
                    peak = self._peak * self.accelerator.num_processes
                    logs["utilization"] = logs["tokens_per_second"] * self._flops / peak
            self._since = now, total
        super().log(logs, start_time)

    def _how_to_go_on(self) -> str:
        return (
            "The run has stopped, and no checkpoint was written since. Go on from the last one with "
            "`--resume_from_checkpoint true` if the fault was the machine's; else lower `learning_rate`, or take these "
            "documents out of the text, and begin anew from that checkpoint's weights."
        )


def _flops_of(model: PreTrainedModel, args: PretrainConfig) -> tuple[float | None, float | None]:
    """Operations of training on a token, of a JAI; and those a second of the device in bf16, where they are known."""
    flops = peak = None
    if isinstance(model.config, JaiConfig):
        flops = model_flops(model, model.config, args.max_length)
    if args.device.type == "cuda" and (args.bf16 or model.dtype == torch.bfloat16):
        peak = peak_flops(torch.cuda.get_device_name(args.device))
    return flops, peak


_SHOWN_DOCUMENTS = 12


def _named(plan: AnyPlan, sequences: list[int]) -> str:
    """Sequences and the documents in them, for an error."""
    documents = []
    for number in sequences:
        part, within = plan.part(number)
        pieces = part.pieces(within)
        for source, document in zip(pieces.source.tolist(), pieces.document.tolist()):
            if source >= 0:
                documents.append(f"{part.sources[source].name} {document}")
    shown = ", ".join(documents[:_SHOWN_DOCUMENTS])
    more = f" and {len(documents) - _SHOWN_DOCUMENTS} more" if len(documents) > _SHOWN_DOCUMENTS else ""
    numbers = ", ".join(map(str, sequences))
    return f"sequence{'s' if len(sequences) > 1 else ''} {numbers} of the plan (documents {shown}{more})"


class FiniteGradients(TrainerCallback):
    """Ends a run whose gradients are not finite, before they reach the weights.

    Raises:
        UserError: before the optimiser's step. Not with fp16, whose scaler leaves such steps out.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if args.fp16 or not gradients:
            return
        # One figure for each, and one question to the device: infinite and NaN entries stay so in a sum of |x|.
        norms = torch.stack([torch.linalg.vector_norm(_local(each).detach().float(), ord=1) for each in gradients])
        if not torch.isfinite(norms).all():
            raise UserError(
                f"The loss of step {state.global_step + 1:,} is finite, and its gradients are not. The run has stopped "
                "with the weights as they were. Lower `learning_rate`, or go on from the last checkpoint with "
                "`--resume_from_checkpoint true` if the fault was the machine's."
            )


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, getattr(gradient, "to_local", lambda: gradient)())

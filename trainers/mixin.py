# SPDX-License-Identifier: Apache-2.0
"""What JAI adds to any of transformers' trainers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from jai.errors import UserError
from jai.trainers.group_losses import GroupLosses
from jai.trainers.monitor import ReadablePrinter, ReadableProgress, RouterMonitor
from jai.trainers.pair_figures import GroupingCollator, PairFigures
from jai.trainers.parts import TrainableParts
from jai.trainers.trainable import (
    ADAPTER_WEIGHTS,
    TrainedModel,
    add_to_adapter,
    alphas_follow_adapter,
    train_parts,
)
from jai.trainers.whole_checkpoints import LogWithCheckpoints, read_state


def prepare_liger() -> None:
    """What `use_liger_kernel` needs before a run: Liger passes over model types that it was not told of, in silence.

    Raises:
        UserError: if Liger is not installed, or cannot run here.
    """
    try:
        from jai.kernels.liger import require_device
    except ImportError as error:
        raise UserError(
            f"`use_liger_kernel` is on, and Liger cannot be imported ({error}). `pip install liger-kernel`, or leave "
            "the option out."
        ) from error
    require_device()


# Beside a sharded checkpoint of an adapter: the skip alphas that learn, which PEFT does not count to it.
ALPHAS_FILE = "skip_alphas.safetensors"
_WITHOUT_BASE = ("is a fine-tuned version of [None](https://huggingface.co/None)", "is fine-tuned")  # in TRL's card


def gather_head_for_reading(model: PreTrainedModel) -> None:
    """Under FSDP2, have the head whole when the backbone is done: TRL reads its weight and does not call it.

    Accelerate shards it together with the last norm, whose call gathers both. PEFT's wrapper hides the norm from it:
    of a sharded weight, rows of new tokens cannot be taken, and gradients would not be summed over processes.
    """

    def gather(backbone: nn.Module, args: tuple, output: Any) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()

    model.base_model.register_forward_hook(gather)


class JaiTrainerMixin(Trainer):
    """Put before a trainer class: `class MyTrainer(JaiTrainerMixin, SFTTrainer)`.

    Skip alphas are not weight-decayed; router statistics and alphas are in the logs (`router_statistics=False` leaves
    them out), and with `group_figures` the loss, or for pairs margin and accuracy, of each category and language.
    `use_liger_kernel` applies to a JAI.
    `linear_cross_entropy=True` computes the head and its loss by our kernels. `parts`
    (`jai.trainers.parts.select_parts`) says what learns; None leaves it as it is.
    """

    # Whether the loss is a plain mean over tokens, so that its gradient can be computed in the forward pass.
    weighs_tokens_alike = False
    # What routers are told apart by: of a trainer that says which language each token is of.
    languages: Sequence[str] = ()

    def __init__(
        self,
        *args: Any,
        router_statistics: bool = True,
        linear_cross_entropy: bool = False,
        parts: TrainableParts | None = None,
        group_figures: GroupLosses | PairFigures | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.hub_token:  # every checkpoint has a pickle of the arguments, and pushing uploads one
            os.environ["HF_TOKEN"] = self.args.hub_token
            self.args.hub_token = None
        model = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes would pack the layer in an evaluation, and warn alone of the wrong gradients after it.
                cast(Any, module).support_avx512bf16_for_cpu = False
        self._trained = TrainedModel() if parts is None else train_parts(model, parts)
        if self._trained.alphas:
            alphas_follow_adapter(cast(PeftModel, model), self._trained)
        checkpointing = cast(dict[str, Any], self.args.gradient_checkpointing_kwargs or {})
        if checkpointing.get("use_reentrant") and parts is not None:
            model.enable_input_require_grads()  # it finds gradients only through inputs that have some
        if self.args.use_liger_kernel:
            prepare_liger()
        if linear_cross_entropy:  # after TRL, which puts its own head in place when the trainer is made
            from jai.kernels.head.causal_lm import use_linear_cross_entropy

            for model in filter(None, (self.model, getattr(self, "ref_model", None))):
                use_linear_cross_entropy(
                    cast(PreTrainedModel, self.accelerator.unwrap_model(model)),
                    expect_equal_weights=self.weighs_tokens_alike,
                )
        gather_head_for_reading(model.get_base_model() if isinstance(model, PeftModel) else model)
        self._router_monitor = None
        if router_statistics:
            self._router_monitor = RouterMonitor(cast(nn.Module, self.model), self.languages)
        self._group_figures = group_figures
        if isinstance(group_figures, GroupLosses):
            group_figures.watch(cast(nn.Module, self.model))
        elif group_figures is not None:
            self.data_collator = GroupingCollator(self.data_collator, group_figures)
            self.args.remove_unused_columns = False  # the collators of pairs take what they need
        for theirs, ours in ((ProgressCallback, ReadableProgress), (PrinterCallback, ReadablePrinter)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ours)
        self.add_callback(LogWithCheckpoints())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers' own; what TRL counts goes on from the checkpoint, too."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:  # the last one, as transformers finds it
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        if checkpoint:
            self.go_on_from(read_state(Path(checkpoint)) or {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Count tokens from where a checkpoint's run was; TRL begins at 0.

        Args:
            state: the checkpoint's trainer_state.json.
        """
        counts = [log["num_tokens"] for log in state.get("log_history", []) if "num_tokens" in log and "loss" in log]
        if counts and hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = counts[-1]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that weight decay applies to.

        None of the skip alphas, whose zero means "no skip", nor of those with frozen entries, which it would change,
        and so no rows of new tokens in an adapter either.
        """
        parameters = dict(model.named_parameters())
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not name.endswith("skip_alpha")
            and "trainable_tokens_delta" not in name
            and not self._trained.is_partial(parameters[name])
        ]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A forward and a backward pass, after which entries that do not learn have no gradient."""
        loss = super().training_step(*args, **kwargs)
        self._trained.clear_frozen_gradients()
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or its adapter, whose file then also holds the skip alphas that learn.

        A sharded checkpoint has no such file, and they lie beside it.
        """
        super().save_model(output_dir, _internal_call)
        alphas = self._trained.alpha_values()  # on all ranks
        folder = Path(str(output_dir or self.args.output_dir))
        if alphas and self.args.should_save:
            if (folder / ADAPTER_WEIGHTS).exists():
                add_to_adapter(folder, alphas)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(alphas, folder / ALPHAS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """transformers', and of a sharded checkpoint the skip alphas, which Accelerate leaves out of an adapter's."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / ALPHAS_FILE
        if self._trained.alphas and path.exists():
            self._trained.set_alphas(load_file(path))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._router_monitor is not None and "loss" in logs:  # a training step, not an evaluation or the summary
            logs.update(self._router_monitor.pop(lambda sums: self.accelerator.reduce(sums, "sum")))
        if self._group_figures is not None and (losses := [key for key in logs if key.endswith("loss")]):
            prefix = losses[0].removesuffix("loss")  # of an evaluation, "eval_"; of the whole training, "train_"
            if prefix != "train_":
                means = self._group_figures.pop(lambda sums: self.accelerator.reduce(sums, "sum"), training=not prefix)
                logs.update({f"{prefix}{key}": mean for key, mean in means.items()})
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Only for `push_to_hub`, and of a model from a local folder without TRL's link to a model "None"."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)
            card = Path(str(self.args.output_dir)) / "README.md"
            if self.is_world_process_zero() and card.exists():
                text = card.read_text(encoding="utf-8")
                card.write_text(text.replace(*_WITHOUT_BASE), encoding="utf-8")

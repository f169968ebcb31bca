# SPDX-License-Identifier: Apache-2.0
"""The options of pre-training: transformers' `TrainingArguments`, and what of text, schedules and losses is ours."""

from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import SchedulerType, TrainingArguments

from jai.errors import UserError
from jai.pretraining.plan import DEFAULT_RHO, MIXED_STRATEGIES, Strategy

_SHARES = ("rho", "annealing", "batch_ramp")
_FINAL_RATE, _BATCH_RAMP = 0.1, 0.5
_AT_LEAST_0 = ("annealing_weight_decay", "router_z_loss_coef", "mtp_weight", "annealing_mtp_weight")


@dataclass
class PretrainConfig(TrainingArguments):
    """What `jai pretrain` takes beside the model's options.

    A share of the steps is a share of the optimiser's steps, from 0 to 1.
    """

    _argument_group_name = "JAI's options for pre-training"

    packed: str | None = field(default=None, metadata={"help": "Folder of text that `jai pack` wrote."})
    verify_packed: bool = field(
        default=False,
        metadata={
            "help": "Read all packed text before the run and compare it with its hashes. Sizes always are, and "
            "ids with the vocabulary where they are read."
        },
    )
    mixture: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with the sources' `weight`, `epochs` and `keep_best`, or with `alpha` and `beta`, as "
            "`jai pack` takes it. Default: what the text was packed with."
        },
    )
    max_length: int = field(default=4096, metadata={"help": "Tokens of a sequence: the context that is trained with."})
    packing_strategy: str = field(
        default="isolated",
        metadata={
            "help": "How documents share a sequence. `isolated`: whole where they can be, and apart from each other; "
            "`concatenated`: one after another, each seeing those before it; `xlda`: two languages or more in every "
            "sequence, each document seeing those before it (Trillion-7B, section 2); `paired-isolated`: the same "
            "sequences, documents apart.",
            "choices": list(get_args(Strategy)),
        },
    )
    rho: float = field(
        default=DEFAULT_RHO,
        metadata={
            "help": "With `xlda` and `paired-isolated`: probability that the next document is of another language. "
            "The default is ours, as Trillion-7B's report has no number."
        },
    )
    annealing: float = field(
        default=0.1,
        metadata={
            "help": "Share of the steps, the last ones, in which the learning rate decays and other options that begin "
            "with `annealing_` hold."
        },
    )
    annealing_mixture: str | None = field(
        default=None, metadata={"help": "YAML file like `mixture`, for the annealing. Default: no change."}
    )
    annealing_learning_rate: float = field(
        default=_FINAL_RATE,
        metadata={"help": "Learning rate at the end of the annealing, as a share of `learning_rate`."},
    )
    annealing_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay in the annealing. Default: `weight_decay`."}
    )
    first_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Batches that the first step accumulates; from there, their number grows in equal stages to "
            "`gradient_accumulation_steps`. Default: no growth."
        },
    )
    batch_ramp: float = field(
        default=_BATCH_RAMP, metadata={"help": "Share of the steps over which `first_accumulation_steps` grows."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the routers' load-balancing loss, the mean over layers of each layer's own. Default: "
            "the model's."
        },
    )
    router_z_loss_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the routers' z-loss, the mean over layers and tokens of (log Σ exp of logits)²."},
    )
    mtp_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the second next token's loss, which one more layer learns to predict (multi-token "
            "prediction, as Trillion-7B has it); where the model has such a layer, it goes on with it. 0: none."
        },
    )
    keep_mtp: bool = field(
        default=False,
        metadata={
            "help": "Keep that layer in the final model, for `generate(use_mtp=True)`: it drafts a token at every step."
        },
    )
    annealing_mtp_weight: float | None = field(
        default=None, metadata={"help": "`mtp_weight` in the annealing. Default: no change."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that a checkpoint brings along. A JAI needs none."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of `from_pretrained`."}
    )

    # What differs from transformers' defaults; three of their help texts have signs that argparse stumbles over.
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Only 1: how often text is used is `epochs` of a source in a mixture."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default=SchedulerType.WARMUP_STABLE_DECAY.value,
        metadata={
            "help": "Schedule of the learning rate. warmup_stable_decay, the default, decays to "
            "`annealing_learning_rate` in inverse proportion to the steps; with `lr_scheduler_kwargs`, or another "
            "name, it is transformers' own."
        },
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of transformers' schedule."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; and whenever a checkpoint is saved."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )
    bf16: bool = field(default=True, metadata={"help": "Compute in bfloat16 where PyTorch's autocast does."})
    torch_empty_cache_steps: int | None = field(
        default=None, metadata={"help": "Empty the device's cache after so many steps. Default: never."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: a loss that is not finite ends the run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "No effect: packed text has no columns."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Must stay sequential: the order is a function of seed and step."}
    )

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; expected a share, from 0 to 1.")
        for name in _AT_LEAST_0:
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"`{name}` is {value}; expected 0 or more.")
        if not 0 < self.annealing_learning_rate <= 1:
            raise UserError(
                f"`annealing_learning_rate` is {self.annealing_learning_rate}; expected a share of `learning_rate`, "
                "above 0 and up to 1."
            )
        first = self.first_accumulation_steps
        if first is not None and not 1 <= first <= self.gradient_accumulation_steps:
            raise UserError(
                f"`first_accumulation_steps` is {first}; expected 1 to `gradient_accumulation_steps`, which is "
                f"{self.gradient_accumulation_steps}."
            )
        if self.batch_ramp != _BATCH_RAMP and first is None:
            raise UserError(
                f"`batch_ramp` is {self.batch_ramp}, and the batch does not grow. Give `first_accumulation_steps`, or "
                "leave it out."
            )
        if self.rho != DEFAULT_RHO and self.packing_strategy not in MIXED_STRATEGIES:
            raise UserError(
                f"`rho` is {self.rho}, and `packing_strategy` is {self.packing_strategy}, which does not mix "
                f"languages. Take one of {', '.join(MIXED_STRATEGIES)}, or leave it out."
            )
        for name in ("annealing_mixture", "annealing_weight_decay", "annealing_mtp_weight"):
            if getattr(self, name) is not None and not self.annealing:
                raise UserError(f"`{name}` is given, but `annealing` is 0. Give a share of the steps.")
        if self.annealing_weight_decay is not None and not self.weight_decay:
            raise UserError(
                "`annealing_weight_decay` is given, and `weight_decay` is 0, so that nothing has one to change. Give "
                "one above 0."
            )
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        is_ours = schedule == SchedulerType.WARMUP_STABLE_DECAY.value and not self.lr_scheduler_kwargs
        if self.annealing_learning_rate != _FINAL_RATE and not is_ours:
            raise UserError(
                "`annealing_learning_rate` is of our decay, and the schedule is transformers' own (`lr_scheduler_type` "
                "is another, or `lr_scheduler_kwargs` is given). Leave one of them out."
            )
        if self.annealing_mtp_weight is not None and not self.mtp_weight:
            raise UserError("`annealing_mtp_weight` is given, and `mtp_weight` is 0, so that there is no such layer.")
        if self.keep_mtp and not self.mtp_weight:
            raise UserError("`keep_mtp` is on, and `mtp_weight` is 0, so that no layer learns that could be kept.")
        for name, only in (
            ("num_train_epochs", 1),
            ("logging_nan_inf_filter", False),
            ("train_sampling_strategy", "sequential"),
            ("group_by_length", False),
            ("auto_find_batch_size", False),
            ("ignore_data_skip", False),
            ("label_smoothing_factor", 0),
        ):
            if getattr(self, name, only) != only:
                raise UserError(
                    f"`{name}` is {getattr(self, name)}, but pre-training needs {only}: {_WHY[name]}. Leave it out."
                )
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no" or self.do_eval:
            raise UserError("`eval_strategy` is on, and `jai pretrain` has no text to evaluate on. Leave it out.")


_WHY = {
    "num_train_epochs": "how often text is used is `epochs` of a source, in a mixture",
    "logging_nan_inf_filter": "a loss that is not finite ends the run, and must be seen",
    "train_sampling_strategy": "the order is a function of seed and step",
    "group_by_length": "all sequences are of one length",
    "auto_find_batch_size": "the batch decides which text a step sees",
    "ignore_data_skip": "a resumed run continues with the text that comes next",
    "label_smoothing_factor": "the loss is that of the next token",
}

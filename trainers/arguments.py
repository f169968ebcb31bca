# SPDX-License-Identifier: Apache-2.0
"""What a training stage is told: TRL's dataclasses, ours beside them, and one parser for a YAML file with overrides."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from jai.errors import UserError

TrlConfig: TypeAlias = SFTConfig | DPOConfig

LORA_TARGETS = ("attention", "experts", "both")


@dataclass
class JaiTrainingArguments:
    """Options of JAI's training stages that TRL does not have."""

    _argument_group_name = "options of JAI's own"

    lora_targets: str = field(
        default="attention",
        metadata={
            "help": "What LoRA adapts when `use_peft` is on and neither `lora_target_modules` nor "
            "`lora_target_parameters` is given: the projections of attention (and the MLP of a dense model), the "
            "experts, or both.",
            "choices": list(LORA_TARGETS),
        },
    )
    lora_router: bool = field(
        default=False, metadata={"help": "With `use_peft`: also train the routers, whole, beside the adapters."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "With `use_peft`: merge the adapter into the model at the end, so that the output folder is a "
            "full checkpoint; the adapter itself stays in its subfolder `adapter`. Without it the output folder "
            "holds the adapter alone."
        },
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How the experts are computed: `eager`, `grouped_mm`, `batched_mm` (transformers' own), or "
            "`jai_fused` (our Triton kernels; `jai_fused_x` and `jai_fused_fp8` keep less for the backward pass). "
            "Default: transformers' choice, grouped_mm."
        },
    )
    linear_cross_entropy: bool = field(
        default=False,
        metadata={
            "help": "Compute the head and its loss with our kernels (`jai.kernels.head`) in place of TRL's "
            "chunked head. The figures in the logs are the same."
        },
    )
    router_statistics: bool = field(
        default=True,
        metadata={"help": "Log each layer's expert load and router entropy, and every skip alpha."},
    )
    snapshot_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "For a dense JAI: at these steps, keep the FFN weights in `snapshots/step-N` of the output folder; "
            "`jai upcycle` makes experts of them. The paper has 2000, 4000 and 6000."
        },
    )

    def __post_init__(self):
        if self.lora_targets not in LORA_TARGETS:
            raise UserError(f"`lora_targets` is {self.lora_targets!r}; expected one of {', '.join(LORA_TARGETS)}.")


@dataclass(frozen=True)
class StageArguments:
    """All that a stage is told.

    Attributes:
        script: TRL's: which data.
        training: TRL's: how to train.
        model: TRL's: which model, its dtype, LoRA.
        jai: ours.
    """

    script: ScriptArguments
    training: TrlConfig
    model: ModelConfig
    jai: JaiTrainingArguments


class _Parser(TrlParser):
    """TRL's parser, with errors as one line instead of a usage text of three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help for the options.")


def parse_arguments(dataclass_types: Sequence[Any], argv: Sequence[str], prog: str) -> tuple[Any, ...]:
    """Parse `--config FILE.yaml` and command-line overrides into one instance of each dataclass.

    Two defaults are not TRL's: LoRA's dropout is 0, because PEFT has none for experts, and bf16 is off on hardware
    that cannot do it.

    Raises:
        UserError: for a configuration file that cannot be read, unknown options, and values that do not fit.
    """
    argv = [part for argument in argv for part in _split_config(argument)]
    parser = _Parser(
        dataclass_types,
        prog=prog,
        usage=f"{prog} --config FILE.yaml [--option VALUE ...]",
        description="The options of TRL and transformers, and JAI's own at the end. A YAML file may set any of them; "
        "the command line overrides it. Start from a copy of the file in recipes/, which explains what most runs need.",
        allow_abbrev=False,
    )
    parser.set_defaults(lora_dropout=0.0)
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    known = {option.name for dataclass_type in dataclass_types for option in fields(dataclass_type)} | {"env"}
    config, overrides = _read_config(argv)
    _refuse_unknown(sorted(set(config) - known), known, "The configuration file", prog)
    _refuse_unknown(parser.parse_known_args(overrides)[1], known, "The command line", prog)
    try:
        return parser.parse_args_and_config(argv)
    except UserError:
        raise
    except ValueError as error:  # the dataclasses' own checks
        hint = " On a machine without a GPU give `bf16: false`." if "bf16" in str(error) else ""
        raise UserError(f"{error}{hint}") from error


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _read_config(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The mapping in the configuration file (empty without one), and the arguments beside `--config FILE`."""
    if "--config" not in argv:
        return {}, list(argv)
    position = argv.index("--config")
    if position + 1 == len(argv):
        raise UserError("`--config` is given without a file. Give a YAML file, for example recipes/sft.yaml.")
    path = Path(argv[position + 1])
    if not path.is_file():
        raise UserError(f"The configuration file {path} does not exist. Give the path of a YAML file.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must be a YAML mapping of options to values; see recipes/sft.yaml.")
    return config, [*argv[:position], *argv[position + 2 :]]


def _refuse_unknown(unknown: Sequence[str], known: set[str], where: str, prog: str) -> None:
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"Did you mean `{close[0]}`?" if close else "See --help for the options."
        raise UserError(f"{where} has `{name}`, which is no option of {prog}. {advice}")


def resume_point(training_args: TrlConfig) -> str | None:
    """The checkpoint to resume from, or None for a fresh start.

    `resume_from_checkpoint` is a folder, or "true" for the last checkpoint in the output folder.

    Raises:
        UserError: if there is no such checkpoint, or a fresh start would write into a folder that is not empty.
    """
    out = Path(str(training_args.output_dir))
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if out.is_dir() and any(out.iterdir()):
            raise UserError(
                f"{out} exists already and is not empty. Give another `output_dir`, remove this one, or continue the "
                "run in it with `--resume_from_checkpoint true`."
            )
        return None
    if str(wanted).lower() == "true":
        last = get_last_checkpoint(str(out)) if out.is_dir() else None
        if last is None:
            raise UserError(
                f"`resume_from_checkpoint` is on, but {out} has no checkpoint-N folder. Leave it out to start afresh; "
                "`save_steps` says how often checkpoints are written."
            )
        return last
    if not Path(wanted).is_dir():
        raise UserError(
            f"`resume_from_checkpoint` names {wanted}, which is no folder. Give a checkpoint-N folder of an earlier "
            "run, or `true` for the last one in `output_dir`."
        )
    return str(wanted)

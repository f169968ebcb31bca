# SPDX-License-Identifier: Apache-2.0
"""What a training stage is told: TRL's dataclasses, ours beside them, and their reading from YAML and command line."""

import os
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, get_type_hints

from transformers.utils import is_torch_bf16_gpu_available
from trl import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ModelConfig,
    RewardConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
)

from jai.errors import UserError
from jai.options import refuse_unknown
from jai.trainers.config_file import read_config_file
from jai.trainers.data_arguments import DataArguments
from jai.trainers.field_values import read_field
from jai.trainers.option_names import RENAMED
from jai.trainers.parts import PART_TEXTS, check_part_names, read_entries
from jai.trainers.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

StageConfig: TypeAlias = (
    "SFTConfig | DPOConfig | KTOConfig | CPOConfig | ORPOConfig | RewardConfig | GRPOConfig | PretrainConfig"
)


_EXAMPLES = {  # recipes with another name than the verb
    "jai pretrain": "jai-1/phase-1.yaml",
    "jai dpo": "dpo.yaml",
    "jai kto": "dpo.yaml",
    "jai cpo": "simpo.yaml",
    "jai orpo": "orpo.yaml",
    "jai reward": "reward.yaml",
    "jai grpo": "grpo.yaml",
}


def max_length_of(training: StageConfig) -> int | None:
    """Tokens of the longest sequence, None where there is no limit. GRPO has none: its answers have one."""
    return getattr(training, "max_length", None)


@dataclass
class JaiTrainingArguments:
    """Options of JAI's training stages that TRL does not have."""

    _argument_group_name = "JAI's options"

    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of the model to train; everything else is frozen. "
            + "; ".join(f"`{name}`: {text}" for name, text in PART_TEXTS.items())
            + ". With `use_peft`, attention and experts are trained through LoRA and the others in full. Default: all; "
            "with `use_peft` attention, experts, router, alphas and new_rows, if the model has them."
        },
    )
    new_row_ids: str | None = field(
        default=None,
        metadata={
            "help": "Token ids that `new_rows` covers, such as 32064-63999. Default: those that `jai convert` added."
        },
    )
    max_position_embeddings: int | None = field(
        default=None,
        metadata={
            "help": "Context length in tokens to train for; saved in the checkpoint's configuration. Default: the "
            "model's."
        },
    )
    rope_theta: float | None = field(
        default=None,
        metadata={
            "help": "RoPE base frequency; saved in the checkpoint's configuration. Changing it breaks the model until "
            "it is trained with the new value. The paper goes from 10,000 to 1,000,000 for long contexts. Default: the "
            "model's."
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "With `use_peft`: merge the adapter at the end, so that the output folder is a full checkpoint "
            "with the adapter in its subfolder `adapter`. Without this option the output folder has only the adapter."
        },
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Kernel for the experts: `eager`, `grouped_mm`, `batched_mm` (transformers' own), or "
            "`jai_fused` (our Triton kernels; `jai_fused_x` and `jai_fused_fp8` keep less for the backward pass). "
            "Default: transformers' choice, grouped_mm."
        },
    )
    linear_cross_entropy: bool = field(
        default=False,
        metadata={
            "help": "Compute head and loss with JAI's kernels (`jai.kernels.head`) instead of TRL's chunked head. The "
            "logged values are the same."
        },
    )
    router_statistics: bool = field(
        default=True,
        metadata={"help": "Log each layer's expert load and router entropy, and every skip alpha."},
    )
    snapshot_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "For a dense JAI: steps at which to save the FFN weights, to `snapshots/step-N` in the output "
            "folder, for `jai upcycle`. The paper uses 2000, 4000 and 6000."
        },
    )

    def __post_init__(self):
        check_part_names(self.trainable or ())
        if self.trainable == []:
            raise UserError(
                "`trainable` is an empty list, so that nothing would learn. Name some parts, or leave it out."
            )
        if self.new_row_ids is not None:
            read_entries(self.new_row_ids, "new_row_ids")


@dataclass(frozen=True)
class StageArguments:
    """All that a stage is told.

    Attributes:
        script: TRL's: which data.
        training: TRL's: how to train.
        model: TRL's: which model, its dtype, LoRA.
        jai: ours.
        data: ours, on the data.
    """

    script: ScriptArguments
    training: StageConfig
    model: ModelConfig
    jai: JaiTrainingArguments
    data: DataArguments = field(default_factory=DataArguments)


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Each option under one of its two spellings, long choices in its help, and no default where it is None."""

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings
        if action.nargs == 0:
            return ", ".join(names)
        if self._has_many_choices(action):
            return f"{', '.join(names)} NAME"
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        if action.nargs == "?" and action.const is True:
            return "true|false"
        return "INTEGER" if action.type is int else "FLOAT" if action.type is float else "TEXT"

    def _get_help_string(self, action: Action) -> str | None:
        if action.const is False:  # the `--no_x` of a flag, which has the flag's help
            return f"Turn off --{action.dest}."
        text = action.help if action.default is None else super()._get_help_string(action)
        return f"{text} One of: {', '.join(action.choices or ())}." if self._has_many_choices(action) else text

    def _has_many_choices(self, action: Action) -> bool:
        return len(list(action.choices or ())) > 6


class _Parser(TrlParser):
    """TRL's parser, with errors as one line instead of a usage text of three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help for the options.")


def parse_arguments(dataclass_types: Sequence[Any], argv: Sequence[str], prog: str) -> tuple[Any, ...]:
    """Parse `--config FILE.yaml` and command-line overrides into one instance of each dataclass.

    Two defaults are not TRL's: LoRA's dropout is 0, because PEFT has none for experts, and bf16 is off on hardware
    that cannot do it. Under the key `env`, the file may set environment variables.

    Raises:
        UserError: for a configuration file that cannot be read, unknown options, and values that do not fit.
    """
    config, overrides = read_config_file(argv)
    data = "--packed packed" if PretrainConfig in dataclass_types else "--dataset_name DATA"
    parser = _Parser(
        dataclass_types,
        prog=prog,
        usage=f"{prog} --config FILE.yaml [--option VALUE ...]",
        description="Start from a copy of a file in recipes/, which sets and explains the options that most runs need. "
        "The command line overrides the file. JAI's own options are at the end, after those of TRL and transformers.",
        epilog=f"example: {prog} --config recipes/{_EXAMPLES.get(prog, 'sft.yaml')} --model_name_or_path MODEL {data} "
        "--output_dir OUT",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    known = {option.name: option for dataclass_type in dataclass_types for option in fields(dataclass_type)}
    hints = {name: hint for dataclass_type in dataclass_types for name, hint in get_type_hints(dataclass_type).items()}
    environment = config.pop("env", None) or {}
    refuse_unknown(config, known, "The configuration file", RENAMED)
    defaults: dict[str, Any] = {"lora_dropout": 0.0}
    if not is_torch_bf16_gpu_available():
        defaults["bf16"] = False
    is_help = bool({"-h", "--help"} & set(overrides))
    parser.set_defaults_with_config(**(defaults if is_help else dict.fromkeys(known, SUPPRESS)))  # only what is given
    given, unknown = parser.parse_known_args(overrides)
    refuse_unknown(
        [name.lstrip("-").split("=")[0].replace("-", "_") for name in unknown[:1]], known, "The command line", RENAMED
    )
    values = {
        name: read_field(name, value, hints[name], known[name].metadata.get("choices"))
        for name, value in {**config, **vars(given)}.items()
    }
    if not isinstance(environment, dict):
        raise UserError(
            f"`env` is {environment!r}; expected environment variables, such as `env: {{WANDB_MODE: offline}}`."
        )
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError("`deepspeed` is on, and is not installed. `pip install deepspeed`, or leave the option out.")
    try:
        return parser.parse_dict({**defaults, **values})
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # the dataclasses' own checks
        hint = " On a machine without a GPU give `bf16: false`." if "bf16" in str(error) else ""
        raise UserError(f"{error}{hint}") from error

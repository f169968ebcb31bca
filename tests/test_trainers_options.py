# SPDX-License-Identifier: Apache-2.0
"""Options of the training stages: what YAML may hold, and what is refused before a model is loaded."""

import contextlib
import dataclasses
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from peft import LoraConfig
from transformers import MixtralConfig, Phi3Config
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from trl import ModelConfig, ScriptArguments, TrlParser

from jai.errors import UserError
from jai.trainers.arguments import JaiTrainingArguments, StageArguments, parse_arguments
from jai.trainers.base_model import BaseModel
from jai.trainers.checks import check_options, check_options_with_model
from jai.trainers.cpo import CPO
from jai.trainers.data_arguments import DataArguments
from jai.trainers.dpo import DPO
from jai.trainers.grpo import GRPO, JaiGRPOConfig
from jai.trainers.kto import KTO
from jai.trainers.option_names import RENAMED, STAGE_DATACLASSES, option_names
from jai.trainers.orpo import ORPO
from jai.trainers.parameters import TrainedParameters, count_trained_parameters, empty_model
from jai.trainers.parts import select_parts
from jai.trainers.pretrain import OPTIONS as PRETRAIN_OPTIONS
from jai.trainers.reward import REWARD
from jai.trainers.sft import SFT, JaiSFTConfig

SFT_OPTIONS = (ScriptArguments, JaiSFTConfig, ModelConfig, JaiTrainingArguments, DataArguments)
DPO_OPTIONS = DPO.option_classes
GRPO_OPTIONS = (ScriptArguments, JaiGRPOConfig, ModelConfig, JaiTrainingArguments, DataArguments)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class FinderWithout:
    """What finds modules, but for one package."""

    def __init__(self, finder: Any, package: str):
        self.finder, self.package = finder, package

    def find_spec(self, name: str, *where: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] == self.package else self.finder.find_spec(name, *where)

    def __getattr__(self, name: str) -> Any:  # importlib.metadata asks finders for the distributions of the others
        return getattr(self.finder, name)


@pytest.fixture
def without_package(monkeypatch) -> Iterator[Callable[[str], None]]:
    """`without_package(name)`: as if it had not been installed."""

    def hide(package: str) -> None:
        monkeypatch.setattr(sys, "meta_path", [FinderWithout(finder, package) for finder in sys.meta_path])
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        forget()

    def forget() -> None:
        is_flash_attn_2_available.cache_clear()
        is_kernels_available.cache_clear()

    yield hide
    monkeypatch.undo()
    forget()


OPTION_CLASSES = {"pretrain": PRETRAIN_OPTIONS} | {
    stage.verb: stage.option_classes for stage in (SFT, DPO, KTO, CPO, ORPO, REWARD, GRPO)
}


@pytest.mark.parametrize("verb", STAGE_DATACLASSES)
def test_option_names_are_those_that_the_parser_knows(verb):
    """They are read from the installed source, which another version of TRL may have moved."""
    flags = TrlParser(OPTION_CLASSES[verb])._option_string_actions
    parsed = {flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")} - {"help", "config"}
    names = option_names(verb)
    assert parsed == names | {name for name in parsed if name.removeprefix("no_") in names}
    assert names == {option.name for each in OPTION_CLASSES[verb] for option in dataclasses.fields(each)}


def test_option_names_that_cannot_be_read_are_left_to_the_parser(without_package):
    without_package("trl")
    assert option_names("dpo") is None


def test_what_options_are_called_today_are_options():
    names = set.union(*(set(filter(None, [*(option_names(verb) or ())])) for verb in STAGE_DATACLASSES))
    assert not RENAMED.keys() & names
    for today in RENAMED.values():
        assert all(name.partition(":")[0] in names for name in re.findall(r"`(.*?)`", today))


def read(text: str, *overrides: str, options: tuple[type, ...] = SFT_OPTIONS) -> StageArguments:
    """The arguments of a YAML file, after the checks that need no model."""
    Path("stage.yaml").write_text(text, encoding="utf-8")
    arguments = StageArguments(*parse_arguments(options, ["--config", "stage.yaml", *overrides], "jai sft"))
    check_options(arguments)
    return arguments


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # text to YAML 1.1
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_length: '64'", "max_length", 64),
        ("max_length: null", "max_length", None),
        ("eval_strategy: no", "eval_strategy", "no"),  # false to YAML 1.1
        ("save_strategy: no", "save_strategy", "no"),
        ("logging_strategy: off", "logging_strategy", "no"),
        ("report_to: no", "report_to", []),
        ("report_to: none", "report_to", []),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("use_peft: 'yes'", "use_peft", True),
        ("snapshot_steps: 2000", "snapshot_steps", [2000]),
        ("snapshot_steps: [2, 4]", "snapshot_steps", [2, 4]),
        ("lora_target_modules: all-linear", "lora_target_modules", "all-linear"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("lr_scheduler_kwargs: '{\"num_cycles\": 2}'", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("pad_to_multiple_of: 8", "pad_to_multiple_of", 8),
        ("lr_scheduler_type: cosine", "lr_scheduler_type", "cosine"),
        ("warmup_steps: 0.03", "warmup_steps", 0.03),
        ("{}", "lora_dropout", 0.0),
        ("{}", "packing_strategy", None),
    ],
)  # fmt: skip
def test_yaml_means_what_it_says(text, name, expected):
    arguments = read(text)
    values = {key: value for part in vars(arguments).values() for key, value in vars(part).items()}
    assert values[name] == expected


def test_help_shows_the_defaults_that_hold(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(SFT_OPTIONS, ["--help"], "jai sft")
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "LoRA dropout. (default: 0.0)" in printed
    assert "SUPPRESS" not in printed


def test_the_command_line_wins_and_environment_is_set(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    text = "seed: 1\ngradient_checkpointing: true\npacking: true\nenv: {WANDB_MODE: offline}"
    training = read(text, "--seed", "7", "--no_gradient_checkpointing", "--packing", "false").training
    assert (training.seed, training.gradient_checkpointing, training.packing) == (7, False, False)
    assert sys.modules["os"].environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: hello", r"`seed` is 'hello'; expected a whole number"),
        ("seed: 1.5", r"`seed` is 1.5; expected a whole number"),
        ("seed: true", r"`seed` is true; expected a whole number"),
        ("seed: -1", r"`seed` is -1; expected 0 or more"),
        ("learning_rate: null", r"`learning_rate` is null; expected a number"),
        ("learning_rate: abc", r"`learning_rate` is 'abc'; expected a number"),
        ("learning_rate: .nan", r"`learning_rate` is nan; expected a number"),
        ("learning_rate: .inf", r"`learning_rate` is inf; expected a number"),
        (f"learning_rate: 1{'0' * 400}", r"`learning_rate` is 10+.*; expected a number"),
        ("learning_rate: [1]", r"`learning_rate` is \[1\]; expected a number"),
        ("per_device_train_batch_size: 0", r"`per_device_train_batch_size` is 0; expected 1 or more"),
        ("gradient_accumulation_steps: 0", r"`gradient_accumulation_steps` is 0; expected 1 or more"),
        ("max_length: -5", r"`max_length` is -5; expected 1 or more"),
        ("max_steps: 0", r"`max_steps` is 0; expected -1 \(no limit\), or 1 or more"),
        ("num_train_epochs: -1", r"`num_train_epochs` is -1.0; expected more than 0"),
        ("lora_r: 0", r"`lora_r` is 0; expected 1 or more"),
        ("lora_dropout: 1", r"`lora_dropout` is 1.0; expected from 0 to below 1"),
        ("snapshot_steps: [0]", r"`snapshot_steps` is \[0\]; expected 1 or more"),
        ("snapshot_steps: [a]", r"`snapshot_steps` is \['a'\]; expected a list, each a whole number"),
        ("packing: maybe", r"`packing` is 'maybe'; expected true or false"),
        ("packing: true\nmax_length: null", r"`packing` fills sequences of `max_length` tokens"),
        ("packing_strategy: bfd_splitt", r"`packing_strategy` is 'bfd_splitt'.*Did you mean 'bfd_split'"),
        ("dtype: bf16", r"`dtype` is 'bf16'; expected one of auto, bfloat16, .*Did you mean 'bfloat16'"),
        ("loss_type: sigmoid", r"`loss_type` is 'sigmoid'; expected one of nll, dft"),
        ("eval_strategy: epochs", r"`eval_strategy` is 'epochs'; expected one of no, steps, epoch"),
        ("eval_strategy: true", r"`eval_strategy` is true; expected one of no, steps, epoch"),
        ("lr_scheduler_type: cosin", r"`lr_scheduler_type` is 'cosin'.*Did you mean 'cosine'"),
        ("optim: adam", r"`optim` is 'adam'; expected one of adamw_torch"),
        ("run_name: 7", r"`run_name` is 7; expected text"),
        ("model_init_kwargs: foo", r"`model_init_kwargs` is 'foo'; expected a mapping"),
        ("deepspeed: missing.json", r"`deepspeed` is 'missing.json'; expected a mapping"),
        ("pad_to_multiple_of: abc", r"`pad_to_multiple_of` is 'abc'; expected a whole number"),
        ("datasets: a.jsonl", r"`datasets` is 'a.jsonl'; expected a list, each a mapping"),
        ("shares: [1]", r"`shares` is \[1\]; expected a mapping"),
        ("shares_of: rows", r"`shares_of` is 'rows'; expected one of examples, tokens"),
        ("mixture_size: 0", r"`mixture_size` is 0; expected more than 0"),
        ("preview: -1", r"`preview` is -1; expected 0 or more"),
        ("env: [a]", r"`env` is \['a'\]; expected environment variables"),
        ("report_to: wandbb", r"`report_to` is 'wandbb'; expected none, or some of .*wandb"),
        ("attn_implementation: flash", r"`attn_implementation` is 'flash'; expected one of eager, "),
        ("load_in_4bit: true", r"`load_in_4bit` is on, and quantised weights cannot be trained. Set `use_peft: true`"),
        ("load_in_4bit: true\nload_in_8bit: true", r"8 bit and 4 bit"),
        ("logging_steps: 0", r"non-zero --logging_steps"),
        ("seed: 1\nseed: 2", r"'seed' is given twice"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss_type: sigmod", r"`loss_type` is 'sigmod'; expected some of sigmoid, "),
        ("loss_type: [ipo, sft]\nloss_weights: [1, a]", r"is \[1, 'a'\]; expected a list, each a number"),
        ("f_divergence_type: kl", r"`f_divergence_type` is 'kl'; expected one of reverse_kl"),
        ("beta: 0", r"`beta` is 0.0; expected more than 0"),
        ("label_smoothing: 2", r"`label_smoothing` is 2.0; expected from 0 to below 1"),
    ],
)  # fmt: skip
def test_values_of_dpo_that_cannot_be_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        read(text, options=DPO_OPTIONS)


@pytest.mark.parametrize(
    ("package", "text", "message"),
    [
        ("wandb", "report_to: wandb", r"`report_to` is wandb, which is not installed. `pip install wandb`"),
        ("trackio", "report_to: [trackio]", r"`report_to` is trackio, which is not installed"),
        ("bitsandbytes", "optim: adamw_8bit", r"`optim` is adamw_8bit, which needs bitsandbytes"),
        ("bitsandbytes", "optim: paged_lion_32bit", r"which needs bitsandbytes"),
        ("bitsandbytes", "load_in_4bit: true\nuse_peft: true", r"`load_in_4bit` is on, which needs bitsandbytes"),
        ("bitsandbytes", "load_in_8bit: true\nuse_peft: true", r"`load_in_8bit` is on, which needs bitsandbytes"),
        ("torchao", "optim: adamw_torch_8bit", r"which needs torchao"),
        ("schedulefree", "optim: schedule_free_adamw", r"which needs schedulefree"),
        ("flash_attn", "attn_implementation: flash_attention_2", r"is flash_attention_2, which is not installed"),
        ("deepspeed", "deepspeed: {zero_optimization: {stage: 2}}", r"`deepspeed` is on, and is not installed"),
        ("vllm", "use_vllm: true", r"`use_vllm` is on, which needs vllm. `pip install vllm`, or leave the option out"),
        ("kernels", "attn_implementation: kernels-community/flash-attn2", r"flash-attn2, which .* the package kernels"),
        ("kernels", "experts_implementation: sonicmoe", r"`experts_implementation` is sonicmoe, .* package kernels"),
        ("kernels", "model_init_kwargs: {experts_implementation: deepgemm}", r"is deepgemm, .* or take `grouped_mm`"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named(package, text, message, without_package):
    without_package(package)
    with pytest.raises(UserError, match=message):
        read(text, options=GRPO_OPTIONS if "vllm" in text else SFT_OPTIONS)


@pytest.mark.parametrize(
    "text", ["experts_implementation: eage", "model_init_kwargs: {experts_implementation: eage}"], ids=["own", "TRL's"]
)
def test_an_unknown_experts_implementation_is_refused(text):
    with pytest.raises(UserError, match=r"is 'eage'; expected one of .*eager, grouped_mm, jai_fused"):
        read(text)
    assert read(text.replace("eage", "jai_fused"))


def test_pushing_without_an_access_token_is_refused(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "none")
    with pytest.raises(UserError, match=r"`push_to_hub` is on, and there is no access token. Log in"):
        read("push_to_hub: true")
    assert read("push_to_hub: true\nhub_token: hf_given").training.push_to_hub
    monkeypatch.setenv("HF_TOKEN", "hf_set")
    assert read("push_to_hub: true").training.push_to_hub


WRONG = ("", "abc", -1, 0, 1.5, float("nan"), True, False, None, [], ["x", None], {}, {"a": [1]}, "2026-01-01", 10**30)


def check_no_traceback(option: str, value: object, options: tuple[type, ...]) -> None:
    with contextlib.suppress(UserError):
        read(yaml.safe_dump({option: value}), options=options)


def pairs(options: tuple[type, ...]) -> list[tuple[str, object]]:
    # Without `local_rank` and other settings of the process that starts this one, and what opens connections.
    process = {
        "local_rank",
        "ddp_backend",
        "ddp_timeout",
        "accelerator_config",
        "parallelism_config",
        "full_determinism",
    }
    names = [field.name for each in options for field in dataclasses.fields(each) if field.init]
    return [(name, value) for name in names if name not in process for value in WRONG]


@pytest.mark.parametrize("options", [SFT_OPTIONS, DPO_OPTIONS, GRPO_OPTIONS], ids=["sft", "dpo", "grpo"])
def test_no_value_of_any_option_is_a_traceback(options):
    for name, value in random.Random(0).sample(pairs(options), 60):
        check_no_traceback(name, value, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [SFT_OPTIONS, DPO_OPTIONS, GRPO_OPTIONS], ids=["sft", "dpo", "grpo"])
def test_no_value_of_any_option_is_a_traceback_at_all(options):
    for name, value in pairs(options):
        check_no_traceback(name, value, options)


def test_a_missing_file_is_refused_before_anything_heavy_is_imported():
    code = """
import sys
from jai.errors import UserError
from jai.trainers.config_file import read_config_file
for name, message in (("missing", "does not exist"), ("broken", "not valid YAML"), ("list", "not a list of options")):
    try:
        read_config_file(["--config", f"{name}.yaml"])
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(name)
assert not {"trl", "datasets"} & set(sys.modules)
"""
    Path("broken.yaml").write_text("a: [\n")
    Path("list.yaml").write_text("- 1\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- with a model's configuration


def base_model(config, name: str = "base") -> BaseModel:
    return BaseModel(name, Path(), {"revision": "main", "trust_remote_code": False}, config, None, None)


def count(base: BaseModel, model_args: ModelConfig, lora: LoraConfig | None = None) -> TrainedParameters:
    model = empty_model(base)
    return count_trained_parameters(model, base, select_parts(["all"], model, None), lora, model_args)


FOUR_BITS = ModelConfig(load_in_4bit=True, use_peft=True)


def mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["jai", "mixtral"])
def test_bits_are_refused_where_experts_would_stay(tiny_config, kind):
    """The share, counted by hand: all but attention's four matrices, which alone are linear layers (the head stays)."""
    config = tiny_config() if kind == "jai" else mixtral()
    layers, alphas = config.num_hidden_layers, 4 if kind == "jai" else 0
    attention = 32 * (32 + 16 + 16 + 32)
    experts = 4 * 3 * 32 * 48
    total = layers * (attention + experts + 4 * 32 + 2 * 32) + 2 * 99 * 32 + 32 + alphas
    few = ModelConfig(load_in_8bit=True, use_peft=True) if kind == "jai" else FOUR_BITS
    with pytest.raises(UserError) as error:
        count(base_model(config), few)
    assert f"leave {1 - layers * attention / total:.0%} of base as it is" in str(error.value)
    assert f"the experts ({layers * experts / total:.0%} of the parameters)" in str(error.value)


def test_four_bits_of_a_jai_are_counted_with_its_experts(tiny_config):
    config = tiny_config(hidden_size=64, intermediate_size=128)
    counted = count(base_model(config), FOUR_BITS)
    layers, attention, experts = config.num_hidden_layers, 64 * (64 + 32 + 32 + 64), 4 * 3 * 64 * 128
    assert counted.quantized == layers * (attention + experts)
    assert counted.quantization == "4 bits (nf4)"
    double = ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True)
    assert count(base_model(config), double).quantization == "4 bits (nf4, scales in 8 bits)"
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    stored = count(base_model(config), ModelConfig())
    assert (stored.quantized, stored.quantization) == (counted.quantized, "4 bits (fp4)")
    assert count(base_model(config), ModelConfig()).total > counted.quantized


@pytest.mark.parametrize("kind", ["jai", "phi3"])
def test_four_bits_of_a_dense_model_are_counted(tiny_config, kind):
    if kind == "jai":
        config = tiny_config(num_local_experts=1)
    else:
        config = Phi3Config(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
    assert count(base_model(config), FOUR_BITS).quantized == 7 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    assert count(base_model(config), ModelConfig()).quantized == 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target_modules": ["q_proj", "nope"]}, r"`lora_target_modules` names nope, which base .*self_attn.q_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["gat"]}, r"`lora_modules_to_save` names gat.*mlp.gate"),
        (
            {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "experts.up"]},
            r"`lora_target_parameters` names experts.up, which .*mlp.experts.gate_up_proj",
        ),
    ],
)
def test_lora_targets_that_match_nothing_are_refused(tiny_config, targets, message):
    with pytest.raises(UserError, match=message):
        count(base_model(tiny_config()), ModelConfig(), LoraConfig(**targets))


def test_label_smoothing_that_would_drop_the_balance_of_experts_is_refused(tiny_config):
    def check(options, text: str, **config) -> None:
        check_options_with_model(read(text, options=options), tiny_config(**config))

    with pytest.raises(UserError, match=r"`label_smoothing_factor` TRL leaves the router's auxiliary loss out"):
        check(SFT_OPTIONS, "label_smoothing_factor: 0.1")
    with pytest.raises(UserError, match=r"no effect on preferences"):
        check(DPO_OPTIONS, "label_smoothing_factor: 0.1")
    check(SFT_OPTIONS, "label_smoothing_factor: 0.1\nrouter_aux_loss_coef: 0")
    check(SFT_OPTIONS, "label_smoothing_factor: 0.1", num_local_experts=1)
    check(SFT_OPTIONS, "label_smoothing_factor: 0", router_aux_loss_coef=0.1)

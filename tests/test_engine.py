# SPDX-License-Identifier: Apache-2.0
"""Recipes for Accelerate, read by Accelerate; and what an engine would do wrong in silence, refused before a run."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.imports import is_deepspeed_available
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from transformers.trainer_pt_utils import get_module_class_from_name

import jai.recipes
from jai.errors import UserError
from jai.trainers import pretrain, sft
from jai.trainers.arguments import parse_arguments
from jai.trainers.engine import batches_at_once, check_engine, check_engine_with_model, sharded_at_load

ACCELERATE = Path(jai.recipes.__file__).parent / "accelerate"


@pytest.fixture
def clean_environment(monkeypatch):
    """Accelerate's classes write into the environment what they are told."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    yield monkeypatch
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def launch(name: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    """What `accelerate launch --config_file` makes of a recipe: its arguments; and its environment, set."""
    command = ["--config_file", str(ACCELERATE / f"{name}.yaml"), *flags, "-m", "jai", "pretrain"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    for key, value in prepare_multi_gpu_env(arguments).items():
        if os.environ.get(key) != value:
            monkeypatch.setenv(key, value)
    return arguments


class TestRecipes:
    @pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
    def test_accelerate_shards_a_jai_by_its_layers(self, name, clean_environment, tiny_model):
        launch(name, clean_environment)
        plugin, spread = FullyShardedDataParallelPlugin(), ParallelismConfig()
        assert plugin.fsdp_version == 2
        assert [get_module_class_from_name(tiny_model(), each).__name__ for each in
                plugin.transformer_cls_names_to_wrap] == ["JaiDecoderLayer"]  # fmt: skip
        assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT
        assert plugin.cpu_ram_efficient_loading
        assert plugin.reshard_after_forward
        assert not plugin.activation_checkpointing  # the stage's own; both at once are refused by transformers
        sizes = spread.dp_replicate_size, spread.dp_shard_size, spread.total_size
        assert sizes == ((2, 32, 64) if name == "hsdp" else (1, 1, 1))

    def test_one_recipe_serves_many_nodes_by_the_command_line(self, clean_environment):
        flags = ("--num_machines", "8", "--num_processes", "64", "--machine_rank", "3", "--main_process_ip", "10.0.0.1")
        arguments = launch("fsdp2", clean_environment, *flags)
        assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (8, 64, 3)
        assert arguments.main_process_ip == "10.0.0.1"
        assert os.environ["FSDP_VERSION"] == "2"

    def test_deepspeed_gets_what_it_has_options_for(self, clean_environment):
        command = ["--config_file", str(ACCELERATE / "zero3.yaml"), "-m", "jai", "sft"]
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
        assert arguments.use_deepspeed
        options = yaml.safe_load((ACCELERATE / "zero3.yaml").read_text())["deepspeed_config"]
        assert {name: str(getattr(arguments, name)) for name in options} == {
            name: str(value) for name, value in options.items()
        }
        if not is_deepspeed_available():
            pytest.skip("deepspeed is not installed: what it makes of these options is not checked")
        assert DeepSpeedPlugin(zero_stage=3).deepspeed_config["zero_optimization"]["stage"] == 3

    def test_the_launchers_name_recipes_that_are_there(self):
        for path in ACCELERATE.glob("*.yaml"):
            assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


def training(stage: Any = pretrain, **options: Any) -> Any:
    options = {"model_name_or_path": "m", "output_dir": "out", "use_cpu": True, "bf16": False, **options}
    if stage is pretrain:
        options["packed"] = "packed"
    classes = pretrain.OPTIONS if stage is pretrain else sft.SFT.option_classes
    command = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return next(each for each in parse_arguments(classes, command, "jai") if hasattr(each, "save_strategy"))


SPREAD = '{"distributed_config": {"tp_size": 2, "ep_size": 2}}'


class TestRefusals:
    def test_fsdp_that_would_shard_nothing(self, clean_environment):
        """Accelerate takes several processes on processors for plain data parallel, and one for none."""
        clean_environment.setenv("ACCELERATE_USE_FSDP", "true")
        clean_environment.setenv("FSDP_VERSION", "2")
        with pytest.raises(UserError, match="FSDP is on, and Accelerate shards nothing here"):
            check_engine(training(), use_peft=False)
        clean_environment.setenv("FSDP_VERSION", "1")
        with pytest.raises(UserError, match="FSDP is on in its first version"):
            check_engine(training(), use_peft=False)

    @pytest.mark.parametrize("stage", [pretrain, sft])
    @pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
    def test_experts_that_would_be_overwritten(self, clean_environment, stage, engine):
        options = training(stage, model_init_kwargs=SPREAD, save_strategy="no")
        clean_environment.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
        clean_environment.setattr("jai.trainers.engine._check_fsdp", lambda training: None)  # it shards, on GPUs
        with pytest.raises(UserError, match=f"Accelerate's {engine} is on, which would shard it again: experts"):
            check_engine(options, use_peft=False)

    def test_a_run_that_could_not_resume(self, clean_environment):
        for options in ({}, {"save_strategy": "steps"}, {"save_strategy": "no", "resume_from_checkpoint": "true"}):
            with pytest.raises(UserError, match="transformers cannot resume such a run"):
                check_engine(training(model_init_kwargs=SPREAD, **options), use_peft=False)

    @pytest.mark.parametrize(
        ("given", "use_peft", "message"),
        [
            ('{"tp_sizes": 2}', False, r"is \{'tp_sizes': 2\}; expected a mapping of tp_size, tp_plan"),
            ('{"tp_size": 0}', False, "cannot be: Parallelism sizes must be >= 1"),
            ('{"tp_size": 2, "ep_size": 3}', False, "cannot be: `ep_size` must be a multiple"),
            ('{"tp_size": 2}', False, r"over 2 processes \(`tp_size` 2 x `fsdp_size` 1 .*, and the run has 1"),
            ('{"pp_size": 2}', False, "`pp_size` is for inference"),
            ('{"tp_size": 1}', True, "`use_peft` is on, which does not go together"),
        ],
    )
    def test_what_cannot_be(self, clean_environment, given, use_peft, message):
        options = training(model_init_kwargs=f'{{"distributed_config": {given}}}', save_strategy="no")
        with pytest.raises(UserError, match=message):
            check_engine(options, use_peft=use_peft)

    def test_frozen_alphas_that_no_process_would_hand_on(self, clean_environment, tiny_config):
        options, frozen = training(), tiny_config(skip_alpha_trainable=False)
        clean_environment.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        check_engine_with_model(options, frozen)
        clean_environment.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UserError, match=r"skip alphas are buffers .* Set it to false"):
            check_engine_with_model(options, frozen)
        check_engine_with_model(options, tiny_config())
        clean_environment.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
        check_engine_with_model(options, frozen)

    @pytest.mark.parametrize("size", ["TP_SIZE", "CP_SIZE"])
    def test_processes_that_accelerate_would_let_share_a_batch(self, clean_environment, size):
        clean_environment.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        clean_environment.setenv(f"PARALLELISM_CONFIG_{size}", "2")
        words = [
            "--model_name_or_path",
            "m",
            "--output_dir",
            "out",
            "--packed",
            "p",
            "--use_cpu",
            "true",
            "--bf16",
            "0",
        ]
        with pytest.raises(UserError, match=f"has .*{size.lower()} 2.*: processes would share a batch"):
            pretrain.run_pretrain(*parse_arguments(pretrain.OPTIONS, words, "jai pretrain"))

    def test_processes_that_hold_parts_of_a_matrix_share_a_batch(self):
        assert sharded_at_load(training()) is None
        options = training(model_init_kwargs=SPREAD, save_strategy="no")
        options.__dict__["distributed_state"] = type("State", (), {"num_processes": 4})()
        assert options.world_size == 4
        assert batches_at_once(options) == 2

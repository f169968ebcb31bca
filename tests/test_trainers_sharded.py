# SPDX-License-Identifier: Apache-2.0
"""`jai pretrain` and `jai sft` over shards of the model: FSDP2, HSDP (`accelerate launch`), tensor and expert parallel.

Each gives what one process gives at the same batch, saves a whole model with its code, and resumes to the bit.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.utils.imports import is_deepspeed_available
from rich.console import Console
from safetensors.torch import load_file

import jai.recipes
from jai.configuration_jai import AUTO_MAP
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.provenance import read_step

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("sharded_worker.py")
ACCELERATE = Path(jai.recipes.__file__).parent / "accelerate"
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "new_row_ids": "300-309"}

_OF_TOKENS = ("loss", "grad_norm", "tokens_seen", "skip_alpha", "router/load", "router/entropy", "router/z_loss")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, checkpoint, sentences) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sources = []
    for name, kept in (("english", sentences[2:4]), ("thai", sentences[:2])):
        texts = [f"{number} {kept[number % 2]} " * (1 + number % 4) for number in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"name": name, "text": str(folder / f"{name}.jsonl"), "language": name[:2]})
    (folder / "corpus.yaml").write_text(yaml.safe_dump({"tokenizer": str(checkpoint), "sources": sources}))
    options = PackOptions(out=folder / "packed", config=folder / "corpus.yaml", workers=1)
    return pack_corpus(options, Console(quiet=True))


@pytest.fixture(scope="module")
def chats(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}], "language": "th"}
        for ask in sentences
        for answer in sentences
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": ask, "chosen": f"ดี {n}", "rejected": "no" * (1 + n % 3)} for n, ask in enumerate(sentences * 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(checkpoint, packed) -> dict[str, Any]:
    return {
        "model_name_or_path": checkpoint,
        "packed": packed,
        "max_length": 48,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-3,
        "router_aux_loss_coef": 0,  # a batch's, and no token's
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "bf16": False,
        "report_to": "none",
    }


def engine(tmp_path: Path, recipe: str | None = "fsdp2", processes: int = 2) -> Path:
    """A recipe's configuration, for so many processes on this machine and in fp32; None for plain data parallel."""
    values: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}
    if recipe is not None:
        values = yaml.safe_load((ACCELERATE / f"{recipe}.yaml").read_text())
    values |= {"num_machines": 1, "num_processes": processes, "mixed_precision": "no", "main_process_port": 0}
    if "parallelism_config" in values:
        values["parallelism_config"] |= {"parallelism_config_dp_shard_size": processes // 2}
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(out: Path, options: dict[str, Any], config: Path | None, verb: str) -> subprocess.Popen:
    """One process without a configuration; else `accelerate launch` with it."""
    options = {**options, "output_dir": out}
    command = ["-m", "jai", verb]
    if config is None:
        options["use_cpu"] = True
    else:
        command = ["-m", "accelerate.commands.launch", "--config_file", str(config), str(WORKER), verb]
    given = [part for key, value in options.items() for part in (f"--{key}", *str(value).split(" "))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command, *given], env=environment, **pipes)


def run(out: Path, options: dict[str, Any], config: Path | None = None, verb: str = "pretrain") -> Path:
    process = start(out, options, config, verb)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors[-4000:]
    return out


def logs_of(out: Path) -> list[dict[str, Any]]:
    logs = json.loads((out / read_step(out)["log_history"]).read_text())
    return [{key: value for key, value in log.items() if key != "tokens_per_second"} for log in logs if "loss" in log]


def assert_same(out: Path, expected: Path, name: str = "model.safetensors", *, exact: bool = False) -> None:
    """Losses within 1e-6 of themselves, all else that is logged within 2e-6, weights within 1e-6; or to the bit."""
    for ours, theirs in zip(logs_of(out), logs_of(expected), strict=True):
        if not exact:  # of a token: TRL's figures and the routers' auxiliary loss are of a batch
            ours, theirs = ({k: log[k] for k in log if k.startswith(_OF_TOKENS)} for log in (ours, theirs))
        assert ours == (theirs if exact else pytest.approx(theirs, rel=2e-6, abs=1e-7))
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-6 * theirs["loss"]
    weights, others = load_file(out / name), load_file(expected / name)
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        if exact:
            assert torch.equal(weight, others[key]), key
        else:
            torch.testing.assert_close(weight, others[key], rtol=1e-5, atol=2e-6, msg=key)


def resume(out: Path, interrupted: Path, options: dict[str, Any], config: Path, step: int = 2) -> Path:
    shutil.copytree(interrupted / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return run(out, {**options, "resume_from_checkpoint": "true"}, config)


def test_fsdp2_pretrains_as_one_process_and_leaves_a_whole_model(options, tmp_path, run_as_stranger):
    """The router's statistics are gathered, the code is the model's, and a resumed run ends as one that was not."""
    one = run(tmp_path / "one", options)
    halves = {**options, "gradient_accumulation_steps": 2}
    two = run(tmp_path / "two", halves, engine(tmp_path))
    assert_same(two, one)
    assert (two / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()  # it was sharded
    assert not (two / "checkpoint-2" / "model.safetensors").exists()
    assert {f"router/load/layer_06/expert_{expert}" for expert in range(4)} <= logs_of(two)[0].keys()
    config = json.loads((two / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["JaiForCausalLM"]
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'transformers_modules' in type(model).__module__, type(model).__module__\n"
        "saved = load_file(sys.argv[1] + '/model.safetensors')\n"
        "assert saved.keys() == model.state_dict().keys()\n"
        "assert all(torch.equal(each, saved[name]) for name, each in model.state_dict().items())\n"
        "print('equal')\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    loaded = run_as_stranger(code, environment, str(two))
    assert "equal" in loaded.stdout, loaded.stderr[-2000:]
    assert_same(resume(tmp_path / "resumed", two, halves, engine(tmp_path)), two, exact=True)
    quarters = {**options, "gradient_accumulation_steps": 1}
    assert_same(resume(tmp_path / "four", two, quarters, engine(tmp_path, processes=4)), two)


def test_fsdp2_trains_an_adapter_and_resumes_its_alphas(options, tmp_path):
    """Rows of new tokens, which TRL reads past the head's call; alphas, which Accelerate's checkpoint leaves out."""
    options |= {**ADAPTER, "optim": "sgd", "learning_rate": 0.1}
    one = run(tmp_path / "one", options)
    halves = {**options, "gradient_accumulation_steps": 2}
    two = run(tmp_path / "two", halves, engine(tmp_path))
    assert_same(two, one, "adapter_model.safetensors")
    resumed = resume(tmp_path / "resumed", two, halves, engine(tmp_path))
    assert_same(resumed, two, "adapter_model.safetensors", exact=True)


def test_fsdp2_trains_parts_of_matrices(options, tmp_path):
    options |= {"trainable": "new_rows new_experts alphas", "new_row_ids": "300-309", "optim": "sgd"}
    options |= {"learning_rate": 0.1, "save_strategy": "no", "max_steps": 2}
    one = run(tmp_path / "one", options)
    assert_same(run(tmp_path / "two", {**options, "gradient_accumulation_steps": 2}, engine(tmp_path)), one)


def test_hsdp_is_two_groups_of_shards(options, tmp_path):
    options |= {"save_strategy": "no", "max_steps": 3}
    one = run(tmp_path / "one", options)
    four = run(tmp_path / "four", {**options, "gradient_accumulation_steps": 1}, engine(tmp_path, "hsdp", 4))
    assert_same(four, one)


def test_fsdp2_tunes_on_chats_as_one_process_and_goes_on_when_it_is_killed(options, chats, tmp_path):
    """SIGKILL to both processes, while the second checkpoint is being written or soon after it."""
    del options["packed"]
    options |= {"dataset_name": chats, "max_length": 128, "packing": False, "lr_scheduler_type": "constant"}
    one = run(tmp_path / "one", options, verb="sft")
    halves = {**options, "gradient_accumulation_steps": 2}
    config = engine(tmp_path)
    two = run(tmp_path / "two", halves, config, "sft")
    assert_same(two, one)
    out = tmp_path / "killed"
    process = start(out, {**halves, "max_steps": 40}, config, "sft")  # not over before it is killed
    while not (out / "checkpoint-4").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()
    shutil.rmtree(out / "checkpoint-6", ignore_errors=True)
    (out / "checkpoint-4" / "trainer_state.json").unlink(missing_ok=True)  # as if it had been killed a moment earlier
    assert_same(run(out, {**halves, "resume_from_checkpoint": "true"}, config, "sft"), two, exact=True)


@pytest.mark.parametrize("verb", ["dpo", "reward"])
def test_fsdp2_learns_from_pairs_as_one_process(options, pairs, tmp_path, verb):
    """DPO's reference is sharded, too; and a reward model has a head that no language model has.

    By SGD: what both answers share has no gradient but of rounding, and AdamW's first step makes it a whole one.
    """
    del options["packed"]
    options |= {"dataset_name": pairs, "max_length": 128, "save_strategy": "no", "max_steps": 2}
    options |= {"optim": "sgd", "learning_rate": 0.1}
    one = run(tmp_path / "one", options, verb=verb)
    halves = {**options, "gradient_accumulation_steps": 2}
    assert_same(run(tmp_path / "two", halves, engine(tmp_path), verb), one)


@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
@pytest.mark.parametrize("verb", ["pretrain", "sft", "dpo"])
def test_zero3_trains_as_one_process(options, chats, pairs, tmp_path, verb):
    """DeepSpeed's own code over gloo. Every weight is cut, which by default those of a tiny model are not."""
    if verb != "pretrain":
        del options["packed"]
        options |= {"dataset_name": chats if verb == "sft" else pairs, "max_length": 128, "max_steps": 2}
        options |= {"optim": "sgd", "learning_rate": 0.1}  # AdamW makes whole steps of gradients of rounding
    one = run(tmp_path / "one", options, verb=verb)
    halves = {**options, "gradient_accumulation_steps": 2}
    config = engine(tmp_path, "zero3")
    values = yaml.safe_load(config.read_text())
    cut = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    plugin = {"zero_optimization": cut, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    plugin |= {"zero_allow_untested_optimizer": True}
    plugin |= {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "deepspeed.json").write_text(json.dumps(plugin))
    values["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": True}
    del values["mixed_precision"]
    config.write_text(yaml.safe_dump(values))
    two = run(tmp_path / "two", halves, config, verb)
    assert_same(two, one)
    if verb == "pretrain":
        assert_same(resume(tmp_path / "resumed", two, halves, config), two, exact=True)


@pytest.mark.parametrize(
    ("sizes", "accumulated"),
    [
        ({"tp_size": 2}, 4),
        ({"tp_size": 2, "ep_size": 2}, 4),
        ({"fsdp_size": 2, "ep_size": 2}, 2),
    ],
    ids=["tp", "tp_ep", "fsdp_ep"],
)
def test_matrices_and_experts_over_two_processes_train_as_one(options, tmp_path, sizes, accumulated):
    """Processes that share a matrix share a batch: its tokens count once, and so does its loss. Not clipped."""
    options |= {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}
    one = run(tmp_path / "one", options)
    spread = {"gradient_accumulation_steps": accumulated}
    spread["model_init_kwargs"] = json.dumps({"distributed_config": sizes}, separators=(",", ":"))
    assert_same(run(tmp_path / "two", {**options, **spread}, engine(tmp_path, None)), one)

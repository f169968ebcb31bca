# SPDX-License-Identifier: Apache-2.0
"""A dense JAI and snapshots of its training → experts: every tensor from where it should be, and nothing else made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

from jai import cli
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.inputs.jai import jai_shapes, open_jai
from jai.conversion.inputs.parts import Copied
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.inspect_checkpoint import inspect
from jai.conversion.inspect_options import InspectOptions
from jai.conversion.output.drawn import normal, normal_pieces
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import SnapshotOptions, UpcycleOptions
from jai.conversion.upcycle.plan import open_upcycle_inputs, plan_upcycled_tensors, upcycled_config
from jai.conversion.upcycle.snapshot import snapshot
from jai.errors import UserError
from jai.files import sha256
from jai.provenance import chain, read_step
from jai.trainers.snapshots import SnapshotCallback

LAYERS = 8
FFN = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def phi3(tmp_path_factory, tiny_phi3, tiny_tokenizer) -> Path:
    folder = tiny_phi3(tmp_path_factory.mktemp("base") / "phi3", vocab_size=len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory, phi3) -> Path:
    out = tmp_path_factory.mktemp("dense") / "dense"
    options = {"block_size": 2, "block_repeats": [1, 2, 1], "duplicate_init": "copy", "experts": 1}
    convert(ConvertOptions(base=str(phi3), out=out, **options))
    return out


def train(dense: Path, out: Path, *, callbacks: list | None = None, **options) -> Path:
    """A plain Trainer on random ids, with a learning rate that moves every weight."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 99, (24, 12), generator=generator)]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dense) -> Path:
    """Whole checkpoints of steps 2, 4 and 6 as a plain Trainer saves them, optimiser and all; snapshots of 2 and 4."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(dense, out, save_steps=2, callbacks=[SnapshotCallback([2, 4])])


@pytest.fixture(scope="module")
def checkpoints(trained) -> list[str]:
    return [str(trained / f"checkpoint-{step}") for step in (2, 4, 6)]


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory, dense, checkpoints) -> Path:
    out = tmp_path_factory.mktemp("upcycled") / "jai"
    run(dense, out, snapshots=checkpoints, verify=True)
    return out


def run(dense: Path | str, out: Path, **options):
    return upcycle(UpcycleOptions(dense=str(dense), out=out, **options))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def expert_of(dense: dict[str, torch.Tensor], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up, down = (dense[f"model.layers.{layer}.mlp.{kind}.weight"] for kind in FFN)
    return torch.cat([gate, up]), down


def test_trainers_checkpoints_differ(dense, checkpoints):
    """Otherwise these tests could not tell one source from another."""
    states = [weights(folder) for folder in (dense, *checkpoints)]
    assert all((Path(folder) / "optimizer.pt").exists() for folder in checkpoints)
    for name in states[0]:
        for i, state in enumerate(states):
            assert not any(torch.equal(state[name], other[name]) for other in states[:i]), name


def test_every_tensor_comes_from_its_checkpoint(dense, checkpoints, upcycled):
    sources = [weights(folder) for folder in (dense, *checkpoints)]
    jai = weights(upcycled)
    seen = set()
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        for expert, source in enumerate(sources):
            gate_up, down = expert_of(source, layer)
            assert torch.equal(jai[f"{prefix}.experts.gate_up_proj"][expert], gate_up)
            assert torch.equal(jai[f"{prefix}.experts.down_proj"][expert], down)
        router = jai[f"{prefix}.gate.weight"]
        assert router.shape == (4, 32)
        assert 0.1 < router.std() < 0.2  # initializer_range is 0.15
        seen |= {f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj", f"{prefix}.gate.weight"}
    others = jai.keys() - seen
    assert others == {name for name in sources[0] if ".mlp." not in name}
    assert "model.layers.4.skip_alpha" in others
    assert all(torch.equal(jai[name], sources[-1][name]) for name in others)


def test_result_is_a_whole_checkpoint(upcycled, checkpoints, capsys):
    model = AutoModelForCausalLM.from_pretrained(upcycled).eval()
    config = model.config
    assert (config.num_local_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (4, 2, 0.001)
    assert config.dtype == torch.float32
    ids = torch.arange(3, 23).unsqueeze(0)
    output = model(ids, labels=ids, output_router_logits=True)
    assert output.loss.isfinite()
    assert len(output.router_logits) == LAYERS
    assert (upcycled / "tokenizer.json").exists()
    assert (upcycled / "modeling_jai.py").exists()
    inspect(InspectOptions(model=str(upcycled)))
    assert "4 (2)" in capsys.readouterr().out


def test_every_byte_is_accounted_for(dense, checkpoints, tmp_path):
    """All is copied but the routers: each is one formula."""
    options = UpcycleOptions(dense=str(dense), out=tmp_path / "jai", snapshots=checkpoints)
    inputs = open_upcycle_inputs(options)
    config = upcycled_config(inputs.dense, options)
    tensors = plan_upcycled_tensors(config, inputs, options)
    assert {tensor.name: tensor.shape for tensor in tensors} == jai_shapes(config)
    for tensor in tensors:
        is_router = tensor.name.endswith(".mlp.gate.weight")
        assert all(isinstance(part, Copied) != is_router for part in tensor.parts), tensor.name
        count = {"experts.gate_up_proj": 8, "experts.down_proj": 4}.get(tensor.name.split(".mlp.")[-1], 1)
        assert len(tensor.parts) == count
    copied = [part for tensor in tensors for part in tensor.parts if isinstance(part, Copied)]
    assert len({(part.files.place, part.file, part.start) for part in copied}) == len(copied)  # nothing twice


def test_other_weights_come_from_base_weights(dense, checkpoints, upcycled, tmp_path):
    for given, source in (("first", dense), (checkpoints[0], checkpoints[0]), ("last", checkpoints[2])):
        out = tmp_path / Path(source).name
        run(dense, out, snapshots=checkpoints, base_weights=given)
        jai, base, default = weights(out), weights(source), weights(upcycled)
        for name, tensor in jai.items():
            assert torch.equal(tensor, default[name] if ".mlp." in name else base[name]), name


def test_routers_are_drawn_with_the_seed(dense, checkpoints, upcycled, tmp_path):
    run(dense, tmp_path / "other", snapshots=checkpoints, seed=1)
    one, other = weights(upcycled), weights(tmp_path / "other")
    routers = [name for name in one if name.endswith(".mlp.gate.weight")]
    assert len(routers) == LAYERS
    assert not any(torch.equal(one[a], one[b]) for a in routers for b in routers if a < b)
    for name in one:
        assert torch.equal(one[name], other[name]) != (name in routers), name


def test_copies_keep_the_function_of_the_dense_model(dense, tmp_path):
    run(dense, tmp_path / "jai", expert_init="copy")
    ids = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, after = (
            F.log_softmax(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.double(), dim=-1)
            for folder in (dense, tmp_path / "jai")
        )
    kl = F.kl_div(after, before, reduction="sum", log_target=True).item() / ids.numel()
    assert abs(kl) < 1e-10
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("expert_init", ["copy", "random"])
def test_upcycling_a_dense_jai_is_converting_with_experts(phi3, dense, tmp_path, expert_init):
    options = {"block_size": 2, "block_repeats": [1, 2, 1], "duplicate_init": "copy", "experts": 3, "seed": 5}
    convert(ConvertOptions(base=str(phi3), out=tmp_path / "converted", expert_init=expert_init, **options))
    run(dense, tmp_path / "upcycled", expert_init=expert_init, experts=3, seed=5)
    for name in ("model.safetensors", "config.json"):
        assert sha256(tmp_path / "converted" / name) == sha256(tmp_path / "upcycled" / name)


def test_noise_is_relative_and_seeded(dense, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(dense, tmp_path / out, expert_init="noise", expert_noise=0.05, seed=seed)
    source, a, c = weights(dense), weights(tmp_path / "a"), weights(tmp_path / "c")
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")
    for layer in range(LAYERS):
        for number, kind in enumerate(("gate_up_proj", "down_proj")):
            stack = a[f"model.layers.{layer}.mlp.experts.{kind}"]
            first = expert_of(source, layer)[number]
            assert torch.equal(stack[0], first)
            for expert in (1, 2, 3):
                noise = stack[expert] - first
                assert 0.9 < noise.std() / first.std() / 0.05 < 1.1
                assert not torch.equal(stack[expert], stack[expert - 1])
                assert not torch.equal(stack[expert], c[f"model.layers.{layer}.mlp.experts.{kind}"][expert])


@pytest.mark.parametrize("piece", [16, 64, 1 << 10])
def test_noise_is_one_stream_in_pieces_of_any_size(piece):
    """A checkpoint with noise does not depend on how much of it is in memory at a time."""
    for count in (0, 1, 15, 16, 17, 31, piece - 1, piece, piece + 1, piece + 15, piece + 16, 3 * piece + 5):
        pieces = list(normal_pieces("name", count, 1, piece))
        assert torch.equal(torch.cat([torch.empty(0), *pieces]), normal("name", count, 1)), count
        assert all(len(values) < piece + 16 for values in pieces)


def test_fewer_snapshots_leave_copies_with_noise(dense, checkpoints, tmp_path, capsys):
    run(dense, tmp_path / "noisy", snapshots=checkpoints[:1], experts=5)
    run(dense, tmp_path / "plain", snapshots=checkpoints[:1], experts=5, expert_noise=0.0)
    assert "the FFN of checkpoint-2 (step 2) with noise" in capsys.readouterr().out
    sources = [weights(dense), weights(checkpoints[0])]
    noisy, plain = weights(tmp_path / "noisy"), weights(tmp_path / "plain")
    name = "model.layers.3.mlp.experts.down_proj"
    for expert in range(5):
        source = sources[expert % 2]["model.layers.3.mlp.down_proj.weight"]
        assert torch.equal(plain[name][expert], source)
        difference = (noisy[name][expert] - source).abs().max()
        assert difference == 0 if expert < 2 else 0 < difference < 0.1


def test_dtype_is_that_of_dense_unless_given(phi3, dense, checkpoints, tmp_path):
    """A Trainer saves fp32, where the conversion was in bf16: the experts are rounded as torch rounds."""
    convert(
        ConvertOptions(
            base=str(phi3), out=tmp_path / "dense", block_size=2, block_repeats=[1, 2, 1], experts=1, dtype="bfloat16"
        )
    )
    config = run(tmp_path / "dense", tmp_path / "jai", snapshots=checkpoints)
    jai, last = weights(tmp_path / "jai"), weights(checkpoints[-1])
    assert config.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in jai.values()} == {torch.bfloat16}
    gate_up, _ = expert_of(last, 2)
    assert torch.equal(jai["model.layers.2.mlp.experts.gate_up_proj"][3], gate_up.bfloat16())
    assert torch.equal(jai["lm_head.weight"], last["lm_head.weight"].bfloat16())
    config = run(dense, tmp_path / "half", snapshots=checkpoints, dtype="float16")
    assert config.dtype == torch.float16


def test_snapshots_have_the_ffn_weights_alone_and_give_the_same(dense, checkpoints, upcycled, trained, tmp_path):
    """By `jai snapshot` and by the callback, sharded and not, in one upcycling with whole checkpoints."""
    snapshot(SnapshotOptions(checkpoint=checkpoints[0], out=tmp_path / "two", max_shard_size=20_000, workers=2))
    assert len(CheckpointReader(tmp_path / "two").files.names) > 3
    by_callback = trained / "snapshots" / "step-4"
    for folder, whole in ((tmp_path / "two", checkpoints[0]), (by_callback, checkpoints[1])):
        kept, source = weights(folder), weights(whole)
        assert kept.keys() == {f"model.layers.{layer}.mlp.{kind}.weight" for layer in range(LAYERS) for kind in FFN}
        assert all(torch.equal(tensor, source[name]) for name, tensor in kept.items())
    mixed = [str(tmp_path / "two"), str(by_callback), checkpoints[2]]
    run(dense, tmp_path / "jai", snapshots=mixed)
    assert sha256(tmp_path / "jai" / "model.safetensors") == sha256(upcycled / "model.safetensors")


def test_snapshots_are_no_models(trained, dense, checkpoints, tmp_path):
    folder = str(trained / "snapshots" / "step-2")
    for trust in (False, True):
        with pytest.raises(ValueError, match="jai_ffn_snapshot"):
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    with pytest.raises(UserError, match="is a snapshot, which has only FFN weights"):
        inspect(InspectOptions(model=str(folder)))
    with pytest.raises(UserError, match="only FFN weights already"):
        snapshot(SnapshotOptions(checkpoint=folder, out=tmp_path / "again"))
    with pytest.raises(UserError, match=r"DENSE, .* has only FFN weights"):
        run(folder, tmp_path / "jai", snapshots=checkpoints)
    with pytest.raises(UserError, match=r"step-2 has only FFN weights\. Give --base-weights first"):
        run(dense, tmp_path / "jai", snapshots=[folder])
    run(dense, tmp_path / "jai", snapshots=[folder], base_weights="first")
    assert torch.equal(weights(tmp_path / "jai")["lm_head.weight"], weights(dense)["lm_head.weight"])


def test_callback_needs_no_save_strategy_and_outlives_the_limit(dense, checkpoints, tmp_path):
    """Snapshots stay where checkpoints are removed, and a run that begins again replaces them."""
    callbacks = [SnapshotCallback([2, 4])]
    out = train(dense, tmp_path / "run", save_strategy="no", save_total_limit=1, callbacks=callbacks)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    (out / "snapshots" / "step-2" / "model.safetensors").write_text("of an earlier run")
    train(dense, out, save_strategy="no", callbacks=callbacks)
    assert sorted(path.name for path in (out / "snapshots").iterdir()) == ["step-2", "step-4"]
    kept, source = weights(out / "snapshots" / "step-2"), weights(checkpoints[0])
    assert all(torch.equal(tensor, source[name]) for name, tensor in kept.items())
    assert open_jai(str(out / "snapshots" / "step-4")).global_step == 4


def test_callback_says_that_its_checkpoint_was_removed(tmp_path):
    """As a Trainer does that keeps one checkpoint, where an earlier run left one of a later step."""
    state = TrainerState(global_step=2, is_world_process_zero=True)
    with pytest.raises(UserError, match="checkpoint-2 is gone"):
        SnapshotCallback([2]).on_save(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())


def test_callback_refuses_before_training(dense, upcycled, tmp_path):
    with pytest.raises(UserError, match="step 8, but training ends at step 6"):
        train(dense, tmp_path / "a", callbacks=[SnapshotCallback([2, 8])])
    with pytest.raises(UserError, match="Convert with --experts 1"):
        train(upcycled, tmp_path / "b", callbacks=[SnapshotCallback([2])])
    with pytest.raises(UserError, match="at step 0"):
        SnapshotCallback([0])


def test_callback_refuses_checkpoints_in_pieces_and_adapters(dense, tmp_path, monkeypatch):
    """What FSDP saves by default, and what LoRA saves."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def begin(state_dict_type: str, model=model) -> None:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=state_dict_type)
        monkeypatch.setattr(Accelerator(cpu=True).state, "fsdp_plugin", plugin, raising=False)
        SnapshotCallback([2]).on_train_begin(arguments, TrainerState(max_steps=6), TrainerControl(), model=model)

    begin("FULL_STATE_DICT")
    with pytest.raises(UserError, match="FSDP saves them in pieces"):
        begin("SHARDED_STATE_DICT")
    with pytest.raises(UserError, match="LoRA trains none"):
        begin("FULL_STATE_DICT", get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


def test_bytes_do_not_depend_on_workers_or_breaks(dense, checkpoints, tmp_path, monkeypatch):
    options = {"snapshots": checkpoints[:2], "experts": 4, "max_shard_size": 30_000}
    run(dense, tmp_path / "one", **options)
    run(dense, tmp_path / "many", **options, workers=4)

    from jai.conversion.output import shards as writing

    write, calls = writing._write_shard, []

    def break_off(path: Path, *rest):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(writing, "_write_shard", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "resumed", **options)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(UserError, match="options seed was 0 and is 1"):
        run(dense, tmp_path / "resumed", **options, seed=1)
    finished = len(calls)
    run(dense, tmp_path / "resumed", **options)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    shards = [name for name in names if name.startswith("model-")]
    assert len(shards) > 8
    assert len(calls) - finished == len(shards) - 3
    for other in ("many", "resumed"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == names
        assert all(sha256(tmp_path / "one" / name) == sha256(tmp_path / other / name) for name in names)


def test_provenance_is_a_tree(dense, checkpoints, upcycled, trained, tmp_path):
    record = read_step(upcycled)
    assert record["step"] == "upcycle"
    assert [entry["role"] for entry in record["inputs"]] == [
        "dense",
        "snapshot",
        "snapshot",
        "snapshot",
        "base weights",
    ]
    assert [entry["name"] for entry in record["inputs"][1:]] == [f"checkpoint-{step}" for step in (2, 4, 6, 6)]
    for entry, folder in zip(record["inputs"], (dense, *checkpoints, checkpoints[-1])):
        assert entry["files"]["model.safetensors"] == sha256(Path(folder) / "model.safetensors")
        assert entry["files"]["config.json"] == sha256(Path(folder) / "config.json")
    assert record["inputs"][0]["made_by"]["step"] == "convert"
    assert record["options"]["seed"] == 0
    assert record["result"]["experts"][3] == "the FFN of checkpoint-6 (step 6)"
    snapshots = [str(trained / "snapshots" / f"step-{step}") for step in (2, 4)]
    run(dense, tmp_path / "jai", snapshots=snapshots, base_weights="first")
    record = read_step(tmp_path / "jai")
    assert [step["step"] for step in chain(record)] == ["convert", "snapshot", "snapshot", "upcycle"]
    taken = record["inputs"][1]
    assert taken["files"].keys() == {"model.safetensors", "config.json"}
    made = taken["made_by"]["inputs"][0]
    assert (made["role"], made["name"]) == ("model", "checkpoint-2")
    assert made["files"]["model.safetensors"] == sha256(Path(checkpoints[0]) / "model.safetensors")


@pytest.fixture(scope="module")
def texts(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences * 2))
    return path


def sft_options(dense: Path, texts: Path, out: Path) -> dict:
    return {
        "model_name_or_path": str(dense),
        "dataset_name": str(texts),
        "output_dir": str(out),
        "max_steps": 4,
        "snapshot_steps": [2, 4],
        "save_strategy": "no",
        "save_only_model": True,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.01,
        "dtype": "float32",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def check_snapshots(out: Path, dense: Path, result: Path) -> None:
    """Both are there, the last is the trained model's FFN, and together they make experts."""
    snapshots = [str(out / "snapshots" / f"step-{step}") for step in (2, 4)]
    first, last = map(weights, snapshots)
    trained = weights(out)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in last.items())
    assert not any(torch.equal(first[name], last[name]) for name in last)
    run(dense, result, snapshots=snapshots, base_weights=str(out))
    AutoModelForCausalLM.from_pretrained(result)
    assert [step["step"] for step in chain(read_step(result))] == [
        "convert",
        "snapshot",
        "snapshot",
        "pretrain",
        "upcycle",
    ]


def test_sft_takes_snapshot_steps_from_its_yaml(dense, texts, tmp_path):
    import yaml

    from jai.trainers.sft import main

    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(sft_options(dense, texts, tmp_path / "run")))
    main(["--config", str(tmp_path / "pretrain.yaml")])
    check_snapshots(tmp_path / "run", dense, tmp_path / "jai")


@pytest.mark.slow
def test_snapshots_of_two_processes(dense, texts, tmp_path):
    """The main process alone writes them, and the other goes on."""
    options = sft_options(dense, texts, tmp_path / "run")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "jai.trainers.sft"]
    for key, value in options.items():
        command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_step(tmp_path / "run")["hardware"]["processes"] == 2
    check_snapshots(tmp_path / "run", dense, tmp_path / "jai")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "No snapshots are given"),
        ({"expert_init": "copies"}, "expected one of snapshots, copy, noise, random"),
        ({"snapshots": "checkpoint-2"}, "expected a list"),
        ({"snapshots": ["a"], "expert_init": "copy"}, "--expert-init copy uses no snapshots, but 1 are given"),
        ({"snapshots": ["a", "b"], "experts": 2}, "make 3 experts, but experts is 2"),
        ({"expert_init": "copy", "experts": 1}, "a whole number from 2"),
        ({"expert_init": "noise", "expert_noise": -1.0}, "a number from 0"),
        ({"expert_init": "copy", "dtype": "int8"}, "expected one of float32, bfloat16, float16"),
        ({"expert_init": "copy", "workers": 0}, "a whole number from 1"),
    ],
)
def test_bad_options_are_refused(dense, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(dense, tmp_path / "jai", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_are_refused(phi3, dense, checkpoints, upcycled, tmp_path):
    def refused(message: str, dense=dense, **options) -> None:
        with pytest.raises(UserError, match=message):
            run(dense, tmp_path / "out" / "jai", **options)
        assert not (tmp_path / "out").exists()

    refused("has 4 experts in each layer already", dense=upcycled, snapshots=checkpoints)
    refused("jai has 4 experts", snapshots=[str(upcycled)])
    refused("type 'phi3', not 'jai'", dense=phi3, snapshots=checkpoints)
    refused("is given twice", snapshots=[checkpoints[0], checkpoints[1], checkpoints[0] + "/"])
    refused("is given twice", snapshots=[str(dense)])
    refused("neither a folder nor a Hub id", snapshots=["no/such/folder"])
    refused("neither a folder nor a Hub id", snapshots=checkpoints, base_weights="no/such/folder")

    convert(ConvertOptions(base=str(phi3), out=tmp_path / "other", block_size=2, block_repeats=[1, 1, 2], experts=1))
    refused(
        r"other is not a state of the model .*block_repeats \[1, 1, 2\] instead of \[1, 2, 1\]",
        snapshots=[str(tmp_path / "other")],
    )
    refused("other is not a state of the model", snapshots=checkpoints, base_weights=str(tmp_path / "other"))

    lacking = tmp_path / "lacking"
    shutil.copytree(checkpoints[0], lacking)
    save_file({n: t for n, t in weights(lacking).items() if "3.mlp.up_proj" not in n}, lacking / "model.safetensors")
    refused(r"model\.layers\.3\.mlp\.up_proj\.weight is missing \(1 missing", snapshots=[str(lacking)])
    (lacking / "model.safetensors").unlink()
    refused("no safetensors weights", snapshots=[str(lacking)])
    (lacking / "adapter_config.json").write_text("{}")
    refused("LoRA adapter without its model", snapshots=[str(lacking)])

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(dense, tmp_path / "taken", snapshots=checkpoints)


@pytest.fixture
def jai(monkeypatch, capsys):
    def run_command(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["jai", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    return run_command


def test_command_line(jai, dense, checkpoints, upcycled, tmp_path):
    out = tmp_path / "jai"
    printed = jai("upcycle", dense, out, "--snapshots", *checkpoints, "--dry-run")
    assert "the FFN of checkpoint-4 (step 4)" in printed
    assert "Dry run" in printed
    assert not out.exists()
    printed = jai("upcycle", dense, out, "--snapshots", *checkpoints, "--seed", 0, "--verify")
    assert "are what their sources give" in printed
    assert sha256(out / "model.safetensors") == sha256(upcycled / "model.safetensors")

    (tmp_path / "upcycle.yaml").write_text(json.dumps({"snapshots": checkpoints, "seed": 3}))
    from_file = tmp_path / "from_file"
    jai("upcycle", dense, from_file, "--config", tmp_path / "upcycle.yaml", "--seed", 0)
    assert sha256(from_file / "model.safetensors") == sha256(upcycled / "model.safetensors")

    printed = jai("snapshot", checkpoints[0], tmp_path / "step-2")
    assert "the FFN weights of checkpoint-2 (step 2)" in " ".join(printed.split())
    assert "jai upcycle DENSE OUT --snapshots" in printed


def test_dry_run_needs_no_weights(dense, checkpoints, tmp_path, capsys):
    """A plan can be made of configurations alone."""
    for number, folder in enumerate((dense, *checkpoints)):
        (tmp_path / str(number)).mkdir()
        shutil.copyfile(Path(folder) / "config.json", tmp_path / str(number) / "config.json")
    names = [str(tmp_path / str(number)) for number in range(4)]
    config = run(names[0], tmp_path / "jai", snapshots=names[1:], dry_run=True)
    assert config.num_local_experts == 4
    assert (
        f"{sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()):,}" in capsys.readouterr().out
    )
    assert not (tmp_path / "jai").exists()


def test_a_snapshot_whose_step_is_no_number_is_refused(dense, checkpoints, tmp_path):
    damaged = tmp_path / "damaged"
    snapshot(SnapshotOptions(checkpoint=checkpoints[0], out=damaged))
    config = damaged / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "global_step": "many"}))
    with pytest.raises(UserError, match=r"is not a snapshot: its global_step is 'many'"):
        run(dense, tmp_path / "jai", snapshots=[str(damaged)])

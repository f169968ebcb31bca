# SPDX-License-Identifier: Apache-2.0
"""Every option of the conversion verbs does something: delete one, and its line here fails.

Each is given to one of two runs on tiny checkpoints that are otherwise alike; the two must differ in bytes. Options
that say how to write, and not what, are tested by what they ask for.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

from jai import JaiForCausalLM
from jai.conversion.adapter.command import merge_lora
from jai.conversion.adapter.options import MergeAdapterOptions
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export.command import export
from jai.conversion.export.options import ExportOptions
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.output import shards
from jai.conversion.output.options import WriteOptions
from jai.conversion.quantize.command import quantize
from jai.conversion.quantize.options import QuantizeOptions
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import SnapshotOptions, UpcycleOptions
from jai.conversion.upcycle.snapshot import snapshot
from jai.errors import UserError
from jai.files import sha256

PLAIN = {"block_size": 2, "block_repeats": [1, 3, 2]}
# Each option that decides bytes: what both runs are given, what one is given, and what the other.
VALUES: dict[type, dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]] = {
    ConvertOptions: {
        "tokenizer": (PLAIN, {}, {"tokenizer": "EXTENDED"}),
        "init": (PLAIN | {"tokenizer": "EXTENDED"}, {"init": "mean"}, {"init": "mean-normed"}),
        "method": ({}, PLAIN, {"method": "dus-v1", "k": 4}),
        "k": ({"method": "dus-v1"}, {"k": 4}, {"k": 5}),
        "layers": ({}, {"layers": [0, 1, 2]}, {"layers": [0, 2, 1]}),
        "block_size": ({}, {"block_size": 2, "block_repeats": [2] * 3}, {"block_size": 3, "block_repeats": [2] * 2}),
        "block_repeats": ({"block_size": 2}, {"block_repeats": [1, 3, 2]}, {"block_repeats": [3, 1, 2]}),
        "skip_alpha": (PLAIN, {}, {"skip_alpha": 0.5}),
        "skip_alpha_normalize": (PLAIN, {}, {"skip_alpha_normalize": True}),
        "duplicate_init": (PLAIN | {"skip_alpha": 0.1}, {}, {"duplicate_init": "copy"}),
        "experts": (PLAIN, {}, {"experts": 2}),
        "expert_init": (PLAIN, {}, {"expert_init": "random"}),
        "expert_noise": (PLAIN | {"expert_init": "noise"}, {}, {"expert_noise": 0.02}),
        "rope_theta": (PLAIN, {}, {"rope_theta": 1e6}),
        "dtype": (PLAIN, {}, {"dtype": "bfloat16"}),
        "seed": (PLAIN, {}, {"seed": 1}),
    },
    UpcycleOptions: {
        "snapshots": ({}, {}, {"snapshots": ["DENSE1", "DENSE1_COPY"]}),
        "base_weights": ({}, {}, {"base_weights": "first"}),
        "expert_init": ({"snapshots": []}, {"expert_init": "copy"}, {"expert_init": "random"}),
        "experts": ({}, {}, {"experts": 4}),
        "expert_noise": ({"experts": 4}, {}, {"expert_noise": 0.5}),
        "dtype": ({}, {}, {"dtype": "bfloat16"}),
        "seed": ({}, {}, {"seed": 1}),
    },
    MergeOptions: {
        "models": ({}, {}, {"models": ["MODEL2", "MODEL1"], "weights": [0.3, 0.7]}),
        "method": ({}, {}, {"method": "slerp"}),
        "weights": ({}, {}, {"weights": [0.25, 0.75]}),
        "t": ({"method": "slerp"}, {}, {"t": 0.1}),
        "base": ({"method": "task-arithmetic"}, {"base": "MODEL0"}, {"base": "MODEL2"}),
        "density": ({"method": "ties", "base": "MODEL0"}, {}, {"density": 0.2}),
        "normalize": ({"weights": [1.0, 2.0]}, {}, {"normalize": False}),
        "place_by": (
            {"weights": [[{"at": 0, "value": 0.0}, {"at": 1, "value": 1.0}], 1.0]},
            {},
            {"place_by": "origin"},
        ),
        "scale": ({"method": "ties", "base": "MODEL0"}, {}, {"scale": 2.0}),
        "dtype": ({}, {}, {"dtype": "bfloat16"}),
        "seed": ({"method": "dare-linear", "base": "MODEL0"}, {}, {"seed": 1}),
    },
    ExportOptions: {"to": ({}, {}, {"model": "DENSE0", "to": "phi3"})},
    SnapshotOptions: {},
    QuantizeOptions: {"dtype": ({}, {}, {"dtype": "bfloat16"}), "double_quant": ({}, {}, {"double_quant": True})},
    MergeAdapterOptions: {"base": ({}, {}, {"base": "MODEL2"})},
}
# Tested elsewhere, by name: what they change is no byte of the output.
HOW_TO_WRITE = {field.name for field in dataclasses.fields(WriteOptions)} | {"stream", "verify_text"}
CASES = [
    pytest.param(options, *values, id=f"{options.__name__}.{name}")
    for options, table in VALUES.items()
    for name, values in table.items()
]


class Work(NamedTuple):
    verb: Callable[..., Any]
    inputs: dict[str, Any]


WORKS: dict[type, Work] = {
    ConvertOptions: Work(convert, {"base": "BASE"}),
    UpcycleOptions: Work(upcycle, {"dense": "DENSE0", "snapshots": ["DENSE1", "DENSE2"]}),
    MergeOptions: Work(merge, {"models": ["MODEL1", "MODEL2"]}),
    ExportOptions: Work(export, {"model": "MODEL_WITHOUT_SKIPS"}),
    SnapshotOptions: Work(snapshot, {"checkpoint": "DENSE0"}),
    QuantizeOptions: Work(quantize, {"model": "MODEL_IN_BLOCKS"}),
    MergeAdapterOptions: Work(merge_lora, {"adapter": "ADAPTER"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_phi3, tiny_tokenizer, tiny_model, sentences) -> dict[str, str]:
    from jai.tokenization.extend import extend_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints")
    special = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_phi3(folder / "BASE", vocab_size=len(tiny_tokenizer), **special)
    tiny_tokenizer.save_pretrained(folder / "BASE")
    extend_tokenizer(tiny_tokenizer, sentences * 4, vocab_size=450).save_pretrained(folder / "EXTENDED")
    for number in range(3):
        tiny_model(number, num_local_experts=1).save_pretrained(folder / f"DENSE{number}")
        tiny_model(number).save_pretrained(folder / f"MODEL{number}")
    tiny_model(1, num_local_experts=1).save_pretrained(folder / "DENSE1_COPY")
    tiny_model(0, skip_alpha=0.0).save_pretrained(folder / "MODEL_WITHOUT_SKIPS")
    tiny_model(0, num_local_experts=1, skip_alpha=0.0).save_pretrained(folder / "DENSE0_WITHOUT_SKIPS")
    tiny_model(0, hidden_size=64, intermediate_size=64).save_pretrained(folder / "MODEL_IN_BLOCKS")
    model = JaiForCausalLM.from_pretrained(folder / "MODEL1")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "ADAPTER")
    return {path.name: str(path) for path in folder.iterdir()} | {"DENSE0": str(folder / "DENSE0_WITHOUT_SKIPS")}


def run(checkpoints: dict[str, str], options: type, out: Path, **values: Any) -> str:
    """Run a verb quietly; what it printed."""
    work = WORKS[options]
    console = Console(record=True, width=200, file=io.StringIO())
    given = {name: with_folders(checkpoints, value) for name, value in (work.inputs | values).items()}
    work.verb(options(out=out, **given), console=console)
    return console.export_text()


def with_folders(checkpoints: dict[str, str], value: Any) -> Any:
    if isinstance(value, list):
        return [with_folders(checkpoints, each) for each in value]
    return checkpoints.get(value, value) if isinstance(value, str) else value


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a checkpoint but of the record of its making, in which options stand."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "provenance.json"}


@pytest.mark.parametrize("options", VALUES, ids=lambda options: options.__name__)
def test_no_option_is_forgotten_here(options):
    names = {field.name for field in dataclasses.fields(options)}
    single = {name for name, value in WORKS[options].inputs.items() if isinstance(value, str)}
    assert names - HOW_TO_WRITE - single == VALUES[options].keys()


@pytest.mark.parametrize(("options", "both", "one", "other"), CASES)
def test_option_decides_bytes(checkpoints, tmp_path, options, both, one, other):
    run(checkpoints, options, tmp_path / "one", **both | one)
    run(checkpoints, options, tmp_path / "other", **both | other)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


@pytest.mark.parametrize("options", VALUES, ids=lambda options: options.__name__)
class TestHowToWrite:
    def values(self, options: type) -> dict[str, Any]:
        return PLAIN if options is ConvertOptions else {}

    def test_dry_run_writes_nothing(self, checkpoints, tmp_path, options):
        printed = run(checkpoints, options, tmp_path / "out", dry_run=True, **self.values(options))
        assert "Dry run: nothing was written" in printed
        assert list(tmp_path.iterdir()) == []

    def test_verify_says_what_it_read(self, checkpoints, tmp_path, options):
        assert "Verified: " in run(checkpoints, options, tmp_path / "out", verify=True, **self.values(options))

    def test_max_shard_size_cuts_files_and_workers_write_them(self, checkpoints, tmp_path, options, monkeypatch):
        workers = []

        class CountedPool(shards.ThreadPoolExecutor):
            def __init__(self, max_workers: int):
                workers.append(max_workers)
                super().__init__(max_workers)

        monkeypatch.setattr(shards, "ThreadPoolExecutor", CountedPool)
        run(checkpoints, options, tmp_path / "out", max_shard_size="20kB", workers=3, **self.values(options))
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
        assert workers == [3]


@pytest.mark.parametrize("expert_init", ["noise", "random"])
@pytest.mark.parametrize(("options", "given"), [(ConvertOptions, PLAIN), (UpcycleOptions, {"snapshots": []})])
def test_seed_draws_the_experts(checkpoints, tmp_path, options, given, expert_init):
    experts = []
    for seed in (0, 1):
        printed = run(checkpoints, options, tmp_path / str(seed), **given, seed=seed, expert_init=expert_init)
        assert options is ConvertOptions or expert_init == "noise" or f"drawn at random with seed {seed}" in printed
        weights = load_file(tmp_path / str(seed) / "model.safetensors")
        experts.append(weights["model.layers.0.mlp.experts.down_proj"])
    first, second = experts
    assert first[0].equal(second[0])
    assert not any(one.equal(other) for one, other in zip(first[1:], second[1:], strict=True))


def test_stream_is_refused_for_a_folder(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"--stream is for a base on the Hub, but .*BASE is a folder"):
        run(checkpoints, ConvertOptions, tmp_path / "out", stream=True, **PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_verify_text_is_what_logits_are_compared_on(checkpoints, tmp_path, capsys):
    from jai.cli.app import app

    (tmp_path / "text.txt").write_text("สวัสดี hello " * 3)
    words = ["convert", checkpoints["BASE"], str(tmp_path / "out"), "--block-size", "6", "--block-repeats", "1"]
    with pytest.raises(SystemExit):
        app([*words, "--verify", "--verify-text", str(tmp_path / "text.txt")], prog_name="jai")
    short = capsys.readouterr().out
    assert "Verified on " in short
    tokens = int(short.partition("Verified on ")[2].split()[0].replace(",", ""))
    assert tokens < 60

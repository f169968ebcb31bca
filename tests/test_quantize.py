# SPDX-License-Identifier: Apache-2.0
"""`jai quantize`: shard by shard the bytes that transformers and bitsandbytes make of a whole model."""

import json
from importlib import metadata
from io import StringIO
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jai import JaiForCausalLM, cli
from jai.conversion.inputs.weight_files import weight_map
from jai.conversion.quantize import plan
from jai.conversion.quantize.command import quantize
from jai.conversion.quantize.options import QuantizeOptions
from jai.errors import UserError
from jai.files import sha256, work_folder
from jai.provenance import read_step

SIZES = {"hidden_size": 64, "intermediate_size": 128, "block_repeats": [1, 2]}


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Mixtures in two dtypes, and a dense JAI whose matrices are no multiple of anything."""
    home = tmp_path_factory.mktemp("whole")
    folders = {"float32": tiny_checkpoint(home / "float32", **SIZES)}
    model = JaiForCausalLM.from_pretrained(folders["float32"])
    model.to(torch.bfloat16).save_pretrained(home / "bfloat16")
    dense = {"hidden_size": 40, "intermediate_size": 50, "num_local_experts": 1, "tie_word_embeddings": True}
    return {**folders, "bfloat16": home / "bfloat16", "dense": tiny_checkpoint(home / "dense", **dense)}


def run(model: Path, out: Path, **options) -> str:
    output = StringIO()
    quantize(QuantizeOptions(model=str(model), out=out, **options), console=Console(file=output, width=100))
    return output.getvalue()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("kind", "to"), [("float32", None), ("bfloat16", None), ("dense", None), ("float32", "bfloat16")]
)
def test_every_weight_is_what_transformers_makes_of_the_whole_model(checkpoints, tmp_path, kind, to, double):
    run(checkpoints[kind], tmp_path / "out", double_quant=double, dtype=to, verify=True)
    dtype = torch.bfloat16 if "bfloat16" in (kind, to) else torch.float32
    assert read_step(tmp_path / "out")["options"]["dtype"] == str(dtype).removeprefix("torch.")
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    expected = AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=dtype, quantization_config=how)
    actual, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(loading.values())
    assert actual.config.quantization_config.to_dict() == how.to_dict()
    assert actual.dtype == expected.dtype == dtype
    found, wanted = dict(actual.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert torch.equal(found[name], parameter), name
        state: QuantState | None = getattr(parameter, "quant_state", None)
        assert (state is None) == (getattr(found[name], "quant_state", None) is None)
        if state is not None:
            ours = found[name].quant_state.as_dict()
            for key, value in state.as_dict().items():
                assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key
    ids = torch.arange(5, 25).reshape(2, 10)
    assert torch.equal(actual(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("double", [False, True])
def test_shards_workers_and_chunks_change_no_byte(checkpoints, tmp_path, monkeypatch, double):
    """Scales may stand in another shard than their weights, and be made by another worker."""
    hashes = []
    for number, options in enumerate(({}, {"max_shard_size": 33_000}, {"max_shard_size": 33_000, "workers": 3})):
        out = tmp_path / str(number)
        monkeypatch.setattr(plan, "_CHUNK", 5 * 64 if number == 2 else 1 << 21)
        run(checkpoints["float32"], out, double_quant=double, **options)
        model = AutoModelForCausalLM.from_pretrained(out)
        hashes.append({name: sum(value.float().flatten().tolist()) for name, value in model.state_dict().items()})
    assert hashes[0] == hashes[1] == hashes[2]
    names = {path.name: sha256(path) for path in (tmp_path / "1").glob("*.safetensors")}
    assert len(names) > 5
    assert names == {path.name: sha256(path) for path in (tmp_path / "2").glob("*.safetensors")}
    files = weight_map(tmp_path / "1")
    matrix = "model.layers.0.mlp.experts.gate_up"
    assert files[f"{matrix}_proj"] != files[f"{matrix}_absmax"]
    index = json.loads((tmp_path / "1" / "model.safetensors.index.json").read_text())
    whole = JaiForCausalLM.from_pretrained(checkpoints["float32"])
    assert index["metadata"]["total_parameters"] == whole.num_parameters()


def test_an_interrupted_run_goes_on(checkpoints, tmp_path, monkeypatch):
    options = {"max_shard_size": 33_000, "double_quant": True}
    run(checkpoints["bfloat16"], tmp_path / "whole", **options)
    made = []

    def stop(*arguments, **named):
        made.append(1)
        if len(made) == 30:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    original = bitsandbytes.functional.quantize_4bit
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "quantize_4bit", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints["bfloat16"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert "shards are finished" in run(checkpoints["bfloat16"], tmp_path / "out", **options)
    assert not work_folder(tmp_path / "out").exists()
    for path in (tmp_path / "whole").iterdir():
        if path.name != "provenance.json":
            assert sha256(path) == sha256(tmp_path / "out" / path.name), path.name


def test_the_plan_and_the_record(checkpoints, tmp_path):
    output = run(checkpoints["bfloat16"], tmp_path / "out", dry_run=True)
    assert "Dry run" in output
    assert not list(tmp_path.iterdir())
    rows = {line.split("│")[1].strip(): [part.strip() for part in line.split("│")[2:-1]] for line in output.splitlines() if "│" in line}  # fmt: skip # noqa: E501
    experts = 3 * 4 * 3 * 64 * 128
    assert rows["experts"] == [f"{experts:,}", "165.9 kB", "0.562", "NF4"]
    assert rows["embeddings, head"][2:] == ["2.000", "bfloat16"]
    run(checkpoints["bfloat16"], tmp_path / "out", double_quant=True)
    step = read_step(tmp_path / "out")
    whole = JaiForCausalLM.from_pretrained(checkpoints["bfloat16"])
    assert step["step"] == "quantize"
    assert step["options"] == {"quant_type": "nf4", "double_quant": True, "dtype": "bfloat16"}
    assert step["result"]["parameters"] == whole.num_parameters()
    assert step["versions"]["bitsandbytes"] == bitsandbytes.__version__
    assert {"modeling_jai.py", "quantization_jai.py", "config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_what_cannot_be_quantised(checkpoints, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    run(checkpoints["bfloat16"], tmp_path / "four")
    for words, message in (
        (("quantize", tmp_path / "four", tmp_path / "out"), "four is quantised already (bitsandbytes)"),
        (("merge", tmp_path / "out", "--models", tmp_path / "four", tmp_path / "four"), "Quantised weights cannot"),
        (("quantize", tiny_checkpoint(tmp_path / "narrow"), tmp_path / "out"), "hidden_size of"),
        (("quantize", checkpoints["bfloat16"], tmp_path / "four"), "four exists already"),
    ):
        monkeypatch.setattr("sys.argv", ["jai", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    narrow = tiny_checkpoint(tmp_path / "narrower", hidden_size=64, intermediate_size=96)
    with pytest.raises(UserError, match=r"intermediate_size of .*narrower is 96.*multiple of 64"):
        run(narrow, tmp_path / "out")


def test_a_bitsandbytes_that_is_missing_or_old(checkpoints, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "0.49.2")
        with pytest.raises(UserError, match=r"bitsandbytes 0\.49\.2 is installed.*need 0\.50 or later"):
            run(checkpoints["bfloat16"], tmp_path / "out")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", missing)
        patch.setattr("sys.argv", ["jai", "quantize", str(checkpoints["bfloat16"]), str(tmp_path / "out")])
        with pytest.raises(SystemExit):
            cli.main()
    assert "pip install 'jai-llm[gpu]'" in capsys.readouterr().err

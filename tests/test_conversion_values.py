# SPDX-License-Identifier: Apache-2.0
"""Values of weights: what is not finite never passes, nothing is rounded or lost without a word."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export import ExportOptions, export
from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.values import bytes_of, is_finite, refuse_not_finite, sha256_of_finite
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.upcycle.command import UpcycleOptions, upcycle
from jai.conversion.upcycle.snapshot import snapshot
from jai.errors import UserError
from jai.files import sha256, work_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_phi3) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("base") / "phi3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, base) -> Path:
    return run(base, tmp_path_factory.mktemp("dense") / "jai", experts=1)


def run(base: Path, out: Path, **options) -> Path:
    values = {"block_size": 1, "block_repeats": [1, 2]} | options
    convert(ConvertOptions(base=str(base), out=out, **values))
    return out


def edited(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object], **config) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    content = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(content))
    return out


def poisoned(source: Path, out: Path, name: str, value: float) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edited(source, out, change)


# --- NaN and infinity ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_16_bits_is_judged_as_torch_does(dtype):
    """And for 32 bits those around each border, with both signs."""
    if dtype == torch.float32:
        patterns = torch.tensor(
            [0, 1, 0x007FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 2**31 - 1]
        )
        bits = torch.cat([patterns, patterns - 2**31]).to(torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype)
    finite = values.isfinite()
    assert 0 < finite.sum() < len(finite)
    assert [is_finite(bytes_of(value), dtype) for value in values] == finite.tolist()
    assert is_finite(bytes_of(values[finite]), dtype)
    for value in values[~finite][:3]:
        assert not is_finite(bytes_of(torch.cat([values[finite], value.view(1)])), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_are_read_to_their_ends(tmp_path, dtype):
    """The hash is that of the file; a bad value is found wherever it lies, beyond the first chunk of a megabyte too."""
    path = tmp_path / WEIGHTS
    tensors = {name: torch.ones(size, dtype=dtype) for name, size in (("a", 700_001), ("b", 1), ("c", 0), ("d", 3))}
    save_file(tensors, path)
    assert sha256_of_finite(path, read_header(path)) == sha256(path)
    for name, at in (("a", 0), ("a", 700_000), ("b", 0), ("d", 2)):
        for value in (math.nan, math.inf, -math.inf):
            bad = {key: tensor.clone() for key, tensor in tensors.items()}
            bad[name][at] = value
            save_file(bad, path)
            for check in (sha256_of_finite, refuse_not_finite):
                with pytest.raises(UserError, match=f"^{name} in .*{WEIGHTS} holds {value},"):
                    check(path, read_header(path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, base, dense, value):
    """By every verb, whichever of its inputs it is in, and whether the weight is copied or computed with."""
    bad_base = poisoned(base, tmp_path / "bad_base", DOWN, value)
    bad = poisoned(dense, tmp_path / "bad", DOWN, value)
    good = edited(dense, tmp_path / "good", lambda tensors: tensors[DOWN].mul_(2))
    out = tmp_path / "out"
    commands = [
        *(lambda dtype=dtype: run(bad_base, out, dtype=dtype) for dtype in (None, "bfloat16")),
        lambda: run(bad_base, out, expert_init="noise"),
        *(
            lambda models=models: merge(MergeOptions(models=[str(model) for model in models], out=out))
            for models in ((good, bad), (bad, good))
        ),
        lambda: merge(MergeOptions(models=[str(good), str(bad)], out=out, method="slerp", t=0.0)),
        lambda: merge(MergeOptions(models=[str(good)], base=str(bad), out=out, method="ties")),
        lambda: upcycle(UpcycleOptions(dense=str(bad), out=out, snapshots=[str(good)])),
        lambda: upcycle(UpcycleOptions(dense=str(good), out=out, snapshots=[str(bad)])),
        lambda: upcycle(UpcycleOptions(dense=str(good), out=out, expert_init="copy", base_weights=str(bad))),
        lambda: export(ExportOptions(model=str(bad), out=out, to="phi3")),
        lambda: snapshot(str(bad), out),
    ]
    for command in commands:
        with pytest.raises(UserError, match=f"{DOWN} in .*bad.* holds {value}"):
            command()
        assert not out.exists()
        assert not work_folder(out).exists()


@pytest.mark.parametrize(
    ("dtype", "value", "remedy"),
    [("float16", 70_000.0, "bfloat16"), ("float16", -1e38, "bfloat16"), ("bfloat16", 3.4e38, "float32")],
)
@pytest.mark.parametrize("name", [DOWN, EMBEDDINGS, "model.norm.weight"])
def test_a_value_too_large_for_the_dtype_is_refused_with_a_remedy_that_works(
    tmp_path, base, name, dtype, value, remedy
):
    large = poisoned(base, tmp_path / "large", name, value)
    message = f"has the value {value:.4g}, but the largest that {dtype} can hold is .* Give --dtype {remedy}".replace(
        "+", r"\+"
    )
    with pytest.raises(UserError, match=message):
        run(large, tmp_path / "jai", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    run(large, tmp_path / "jai", dtype=remedy)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "jai" / WEIGHTS).values())


def test_what_computes_to_no_number_is_refused(tmp_path, base, dense):
    large = poisoned(base, tmp_path / "large", DOWN, 3e38)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.down_proj comes out as .*inf: .*noise"):
        run(large, tmp_path / "jai", expert_init="noise", expert_noise=100.0)
    models = [str(poisoned(dense, tmp_path / f"{sign}", DOWN, sign * 3e38)) for sign in (1, -1)]
    options = {"models": models, "out": tmp_path / "jai", "normalize": False}
    with pytest.raises(UserError, match=rf"{DOWN} comes out as -inf: linear, -3 x model 1"):
        merge(MergeOptions(**options, weights=[-3.0, 1.0]))
    with pytest.raises(UserError, match=rf"{DOWN} has the value 3e\+38, .* Give --dtype bfloat16"):
        merge(MergeOptions(**options, weights=[1.0, 0.0], dtype="float16"))
    with pytest.raises(UserError, match=r"skip_alpha has the value 7e\+04, .* Give --dtype bfloat16"):
        run(base, tmp_path / "jai", skip_alpha=70_000.0, dtype="float16")
    assert not (tmp_path / "jai").exists()

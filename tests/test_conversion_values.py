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
from transformers import AutoModelForCausalLM

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.verify import verify
from jai.conversion.export.command import export
from jai.conversion.export.options import ExportOptions
from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.values import bytes_of, is_finite, refuse_not_finite, sha256_of_finite
from jai.conversion.inspect_checkpoint import inspect
from jai.conversion.inspect_options import InspectOptions
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import SnapshotOptions, UpcycleOptions
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
        lambda: snapshot(SnapshotOptions(checkpoint=str(bad), out=out)),
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
    large, shards = poisoned(base, tmp_path / "large", name, value), {"max_shard_size": "1KB"}
    message = f"has the value {value:.4g}, but the largest that {dtype} can hold is .* Give --dtype {remedy}".replace(
        "+", r"\+"
    )
    with pytest.raises(UserError, match=message):
        run(large, tmp_path / "jai", dtype=dtype, **shards)
    # Shards that were finished before are of no use to another dtype, and would refuse it.
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    run(large, tmp_path / "jai", dtype=remedy, **shards)
    written = [load_file(path) for path in (tmp_path / "jai").glob("*.safetensors")]
    assert len(written) > 10
    assert all(tensor.isfinite().all() for tensors in written for tensor in tensors.values())


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
    assert not (tmp_path / "jai").exists()


# --- Dtypes ---


def cast(names: dict[str, torch.dtype]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, dtype in names.items():
            tensors[name] = tensors[name].to(dtype)

    return change


def written(out: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that was written, and with them the promise of its configuration."""
    tensors = load_file(out / WEIGHTS)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    assert dtypes == {f"torch.{json.loads((out / 'config.json').read_text())['dtype']}"}
    return tensors


@pytest.mark.parametrize(
    ("narrow", "expected"),
    [
        ({EMBEDDINGS: torch.bfloat16}, torch.float32),
        ({EMBEDDINGS: torch.float16, "lm_head.weight": torch.bfloat16}, torch.float32),
        ({"model.norm.weight": torch.bfloat16}, torch.float32),
        (None, torch.bfloat16),  # all of them
    ],
)
def test_a_base_of_several_dtypes_is_not_rounded(tmp_path, base, capsys, narrow, expected):
    """The embeddings speak for themselves: the output has the dtype that holds all values, and the plan says so."""
    names = narrow or dict.fromkeys(load_file(base / WEIGHTS), torch.bfloat16)
    mixed = edited(base, tmp_path / "mixed", cast(names))
    run(mixed, tmp_path / "jai", experts=1)
    source, result = load_file(mixed / WEIGHTS), written(tmp_path / "jai")
    assert {tensor.dtype for tensor in result.values()} == {expected}
    assert torch.equal(result[DOWN], source[DOWN].to(expected))
    assert torch.equal(result[EMBEDDINGS], source[EMBEDDINGS].to(expected))
    printed = " ".join(capsys.readouterr().out.split())
    assert ("; the output is all float32" in printed) == (narrow is not None)
    run(mixed, tmp_path / "rounded", dtype="bfloat16", experts=1)
    assert torch.equal(written(tmp_path / "rounded")[DOWN], source[DOWN].bfloat16())


def test_what_is_not_used_does_not_decide_the_dtype(tmp_path, tied, capsys):
    """The copy of the embeddings that a tied base may have."""
    everything = dict.fromkeys(load_file(tied / WEIGHTS), torch.bfloat16)
    narrow = edited(tied, tmp_path / "narrow", cast(everything))
    run(edited(narrow, tmp_path / "base", add_head(torch.float32)), tmp_path / "jai")
    assert {tensor.dtype for tensor in written(tmp_path / "jai").values()} == {torch.bfloat16}
    assert "the output is all" not in capsys.readouterr().out


def test_upcycling_says_what_it_rounds(tmp_path, dense, capsys):
    """The output has the dtype of DENSE: of all of its weights, and not of the first."""
    narrow = edited(dense, tmp_path / "narrow", cast(dict.fromkeys(load_file(dense / WEIGHTS), torch.bfloat16)))
    # safetensors has wide tensors first, so the first weight says too little only of two narrow dtypes.
    mixed = edited(narrow, tmp_path / "mixed", cast({EMBEDDINGS: torch.float16}))
    note = "Note: the checkpoints are bfloat16 and float32, and the output has DENSE's bfloat16."
    for number, (sources, dtype, expected, is_noted) in enumerate(
        [
            ((narrow, dense), None, torch.bfloat16, True),
            ((narrow, dense), "float32", torch.float32, False),
            ((dense, narrow), None, torch.float32, False),
            ((mixed, narrow), None, torch.float32, False),
        ]
    ):
        out = tmp_path / str(number)
        upcycle(UpcycleOptions(dense=str(sources[0]), snapshots=[str(sources[1])], out=out, dtype=dtype))
        stack = written(out)["model.layers.1.mlp.experts.down_proj"]
        assert stack.dtype == expected
        for expert, source in zip(stack, sources):
            assert torch.equal(expert, load_file(source / WEIGHTS)[DOWN].to(expected))
        assert (note in " ".join(capsys.readouterr().out.split())) == is_noted


def test_merging_says_what_it_rounds(tmp_path, dense, capsys):
    """Each tensor has the dtype of the first model's."""
    narrow = edited(dense, tmp_path / "narrow", cast(dict.fromkeys(load_file(dense / WEIGHTS), torch.bfloat16)))
    mixed = edited(dense, tmp_path / "mixed", cast({DOWN: torch.bfloat16}))
    fp32 = load_file(dense / WEIGHTS)
    of_mixed = {name: tensor.dtype for name, tensor in load_file(mixed / WEIGHTS).items()}
    for number, (models, dtype, expected, rounded) in enumerate(
        [
            ((narrow, dense), None, dict.fromkeys(fp32, torch.bfloat16), f"{len(fp32)} tensors of {dense} are float32"),
            ((narrow, dense), "float32", dict.fromkeys(fp32, torch.float32), None),
            ((dense, narrow), None, dict.fromkeys(fp32, torch.float32), None),
            ((mixed, mixed), None, of_mixed, None),
            (
                (mixed, dense),
                None,
                {name: tensor.dtype for name, tensor in load_file(mixed / WEIGHTS).items()},
                "1 tens",
            ),
        ]
    ):
        options = MergeOptions(models=[str(model) for model in models], out=tmp_path / str(number), dtype=dtype)
        merge(options)
        result = load_file(options.out / WEIGHTS)
        assert {name: tensor.dtype for name, tensor in result.items()} == expected
        printed = capsys.readouterr().out
        assert ("--dtype float32 rounds nothing" in printed) == (rounded is not None)
        assert rounded is None or f"Note: {rounded}" in printed


def test_exported_matrices_of_several_dtypes_are_not_rounded(tmp_path, dense):
    """Phi-3 fuses three projections in one matrix, which has one dtype."""
    query = "model.layers.0.self_attn.q_proj.weight"
    mixed = edited(dense, tmp_path / "mixed", cast({query: torch.bfloat16}))
    export(ExportOptions(model=str(mixed), out=tmp_path / "phi3", to="phi3"))
    fused = load_file(tmp_path / "phi3" / WEIGHTS)["model.layers.0.self_attn.qkv_proj.weight"]
    source = load_file(mixed / WEIGHTS)
    parts = [source[query.replace("q_proj", part)].float() for part in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(fused, torch.cat(parts))


# --- Heads ---


@pytest.fixture(scope="module")
def tied(tmp_path_factory, tiny_phi3) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("tied") / "phi3", num_hidden_layers=2, tie_word_embeddings=True)


def add_head(dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors[EMBEDDINGS].clone()
        head[-1, -1] += shift
        tensors["lm_head.weight"] = head.to(dtype)

    return change


def test_a_tied_base_with_a_head_of_its_own_keeps_it(tmp_path, tied, capsys):
    """As transformers does it, which loads both; the loss is not noticed until the model is used."""
    own = edited(tied, tmp_path / "own", add_head(shift=1.0))
    run(own, tmp_path / "jai", experts=1)
    assert "the weights have a head of its own" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "jai" / "config.json").read_text())["tie_word_embeddings"] is False
    source, result = load_file(own / WEIGHTS), load_file(tmp_path / "jai" / WEIGHTS)
    for name in (EMBEDDINGS, "lm_head.weight"):
        assert torch.equal(result[name], source[name])
    assert verify(str(own), tmp_path / "jai").same_function
    # So do the verbs that read a JAI.
    again = edited(tmp_path / "jai", tmp_path / "again", lambda _: None, tie_word_embeddings=True)
    counts = [inspect(InspectOptions(model=str(folder))).count for folder in (tmp_path / "jai", again)]
    assert counts[0] == counts[1]
    capsys.readouterr()
    upcycle(UpcycleOptions(dense=str(again), out=tmp_path / "upcycled", expert_init="copy"))
    export(ExportOptions(model=str(again), out=tmp_path / "exported", to="phi3"))
    for name in ("upcycled", "exported"):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(tmp_path / name / WEIGHTS)["lm_head.weight"], source["lm_head.weight"])
    assert " ".join(capsys.readouterr().out.split()).count("the weights have a head of its own") == 2


def test_a_tied_base_with_a_copy_of_its_embeddings_stays_tied(tmp_path, tied, capsys):
    run(tied, tmp_path / "plain", experts=1)
    run(edited(tied, tmp_path / "base", add_head()), tmp_path / "jai", experts=1)
    assert sha256(tmp_path / "plain" / WEIGHTS) == sha256(tmp_path / "jai" / WEIGHTS)
    assert "head of its own" not in capsys.readouterr().out


def test_a_tied_base_that_stores_only_its_head_is_read_as_transformers_reads_it(tmp_path, tied, capsys):
    def only_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop(EMBEDDINGS)

    base = edited(tied, tmp_path / "base", only_head)
    loaded = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(loaded, load_file(tied / WEIGHTS)[EMBEDDINGS])
    run(tied, tmp_path / "plain", experts=1)
    run(base, tmp_path / "jai", experts=1)
    assert sha256(tmp_path / "plain" / WEIGHTS) == sha256(tmp_path / "jai" / WEIGHTS)
    again = edited(tmp_path / "jai", tmp_path / "again", only_head)
    upcycle(UpcycleOptions(dense=str(again), out=tmp_path / "upcycled", expert_init="copy"))
    assert torch.equal(load_file(tmp_path / "upcycled" / WEIGHTS)[EMBEDDINGS], loaded)
    assert " ".join(capsys.readouterr().out.split()).count("only lm_head.weight is stored") == 2


def test_a_tied_base_with_a_head_of_another_shape_is_refused(tmp_path, tied):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(7, 32)

    with pytest.raises(UserError, match=r"lm_head.weight is \(7, 32\), not \(99, 32\)"):
        run(edited(tied, tmp_path / "base", change), tmp_path / "jai")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dare-linear", "density": 0.5},
        {"weights": [[{"at": 0, "value": 1}, {"at": 1, "value": 0}], [{"at": 0, "value": 0}, {"at": 1, "value": 1}]]},
    ],
    ids=["random numbers by name", "weights by layer"],
)
def test_merged_copies_of_the_embeddings_stay_copies(tmp_path, tied, options):
    """Else the two differ, and transformers would not tie them any more."""
    other = edited(tied, tmp_path / "other", lambda tensors: tensors[EMBEDDINGS].mul_(2))
    models = [
        edited(run(base, tmp_path / f"jai {number}"), tmp_path / f"with head {number}", add_head())
        for number, base in enumerate((tied, other))
    ]
    given = [str(model) for model in models]
    if "method" in options:
        options = options | {"base": given.pop(0)}
    merge(MergeOptions(models=given, out=tmp_path / "out", **options))
    result = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(result["lm_head.weight"], result[EMBEDDINGS])
    # A head of its own is merged by itself.
    own = edited(models[1], tmp_path / "own", add_head(shift=1.0))
    merge(MergeOptions(models=[*given[:-1], str(own)], out=tmp_path / "untied", **options))
    result = load_file(tmp_path / "untied" / WEIGHTS)
    assert not torch.equal(result["lm_head.weight"], result[EMBEDDINGS])


# --- Slerp ---


def test_slerp_of_a_tensor_and_its_negative_is_refused_with_a_remedy_that_works(tmp_path, dense):
    """Its line would go through zero, and at the middle everything there would be zero."""
    other = edited(dense, tmp_path / "other", lambda tensors: tensors[DOWN].neg_())
    options = {"models": [str(dense), str(other)], "out": tmp_path / "out"}
    with pytest.raises(UserError, match=f"{DOWN} points in opposite directions .*--method linear"):
        merge(MergeOptions(**options, method="slerp", t=0.5))
    assert not (tmp_path / "out").exists()
    merge(MergeOptions(**options, method="linear"))


def test_slerp_of_single_values_is_linear(tmp_path, dense):
    """A skip alpha has no direction beside its sign."""
    name = "model.layers.2.skip_alpha"

    def set_alpha(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors[name].fill_(value)

    models = [str(edited(dense, tmp_path / str(value), set_alpha(value))) for value in (0.5, -0.25)]
    merge(MergeOptions(models=models, out=tmp_path / "out", method="slerp", t=0.5))
    assert load_file(tmp_path / "out" / WEIGHTS)[name].item() == 0.125


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_slerp_of_extreme_values_has_the_right_angle(tmp_path, dense, size):
    """Whose squares fp32 does not hold: at a right angle both weights are the root of a half."""

    def set_direction(column: int) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[DOWN].zero_()[:, [column, 2]] = size

        return change

    models = [str(edited(dense, tmp_path / str(column), set_direction(column))) for column in (0, 1)]
    merge(MergeOptions(models=models, out=tmp_path / "out", method="slerp", t=0.5))
    result = load_file(tmp_path / "out" / WEIGHTS)[DOWN]
    weight = math.sin(math.pi / 6) / math.sin(math.pi / 3)  # the two have an angle of 60 degrees
    torch.testing.assert_close(result[:, 0] / size, torch.full((32,), weight))
    torch.testing.assert_close(result[:, 2] / size, torch.full((32,), 2 * weight))

# SPDX-License-Identifier: Apache-2.0
"""Merging: every method against a float64 reference, weights by layer, one result for any number of workers and after a
kill, and what does not fit is refused."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import jai
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.inputs.parts import Computed, Copied
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.merge import methods as merge_methods
from jai.conversion.merge.command import merge
from jai.conversion.merge.curves import parse_curve, value_for
from jai.conversion.merge.options import MergeOptions
from jai.conversion.merge.plan import FIXED_CHUNK, plan_merged_tensors
from jai.errors import UserError
from jai.files import sha256
from jai.provenance import chain, read_step

RECIPES = Path(jai.__file__).parent / "recipes"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model) -> list[Path]:
    """Three states of one JAI: a base, and two with small changes of every weight."""
    folder = tmp_path_factory.mktemp("models")
    for number in range(3):
        model = tiny_model(0)
        generator = torch.Generator().manual_seed(number)
        for tensor in model.state_dict().values():
            tensor += (number > 0) * 0.05 * torch.randn(tensor.shape, generator=generator)
        model.save_pretrained(folder / f"model{number}")
    return sorted(folder.iterdir())


def run(models: list[Path], out: Path, **options) -> dict[str, torch.Tensor]:
    merge(MergeOptions(models=[str(model) for model in models], out=out, **options))
    return load(out)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """A checkpoint of no model that transformers knows, for tensors of any shape."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown"} | config))
    return folder


def passes(*tensors: torch.Tensor, chunk: int) -> merge_methods.Passes:
    """A tensor of several models in chunks, in fp32, safe to overwrite."""

    def begin():
        for at in range(0, tensors[0].numel(), chunk):
            yield [tensor.view(-1)[at : at + chunk].float().clone() for tensor in tensors]

    return begin


def merged(chunks, like: torch.Tensor) -> torch.Tensor:
    parts = [chunk.clone() for chunk in chunks]
    return torch.cat(parts).view(like.shape) if parts else torch.empty(like.shape)


def drawn(seed: int, shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


# --- Methods against float64 ---

# Shapes with nothing in them, of one value, and that no chunk divides.
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
weight = st.floats(-2, 2).map(lambda value: round(value, 3))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@given(
    st.integers(0, 99), shapes, st.lists(weight, min_size=1, max_size=5), st.sampled_from(DTYPES), st.integers(1, 50)
)
def test_linear(seed, shape, weights, dtype, chunk):
    tensors = drawn(seed, shape, len(weights), dtype)
    expected = sum((w * tensor.double() for w, tensor in zip(weights, tensors)), torch.zeros(shape).double())
    close(merged(merge_methods.linear(passes(*tensors, chunk=chunk), weights), tensors[0]), expected)


@given(
    st.integers(0, 99), shapes, st.lists(weight, min_size=1, max_size=4), st.sampled_from(DTYPES), st.integers(1, 50)
)
def test_task_arithmetic(seed, shape, weights, dtype, chunk):
    base, *tensors = drawn(seed, shape, len(weights) + 1, dtype)
    expected = base.double() + sum(w * (tensor.double() - base.double()) for w, tensor in zip(weights, tensors))
    run_ = merge_methods.task_arithmetic(passes(base, *tensors, chunk=chunk), weights)
    close(merged(run_, base), expected)


@given(
    st.integers(0, 99),
    shapes,
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.integers(1, 50),
    st.sampled_from([0, 2, -2]),
)
def test_slerp(seed, shape, t, dtype, chunk, along):
    """The point at t of the way on the arc: its angles to both ends are shares of theirs, or the line if parallel.

    Opposite tensors are refused, but for single values.
    """
    first, second = drawn(seed, shape, 2, dtype)
    if along:
        second = first * along
    a, b = first.double(), second.double()
    lengths = (a.norm() * b.norm()).item()
    cosine = (a * b).sum().item() / lengths if lengths else 1.0
    if abs(abs(cosine) - merge_methods.PARALLEL) < 1e-5:
        return  # either way is right
    if cosine < -merge_methods.PARALLEL and first.numel() > 1:
        with pytest.raises(UserError, match=r"weight\.x points in opposite directions"):
            list(merge_methods.slerp(passes(first, second, chunk=chunk), t, "weight.x"))
        return
    if abs(cosine) > merge_methods.PARALLEL:
        expected = a * (1 - t) + b * t
    else:
        angle = math.acos(cosine)
        expected = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    close(merged(merge_methods.slerp(passes(first, second, chunk=chunk), t, "weight.x"), first), expected)


def test_slerp_keeps_the_length():
    """Of two vectors of length 1, everything between has length 1; a plain mean is shorter."""
    first, second = (tensor / tensor.norm() for tensor in drawn(0, (1000,), 2, torch.float32))
    for t in (0.0, 0.3, 0.5, 1.0):
        between = merged(merge_methods.slerp(passes(first, second, chunk=128), t, "weight.x"), first)
        assert between.norm().item() == pytest.approx(1, abs=1e-5)
        assert math.acos(min(1.0, (between @ first).item())) == pytest.approx(
            t * math.acos((first @ second).item()), abs=1e-3
        )


def ties_reference(base, tensors, weights, density, normalize, scale):
    """The paper's steps on whole tensors, with a sort where the code counts."""
    changes = [tensor.double() - base.double() for tensor in tensors]
    kept = max(1, round(density * base.numel()))
    for change in changes:
        if change.numel():
            smallest = change.abs().flatten().sort(descending=True).values[kept - 1]
            change[change.abs() < smallest] = 0
    weighted = torch.stack([w * change for w, change in zip(weights, changes)])
    elected = weighted.sum(0).sign()
    agree = (weighted.sign() == elected) & (elected != 0)
    total = (weighted * agree).sum(0)
    if normalize:
        of_agreeing = (torch.tensor(weights).double().view(-1, *[1] * base.dim()) * agree).sum(0)
        total = total / of_agreeing.where(of_agreeing != 0, torch.ones(()).double())
    return base.double() + scale * total


@given(
    st.integers(0, 99),
    shapes,
    st.lists(st.integers(0, 8).map(lambda eighths: eighths / 8), min_size=1, max_size=4),
    st.floats(0.01, 1),
    st.booleans(),
    st.sampled_from([1.0, 0.5]),
    st.integers(1, 50),
)
def test_ties(seed, shape, weights, density, normalize, scale, chunk):
    """Values are multiples of 1/16, so that there are many equal sizes, sums of 0, and no rounding of signs."""
    base, *tensors = ((tensor * 16).round() / 16 for tensor in drawn(seed, shape, len(weights) + 1, torch.float32))
    actual = merge_methods.ties(
        passes(base, *tensors, chunk=chunk), weights, density=density, normalize=normalize, scale=scale
    )
    close(merged(actual, base), ties_reference(base, tensors, weights, density, normalize, scale))


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
def test_ties_keeps_exactly_the_largest(density):
    base, model = torch.zeros(10_007), drawn(3, (10_007,), 1, torch.float32)[0] ** 5  # sizes over many powers of two
    kept = merged(
        merge_methods.ties(passes(base, model, chunk=777), [1.0], density=density, normalize=True, scale=1.0), base
    )
    count = round(density * 10_007)
    largest = model.abs().topk(count).indices
    assert torch.equal(kept[largest], model[largest])
    assert kept.count_nonzero() == count


@pytest.mark.parametrize("elect_sign", [False, True])
def test_dare_drops_at_random_and_rescales(elect_sign):
    base, model = drawn(1, (50_000,), 2, torch.float32)

    def dare(stream: str) -> torch.Tensor:
        return merged(
            merge_methods.dare(
                passes(base, model, chunk=9_999),
                [1.0],
                density=0.25,
                streams=[stream],
                elect_sign=elect_sign,
                normalize=False,
                scale=1.0,
            ),
            base,
        )

    change = dare("a") - base
    kept = (change.abs() > 0).float().mean().item()
    assert kept == pytest.approx(0.25, abs=0.01)
    expected = (model - base) / 0.25
    torch.testing.assert_close(change.where(change.abs() > 0, expected), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(dare("a"), dare("a"))
    overlap = ((change.abs() > 0) & ((dare("b") - base).abs() > 0)).float().mean().item()
    assert overlap == pytest.approx(0.25**2, abs=0.01)  # other models drop other values


def test_dare_ties_leaves_out_what_disagrees():
    base, up, down = torch.zeros(64), torch.full((64,), 2.0), torch.full((64,), -1.0)
    both = merged(
        merge_methods.dare(
            passes(base, up, down, chunk=64),
            [1.0, 1.0],
            density=1.0,
            streams=["a", "b"],
            elect_sign=True,
            normalize=False,
            scale=1.0,
        ),
        base,
    )
    assert both.tolist() == [2.0] * 64


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_files_match_float64_within_bf16_rounding(tmp_path, method):
    """Odd shapes, an empty tensor, one of shape (1,), and one of more than a chunk, through files."""
    forms = {"empty": (0, 3), "one": (1,), "odd": (3, 5, 7), "long": (FIXED_CHUNK + 1001,)}
    sources = []
    for seed in range(2):
        tensors = {
            name: drawn(seed * 9 + i, shape, 1, torch.bfloat16)[0] for i, (name, shape) in enumerate(forms.items())
        }
        sources.append(checkpoint(tmp_path / f"m{seed}", tensors))
    options = {"weights": [0.7, 0.3]} if method == "linear" else {"method": "slerp", "t": 0.3}
    result = run(sources, tmp_path / "out", **options)
    for name, shape in forms.items():
        first, second = (load(source)[name].double() for source in sources)
        weights = (0.7, 0.3)
        if method == "slerp":
            dot, norms = (first * second).sum().item(), (first.norm().item(), second.norm().item())
            weights = merge_methods.slerp_weights(dot, *norms, 0.3)
        expected = weights[0] * first + weights[1] * second
        assert result[name].dtype == torch.bfloat16
        assert result[name].shape == shape
        half_step = torch.ldexp(torch.ones_like(expected), torch.frexp(expected).exponent - 9)
        slack = 2**-20 * (first.abs() + second.abs())
        assert ((result[name].double() - expected).abs() <= half_step + slack).all(), name


# --- Weights by layer ---


def recipe(name: str, models: int = 2) -> MergeOptions:
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return MergeOptions(models=["language", "reasoning"][:models], out=Path("out"), **values)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("merge_m1", lambda layer: 0.25),
        ("merge_m2", lambda layer: 0.75),
        # Table 4: layers 0-53 at 75 %, layers 53-80 linearly down to 12.5 %.
        ("merge_m3", lambda layer: 0.75 if layer <= 53 else 0.75 - 0.625 * (layer - 53) / 26),
    ],
)
def test_recipes_are_the_papers_tables_at_80_layers(name, share):
    language, reasoning = recipe(name).curves
    for layer in range(80):
        assert reasoning.at(layer, 80) == pytest.approx(share(layer), abs=1e-12)
        assert language.at(layer, 80) + reasoning.at(layer, 80) == pytest.approx(1, abs=1e-12)
    assert value_for(reasoning, "model.embed_tokens.weight", range(80)) == share(0)
    for name in ("model.norm.weight", "lm_head.weight"):
        assert value_for(reasoning, name, range(80)) == pytest.approx(share(79))


@pytest.mark.parametrize("layers", [1, 7, 32, 64, 80])
def test_recipes_scale_to_any_depth(layers):
    _, reasoning = recipe("merge_m3").curves
    for layer in range(layers):
        depth = layer / max(layers - 1, 1)
        expected = 0.75 if depth <= 53 / 79 else 0.75 - 0.625 * (depth - 53 / 79) / (1 - 53 / 79)
        assert reasoning.at(layer, layers) == pytest.approx(expected)


def test_points_by_layer():
    curve = parse_curve("t", [{"layer": 2, "value": 1}, {"layer": 4, "value": 0}, {"layer": 5, "value": 3}])
    assert [curve.at(layer, 8) for layer in range(8)] == [1, 1, 1, 0.5, 0, 3, 3, 3]


@pytest.mark.parametrize(
    "given_",
    [
        "0.5",
        True,
        float("nan"),
        [],
        [1, 2],
        [{"at": 0, "value": 1}, {"layer": 1, "value": 1}],
        [{"at": 0}],
        [{"at": 1.5, "value": 1}],
        [{"at": "1/0", "value": 1}],
        [{"at": 0, "value": "x"}],
        [{"layer": 1.5, "value": 1}],
        [{"at": 0.5, "value": 1}, {"at": 0.5, "value": 2}],
        [{"at": 1, "value": 1}, {"at": 0, "value": 2}],
        10**400,
        [{"at": 0, "value": 10**400}],
        [{"at": 10**400, "value": 1}],
        [{"layer": 10**400, "value": 1}],
    ],
    ids=lambda given_: repr(given_)[:60],
)
def test_curves_that_are_none_are_refused(given_):
    with pytest.raises(UserError, match="weight 1"):
        MergeOptions(models=["a", "b"], out=Path("out"), weights=[given_, 1])


def test_each_layer_has_its_weight(tmp_path, models):
    """Layers where one model has all the weight are its bytes; head and final norm go with the last layer."""
    curve = [{"layer": 2, "value": 1}, {"layer": 4, "value": 0}]
    other = [{"layer": 2, "value": 0}, {"layer": 4, "value": 1}]
    result = run(models[:2], tmp_path / "out", weights=[curve, other])
    first, second = load(models[0]), load(models[1])
    for name, tensor in result.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else 6
        if layer <= 2:
            assert torch.equal(tensor, first[name]), name
        elif layer >= 4:
            assert torch.equal(tensor, second[name]), name
        else:
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, msg=name)
    assert any(name.endswith("skip_alpha") for name in result)
    assert any(name.endswith("mlp.gate.weight") for name in result)


def test_copies_of_one_base_layer_have_one_weight(tmp_path, models, tiny_phi3, capsys, monkeypatch):
    """Blocks of one layer that run 2, 3 and 2 times: the base has three layers, and its middle one lies half-way."""
    monkeypatch.setenv("COLUMNS", "200")
    points = [[{"at": 0, "value": 1}, {"at": 1, "value": 0}], [{"at": 0, "value": 0}, {"at": 1, "value": 1}]]
    result = run(models[:2], tmp_path / "out", weights=points, place_by="origin")
    first, second = load(models[0]), load(models[1])
    for name, tensor in result.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else 6
        if layer < 2:
            assert torch.equal(tensor, first[name]), name
        elif layer > 4:
            assert torch.equal(tensor, second[name]), name
        else:
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, msg=name)
    assert "1 at base layer 0, 0 at base layer 2" in capsys.readouterr().out
    assert read_step(tmp_path / "out")["options"]["place_by"] == "origin"

    by_number = [
        [{"layer": 1, "value": 1}, {"layer": 2, "value": 0}],
        [{"layer": 1, "value": 0}, {"layer": 2, "value": 1}],
    ]
    result = run(models[:2], tmp_path / "numbers", weights=by_number, place_by="origin")
    for layer, model in ((4, first), (5, second)):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(result[name], model[name])
    phi3 = [str(tiny_phi3(tmp_path / name, seed)) for seed, name in enumerate(("phi3-a", "phi3-b"))]
    with pytest.raises(UserError, match=r"phi3-a is not a JAI \(model_type 'phi3'\)"):
        merge(MergeOptions(models=phi3, out=tmp_path / "phi3", weights=points, place_by="origin"))


def test_places_without_a_curve_are_said(tmp_path, models, capsys):
    merge(MergeOptions(models=list(map(str, models[:2])), out=tmp_path / "out", place_by="origin", dry_run=True))
    assert "no weight depends on the layer, so --place-by changes nothing" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["merge_m1", "merge_m3"])
def test_dare_that_drops_nothing_is_the_recipe(tmp_path, models, name):
    """mergekit's dare_linear keeps all changes unless told otherwise; with weights that sum to 1 it is linear."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    linear = run(models[1:], tmp_path / "linear", **values)
    values |= {"method": "dare-linear", "base": str(models[0]), "density": 1.0}
    dare = run(models[1:], tmp_path / "dare", **values)
    for tensor_name, tensor in linear.items():
        torch.testing.assert_close(dare[tensor_name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "models_", "shares"), [("merge_sft", 2, [0.5, 0.5]), ("merge_seeds", 3, [1 / 3] * 3)])
def test_recipes_of_equal_parts(tmp_path, models, name, models_, shares):
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    result = run(models[:models_], tmp_path / "out", **values)
    inputs = [load(folder) for folder in models[:models_]]
    for tensor_name, tensor in result.items():
        expected = sum(share * each[tensor_name] for share, each in zip(shares, inputs))
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_what_one_model_gives_is_copied(models):
    readers = [CheckpointReader(model) for model in models[:2]]
    points = [{"at": 0, "value": 0}, {"at": 1, "value": 1}]
    options = MergeOptions(models=["a", "b"], out=Path("out"), method="slerp", t=points)
    kinds = {tensor.name: tensor.parts[0] for tensor in plan_merged_tensors(options, readers, range(7))}
    assert isinstance(kinds["model.embed_tokens.weight"], Copied)
    assert isinstance(kinds["lm_head.weight"], Copied)
    middle = kinds["model.layers.3.self_attn.q_proj.weight"]
    assert isinstance(middle, Computed)
    assert middle.formula == "slerp, t 0.5, of model.layers.3.self_attn.q_proj.weight"
    assert {files.place for files, _ in middle.reads} == {str(model) for model in models[:2]}


# --- Whole checkpoints ---

EVERY_METHOD = [
    {"weights": [0.6, 0.4]},
    {"method": "slerp", "t": 0.3},
    {"method": "task-arithmetic", "weights": [0.5, 0.7], "scale": 0.8},
    {"method": "ties", "density": 0.3},
    {"method": "dare-linear", "density": 0.4, "seed": 3, "weights": [0.5, 0.5]},
    {"method": "dare-ties", "density": 0.4, "normalize": True},
]


def method_options(options: dict, models: list[Path]) -> dict:
    needs_base = options.get("method", "linear") not in ("linear", "slerp")
    return options | ({"base": str(models[0])} if needs_base else {})


@pytest.mark.parametrize("options", EVERY_METHOD, ids=lambda options: options.get("method", "linear"))
def test_bytes_do_not_depend_on_workers(tmp_path, models, options):
    options = method_options(options, models)
    run(models[1:], tmp_path / "one", max_shard_size="100kB", **options)
    run(models[1:], tmp_path / "four", max_shard_size="100kB", workers=4, **options)
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 3
    for name in (*shards, "model.safetensors.index.json", "config.json", "provenance.json"):
        assert sha256(tmp_path / "one" / name) == sha256(tmp_path / "four" / name), name


@pytest.mark.parametrize("options", EVERY_METHOD, ids=lambda options: options.get("method", "linear"))
def test_result_loads_and_runs(tmp_path, models, options):
    options = method_options(options, models)
    tensors = run(models[1:], tmp_path / "out", dtype="bfloat16", **options)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.config.block_repeats == [2, 3, 2]
    logits = model(torch.arange(3, 40).unsqueeze(0)).logits
    assert logits.isfinite().all()
    assert (tmp_path / "out" / "modeling_jai.py").is_file()
    base, first, second = (load(folder) for folder in models)
    name = "model.layers.1.self_attn.q_proj.weight"
    if options.get("method") == "task-arithmetic":
        expected = base[name] + 0.8 * (0.5 * (first[name] - base[name]) + 0.7 * (second[name] - base[name]))
    elif options.get("method") == "ties":
        expected = ties_reference(base[name], [first[name], second[name]], [1.0, 1.0], 0.3, True, 1.0).float()
    else:
        return
    torch.testing.assert_close(tensors[name].float(), expected, rtol=2**-8, atol=1e-6)


def test_three_seeds_are_averaged(tmp_path, models):
    """Trillion-7B's way, which is the default: all alike."""
    result = run(models, tmp_path / "out")
    sources = [load(model) for model in models]
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, sum(source[name] for source in sources) / 3, msg=name)


def test_phi3_keeps_its_own_files(tmp_path, tiny_phi3, tiny_tokenizer):
    sources = [tiny_phi3(tmp_path / f"phi{seed}", seed=seed, vocab_size=len(tiny_tokenizer)) for seed in range(2)]
    tiny_tokenizer.save_pretrained(sources[0])
    tiny_tokenizer.save_pretrained(sources[1])
    (sources[0] / "modeling_other.py").write_text("# its own code\n")
    merge(MergeOptions(models=[str(source) for source in sources], out=tmp_path / "out", verify=True))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "phi3"
    assert (tmp_path / "out" / "modeling_other.py").read_text() == "# its own code\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [load(source)["model.layers.2.mlp.down_proj.weight"] for source in sources]
    torch.testing.assert_close(model.model.layers[2].mlp.down_proj.weight.data, sum(weights) / 2)


def test_provenance_holds_the_history_of_every_input(tmp_path, tiny_phi3):
    for seed in range(2):
        base = tiny_phi3(tmp_path / f"phi{seed}", seed=seed)
        convert(ConvertOptions(base=str(base), out=tmp_path / f"jai{seed}", block_size=2, block_repeats=[1, 2, 1]))
    run([tmp_path / "jai0", tmp_path / "jai1"], tmp_path / "out", weights=[0.7, 0.3])
    step = read_step(tmp_path / "out")
    assert [earlier["step"] for earlier in chain(step)] == ["convert", "convert", "merge"]
    assert [entry["role"] for entry in step["inputs"]] == ["model", "model"]
    assert [entry["made_by"]["inputs"][0]["name"] for entry in step["inputs"]] == ["phi0", "phi1"]
    for number, entry in enumerate(step["inputs"]):
        folder = tmp_path / f"jai{number}"
        assert entry["files"]["model.safetensors"] == sha256(folder / "model.safetensors")
    assert step["options"] == {"method": "linear", "dtype": None, "weights": [0.7, 0.3], "normalize": True}
    assert str(tmp_path) not in (tmp_path / "out" / "provenance.json").read_text()


def test_killed_merge_goes_on(tmp_path):
    """Killed when its first shards are done, it leaves no output; the same command ends with the same bytes."""
    tensors = {f"model.layers.{layer}.weight": (2000, 500) for layer in range(12)}
    sources = []
    for seed in range(3):
        values = {
            name: drawn(seed * 99 + i, shape, 1, torch.float32)[0] for i, (name, shape) in enumerate(tensors.items())
        }
        sources.append(checkpoint(tmp_path / f"m{seed}", values))
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ["--method", "dare-ties", "--base", sources[0], "--max-shard-size", "4MB", "--models", *sources[1:]]

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-m", "jai", "merge", str(folder), *map(str, options)]

    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL)
    journal = tmp_path / ".out.partial" / "journal.json"
    while process.poll() is None and not (journal.exists() and '"finished": {}' not in journal.read_text()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "it was not killed in time"
    done = len(json.loads(journal.read_text())["finished"])
    assert 0 < done < len(tensors)
    resumed = subprocess.run(command(out), check=True, capture_output=True, text=True)
    assert "shards are finished" in resumed.stdout
    run(sources[1:], whole, method="dare-ties", base=str(sources[0]), max_shard_size="4MB")
    for path in whole.iterdir():
        assert sha256(path) == sha256(out / path.name), path.name


# --- The command line ---


def test_command_line_with_a_recipe(tmp_path, models, capsys):
    from typer.testing import CliRunner

    from jai.cli.app import app

    arguments = ["--config", str(RECIPES / "merge_m3.yaml"), "--models", str(models[0]), str(models[1])]
    planned = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), *arguments, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "Dry run: nothing was written" in planned.output
    assert not (tmp_path / "out").exists()
    written = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), *arguments, "--dtype", "float16"])
    assert written.exit_code == 0, written.output
    first, second, result = load(models[0]), load(models[1]), load(tmp_path / "out")
    for name, share in (("model.layers.0.mlp.experts.down_proj", 0.75), ("lm_head.weight", 0.125)):
        expected = first[name] * (1 - share) + second[name] * share
        torch.testing.assert_close(result[name].float(), expected, rtol=2**-10, atol=1e-6)
    repeated = ["--models", str(models[0]), "--models", str(models[1]), "--weights", "1,3"]
    assert CliRunner().invoke(app, ["merge", str(tmp_path / "short"), *repeated]).exit_code == 0
    torch.testing.assert_close(
        load(tmp_path / "short")["lm_head.weight"], 0.25 * first["lm_head.weight"] + 0.75 * second["lm_head.weight"]
    )


# --- Refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["a"]}, "at least 2 models"),
        ({"models": "a"}, "expected a list of names"),
        ({"method": "mean"}, "method is 'mean'; expected one of linear, slerp"),
        ({"weights": [1]}, "2 models but 1 weights"),
        ({"weights": 0.5}, "weights is 0.5; expected a list"),
        ({"t": 0.5}, "t is given, but linear does not use it"),
        ({"base": "c"}, "linear has none"),
        ({"density": 0.5}, "density is given, but linear"),
        ({"method": "ties"}, "--base"),
        ({"method": "ties", "base": "c", "density": 0}, "density is 0"),
        ({"method": "ties", "base": "c", "density": 1.1}, "density is 1.1"),
        ({"method": "ties", "base": "c", "weights": [1, -1]}, "weight 2 is negative"),
        ({"method": "slerp", "models": ["a", "b", "c"]}, "between two models"),
        ({"method": "slerp", "weights": [1, 1]}, "weights is given, but slerp"),
        ({"method": "slerp", "t": 1.5}, "t is 1.5; expected 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"normalize": "yes"}, "normalize is 'yes'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"workers": 0}, "workers is 0"),
        ({"max_shard_size": "many"}, "expected a size"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MergeOptions(**({"models": ["a", "b"], "out": Path("out")} | options))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block_repeats": [2, 2, 3]}, r"configuration: block_repeats is \[2, 3, 2\] and \[2, 2, 3\]"),
        ({"hidden_size": 64}, "hidden_size is 32 and 64"),
        ({"num_local_experts": 1}, "num_local_experts is 4 and 1"),
        ({"skip_alpha_normalize": True}, "skip_alpha_normalize is False and True"),
    ],
)
def test_other_plans_are_refused(tmp_path, models, tiny_model, overrides, message):
    tiny_model(1, **overrides).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=message):
        run([models[0], tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_change_no_weight_are_not_refused(tmp_path, models, tiny_model):
    other = tiny_model(1, skip_alpha=0.1, router_aux_loss_coef=0.5, eos_token_id=5, skip_alpha_trainable=False)
    other.to(torch.bfloat16).save_pretrained(tmp_path / "other")
    result = run([models[0], tmp_path / "other"], tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    expected = (load(models[0])["model.norm.weight"] + load(tmp_path / "other")["model.norm.weight"].float()) / 2
    torch.testing.assert_close(result["model.norm.weight"], expected)


def test_other_architectures_tensors_and_tokenizers_are_refused(tmp_path, models, tiny_phi3, tiny_tokenizer, sentences):
    from jai.tokenization.phi3_style import train_phi3_style

    with pytest.raises(UserError, match="model_type is 'jai' and 'phi3'"):
        run([models[0], tiny_phi3(tmp_path / "phi3")], tmp_path / "out")

    tensors = {"model.norm.weight": torch.ones(4), "extra": torch.ones(2)}
    one = checkpoint(tmp_path / "one", tensors)
    with pytest.raises(UserError, match="weights: extra is only in the first"):
        run([one, checkpoint(tmp_path / "two", {"model.norm.weight": torch.ones(4)})], tmp_path / "out")
    with pytest.raises(UserError, match=r"extra is \(2,\) and \(3,\)"):
        run([one, checkpoint(tmp_path / "three", tensors | {"extra": torch.ones(3)})], tmp_path / "out")

    sources = [tiny_phi3(tmp_path / f"phi{seed}", seed=seed) for seed in range(2)]
    tiny_tokenizer.save_pretrained(sources[0])
    train_phi3_style([*sentences[:3]] * 4, vocab_size=370).save_pretrained(sources[1])
    with pytest.raises(UserError, match=r"tokenizer: .*vocabularies of"):
        run(sources, tmp_path / "out")


def test_weights_that_vanish_are_refused(tmp_path, models):
    points = [{"at": 0, "value": 1}, {"at": 1, "value": 0}]
    with pytest.raises(UserError, match="add up to 0"):
        run(models[:2], tmp_path / "out", weights=[points, points])
    with pytest.raises(UserError, match="All weights are 0 for"):
        run(models[:2], tmp_path / "out", weights=[points, points], normalize=False)
    flat = checkpoint(tmp_path / "flat", {"weight": torch.ones(4)})
    with pytest.raises(UserError, match=r"no tensor of .* is named after one"):
        run([flat, flat], tmp_path / "out", weights=[points, 1])

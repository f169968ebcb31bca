# SPDX-License-Identifier: Apache-2.0
"""A JAI without skips as Mixtral or Phi-3: the same logits to the last bit, from the names that the Hub has."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, Phi3ForCausalLM

from jai import cli
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export.command import export, plan_exported_tensors
from jai.conversion.export.options import ExportOptions
from jai.conversion.inputs.jai import open_jai
from jai.conversion.inputs.parts import Copied
from jai.errors import UserError
from jai.files import sha256
from jai.provenance import chain, read_step

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    """`checkpoint(name="jai", **config_overrides) -> folder`: a JAI whose alphas are 0 unless given."""

    def build(name: str = "jai", **overrides) -> Path:
        tiny_model(**{"skip_alpha": 0.0, **overrides}).save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def run(model: Path, out: Path, **options):
    return export(ExportOptions(model=str(model), out=out, **options))


def logits(folder: Path, *, expected_class: type | None = None, **options) -> torch.Tensor:
    """Of 2 x 40 ids, one of them padded."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert expected_class is None or type(model) is expected_class
    ids = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.inference_mode():
        return model(ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral_has_the_same_logits(checkpoint, tmp_path, attention, experts, dtype):
    run(checkpoint(), tmp_path / "mixtral")
    options = {"attn_implementation": attention, "experts_implementation": experts, "dtype": dtype}
    ours = logits(tmp_path / "jai", **options)
    theirs = logits(tmp_path / "mixtral", expected_class=MixtralForCausalLM, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"num_local_experts": 3, "num_experts_per_tok": 3},
        {"head_dim": 16},
        {"num_hidden_layers": 5},
        {"skip_alpha_normalize": True},
        {"skip_alpha_trainable": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}},
    ],
)
def test_mixtral_has_the_same_logits_for_other_shapes(checkpoint, tmp_path, overrides):
    run(checkpoint(**overrides), tmp_path / "mixtral")
    assert torch.equal(logits(tmp_path / "jai"), logits(tmp_path / "mixtral", expected_class=MixtralForCausalLM))


def test_mixtral_trains_with_the_same_loss(checkpoint, tmp_path):
    run(checkpoint(router_aux_loss_coef=0.05), tmp_path / "mixtral")
    ids = torch.arange(3, 43).unsqueeze(0)
    losses = []
    for folder in ("jai", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        output = model(ids, labels=ids, output_router_logits=True)
        losses.append((output.loss.item(), output.aux_loss.item()))
    assert losses[0] == losses[1]
    assert losses[0][1] > 0


def test_names_and_values_are_those_of_the_hub(checkpoint, tmp_path):
    """Names written down from mistralai/Mixtral-8x7B-v0.1; and each value from its place in the JAI."""
    run(checkpoint(), tmp_path / "mixtral")
    jai, mixtral = load_file(tmp_path / "jai/model.safetensors"), load_file(tmp_path / "mixtral/model.safetensors")
    expected = {
        "model.embed_tokens.weight": jai["model.embed_tokens.weight"],
        "model.norm.weight": jai["model.norm.weight"],
        "lm_head.weight": jai["lm_head.weight"],
    }
    for layer in (f"model.layers.{i}" for i in range(7)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{layer}.{name}.weight"] = jai[f"{layer}.{name}.weight"]
        for name in "qkvo":
            expected[f"{layer}.self_attn.{name}_proj.weight"] = jai[f"{layer}.self_attn.{name}_proj.weight"]
        expected[f"{layer}.block_sparse_moe.gate.weight"] = jai[f"{layer}.mlp.gate.weight"]
        for e in range(4):
            gate, up = jai[f"{layer}.mlp.experts.gate_up_proj"][e].chunk(2)
            expected[f"{layer}.block_sparse_moe.experts.{e}.w1.weight"] = gate
            expected[f"{layer}.block_sparse_moe.experts.{e}.w3.weight"] = up
            expected[f"{layer}.block_sparse_moe.experts.{e}.w2.weight"] = jai[f"{layer}.mlp.experts.down_proj"][e]
    assert mixtral.keys() == expected.keys()
    assert all(torch.equal(mixtral[name], tensor) for name, tensor in expected.items())


def test_every_byte_is_copied_exactly_once(checkpoint, tmp_path):
    source = open_jai(str(checkpoint()))
    parts = [part for tensor in plan_exported_tensors(source, "mixtral") for part in tensor.parts]
    assert all(isinstance(part, Copied) for part in parts)
    ranges = sorted((part.start, part.start + part.length) for part in parts)
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))
    alphas = 4 * 4  # the four later copies have one each, in fp32
    whole = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / "jai" / "model.safetensors").values())
    assert sum(part.length for part in parts) == whole - alphas


def test_config_is_mixtrals_alone(checkpoint, tmp_path):
    config = run(checkpoint(router_aux_loss_coef=0.02, num_experts_per_tok=3), tmp_path / "mixtral")
    content = json.loads((tmp_path / "mixtral" / "config.json").read_text())
    assert content["architectures"] == ["MixtralForCausalLM"]
    assert content["model_type"] == "mixtral"
    assert "auto_map" not in content
    assert (content["num_local_experts"], content["num_experts_per_tok"]) == (4, 3)
    assert content["router_aux_loss_coef"] == 0.02
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 10_000.0
    assert content["dtype"] == "float32"
    assert content["sliding_window"] is None
    assert not [key for key in content if key.startswith(("skip_alpha", "block"))]
    assert config.num_hidden_layers == 7
    assert not list((tmp_path / "mixtral").glob("*.py"))


def test_longrope_is_spelt_as_in_phi3s_checkpoints_too(checkpoint, tmp_path):
    """transformers 4 takes `rope_scaling` with these three keys and no others."""
    run(
        checkpoint(num_local_experts=1, rope_parameters=LONGROPE, original_max_position_embeddings=32),
        tmp_path / "phi3",
        to="phi3",
    )
    content = json.loads((tmp_path / "phi3" / "config.json").read_text())
    assert content["rope_scaling"] == {
        "type": "longrope",
        "short_factor": LONGROPE["short_factor"],
        "long_factor": LONGROPE["long_factor"],
    }
    assert (content["rope_theta"], content["original_max_position_embeddings"]) == (10_000.0, 32)


def test_tokenizer_and_generation_settings_come_along(tmp_path, checkpoint, tiny_tokenizer):
    folder = checkpoint(vocab_size=len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [2, 7], "top_k": 11}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    run(folder, tmp_path / "mixtral")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mixtral")
    assert tokenizer("แมว and dog")["input_ids"] == tiny_tokenizer("แมว and dog")["input_ids"]
    outputs = []
    for name in ("jai", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert model.generation_config.eos_token_id == [2, 7]
        assert model.generation_config.top_k == 11
        torch.manual_seed(0)
        outputs.append(model.generate(torch.tensor([[3, 4, 5]]), do_sample=True, max_new_tokens=20, min_new_tokens=20))
    assert torch.equal(*outputs)


def test_provenance_names_the_model(tmp_path, tiny_phi3):
    base = tiny_phi3(tmp_path / "base")
    convert(ConvertOptions(base=str(base), out=tmp_path / "jai", block_size=2, block_repeats=[1, 2, 1], skip_alpha=0.0))
    run(tmp_path / "jai", tmp_path / "mixtral")
    record = read_step(tmp_path / "mixtral")
    assert [step["step"] for step in chain(record)] == ["convert", "export"]
    assert (record["inputs"][0]["role"], record["inputs"][0]["name"]) == ("model", "jai")
    assert record["inputs"][0]["files"]["model.safetensors"] == sha256(tmp_path / "jai" / "model.safetensors")
    assert record["options"] == {"to": "mixtral"}


def test_phi3_to_jai_to_phi3_is_the_same_file(tmp_path, tiny_phi3):
    """There and back: every tensor as it was, and the same logits."""
    base = tiny_phi3(tmp_path / "base", dtype=torch.bfloat16, sliding_window=None)
    convert(ConvertOptions(base=str(base), out=tmp_path / "jai", block_size=1, block_repeats=[1] * 6, experts=1))
    run(tmp_path / "jai", tmp_path / "phi3", to="phi3")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "phi3" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(base), logits(tmp_path / "phi3", expected_class=Phi3ForCausalLM))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ],
)
def test_dense_jai_with_repeats_is_a_phi3(checkpoint, tmp_path, overrides):
    """Equal but for the order of sums: Phi-3 multiplies fused matrices."""
    run(checkpoint(num_local_experts=1, **overrides), tmp_path / "phi3", to="phi3")
    ours, theirs = logits(tmp_path / "jai"), logits(tmp_path / "phi3", expected_class=Phi3ForCausalLM)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_live_skips_are_refused_by_name(tmp_path, tiny_model):
    """What counts is in the weights, not where the configuration says that the alphas began."""
    model = tiny_model(skip_alpha=0.0)
    with torch.no_grad():
        model.model.layers[3].skip_alpha.fill_(0.25)
        model.model.layers[6].skip_alpha.fill_(-1e-3)
    model.save_pretrained(tmp_path / "jai")
    with pytest.raises(UserError, match=r"2 skip alphas that are not 0 \(layer 3 0\.25, layer 6 -0\.001\)"):
        run(tmp_path / "jai", tmp_path / "mixtral")
    assert not (tmp_path / "mixtral").exists()
    model = tiny_model(skip_alpha=0.3)
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.skip_alpha is not None:
                layer.skip_alpha.zero_()
    model.save_pretrained(tmp_path / "zeroed")
    run(tmp_path / "zeroed", tmp_path / "mixtral")
    assert torch.equal(logits(tmp_path / "zeroed"), logits(tmp_path / "mixtral"))


@pytest.mark.parametrize(
    ("overrides", "to", "message"),
    [
        ({"num_local_experts": 1}, "mixtral", "is dense, and Mixtral has experts. Give --to phi3"),
        ({}, "phi3", "4 experts in each layer, and Phi-3 has none. Give --to mixtral"),
        ({}, "llama", "expected one of mixtral, phi3"),
        ({"num_local_experts": 1, "head_dim": 16}, "phi3", "heads of 16, and Phi-3's are .* = 8"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "mixtral",
            "rotates only a part of each head",
        ),
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, "mixtral", "has LongRoPE"),
        (
            {"num_local_experts": 1, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "phi3",
            "RoPE of type 'linear'",
        ),
    ],
)
def test_what_a_form_cannot_express_is_refused(checkpoint, tmp_path, overrides, to, message):
    folder = checkpoint(**overrides)
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["jai"]


def test_bad_inputs_are_refused(checkpoint, tmp_path, tiny_phi3):
    with pytest.raises(UserError, match="neither a folder nor a Hub id"):
        run(Path("no/such/folder"), tmp_path / "out")
    with pytest.raises(UserError, match="type 'phi3', not 'jai'"):
        run(tiny_phi3(tmp_path / "phi3"), tmp_path / "out")
    folder = checkpoint()
    with pytest.raises(UserError, match="exists already"):
        run(folder, tmp_path / "phi3")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or damaged"):
        run(folder, tmp_path / "out")


def test_bytes_do_not_depend_on_workers(checkpoint, tmp_path):
    folder = checkpoint()
    for out, workers in (("one", 1), ("many", 4)):
        run(folder, tmp_path / out, max_shard_size=30_000, workers=workers)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "model.safetensors.index.json" in names
    assert all(sha256(tmp_path / "one" / name) == sha256(tmp_path / "many" / name) for name in names)
    assert torch.equal(logits(folder), logits(tmp_path / "many"))


def test_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    folder = checkpoint()
    for options in (["--dry-run"], ["--verify"]):
        monkeypatch.setattr(sys, "argv", ["jai", "export", str(folder), str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code
        assert (tmp_path / "out").exists() == (options == ["--verify"])
    printed = capsys.readouterr().out
    assert "of a Mixtral" in printed
    assert "are what their sources give" in printed

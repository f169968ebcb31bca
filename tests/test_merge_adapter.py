# SPDX-License-Identifier: Apache-2.0
"""`jai merge-adapter`: shard by shard what PEFT merges in memory."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_four_bits import SIZES, four_bits
from transformers import AutoModelForCausalLM

from jai import JaiForCausalLM, JaiForSequenceClassification
from jai.auto import load_causal_model
from jai.conversion.adapter import plan
from jai.conversion.adapter.command import merge_lora
from jai.conversion.adapter.options import MergeAdapterOptions
from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers.expert_lora import adapting_four_bits

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS = {"embed_tokens": [3, 4, 90, 7], "lm_head": [98]}


@pytest.fixture(scope="module")
def base(tiny_checkpoint, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "jai", **SIZES)


def make_adapter(base: Path, folder: Path, four: bool = False, **options) -> Path:
    """An adapter with random values in all that it holds."""
    torch.manual_seed(1)
    how = {"quantization_config": four_bits()} if four else {}
    model = AutoModelForCausalLM.from_pretrained(base, **how)
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH}
    config = LoraConfig(**{**values, "init_lora_weights": False, **options})
    adapted = get_peft_model(model, adapting_four_bits(config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("repeats", [[1, 1], [3, 3]], ids=["fewer layers", "more layers"])
def test_an_adapter_whose_base_has_other_layers_does_not_load(base, tiny_checkpoint, tmp_path, repeats):
    """transformers drops what has no place, and draws what is missing, in silence."""
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["mlp.gate"], trainable_token_indices=ROWS)
    load_causal_model("adapter", adapter, trust_remote_code=False)
    other = tiny_checkpoint(tmp_path / "other", **{**SIZES, "block_repeats": repeats})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    with pytest.raises(UserError, match=r"^adapter cannot be loaded: .*lora.*adapter and base do not fit"):
        load_causal_model("adapter", adapter, trust_remote_code=False)


def test_a_checkpoint_that_lacks_a_weight_does_not_load(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "jai")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"jai cannot be loaded: model.norm.weight \(1 in all\): the checkpoint has no"):
        load_causal_model("jai", folder, trust_remote_code=False)


def run(adapter: Path, out: Path, **options) -> str:
    output = StringIO()
    console = Console(file=output, width=200)
    merge_lora(MergeAdapterOptions(adapter=str(adapter), out=out, **options), console=console)
    return output.getvalue()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return JaiForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_parameters": BOTH[1:], "target_modules": [], "use_rslora": True},
        {"target_parameters": [f"layers.1.{BOTH[0]}"], "modules_to_save": ["mlp.gate"]},
        {"trainable_token_indices": ROWS},
    ],
    ids=["both", "one matrix", "one layer and routers", "rows"],
)
def test_it_is_what_peft_merges_in_memory(base, tmp_path, options, monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK", 300)  # a few rows at a time
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merged = PeftModel.from_pretrained(JaiForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    said = run(adapter, tmp_path / "out", max_shard_size=60_000, verify=True)
    actual, before = weights_of(tmp_path / "out"), weights_of(base)
    assert actual.keys() == merged.keys()
    changed = 0
    for name, weight in merged.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-6, atol=1e-6, msg=name)
        assert torch.equal(actual[name], before[name]) == torch.equal(weight, before[name]), name
        changed += not torch.equal(weight, before[name])
    assert changed > 0
    assert sum(int(word) for word in said.replace(",", "").split() if word.isdigit()) > changed
    assert "rank 3, scale" in said


def test_an_adapter_of_four_bits_goes_into_the_weights_in_16(base, tmp_path):
    """Quantise, train, save, merge: in bf16, rounded once from the sum in fp32."""
    JaiForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copyfile(base / "tokenizer.json", tmp_path / "half" / "tokenizer.json")
    adapter = make_adapter(tmp_path / "half", tmp_path / "adapter", four=True)
    run(adapter, tmp_path / "out")
    exact = JaiForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    exact = PeftModel.from_pretrained(exact, adapter).merge_and_unload().state_dict()
    actual = weights_of(tmp_path / "out")
    for name, weight in exact.items():
        assert actual[name].dtype == torch.bfloat16
        torch.testing.assert_close(actual[name].float(), weight.bfloat16().float(), rtol=2**-7, atol=1e-6)
    assert torch.equal(actual["model.norm.weight"], weights_of(tmp_path / "half")["model.norm.weight"])
    inputs = {each["role"]: each for each in read_step(tmp_path / "out")["inputs"]}
    assert inputs.keys() == {"base", "adapter"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= inputs["adapter"]["files"].keys()


def test_a_reward_model_gets_its_head(base, tmp_path):
    """And its calibration; the head for words is left out."""
    model = JaiForSequenceClassification.from_pretrained(base, num_labels=1)
    options = {"target_modules": ["q_proj"], "target_parameters": BOTH, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(r=3, task_type="SEQ_CLS", **options))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "reward_calibration.json").write_text("{}")
    JaiForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    run(tmp_path / "adapter", tmp_path / "in-half", base=str(tmp_path / "half"))
    assert {value.dtype for value in load_file(tmp_path / "in-half" / "model.safetensors").values()} == {torch.bfloat16}
    assert not (tmp_path / "in-half" / "tokenizer.json").exists()
    shutil.copyfile(base / "tokenizer.json", tmp_path / "adapter" / "tokenizer.json")
    shutil.copyfile(base / "tokenizer_config.json", tmp_path / "adapter" / "tokenizer_config.json")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("the adapter's own")
    said = run(tmp_path / "adapter", tmp_path / "out", verify=True)
    assert "jai score" in said
    assert (tmp_path / "out" / "reward_calibration.json").read_text() == "{}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the adapter's own"
    actual, loading = JaiForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert actual.num_labels == 1
    wanted = adapted.merge_and_unload().state_dict()
    torch.testing.assert_close(dict(actual.state_dict()), dict(wanted), rtol=1e-6, atol=1e-6)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("score.weight"))
    save_file({**weights, name: torch.zeros(1, 32)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"score.weight is \(1, 32\).*needs \(1, 64\)"):
        run(tmp_path / "adapter", tmp_path / "wide")


def edit(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_does_not_fit_is_refused(base, tiny_checkpoint, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    others = {
        "experts": {**SIZES, "num_local_experts": 5},
        "plan": {**SIZES, "block_repeats": [1, 1]},
        "wide": {**SIZES, "intermediate_size": 192},
    }
    for name, sizes in others.items():
        tiny_checkpoint(tmp_path / name, **sizes)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits()).save_pretrained(tmp_path / "four")
    for name, message in (
        ("experts", r"needs \(15, 64\).*another size or number of experts"),
        ("plan", r"no place for: .*layers\.2\..*another plan"),
        ("wide", r"another size"),
        ("four", r"[Qq]uantised"),
    ):
        with pytest.raises(UserError, match=message):
            run(adapter, tmp_path / "out", base=str(tmp_path / name))
    for values, message in (
        ({"use_dora": True}, "`use_dora` to True"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern`"),
        ({"alpha_pattern": {"q_proj": 2}}, "`alpha_pattern`"),
        ({"bias": "lora_only"}, "`bias` to 'lora_only'"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out`"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication`"),
        ({"use_qalora": True}, "`use_qalora`"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens`"),
        ({"peft_type": "IA3"}, "'IA3'; only LORA"),
        ({"r": 0}, "no sound rank"),
        ({"r": 10**400, "use_rslora": True}, "no sound rank"),
        ({"lora_alpha": 10**400}, "no sound rank"),
        ({"base_model_name_or_path": "me/base", "revision": "abc"}, r"revision abc.*--revision abc --local-dir"),
        ({"revision": 7}, "no sound rank"),
        ({"base_model_name_or_path": None}, r"does not say which model.*--base"),
    ):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(adapter, tmp_path / "changed")
        edit(tmp_path / "changed", **values)
        with pytest.raises(UserError, match=message):
            run(tmp_path / "changed", tmp_path / "out")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        run(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_and_rows_that_are_not_there(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", trainable_token_indices=ROWS)
    weights = load_file(adapter / "adapter_model.safetensors")
    edit(adapter, trainable_token_indices={**ROWS, "embed_tokens": [3, 4, 5000, 7]})
    with pytest.raises(UserError, match="row 5000"):
        run(adapter, tmp_path / "out")
    edit(adapter, trainable_token_indices=ROWS)
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="holds nan"):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    assert "nothing was written" in run(adapter, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_runs_of_rows():
    assert list(plan._runs([], 3)) == [(0, 3, False)]
    assert list(plan._runs([0, 1, 4], 5)) == [(0, 2, True), (2, 4, False), (4, 5, True)]
    assert list(plan._runs([2, 4, 5], 7)) == [
        (0, 2, False), (2, 3, True), (3, 4, False), (4, 6, True), (6, 7, False),
    ]  # fmt: skip

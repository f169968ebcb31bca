# SPDX-License-Identifier: Apache-2.0
"""The stages on four bits, from their options: the same as on the dequantised weights, and what is refused."""

import importlib
import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from json_lines import write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_four_bits import SIZES, four_bits
from test_trainers import arguments, chat, log_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from jai.conversion.adapter.command import merge_lora
from jai.conversion.adapter.options import MergeAdapterOptions
from jai.conversion.quantize.command import quantize
from jai.conversion.quantize.options import QuantizeOptions
from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers import checks, dpo, grpo, reward, sft
from jai.trainers import stage as stages

FOUR_BITS = {
    "load_in_4bit": True,
    "use_peft": True,
    "lora_r": 4,
    "dtype": "float32",
    "learning_rate": 0.02,
    "router_aux_loss_coef": 0,
    "max_steps": 4,
}


class Run(NamedTuple):
    """A stage's module, its data's fixture, and what it needs beside the others' options."""

    module: str
    data: str
    options: dict[str, Any]


_GRPO = {
    "rewards": "language",
    "language_column": "language",
    "num_generations": 4,
    "max_completion_length": 8,
    "temperature": 1.0,
}
STAGES = {
    "sft": Run("sft", "chats", {}),
    "dpo": Run("dpo", "preferences", {}),
    "kto": Run("kto", "labelled", {}),
    "cpo": Run("cpo", "preferences", {}),
    "orpo": Run("orpo", "preferences", {}),
    # Its head's first values are drawn in fp32, and TRL rounds them, too: not more than their error may be seen.
    "reward": Run("reward", "preferences", {"learning_rate": 0.001}),
    "grpo": Run("grpo", "prompts", _GRPO),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), **SIZES)


@pytest.fixture(scope="module")
def dequantized(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with the weights that it has in four bits, in full."""
    folder = tmp_path_factory.mktemp("dequantized")
    how = four_bits(bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=how).dequantize().save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=four_bits()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory, sentences) -> Path:
    rows = [{"messages": chat(text, f"{text[:9]} {i}")} for i, text in enumerate(sentences)]
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory, sentences) -> Path:
    rows = [
        {
            "prompt": chat(text[:12]),
            "chosen": [{"role": "assistant", "content": f"yes {i}"}],
            "rejected": [{"role": "assistant", "content": f"no {i}"}],
        }
        for i, text in enumerate(sentences)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "preferences.jsonl", rows)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, sentences) -> Path:
    rows = [
        {
            "prompt": chat(text[:12]),
            "completion": [{"role": "assistant", "content": f"yes {i}"}],
            "label": i % 2 == 0,
        }
        for i, text in enumerate(sentences)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, sentences) -> Path:
    rows = [{"prompt": chat(text[:12]), "language": "th"} for text in sentences]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture
def even_factors(monkeypatch) -> None:
    """LoRA begins with numbers of bf16, to which TRL rounds it beside quantised weights and not beside others."""
    draw = torch.nn.init.kaiming_uniform_

    def draw_rounded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return tensor.copy_(draw(tensor, *args, **kwargs).bfloat16())

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", draw_rounded)


def losses(out: Path) -> list[float]:
    return [log["loss"] for log in log_of(out)]


@pytest.mark.usefixtures("in_empty_folder")
class TestStages:
    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
    def test_sft_loses_what_it_does_on_the_dequantised_weights(
        self, checkpoint, dequantized, chats, implementation, even_factors, capsys
    ):
        options = {**FOUR_BITS, "experts_implementation": implementation}
        out = sft.main(arguments(checkpoint, chats, "four", **options))
        plan = " ".join(capsys.readouterr().out.split())
        assert "in 4 bits (nf4), the rest in float32" in plan
        assert "experts (or MLP)" in plan
        expected = sft.main(arguments(dequantized, chats, "whole", **{**options, "load_in_4bit": False}))
        assert losses(out) == pytest.approx(losses(expected), rel=1e-4)
        assert losses(out)[-1] < losses(out)[0] - 0.05
        stored = load_file(out / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        kinds = {
            kind for kind in ("self_attn", "experts", "gate", "skip_alpha") if any(kind in name for name in stored)
        }
        assert kinds == {"self_attn", "experts", "gate", "skip_alpha"}
        merge_lora(MergeAdapterOptions(adapter=str(out), out=Path("merged")))  # into the checkpoint in full
        ids = torch.arange(3, 40)[None]
        in_memory = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), out)
        with torch.no_grad():
            streamed = AutoModelForCausalLM.from_pretrained("merged").eval()(ids).logits
            torch.testing.assert_close(streamed, in_memory.eval()(ids).logits, rtol=1e-4, atol=1e-4)
        model = AutoModelForCausalLM.from_pretrained(dequantized)
        before = model(ids).logits
        assert (PeftModel.from_pretrained(model, out)(ids).logits - before).abs().max() > 0.01

    def test_dpo_loses_what_it_does_on_the_dequantised_weights(
        self, checkpoint, dequantized, preferences, even_factors
    ):
        out = dpo.main(arguments(checkpoint, preferences, "four", **FOUR_BITS))
        expected = dpo.main(arguments(dequantized, preferences, "whole", **{**FOUR_BITS, "load_in_4bit": False}))
        assert losses(out) == pytest.approx(losses(expected), rel=1e-3)
        assert losses(out)[0] == pytest.approx(0.6931, abs=1e-3)
        assert losses(out)[-1] < 0.68

    def test_another_reference_of_dpo_is_in_four_bits_too(self, checkpoint, preferences, monkeypatch):
        trainers, save = [], stages.save_result
        monkeypatch.setattr(
            stages, "save_result", lambda trainer, *a, **k: (trainers.append(trainer), save(trainer, *a, **k))[1]
        )
        options = {**FOUR_BITS, "max_steps": 1, "ref_model_name_or_path": str(checkpoint)}
        out = dpo.main(arguments(checkpoint, preferences, "dpo", **options))
        assert trainers[0].ref_model.is_loaded_in_4bit
        assert losses(out)[0] == pytest.approx(0.6931, abs=1e-3)

    def test_a_checkpoint_in_four_bits_trains_as_it_is_and_resumes(self, quantized, checkpoint, chats, capsys):
        options = {**FOUR_BITS, "load_in_4bit": False, "save_strategy": "steps", "save_steps": 2}
        out = sft.main(arguments(quantized, chats, "run", **options))
        said = " ".join(capsys.readouterr().out.split())
        assert "in 4 bits (nf4)" in said
        assert "transformers.AutoModelForCausalLM.from_pretrained('run'" in said
        assert "jai merge-adapter run OUT --base CKPT-IN-16-BITS" in said
        assert losses(out) == pytest.approx(
            losses(sft.main(arguments(checkpoint, chats, "asked", **FOUR_BITS))), rel=1e-4
        )
        again = sft.main(
            arguments(quantized, chats, "run", **options, resume_from_checkpoint="run/checkpoint-2", seed=42)
        )
        assert losses(again) == pytest.approx(losses(out), rel=1e-4)
        assert read_step(out)["options"].get("load_in_4bit") in (None, False)

    def test_what_the_adapter_copies_of_the_model_begins_as_it_is_there(self, checkpoint, chats):
        """TRL rounds what learns beside quantised weights to bf16."""
        options = {**FOUR_BITS, "learning_rate": 0, "max_steps": 1, "new_row_ids": "300-309"}
        learning = ["--trainable", "attention", "router", "new_rows"]
        out = sft.main([*arguments(checkpoint, chats, "still", **options), *learning])
        stored, weights = load_file(out / "adapter_model.safetensors"), load_file(checkpoint / "model.safetensors")
        gates = [name for name in weights if name.endswith("mlp.gate.weight")]
        assert gates
        for name in gates:
            assert torch.equal(stored[f"base_model.model.{name}"], weights[name])
        for name in ("model.embed_tokens", "lm_head"):
            rows = stored[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
            assert torch.equal(rows, weights[f"{name}.weight"][300:310])

    def test_an_evaluation_before_training_changes_nothing(self, checkpoint, chats, tmp_path):
        """On some processors bitsandbytes packs linear layers in it, which then have other gradients."""
        expected = sft.main(arguments(checkpoint, chats, "without", **FOUR_BITS))
        data = tmp_path / "data"
        data.mkdir()
        for split in ("train", "test"):
            shutil.copyfile(chats, data / f"{split}.jsonl")
        evaluated = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
        out = sft.main(arguments(checkpoint, data, "with", **FOUR_BITS, **evaluated))
        assert losses(out) == pytest.approx(losses(expected), rel=1e-5)

    def test_grpo(self, checkpoint, prompts):
        options = {**FOUR_BITS, **_GRPO, "max_steps": 1}
        out = grpo.main(arguments(checkpoint, prompts, "grpo", **options))
        assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in out.iterdir()}

    @pytest.mark.parametrize("scales", [False, True])
    def test_reward_with_double_quantisation(self, checkpoint, preferences, scales, capsys):
        options = {**FOUR_BITS, "use_bnb_nested_quant": scales, "gradient_checkpointing": scales}
        if scales:
            options |= {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"}
        out = reward.main(arguments(checkpoint, preferences, f"reward-{scales}", **options))
        form = "4 bits (fp4, scales in 8 bits)" if scales else "4 bits (nf4)"
        assert form in " ".join(capsys.readouterr().out.split())
        assert losses(out)[-1] < losses(out)[0]


# --- once round: from the whole checkpoint to the merged one

IMPLEMENTATIONS = ("eager", "grouped_mm")

STRANGER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
four, adapter, whole, merged = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(four, trust_remote_code=True).dequantize()
assert type(model).__module__.startswith("transformers_modules.")
model.save_pretrained(whole)
ids = torch.arange(300, 337)[None]
logits = {"untrained": model(ids).logits}
adapted = PeftModel.from_pretrained(model, adapter).eval()
for name in ("eager", "grouped_mm"):
    model.set_experts_implementation(name)
    logits[name] = adapted(ids).logits
adapted.merge_and_unload().save_pretrained(merged)
torch.save(logits, "logits.pt")
"""


@pytest.mark.slow
def test_once_round(checkpoint, chats, in_empty_folder, monkeypatch, run_as_stranger):
    """Quantised, trained, saved, read by plain PEFT without the package, merged: the same model at each station."""
    quantize(QuantizeOptions(model=str(checkpoint), out=Path("four"), double_quant=True))
    trained = []
    save = sft.JaiSFTTrainer.save_model
    monkeypatch.setattr(
        sft.JaiSFTTrainer, "save_model", lambda self, *a, **k: (trained.append(self.model), save(self, *a, **k))
    )
    options = {**FOUR_BITS, "load_in_4bit": False, "new_row_ids": "300-309"}
    learning = ["--trainable", "attention", "experts", "router", "alphas", "new_rows"]
    for name, checkpointing in (("kept", False), ("adapter", True)):
        sft.main([*arguments("four", chats, name, **options, gradient_checkpointing=checkpointing), *learning])
    stored = load_file("adapter/adapter_model.safetensors")
    for part in ("q_proj.lora_A", "experts.lora_B", "mlp.gate.weight", "skip_alpha", "token_adapter"):
        assert any(part in name for name in stored), part

    ids = torch.arange(300, 337)[None]
    expected = {}
    for kind, model in zip(("kept", "checkpointing"), trained, strict=True):
        assert model.base_model.model.is_gradient_checkpointing == (kind == "checkpointing")
        model.train()  # in evaluation bitsandbytes' linear layers compute in bf16 on some processors
        for name in IMPLEMENTATIONS:
            model.base_model.model.set_experts_implementation(name)
            with torch.no_grad():
                expected[kind, name] = model(ids).logits
    wanted = expected["checkpointing", "eager"]
    for logits in expected.values():
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

    run = run_as_stranger(STRANGER, {"HF_HOME": "home"}, "four", "adapter", "dequantized", "in_memory")
    assert run.returncode == 0, run.stderr
    found = torch.load("logits.pt")
    assert (found["untrained"] - wanted).abs().max() > 0.1
    for name in IMPLEMENTATIONS:
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-4)

    AutoTokenizer.from_pretrained(checkpoint).save_pretrained("dequantized")
    merge_lora(MergeAdapterOptions(adapter="adapter", base="dequantized", out=Path("merged")))
    streamed = AutoModelForCausalLM.from_pretrained("merged")
    in_memory = AutoModelForCausalLM.from_pretrained("in_memory").state_dict()
    torch.testing.assert_close(dict(streamed.state_dict()), dict(in_memory), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(streamed.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("verb", STAGES)
def test_each_stage_once_round(
    verb, quantized, dequantized, request, even_factors, in_empty_folder, monkeypatch, capsys
):
    """From YAML on a checkpoint in four bits: losses, and the adapter in transformers, plain PEFT and both merges."""
    stage = importlib.import_module(f"jai.trainers.{STAGES[verb].module}")
    auto = AutoModelForSequenceClassification if verb == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if verb == "reward" else {}
    trained, save = [], stages.save_result
    monkeypatch.setattr(
        stages, "save_result", lambda trainer, *a, **k: (trained.append(trainer.model), save(trainer, *a, **k))[1]
    )
    for out, base in (("four", quantized), ("whole", dequantized)):
        options = {
            **{name: value for name, value in FOUR_BITS.items() if name != "load_in_4bit"},
            **STAGES[verb].options,
            "model_name_or_path": str(base),
            "dataset_name": str(request.getfixturevalue(STAGES[verb].data)),
            "output_dir": out,
            "trainable": ["attention", "experts", "router", "alphas"],
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        Path(f"{out}.yaml").write_text(yaml.safe_dump(options))
        stage.main(["--config", f"{out}.yaml"])
    within = 0.02 if verb == "reward" else 2e-3
    assert losses(Path("four")) == pytest.approx(losses(Path("whole")), rel=within, abs=1e-4)
    assert {each.dtype for each in trained[0].parameters() if each.requires_grad} == {torch.float32}
    first = capsys.readouterr().out.split("Adapter written")[1]
    assert re.search(rf"transformers\.{auto.__name__}\.from_pretrained\('four'", first)
    assert "--base CKPT-IN-16-BITS" in first

    ids = torch.arange(300, 337)[None]
    untrained = auto.from_pretrained(dequantized, **labels)
    with torch.no_grad():
        wanted = trained[0].train()(ids).logits  # as above
        assert (untrained(ids).logits - wanted).abs().max() > 1e-3
        by_folder = auto.from_pretrained("four", **labels).train()
        torch.testing.assert_close(by_folder(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        plain = PeftModel.from_pretrained(untrained, "four").eval()
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        merge_lora(MergeAdapterOptions(adapter="four", base=str(dequantized), out=Path("merged")))
        streamed, loading = auto.from_pretrained("merged", output_loading_info=True)
        assert not any(loading.values())
        in_memory = plain.merge_and_unload().state_dict()
        torch.testing.assert_close(dict(streamed.state_dict()), dict(in_memory), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(streamed.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-4)


# --- what is refused


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize("engine", ["uses_fsdp", "is_deepspeed_zero3_enabled"])
@pytest.mark.parametrize("stored", [False, True], ids=["asked for", "stored"])
def test_no_engine_cuts_weights_in_four_bits(engine, stored, checkpoint, quantized, chats, monkeypatch):
    """As if it were on, which needs GPUs."""
    monkeypatch.setattr(checks, engine, lambda *training: True)
    options = {**FOUR_BITS, "load_in_4bit": not stored}
    with pytest.raises(UserError, match=r"(FSDP|ZeRO-3) is on, and quantised weights cannot be cut over processes"):
        sft.main(arguments(quantized if stored else checkpoint, chats, "out", **options))


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (
            "checkpoint",
            {"load_in_8bit": True, "load_in_4bit": False},
            r"`load_in_8bit` is on, but.*`load_in_4bit: true`",
        ),
        ("checkpoint", {"lora_dropout": 0.1}, r"`lora_dropout` is 0.1, which PEFT cannot do on experts"),
        ("checkpoint", {"use_peft": False}, r"quantised weights cannot be trained. Set `use_peft: true`"),
        ("quantized", {"use_peft": False, "load_in_4bit": False}, r"weights are quantised.*Set `use_peft: true`"),
        ("quantized", {"merge_adapter": True}, r"cannot be merged into them.*jai merge-adapter"),
        ("quantized", {"load_in_4bit": False, "load_in_8bit": True}, r"cannot be quantised again"),
        ("fp8", {}, r"weights are quantised \(fp8\), and cannot be quantised again"),
        ("odd", {}, r"`intermediate_size` is 96.*multiple of 64"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    base, options, message, checkpoint, quantized, chats, tiny_checkpoint, tmp_path
):
    folder = {"checkpoint": checkpoint, "quantized": quantized, "odd": tmp_path / "odd", "fp8": tmp_path / "fp8"}[base]
    if base == "fp8":
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    if base == "odd":
        tiny_checkpoint(folder, **{**SIZES, "intermediate_size": 96})
    with pytest.raises(UserError, match=message):
        sft.main(arguments(folder, chats, "out", **{**FOUR_BITS, **options}))
    assert not Path("out").exists()


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize("stored", [False, True], ids=["asked for", "stored"])
def test_an_old_bitsandbytes_is_named_before_the_data_is_read(stored, checkpoint, quantized, monkeypatch):
    data = Path("damaged.jsonl")
    data.write_text("{")
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.49.2" if name == "bitsandbytes" else installed(name))
    options = {**FOUR_BITS, "load_in_4bit": not stored}
    with pytest.raises(UserError, match=r"bitsandbytes 0\.49\.2 is installed.*need 0\.50 or later: pip install"):
        sft.main(arguments(quantized if stored else checkpoint, data, "out", **options))
    assert not Path("out").exists()

# SPDX-License-Identifier: Apache-2.0
"""`jai sft` and `jai dpo` with our kernels train as they do without, whole or through LoRA on the experts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton is not installed")

from jai.errors import UserError
from jai.kernels import register
from jai.kernels.head import causal_lm
from jai.provenance import read_step
from jai.trainers import dpo, sft


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(vocab_size=len(tiny_tokenizer), num_hidden_layers=2)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory, sentences) -> Path:
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sentences[:4]))
    return file


def run(checkpoint: Path, texts: Path, out: Path, *more: str, stage=sft) -> list[float]:
    options = {
        "model_name_or_path": checkpoint,
        "dataset_name": texts,
        "output_dir": out,
        "max_steps": 2,
        "max_length": 24,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    stage.main([part for key, value in options.items() for part in (f"--{key}", str(value))] + list(more))
    history = json.loads((out / read_step(out)["log_history"]).read_text())
    return [log["loss"] for log in history if "loss" in log]


KERNELS = ("--experts_implementation", "jai_fused", "--linear_cross_entropy", "true")


# A whole model's training with the kernels is that of preferences, below, in every run.
@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "lora"])
def test_the_kernels_train_the_same(checkpoint, texts, tmp_path, monkeypatch, lora):
    monkeypatch.chdir(tmp_path)
    more = ("--use_peft", "--lora_r", "4", "--merge_adapter", "true") if lora else ()
    expected = run(checkpoint, texts, tmp_path / "expected", *more)
    calls: list[str] = []
    for module, name in ((register, "fused_experts"), (causal_lm, "linear_token_figures")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, **k: (calls.append(f.__name__), f(*a, **k))[1])
    losses = run(checkpoint, texts, tmp_path / "fused", *KERNELS, *more)
    assert set(calls) == {"fused_experts", "linear_token_figures"}
    assert losses == pytest.approx(expected, rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("expected", "fused")]
    start = AutoModelForCausalLM.from_pretrained(checkpoint)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4, msg=name)
    assert not torch.equal(models[1].model.layers[0].mlp.experts.down_proj, start.model.layers[0].mlp.experts.down_proj)


def test_preferences_with_the_kernels(checkpoint, tmp_path, monkeypatch, sentences):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": a[:9], "chosen": b[:9], "rejected": c[:9]}
        for a, b, c in zip(sentences, sentences[1:], sentences[2:])
    ]
    data = tmp_path / "preferences.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    expected = run(checkpoint, data, tmp_path / "expected", stage=dpo)
    assert run(checkpoint, data, tmp_path / "fused", *KERNELS, stage=dpo) == pytest.approx(expected, rel=1e-3)


def test_an_unknown_implementation_is_one_message(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`experts_implementation` is 'jai'; expected one of batched_mm, .*jai_fused"):
        run(checkpoint, texts, tmp_path / "out", "--experts_implementation", "jai")
    assert not (tmp_path / "out").exists()

# SPDX-License-Identifier: Apache-2.0
"""`max_position_embeddings` and `rope_theta`: trained with, written down, refused where they would be lost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers import dpo, sft

CONTEXT = {"max_position_embeddings": 256, "rope_theta": 1e6}


pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    """Made for 128 tokens, with the base 10,000."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 128}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text(json.dumps({"text": " ".join(sentences[:2])}) + "\n")
    return path


def arguments(model: Path, data: Path, **options: Any) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": "out",
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "router_aux_loss_coef": 0,
        **options,
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def loss_of(out: Path) -> float:
    record = read_step(out)
    return next(log["loss"] for log in json.loads((out / record["log_history"]).read_text()) if "loss" in log)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "merged"])
def test_the_model_is_trained_with_them_and_they_are_in_the_checkpoint(checkpoint, text, lora, capsys):
    options = {"use_peft": True, "merge_adapter": True} if lora else {}
    out = sft.main(arguments(checkpoint, text, **CONTEXT, **options))
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert AutoTokenizer.from_pretrained(out).model_max_length == 256
    assert read_step(out)["options"]["rope_theta"] == 1e6

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    row = json.loads(text.read_text())["text"] + tokenizer.eos_token
    ids = tokenizer(row, return_tensors="pt")["input_ids"]
    losses = {}
    for theta in (1e4, 1e6):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
        with torch.no_grad():
            losses[theta] = model(ids, labels=ids).loss.item()
    assert loss_of(out) == pytest.approx(losses[1e6], abs=1e-4)
    assert abs(losses[1e6] - losses[1e4]) > 1e-3
    plan = " ".join(capsys.readouterr().out.split("{")[0].split())
    assert "context 128 → 256 tokens, RoPE's base 10,000 → 1,000,000 with another base, attention turns" in plan
    assert "broken until it is trained with it" in plan
    assert "sequences have up to 1,024 tokens, beyond that" in plan


def test_the_reference_of_dpo_has_them_too(checkpoint, sentences):
    Path("pairs.jsonl").write_text(
        json.dumps({"prompt": "a ", "chosen": sentences[0], "rejected": sentences[1]}) + "\n"
    )
    out = dpo.main(arguments(checkpoint, Path("pairs.jsonl"), **CONTEXT))
    assert loss_of(out) == pytest.approx(math.log(2), abs=1e-6)


def test_without_them_nothing_changes(checkpoint, text, capsys):
    out = sft.main(arguments(checkpoint, text, max_length=100))
    assert json.loads((out / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    plan = " ".join(capsys.readouterr().out.split("{")[0].split())
    assert "context 128 tokens, RoPE's base 10,000 loss on" in plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_position_embeddings": 0}, r"`max_position_embeddings` is 0; expected 1 or more"),
        ({"rope_theta": -5}, r"`rope_theta` is -5.0; expected more than 0"),
        ({"rope_theta": 1.5}, r"The context does not fit .*rope_theta.*1.5"),
        ({"rope_theta": 1e6, "use_peft": True}, r"`rope_theta` would be lost.*`merge_adapter: true`"),
        (
            {"rope_theta": 1e6, "model_init_kwargs": '{"rope_parameters": {"rope_type": "default"}}'},
            r"`rope_theta` and `model_init_kwargs` \(rope_parameters\) set the same",
        ),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, text, options, message):
    with pytest.raises(UserError, match=message):
        sft.main(arguments(checkpoint, text, **options))
    assert not Path("out").exists()


def test_windows_and_other_kinds_of_rope_are_refused(tiny_model, tiny_tokenizer, text):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    tiny_model(vocab_size=400, rope_parameters=rope).save_pretrained("long")
    window = Phi3Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        sliding_window=64, pad_token_id=0,
    )  # fmt: skip
    Phi3ForCausalLM(window).save_pretrained("window")
    for folder, message in (("long", r"its RoPE is longrope, whose further factors"), ("window", r"a window of 64")):
        tiny_tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            sft.main(arguments(Path(folder), text, **CONTEXT))

# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning through TRL: what is trained, what is logged, what lies in the output folder, what is refused."""

import gzip
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from json_lines import write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from jai import JaiForCausalLM, JaiForSequenceClassification
from jai.configuration_jai import AUTO_MAP
from jai.errors import UserError
from jai.files import sha256
from jai.provenance import PROVENANCE_FILE, chain, input_of, read_step, write_step
from jai.trainers import dpo, sft
from jai.trainers.arguments import JaiTrainingArguments, parse_arguments
from jai.trainers.data_arguments import DataArguments
from jai.trainers.dpo import JaiDPOTrainer
from jai.trainers.lora import lora_config, merge_adapter
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.monitor import RouterMonitor
from jai.trainers.parts import select_parts
from jai.trainers.sft import JaiSFTConfig, JaiSFTTrainer
from jai.trainers.stage import run_as_script

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes"
LAYERS, EXPERTS = 7, 4
SFT_OPTIONS = (ScriptArguments, JaiSFTConfig, ModelConfig, JaiTrainingArguments, DataArguments)
DPO_OPTIONS = (ScriptArguments, DPOConfig, ModelConfig, JaiTrainingArguments, DataArguments)


pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    """A whole tiny JAI with its tokenizer, as `jai convert` leaves it."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    base = input_of("base", "microsoft/Phi-3-mini-4k-instruct", files={}, made_by=None)
    write_step(folder, {"step": "convert", "inputs": [base], "options": {}})
    return folder


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory, sentences) -> Path:
    """Eight conversations in Thai and English, with a column that training does not read."""
    rows = [
        {"messages": chat(sentences[i % 6], sentences[(i + 1) % 6], sentences[(i + 2) % 6], f"ข้อ {i} yes"), "task": "x"}
        for i in range(8)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory, sentences) -> Path:
    rows = [
        {
            "prompt": chat(sentences[i % 6]),
            "chosen": [{"role": "assistant", "content": sentences[(i + 1) % 6]}],
            "rejected": [{"role": "assistant", "content": sentences[(i + 2) % 6]}],
        }
        for i in range(8)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "preferences.jsonl", rows)


def arguments(model: Path | str, data: Path | str, out: Path | str, **options: Any) -> list[str]:
    """Command-line arguments; a run of two steps unless the options say otherwise."""
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def log_of(out: Path) -> list[dict[str, float]]:
    """The logs of the last stage's training steps."""
    record = read_step(out)
    return [log for log in json.loads((out / record["log_history"]).read_text()) if "loss" in log]


def logits_of(model: torch.nn.Module, vocab_size: int = 390) -> torch.Tensor:
    ids = torch.arange(3, vocab_size, 7)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).state_dict()


# --- what is trained


def test_sft_is_gradient_descent_on_the_models_own_loss(checkpoint, tmp_path, sentences):
    """Losses and weights of three SGD steps on one batch, auxiliary loss included, equal a loop written by hand."""
    data = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in sentences[:4]])
    options = {
        "max_steps": 3,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.3,
        "max_grad_norm": 0,
    }
    out = sft.main(arguments(checkpoint, data, "out", router_aux_loss_coef=0.01, **options))

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint).train()
    model.config.router_aux_loss_coef = 0.01
    batch = tokenizer(
        [text + tokenizer.eos_token for text in sentences[:4]], return_tensors="pt", padding=True, padding_side="right"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=labels, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert [log["loss"] for log in log_of(out)] == pytest.approx(losses, abs=1e-4)
    assert losses[2] < losses[0] - 0.01
    trained = weights_of(out)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-5)
    assert read_step(out)["step"] == "pretrain"


def test_assistant_only_loss_covers_the_answers_and_their_ends(checkpoint, chats, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    rows = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
    trainer = JaiSFTTrainer(
        model,
        SFTConfig(str(tmp_path / "out"), assistant_only_loss=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    losses = []
    for row, prepared in zip(rows, trainer.train_dataset):
        ids, labels = torch.tensor(prepared["input_ids"]), torch.tensor(prepared["labels"])
        supervised = labels != -100
        assert torch.equal(labels[supervised], ids[supervised])
        # Spaces aside: phi-3's decoder gives "<|end|> next" a space that the text did not have.
        decoded = tokenizer.decode(ids[supervised]).replace(" ", "")
        answers = [turn["content"] + "<|end|>" for turn in row["messages"] if turn["role"] == "assistant"]
        assert decoded == "".join(answers).replace(" ", "") + tokenizer.eos_token
        user = tokenizer.decode(ids[~supervised])
        assert all(turn["content"].split()[0] in user for turn in row["messages"] if turn["role"] == "user")
        with torch.no_grad():
            logits = model.eval()(ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1][supervised[1:]], ids[1:][supervised[1:]], reduction="sum"))
        losses[-1] = (losses[-1].item(), int(supervised[1:].sum()))

    out = sft.main(
        arguments(
            checkpoint, chats, "o", assistant_only_loss=True, max_steps=1, router_aux_loss_coef=0, learning_rate=0,
            per_device_train_batch_size=8,
        )
    )  # fmt: skip
    expected = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    assert log_of(out)[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_completions_alone_are_trained_on(checkpoint, tmp_path, sentences):
    rows = [{"prompt": sentences[0], "completion": f" {sentences[2]}"}, {"prompt": "สวัสดี", "completion": " hello"}]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    out = sft.main(arguments(checkpoint, data, "out", max_steps=1, router_aux_loss_coef=0, learning_rate=0))
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    loss = tokens = 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        start = len(prompt)
        assert ids[:start] == prompt
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        loss += F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum").item()
        tokens += len(ids) - start
    assert log_of(out)[0]["loss"] == pytest.approx(loss / tokens, abs=1e-5)


def test_packed_examples_do_not_see_each_other(checkpoint, chats):
    options = {"max_steps": 1, "router_aux_loss_coef": 0, "learning_rate": 0, "assistant_only_loss": True}
    separate = sft.main(arguments(checkpoint, chats, "separate", per_device_train_batch_size=8, **options))
    packed = sft.main(arguments(checkpoint, chats, "packed", packing=True, max_length=1024, **options))
    assert log_of(packed)[0]["loss"] == pytest.approx(log_of(separate)[0]["loss"], abs=1e-5)


def test_dpo_starts_at_ln_2_and_prefers_the_chosen(checkpoint, preferences):
    out = dpo.main(
        arguments(checkpoint, preferences, "out", max_steps=3, learning_rate=1e-2, router_aux_loss_coef=0,
                  per_device_train_batch_size=8)
    )  # fmt: skip
    first, _, last = log_of(out)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is still the reference
    assert last["loss"] < first["loss"] - 0.05
    assert last["rewards/margins"] > 0.1
    before, after = weights_of(checkpoint), weights_of(out)
    assert not torch.equal(
        before["model.layers.3.mlp.experts.down_proj"], after["model.layers.3.mlp.experts.down_proj"]
    )


def test_dpo_takes_plain_strings_and_pairs_with_their_prompt_inside(checkpoint, tmp_path, sentences):
    strings = [{"prompt": "ก ", "chosen": sentences[0], "rejected": sentences[1]}]
    implicit = [{"chosen": chat("hi", sentences[0]), "rejected": chat("hi", sentences[1])}]
    for name, rows in (("strings", strings), ("implicit", implicit)):
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        log = log_of(dpo.main(arguments(checkpoint, data, name, max_steps=1, router_aux_loss_coef=0)))
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_resuming_continues_the_same_run(checkpoint, chats, tmp_path):
    """From the last checkpoint that is whole; logs are where checkpoints are, and TRL's count of tokens goes on."""
    options = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    options |= {"logging_steps": 2}
    whole = sft.main(arguments(checkpoint, chats, "whole", max_steps=6, **options))
    sft.main(arguments(checkpoint, chats, "halves", max_steps=3, **options))
    half = Path("halves/checkpoint-4")
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 0.')  # as a kill while saving leaves it
    halves = sft.main(arguments(checkpoint, chats, "halves", max_steps=6, resume_from_checkpoint="true", **options))
    assert not half.exists()
    assert [log["step"] for log in log_of(halves)] == [2, 3, 4, 6]
    assert log_of(halves) == log_of(whole)
    assert log_of(whole)[-1]["num_tokens"] > log_of(whole)[1]["num_tokens"]
    expected = weights_of(whole)
    for name, weight in weights_of(halves).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)


def test_a_trainer_of_ones_own_counts_on_from_the_last_checkpoint(checkpoint, chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class MyTrainer(JaiTrainerMixin, SFTTrainer):
        pass

    def logs(steps: int, resume: bool) -> list[dict]:
        config = SFTConfig("own", max_steps=steps, save_steps=1, logging_steps=1, bf16=False, report_to="none")
        rows = Dataset.from_json(str(chats), cache_dir=str(tmp_path)).select_columns(["messages"])
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        trainer = MyTrainer(load(checkpoint), config, train_dataset=rows, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return [log for log in trainer.state.log_history if "loss" in log]

    first = logs(1, resume=False)
    assert logs(2, resume=True)[-1]["num_tokens"] > first[-1]["num_tokens"]


@pytest.mark.parametrize(
    ("stage", "trainer_class", "config_class"), [(sft, SFTTrainer, SFTConfig), (dpo, DPOTrainer, DPOConfig)]
)
def test_trls_own_trainers_give_the_same_losses(
    checkpoint, chats, preferences, stage, trainer_class, config_class, tmp_path
):
    """Ten lines of TRL, auxiliary loss included."""
    data = chats if stage is sft else preferences
    options = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
    out = stage.main(arguments(checkpoint, data, "out", **options))
    more = {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "bf16": False}
    trainer = trainer_class(
        model=str(checkpoint),
        args=config_class(output_dir="trl", **options, **more),
        train_dataset=Dataset.from_json(str(data), cache_dir=str(tmp_path)).remove_columns(
            ["task"] if stage is sft else []
        ),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    keys = ("loss", "grad_norm", "aux_loss", "num_tokens", *(("rewards/margins",) if stage is dpo else ()))
    theirs = [[log[key] for key in keys] for log in trainer.state.log_history if "loss" in log]
    assert [[log[key] for key in keys] for log in log_of(out)] == theirs
    assert len({loss for loss, *_ in theirs}) == 3


def test_a_run_goes_on_from_what_it_was_alone(checkpoint, tiny_checkpoint, chats, tmp_path, monkeypatch):
    """An adapter of a model with other tokens would be trained on in silence, and the rest end in tracebacks."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    whole, adapter = (arguments(checkpoint, chats, f"run-{peft}", use_peft=peft, **saving) for peft in (False, True))
    dora = arguments(checkpoint, chats, "dora", use_peft=True, use_dora=True, trainable="attention", **saving)
    for run in (whole, adapter, dora):
        sft.main(run)
    monkeypatch.setattr(JaiForCausalLM, "from_pretrained", None)  # no weights are read
    larger = tiny_checkpoint(tmp_path / "larger", vocab_size=448)
    rendered = shutil.copytree(checkpoint, tmp_path / "rendered")
    tokenizer = AutoTokenizer.from_pretrained(rendered)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|> ")
    tokenizer.save_pretrained(rendered)
    for run, options, message in (
        (
            whole,
            {"model_name_or_path": larger},
            r"of another model than .*: its `vocab_size` is \d+, and not 448",
        ),
        (whole, {"use_peft": True}, "of a run without an adapter, and `use_peft` is on"),
        (
            whole,
            {"model_name_or_path": rendered},
            "that read other tokens than .*: its chat template is another",
        ),
        (adapter, {"use_peft": False}, "of a run with an adapter, and `use_peft` is off"),
        (adapter, {"lora_r": 4}, "of a run with another adapter: `lora_r` was 16, and is 4"),
        (adapter, {"trainable": "attention"}, "`lora_target_parameters` was .*, and is None"),
        (dora, {"use_dora": False}, "of a run with another adapter: `use_dora` was True, and is None"),
        (
            adapter,
            {"model_name_or_path": rendered},
            "that read other tokens than .*: its chat template is another",
        ),
    ):
        changed = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        with pytest.raises(UserError, match=message):
            sft.main([*run, "--resume_from_checkpoint", "true", "--max_steps", "2", *changed])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(checkpoint, chats, reentrant):
    options = {"learning_rate": 1e-2, "router_aux_loss_coef": 0 if reentrant else 0.01}
    plain = sft.main(arguments(checkpoint, chats, "plain", gradient_checkpointing=False, **options))
    kwargs = json.dumps({"use_reentrant": reentrant})
    saved = sft.main(
        arguments(
            checkpoint, chats, "saved", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **options
        )
    )
    for ours, theirs in zip(log_of(saved), log_of(plain)):
        for key in ("loss", "grad_norm", "skip_alpha/layer_01", "router/load/layer_03/expert_0"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5)


# --- LoRA


def build_lora_trainer(checkpoint: Path, chats: Path, out: Path, names: list[str]) -> JaiSFTTrainer:
    model = load(checkpoint)
    parts = select_parts(names, model, None)
    model_args = ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0)
    return JaiSFTTrainer(
        model,
        SFTConfig(
            str(out), max_steps=2, learning_rate=0.1, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_json(str(chats)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=lora_config(model_args, parts, model),
        parts=parts,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (["attention"], {"self_attn"}),
        (["experts"], {"experts"}),
        pytest.param(["attention", "experts"], {"self_attn", "experts"}, marks=pytest.mark.slow),
        (["attention", "experts", "router", "alphas"], {"self_attn", "experts", "gate", "skip_alpha"}),
    ],
    ids=lambda names: "+".join(sorted(names)),  # a set has another order in each worker
)
def test_lora_trains_what_it_says_and_comes_back(checkpoint, chats, tmp_path, parts, trained):
    trainer = build_lora_trainer(checkpoint, chats, tmp_path / "adapter", parts)
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    kinds = {part for name in names for part in ("self_attn", "experts", "gate", "norm", "skip_alpha") if part in name}
    assert kinds == trained
    modules = {"self_attn": 4 * 2 * LAYERS, "experts": 2 * 2 * LAYERS, "gate": LAYERS, "skip_alpha": 4}
    assert len(names) == sum(modules[part] for part in trained)

    base = logits_of(load(checkpoint))
    trainer.train()
    in_training = logits_of(trainer.model)
    assert (in_training - base).abs().max() > 0.05
    trainer.save_model()
    adapted = logits_of(PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter"))
    torch.testing.assert_close(adapted, in_training, atol=1e-5, rtol=1e-5)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(checkpoint), dtype=torch.float32)
    merged = logits_of(load(tmp_path / "merged"))
    torch.testing.assert_close(merged, in_training, atol=1e-4, rtol=1e-4)


def test_lora_stage_leaves_an_adapter_or_with_merging_a_checkpoint(checkpoint, chats, preferences):
    options = {"use_peft": True, "lora_r": 2, "learning_rate": 0.1}
    adapter = sft.main(arguments(checkpoint, chats, "adapter", **options))
    assert not (adapter / "model.safetensors").exists()
    assert read_step(adapter)["options"]["lora_r"] == 2
    with pytest.raises(UserError, match=r"adapter without its model.*merge_adapter: true"):
        dpo.main(arguments(adapter, preferences, "aligned"))

    merged = sft.main(arguments(checkpoint, chats, "merged", merge_adapter=True, **options))
    expected = logits_of(PeftModel.from_pretrained(load(checkpoint), merged / "adapter"))
    torch.testing.assert_close(logits_of(load(merged)), expected, atol=1e-4, rtol=1e-4)
    assert {"modeling_jai.py", "tokenizer.json", PROVENANCE_FILE} <= {file.name for file in merged.iterdir()}
    aligned = dpo.main(arguments(merged, preferences, "aligned", router_aux_loss_coef=0, **options))
    assert log_of(aligned)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_experts_of_a_dense_jai_are_its_mlp(tiny_model):
    model = tiny_model(num_local_experts=1)
    config = lora_config(ModelConfig(use_peft=True), select_parts(["attention", "experts"], model, None), model)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_head_of_a_reward_model_learns_as_a_whole(tiny_config):
    """It starts from nothing, and a share of low rank would be all that it ever is."""
    with torch.device("meta"):
        model = JaiForSequenceClassification(tiny_config(num_labels=1))
    config = lora_config(ModelConfig(use_peft=True), select_parts(["attention"], model, None), model)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config.modules_to_save == ["score"]


def test_lora_targets_given_by_hand_stand(tiny_model):
    model = tiny_model()
    model_args = ModelConfig(use_peft=True, lora_target_modules=["v_proj", "o_proj"])
    config = lora_config(model_args, select_parts(["router"], model, None), model)
    assert config.target_modules == {"v_proj", "o_proj"}
    assert config.target_parameters is None
    assert config.modules_to_save == ["mlp.gate"]


@pytest.mark.parametrize(("given", "targets"), [("q_proj", ["q_proj"]), (r".*\.[qv]_proj", r".*\.[qv]_proj")])
def test_one_lora_target_is_a_name_or_a_pattern(tiny_model, given, targets):
    """TRL makes a string of a single name, which PEFT would take for a pattern that matches nothing."""
    model = tiny_model()
    config = lora_config(ModelConfig(use_peft=True, lora_target_modules=[given]), select_parts(["router"], model, None),
                         model)  # fmt: skip
    assert config.target_modules == targets
    adapted = [name for name, _ in get_peft_model(model, config).named_parameters() if "q_proj.lora_A" in name]
    assert len(adapted) == LAYERS


def test_peft_knows_the_default_targets_of_a_jai(tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    adapted = {
        name.split(".lora_")[0].split(".")[-1] for name, weight in model.named_parameters() if weight.requires_grad
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.05}, r"`lora_dropout` is 0.05.*Set it to 0.0"),
        ({"use_dora": True}, r"`use_dora` is True.*Set it to false"),
    ],
)
def test_lora_options_that_do_not_fit_experts_are_refused(tiny_model, options, message):
    model = tiny_model()
    model_args = ModelConfig(**{"use_peft": True, "lora_dropout": 0.0, **options})
    with pytest.raises(UserError, match=message):
        lora_config(model_args, select_parts(["experts"], model, None), model)


# --- what is logged


def test_router_statistics_match_a_count_by_hand(checkpoint, tmp_path, sentences):
    """On rows of different lengths: the padding is not counted."""
    texts = [sentences[0], "hello", sentences[3], "สวัสดี"]
    data = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    out = sft.main(arguments(checkpoint, data, "out", max_steps=1, learning_rate=0))
    (log,) = log_of(out)

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    tokens = torch.zeros(LAYERS, EXPERTS)
    entropies: list[list[float]] = [[] for _ in range(LAYERS)]
    for text in texts:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            router_logits = model(ids, output_router_logits=True).router_logits
        for layer, logits in enumerate(router_logits):
            for token in logits.softmax(-1):
                tokens[layer, token.topk(2).indices] += 1
                entropies[layer].append(-(token * token.log()).sum().item())
    shares = tokens / tokens.sum(-1, keepdim=True)
    for layer in range(LAYERS):
        logged = [log[f"router/load/layer_{layer:02}/expert_{expert}"] for expert in range(EXPERTS)]
        assert sum(logged) == pytest.approx(1)
        assert logged == pytest.approx(shares[layer].tolist(), abs=1e-6)
        assert log[f"router/load_max/layer_{layer:02}"] == max(logged)
        assert log[f"router/load_min/layer_{layer:02}"] == min(logged)
        assert log[f"router/entropy/layer_{layer:02}"] == pytest.approx(
            sum(entropies[layer]) / len(entropies[layer]), abs=1e-5
        )
    assert log["router/load_max/mean"] == pytest.approx(shares.max(-1).values.mean().item(), abs=1e-6)


def test_monitor_counts_training_passes_alone(tiny_model):
    model = tiny_model()
    monitor = RouterMonitor(model)
    ids = torch.arange(3, 23)[None]
    model.train()
    with torch.no_grad():  # DPO's reference pass through a LoRA model
        model(ids)
    model.eval()
    model(ids)
    assert not any(key.startswith("router/") for key in monitor.pop(lambda sums: sums))
    model.train()
    model(ids)
    assert "router/load/layer_06/expert_3" in monitor.pop(lambda sums: sums)
    assert not any(key.startswith("router/") for key in monitor.pop(lambda sums: sums))


@pytest.mark.parametrize("trainable", [True, False])
def test_every_alpha_is_logged(tiny_model, trainable):
    model = tiny_model(skip_alpha=[0.1, 0.2, 0.3, 0.4], skip_alpha_trainable=trainable)
    logs = RouterMonitor(model).pop(lambda sums: sums)
    assert logs == pytest.approx(
        {
            "skip_alpha/layer_01": 0.1,
            "skip_alpha/layer_03": 0.2,
            "skip_alpha/layer_04": 0.3,
            "skip_alpha/layer_06": 0.4,
            "skip_alpha/mean": 0.25,
        }
    )


def test_console_shows_means_and_not_layers(checkpoint, chats, capsys):
    out = sft.main(arguments(checkpoint, chats, "out", max_steps=1))
    printed = capsys.readouterr().out
    assert "router/load_max/mean" in printed
    assert "skip_alpha/mean" in printed
    assert "layer_" not in printed
    assert "router/load/layer_00/expert_0" in log_of(out)[0]


@pytest.mark.parametrize(("trainer_class", "config_class"), [(JaiSFTTrainer, SFTConfig), (JaiDPOTrainer, DPOConfig)])
def test_alphas_are_not_decayed(checkpoint, chats, preferences, tmp_path, trainer_class, config_class):
    trainer = trainer_class(
        model=str(checkpoint),
        args=config_class(str(tmp_path / "out"), weight_decay=0.1, bf16=False, report_to="none"),
        train_dataset=Dataset.from_json(str(chats if trainer_class is JaiSFTTrainer else preferences)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decay_of = {
        names[id(parameter)]: group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    alphas = [name for name in decay_of if name.endswith("skip_alpha")]
    assert len(alphas) == 4
    assert all(decay_of[name] == 0 for name in alphas)
    assert decay_of["model.layers.0.self_attn.q_proj.weight"] == 0.1
    assert decay_of["model.layers.0.mlp.gate.weight"] == 0.1


# --- what lies in the output folder


def test_the_output_is_a_whole_checkpoint_with_its_history(checkpoint, chats, preferences):
    tuned = sft.main(arguments(checkpoint, chats, "tuned", assistant_only_loss=True, learning_rate=1e-3))
    aligned = dpo.main(arguments(tuned, preferences, "aligned"))
    for folder in (tuned, aligned):
        files = {file.name for file in folder.iterdir()}
        assert {
            "config.json", "generation_config.json", "model.safetensors", "modeling_jai.py", "configuration_jai.py",
            "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", PROVENANCE_FILE, "training_logs",
            "trainer_state.json",
        } <= files  # fmt: skip
        assert "training_args.bin" not in files  # a pickle, with the Hub token in it
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        assert config == json.loads((checkpoint / "config.json").read_text())  # `use_cache` and all
    # A chat model stops at the end of its turn.
    assert AutoTokenizer.from_pretrained(tuned).convert_tokens_to_ids("<|end|>") in (
        load(aligned).generation_config.eos_token_id
    )

    conversion, first, second = chain(read_step(aligned))
    assert [conversion, first] == chain(read_step(tuned))
    assert conversion == read_step(checkpoint)
    assert (first["step"], second["step"]) == ("sft", "dpo")
    assert (second["inputs"][0]["role"], second["inputs"][0]["name"]) == ("model", "tuned")
    assert second["inputs"][0]["files"] == {name: sha256(tuned / name) for name in ("config.json", "model.safetensors")}
    assert first["dataset"] == {"name": "chats.jsonl", "rows": 8}
    assert first["options"]["assistant_only_loss"] is True
    assert first["options"]["learning_rate"] == 1e-3
    assert first["metrics"]["train_loss"] > 0
    assert first["versions"]["transformers"]
    for record in (first, second):
        logs = json.loads((aligned / record["log_history"]).read_text())
        assert sum("loss" in log for log in logs) == 2


def test_evaluation_and_its_record(checkpoint, tmp_path, sentences):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", [{"text": text} for text in sentences[:4]])
    write_rows(data / "test.jsonl", [{"text": text} for text in sentences[4:]])
    out = sft.main(arguments(checkpoint, data, "out", eval_strategy="steps", eval_steps=1))
    metrics = read_step(out)["metrics"]
    assert metrics["eval_loss"] > 0
    assert not any(key.startswith("eval_router") for key in metrics)


def test_streamed_data(checkpoint, chats, capsys):
    out = sft.main(arguments(checkpoint, chats, "out", dataset_streaming=True, assistant_only_loss=True))
    assert len(log_of(out)) == 2
    printed = capsys.readouterr().out
    assert "streamed" in printed
    assert "those that no loss is taken on are left out" in printed


def test_the_plan_comes_first_and_the_next_commands_last(checkpoint, chats, capsys):
    sft.main(arguments(checkpoint, chats, "an out", max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2))
    printed = " ".join(capsys.readouterr().out.split())
    plan, rest = printed.split("{", 1)
    total = sum(weight.numel() for weight in load(checkpoint).parameters())
    assert f"{total:,}, of which {total:,} are trained" in plan
    assert "8 rows" in plan
    assert "about 2, each on 8 sequences" in plan
    assert "no code from the checkpoint runs" in plan
    assert "jai dpo --config recipes/dpo.yaml --model_name_or_path 'an out'" in rest  # as a shell takes it
    assert "jai publish 'an out'" in rest


def test_code_in_the_checkpoint_does_not_run(checkpoint, chats, tmp_path):
    poisoned = shutil.copytree(checkpoint, tmp_path / "poisoned")
    for file in ("modeling_jai.py", "configuration_jai.py"):
        (poisoned / file).write_text('raise RuntimeError("code from the checkpoint ran")')
    out = sft.main(arguments(poisoned, chats, "out", max_steps=1))
    assert "checkpoint ran" not in (out / "modeling_jai.py").read_text()


def test_a_tokenizer_without_template_gets_ours(checkpoint, chats, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    out = sft.main(arguments(bare, chats, "out", max_steps=1, assistant_only_loss=True))
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template


def test_examples_that_teach_nothing_are_counted(checkpoint, tmp_path, sentences, capsys):
    long_question = " ".join(sentences * 3)
    rows = [
        {"messages": chat("hi", "hello")},
        {"messages": chat(long_question, "never reached")},
        {"messages": chat("a question alone")},
    ]
    options = {"assistant_only_loss": True, "max_length": 64, "max_steps": 1}
    data = write_rows(tmp_path / "some.jsonl", rows)
    sft.main(arguments(checkpoint, data, "out", **options))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out 1 of 3 examples: they have no assistant's turn" in printed
    assert "Left out 1 of 2 examples: nothing that the loss is taken on lies in their first 64 tokens" in printed
    sft.main(arguments(checkpoint, data, "packed", packing=True, **options))
    assert "Left out 1 of 2 examples: nothing that the loss is taken on" in " ".join(capsys.readouterr().out.split())

    data = write_rows(tmp_path / "none.jsonl", rows[1:2])
    for packing in (False, True):
        with pytest.raises(UserError, match=r"None of the examples in .*raise `max_length`"):
            sft.main(arguments(checkpoint, data, f"none-{packing}", packing=packing, **options))
    data = write_rows(tmp_path / "unanswered.jsonl", rows[2:])
    with pytest.raises(UserError, match=r"None of the examples in .*no assistant's turn"):
        sft.main(arguments(checkpoint, data, "unanswered", **options))
    pair = {"prompt": long_question, "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(UserError, match=r"None of the examples in .*prompts alone have 64 tokens"):
        dpo.main(arguments(checkpoint, data, "pairs", max_length=64))


# --- configurations and bad input


@pytest.mark.parametrize(
    ("recipe", "options"),
    [*((name, SFT_OPTIONS) for name in ("text", "sft_1", "sft_2")), ("dpo", DPO_OPTIONS)],
)
def test_tiny_recipes_parse(recipe, options):
    """Those that benchmarks/post_training_chain.py runs, one after another."""
    path = RECIPES / "tiny" / f"{recipe}.yaml"
    parsed = parse_arguments(options, ["--config", str(path)], "jai sft")
    values = {key: value for part in parsed for key, value in vars(part).items()}
    given = yaml.safe_load(path.read_text())
    assert {key: values[key] for key in given if key != "report_to"} == {
        key: value for key, value in given.items() if key != "report_to"
    }


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("pretrain.yaml", SFT_OPTIONS),
        ("qlora_one_card.yaml", SFT_OPTIONS),
        ("qlora_two_cards.yaml", SFT_OPTIONS),
        ("lora_eight_cards.yaml", SFT_OPTIONS),
        ("sft.yaml", SFT_OPTIONS),
        ("dpo.yaml", DPO_OPTIONS),
    ],
)
def test_recipes_parse(recipe, options, tmp_path):
    path = RECIPES / recipe
    prog = f"jai {path.stem}"
    parsed = parse_arguments(options, ["--config", str(path), "--learning_rate=3e-5"], prog)
    values = {key: value for part in parsed for key, value in vars(part).items()}
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("learning_rate", "report_to"):
            assert values[key] == value, key
    assert values["learning_rate"] == 3e-5
    # Commented-out options must be real ones too.
    spelled_out = tmp_path / recipe
    spelled_out.write_text(
        re.sub(
            r"^# (eval_|router_aux_loss_coef|snapshot_steps|experts_implementation|max_position_embeddings|rope_theta)",
            r"\1",
            path.read_text(),
            flags=re.M,
        )
    )
    spelled = yaml.safe_load(spelled_out.read_text())
    assert len(spelled) > len(yaml.safe_load(path.read_text()))
    parsed = parse_arguments(options, ["--config", str(spelled_out)], prog)
    values = {key: value for part in parsed for key, value in vars(part).items()}
    assert {key: values[key] for key in spelled if key != "report_to"} == {
        key: value for key, value in spelled.items() if key != "report_to"
    }

    spelled_out.write_text(path.read_text() + "\nlerning_rate: 1\n")
    with pytest.raises(UserError, match=r"the option 'lerning_rate', .*Did you mean 'learning_rate'"):
        parse_arguments(options, ["--config", str(spelled_out)], prog)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config"], r"without a file"),
        (["--config", "missing.yaml"], r"missing.yaml does not exist"),
        (["--config=list.yaml"], r"not a list of options"),
        (["--config=broken.yaml"], r"not valid YAML"),
        (["--lerning_rate", "1"], r"Did you mean 'learning_rate'"),
        (["--max_steps", "many"], r"--max_steps.*invalid int value: 'many'"),
        (["--lora_task_type", "CAUSAL", "--trainable", "some"], r"`trainable` names 'some'; expected some of all, "),
        (["--bf16", "true"], r"without a GPU give `bf16: false`"),
        ([], r"No model is given"),
        (["--model_name_or_path", "MODEL"], r"No training data is given"),
        (["--model_name_or_path", "./nowhere"], r"\./nowhere is neither a folder nor a Hub id"),
        (["--model_name_or_path", "empty"], r"empty has no config.json"),
    ],
)
def test_bad_command_lines(checkpoint, argv, message):
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("a: [\n")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        sft.main([str(checkpoint) if part == "MODEL" else part for part in argv])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, r"missing.jsonl does not exist"),
        ("notes.txt", "hello", r"notes.txt is not a data file.*\.jsonl"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', r"Row 2 of broken.jsonl .* it is not valid JSON"),
        ("empty.jsonl", "", r"empty.jsonl has no rows"),
        ("blank.jsonl", "\n", r"blank.jsonl \(split train\) has no rows"),
        ("columns.jsonl", '{"question": "a", "answer": "b"}\n', r"columns question, answer; expected `messages`"),
        ("pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', r"run `jai dpo`"),
        ("shape.jsonl", '{"messages": [["user", "hi"]]}\n', r"Row 1 of shape.jsonl .* expected a message such as"),
        ("roles.jsonl", '{"messages": [{"role": "robot", "content": "hi"}]}\n', r"Row 1 of roles.jsonl .*role 'robot'"),
        (
            "mixed.jsonl",
            '{"prompt": "a", "completion": "b"}\n' * 100
            + '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
            r"Row 101 of mixed.jsonl .*`completion` is .*; expected a string",
        ),
    ],
)
def test_bad_data(checkpoint, name, content, message):
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UserError, match=message):
        sft.main(arguments(checkpoint, name, "out"))
    assert not Path("out").exists()


def test_bad_preferences(checkpoint, chats):
    with pytest.raises(UserError, match=r"expected `prompt`, `chosen` and `rejected`.*run `jai sft`"):
        dpo.main(arguments(checkpoint, chats, "out"))


def test_other_input_that_is_refused(checkpoint, chats, tmp_path, sentences, capsys):
    text = write_rows(tmp_path / "text.jsonl", [{"text": sentences[0]}])
    for data, advice in ((text, "Leave it out"), (chats, "For conversations set `assistant_only_loss: true`")):
        with pytest.raises(UserError, match=rf"`completion_only_loss` is on, and {data} has no `prompt` .*{advice}"):
            sft.main(arguments(checkpoint, data, "out", completion_only_loss=True))
    with pytest.raises(UserError, match=r"`eval_on_start` is on, and `eval_strategy` is no"):
        sft.main(arguments(checkpoint, text, "out", eval_on_start=True))
    with pytest.raises(UserError, match=r"`ignore_bias_buffers` has no effect"):
        sft.main(arguments(checkpoint, text, "out", ignore_bias_buffers=True))
    with pytest.raises(UserError, match=r"'torch_dtype', which does not exist. Today it is `dtype`"):
        sft.main(arguments(checkpoint, text, "out", torch_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"`assistant_only_loss` is on, but .* plain strings"):
        sft.main(arguments(checkpoint, text, "out", assistant_only_loss=True))
    with pytest.raises(UserError, match=r"no split 'test'.*eval_strategy: no"):
        sft.main(arguments(checkpoint, text, "out", eval_strategy="steps"))
    with pytest.raises(UserError, match="has no checkpoint that is whole"):
        sft.main(arguments(checkpoint, text, "out", resume_from_checkpoint="true"))
    with pytest.raises(UserError, match=r"`eos_token` is '<end>', which the vocabulary of .* does not have"):
        sft.main(arguments(checkpoint, text, "out", eos_token="<end>"))
    sft.main(arguments(checkpoint, text, "ended", eos_token="<|end|>", preview=1))
    assert "<|end|>(" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"`chat_template_path` names nowhere.jinja"):
        sft.main(arguments(checkpoint, chats, "out", chat_template_path="nowhere.jinja"))
    Path("full").mkdir()
    Path("full/file").touch()
    with pytest.raises(UserError, match=r"full exists already and is not empty.*resume_from_checkpoint"):
        sft.main(arguments(checkpoint, text, "full"))
    Path("plain.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"needs \{% generation %\} marks"):
        sft.main(arguments(checkpoint, chats, "out", assistant_only_loss=True, chat_template_path="plain.jinja"))


def test_checkpoints_that_are_refused(checkpoint, chats, tmp_path, tiny_model, tiny_tokenizer):
    small = tmp_path / "small"
    tiny_model(vocab_size=99).save_pretrained(small)
    with pytest.raises(UserError, match=r"small has no tokenizer that can be loaded"):
        sft.main(arguments(small, chats, "out"))
    tiny_tokenizer.save_pretrained(small)
    with pytest.raises(
        UserError, match=r"ids up to \d+, but the model has a vocabulary of 99.*jai convert BASE OUT --tokenizer"
    ):
        sft.main(arguments(small, chats, "out"))
    hollow = shutil.copytree(checkpoint, tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"hollow has no safetensors weights"):
        sft.main(arguments(hollow, chats, "out"))
    foreign = shutil.copytree(checkpoint, tmp_path / "foreign")
    (foreign / "chat_template.jinja").unlink()
    text = (foreign / "tokenizer.json").read_text().replace("<|assistant|>", "<|model|>")
    (foreign / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"no chat template, and lacks <\|assistant\|>"):
        sft.main(arguments(foreign, chats, "out"))


def test_a_damaged_history_is_refused_before_training(checkpoint, chats, tmp_path):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / PROVENANCE_FILE).write_text('{"stage": "sft"}')
    with pytest.raises(UserError, match=r"damaged/provenance.json is not a record of how the checkpoint was made"):
        sft.main(arguments(damaged, chats, "out"))
    assert not Path("out").exists()


def test_a_history_cannot_write_outside_of_the_output(checkpoint, chats, tmp_path):
    hostile = shutil.copytree(checkpoint, tmp_path / "inner" / "hostile")
    record = {"step": "sft", "inputs": [], "log_history": "training_logs/../../secret.json"}
    (hostile / PROVENANCE_FILE).write_text(json.dumps(record))
    (hostile / "training_logs").mkdir()
    (tmp_path / "inner" / "secret.json").write_text("{}")
    sft.main(arguments(hostile, chats, tmp_path / "out", max_steps=1))
    assert not (tmp_path / "secret.json").exists()
    assert [log.name for log in (tmp_path / "out" / "training_logs").iterdir()] == ["02_sft.json"]


def test_a_script_prints_one_line_and_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft", "--model_name_or_path", "./nowhere"])
    with pytest.raises(SystemExit) as exit_:
        run_as_script(sft.main)
    assert exit_.value.code == 1
    assert "Error: ./nowhere is neither a folder nor a Hub id." in capsys.readouterr().err


# --- without this package

WITHOUT_JAI = """
import gc, runpy, sys
gc.disable()  # imports take a seventh less
sys.modules.update(jai=None, liger_kernel=None, triton=None, bitsandbytes=None)
script, *sys.argv[1:] = sys.argv[1:]
import torch
trainer = runpy.run_path(script)["trainer"]
from transformers import AutoModelForCausalLM
assert type(trainer.model).__module__.startswith("transformers_modules."), type(trainer.model)
assert trainer.state.global_step == 2
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
ids = torch.arange(3, 60)[None]
with torch.no_grad():
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=0, rtol=0)
start = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not torch.equal(start.lm_head.weight, loaded.lm_head.weight)
print("trained, saved, loaded")
"""


@pytest.fixture
def clean_process(tmp_path) -> Iterator[Callable[..., str]]:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}

    def run(code: str, *argv: str | Path) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, argv)], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run


@pytest.fixture(scope="module")
def answers(tmp_path_factory, preferences) -> Path:
    """Prompts with one answer each, which is good or bad."""
    pairs = [json.loads(line) for line in preferences.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "answers.jsonl", rows)


@pytest.mark.parametrize(
    "script", ["sft", "rloo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "kto"))]
)
def test_examples_run_without_this_package(checkpoint, chats, preferences, answers, clean_process, script):
    """TRL on remote code, in a process that cannot import this package."""
    data = {"sft": chats, "dpo": preferences, "kto": answers, "rloo": answers}[script]
    path = TESTS.parent / "examples" / f"{script}.py"
    assert "trained, saved, loaded" in clean_process(WITHOUT_JAI, path, checkpoint, data, "out", 2)


def test_real_tokenizer_and_real_conversations(shared_data, tmp_path, tiny_model):
    """Thai and English chats and pairs from the shared data, with phi-3's own tokenizer and template."""
    model = tiny_model(vocab_size=32064, pad_token_id=32000, eos_token_id=32000)
    model.save_pretrained("model")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "phi3-mini")
    tokenizer.save_pretrained("model")

    def first_rows(name: str, count: int) -> list[dict[str, Any]]:
        with gzip.open(shared_data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in itertools.islice(lines, count)]

    data = write_rows(tmp_path / "chats.jsonl", [*first_rows("instruct_th", 1), *first_rows("instruct_en", 1)])
    out = sft.main(arguments("model", data, "tuned", assistant_only_loss=True, max_length=512, max_steps=1))
    assert 9 < log_of(out)[0]["loss"] < 12  # ln 32064 is 10.4
    data = write_rows(tmp_path / "pairs.jsonl", first_rows("preference_th", 1))
    out = dpo.main(arguments("model", data, "aligned", max_steps=1, router_aux_loss_coef=0, max_length=512))
    assert log_of(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

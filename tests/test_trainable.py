# SPDX-License-Identifier: Apache-2.0
"""`trainable`: what should move moves, what should not is equal to the bit, and adapters load and merge."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import trainable_worker
import transformers
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from packaging import version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import ModelConfig

from jai import JaiForSequenceClassification
from jai.auto import load_causal_model
from jai.errors import UserError
from jai.hub_card.check import check_checkpoint
from jai.provenance import input_of, read_step, write_step
from jai.trainers import dpo, sft
from jai.trainers.checks import check_partial_training
from jai.trainers.lora import lora_config
from jai.trainers.parameters import empty_model
from jai.trainers.parts import ADAPTER_PARTS, read_entries, select_parts
from jai.trainers.trainable import train_parts

NEW_ROWS = "300-309,320-389"
NEW = [*range(300, 310), *range(320, 390)]
OLD = sorted(set(range(400)) - set(NEW))
LATER_COPIES = (1, 3, 4, 6)  # of the plan [2, 3, 2] of single layers


pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint, tiny_tokenizer) -> Path:
    """A tiny JAI as `jai convert` leaves it: alphas 0, and a record that says which rows are new."""
    assert len(tiny_tokenizer) == len(NEW) + len(OLD)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("made") / "checkpoint", skip_alpha=0.0)
    base = input_of("base", "microsoft/Phi-3-mini-4k-instruct", files={}, made_by=None)
    write_step(folder, {"step": "convert", "inputs": [base], "options": {}, "result": {"new_row_ids": NEW_ROWS}})
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sentences))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": "ก ", "chosen": a, "rejected": b} for a, b in itertools.pairwise(sentences)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def arguments(model: Path | str, data: Path, out: str, **options: Any) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    given: list[str] = []
    for key, value in options.items():
        given += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return given


def losses_of(out: Path) -> list[float]:
    record = read_step(out)
    return [log["loss"] for log in json.loads((out / record["log_history"]).read_text()) if "loss" in log]


def load(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 390, 7)[None]).logits


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where along the first dimension a tensor is no longer equal to the bit."""
    return (before[name].view(torch.int32) != after[name].view(torch.int32)).flatten(1).any(dim=1)


# --- which parameters they are


def expected_entries(part: str, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Which entries of a tiny JAI's parameter belong to a part, written down a second time."""
    every, none = torch.ones(len(parameter), dtype=torch.bool), torch.zeros(len(parameter), dtype=torch.bool)
    layer = int(name.split(".")[2]) if ".layers." in name else None
    if part == "all":
        return every
    if part == "new_rows" and name in ("model.embed_tokens.weight", "lm_head.weight"):
        return none.index_fill(0, torch.tensor(NEW), True)
    if part == "new_experts" and ".experts." in name:
        return none.index_fill(0, torch.tensor([1, 2, 3]), True)
    pattern = {
        "attention": r".*\.self_attn\.[qkvo]_proj\.weight",
        "experts": r".*\.mlp\.experts\.(gate_up_proj|down_proj)",
        "router": r".*\.mlp\.gate\.weight",
        "alphas": r".*\.skip_alpha",
        "new_layers": "|".join(rf"model\.layers\.{layer}\..*" for layer in LATER_COPIES),
    }.get(part, "-")
    return every if re.fullmatch(pattern, name) and (part != "new_layers" or layer in LATER_COPIES) else none


@pytest.mark.parametrize(
    "parts",
    [
        ["attention"],
        ["experts", "new_layers"],
        ["router", "alphas", "new_rows"],
        ["new_experts", "new_layers", "new_rows"],
        ["all"],
    ],
    ids="+".join,
)
def test_what_learns_in_full_moves_and_the_rest_is_equal_to_the_bit(checkpoint, texts, parts):
    """Under AdamW with momentum and weight decay, in steps with and without gradients of their own."""
    out = sft.main(arguments(checkpoint, texts, "out", trainable=parts, gradient_accumulation_steps=2))
    before, after = load(checkpoint).state_dict(), load(out).state_dict()
    for name, parameter in before.items():
        expected = torch.stack([expected_entries(part, name, parameter) for part in parts]).any(dim=0)
        changed = moved(before, after, name) if parameter.ndim > 1 else (before[name] != after[name])
        if name == "model.embed_tokens.weight":  # a row without its token in the text has no gradient to learn from
            assert not changed[~expected].any(), name
            assert changed[expected].any() == expected.any(), name
        else:
            assert torch.equal(changed, expected) or (parameter.ndim == 1 and changed.any() == expected.all()), name
    assert read_step(out)["options"]["trainable"] == parts


def test_frozen_entries_have_no_share_in_the_gradients_norm(checkpoint, texts):
    """Clipping would else be by gradients that move nothing."""
    norms = {}
    for parts in (["new_rows"], ["all"]):
        out = sft.main(arguments(checkpoint, texts, parts[0], trainable=parts, max_steps=1, learning_rate=0))
        norms[parts[0]] = json.loads((out / read_step(out)["log_history"]).read_text())[0]["grad_norm"]
    model = load(checkpoint).train()
    rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    batch = batch_of(checkpoint, rows)
    model(**batch, output_router_logits=True).loss.backward()
    new = [model.model.embed_tokens.weight.grad[NEW], model.lm_head.weight.grad[NEW]]
    assert norms["new_rows"] == pytest.approx(torch.cat(new).norm().item(), rel=1e-4)
    assert norms["new_rows"] < 0.9 * norms["all"]


def batch_of(checkpoint: Path, rows: list[str]) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(
        [row + tokenizer.eos_token for row in rows], return_tensors="pt", padding=True, padding_side="right"
    )
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


# --- through an adapter


def test_an_adapter_teaches_what_is_new_by_default(checkpoint, texts):
    """In plain PEFT, in transformers alone, and merged it is the model that was trained."""
    out = sft.main(arguments(checkpoint, texts, "merged", use_peft=True, merge_adapter=True, lora_r=4))
    adapter = out / "adapter"
    before, after = load(checkpoint).state_dict(), load(out).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = moved(before, after, name)
        assert not changed[OLD].any()
        assert changed[NEW].sum() > (20 if name == "lm_head.weight" else 5)
    kinds = {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj"}
    for name in before:
        if any(name.endswith(kind) for kind in kinds):
            assert moved(before, after, name).any(), name
        if "norm" in name:
            assert torch.equal(before[name], after[name])
    alphas = {name: after[name] for name in after if name.endswith("skip_alpha")}
    assert len(alphas) == 4
    assert all(0 < abs(alpha) < 0.1 for alpha in alphas.values())

    saved = load_file(adapter / "adapter_model.safetensors")
    whole = {"mlp.gate.weight", "skip_alpha", "trainable_tokens_delta"}
    for name, tensor in saved.items():  # what is no product of two factors is merged as it is
        if any(name.endswith(kind) for kind in whole):
            inner = name.removeprefix("base_model.model.").replace("token_adapter.trainable_tokens_delta", "weight")
            merged = after[inner][NEW] if "token_adapter" in name else after[inner]
            assert torch.equal(merged, tensor), name
    by_peft = logits_of(PeftModel.from_pretrained(load(checkpoint), adapter))
    if version.parse(transformers.__version__) >= version.parse(
        "5.18"
    ):  # 5.17 leaves out rows and routers, and says so
        loaded = load_causal_model("adapter", adapter, trust_remote_code=False)
        torch.testing.assert_close(by_peft, logits_of(loaded), atol=0, rtol=0)
    torch.testing.assert_close(logits_of(load(out)), by_peft, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_plain_peft_loads_an_adapter_on_remote_code(checkpoint, texts, capsys):
    """In a process that cannot import this package, upon the code in the checkpoint, as `jai publish` checks it."""
    adapter = sft.main(arguments(checkpoint, texts, "adapter", use_peft=True, lora_r=4))
    assert "cannot serve LoRA on experts: merge the adapter first" in " ".join(capsys.readouterr().out.split())
    report = check_checkpoint(adapter, base=checkpoint)
    assert report.auto_class == "AutoPeftModelForCausalLM"
    model = PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    with torch.no_grad():
        logits = model((torch.arange(16) * 7 % 400)[None]).logits
    assert report.logits_sha256 == hashlib.sha256(logits.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("parts", [["new_layers"], ["attention", "new_experts"]])
def test_new_layers_and_experts_learn_through_an_adapter(checkpoint, texts, parts):
    options = {"use_peft": True, "lora_r": 4, "merge_adapter": True, "gradient_accumulation_steps": 2}
    out = sft.main(arguments(checkpoint, texts, "out", trainable=parts, **options))
    before, after = load(checkpoint).state_dict(), load(out).state_dict()
    for name, parameter in before.items():
        expected = torch.stack([expected_entries(part, name, parameter) for part in parts]).any(dim=0)
        changed = moved(before, after, name) if parameter.ndim > 1 else (before[name] != after[name])
        assert not changed[~expected].any(), name
        if parameter.ndim == 3:
            assert torch.equal(changed, expected), name
        assert changed.any() == expected.any(), name


def test_later_copies_that_start_as_the_identity_learn(checkpoint, texts, tmp_path):
    """LoRA on matrices of zeros, behind a skip whose alpha is 0: each must leave where it begins."""
    model = load(checkpoint)
    zeros = [
        f"model.layers.{layer}.{inner}"
        for layer in LATER_COPIES
        for inner in ("self_attn.o_proj.weight", "mlp.experts.down_proj")
    ]
    with torch.no_grad():
        for name in zeros:
            model.get_parameter(name).zero_()
    identity = tmp_path / "identity"
    model.save_pretrained(identity)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (identity / name).symlink_to(checkpoint / name)
    out = sft.main(arguments(identity, texts, "out", use_peft=True, merge_adapter=True, max_steps=3))
    after = load(out).state_dict()
    assert all(after[name].flatten(1).any(dim=1).all() for name in zeros)
    assert all(after[f"model.layers.{layer}.skip_alpha"] != 0 for layer in LATER_COPIES)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"linear_cross_entropy": True}], ids=str)
def test_the_loss_of_training_has_the_new_rows_gradient(checkpoint, texts, sentences, tmp_path, options):
    """By finite differences, in the head and in the embeddings: TRL's fused head never calls the head's module."""
    trainer = build_adapter_trainer(checkpoint, tmp_path, sentences, **options)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    model = trainer.model.train()
    trainer.compute_loss(model, dict(inputs)).backward()

    def loss() -> float:
        with torch.no_grad():
            return trainer.compute_loss(model, dict(inputs)).item()

    rows = {name: weight for name, weight in model.named_parameters() if "trainable_tokens_delta" in name}
    assert {name.split(".")[-4] for name in rows} == {"embed_tokens", "lm_head"}
    for weight in rows.values():
        slope = weight.grad.abs().max()
        at = tuple((weight.grad.abs() == slope).nonzero()[0])
        with torch.no_grad():
            weight[at] += 0.001
            above = loss()
            weight[at] -= 0.002
            measured = (above - loss()) / 0.002
            weight[at] += 0.001
        assert weight.grad[at].item() == pytest.approx(measured, rel=0.01)
        assert slope > 0.005


def build_adapter_trainer(checkpoint: Path, out: Path, sentences, *, linear_cross_entropy: bool = False, **options):
    from datasets import Dataset
    from transformers import AutoTokenizer

    # All experts for a token: another choice of experts, at a small step, would be a jump of the loss.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, num_experts_per_tok=4)
    parts = select_parts(ADAPTER_PARTS, model, read_entries(NEW_ROWS, "new_row_ids"))
    training = sft.JaiSFTConfig(
        str(out / "trained"), bf16=False, report_to="none", packing_strategy="bfd", max_length=20, **options
    )
    return sft.JaiSFTTrainer(
        model,
        training,
        train_dataset=Dataset.from_list([{"text": text} for text in sentences[:2]]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=lora_config(ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0), parts, model),
        parts=parts,
        linear_cross_entropy=linear_cross_entropy,
    )


def test_without_its_adapter_the_model_is_the_reference(checkpoint, pairs, monkeypatch):
    """DPO's loss begins at ln 2, and the reference never moves, though the skip alphas learn beside the adapter."""
    trainers = []
    original = dpo.JaiDPOTrainer.train
    monkeypatch.setattr(
        dpo.JaiDPOTrainer, "train", lambda self, **kwargs: (trainers.append(self), original(self, **kwargs))[1]
    )
    out = dpo.main(
        arguments(checkpoint, pairs, "out", use_peft=True, router_aux_loss_coef=0, max_steps=3, learning_rate=1e-3)
    )
    losses = losses_of(out)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[2] < losses[0] - 0.02
    model = trainers[0].model
    trained = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load(checkpoint)))
    assert torch.equal(logits_of(model), trained)
    saved = load_file(out / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.1.skip_alpha"].abs() > 1e-4
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(out)), trained)


def test_resuming_an_adapter_continues_the_same_run(checkpoint, texts):
    options = {"use_peft": True, "lora_r": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sft.main(arguments(checkpoint, texts, "whole", **{**options, "max_steps": 4}))
    sft.main(arguments(checkpoint, texts, "halves", **{**options, "max_steps": 2}))
    halves = sft.main(
        arguments(checkpoint, texts, "halves", **{**options, "max_steps": 4}, resume_from_checkpoint="true")
    )
    assert losses_of(halves) == losses_of(whole)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (halves, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_with_other_parts_is_one_message(checkpoint, texts):
    options = {"save_strategy": "steps", "save_steps": 1}
    sft.main(arguments(checkpoint, texts, "out", trainable=["router"], **{**options, "max_steps": 1}))
    again = arguments(checkpoint, texts, "out", trainable=["all"], resume_from_checkpoint="true", **options)
    with pytest.raises(UserError, match=r"other options: trainable was \['router'\] and is \['all'\]"):
        sft.main(again)
    # One that does not say so, as TRL's own.
    state_file = Path("out/checkpoint-1/trainer_state.json")
    state_file.write_text(json.dumps({**json.loads(state_file.read_text()), "stateful_callbacks": {}}))
    with pytest.raises(UserError, match=r"other parts learnt.*Resume with the `trainable`"):
        sft.main(again)


def test_the_line_that_is_printed_loads_dora(checkpoint, texts, capsys):
    """transformers' own loading leaves DoRA's magnitudes out, and computes something else."""
    out = sft.main(
        arguments(checkpoint, texts, "out", trainable=["attention", "alphas"], use_peft=True, use_dora=True, lora_r=4)
    )
    printed = " ".join(capsys.readouterr().out.split())
    line = re.search(r"peft\.AutoPeftModelForCausalLM\.from_pretrained\('out'\)", printed)
    assert "cannot serve LoRA" not in printed  # experts are not adapted
    expected = logits_of(PeftModel.from_pretrained(load(checkpoint), out))
    assert torch.equal(logits_of(eval(line.group(), {"peft": peft})), expected)
    assert (expected - logits_of(load(checkpoint))).abs().max() > 0.01


def test_snapshots_of_frozen_experts_are_refused(tiny_model, tiny_tokenizer, texts):
    tiny_model(vocab_size=400, num_local_experts=1).save_pretrained("dense")
    tiny_tokenizer.save_pretrained("dense")
    with pytest.raises(UserError, match=r"`trainable` leaves them as they are"):
        sft.main(arguments("dense", texts, "out", trainable=["attention"], snapshot_steps=1))


@pytest.mark.slow
def test_resuming_in_full_keeps_frozen_entries(checkpoint, texts):
    options = {"trainable": ["new_rows", "new_experts"], "save_strategy": "steps", "save_steps": 2}
    whole = sft.main(arguments(checkpoint, texts, "whole", **{**options, "max_steps": 4}))
    sft.main(arguments(checkpoint, texts, "halves", **{**options, "max_steps": 2}))
    halves = sft.main(
        arguments(checkpoint, texts, "halves", **{**options, "max_steps": 4}, resume_from_checkpoint="true")
    )
    expected = load(whole).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load(halves).state_dict().items())
    before = load(checkpoint).state_dict()
    assert torch.equal(before["lm_head.weight"][OLD], expected["lm_head.weight"][OLD])


def test_what_an_adapter_holds_whole_learns_in_fp32_beside_bf16(checkpoint, texts):
    """At 1e-5 a step, nothing near 0.1 would move in bf16."""
    out = sft.main(arguments(checkpoint, texts, "out", use_peft=True, dtype="bfloat16", learning_rate=1e-5, lora_r=4))
    saved = load_file(out / "adapter_model.safetensors")
    start = load(checkpoint).to(torch.bfloat16).state_dict()
    name = "model.layers.0.mlp.gate.weight"
    assert saved[f"base_model.model.{name}"].dtype == torch.float32
    assert (saved[f"base_model.model.{name}"] != start[name].float()).float().mean() > 0.9
    rows = saved["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    assert (rows != start["lm_head.weight"][NEW].float()).float().mean() > 0.9


# --- what is said


def plan_of(*given: str, stage=sft) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        stage.main(list(given))
    return " ".join(printed.getvalue().split("{")[0].split())


def test_the_plan_says_in_numbers_what_learns(checkpoint, texts):
    rank, layers = 4, 7
    plan = plan_of(*arguments(checkpoint, texts, "lora", use_peft=True, lora_r=rank, max_steps=1))
    attention = layers * rank * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    assert f"attention: {attention:,} of LoRA for {layers * 32 * (32 + 16 + 16 + 32):,}" in plan
    experts = layers * 4 * rank * ((32 + 96) + (48 + 32))
    assert f"experts (or MLP): {experts:,} of LoRA for {layers * 4 * 3 * 32 * 48:,}" in plan
    assert f"rows of new tokens: {2 * len(NEW) * 32:,}, in full" in plan
    assert f"routers: {layers * 4 * 32:,}, in full" in plan
    assert "skip alphas: 4, in full" in plan
    assert f"frozen other rows of embeddings and head {2 * len(OLD) * 32:,}, norms and the rest {15 * 32:,}" in plan
    trained = load_file("lora/adapter_model.safetensors")
    assert f"of which {sum(tensor.numel() for tensor in trained.values()):,} are trained" in plan
    assert "stay as conversion made them" not in plan

    plan = plan_of(*arguments(checkpoint, texts, "part", trainable=["new_experts"], max_steps=1))
    assert f"experts (or MLP): {layers * 3 * 3 * 32 * 48:,} of {layers * 4 * 3 * 32 * 48:,}, in full" in plan
    assert "without weight decay, because parts of them are frozen: experts" in plan
    assert "frozen nothing" in plan_of(*arguments(checkpoint, texts, "all", max_steps=1))


def test_a_new_part_that_nothing_teaches_is_warned_of(checkpoint, texts, pairs):
    options = {"use_peft": True, "max_steps": 1, "trainable": ["attention", "experts"]}
    plan = plan_of(*arguments(checkpoint, texts, "first", merge_adapter=True, **options))
    assert "routers, skip alphas and rows of new tokens stay as conversion made them" in plan.replace(
        "rows of new tokens, routers and skip alphas", "routers, skip alphas and rows of new tokens"
    )
    # Taught by an earlier stage, they may rest.
    taught = sft.main(arguments(checkpoint, texts, "taught", max_steps=1))
    plan = plan_of(*arguments(taught, pairs, "rests", **options), stage=dpo)
    assert "stay as conversion made them" not in plan


def test_new_rows_without_a_record(checkpoint, texts, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "provenance.json":
            (bare / file.name).symlink_to(file)
    plan = plan_of(*arguments(bare, texts, "guessed", use_peft=True, max_steps=1))
    assert "rows of new tokens, if there are any, are frozen: no record says which they are" in plan
    with pytest.raises(UserError, match=r"names new_rows.*no record says which.*`new_row_ids`"):
        sft.main(arguments(bare, texts, "asked", trainable=["new_rows"]))
    out = sft.main(arguments(bare, texts, "given", trainable=["new_rows"], new_row_ids="389"))
    changed = moved(load(checkpoint).state_dict(), load(out).state_dict(), "lm_head.weight")
    assert changed.nonzero().flatten().tolist() == [389]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": ["atention"]}, r"names 'atention'; expected some of all, .*Did you mean 'attention'"),
        ({"trainable": ["all"], "use_peft": True}, r"`trainable` is all and `use_peft` is on.*use_peft: false"),
        ({"trainable": ["router", "alphas"], "use_peft": True}, r"leaves nothing for LoRA to adapt"),
        ({"trainable": ["attention"], "use_peft": True, "lora_target_modules": ["v_proj"]}, r"Give one or the other"),
        ({"new_row_ids": "12-x"}, r"`new_row_ids` is '12-x'; expected ids of tokens, such as"),
        ({"new_row_ids": "12-400"}, r"goes up to 400, and the model has rows 0 to 399"),
        ({"new_row_ids": "12-13", "trainable": ["router"]}, r"new_rows does not learn"),
        ({"merge_adapter": True}, r"`merge_adapter` is on.*`use_peft: true`"),
        ({"trainable": ["new_experts"], "optim": "galore_adamw"}, r"galore"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, texts, options, message):
    with pytest.raises(UserError, match=message):
        sft.main(arguments(checkpoint, texts, "out", **options))
    assert not Path("out").exists()


def test_deepspeed_cannot_train_a_part_of_a_matrix():
    """It keeps gradients out of reach, so that frozen entries would move."""
    training = SimpleNamespace(optim="adamw_torch", deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(UserError, match=r"`deepspeed` is on, and lm_head\.weight is to learn in part"):
        check_partial_training(SimpleNamespace(training=training), ["lm_head.weight"])
    check_partial_training(SimpleNamespace(training=training), [])


def test_zero3_leaves_the_plans_model_whole_and_takes_no_rows_beside_lora(checkpoint):
    """transformers would cut that model's weights up as they are made, and there are none."""
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    training = SimpleNamespace(training=SimpleNamespace(optim="adamw_torch"))
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [300]})
    check_partial_training(training, [], rows)
    set_hf_deepspeed_config(zero3)  # as TrainingArguments does
    try:
        base = SimpleNamespace(config=AutoConfig.from_pretrained(checkpoint), loading={"trust_remote_code": False})
        assert {each.device.type for each in empty_model(base).parameters()} == {"meta"}
        with pytest.raises(UserError, match="ZeRO-3 is on, and rows of new tokens are to learn beside LoRA"):
            check_partial_training(training, [], rows)
        check_partial_training(training, [], LoraConfig(target_modules=["q_proj"]))
    finally:
        unset_hf_deepspeed_config()


def test_a_part_that_the_model_lacks_is_named(tiny_model):
    dense = tiny_model(num_local_experts=1, block_repeats=[1, 1, 1], skip_alpha=0.1)
    for part in ("router", "alphas", "new_layers", "new_experts"):
        with pytest.raises(UserError, match=rf"`trainable` names {part}, and there is none in this model"):
            select_parts([part], dense, ())
    with pytest.raises(UserError, match=r"kept the base's vocabulary"):
        select_parts(["new_rows"], dense, ())
    frozen = tiny_model(skip_alpha_trainable=False)
    with pytest.raises(UserError, match=r"`skip_alpha_trainable` is false"):
        select_parts(["alphas"], frozen, ())
    assert select_parts(ADAPTER_PARTS, dense, None, required=False).names == ("attention", "experts")


def test_a_head_for_another_task_always_learns(tiny_config):
    model = JaiForSequenceClassification(tiny_config(num_labels=1))
    parts = select_parts(["router"], model, None)
    assert set(parts.entries) == {"score.weight", *(f"model.layers.{layer}.mlp.gate.weight" for layer in range(7))}
    both = select_parts(["attention", "router"], model, None)
    config = lora_config(ModelConfig(use_peft=True, lora_dropout=0.0, lora_task_type="SEQ_CLS"), both, model)
    assert set(config.modules_to_save) == {"score", "mlp.gate"}
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_tied_head_learns_once(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    parts = select_parts(["attention", "new_rows"], model, (range(90, 99),))
    config = lora_config(ModelConfig(use_peft=True, lora_dropout=0.0), parts, model)
    assert config.trainable_token_indices == {"embed_tokens": list(range(90, 99))}
    trained = train_parts(model, parts)
    assert [each.trained for each in trained.partial] == [9 * 32]


# --- over two processes


@pytest.mark.slow
def test_two_processes_under_fsdp2_train_the_same_parts(checkpoint, tmp_path):
    """As one process does with the batch of both; what is frozen is equal to the bit, on shards as well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(trainable_worker.__file__)), str(checkpoint), str(tmp_path), NEW_ROWS]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    start = load(checkpoint)
    for mode in trainable_worker.PARTS:
        two = load_file(tmp_path / f"{mode}.safetensors")
        one = trainable_worker.train_two_steps(checkpoint, mode, NEW_ROWS, trainable_worker.IDS, sharded=False)
        assert two.keys() == one.keys()
        for name, weight in two.items():
            if name == "reference":
                with torch.no_grad():
                    expected = start(trainable_worker.IDS[:1]).logits
                torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-5)
            else:
                torch.testing.assert_close(weight, one[name], atol=1e-5, rtol=1e-4, msg=f"{mode}: {name}")
    full, before = load_file(tmp_path / "full.safetensors"), start.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not moved(before, full, name)[OLD].any()
        assert moved(before, full, name)[NEW].any()
    assert moved(before, full, "model.layers.2.mlp.experts.down_proj").tolist() == [False, True, True, True]
    lora = load_file(tmp_path / "experts.safetensors")
    up = lora["base_model.model.model.layers.2.mlp.experts.lora_B.default.weight"]
    by_expert = up.view(len(up), 4, 4)  # out, rank, experts
    assert [bool(by_expert[..., expert].any()) for expert in range(4)] == [False, True, True, True]


@pytest.mark.slow
def test_two_processes_by_accelerate_train_the_adapter_that_one_does(checkpoint, texts, tmp_path):
    """The plan, DDP, the adapter's file and merging, as `accelerate launch` starts them."""
    merged = {}
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        options = {
            "use_peft": True,
            "merge_adapter": True,
            "lora_r": 4,
            "optim": "sgd",
            "learning_rate": 0.3,
            "max_steps": 1,  # the second batch would be another: six rows
            "router_aux_loss_coef": 0,
            "per_device_train_batch_size": 4 // processes,
            "use_cpu": True,
        }
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", "-m", "jai.trainers.sft"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        result = subprocess.run(
            [*command, *arguments(checkpoint, texts, str(out), **options)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        merged[processes] = load(out).state_dict()
    before = load(checkpoint).state_dict()
    for name, weight in merged[2].items():
        torch.testing.assert_close(weight, merged[1][name], atol=1e-5, rtol=1e-4, msg=name)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not moved(before, merged[2], name)[OLD].any()
        assert moved(before, merged[2], name)[NEW].any()
    assert not torch.equal(before["model.layers.1.skip_alpha"], merged[2]["model.layers.1.skip_alpha"])

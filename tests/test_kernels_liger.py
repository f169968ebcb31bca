# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""Liger's kernels in a JAI: which parts, in which model, with what result. On a GPU, or in Triton's interpreter."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from trl import DPOConfig, ModelConfig, SFTConfig, SFTTrainer

triton = pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

import liger_kernel.ops.rms_norm as liger_rms_norm_ops
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

from jai import JaiConfig, JaiForCausalLM, JaiForSequenceClassification, modeling_jai
from jai.errors import UserError
from jai.kernels import liger
from jai.kernels.liger import apply_liger_kernel_to_jai
from jai.trainers import sft
from jai.trainers.dpo import JaiDPOTrainer
from jai.trainers.lora import lora_config
from jai.trainers.parts import ADAPTER_PARTS, select_parts
from jai.trainers.sft import JaiSFTTrainer

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
}
HALF = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
THREE_QUARTERS = {**HALF, "partial_rotary_factor": 0.75}


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch):
    """Two things that the interpreter lacks and Liger needs: scalars of type float, and libdevice's rsqrt."""
    if not INTERPRETED:
        return
    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr(liger_rms_norm_ops, "rsqrt", lambda x: tl.rsqrt(x))


@pytest.fixture
def pair(tiny_model) -> Callable[..., tuple[JaiForCausalLM, JaiForCausalLM]]:
    """Two models with the same weights; the second is to be patched."""

    def build(**options) -> tuple[JaiForCausalLM, JaiForCausalLM]:
        return tiny_model(**options).to(DEVICE), tiny_model(**options).to(DEVICE)

    return build


@pytest.fixture
def tokenizer(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def token_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out - reference).norm() / reference.norm()).item()


def gradients(model: JaiForCausalLM, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(labels=inputs["input_ids"], use_cache=False, output_router_logits=True, **inputs).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def patched_parts(model: JaiForCausalLM) -> set[str]:
    """Which of Liger's functions run in *every* place where they could, and in none of the others."""
    layers = model.model.layers
    norms = [
        model.model.norm,
        *(n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    states = {
        "rms_norm": {norm.forward.__func__ is LigerRMSNorm.forward for norm in norms},
        "rope": {layer.self_attn.apply_rotary_pos_emb is liger_rotary_pos_emb for layer in layers},
        "swiglu": {layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward for layer in layers},
    }
    assert all(len(state) == 1 for state in states.values())
    return {name for name, state in states.items() if state == {True}}


# --- The same model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts": 1},
        {"num_experts": 1, "rope_parameters": HALF},
        {"rope_parameters": THREE_QUARTERS, "head_dim": 16},
        {"num_experts": 1, "rope_parameters": LONGROPE},
    ],
    ids=["experts", "dense", "half of a head", "three quarters of a head", "LongRoPE"],
)
def test_outputs_and_every_gradient_are_the_models_own(pair, options):
    reference, model = pair(num_hidden_layers=3, **options)
    apply_liger_kernel_to_jai(model=model)
    ids = token_ids()
    assert error(model(ids).logits, reference(ids).logits) < 1e-5
    expected = gradients(reference, input_ids=ids)
    for name, gradient in gradients(model, input_ids=ids).items():
        assert error(gradient, expected[name]) < 1e-5, name


def test_longrope_changes_its_factors_where_the_model_does(pair):
    reference, model = pair(num_hidden_layers=2, num_experts=1, rope_parameters=LONGROPE)
    apply_liger_kernel_to_jai(model=model)
    for length in (8, 20, 8):
        ids = token_ids(1, length)
        assert error(model(ids).logits, reference(ids).logits) < 1e-5


def test_packed_padded_and_cached_inputs(pair):
    reference, model = pair(num_hidden_layers=3)
    apply_liger_kernel_to_jai(model=model)
    ids = token_ids()
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]], device=DEVICE)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], device=DEVICE)
    assert error(model(ids, position_ids=packed).logits, reference(ids, position_ids=packed).logits) < 1e-5
    assert error(model(ids, attention_mask=padding).logits, reference(ids, attention_mask=padding).logits) < 1e-5
    options = {"attention_mask": padding, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(pair, reentrant):
    reference, model = pair(num_hidden_layers=3, num_experts=1)
    apply_liger_kernel_to_jai(model=model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = gradients(reference, input_ids=token_ids())
    for name, gradient in gradients(model, input_ids=token_ids()).items():
        assert error(gradient, expected[name]) < 1e-5, name


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is wrong on bf16: this one needs a GPU")
@pytest.mark.parametrize("experts", [1, 4])
def test_bf16_is_as_near_to_fp64_as_the_model_itself(pair, experts):
    reference, model = pair(num_experts=experts, hidden_size=256, intermediate_size=512)
    exact = copy.deepcopy(reference).double()(token_ids()).logits
    apply_liger_kernel_to_jai(model=model)
    reference, model = reference.bfloat16(), model.bfloat16()
    assert error(model(token_ids()).logits, exact) < 1.5 * error(reference(token_ids()).logits, exact)


# --- Which parts, in which model


@pytest.mark.parametrize("part", ["rope", "rms_norm", "swiglu"])
def test_each_part_alone(pair, part):
    reference, model = pair(num_experts=1, num_hidden_layers=2)
    apply_liger_kernel_to_jai(**{name: name == part for name in ("rope", "rms_norm", "swiglu")}, model=model)
    assert patched_parts(model) == {part}
    assert error(model(token_ids()).logits, reference(token_ids()).logits) < 1e-5


def test_one_model_and_no_other(pair, tiny_model):
    other, model = pair(num_experts=1)
    apply_liger_kernel_to_jai(model=model)
    assert patched_parts(model) == {"rope", "rms_norm", "swiglu"}
    for untouched in (other, tiny_model(num_experts=1)):
        assert patched_parts(untouched) == set()
    assert modeling_jai.JaiAttention.apply_rotary_pos_emb is modeling_jai.apply_rotary_pos_emb


def test_experts_are_left_to_their_own_interface(pair):
    _, model = pair()
    apply_liger_kernel_to_jai(model=model)
    assert patched_parts(model) == {"rope", "rms_norm"}
    for layer in model.model.layers:
        assert "forward" not in vars(layer.mlp)
        assert "forward" not in vars(layer.mlp.experts)


def test_a_classifier_and_a_bare_model(tiny_config):
    torch.manual_seed(0)
    model = JaiForSequenceClassification(tiny_config(num_hidden_layers=2, num_labels=1)).eval().to(DEVICE)
    before = model(token_ids()).logits
    apply_liger_kernel_to_jai(model=model)
    assert patched_parts(model) == {"rope", "rms_norm"}
    assert error(model(token_ids()).logits, before) < 1e-5
    apply_liger_kernel_to_jai(model=model.model)  # a second time, and without a head
    assert error(model(token_ids()).logits, before) < 1e-5


def test_a_patched_model_is_saved_and_copied_as_before(pair, tmp_path):
    reference, model = pair(num_experts=1, num_hidden_layers=2)
    apply_liger_kernel_to_jai(model=model)
    assert model.state_dict().keys() == reference.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = JaiForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert patched_parts(loaded) == set()
    assert torch.equal(loaded(token_ids()).logits, reference(token_ids()).logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert error(twin(token_ids()).logits, reference(token_ids()).logits) < 1e-5


def test_a_class_from_remote_code(pair, tmp_path):
    reference, _ = pair(num_experts=1, num_hidden_layers=2)
    reference.save_pretrained(tmp_path / "remote")
    remote_class = get_class_from_dynamic_module("modeling_jai.JaiForCausalLM", str(tmp_path / "remote"))
    assert remote_class.__module__.startswith("transformers_modules.")
    model = remote_class.from_pretrained(tmp_path / "remote").to(DEVICE)
    assert patched_parts(model) == set()
    apply_liger_kernel_to_jai(model=model)
    assert patched_parts(model) == {"rope", "rms_norm", "swiglu"}
    assert error(model(token_ids()).logits, reference(token_ids()).logits) < 1e-5


# --- What is refused


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"model": None}, "Build the model first"),
        ({}, {"cross_entropy": True}, "compute the loss in chunks anyway"),
        ({}, {"fused_linear_cross_entropy": True}, "compute the loss in chunks anyway"),
        ({"num_experts": 1, "hidden_act": "gelu"}, {}, "`hidden_act` is 'gelu'"),
    ],
)
def test_what_would_be_wrong_is_refused(tiny_model, options, arguments, message):
    model = tiny_model(num_hidden_layers=1, **options)
    with pytest.raises(UserError, match=message):
        apply_liger_kernel_to_jai(**{"model": model, **arguments})
    assert patched_parts(model) == set()


def test_another_activation_is_fine_where_its_place_is_left_alone(pair):
    for options, arguments in (({"num_experts": 1}, {"swiglu": False}), ({"num_experts": 4}, {})):
        reference, model = pair(num_hidden_layers=1, hidden_act="gelu", **options)
        apply_liger_kernel_to_jai(**arguments, model=model)
        assert error(model(token_ids()).logits, reference(token_ids()).logits) < 1e-5


def test_an_older_liger_is_not_given_partial_rope(tiny_model, monkeypatch):
    def older(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        raise AssertionError

    monkeypatch.setattr(liger, "liger_rotary_pos_emb", older)
    apply_liger_kernel_to_jai(model=tiny_model())
    apply_liger_kernel_to_jai(rope=False, model=tiny_model(rope_parameters=HALF))
    with pytest.raises(UserError, match=r"0\.8\.5 or later"):
        apply_liger_kernel_to_jai(model=tiny_model(rope_parameters=HALF))


def test_a_machine_without_a_gpu_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(liger, "infer_device", lambda: "cpu")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UserError, match="need a GPU"):
        apply_liger_kernel_to_jai(model=tiny_model())
    with pytest.raises(UserError, match="need a GPU"):  # before a model of 150 GB is read
        sft.main(["--model_name_or_path", "absent", "--dataset_name", "absent", "--use_liger_kernel"])


def test_liger_that_is_not_installed_is_one_message(monkeypatch):
    monkeypatch.delitem(sys.modules, "jai.kernels.liger")
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        sft.main(["--model_name_or_path", "absent", "--dataset_name", "absent", "--use_liger_kernel"])


# --- `use_liger_kernel=True`


def training_options(config_class: type, out, **options):
    return config_class(
        str(out), learning_rate=0.01, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, logging_steps=1, seed=0, bf16=False, **{"max_steps": 2, **options},
    )  # fmt: skip


def test_registration():
    assert MODEL_TYPE_TO_APPLY_LIGER_FN[JaiConfig.model_type] is apply_liger_kernel_to_jai


def adapter(model: JaiForCausalLM) -> dict[str, object]:
    """Of the parts that learn through LoRA by default, rows of new tokens among them."""
    parts = select_parts(ADAPTER_PARTS, model, (range(300, 400),))
    return {"parts": parts, "peft_config": lora_config(ModelConfig(use_peft=True, lora_dropout=0.0), parts, model)}


@pytest.mark.parametrize(("trainer_class", "lora"), [(SFTTrainer, False), (JaiSFTTrainer, True)], ids=["TRL", "LoRA"])
def test_sft(tiny_model, tokenizer, sentences, tmp_path, trainer_class, lora):
    logs = {}
    data = Dataset.from_dict({"text": list(sentences)})
    for use_liger in (False, True):
        model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64)
        options = {"max_length": 16, "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2}
        trainer = trainer_class(
            model,
            training_options(SFTConfig, tmp_path / str(use_liger), use_liger_kernel=use_liger, **options),
            train_dataset=data,
            eval_dataset=data.select(range(2)),
            processing_class=tokenizer,
            **(adapter(model) if lora else {}),
        )
        trainer.train()
        assert patched_parts(model) == ({"rope", "rms_norm"} if use_liger else set())
        logs[use_liger] = [log.get("loss", log.get("eval_loss")) for log in trainer.state.log_history[:3]]
    assert logs[True] == pytest.approx(logs[False], rel=1e-4)


def test_dpo(tiny_model, tokenizer, sentences, tmp_path):
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=64, num_experts=1)
    model.save_pretrained(tmp_path / "model")
    rows = [{"prompt": a[:20], "chosen": b[:20], "rejected": c[:20]} for a, b, c in zip(*[iter(sentences)] * 3)]
    trainer = JaiDPOTrainer(
        JaiForCausalLM.from_pretrained(tmp_path / "model"),
        args=training_options(DPOConfig, tmp_path / "out", use_liger_kernel=True, max_length=16, max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert patched_parts(trainer.model) == {"rope", "rms_norm", "swiglu"}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_plain_trainer_evaluates_too(tiny_model, tmp_path):
    """transformers adds `skip_logits` to a model's inputs where Liger is on."""
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4).tolist()]
    losses = []
    for use_liger in (False, True):
        model = tiny_model(num_hidden_layers=2)
        arguments = training_options(
            TrainingArguments, tmp_path, use_liger_kernel=use_liger, prediction_loss_only=True, include_for_metrics=[]
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        assert patched_parts(model) == ({"rope", "rms_norm"} if use_liger else set())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


OWN_SCRIPT = """
import sys
from liger_kernel.transformers import LigerRMSNorm
from transformers import AutoModelForCausalLM
from transformers.integrations.liger import apply_liger_kernel

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.") and "jai" not in sys.modules
apply_liger_kernel(model, {"fused_linear_cross_entropy": False})  # what a trainer with `use_liger_kernel` does
print(model.model.norm.forward.__func__ is LigerRMSNorm.forward)
import jai.kernels.liger
apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
print(model.model.norm.forward.__func__ is LigerRMSNorm.forward)
"""


def test_a_users_own_script(pair, tmp_path):
    """Without the import, Liger leaves a JAI as it is and says nothing; with it, remote code is patched as well."""
    pair(num_hidden_layers=2)[0].save_pretrained(tmp_path / "model")
    finished = subprocess.run(
        [sys.executable, "-c", OWN_SCRIPT, tmp_path / "model"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert finished.stdout.split() == ["False", "True"], finished.stderr

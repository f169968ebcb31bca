# SPDX-License-Identifier: Apache-2.0
"""`clean_process.py OUT STEP FOLDER …`: what test_remote_code.py runs where `jai` cannot be imported."""

import gc
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

gc.disable()  # imports take a seventh less


class NoJai(MetaPathFinder):
    """The development install makes `jai` importable from anywhere; a user's machine has no such package."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "jai":
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)


sys.meta_path.insert(0, NoJai())

import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

torch.set_num_threads(1)
REMOTE = {"trust_remote_code": True}
INPUT_IDS = torch.arange(5, 25).reshape(2, 10)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(INPUT_IDS).logits


def can_import_jai() -> bool:
    try:
        import jai  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one. Tensors mapped from a file lie at other addresses, and products may differ in the last bit."""
    return (actual - expected).abs().max().item()


def load_and_save(folder: Path, out: Path) -> dict:
    """Load through every door, and save from each."""
    results = {}
    doors = {
        "AutoModel": (AutoModel, {}),
        "AutoModelForCausalLM": (AutoModelForCausalLM, {}),
        "AutoModelForSequenceClassification": (
            AutoModelForSequenceClassification,
            {"num_labels": 1, "pad_token_id": 0},
        ),
    }
    for name, (auto_class, values) in doors.items():
        model = auto_class.from_pretrained(folder, **values, **REMOTE).eval()
        results[name] = {"module": type(model).__module__, "class": type(model).__name__}
        with torch.no_grad():
            output = model(INPUT_IDS)
        torch.save(output.last_hidden_state if name == "AutoModel" else output.logits, out / f"{name}.pt")
        model.save_pretrained(out / name)
    AutoConfig.from_pretrained(folder, **REMOTE).save_pretrained(out / "AutoConfig")
    AutoTokenizer.from_pretrained(folder, **REMOTE).save_pretrained(out / "AutoModelForCausalLM")
    generator = pipeline("text-generation", model=str(folder), **REMOTE)
    text = generator("วันนี้อากาศ", max_new_tokens=8, do_sample=False, return_full_text=False)
    results["generated"] = text[0]["generated_text"]
    return results


def load_again(folder: Path, out: Path) -> dict:
    """Load what the first process saved."""
    results = {}
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        name = auto_class.__name__
        model = auto_class.from_pretrained(folder / name, **REMOTE).eval()
        with torch.no_grad():
            output = model(INPUT_IDS)
        actual = output.last_hidden_state if name == "AutoModel" else output.logits
        results[name] = difference(actual, torch.load(folder / f"{name}.pt"))
    results["AutoConfig"] = type(AutoConfig.from_pretrained(folder / "AutoConfig", **REMOTE)).__module__
    generator = pipeline("text-generation", model=str(folder / "AutoModelForCausalLM"), **REMOTE)
    text = generator("วันนี้อากาศ", max_new_tokens=8, do_sample=False, return_full_text=False)
    results["generated"] = text[0]["generated_text"]
    return results


def train_adapters(folder: Path, out: Path) -> dict:
    """LoRA on attention and on the experts, a few steps; then merged."""
    model = AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
    before = logits(model)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(INPUT_IDS, labels=INPUT_IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = logits(model)
    torch.save(trained, out / "trained.pt")
    model.save_pretrained(out / "adapter")
    moved = dict.fromkeys(("self_attn", "experts"), 0.0)
    for name, parameter in model.named_parameters():
        for kind in moved:
            if kind in name and "lora_B" in name:
                moved[kind] = max(moved[kind], parameter.detach().abs().max().item())
    merged = model.merge_and_unload()
    merged.save_pretrained(out / "merged")
    return {
        "losses": losses,
        "moved": moved,
        "changed": difference(trained, before),
        "merged_difference": difference(logits(merged), trained),
    }


def load_adapters(folder: Path, out: Path) -> dict:
    trained = torch.load(out / "trained.pt")
    base = AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
    return {
        "PeftModel": difference(logits(PeftModel.from_pretrained(base, out / "adapter")), trained),
        "AutoPeftModel": difference(
            logits(AutoPeftModelForCausalLM.from_pretrained(out / "adapter", **REMOTE)), trained
        ),
        "merged": difference(logits(AutoModelForCausalLM.from_pretrained(out / "merged", **REMOTE)), trained),
    }


if __name__ == "__main__":
    steps = {step.__name__: step for step in (load_and_save, load_again, train_adapters, load_adapters)}
    out, *asked = sys.argv[1:]
    results = {step: steps[step](Path(folder), Path(out)) for step, folder in zip(asked[::2], asked[1::2], strict=True)}
    (Path(out) / "results.json").write_text(json.dumps({**results, "can_import_jai": can_import_jai()}))

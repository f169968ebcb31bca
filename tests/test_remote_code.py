# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder is all that a user needs: it loads, saves and takes adapters where `jai` cannot be imported."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

import jai
from jai import JaiForCausalLM
from jai.configuration_jai import AUTO_MAP

SCRIPT = Path(__file__).with_name("clean_process.py")
INPUT_IDS = torch.arange(5, 25).reshape(2, 10)
CODE = ("configuration_jai.py", "modeling_jai.py", "quantization_jai.py")


def run_clean(home: Path, out: Path, **folders: Path) -> dict[str, dict]:
    """Run steps of clean_process.py by name, each on its folder, in one isolated process whose caches are in `home`."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    offline = {"HF_HOME": str(home), "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(out), *(str(part) for pair in folders.items() for part in pair)],
        cwd=home,
        env={**kept, **offline},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    results = json.loads((out / "results.json").read_text())
    assert not results.pop("can_import_jai")
    return results


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder as a user gets it from the Hub: model, code and tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-jai"
    ids = {"pad_token_id": tiny_tokenizer.pad_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    tiny_model(vocab_size=len(tiny_tokenizer), **ids).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder that the first process writes and the second reads."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def first(checkpoint, out, tmp_path_factory) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("first")
    return run_clean(home, out, load_and_save=checkpoint, train_adapters=checkpoint)


@pytest.fixture(scope="module")
def second(first, checkpoint, out, tmp_path_factory) -> dict[str, dict]:
    return run_clean(tmp_path_factory.mktemp("second"), out, load_again=out, load_adapters=checkpoint)


def test_transformers_alone_has_all_that_the_code_imports():
    found = {name for file in CODE for name in get_imports(Path(jai.__file__).with_name(file))}
    comes_with_python = found & sys.stdlib_module_names
    assert found - comes_with_python == {"torch", "transformers", "huggingface_hub", "packaging"}


def test_it_loads_through_every_auto_class(first, out):
    results = first["load_and_save"]
    classes = {
        "AutoModel": "JaiModel",
        "AutoModelForCausalLM": "JaiForCausalLM",
        "AutoModelForSequenceClassification": "JaiForSequenceClassification",
    }
    for door, name in classes.items():
        assert results[door]["class"] == name
        assert results[door]["module"].startswith("transformers_modules.")
        assert (out / f"{door}.pt").exists()


def test_remote_code_computes_what_the_package_computes(first, out, checkpoint):
    model = JaiForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(torch.load(out / "AutoModelForCausalLM.pt"), model(INPUT_IDS).logits)
    torch.testing.assert_close(torch.load(out / "AutoModel.pt"), model.model(INPUT_IDS).last_hidden_state)
    assert torch.load(out / "AutoModelForSequenceClassification.pt").shape == (2, 1)


def test_the_text_generation_pipeline_generates(first, checkpoint, tiny_tokenizer):
    inputs = tiny_tokenizer("วันนี้อากาศ", return_tensors="pt")
    model = JaiForCausalLM.from_pretrained(checkpoint)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert first["load_and_save"]["generated"] == tiny_tokenizer.decode(generated, skip_special_tokens=True)


@pytest.mark.parametrize(
    "saved", [None, "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoConfig"]
)
def test_every_save_carries_the_code_and_the_whole_flat_auto_map(first, out, checkpoint, saved):
    folder = checkpoint if saved is None else out / saved
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    carried = CODE[:1] if saved == "AutoConfig" else CODE
    assert sorted(path.name for path in folder.glob("*.py")) == sorted(carried)
    for name in carried:
        assert filecmp.cmp(folder / name, Path(sys.modules["jai"].__file__).parent / name, shallow=False)


def test_what_was_saved_from_remote_code_loads_again(first, second):
    again = second["load_again"]
    assert again["AutoConfig"].startswith("transformers_modules.")
    for door in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        assert again[door] < 1e-5, f"{door}: the reloaded model computes something else"
    assert again["generated"] == first["load_and_save"]["generated"]


def test_adapters_trained_on_remote_code_load_back(first, second, out, checkpoint):
    trained = first["train_adapters"]
    assert trained["losses"][-1] < trained["losses"][0]
    assert min(trained["moved"].values()) > 1e-3
    assert trained["changed"] > 0.05
    assert trained["merged_difference"] < 1e-4
    assert not list((out / "adapter").glob("*.py"))  # adapters carry no code: the base does
    loaded = second["load_adapters"]
    assert loaded["PeftModel"] < 1e-5
    assert loaded["AutoPeftModel"] < 1e-5
    assert loaded["merged"] < 1e-4
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert config["task_type"] == "CAUSAL_LM"

# SPDX-License-Identifier: Apache-2.0
"""What a stranger has: a fresh virtual environment with torch and transformers, and the name of a repository."""

import json
import os
import shutil
import subprocess
import venv
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from jai import JaiForCausalLM
from jai.hub_card.options import PublishOptions
from jai.hub_card.publish import publish
from loopback_hub import LoopbackHub

REPO = "loopback/tiny"
OLDEST, NEWEST = "5.17.0", metadata.version("transformers")
PROMPT, INPUT_IDS = "ประเทศไทย", [[5, 6, 7, 8, 9, 10, 11, 12]]

STRANGER = """
import importlib.util, json, sys
import torch, transformers

torch.set_num_threads(1)
for absent in ("jai", "peft", "trl", "accelerate", "datasets"):
    assert importlib.util.find_spec(absent) is None, absent
from transformers import AutoModelForCausalLM, AutoTokenizer

line, repo, revision, input_ids, prompt = sys.argv[1:]
model = eval(line)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(torch.tensor(json.loads(input_ids))).logits
generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(json.dumps({
    "transformers": transformers.__version__,
    "logits": logits.flatten().tolist(),
    "ids": inputs.input_ids[0].tolist(),
    "generated": generated[0].tolist(),
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-jai"
    special = {"pad_token_id": tiny_tokenizer.pad_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    tiny_model(vocab_size=400, **special).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def load_as_a_stranger(python: Path, environment: dict[str, str], line: str, revision: str, home: Path) -> dict:
    arguments = (line, REPO, revision, json.dumps(INPUT_IDS), PROMPT)
    run = subprocess.run(
        [str(python), "-I", "-c", STRANGER, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_fresh_environment_loads_what_was_published(checkpoint, tmp_path):
    """From the Hub, then from the cache without it, with the oldest and the newest transformers: the same logits."""
    home, python = tmp_path / "home", tmp_path / "venv" / "bin" / "python"
    home.mkdir()
    venv.create(tmp_path / "venv", with_pip=True)
    model = JaiForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(torch.tensor(INPUT_IDS)).logits.flatten()
    for number, version in enumerate(dict.fromkeys((OLDEST, NEWEST))):
        torch_version = metadata.version("torch").split("+")[0]
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            f"torch=={torch_version}",
            f"transformers=={version}",
        ]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"torch and transformers {version} cannot be installed here: {installed.stderr[-300:]}")
        with LoopbackHub(tmp_path / f"hub-{number}") as hub:
            options = PublishOptions(folder=checkpoint, repo_id=REPO, forward=False)
            result = publish(options, token=hub.token, endpoint=hub.endpoint, console=Console(file=StringIO()))
            environment = hub.environment()
            online = load_as_a_stranger(python, environment, result.revision_line, result.commit, home)
            asked = len(hub.requests)
        offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        cached = load_as_a_stranger(python, offline, result.revision_line, result.commit, home)
        assert len(hub.requests) == asked
        assert online["transformers"] == version
        assert cached == online
        torch.testing.assert_close(torch.tensor(online["logits"]), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            generated = model.generate(torch.tensor([online["ids"]]), max_new_tokens=8, do_sample=False)
        assert online["generated"] == generated[0].tolist()
        print(f"\ntransformers {version}: online and offline, {len(online['logits'])} logits equal")
    shutil.rmtree(tmp_path / "venv")  # it is large, and pytest keeps the folders of three runs

# SPDX-License-Identifier: Apache-2.0
"""`jai convert` of a base that lies on a Hub: it works, or says in one message why not, and writes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from jai.hub_card.loopback_hub import LoopbackHub

PLAN = ["--block-size", "2", "--block-repeats", "1,2,1"]


@pytest.fixture
def hub(tmp_path, tiny_phi3):
    with LoopbackHub(tmp_path / "hub", user="lab") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("lab/base", private=True)
        api.upload_folder(repo_id="lab/base", folder_path=tiny_phi3(tmp_path / "base"))
        yield hub


def convert(hub: LoopbackHub, out: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jai", "convert", "lab/base", str(out), *PLAN],
        env=os.environ | hub.environment() | environment,
        cwd=hub.root,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_base_comes_from_the_hub(hub, tmp_path):
    process = convert(hub, tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert '"name": "lab/base"' in (tmp_path / "out" / "provenance.json").read_text()


@pytest.mark.parametrize("fault", ["no token", "500", "hangs up"])
def test_a_hub_that_refuses_is_one_message(hub, tmp_path, fault):
    environment = {}
    if fault == "no token":
        environment["HF_TOKEN"] = ""
    elif fault == "500":
        hub.fail_next(100, status=500)
    else:
        hub.hang_up_next(100)
    process = convert(hub, tmp_path / "out", **environment)
    assert process.returncode == 1
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: lab/base is no local folder, and the Hub did not give it")
    assert "Traceback" not in process.stderr
    assert hub.token not in process.stderr + process.stdout
    assert not (tmp_path / "out").exists()

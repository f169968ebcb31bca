# SPDX-License-Identifier: Apache-2.0
"""`jai convert` of a base that lies on a Hub: it works, or says in one message why not, and writes nothing."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import Phi3ForCausalLM

from jai.files import work_folder
from loopback_hub import LoopbackHub

PLAN = ["--block-size", "2", "--block-repeats", "1,2,1"]


@pytest.fixture
def hub(tmp_path, tiny_phi3):
    with LoopbackHub(tmp_path / "hub", user="lab") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("lab/base", private=True)
        base = tiny_phi3(tmp_path / "base")
        Phi3ForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="50KB")
        (base / "model.safetensors").unlink()
        api.upload_folder(repo_id="lab/base", folder_path=base)
        yield hub


def convert(hub: LoopbackHub, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jai", "convert", "lab/base", str(out), *PLAN, *options],
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


def test_streamed_shard_by_shard(hub, tmp_path):
    """The same bytes as from a folder, though no more than some shards are ever here, and none at the end."""
    options = ["--max-shard-size", "150KB"]
    local = subprocess.run(
        [sys.executable, "-m", "jai", "convert", str(tmp_path / "base"), str(tmp_path / "local"), *PLAN, *options],
        cwd=hub.root,
        capture_output=True,
        text=True,
    )
    assert local.returncode == 0, local.stderr
    watcher = DownloadWatcher(work_folder(tmp_path / "out") / "downloads")
    process = convert(hub, tmp_path / "out", *options, "--stream", "--verify")
    most = watcher.stop()
    assert process.returncode == 0, process.stderr
    weights = sorted(path.name for path in (tmp_path / "local").glob("*.safetensors"))
    assert len(weights) > 3
    for name in weights:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert 0 < most < len(list((tmp_path / "base").glob("*.safetensors")))
    assert not work_folder(tmp_path / "out").exists()
    assert not list((hub.root).glob("**/blobs/*.safetensors"))
    streamed, copied = (
        json.loads((tmp_path / name / "provenance.json").read_text())["inputs"][0]["files"] for name in ("out", "local")
    )
    assert {name: digest for name, digest in copied.items() if "safetensors" in name}.items() <= streamed.items()


def test_a_streamed_shard_that_is_not_finite_is_refused(hub, tmp_path):
    """Its hash is the Hub's, so its values are looked at when it has come."""
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[-1]  # by then, some of the output is finished
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[-1] = math.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.upload_file(path_or_fileobj=shard, path_in_repo=shard.name, repo_id="lab/base")
    process = convert(hub, tmp_path / "out", "--max-shard-size", "150KB", "--stream")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert f"{shard.name} holds nan" in error
    assert not (tmp_path / "out").exists()
    assert not work_folder(tmp_path / "out").exists()  # another commit's weights could not go on with what was finished


class DownloadWatcher:
    """Counts the most weight files that lie in a folder at a time."""

    def __init__(self, folder: Path):
        self._folder, self._most, self._end = folder, 0, Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self._most = max(self._most, len(list(self._folder.glob("*.safetensors"))))


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
    assert error.startswith("Error: lab/base is not a local folder, and it cannot be downloaded from the Hub")
    assert "Traceback" not in process.stderr
    assert hub.token not in process.stderr + process.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_does_not_take_an_index_for_the_weights(hub, tmp_path):
    """A sharded repository's index is fetched with its configuration; of the shards only the headers are read."""
    process = subprocess.run(
        [sys.executable, "-m", "jai", "merge", str(tmp_path / "out"), "--models", "lab/base", "lab/base", "--dry-run"],
        env=os.environ | hub.environment(),
        cwd=hub.root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert "Dry run: nothing was written" in process.stdout
    assert not list(hub.root.glob("**/blobs/*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_header_on_the_hub_is_one_message(hub, tmp_path):
    """Read where it is, before anything is fetched or written."""
    content = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    first = sorted((tmp_path / "base").glob("*.safetensors"))[0]
    first.write_bytes(len(content).to_bytes(8, "little") + content + b"0000")
    HfApi(endpoint=hub.endpoint, token=hub.token).upload_file(
        repo_id="lab/base", path_or_fileobj=first, path_in_repo=first.name
    )
    process = convert(hub, tmp_path / "out", "--stream")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith(f"Error: lab/base/{first.name} is not a complete safetensors file")
    assert "the bytes of b are 0 to 4, where 4 was expected" in error
    assert not (tmp_path / "out").exists()

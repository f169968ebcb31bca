# SPDX-License-Identifier: Apache-2.0
"""Pushing and pulling while the network and the Hub fail at random: a branch is whole at every moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from jai.errors import UserError
from jai.hub_card import hub_repo
from jai.hub_card.contents import Contents, read_contents
from jai.hub_card.hub_repo import upload
from loopback_hub import LoopbackHub

REPO = "loopback/tiny"
SHARE = 0.15  # of all requests that meet a fault
TRIES = 40  # the chance that all of them fail is below 1e-12
# How every refusal of a push ends, in plain words: what to do, or that nothing happened.
CLEAR = (
    "Run the same command again",
    "run the command again",
    "Nothing was published",
    "Wait a few minutes and run the same command again",
)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_progress_bars()
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")  # instead of three seconds
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")


def a_version(folder: Path, number: int, draw: random.Random) -> Contents:
    """A folder as a checkpoint's: other weights, in other shards, each time."""
    for path in folder.glob("*"):
        path.unlink()
    shards = draw.randint(1, 3)
    names = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    for name in names if shards > 1 else ["model.safetensors"]:
        (folder / name).write_bytes(draw.randbytes(draw.randint(1_000, 60_000)))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: n for n in names}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "jai", "version": number}))
    (folder / "modeling_jai.py").write_text("# the same in every version\n")
    return read_contents(folder)


def bytes_of(contents: Contents, readme: str) -> dict[str, bytes]:
    return {path: (contents.folder / path).read_bytes() for path in contents.kept} | {"README.md": readme.encode()}


def push(api: HfApi, contents: Contents, readme: str, refusals: Counter) -> str:
    """As `jai publish` does it after its check, again and again until it has been told that it is done."""
    for _ in range(TRIES):
        try:
            with hub_repo.explained(REPO, api.token):
                remote = hub_repo.look_at_hub(api, contents, REPO, False, None, False)
            stale = hub_repo.stale_files(contents, remote)
            return upload(api, contents, REPO, generated={"README.md": readme}, stale=stale, parent=remote.head).commit
        except UserError as refusal:
            message = str(refusal)
            assert api.token not in message
            assert any(part in message for part in CLEAR), message
            assert "Traceback" not in message
            refusals[message.split("(")[0].split(":")[0][:60]] += 1
    raise AssertionError(f"not one of {TRIES} tries went through")


def pull(api: HfApi, commit: str, folder: Path, refusals: Counter) -> dict[str, bytes]:
    for _ in range(TRIES):
        try:
            found = Path(
                snapshot_download(REPO, revision=commit, cache_dir=folder, endpoint=api.endpoint, token=api.token)
            )
            return {p.relative_to(found).as_posix(): p.read_bytes() for p in found.rglob("*") if p.is_file()}
        except (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as refusal:
            refusals[type(refusal).__name__] += 1
    raise AssertionError(f"not one of {TRIES} tries went through")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("rounds", "xet"),
    [
        pytest.param(12, False, id="lfs"),
        pytest.param(100, False, id="lfs-100", marks=pytest.mark.slow),
        pytest.param(100, True, id="xet-100", marks=pytest.mark.slow),
    ],
)
def test_pushes_and_pulls_through_a_storm(rounds, xet, tmp_path, no_waiting, monkeypatch):
    """`-s` prints the figures."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(hub_repo, "LARGE_BYTES", 20_000)  # some files go one by one, some together
    draw, refusals = random.Random(7), Counter()
    (tmp_path / "folder").mkdir()
    versions: list[dict[str, bytes]] = []
    with LoopbackHub(tmp_path / "hub", xet=xet) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        for number in range(rounds):
            contents = a_version(tmp_path / "folder", number, draw)
            readme = f"---\nlicense: mit\n---\n# Version {number}\n"
            versions.append(bytes_of(contents, readme))
            hub.faults.storm(SHARE, seed=number)
            commit = push(api, contents, readme, refusals)
            pulled = pull(api, commit, tmp_path / f"cache-{number % 5}", refusals)
            pulled.pop(".gitattributes")
            assert pulled == versions[-1]
        hub.stop_faults()

        # Every commit that ever was is the empty beginning or one whole version, and each version came once.
        repo = hub.repo(REPO)
        seen = []
        commit = repo.head()
        while commit.parent is not None:
            files = {p: hub.content(REPO, p, commit.sha) for p in commit.files if p != ".gitattributes"}
            assert files in versions
            seen.append(versions.index(files))
            commit = repo.commits[commit.parent]
        assert set(commit.files) == {".gitattributes"}
        assert seen == list(reversed(range(rounds)))
        assert len(repo.commits) == rounds + 1  # no branch was left behind either
        assert not list((tmp_path / "hub" / "objects").glob("*.*"))
        met = sum(hub.faults.met.values())
        print(f"\n{rounds} pushes and pulls, {len(hub.requests)} requests, {met} faults: {dict(hub.faults.met)}")
        print(f"{sum(refusals.values())} refusals: {dict(refusals)}")
    assert met > rounds
    assert {"status", "hang up", "lose answer", "cut upload", "cut answer", "slow"} <= set(hub.faults.met)


UPLOAD = """
import sys
from huggingface_hub import HfApi
from jai.hub_card import hub_repo
from jai.hub_card.contents import read_contents

hub_repo.LARGE_BYTES = 100_000
print(hub_repo.upload(HfApi(), read_contents(sys.argv[1]), "loopback/tiny").commit)
"""


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_a_killed_upload_goes_on_where_it_was(xet, tmp_path):
    """Killed while the second of three files is on its way: nothing is visible, and the first is not sent again."""
    folder = tmp_path / "folder"
    folder.mkdir()
    draw = random.Random(0)
    for number in (1, 2, 3):
        (folder / f"model-{number:05}-of-00003.safetensors").write_bytes(draw.randbytes(600_000))
    (folder / "config.json").write_text("{}")
    route = "POST /cas-" if xet else "PUT /uploads/"
    xorbs = "/v1/xorbs/" if xet else "/uploads/"
    with LoopbackHub(tmp_path / "hub", xet=xet) as hub:

        def sent() -> list[str]:
            return [request.path for request in hub.requests if xorbs in request.path]

        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo(REPO)
        environment = {**os.environ, **hub.environment()}
        command = [sys.executable, "-P", "-c", UPLOAD, str(folder)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not sent() and process.poll() is None:
            time.sleep(0.01)
        hub.fail_next(1, status=503, match=xorbs, delay=60)  # the second file hangs
        while len(sent()) < 2 and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert set(hub.repo(REPO).head().files) == {".gitattributes"}

        hub.stop_faults()
        first, before = sent()[0], len(sent())
        again = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert again.stdout.strip() == hub.repo(REPO).head().sha
        assert first not in sent()[before:]
        assert len(sent()) - before == 2
        for path in folder.iterdir():
            assert hub.content(REPO, path.name) == path.read_bytes()
    assert route in {f"{request.method} {request.path}"[: len(route)] for request in hub.requests}

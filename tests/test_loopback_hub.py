# SPDX-License-Identifier: Apache-2.0
"""The loopback Hub, asked by the real client: what goes in comes out, by every way, and errors are the Hub's own."""

import os
import random
import socket
import time
import types
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import _http

from loopback_hub import Fault, Faults, LoopbackHub
from loopback_hub.xet import chunk_offsets, shard_files

REPO = "loopback/files"

pytestmark = pytest.mark.usefixtures("nobody_logged_in")


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO)
    return api


@pytest.fixture
def use_xet(monkeypatch: pytest.MonkeyPatch):
    return lambda on: monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not on)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Small and large, plain and packed, empty, repeated, and several chunks long."""
    draw = random.Random(0)
    noise = draw.randbytes(1_500_000)
    return {
        "config.json": b'{"a": 1}',
        "empty.txt": b"",
        "noise.safetensors": noise,
        "again/noise.safetensors": noise[300_000:] + noise[:500_000],
        "zeros.safetensors": bytes(700_001),
        "text.safetensors": b"the same words again and again " * 9_000,
        "one.safetensors": b"1",
        "binary_without_suffix": b"\0\1\2",
    }


def push(api: HfApi, files: dict[str, bytes], **kwargs) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message="files", **kwargs).oid


def pull(api: HfApi, paths, folder: Path, **kwargs) -> dict[str, bytes]:
    local = api.snapshot_download(REPO, cache_dir=folder, **kwargs)
    return {path: (Path(local) / path).read_bytes() for path in paths}


@pytest.mark.parametrize("pull_by", ["xet", "lfs"])
@pytest.mark.parametrize("push_by", ["xet", "lfs"])
def test_what_goes_in_comes_out(push_by, pull_by, hub, api, use_xet, files, tmp_path):
    use_xet(push_by == "xet")
    commit = push(api, files)
    assert {path: hub.content(REPO, path) for path in files} == files
    pushed = [request.path for request in hub.requests]
    assert any("xet-write-token" in path for path in pushed) == (push_by == "xet")
    assert any("/v1/xorbs/" in path for path in pushed) == (push_by == "xet")
    assert any(path.startswith("/uploads/") for path in pushed) == (push_by == "lfs")

    use_xet(pull_by == "xet")
    assert pull(api, files, tmp_path / "cache") == files
    assert pull(api, files, tmp_path / "cache2", revision=commit) == files
    pulled = [request.path for request in hub.requests[len(pushed) :]]
    by_xet = push_by == pull_by == "xet"  # what came by LFS has no Xet hash
    assert any("xet-read-token" in path for path in pulled) == by_xet
    assert any(path.startswith("/objects/") for path in pulled) != by_xet
    # Large files come from another host, and the token does not go there.
    assert {request.host.split(":")[0] for request in hub.requests if request.authorized} == {"127.0.0.1"}
    assert any(request.host.startswith("localhost:") for request in hub.requests)


def test_a_part_of_a_file_through_xet(hub, api, use_xet, files):
    use_xet(True)
    push(api, files)
    from hf_xet import XetFileInfo, XetSession

    entry = api.get_hf_file_metadata(url=f"{hub.endpoint}/{REPO}/resolve/main/noise.safetensors", token=hub.token)
    group = XetSession().new_download_stream_group(
        token_refresh_url=entry.xet_file_data.refresh_route,
        token_refresh_headers={"Authorization": f"Bearer {hub.token}"},
    )
    info = XetFileInfo(entry.xet_file_data.file_hash, entry.size)
    for start, end in ((0, 10), (123_457, 777_777), (1_499_990, 1_500_000)):
        assert b"".join(group.download_stream(info, start, end)) == files["noise.safetensors"][start:end]


def test_a_download_resumes(hub, api, use_xet, files, tmp_path):
    use_xet(False)
    push(api, files)
    content = files["noise.safetensors"]
    half = tmp_path / "half"
    half.write_bytes(content[:1_000_000])
    with half.open("ab") as file:
        url = f"{hub.endpoint}/{REPO}/resolve/main/noise.safetensors"
        headers = {"Authorization": f"Bearer {hub.token}"}
        http_get(url, file, resume_size=1_000_000, headers=headers, expected_size=len(content))
    assert half.read_bytes() == content


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_unchanged_files_make_no_commit(xet, hub, api, use_xet, files):
    use_xet(xet)
    first = push(api, files)
    assert push(api, files) == first
    assert len(hub.repo(REPO).commits) == 2  # that, and the one of the repository's creation


def test_commits_branches_and_deletions(hub, api, files):
    first = push(api, {"a.txt": b"1", "folder/b.txt": b"2"})
    api.create_branch(REPO, branch="try/this")
    second = push(api, {"a.txt": b"3"}, revision="try/this")
    assert api.model_info(REPO).sha == first
    assert api.model_info(REPO, revision="try/this").sha == second
    assert hub.content(REPO, "a.txt") == b"1"
    assert hub.content(REPO, "a.txt", revision=second) == b"3"
    operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("folder/")]
    api.create_commit(REPO, operations, commit_message="clear", revision="try/this")
    assert api.list_repo_files(REPO, revision="try/this") == [".gitattributes"]
    assert set(api.list_repo_files(REPO)) == {".gitattributes", "a.txt", "folder/b.txt"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "folder")] == ["folder/b.txt"]


def test_a_commit_on_an_old_parent_is_refused(hub, api):
    first = push(api, {"a.txt": b"1"})
    push(api, {"a.txt": b"2"})
    with pytest.raises(HfHubHTTPError) as caught:
        push(api, {"a.txt": b"3"}, parent_commit=first)
    assert caught.value.response.status_code == 412
    assert hub.content(REPO, "a.txt") == b"2"


@pytest.mark.parametrize("oid", ["0" * 64, "../home/token"])
def test_a_commit_that_names_a_file_that_never_came_changes_nothing(oid, hub, api):
    before = hub.repo(REPO).head()
    lines = (
        '{"key": "header", "value": {"summary": "x", "description": ""}}\n'
        '{"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}}\n'
        f'{{"key": "lfsFile", "value": {{"path": "b.bin", "algo": "sha256", "oid": "{oid}", "size": 3}}}}\n'
    )
    answer = _http.get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content=lines.encode(),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400
    assert hub.repo(REPO).head() == before


def test_private_repositories_need_the_token(hub, tmp_path):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("loopback/secret", private=True)
    assert api.model_info("loopback/secret").private
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError) as caught:
        stranger.model_info("loopback/secret")
    assert caught.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("loopback/secret", ".gitattributes", endpoint=hub.endpoint, token=False, cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.endpoint, token="hf_somebody_else").model_info("loopback/secret")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


def status_of(call) -> tuple[int, str | None]:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code, caught.value.response.headers.get("X-Error-Code")


def test_who_may_do_what(hub, api, tmp_path):
    """Status and X-Error-Code of every refusal, as the Hub gives them."""
    push(api, {"a.txt": b"1"})
    api.create_repo("loopback/secret", private=True)
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_token("loopback", may_write=False))
    other = HfApi(endpoint=hub.endpoint, token=hub.add_token("somebody"))
    nobody = HfApi(endpoint=hub.endpoint, token=False)
    assert other.whoami()["name"] == "somebody"
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"

    assert reader.model_info("loopback/secret").private
    assert status_of(lambda: other.model_info("loopback/secret")) == (404, "RepoNotFound")
    assert status_of(lambda: nobody.model_info("loopback/secret")) == (401, "RepoNotFound")
    assert status_of(lambda: nobody.list_repo_files("loopback/secret")) == (401, "RepoNotFound")
    for writer in (reader, other):
        assert status_of(lambda writer=writer: push(writer, {"a.txt": b"2"})) == (403, None)
        assert status_of(lambda writer=writer: writer.create_tag(REPO, tag="v1")) == (403, None)
        assert status_of(lambda writer=writer: writer.delete_repo(REPO)) == (403, None)
    assert status_of(lambda: other.create_repo("loopback/theirs")) == (403, None)
    assert status_of(lambda: nobody.create_repo(REPO))[0] == 401
    assert hub.content(REPO, "a.txt") == b"1"

    hub.repo(REPO).gated = True
    assert nobody.model_info(REPO).gated == "manual"
    for asker, status in ((other, 403), (nobody, 401)):
        with pytest.raises(GatedRepoError) as caught:
            asker.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path / str(status))
        assert caught.value.response.status_code == status
        assert caught.value.response.headers["X-Error-Code"] == "GatedRepo"
    assert pull(reader, ["a.txt"], tmp_path / "ours") == {"a.txt": b"1"}


def test_tags_refs_and_history(hub, api, tmp_path):
    first = push(api, {"a.txt": b"1"})
    second = push(api, {"a.txt": b"2"})
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_tag(REPO, tag="try/v2")
    assert status_of(lambda: api.create_tag(REPO, tag="v1"))[0] == 409
    api.create_tag(REPO, tag="v1", exist_ok=True)
    assert status_of(lambda: api.create_tag(REPO, tag="v3", revision="nowhere")) == (404, "RevisionNotFound")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first, "try/v2": second}
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.branches] == [("main", "refs/heads/main", second)]
    assert refs.pull_requests == []
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)][:2] == [second, first]
    assert pull(api, ["a.txt"], tmp_path, revision="v1") == {"a.txt": b"1"}
    assert api.model_info(REPO, revision="try/v2").sha == second
    with pytest.raises(HfHubHTTPError):  # a tag does not move
        push(api, {"a.txt": b"3"}, revision="v1")
    api.delete_tag(REPO, tag="v1")
    assert status_of(lambda: api.model_info(REPO, revision="v1")) == (404, "RevisionNotFound")
    api.create_branch(REPO, branch="try", revision=first)
    api.delete_branch(REPO, branch="try")
    assert status_of(lambda: api.delete_branch(REPO, branch="main"))[0] == 403
    assert [ref.name for ref in api.list_repo_refs(REPO).branches] == ["main"]


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_pull_requests(xet, hub, api, use_xet, files, tmp_path):
    use_xet(xet)
    before = push(api, {"a.txt": b"1"})
    guest = HfApi(endpoint=hub.endpoint, token=hub.add_token("guest"))
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    made = guest.create_commit(REPO, operations, commit_message="Some files", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert made.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert api.model_info(REPO).sha == before
    assert pull(api, files, tmp_path / "pr", revision="refs/pr/1") == files
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    push(guest, {"b.txt": b"2"}, revision="refs/pr/1")
    details = api.get_discussion_details(REPO, 1)
    assert (details.title, details.author, details.status) == ("Some files", "guest", "open")
    assert details.target_branch == "refs/heads/main"
    assert [event.summary for event in details.events] == ["Some files", "files"]
    assert status_of(lambda: guest.merge_pull_request(REPO, 1))[0] == 403
    api.merge_pull_request(REPO, 1)
    assert api.get_discussion_details(REPO, 1).status == "merged"
    assert pull(api, ["a.txt", "b.txt"], tmp_path / "main") == {"a.txt": b"1", "b.txt": b"2"}

    draft = api.create_pull_request(REPO, title="Another")
    push(api, {"a.txt": b"3"})
    assert status_of(lambda: api.merge_pull_request(REPO, draft.num))[0] == 400
    api.change_discussion_status(REPO, draft.num, new_status="open")
    assert status_of(lambda: api.merge_pull_request(REPO, draft.num))[0] == 409  # main has moved
    api.change_discussion_status(REPO, draft.num, new_status="closed")
    listed = list(api.get_repo_discussions(REPO))
    assert [(pull.num, pull.status) for pull in listed] == [(2, "closed"), (1, "merged")]
    assert [pull.num for pull in api.get_repo_discussions(REPO, author="guest")] == [1]
    assert list(api.get_repo_discussions(REPO, discussion_status="open")) == []
    for number in range(11):
        api.create_pull_request(REPO, title=str(number))
    assert len(list(api.get_repo_discussions(REPO))) == 13  # over two pages


def test_errors_say_what_is_missing(hub, api, tmp_path):
    for repo_id in ("loopback/nothing", "nothing"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo_id)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        push(api, {"a.txt": b"1"}, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "nothing.txt", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "additional_chat_templates"))
    with pytest.raises(HfHubHTTPError, match="rights to write"):
        api.create_repo("somebody/else")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    assert hub.repo(REPO) is None


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("license: [mit", "YAML"),
        ("license: 3", "license"),
        ("tags: jai", "tags"),
        ("- mit", "not a mapping"),
        ("base_model: /home/me/phi-3", "base_model"),
    ],
)
def test_cards_are_validated(header, fault, hub, api):
    with pytest.raises(ValueError, match=fault):
        push(api, {"README.md": f"---\n{header}\n---\n# x".encode()})
    assert "README.md" not in hub.repo(REPO).head().files
    push(api, {"README.md": b"---\nlicense: mit\nlibrary_name: transformers\n---\n# x"})
    assert api.model_info(REPO).card_data.license == "mit"
    assert api.model_info(REPO).library_name == "transformers"


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_passing_faults_are_retried_by_the_client(xet, hub, api, use_xet, no_waiting, files):
    use_xet(xet)
    hub.fail_next(2, status=503, match="preupload")
    hub.fail_next(1, match="/uploads/" if not xet else "/v1/xorbs/")
    push(api, files)
    assert hub.content(REPO, "noise.safetensors") == files["noise.safetensors"]


def test_lasting_faults_are_errors_and_leave_the_repository_alone(hub, api, no_waiting):
    before = hub.repo(REPO).head()
    hub.fail_next(100, status=500, match="preupload")
    with pytest.raises(HfHubHTTPError) as caught:
        push(api, {"a.txt": b"1"})
    assert caught.value.response.status_code == 500
    hub.stop_faults()
    hub.hang_up_next(1, match="/commit/")
    with pytest.raises(Exception, match="disconnected"):
        push(api, {"a.txt": b"1"})
    assert hub.repo(REPO).head() == before
    hub.hang_up_next(1, match="/commit/", after_work=True)
    with pytest.raises(Exception, match="disconnected"):
        push(api, {"a.txt": b"1"})
    assert hub.content(REPO, "a.txt") == b"1"


def test_a_slow_answer_runs_into_the_clients_limit(hub, api):
    hub.fail_next(1, status=500, match=f"/api/models/{REPO}", delay=1.0)
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        api.model_info(REPO, timeout=0.2)
    assert time.monotonic() - start < 1.0


def test_too_many_requests_say_when_to_come_back(hub, api, monkeypatch):
    waits = []
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=waits.append))
    hub.fail_next(2, status=429, match="preupload", retry_after=7)
    push(api, {"a.txt": b"1"})
    assert waits == [8.0, 8.0]  # the client adds a second
    assert hub.faults.met == {"status": 2}


@pytest.mark.parametrize("kind", ["cut answer", "slow"])
def test_connections_that_break_or_crawl_while_reading(kind, hub, api, use_xet, files, tmp_path, no_waiting):
    use_xet(False)
    push(api, files)
    hub.faults.plan(Fault(kind), 3, "GET /objects/")
    assert pull(api, files, tmp_path / "cache") == files  # the client goes on where the connection broke
    assert hub.faults.met == {kind: 3}


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_uploads_that_break_off(xet, hub, api, use_xet, files, no_waiting):
    use_xet(xet)
    before = hub.repo(REPO).head()
    route = "/v1/xorbs/" if xet else "/uploads/"
    if not xet:
        hub.faults.plan(Fault("cut upload"), 1000, route)
        with pytest.raises(Exception, match="Error while uploading"):
            push(api, files)
        assert hub.repo(REPO).head() == before
        assert not list((hub.root / "objects").glob("*.*"))  # no half of a file either
        hub.stop_faults()
    hub.faults.plan(Fault("cut upload"), 1, route)
    push(api, files)
    assert {path: hub.content(REPO, path) for path in files} == files


def test_a_commit_that_breaks_off_changes_nothing(hub):
    """Half of the lines of a commit are a commit, too; only the length of the request says that more was to come."""
    HfApi(endpoint=hub.endpoint, token=hub.token).create_repo(REPO)
    before = hub.repo(REPO).head()
    header = '{"key": "header", "value": {"summary": "x", "description": ""}}\n'
    file = '{"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}}\n'
    with socket.create_connection(("127.0.0.1", hub.server.server_port)) as connection:
        connection.sendall(
            f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {hub.token}\r\n"
            f"Content-Length: {len(header) + 2 * len(file)}\r\n\r\n{header}{file}".encode()
        )
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""
    assert hub.repo(REPO).head() == before


def test_chance_depends_on_the_seed_alone():
    asked = [("GET", f"/api/models/a/b/revision/{n % 3}", False) for n in range(200)]
    asked += [("PUT", f"/uploads/{n:064x}", True) for n in range(200)]

    def storm(seed: int, order: list) -> dict:
        faults, drawn = Faults(), {}
        faults.storm(0.3, seed)
        for method, path, has_body in order:
            drawn.setdefault(path, []).append(faults.draw(method, path, has_body))
        return drawn

    first = storm(1, asked)
    by_name = {path: found for path, found in first.items() if path.startswith("/api")}
    again = storm(1, asked[200:] + asked[:200])  # other threads come first
    assert {path: again[path] for path in by_name} == by_name
    assert storm(2, asked) != first
    met = [fault for found in first.values() for fault in found if fault]
    assert 0.2 < len(met) / len(asked) < 0.4
    assert {fault.kind for fault in met} == {
        "status", "hang up", "lose answer", "cut upload", "cut answer", "slow",
    }  # fmt: skip
    assert all(fault.kind != "cut upload" for found in by_name.values() for fault in found if fault)
    assert all((fault.retry_after is not None) == (fault.kind == "status" and fault.status == 429) for fault in met)


def test_signed_links_cannot_be_made_up(hub, api, use_xet, files):
    use_xet(False)
    push(api, {"one.safetensors": b"1"})
    sha256 = hub.repo(REPO).head().files["one.safetensors"].sha256
    client = _http.get_session()
    for method, path in (("GET", "objects"), ("PUT", "uploads"), ("GET", "xorbs")):
        answer = client.request(method, f"{hub.endpoint}/{path}/{sha256}?signature={'0' * 64}")
        assert answer.status_code == 403
    assert hub.content(REPO, "one.safetensors") == b"1"


def test_it_listens_on_the_loopback_only(hub):
    address, port = hub.server.server_address
    assert address == "127.0.0.1"
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}:
        if not address.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=2)


def test_the_environment_leads_there(hub):
    environment = hub.environment()
    assert environment["HF_ENDPOINT"] == hub.endpoint
    assert environment["HF_TOKEN"] == hub.token
    assert all(str(hub.root) in environment[name] for name in environment if name.endswith(("_HOME", "_CACHE")))
    assert os.environ.get("HF_ENDPOINT") != hub.endpoint


def test_damaged_shards_and_xorbs():
    with pytest.raises(ValueError, match="not a Xet shard"):
        list(shard_files(b"something else" * 10))
    with pytest.raises(ValueError, match="cut off"):
        list(shard_files(b"HFRepoMetaData\0".ljust(48, b"\1")))
    packed = b"".join(bytes([0]) + len(c).to_bytes(3, "little") + bytes(4) + c for c in (b"ab", b"", b"cde"))
    assert chunk_offsets(packed) == [0, 10, 18, 29]
    assert chunk_offsets(packed + b"XETBLOB and a footer") == [0, 10, 18, 29]

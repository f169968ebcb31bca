# SPDX-License-Identifier: Apache-2.0
"""The repository on the Hub to which a folder is published: what it holds, and what is changed in it."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console
from rich.markup import escape

from jai.errors import UserError
from jai.hub import METADATA_PATTERNS
from jai.hub_card.adapter import Adapter
from jai.hub_card.contents import ADAPTER_CONFIG, Contents, Kind, in_manifest
from jai.hub_card.readme import README, written_by_hand
from jai.provenance import redact

ANSWER_SECONDS = 30.0  # for the first question to the Hub; the client itself would wait for ever
LARGE_BYTES = 10 * 2**20
_AUTHORS_OWN = (README, "LICENSE*", "NOTICE*", "images/*")  # never deleted from a repository


@dataclass(frozen=True)
class RemoteBranch:
    """Whether the repository is there; the branch's head (`None` where there is no such branch yet) and its files."""

    exists: bool
    head: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upload:
    """What `upload` did: the commit that holds the files, and the pull request's page where there is one."""

    commit: str
    pull_request: str | None = None


def look_at_hub(
    api: HfApi, contents: Contents, repo_id: str, private: bool, revision: str | None, create_pr: bool
) -> RemoteBranch:
    """What the repository holds, asked before the long work begins."""
    try:
        info = api.model_info(repo_id, revision=revision, timeout=ANSWER_SECONDS)
        remote = RemoteBranch(True, info.sha, tuple(sibling.rfilename for sibling in info.siblings or []))
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        if create_pr:
            raise UserError(
                f"There is no {repo_id} to open a pull request in. Check the name, or leave --create-pr out."
            ) from None
        return RemoteBranch(False)
    except RevisionNotFoundError:
        info = api.model_info(repo_id, timeout=ANSWER_SECONDS)
        remote = RemoteBranch(True)
    if private and not info.private:
        raise UserError(
            f"{repo_id} exists and is public, and you asked for a private one. Make it private in its settings, or "
            "give another name."
        )
    if contents.kind is Kind.MODEL and ADAPTER_CONFIG in remote.files:
        raise UserError(
            f"{repo_id} holds a PEFT adapter (adapter_config.json). Beside a whole model, transformers would load the "
            "adapter's base instead of this one. Delete that file there, or publish to another repository."
        )
    if contents.kind is Kind.ADAPTER and "config.json" in remote.files:
        raise UserError(
            f"{repo_id} holds a complete model. With an adapter beside it, transformers would load the adapter's base "
            "instead. Publish the adapter to another repository."
        )
    return remote


def open_pull_request(api: HfApi, repo_id: str, title: str) -> str | None:
    """`refs/pr/N` of the user's own open pull request with this title: its answer may have been lost on the way."""
    own = api.get_repo_discussions(
        repo_id, author=api.whoami()["name"], discussion_type="pull_request", discussion_status="open"
    )
    return next((f"refs/pr/{pull.num}" for pull in own if pull.title == title), None)


def upload(
    api: HfApi,
    contents: Contents,
    repo_id: str,
    *,
    generated: Mapping[str, str] | None = None,
    stale: Iterable[str] = (),
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    parent: str | None = None,
    commit_message: str = "Upload with jai publish",
    console: Console | None = None,
) -> Upload:
    """Put files into one commit of a repository, which is created if it is not there.

    Large files go first, one by one: their content is then on the Hub, though no branch shows it, and a later try does
    not send it again. The commit names all of them, so that a branch has the old files or the new ones. Not
    `HfApi.upload_folder`: that splits large or failing uploads into several commits, each visible.

    Args:
        api: the client, with its token.
        contents: the files; its README.md only if it is among `generated`.
        repo_id: "owner/name".
        generated: texts by path, which go before the folder's own files.
        stale: files of the repository to delete in the same commit.
        private: create the repository as a private one.
        revision: the branch (made where `parent` is not given), or `refs/pr/N`.
        create_pr: open a pull request with the commit.
        parent: head of that branch; the commit is refused if it has moved since.
        commit_message: title of the commit.
        console: where large files are counted.

    Raises:
        UserError: if the Hub refuses or cannot be reached.
    """
    generated = generated or {}
    paths = [path for path in contents.kept if path not in generated and path != README]
    with explained(repo_id, api.token if isinstance(api.token, str) else None):
        additions = [CommitOperationAdd(path, str(contents.folder / path)) for path in paths]
        additions += [CommitOperationAdd(path, text.encode()) for path, text in generated.items()]
        if parent is None and not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        large = [addition for addition in additions if addition.upload_info.size > LARGE_BYTES]
        small = [addition for addition in additions if addition not in large]
        for number, batch in enumerate([[addition] for addition in large] + [small]):
            # No .gitignore of the repository may leave files out.
            api.preupload_lfs_files(repo_id, batch, revision=revision, create_pr=create_pr, gitignore_content="")
            if console and batch is not small:
                sent = f"{batch[0].path_in_repo} ({number + 1} of {len(large)} large files)"
                console.print(f"  On the Hub, not yet visible: {escape(sent)}", highlight=False)
        commit = api.create_commit(
            repo_id,
            [*(CommitOperationDelete(path) for path in stale), *additions],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    pull_request = commit.pr_url
    if pull_request is None and revision and revision.startswith("refs/pr/"):
        pull_request = f"{api.endpoint}/{repo_id}/discussions/{revision.removeprefix('refs/pr/')}"
    return Upload(commit.oid, pull_request)


def _code_files(contents: Contents) -> dict[str, bytes]:
    return {name: (contents.folder / name).read_bytes() for name in contents.kept if name.endswith(".py")}


def _code_tag(contents: Contents) -> str:
    """The tag of this version of the code: whoever has read it once knows it again by its name."""
    listing = "".join(f"{hashlib.sha256(text).hexdigest()} {name}\n" for name, text in _code_files(contents).items())
    return f"code-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


def tagged_code(api: HfApi, contents: Contents, repo_id: str) -> str | None:
    """The commit that this version of the code is tagged at, if it is there already.

    Raises:
        UserError: if the tag is there and the code is another: nobody should trust it.
    """
    tag = _code_tag(contents)
    commit = next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == tag), None)
    if commit is None:
        return None
    there = {entry.path: getattr(entry, "blob_id", None) for entry in api.list_repo_tree(repo_id, revision=commit)}
    for name, text in _code_files(contents).items():
        if there.get(name) != hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest():  # git's name of the content
            raise UserError(
                f"The tag {tag} of {repo_id} points to a commit whose {name} is another. Somebody moved it: look who, "
                "delete it, and publish again."
            )
    return commit


def tag_code(console: Console, api: HfApi, contents: Contents, repo_id: str, commit: str) -> str:
    tag = _code_tag(contents)
    try:
        with explained(repo_id, api.token if isinstance(api.token, str) else None):
            api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
    except UserError as error:
        raise UserError(
            f"Published at commit {commit}, but its code could not be tagged {tag}: {error}\nRun the same command "
            "again: it finds the files there and only tags."
        ) from None
    console.print(f"  The code of this commit is tagged {tag}.", highlight=False)
    return commit


def remote_readme_by_hand(api: HfApi, repo_id: str, remote: RemoteBranch) -> bool:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, README, revision=remote.head, cache_dir=cache)
        return written_by_hand(Path(path).read_text("utf-8", errors="replace"))


def stale_files(contents: Contents, remote: RemoteBranch) -> list[str]:
    """Files of an earlier upload that would now be wrong: a `model.safetensors` beside new shards would be loaded."""
    ours = (path for path in remote.files if in_manifest(path, contents.kind) and path not in contents.kept)
    return [path for path in ours if not any(fnmatchcase(path, pattern) for pattern in _AUTHORS_OWN)]


def fetch_base(api: HfApi, adapter: Adapter, without_weights: Path | None) -> Path:
    """Folder of an adapter's base: of the cache, or the one given, which then gets all but the weights."""
    folder = snapshot_download(
        adapter.base,
        revision=adapter.revision,
        allow_patterns=[*METADATA_PATTERNS, *([] if without_weights else ["*.safetensors"])],
        endpoint=api.endpoint,
        token=api.token,
        local_dir=without_weights,
    )
    return Path(folder)


@contextmanager
def explained(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # `from None`: the client's own errors may quote what was sent, tokens included.
        raise UserError(redact(_explain(error, repo_id), token)) from None


def _explain(error: BaseException, repo_id: str) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            return _explain_status(link, repo_id, str(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set, so the Hub cannot be asked. Unset it and publish again."
    # By name: the client is httpx or httpx2, depending on huggingface_hub's version.
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    said = str(error).strip() or type(error).__name__
    again = "Run the same command again: what has arrived is not sent twice."
    if names & {"TimeoutException", "TimeoutError"}:
        return f"The Hub did not answer in time ({said}). {again}"
    if names & {"ConnectError", "ConnectionRefusedError", "gaierror"}:
        return f"The Hub cannot be reached ({said}). Check the network and HF_ENDPOINT. {again}"
    if names & {"TransportError", "ConnectionError"}:
        return f"The Hub hung up before it answered ({said}). {again}"
    return f"Publishing to {repo_id} failed: {type(error).__name__}: {said}. {again}"


def _explain_status(error: HfHubHTTPError, repo_id: str, raised: str) -> str:
    status = error.response.status_code
    if status == 400:  # the client has put the Hub's findings, as on the README's metadata, into what it raised
        return f"The Hub refused the upload to {repo_id}: {raised.strip()}\nNothing was published."
    said = error.response.headers.get("X-Error-Message") or error.server_message or "no reason given"
    if status == 401:
        return (
            f"The Hub does not accept your access token (401: {said}). Run `hf auth login` with a token from "
            "https://huggingface.co/settings/tokens that may write. Nothing was published."
        )
    if status == 403:
        return (
            f"You may not write to {repo_id} (403: {said}). Use a token with write access, or a namespace of yours. "
            "Nothing was published."
        )
    if status == 404:
        return f"The Hub does not find {repo_id} or its branch (404: {said}). Check the name. Nothing was published."
    if status == 412:
        return f"{repo_id} was changed by somebody else meanwhile (412). Nothing was published; run the command again."
    if status == 429:
        return "The Hub asks for fewer requests (429). Wait a few minutes and run the same command again."
    if status >= 500:
        return (
            f"The Hub has a fault of its own ({status}: {said}). Run the same command again later: what has arrived is "
            "not sent twice."
        )
    return f"The Hub refused the upload to {repo_id} ({status}: {said}). Nothing was published."

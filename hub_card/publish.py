# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint folder to a repository on the Hub, in one commit or not at all."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.markup import escape

from jai.errors import UserError
from jai.hub_card.card import model_card, written_by_hand
from jai.hub_card.check import check_checkpoint, check_files
from jai.hub_card.contents import Contents, in_manifest, size_text
from jai.hub_card.redaction import holds_token, redact

_README = "README.md"
_ANSWER_SECONDS = 30.0  # for the first question to the Hub; the client itself would wait for ever
_AUTHORS_OWN = (_README, "LICENSE*", "NOTICE*", "images/*")  # never deleted from a repository


@dataclass(frozen=True)
class PublishResult:
    """Where the model is now.

    Attributes:
        url: the repository's page.
        commit: hash of the commit, `None` after a dry run.
        revision_line: the line of Python that loads exactly this commit.
    """

    url: str
    commit: str | None
    revision_line: str


@dataclass(frozen=True)
class _Remote:
    """The branch before the upload: its head (`None` where there is no such branch yet) and its files."""

    head: str | None
    files: tuple[str, ...]


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    console: Console | None = None,
    endpoint: str | None = None,
    forward: bool = True,
) -> PublishResult:
    """Check a checkpoint folder, write its model card, and upload both to the Hub.

    The folder is not changed. A README.md that a person wrote, in the folder or in the repository, is kept. Files of an
    earlier upload that are no part of this one (old shards) are deleted in the same commit.

    Args:
        folder: a checkpoint folder; only the files that `manifest` lists are uploaded.
        repo_id: "owner/name", or "name" for the user's own namespace.
        private: create the repository as a private one.
        revision: the branch, "main" by default; it is made where it does not exist.
        dry_run: print the plan, check the files, and stop; asks nothing of the Hub.
        commit_message: title of the commit.
        token: access token; by default `HF_TOKEN`, or that of `hf auth login`.
        console: where the plan is printed.
        endpoint: address of the Hub; by default `HF_ENDPOINT`.
        forward: load the weights and run a forward pass before the upload (see `check_checkpoint`).

    Raises:
        UserError: with one message for whatever went wrong; no token is ever part of it.
    """
    console = console or Console()
    token = _clean_token(token)
    _check_repo_id(repo_id)
    contents = check_files(folder)
    _refuse_tokens(contents, token)
    api = HfApi(endpoint=endpoint, token=token)
    own_readme = _own_readme(contents)
    _print_plan(console, contents, f"{api.endpoint}/{repo_id}", private, revision, own_readme is not None)
    if dry_run:
        console.print("Dry run: nothing was loaded or uploaded.")
        return PublishResult(f"{api.endpoint}/{repo_id}", None, _load_line("AutoModelForCausalLM", repo_id, "<commit>"))

    if token is None:
        raise UserError("You are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN, and publish again.")
    with _explained(repo_id, token):
        repo_id, remote = _look_at_hub(api, repo_id, private, revision)
        keep_remote_readme = (
            own_readme is None and _README in remote.files and _remote_readme_by_hand(api, repo_id, remote)
        )

    console.print("Checking: loading the folder in a clean process…")
    report = check_checkpoint(folder, forward=forward)
    checked = "one forward pass went well" if forward else "names and shapes fit (the weights were not loaded)"
    console.print(f"  {report.parameters:,} parameters, {report.dtype}; {checked}", highlight=False)
    if keep_remote_readme:
        console.print("  The repository's README.md was written by hand and stays.")
    stale = _stale_files(contents, remote)
    if stale:
        console.print(f"  Deleting what is left of an earlier upload: {escape(', '.join(stale))}", highlight=False)

    commit = upload(
        api,
        contents,
        repo_id,
        readme=None if keep_remote_readme else own_readme or model_card(folder, repo_id),
        stale=stale,
        private=private,
        revision=revision,
        parent=remote.head,
        commit_message=commit_message,
    )
    line = _load_line(report.auto_class, repo_id, commit)
    url = f"{api.endpoint}/{repo_id}"
    done = "Nothing had changed" if commit == remote.head else "Published"
    console.print(f"{done}: {url} at commit {commit}", highlight=False, soft_wrap=True)
    console.print("This line loads exactly this commit:")
    console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    return PublishResult(url, commit, line)


def upload(
    api: HfApi,
    contents: Contents,
    repo_id: str,
    *,
    readme: str | None = None,
    stale: Iterable[str] = (),
    private: bool = False,
    revision: str | None = None,
    parent: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Put files into one commit of a repository, which is created if it is not there; the commit's hash.

    Not `HfApi.upload_folder`: with Xet that splits large or failing uploads into several commits, each visible.

    Args:
        api: the client, with its token.
        contents: the files, of which all but README.md are uploaded.
        repo_id: "owner/name".
        readme: text of the README.md; `None` leaves the repository's as it is.
        stale: files of the repository to delete in the same commit.
        private: create the repository as a private one.
        revision: the branch, made where `parent` is not given.
        parent: head of that branch; the commit is refused if it has moved since.
        commit_message: title of the commit.

    Raises:
        UserError: if the Hub refuses or cannot be reached.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in stale]
    paths = [path for path in contents.kept if path != _README]
    message = commit_message or f"Upload {contents.folder.resolve().name} with jai publish"
    with _explained(repo_id, api.token if isinstance(api.token, str) else None):
        operations += [CommitOperationAdd(path, str(contents.folder / path)) for path in paths]
        if readme is not None:
            operations.append(CommitOperationAdd(_README, readme.encode()))
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and parent is None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=parent)
    return commit.oid


def _load_line(auto_class: str, repo_id: str, commit: str) -> str:
    return f'{auto_class}.from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)'


def _clean_token(token: str | None) -> str | None:
    """The token to use, without the line end that a file or a paste adds.

    Refuses what no token is, because the HTTP client would put it into the message of its own error.
    """
    token = (token or get_token() or "").strip()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            "The access token holds blanks or characters that no token has. Copy it again from "
            "https://huggingface.co/settings/tokens, or run `hf auth login`."
        )
    return token or None


def _check_repo_id(repo_id: str) -> None:
    if redact(repo_id) != repo_id:
        raise UserError("An access token stands where the name of the repository should. Give owner/name.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is no name of a repository. Give owner/name, as in my-org/my-jai: letters, digits, '-', '_' "
            "and '.', at most 96 of them."
        ) from error


def _refuse_tokens(contents: Contents, token: str | None) -> None:
    texts = [name for name in contents.kept if not name.endswith((".safetensors", ".model", ".png", ".jpg"))]
    suspects = [name for name in texts if holds_token(contents.folder / name, token)]
    if suspects:
        raise UserError(
            f"An access token stands in {', '.join(suspects)} of {contents.folder}, and would be published. Take it "
            "out (and revoke it, if others could have read it)."
        )


def _own_readme(contents: Contents) -> str | None:
    """The folder's README.md, if a person wrote it."""
    if _README not in contents.kept:
        return None
    try:
        readme = (contents.folder / _README).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{contents.folder / _README} is not in UTF-8 ({error}). Save it as UTF-8.") from error
    return readme if written_by_hand(readme) else None


def _print_plan(
    console: Console, contents: Contents, url: str, private: bool, revision: str | None, own_readme: bool
) -> None:
    kept = {name: size for name, size in contents.kept.items() if name != _README}
    console.print(
        f"Publishing {escape(str(contents.folder))} to {url}"
        f"{', branch ' + escape(revision) if revision else ''} ({'private' if private else 'public'} if it is new)"
    )
    for name, size in kept.items():
        console.print(f"  {escape(name)}  {size_text(size)}", highlight=False)
    readme = "yours, as it is" if own_readme else "generated from the records in the folder"
    console.print(f"  {_README}  ({readme})", highlight=False)
    console.print(f"  together {size_text(sum(kept.values()))} in {len(kept) + 1} files", highlight=False)
    if contents.left_out:
        listed = ", ".join(f"{name} ({size_text(size)})" for name, size in contents.left_out.items())
        console.print(f"Staying here, as they are not in the manifest: {escape(listed)}", highlight=False)


def _look_at_hub(api: HfApi, repo_id: str, private: bool, revision: str | None) -> tuple[str, _Remote]:
    """The repository's whole name and what it holds, asked before the long work begins."""
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.model_info(repo_id, revision=revision, timeout=_ANSWER_SECONDS)
        remote = _Remote(info.sha, tuple(sibling.rfilename for sibling in info.siblings or []))
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return repo_id, _Remote(None, ())
    except RevisionNotFoundError:
        info = api.model_info(repo_id, timeout=_ANSWER_SECONDS)
        remote = _Remote(None, ())
    if private and not info.private:
        raise UserError(
            f"{repo_id} exists and is public, and you asked for a private one. Make it private in its settings, or "
            "give another name."
        )
    if "adapter_config.json" in remote.files:
        raise UserError(
            f"{repo_id} holds a PEFT adapter (adapter_config.json). Beside a whole model, transformers would load the "
            "adapter's base instead of this one. Delete that file there, or publish to another repository."
        )
    return repo_id, remote


def _remote_readme_by_hand(api: HfApi, repo_id: str, remote: _Remote) -> bool:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, _README, revision=remote.head, cache_dir=cache)
        return written_by_hand(Path(path).read_text("utf-8", errors="replace"))


def _stale_files(contents: Contents, remote: _Remote) -> list[str]:
    """Files of an earlier upload that would now be wrong: a `model.safetensors` beside new shards would be loaded."""
    return [
        path
        for path in remote.files
        if in_manifest(path) and path not in contents.kept and not any(fnmatchcase(path, p) for p in _AUTHORS_OWN)
    ]


@contextmanager
def _explained(repo_id: str, token: str | None) -> Iterator[None]:
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

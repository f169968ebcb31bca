# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint folder to a repository on the Hub, in one commit or not at all."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
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
from jai.hub import METADATA_PATTERNS
from jai.hub_card.adapter import Adapter, adapter_card, on_hub, read_adapter
from jai.hub_card.card import card_files, written_by_hand
from jai.hub_card.check import CheckReport, check_checkpoint, check_files
from jai.hub_card.contents import ADAPTER_CONFIG, Contents, Kind, in_manifest, size_text
from jai.provenance import holds_token, redact

_README = "README.md"
_PEFT_README = "# Model Card for Model ID"  # what PEFT leaves beside an adapter: a form to fill in
_ANSWER_SECONDS = 30.0  # for the first question to the Hub; the client itself would wait for ever
_LARGE_BYTES = 10 * 2**20
_AUTHORS_OWN = (_README, "LICENSE*", "NOTICE*", "images/*")  # never deleted from a repository


@dataclass(frozen=True)
class PublishResult:
    """Where the model is now.

    Attributes:
        url: the repository's page, or that of the pull request.
        commit: hash of the commit, `None` after a dry run.
        revision_line: the line of Python that loads exactly this commit, with exactly the code that was checked.
    """

    url: str
    commit: str | None
    revision_line: str


@dataclass(frozen=True)
class Upload:
    """What `upload` did: the commit that holds the files, and the pull request's page where there is one."""

    commit: str
    pull_request: str | None = None


@dataclass(frozen=True)
class _Remote:
    """Whether the repository is there; the branch's head (`None` where there is no such branch yet) and its files."""

    exists: bool
    head: str | None = None
    files: tuple[str, ...] = ()


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    base: str | None = None,
    dry_run: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    console: Console | None = None,
    endpoint: str | None = None,
    forward: bool = True,
) -> PublishResult:
    """Check a checkpoint or an adapter, write its model card, and upload both to the Hub.

    The folder is not changed. A README.md that a person wrote, in the folder or in the repository, is kept. Files of an
    earlier upload that are no part of this one (old shards) are deleted in the same commit. The code is tagged
    `code-HASH`, once for each version of it.

    Args:
        folder: a checkpoint folder or an adapter's; only the files that `manifest` lists are uploaded.
        repo_id: "owner/name", or "name" for the user's own namespace.
        private: create the repository as a private one.
        revision: the branch, "main" by default; it is made where it does not exist.
        create_pr: open a pull request instead of changing the branch; one of the same title that is still open goes on.
        base: of an adapter: the base model's name on the Hub, where the adapter was trained on a folder.
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
    if create_pr and revision is not None:
        raise UserError("--create-pr opens a pull request to main. Leave --revision out.")
    contents = check_files(folder)
    adapter = read_adapter(contents) if contents.kind is Kind.ADAPTER else None
    if base is not None and adapter is None:
        raise UserError(f"--base is for adapters, and {folder} holds a whole model. Leave it out.")
    adapter = on_hub(adapter, base) if adapter else None
    _refuse_tokens(contents, token)
    api = HfApi(endpoint=endpoint, token=token)
    own_readme = _own_readme(contents)
    url = f"{api.endpoint}/{repo_id}"
    _print_plan(console, contents, url, private, "a pull request" if create_pr else revision, own_readme is not None)
    if dry_run:
        console.print("Dry run: nothing was loaded or uploaded.")
        return PublishResult(url, None, _load_line(contents, "AutoModelForCausalLM", repo_id, "<commit>", "<commit>"))

    if token is None:
        raise UserError("You are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN, and publish again.")
    message = commit_message or f"Upload {contents.folder.resolve().name} with jai publish"
    with _explained(repo_id, token):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        remote = _look_at_hub(api, contents, repo_id, private, revision, create_pr)
        if create_pr and (open_one := _open_pull_request(api, repo_id, message)):
            console.print(f"  The open pull request {open_one} has this title and goes on.", highlight=False)
            create_pr, revision = False, open_one
            remote = _look_at_hub(api, contents, repo_id, private, revision, create_pr)
        keep_remote_readme = (
            own_readme is None and _README in remote.files and _remote_readme_by_hand(api, repo_id, remote)
        )
        tagged = _tagged_code(api, contents, repo_id) if remote.exists else None
    if adapter:
        with _explained(adapter.base, token):
            adapter = replace(adapter, revision=api.model_info(adapter.base, revision=adapter.revision).sha)
        console.print(f"The base model is {adapter.base} at commit {adapter.revision}.", highlight=False)

    report = _check(console, api, contents, adapter, forward)
    if keep_remote_readme:
        console.print("  The repository's README.md was written by hand and stays.")
    stale = _stale_files(contents, remote)
    if stale:
        console.print(f"  Deleting what is left of an earlier upload: {escape(', '.join(stale))}", highlight=False)
    generated = {ADAPTER_CONFIG: adapter.config_text()} if adapter else {}
    if own_readme is not None:
        generated[_README] = own_readme
    elif not keep_remote_readme:
        generated |= {_README: adapter_card(contents, adapter, repo_id)} if adapter else card_files(folder, repo_id)

    done = upload(
        api,
        contents,
        repo_id,
        generated=generated,
        stale=stale,
        private=private,
        revision=revision,
        create_pr=create_pr,
        parent=remote.head,
        commit_message=message,
        console=console,
    )
    in_pull_request = create_pr or str(revision).startswith("refs/pr/")
    if contents.kind is Kind.MODEL and not in_pull_request:
        tagged = tagged or _tag_code(console, api, contents, repo_id, done.commit)
    line = _load_line(contents, report.auto_class, repo_id, done.commit, tagged or done.commit)
    url = done.pull_request or f"{api.endpoint}/{repo_id}"
    happened = "Nothing had changed" if done.commit == remote.head else "Published"
    console.print(f"{happened}: {url} at commit {done.commit}", highlight=False, soft_wrap=True)
    console.print("This line loads exactly this commit:")
    console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    return PublishResult(url, done.commit, line)


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
    paths = [path for path in contents.kept if path not in generated and path != _README]
    with _explained(repo_id, api.token if isinstance(api.token, str) else None):
        additions = [CommitOperationAdd(path, str(contents.folder / path)) for path in paths]
        additions += [CommitOperationAdd(path, text.encode()) for path, text in generated.items()]
        if parent is None and not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        large = [addition for addition in additions if addition.upload_info.size > _LARGE_BYTES]
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


def _check(console: Console, api: HfApi, contents: Contents, adapter: Adapter | None, forward: bool) -> CheckReport:
    console.print("Checking: loading it in a clean process, which runs the model code that is published…")
    with tempfile.TemporaryDirectory(prefix="jai-base-") as scratch:
        base = None
        if adapter:
            with _explained(adapter.base, api.token if isinstance(api.token, str) else None):
                base = _fetch_base(api, adapter, None if forward else Path(scratch))
        report = check_checkpoint(
            contents.folder,
            forward=forward,
            base=base,
            source=True,
            source_base=adapter.base_folder if adapter else None,
        )
    if report.difference is None:
        checked = "names and shapes fit (the weights were not loaded)"
    elif report.difference == 0:
        checked = "logits equal to the installed package's, bit for bit"
    else:
        checked = f"logits equal to the installed package's up to {report.difference:.1g}"
    console.print(f"  {report.parameters:,} parameters, {report.dtype}; {checked}", highlight=False)
    return report


def _fetch_base(api: HfApi, adapter: Adapter, without_weights: Path | None) -> Path:
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


def _load_line(contents: Contents, auto_class: str, repo_id: str, commit: str, code: str) -> str:
    if contents.kind is Kind.ADAPTER:  # whose adapter_config.json pins the base, and with it the code
        return f'AutoPeftModelForCausalLM.from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)'
    pinned = f'revision="{commit}", code_revision="{code}"'
    return f'{auto_class}.from_pretrained("{repo_id}", {pinned}, trust_remote_code=True)'


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
    return readme if written_by_hand(readme) and _PEFT_README not in readme else None


def _print_plan(
    console: Console, contents: Contents, url: str, private: bool, target: str | None, own_readme: bool
) -> None:
    kept = {name: size for name, size in contents.kept.items() if name != _README}
    console.print(
        f"Publishing {escape(str(contents.folder))} to {url}"
        f"{', to ' + escape(target) if target else ''} ({'private' if private else 'public'} if it is new)"
    )
    for name, size in kept.items():
        console.print(f"  {escape(name)}  {size_text(size)}", highlight=False)
    readme = "yours, as it is" if own_readme else "generated from the records in the folder"
    console.print(f"  {_README}  ({readme})", highlight=False)
    console.print(f"  together {size_text(sum(kept.values()))} in {len(kept) + 1} files", highlight=False)
    if contents.left_out:
        listed = ", ".join(f"{name} ({size_text(size)})" for name, size in contents.left_out.items())
        console.print(f"Staying here, as they are not in the manifest: {escape(listed)}", highlight=False)


def _look_at_hub(
    api: HfApi, contents: Contents, repo_id: str, private: bool, revision: str | None, create_pr: bool
) -> _Remote:
    """What the repository holds, asked before the long work begins."""
    try:
        info = api.model_info(repo_id, revision=revision, timeout=_ANSWER_SECONDS)
        remote = _Remote(True, info.sha, tuple(sibling.rfilename for sibling in info.siblings or []))
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        if create_pr:
            raise UserError(
                f"There is no {repo_id} to open a pull request in. Check the name, or leave --create-pr out."
            ) from None
        return _Remote(False)
    except RevisionNotFoundError:
        info = api.model_info(repo_id, timeout=_ANSWER_SECONDS)
        remote = _Remote(True)
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
            f"{repo_id} holds a whole model. With an adapter beside it, transformers would load the adapter's base "
            "instead. Publish the adapter to another repository."
        )
    return remote


def _open_pull_request(api: HfApi, repo_id: str, title: str) -> str | None:
    """`refs/pr/N` of the user's own open pull request with this title: its answer may have been lost on the way."""
    own = api.get_repo_discussions(
        repo_id, author=api.whoami()["name"], discussion_type="pull_request", discussion_status="open"
    )
    return next((f"refs/pr/{pull.num}" for pull in own if pull.title == title), None)


def _code_files(contents: Contents) -> dict[str, bytes]:
    return {name: (contents.folder / name).read_bytes() for name in contents.kept if name.endswith(".py")}


def _code_tag(contents: Contents) -> str:
    """The tag of this version of the code: whoever has read it once knows it again by its name."""
    listing = "".join(f"{hashlib.sha256(text).hexdigest()} {name}\n" for name, text in _code_files(contents).items())
    return f"code-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


def _tagged_code(api: HfApi, contents: Contents, repo_id: str) -> str | None:
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


def _tag_code(console: Console, api: HfApi, contents: Contents, repo_id: str, commit: str) -> str:
    tag = _code_tag(contents)
    try:
        with _explained(repo_id, api.token if isinstance(api.token, str) else None):
            api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
    except UserError as error:
        raise UserError(
            f"Published at commit {commit}, but its code could not be tagged {tag}: {error}\nRun the same command "
            "again: it finds the files there and only tags."
        ) from None
    console.print(f"  The code of this commit is tagged {tag}.", highlight=False)
    return commit


def _remote_readme_by_hand(api: HfApi, repo_id: str, remote: _Remote) -> bool:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, _README, revision=remote.head, cache_dir=cache)
        return written_by_hand(Path(path).read_text("utf-8", errors="replace"))


def _stale_files(contents: Contents, remote: _Remote) -> list[str]:
    """Files of an earlier upload that would now be wrong: a `model.safetensors` beside new shards would be loaded."""
    ours = (path for path in remote.files if in_manifest(path, contents.kind) and path not in contents.kept)
    return [path for path in ours if not any(fnmatchcase(path, pattern) for pattern in _AUTHORS_OWN)]


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

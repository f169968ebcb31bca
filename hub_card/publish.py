# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint folder to a repository on the Hub, in one commit or not at all."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jai.errors import UserError
from jai.files import read_json
from jai.hub import is_hub_id
from jai.hub_card.adapter import Adapter, on_hub, read_adapter
from jai.hub_card.check import CheckReport, check_checkpoint, check_files
from jai.hub_card.contents import ADAPTER_CONFIG, Contents, Kind, read_contents, size_text
from jai.hub_card.options import PublishOptions
from jai.hub_card.readme import README, check_metadata, written_by_hand
from jai.provenance import holds_token, redact

if TYPE_CHECKING:
    from rich.console import Console

_PEFT_README = "# Model Card for Model ID"  # what PEFT leaves beside an adapter: a form to fill in


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
class _Checked:
    """What is to be published, after all that can be checked without the Hub and without loading it.

    Attributes:
        contents: the files.
        adapter: what they are an adapter of, None for a whole model.
        own_readme: the folder's README.md where a person wrote it.
        token: access token, None where nobody is logged in.
    """

    contents: Contents
    adapter: Adapter | None
    own_readme: str | None
    token: str | None


def publish(
    options: PublishOptions,
    *,
    token: str | None = None,
    console: Console | None = None,
    endpoint: str | None = None,
) -> PublishResult:
    """Check a checkpoint or an adapter, write its model card, and upload both to the Hub.

    The folder is not changed; only the files of `MANIFEST` are uploaded. A README.md that a person wrote, in the folder
    or in the repository, is kept. Files of an earlier upload that are no part of this one (old shards) are deleted in
    the same commit. The code is tagged `code-HASH`, once for each version of it.

    Args:
        options: what to publish, and where.
        token: access token; by default `HF_TOKEN`, or that of `hf auth login`.
        console: where the plan is printed.
        endpoint: address of the Hub; by default `HF_ENDPOINT`.

    Raises:
        UserError: with one message for whatever went wrong; no token is ever part of it.
    """
    checked = _check_folder(options, token)
    # After the errors that need none of it.
    from huggingface_hub import constants
    from rich.console import Console

    console = console or Console()

    endpoint = endpoint or constants.ENDPOINT
    contents, url = checked.contents, f"{endpoint}/{options.repo_id}"
    _print_plan(console, options, checked, url)
    if options.dry_run:
        console.print("Dry run: nothing was loaded or uploaded.")
        line = _load_line(contents, "AutoModelForCausalLM", options.repo_id, "<commit>", "<commit>")
        return PublishResult(url, None, line)
    if checked.token is None:
        raise UserError("You are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN, and publish again.")
    return _publish_checked(options, checked, checked.token, endpoint, console)


def _check_folder(options: PublishOptions, token: str | None) -> _Checked:
    contents = read_contents(options.folder)
    _check_repo_id(options.repo_id)
    token = _clean_token(token)
    _refuse_tokens(contents, token)  # before any message that might quote a file
    contents = check_files(options.folder)
    adapter = read_adapter(contents) if contents.kind is Kind.ADAPTER else None
    if options.base is not None and adapter is None:
        raise UserError(f"--base is for adapters, and {options.folder} holds a whole model. Leave it out.")
    adapter = on_hub(adapter, options.base) if adapter else None
    return _Checked(contents, adapter, _own_readme(contents), token)


def _publish_checked(
    options: PublishOptions, checked: _Checked, token: str, endpoint: str, console: Console
) -> PublishResult:
    # The Hub's client takes 0.2 seconds to import; what is wrong with the folder has been said without it.
    from huggingface_hub import HfApi
    from rich.markup import escape

    from jai.hub_card import hub_repo

    contents, adapter, own_readme = checked.contents, checked.adapter, checked.own_readme
    api = HfApi(endpoint=endpoint, token=token)
    repo_id, revision, create_pr = options.repo_id, options.revision, options.create_pr
    commit_message = options.commit_message or f"Upload {contents.folder.resolve().name} with jai publish"
    with hub_repo.explained(repo_id, token):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        remote = hub_repo.look_at_hub(api, contents, repo_id, options.private, revision, create_pr)
        if create_pr and (open_one := hub_repo.open_pull_request(api, repo_id, commit_message)):
            console.print(f"  The open pull request {open_one} with this title is continued.", highlight=False)
            create_pr, revision = False, open_one
            remote = hub_repo.look_at_hub(api, contents, repo_id, options.private, revision, create_pr)
        keep_remote_readme = (
            own_readme is None and README in remote.files and hub_repo.remote_readme_by_hand(api, repo_id, remote)
        )
        tagged = hub_repo.tagged_code(api, contents, repo_id) if remote.exists else None
    if adapter:
        with hub_repo.explained(adapter.base, token):
            adapter = replace(adapter, revision=api.model_info(adapter.base, revision=adapter.revision).sha)
        console.print(f"The base model is {adapter.base} at commit {adapter.revision}.", highlight=False)

    console.print("Checking: loading it in a clean process, which runs the model code that is published…")
    with tempfile.TemporaryDirectory(prefix="jai-base-") as scratch:
        base = None
        if adapter:
            with hub_repo.explained(adapter.base, token):
                base = hub_repo.fetch_base(api, adapter, None if options.forward else Path(scratch))
            if adapter.config.get("target_parameters") and _is_quantized(base):
                raise UserError(
                    f"{adapter.base} is quantised, and PEFT cannot put LoRA on quantised experts. Publish the adapter "
                    "for the model in 16 or 32 bits that it was made from, which others can quantise: --base OWNER/NAME"
                )
        report = _check(console, contents, adapter, base, options.forward)
    if keep_remote_readme:
        console.print("  The repository's README.md was written by a person and is kept.")
    stale = hub_repo.stale_files(contents, remote)
    if stale:
        console.print(f"  Deleting what is left of an earlier upload: {escape(', '.join(stale))}", highlight=False)

    done = hub_repo.upload(
        api,
        contents,
        repo_id,
        generated=_generated_files(checked, adapter, repo_id, write_card=not keep_remote_readme),
        stale=stale,
        private=options.private,
        revision=revision,
        create_pr=create_pr,
        parent=remote.head,
        commit_message=commit_message,
        console=console,
    )
    in_pull_request = create_pr or str(revision).startswith("refs/pr/")
    if contents.kind is Kind.MODEL and not in_pull_request:
        tagged = tagged or hub_repo.tag_code(console, api, contents, repo_id, done.commit)
    line = _load_line(contents, report.auto_class, repo_id, done.commit, tagged or done.commit)
    url = done.pull_request or f"{api.endpoint}/{repo_id}"
    happened = "Nothing had changed" if done.commit == remote.head else "Published"
    console.print(f"{happened}: {url} at commit {done.commit}", highlight=False, soft_wrap=True)
    console.print("This line loads exactly this commit:")
    console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    return PublishResult(url, done.commit, line)


def _generated_files(checked: _Checked, adapter: Adapter | None, repo_id: str, *, write_card: bool) -> dict[str, str]:
    """Texts by path that are uploaded in place of the folder's own: the card, and the adapter's pinned base."""
    # The cards' template engine, and of a whole model its configuration class, which brings transformers.
    from jai.hub_card.adapter_card import adapter_card
    from jai.hub_card.card import card_files

    generated = {ADAPTER_CONFIG: adapter.config_text()} if adapter else {}
    if checked.own_readme is not None:
        return {**generated, README: checked.own_readme}
    if not write_card:
        return generated
    if adapter:
        return {**generated, README: adapter_card(checked.contents, adapter, repo_id)}
    return card_files(checked.contents.folder, repo_id)


def _is_quantized(folder: Path) -> bool:
    return bool(read_json(folder / "config.json").get("quantization_config"))


def _check(
    console: Console, contents: Contents, adapter: Adapter | None, base: Path | None, forward: bool
) -> CheckReport:
    # Of one that was trained in few bits the base on the Hub is another than the folder that it names.
    own_base = adapter.base_folder if adapter else None
    report = check_checkpoint(
        contents.folder,
        forward=forward,
        base=base,
        source=True,
        source_base=None if own_base is None or _is_quantized(own_base) else own_base,
    )
    if report.difference is None:
        checked = "names and shapes fit (the weights were not loaded)"
    elif report.difference == 0:
        checked = "logits equal to the installed package's, bit for bit"
    else:
        checked = f"logits equal to the installed package's up to {report.difference:.1g}"
    console.print(f"  {report.parameters:,} parameters, {report.dtype}; {checked}", highlight=False, soft_wrap=True)
    return report


def _load_line(contents: Contents, auto_class: str, repo_id: str, commit: str, code: str) -> str:
    if contents.kind is Kind.ADAPTER:  # whose adapter_config.json pins the base, and with it the code
        return f'AutoPeftModelForCausalLM.from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)'
    pinned = f'revision="{commit}", code_revision="{code}"'
    return f'{auto_class}.from_pretrained("{repo_id}", {pinned}, trust_remote_code=True)'


def _clean_token(token: str | None) -> str | None:
    """The token to use, without the line end that a file or a paste adds.

    Refuses what no token is, because the HTTP client would put it into the message of its own error.
    """
    from huggingface_hub import get_token  # brings more of the client

    token = (token or get_token() or "").strip()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            "The access token holds blanks or characters that no token has. Copy it again from "
            "https://huggingface.co/settings/tokens, or run `hf auth login`."
        )
    return token or None


def _check_repo_id(repo_id: str) -> None:
    if redact(repo_id) != repo_id:
        raise UserError("An access token was given instead of the name of the repository. Give owner/name.")
    if not is_hub_id(repo_id):
        raise UserError(
            f"{repo_id!r} is not a name of a repository. Give owner/name, as in my-org/my-jai: letters, digits, '-', "
            "'_' and '.', at most 96 of them."
        )


def _refuse_tokens(contents: Contents, token: str | None) -> None:
    texts = [name for name in contents.kept if not name.endswith((".safetensors", ".model", ".png", ".jpg"))]
    suspects = [name for name in texts if holds_token(contents.folder / name, token)]
    if suspects:
        raise UserError(
            f"There is an access token in {', '.join(suspects)} of {contents.folder}, and would be published. Take it "
            "out (and revoke it, if others could have read it)."
        )


def _own_readme(contents: Contents) -> str | None:
    """The folder's README.md, if a person wrote it."""
    if README not in contents.kept:
        return None
    try:
        readme = (contents.folder / README).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{contents.folder / README} is not in UTF-8 ({error}). Save it as UTF-8.") from error
    if not written_by_hand(readme) or _PEFT_README in readme:
        return None
    check_metadata(contents.folder / README, readme)
    return readme


def _print_plan(console: Console, options: PublishOptions, checked: _Checked, url: str) -> None:
    from rich.markup import escape

    contents = checked.contents
    kept = {name: size for name, size in contents.kept.items() if name != README}
    target = "a pull request" if options.create_pr else options.revision
    console.print(
        f"Publishing {escape(str(contents.folder))} to {url}"
        f"{', to ' + escape(target) if target else ''} ({'private' if options.private else 'public'} if it is new)"
    )
    for name, size in kept.items():
        console.print(f"  {escape(name)}  {size_text(size)}", highlight=False)
    readme = "generated from the records in the folder" if checked.own_readme is None else "yours, as it is"
    console.print(f"  {README}  ({readme})", highlight=False)
    console.print(f"  together {size_text(sum(kept.values()))} in {len(kept) + 1} files", highlight=False)
    if contents.left_out:
        listed = ", ".join(f"{name} ({size_text(size)})" for name, size in contents.left_out.items())
        console.print(f"Staying here, as they are not in the manifest: {escape(listed)}", highlight=False)

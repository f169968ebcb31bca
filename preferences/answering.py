# SPDX-License-Identifier: Apache-2.0
"""Several answers of a model to each prompt, in a folder in which a killed run goes on."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.endpoint import Endpoint, EndpointClient
from jai.evaluation.judged.checkpoint import CheckpointAsker
from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.models import load_answering_model
from jai.evaluation.options import EvalOptions
from jai.evaluation.reply_cache import ChatReply, ChatRequest, ReplyCache
from jai.files import differences, make_locked_folder, read_json, sha256, write_whole
from jai.preferences.options import AnsweringOptions
from jai.preferences.prompts import PreferencePrompt
from jai.provenance import checkpoint_revision

_PLAN_FILE = "plan.json"  # what decides the answers and what they are worth, written before any of them is there


@dataclass(frozen=True)
class Answered:
    """What a model answered.

    Attributes:
        replies: of each prompt.
        cut_prompts: how many prompts lost their beginning, for they were longer than the model takes.
    """

    replies: list[list[ChatReply]]
    cut_prompts: int = 0


def model_options(options: AnsweringOptions) -> EvalOptions:
    """The same model for `jai.evaluation`."""
    shared = ("model", "backend", "base_url", "batch_size", "device", "dtype", "seed", "trust_remote_code")
    return EvalOptions(**{name: getattr(options, name) for name in shared})


def ask_for_answers(
    options: AnsweringOptions, prompts: Sequence[PreferencePrompt], count: int, cache: ReplyCache, console: Console
) -> Answered:
    """Have the model answer each prompt several times; what it has answered already is not asked again.

    Args:
        options: who answers, and how.
        prompts: what is asked.
        count: answers to each.
        cache: of a server's replies.
        console: where to print.

    Raises:
        UserError: if the model cannot be loaded, or does not answer; what came is kept.
    """
    parameters: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_new_tokens,
    }
    requests = [ChatRequest(prompt.messages, {**parameters}, repeat) for prompt in prompts for repeat in range(count)]
    cut_prompts = 0
    if options.backend == "openai":
        endpoint = Endpoint(url=str(options.base_url), model=options.model, concurrency=options.batch_size)
        client = EndpointClient(endpoint, cache, console=console)
        replies = cast(list[ChatReply], client.ask(requests, "Answering"))  # one that fails for good ends the run
        console.print(f"  Answers: {client.summary()}", markup=False, highlight=False, soft_wrap=True)
    else:
        lm = load_answering_model(model_options(options), chat=True)
        model = KeptAnswers(lm, options.out / ANSWERS_FILE, options.batch_size)
        asker = CheckpointAsker(model, options.model, seed=options.seed, console=console)
        replies = asker.ask(requests, "Answering")
        cut_prompts = asker.cut // count
        if cut_prompts:
            console.print(
                f"  {cut_prompts:,} prompts were longer than the model takes and lost their beginning.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    return Answered(
        [list(replies[number * count : (number + 1) * count]) for number in range(len(prompts))], cut_prompts
    )


def answering_plan(options: AnsweringOptions, count: int) -> dict[str, Any]:
    """What decides the answers, for a record.

    A server is known by the name that its model has there: started again, it may have another address.
    """
    return {
        "prompts_file": options.prompts.name,
        "prompts_sha256": sha256(options.prompts),
        "model": options.model,
        "model_revision": None if options.backend == "openai" else checkpoint_revision(options.model),
        "backend": options.backend,
        "dtype": options.dtype,
        "candidates_each": count,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "limit": options.limit,
    }


@contextmanager
def answers_folder(out: Path, plan: dict[str, Any], what: str) -> Iterator[None]:
    """Make the folder or go on in it, for this process alone.

    Args:
        out: the folder.
        plan: what decides what will lie in it.
        what: it holds, in the plural, for the message.

    Raises:
        UserError: if it holds something else, was begun with another plan, or cannot be written.
    """
    path = out / _PLAN_FILE
    if out.exists() and not path.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and holds no {what}. Give another output folder.")
    lock = make_locked_folder(out)
    try:
        changes = sorted(differences(read_json(path), plan)) if path.exists() else []
        if changes:
            raise UserError(
                f"{out} was begun with other inputs or options: {'; '.join(changes[:3])}. Give the same ones to "
                "resume, or another output folder."
            )
        write_whole(path, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
        yield
    finally:
        (out / "lock").unlink(missing_ok=True)
        os.close(lock)

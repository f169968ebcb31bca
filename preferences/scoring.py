# SPDX-License-Identifier: Apache-2.0
"""`jai score`: a reward model's logit and probability for each row of a file, and the rows above a threshold."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.data import parsed_rows
from jai.evaluation.reply_cache import Message
from jai.files import UnfinishedFolder, resumable_folder, sha256
from jai.hub import METADATA_PATTERNS, local_folder
from jai.preferences.calibration import PAPER_THRESHOLD, Calibration, read_calibration
from jai.preferences.options import ScoreOptions
from jai.preferences.prompts import preference_prompt
from jai.preferences.reward_model import RewardModel
from jai.provenance import checkpoint_revision, versions

SCORED_FILE = "scored.jsonl"
KEPT_FILE = "kept.jsonl"
RECORD_FILE = "scores.json"
_CHUNK = 1000  # rows that are scored together, sorted by length, and kept if the run is interrupted
_ANSWERS = ("completion", "answer", "response", "output", "chosen")


@dataclass(frozen=True)
class ScoredConversation:
    """A row that ends with an answer.

    Attributes:
        messages: the conversation.
        row: all that the file says.
    """

    messages: tuple[Message, ...]
    row: Mapping[str, Any]


def scored_conversation(row: Mapping[str, Any]) -> ScoredConversation:
    """A conversation from a row of a file.

    Args:
        row: with `messages` that end with an answer, or a prompt (`prompt`, `question`) and an answer (`completion`,
            `answer`, `response`, `output` or `chosen`: a text or messages).

    Raises:
        ValueError: if it has no answer.
    """
    messages = row.get("messages")
    if isinstance(messages, list) and messages:
        last = messages[-1]
        asked = preference_prompt({"messages": messages[:-1]}).messages
        if last.get("role") != "assistant" or len(asked) != len(messages) - 1:
            raise ValueError("`messages` does not end with a question and its answer")
        return ScoredConversation((*asked, {"role": "assistant", "content": _text(last.get("content"))}), row)
    asked = preference_prompt(row).messages
    answer = next((row[name] for name in _ANSWERS if row.get(name) is not None), None)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    return ScoredConversation((*asked, {"role": "assistant", "content": _text(answer)}), row)


def _text(content: Any) -> str:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"no answer in `messages`, {', '.join(f'`{name}`' for name in _ANSWERS)}")
    return content


def score_file(options: ScoreOptions, *, console: Console | None = None) -> Path:
    """Score every row of a file; a run that was killed goes on with the same command.

    Args:
        options: of the command line.
        console: where to print; None is standard output.

    Returns:
        The file of scored rows: those of the input, with `reward` (the logit) and `reward_probability` (null where the
        reward model has no calibration).

    Raises:
        UserError: if the file or the reward model cannot be read, or a threshold is given without a calibration.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    options.check()
    calibration = read_calibration(local_folder(options.model, METADATA_PATTERNS))
    if calibration is None and options.keep_above is not None:
        raise UserError(
            f"{options.model} has no calibration, so its logits are not probabilities, and --keep-above is one. Train "
            "it with `jai reward` and held-out pairs (`test_split_size`), or leave --keep-above out."
        )
    count = sum(1 for _ in parsed_rows(options.file, scored_conversation))  # all are read before any is scored
    if not count:
        raise UserError(f"{options.file} has no rows. Give a file with at least one.")
    identity = {
        "file_sha256": sha256(options.file),
        "model": options.model,
        "model_revision": checkpoint_revision(options.model),
        "keep_above": options.keep_above,
    }
    with resumable_folder(options.out, identity) as job:
        _score_chunks(options, calibration, job, count, console)
        shares = _join(options, job, count)
        record = {**identity, "file": options.file.name, "rows": count, **shares, "versions": versions("transformers")}
        (job.folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{count:,} rows scored: {options.out / SCORED_FILE}")
    if calibration is None:
        say(f"No probabilities: {options.model} has no calibration.")
    else:
        share = shares["share_above_paper_threshold"]
        say(
            f"{share:.1%} have a probability above {PAPER_THRESHOLD}. (The JAI-1 paper's {PAPER_THRESHOLD} is on "
            "logits of an unknown scale, so it is another threshold.)"
        )
    if options.keep_above is not None:
        kept = shares["kept"]
        say(f"{kept:,} of {count:,} above {options.keep_above:g} ({kept / count:.1%}): {options.out / KEPT_FILE}")
    return options.out / SCORED_FILE


def _score_chunks(
    options: ScoreOptions, calibration: Calibration | None, job: UnfinishedFolder, count: int, console: Console
) -> None:
    model: RewardModel | None = None
    rows = parsed_rows(options.file, scored_conversation)
    done = 0
    for number, chunk in enumerate(_chunks(rows)):
        name = _chunk_name(number)
        done += len(chunk)
        if name in job.finished:
            continue
        model = model or RewardModel(options.model, device=options.device, trust_remote_code=options.trust_remote_code)
        conversations = [each.messages for each in chunk]
        logits = model.scores(conversations, batch_size=options.batch_size, console=console)
        with (job.folder / name).open("w", encoding="utf-8") as file:
            for each, logit in zip(chunk, logits):
                probability = None if calibration is None else calibration.probability(logit)
                scored = {**each.row, "reward": logit, "reward_probability": probability}
                file.write(json.dumps(scored, ensure_ascii=False) + "\n")
        job.finish(name)
        if count > _CHUNK:
            console.print(f"  {done:,} of {count:,}", highlight=False)


def _chunks(rows: Iterator[ScoredConversation]) -> Iterator[list[ScoredConversation]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _chunk_name(number: int) -> str:
    return f"chunk-{number:06}.jsonl"


def _join(options: ScoreOptions, job: UnfinishedFolder, count: int) -> dict[str, Any]:
    """Join the chunks, and write what is kept; gives how many rows are above the thresholds."""
    above_paper = kept = 0
    has_probability = True
    chunks = [job.folder / _chunk_name(number) for number in range(-(-count // _CHUNK))]
    with (job.folder / SCORED_FILE).open("w", encoding="utf-8") as scored:
        kept_path = job.folder / KEPT_FILE if options.keep_above is not None else Path(os.devnull)
        with kept_path.open("w", encoding="utf-8") as kept_file:
            for chunk in chunks:
                # Not by splitlines(), for which U+2028 inside of a text ends a line, too.
                for line in chunk.read_text(encoding="utf-8").split("\n")[:-1]:
                    scored.write(f"{line}\n")
                    probability = json.loads(line)["reward_probability"]
                    has_probability = has_probability and probability is not None
                    above_paper += probability is not None and probability > PAPER_THRESHOLD
                    if options.keep_above is not None and probability > options.keep_above:
                        kept += 1
                        kept_file.write(f"{line}\n")
    for chunk in chunks:
        chunk.unlink()
    share = above_paper / count if has_probability else None
    return {"share_above_paper_threshold": share, "kept": kept if options.keep_above is not None else None}

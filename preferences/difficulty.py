# SPDX-License-Identifier: Apache-2.0
"""`jai difficulty`: how often a model answers each prompt right, and the prompts that it answers right now and then.

A prompt whose answers are all right or all wrong teaches nothing in reinforcement learning: its rewards are equal.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.answers import require_math_verify, states_right_answer
from jai.evaluation.data import parsed_rows
from jai.evaluation.instructions.scoring import instruction_row, judge_instructions
from jai.evaluation.judged.command import REPLIES_FILE
from jai.evaluation.models import check_chat_template
from jai.evaluation.progress import quiet_libraries
from jai.evaluation.reply_cache import ChatReply, ReplyCache
from jai.files import print_next, write_whole
from jai.preferences.answering import answering_plan, answers_folder, ask_for_answers, model_options
from jai.preferences.options import DifficultyOptions
from jai.preferences.prompts import PreferencePrompt, number_prompts, preference_prompt
from jai.provenance import versions

KEPT_FILE = "prompts.jsonl"
RATES_FILE = "pass_rates.jsonl"
RECORD_FILE = "difficulty.json"
TOO_HARD, TOO_EASY = "too hard", "too easy"


def select_prompts(options: DifficultyOptions, *, console: Console | None = None) -> Path:
    """Have the model answer each prompt several times, and keep the prompts between two shares of right answers.

    What a killed run was answered is kept: the same command asks for the rest. A finished folder can be filtered anew
    by other shares, for nothing.

    Args:
        options: of the command line.
        console: where to print; None is standard output.

    Returns:
        The file of prompts that are kept: the rows as they were, with `pass_rate`.

    Raises:
        UserError: if a prompt has no solution or no instructions, the model cannot be asked, or no prompt is left.
        ModuleNotFoundError: if answers are to be compared and math-verify is not installed.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    options.check()
    if options.by == "answers":
        require_math_verify()
    quiet_libraries()
    check_chat_template(model_options(options))
    read = list(parsed_rows(options.prompts, preference_prompt))
    prompts = [
        _with_system(each, options.system_prompt)
        for each in number_prompts(read, str(options.prompts))[: options.limit]
    ]
    checks = [_check_of(each, options) for each in prompts]
    plan = {
        **answering_plan(options, options.candidates),
        "by": options.by,
        "language": options.language if options.by == "checks" else None,
        "system_prompt": options.system_prompt,
    }
    with answers_folder(options.out, plan, "pass rates"):
        say(f"{len(prompts):,} prompts, {options.candidates} answers each from {options.model}")
        cache = ReplyCache(options.out / REPLIES_FILE)
        answered = ask_for_answers(options, prompts, options.candidates, cache, console)
        counts: Counter[str] = Counter()
        rates = [_pass_rate(replies, check, counts) for replies, check in zip(answered.replies, checks)]
        left_out = Counter(filter(None, (_why_left_out(rate, options) for rate in rates)))
        kept = [(each, rate) for each, rate in zip(prompts, rates) if _why_left_out(rate, options) is None]
        lines = [{"id": each.id, "pass_rate": rate} for each, rate in zip(prompts, rates)]
        write_whole(options.out / RATES_FILE, "".join(json.dumps(line) + "\n" for line in lines))
        rows = [json.dumps({**each.row, "pass_rate": rate}, ensure_ascii=False) + "\n" for each, rate in kept]
        write_whole(options.out / KEPT_FILE, "".join(rows))
        record = plan | {
            "base_url": options.base_url,
            "min_pass_rate": options.min_pass_rate,
            "max_pass_rate": options.max_pass_rate,
            "prompts": len(prompts),
            "kept": len(kept),
            "left_out": dict(left_out),
            "prompts_by_pass_rate": _histogram(rates),
            "answers": dict(counts),
            "cut_prompts": answered.cut_prompts,
            "versions": versions("transformers"),
        }
        write_whole(options.out / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    rates_text = f"from {options.min_pass_rate:g} to {options.max_pass_rate:g}"
    say(f"{len(kept):,} of {len(prompts):,} prompts are answered right at a rate {rates_text}.")
    for reason, count in left_out.items():
        say(f"  left out: {count:,} ({reason})")
    for rate, count in _histogram(rates).items():
        say(f"  right at a rate of {rate}: {count:,} prompts")
    if unfinished := counts["cut off at --max-new-tokens"]:
        say(f"  {unfinished:,} answers were cut off at --max-new-tokens, and are judged as they are.")
    if not kept:
        raise UserError(
            f"No prompt is left; {options.out / RECORD_FILE} says why. Everything that was answered is kept: try "
            "another --min-pass-rate or --max-pass-rate."
        )
    say(f"They are in {options.out / KEPT_FILE}.")
    print_next(console, ["jai", "grpo", "--config", "recipes/grpo.yaml", "--dataset_name", options.out / KEPT_FILE])
    return options.out / KEPT_FILE


def _with_system(prompt: PreferencePrompt, system: str | None) -> PreferencePrompt:
    if system is None or prompt.messages[0]["role"] == "system":
        return prompt
    return replace(prompt, messages=({"role": "system", "content": system}, *prompt.messages))


def _check_of(prompt: PreferencePrompt, options: DifficultyOptions) -> Callable[[str], bool]:
    """What tells a right answer to a prompt.

    Raises:
        UserError: naming a prompt that has nothing to tell it by.
    """
    if options.by == "checks":
        row = instruction_row(prompt.row, options.language)
        return lambda text: all(judge_instructions(row, text).strict)
    solution = next((prompt.row[name] for name in ("solution", "answer") if prompt.row.get(name) is not None), None)
    if not isinstance(solution, str | int | float) or not str(solution).strip():
        raise UserError(
            f"Prompt {prompt.id} has no `solution` or `answer`, so no answer to it can be told right. Leave it out, or "
            "take --by checks for rows with instructions."
        )
    return lambda text: states_right_answer(text, str(solution), question=prompt.text)


def _pass_rate(replies: Sequence[ChatReply], is_right: Callable[[str], bool], counts: Counter[str]) -> float:
    """The share of right answers."""
    counts["cut off at --max-new-tokens"] += sum(reply.finish_reason == "length" for reply in replies)
    right = sum(is_right(reply.text) for reply in replies)
    counts["right"] += right
    counts["wrong"] += len(replies) - right
    return right / len(replies)


def _why_left_out(rate: float, options: DifficultyOptions) -> str | None:
    if rate < options.min_pass_rate:
        return TOO_HARD
    return TOO_EASY if rate > options.max_pass_rate else None


def _histogram(rates: Sequence[float]) -> dict[str, int]:
    """Prompts by their rate, of which there are as many as answers to a prompt, and one more."""
    counted = Counter(rates)
    return {f"{rate:.3g}": counted[rate] for rate in sorted(counted)}

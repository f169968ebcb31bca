# SPDX-License-Identifier: Apache-2.0
"""`jai pairs`: candidates, what they are worth, and pairs of the best and the worst, with a record of all of it."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.data import parsed_rows
from jai.evaluation.endpoint import EndpointClient
from jai.evaluation.judged.command import REPLIES_FILE
from jai.evaluation.judged.measure import Judge
from jai.evaluation.judged.prompts import FACTS, LATER_TURN_GRADE, SINGLE_GRADE, prompts_hash
from jai.evaluation.models import check_chat_template
from jai.evaluation.progress import quiet_libraries
from jai.evaluation.reply_cache import ReplyCache
from jai.files import print_next, sha256, write_whole
from jai.hub import METADATA_PATTERNS, local_folder
from jai.preferences.answering import answering_plan, answers_folder, ask_for_answers, model_options
from jai.preferences.calibration import Calibration, read_calibration
from jai.preferences.candidates import Candidate, OtherAnswers, add_off_policy, keep_candidates, other_answers
from jai.preferences.options import PairsOptions
from jai.preferences.pairing import LengthBias, PairingRule, PreferencePair, make_preference_pairs
from jai.preferences.prompts import number_prompts, preference_prompt
from jai.preferences.reward_model import RewardModel
from jai.preferences.scores import Scores, fact_questions, scores_by_checks, scores_by_facts, scores_by_grade
from jai.provenance import checkpoint_revision, versions

PAIRS_FILE = "pairs.jsonl"
RECORD_FILE = "pairs.json"


@dataclass(frozen=True)
class _Outcome:
    """What came of the prompts.

    Attributes:
        pairs: the pairs.
        candidates: how many answers competed.
        off_policy: how many of these are other models'.
        before, after: the length bias, before and after pairs of very different lengths were dropped.
        dropped: what is not in the pairs, by reason.
    """

    pairs: list[PreferencePair]
    candidates: int
    off_policy: int
    before: LengthBias | None
    after: LengthBias | None
    dropped: dict[str, int]


def make_pairs(options: PairsOptions, *, console: Console | None = None) -> Path:
    """Make preference pairs: the model answers each prompt several times, and its best answer is paired with its worst.

    What a killed run was answered is kept: the same command asks for the rest. A finished folder can be paired anew
    with another margin or length ratio, for nothing.

    Args:
        options: of the command line.
        console: where to print; None is standard output.

    Returns:
        The file of pairs, in TRL's form (`prompt`, `chosen`, `rejected`), each row with its judge and its scores.

    Raises:
        UserError: if a file is malformed, the model or the judge cannot be asked, or no prompt has a pair.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    options.check()
    quiet_libraries()
    check_chat_template(model_options(options))
    work, plan = _Work(options, console), _plan(options)
    with answers_folder(options.out, plan, "pairs"):
        count = f"{len(work.prompts):,} prompts, {options.candidates} answers each from {options.model}"
        say(f"{count}, told apart by {plan['judge']}")
        if options.by == "reward" and work.calibration is None:
            say(f"  {options.reward_model} has no calibration: scores and --min-margin are in logits.")
        elif options.by == "reward":
            say("  Scores and --min-margin are calibrated probabilities.")
        outcome = work.run()
        write_whole(options.out / PAIRS_FILE, "".join(_row(pair, plan["judge"]) + "\n" for pair in outcome.pairs))
        record = (
            plan
            | _record(outcome, options)
            | {
                "prompts": len(work.prompts),
                "cut_prompts": work.cut_prompts,
                "judge_calls_itself": work.judge_calls_itself,
            }
        )
        write_whole(options.out / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _report(outcome, len(work.prompts), console)
    if not outcome.pairs:
        raise UserError(
            f"No prompt has a pair; {options.out / RECORD_FILE} says why. Everything that was answered is kept: try "
            "another --min-margin or --max-length-ratio, or more --candidates."
        )
    say(f"The pairs are in {options.out / PAIRS_FILE}.")
    print_next(console, ["jai", "dpo", "--config", "recipes/dpo.yaml", "--dataset_name", options.out / PAIRS_FILE])
    return options.out / PAIRS_FILE


class _Work:
    """The inputs, read and checked before anyone is asked, and what is done with them.

    Attributes:
        prompts: what is asked.
        judge_calls_itself: names of the judge by its own word.
        calibration: of the reward model, where one decides and has it.
        cut_prompts: how many lost their beginning, for they were longer than the model takes.
    """

    def __init__(self, options: PairsOptions, console: Console):
        self._options = options
        self._console = console
        self.judge_calls_itself: list[str] = []
        self.cut_prompts = 0
        read = list(parsed_rows(options.prompts, preference_prompt))
        self.prompts = number_prompts(read, str(options.prompts))[: options.limit]
        self._others: list[OtherAnswers] = []
        if options.off_policy is not None:
            self._others = list(parsed_rows(options.off_policy, other_answers))
        self._facts = fact_questions(self.prompts) if options.by == "facts" else []
        self.calibration = _calibration(options)
        if options.by == "checks":
            scores_by_checks(self.prompts, [[] for _ in self.prompts], options.language)

    def run(self) -> _Outcome:
        """Ask, score and pair."""
        options, dropped = self._options, Counter[str]()
        cache = ReplyCache(options.out / REPLIES_FILE)
        judge = self._judge(cache)
        candidates = self._candidates(cache, dropped)
        added = add_off_policy(self.prompts, candidates, self._others, dropped) if self._others else 0
        scores = self._scores(candidates, judge, dropped)
        if judge:
            self.judge_calls_itself = sorted(judge.client.counts.models)
            self._say(f"  Judge: {judge.client.summary()}")
        rule = PairingRule(options.margin, options.by in ("facts", "checks"), options.max_length_ratio)
        pairs, before, after = make_preference_pairs(self.prompts, candidates, scores, rule, dropped)
        counted = {reason: count for reason, count in dropped.items() if count}
        return _Outcome(pairs, sum(map(len, candidates)), added, before, after, counted)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _judge(self, cache: ReplyCache) -> Judge | None:
        options = self._options
        if options.by not in ("judge", "facts"):
            return None
        client = EndpointClient(options.endpoint_of_judge(), cache, console=self._console)
        judge = Judge(client, options.parameters_of_judge(), options.repeats)
        judge.probe()
        return judge

    def _candidates(self, cache: ReplyCache, dropped: Counter[str]) -> list[list[Candidate]]:
        answered = ask_for_answers(self._options, self.prompts, self._options.candidates, cache, self._console)
        self.cut_prompts = answered.cut_prompts
        return [keep_candidates(replies, dropped) for replies in answered.replies]

    def _scores(self, candidates: Sequence[Sequence[Candidate]], judge: Judge | None, dropped: Counter[str]) -> Scores:
        options = self._options
        if judge is not None:
            if options.by == "judge":
                return scores_by_grade(self.prompts, candidates, judge, dropped)
            return scores_by_facts(self._facts, candidates, judge, dropped)
        if options.by == "checks":
            return scores_by_checks(self.prompts, candidates, options.language)
        model = RewardModel(
            str(options.reward_model), device=options.device, trust_remote_code=options.trust_remote_code
        )
        conversations = [
            [*prompt.messages, {"role": "assistant", "content": each.answer}]
            for prompt, some in zip(self.prompts, candidates)
            for each in some
        ]
        scores = model.scores(conversations, batch_size=options.batch_size, console=self._console)
        if self.calibration is not None:
            scores = [self.calibration.probability(logit) for logit in scores]
        left = iter(scores)
        return [[next(left) for _ in some] for some in candidates]


def _calibration(options: PairsOptions) -> Calibration | None:
    """The calibration of the reward model of --by reward.

    Raises:
        UserError: if it says that the model takes worse answers for the better ones.
    """
    if options.reward_model is None:
        return None
    calibration = read_calibration(local_folder(options.reward_model, METADATA_PATTERNS))
    if calibration is not None and calibration.slope <= 0:
        raise UserError(
            f"The calibration of {options.reward_model} has the slope {calibration.slope:.3g}: of held-out pairs it "
            "gave the rejected answers the higher logits. Train it anew, with more pairs or for longer."
        )
    return calibration


def _plan(options: PairsOptions) -> dict[str, Any]:
    plan: dict[str, Any] = {
        **answering_plan(options, options.candidates),
        "off_policy_sha256": sha256(options.off_policy) if options.off_policy else None,
        "by": options.by,
        "judge": _judge_name(options),
    }
    if options.by == "reward":
        calibration = _calibration(options)
        plan |= {
            "score": "logit" if calibration is None else "calibrated probability",
            "reward_model_revision": checkpoint_revision(str(options.reward_model)),
            "calibration": None if calibration is None else dataclasses.asdict(calibration),
        }
    if options.by in ("judge", "facts"):
        told = [FACTS] if options.by == "facts" else [SINGLE_GRADE, LATER_TURN_GRADE]
        plan |= {
            "judge_prompt_hash": prompts_hash(told),
            "judge_parameters": options.parameters_of_judge(),
            "repeats": options.repeats,
        }
    return plan


def _judge_name(options: PairsOptions) -> str:
    named = {"reward": options.reward_model, "checks": f"jai.evaluation.instructions ({options.language})"}
    return str(named.get(options.by, options.judge_model))


def _record(outcome: _Outcome, options: PairsOptions) -> dict[str, Any]:
    """What is known of the pairs, for a JSON record, with what the plan leaves open: the address, the thresholds."""
    return {
        "base_url": options.base_url,
        "min_margin": options.margin,
        "max_length_ratio": options.max_length_ratio,
        "candidates": outcome.candidates,
        "off_policy_candidates": outcome.off_policy,
        "pairs": len(outcome.pairs),
        "pairs_by_category": dict(Counter(pair.prompt.category or "" for pair in outcome.pairs)),
        "pairs_by_origin": _origins(outcome.pairs),
        "dropped": outcome.dropped,
        "length_bias_before": outcome.before and dataclasses.asdict(outcome.before),
        "length_bias_after": outcome.after and dataclasses.asdict(outcome.after),
        "versions": versions("transformers"),
    }


def _origins(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    return dict(Counter(f"{pair.chosen.origin} over {pair.rejected.origin}" for pair in pairs))


def _row(pair: PreferencePair, judge: str) -> str:
    row = {
        "prompt": [dict(message) for message in pair.prompt.messages],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "id": pair.prompt.id,
        "category": pair.prompt.category,
        "judge": judge,
        "score_chosen": pair.chosen_score,
        "score_rejected": pair.rejected_score,
        "chosen_from": pair.chosen.origin,
        "rejected_from": pair.rejected.origin,
    }
    return json.dumps(row, ensure_ascii=False)


def _report(outcome: _Outcome, prompts: int, console: Console) -> None:
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{len(outcome.pairs):,} pairs of {prompts:,} prompts and {outcome.candidates:,} answers.")
    for reason, count in outcome.dropped.items():
        say(f"  dropped: {count:,} ({reason})")
    for origins, count in _origins(outcome.pairs).items() if outcome.off_policy else ():
        say(f"  {origins}: {count:,}")
    for when, bias in (("before", outcome.before), ("after", outcome.after)):
        if bias is not None:
            say(
                f"  length bias {when} pairs were dropped by length: the chosen answer is the longer one in "
                f"{100 * bias.longer:.0f} % of {bias.pairs:,} pairs, and {bias.ratio:.2f} times as long in the mean"
            )

# SPDX-License-Identifier: Apache-2.0
"""Damaged files and values of every kind: never a traceback, never exit code 0 with a result that is not whole.

Each target runs `jai` in this process, hundreds of times on tiny checkpoints. `make test` takes the same examples every
time; `make test-slow` takes new ones, for JAI_FUZZ_SECONDS in all (600). The figures are printed at the end of the run.
"""

import contextlib
import gzip
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from damage import VALUES, Damage, changed_rows, damages, damages_of, hard_linked
from huggingface_hub import constants
from hypothesis import strategies as st
from json_lines import write_rows
from pyarrow import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig

from chat_endpoint import ChatEndpoint
from fuzzing import SECONDS, Figures, Outcome, check_nothing_left, check_outcome, check_whole, fuzz, no_hanging, run
from jai import JaiForSequenceClassification
from jai.cli.verb import VERBS, Verb
from jai.errors import UserError
from jai.evaluation.results import Item, mean_figure, open_run
from jai.options import Option, options_of
from jai.trainers.arguments import JaiTrainingArguments, StageArguments
from jai.trainers.cpo import JaiCPOConfig
from jai.trainers.data import load_training_data
from jai.trainers.data_arguments import DataArguments
from jai.trainers.dpo import JaiDPOConfig
from jai.trainers.grpo import JaiGRPOConfig
from jai.trainers.orpo import JaiORPOConfig
from jai.trainers.reward import JaiRewardConfig
from jai.trainers.rows import DatasetType
from jai.trainers.sft import JaiSFTConfig
from loopback_hub import LoopbackHub

pytestmark = pytest.mark.usefixtures("within_bounds")

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


# --- Checkpoints ---


def verdict(request: str) -> str:
    return "ABC"[len(request) % 3] if "[[A]]" in request else str(len(request) % 10 + 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_phi3, tiny_tokenizer, tiny_config, sentences) -> Iterator[Path]:
    """A folder with one of each kind that a verb reads; a judge answers at the address in its `judge_url`."""
    home = tmp_path_factory.mktemp("fuzz")
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": len(tiny_tokenizer)}
    base = tiny_phi3(home / "base", **shape)
    tiny_tokenizer.save_pretrained(base)
    wide = tiny_phi3(home / "wide-base", **{**shape, "hidden_size": 64, "intermediate_size": 64})
    tiny_tokenizer.save_pretrained(wide)
    sharded = AutoModelForCausalLM.from_pretrained(tiny_phi3(home / "other", seed=1, **shape))
    sharded.to(torch.bfloat16).save_pretrained(home / "sharded", max_shard_size="30KB")
    blocks = ("--block-size", "1", "--block-repeats", "1,2", "--experts")
    for words in (
        ("convert", base, home / "jai", *blocks, "2"),
        ("convert", home / "other", home / "jai-2", *blocks, "2"),
        ("convert", base, home / "dense", *blocks, "1"),
        ("convert", home / "other", home / "trained", *blocks, "1"),
        ("snapshot", home / "trained", home / "snapshot"),
        ("convert", base, home / "plain", "--layers", "0-1", "--experts", "2"),
        ("convert", wide, home / "wide", "--layers", "0-1", "--experts", "2"),
    ):
        assert run(*words).code == 0
    (home / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "me/base", "r": 2}
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["q_proj"]}))
    weights = {f"base_model.model.model.layers.0.q_proj.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(weights, home / "adapter" / "adapter_model.safetensors")
    (home / "lora").mkdir()
    sound = {**adapter, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(home / "jai")}
    (home / "lora" / "adapter_config.json").write_text(json.dumps(sound))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 16), f"{name}B.weight": torch.ones(16, 2)}
    save_file(factors, home / "lora" / "adapter_model.safetensors")
    (home / "text.txt").write_text("".join(f"{sentence}\n\n" for sentence in sentences * 4), encoding="utf-8")
    write_rows(home / "chats.jsonl", [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}])
    write_rows(home / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    write_rows(home / "rated.jsonl", [{"prompt": "a", "completion": "b", "label": good} for good in (True, False)])
    corpus = {"sources": [{"name": "t", "text": [str(home / "text.txt")], "language": "th"}]}
    (home / "corpus.yaml").write_text(yaml.safe_dump(corpus), encoding="utf-8")
    for run_folder in (home / "run", home / "run-2"):
        with open_run(run_folder, model="m", revision="r") as evaluation:
            evaluation.add([Item("s", "t", str(number), "acc", number % 2) for number in range(4)])
            items = [*evaluation.items.values()]
            evaluation.replace_figures("s", [mean_figure(items, suite="s", name="t", metric="acc")])
            evaluation.finish()
    (home / "trained-run").mkdir()
    history = [{"step": step, "loss": 3.0 - step, "learning_rate": 1e-3, "grad_norm": 1.0} for step in range(3)]
    (home / "trained-run" / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 2}))
    write_what_is_judged(home, tiny_config, tiny_tokenizer)
    with ChatEndpoint(lambda request, before: f"[[{verdict(str(request))}]]") as judge:
        (home / "judge_url").write_text(judge.url)
        yield home


def write_what_is_judged(home: Path, tiny_config: Callable, tiny_tokenizer: Any) -> None:
    """Prompts, answers and questions, a reward model, and an ablation's file."""
    reward_model = JaiForSequenceClassification(
        tiny_config(vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=24, num_labels=1)
    )
    reward_model.save_pretrained(home / "reward")
    tiny_tokenizer.save_pretrained(home / "reward")
    (home / "prompts").mkdir()
    prompts = ("A", "ก", "hi there")
    write_rows(home / "prompts" / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_rows(home / "others.jsonl", [{"prompt": prompt, "answers": ["yes", "hello"]} for prompt in prompts])
    for folder, rows in (
        ("problems", [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "solution": 4}]),
        ("replies", [{"question": "A?", "response": "ดี"}, {"question": "B?", "response": "<think>a</think>ดี"}]),
    ):
        (home / folder).mkdir()
        write_rows(home / folder / f"{folder}.jsonl", rows)
    write_rows(home / "texts.jsonl", [{"text": f"ข้อความ {number} สวัสดี"} for number in range(400)])
    (home / "data").mkdir()
    questions = [{"question_id": n, "category": "math", "turns": ["1?", "2?"], "reference": ["a", "b"]} for n in (0, 1)]
    write_rows(home / "data" / "mt_bench_th.jsonl", questions)
    choices = {"choice1": "ก", "choice2": "ข", "question": "effect"}
    (home / "data" / "cambridgeltl" / "xcopa" / "th").mkdir(parents=True)
    rows = [{"premise": f"A {n}.", "label": n % 2, **choices} for n in range(4)]
    write_rows(home / "data" / "cambridgeltl" / "xcopa" / "th" / "test.jsonl", rows)
    suite = {"title": "T", "about": "A", "language": "th", "tasks": [{"task": "xcopa_th", "metric": "acc", "shots": 0}]}
    (home / "suite.yaml").write_text(yaml.safe_dump(suite | {"means": [{"name": "mean", "over": "tasks"}]}))
    (home / "answers").mkdir()
    for name in ("first", "second"):
        answers = [{"id": str(n), "answers": [name, "b"], "questions": ["1?", "2?"]} for n in (0, 1)]
        write_rows(home / "answers" / f"{name}.jsonl", answers)
    ablation = {
        "languages": [{"name": "Thai", "texts": [str(home / "texts.jsonl")]}],
        "arms": [{"name": "base"}],
        "training": {"tokens": 64, "context": 8, "batch_rows": 4, "warmup_steps": 1, "dtype": "float32"},
        "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        "base": str(home / "base"),
        "seeds": [0],
        "heldout_every": 4,
        "heldout_characters": 20,
        "piece_characters": 40,
    }
    for folder, content in (("ablation", ablation), ("corpus", yaml.safe_load((home / "corpus.yaml").read_text()))):
        (home / folder).mkdir()
        (home / folder / f"{folder}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@dataclass(frozen=True)
class Work:
    """A verb with an input that is damaged: DAMAGED among its words, and OUT for what it makes."""

    damaged: str
    words: tuple[str, ...]

    @property
    def verb(self) -> str:
        """Its name, of one word or two."""
        first, second = self.words[:2]
        return f"{first} {second}" if first in ("eval", "tokenizer") else first


BLOCKS = ("--block-size", "1", "--block-repeats", "1,2", "--experts", "2")
SHORT = ("--candidates", "2", "--max-new-tokens", "2")
REWARD = (*SHORT, "--off-policy", "the/others.jsonl", "--by", "reward", "--reward-model")  # its own answers are cut off
JUDGE = ("--judge-url", "the/judge_url", "--judge-model", "judge", "--judge-attempts", "1")
WORKS = {
    "convert": Work("base", ("convert", "DAMAGED", "OUT", *BLOCKS)),
    "convert, shards": Work("sharded", ("convert", "DAMAGED", "OUT", *BLOCKS, "--dtype", "float16")),
    "convert, tokenizer": Work("base", ("convert", "the/base", "OUT", *BLOCKS, "--tokenizer", "DAMAGED")),
    "snapshot": Work("dense", ("snapshot", "DAMAGED", "OUT")),
    "upcycle": Work("dense", ("upcycle", "DAMAGED", "OUT", "--snapshots", "the/trained", "--experts", "3")),
    "upcycle, snapshot": Work(
        "snapshot", ("upcycle", "the/dense", "OUT", "--snapshots", "DAMAGED", "--base-weights", "first")
    ),
    "merge": Work("jai", ("merge", "OUT", "--models", "DAMAGED", "the/jai-2")),
    "merge, second": Work("sharded", ("merge", "OUT", "--models", "the/other", "DAMAGED", "--method", "slerp")),
    "export": Work("plain", ("export", "DAMAGED", "OUT")),
    "quantize": Work("wide", ("quantize", "DAMAGED", "OUT")),
    "merge-adapter": Work("lora", ("merge-adapter", "DAMAGED", "OUT", "--base", "the/jai")),
    "inspect": Work("jai", ("inspect", "DAMAGED")),
    "publish": Work("jai", ("publish", "DAMAGED", "me/model", "--dry-run")),
    "publish, adapter": Work("adapter", ("publish", "DAMAGED", "me/model", "--dry-run")),
    "pack": Work("corpus", ("pack", "OUT", "--config", "DAMAGED/corpus.yaml", "--tokenizer", "the/jai")),
    "report": Work("trained-run", ("report", "DAMAGED", "--out", "OUT")),
    "eval compare": Work("run", ("eval", "compare", "the/run", "DAMAGED")),
    "eval pairwise": Work(
        "answers",
        (
            "eval",
            "pairwise",
            "the/answers/first.jsonl",
            "DAMAGED/second.jsonl",
            *JUDGE,
            "--data",
            "the/data",
            "--out",
            "OUT",
        ),
    ),
    "generate": Work("jai", ("generate", "DAMAGED", "A", "--max-new-tokens", "2")),
    "eval run": Work(
        "jai",
        ("eval", "run", "DAMAGED", "--suite", "the/suite.yaml", "--data", "the/data", "--limit", "1", "--out", "OUT"),
    ),
    "pairs": Work("jai", ("pairs", "the/prompts/prompts.jsonl", "OUT", "--model", "DAMAGED", *REWARD, "the/reward")),
    "pairs, reward model": Work(
        "reward", ("pairs", "the/prompts/prompts.jsonl", "OUT", "--model", "the/jai", *REWARD, "DAMAGED")
    ),
    "pairs, prompts": Work(
        "prompts", ("pairs", "DAMAGED/prompts.jsonl", "OUT", "--model", "the/jai", *REWARD, "the/reward")
    ),
    "difficulty": Work(
        "problems",
        ("difficulty", "DAMAGED/problems.jsonl", "OUT", "--model", "the/jai", *SHORT, "--min-pass-rate", "0"),
    ),
    "eval language": Work("replies", ("eval", "language", "DAMAGED/replies.jsonl")),
    "score": Work("reward", ("score", "the/chats.jsonl", "OUT", "--model", "DAMAGED")),
    "tokenizer ablate": Work("ablation", ("tokenizer", "ablate", "--config", "DAMAGED/ablation.yaml", "--out", "OUT")),
}
EXAMPLES = {"convert": 80, "convert, shards": 40} | dict.fromkeys(
    (
        *("pack", "report", "eval compare", "eval pairwise", "eval run", "eval language", "generate", "pairs"),
        *("pairs, reward model", "pairs, prompts", "difficulty", "score", "tokenizer ablate"),
    ),
    4,
)
# What these have done when they end with an error is gone on with.
RESUMABLE = ("eval run", "eval pairwise", "pairs", "difficulty", "tokenizer ablate")


@dataclass(frozen=True)
class Names:
    """What stands for the words of a line that name something: OUT and the like, and what lies in `the`."""

    home: Path
    others: Mapping[str, Path]

    def given(self, word: str) -> str:
        first, *rest = word.split("/")
        if word == "the/judge_url":
            return (self.home / "judge_url").read_text()
        if first in self.others:
            return str(Path(self.others[first], *rest))
        path = Path(self.home, *rest)
        return str(path) if first == "the" and path.exists() else word


def check_damage(checkpoints: Path, work: Work, damage: Damage) -> Outcome:
    with tempfile.TemporaryDirectory(dir=checkpoints) as folder:
        out = Path(folder) / "out"
        damaged = hard_linked(checkpoints / work.damaged, Path(folder) / "damaged")
        damage.lay_on(damaged)
        names = Names(checkpoints, {"OUT": out, "DAMAGED": damaged})
        outcome = run(*map(names.given, work.words))
        check_outcome(outcome)
        if outcome.code and work.verb not in RESUMABLE:
            check_nothing_left(out)
        elif (out / "config.json").exists():
            check_whole(out, forward=not damage.file.endswith(".safetensors"))
        return outcome


@pytest.mark.parametrize("name", WORKS)
def test_damaged_checkpoints(checkpoints, figures, name):
    fuzz_damages(checkpoints, figures, name, None)


@pytest.mark.parametrize("name", WORKS)
def test_what_is_not_damaged_is_taken(checkpoints, name):
    """Else a target would refuse everything, and find nothing."""
    folder = checkpoints / WORKS[name].damaged
    file = next(path for path in sorted(folder.rglob("*")) if path.is_file())
    nothing = Damage(str(file.relative_to(folder)), "nothing", file.read_bytes())
    outcome = check_damage(checkpoints, WORKS[name], nothing)
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("name", WORKS)
def test_damaged_checkpoints_for_minutes(checkpoints, figures, name):
    fuzz_damages(checkpoints, figures, name, SECONDS / 2 / len(WORKS))


def fuzz_damages(checkpoints: Path, figures: Figures, name: str, seconds: float | None) -> None:
    work = WORKS[name]

    def check(damage: Damage) -> None:
        figures.add(check_damage(checkpoints, work, damage))

    fuzz(damages(checkpoints / work.damaged), check, examples=EXAMPLES.get(name, 20), seconds=seconds)


# --- Options ---

# What a shell may give, and whoever writes a YAML file by hand.
WORDS = (
    *(
        "",
        " ",
        *["0", "-1", "1", "2", "3", "0.5", "1e9", "nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_0", "๑", "½"],
    ),
    *("9" * 400, "1,2", "1,,2", "0-1", "0-99999999", "5-1", "1-", ",", "-", "--", "-x", "--help", "[1]", "{}", "null"),
    *("true", "[bold", "[/]", "%s", "../x", "/dev/null", "~", "น้ำ", "a" * 5000, "\udcff", "\x1b[31m", "a\nb", "."),
    *("the/base", "the/jai", "the/dense", "the/trained", "the/snapshot", "the/plain", "the/text.txt", "the", "OUT"),
)
INTEGERS = (0, 1, 2, 3, 4, -1, 2**63, 10**400)
NUMBERS = (0.0, 0.5, 1.0, -0.5, 2.0, 1e-30, 1e30, 3e38, 1e300)
EXTENDED = 452  # entries: the base uses 400 ids and reserves those up to 447
# What each verb needs, beside which one thing or another is wrong.
VALID: dict[str, dict[str, Any]] = {
    "convert": {"base": "the/base", "out": "OUT", "block_size": 1, "block_repeats": [1, 2]},
    "upcycle": {"dense": "the/dense", "out": "OUT", "snapshots": ["the/trained"]},
    "snapshot": {"checkpoint": "the/dense", "out": "OUT"},
    "merge": {"out": "OUT", "models": ["the/jai", "the/jai-2"]},
    "export": {"model": "the/plain", "out": "OUT"},
    "quantize": {"model": "the/wide", "out": "OUT"},
    "merge-adapter": {"adapter": "the/lora", "out": "OUT"},
    "publish": {"folder": "the/jai", "repo_id": "me/model", "dry_run": True},
    "tokenizer train": {"text": ["the/text.txt"], "base": "the/base", "out": "OUT", "vocab_size": EXTENDED},
    "tokenizer report": {"tokenizer": ["the/base"], "text": ["the/text.txt"]},
    "generate": {"model": "the/jai", "prompt": "A", "max_new_tokens": 2},
    "inspect": {"model": "the/jai", "train": "qlora"},
    "eval run": {"model": "the/jai", "suite": ["the/suite.yaml"], "data": "the/data", "limit": 1, "out": "OUT"},
    "eval language": {"files": ["the/chats.jsonl"]},
    "eval contamination": {"texts": ["the/text.txt"], "suite": ["the/suite.yaml"], "data": "the/data"},
    "eval pairwise": {
        "first": "the/answers/first.jsonl",
        "second": "the/answers/second.jsonl",
        **{"data": "the/data", "out": "OUT"},
        **{"judge_url": "the/judge_url", "judge_model": "judge", "judge_attempts": 1},
    },
    "eval compare": {"runs": ["the/run", "the/run-2"]},
    "pack": {"out": "OUT", "config": "the/corpus.yaml", "tokenizer": "the/jai"},
    "report": {"run": "the/trained-run", "out": "OUT"},
    "pairs": {
        **{
            "prompts": "the/prompts/prompts.jsonl",
            "out": "OUT",
            "model": "the/jai",
            "candidates": 2,
            "max_new_tokens": 2,
        },
        **{"by": "reward", "reward_model": "the/reward", "judge_attempts": 1},
    },
    "difficulty": {
        **{"prompts": "the/problems/problems.jsonl", "out": "OUT", "model": "the/jai", "min_pass_rate": 0.0},
        **{"candidates": 2, "max_new_tokens": 2},
    },
    "score": {"file": "the/chats.jsonl", "out": "OUT", "model": "the/reward"},
    "tokenizer ablate": {"config": "the/ablation/ablation.yaml", "out": "OUT"},
    "demo": {"out": "OUT"},
}
LINE_EXAMPLES = dict.fromkeys(
    ("eval run", "eval contamination", "eval pairwise", "pairs", "score", "tokenizer ablate"), 8
)
FUZZED = [verb for verb in VERBS if verb.name in VALID]


def test_every_verb_is_fuzzed():
    assert {verb.name for verb in VERBS} == VALID.keys()


@pytest.fixture(autouse=True)
def no_demo(monkeypatch):
    """What the demo is told is read and checked; what it does takes minutes, whatever it is told."""
    monkeypatch.setattr("jai.demo.run.run_demo", lambda options: None)


@st.composite
def values_of(draw: st.DrawFn, each: Option) -> Any:
    """A value that the option may have, or anything at all."""
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from((*WORDS, *VALUES)))
    if each.choices:
        return draw(st.sampled_from(each.choices))
    if each.element is not None:
        of = {int: INTEGERS, float: NUMBERS, str: WORDS}.get(each.element, (*NUMBERS, [{"at": 0, "value": 1}]))
        return draw(st.lists(st.sampled_from(of), max_size=3))
    if each.kind is bool:
        return draw(st.booleans())
    return draw(st.sampled_from({int: INTEGERS, float: NUMBERS}.get(each.kind, WORDS)))


@dataclass(frozen=True)
class Line:
    """A command line, and the YAML file that it names with CONFIG."""

    words: tuple[str, ...]
    yaml: bytes | None


@st.composite
def lines(draw: st.DrawFn, verb: Verb) -> Line:
    """Command lines with some values that a verb takes, and some that it does not."""
    known, values = options_of(verb.options), dict(VALID[verb.name])
    for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True)):
        if draw(st.integers(0, 9)) == 0:
            values.pop(name, None)
        else:
            values[name] = draw(values_of(known[name]))
    in_file = {}
    if verb.config and draw(st.booleans()):
        in_file = {name: values.pop(name) for name in sorted(values) if not known[name].info.positional}
    words = [word for name, value in values.items() for word in words_of(known[name], value)]
    config = None
    if in_file:
        config = yaml.safe_dump(in_file, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")
        if draw(st.integers(0, 3)) == 0:
            config = draw(damages_of("config.yaml", config)).content
        words += ["--config", "CONFIG"]
    extra = draw(st.sampled_from([*[[]] * 9, ["--no-such"], ["--help"], [draw(st.sampled_from(WORDS))]]))
    return Line((*verb.name.split(), *map(shell_word, words), *map(shell_word, extra)), config)


def words_of(each: Option, value: Any) -> list[str]:
    """An option as it is written on a command line."""
    texts = [str(one) for one in value] if isinstance(value, list) else [str(value)]
    if each.info.positional:
        return texts
    if each.kind is bool and isinstance(value, bool):
        return [each.flag if value else each.flag.replace("--", "--no-", 1)]
    if each.info.spread:
        return [each.flag, *texts]
    if each.element is str:
        return [word for text in texts for word in (each.flag, text)]
    return [each.flag, ",".join(texts)]


def shell_word(text: str) -> str:
    """As the system hands it over: any bytes but 0."""
    return os.fsdecode(text.replace("\0", "").encode(errors="replace" if "\ud800" in text else "surrogateescape"))


def check_line(checkpoints: Path, line: Line) -> Outcome:
    with tempfile.TemporaryDirectory(dir=checkpoints) as folder, contextlib.chdir(folder):
        out, config = Path(folder) / "out", Path(folder) / "config.yaml"
        names = Names(checkpoints, {"OUT": out, "CONFIG": config})
        if line.yaml is not None:
            named = re.sub(rb"the/[\w./-]+|\bOUT\b", lambda found: names.given(found[0].decode()).encode(), line.yaml)
            config.write_bytes(named)
        outcome = run(*map(names.given, line.words))
        check_outcome(outcome)
        if outcome.code and not any(" ".join(line.words).startswith(verb) for verb in RESUMABLE):
            check_nothing_left(out)
        elif (out / "config.json").exists():
            check_whole(out)
        return outcome


@pytest.mark.parametrize("verb", FUZZED, ids=[verb.name for verb in FUZZED])
def test_options(checkpoints, figures, verb):
    fuzz_options(checkpoints, figures, verb, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("verb", FUZZED, ids=[verb.name for verb in FUZZED])
def test_options_for_minutes(checkpoints, figures, verb):
    fuzz_options(checkpoints, figures, verb, SECONDS * 0.15 / len(FUZZED))


def fuzz_options(checkpoints: Path, figures: Figures, verb: Verb, seconds: float | None) -> None:
    if seconds is not None:
        known = options_of(verb.options)
        words = (word for name, value in VALID[verb.name].items() for word in words_of(known[name], value))
        assert check_line(checkpoints, Line((*verb.name.split(), *words), None)).code == 0
    fuzz(
        lines(verb),
        lambda line: figures.add(check_line(checkpoints, line)),
        examples=LINE_EXAMPLES.get(verb.name, 20),
        seconds=seconds,
    )


@pytest.fixture
def login(nobody_logged_in, checked_once, hub, monkeypatch) -> None:
    """A login to the Hub on this machine; what was checked once in a clean process is not checked again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)


def test_publishing(checkpoints, figures, login, hub):
    fuzz_publishing(checkpoints, figures, hub, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_publishing_for_minutes(checkpoints, figures, login, hub):
    fuzz_publishing(checkpoints, figures, hub, SECONDS / 20)


def fuzz_publishing(checkpoints: Path, figures: Figures, hub: LoopbackHub, seconds: float | None) -> None:
    verb = next(verb for verb in VERBS if verb.name == "publish")
    names = ("loopback/model", "model", "loopback/other")

    def check(drawn: tuple[Line, str]) -> None:
        line, name = drawn
        words = [name if word == "me/model" else word for word in line.words if word != "--dry-run"]
        outcome = check_line(checkpoints, Line(tuple(words), line.yaml))
        figures.add(outcome)
        assert outcome.code or "--help" in words or "--no-dry-run" in words or "Published" in outcome.out
        for repo in hub.repos.values():
            for head in {*repo.branches, *repo.tags}:
                files = repo.head(head).files.keys() - {".gitattributes"}
                assert not files or files >= {"README.md"}, "half of it is there"
                assert not files & {"config.json"} or files >= {"modeling_jai.py", "model.safetensors"}, files

    fuzz(st.tuples(lines(verb), st.sampled_from(names)), check, examples=2, seconds=seconds)


TRAINING = {
    verb: (config, data, (ScriptArguments, config, ModelConfig, JaiTrainingArguments, DataArguments))
    for verb, config, data in (
        ("sft", JaiSFTConfig, "the/chats.jsonl"),
        ("dpo", JaiDPOConfig, "the/pairs.jsonl"),
        ("kto", KTOConfig, "the/rated.jsonl"),
        ("cpo", JaiCPOConfig, "the/pairs.jsonl"),
        ("orpo", JaiORPOConfig, "the/pairs.jsonl"),
        ("reward", JaiRewardConfig, "the/pairs.jsonl"),
        ("grpo", JaiGRPOConfig, "the/problems/problems.jsonl"),
    )
}


@st.composite
def training_values(draw: st.DrawFn, each: Field) -> Any:
    """A value that an option of a dataclass may have, or anything at all."""
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from((*VALUES, *WORDS, *NUMBERS)))
    if choices := each.metadata.get("choices"):
        return draw(st.sampled_from([*choices]))
    kind = next((kind for kind in (bool, int, float) if kind.__name__ in re.findall(r"\w+", str(each.type))), str)
    if kind is bool:
        return draw(st.booleans())
    return draw(st.sampled_from({int: (1, 2, 8, 64), float: (1, 0.5, 0.1, 1e-5)}.get(kind, ("no", "steps", "auto"))))


@st.composite
def training_lines(draw: st.DrawFn, verb: str) -> Line:
    """Options of TRL and JAI beside those that a run needs; with `preview` it ends before a model is loaded."""
    _, data, dataclasses = TRAINING[verb]
    known = {option.name: option for each in dataclasses for option in fields(each)}
    values: dict[str, Any] = {"model_name_or_path": "the/jai", "dataset_name": data, "output_dir": "OUT", "preview": 1}
    for name in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3, unique=True)):
        values[name] = draw(training_values(known[name]))
    values |= {"preview": 1}
    if draw(st.booleans()):
        return Line((verb, "--config", "CONFIG"), yaml.safe_dump(values).encode(errors="surrogatepass"))
    return Line((verb, *(word for name in values for word in (f"--{name}", shell_word(str(values[name]))))), None)


@pytest.mark.parametrize("verb", TRAINING)
def test_a_training_line_alone_is_taken(checkpoints, verb):
    line = ("--model_name_or_path", "the/jai", "--dataset_name", TRAINING[verb][1], "--output_dir", "OUT")
    outcome = check_line(checkpoints, Line((verb, *line, "--preview", "1"), None))
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("verb", TRAINING)
def test_training_options(checkpoints, figures, verb):
    fuzz_training_options(checkpoints, figures, verb, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("verb", TRAINING)
def test_training_options_for_minutes(checkpoints, figures, verb):
    fuzz_training_options(checkpoints, figures, verb, SECONDS / 10 / len(TRAINING))


def fuzz_training_options(checkpoints: Path, figures: Figures, verb: str, seconds: float | None) -> None:
    def check(line: Line) -> None:
        environment = dict(os.environ)
        try:
            outcome = check_line(checkpoints, line)
        finally:  # transformers' arguments write into it
            os.environ.clear()
            os.environ.update(environment)
        figures.add(outcome)

    fuzz(training_lines(verb), check, examples=15 if verb == "sft" else 5, seconds=seconds)


# --- Text and training data ---

TEXTS = ("text.txt", "text.jsonl", "text.jsonl.gz", "text.parquet")
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT}, {"messages": [{"role": "system", "content": "ก"}, *CHAT]}],
    "tools": [{"messages": CHAT, "tools": "[]", "chat_template_kwargs": {"x": 1}}, {"messages": CHAT, "tools": "[]"}],
    "conversations": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2,
    "text": [{"text": "a"}, {"text": "ข"}],
    "prompt, completion": [{"prompt": "a", "completion": "b"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}][:1] * 2,
    "chosen, rejected": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2,
    "preferred conversations": [{"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "no"}]}] * 2,
}


@pytest.fixture(scope="module")
def texts(checkpoints, sentences) -> Path:
    """A folder with the same text in each form that is read."""
    folder = checkpoints / "texts"
    folder.mkdir()
    shutil.copyfile(checkpoints / "text.txt", folder / "text.txt")
    sentences = sentences * 4
    lines = "".join(json.dumps({"text": sentence, "source": "x"}) + "\n" for sentence in sentences).encode()
    (folder / "text.jsonl").write_bytes(lines)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    parquet.write_table(Table.from_pylist([{"text": sentence} for sentence in sentences]), folder / "text.parquet")
    return folder


def check_text(checkpoints: Path, texts: Path, damage: Damage) -> Outcome:
    with tempfile.TemporaryDirectory(dir=checkpoints) as folder:
        out = Path(folder) / "out"
        damaged = hard_linked(texts, Path(folder) / "damaged")
        damage.lay_on(damaged)
        words = ("--base", checkpoints / "base", "--out", out, "--vocab-size", str(EXTENDED))
        outcome = run("tokenizer", "train", damaged / damage.file, *words)
        check_outcome(outcome)
        if outcome.code:
            check_nothing_left(out)
        else:
            tokenizer = AutoTokenizer.from_pretrained(out)
            assert len(tokenizer) == EXTENDED
            assert tokenizer.decode(tokenizer("ก A")["input_ids"]) == "ก A"
        return outcome


@pytest.mark.parametrize("file", TEXTS)
def test_damaged_text(checkpoints, texts, figures, file):
    fuzz_text(checkpoints, texts, figures, file, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("file", TEXTS)
def test_damaged_text_for_minutes(checkpoints, texts, figures, file):
    fuzz_text(checkpoints, texts, figures, file, SECONDS / 8 / len(TEXTS))


def fuzz_text(checkpoints: Path, texts: Path, figures: Figures, file: str, seconds: float | None) -> None:
    whole = Damage(file, "nothing", (texts / file).read_bytes())
    assert check_text(checkpoints, texts, whole).code == 0

    def check(damage: Damage) -> None:
        figures.add(check_text(checkpoints, texts, damage))

    fuzz(damages_of(file, (texts / file).read_bytes()), check, examples=15, seconds=seconds)


def check_rows(folder: Path, content: bytes, types: tuple[DatasetType, ...], file: str = "rows.jsonl") -> str:
    """What `jai sft` and `jai dpo` say of rows before they load a model."""
    with tempfile.TemporaryDirectory(dir=folder) as work, pytest.MonkeyPatch.context() as patch, no_hanging():
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(work) / "cache")
        (path := Path(work) / file).write_bytes(content)
        config = DPOConfig if DatasetType.PREFERENCE in types else SFTConfig
        script, training = ScriptArguments(dataset_name=str(path)), config(str(Path(work) / "out"), bf16=False)
        try:
            data = load_training_data(StageArguments(script, training, ModelConfig(), JaiTrainingArguments()), types)
        except UserError as error:
            return Outcome(1, "", f"Error: {error}").kind
        assert data.rows
        assert all(row[column] is not None for row in data.train for column in data.columns)
        return "ok"


@pytest.mark.parametrize("form", ROWS)
def test_rows(tmp_path, figures, form):
    fuzz_rows(tmp_path, figures, form, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("form", ROWS)
def test_rows_for_minutes(tmp_path, figures, form):
    fuzz_rows(tmp_path, figures, form, SECONDS / 8 / len(ROWS))


def fuzz_rows(folder: Path, figures: Figures, form: str, seconds: float | None) -> None:
    preference = (DatasetType.PREFERENCE,)
    types = preference if "chosen" in ROWS[form][0] else (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)

    def check(change: tuple[str, bytes]) -> None:
        figures.add(check_rows(folder, change[1], types))

    fuzz(changed_rows(ROWS[form]), check, examples=8, seconds=seconds)


def test_damaged_gzipped_rows(tmp_path, figures):
    fuzz_gzipped_rows(tmp_path, figures, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_damaged_gzipped_rows_for_minutes(tmp_path, figures):
    fuzz_gzipped_rows(tmp_path, figures, SECONDS / 40)


def fuzz_gzipped_rows(folder: Path, figures: Figures, seconds: float | None) -> None:
    file, types = "rows.jsonl.gz", (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS["messages"] * 20).encode()
    whole = gzip.compress(lines, mtime=0)
    assert check_rows(folder, whole, types, file) == "ok"

    def check(damage: Damage) -> None:
        if damage.content is not None:  # what is no file is refused in test_files.py
            figures.add(check_rows(folder, damage.content, types, file))

    fuzz(damages_of(file, whole), check, examples=15, seconds=seconds)


# --- What was found by chance once, each of its kind ---


def with_values(**values: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | values).encode()


FOUND = [
    # Tokenizers were copied unread by the verbs that have no use for them.
    ("merge", "tokenizer_config.json", with_values(unk_token=[-1]), "Special token unk_token has to be"),
    ("merge", "tokenizer_config.json", with_values(padding_side=[0.5]), "Padding side should be"),
    ("export", "tokenizer.json", lambda _: b"{}", "has no tokenizer that can be loaded"),
    ("export", "chat_template.jinja", lambda content: content + b"\xff", "can't decode byte 0xff"),
    ("export", "tokenizer_config.json", with_values(eos_token="<new>"), r"'<new>'\), but the embeddings have 400 rows"),
    ("upcycle", "tokenizer_config.json", with_values(tokenizer_class=0.5), "tokenizer_class in .* is 0.5"),
    ("convert", "config.json", with_values(tokenizer_class=["x"]), "tokenizer_class in .* is "),
    ("convert, tokenizer", "tokenizer_config.json", with_values(tokenizer_class=1e300), "tokenizer_class in .* is 1e"),
    ("convert", "tokenizer_config.json", with_values(model_max_length="x"), "has no tokenizer that can be loaded"),
    # A model that transformers cannot build.
    ("export", "config.json", with_values(hidden_act="sil"), "`hidden_act` is 'sil'; expected one of .*silu"),
    ("convert", "config.json", with_values(hidden_act="sil"), "`hidden_act` is 'sil'; expected one of .*silu"),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), FOUND, ids=[f"{n}-{f}" for n, f, *_ in FOUND])
def test_what_fuzzing_found_is_refused(checkpoints, name, file, change, message):
    content = change((checkpoints / WORKS[name].damaged / file).read_bytes())
    outcome = check_damage(checkpoints, WORKS[name], Damage(file, "changed", content))
    assert outcome.code == 1
    assert re.search(message, outcome.err), outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # What no verb foresaw was a traceback.
        (("export", "the/plain", ""), "is not a name that a folder can get"),
        (("snapshot", "the/dense", "."), "is not a name that a folder can get"),
        (
            ("tokenizer", "train", "the/text.txt", "--base", "the/base", "--out", ""),
            "is not a name that a folder can get",
        ),
        (("export", "a" * 5000, "OUT"), "File name too long"),
        (("export", "the/plain", "a" * 5000), "File name too long"),
        (("publish", "a" * 5000, "me/model"), "File name too long"),
        (
            ("tokenizer", "train", "x", "--base", "the/base", "--out", "OUT", "--script", "inf"),
            "not a script that Unicode",
        ),
        (("generate", "the/jai", "\udcff"), "The prompt is not UTF-8"),
        (
            ("upcycle", "the/dense", "OUT", "--snapshots", "the/trained", "--experts", str(2**63)),
            "expected a number from 1 to 16,384",
        ),
        (
            ("pack", "OUT", "--config", "the/corpus.yaml", "--tokenizer", "the/jai", "--workers", "9" * 30),
            "expected a whole number from 1 up to 1024",
        ),
    ],
)
def test_lines_that_fuzzing_found_are_refused(checkpoints, words, message):
    outcome = check_line(checkpoints, Line(words, None))
    assert outcome.code == 1
    assert message in outcome.err


def test_names_that_are_no_unicode(checkpoints):
    """Files from a Thai Windows have them."""
    assert check_line(checkpoints, Line(("export", "the/plain", "\udca1\udcd2"), None)).code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),  # took 12 seconds
        (
            b"layers: [&a0 [x]" + b"".join(b", &a%d [*a%d, *a%d, *a%d]" % (n + 1, n, n, n) for n in range(40)) + b"]",
            "layers is [['x'], [['x'], ['x'], ['x']], [",
        ),
        (b"seed: &a [x, x]\n" + b"layers: &b [*a, *a, *a]\n", "seed is ['x', 'x']; expected a whole number"),
        (b"seed: " + b"9" * 4000 + b"x", "seed is '9999"),
    ],
)
def test_yaml_that_would_take_for_ever_is_refused(checkpoints, text, message):
    outcome = check_line(checkpoints, Line(("convert", "the/base", "OUT", "--config", "CONFIG"), text))
    assert outcome.code == 1
    assert message in outcome.err
    assert len(outcome.err) < 1000


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"null\n", "cannot be read: of row … it is null"),  # ended the process
        (b'\xef\xbb\xbf\n null\n{"text": "a"}\n', "Row … of … (split train) cannot be trained on: it is null"),
        (b'{"conversations": 7}\n', "Row … of … (split train) cannot be trained on: `messages` is"),
        (b'{"conversations": [{"from": [], "value": "a"}]}\n', "`messages` ha"),
        (
            b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
            b'{"conversations": [{"from": "human", "value": [1, 2]}, {"from": "gpt", "value": "b"}]}\n',
            "Row … of … (split train) cannot be trained on: `messages` ha",
        ),
    ],
)
def test_rows_that_fuzzing_found_are_refused(tmp_path, lines, message):
    assert message in check_rows(tmp_path, lines, (DatasetType.LANGUAGE_MODELING,))

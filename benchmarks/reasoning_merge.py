# SPDX-License-Identifier: Apache-2.0
"""Merging a language model with a reasoner, small: is there a valley between them, and does alignment fill it?

    python benchmarks/reasoning_merge.py runs/reasoning          # three seeds: 25 minutes on one core of a processor

A small JAI learns Thai and English text and chats from nothing. From it come a language model (`jai sft` on Thai chats)
and a reasoner (on English arithmetic with `<think>` traces); the aligned model is the language model after a few traces
in both languages (Typhoon2-R1's recipe). `jai merge` makes all the rest: the language model or the aligned one with the
reasoner, by constant ratios and by curves over the layers in the shape of recipes/merge_m3.yaml.

Started again with the same options it goes on with what the folder lacks. Tables and the plot go there too, and with
`--record` one row a model and seed to results/reasoning_merge.csv. With `--quick` all runs, and little is learnt.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from arms import check_setup
from post_training_measures import answers_of, read_rows
from reasoning_merge_arms import ARMS, QUICK, REASONER, Blend, Settings, blends, merge_weights
from reasoning_merge_data import Chat, write_data
from reasoning_merge_report import Outcome, csv_rows, write_report
from records import append, provenance
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.demo.base import train_base
from jai.demo.measure import MeasuredModel
from jai.errors import UserError
from jai.evaluation.answers import STATED_FORMS, is_right_answer
from jai.evaluation.instructions.scoring import instruction_row, judge_instructions
from jai.evaluation.language import language_fault, think_fault
from jai.files import new_folder, write_whole
from jai.tokenization.phi3_style import train_phi3_style
from jai.trainers.arguments import StageArguments, parse_arguments
from jai.trainers.sft import SFT
from jai.trainers.stage import run_stage

LONGEST_ANSWER = 80  # tokens; the longest of what is learnt has 65
LAYERS = 6  # of demo.base.train_base


class Seed:
    """The models of one seed, each made where its folder is not there yet."""

    def __init__(self, out: Path, seed: int, settings: Settings):
        self._data = out / "data"
        self._folder = out / f"seed-{seed}"
        self._seed = seed
        self._settings = settings
        self._folder.mkdir(exist_ok=True)

    def train(self) -> None:
        self._make_base()
        self._sft("language", "base", self._settings.language_steps)
        self._sft(REASONER, "base", self._settings.reasoner_steps)
        self._sft("aligned", "language", self._settings.aligned_steps)

    def outcomes(self, blend: Blend) -> Outcome:
        """What a blend's model scores, question by question."""
        path = self._folder / "measured" / f"{blend.name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                if blend.is_parent:
                    folder = self._folder / blend.name
                else:
                    folder = Path(scratch) / "merged"
                    models = [str(self._folder / name) for name in (ARMS[blend.arm], REASONER)]
                    options = MergeOptions(models=models, weights=merge_weights(blend), out=folder)
                    merge(options, console=Console(quiet=True))
                write_whole(path, json.dumps(measure(folder, self._data), ensure_ascii=False, indent=1))
        return Outcome(self._seed, blend, json.loads(path.read_text(encoding="utf-8"))["scores"])

    def _make_base(self) -> None:
        if (self._folder / "base").exists():
            return
        documents = json.loads((self._data / "documents.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(self._data / "tokenizer")
        chats = [row["messages"] for row in read_rows(self._data / "base.jsonl")]
        texts = documents + [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        with tempfile.TemporaryDirectory() as scratch:
            train_base(texts, tokenizer, Path(scratch) / "phi3", steps=self._settings.base_steps, seed=self._seed)
            options = ConvertOptions(
                base=f"{scratch}/phi3", out=self._folder / "base", block_size=1, block_repeats=[1] * LAYERS, experts=1
            )
            convert(options, console=Console(quiet=True))

    def _sft(self, name: str, start: str, steps: int) -> None:
        if (self._folder / name).exists():
            return
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            options = {
                "model_name_or_path": str(self._folder / start),
                "dataset_name": str(self._data / f"{name}.jsonl"),
                "output_dir": f"{scratch}/out",
                "assistant_only_loss": True,
                "max_length": 160,
                "trainable": ["all"],
                "dtype": "float32",
                "bf16": False,
                "use_cpu": True,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "max_steps": steps,
                "per_device_train_batch_size": 16,
                "gradient_checkpointing": False,
                "seed": self._seed,
                "logging_steps": 20,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
            }
            config = Path(scratch) / "sft.yaml"
            config.write_text(yaml.safe_dump(options), encoding="utf-8")
            given = parse_arguments(SFT.option_classes, ["--config", str(config)], prog="jai sft")
            run_stage(SFT, StageArguments(*given), Console(quiet=True))
            shutil.move(f"{scratch}/out", self._folder / name)


def measure(folder: Path, data: Path) -> dict[str, Any]:
    """Ask a model everything: its scores by measure, as [question, score], and its replies by kind of question."""
    model = MeasuredModel(folder)
    questions: dict[str, list[Chat]] = json.loads((data / "questions.json").read_text(encoding="utf-8"))
    replies = {
        kind: answers_of(model, [chat["messages"][:-1] for chat in chats], kind[-2:], LONGEST_ANSWER)
        for kind, chats in questions.items()
    }
    scores: dict[str, list[tuple[str, float]]] = {}
    for kind, chats in questions.items():
        for number, (chat, reply) in enumerate(zip(chats, replies[kind])):
            for name, score in _scores(kind, chat, reply):
                scores.setdefault(name, []).append((f"{kind} {number}", float(score)))
    return {"scores": scores, "replies": replies}


def _scores(kind: str, chat: Chat, reply: str) -> Iterator[tuple[str, bool]]:
    """Measures of one reply."""
    what, language = kind.split()
    if what == "problems":
        asked = chat["messages"][0]["content"]
        yield f"right {language}", is_right_answer(reply, chat["solution"], question=asked, forms=STATED_FORMS)
        yield "think", think_fault(reply) is None
    if what == "forms":
        row = {"key": "", "prompt": "", **{name: chat[name] for name in ("instruction_id_list", "kwargs")}}
        yield "instructions", all(judge_instructions(instruction_row(row, language), reply).strict)
    if what != "forms" and language == "th":
        yield "language", language_fault(reply, "th") is None


def prepare(out: Path, settings: Settings) -> None:
    """Write the data and the tokenizer, which all seeds share.

    Raises:
        UserError: if `out` holds a run with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_setup(asdict(settings), out)
    if not (out / "data").exists():
        with new_folder(out / "data") as folder:
            write_data(folder, settings.data)
            texts = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
            texts += [turn["content"] for row in read_rows(folder / "base.jsonl") for turn in row["messages"]]
            train_phi3_style(texts, settings.vocabulary).save_pretrained(folder / "tokenizer")


def run(settings: Settings, seeds: list[int], out: Path) -> list[Outcome]:
    """Train, merge and measure what `out` lacks, and write the report into it."""
    prepare(out, settings)
    found: list[Outcome] = []
    for seed in seeds:
        models = Seed(out, seed, settings)
        models.train()
        found += map(models.outcomes, blends(settings))
        write_report(found, out)
        print(f"seed {seed}: {len(blends(settings))} models are measured", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: all runs, and little is learnt")
    parser.add_argument("--record", action="store_true", help="append to results/reasoning_merge.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        found = run(QUICK if arguments.quick else Settings(), arguments.seeds, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print((arguments.out / "reasoning_merge.md").read_text(encoding="utf-8"))
    if arguments.record:
        origin = provenance(("torch", "transformers", "trl"))
        print("appended to", append("reasoning_merge", [{**row, **origin} for row in csv_rows(found)]))


if __name__ == "__main__":
    main()

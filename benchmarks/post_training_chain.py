# SPDX-License-Identifier: Apache-2.0
"""The whole of post-training on a tiny model: SFT.1, SFT.2, their merge, reward model, pairs, DPO, GRPO.

Each step is a verb with its recipe of recipes/tiny, on the shared data; the pairs are answers of a `jai serve` on
127.0.0.1. Every checkpoint is then measured: held-out loss by language, preference accuracy, reward, IFEval, right
answers, language accuracy and think accuracy, with intervals.

    python benchmarks/post_training_chain.py runs/chain          # half an hour on one core of a processor

The same command goes on with a run that was stopped. The table goes to RUN/table.md, and with `--record` one row a
checkpoint to results/post_training_chain.csv.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from post_training_data import Sizes, write_data
from post_training_measures import Measured, answer_log_probs, mean_of, measure_checkpoint, measured, read_rows
from records import ROOT, append, provenance
from rich.console import Console

from jai.demo.base import train_base
from jai.demo.measure import MeasuredModel
from jai.demo.run import Shell
from jai.evaluation.results import read_run
from jai.preferences.reward_model import RewardModel
from jai.tokenization.phi3_style import train_phi3_style

RECIPES = ROOT / "recipes"
SHARED = ROOT.parent / "shared" / "data"
CHECKPOINTS = {
    "base": "base",
    "sft_1": "SFT.1",
    "sft_2": "SFT.2",
    "merged": "SFT.1 and SFT.2, 1:1",
    "dpo": "DPO",
    "grpo": "GRPO",
}
COLUMNS = {
    "loss th": ("loss, Thai", ".3f"),
    "loss en": ("loss, English", ".3f"),
    "preference": ("preference accuracy", ".2f"),
    "reward": ("reward (logit)", ".2f"),
    "ifeval": ("IFEval-TH", ".2f"),
    "right answers": ("right answers", ".2f"),
    "language": ("language accuracy", ".2f"),
    "think": ("think accuracy", ".2f"),
}
BASE_VOCABULARY, VOCABULARY = 1600, 3000
# Options of the quick form. With fewer steps no answer ends, or the reward model is at chance: there would be no pairs.
# With these no answer follows an instruction, so that the data's own answers compete.
QUICK = {
    "base": "--max_steps 20",
    "sft_1": "--max_steps 60 --per_device_train_batch_size 8",
    "sft_2": "--max_steps 60 --per_device_train_batch_size 8",
    "reward": "--max_steps 24 --eval_steps 24",
    "pairs": "--limit 24 --temperature 0.7",
    "pairs_if": "--limit 12 --off-policy data/answers_if.jsonl",
    "dpo": "--max_steps 4 --logging_steps 1",
    "grpo": "--max_steps 4 --logging_steps 1",
}
CONVERSION = "--block-size 1 --block-repeats 1,1,2,3,1,1 --experts 4 --expert-init copy"


class Chain:
    """The steps, each of which is left out where its result is there.

    Args:
        folder: of the run.
        quick: a few steps of each: all of it runs, and little is learnt.
        seed: of data, weights and training; the server draws its answers by its own.
    """

    def __init__(self, folder: Path, *, quick: bool, seed: int):
        self._folder = folder
        self._quick = quick
        self._seed = seed
        self._shell = Shell(folder, Console())

    def run(self) -> None:
        self._make_base()
        for name in ("sft_1", "sft_2"):
            self._train("sft", name)
        if not self._is_there("merged"):
            self._shell.jai(f"merge merged --config {RECIPES / 'merge_sft.yaml'} --models sft_1 sft_2")
        self._train("reward", "reward")
        self._make_pairs()
        self._train("dpo", "dpo")
        self._train("grpo", "grpo")

    def _is_there(self, name: str) -> bool:
        """Whether a step is whole: its record is the last that it writes."""
        if (self._folder / name / "provenance.json").exists():
            return True
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return False

    def _make_base(self) -> None:
        """A JAI that has read text in both languages, with rows of its own for Thai."""
        if not (self._folder / "data").exists():
            sizes = Sizes(400, 200, 40, 40) if self._quick else Sizes()
            work = self._folder / "data.new"
            shutil.rmtree(work, ignore_errors=True)
            print(write_data(SHARED, work, sizes, self._seed))
            work.rename(self._folder / "data")
        if self._is_there("base"):
            return
        texts = [row["text"] for row in read_rows(self._folder / "data" / "pretrain.jsonl")]
        for name in ("phi3", "tokenizer", "converted"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        tokenizer = train_phi3_style(texts, BASE_VOCABULARY)
        train_base(texts, tokenizer, self._folder / "phi3", steps=60 if self._quick else 300, seed=self._seed)
        size = BASE_VOCABULARY + 200 if self._quick else VOCABULARY
        self._shell.jai(f"tokenizer train data/text.txt --base phi3 --out tokenizer --vocab-size {size}")
        self._shell.jai(f"convert phi3 converted --tokenizer tokenizer {CONVERSION}")
        self._train("sft", "base", recipe="text")

    def _train(self, verb: str, name: str, recipe: str | None = None) -> None:
        if not self._is_there(name):
            path = RECIPES / "tiny" / f"{recipe or name}.yaml"
            self._shell.jai(
                f"{verb} --config {path} --seed {self._seed} --disable_tqdm true --use_cpu true{self._changes(name)}"
            )

    def _changes(self, name: str) -> str:
        return f" {QUICK[name]}" if self._quick else ""

    def _make_pairs(self) -> None:
        if all((self._folder / name / "pairs.jsonl").exists() for name in ("pairs", "pairs_if")):
            return
        with serving(self._folder, "merged") as address:
            for name, prompts in (("pairs", "prompts_chat"), ("pairs_if", "prompts_if")):
                config = RECIPES / "tiny" / f"{name}.yaml"
                self._shell.jai(
                    f"pairs data/{prompts}.jsonl {name} --config {config} --model merged --base-url {address}/v1"
                    f"{self._changes(name)}"
                )


@contextmanager
def serving(folder: Path, checkpoint: str) -> Iterator[str]:
    """`jai serve` on a free port of 127.0.0.1; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jai", "serve", checkpoint, "--device", "cpu", "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=log,
            stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(server, f"{address}/health", folder / "serve.log")
            yield address
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(server: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError(f"jai serve ended:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"jai serve does not answer:\n{log.read_text()}")


def measure(folder: Path, *, rows: int, limit: int) -> dict[str, dict[str, Measured]]:
    """All figures of all checkpoints; those that were measured before are read."""
    reward_model = RewardModel(str(folder / "reward"))
    found = {}
    for name in CHECKPOINTS:
        path = folder / "measured" / f"{name}.json"
        if not path.exists():
            figures = measure_checkpoint(folder / name, folder / "data", reward_model, rows)
            Shell(folder, Console()).jai(
                f"eval run {name} --suite ifeval-th --data {SHARED / 'eval'} --out eval/{name} --device cpu "
                f"--batch-size 32 --limit {limit} --max-length 512"
            )
            results, _ = read_run(folder / "eval" / name)
            figures["ifeval"] = measured(
                next(each for each in results.figures if each.metric == "inst_level_strict_acc")
            )
            path.parent.mkdir(exist_ok=True)
            text = json.dumps({key: asdict(figure) for key, figure in figures.items()}, indent=2)
            path.write_text(text + "\n", encoding="utf-8")
        content = json.loads(path.read_text(encoding="utf-8"))
        found[name] = {key: Measured(**values) for key, values in content.items()}
    return found


def reward_accuracy(folder: Path, rows: int) -> Measured:
    """Of the reward model, on pairs that it was neither trained nor calibrated with."""
    pairs = read_rows(folder / "data" / "heldout_pairs.jsonl")[:rows]
    model = RewardModel(str(folder / "reward"))
    better, worse = (
        model.scores([pair["prompt"] + pair[side] for pair in pairs], batch_size=16) for side in ("chosen", "rejected")
    )
    return mean_of([float(first > second) for first, second in zip(better, worse)], [pair["prompt"] for pair in pairs])


def against_reference(folder: Path, rows: int) -> Measured:
    """DPO's accuracy on held-out pairs: log-probabilities beside those of the merged model, which is its reference."""
    pairs = read_rows(folder / "data" / "heldout_pairs.jsonl")[:rows]
    sides = {side: [pair["prompt"] + pair[side] for pair in pairs] for side in ("chosen", "rejected")}
    models = {name: MeasuredModel(folder / name) for name in ("dpo", "merged")}
    gains = {
        side: [
            trained - reference
            for trained, reference in zip(*(answer_log_probs(models[name], chats) for name in ("dpo", "merged")))
        ]
        for side, chats in sides.items()
    }
    better = [float(first > second) for first, second in zip(gains["chosen"], gains["rejected"])]
    return mean_of(better, [pair["prompt"] for pair in pairs])


def history(folder: Path, name: str, key: str) -> list[float]:
    """A logged figure of a stage, in the order of its steps."""
    state = json.loads((folder / name / "trainer_state.json").read_text(encoding="utf-8"))
    return [log[key] for log in state["log_history"] if key in log]


def write_table(folder: Path, rows: int, limit: int) -> tuple[str, dict[str, dict[str, Measured]]]:
    """Measure all, and write RUN/table.md."""
    found = measure(folder, rows=rows, limit=limit)
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, title in CHECKPOINTS.items():
        cells = [f"{found[name][key]:{form}}" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    pairs = {name: json.loads((folder / name / "pairs.json").read_text()) for name in ("pairs", "pairs_if")}
    margins, rewards = history(folder, "dpo", "rewards/margins"), history(folder, "grpo", "reward")
    disagreement = history(folder, "grpo", "routing/disagreement")
    held_out = read_rows(folder / "data" / "heldout_pairs.jsonl")[:rows]
    prompts = len({json.dumps(pair["prompt"]) for pair in held_out})
    lines += [
        "",
        f"- Reward model: accuracy on {len(held_out)} held-out pairs of {prompts} prompts "
        f"{reward_accuracy(folder, rows):.2f}.",
        *(_pairs_line(name, record) for name, record in pairs.items()),
        f"- DPO: margin of the training pairs {margins[0]:.3f} at first and {margins[-1]:.3f} at last; accuracy beside "
        f"the reference on the held-out pairs {against_reference(folder, rows):.2f}.",
        f"- GRPO: reward {rewards[0]:.2f} at first and {rewards[-1]:.2f} at last, of 2; "
        f"{sum(disagreement) / len(disagreement):.2%} of the experts' choices disagreed with the rollout's.",
    ]
    text = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text, found


def _pairs_line(name: str, record: dict[str, Any]) -> str:
    bias = [record[f"length_bias_{when}"]["longer"] for when in ("before", "after")]
    kind = {"pairs": "the reward model", "pairs_if": "the instruction checks"}[name]
    return (
        f"- Pairs by {kind}: {record['pairs']} of {record['prompts']} prompts; the chosen answer is the longer one in "
        f"{bias[0]:.0%} before and {bias[1]:.0%} after pairs of very different lengths were dropped."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few steps of each: all runs, and little is learnt")
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, weights and training; the server draws its answers by its own"
    )
    parser.add_argument("--record", action="store_true", help="append to results/post_training_chain.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    Chain(out, quick=arguments.quick, seed=arguments.seed).run()
    text, found = write_table(out, rows=12 if arguments.quick else 100, limit=4 if arguments.quick else 105)
    print(text)
    if arguments.record:
        rows = [
            {"checkpoint": name, "seed": str(arguments.seed)}
            | {
                f"{key} {part}": f"{getattr(figure, part):.4f}"
                for key, figure in figures.items()
                for part in ("value", "low", "high")
            }
            | provenance(("torch", "transformers", "trl"))
            for name, figures in found.items()
        ]
        append("post_training_chain", rows)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Every task of every suite by lm-eval's own command line and by ours, on one checkpoint: the same answers and scores,
item by item and in all, to the last digit."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import CODE_EVAL, LENGTHS, short_suite, write_whole_data
from lm_eval.models.huggingface import HFLM

from jai.evaluation.data import local_split
from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.measure import SuitePlan, measure_suite, plan_suite
from jai.evaluation.models import load_answering_model
from jai.evaluation.options import EvalOptions
from jai.evaluation.results import EvaluationRun, open_run
from jai.evaluation.suites import Suite, SuiteTask, read_suite, suite_names
from jai.evaluation.tasks import TASKS_FOLDER, TaskLoader, data_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LIMIT = 5  # questions of each task; of long contexts, one of each length
ANSWER_TOKENS = 8
# Judged suites are none of lm-eval's; ruler fetches its texts.
SUITES = [name for name in suite_names() if isinstance(read_suite(name), Suite) and name != "ruler"]
ADDRESSES = re.compile(r"(?:https://raw\.githubusercontent\.com|hf://datasets)/\S+/")


@dataclass(frozen=True)
class Words:
    """What tasks must have in common to run in one process of lm-eval's."""

    shots: int | None
    chat: bool
    runs_code: bool

    def __iter__(self) -> Iterator[str]:
        if self.shots is not None:
            yield from ("--num_fewshot", str(self.shots))
        if self.chat:
            yield from ("--apply_chat_template", "--fewshot_as_multiturn")
        if self.runs_code:
            yield "--confirm_run_unsafe_code"


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared_data) -> Path:
    return write_whole_data(tmp_path_factory.mktemp("data"), shared_data)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint: Callable) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def metadata(data) -> dict[str, Any]:
    return {"haystack_folder": str(data), "max_seq_lengths": [*LENGTHS.values()], "samples": 1}


@pytest.fixture(scope="module", autouse=True)
def programs_may_run() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ALLOW_CODE_EVAL", "1")
        yield


@pytest.fixture(scope="module")
def plans(data, checkpoint, metadata, tmp_path_factory) -> dict[str, SuitePlan]:
    """The suites as `jai eval` loads them; answers are short."""
    loader = TaskLoader(data=data, metadata={**metadata, "pretrained": str(checkpoint)})
    folder = tmp_path_factory.mktemp("suites")
    write_code_eval(folder)
    plans = {}
    for name in SUITES:
        with chdir(folder):  # where HumanEval and MBPP find their metric
            plan = plan_suite(read_suite(str(short_suite(name, folder)) if "ruler" in name else name), loader)
        for tasks in plan.tasks.values():
            for task in tasks:
                if task.OUTPUT_TYPE == "generate_until":
                    task.set_config("generation_kwargs", {"max_gen_toks": ANSWER_TOKENS}, update=True)
        plans[name] = plan
    return plans


def write_code_eval(folder: Path) -> None:
    (folder / "code_eval").mkdir()
    (folder / "code_eval/code_eval.py").write_text(CODE_EVAL)


def words_of(suite: Suite, row: SuiteTask) -> Words:
    return Words(row.shots, suite.chat, suite.runs_code)


class LmEval:
    """lm-eval's command line in a folder whose subfolders stand in for the Hub's data sets, as `datasets` takes them.

    Its tasks and ours are as they are, but for the files that O-NET and LiveCodeBench name by their addresses.
    """

    def __init__(self, folder: Path, data: Path):
        self.folder = folder
        self._data = data
        self._tasks = folder / "tasks"
        shutil.copytree(TASKS_FOLDER, self._tasks)
        for path in self._tasks.rglob("*yaml"):
            text = path.read_text(encoding="utf-8")
            path.write_text(ADDRESSES.sub(f"{folder}/files/", text), encoding="utf-8")
        write_code_eval(folder)
        self._splits: dict[Path, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))

    def add_data(self, config: dict[str, Any]) -> None:
        """Write the splits of a task in the Hub's columns."""
        for split in filter(
            None, {config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")}
        ):
            source = data_source(config, split)
            rows = local_split(self._data, source)
            if rows is None:
                continue
            if "://" in source.path:
                self._write_file(Path(source.path).name, rows)
                continue
            dataset = self.folder / source.path
            path = dataset / (source.config or "") / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_json(path, force_ascii=False)
            self._splits[dataset][source.config or "default"][split] = str(path.relative_to(dataset))
            self._describe(dataset)

    def _describe(self, dataset: Path) -> None:
        """Say in the card which files a configuration has."""
        configs = [
            {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
            for name, files in self._splits[dataset].items()
        ]
        (dataset / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

    def _write_file(self, name: str, rows: Any) -> None:
        path = self.folder / "files" / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows.column_names)
                writer.writeheader()
                writer.writerows(rows)
        else:  # LiveCodeBench's two files, of which one has all rows here
            rows.select(range(1)).to_json(path, force_ascii=False)
            rows.select(range(1, len(rows))).to_json(path.with_name("test2.jsonl"), force_ascii=False)

    def run(self, checkpoint: Path, tasks: list[str], words: Words, metadata: dict[str, Any]) -> Path:
        """Measure tasks; gives the folder of the results."""
        out = self.folder / f"out {words}"
        # It knows JAI where `jai` is imported first, as a plug-in of the interpreter would.
        code = "import jai, sys; from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"
        arguments = ["run", "--model", "hf", "--model_args", f"pretrained={checkpoint}", "--device", "cpu"]
        arguments += ["--tasks", *tasks, "--include_path", str(self._tasks), "--metadata", json.dumps(metadata)]
        arguments += ["--gen_kwargs", f"max_gen_toks={ANSWER_TOKENS}", "--limit", str(LIMIT), "--log_samples"]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.folder / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--output_path", str(out), *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return out


@dataclass(frozen=True)
class Theirs:
    """What lm-eval found of a task: its figures by metric and filter, and its samples."""

    figures: dict[str, float]
    samples: list[dict[str, Any]]


@pytest.fixture(scope="module")
def theirs(plans, data, checkpoint, metadata, tmp_path_factory) -> Callable[[Words], dict[str, Theirs]]:
    """`theirs(words)`: what lm-eval found of all tasks that these words are for, by one process."""
    lm_eval = LmEval(tmp_path_factory.mktemp("lm_eval"), data)
    loader = TaskLoader(data=data, metadata={**metadata, "pretrained": str(checkpoint)})

    @cache
    def measured(words: Words) -> dict[str, Theirs]:
        tasks: dict[str, None] = {}
        for plan in plans.values():
            for row in plan.suite.tasks:
                if words_of(plan.suite, row) == words:
                    tasks |= dict.fromkeys(task.task_name for task in plan.tasks[row.label])
        for task in tasks:
            lm_eval.add_data(loader._config(task))
        out = lm_eval.run(checkpoint, list(tasks), words, metadata)
        (path,) = out.rglob("results_*.json")
        figures = json.loads(path.read_text())["results"]
        found = {}
        for task in tasks:
            (path,) = out.rglob(f"samples_{task}_2*.jsonl")
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            found[task] = Theirs(figures[task], sorted(samples, key=lambda each: each["doc_id"]))
        return found

    return measured


@pytest.fixture(scope="module", params=["lm-eval's loop", "shared prefixes"])
def lm(request, checkpoint) -> HFLM:
    if request.param == "shared prefixes":
        return load_answering_model(EvalOptions(model=str(checkpoint), batch_size=4), chat=False)
    return HFLM(pretrained=str(checkpoint), device="cpu")


@pytest.mark.parametrize("name", SUITES)
def test_scores_are_those_of_lm_evals_command_line(plans, theirs, lm, tmp_path, name):
    plan = plans[name]
    with open_run(tmp_path / "run", model="m", revision="r") as run:
        model = KeptAnswers(lm, run.folder / ANSWERS_FILE, 4)
        limit = None if "ruler" in name else LIMIT
        measure_suite(plan, model, run, limit=limit, seed=0, tell=lambda task: None)
    compared = 0
    for row in plan.suite.tasks:
        for task in plan.tasks[row.label]:
            found = theirs(words_of(plan.suite, row))[task.task_name]
            compared += compare(run, plan.suite, row, task.task_name, found, lm)
    pairs = {pair.name for pair in plan.suite.pairs}  # which lm-eval does not have
    assert compared == sum(item.task not in pairs for item in run.items.values())


def compare(run: EvaluationRun, suite: Suite, row: SuiteTask, task: str, theirs: Theirs, lm: HFLM) -> int:
    """Item by item, and in all; gives how many outcomes were compared."""
    count = 0
    for metric in row.metrics:
        ours = run.of(suite.name, task=task, metric=metric)
        reading = row.filter or theirs.samples[0]["filter"]
        expected = [
            (score, sample)
            for sample in theirs.samples
            if sample["filter"] == reading and metric in sample
            for score in (sample[metric] if isinstance(sample[metric], list) else [sample[metric]])
        ]
        assert len(ours) == len(expected) > 0
        for item, (found, sample) in zip(ours, expected, strict=True):
            score = found["score"] if isinstance(found, dict) else found  # of BLEU there is more than a score
            assert item.score == pytest.approx(score * row.scale, **closeness(task, lm)), item
            assert item.texts["answer"] == answer_of(sample)
        (figure,) = [
            each for each in run.results.figures if (each.name, each.metric) == (figure_name(run, row, task), metric)
        ]
        assert figure.value == pytest.approx(theirs.figures[f"{metric},{reading}"] * row.scale, **closeness(task, lm))
        count += len(ours)
    return count


def figure_name(run: EvaluationRun, row: SuiteTask, task: str) -> str:
    return task if any(figure.name == task for figure in run.results.figures) else row.label


def closeness(task: str, lm: HFLM) -> dict[str, float]:
    """TruthfulQA's score is a share of probability, so it has the rounding errors of the way it was computed."""
    by_prefixes = type(lm) is not HFLM
    return {"rel": 0, "abs": 1e-6 if "truthfulqa" in task and by_prefixes else 0}


def answer_of(sample: dict[str, Any]) -> str:
    """What the model said; of choices, the likeliest."""
    responses = sample["filtered_resps"]
    if all(isinstance(each, list) and len(each) == 2 for each in responses):
        best = max(range(len(responses)), key=lambda index: float(responses[index][0]))
        return sample["arguments"][f"gen_args_{best}"]["arg_1"].strip()
    return "\n".join(each[0] for each in sample["resps"])

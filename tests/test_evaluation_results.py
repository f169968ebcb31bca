# SPDX-License-Identifier: Apache-2.0
"""Items, figures and their intervals, paired tests, and the folder of a run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jai.errors import UserError
from jai.evaluation.results import (
    ITEMS_FILE,
    RESULTS_FILE,
    Figure,
    Item,
    TaskRecord,
    mean_figure,
    open_run,
    paired_difference,
    read_run,
)


def items_of(scores, task="t", groups=None, metric="acc"):
    groups = groups or [None] * len(scores)
    return [
        Item("s", task, str(number), metric, score, group) for number, (score, group) in enumerate(zip(scores, groups))
    ]


def figure_of(items, **options):
    return mean_figure(items, suite="s", name="mean", metric="acc", **options)


# --- Figures ---


def test_a_figure_is_the_mean_with_the_interval_of_its_binomial():
    figure = figure_of(items_of([1.0] * 120 + [0.0] * 280))
    assert (figure.value, figure.items, figure.unscored) == (0.3, 400, 0)
    half_width = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert figure.low == pytest.approx(0.3 - half_width, abs=0.008)
    assert figure.high == pytest.approx(0.3 + half_width, abs=0.008)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(5)
    figures = [figure_of(items_of((rng.random(60) < 0.4).astype(float)), seed=seed) for seed in range(200)]
    holds = np.mean([figure.low <= 0.4 <= figure.high for figure in figures])
    assert 0.90 <= holds <= 0.985  # a percentile interval of 60 items covers a little less than 0.95


def test_items_of_a_group_count_as_one_for_the_interval():
    scores = [float(number % 3 == 0) for number in range(90)]
    alone = figure_of(items_of(scores))
    fourfold = items_of(scores * 4, groups=[f"paragraph {number}" for number in range(90)] * 4)
    grouped = figure_of(fourfold)
    assert (grouped.value, grouped.low, grouped.high) == (alone.value, alone.low, alone.high)
    apart = figure_of(items_of(scores * 4))
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


def test_groups_are_looked_for_across_tasks():
    thai, english = ([float(number % 2)] * 1 for number in (0, 1))
    names = [f"question {number}" for number in range(100)]
    scores = [float(number % 2) for number in range(100)]
    parallel = items_of(scores, "th", names) + items_of([1 - score for score in scores], "en", names)
    assert thai != english
    figure = figure_of(parallel, weights={"th": 0.5, "en": 0.5})
    assert (figure.value, figure.low, figure.high) == (0.5, 0.5, 0.5)  # each question is right in one of the two


def test_means_over_tasks_and_over_items():
    items = items_of([1.0] * 10, "small") + items_of([0.0] * 90, "large")
    assert figure_of(items).value == 0.1
    assert figure_of(items, weights={"small": 0.5, "large": 0.5}).value == 0.5
    # Each task keeps its size in every draw, so two tasks without a spread have none together.
    assert figure_of(items).low == figure_of(items).high == 0.1


def test_items_without_a_score_are_counted_and_left_out():
    figure = figure_of(items_of([1.0, None, 0.0, None]))
    assert (figure.value, figure.items, figure.unscored) == (0.5, 2, 2)
    assert figure_of(items_of([None, None])) is None
    assert figure_of(items_of([1.0], "a"), weights={"a": 0.5, "b": 0.5}) is None


def test_the_seed_decides_the_interval():
    items = items_of([number % 7 / 6 for number in range(300)])
    assert figure_of(items, seed=1) == figure_of(items, seed=1)
    assert figure_of(items, seed=1) != figure_of(items, seed=2)


# --- Paired tests ---


def test_a_paired_test_tells_a_change_from_noise():
    rng = np.random.default_rng(0)
    before = (rng.random(300) < 0.5).astype(float)
    better = np.maximum(before, rng.random(300) < 0.1)
    shuffled = rng.permutation(before)
    gain = paired_difference(items_of(before), items_of(better))
    assert gain.value == pytest.approx(better.mean() - before.mean())
    assert gain.low > 0
    assert gain.p_value < 0.001
    noise = paired_difference(items_of(before), items_of(shuffled))
    assert noise.low < 0 < noise.high
    assert noise.p_value > 0.05
    same = paired_difference(items_of(before), items_of(before))
    assert (same.value, same.p_value) == (0.0, 1.0)


def test_items_are_paired_by_their_keys():
    """Whatever their order, and whichever are missing in one."""
    scores = [float(number % 3 == 0) for number in range(30)]
    same = paired_difference(items_of(scores), items_of(scores)[:0:-1])
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert (same.items, same.unpaired) == (29, 1)


def test_p_values_are_those_of_the_binomial():
    # Nine questions changed, eight of them for the better: two-sided 2 · (1 + 9) / 2^9.
    before, after = [0.0] * 8 + [1.0] + [1.0] * 50, [1.0] * 8 + [0.0] + [1.0] * 50
    assert paired_difference(items_of(before), items_of(after)).p_value == pytest.approx(20 / 512, abs=0.006)


def test_no_p_value_is_zero():
    """One of 10,001 at the least: what was seen is one of the swaps."""
    assert paired_difference(items_of([0.0] * 40), items_of([1.0] * 40)).p_value == 1 / 10_001


def test_a_paired_test_has_the_weights_of_the_figure():
    before = items_of([0.0] * 8, task="large") + items_of([0.0] * 2, task="small")
    after = items_of([0.0] * 8, task="large") + items_of([1.0] * 2, task="small")
    assert paired_difference(before, after).value == pytest.approx(0.2)
    assert paired_difference(before, after, weights={"large": 0.5, "small": 0.5}).value == pytest.approx(0.5)


def test_a_paired_test_takes_what_both_have():
    difference = paired_difference(items_of([1.0, 0.0, None]), items_of([1.0, 1.0, 1.0, 1.0]))
    assert (difference.value, difference.items, difference.unpaired) == (0.5, 2, 2)
    assert paired_difference(items_of([1.0]), items_of([1.0], task="other")) is None


# --- Runs ---

WHAT = {"model": "runs/x", "revision": "abc", "conditions": {"limit": 5}}


def test_a_run_is_read_as_it_was_written(tmp_path):
    item = Item("s", "t", "1", "acc", 1.0, "paragraph 3", {"prompt": "ประเทศไทย", "answer": "ก"})
    unread = Item("s", "t", "2", "acc", None)
    record = TaskRecord("s", "t", "1.0", "00ff", shots=5, data="owner/data", judge="gpt-4")
    figure = Figure("s", "t", "acc", 1.0, 0.5, 1.0, 1, 1)
    with open_run(tmp_path / "run", **WHAT) as run:
        run.add([item, unread])
        run.results.seeds["bootstrap"] = 0
        run.results.notes.append("a note")
        run.replace_task(record)
        run.replace_figures("s", [figure])
        run.finish()
    results, items = read_run(tmp_path / "run")
    assert items == [item, unread]
    assert (results.tasks, results.figures, results.finished) == ([record], [figure], True)
    assert (results.model, results.conditions, results.notes) == ("runs/x", {"limit": 5}, ["a note"])
    assert sorted(os.listdir(tmp_path / "run")) == [ITEMS_FILE, RESULTS_FILE]


WRITER = """
import sys, time
from pathlib import Path
from jai.evaluation.results import Item, open_run
with open_run(Path(sys.argv[1]), model="runs/x", revision="abc", conditions={"limit": 5}) as run:
    for number in range(50):
        if number == int(sys.argv[2]):
            (run.folder / "items.jsonl").open("a").write('{"suite": "s", "ta')
            print("reached", flush=True)
            time.sleep(60)
        run.add([Item("s", "t", str(number), "acc", number % 3 / 2)])
    run.finish()
"""


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(killed), "20"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"reached\n"
    with pytest.raises(UserError, match="Another process"), open_run(killed, **WHAT):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    results, items = read_run(killed)
    assert (results.finished, len(items)) == (False, 20)
    for folder in (killed, whole):
        subprocess.run([sys.executable, "-c", WRITER, str(folder), "-1"], check=True)
    for name in (ITEMS_FILE, RESULTS_FILE):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [int(item.id) for item in read_run(killed)[1]] == list(range(50))


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    """Of the outcomes and of the answers, which lie beside them."""
    with open_run(tmp_path / "run", **WHAT) as run:
        run.add(items_of([1.0]))
    paths = [tmp_path / "run" / ITEMS_FILE, tmp_path / "run" / "answers.jsonl"]
    for path in paths:
        with path.open("a") as file:
            file.write('{"suite": "s", "ta')
    with open_run(tmp_path / "run", **WHAT) as run:
        run.add(items_of([1.0, 0.0]))
        assert paths[1].read_text() == ""
    assert [item.score for item in read_run(tmp_path / "run")[1]] == [1.0, 0.0]


def test_what_is_there_is_not_measured_again(tmp_path):
    for score in (1.0, 0.0):
        with open_run(tmp_path / "run", **WHAT) as run:
            run.add(items_of([score]))
    assert [item.score for item in read_run(tmp_path / "run")[1]] == [1.0]


def test_a_run_that_is_gone_on_with_is_not_finished_until_it_is(tmp_path):
    with open_run(tmp_path / "run", **WHAT) as run:
        run.finish()
    assert read_run(tmp_path / "run")[0].finished
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run", **WHAT):
        raise KeyboardInterrupt
    assert not read_run(tmp_path / "run")[0].finished


def test_a_run_of_something_else_is_refused(tmp_path):
    with open_run(tmp_path / "run", **WHAT):
        pass
    with (
        pytest.raises(UserError, match="limit was 5 and is 6"),
        open_run(tmp_path / "run", **{**WHAT, "conditions": {"limit": 6}}),
    ):
        pass
    with open_run(tmp_path / "run", **WHAT | {"model": "moved/to/here"}) as run:  # the same files
        assert run.results.model == "moved/to/here"
    with pytest.raises(UserError, match="revision was"), open_run(tmp_path / "run", **WHAT | {"revision": "other"}):
        pass
    served = WHAT | {"revision": "http://127.0.0.1/v1"}
    with open_run(tmp_path / "served", **served):
        pass
    with pytest.raises(UserError, match="model was"), open_run(tmp_path / "served", **served | {"model": "other"}):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights").touch()
    with pytest.raises(UserError, match="is not an evaluation"), open_run(tmp_path / "other", **WHAT):
        pass


@pytest.mark.parametrize(
    "line",
    ['{"suite": "s"}', "no JSON", '{"suite": "s", "task": "t", "id": "1", "metric": "acc", "score": NaN}', "[]", "5"],
)
def test_a_damaged_line_is_named(tmp_path, line):
    with open_run(tmp_path / "run", **WHAT) as run:
        run.add(items_of([1.0]))
    path = Path(tmp_path / "run" / ITEMS_FILE)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"items.jsonl, line 2, is not an outcome"):
        read_run(tmp_path / "run")


def test_outcomes_in_a_named_pipe_are_refused(tmp_path):
    with open_run(tmp_path / "run", **WHAT) as run:
        run.save()
    path = tmp_path / "run" / ITEMS_FILE
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"items.jsonl is a named pipe, not a file"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": "x"}, "revision"),
        ({"model": ["x"], "revision": "r"}, "'model' is a list"),
        ({"model": "x", "revision": "r", "figures": [{"suite": "s", "parts": [{"task": 1}]}]}, "'task' is a number"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, problem):
    (tmp_path / RESULTS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"results.json is not a record of an evaluation \(.*{problem}"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nothing")

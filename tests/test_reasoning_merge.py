# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the reasoning recipe: its weights are the recipes', a valley is seen where one is, a run goes on."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from jai.conversion.merge.curves import parse_curve, value_for
from jai.conversion.merge.options import MergeOptions
from jai.errors import UserError
from jai.options import read_options_file

ROOT = Path(__file__).parents[1]
LAYERS = range(80)


@pytest.fixture(scope="module")
def benchmark():
    """The program's module of a name."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "benchmarks":
            del sys.modules[name]


def over_layers(weights) -> list[list[float]]:
    """The weight of each model in each layer."""
    return [
        [value_for(parse_curve("weight", weight), f"model.layers.{layer}.x", LAYERS) for layer in LAYERS]
        for weight in weights
    ]


@pytest.mark.parametrize(
    ("recipe", "shape", "ratio"), [("m1", "constant", 0.25), ("m2", "constant", 0.75), ("m3", "layer-wise", 0.75)]
)
def test_named_ratios_are_the_recipes(benchmark, recipe, shape, ratio):
    arms = benchmark("reasoning_merge_arms")
    ours = arms.merge_weights(arms.Blend("merge only", shape, ratio))
    theirs = read_options_file(ROOT / "recipes" / f"merge_{recipe}.yaml", MergeOptions)["weights"]
    assert over_layers(ours) == [pytest.approx(weights) for weights in over_layers(theirs)]


def test_all_blends_are_means(benchmark):
    arms = benchmark("reasoning_merge_arms")
    for blend in arms.blends(arms.Settings()):
        language, reasoner = over_layers(arms.merge_weights(blend))
        assert [sum(pair) for pair in zip(language, reasoner)] == pytest.approx([1] * len(LAYERS))
        assert max(reasoner) == pytest.approx(blend.ratio)


def outcomes(benchmark, middle: float) -> list:
    """Of two questions and two seeds: everything is 0.5 and 0.75 for the parents, and `middle` between them."""
    scores = {0.0: 0.5, 0.5: middle, 1.0: 0.75}
    arms, report = benchmark("reasoning_merge_arms"), benchmark("reasoning_merge_report")
    return [
        report.Outcome(
            seed,
            arms.Blend("merge only", "constant", ratio),
            {name: [(f"{number}", score) for number in range(2)] for name in report.MEASURES},
        )
        for seed in (0, 1)
        for ratio, score in scores.items()
    ]


@pytest.mark.parametrize(("middle", "cell"), [(0.25, "**-0.25 [-0.25, -0.25]**"), (0.6, "+0.10 [+0.10, +0.10]")])
def test_a_valley_is_marked(benchmark, tmp_path, middle, cell):
    benchmark("reasoning_merge_report").write_report(outcomes(benchmark, middle), tmp_path)
    text = (tmp_path / "reasoning_merge.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| merge only, 0.5 |"))
    assert set(map(str.strip, row.split("|")[2:-1])) == {cell}
    assert (tmp_path / "reasoning_merge.png").stat().st_size > 1000


def test_questions_are_in_no_training(benchmark, tmp_path):
    data = benchmark("reasoning_merge_data")
    data.write_data(tmp_path, data.DataSizes())
    asked = {
        chat["messages"][0]["content"]
        for chats in json.loads((tmp_path / "questions.json").read_text(encoding="utf-8")).values()
        for chat in chats
    }
    trained = {
        turn["content"]
        for name in ("base", "language", "reasoner", "aligned")
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for turn in json.loads(line)["messages"]
    }
    assert len(asked) > 200
    assert not asked & trained
    sums, trained_sums = (set(re.findall(r"\d \+ \d [+-] \d", "\n".join(texts))) for texts in (asked, trained))
    assert len(sums) == 2 * data.DataSizes().questions  # the same in both languages
    assert len(trained_sums) >= data.DataSizes().traces
    assert not sums & trained_sums


@pytest.mark.slow
def test_a_run_of_tiny_sizes_goes_on(benchmark, tmp_path):
    program, arms = benchmark("reasoning_merge"), benchmark("reasoning_merge_arms")
    found = program.run(arms.QUICK, [0], tmp_path)
    assert [outcome.blend for outcome in found] == arms.blends(arms.QUICK)
    for name, source in {"language": "base", "reasoner": "base", "aligned": "language"}.items():
        record = json.loads((tmp_path / "seed-0" / name / "provenance.json").read_text())
        assert Path(record["inputs"][0]["name"]).name == source
    assert all((tmp_path / f"reasoning_merge.{kind}").stat().st_size > 1000 for kind in ("md", "png"))
    merges = [blend for blend in arms.blends(arms.QUICK) if not blend.is_parent]
    assert len(list((tmp_path / "seed-0" / "measured").iterdir())) == len(merges) + 3

    def written() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("seed-0/*/*")}

    before = written()
    (tmp_path / "seed-0" / "measured" / "aligned, constant, 0.5.json").unlink()
    again = program.run(arms.QUICK, [0], tmp_path)
    assert [outcome.scores for outcome in again] == [outcome.scores for outcome in found]  # also what was made anew
    changed = {Path(path).name for path, when in written().items() if before[path] != when}
    assert changed == {"aligned, constant, 0.5.json"}
    with pytest.raises(UserError, match="holds runs with other data, base_steps"):
        program.run(arms.Settings(), [0], tmp_path)

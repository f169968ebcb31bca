# SPDX-License-Identifier: Apache-2.0
"""The benchmark of forgetting: what its arms cost, what equal FLOPs are, and a whole run in tiny sizes that goes on."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jai.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def arms():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("forgetting_arms")
    sys.modules.pop("forgetting_arms", None)


def test_a_token_costs_what_its_matrices_do(arms):
    settings = arms.Settings()
    width, inner, layers = 64, 176, 6
    layer, scores = 4 * width**2 + 3 * width * inner, width * settings.context
    head = settings.vocabulary * width
    plain, deep, new, moe = (
        arms.GROUPS["forgetting"][f"{name}, 27 % Thai"]
        for name in ("plain", "upscaled", "upscaled, only what is new", "upscaled, four experts")
    )
    assert arms.flops_of_token(plain, settings) == 6 * (layers * (layer + scores) + head)
    assert arms.flops_of_token(deep, settings) == 6 * (10 * (layer + scores) + head)
    # Four of ten layers are new: the other six have no gradient of their weights, a third of what a weight costs.
    assert arms.flops_of_token(new, settings) == pytest.approx(6 * (10 * (layer + scores) + head) - 2 * 6 * layer)
    assert arms.flops_of_token(moe, settings) == 6 * (10 * (layer + 3 * width * inner + scores) + head)


def test_plain_training_goes_on_to_the_flops_of_each_other_arm(arms):
    settings = arms.Settings()
    group = arms.GROUPS["forgetting"]
    steps = arms.measured_steps("plain, 27 % Thai", "forgetting", settings)
    last = arms.equal_flops_step(group["plain, 27 % Thai"], group["upscaled, four experts, 27 % Thai"], settings)
    assert steps[-1] == last > settings.steps in steps
    assert arms.measured_steps("upscaled, 27 % Thai", "forgetting", settings)[-1] == settings.steps


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data, which is not here")
def test_a_run_of_tiny_sizes_goes_on_and_trains_what_its_arms_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    forgetting = importlib.import_module("forgetting")
    settings = replace(forgetting.QUICK, seeds=(0,))
    runs, new = forgetting.forgetting(settings, DATA, tmp_path, ["starts"])
    assert new
    assert [run.name for run in runs] == list(forgetting.GROUPS["starts"])
    by_name = {run.name: run.points for run in runs}
    # `identity` is the function that it was made from; copies are not.
    assert by_name["identity"][0].english == pytest.approx(by_name["not upscaled"][0].english, abs=1e-4)
    assert abs(by_name["copies, alpha 0.1"][0].english - by_name["not upscaled"][0].english) > 1e-3
    assert all(points[-1].english < points[0].english for points in by_name.values())

    # An arm that two groups have is trained once; another seed is all that is new.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    runs, _ = forgetting.forgetting(settings, DATA, tmp_path, ["starts", "shares"])
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}.items() >= before.items()
    shared = {run.group: run.points for run in runs if run.name in ("identity", "0 % Thai")}
    assert shared["starts"] == shared["shares"]
    assert json.loads((tmp_path / "setup.json").read_text())["context"] == settings.context
    for name in ("forgetting.csv", "forgetting.md", "forgetting.png"):
        assert (tmp_path / name).stat().st_size > 100

    with pytest.raises(UserError, match="other steps"):
        forgetting.forgetting(replace(settings, steps=5), DATA, tmp_path, ["starts"])

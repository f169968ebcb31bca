# SPDX-License-Identifier: Apache-2.0
"""The whole demo, with a few steps of training: every verb as a process, the Hub, the report."""

import html.parser
import json
import os
import subprocess
import sys

import pytest

from jai.demo.run import QUICK_STEPS
from jai.demo.text.corpus import build_text, write_text_files
from jai.files import sha256
from jai.provenance import chain, read_step

# Void elements of HTML have no end.
VOID = {"meta", "img", "br"}


class Balance(html.parser.HTMLParser):
    """Collects what a page loads from elsewhere, and elements that are closed out of order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.misplaced = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.misplaced.append(tag)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    process = subprocess.run(
        [sys.executable, "-m", "jai", "demo", str(folder), "--quick", "--seed", "3"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=os.environ | {"HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return folder, process.stdout


def test_every_verb_ran(demo):
    folder, output = demo
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    verbs = [command["line"].split()[1] for command in results["commands"] if command["line"].startswith("jai ")]
    # The second conversion is the paper's start, beside the product's own.
    assert verbs == ["tokenizer", "convert", "inspect", "convert", "sft", "sft", "dpo", "publish", "generate"]
    training = [command["line"] for command in results["commands"] if command["line"].split()[1] in ("sft", "dpo")]
    assert len(training) == 3
    assert all(line.endswith(f"--max_steps {QUICK_STEPS} --seed 3") for line in training)
    loaded = f"{results['jai_parameters']:,} parameters, float32; logits equal to the installed package's, bit for bit"
    assert results["checks"] == {
        "Loads in a clean process": f"{loaded} (through trust_remote_code, jai not importable)",
        "Back from the Hub bit-equal": "6 files, SHA-256 equal",
    }
    assert all(check in output for check in results["checks"])
    assert results["peak_memory_mb"] < 4000


def test_what_must_hold_without_training_holds(demo):
    results = json.loads((demo[0] / "results.json").read_text(encoding="utf-8"))
    own, papers = results["starts"]
    assert own["kl"] < 1e-9 < 1e-6 < papers["kl"]
    assert own["bits"]["en"] < papers["bits"]["en"]
    assert results["fertility"]["extended"]["th"] < 0.4 < results["fertility"]["base"]["th"]
    assert all(sum(layer) == pytest.approx(1) for load in results["router_load"].values() for layer in load)
    assert list(results["alphas_before"].values()) == [0] * 3
    assert all(results["alphas_after"].values())


def test_a_small_suite_is_measured_before_and_after(demo):
    folder, _ = demo
    suite = json.loads((folder / "results.json").read_text(encoding="utf-8"))["suite"]
    assert [(score["name"], score["items"]) for score in suite] == [("Thai", 40), ("English", 40), ("mean", 80)]
    for score in suite:
        for value, low, high in (score["before"], score["after"]):
            assert 0 <= low <= value <= high <= 1
        assert 0 < score["p_value"] <= 1
    assert "Questions with four choices" in (folder / "report.html").read_text(encoding="utf-8")
    scores = json.loads((folder / "dpo" / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    recorded = {score["metric_name"]: score["intervals"] for score in scores if score["dataset"] == "jai-demo"}
    assert recorded["The demo's questions, Thai"] == {"DPO": suite[0]["after"][1:]}


def test_the_seed_decides_the_text(demo, tmp_path):
    for seed in (3, 0):
        write_text_files(build_text(seed), tmp_path / str(seed))
    made, same, other = (
        (folder / "pretrain_th.txt").read_bytes() for folder in (demo[0] / "corpus", tmp_path / "3", tmp_path / "0")
    )
    assert made == same != other


def test_training_record_is_carried_to_the_end(demo):
    steps = chain(read_step(demo[0] / "dpo"))
    assert [step["step"] for step in steps] == ["convert", "pretrain", "sft", "dpo"]
    assert [entry["name"] for step in steps for entry in step["inputs"]][1:] == ["converted", "pretrained", "sft"]
    weights = sha256(demo[0] / "pretrained" / "model.safetensors")
    assert steps[2]["inputs"][0]["files"]["model.safetensors"] == weights


def test_report_is_self_contained(demo):
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert balance.misplaced == []
    assert len(balance.sources) == 6
    assert all(source.startswith("data:image/svg+xml;base64,") for source in balance.sources)
    text = (demo[0] / "report.md").read_text(encoding="utf-8")
    for figure in ("plan", "stages", "curves", "dpo", "router", "fertility"):
        assert f"(figures/{figure}.svg)" in text
        assert (demo[0] / "figures" / f"{figure}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert str(demo[0]) not in page + text

# SPDX-License-Identifier: Apache-2.0
"""Run the generic suites of transformers, PEFT and TRL on a tiny JAI, and count.

    python tests/conformance/run.py transformers --sources SOURCES -n 2

Options that it does not know are pytest's.

SOURCES holds the source trees of the three libraries in folders of their names, at the versions that are installed (see
docs/conformance.md). They stay as they are: the tests run in a copy.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import fixtures

HERE = Path(__file__).parent
FILES = {
    "transformers": ["tests/models/jai/test_modeling_jai.py", "-k", "JaiModelTest"],
    "mixtral": ["tests/models/jai/test_modeling_jai.py", "-k", "MixtralModelTest"],
    "peft": ["tests/test_decoder_models.py", "tests/test_target_parameters.py"],
    "trl": [f"tests/test_{name}_trainer.py" for name in ("sft", "dpo", "kto", "grpo", "reward")],
}


@dataclass
class Result:
    """What became of a suite: numbers, names of failures, and how many tests were skipped for which reason."""

    passed: int
    failures: dict[str, str]
    skips: Counter[str]
    seconds: float


def prepare(suite: str, sources: Path, folder: Path) -> None:
    """Copy the tests of `suite` into `folder`, with what we add."""
    source = sources / ("transformers" if suite == "mixtral" else suite)
    if not (source / "tests").is_dir():
        sys.exit(f"{source} has no folder `tests`; docs/conformance.md says how to get it.")
    shutil.copytree(source / "tests", folder / "tests")
    (folder / "tests/__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    if source.name == "transformers":
        for part in ("src", "utils"):
            (folder / part).symlink_to((source / part).resolve())
        (folder / "tests/models/jai").mkdir(parents=True)
        (folder / "tests/models/jai/__init__.py").touch()
        shutil.copy(HERE / "suite_transformers.py", folder / "tests/models/jai/test_modeling_jai.py")
        if not (folder / "tests/distributed_testing_utils.py").exists():  # the sdist has none
            shutil.copy(HERE / "distributed_testing_utils.py", folder / "tests")
    else:
        fixtures.build(folder)
        shutil.copy(HERE / "plugin.py", folder / "conftest.py")


def read_report(path: Path) -> Result:
    """Read pytest's JUnit report; reasons lose the names of classes, so that equal ones count as one."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    passed, failures, skips = 0, {}, Counter()
    for case in suite.iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            failures[f"{case.get('classname')}::{case.get('name')}"] = problem.get("message", "").strip()
        elif skipped is not None:
            reason = re.sub(r"^.*? is skipped: ", "", skipped.get("message", ""))
            reason = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", reason)
            reason = re.sub(r"\b(Jai|Mixtral)\w+\b", "the model", reason)
            skips[re.sub(r"\b\w+Config\b", "the method", reason)] += 1
        else:
            passed += 1
    return Result(passed, failures, skips, float(suite.get("time", 0)))


def main() -> int:
    """Run one suite and print its numbers; 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(FILES))
    parser.add_argument("--sources", type=Path, required=True, help="folder with transformers/, peft/ and trl/")
    given, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        prepare(given.suite, given.sources, folder)
        command = [sys.executable, "-m", "pytest", *FILES[given.suite], "-q", "-W", "ignore", "--tb=short"]
        subprocess.run([*command, "--junitxml=report.xml", *pytest_options], cwd=folder, env=environment, check=False)
        result = read_report(folder / "report.xml")
        left_out = folder / "left_out.json"
        other_models = Counter(json.loads(left_out.read_text()) if left_out.exists() else {})
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    print(f"\n{given.suite} ({libraries}): {result.passed} passed, {len(result.failures)} failed,", end=" ")
    print(f"{result.skips.total()} skipped, {other_models.total()} left out, {result.seconds:.0f} s")
    for test, message in result.failures.items():
        print(f"failed   {test}: {message.splitlines()[0] if message else ''}")
    for word, reasons in (("skipped", result.skips), ("left out", other_models)):
        for reason, count in reasons.most_common():
            print(f"{word:8} {count:5}  {reason}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())

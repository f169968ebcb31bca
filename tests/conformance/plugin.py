# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that leaves out what PEFT's and TRL's tests ask of other models, and says so.

A test runs if all it loads from the Hub has a stand-in in the working directory (see fixtures.py), and it runs once: a
JAI stands for every causal language model, so the same test under another name would be the same test again.
"""

import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import jai  # noqa: F401 (registers the classes)

REPOSITORY = re.compile(r"[\"']([\w-]+-internal-testing/[\w.-]+)[\"']")
# Tests whose name or code is about one architecture although the model that they load has a stand-in.
OTHER_ARCHITECTURE = {
    "test_prompt_tuning_trust_remote_code": "reads OPT's `model.decoder`",
    "test_lora_layer_replication": "counts the layers and linear layers of a tiny Llama",
}


def reason_to_leave_out(item: pytest.Item, seen: set[str]) -> str | None:
    """Why `item` does not apply to a JAI, or None; adds what it runs to `seen`."""
    name = item.originalname
    if name in OTHER_ARCHITECTURE:
        return f"{name}: {OTHER_ARCHITECTURE[name]}"
    given = item.callspec.params if hasattr(item, "callspec") else {}
    _, _, body = inspect.getsource(item.function).partition("def ")  # less the decorators, which name other models too
    loaded = REPOSITORY.findall(body + " ".join(map(repr, given.values())))
    missing = [repository for repository in loaded if not Path(repository).is_dir()]
    if missing:
        return f"loads {missing[0]}, which no JAI stands for"
    test = item.nodeid
    for repository in loaded:
        test = test.replace(repository, "")
    if test in seen:
        return "the same test under another model's name"
    seen.add(test)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: set[str] = set()
    # Llama's name last: under it PEFT's tests skip every merge, of whatever method.
    reasons = {item: reason_to_leave_out(item, seen) for item in sorted(items, key=lambda it: "Llama" in it.nodeid)}
    config.hook.pytest_deselected(items=[item for item in items if reasons[item]])
    items[:] = [item for item in items if not reasons[item]]
    Path("left_out.json").write_text(json.dumps(Counter(filter(None, reasons.values()))))

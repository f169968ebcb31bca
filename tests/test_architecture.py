# SPDX-License-Identifier: Apache-2.0
"""Where things go: imports point down the layers of CONTRIBUTING.md, in no circle, and a public name is one thing."""

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import jai

ROOT = Path(jai.__file__).parent
# Folders that the package does not ship, and the Space, whose files stand alone on the Hub.
OUTSIDE = ("tests", "benchmarks", "examples", "runs", "build", "hub_card/space")


def layers() -> list[list[str]]:
    """The picture in CONTRIBUTING.md, from the top layer down: each line names the modules and packages of a layer."""
    picture = re.search(r"<!-- layers -->\s+```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return [line.split("—")[0].split() for line in picture[1].strip().splitlines()]


def modules() -> dict[str, Path]:
    """Path of each module of the package by its name without `jai.`; packages by the name of their folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if place.as_posix() != "__init__.py" and not place.as_posix().startswith((".", *OUTSIDE)):
            found[".".join(place.with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports; imports inside functions and for type checkers count too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".") if package else []
                base = ".".join(["jai", *parents[: len(parents) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            inside = target.removeprefix("jai.") if target.startswith("jai.") else None
            if inside is not None:
                found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found & MODULES.keys() - {name}


def layer_of(name: str) -> int:
    """Number of a module's layer, the top one being 0; the longest name of a package in the picture decides."""
    places = {entry.rstrip("/").replace("/", "."): number for number, layer in enumerate(layers()) for entry in layer}
    fitting = [entry for entry in places if name == entry or name.startswith(f"{entry}.")]
    assert fitting, f"CONTRIBUTING.md names no layer for {name}"
    return places[max(fitting, key=len)]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    wrong = [target for target in imports_of(name) if layer_of(target) < layer_of(name)]
    assert not wrong, f"{name} imports {wrong} from a layer above"


def test_imports_make_no_circle():
    try:
        list(TopologicalSorter({name: imports_of(name) for name in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_public_name_means_one_thing():
    """But for the command line, whose functions are named after the verbs that they call, and `main`."""
    owners = defaultdict(list)
    for name, path in MODULES.items():
        if not name.startswith("cli"):
            for node in ast.parse(path.read_text()).body:
                if (
                    isinstance(node, ast.ClassDef | ast.FunctionDef)
                    and not node.name.startswith("_")
                    and node.name != "main"
                ):
                    owners[node.name].append(name)
    assert {public: where for public, where in owners.items() if len(where) > 1} == {}

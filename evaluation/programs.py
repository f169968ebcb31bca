# SPDX-License-Identifier: Apache-2.0
"""Programs that a model writes, run on tests in the form of LiveCodeBench (Jain et al., 2024, arXiv:2403.07974)."""

import base64
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from jai.evaluation.text import split_thought

if TYPE_CHECKING:
    from datasets import Dataset

SECONDS = 6.0  # of one test, as LiveCodeBench has it
_MEMORY = 4 << 30  # bytes of a program's address space
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
# What programs on such sites find imported, by custom of LiveCodeBench.
_IMPORTS = """\
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from random import *
from typing import *
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, string, sys
sys.setrecursionlimit(50000)
"""
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)  # must come first, and these change nothing here
_CALL = """

import json as _json, sys as _sys
_find = (lambda: getattr(Solution(), {name!r})) if "Solution" in globals() else (lambda: globals()[{name!r}])
_result = _find()(*[_json.loads(_line) for _line in _sys.stdin.read().split("\\n") if _line.strip()])
_sys.stdout.write("\\n" + {mark!r} + _json.dumps(_result, default=list) + "\\n")
"""
_MARK = "the value of the function: "


def program_docs(dataset: "Dataset") -> "Dataset":
    """Rows with what is asked and what a program is tested on, of LiveCodeBench's columns.

    Raises:
        KeyError, ValueError: if a row lacks a column, or its tests cannot be read.
    """
    return dataset.map(_program_doc, remove_columns=dataset.column_names)


def _program_doc(row: Mapping[str, Any]) -> dict[str, str]:
    tests = [*json.loads(row["public_test_cases"]), *hidden_tests(row["private_test_cases"])]
    function = json.loads(row["metadata"] or "{}").get("func_name") or ""
    cases = [[str(test["input"]), str(test["output"])] for test in tests]
    return {
        "problem": row["question_content"].strip(),
        "starter_code": row["starter_code"] or "",
        "function": function,
        "tests": json.dumps(cases, ensure_ascii=False),
        "date": str(row.get("contest_date") or ""),
    }


def check_program_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it is.

    Raises:
        KeyError, ValueError: as `program_docs`; here, where file and line are known.
    """
    _program_doc(row)
    return dict(row)


def hidden_tests(text: str) -> list[dict[str, Any]]:
    """The tests that LiveCodeBench packs: JSON, or the Base64 of the zlib of a pickled text of JSON.

    A pickle may run code when it is read; here it may hold a text and nothing else.

    Raises:
        ValueError: if it is neither.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private_test_cases cannot be read: {error}") from error


class _TextUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and should be a text")


def program_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the program in a reply passes all its tests, for lm-eval's `process_results`."""
    program = program_of(results[0])
    tests = json.loads(doc["tests"])
    return {"pass@1": float(program is not None and passes(program, tests, function=doc["function"]))}


def program_of(reply: str) -> str | None:
    """The last block of code after the thought; None where there is none."""
    blocks = _FENCED.findall(split_thought(reply).answer)
    return blocks[-1] if blocks else None


def passes(program: str, tests: Sequence[Sequence[str]], *, function: str = "", seconds: float = SECONDS) -> bool:
    """Whether a program gives what is expected, in every test. It is run on this machine, in a process of its own with
    a limit of time and memory, in an empty folder; it is not kept from the network or from files.

    Args:
        program: in Python.
        tests: each an input and an output: of the program as a whole, or the function's arguments, a line of JSON each,
            and its value as JSON.
        function: that is called; empty where the program reads and prints.
        seconds: for one test.
    """
    if not tests:
        return False  # nothing shows that it is right
    code = _IMPORTS + _FUTURE.sub("", program) + (_CALL.format(name=function, mark=_MARK) if function else "")
    return all(_passes_one(code, given, expected, bool(function), seconds) for given, expected in tests)


def _passes_one(code: str, given: str, expected: str, is_function: bool, seconds: float) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(code)
        try:
            done = subprocess.run(
                [sys.executable, "-I", path],
                input=given.encode(),
                capture_output=True,
                timeout=seconds,
                cwd=folder,
                env={"PATH": os.defpath, "PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "0"},
                preexec_fn=_limit if os.name == "posix" else None,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode != 0:
        return False
    printed = done.stdout.decode("utf-8", errors="replace")
    if not is_function:
        return same_output(printed, expected)
    value = printed.rpartition(_MARK)[2]
    try:
        return bool(json.loads(value) == json.loads(expected))
    except ValueError:
        return False


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are the same but for spaces at the ends of lines and the way in which numbers are written."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(wanted) and all(
        mine == theirs or _same_numbers(mine, theirs) for mine, theirs in zip(lines, wanted)
    )


def _same_numbers(first: str, second: str) -> bool:
    try:
        return [Decimal(word) for word in first.split()] == [Decimal(word) for word in second.split()]
    except InvalidOperation:
        return False

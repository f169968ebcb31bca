# SPDX-License-Identifier: Apache-2.0
"""What tests share that give `jai` hundreds of damaged inputs: running it, what must hold, and the figures."""

import io
import json
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jai.cli.app import main
from jai.files import work_folder

SECONDS = float(os.environ.get("JAI_FUZZ_SECONDS", "600"))
HANG_SECONDS = 60  # an example takes a quarter of a second
MEMORY = 3 * 2**30  # bytes that may be added to what this process has
LARGEST_FILE = 2**28


# --- Running jai, and what must hold whatever it was given ---


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def kind(self) -> str:
        """What happened, without the names and numbers of this example."""
        if self.code == 0:
            return "ok"
        message = re.split("^Error: ", self.err, flags=re.MULTILINE)[-1]
        return re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|[\w.]*\d[\w.,]*|[\w.]*[._][\w.]+", "…", message)[:60]


class Hang(BaseException):
    """An example that takes for ever."""


@contextmanager
def no_hanging() -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise Hang(f"no end after {HANG_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*words: str | Path) -> Outcome:
    """Run `jai …` in this process; whatever is not an exit is a traceback to the user."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    argv, sys.argv = sys.argv, ["jai", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err), no_hanging():
            main()
        code: Any = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.argv = argv
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))  # type: ignore[attr-defined]
    return Outcome(code, *texts)


def check_outcome(outcome: Outcome) -> None:
    assert outcome.code in (0, 1, 2), outcome
    assert "Traceback" not in outcome.err, outcome.err
    assert len(re.findall("^Error: ", outcome.err, re.MULTILINE)) == (outcome.code != 0), outcome.err


def check_nothing_left(out: Path) -> None:
    assert not out.exists()
    assert not work_folder(out).exists()


def check_whole(out: Path, *, forward: bool = False) -> None:
    """A folder is what its configuration says, to readers that are not ours, and every weight is a number."""
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert file.get_tensor(name).isfinite().all(), f"{name} in {path} is not finite"
    for path in out.glob("*.json"):
        assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict), path
    if (out / "generation_config.json").exists():
        GenerationConfig.from_pretrained(out)
    if json.loads((out / "config.json").read_text())["model_type"] == "jai_ffn_snapshot":
        return
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    rows = model.get_input_embeddings().weight.shape[0]
    if (out / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = tokenizer("A ก.")["input_ids"]
        assert max(tokenizer.get_vocab().values()) < rows, "ids beyond the rows"
        assert max(ids) < rows
    if forward:
        with torch.inference_mode():
            assert model.eval()(torch.tensor([[1, 5, 6, 7]])).logits.isfinite().all()


# --- Examples: how many, and the figures ---


class Figures:
    """How often each kind of outcome was met."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def add(self, outcome: Outcome | str) -> None:
        self.kinds[outcome if isinstance(outcome, str) else outcome.kind] += 1

    def __str__(self) -> str:
        ok, total = self.kinds["ok"], self.kinds.total()
        messages = len(self.kinds - Counter(ok=ok))
        return f"{total:,} examples: {ok:,} taken, {total - ok:,} refused with {messages:,} messages"


def fuzz(strategy: st.SearchStrategy, check: Callable[[Any], None], *, examples: int, seconds: float | None) -> None:
    """Check examples: the same ones each time, or without `examples` new ones until the seconds are over."""

    def some(count: int, **more: Any) -> Callable[[], None]:
        # An example is one change already: to look for a smaller one would take minutes.
        phases = [Phase.generate]
        return settings(max_examples=count, deadline=None, suppress_health_check=[*HealthCheck], phases=phases, **more)(
            given(strategy)(check)
        )

    if seconds is None:
        some(examples, derandomize=True, database=None)()
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seed(time.time_ns())(some(20))()


@contextmanager
def bounds() -> Iterator[None]:
    """Whoever takes the machine's memory, disk or network fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: used + MEMORY, resource.RLIMIT_FSIZE: LARGEST_FILE}
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, soft in limits.items():
        resource.setrlimit(kind, (soft, before[kind][1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
    for kind, limit in before.items():
        resource.setrlimit(kind, limit)

# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer ablate`: which tokenizer makes the better language model, in bits per character.

The same small phi-3 is trained from the same seeds with each tokenizer, on the same documents in the same order, and
read at equal characters, at equal tokens and at equal compute.
"""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import Phi3ForCausalLM
from transformers.utils import logging as transformers_logging

from jai.errors import UserError
from jai.files import new_folder, sha256
from jai.small_model import bits_per_character, build_model, extend_model, flops_per_token, train
from jai.tokenization.ablation.config import AblationConfig, Arm
from jai.tokenization.ablation.report import (
    EQUAL_CHARACTERS,
    EQUAL_COMPUTE,
    EQUAL_TOKENS,
    ArmRun,
    Point,
    write_report,
)
from jai.tokenization.ablation.text import SplitText, Stream, encode, encode_stream, reading_order, split_text
from jai.tokenization.corpus import TextFile, open_sources
from jai.tokenization.extend import extend_tokenizer, new_token_pieces
from jai.tokenization.loading import load_tokenizer

# Parts of the equal characters, and multiples of them, at which the curves have points.
_CURVE = (0.125, 0.25, 0.5, 1, 2, 4, 8)


def ablate(config: AblationConfig, out: Path, workers: int = 1, console: Console | None = None) -> Path:
    """Train every arm with every seed and report bits per character.

    `out` gets `tokenizers/` (those that were trained), `runs/ARM-SEED.json`, and `ablation.json`, `.md` and `.png`,
    which are written anew after every run. Started again, it goes on with the runs that are missing.

    Args:
        config: what to compare.
        out: folder to write, or to go on in.
        workers: runs at a time, each with its share of the processor's cores.
        console: where the plan and the result are printed; None is standard output.

    Returns:
        The report, `out/ablation.md`.

    Raises:
        UserError: for text or tokenizers that cannot be used, or if `out` holds runs of another configuration.
    """
    console = console or Console()
    if workers < 1:
        raise UserError(f"workers is {workers}. Give 1 or more.")
    console.print(_plan_table(config, out, workers))
    setup = _common_setup(config)
    with _pool(workers) as pool:
        tokenizers = list(pool(_arm_tokenizer, [(config, arm, out, setup) for arm in config.arms]))
        jobs = [
            _Job(config, arm, seed, out, tokenizer, sha256, entries, setup)
            for seed in config.seeds
            for arm, (tokenizer, sha256, entries) in zip(config.arms, tokenizers)
        ]
        characters = list(pool(_prepare_stream, [(job,) for job in jobs]))
        jobs = _with_stops(jobs, characters)
        runs = [run for job in jobs if (run := _finished_run(job))]
        missing = [job for job in jobs if not job.file.exists()]
        console.print(f"{len(runs)} of {len(jobs)} runs are finished already.", highlight=False)
        if config.training.pretrain_tokens:
            seeds = dict.fromkeys(job.seed for job in missing)
            list(pool(_pretrain, [(config, seed, out, setup) for seed in seeds]))
        for run in pool(_run, [(job,) for job in missing]):
            runs.append(run)
            write_report(runs, [arm.name for arm in config.arms], out)
    report = write_report(runs, [arm.name for arm in config.arms], out)
    console.print(f"[bold green]Report written to[/] {escape(str(report))}", soft_wrap=True)
    console.print("Next: jai tokenizer train TEXT... with the options of the arm that you choose.", highlight=False)
    return report


@dataclass(frozen=True)
class _Job:
    """One run: an arm and a seed.

    Attributes:
        tokenizer: folder or Hub id of the arm's tokenizer.
        sha256: hash of that tokenizer.
        entries: its size.
        setup: what all arms have in common.
        readouts: rows after which the arms are compared, by name.
        curve: other rows after which the run is measured.
    """

    config: AblationConfig
    arm: Arm
    seed: int
    out: Path
    tokenizer: str
    sha256: str
    entries: int
    setup: dict[str, Any]
    readouts: dict[str, int] = field(default_factory=dict)
    curve: list[int] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.out / "runs" / f"{self.arm.name}-{self.seed}.json"

    @property
    def stream_file(self) -> Path:
        return self.out / "streams" / f"{self.arm.name}-{self.seed}.npz"

    @property
    def full_setup(self) -> dict[str, Any]:
        own = {"arm": asdict(self.arm), "tokenizer": self.sha256, "seed": self.seed}
        return self.setup | own | {"readouts": self.readouts}


def readout_rows(characters: Mapping[str, np.ndarray], flops: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """Rows after which each arm is read, so that the arms of one seed are compared at equals.

    At equal characters: as many as the arm that reads the fewest has read in the end. At equal tokens, which is equal
    compute of the layers: all rows. At equal compute with the head: what the cheapest arm has spent in the end.

    Args:
        characters: characters predicted after each row, by arm; all arms have as many rows.
        flops: operations of a token, by arm.
    """
    rows = len(next(iter(characters.values())))
    fewest = min(read[-1] for read in characters.values())
    cheapest = min(flops.values())
    return {
        arm: {
            EQUAL_CHARACTERS: int(np.abs(read - fewest).argmin()) + 1,
            EQUAL_TOKENS: rows,
            EQUAL_COMPUTE: max(round(rows * cheapest / flops[arm]), 1),
        }
        for arm, read in characters.items()
    }


def _with_stops(jobs: Sequence[_Job], characters: Sequence[np.ndarray]) -> list[_Job]:
    result = []
    for job in jobs:
        same_seed = {other.arm.name: i for i, other in enumerate(jobs) if other.seed == job.seed}
        flops = {name: sum(_flops(jobs[i])) for name, i in same_seed.items()}
        read = {name: characters[i] for name, i in same_seed.items()}
        readouts = readout_rows(read, flops)[job.arm.name]
        mine = read[job.arm.name]
        fewest = min(other[-1] for other in read.values())
        curve = [int(np.searchsorted(mine, part * fewest)) + 1 for part in _CURVE if part * fewest < mine[-1]]
        curve = [row for row in curve if all(abs(row / readout - 1) > 0.05 for readout in readouts.values())]
        result.append(replace(job, readouts=readouts, curve=curve))
    return result


def _flops(job: _Job) -> tuple[float, float]:
    return flops_per_token(job.config.model, job.entries, job.config.training.context)


# What the processes do


def _arm_tokenizer(config: AblationConfig, arm: Arm, out: Path, setup: dict[str, Any]) -> tuple[str, str, int]:
    """Folder or Hub id of an arm's tokenizer, which is trained if need be; its hash and its size."""
    name = arm.tokenizer or str(config.base)
    if arm.vocab_size:
        folder = out / "tokenizers" / arm.name
        name = str(folder)
        record = setup | {"arm": asdict(arm)}
        if folder.exists():
            _check_same(folder / _RECORD_FILE, record, _TOKENIZER_KEYS)
        else:
            began = time.perf_counter()
            texts = (piece for pieces in _text(config).train.values() for piece in pieces)
            trained = extend_tokenizer(
                _load_tokenizer(str(config.base)),
                texts,
                vocab_size=arm.vocab_size,
                script=config.script,
                max_token_chars=arm.max_token_chars,
                unit=arm.unit,
            )
            with new_folder(folder) as partial:
                trained.save_pretrained(partial)
                (partial / _RECORD_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
            _say(f"{arm.name}: tokenizer of {len(trained):,} entries trained ({time.perf_counter() - began:.0f} s)")
    tokenizer = _load_tokenizer(name)
    return name, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), len(tokenizer)


def _prepare_stream(job: _Job) -> np.ndarray:
    """Encode what a run reads into `streams/`; returns the characters predicted after each row."""
    key = json.dumps([_pick(job.setup, _STREAM_KEYS), job.sha256, job.seed, job.config.training.context])
    if job.stream_file.exists():
        with np.load(job.stream_file) as stored:
            if str(stored["key"]) == key and len(stored["characters"]) == job.config.training.rows:
                return stored["characters"]
    stream = _stream(job.config, job.tokenizer, job.config.training.rows, job.seed)
    job.stream_file.parent.mkdir(parents=True, exist_ok=True)
    partial = job.stream_file.with_suffix(f".partial-{os.getpid()}.npz")
    np.savez(partial, ids=stream.ids, characters=stream.characters, key=np.array(key))
    partial.replace(job.stream_file)
    return stream.characters


def _pretrain(config: AblationConfig, seed: int, out: Path, setup: dict[str, Any]) -> None:
    """Train the model of a seed with the base tokenizer, on an order of the text that no run has."""
    folder = _pretrained_folder(out, seed)
    if folder.exists():
        _check_same(folder / _RECORD_FILE, setup | {"seed": seed}, (*setup, "seed"))
        return
    tokenizer = _load_tokenizer(str(config.base))
    rows = max(config.training.pretrain_tokens // config.training.context, 1)
    stream = _stream(config, str(config.base), rows, f"pretrain {seed}")
    model = build_model(config.model, len(tokenizer), config.training.context, seed)

    def at_stop(row: int, seconds: float) -> None:
        _say(f"pretraining, seed {seed}: {row * config.training.context:,} tokens ({seconds:.0f} s)")

    train(model, stream.ids, config.training, [rows // 4, rows // 2, rows * 3 // 4, rows], at_stop)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        (partial / _RECORD_FILE).write_text(json.dumps(setup | {"seed": seed}), encoding="utf-8")


def _run(job: _Job) -> ArmRun:
    """Train one arm with one seed and write its result."""
    config, training = job.config, job.config.training
    tokenizer = _load_tokenizer(job.tokenizer)
    heldout = _text(config).heldout
    with np.load(job.stream_file) as stored:
        stream = Stream(stored["ids"], stored["characters"])
    if training.pretrain_tokens:
        start = Phi3ForCausalLM.from_pretrained(_pretrained_folder(job.out, job.seed), dtype=torch.float32)
        pieces = new_token_pieces(_load_tokenizer(str(config.base)).backend_tokenizer, tokenizer.backend_tokenizer)
        model = extend_model(start, config.model, training.context, job.entries, pieces, job.seed)
    else:
        model = build_model(config.model, job.entries, training.context, job.seed)
    run = ArmRun(
        arm=job.arm.name,
        seed=job.seed,
        entries=job.entries,
        tokens_per_character={
            language: sum(len(ids) for _, ids in encode(tokenizer, texts)) / sum(map(len, texts))
            for language, texts in heldout.items()
        },
        readouts=job.readouts,
        points=[],
        setup=job.full_setup,
    )

    bits_of = partial(
        bits_per_character,
        model,
        tokenizer,
        context=training.context,
        batch_rows=training.batch_rows,
        dtype=training.dtype,
    )

    def at_stop(rows: int, seconds: float) -> None:
        bits = {name: bits_of(texts) for name, texts in heldout.items()}
        model.train()
        tokens = rows * training.context
        characters = float(stream.characters[rows - 1])
        run.points.append(Point(rows, tokens, characters, tokens * sum(_flops(job)), bits, seconds))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
        _say(
            f"{job.arm.name}, seed {job.seed}: {tokens:,} of {training.rows * training.context:,} tokens, "
            f"{characters:,.0f} characters: {shown} bits a character ({seconds:.0f} s)"
        )

    train(model, stream.ids, training, [*job.readouts.values(), *job.curve], at_stop)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = job.file.with_suffix(f".partial-{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")
    unfinished.replace(job.file)
    return run


def _stream(config: AblationConfig, tokenizer: str, rows: int, seed: int | str) -> Stream:
    order = reading_order(_text(config), {language.name: language.weight for language in config.languages}, seed)
    return encode_stream(_load_tokenizer(tokenizer), order, rows, config.training.context)


def _pretrained_folder(out: Path, seed: int) -> Path:
    return out / "pretrained" / str(seed)


def _text(config: AblationConfig) -> SplitText:
    texts = tuple((language.name, tuple(language.texts)) for language in config.languages)
    return _read_text(texts, config.heldout_every, config.heldout_characters, config.piece_characters)


@cache  # a process reads the text once
def _read_text(texts: tuple[tuple[str, tuple[str, ...]], ...], *split: int) -> SplitText:
    documents = {
        name: (document.text for source in open_sources(paths) for part in source.parts for document in part.read())
        for name, paths in texts
    }
    return split_text(documents, *split)


_load_tokenizer = cache(load_tokenizer)  # a process loads each once


def _say(line: str) -> None:
    Console().print(escape(line), highlight=False, soft_wrap=True)


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Callable, Sequence[tuple]], Iterable]]:
    """A function that maps over argument tuples, in order, in `workers` processes; with one, in this process."""
    if workers == 1:
        yield lambda function, arguments: (function(*each) for each in arguments)
        return
    threads = max((os.cpu_count() or 1) // workers, 1)
    # Keep freed memory: a step's large tensors would else be mapped anew each time, which takes 40 % of all time.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "-1")
    os.environ.setdefault("MALLOC_TOP_PAD_", str(2**28))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(threads,)) as executor:
        try:
            yield lambda function, arguments: executor.map(function, *zip(*arguments)) if arguments else ()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    transformers_logging.set_verbosity_error()


# What makes two runs comparable


_RECORD_FILE = "ablation.json"
_TOKENIZER_KEYS = ("arm", "texts", "base", "script", "heldout")
_STREAM_KEYS = ("texts", "heldout")


def _common_setup(config: AblationConfig) -> dict[str, Any]:
    """Everything that all arms and seeds have in common, for JSON."""
    texts = {
        language.name: {
            "weight": language.weight,
            "texts": [
                sha256(part.path) if isinstance(part, TextFile) else part.record()
                for source in open_sources(language.texts)
                for part in source.parts
            ],
        }
        for language in config.languages
    }
    base = _load_tokenizer(str(config.base)).backend_tokenizer.to_str()
    return {
        "texts": texts,
        "base": hashlib.sha256(base.encode()).hexdigest(),
        "script": config.script,
        "heldout": [config.heldout_every, config.heldout_characters, config.piece_characters],
        "model": asdict(config.model),
        "training": asdict(config.training),
    }


def _finished_run(job: _Job) -> ArmRun | None:
    if not job.file.exists():
        return None
    _check_same(job.file, {"setup": job.full_setup}, ("setup",))
    values = json.loads(job.file.read_text(encoding="utf-8"))
    return ArmRun(**values | {"points": [Point(**point) for point in values["points"]]})


def _check_same(file: Path, setup: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuse to go on from a file that another configuration has written."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    before, now = (_flat(_pick(values, keys)) for values in (stored, setup))
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        shown = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in different[:3])
        raise UserError(
            f"{file} comes from another configuration: {shown}. Give another --out, or the configuration that it was "
            "made with."
        )


def _pick(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {name: values}
    return {key: leaf for k, v in values.items() for key, leaf in _flat(v, f"{name}.{k}".lstrip(".")).items()}


def _plan_table(config: AblationConfig, out: Path, workers: int) -> Table:
    training, model = config.training, config.model
    table = Table("", "", title="Tokenizer ablation", show_header=False)
    table.add_row("arms", escape(", ".join(arm.name for arm in config.arms)))
    table.add_row("runs", f"{len(config.arms)} arms × {len(config.seeds)} seeds, {workers} at a time")
    for language in config.languages:
        table.add_row(language.name, escape(f"{', '.join(language.texts)} (weight {language.weight:g})"))
    table.add_row("model", f"phi-3, {model.num_hidden_layers} layers of {model.hidden_size}, {training.dtype}")
    table.add_row("a run", f"{training.tokens:,} tokens, {training.batch_rows} × {training.context} a step")
    if training.pretrain_tokens:
        table.add_row("before it", f"{training.pretrain_tokens:,} tokens with the base tokenizer, once for each seed")
    table.add_row("out", escape(str(out)))
    return table

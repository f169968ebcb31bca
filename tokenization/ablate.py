# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer ablate`: which tokenizer makes the better language model, in bits per character.

The same small phi-3 is trained from the same seeds with each tokenizer, on the same documents in the same order, and
read at equal characters, at equal tokens and at equal compute.
"""

import difflib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import Phi3ForCausalLM
from transformers.utils import logging as transformers_logging

from jai.errors import UserError
from jai.files import new_folder, sha256
from jai.tokenization.ablation_report import EQUAL_CHARACTERS, EQUAL_COMPUTE, EQUAL_TOKENS, Run, write_report
from jai.tokenization.ablation_run import (
    ModelShape,
    Point,
    Training,
    bits_per_character,
    build_model,
    extend_model,
    flops_per_token,
    train,
)
from jai.tokenization.ablation_text import Corpus, Stream, encode, encode_stream, reading_order, split_corpus
from jai.tokenization.corpus import TextFile, open_sources
from jai.tokenization.extend import extend_tokenizer, new_token_pieces
from jai.tokenization.loading import load_tokenizer
from jai.tokenization.units import Unit

# Parts of the equal characters, and multiples of them, at which the curves have points.
_CURVE = (0.125, 0.25, 0.5, 1, 2, 4, 8)


@dataclass(frozen=True)
class Language:
    """Text of one language.

    Attributes:
        name: as reports show it.
        texts: files, folders or Hub datasets, as `jai tokenizer train` takes them.
        weight: its share of the characters that are trained on, against the other languages' weights.
    """

    name: str
    texts: list[str] = field(default_factory=list)
    weight: float = 1.0


@dataclass(frozen=True)
class Arm:
    """A tokenizer to compare: the base (only a name), a folder or Hub id (`tokenizer`), or options to train one.

    Attributes:
        name: as reports show it.
        tokenizer: a tokenizer that exists.
        vocab_size, unit, max_token_chars: of `jai tokenizer train`.
    """

    name: str
    tokenizer: str | None = None
    vocab_size: int | None = None
    unit: Unit = "run"
    max_token_chars: int = 16


@dataclass(frozen=True)
class AblationConfig:
    """What `recipes/tokenizer_ablation.yaml` holds; it explains each key.

    Attributes:
        languages, arms: what is read, and the tokenizers that are compared; the first arm is the reference.
        training, model: of the small phi-3.
        base: folder or Hub id of the tokenizer that is extended.
        script: Unicode name of the script that arms add.
        seeds: one run of each arm for each.
        heldout_every: every 20th document is held out.
        heldout_characters: characters of each language to evaluate on.
        piece_characters: longer documents are cut.
    """

    languages: list[Language]
    arms: list[Arm]
    training: Training
    model: ModelShape = field(default_factory=ModelShape)
    base: str | None = None
    script: str = "Thai"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    heldout_every: int = 20
    heldout_characters: int = 60_000
    piece_characters: int = 2_000

    def __post_init__(self) -> None:
        for kind, names in (
            ("languages", [language.name for language in self.languages]),
            ("arms", [arm.name for arm in self.arms]),
            ("seeds", self.seeds),
        ):
            if not names:
                raise UserError(f"The configuration has no {kind}. Give at least one.")
            double = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if double is not None:
                raise UserError(f"The configuration has two {kind} of the name {double!r}. Give each its own.")
        for language in self.languages:
            if not language.weight > 0:
                raise UserError(f"The weight of {language.name} is {language.weight}. Give a number above 0.")
        for arm in self.arms:
            if not arm.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or arm.name.startswith("."):
                raise UserError(f"The arm {arm.name!r} names files. Use letters, digits, '-', '_' and '.'.")
            if arm.tokenizer and arm.vocab_size:
                raise UserError(f"The arm {arm.name} has a tokenizer and options to train one. Give one of the two.")
            if not arm.vocab_size and arm != Arm(arm.name, arm.tokenizer):
                raise UserError(f"The arm {arm.name} has options to train a tokenizer, but no vocab_size. Give one.")
        if self.heldout_every < 2 or self.heldout_characters < 1 or self.piece_characters < 1:
            raise UserError("heldout_every must be 2 or more, heldout_characters and piece_characters 1 or more.")
        if min(self.training.batch_rows, self.training.rows) < 1 or self.training.context < 2:
            raise UserError(
                f"{self.training.tokens} tokens in rows of {self.training.context} and steps of "
                f"{self.training.batch_rows} rows are no training. Give more tokens."
            )
        if self.training.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.training.dtype!r}. Give float32 or bfloat16.")
        if self.model.hidden_size % self.model.num_attention_heads:
            raise UserError(
                f"hidden_size {self.model.hidden_size} does not divide into {self.model.num_attention_heads} heads. "
                "Give a multiple."
            )


def read_config(
    path: Path, base: str | None = None, texts: Mapping[str, Sequence[str]] | None = None
) -> AblationConfig:
    """Parse the YAML of an ablation.

    Args:
        path: YAML file. Paths in it are taken from the current folder.
        base: tokenizer to extend, instead of the file's.
        texts: texts by language, instead of the file's.

    Raises:
        UserError: for a file that cannot be read, unknown keys, values that do not fit, a language that the file does
            not have, or when base or texts are given nowhere.
    """
    if not path.is_file():
        raise UserError(f"The configuration file {path} does not exist. Give the path of a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {error}") from error
    config: AblationConfig = _parse(AblationConfig, values, str(path))
    unknown = (texts or {}).keys() - {language.name for language in config.languages}
    if unknown:
        known = ", ".join(language.name for language in config.languages)
        raise UserError(f"{path} has no language {sorted(unknown)[0]!r}, but: {known}. Give text for these.")
    languages = [
        Language(language.name, list((texts or {}).get(language.name, language.texts)), language.weight)
        for language in config.languages
    ]
    for language in languages:
        if not language.texts:
            raise UserError(
                f"No {language.name} text is given. Give --text {language.name}=FILE, or `texts` in {path}."
            )
    if not (base or config.base):
        raise UserError(f"No base tokenizer is given. Give --base TOKENIZER, or `base` in {path}.")
    given = {option.name: getattr(config, option.name) for option in fields(config)}
    return AblationConfig(**given | {"languages": languages, "base": base or config.base})


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
            texts = (piece for pieces in _corpus(config).train.values() for piece in pieces)
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

    train(model, stream, config.training, [rows // 4, rows // 2, rows * 3 // 4, rows], at_stop)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        (partial / _RECORD_FILE).write_text(json.dumps(setup | {"seed": seed}), encoding="utf-8")


def _run(job: _Job) -> Run:
    """Train one arm with one seed and write its result."""
    config, training = job.config, job.config.training
    tokenizer = _load_tokenizer(job.tokenizer)
    heldout = _corpus(config).heldout
    with np.load(job.stream_file) as stored:
        stream = Stream(stored["ids"], stored["characters"])
    if training.pretrain_tokens:
        start = Phi3ForCausalLM.from_pretrained(_pretrained_folder(job.out, job.seed), dtype=torch.float32)
        pieces = new_token_pieces(_load_tokenizer(str(config.base)).backend_tokenizer, tokenizer.backend_tokenizer)
        model = extend_model(start, config.model, training.context, job.entries, pieces, job.seed)
    else:
        model = build_model(config.model, job.entries, training.context, job.seed)
    run = Run(
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

    def at_stop(rows: int, seconds: float) -> None:
        bits = {name: bits_per_character(model, tokenizer, texts, training) for name, texts in heldout.items()}
        model.train()
        tokens = rows * training.context
        characters = float(stream.characters[rows - 1])
        run.points.append(Point(rows, tokens, characters, tokens * sum(_flops(job)), bits, seconds))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
        _say(
            f"{job.arm.name}, seed {job.seed}: {tokens:,} of {training.rows * training.context:,} tokens, "
            f"{characters:,.0f} characters: {shown} bits a character ({seconds:.0f} s)"
        )

    train(model, stream, training, [*job.readouts.values(), *job.curve], at_stop)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    partial = job.file.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")
    partial.replace(job.file)
    return run


def _stream(config: AblationConfig, tokenizer: str, rows: int, seed: int | str) -> Stream:
    order = reading_order(_corpus(config), {language.name: language.weight for language in config.languages}, seed)
    return encode_stream(_load_tokenizer(tokenizer), order, rows, config.training.context)


def _pretrained_folder(out: Path, seed: int) -> Path:
    return out / "pretrained" / str(seed)


def _corpus(config: AblationConfig) -> Corpus:
    texts = tuple((language.name, tuple(language.texts)) for language in config.languages)
    return _read_corpus(texts, config.heldout_every, config.heldout_characters, config.piece_characters)


@cache  # a process reads the text once
def _read_corpus(texts: tuple[tuple[str, tuple[str, ...]], ...], *split: int) -> Corpus:
    documents = {
        name: (document.text for source in open_sources(paths) for part in source.parts for document in part.read())
        for name, paths in texts
    }
    return split_corpus(documents, *split)


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


def _finished_run(job: _Job) -> Run | None:
    if not job.file.exists():
        return None
    _check_same(job.file, {"setup": job.full_setup}, ("setup",))
    values = json.loads(job.file.read_text(encoding="utf-8"))
    return Run(**values | {"points": [Point(**point) for point in values["points"]]})


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


# Configuration


def _parse(kind: type, values: Any, where: str) -> Any:
    """Build a dataclass from what YAML gave, checking names and types."""
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of options to values; see recipes/tokenizer_ablation.yaml.")
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            advice = f"Did you mean `{close[0]}`?" if close else f"Known are: {', '.join(hints)}."
            raise UserError(f"{where} has the unknown option `{name}`. {advice}")
    lacking = [option.name for option in fields(kind) if _required(option) and option.name not in values]
    if lacking:
        raise UserError(f"{where} lacks `{lacking[0]}`. See recipes/tokenizer_ablation.yaml.")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _required(option: Field) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return _parse(hint, value, where)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}. Give a list.")
        return [_value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where} is {value!r}. Give one of {', '.join(get_args(hint))}.")
        return value
    kinds = get_args(hint) or (hint,)  # of `int | None`
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{where} is {value!r}. Give a value of the type {' or '.join(k.__name__ for k in kinds)}.")
    return value


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

# SPDX-License-Identifier: Apache-2.0
"""The price of depth and of experts: held-out loss before conversion, after it, and over continued training.

    python benchmarks/price_of_depth.py --text FILE... --out FOLDER [--workers 2] [--quick]

For each seed a small phi-3 is trained from nothing on the texts (`.jsonl.gz` and all else that `jai tokenizer train`
reads; as many characters of each). It is then made deeper in the ways of the paper's section 3.1.2 and in others, and
each way is trained on with the same batches. The deep model with the paper's start then gets four experts in several
ways (section 3.1.3). Controls are the base and the dense deep model, trained on with the same batches for as many steps
and for as much compute.

Started again with the same options, it goes on with the runs that `--out` lacks. Results are in `--out`, and are
appended to `benchmarks/results/` once all runs are there. With `--quick` everything runs, but little is learnt.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import log, log2
from pathlib import Path

import numpy as np
import torch
from arms import check_setup, first_characters
from price_of_depth_models import (
    EXPERT_NOISE,
    EXPERTS_PER_TOKEN,
    Start,
    dus_v1,
    dus_v2,
    expert_distance,
    upcycle,
)
from price_of_depth_report import BASE, DEPTH, EXPERTS, REFERENCES, ArmResult, Measurement, csv_rows, write_report
from records import append, provenance
from transformers import AutoTokenizer, Phi3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from jai import JaiForCausalLM
from jai.errors import UserError
from jai.files import new_folder, sha256
from jai.router_load import router_load
from jai.small_model import bits_per_character, build_model, flops_per_token, train
from jai.small_model_options import ModelShape, Training
from jai.tokenization.ablation.text import encode, encode_stream, reading_order, split_text
from jai.tokenization.corpus import open_sources
from jai.tokenization.extend import extend_tokenizer
from jai.tokenization.phi3_style import train_phi3_style

SNAPSHOTS = (1 / 3, 2 / 3, 1)  # parts of the dense model's steps, beside step 0
_BASE_SHAPE = ModelShape(64, 176, 10, 4, initializer_range=0.05)


@dataclass(frozen=True)
class Settings:
    """Sizes of a whole run. Learning rates stay constant after a warm-up, so that any point of a curve may be read.

    Attributes:
        seeds: of the weights, of the order of the text, and of what conversion draws.
        vocabulary: entries of the tokenizer: `base_vocabulary` in phi-3's manner, then Thai pieces.
        tokenizer_characters: characters that the tokenizer is trained on.
        shape: of the base.
        block_repeats: of DUS.v2, for blocks of one layer; DUS.v1 gets as many layers.
        base_steps: steps from nothing to the base, with the learning rate `base_learning_rate`.
        settling_steps: steps of the base after these, with the arms' learning rate, so that its decay is no arm's gain.
        steps: steps of continued training of each arm; the controls go on to the compute of the others.
        points: steps after which is measured, as parts of `steps`.
        context, batch_rows, warmup_steps: of every training.
        learning_rate: of all trainings but the base's first.
        heldout_characters: of each text.
        piece_characters: longer documents are cut.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    base_vocabulary: int = 1792
    vocabulary: int = 2560
    tokenizer_characters: int = 1_000_000
    shape: ModelShape = _BASE_SHAPE
    block_repeats: tuple[int, ...] = (1, 1, 1, 2, 3, 3, 2, 1, 1, 1)
    base_steps: int = 1600
    settling_steps: int = 400
    steps: int = 180
    points: tuple[float, ...] = (0, 1 / 20, 1 / 6, *SNAPSHOTS)
    context: int = 128
    batch_rows: int = 4
    base_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    heldout_characters: int = 12_000
    piece_characters: int = 400

    @property
    def training(self) -> Training:
        steps = self.base_steps + self.settling_steps
        steps += max(self.equal_compute(DEPTH), self.steps + self.equal_compute(EXPERTS))
        return Training(
            tokens=steps * self.batch_rows * self.context,
            context=self.context,
            batch_rows=self.batch_rows,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            dtype="float32",
        )

    @property
    def deep_shape(self) -> ModelShape:
        return replace(self.shape, num_hidden_layers=sum(self.block_repeats))

    @property
    def measured_at(self) -> tuple[int, ...]:
        return tuple(sorted({round(part * self.steps) for part in self.points}))

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps of the dense deep model whose MLPs become experts (paper: 0, 2K, 4K, 6K)."""
        return tuple(round(part * self.steps) for part in (0, *SNAPSHOTS))

    def equal_compute(self, part: str) -> int:
        """Steps in which the control of a part does as many operations as the others do in `steps`."""
        if part == DEPTH:
            control, other = self.shape, self.deep_shape
        else:
            control = self.deep_shape
            other = replace(control, intermediate_size=EXPERTS_PER_TOKEN * control.intermediate_size)
        flops = [sum(flops_per_token(shape, self.vocabulary, self.context)) for shape in (control, other)]
        return round(self.steps * flops[1] / flops[0])


QUICK = Settings(
    seeds=(0, 1),
    base_vocabulary=400,
    vocabulary=464,
    shape=ModelShape(16, 32, 3, 2, 0.1),
    block_repeats=(1, 2, 1),
    tokenizer_characters=10_000,
    base_steps=4,
    settling_steps=2,
    steps=6,
    context=24,
    batch_rows=2,
    learning_rate=5e-3,
    warmup_steps=2,
    heldout_characters=150,
    piece_characters=60,
)


DUS_V1 = "dus-v1"
DEPTH_STARTS = {
    **{f"alpha-{alpha:g}": Start(alpha) for alpha in (0, 0.1, 0.25, 0.5)},
    **{f"alpha-{alpha:g}-frozen": Start(alpha, trainable=False) for alpha in (0, 0.1, 0.25, 0.5)},
    **{f"normalised-{alpha:g}": Start(alpha, normalize=True) for alpha in (0.25, 0.5, 1)},
    "identity": Start(0, duplicate_init="identity"),
}
PAPERS_START = "alpha-0.1"  # what the dense model of the experts' part starts as
EXPERT_STARTS = ("copy", *EXPERT_NOISE, "snapshots", "random")
ARMS = {
    BASE: (BASE,),
    DEPTH: (REFERENCES[DEPTH], DUS_V1, *DEPTH_STARTS),
    EXPERTS: (REFERENCES[EXPERTS], *EXPERT_STARTS),
}


@dataclass(frozen=True)
class Job:
    """One arm with one seed; `out` is the folder of the whole run."""

    part: str
    arm: str
    seed: int
    settings: Settings
    out: Path

    @property
    def file(self) -> Path:
        return self.out / "runs" / f"{self.part}-{self.arm}-{self.seed}.json"

    @property
    def needs(self) -> "Job | None":
        """The job whose model this one starts from."""
        if self.part == BASE:
            return None
        return replace(self, part=BASE, arm=BASE) if self.part == DEPTH else replace(self, part=DEPTH, arm=PAPERS_START)

    @property
    def rows_before(self) -> int:
        """Rows of the seed's text that the model has read before; the same for all arms of a part."""
        base = self.settings.base_steps + self.settings.settling_steps
        return {BASE: 0, DEPTH: base, EXPERTS: base + self.settings.steps}[self.part] * self.settings.batch_rows

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps after which is measured."""
        if self.part == BASE:
            return (0, self.settings.base_steps + self.settings.settling_steps)
        control = self.arm == REFERENCES[self.part]
        return (*self.settings.measured_at, *((self.settings.equal_compute(self.part),) if control else ()))

    @property
    def base_folder(self) -> Path:
        return self.out / "models" / f"base-{self.seed}"

    def snapshot_folder(self, step: int) -> Path:
        """Where the dense deep model is kept for the experts."""
        return self.out / "models" / f"dense-{self.seed}-{step}"


# The models that arms start from


def start_model(job: Job) -> PreTrainedModel:
    """The model of a job before its training."""
    settings = job.settings
    if job.part == BASE:
        return build_model(settings.shape, settings.vocabulary, settings.context, job.seed)
    if job.part == DEPTH:
        if job.arm == REFERENCES[DEPTH]:
            return Phi3ForCausalLM.from_pretrained(job.base_folder, dtype=torch.float32)
        if job.arm == DUS_V1:
            return dus_v1(job.base_folder, sum(settings.block_repeats))
        return dus_v2(job.base_folder, settings.block_repeats, DEPTH_STARTS[job.arm])
    snapshots = [JaiForCausalLM.from_pretrained(job.snapshot_folder(step)) for step in settings.snapshot_steps]
    return snapshots[-1] if job.arm == REFERENCES[EXPERTS] else upcycle(snapshots, job.arm, job.seed)


# Measures


class Scale:
    """Measures a model on the held-out text of a run's folder."""

    def __init__(self, settings: Settings, out: Path, model: PreTrainedModel):
        self._training = settings.training
        self._tokenizer, self._heldout, self._tokens = _heldout(out)
        self._model = model

    def point(self, step: int) -> Measurement:
        """All that is measured after a step."""
        bits = {
            name: bits_per_character(
                self._model,
                self._tokenizer,
                texts,
                context=self._training.context,
                batch_rows=self._training.batch_rows,
            )
            for name, texts in self._heldout.items()
        }
        characters = {name: sum(map(len, texts)) for name, texts in self._heldout.items()}
        all_bits = sum(bits[name] * characters[name] for name in bits)
        tensors = self._model.state_dict()
        return Measurement(
            step=step,
            tokens=step * self._training.batch_rows * self._training.context,
            nats=all_bits * log(2) / self._tokens,
            bits=all_bits / sum(characters.values()),
            bits_by_text=bits,
            alphas=[tensors[name].item() for name in tensors if name.endswith(".skip_alpha")],
            load_entropy=self._load_entropy(),
            expert_distance=expert_distance(self._model),
        )

    def _load_entropy(self) -> list[float]:
        if getattr(self._model.config, "num_local_experts", 1) == 1:
            return []
        rows = _heldout_rows(self._heldout, self._tokenizer, self._training.context)
        return [
            -sum(share * log2(share) for share in shares if share) / log2(len(shares))
            for shares in router_load(self._model, ({"input_ids": batch} for batch in rows.split(32)))
        ]


@cache
def _heldout(out: Path) -> tuple[PreTrainedTokenizerBase, dict[str, list[str]], int]:
    tokenizer = AutoTokenizer.from_pretrained(out / "text" / "tokenizer")
    texts = json.loads((out / "text" / "heldout.json").read_text(encoding="utf-8"))
    return tokenizer, texts, sum(len(ids) for pieces in texts.values() for _, ids in encode(tokenizer, pieces))


def _heldout_rows(heldout: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, context: int) -> torch.Tensor:
    eos = tokenizer.eos_token_id
    ids = [id_ for pieces in heldout.values() for _, piece in encode(tokenizer, pieces) for id_ in (eos, *piece)]
    return torch.tensor(ids[: len(ids) // context * context]).view(-1, context)


# The run


def run(job: Job, origin: dict[str, str]) -> ArmResult:
    """Train one arm with one seed, measure it on the way, and write its result."""
    settings = job.settings
    model = start_model(job)
    scale = Scale(settings, job.out, model)
    with np.load(job.out / "text" / f"stream-{job.seed}.npz") as stored:
        ids = stored["ids"][job.rows_before * settings.context :]
    if job.part == BASE:
        points = _train_base(model, ids, settings, scale)
        model.save_pretrained(job.base_folder)
    else:
        points = _train_arm(model, ids, job, scale)
    finished = ArmResult(job.part, job.arm, job.seed, points, origin)
    partial = job.file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(finished), indent=1), encoding="utf-8")
    partial.replace(job.file)
    curve = ", ".join(f"{point.nats:.3f}" for point in points)
    print(f"seed {job.seed}, {job.part}, {job.arm}: {curve} nats per token", flush=True)
    return finished


def _train_base(model: PreTrainedModel, ids: np.ndarray, settings: Settings, scale: Scale) -> list[Measurement]:
    points, first_rows = [scale.point(0)], settings.base_steps * settings.batch_rows
    first = replace(settings.training, learning_rate=settings.base_learning_rate)
    train(model, ids, first, [first_rows])
    ids = ids[first_rows * settings.context :]
    rows = settings.settling_steps * settings.batch_rows
    train(model, ids, settings.training, [rows])
    return [*points, scale.point(settings.base_steps + settings.settling_steps)]


def _train_arm(model: PreTrainedModel, ids: np.ndarray, job: Job, scale: Scale) -> list[Measurement]:
    settings, points = job.settings, [scale.point(0)]
    snapshot_steps = settings.snapshot_steps if (job.part, job.arm) == (DEPTH, PAPERS_START) else ()
    if snapshot_steps:
        model.save_pretrained(job.snapshot_folder(0))

    def at_stop(rows: int, seconds: float) -> None:
        step = rows // settings.batch_rows
        points.append(scale.point(step))
        model.train()
        if step in snapshot_steps:
            model.save_pretrained(job.snapshot_folder(step))

    stops = [step * settings.batch_rows for step in job.stops if step]
    train(model, ids, settings.training, stops, at_stop)
    return points


def read_run(job: Job) -> ArmResult | None:
    """The result of a job, if it is finished."""
    if not job.file.exists():
        return None
    values = json.loads(job.file.read_text(encoding="utf-8"))
    return ArmResult(**values | {"points": [Measurement(**point) for point in values["points"]]})


def prepare_text(settings: Settings, texts: Sequence[Path], out: Path) -> None:
    """Write the tokenizer, the held-out pieces and each seed's stream of tokens into `out`/text, if not yet there."""
    if (out / "text").exists():
        return
    documents = {
        _name(path): (
            document.text for source in open_sources([str(path)]) for part in source.parts for document in part.read()
        )
        for path in texts
    }
    text = split_text(documents, 20, settings.heldout_characters, settings.piece_characters)
    weights = dict.fromkeys(documents, 1.0)
    rows = settings.training.rows
    with new_folder(out / "text") as folder:
        sample = list(first_characters(reading_order(text, weights, "tokenizer"), settings.tokenizer_characters))
        base = train_phi3_style(sample, settings.base_vocabulary)
        tokenizer = extend_tokenizer(base, sample, vocab_size=settings.vocabulary)
        tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "heldout.json").write_text(json.dumps(text.heldout, ensure_ascii=False), encoding="utf-8")
        for seed in settings.seeds:
            stream = encode_stream(tokenizer, reading_order(text, weights, seed), rows, settings.context)
            np.savez(folder / f"stream-{seed}.npz", ids=stream.ids)


def _name(path: Path) -> str:
    return path.name.split(".")[0]


def price_of_depth(
    settings: Settings, texts: Sequence[Path], out: Path, workers: int = 1
) -> tuple[list[ArmResult], bool]:
    """Run every arm with every seed, or what of them `out` lacks, and write the report into `out`.

    Returns:
        All runs, by seed, part and arm; and whether any of them is new.

    Raises:
        UserError: if `out` holds runs of other settings or texts, or for texts that cannot be used.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    check_setup(asdict(settings) | {"texts": {_name(path): sha256(path) for path in texts}}, out)
    prepare_text(settings, texts, out)
    jobs = [Job(part, arm, seed, settings, out) for seed in settings.seeds for part in ARMS for arm in ARMS[part]]
    missing = [job for job in jobs if not job.file.exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished already", flush=True)
    origin = provenance(("torch", "transformers", "tokenizers"))
    try:
        if workers == 1:
            for job in missing:
                run(job, origin)
        else:
            _run_in_processes(missing, origin, workers)
    finally:  # after Ctrl-C too
        runs = [finished for job in jobs if (finished := read_run(job))]
        if runs:
            write_report(runs, out)
    return runs, bool(missing)


def _run_in_processes(jobs: Sequence[Job], origin: dict[str, str], workers: int) -> None:
    """Run jobs, each after the one that it needs, in `workers` processes of one thread each."""
    waiting, running = list(jobs), set[Future]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process) as executor:
        try:
            while waiting or running:
                ready = [job for job in waiting if job.needs is None or job.needs.file.exists()]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    running.add(executor.submit(run, job, origin))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_process() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="Thai and English documents, a file each")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; a run that was stopped goes on")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--seeds", type=int, default=len(Settings.seeds))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: everything runs, little is learnt")
    arguments = parser.parse_args()
    settings = QUICK
    if not arguments.quick:
        settings = Settings(seeds=tuple(range(arguments.seeds)), learning_rate=arguments.learning_rate)
    _begin_process()
    try:
        runs, is_new = price_of_depth(settings, arguments.text, arguments.out, arguments.workers)
    except UserError as error:
        sys.exit(f"error: {error}")
    print((arguments.out / "price_of_depth.md").read_text(encoding="utf-8"))
    if is_new and not arguments.quick:
        print("appended to", append("price_of_depth", csv_rows(runs)))


if __name__ == "__main__":
    main()

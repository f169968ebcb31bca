# SPDX-License-Identifier: Apache-2.0
"""Does upscaling spare the old language? Thai that is gained and English that is lost, arm by arm, over training.

    python benchmarks/forgetting.py --data FOLDER --out FOLDER [--groups forgetting starts ...] [--quick]

`--data` holds train_en.jsonl.gz and train_th.jsonl.gz (rows with `text`, `register`) and parallel_en_th.jsonl.gz (rows
with `en`, `th`, `source`). One small phi-3 learns English from nothing. Its vocabulary is extended with Thai pieces,
`jai convert` makes of it what each arm starts from, `jai pack` packs the text, and `jai pretrain` trains on it: nothing
of the loop is of this file.

Started again with the same options, it goes on with the runs that `--out` lacks. Results are in `--out`, and are
appended to `benchmarks/results/` once all runs are there. With `--quick` everything runs, but little is learnt.
"""

import argparse
import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from arms import check_setup, first_characters
from forgetting_arms import (
    EDITED,
    ENGLISH,
    GROUPS,
    PARALLEL,
    QUICK,
    STARTS,
    THAI,
    Arm,
    Settings,
    flops_of_token,
    measured_steps,
)
from forgetting_report import ArmResult, Point, csv_rows, write_report
from records import append, provenance
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.utils import logging as transformers_logging

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.errors import UserError
from jai.files import new_folder, sha256
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.small_model import bits_per_character, build_model, train
from jai.small_model_options import Training
from jai.tokenization.ablation.text import SplitText, encode_stream, reading_order, split_text
from jai.tokenization.extend import extend_tokenizer
from jai.tokenization.phi3_style import train_phi3_style
from jai.trainers.arguments import parse_arguments
from jai.trainers.pretrain import OPTIONS, run_pretrain


@dataclass(frozen=True)
class Job:
    """One arm of one group with one seed; `out` is the folder of the whole run."""

    group: str
    name: str
    seed: int
    settings: Settings
    out: Path

    @property
    def arm(self) -> Arm:
        return GROUPS[self.group][self.name]

    @property
    def steps(self) -> list[int]:
        return measured_steps(self.name, self.group, self.settings)

    @property
    def file(self) -> Path:
        """Of the result: by what the arm is, as one arm may stand in several groups."""
        arm = {**asdict(self.arm), "trainable": "+".join(self.arm.trainable)}
        parts = [f"{key}={value}" for key, value in arm.items()]
        return self.out / "runs" / f"{','.join(parts)},seed={self.seed}.json"


_EDITED, _OTHER = " edited", " other"
_LANGUAGES: dict[str, dict[str, Any]] = {
    ENGLISH: {"language": "en", "quality_column": "edited"},
    THAI: {"language": "th", "quality_column": "edited"},
    PARALLEL: {"parallel": {"en": "en", "th": "th"}},
}


# The text and the models that arms start from


def prepare(settings: Settings, data: Path, out: Path) -> None:
    """Write the text, both tokenizers, the base and what arms start from into `out`, where they are not yet there."""
    if not (out / "text").exists():
        with new_folder(out / "text") as folder:
            _write_text(settings, data, folder)
    if not (out / "packed").exists():
        sources = [
            {"name": name, "text": str(out / "text" / f"{name}.jsonl"), **language}
            for name, language in _LANGUAGES.items()
        ]
        config = out / "corpus.yaml"
        config.write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")
        options = PackOptions(out=out / "packed", config=config, tokenizer=str(out / "text" / "tokenizer"), workers=1)
        pack_corpus(options, Console(quiet=True))
    if not (out / "base").exists():
        with new_folder(out / "base") as folder:
            _train_base(settings, out / "text", folder)
    for name, start in STARTS.items():
        if not (out / "starts" / name).exists():
            repeats = settings.block_repeats if name != "plain" else (1,) * len(settings.block_repeats)
            options = ConvertOptions(
                base=str(out / "base"),
                out=out / "starts" / name,
                tokenizer=str(out / "text" / "tokenizer"),
                block_size=1,
                block_repeats=list(repeats),
                **start,
            )
            convert(options, console=Console(quiet=True))


def _write_text(settings: Settings, data: Path, folder: Path) -> None:
    kinds = {
        f"{language}{kind}": [row["text"] for row in rows if (row["register"] in EDITED) == (kind == _EDITED)]
        for language, name in ((ENGLISH, "train_en"), (THAI, "train_th"))
        for rows in [list(_rows(data / f"{name}.jsonl.gz", settings.rows_mb))]
        for kind in (_EDITED, _OTHER)
    }
    by_kind = split_text(kinds, 20, settings.heldout_characters // 2, settings.piece_characters)
    split = SplitText(
        *(
            {language: [*texts[language + _EDITED], *texts[language + _OTHER]] for language in (ENGLISH, THAI)}
            for texts in (by_kind.train, by_kind.heldout)
        )
    )
    for language in (ENGLISH, THAI):
        of_kinds = ((by_kind.train[language + kind], int(kind == _EDITED)) for kind in (_EDITED, _OTHER))
        rows_ = [{"text": text, "edited": edited} for texts, edited in of_kinds for text in texts]
        _write_rows(folder / f"{language}.jsonl", rows_)
    pairs = list(_rows(data / "parallel_en_th.jsonl.gz", settings.rows_mb))
    # Only sentences are held out: the translated courses may be among the documents.
    sentences = [number for number, row in enumerate(pairs) if row["source"].startswith("Tatoeba")]
    aside = set(sentences[:: max(1, len(sentences) // settings.heldout_pairs)][: settings.heldout_pairs])
    heldout: dict[str, Any] = {**split.heldout, PARALLEL: [[pairs[n]["en"], pairs[n]["th"]] for n in sorted(aside)]}
    (folder / "heldout.json").write_text(json.dumps(heldout, ensure_ascii=False), encoding="utf-8")
    kept = [row for number, row in enumerate(pairs) if number not in aside]
    _write_rows(folder / "parallel.jsonl", ({"en": row["en"], "th": row["th"]} for row in kept))

    weights = {ENGLISH: 1.0}
    sample = list(first_characters(reading_order(split, weights, "tokenizer"), settings.tokenizer_characters))
    base = train_phi3_style(sample, settings.base_vocabulary)
    base.save_pretrained(folder / "base-tokenizer")
    thai = list(first_characters(reading_order(split, {THAI: 1.0}, "tokenizer"), settings.tokenizer_characters))
    tokenizer = extend_tokenizer(base, thai, vocab_size=settings.vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    lengths = [
        sum(map(len, tokenizer([row[language] for row in kept], add_special_tokens=False)["input_ids"]))
        for language in ("en", "th")
    ]
    (folder / "thai_of_parallel.json").write_text(json.dumps(lengths[1] / sum(lengths)), encoding="utf-8")
    rows_of_text = settings.base_tokens // settings.context
    stream = encode_stream(base, reading_order(split, weights, 0), rows_of_text, settings.context)
    np.savez(folder / "base-stream.npz", ids=stream.ids)


def _rows(path: Path, megabytes: float) -> Iterator[dict[str, Any]]:
    """Rows of a file, from places all over it, of about so many megabytes."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    random.Random(0).shuffle(lines)
    read = 0.0
    for line in lines:
        yield json.loads(line)
        read += len(line.encode()) / 1e6
        if read > megabytes:
            return


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _train_base(settings: Settings, text: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text / "base-tokenizer")
    with np.load(text / "base-stream.npz") as stored:
        ids = stored["ids"]
    training = Training(
        tokens=settings.base_tokens,
        context=settings.context,
        batch_rows=settings.batch,
        learning_rate=settings.base_learning_rate,
        warmup_steps=settings.warmup_steps,
        decay=True,
        dtype="float32",
    )
    model = build_model(settings.shape, settings.base_vocabulary, settings.context, seed=0)
    train(model, ids, training, [training.rows])
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# A run


class Measure(TrainerCallback):
    """Measures the model before its training and after some of its steps."""

    def __init__(self, job: Job):
        self._job = job
        text = job.out / "text"
        self._tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
        self._heldout = json.loads((text / "heldout.json").read_text(encoding="utf-8"))
        self.points: list[Point] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._measure(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in self._job.steps:
            self._measure(state.global_step, model)

    def _measure(self, step: int, model: PreTrainedModel) -> None:
        settings = self._job.settings
        tokens = step * settings.batch * settings.context
        point = Point(
            step=step,
            tokens=tokens,
            flops=tokens * flops_of_token(self._job.arm, settings),
            english=self._bits(model, self._heldout[ENGLISH]),
            thai=self._bits(model, self._heldout[THAI]),
            translation_gain=self._translation_gain(model),
        )
        self.points.append(point)
        model.train()

    def _translation_gain(self, model: PreTrainedModel) -> float:
        """Bits a character of Thai that are saved if its own English sentence stands before it, and not another's."""
        pairs = self._heldout[PARALLEL]
        others = [pairs[(number + 1) % len(pairs)][0] for number in range(len(pairs))]
        own = self._bits(model, [f"{english}\n{thai}" for english, thai in pairs], total=True)
        other = self._bits(model, [f"{english}\n{thai}" for english, (_, thai) in zip(others, pairs)], total=True)
        # The English sentences are the same in both, so that what they take themselves is no difference.
        return (other - own) / sum(len(thai) for _, thai in pairs)

    def _bits(self, model: PreTrainedModel, texts: Sequence[str], total: bool = False) -> float:
        bits = bits_per_character(model, self._tokenizer, texts, context=self._job.settings.context)
        return bits * sum(map(len, texts)) if total else bits


def run(job: Job, origin: dict[str, str]) -> ArmResult:
    """Train one arm with one seed by `jai pretrain`, and write its result."""
    measure = Measure(job)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "pretrain.yaml"
        config.write_text(yaml.safe_dump(_pretrain_options(job, Path(folder))), encoding="utf-8")
        given = parse_arguments(OPTIONS, ["--config", str(config)], "jai pretrain")
        run_pretrain(*given, console=Console(quiet=True), callbacks=[measure])
    finished = ArmResult(job.group, job.name, job.seed, measure.points, origin)
    partial = job.file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(finished), indent=1), encoding="utf-8")
    partial.replace(job.file)
    first, last = finished.points[0], finished.points[-1]
    print(
        f"seed {job.seed}, {job.group}, {job.name}: English {first.english:.3f} to {last.english:.3f}, "
        f"Thai {first.thai:.3f} to {last.thai:.3f}, gain of translations {last.translation_gain:+.3f}",
        flush=True,
    )
    return finished


def _pretrain_options(job: Job, folder: Path) -> dict[str, Any]:
    arm, settings = job.arm, job.settings
    _write_mixture(folder / "mixture.yaml", job, arm.thai)
    options = {
        "model_name_or_path": str(job.out / "starts" / arm.start),
        "packed": str(job.out / "packed"),
        "output_dir": str(folder / "out"),
        "mixture": str(folder / "mixture.yaml"),
        "max_length": settings.context,
        "packing_strategy": arm.strategy,
        "trainable": list(arm.trainable),
        "mtp_weight": arm.mtp,
        "max_steps": job.steps[-1],
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "warmup_steps": settings.warmup_steps,
        "annealing": 0.0 if arm.annealing is None else 0.1,
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": job.seed,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if arm.annealing in ("more", "better", "both"):
        more, best = arm.annealing != "better", arm.annealing != "more"
        _write_mixture(folder / "annealing.yaml", job, min(1.0, arm.thai * (3 if more else 1)), best)
        options["annealing_mixture"] = str(folder / "annealing.yaml")
    return options


def _write_mixture(path: Path, job: Job, thai: float, best: bool = False) -> None:
    shares = {ENGLISH: 1 - thai, THAI: thai}
    if job.arm.parallel:  # half of the Thai, and the English that it translates
        thai_of_parallel = json.loads((job.out / "text" / "thai_of_parallel.json").read_text(encoding="utf-8"))
        parallel = thai / 2 / thai_of_parallel
        shares = {ENGLISH: 1 - thai / 2 - parallel, THAI: thai / 2, PARALLEL: parallel}
    sources: list[dict[str, Any]] = [
        {"name": name, **_LANGUAGES[name], "weight": share, "epochs": 100}
        for name, share in shares.items()
        if share > 0
    ]
    if best:
        for source in sources:
            source["keep_best"] = 0.2 if source["name"] == ENGLISH else 0.1  # Trillion-7B, section 2.2
    path.write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")


def read_run(job: Job) -> ArmResult | None:
    """The result of a job, if it is finished, by any group that has its arm."""
    if not job.file.exists():
        return None
    values = json.loads(job.file.read_text(encoding="utf-8"))
    points = [Point(**point) for point in values["points"]]
    return ArmResult(job.group, job.name, job.seed, points, values["origin"])


def forgetting(
    settings: Settings, data: Path, out: Path, groups: Sequence[str] = tuple(GROUPS)
) -> tuple[list[ArmResult], list[ArmResult]]:
    """Run every arm of the groups with every seed, or what of them `out` lacks, and write the report into `out`.

    Returns:
        All runs, by group, arm and seed; and those of them that `out` lacked.

    Raises:
        UserError: if `out` holds runs of other settings or texts.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    setup = asdict(settings) | {"texts": {path.name: sha256(path) for path in sorted(data.glob("*.jsonl.gz"))}}
    setup.pop("seeds")  # more of them may come later
    check_setup(setup, out)
    prepare(settings, data, out)
    # All arms of the first seed come first, so that a look at them is early.
    jobs = [
        Job(group, name, seed, settings, out) for seed in settings.seeds for group in groups for name in GROUPS[group]
    ]
    origin = provenance(("torch", "transformers", "tokenizers"))
    new = []
    try:
        for job in jobs:
            if not job.file.exists():
                new.append(run(job, origin))
    finally:  # after Ctrl-C too
        runs = [finished for job in jobs if (finished := read_run(job))]
        if runs:
            write_report(runs, settings, out)
    return runs, new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; a run that was stopped goes on")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=len(Settings.seeds))
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of an arm, of 1,024 tokens")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: everything runs, little is learnt")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings(seeds=tuple(range(arguments.seeds)), steps=arguments.steps)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _, new = forgetting(settings, arguments.data, arguments.out, arguments.groups)
    except UserError as error:
        sys.exit(f"error: {error}")
    print((arguments.out / "forgetting.md").read_text(encoding="utf-8"))
    if new and not arguments.quick:
        print("appended to", append("forgetting", csv_rows(new)))


if __name__ == "__main__":
    main()

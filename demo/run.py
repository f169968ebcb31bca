# SPDX-License-Identifier: Apache-2.0
"""`jai demo`: the whole way on tiny models, with the verbs that a user would type, and a report at the end."""

import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.rule import Rule
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from jai.configuration_jai import JaiConfig
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.verify import verify
from jai.conversion.inspect_checkpoint import count_parameters, inspect
from jai.conversion.inspect_options import InspectOptions
from jai.demo.base import train_base
from jai.demo.hub.local_hub import LocalHub
from jai.demo.measure import MeasuredModel
from jai.demo.options import DemoOptions
from jai.demo.report import write_demo_report
from jai.demo.results import Answer, Command, Fertility, MetricCurve, Results, StageResult, StartResult
from jai.demo.suite import measure_suite_of_demo, write_questions
from jai.demo.text.corpus import DemoText, build_text, write_text_files
from jai.errors import UserError
from jai.files import print_next, read_json, sha256
from jai.hub_card.evaluation import TOKENS_PER_CHARACTER, Evaluation, Score, write_evaluation
from jai.options import read_options_file
from jai.provenance import versions
from jai.tokenization.phi3_style import train_phi3_style
from jai.version import __version__

QUIET = Console(quiet=True)
REPO_ID = "demo/jai-tiny"
QUESTION = "แพะมีกี่ขา"  # how many legs has a goat?
BASE_STEPS = 100
QUICK_BASE_STEPS, QUICK_STEPS = 20, 2
BASE_VOCABULARY = 1536
VOCABULARY = 2304
RECIPES = ("convert.yaml", "pretrain.yaml", "sft.yaml", "dpo.yaml")
_PULL = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
# One thread each: two that wait for one another on busy cores took more than six times as long.
_VERB_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Shell:
    """Runs the program's own verbs as processes in `folder`, and keeps what was run."""

    folder: Path
    console: Console
    commands: list[Command] = field(default_factory=list)

    def jai(self, line: str, environment: dict[str, str] | None = None) -> str:
        """Run `jai LINE`; its output is shown and returned.

        Raises:
            UserError: if it fails.
        """
        self.console.print(f"[bold cyan]$ jai {line}[/]", highlight=False, soft_wrap=True)
        began = time.perf_counter()
        process = subprocess.Popen(
            [Path(sys.executable).with_name("jai"), *shlex.split(line)],
            cwd=self.folder,
            env={**os.environ, **_VERB_ENVIRONMENT, **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        output = []
        for text in process.stdout:
            output.append(text)
            self.console.print(f"  {text.rstrip()}", markup=False, highlight=False, soft_wrap=True)
        if process.wait():
            raise UserError(f"`jai {line}` failed with exit code {process.returncode}; its output is above.")
        self.commands.append(Command(f"jai {line}", time.perf_counter() - began))
        return "".join(output)

    def jai_here(self, line: str, run: Callable[[], object]) -> None:
        """Run what `jai LINE` would, in this process: another one would import PyTorch again, for 5 seconds."""
        self.console.print(f"[bold cyan]$ jai {line}[/]", highlight=False, soft_wrap=True)
        began = time.perf_counter()
        run()
        self.commands.append(Command(f"jai {line}", time.perf_counter() - began))


def run_demo(options: DemoOptions, *, console: Console | None = None) -> Path:
    """Run the demo and write its report.

    Args:
        options: where to, and how.
        console: where to print; None is standard output.

    Returns:
        The report, an HTML page.

    Raises:
        UserError: if a verb fails.
    """
    out, seed, quick = options.out, options.seed, options.quick
    console = console or Console()
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shell = Shell(out, console)
    began = time.perf_counter()

    _say(console, "Text", "the demo's own Thai and English, made from templates")
    corpus = build_text(seed)
    write_text_files(corpus, out / "corpus")
    for recipe in RECIPES:
        shutil.copy(Path(__file__).with_name(recipe), out / recipe)
    heldout = {"en": corpus.heldout_en, "th": corpus.heldout_th}
    console.print(f"  {len(corpus.sft):,} chats, {len(corpus.preferences):,} preference pairs, in {out / 'corpus'}")

    _say(console, "Base", "a small phi-3 is trained from nothing, mostly on English")
    base_curve = _make_base(corpus, out / "base", seed, QUICK_BASE_STEPS if quick else BASE_STEPS, console, shell)

    _say(console, "Vocabulary", "Thai merges are appended to the base's tokenizer")
    shell.jai(f"tokenizer train corpus/pretrain_th.txt --base base --out tokenizer --vocab-size {VOCABULARY}")
    fertility = _fertility(out, heldout)

    _say(console, "Conversion", "from the product's own start; then from the paper's, to compare")
    shell.jai("convert base converted --config convert.yaml --verify")
    shell.jai_here("inspect converted", lambda: inspect(InspectOptions(model=str(out / "converted")), console=console))
    shell.jai_here(
        "convert base papers-start --config convert.yaml --duplicate-init copy --skip-alpha 0.1",
        lambda: convert(_papers_start(out), console=console),
    )

    _say(console, "Training", "continued pre-training, then chats, then preferences")
    short = f" --max_steps {QUICK_STEPS}" if quick else ""
    for stage, recipe in (("sft", "pretrain.yaml"), ("sft", "sft.yaml"), ("dpo", "dpo.yaml")):
        shell.jai(f"{stage} --config {recipe}{short} --seed {seed}")

    _say(console, "Measurement", "bits per character, answers, router load")
    models = {folder: MeasuredModel(out / folder) for folder in ("base", "converted", "pretrained", "sft", "dpo")}
    answers = {folder: models[folder].answers(corpus.eval_chats) for folder in ("pretrained", "sft", "dpo")}
    names = {"base": "phi-3 base", "converted": "converted", "pretrained": "pre-trained", "sft": "SFT", "dpo": "DPO"}
    stages = [_stage(name, folder, models[folder], heldout, answers.get(folder)) for folder, name in names.items()]
    bits = {stage.folder: stage.bits for stage in stages}
    bits["papers-start"] = _bits(MeasuredModel(out / "papers-start"), heldout)
    starts = [
        _start("identity, α = 0 (default)", out, "converted", bits),
        _start("copy, α = 0.1 (paper)", out, "papers-start", bits),
    ]
    router_load = {language: models["dpo"].router_load(texts) for language, texts in heldout.items()}

    write_evaluation(out / "dpo", _evaluation(stages, fertility, router_load))
    _say(console, "Evaluation", "a small suite by jai eval, before and after chat training")
    write_questions(corpus.eval_chats, out / "questions", seed)
    suite = measure_suite_of_demo(
        out / "pretrained", out / "dpo", out / "questions", out / "eval", seed=seed, console=console
    )

    _say(console, "Hub", "pushed to a Hub on this machine, pulled back, compared")
    config = models["dpo"].model.config
    assert isinstance(config, JaiConfig)
    count = count_parameters(config)
    checks = _round_trip(out, shell)
    results = Results(
        seed=seed,
        seconds=time.perf_counter() - began,
        versions=_versions(),
        base_parameters=sum(parameter.numel() for parameter in models["base"].model.parameters()),
        jai_parameters=count.total + count.skip_alphas,
        jai_active=count.active,
        config=config.to_dict(),
        stages=stages,
        starts=starts,
        curves=[base_curve, *_curves(out)],
        fertility=fertility,
        router_load=router_load,
        alphas_before=models["converted"].skip_alphas(),
        alphas_after=models["dpo"].skip_alphas(),
        answers_before=answers["pretrained"],
        answers_after=answers["dpo"],
        suite=suite,
        checks=checks,
        commands=shell.commands,
        peak_memory_mb=_peak_memory_mb(),
    )
    results.save(out)
    report = write_demo_report(results, out)

    console.print(Rule("Done"))
    for name, finding in checks.items():
        console.print(f"[green]✓[/] {name}: {finding}", highlight=False, soft_wrap=True)
    console.print(f"{results.seconds:.0f} s, at most {results.peak_memory_mb:,.0f} MB in one process.")
    console.print(f"[bold green]The report is in[/] {report}", soft_wrap=True)
    print_next(console, ["jai", "generate", out / "dpo", QUESTION])
    return report


def _papers_start(out: Path) -> ConvertOptions:
    """Equation 1 with the cheapest alpha (docs/price-of-depth.md), and all else as for the product's own start."""
    recipe = read_options_file(out / "convert.yaml", ConvertOptions)
    changes = {
        "base": str(out / "base"),
        "out": out / "papers-start",
        "tokenizer": str(out / "tokenizer"),
        "duplicate_init": "copy",
        "skip_alpha": 0.1,
    }
    return ConvertOptions(**{**recipe, **changes})


def _say(console: Console, title: str, text: str) -> None:
    console.print(Rule(f"[bold]{title}[/]: {text}", align="left"))


def _make_base(corpus: DemoText, folder: Path, seed: int, steps: int, console: Console, shell: Shell) -> MetricCurve:
    # A tenth of the Thai text: phi-3 has seen some Thai too.
    texts = corpus.pretrain_en + corpus.pretrain_th[: len(corpus.pretrain_th) // 10]
    tokenizer = train_phi3_style(corpus.pretrain_en + corpus.pretrain_th, BASE_VOCABULARY)
    began = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=steps)
        losses = train_base(
            texts,
            tokenizer,
            folder,
            steps=steps,
            seed=seed,
            on_step=lambda step, loss: progress.update(task, completed=step, description=f"training, loss {loss:.2f}"),
        )
    shell.commands.append(Command("(the base: jai.demo.base.train_base)", time.perf_counter() - began))
    return MetricCurve("base", "loss", list(range(1, len(losses) + 1)), losses)


def _start(name: str, out: Path, converted: str, bits: dict[str, dict[str, float]]) -> StartResult:
    proof = verify(str(out / "base"), out / converted, console=QUIET)
    assert proof is not None  # models of the demo's size fit anywhere
    return StartResult(name, proof.kl, bits[converted])


def _fertility(out: Path, heldout: dict[str, list[str]]) -> Fertility:
    base, extended = (AutoTokenizer.from_pretrained(out / name) for name in ("base", "tokenizer"))

    def per_character(tokenizer, texts: list[str]) -> float:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return sum(map(len, ids)) / sum(map(len, texts))

    example = heldout["th"][0].splitlines()[0]
    return Fertility(
        base={language: per_character(base, texts) for language, texts in heldout.items()},
        extended={language: per_character(extended, texts) for language, texts in heldout.items()},
        example=example,
        base_pieces=base.tokenize(example),
        extended_pieces=extended.tokenize(example),
    )


def _bits(model: MeasuredModel, heldout: dict[str, list[str]]) -> dict[str, float]:
    return {language: model.bits_per_character(texts) for language, texts in heldout.items()}


def _stage(
    name: str, folder: str, model: MeasuredModel, heldout: dict[str, list[str]], answers: list[Answer] | None
) -> StageResult:
    stage = StageResult(name, folder, _bits(model, heldout))
    if answers is not None:
        by_language = {language: [a for a in answers if a.language == language] for language in heldout}
        stage.correct = {language: _share(a.correct for a in found) for language, found in by_language.items()}
        stage.in_language = {language: _share(a.in_language for a in found) for language, found in by_language.items()}
    return stage


def _evaluation(
    stages: list[StageResult], fertility: Fertility, router_load: dict[str, list[list[float]]]
) -> Evaluation:
    """The record that the model's card reads."""
    base, final = stages[0].name, stages[-1].name
    scores = []
    for language, name in (("th", "Thai"), ("en", "English")):
        text = ("jai-demo-heldout", f"the demo's held-out {name} text", language)
        chats = ("jai-demo-questions", f"the demo's {name} questions", language)
        tokens = {base: fertility.base[language], final: fertility.extended[language]}
        bits = {stage.name: stage.bits[language] for stage in stages}
        spoken = {stage.name: stage.in_language[language] for stage in stages if stage.in_language is not None}
        right = {stage.name: stage.correct[language] for stage in stages if stage.correct is not None}
        scores += [
            Score(TOKENS_PER_CHARACTER, "tokens per character", *text, False, tokens),
            Score("bits_per_character", "bits per character", *text, False, bits),
            Score("in_language", "answers in the language of the question", *chats, True, spoken),
            Score("exact_match", "answers exactly right", *chats, True, right),
        ]
    return Evaluation(
        model=final,
        models=[stage.name for stage in stages],
        scores=scores,
        router_load={language: router_load[language] for language in ("th", "en")},
        router_load_text="the demo's held-out text",
        versions=versions("torch", "transformers"),
    )


def _share(holds: Iterable[bool]) -> float:
    found = list(holds)
    return sum(found) / len(found)


def _curves(out: Path) -> list[MetricCurve]:
    metrics = {
        "pretrained": ["loss"],
        "sft": ["loss"],
        "dpo": ["loss", "rewards/accuracies", "rewards/margins"],
    }
    return [_curve(out, stage, name) for stage, names in metrics.items() for name in names]


def _curve(out: Path, stage: str, metric: str) -> MetricCurve:
    history = read_json(out / stage / "trainer_state.json")["log_history"]
    points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
    steps, values = zip(*points)
    return MetricCurve(stage, metric, list(steps), list(values))


def _round_trip(out: Path, shell: Shell) -> dict[str, str]:
    """Push `dpo` to a Hub on 127.0.0.1, pull it back, compare the files, and generate with what lies there.

    Returns:
        What was checked, each with what was found.

    Raises:
        UserError: if anything differs.
    """
    with LocalHub(out / "hub", user="demo") as hub:
        environment = hub.environment()
        published = shell.jai(f"publish dpo {REPO_ID}", environment)
        pulled = out / "pulled"
        # In a process of its own: this one may have been started with HF_HUB_OFFLINE, which is read at the import.
        subprocess.run(
            [sys.executable, "-c", _PULL, REPO_ID, str(pulled)], env={**os.environ, **environment}, check=True
        )
        names = sorted(path.name for path in (out / "dpo").glob("*.safetensors"))
        names += ["config.json", "tokenizer.json", "modeling_jai.py", "configuration_jai.py", "quantization_jai.py"]
        different = [name for name in names if sha256(out / "dpo" / name) != sha256(pulled / name)]
        if different:
            raise UserError(f"What came back from the Hub differs from what was pushed: {', '.join(different)}.")
        shell.jai(
            f'generate {REPO_ID} "{QUESTION}" --temperature 0 --max-new-tokens 20 --trust-remote-code', environment
        )
    shutil.rmtree(out / "hub")
    (loaded,) = re.findall(r"[\d,]+ parameters, .*", published)  # what the clean process found, before the upload
    return {
        "Loads in a clean process": f"{loaded} (through trust_remote_code, jai not importable)",
        "Back from the Hub bit-equal": f"{len(names)} files, SHA-256 equal",
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "huggingface_hub")
    return {
        "jai-llm": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "threads": str(torch.get_num_threads()),
    }


def _peak_memory_mb() -> float:
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kilobytes / 1024

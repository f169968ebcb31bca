# SPDX-License-Identifier: Apache-2.0
"""Training on pairs: DPO against a literal computation, its reference, CPO and ORPO, figures by category, recipes."""

import copy
import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from json_lines import turn, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer, ModelConfig, RewardConfig, ScriptArguments

from jai import JaiForCausalLM
from jai.errors import UserError
from jai.provenance import checkpoint_revision, read_step
from jai.trainers import cpo, dpo, orpo
from jai.trainers.agreement import tokenizer_difference
from jai.trainers.arguments import JaiTrainingArguments, parse_arguments
from jai.trainers.cpo import JaiCPOConfig
from jai.trainers.data import TrainingData
from jai.trainers.data_arguments import DataArguments
from jai.trainers.dpo import JaiDPOConfig, JaiDPOTrainer
from jai.trainers.orpo import JaiORPOConfig
from jai.trainers.pair_figures import PairFigures
from jai.trainers.reference import KeptLogProbs, log_probs_folder, pair_keys
from jai.trainers.reference_free import CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer, tokenize_pairs
from jai.trainers.rows import DatasetType

RECIPES = Path(__file__).parent.parent / "recipes"
OF_ALL = (ModelConfig, JaiTrainingArguments, DataArguments)
BETA = 0.3

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), router_aux_loss_coef=0.1)


@pytest.fixture(scope="module")
def pair_rows(sentences) -> list[dict[str, Any]]:
    return [
        {
            "prompt": turn("user", f"{sentences[i % 6][:20]} {i}"),
            "chosen": turn("assistant", f"{'yes ' * (i % 3)}ดี"),
            "rejected": turn("assistant", f"no {i}"),
        }
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, pair_rows) -> Path:
    groups = [{"kind": ("chat", "if", None)[i % 3], "lang": ("th", "en")[i % 2]} for i in range(len(pair_rows))]
    rows = [{**row, **group} for row, group in zip(pair_rows, groups)]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def arguments(model: Path, data: Path | str, out: str, **options: Any) -> list[str]:
    """Command-line arguments of a run of two steps on all eight pairs, in any order."""
    values = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return [
        part
        for key, value in values.items()
        for part in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def logs_of(out: Path, key: str = "loss") -> list[dict[str, float]]:
    return [log for log in json.loads((out / read_step(out)["log_history"]).read_text()) if key in log]


# --- DPO, literally

SGD = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.05,
    "max_grad_norm": 0,
    "max_steps": 4,
    "beta": BETA,
}


def answer_log_prob(model: torch.nn.Module, tokenizer: Any, row: dict[str, Any], name: str) -> torch.Tensor:
    """log p(answer | prompt), one token after the other."""
    start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
    ids = tokenizer.apply_chat_template(row["prompt"] + row[name])["input_ids"]
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return torch.stack([log_p[place - 1, ids[place]] for place in range(start, len(ids))]).sum()


@pytest.fixture(scope="module")
def literal_steps(checkpoint, pair_rows) -> list[dict[str, Any]]:
    """Rafailov et al., equation 7, and gradient descent on it by hand, with a reference that nothing touches."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    policy, reference = (AutoModelForCausalLM.from_pretrained(checkpoint).eval() for _ in range(2))
    steps = []
    for _ in range(SGD["max_steps"]):
        terms, margins = [], []
        for row in pair_rows:
            ratios = {}
            for name in ("chosen", "rejected"):
                with torch.no_grad():
                    fixed = answer_log_prob(reference, tokenizer, row, name)
                ratios[name] = answer_log_prob(policy, tokenizer, row, name) - fixed
            margins.append(BETA * (ratios["chosen"] - ratios["rejected"]))
            terms.append(-torch.log(1 / (1 + torch.exp(-margins[-1]))))
        loss = torch.stack(terms).mean()
        policy.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.grad is not None:
                    parameter -= SGD["learning_rate"] * parameter.grad
        steps.append({"loss": loss.item(), "margins": torch.stack(margins).tolist()})
    return steps


@pytest.mark.parametrize("beforehand", [False, True], ids=["live", "beforehand"])
def test_dpo_is_its_equation_with_an_untouched_reference(checkpoint, pairs, literal_steps, beforehand):
    """Four steps: a reference that moves with the policy, or half of beta, gives other losses from the second on."""
    options = {**SGD, "router_aux_loss_coef": 0, "precompute_ref_log_probs": beforehand}
    options |= {"category_column": "kind", "language_column": "lang"}
    logs = logs_of(dpo.main(arguments(checkpoint, pairs, "out", **options)))
    assert [log["loss"] for log in logs] == pytest.approx([step["loss"] for step in literal_steps], abs=2e-5)
    means = [sum(step["margins"]) / 8 for step in literal_steps]
    assert [log["rewards/margins"] for log in logs] == pytest.approx(means, abs=1e-4)
    assert means[-1] > 0.1  # and it goes somewhere

    groups = {"category/chat": [0, 3, 6], "category/if": [1, 4, 7], "language/th": [0, 2, 4, 6]}
    groups["language/en"] = [1, 3, 5, 7]
    for step, log in zip(literal_steps, logs):
        for name, members in groups.items():
            margins = [step["margins"][member] for member in members]
            assert log[f"rewards/margins/{name}"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
            if min(map(abs, margins)) > 1e-4:
                right = sum(margin > 0 for margin in margins) / len(margins)
                assert log[f"rewards/accuracies/{name}"] == pytest.approx(right)
        for name in ("margins", "accuracies"):  # as many pairs of both languages, ties too
            both = [log[f"rewards/{name}/language/{language}"] for language in ("th", "en")]
            assert sum(both) / 2 == pytest.approx(log[f"rewards/{name}"], abs=1e-5)
    named = {key.partition("rewards/margins/")[2] for log in logs for key in log if key.startswith("rewards/margins/")}
    assert named == {*groups}


def test_the_literal_computation_tells_half_of_beta_and_a_reference_that_moves(checkpoint, pairs, literal_steps):
    """What the test above would miss if its tolerance were too wide."""
    expected = [step["loss"] for step in literal_steps]
    options = {**SGD, "router_aux_loss_coef": 0}
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    for number, change in enumerate(({"beta": BETA / 2}, moving)):
        logs = logs_of(dpo.main(arguments(checkpoint, pairs, f"out-{number}", **{**options, **change})))
        assert max(abs(log["loss"] - loss) for log, loss in zip(logs, expected)) > 1e-2


def test_figures_of_categories_with_lora_beforehand_and_in_an_evaluation(checkpoint, pairs):
    """The reference is the same model with its adapter off; of an evaluation the figures have their prefix."""
    options = {"use_peft": True, "learning_rate": 1e-2, "category_column": "kind", "test_split_size": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 6, "loss_type": "ipo"}
    found = []
    for number, beforehand in enumerate((False, True)):
        out = dpo.main(arguments(checkpoint, pairs, f"{number}", precompute_ref_log_probs=beforehand, **options))
        logs, evaluated = logs_of(out)[-1], logs_of(out, "eval_loss")[-1]
        names = [key for key in logs if key.startswith(("rewards/margins/c", "rewards/accuracies/c"))]
        names_there = [key for key in evaluated if key.startswith("eval_rewards/margins/c")]
        assert len(names) == 4
        assert names_there
        assert not any("train_rewards" in key for log in logs_of(out, "train_loss") for key in log)
        found.append([logs[key] for key in names] + [evaluated[key] for key in names_there])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert max(map(abs, found[0])) > 1e-3


def test_pairs_without_a_group_are_in_no_figure():
    rows = Dataset.from_list([{"category": "a", "language": "th"}, {"category": "b", "language": None}])
    figures = PairFigures(TrainingData("d", DatasetType.PREFERENCE, ("chosen",), True, rows, None))
    asked = [{"category": "b"}, {"category": "a", "language": "th"}, {"category": "a"}, {}]
    numbers = torch.tensor([figures.number_of(row) for row in asked])
    assert numbers.tolist() == [1, 0, 2, 2]
    figures.add(numbers, torch.tensor([1.0, 2.0, 50.0, 60.0]), torch.tensor([1.0, 1.5, 0.0, 0.0]), training=True)
    assert figures.pop(lambda sums: sums, training=False) == {}
    assert figures.pop(lambda sums: sums, training=True) == {
        "rewards/margins/category/a": 0.5,
        "rewards/margins/category/b": 0.0,
        "rewards/margins/language/th": 0.5,
        "rewards/accuracies/category/a": 1.0,
        "rewards/accuracies/category/b": 0.0,  # of equal rewards none is higher
        "rewards/accuracies/language/th": 1.0,
    }
    assert figures.pop(lambda sums: sums, training=True) == {}


def test_figures_are_of_all_batches_and_of_groups_that_are_evaluated_alone():
    rows, others = (Dataset.from_list([{"category": name}]) for name in "ab")
    figures = PairFigures(TrainingData("d", DatasetType.PREFERENCE, ("chosen",), True, rows, others))
    both = torch.tensor([figures.number_of({"category": name}) for name in "ab"])
    for chosen, training in ((2.0, True), (4.0, True), (-5.0, False)):
        figures.add(both, torch.tensor([chosen, 2 * chosen]), torch.zeros(2), training=training)
    names = [f"rewards/{figure}/category/{name}" for figure in ("margins", "accuracies") for name in "ab"]
    assert figures.pop(lambda sums: sums, training=False) == dict(zip(names, (-5.0, -10.0, 0.0, 0.0)))
    assert figures.pop(lambda sums: sums, training=True) == dict(zip(names, (3.0, 6.0, 1.0, 1.0)))


def test_figures_need_rewards_that_are_sums_over_tokens():
    """With `ld_alpha` TRL weighs the tokens beyond the shorter answer's, and a reward model has rewards of its own."""
    rows = Dataset.from_list([{"category": "a"}])
    data = TrainingData("d", DatasetType.PREFERENCE, ("chosen",), True, rows, None)
    options = {"output_dir": "out", "bf16": False}
    assert PairFigures.can_tell(data, JaiDPOConfig(**options))
    assert not PairFigures.can_tell(data, JaiDPOConfig(**options, ld_alpha=0.5))
    assert not PairFigures.can_tell(data, RewardConfig(**options))


# --- the reference


def models_in_memory() -> int:
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, JaiForCausalLM)]
    return sum(next(each.parameters()).device.type != "meta" for each in found)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"use_peft": True}, 1),
        pytest.param({"use_peft": True, "precompute_ref_log_probs": True}, 1, marks=pytest.mark.slow),
        pytest.param({"precompute_ref_log_probs": True}, 1, marks=pytest.mark.slow),
        ({}, 2),  # so that the count can tell
        pytest.param({"ref_model_name_or_path": "{checkpoint}"}, 2, marks=pytest.mark.slow),
        ({"ref_model_name_or_path": "{checkpoint}", "precompute_ref_log_probs": True}, 1),
    ],
    ids=str,
)
def test_a_second_model_is_in_memory_where_the_plan_says_so(checkpoint, pairs, monkeypatch, capsys, options, more):
    before, counted = models_in_memory(), []
    step = JaiDPOTrainer.training_step

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        counted.append(models_in_memory() - before)
        return step(*args, **kwargs)

    monkeypatch.setattr(JaiDPOTrainer, "training_step", counting)
    options = {key: str(value).format(checkpoint=checkpoint) for key, value in options.items()}
    dpo.main(arguments(checkpoint, pairs, "out", max_steps=1, **options))
    assert counted == [more]
    said = " ".join(capsys.readouterr().out.split())
    assert ("a second model in memory" in said) == (more == 2)


def test_another_reference_is_what_the_answers_are_held_against(checkpoint, tiny_checkpoint, pairs, pair_rows):
    """The first loss is that of two models, and no ln 2; computed beforehand, it is the same."""
    other = tiny_checkpoint(Path("other"), seed=1, router_aux_loss_coef=0.1)
    options = {"beta": BETA, "router_aux_loss_coef": 0, "max_steps": 1, "ref_model_name_or_path": other}
    live = logs_of(dpo.main(arguments(checkpoint, pairs, "live", **options)))[0]
    out = dpo.main(arguments(checkpoint, pairs, "kept", precompute_ref_log_probs=True, **options))
    (kept,) = logs_of(out)
    assert [(entry["role"], entry["name"]) for entry in read_step(out)["inputs"]] == [
        ("model", checkpoint.name),
        ("reference", "other"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checkpoint, other))
    with torch.no_grad():
        margins = [
            BETA * sum(
                of_model * of_name * answer_log_prob(model, tokenizer, row, name)
                for model, of_model in ((policy, 1), (reference, -1))
                for name, of_name in (("chosen", 1), ("rejected", -1))
            )
            for row in pair_rows
        ]  # fmt: skip
    expected = -F.logsigmoid(torch.stack(margins)).mean().item()
    assert abs(expected - math.log(2)) > 0.01
    assert live["loss"] == pytest.approx(expected, abs=2e-5)
    assert kept["loss"] == pytest.approx(expected, abs=2e-5)


def counted_pairs(monkeypatch) -> list[int]:
    """How many pairs each batch of a reference has, as they are computed."""
    counted: list[int] = []
    compute = JaiDPOTrainer.compute_ref_log_probs

    def counting(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        counted.append(len(inputs["input_ids"]) // 2)
        return compute(self, model, inputs)

    monkeypatch.setattr(JaiDPOTrainer, "compute_ref_log_probs", counting)
    return counted


def test_a_reference_that_was_interrupted_goes_on_and_is_used_again(checkpoint, pairs, pair_rows, monkeypatch, capsys):
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2, "router_aux_loss_coef": 0}
    expected = logs_of(dpo.main(arguments(checkpoint, pairs, "live", router_aux_loss_coef=0)))
    counted = counted_pairs(monkeypatch)
    add = KeptLogProbs.add

    def killed(self: KeptLogProbs, keys: Any, values: np.ndarray) -> None:
        add(self, keys, values)
        if len(counted) == 2:
            with next(Path().rglob("log_probs.bin")).open("ab") as file:
                file.write(b"half a record")  # as a kill in the middle of writing leaves it
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptLogProbs, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            dpo.main(arguments(checkpoint, pairs, "out", **options))
    assert counted == [2, 2]
    counted.clear()
    capsys.readouterr()
    out = dpo.main(arguments(checkpoint, pairs, "out", **options))
    assert counted == [2, 2]  # the other four
    assert "Log-probabilities of the reference: 4 of 8 pairs are kept." in capsys.readouterr().out
    assert [log["loss"] for log in logs_of(out)] == pytest.approx([log["loss"] for log in expected], abs=1e-5)

    counted.clear()
    dpo.main(arguments(checkpoint, pairs, "again", seed=7, learning_rate=1e-4, use_peft=True, **options))
    assert counted == []
    more = [*pair_rows[::-1], {**pair_rows[0], "chosen": turn("assistant", "another")}]
    dpo.main(arguments(checkpoint, write_rows(Path("more.jsonl"), more), "more", **options))
    assert counted == [1]


@pytest.mark.slow
def test_a_killed_reference_goes_on_with_the_same_command(checkpoint, tmp_path):
    """SIGKILL while it is computed; the same command computes the rest, and trains."""
    rows = [{"prompt": f"{row}", "chosen": f"yes {row}", "rejected": f"no {row}"} for row in range(400)]
    data = write_rows(tmp_path / "many.jsonl", rows)
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1, "max_steps": 1, "bf16": False}
    command = [sys.executable, "-m", "jai", "dpo", *arguments(checkpoint, data, "out", **options)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kept() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "cache").rglob("log_probs.bin")) // 24

    while kept() < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = kept()
    assert before < 400
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Log-probabilities of the reference: {before} of 400 pairs are kept." in done.stdout
    assert kept() == 400
    assert logs_of(Path("out"))[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        "other weights",
        {"max_length": 30},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("other template", {"dtype": "bfloat16"}, {"ld_alpha": 0.5})
        ),
    ],
    ids=str,
)
def test_another_reference_or_other_tokens_are_computed_anew(checkpoint, tiny_checkpoint, pairs, monkeypatch, change):
    options = {"precompute_ref_log_probs": True, "max_steps": 1}
    dpo.main(arguments(checkpoint, pairs, "first", **options))
    counted = counted_pairs(monkeypatch)
    if change == "other weights":
        checkpoint = tiny_checkpoint(Path("other"), seed=1)
    elif change == "other template":
        template = AutoTokenizer.from_pretrained(checkpoint).chat_template
        Path("other.jinja").write_text(template.replace("<|user|>", "<|user|> "), encoding="utf-8")
        checkpoint = tiny_checkpoint(Path("same"))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.chat_template = Path("other.jinja").read_text(encoding="utf-8")
        tokenizer.save_pretrained(checkpoint)
    else:
        options |= change
    dpo.main(arguments(checkpoint, pairs, "second", **options))
    assert sum(counted) == 8


def test_a_reference_is_known_by_all_that_decides_its_numbers(checkpoint, tiny_checkpoint, pairs, monkeypatch):
    """What another checkpoint is loaded with is its own: no context or revision of the model's."""
    identities: list[dict[str, Any]] = []
    monkeypatch.setattr(dpo, "log_probs_folder", lambda **identity: identities.append(identity) or Path("kept"))
    other = tiny_checkpoint(Path("other"))
    options = {"precompute_ref_log_probs": True, "max_steps": 1, "truncation_mode": "keep_end", "max_length": 40}
    options |= {"max_position_embeddings": 64, "attn_implementation": "eager"}
    dpo.main(arguments(checkpoint, pairs, "own", **options))
    dpo.main(arguments(checkpoint, pairs, "other-run", ref_model_name_or_path=other, dtype="bfloat16", **options))
    own, named = identities
    shared = {"autocast": (False, False), "max_length": 40, "truncation_mode": "keep_end", "ld_alpha": None}
    assert own == own | shared | {"dtype": torch.float32, "reference": checkpoint_revision(str(checkpoint))}
    assert named == named | shared | {"dtype": torch.bfloat16, "reference": checkpoint_revision(str(other))}
    assert own.keys() == named.keys() == {*shared, "dtype", "reference", "loading"}
    assert own["loading"]["max_position_embeddings"] == 64
    assert own["loading"]["attn_implementation"] == named["loading"]["attn_implementation"] == "eager"
    assert "max_position_embeddings" not in named["loading"]
    assert not {"revision"} & (own["loading"].keys() | named["loading"].keys())


def test_the_same_tokens_with_other_borders_are_another_pair():
    borders = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1], [2], [3, 4]), ([1, 2], [3, 4], [])]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert len(set(pair_keys(Dataset.from_list([dict(zip(names, ids)) for ids in borders])))) == len(borders)


def test_log_probs_of_another_version_are_not_taken(monkeypatch):
    """The code that computes them is part of what decides them."""
    before = log_probs_folder(reference="a")
    assert log_probs_folder(reference="a") == before != log_probs_folder(reference="b")
    monkeypatch.setattr("jai.trainers.reference.__version__", "another")
    assert log_probs_folder(reference="a") != before


def test_how_tokenizers_differ(tiny_tokenizer):
    bare, other = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    bare.chat_template, other.chat_template = None, "another"
    assert tokenizer_difference(tiny_tokenizer, bare, template=True) is None
    assert tokenizer_difference(tiny_tokenizer, other, template=False) is None
    assert tokenizer_difference(tiny_tokenizer, other, template=True) == "its chat template is another one"
    other.add_tokens(["ใหม่"])
    size = len(tiny_tokenizer)
    assert tokenizer_difference(tiny_tokenizer, other, template=False) == (
        f"1 tokens differ, such as 'ใหม่', which is {size} there and is none here"
    )


def test_two_runs_do_not_write_one_file(checkpoint, pairs):
    options = {"precompute_ref_log_probs": True, "max_steps": 1}
    dpo.main(arguments(checkpoint, pairs, "out", **options))
    kept = KeptLogProbs(next(Path().rglob("log_probs.bin")).parent)
    with pytest.raises(UserError, match="Another run is computing log-probabilities of the same reference"):
        dpo.main(arguments(checkpoint, pairs, "other", **options))
    kept.close()


def test_a_reference_without_numbers_is_refused(tiny_checkpoint, pairs):
    broken = tiny_checkpoint(Path("broken"))
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="log-probabilities that are not finite"):
        dpo.main(arguments(broken, pairs, "out", precompute_ref_log_probs=True))


def test_a_reference_that_reads_other_tokens_is_refused_before_training(
    checkpoint, tiny_checkpoint, pairs, monkeypatch
):
    """Neither model's weights are read: they are no weights."""
    monkeypatch.setattr(JaiForCausalLM, "from_pretrained", None)
    smaller = tiny_checkpoint(Path("smaller"))
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    swapped, rendered = tiny_checkpoint(Path("swapped")), tiny_checkpoint(Path("rendered"))
    written = (swapped / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(written)
    ids = vocabulary["model"]["vocab"]
    one, two = list(ids)[300:302]
    ids[one], ids[two] = ids[two], ids[one]
    (swapped / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(rendered)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|> ")
    tokenizer.save_pretrained(rendered)
    size = config["vocab_size"]
    for folder, message in (
        (smaller, f"has a vocabulary of {size + 64}, and .* one of {size}"),
        (swapped, "reads other tokens than .*: 2 tokens differ, such as"),
        (rendered, "reads other tokens than .*: its chat template is another one"),
        ("nowhere/at/all", "neither a folder nor a Hub id"),
    ):
        with pytest.raises(UserError, match=message):
            dpo.main(arguments(checkpoint, pairs, "out", ref_model_name_or_path=folder))
    assert not Path("out").exists()


def test_trls_private_method_is_there():
    assert callable(DPOTrainer._precompute_ref_logps)


# --- CPO with SimPO, and ORPO

TRLS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "bf16": False,
    "learning_rate": 1e-2,
}
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "beta": 2.0}


@pytest.mark.parametrize(
    ("stage", "trainer_class", "config_class", "options"),
    [
        (cpo, CPOTrainer, CPOConfig, SIMPO),
        (cpo, CPOTrainer, CPOConfig, {}),
        (orpo, ORPOTrainer, ORPOConfig, {"beta": 0.4}),
    ],
    ids=["simpo", "cpo", "orpo"],
)
def test_trls_own_trainers_give_the_same_losses(
    checkpoint, pairs, pair_rows, stage, trainer_class, config_class, options
):
    """Ten lines of TRL. It puts `<s>` before prompts where the tokenizer has one, which ours do not."""
    given = {**TRLS, **options, "router_aux_loss_coef": 0, "category_column": "kind"}
    out = stage.main(arguments(checkpoint, pairs, "out", **{key: given[key] for key in given if key != "bf16"}))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.bos_token = None
    trainer = trainer_class(
        model=str(checkpoint),
        args=config_class(output_dir="trl", **TRLS, **options),
        train_dataset=Dataset.from_list(pair_rows),
        processing_class=tokenizer,
    )
    trainer.train()
    keys = ("loss", "rewards/margins", "rewards/accuracies", "nll_loss")
    theirs = [[log[key] for key in keys] for log in trainer.state.log_history if "loss" in log]
    assert [[log[key] for key in keys] for log in logs_of(out)] == theirs
    assert "aux_loss" not in logs_of(out)[0]
    assert len({loss for loss, *_ in theirs}) == 3


@pytest.mark.parametrize(("stage", "options"), [(cpo, SIMPO), (orpo, {})], ids=["simpo", "orpo"])
def test_the_auxiliary_loss_is_added_and_categories_are_told_apart(checkpoint, pairs, monkeypatch, stage, options):
    shared = {**options, "learning_rate": 0, "max_steps": 1, "category_column": "kind", "language_column": "lang"}
    loaded, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: loaded.append(kwargs) or load(name, **kwargs)
    )
    log = logs_of(stage.main(arguments(checkpoint, pairs, "with", **shared)))[0]
    without = logs_of(stage.main(arguments(checkpoint, pairs, "without", router_aux_loss_coef=0, **shared)))[0]
    assert {kwargs["device_map"] for kwargs in loaded} == {None}  # TRL's "auto" would split it over all GPUs
    assert log["aux_loss"] > 0.5
    assert log["loss"] == pytest.approx(without["loss"] + 0.1 * log["aux_loss"], abs=1e-5)
    assert log["grad_norm"] != pytest.approx(without["grad_norm"], abs=1e-4)  # it has gradients of its own
    assert (log["rewards/margins/language/th"] + log["rewards/margins/language/en"]) / 2 == pytest.approx(
        log["rewards/margins"], abs=1e-5
    )
    assert "rewards/accuracies/category/chat" in log


def test_tokens_are_those_of_all_stages(tiny_tokenizer):
    """No `<s>`, which TRL's trainers without a reference put before prompts, and tools, which they leave out."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {"prompt": turn("user", "hi"), "chosen": turn("assistant", "yes"), "rejected": turn("assistant", "no")}
    rows = tokenize_pairs(
        Dataset.from_list([{**row, "tools": json.dumps(tools), "category": "x"}]), tiny_tokenizer, 512
    )
    ids = tiny_tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tools=tools)["input_ids"]
    start = tiny_tokenizer.apply_chat_template(row["prompt"], tools=tools, add_generation_prompt=True)["input_ids"]
    (encoded,) = rows
    assert encoded["chosen_input_ids"] == ids
    assert encoded["chosen_labels"] == [-100] * len(start) + ids[len(start) :]
    assert encoded["chosen_attention_mask"] == [1] * len(ids)
    assert encoded["category"] == "x"
    cut = tokenize_pairs(Dataset.from_list([row]), tiny_tokenizer, len(ids) - 1)
    assert len(cut) == 1
    assert len(cut[0]["chosen_input_ids"]) == len(cut[0]["chosen_labels"]) < len(ids)


@pytest.mark.parametrize("stage", [cpo, orpo])
@pytest.mark.parametrize(
    ("seed", "expected"), [(42, ("1", "6", "")), (2, ("1", "3", " to evaluate on"))], ids=["train", "evaluation"]
)
def test_pairs_whose_prompts_are_too_long_are_left_out_and_counted(
    checkpoint, pair_rows, stage, seed, expected, capsys
):
    """TRL trains on their mean over no token, which is NaN."""
    rows = [*pair_rows, {**pair_rows[0], "prompt": turn("user", "long " * 60)}]
    options = {"max_length": 60, "max_steps": 1, "eval_strategy": "steps", "test_split_size": 3, "seed": seed}
    out = stage.main(arguments(checkpoint, write_rows(Path("rows.jsonl"), rows), "out", **options))
    said = " ".join(capsys.readouterr().out.split())
    found = re.findall(r"Left out (\d+) of (\d+) examples(| to evaluate on): their prompts", said)
    assert found == [expected]
    assert math.isfinite(logs_of(out)[0]["loss"])
    with pytest.raises(UserError, match=r"None of the examples in .* can be trained on: their prompts alone have 5"):
        stage.main(arguments(checkpoint, "rows.jsonl", "none", max_length=5))


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (cpo, {"dataset_streaming": True}, "`dataset_streaming` is on"),
        (orpo, {"max_length": "null"}, "`max_length` is null, for which this trainer of TRL's takes 512"),
        (orpo, {"linear_cross_entropy": True}, "`linear_cross_entropy` is about TRL's fused head"),
        (cpo, {"simpo_gamma": 1.5}, "`simpo_gamma` is 1.5, which has an effect with `loss_type: simpo` alone"),
        (cpo, {"loss_type": "hinge", "label_smoothing": 0.1}, "`label_smoothing` is 0.1, which has an effect with"),
        (orpo, {"max_completion_length": 9}, "`max_completion_length` is 9, which has an effect with encoder-decoder"),
        (cpo, {"generate_during_eval": True}, "`generate_during_eval` is True, which has an effect with TRL's own"),
        (cpo, {"label_smoothing_factor": 0.1}, "`label_smoothing` is the one that has"),
        (dpo, {"padding_free": True}, "`padding_free` is True, which has an effect with a TRL whose DPOTrainer"),
        (dpo, {"dataset_streaming": True, "precompute_ref_log_probs": True}, "needs all pairs at once"),
        (cpo, {"loss_type": "nonsense"}, "invalid choice: 'nonsense'"),
        (dpo, {"label_smoothing": 0.1}, "`label_smoothing` is 0.1, which has an effect with `loss_type` exo_pair"),
        (dpo, {"label_smoothing": 0.5, "loss_type": "robust"}, "the robust loss needs less than 0.5"),
        (dpo, {"discopop_tau": 0.5}, "`discopop_tau` is 0.5, which has an effect with `loss_type` discopop alone"),
        (dpo, {"f_alpha_divergence_coef": 0.7}, "`f_alpha_divergence_coef` is 0.7, which has an effect"),
        (dpo, {"ref_model_sync_steps": 9}, "`ref_model_sync_steps` is 9, which has an effect with `sync_ref_model"),
        (dpo, {"precompute_ref_batch_size": 9}, "`precompute_ref_batch_size` is 9, which has an effect"),
        (dpo, {"sync_ref_model": True, "use_peft": True}, "`sync_ref_model` needs a reference of its own"),
        (dpo, {"sync_ref_model": True, "precompute_ref_log_probs": True}, "`sync_ref_model` moves the reference"),
        (dpo, {"ld_alpha": 2}, "`ld_alpha` is 2.0; expected from 0 to 1"),
        (dpo, {"use_weighting": True, "loss_type": "aot"}, "WPO-style weighting is not implemented"),
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_or_fail_later_are_refused(checkpoint, pairs, stage, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        stage.main(arguments(checkpoint, pairs, "out", **options))


# --- recipes

CONFIGS = {
    "dpo_table12": JaiDPOConfig,
    "dpo_fluency": JaiDPOConfig,
    "simpo": JaiCPOConfig,
    "orpo": JaiORPOConfig,
}


@pytest.mark.parametrize("recipe", CONFIGS)
def test_recipes_parse(recipe):
    """What is commented out is an option, too."""
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    spelled = re.sub(r"^# ((router_aux|precompute_ref|ref_model|eval_|experts_impl)\w*: )", r"\1", text, flags=re.M)
    assert spelled != text
    Path("spelled.yaml").write_text(spelled, encoding="utf-8")
    for path in (RECIPES / f"{recipe}.yaml", Path("spelled.yaml")):
        parsed = parse_arguments((ScriptArguments, CONFIGS[recipe], *OF_ALL), ["--config", str(path)], "jai")
        values = {key: value for part in parsed for key, value in vars(part).items()}
        for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            assert values[key] == value or key == "report_to", key


def test_the_shares_are_table_12s():
    shares = yaml.safe_load((RECIPES / "dpo_table12.yaml").read_text(encoding="utf-8"))["shares"]
    assert sum(shares.values()) == 79_811
    printed = {name: round(100 * share / 79_811, 2) for name, share in shares.items()}
    assert printed == {"chat": 9.89, "if": 84.53, "hallucination": 5.58}


@pytest.mark.parametrize("recipe", ["dpo_fluency", pytest.param("dpo_table12", marks=pytest.mark.slow)])
def test_recipes_of_pairs_run_on_generated_rows(recipe, checkpoint, sentences):
    """As they are but for the places of the data, and with a thousandth of their rows."""
    config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    counts = {"chat": 8, "if": 34, "hallucination": 5, "fluency": 8}
    for number, source in enumerate(config["datasets"]):
        rows = [
            {"prompt": f"{number} {row}", "chosen": turn("assistant", f"{sentences[0][:9]} {row}"),
             "rejected": turn("assistant", "no")}
            for row in range(counts[source["category"]])
        ]  # fmt: skip
        source["path"] = str(write_rows(Path(f"source-{number}.jsonl"), rows))
    small = {"max_steps": 1, "per_device_train_batch_size": 80, "gradient_accumulation_steps": 1, "dtype": "float32"}
    small |= {"model_name_or_path": str(checkpoint), "output_dir": "out", "merge_adapter": False, "logging_steps": 1}
    small |= {"new_row_ids": "300-380", "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none"}
    Path("stage.yaml").write_text(yaml.safe_dump(config | small), encoding="utf-8")
    out = dpo.main(["--config", "stage.yaml"])
    (log,) = logs_of(out)
    assert log["loss"] == pytest.approx(math.log(2) + 0.1 * log["aux_loss"], abs=1e-5)
    names = {f"{name}/{source[name]}" for source in config["datasets"] for name in ("category", "language")}
    assert {key.removeprefix("rewards/margins/") for key in log if key.startswith("rewards/margins/")} == names
    record = read_step(out)
    of = dict.fromkeys(config["shares"], 0)
    for source in record["dataset"]["sources"]:
        of[source["category"]] += source["rows"]
    for name, share in config["shares"].items():
        assert of[name] / record["dataset"]["rows"] == pytest.approx(share / sum(config["shares"].values()), abs=0.02)
    assert record["options"]["shares"] == config["shares"]

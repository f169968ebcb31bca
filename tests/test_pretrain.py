# SPDX-License-Identifier: Apache-2.0
"""`jai pretrain`: the steps' sequences, losses and schedules, resumption to the bit, what stops or is refused."""

import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from packed_text import packed_corpus
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState, get_wsd_schedule
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import add_fused_lm_head

import jai.recipes
from jai.errors import UserError
from jai.hub_card.readme import written_by_hand
from jai.pretraining.config import read_corpus_config
from jai.pretraining.dataset import PackedSequences
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.pretraining.plan import AnnealedPlan, SequencePlan
from jai.pretraining.shards import PackedCorpus
from jai.pretraining.shares import DocumentChoice, Shares, SourceShare
from jai.provenance import chain, read_step
from jai.trainers import pretrain, pretrain_trainer
from jai.trainers.arguments import parse_arguments
from jai.trainers.pretrain_announce import step_rows, text_rows
from jai.trainers.pretrain_trainer import TOKENS_SEEN
from jai.trainers.run_report import find_alarms, read_logs, report_run
from jai.trainers.run_report_options import RunReportOptions
from jai.trainers.schedules import annealing_begins, warmup_stable_decay
from jai.trainers.second_token import add_second_token_layer, second_labels
from jai.trainers.steps import StepLayout

RECIPES = Path(jai.recipes.__file__).parent
CONTEXT = 48
_MORE_THAI = (("english", 1), ("thai", 3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, checkpoint, sentences) -> Path:
    """Two sources, of 3 parts English and 1 part Thai, by the real `jai pack`."""
    folder = tmp_path_factory.mktemp("text")
    sources = []
    for name, weight, kept in (("english", 3, sentences[2:4]), ("thai", 1, sentences[:2])):
        texts = [f"{number} {kept[number % 2]} " * (1 + number % 4) for number in range(60)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"name": name, "text": str(path), "language": name[:2], "weight": weight, "epochs": 3})
    config = folder / "corpus.yaml"
    config.write_text(yaml.safe_dump({"tokenizer": str(checkpoint), "sources": sources}))
    return pack_corpus(PackOptions(out=folder / "packed", config=config, workers=1), Console(quiet=True))


@pytest.fixture
def options(checkpoint, packed, tmp_path) -> dict[str, Any]:
    """Of a short run; all that is random is by the seed."""
    return {
        "model_name_or_path": checkpoint,
        "packed": packed,
        "output_dir": tmp_path / "out",
        "max_length": CONTEXT,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }


def command_line(options: dict[str, Any]) -> list[str]:
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def run(options: dict[str, Any], **more: Any) -> Path:
    return pretrain.main(command_line({**options, **more}))


def arguments_of(options: dict[str, Any]) -> tuple:
    return parse_arguments(pretrain.OPTIONS, command_line(options), "jai pretrain")


def logs_of(out: Path) -> list[dict[str, Any]]:
    """The logs of the training steps, without what depends on the time."""
    logs = json.loads((out / read_step(out)["log_history"]).read_text())
    return [{key: value for key, value in log.items() if key != "tokens_per_second"} for log in logs if "loss" in log]


def of_tokens(log: dict[str, Any]) -> dict[str, Any]:
    """What is a mean over tokens. The load-balancing loss is of a batch on one process, whatever its size."""
    return {key: value for key, value in log.items() if not key.startswith("router/aux_loss")}


class TestSteps:
    def test_batches_grow_in_stages_and_every_sequence_comes_once(self):
        layout = StepLayout(steps=20, batch_sequences=6, accumulation=4, first_accumulation=2, ramp_steps=10)
        assert [layout.batches(step) for step in (0, 3, 4, 6, 7, 19)] == [2, 2, 3, 3, 4, 4]
        sequences = [layout.sequence(slot) for slot in range(layout.slots)]
        present = [sequence for sequence in sequences if sequence is not None]
        assert present == [*range(layout.first_sequence(20))]
        for step in range(20):
            of_step = sequences[step * 24 : (step + 1) * 24]
            absent = 24 - layout.batches(step) * 6
            assert of_step[:absent] == [None] * absent  # first: processes share gradients after the last
            assert of_step[absent] == layout.first_sequence(step)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"first_accumulation": 1}, {"sequences_of_first_step"}),
            ({"ramp_steps": 9}, {"ramp_steps"}),
            ({"batch_sequences": 12, "accumulation": 2, "first_accumulation": 1}, {"sequences_a_batch"}),
        ],
        ids=lambda value: "-".join(value),
    )
    def test_the_growth_of_the_batch_decides_the_run(self, changes, named):
        """Whatever gives a step other sequences is another run, and so may not be resumed as this one."""
        layout = StepLayout(steps=20, batch_sequences=6, accumulation=4, first_accumulation=2, ramp_steps=10)
        other = replace(layout, **changes)
        begins = [[each.first_sequence(step) for step in range(20)] for each in (layout, other)]
        assert begins[0] != begins[1]
        identity = layout.identity()
        assert {key for key, value in other.identity().items() if value != identity[key]} == named
        alike = [StepLayout(20, batch, 24 // batch, 24 // batch, 10).identity() for batch in (6, 12)]
        assert alike[0] == alike[1]  # a batch that does not grow may be divided otherwise


class TestSchedules:
    def test_the_decay_is_inverse_and_ends_at_its_share(self):
        rates = [warmup_stable_decay(s, warmup=10, decay=90, steps=100, final=0.1) for s in range(101)]
        assert rates[:11] == [step / 10 for step in range(11)]
        assert set(rates[10:91]) == {1.0}
        assert rates[95] == pytest.approx(1 / (1 + 9 * 0.5))
        assert rates[100] == pytest.approx(0.1)
        assert annealing_begins(100, 0.1) == 90


class TestRun:
    def test_it_is_the_models_own_loss_on_the_plans_sequences(self, options, packed, checkpoint, capsys):
        """Losses of the first two steps and weights, against a loop written by hand on `SequencePlan`'s pieces."""
        more = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "router_aux_loss_coef": 0, "max_grad_norm": 0}
        out = run(options, annealing=0, warmup_steps=0, **more)
        plan = SequencePlan(PackedCorpus.open(packed), CONTEXT, seed=42)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
        logs = logs_of(out)
        for step in range(2):
            model.zero_grad()
            total, count = torch.zeros(()), 0
            for number in range(step * 4, step * 4 + 4):
                pieces = plan.pieces(number)
                for piece in range(len(pieces)):  # each document alone
                    source, document, start, stop = (
                        int(column[piece]) for column in (pieces.source, pieces.document, pieces.start, pieces.stop)
                    )
                    ids = torch.tensor(plan.sources[source].read(document, start, stop).astype("int64"))[None]
                    if ids.shape[1] > 1:
                        logits = model(ids).logits[0, :-1]
                        total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
                        count += ids.shape[1] - 1
            loss = total / count
            loss.backward()
            assert logs[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        for name, weight in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(weight, model.state_dict()[name], atol=1e-5, rtol=1e-4)
        seen = read_step(out)["dataset"][TOKENS_SEEN]
        assert seen == plan.tokens_seen(8)
        assert sum(seen.values()) == 8 * CONTEXT
        assert [log[TOKENS_SEEN] for log in logs] == [4 * CONTEXT, 8 * CONTEXT]
        assert logs[1][f"{TOKENS_SEEN}/thai"] == seen["thai"]
        shown = " ".join(capsys.readouterr().out.split())
        assert f": 8 of {len(plan)} sequences of 48 tokens, isolated" in shown
        assert "load-balancing loss x 0, z-loss x 0" in shown
        assert f"384: english {seen['english']} ({seen['english'] / 384:.1%}), thai {seen['thai']}" in shown

    def test_accumulation_gives_the_large_batchs_losses(self, options, tmp_path):
        """Without the routers' losses, which are a batch's and not a token's."""
        options |= {"router_aux_loss_coef": 0, "max_steps": 3}
        sizes = {"whole": (4, 1), "halves": (2, 2)}
        runs = {
            name: logs_of(
                run(
                    options,
                    output_dir=tmp_path / name,
                    per_device_train_batch_size=batch,
                    gradient_accumulation_steps=accumulated,
                )
            )
            for name, (batch, accumulated) in sizes.items()
        }
        for ours, theirs in zip(runs["halves"], runs["whole"], strict=True):
            assert of_tokens(ours) == pytest.approx(of_tokens(theirs), abs=1e-6, rel=1e-6)  # 4 units in the last place

    def test_what_text_is_taken_and_when_is_as_the_options_say(self, options, packed):
        """Each option has another value than its default; nothing is trained."""
        corpus = PackedCorpus.open(packed)
        taken = {"data_seed": 7, "packing_strategy": "xlda", "rho": 0.25, "max_length": 32, "max_steps": -1}
        plan, layout = pretrain.plan_run(arguments_of({**options, **taken})[0], corpus)
        expected = SequencePlan(corpus, 32, strategy="xlda", seed=7, rho=0.25)
        assert plan.identity() == expected.identity()
        assert layout.steps == len(expected) // 4 > 10  # as long as the text lasts
        growth = {"gradient_accumulation_steps": 4, "first_accumulation_steps": 2, "batch_ramp": 0.25, "max_steps": 12}
        _, layout = pretrain.plan_run(arguments_of({**options, **growth})[0], corpus)
        assert [layout.batches(step) for step in range(5)] == [2, 3, 4, 4, 4]
        with pytest.raises(UserError, match="sequences of 48 tokens, fewer than one step takes"):
            pretrain.plan_run(arguments_of({**options, "max_steps": -1, "gradient_accumulation_steps": 999})[0], corpus)

    def test_the_plan_says_what_is_left_out_and_a_dense_model_leaves_snapshots(
        self, options, tiny_model, tiny_tokenizer, tmp_path, capsys
    ):
        dense = tmp_path / "dense"
        tiny_model(vocab_size=len(tiny_tokenizer), num_local_experts=1).save_pretrained(dense)
        tiny_tokenizer.save_pretrained(dense)
        lengths = PackedCorpus.open(options["packed"]).sources[0].lengths(0, 60)
        longest = int(sorted(lengths)[30])
        mixture = {"sources": [{"name": "english", "language": "en", "max_tokens": longest}]}
        (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
        more = {"mixture": tmp_path / "mixture.yaml", "router_z_loss_coef": 0.1, "snapshot_steps": 1, "max_steps": 1}
        out = run(options, model_name_or_path=dense, save_strategy="steps", **more)
        shown = " ".join(capsys.readouterr().out.split())
        left = int((lengths > longest).sum())
        assert 0 < left < 60
        assert f"left out thai: not in the mixture english: {left} of 60 documents, by `keep_best`" in shown
        assert "routers none: `router_z_loss_coef` has no effect" in shown
        assert (out / "snapshots" / "step-1").is_dir()

    def test_the_plan_says_what_has_no_effect(self, options, packed, tmp_path):
        """Nothing is trained: the rows that would be printed."""
        corpus = PackedCorpus.open(packed)
        weights = {"sources": [{"name": "english", "language": "en"}]}
        (tmp_path / "annealing.yaml").write_text(yaml.safe_dump(weights))

        def rows(**more: Any) -> dict[str, str]:
            config = arguments_of({**options, **more})[0]
            plan, layout = pretrain.plan_run(config, corpus)
            return dict([*text_rows(config, plan, layout), *step_rows(config, None, layout)])

        longest = max(corpus.sources[index].lengths(0, 60).max() for index in (0, 1))
        assert "positions" not in rows(max_length=int(longest), max_steps=1)
        beyond = f"the longest has {longest} tokens: [yellow]positions beyond learn nothing[/]"
        assert beyond in rows(max_length=int(longest) + 1, max_steps=1)["positions"]
        assert "positions" not in rows(max_length=int(longest) + 1, max_steps=1, packing_strategy="concatenated")
        kept = rows(max_steps=20, warmup_steps=18)
        assert kept["learning rate"] == "0.001 after 18 steps; from step 18, decays to 0.0001"
        unreached = rows(max_steps=20, warmup_steps=19)["learning rate"]
        assert unreached == (
            "rises over 19 steps; [yellow]its peak, 0.001, is never reached[/]; from step 18, decays to 0.0001"
        )
        more = {"annealing_weight_decay": 0.01, "weight_decay": 0.1}
        short = rows(max_steps=4, **more)  # 0.4 steps
        assert short["learning rate"] == "0.001 after 0 steps"
        assert short["annealing"] == (
            "[yellow]none: 0.1 of 4 steps is less than one step, and without effect are weight decay 0.01[/]"
        )
        assert rows(max_steps=5, annealing=0.2, **more)["annealing"] == "from step 4: weight decay 0.01"
        with pytest.raises(UserError, match=r"`annealing` is 1, all of the 4 steps"):
            rows(max_steps=4, annealing=1, annealing_mixture=tmp_path / "annealing.yaml")

    def test_the_trainer_gets_what_the_options_say(self, options, monkeypatch):
        """Two whose effect takes a slow run; nothing is trained."""

        class Built(Exception):
            pass

        def build(*args: Any, **given: Any) -> None:
            raise Built(given["linear_cross_entropy"], given["router_statistics"])

        monkeypatch.setattr(pretrain, "JaiPretrainTrainer", build)
        for is_on in (True, False):
            with pytest.raises(Built) as built:
                run(options, linear_cross_entropy=is_on, router_statistics=not is_on)
            assert built.value.args == (is_on, not is_on)

    def test_with_arguments_the_schedule_is_transformers_own(self, options):
        given = {"warmup_steps": 1, "lr_scheduler_kwargs": '{"num_decay_steps": 3, "decay_type": "linear"}'}
        logs = logs_of(run(options, **given))
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
        theirs = get_wsd_schedule(optimizer, 1, 3, num_training_steps=6, decay_type="linear").lr_lambdas[0]
        assert [log["learning_rate"] for log in logs] == pytest.approx([1e-3 * theirs(step) for step in range(6)])
        assert logs[3]["learning_rate"] == 1e-3 > logs[4]["learning_rate"]

    def test_the_plan_says_that_equal_scores_keep_more_than_is_asked(self, options, tmp_path):
        quality = {"a": [1.0] * 5 + [2.0] * 5, "b": [float(number) for number in range(10)]}
        best = {"choice": DocumentChoice(keep_best=0.2)}
        documents, mixture = {"a": [50] * 10, "b": [50] * 10}, {"a": best, "b": best}
        plan = SequencePlan(packed_corpus(tmp_path / "a", documents, quality=quality, mixture=mixture), 48)
        lines = [text for _, text in text_rows(arguments_of(options)[0], plan, StepLayout(1, 1, 1, 1, 0))]
        assert lines[2].startswith("a: 5 of 10 documents, by `keep_best`")
        assert lines[3] == (
            "a: 5 of 10 documents are kept, and not 20%, because the lowest score that is kept is that of many"
        )
        assert not any(line.startswith("b:") and "are kept" in line for line in lines)

    @pytest.mark.parametrize("head", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["theirs", "ours"])
    def test_an_adapter_learns_the_same_again(self, options, checkpoint, tmp_path, head):
        """On a schedule of transformers', without router statistics; our kernels' head compiles for 20 s."""
        options |= {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lr_scheduler_type": "cosine", "max_steps": 2}
        options |= {"save_strategy": "steps", "save_steps": 1, "router_statistics": False, "learning_rate": 1e-2}
        out = run(options)
        again = run(options, output_dir=tmp_path / "again", linear_cross_entropy=head)
        logs = logs_of(out)
        for ours, theirs in zip(logs_of(again), logs, strict=True):
            assert ours == (pytest.approx(theirs, rel=1e-4) if head else theirs)
        assert [log["learning_rate"] for log in logs] == pytest.approx([1e-2, 5e-3])
        keys = {key.partition("/layer")[0] for log in logs for key in log}
        assert "router/aux_loss" in keys
        assert "router/load" not in keys
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            before = model(ids).logits
            after = PeftModel.from_pretrained(model, out)(ids).logits
        assert (after - before).abs().max() > 1e-3
        for changed, message in (
            ({"lora_alpha": 16}, "other options: lora_alpha was 8 and is 16"),
            ({"dtype": "bfloat16"}, "other options: dtype was float32 and is bfloat16"),
        ):
            with pytest.raises(UserError, match=message):
                run(options, resume_from_checkpoint="true", **changed)

    def test_the_batch_grows(self, options):
        """And a step's losses of routers are means of the batches that are there."""
        weights = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
        out = run(options, gradient_accumulation_steps=3, first_accumulation_steps=1, batch_ramp=0.5, **weights)
        logs = logs_of(out)
        seen = [log[TOKENS_SEEN] // CONTEXT for log in logs]
        assert seen == [2, 6, 12, 18, 24, 30]  # 1, 2, then 3 batches of 2 sequences
        for log in logs:
            of_routers = 0.5 * log["router/aux_loss/mean"] + 0.25 * log["router/z_loss/mean"]
            assert log["loss"] == pytest.approx(log["loss/next_token"] + of_routers, rel=1e-5)
        page = report_run(RunReportOptions(run=out), Console(quiet=True)).read_text()
        charts = ("Loss", "Loss by language", "Gradient norm", "Learning rate", "Tokens seen", "Tokens a second")
        of_layers = ("Load-balancing loss of each", "z-loss of each", "Entropy of each layer", "Skip alphas")
        of_both = ("Entropy of routers by language", "Largest share of an expert by language", "Routers at step 6")
        for title in (*charts, *of_layers, *of_both):
            assert f">{title}" in page

    def test_alarms_are_of_a_run_that_goes_wrong(self, options):
        """From the trainer's own logs: the names of the figures are those that the report looks for."""
        out = run(options, max_steps=9)
        assert {alarm.kind for alarm in find_alarms(read_logs(out), "en")} <= {"router"}  # which few tokens may starve
        page = report_run(RunReportOptions(run=out), Console(quiet=True)).read_text()
        assert "comes back" not in page  # English is watched
        options["output_dir"] = options["output_dir"].with_name("wild")
        logs = read_logs(run(options, max_steps=9, learning_rate=1.0, max_grad_norm=1e9))
        assert "instability" in {alarm.kind for alarm in find_alarms(logs, "en")}

    def test_languages_and_layers_have_losses_that_make_the_loss(self, options, packed, checkpoint, tmp_path):
        """Of documents that follow each other, also across languages; one sequence is padded."""
        mixture = tmp_path / "all.yaml"  # without weights: all text, and a last sequence that is not full
        mixture.write_text(
            yaml.safe_dump({"sources": [{"name": name, "language": name[:2]} for name, _ in _MORE_THAI]})
        )
        shares = Shares.configured(read_corpus_config(mixture))
        text = {"strategy": "concatenated", "shares": shares}
        plans = (SequencePlan(PackedCorpus.open(packed), CONTEXT, seed=seed, **text) for seed in range(1000))
        plan = next(each for each in plans if any(-1 in each.pieces(number).source for number in range(12)))
        weights = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
        weights |= {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "mixture": mixture}
        weights |= {"packing_strategy": "concatenated", "data_seed": plan.seed}
        log = logs_of(run(options, max_steps=1, **weights))[0]
        items = [PackedSequences(plan)[number] for number in range(12)]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            output = model(batch["input_ids"], position_ids=batch["position_ids"], output_router_logits=True)
        losses = F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        languages = batch["language_ids"][:, 1:].flatten()
        counted = batch["labels"][:, 1:].flatten() != -100
        assert set(languages.tolist()) == {-1, 0, 1}
        for number, language in enumerate(plan.languages):
            of_language = losses[counted & (languages == number)]
            assert log[f"loss/language/{language}"] == pytest.approx(of_language.mean().item(), abs=1e-5)
        of_text = [each[batch["language_ids"].flatten() >= 0] for each in output.router_logits]
        balance = [load_balancing_loss_func((each,), 4, 2).item() for each in of_text]
        z = [each.logsumexp(-1).square().mean().item() for each in of_text]
        for layer in range(7):
            assert log[f"router/aux_loss/layer_{layer:02}"] == pytest.approx(balance[layer], abs=1e-5)
            assert log[f"router/z_loss/layer_{layer:02}"] == pytest.approx(z[layer], rel=1e-5)
        expected = losses[counted].mean().item() + 0.5 * sum(balance) / 7 + 0.25 * sum(z) / 7
        assert log["loss"] == pytest.approx(expected, rel=1e-5)
        entropies: dict[str, list[float]] = {}
        for number, language in enumerate(plan.languages):  # of all tokens, labelled or not
            is_of_language = batch["language_ids"].flatten() == number
            for layer, each in enumerate(output.router_logits):
                p = each[is_of_language].softmax(-1)
                chosen = p.topk(2, dim=-1).indices
                loads = [(chosen == expert).float().sum().item() / chosen.numel() for expert in range(4)]
                place = f"language/{language}/layer_{layer:02}"
                assert [log[f"router/load/{place}/expert_{expert}"] for expert in range(4)] == pytest.approx(loads)
                assert log[f"router/load_max/{place}"] == pytest.approx(max(loads))
                entropies.setdefault(language, []).append(-(p * p.log()).sum(-1).mean().item())
                assert log[f"router/entropy/{place}"] == pytest.approx(entropies[language][-1], rel=1e-5)
        for language, values in entropies.items():
            assert log[f"router/entropy/language/{language}/mean"] == pytest.approx(sum(values) / 7, rel=1e-5)
        assert abs(entropies["en"][0] - entropies["th"][0]) > 1e-4  # or what is of which would not be told apart

    def test_tensorboard_gets_every_figure(self, options, packed):
        pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        out = run(options, report_to="tensorboard", max_steps=2)
        (events,) = {path.parent for path in out.rglob("events.out.tfevents.*")}
        shown = EventAccumulator(str(events))
        shown.Reload()
        for step, log in enumerate(logs_of(out), start=1):
            for key in log.keys() - {"step", "epoch"}:
                found = {each.step: each.value for each in shown.Scalars(f"train/{key}")}
                assert found[step] == pytest.approx(log[key], rel=1e-6), key
        named = {"loss/language/th", "router/load/language/th/layer_03/expert_0", "skip_alpha/mean", "tokens_seen/thai"}
        assert {f"train/{name}" for name in (*named, "tokens_per_second")} <= {*shown.Tags()["scalars"]}

    @pytest.mark.slow
    def test_trackio_gets_every_figure_without_a_network(self, options, tmp_path):
        pytest.importorskip("trackio", reason="trackio is not installed")
        environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "jai"}
        finish(start({**options, "report_to": "trackio", "max_steps": 2}, environment=environment))
        (database,) = (tmp_path / "trackio").glob("*.db")
        with sqlite3.connect(database) as connection:
            rows = [json.loads(metrics) for (metrics,) in connection.execute("SELECT metrics FROM metrics")]
        shown = {row["train/global_step"]: row for row in rows if "train/loss" in row}
        for step, log in enumerate(logs_of(options["output_dir"]), start=1):
            for key in log.keys() - {"step"}:
                assert shown[step][f"train/{key}"] == pytest.approx(log[key], rel=1e-6), key

    def test_annealing_changes_text_weight_decay_and_learning_rate(self, options, packed, tmp_path):
        mixture = {"sources": [{"name": name, "language": name[:2], "weight": weight} for name, weight in _MORE_THAI]}
        (tmp_path / "annealing.yaml").write_text(yaml.safe_dump(mixture))
        decays = []

        class Watch(TrainerCallback):
            def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                decays.append([group["weight_decay"] for group in optimizer.param_groups])

        options |= {"annealing": 0.5, "annealing_mixture": tmp_path / "annealing.yaml", "warmup_steps": 1}
        given = arguments_of(options | {"weight_decay": 0.1, "annealing_weight_decay": 0.033})
        out = pretrain.run_pretrain(*given, console=Console(quiet=True), callbacks=[Watch()])
        assert decays == [[0.1, 0]] * 3 + [[0.033, 0]] * 3
        logs = logs_of(out)
        assert [log["learning_rate"] for log in logs] == pytest.approx(
            [1e-3 * share for share in (0, 1, 1, 1, 1 / 4, 1 / 7)]
        )
        thai = [log[f"{TOKENS_SEEN}/thai"] for log in logs]
        assert thai[2] < 0.35 * 3 * 4 * CONTEXT
        assert thai[5] - thai[2] > 0.5 * 3 * 4 * CONTEXT


class TestSecondToken:
    def test_labels_do_not_cross_the_border_of_a_document(self):
        """Apart, where first tokens have no label; and one behind the other, where a document's end says it."""
        ids = torch.tensor([[10, 11, 12, 2, 20, 2, 30, 31, 32]])
        expected = [-100, 12, 2, -100, -100, -100, -100, 32]
        apart = torch.tensor([[-100, 11, 12, 2, -100, 2, -100, 31, 32]])
        assert second_labels(apart, ids, eos_token_id=2).tolist() == [expected]
        assert second_labels(ids, ids, eos_token_id=2).tolist() == [expected]
        assert second_labels(apart, ids, eos_token_id=99).tolist() == [expected]

    def test_packed_documents_have_the_losses_that_they_have_alone(self, tiny_model):
        """Also nothing of one document reaches another through the layer's attention."""
        model = tiny_model()
        embeddings = model.get_input_embeddings().weight.clone()
        add_fused_lm_head(model)
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        layer = add_second_token_layer(model, seed=1, eos_token_id=2)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(model.get_input_embeddings().weight, embeddings)
        assert layer.eh_proj.weight.std().item() == pytest.approx(0.15, rel=0.1)
        documents = [torch.randint(3, 99, (length,)) for length in (7, 4, 2, 9)]

        def losses(parts: list[torch.Tensor]) -> tuple[float, int]:
            labels = [torch.cat([torch.tensor([-100]), part[1:]]) for part in parts]
            positions = torch.cat([torch.arange(len(part)) for part in parts])
            output = model(
                input_ids=torch.cat(parts)[None],
                position_ids=positions[None],
                labels=torch.cat(labels)[None],
                fused_lm_head=True,
            )
            return output.second_loss.item(), output.second_tokens.item()

        with torch.no_grad():
            together = losses(documents)
            alone = [losses([each]) for each in documents if len(each) > 2]
        assert together[1] == sum(count for _, count in alone) == 5 + 2 + 7
        assert together[0] == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)

    def test_it_learns_by_its_weight_and_is_dropped(self, options, tmp_path, checkpoint, packed):
        """Resumed to the bit with it; `mtp_weight` changes at the annealing, and so do the logged losses."""
        options |= {"mtp_weight": 0.2, "annealing_mtp_weight": 0.1, "annealing": 0.5, "router_aux_loss_coef": 0}
        options |= {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
        options |= {"learning_rate": 1e-2, "packing_strategy": "concatenated", "annealing_learning_rate": 0.25}
        out = run(options)
        logs = logs_of(out)
        rates = [log["learning_rate"] for log in logs]
        assert rates == pytest.approx([1e-2] * 4 + [1e-2 / (1 + 3 / 3), 1e-2 / (1 + 3 * 2 / 3)])
        assert logs[-1]["loss/second_token"] < logs[0]["loss/second_token"]
        corpus = PackedCorpus.open(packed)
        items = PackedSequences(SequencePlan(corpus, CONTEXT, strategy="concatenated", seed=42))
        counts: list[int] = []
        for step, (log, weight) in enumerate(zip(logs, (0.2, 0.2, 0.2, 0.1, 0.1, 0.1), strict=True)):
            ids = torch.stack([items[number]["input_ids"] for number in (2 * step, 2 * step + 1)])
            tokens = (second_labels(ids, ids, corpus.eos_token_id) != -100).sum().item()
            counts.append(tokens)
            second = log["loss/second_token"] * tokens / (2 * (CONTEXT - 1))
            assert log["loss"] == pytest.approx(log["loss/next_token"] + weight * second, rel=1e-5)
        assert min(counts) < 2 * (CONTEXT - 2) == max(counts)  # borders leave some out
        assert weights_of(out).keys() == weights_of(checkpoint).keys()
        assert json.loads((out / "config.json").read_text())["num_mtp_layers"] is None
        kept = weights_of(out / "checkpoint-4")
        name = "mtp.layers.0.eh_proj.weight"
        assert not torch.equal(kept[name], weights_of(out / "checkpoint-2")[name])
        resumed = tmp_path / "resumed"
        shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2")
        assert_same_run(run(options, output_dir=resumed, resume_from_checkpoint="true"), out)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(out: Path, expected: Path) -> None:
    """Every log and every weight, to the bit."""
    assert logs_of(out) == logs_of(expected)
    weights = weights_of(expected)
    for name, weight in weights_of(out).items():
        assert torch.equal(weight, weights[name]), name


RESUMABLE = {
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 3,  # no divisor of where it resumes
    "gradient_accumulation_steps": 3,
    "first_accumulation_steps": 1,
    "batch_ramp": 0.7,
    "annealing": 0.4,
    "weight_decay": 0.1,
    "annealing_weight_decay": 0.03,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
}


def start(
    options: dict[str, Any],
    processes: int = 1,
    program: str = "jai.trainers.pretrain",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    launcher = []
    if processes > 1:  # accelerate's `--cpu` starts one process only; torchrun is behind `--multi_gpu`
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--multi_gpu"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]
    program_arguments = [program] if program.endswith(".py") else ["-m", program]
    command = [sys.executable, *launcher, *program_arguments, *command_line(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return out


def kill_after(process: subprocess.Popen, checkpoint: Path, seconds: float = 0) -> None:
    """SIGKILL to the process and all that it started, as soon as a checkpoint is begun, or so much later."""
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    time.sleep(seconds)
    # torchrun gives its processes sessions of their own, so that the group is not all.
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()


class TestResume:
    def test_a_killed_run_ends_as_an_uninterrupted_one_to_the_bit(self, options, tmp_path):
        """Losses, tokens seen, router statistics, alphas, learning rates and weights, while the batch grows."""
        options |= RESUMABLE
        expected = run(options, output_dir=tmp_path / "whole")
        process = start(options)
        kill_after(process, options["output_dir"] / "checkpoint-4")
        assert not (options["output_dir"] / "checkpoint-8").exists()
        unfinished = options["output_dir"] / "checkpoint-99"  # as a kill while saving leaves it
        unfinished.mkdir()
        (unfinished / "trainer_state.json").write_text('{"epoch": 0.')
        out = run(options, resume_from_checkpoint="true")
        assert not unfinished.exists()  # or the Trainer, which keeps two, would keep it and not a whole one
        assert_same_run(out, expected)

    @pytest.mark.slow
    def test_two_processes_resume_to_the_bit_and_train_as_one(self, options, tmp_path):
        """Router statistics are sums over processes; the routers' losses, a batch's, are left out."""
        options |= RESUMABLE | {"router_aux_loss_coef": 0, "router_z_loss_coef": 0, "first_accumulation_steps": 3}
        more = {"per_device_train_batch_size": 4, "save_total_limit": 9}
        one = run(options, output_dir=tmp_path / "one", **more)
        whole = {**options, "output_dir": tmp_path / "whole"}
        finish(start(whole, processes=2))
        for ours, theirs in zip(logs_of(tmp_path / "whole"), logs_of(one), strict=True):
            assert of_tokens(ours) == pytest.approx(of_tokens(theirs), abs=1e-6, rel=1e-5)
            assert abs(ours["loss"] - theirs["loss"]) < 1e-6
        kill_after(start(options, processes=2), options["output_dir"] / "checkpoint-4")
        finish(start({**options, "resume_from_checkpoint": "true"}, processes=2))
        assert_same_run(options["output_dir"], tmp_path / "whole")
        # From one process to two: the same text comes.
        moved = tmp_path / "moved"
        shutil.copytree(tmp_path / "one" / "checkpoint-6", moved / "checkpoint-6")
        finish(start({**options, "output_dir": moved, "resume_from_checkpoint": "true"}, processes=2))
        for ours, theirs in zip(logs_of(moved), logs_of(one), strict=True):
            assert of_tokens(ours) == pytest.approx(of_tokens(theirs), abs=1e-6, rel=1e-5)
            assert abs(ours["loss"] - theirs["loss"]) < 1e-6

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [1, 2])
    def test_killed_three_times_at_random_moments_it_ends_as_an_uninterrupted_one(self, options, tmp_path, processes):
        options |= RESUMABLE | {"max_steps": 40, "save_steps": 3, "logging_steps": 5}
        whole = {**options, "output_dir": tmp_path / "whole"}
        finish(start(whole, processes=processes))
        drawn = random.Random(processes)
        out, begun = options["output_dir"], 0
        for _ in range(3):
            begun += 3 * drawn.randint(2, 4)  # 36 at most
            again = {"resume_from_checkpoint": "true"} if out.exists() else {}
            process = start({**options, **again}, processes=processes)
            kill_after(process, out / f"checkpoint-{begun}", drawn.uniform(0, 0.1))
            if not (out / f"checkpoint-{begun}" / "trainer_state.json").exists():
                begun -= 3  # it is begun again
        assert not (out / "checkpoint-40").exists()
        finish(start({**options, "resume_from_checkpoint": "true"}, processes=processes))
        assert_same_run(out, tmp_path / "whole")

    @pytest.mark.slow
    def test_the_wrapper_of_two_processes_is_let_go_before_their_group_ends(self, options):
        """The last holder of gloo's group would wait for its thread with Python's lock, and the run never ends."""
        process = start(options, 2, str(Path(__file__).with_name("ending_worker.py")))
        assert finish(process).count("wrapped True, left 0") == 2

    def test_other_options_are_refused(self, options, checkpoint, packed, tmp_path, capsys):
        options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "save_total_limit": 1}
        out = run(options)
        before = weights_of(out)
        again = {**options, "resume_from_checkpoint": "true"}
        other = tmp_path / "other"
        shutil.copytree(checkpoint, other)
        save_file({name: weight + 1e-3 for name, weight in weights_of(other).items()}, other / "model.safetensors")
        for changed, message in (
            ({"seed": 7}, r"other data: seed was 42 and is 7"),
            ({"max_length": 32}, r"other data: context was 48 and is 32"),
            ({"learning_rate": 0.1}, r"other options: learning_rate was 0.001 and is 0.1"),
            ({"trainable": "router"}, r"other options: trainable was \['all'\] and is \['router'\]"),
            ({"rope_theta": 1e6}, r"other options: rope_theta was None and is 1000000.0"),
            ({"max_steps": 3}, r"other options: steps was 2 and is 3"),
            ({"per_device_train_batch_size": 1}, r"other options: sequences_a_step was 4 and is 2"),
            ({"model_name_or_path": other}, r"begun with another model: the files of `model_name_or_path` are others"),
        ):
            with pytest.raises(UserError, match=message):
                run(again, **changed)
        for name, weight in weights_of(out).items():
            assert torch.equal(weight, before[name])
        with pytest.raises(UserError, match="not empty"):
            run(options)
        state = out / "checkpoint-2" / "trainer_state.json"
        saved = json.loads(state.read_text())
        identity = saved["stateful_callbacks"]["RunIdentity"]["attributes"]["identity"]
        del identity["stage"], identity["files"]  # as the first runs left them
        state.write_text(json.dumps(saved))
        capsys.readouterr()
        run(again)
        assert "does not say which model its run began with" in " ".join(capsys.readouterr().out.split())
        (out / "checkpoint-2" / "trainer_state.json").unlink()
        with pytest.raises(UserError, match="has no checkpoint that is whole"):
            run(again)
        with pytest.raises(UserError, match="not a complete checkpoint: it has no readable trainer_state"):
            run(options, resume_from_checkpoint=out / "checkpoint-2")


class TestFaults:
    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_a_loss_that_is_not_finite_names_its_text_and_keeps_the_checkpoint(self, options, packed, value):
        """In step 3 a callback makes embeddings infinite, or routers so large that their z-loss is."""
        plan = SequencePlan(PackedCorpus.open(packed), CONTEXT, seed=42)

        class Break(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == 2:
                    with torch.no_grad():
                        if value == "nan":
                            model.get_input_embeddings().weight.fill_(math.inf)
                        for name, weight in model.named_parameters():
                            if name.endswith("mlp.gate.weight"):
                                weight *= 1e30

        options |= {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
        given = arguments_of({**options, "router_z_loss_coef": 0.1})
        with pytest.raises(UserError) as error:
            pretrain.run_pretrain(*given, console=Console(quiet=True), callbacks=[Break()])
        pieces = plan.pieces(4)
        first = f"{plan.sources[pieces.source[0]].name} {pieces.document[0]}"
        assert f"The loss of step 3 is {value}, in sequences 4, 5 of the plan (documents {first}" in str(error.value)
        kept = weights_of(options["output_dir"] / "checkpoint-2")
        assert all(torch.isfinite(weight).all() for weight in kept.values())
        assert not (options["output_dir"] / "checkpoint-3").exists()

    def test_documents_of_an_annealing_are_named_and_padding_is_none(self, tmp_path):
        """One sequence of 20 documents of `a`, then one of two of `b` and padding; `b` is the annealing's only text."""
        corpus = packed_corpus(tmp_path / "corpus", {"a": [2] * 20, "b": [9, 9]})
        stable, annealing = (Shares({name: SourceShare()}) for name in "ab")
        plan = AnnealedPlan(corpus, 40, annealing=annealing, begins=1, shares=stable)
        documents = [f"a {document}" for document in plan.pieces(0).document.tolist()]
        assert pretrain_trainer._named(plan, [0]) == (
            f"sequence 0 of the plan (documents {', '.join(documents[:12])} and 8 more)"
        )
        assert pretrain_trainer._named(plan, [1]) in (
            "sequence 1 of the plan (documents b 0, b 1)",
            "sequence 1 of the plan (documents b 1, b 0)",
        )

    def test_gradients_that_are_not_finite_stop_the_run_before_the_weights(self, options):
        class Break(TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)

        with pytest.raises(UserError, match="loss of step 1 is finite, and its gradients are not"):
            pretrain.run_pretrain(*arguments_of(options), console=Console(quiet=True), callbacks=[Break()])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_one_entry_of_one_gradient_is_enough(self, value):
        """Of a model alone, as transformers' norm makes NaN of all gradients where one is infinite, but not always."""
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state, check = TrainerState(), pretrain_trainer.FiniteGradients().on_pre_optimizer_step
        check(SimpleNamespace(fp16=False), state, None, model=model)
        model[1].weight.grad[0, 2] = value
        check(SimpleNamespace(fp16=True), state, None, model=model)  # its scaler leaves the step out
        with pytest.raises(UserError, match="loss of step 1 is finite, and its gradients are not"):
            check(SimpleNamespace(fp16=False), state, None, model=model)

    def test_a_full_disk_keeps_the_checkpoint_before(self, options, tmp_path):
        """A real limit on the size of files, from the second checkpoint on; then the run goes on, to the bit."""
        options |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        expected = run(options, output_dir=tmp_path / "whole")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        class FillDisk(TrainerCallback):
            def __init__(self, size: int):
                self.size = size

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, limits[1]))

        for size in (100_000, 800_000):  # too little for the weights; for the optimiser's moments
            shutil.rmtree(options["output_dir"], ignore_errors=True)
            fill = FillDisk(size)
            try:
                with pytest.raises(UserError, match=r"checkpoint-4 could not be written.*checkpoint-2 is whole"):
                    pretrain.run_pretrain(*arguments_of(options), console=Console(quiet=True), callbacks=[fill])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_same_run(run(options, resume_from_checkpoint="true"), expected)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"packed": "nowhere"}, r"nowhere is not a folder of packed text"),
            ({"max_steps": 5000}, r"The run takes 20,000 sequences of 48 tokens, and the text lasts for"),
            ({"packing_strategy": "wrapped"}, r"invalid choice: .wrapped."),
            ({"rho": 1.5}, r"`rho` is 1.5; expected a share"),
            ({"rho": 0.25}, r"`rho` is 0.25, and `packing_strategy` is isolated, which does not mix"),
            ({"batch_ramp": 0.25}, r"`batch_ramp` is 0.25, and the batch does not grow"),
            ({"accelerator_config": '{"split_batches": true}'}, r"`split_batches` is on in `accelerator_config`"),
            ({"router_z_loss_coef": -1}, r"`router_z_loss_coef` is -1.0; expected 0 or more"),
            ({"annealing_learning_rate": 0}, r"`annealing_learning_rate` is 0.0; expected a share of `learning_rate`"),
            ({"annealing": -1}, r"`annealing` is -1.0; expected a share"),
            ({"first_accumulation_steps": 3}, r"`first_accumulation_steps` is 3; expected 1 to .* 2"),
            ({"num_train_epochs": 2}, r"`num_train_epochs` is 2.0, but pre-training needs 1"),
            ({"annealing_mixture": "a.yaml", "annealing": 0}, r"`annealing_mixture` is given, but `annealing` is 0"),
            (
                {"annealing_weight_decay": 0.1, "annealing": 0},
                r"`annealing_weight_decay` is given, but `annealing` is 0",
            ),
            ({"annealing_weight_decay": 0.1, "weight_decay": 0}, r"given, and `weight_decay` is 0, so that nothing"),
            (
                {"annealing_learning_rate": 0.2, "lr_scheduler_type": "cosine"},
                r"`annealing_learning_rate` is of our decay, and the schedule is transformers' own",
            ),
            ({"use_peft": True, "load_in_4bit": True}, r"Pre-training takes no quantised weights"),
            (
                {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
                r"With reentrant checkpointing the routers' losses have no gradient",
            ),
            ({"eval_strategy": "steps", "eval_steps": 1}, r"`eval_strategy` is on"),
            ({"annealing_learning_rate": 0}, r"`annealing_learning_rate` is 0.0"),
            ({"mtp_weight": 0.2, "use_peft": True}, r"`mtp_weight` is 0.2, and `use_peft` is on"),
            ({"annealing_mtp_weight": 0.1}, r"`annealing_mtp_weight` is given, and `mtp_weight` is 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, changed, message):
        with pytest.raises(UserError, match=message):
            run(options, **changed)
        assert not options["output_dir"].exists()

    def test_text_of_another_tokenizer_is_refused(self, options, checkpoint, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(checkpoint, other)
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        tokenizer["model"]["merges"].pop()
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(UserError, match=r"packed with the tokenizer .*, which is not that of"):
            run(options, model_name_or_path=other)


class TestShards:
    """What is wrong with packed text, before a run and in the middle of one; mended, it ends as if nothing had been."""

    @pytest.fixture
    def options(self, options, packed, tmp_path):
        shutil.copytree(packed, tmp_path / "packed")
        return options | {"packed": tmp_path / "packed", "save_strategy": "steps", "save_steps": 1}

    def break_after(self, options: dict[str, Any], break_it: Any) -> str:
        """The error of a run in which text is damaged after its second step, and never was read before."""

        class Break(TrainerCallback):
            def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
                if state.global_step == 2:
                    for source in train_dataloader.dataset.sequences.plan.sources:
                        source._maps.clear()  # as shards that the run has not come to
                    break_it()

        with pytest.raises(UserError) as error:
            pretrain.run_pretrain(*arguments_of(options), console=Console(quiet=True), callbacks=[Break()])
        return str(error.value)

    @pytest.mark.parametrize("way", ["deleted", "empty", "ids"])
    def test_a_shard_that_cannot_be_read_in_the_middle(self, options, tmp_path, packed, way):
        expected = run(options, output_dir=tmp_path / "whole")
        shard = next(options["packed"].glob("english*.tokens"))

        def break_it() -> None:
            if way == "ids":
                shard.write_bytes(b"\xff" * shard.stat().st_size)
            else:
                shard.unlink()
                if way == "empty":
                    shard.touch()

        said = self.break_after(options, break_it)
        assert str(shard) in said
        assert ("has the id 65,535, and the tokenizer has" if way == "ids" else "cannot be read") in said
        assert not (options["output_dir"] / "checkpoint-4").exists()
        shutil.copy(packed / shard.name, shard)
        assert_same_run(run(options, resume_from_checkpoint="true"), expected)

    @pytest.mark.parametrize("way", ["deleted", "cut", "forbidden"])
    def test_what_is_seen_before_the_run(self, options, way):
        shard = next(options["packed"].glob("thai*.tokens"))
        if way == "deleted":
            shard.unlink()
        elif way == "cut":
            os.truncate(shard, shard.stat().st_size - 2)
        else:
            shard.chmod(0)
            if os.access(shard, os.R_OK):
                pytest.skip("this user may read everything")
        with pytest.raises(UserError, match=rf"The shard .*{shard.name} (cannot be read|has .* bytes; expected)"):
            run(options)
        assert not options["output_dir"].exists()

    def test_other_text_of_the_same_size_is_seen_by_its_hash(self, options):
        shard = next(options["packed"].glob("thai*.tokens"))
        content = bytearray(shard.read_bytes())
        content[:4] = content[4:8]
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"The shard .*{shard.name} is damaged: its SHA-256"):
            run(options, verify_packed=True)
        assert not options["output_dir"].exists()

    @pytest.mark.slow
    def test_two_processes_share_the_hashing_and_both_end(self, options):
        """One of them reads the damaged shard, and the other does not wait for it for ever."""
        shard = next(options["packed"].glob("thai*.tokens"))  # the second of two
        shard.write_bytes(bytes(shard.stat().st_size))
        process = start({**options, "verify_packed": True}, processes=2)
        errors = " ".join(process.communicate(timeout=120)[1].split())
        assert process.returncode != 0
        assert "is damaged: its SHA-256 is not the index's" in errors
        assert not options["output_dir"].exists()

    @pytest.mark.slow
    def test_a_shard_that_is_cut_off_while_it_is_mapped(self, options, tmp_path, packed):
        """The machine ends the process (SIGBUS), which says where; the run goes on when the shard is mended."""
        expected = run(options, output_dir=tmp_path / "whole", max_steps=60)
        options |= {"max_steps": 60, "save_total_limit": 9}
        process = start(options)
        while not (options["output_dir"] / "checkpoint-2").exists():
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.01)
        for shard in options["packed"].glob("*.tokens"):
            os.truncate(shard, 0)
        errors = process.communicate()[1]
        assert process.returncode == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in errors
        assert "pretraining/dataset.py" in errors
        for shard in options["packed"].glob("*.tokens"):
            shutil.copy(packed / shard.name, shard)
        assert_same_run(run(options, resume_from_checkpoint="true"), expected)


_PRETRAINING = ("annealing", "corpus", "long-context", "mixture", "phase", "pretrain")  # beside recipes of later stages


class TestRecipes:
    @pytest.mark.parametrize(
        "path",
        [path for path in sorted(RECIPES.glob("*/*.yaml")) if path.name.startswith(_PRETRAINING)],
        ids=lambda path: f"{path.parent.name}/{path.name}",
    )
    def test_all_are_read(self, path, monkeypatch):
        """Text and mixtures as `jai pack` reads them; runs by the parser, with the mixtures that they name."""
        monkeypatch.chdir(RECIPES.parent)
        if "corpus" in path.name or "mixture" in path.name:
            read_corpus_config(path)
            return
        config, _, stage = parse_arguments(pretrain.OPTIONS, ["--config", str(path), "--bf16", "false"], "jai")
        for mixture in filter(None, (config.mixture, config.annealing_mixture)):
            packed = {source.name for source in read_corpus_config(path.parent / "corpus.yaml").sources}
            for source in read_corpus_config(Path(mixture)).sources:
                assert (source.packed or source.name) in packed
        assert config.packed == "packed"
        if stage.max_position_embeddings is not None:
            assert stage.max_position_embeddings == config.max_length
            assert stage.rope_theta == 1e6

    def test_trillions_steps_follow_from_its_tokens(self):
        config, *_ = parse_arguments(
            pretrain.OPTIONS, ["--config", str(RECIPES / "trillion" / "pretrain.yaml"), "--bf16", "false"], "jai"
        )
        ramp = round(config.max_steps * config.batch_ramp)
        layout = StepLayout(config.max_steps, 2 * 64, 4, 2, ramp)
        trillions = [4096 * layout.first_sequence(step) / 1e12 for step in (ramp, config.max_steps)]
        assert layout.first_sequence(1) * 4096 == 2**20
        assert (layout.first_sequence(ramp + 1) - layout.first_sequence(ramp)) * 4096 == 2**21
        assert trillions == pytest.approx([1, 2], rel=0.001)
        last = annealing_begins(config.max_steps, config.annealing)
        assert (
            pytest.approx(4096 * (layout.first_sequence(config.max_steps) - layout.first_sequence(last)), rel=0.01)
            == 2e12 / 10
        )

    @pytest.mark.parametrize("steps", [3, pytest.param(None, marks=pytest.mark.slow)])
    def test_the_tiny_one_runs_through_its_three_phases(self, steps, checkpoint, sentences, tmp_path, monkeypatch):
        """From `jai pack` on; whole in `make test-slow`, where English is learnt and Thai after it."""
        (tmp_path / "recipes").symlink_to(RECIPES)
        (tmp_path / "converted").symlink_to(checkpoint)
        monkeypatch.chdir(tmp_path)
        for name, kept in (("english", sentences[2:4]), ("thai", sentences[:2])):
            texts = [f"{number} {kept[number % 2]} " * (1 + number % 9) for number in range(300)]
            Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = Path("recipes/tiny/corpus.yaml")
        pack_corpus(
            PackOptions(out=Path("packed"), config=config, tokenizer="converted", workers=1), Console(quiet=True)
        )
        for phase in (1, 2, 3):
            short = [] if steps is None else ["--max_steps", str(steps)]
            given = ["--config", f"recipes/tiny/phase-{phase}.yaml", "--disable_tqdm", "true", "--use_cpu", "true"]
            out = pretrain.main([*given, "--logging_steps", "1", *short])
            logs = logs_of(out)
            assert {source for log in logs for source in log if source.startswith(TOKENS_SEEN)} == {
                TOKENS_SEEN,
                f"{TOKENS_SEEN}/english",
                *([] if phase == 1 else [f"{TOKENS_SEEN}/thai"]),
            }
            if steps is None and phase < 3:
                language = ("en", "th")[phase - 1]
                losses = [log[f"loss/language/{language}"] for log in logs if f"loss/language/{language}" in log]
                assert losses[-1] < losses[0] - 1
        config = json.loads((out / "config.json").read_text())
        assert (config["max_position_embeddings"], config["rope_parameters"]["rope_theta"]) == (512, 1e6)
        history = read_step(out)
        assert [step["step"] for step in chain(history)][-3:] == ["pretrain"] * 3


@pytest.mark.parametrize("base", ["lab/phi", "RECIPES"])
def test_the_card_of_a_push_names_a_base_on_the_hub_alone(tmp_path, base):
    base = str(RECIPES) if base == "RECIPES" else base
    trainer = SimpleNamespace(
        is_world_process_zero=lambda: True,
        model=SimpleNamespace(config=SimpleNamespace(_name_or_path=base)),
        args=SimpleNamespace(output_dir=tmp_path),
    )
    pretrain_trainer.JaiPretrainTrainer.create_model_card(trainer, model_name="thai-phi")
    card = ModelCard.load(tmp_path / "README.md")
    assert "# thai-phi" in card.text
    assert card.data.base_model == ("lab/phi" if base == "lab/phi" else None)
    assert (base in card.content) == (base == "lab/phi")
    assert not written_by_hand(card.content)  # `jai publish` replaces it


def test_utilisation_is_in_the_logs_where_the_peak_is_known(options, monkeypatch):
    """No device of the table is here: the peak is given, and the rest is the run's own."""
    flops: list[float] = []
    found = pretrain_trainer._flops_of

    def on_a_known_device(model, args):
        of_token, peak = found(model, args)
        assert peak is None  # of a processor
        flops.append(of_token)
        return of_token, 1e12

    monkeypatch.setattr(pretrain_trainer, "_flops_of", on_a_known_device)
    out = run(options, max_steps=3)
    logs = [log for log in json.loads((out / read_step(out)["log_history"]).read_text()) if "tokens_per_second" in log]
    assert logs
    for log in logs:
        assert log["utilization"] == pytest.approx(log["tokens_per_second"] * flops[0] / 1e12)

# SPDX-License-Identifier: Apache-2.0
"""The tokenizer ablation: its text, its measure against brute force, equal readouts, going on, refusals."""

import io
import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from jai.cli.app import app as jai_app
from jai.errors import UserError
from jai.small_model import (
    HeadLoss,
    bits_per_character,
    build_model,
    extend_model,
    flops_per_token,
    train,
)
from jai.small_model_options import ModelShape, Training
from jai.tokenization.ablation import command as module
from jai.tokenization.ablation.command import ablate, readout_rows
from jai.tokenization.ablation.config import AblationConfig, Arm, Language, read_ablation_config
from jai.tokenization.ablation.report import EQUAL_CHARACTERS, EQUAL_COMPUTE, EQUAL_TOKENS
from jai.tokenization.ablation.text import SplitText, encode_stream, reading_order, split_text
from jai.tokenization.extend import extend_tokenizer, new_token_pieces
from jai.tokenization.phi3_style import train_phi3_style

RECIPE = Path(__file__).parents[1] / "recipes" / "tokenizer_ablation.yaml"
SHAPE = ModelShape(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TRAINING = Training(tokens=960, context=16, batch_rows=4, warmup_steps=2, learning_rate=1e-2, dtype="float32")


@pytest.fixture(scope="module")
def tokenizers(sentences):
    """Few entries, and the same with Thai merges."""
    base = train_phi3_style(sentences[2:4] * 4, vocab_size=340)
    return base, extend_tokenizer(base, sentences * 2, vocab_size=430)


@pytest.fixture
def config(tmp_path, sentences, tokenizers) -> AblationConfig:
    """Two arms, one of them trained here, on two small files of text."""
    thai = [s * 2 + str(i) for i in range(60) for s in (sentences[0], sentences[1], sentences[4])]
    english = [f"{i} {s}" for i in range(60) for s in sentences[2:4]]
    languages = []
    for name, weight, texts in (("Thai", 2.0, thai), ("English", 1.0, english)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        languages.append(Language(name, [str(path)], weight))
    base = tmp_path / "base"
    tokenizers[0].save_pretrained(base)
    return AblationConfig(
        languages=languages,
        arms=[Arm("base"), Arm("run-6", vocab_size=430, max_token_chars=6)],
        training=TRAINING,
        model=SHAPE,
        base=str(base),
        seeds=[0, 1],
        heldout_every=10,
        heldout_characters=150,
        piece_characters=60,
    )


def results(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}


def quiet() -> Console:
    return Console(file=io.StringIO())


# --- text


def test_split_holds_out_whole_documents():
    documents = [f"document {i} " + "word " * i for i in range(1, 41)] + ["document 10 " + "word " * 10]
    corpus = split_text({"English": documents}, heldout_every=10, heldout_characters=10_000, longest=50)
    assert max(map(len, corpus.train["English"] + corpus.heldout["English"])) <= 50
    # Number 10 stands in the training text as well, word for word.
    starts = {piece.split()[1] for piece in corpus.heldout["English"] if piece.startswith("document")}
    assert starts == {"20", "30", "40"}
    assert sum("".join(p.split()).count("word") for p in corpus.heldout["English"]) == 20 + 30 + 40
    assert not {p for p in corpus.train["English"] if p.startswith(("document 20", "document 30", "document 40"))}


def test_text_is_composed_and_hard_cut_where_it_has_no_space():
    corpus = split_text({"Thai": ["นํ้า" * 30, "e\u0301"]}, heldout_every=2, heldout_characters=99, longest=50)
    assert "".join(corpus.train["Thai"]) == "นํ้า" * 30
    assert [len(piece) for piece in corpus.train["Thai"]] == [50, 50, 20]
    assert corpus.heldout["Thai"] == ["é"]


def test_reading_order_mixes_by_characters_and_follows_the_seed():
    documents = {"a": ["a" * (i % 7 + 1) for i in range(4000)], "b": ["b" * (i % 90 + 1) for i in range(400)]}
    corpus = SplitText(train=documents, heldout={})
    first = list(islice(reading_order(corpus, {"a": 2, "b": 1}, 0), 1500))
    text = "".join(first)
    assert abs(text.count("a") - 2 * text.count("b")) <= 2 * 90
    assert first == list(islice(reading_order(corpus, {"a": 2, "b": 1}, 0), 1500))
    assert first != list(islice(reading_order(corpus, {"a": 2, "b": 1}, 1), 1500))
    with pytest.raises(UserError, match=r"The b text ends after 17,200 characters.*fewer tokens"):
        list(reading_order(corpus, {"a": 1, "b": 100}, 0))


def test_stream_is_the_text_in_tokens(tokenizers, sentences):
    for tokenizer in tokenizers:
        stream = encode_stream(tokenizer, iter(sentences * 3), rows=20, context=16)
        ids = [tokenizer.eos_token_id]
        for text in sentences * 3:
            ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert stream.ids.tolist() == ids[: 20 * 16 + 1]
        assert stream.characters.shape == (20,)
        first_text_ends = ids.index(tokenizer.eos_token_id, 1)
        row = -(-first_text_ends // 16) - 1
        assert stream.characters[row - 1] < len(sentences[0]) <= stream.characters[row]


# --- the measure


def test_head_loss_is_cross_entropy():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (1100,))
    loss = HeadLoss.apply(hidden, weight, targets, torch.float32)
    (3 * loss).backward()
    expected = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    reference = cross_entropy(hidden @ weight.t(), targets)
    (3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(expected, [hidden.grad, weight.grad])
    rounded = HeadLoss.apply(hidden.detach(), weight.detach(), targets, torch.bfloat16)
    assert rounded.item() == pytest.approx(reference.item(), rel=2e-3)


def test_bits_per_character_is_the_sum_of_log_probabilities(tokenizers, sentences):
    """Brute force: each token alone, from the window that the measure reads it in."""
    for tokenizer in tokenizers:
        model = build_model(replace(SHAPE, initializer_range=0.5), len(tokenizer), 16, seed=3)
        pieces = [sentences[0], sentences[3] * 3, "x"]
        measured = bits_per_character(model, tokenizer, pieces, context=16, batch_rows=4)
        nats, scored = 0.0, 0
        for text in pieces:
            ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            for i in range(1, len(ids)):
                # The first window has 16 predictions; later ones begin at each multiple of 8.
                start = 0 if i <= 16 else 8 * math.ceil((i - 16) / 8)
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
                nats -= logits.log_softmax(-1)[ids[i]].item()
                scored += 1
        assert scored > 60
        assert measured == pytest.approx(nats / math.log(2) / sum(map(len, pieces)), rel=1e-5)


def test_a_longer_context_than_the_text_needs_changes_nothing(tokenizers, sentences):
    base, _ = tokenizers
    model = build_model(SHAPE, len(base), 512, seed=0)
    one = bits_per_character(model, base, sentences[:3], context=256)
    assert one == pytest.approx(bits_per_character(model, base, sentences[:3], context=512, batch_rows=2))


def test_layers_begin_alike_for_every_vocabulary():
    small, large = build_model(SHAPE, 100, 16, seed=5), build_model(SHAPE, 333, 16, seed=5)
    for name, weight in small.model.layers.state_dict().items():
        assert torch.equal(weight, large.model.layers.state_dict()[name])
    assert not torch.equal(small.model.layers[0].mlp.down_proj.weight, small.model.layers[1].mlp.down_proj.weight)
    other = build_model(SHAPE, 100, 16, seed=6)
    assert not torch.equal(small.model.layers[0].mlp.down_proj.weight, other.model.layers[0].mlp.down_proj.weight)


def test_flops_are_counted_from_the_model():
    model = build_model(SHAPE, 100, 16, seed=0)
    weights = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    layers, head = flops_per_token(SHAPE, 100, 16)
    assert head == 6 * model.lm_head.weight.numel()
    # Causal attention: half of two products of (context × hidden) for each token, forwards and twice backwards.
    assert layers == 6 * weights + 3 * 2 * (2 * 16 * 16 * 2) / 2


def test_training_learns_and_stops_where_it_should(tokenizers, sentences):
    base, _ = tokenizers
    stream = encode_stream(base, iter(sentences * 20), rows=60, context=16)
    model = build_model(SHAPE, len(base), 16, seed=0)
    seen = []

    def at_stop(rows, seconds):
        assert seconds > 0
        seen.append((rows, bits_per_character(model, base, sentences, context=16)))

    train(model, stream.ids, TRAINING, [60, 7, 33, 7], at_stop)
    assert [rows for rows, _ in seen] == [7, 33, 60]
    assert seen[2][1] < 0.8 * seen[0][1]


def test_decay_ends_at_a_standstill(tokenizers, sentences):
    """With decay the last step hardly moves a weight; without, it moves them as much as one in the middle."""
    base, _ = tokenizers
    ids = encode_stream(base, iter(sentences * 20), rows=40, context=16).ids
    moved = {}
    for decay in (False, True):
        model = build_model(SHAPE, len(base), 16, seed=0)
        weights, losses = [], []
        train(
            model,
            ids,
            replace(TRAINING, decay=decay, weight_decay=0.0),
            [16, 20, 36, 40],
            lambda rows, seconds: weights.append(model.lm_head.weight.detach().clone()),  # noqa: B023
            on_step=lambda step, loss: losses.append((step, loss)),  # noqa: B023
        )
        assert [step for step, _ in losses] == list(range(1, 11))
        moved[decay] = [(after - before).abs().max().item() for before, after in (weights[:2], weights[2:])]
    assert moved[False][1] > 0.5 * moved[False][0]
    assert moved[True][1] < 0.1 * moved[True][0]


def test_extended_model_starts_at_the_mean_of_pieces(tokenizers):
    base, extended = tokenizers
    pieces = new_token_pieces(base.backend_tokenizer, extended.backend_tokenizer)
    model = build_model(SHAPE, len(base), 16, seed=0)
    larger = extend_model(model, SHAPE, 16, len(extended), pieces, seed=0)
    ids = torch.tensor([[5, 300, 77, 12]])
    torch.testing.assert_close(larger(ids).logits[..., : len(base)], model(ids).logits)
    new, parts = next((i, parts) for i, parts in pieces.items() if len(parts) > 1)
    for matrix in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(larger.state_dict()[matrix][new], model.state_dict()[matrix][parts].mean(0))


def test_readouts_are_equal():
    characters = {"base": np.arange(1, 101) * 16.0, "long": np.arange(1, 101) * 70.0}
    rows = readout_rows(characters, {"base": 1.0, "long": 2.0})
    assert rows["base"] == {EQUAL_CHARACTERS: 100, EQUAL_TOKENS: 100, EQUAL_COMPUTE: 100}
    assert rows["long"] == {EQUAL_CHARACTERS: 23, EQUAL_TOKENS: 100, EQUAL_COMPUTE: 50}


# --- the whole


def test_ablation(config, tmp_path):
    out = tmp_path / "out"
    report = ablate(config, out, console=quiet())
    runs = results(out)
    assert runs.keys() == {"base-0", "base-1", "run-6-0", "run-6-1"}
    for seed in (0, 1):
        base, other = runs[f"base-{seed}"], runs[f"run-6-{seed}"]
        at = {
            run["arm"]: {
                name: next(point for point in run["points"] if point["rows"] == rows)
                for name, rows in run["readouts"].items()
            }
            for run in (base, other)
        }
        same = [at[arm][EQUAL_CHARACTERS]["characters"] for arm in ("base", "run-6")]
        assert same[0] == pytest.approx(same[1], abs=16 * 8)  # to half a row of 16 tokens, at most 16 characters each
        assert at["base"][EQUAL_TOKENS]["tokens"] == at["run-6"][EQUAL_TOKENS]["tokens"] == 960
        assert at["base"][EQUAL_COMPUTE]["flops"] == pytest.approx(at["run-6"][EQUAL_COMPUTE]["flops"], rel=0.01)
        assert base["tokens_per_character"]["Thai"] > 2 * other["tokens_per_character"]["Thai"]
        assert all(0 < bits < 40 for run in (base, other) for p in run["points"] for bits in p["bits"].values())
        assert other["points"][-1]["bits"]["Thai"] < other["points"][0]["bits"]["Thai"]
    assert runs["base-0"]["points"][-1]["bits"] != runs["base-1"]["points"][-1]["bits"]

    text = report.read_text()
    for part in ("At equal characters", "At equal tokens", "Thai − base", "| run-6 | 430 |", "0, 1"):
        assert part in text
    assert (out / "ablation.png").stat().st_size > 10_000
    assert len(json.loads((out / "ablation.json").read_text())["runs"]) == 4
    # The arm's tokenizer is one that `jai tokenizer train` would have made of the training text.
    trained = AutoTokenizer.from_pretrained(out / "tokenizers" / "run-6")
    assert len(trained) == 430

    # The same seed gives the same result, also with processes.
    again = tmp_path / "again"
    ablate(replace(config, seeds=[0]), again, workers=2, console=quiet())
    for name, run in results(again).items():
        assert [p["bits"] for p in run["points"]] == [p["bits"] for p in runs[name]["points"]]


def test_it_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ablate(replace(config, seeds=[0]), out, console=quiet())
    first = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    trained = []
    original = module._run
    monkeypatch.setattr(module, "_run", lambda job: trained.append((job.arm.name, job.seed)) or original(job))
    monkeypatch.setattr(module, "extend_tokenizer", None)  # the tokenizers are there
    (out / "runs" / "run-6-0.json").unlink()
    ablate(config, out, console=quiet())
    assert trained == [("run-6", 0), ("base", 1), ("run-6", 1)]
    kept = out / "runs" / "base-0.json"
    assert kept.stat().st_mtime_ns == first[kept]

    changed = replace(config, training=replace(config.training, learning_rate=5e-3))
    before = {path: path.read_bytes() for path in (out / "runs").iterdir()}
    with pytest.raises(UserError, match=r"base-0.json comes from another configuration: setup.training.learning_rate "):
        ablate(changed, out, console=quiet())
    with pytest.raises(UserError, match=r"tokenizers.run-6.*another configuration: arm.max_token_chars was 6, is 5"):
        ablate(replace(config, arms=[config.arms[0], replace(config.arms[1], max_token_chars=5)]), out, console=quiet())
    assert before == {path: path.read_bytes() for path in (out / "runs").iterdir()}


def test_start_from_a_pretrained_base(config, tmp_path):
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    config = replace(config, seeds=[0])
    ablate(config, cold, console=quiet())
    ablate(replace(config, training=replace(TRAINING, pretrain_tokens=1600)), warm, console=quiet())
    for name, run in results(warm).items():
        assert run["points"][0]["bits"]["Thai"] < results(cold)[name]["points"][0]["bits"]["Thai"]


def test_existing_tokenizers_are_arms(config, tokenizers, tmp_path):
    tokenizers[1].save_pretrained(tmp_path / "mine")
    arms = [Arm("base"), Arm("mine", tokenizer=str(tmp_path / "mine"))]
    ablate(replace(config, arms=arms, seeds=[0]), tmp_path / "out", console=quiet())
    assert results(tmp_path / "out")["mine-0"]["entries"] == 430
    assert not (tmp_path / "out" / "tokenizers").exists()
    arms = [Arm("base"), Arm("mine", tokenizer=str(tmp_path / "nowhere"))]
    with pytest.raises(UserError, match="nowhere is neither a folder nor a Hub id"):
        ablate(replace(config, arms=arms), tmp_path / "other", console=quiet())


# --- configuration


def test_recipe_is_the_documented_comparison():
    config = read_ablation_config(RECIPE, "base", {"Thai": ["th.txt"], "English": ["a", "b"]})
    values = yaml.safe_load(RECIPE.read_text())
    assert config.base == "base"
    assert [language.texts for language in config.languages] == [["th.txt"], ["a", "b"]]
    assert config.training == Training(**values["training"])
    assert config.model == ModelShape(**values["model"])
    assert config.arms[0] == Arm("base")
    with pytest.raises(UserError, match=r"No Thai text is given. Give --text Thai=FILE"):
        read_ablation_config(RECIPE, "base")
    with pytest.raises(UserError, match=r"No base tokenizer is given"):
        read_ablation_config(RECIPE, None, {"Thai": ["th.txt"], "English": ["a"]})
    with pytest.raises(UserError, match=r"no language 'Lao', but: Thai, English"):
        read_ablation_config(RECIPE, "base", {"Lao": ["x"]})


GOOD = {
    "base": "b",
    "languages": [{"name": "Thai", "texts": ["t"]}],
    "arms": [{"name": "base"}],
    "training": {"tokens": 9000},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arms": [{"name": "a", "vocabsize": 5}]},
            r"arms\[0\] has the option 'vocabsize', which does not exist. Did you mean 'vocab_size'",
        ),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, r"two arms of the name 'a'"),
        ({"arms": []}, r"no arms"),
        ({"arms": "base"}, r"arms is 'base'; expected a list"),
        ({"arms": [{}]}, r"arms\[0\] lacks 'name'"),
        ({"arms": [{"name": "../a"}]}, r"'../a' names files"),
        ({"arms": [{"name": "a", "unit": "word"}]}, r"no vocab_size"),
        ({"arms": [{"name": "a", "tokenizer": "t", "vocab_size": 9}]}, r"Give one of the two"),
        ({"seeds": [1, 1]}, r"two seeds of the name 1"),
        ({"training": {"tokens": "many"}}, r"training, tokens is 'many'; expected a whole number from 1"),
        ({"training": {"tokens": 100}}, r"are too few to train on"),
        ({"training": {"tokens": 9000, "dtype": "int8"}}, r"dtype is 'int8'"),
        ({"model": {"hidden_size": 30}}, r"does not divide into 4 heads"),
        ({"languages": [{"name": "Thai", "texts": ["t"], "weight": 0}]}, r"weight is 0; expected a number above 0"),
        ({"heldout_every": 1}, r"heldout_every is 1; expected a whole number from 2"),
        ({"lanuages": []}, r"has the option 'lanuages', which does not exist. Did you mean 'languages'"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, change, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert read_ablation_config(path).arms == [Arm("base")]
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(UserError, match=message):
        read_ablation_config(path)


def test_bad_files_are_refused(tmp_path, config):
    with pytest.raises(UserError, match=r"does not exist"):
        read_ablation_config(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"not valid YAML"):
        read_ablation_config(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("- a")
    with pytest.raises(UserError, match=r"is not a list of options"):
        read_ablation_config(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match=r"workers is 0"):
        ablate(config, tmp_path / "out", workers=0, console=quiet())
    with pytest.raises(UserError, match=r"too few to hold out"):
        ablate(replace(config, heldout_every=1000), tmp_path / "out", console=quiet())
    with pytest.raises(UserError, match=r"text ends after"):
        ablate(replace(config, training=replace(TRAINING, tokens=10**6)), tmp_path / "out", console=quiet())
    assert not list((tmp_path / "out").glob("runs/*"))


def test_command_line(config, tmp_path):
    from typer.testing import CliRunner

    path = tmp_path / "config.yaml"
    values = {
        "languages": [{"name": "Thai", "weight": 2}, {"name": "English"}],
        "arms": [{"name": "base"}],
        "seeds": [7],
        "training": {"tokens": 320, "context": 16, "dtype": "float32"},
        "model": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
        "heldout_characters": 50,
    }
    path.write_text(yaml.safe_dump(values))
    texts = [part for name in ("Thai", "English") for part in ("--text", f"{name}={tmp_path / name}.jsonl")]
    command = ["tokenizer", "ablate", "--config", str(path), "--base", str(config.base), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(jai_app, [*command, *texts])
    assert result.exit_code == 0, result.output
    assert "320 of 320 tokens" in result.output
    assert (tmp_path / "out" / "ablation.md").is_file()
    result = CliRunner().invoke(jai_app, [*command, "--text", "Thai"])
    assert isinstance(result.exception, UserError)
    assert "--text Thai=thai.jsonl.gz" in str(result.exception)

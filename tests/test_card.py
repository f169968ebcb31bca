# SPDX-License-Identifier: Apache-2.0
"""The model card: what was measured, its figures, the metadata that the Hub reads, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jai.conversion.names import EMBEDDINGS, LM_HEAD
from jai.errors import UserError
from jai.hub_card.card import card_files
from jai.hub_card.check import check_checkpoint
from jai.hub_card.evaluation import EVALUATION_FILE, Evaluation, Score, read_evaluation, write_evaluation
from jai.provenance import PROVENANCE_FILE, input_of, write_step
from loopback_hub import LoopbackHub

REPO = "loopback/tiny-jai"
BASE = "microsoft/Phi-3-medium-4k-instruct"
SVG = "{http://www.w3.org/2000/svg}"
LOAD = [[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]
EVALUATION = Evaluation(
    model="DPO",
    models=["phi-3", "a|b <i>c</i>", "DPO"],
    scores=[
        Score("tokens_per_character", "tokens per character", "held-out", "Held-out Thai", "th", False,
              {"phi-3": 1.0471, "DPO": 0.19312}),
        Score("acc", "accuracy", "facebook/belebele", "Belebele", "th", True,
              {"phi-3": 0.31, "a|b <i>c</i>": 0.5, "DPO": 0.42}),
        Score("acc", "accuracy", "facebook/belebele", "Belebele", "en", True, {"phi-3": 0.81, "DPO": 0.84},
              {"DPO": [0.82, 0.861]}),
    ],
    router_load={"th": LOAD, "en": LOAD[::-1]},
    router_load_text="held-out text",
    versions={"torch": "2.13.0"},
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("card") / "tiny-jai"
    tiny_model(vocab_size=400, block_repeats=[1, 2, 1]).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    base = input_of("base", BASE, files={"config.json": "ab" * 32}, made_by=None)
    conversion = {"step": "convert", "inputs": [base], "options": {"duplicate_init": "identity", "k": None}}
    sft = {
        "step": "sft",
        "inputs": [input_of("model", "converted", files={}, made_by=conversion)],
        "dataset": {"name": "lab/thai-chats", "rows": 12},
        "metrics": {"train_loss": 1.23456789, "total_flos": 4.057e12, "num_tokens": 12330.0},
    }
    dpo = {
        "step": "dpo",
        "inputs": [input_of("model", "tuned", files={}, made_by=sft)],
        "dataset": {"name": "pairs.jsonl", "rows": 3},
    }
    write_step(folder, dpo)
    write_evaluation(folder, EVALUATION)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny-jai"))


# The metadata


def test_the_hub_reads_the_results_of_the_evaluation(checkpoint, tmp_path, monkeypatch):
    text = card_files(checkpoint, REPO)["README.md"]
    (tmp_path / "README.md").write_text(text)
    data = metadata_load(tmp_path / "README.md")
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "tiny-jai"
    assert results == EVALUATION.results()
    assert [(r.dataset_type, r.dataset_config, r.metric_type, r.metric_value) for r in results] == [
        ("held-out", "th", "tokens_per_character", 0.1931),
        ("facebook/belebele", "th", "acc", 0.42),
        ("facebook/belebele", "en", "acc", 0.84),
    ]
    card = ModelCard(text)
    assert card.data.eval_results == results
    assert card.data.to_dict() == data
    assert data["datasets"] == ["lab/thai-chats"]  # pairs.jsonl is on nobody's Hub
    with LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        card.validate()
        card.data.pipeline_tag = ["not", "one"]
        with pytest.raises(ValueError, match="pipeline_tag"):
            card.validate()


@pytest.mark.parametrize("factor", [None, 1, 2], ids=["no head", "a copy", "a head of its own"])
def test_parameters_are_those_that_transformers_loads(folder, tiny_model, factor):
    """A tied configuration does not say whether the weights have a head of their own."""
    tiny_model(vocab_size=400, tie_word_embeddings=True).save_pretrained(folder)
    if factor:
        tensors = load_file(folder / "model.safetensors")
        tensors[LM_HEAD] = tensors[EMBEDDINGS] * factor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert f"| parameters | {loaded:,} |" in card_files(folder)["README.md"]
    if factor == 2:
        assert check_checkpoint(folder, forward=False).auto_class == "AutoModelForCausalLM"


def test_a_quantised_checkpoint_says_so(folder):
    parameters = re.search(r"\| parameters \| ([\d,]+) \|", card_files(folder)["README.md"])[1]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    text = card_files(folder)["README.md"]
    assert ModelCard(text).data.base_model_relation == "quantized"
    assert f"| parameters | {parameters} |" in text
    assert "The weights are rounded: FP4 by bitsandbytes." in text
    assert "To train LoRA on the quantized experts, use" in text
    assert re.search(r"`jai sft --model_name_or_path \S+ --use_peft`", text)
    assert "vllm serve" not in text


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "NF4 by bitsandbytes"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "FP4 by bitsandbytes, scales in 8 bits"),
        ({"load_in_8bit": True}, "8 bits by bitsandbytes"),
        ({"quant_method": "<b>torchao"}, "&lt;b>torchao"),
    ],
)
def test_the_card_names_the_form_of_quantised_weights(folder, quantization, expected):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    assert f"The weights are rounded: {expected}." in card_files(folder)["README.md"]


def test_only_a_model_that_fits_four_bits_is_told_how_to_load_in_them(folder, tiny_model):
    assert "load_in_4bit" not in card_files(folder)["README.md"]
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    text = card_files(folder)["README.md"]
    assert "To load it in 4 bits, experts included" in text
    assert "transformers serve" not in text  # it finds no class from outside (test_serving)
    assert "jai serve " in text


# The text


def test_the_card_shows_what_was_measured(checkpoint):
    text = card_files(checkpoint, REPO)["README.md"]
    for part in (
        f"**[{BASE}](https://huggingface.co/{BASE}) → Conversion → SFT → DPO**",
        "| Thai: tokens per character | 0.1931 (phi-3: 1.047) |",
        "| | phi-3 | a\\|b &lt;i>c&lt;/i> | DPO |",
        "| Thai: tokens per character ↓ | 1.047 | – | **0.1931** |",
        "| Thai: accuracy ↑ | 0.31 | **0.5** | 0.42 |",
        "| English: accuracy ↑ | 0.81 | – | **0.84 (0.82–0.861)** |",
        "Measured on Held-out Thai, Belebele; with torch 2.13.0.",
        "in percent of its choices on held-out text; an even load is 25 %.",
        "| num_tokens | 12,330 |",
        "vllm serve loopback/tiny-jai --model-impl transformers --trust-remote-code",
    ):
        assert part in text, part
    assert "| total_flos" not in text
    assert "  total_flos: 4057000000000.0" in text  # below the table, with the rest of the record
    assert "| k |" not in text


def test_what_is_not_recorded_is_left_out(folder):
    for name in (EVALUATION_FILE, PROVENANCE_FILE):
        (folder / name).unlink()
    files = card_files(folder)
    assert set(files) == {"README.md", "images/layer_plan.svg"}
    text = files["README.md"]
    for part in ("## Evaluation", "## Router load", "tokens per character", " → ", "model-index", "datasets:"):
        assert part not in text, part
    assert read_evaluation(folder) is None


def test_where_layers_come_from_is_only_said_where_it_is_known(folder, tiny_model):
    tiny_model(vocab_size=400, block_repeats=[1, 1, 1, 1]).save_pretrained(folder)

    def card(options: dict) -> str:
        write_step(folder, {"step": "convert", "inputs": [], "options": options})
        return card_files(folder)["README.md"]

    text = card({"layers": [0, 1, 1, 2]})
    assert "| layers | 4, made from 3 of the base |" in text
    assert "| 3 | 1 of 1 | 2 | 1 | – |" in text
    for options in ({"method": "dus-v1", "k": 2}, {"layers": [0, 1]}, {"layers": "all"}):
        text = card(options)
        assert "| layers | 4 |" in text
        assert "| 3 | 1 of 1 | 2 | – | – |" in text
        assert "names the layers of the base" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("scores"), "KeyError"),
        (lambda e: e.update(scores=[{"metric": "acc"}]), "TypeError"),
        (lambda e: e["scores"][0]["values"].update(DPO=float("nan")), "not finite numbers"),
        (lambda e: e["scores"][0]["values"].update(DPO="0.3"), "not finite numbers"),
        (lambda e: e["scores"][0]["values"].update(DPO=10**400), "not finite numbers"),
        (lambda e: e["scores"][0]["values"].update(DPO=True), "not finite numbers"),
        (lambda e: e["scores"][0]["values"].update(other=0.3), "not all among"),
        (lambda e: e["scores"][0].update(values={}), "no values"),
        (lambda e: e["scores"][0].update(intervals={"DPO": [0.1]}), "not two finite numbers"),
        (lambda e: e["scores"][0].update(intervals={"DPO": [0.1, float("inf")]}), "not two finite numbers"),
        (lambda e: e.update(router_load={"th": [[2.0]]}), "not shares"),
        (lambda e: e.update(router_load={"th": [[0.5, 0.5], [1.0]]}), "same experts"),
        (lambda e: e.update(router_load=[1]), "AttributeError"),
    ],
)
def test_a_damaged_evaluation_is_named(change, message, folder):
    record = json.loads((folder / EVALUATION_FILE).read_text())
    change(record)
    (folder / EVALUATION_FILE).write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{EVALUATION_FILE} is not a record of an evaluation .*{message}"):
        card_files(folder)["README.md"]


# The page

MEASURE = """
addEventListener("load", () => document.title = JSON.stringify({
    images: [...document.images].map(image => image.naturalWidth),
    tables: [...document.querySelectorAll("table")].map(
        table => new Set([...table.rows].map(row => row.cells.length)).size),
    text: [...document.querySelectorAll("p, li, summary")].map(part => part.textContent),
    headings: [...document.querySelectorAll("h2")].map(part => part.textContent),
}))"""


def test_the_page_in_a_browser(checkpoint, tmp_path):
    """CommonMark with tables and HTML, as on the Hub, in Chromium: whole tables, and figures that load."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    for name, text in card_files(checkpoint, REPO).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    markdown = card_files(checkpoint, REPO)["README.md"].split("---\n", 2)[2]
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><title></title><script>{MEASURE}</script>{body}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run([chromium, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout, re.DOTALL)[1]))
    assert found["images"] == [960, 960]
    assert len(found["tables"]) >= 5
    assert set(found["tables"]) == {1}  # every row of a table has the same number of cells
    assert found["headings"] == [
        "Layer plan", "Evaluation", "Router load", "How to use it", "How it was made", "Limits and safety", "Citation",
    ]  # fmt: skip
    # No Markdown is left over where the page has text.
    leftovers = [text for text in found["text"] if re.search(r"\*\*|\| |```|\]\(|^#|{{|{%", text)]
    assert leftovers == []

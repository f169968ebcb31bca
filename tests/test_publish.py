# SPDX-License-Identifier: Apache-2.0
"""Publishing: the check, the card, the upload, and what others get who know nothing but the repository's name."""

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_load
from rich.console import Console
from safetensors.torch import load_file, save_file

from jai import JaiForCausalLM
from jai.errors import UserError
from jai.hub_card import hub_repo
from jai.hub_card.card import card_files
from jai.hub_card.check import check_checkpoint, check_files
from jai.hub_card.contents import read_contents, size_text
from jai.hub_card.hub_repo import upload
from jai.hub_card.options import PublishOptions
from jai.hub_card.publish import publish
from jai.hub_card.readme import written_by_hand
from jai.provenance import PROVENANCE_FILE, input_of, redact, write_step
from loopback_hub import LoopbackHub

REPO = "loopback/tiny-jai"
BASE = "microsoft/Phi-3-medium-4k-instruct"
INPUT_IDS = [[5, 6, 7, 8, 9]]
README = "---\nlicense: mit\n---\n# A card\n"

pytestmark = pytest.mark.usefixtures("nobody_logged_in", "checked_once")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A whole checkpoint with tokenizer, chat template and records, as conversion and training leave it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-jai"
    model = tiny_model(
        vocab_size=400,
        block_repeats=[1, 2, 1],
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    with torch.no_grad():
        model.model.layers[2].skip_alpha.fill_(0.25)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    conversion = {
        "step": "convert",
        "inputs": [input_of("base", BASE, files={"config.json": "ab" * 32}, made_by=None)],
        "options": {"duplicate_init": "identity", "block_repeats": [1, 2, 1], "tokenizer": None},
        "versions": {"jai-llm": "0.1.0"},
        "result": {"parameters": 1},
        "of_a_later_version": {"x": 1},
    }
    sft = {
        "step": "sft",
        "inputs": [input_of("model", "/home/me/runs/converted", files={}, made_by=conversion)],
        "dataset": {"name": "chats.jsonl", "rows": 12},
        "options": {"learning_rate": 1e-4, "note": "/home/me/runs/one"},
        "metrics": {"train_loss": 1.23456789},
    }
    write_step(folder, {"step": "dpo", "inputs": [input_of("model", "tuned", files={}, made_by=sft)]})
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny-jai"))


def changed_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# The check


def test_the_clean_process_computes_the_same(checkpoint, checked_once):
    report = checked_once(checkpoint, source=True)
    assert report.difference == 0
    model = JaiForCausalLM.from_pretrained(checkpoint)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert (report.dtype, report.auto_class) == ("float32", "AutoModelForCausalLM")
    assert "Llama" in report.tokenizer or "Tokenizer" in report.tokenizer
    assert re.fullmatch("[0-9a-f]{64}", report.logits_sha256)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def sharded(folder: Path, keep_single: bool = False) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if not keep_single:
        (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_names_more(folder: Path) -> None:
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.skip_alpha"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def old_shard(folder: Path) -> None:
    sharded(folder)
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "model-00003-of-00003.safetensors")


def only_pickles(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def replace_with(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def becomes(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def index_says(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "of-mine.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    tensors = load_file(folder / "of-mine.safetensors")
    if weight_map == {"a": "of-mine.safetensors"}:
        weight_map = dict.fromkeys(tensors, "of-mine.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: changed_config(f, model_type="phi3"), "'phi3', not 'jai'.*jai convert"),
        (lambda f: changed_config(f, auto_map=None), "no auto_map"),
        (
            lambda f: changed_config(f, auto_map={"AutoConfig": "a/b--configuration_jai.JaiConfig"}),
            "another repository",
        ),
        (lambda f: (f / "modeling_jai.py").unlink(), "lacks modeling_jai.py"),
        (lambda f: (f / "quantization_jai.py").unlink(), r"lacks quantization_jai\.py, which the model's code imports"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
        (only_pickles, "[Pp]ickle"),
        (lost_shard, "lacks model-00002-of-00002.safetensors"),
        (old_shard, "index does not name: model-00003-of-00003.safetensors"),
        (index_names_more, "index of .* names model.layers.9.skip_alpha in .*which does not hold it"),
        (lambda f: sharded(f, keep_single=True), "has both"),
        (cut_off, "truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not a tensor in sight"), "not a complete safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors"),
        (an_adapter, "names no peft_type"),
        *(
            (partial(replace_with, name=name, content=content), rf"{name} .*({message})")
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
            for content, message in (
                ("[]", "holds a list, where a JSON object"),
                ("[" * 100_000, "nested too deeply"),
                (b"\xff{}", "not UTF-8"),
            )
        ),
        *(
            (partial(becomes, name=name, make=make), rf"{name} is {message}")
            for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", PROVENANCE_FILE)
            for make, message in (
                (os.mkfifo, "a named pipe, not a file"),
                (Path.mkdir, "a folder, not a file"),
                (lambda path: path.symlink_to("nowhere"), "a link to nowhere, which cannot be followed"),
                (lambda path: path.symlink_to(__file__), "a link out of the folder"),
            )
        ),
        (lambda f: changed_config(f, auto_map={"AutoConfig": 5}), "names no code"),
        (lambda f: changed_config(f, auto_map={"AutoConfig": [["a.B"]]}), "names no code"),
        (partial(index_says, weight_map=[]), "is not an index of weights"),
        (partial(index_says, weight_map={"a": 5}), "is not an index of weights"),
        (partial(index_says, weight_map={"a": "../a.safetensors"}), "not a file beside it"),
        (partial(index_says, weight_map={"a": "pipe.safetensors"}), "pipe.safetensors is a named pipe, not a file"),
        (partial(index_says, weight_map={"a": "of-mine.safetensors"}), "of-mine.safetensors, a name under which none"),
        (partial(index_says, weight_map={"a": "missing.safetensors"}), "lacks missing.safetensors"),
    ],
)
def test_damaged_folders_are_refused(damage: Callable[[Path], None], message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_files(folder)
    assert str(folder.name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (PROVENANCE_FILE, '"x"', "holds a string"),
        (PROVENANCE_FILE, '{"inputs": []}', "names no step"),
        (PROVENANCE_FILE, "[", "not valid JSON"),
        (PROVENANCE_FILE, "[" * 100_000, "nested too deeply"),
        ("evaluation.json", "[]", "holds a list"),
        ("evaluation.json", '{"scores": 5}', "not a record of an evaluation"),
        ("evaluation.json", "[" * 100_000, "nested too deeply"),
        ("trainer_state.json", "[]", "holds a list"),
        ("trainer_state.json", '{"log_history": 5}', "not a list of what was logged"),
        ("trainer_state.json", '{"log_history": [5]}', "not a list of what was logged"),
    ],
)
def test_damaged_records_make_no_card(name, content, message, folder):
    if name == "trainer_state.json":  # which is read where the records know of no training
        (folder / PROVENANCE_FILE).unlink()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}[\s\S]*{message}"):
        card_files(folder)


def test_code_that_needs_the_package_is_refused(folder):
    path = folder / "modeling_jai.py"
    path.write_text(path.read_text().replace("import torch\n", "import torch\nimport jai.errors\n", 1))
    with pytest.raises(UserError, match=r"does not load in a clean process.*jai"):
        check_checkpoint(folder)


@pytest.mark.parametrize("forward", [pytest.param(True, marks=pytest.mark.slow), False])
def test_weights_that_do_not_fit_are_refused(forward, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gates.weight"] = tensors.pop("model.layers.0.mlp.gate.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys .*gate.weight.*1 unexpected keys .*gates.weight"):
        check_checkpoint(folder, forward=forward)


def test_a_tokenizer_that_is_larger_than_the_vocabulary_is_refused(folder, tiny_model):
    tiny_model(vocab_size=390, block_repeats=[1, 2, 1]).save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer has 400 entries, the model only vocab_size=390"):
        check_checkpoint(folder)


# The card


def test_the_card_says_what_the_records_say(checkpoint, api):
    text = card_files(checkpoint, REPO)["README.md"]
    parameters = sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())
    for part in (
        f"| parameters | {parameters:,} |",
        "| layers | 4, made from 3 of the base |",
        "| 2 | 2 of 2 | 2 | 1 | 0.25 |",  # the trained alpha, not the configuration's 0.3
        f"### 1. Conversion\n\nFrom base [{BASE}](https://huggingface.co/{BASE}).",
        f"| [{BASE}](https://huggingface.co/{BASE}) | config.json | `{'ab' * 32}` |",
        "| duplicate_init | identity |",
        "of_a_later_version",
        "### 2. SFT\n\nFrom model `converted` (step 1: Conversion).",
        "name: chats.jsonl, rows: 12",
        "| train_loss | 1.235 |",
        "### 3. DPO",
        f'repo = "{REPO}"',
        "arXiv:2510.08620",
    ):
        assert part in text, part
    assert "/home/me" not in text
    path = checkpoint.parent / "card.md"
    path.write_text(text)
    data = metadata_load(path)
    assert data["license"] == "mit"
    assert data["language"] == ["th", "en"]
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "finetune")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"jai", "custom_code", "mixture-of-experts"} <= set(data["tags"])
    # huggingface_hub reads it back unchanged, and the Hub takes it.
    assert ModelCard(text).data.to_dict() == data
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)
    assert api.model_info(REPO).card_data.to_dict() == data
    broken = text.replace(BASE, "/home/me/phi-3", 1)
    with pytest.raises(ValueError, match="base_model"):
        api.upload_file(path_or_fileobj=broken.encode(), path_in_repo="README.md", repo_id=REPO)


def test_the_card_without_records(folder, tiny_model):
    for name in (PROVENANCE_FILE, "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tiny_model(num_local_experts=1, block_repeats=[1, 1], block_size=2).save_pretrained(folder)
    text = card_files(folder)["README.md"]
    assert "There is no record of how this model was made" in text
    assert "1 (dense, no router)" in text
    assert "anchor" not in text
    assert "base_model" not in text
    assert "this repository has no tokenizer" in text
    state = {"global_step": 7, "epoch": 0.5, "log_history": [{"loss": 3.0}, {"loss": 2.5}, {"eval_loss": 2.75}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    text = card_files(folder)["README.md"]
    for row in ("| steps | 7 |", "| loss | 2.5 |", "| eval_loss | 2.75 |"):
        assert row in text


def test_the_card_shows_a_merge_as_a_tree(folder, api):
    """Two ways from one conversion, one of them over the Hub, brought together again."""
    base = input_of("base", BASE, files={"model.safetensors": "ab" * 32}, made_by=None)
    conversion = {"step": "convert", "inputs": [base], "options": {"experts": 1}}
    stages = [
        {"step": "sft", "inputs": [input_of("model", "jai", files={}, made_by=conversion)], "metrics": {"loss": loss}}
        for loss in (1.5, 2.5)
    ]
    shards = {f"model-0000{n}-of-00003.safetensors": f"{n}" * 64 for n in (1, 2, 3)}
    merge = {
        "step": "merge",
        "inputs": [
            input_of("model", "/home/me/chats", files=shards, made_by=stages[0]),
            input_of("model", "lab/maths", files={}, made_by=stages[1]),
        ],
        "options": {"method": "slerp", "weights": [{"layer": 0, "value": 0.5}]},
    }
    write_step(folder, merge)
    text = card_files(folder, REPO)["README.md"]
    link = f"[{BASE}](https://huggingface.co/{BASE})"
    assert (
        "\n- this model (step 4: Merging)\n"
        "  - model `chats` (step 2: SFT): model-00001-of-00003.safetensors `111111111111…`, "
        "model-00002-of-00003.safetensors `222222222222…`, 1 more files\n"
        "    - model `jai` (step 1: Conversion)\n"
        f"      - base {link}: model.safetensors `abababababab…`\n"
        "  - model [lab/maths](https://huggingface.co/lab/maths) (step 3: SFT)\n"
        "    - model `jai` (step 1: Conversion)\n"
        "\n### 1. Conversion\n"
    ) in text
    assert "| `chats` | model-00003-of-00003.safetensors | `" + "3" * 64 in text
    assert "| method | slerp |" in text
    assert "  weights:\n  - layer: 0\n" in text  # what is nested stands below the table
    assert "/home/me" not in text
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ([BASE, "lab/maths"], "merge")
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)


def test_training_by_others_after_the_record(folder):
    write_step(folder, {"step": "convert", "inputs": []})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    text = card_files(folder)["README.md"]
    assert "### 1. Conversion" in text
    assert "### Training\n\n| measure | value |\n| --- | --- |\n| steps | 7 |" in text


def test_who_wrote_a_readme(checkpoint):
    card = card_files(checkpoint, REPO)["README.md"]
    assert not written_by_hand(card)
    assert written_by_hand(card.replace("Thai-Centric", "Thai-centric"))
    assert written_by_hand("# My model\n\nIt is good.")
    assert written_by_hand("---\nlicense: [mit\n---\n# broken, but mine")
    assert not written_by_hand("---\ntags:\n- generated_from_trainer\n- trl\n---\n# Model Card for out")


# What is uploaded


def test_only_the_manifest_leaves_the_machine(folder, hub):
    for name in ("training_args.bin", "optimizer.pt", "adapter_config.json", "notes.txt", "checkpoint-5/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    contents = read_contents(folder)
    assert set(contents.left_out) == {
        "training_args.bin", "optimizer.pt", "adapter_config.json", "notes.txt", "checkpoint-5/",
    }  # fmt: skip
    assert {"config.json", "modeling_jai.py", "model.safetensors", "tokenizer.json", PROVENANCE_FILE} <= set(
        contents.kept
    )
    output = StringIO()
    options = PublishOptions(folder=folder, repo_id=REPO, dry_run=True)
    result = publish(options, console=Console(file=output, width=200), endpoint=hub.endpoint)
    assert result.commit is None
    for name in (*contents.kept, *contents.left_out):
        assert name in output.getvalue()
    assert hub.requests == []


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 999, 1000, 12_345_678, 150_631_884_800)] == [
        "0 B", "999 B", "1 kB", "12.3 MB", "151 GB",
    ]  # fmt: skip


PULL = """
import json, os, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

repo, revision, input_ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
generate = pipeline("text-generation", model=repo, revision=revision, trust_remote_code=True)
with torch.no_grad():
    found = {
        "logits": model(torch.tensor(json.loads(input_ids))).logits,
        "weights": model.state_dict(),
        "ids": tokenizer("ประเทศไทย and the river").input_ids,
        "text": generate("ประเทศไทย", max_new_tokens=5, do_sample=False)[0]["generated_text"],
    }
torch.save(found, out)
model.push_to_hub("loopback/again", private=True)
token = os.environ.pop("HF_TOKEN")
try:
    AutoConfig.from_pretrained("loopback/again", trust_remote_code=True)
except OSError as error:
    print(f"refused: {error}")
again = AutoModelForCausalLM.from_pretrained("loopback/again", trust_remote_code=True, token=token)
print(sum(p.numel() for p in again.parameters()))
"""


@pytest.mark.parametrize("xet", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["xet", "lfs"])
def test_published_and_pulled_by_a_stranger(xet, checkpoint, tiny_tokenizer, tmp_path, monkeypatch, run_as_stranger):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    with LoopbackHub(tmp_path / "hub", xet=xet) as hub:
        output = StringIO()
        console = Console(file=output, width=200)
        options = PublishOptions(folder=checkpoint, repo_id=REPO)
        result = publish(options, token=hub.token, endpoint=hub.endpoint, console=console)
        assert result.url == f"{hub.endpoint}/{REPO}"
        assert result.commit == hub.repo(REPO).head().sha
        assert result.revision_line in output.getvalue()
        assert result.commit in result.revision_line
        assert any("/v1/xorbs/" in request.path for request in hub.requests) == xet
        assert hub.content(REPO, "model.safetensors") == (checkpoint / "model.safetensors").read_bytes()
        assert hub.content(REPO, "README.md").decode() == card_files(checkpoint, REPO)["README.md"]
        assert not (checkpoint / "README.md").exists()

        arguments = (REPO, result.commit, json.dumps(INPUT_IDS), str(tmp_path / "pulled.pt"))
        pulled = run_as_stranger(PULL, hub.environment(), *arguments)
        assert pulled.returncode == 0, pulled.stderr
        # And what was loaded that way can be pushed on, code and all: privately, for those who have a token.
        said = pulled.stdout.strip().splitlines()
        assert any(line.startswith("refused: ") for line in said)
        assert int(said[-1]) == sum(t.numel() for t in load_file(checkpoint / "model.safetensors").values())
        assert hub.repo("loopback/again").private
        again = hub.repo("loopback/again").head().files
        assert {"modeling_jai.py", "configuration_jai.py", "model.safetensors"} <= set(again)
        config = json.loads(hub.content("loopback/again", "config.json"))
        assert config["auto_map"] == json.loads((checkpoint / "config.json").read_text())["auto_map"]
        assert hub.content("loopback/again", "model.safetensors") == hub.content(REPO, "model.safetensors")

    found = torch.load(tmp_path / "pulled.pt")
    model = JaiForCausalLM.from_pretrained(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found["weights"].pop(name)), name
    assert not found["weights"]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(INPUT_IDS)).logits, found["logits"])
    assert found["ids"] == tiny_tokenizer("ประเทศไทย and the river").input_ids
    assert found["text"].startswith("ประเทศไทย")


def test_a_new_upload_replaces_the_old_one_whole(folder, hub, api):
    first = upload(api, read_contents(folder), REPO, generated={"README.md": README}).commit
    api.upload_file(path_or_fileobj=b"picture", path_in_repo="images/mine.png", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"table", path_in_repo="results.csv", repo_id=REPO)
    sharded(folder)
    (folder / "chat_template.jinja").unlink()
    output = StringIO()
    console = Console(file=output, width=200)
    options = PublishOptions(folder=folder, repo_id=REPO, forward=False)
    publish(options, token=hub.token, endpoint=hub.endpoint, console=console)
    files = hub.repo(REPO).head().files
    assert "model-00001-of-00002.safetensors" in files
    assert not {"model.safetensors", "chat_template.jinja"} & set(files)
    assert {"images/mine.png", "results.csv"} <= set(files)
    assert "chat_template.jinja, model.safetensors" in output.getvalue()
    assert "model.safetensors" in hub.repo(REPO).head(first).files  # the old commit is what it was


def test_readmes_by_hand_stay(folder, hub, api):
    quiet = Console(file=StringIO())
    at_hub = {"token": hub.token, "endpoint": hub.endpoint, "console": quiet}
    # of the repository: edited there after it was generated
    upload(
        api,
        read_contents(folder),
        REPO,
        generated={"README.md": card_files(folder, REPO)["README.md"] + "\nAnd a word from me.\n"},
    )
    (folder / "README.md").write_text("---\ntags:\n- generated_from_trainer\n---\n# by a trainer")
    publish(PublishOptions(folder=folder, repo_id=REPO, forward=False), **at_hub)
    assert hub.content(REPO, "README.md").endswith(b"And a word from me.\n")
    # of the folder
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine ก\n")
    # in the user's own namespace
    publish(PublishOptions(folder=folder, repo_id="tiny-two", forward=False), **at_hub)
    assert hub.content("loopback/tiny-two", "README.md").decode() == "---\nlicense: mit\n---\n# Mine ก\n"


def test_to_a_branch(folder, hub, api):
    contents = read_contents(folder)
    main = upload(api, contents, REPO, generated={"README.md": README})
    branch = upload(api, contents, REPO, generated={"README.md": README + "two"}, revision="try")
    assert main != branch
    assert hub.content(REPO, "README.md").decode() == README
    assert hub.content(REPO, "README.md", revision="try").decode() == README + "two"


def test_to_a_branch_of_a_new_private_repository(folder, hub, api):
    options = PublishOptions(
        folder=folder, repo_id=REPO, private=True, revision="try", commit_message="First try", forward=False
    )
    result = publish(options, token=hub.token, endpoint=hub.endpoint, console=Console(file=StringIO()))
    assert hub.repo(REPO).private
    assert result.commit == api.model_info(REPO, revision="try").sha != api.model_info(REPO).sha
    assert api.list_repo_commits(REPO, revision="try")[0].title == "First try"


# What can go wrong


def refuse(folder, repo_id, hub: LoopbackHub, **options) -> str:
    at_hub = {"token": options.pop("token", hub.token), "endpoint": options.pop("endpoint", hub.endpoint)}
    with pytest.raises(UserError) as caught:
        publish(PublishOptions(folder=folder, repo_id=repo_id, **options), console=Console(file=StringIO()), **at_hub)
    assert hub.token not in str(caught.value)
    return str(caught.value)


def test_what_is_refused_before_any_work(folder, hub, api, monkeypatch):
    api.create_repo(REPO)
    started = hub.repo(REPO).head()
    assert "not a name of a repository" in refuse(folder, "my model", hub)
    assert "not a name of a repository" in refuse(folder, "a/b/c", hub)
    assert "not logged in" in refuse(folder, REPO, hub, token=None)
    assert "(401: Invalid credentials" in refuse(folder, REPO, hub, token="hf_" + "x" * 34)
    assert "cannot be reached" in refuse(folder, REPO, hub, endpoint="http://127.0.0.1:9")
    assert "exists and is public" in refuse(folder, REPO, hub, private=True)
    hub.fail_next(1, status=500, match="/api/models")
    assert "fault of its own (500" in refuse(folder, REPO, hub)
    hub.fail_next(1, status=429, match="/api/models")
    assert "fewer requests (429)" in refuse(folder, REPO, hub)
    hub.hang_up_next(1, match="/api/models")
    assert "hung up" in refuse(folder, REPO, hub)
    monkeypatch.setattr(hub_repo, "ANSWER_SECONDS", 0.2)
    hub.fail_next(1, match="/api/models", delay=1.0)
    assert "did not answer in time" in refuse(folder, REPO, hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refuse(folder, REPO, hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (folder / "README.md").write_bytes("ภาษาไทย".encode("cp874"))
    assert "not in UTF-8" in refuse(folder, REPO, hub)
    assert hub.repo(REPO).head() == started


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("---\n- mit\n---\n# Mine", "is a list"),
        ("---\nlicense: [mit\n---\n# Mine", "while parsing"),
        ("---\njust words\n---\n# Mine", "is a str"),
        (f"---\na: {'[' * 100_000}\n---\n# Mine", "nested too deeply"),
    ],
)
def test_a_card_by_hand_with_broken_metadata_is_refused_before_any_work(readme, message, folder, hub):
    (folder / "README.md").write_text(readme)
    assert re.search(
        f"metadata at the head of .*README.md is not a YAML mapping .*{message}", refuse(folder, REPO, hub)
    )
    assert hub.requests == []


def test_a_repository_with_an_adapter_is_refused(folder, hub, api):
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id=REPO)
    assert "holds a PEFT adapter" in refuse(folder, REPO, hub)


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_a_failed_upload_leaves_nothing_and_can_be_repeated(xet, folder, hub, api, no_waiting, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    contents = read_contents(folder)
    faults: list[tuple[Callable[[], None], str]] = [
        (lambda: hub.fail_next(1, status=403, match="/api/repos/create"), "may not write"),
        (lambda: hub.fail_next(50, status=500, match="preupload"), "fault of its own"),
        (lambda: hub.hang_up_next(50, match="preupload"), "hung up"),
        (lambda: hub.fail_next(1, status=401, match="preupload"), "does not accept your access token"),
        (lambda: hub.fail_next(1, status=404, match="commit"), "does not find"),
        (lambda: hub.fail_next(1, status=412, match="commit"), "changed by somebody else"),
        (lambda: hub.hang_up_next(1, match="commit"), "hung up"),
        (lambda: hub.fail_next(1, status=503, match="commit"), "fault of its own"),
    ]
    if not xet:  # first, because what has arrived is not sent again
        faults.insert(0, (lambda: hub.fail_next(50, status=500, match="/uploads/"), "fault of its own"))
        faults.insert(0, (lambda: hub.hang_up_next(50, match="/uploads/"), "hung up"))
    for fault, message in faults:
        fault()
        with pytest.raises(UserError, match=message) as caught:
            upload(api, contents, REPO, generated={"README.md": README})
        assert hub.token not in str(caught.value)
        hub.stop_faults()
        repo = hub.repo(REPO)
        assert repo is None or set(repo.head().files) == {".gitattributes"}
    # The answer is lost, but the commit is made: the second try finds everything there.
    hub.hang_up_next(1, match="commit", after_work=True)
    with pytest.raises(UserError, match=r"hung up.*again"):
        upload(api, contents, REPO, generated={"README.md": README})
    commit = upload(api, contents, REPO, generated={"README.md": README}).commit
    assert commit == hub.repo(REPO).head().sha
    assert len(hub.repo(REPO).commits) == 2
    assert hub.content(REPO, "model.safetensors") == (folder / "model.safetensors").read_bytes()


def test_a_card_that_the_hub_refuses(folder, hub, api):
    with pytest.raises(UserError, match=r"Invalid metadata in README.md[\s\S]*license"):
        upload(api, read_contents(folder), REPO, generated={"README.md": "---\nlicense: 3\n---\n"})


# Tokens


def test_tokens_are_blotted_out():
    token = "hf_" + "aB3" * 11
    assert token not in redact(f"Bearer {token}")
    assert "secret" not in redact("the secret word", "secret")
    assert "b\\nc" not in redact(str(ValueError("Illegal header value b'Bearer a b\\nc'")), "a b\nc")
    assert redact("hf_internal_testing/tiny-model is no token") == "hf_internal_testing/tiny-model is no token"


def test_tokens_in_the_wrong_place(folder, hub):
    token = "hf_" + "aB3" * 11
    for wrong in ("a b", "ก", token + "\nX: y"):
        message = refuse(folder, REPO, hub, token=wrong)
        assert "holds blanks" in message
        assert token not in message
    message = refuse(folder, token, hub)
    assert "instead of the name of the repository" in message
    assert token not in message
    record = {"step": "sft", "inputs": [], "options": {"hub_token": token}}
    (folder / PROVENANCE_FILE).write_text(json.dumps(record))
    message = refuse(folder, REPO, hub)
    assert f"There is an access token in {PROVENANCE_FILE}" in message
    assert token not in message
    assert token not in card_files(folder)["README.md"]


TALKATIVE = """
import logging, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from huggingface_hub.utils import logging as hub_logging
hub_logging.set_verbosity_debug()
del sys.modules["jai"]
from jai import JaiForCausalLM
from jai.hub_card.options import PublishOptions
from jai.hub_card.publish import publish

folder, repo = sys.argv[1:]
for attempt in ("somebody-else/x", repo):
    try:
        print(publish(PublishOptions(folder=folder, repo_id=attempt, forward=False)))
    except Exception:
        traceback.print_exc()
JaiForCausalLM.from_pretrained(folder).push_to_hub("secret", private=True)
"""


def test_no_token_in_any_log(folder, hub, run_as_stranger):
    """At the client's most talkative: `publish` fails and succeeds, then a user pushes by themselves."""
    environment = {**hub.environment(), "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "RUST_LOG": "debug"}
    run = run_as_stranger(TALKATIVE, environment, str(folder), REPO)
    assert run.returncode == 0, run.stderr
    assert "may not write to somebody-else/x" in run.stderr
    assert "PublishResult" in run.stdout
    assert hub.repo("loopback/secret").private
    assert {"model.safetensors", "modeling_jai.py"} <= hub.repo("loopback/secret").head().files.keys()
    assert "curl -X" in run.stderr  # it was talkative indeed
    secrets = [hub.token, "xet_write_", "xet_read_"]
    for secret in secrets:
        assert secret not in run.stdout
        assert secret not in run.stderr
    for path in [path for path in (hub.root / "home").rglob("*") if path.is_file()]:
        assert hub.token.encode() not in path.read_bytes(), path
    for name in hub.repo(REPO).head().files:
        assert hub.token.encode() not in hub.content(REPO, name)


@pytest.mark.slow
def test_the_cards_examples_run(checkpoint, tmp_path, run_as_stranger):
    """Every Python block of the card, as it stands, against the published repository."""
    with LoopbackHub(tmp_path / "hub") as hub:
        options = PublishOptions(folder=checkpoint, repo_id=REPO, forward=False)
        publish(options, token=hub.token, endpoint=hub.endpoint, console=Console(file=StringIO()))
        blocks = re.findall(r"```python\n(.*?)```", hub.content(REPO, "README.md").decode(), re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            run = run_as_stranger(f"import os; os.chdir({str(tmp_path)!r})\n{block}", hub.environment())
            assert run.returncode == 0, run.stderr

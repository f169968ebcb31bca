# SPDX-License-Identifier: Apache-2.0
"""What neither a checkpoint nor a repository may do to us, and what of ours may not leave the machine."""

import ast
import json
import os
import pickle
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import SecurityError
from rich.console import Console
from transformers import AutoTokenizer

import jai
from jai.conversion.inputs.weight_files import weight_files
from jai.errors import UserError
from jai.generate import GenerateOptions, generate
from jai.hub_card.card import card_files
from jai.hub_card.check import check_files, clean_environment
from jai.hub_card.contents import MANIFEST, Kind, read_contents
from jai.hub_card.options import PublishOptions
from jai.hub_card.publish import publish
from jai.provenance import PROVENANCE_FILE, write_step
from loopback_hub import LoopbackHub

ROOT = Path(jai.__file__).parent
OURS = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "build", "runs", "benchmarks"} & set(path.relative_to(ROOT).parts)
)
REPO = "loopback/tiny"
INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.usefixtures("nobody_logged_in")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-jai"
    tiny_model(vocab_size=400, block_repeats=[1, 2, 1], pad_token_id=tiny_tokenizer.pad_token_id).save_pretrained(
        folder
    )
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny-jai"))


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


# Our own source


def calls(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def unpickles_text_alone(tree: ast.Module) -> bool:
    """Whether pickles are read only by classes that refuse every name: nothing but plain values comes of them."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    readers = [node for node in classes if list(map(ast.unparse, node.bases)) == ["pickle.Unpickler"]]
    refusing = [
        method
        for reader in readers
        for method in reader.body
        if isinstance(method, ast.FunctionDef) and method.name == "find_class" and isinstance(method.body[0], ast.Raise)
    ]
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    of_pickle = {name for name in used if name.startswith("pickle.")}
    return len(refusing) == len(readers) and of_pickle <= {"pickle.Unpickler", "pickle.UnpicklingError"}


def test_a_reader_of_pickles_must_refuse_every_name():
    refusing = "class A(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise ValueError\n"
    assert unpickles_text_alone(ast.parse(refusing))
    assert not unpickles_text_alone(ast.parse("class A(pickle.Unpickler): pass"))
    assert not unpickles_text_alone(ast.parse(refusing + "pickle.loads(b'')"))


def test_no_source_of_ours_runs_what_it_reads():
    """No pickle but of plain values, no eval or exec, no shell."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in OURS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(ROOT)
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        safe_loaders = {node.name for node in classes if list(map(ast.unparse, node.bases)) == ["yaml.SafeLoader"]}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & forbidden
            assert not found or (found == {"pickle"} and unpickles_text_alone(tree)), where
        for call in calls(tree):
            name = ast.unparse(call.func)
            assert name not in ("eval", "exec", "compile", "os.system", "torch.load", "torch.save"), f"{where}: {name}"
            if name == "yaml.load":  # with a loader of ours that makes no more than SafeLoader does
                loader = call.args[1] if len(call.args) > 1 else {k.arg: k.value for k in call.keywords}["Loader"]
                assert ast.unparse(loader) in safe_loaders, where
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            assert not (name.startswith("subprocess.") and "shell" in keywords), where
            assert ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) == "False", where


def test_trust_in_remote_code_is_given_by_the_user_alone():
    """`trust_remote_code=True` stands nowhere in our calls, but in the check, which says that it runs the code."""
    trusting = set()
    for path in OURS:
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "True":
                    trusting.add(path.relative_to(ROOT).as_posix())
    users_own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert trusting == {"hub_card/clean_load.py", *users_own}
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert not re.search(r"^trust_remote_code:", recipe.read_text(encoding="utf-8"), re.MULTILINE), recipe


@pytest.mark.usefixtures("checked_once")
def test_the_check_says_that_it_runs_the_code(folder, tmp_path):
    output = StringIO()
    with LoopbackHub(tmp_path / "hub") as hub:
        options = PublishOptions(folder=folder, repo_id=REPO, forward=False)
        publish(options, token=hub.token, endpoint=hub.endpoint, console=Console(file=output, width=200))
    assert "which runs the model code that is published" in output.getvalue()


# Pickles


def is_pickle(content: bytes) -> bool:
    """Also inside of the zip files of torch.save."""
    return content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04"))


@pytest.mark.usefixtures("checked_once")
def test_nothing_published_is_a_pickle(folder, tmp_path):
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with LoopbackHub(tmp_path / "hub") as hub:
        options = PublishOptions(folder=folder, repo_id=REPO, forward=False)
        publish(options, token=hub.token, endpoint=hub.endpoint, console=Console(file=StringIO()))
        files = hub.repo(REPO).head().files
        assert "model.safetensors" in files
        for name in files:
            assert not is_pickle(hub.content(REPO, name)), name
            assert Path(name).suffix not in (".bin", ".pt", ".pth", ".pkl", ".ckpt"), name
    for kind in Kind:
        assert not [pattern for pattern in MANIFEST[kind] if pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*"))]


def test_pickled_weights_are_refused_and_not_opened(folder, tmp_path):
    mark = tmp_path / "it-ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match="no safetensors weights"):
        check_files(folder)
    with pytest.raises(UserError, match="no safetensors weights"):
        weight_files(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")  # under another name
    with pytest.raises(UserError, match="not a complete safetensors"):
        check_files(folder)
    assert not mark.exists()


# Paths


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "sub/x.safetensors"])
def test_an_index_names_plain_files_only(name, folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="is not a file beside it"):
        check_files(folder)


@pytest.mark.parametrize("module", ["../evil", "/tmp/evil", "sub/evil", "evil", ""])
def test_an_auto_map_names_published_files_only(module, folder):
    (folder / "evil.py").write_text("")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = f"{module}.JaiForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="auto_map"):
        check_files(folder)


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"generation_config.json is a link out of the folder, to .*secret.json"):
        read_contents(folder)


def test_links_within_the_folder_and_the_hubs_cache_are_followed(folder, tmp_path):
    (folder / "LICENSE").write_text("MIT")
    (folder / "LICENSE.txt").symlink_to("LICENSE")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert read_contents(snapshot).kept == read_contents(folder).kept


def test_a_published_folder_holds_no_paths_outside():
    for kind in Kind:
        for pattern in MANIFEST[kind]:
            assert not pattern.startswith(("/", "~", "*"))
            assert ".." not in Path(pattern).parts


# Templates

ATTACKS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{% for k in messages %}{{ k.clear() }}{% endfor %}",
    "{{ self.__init__.__globals__ }}",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_chat_templates_run_in_a_sandbox(attack, folder, tmp_path):
    (folder / "chat_template.jinja").write_text(attack.replace("MARK", str(tmp_path / "it-ran")))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    with pytest.raises((SecurityError, UserError)):
        generate(GenerateOptions(model=str(folder), prompt="hi", max_new_tokens=1))
    text = card_files(folder, REPO)["README.md"]  # names the template, and renders none of it
    assert "subclasses" not in text
    assert not (tmp_path / "it-ran").exists()


def test_what_records_say_is_text_and_no_template(folder):
    write_step(folder, {"step": "sft", "inputs": [], "options": {"note": "{{ 7 * 191 }}{% raw %}"}})
    text = card_files(folder, REPO)["README.md"]
    assert "{{ 7 * 191 }}" in text
    assert "1337" not in text


# Tokens


def test_a_token_in_any_file_stops_the_upload(folder, tmp_path):
    token = "hf_" + "aB3" * 11
    with LoopbackHub(tmp_path / "hub", token=token) as hub:
        options = PublishOptions(folder=folder, repo_id=REPO, forward=False)
        for name in ("README.md", "tokenizer_config.json", "training_logs/loss.json", "LICENSE", "modeling_jai.py"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            before = path.read_bytes() if path.exists() else None
            path.write_bytes((before or b"") + f"\n# {token}\n".encode())
            with pytest.raises(UserError) as caught:
                publish(options, token=token, endpoint=hub.endpoint, console=Console(file=StringIO()))
            assert f"There is an access token in {name}" in str(caught.value)
            assert token not in str(caught.value)
            path.unlink() if before is None else path.write_bytes(before)
        assert hub.requests == []


def test_a_token_in_a_record_reaches_no_card(folder):
    token = "hf_" + "aB3" * 11
    record = {"step": "sft", "inputs": [], "options": {"hub_token": token}, "metrics": {token: 1}}
    (folder / PROVENANCE_FILE).write_text(json.dumps(record))
    assert token not in card_files(folder, REPO)["README.md"]
    write_step(folder, record)
    assert token not in (folder / PROVENANCE_FILE).read_text()


def test_the_check_runs_without_tokens(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, "hf_secret")
    found = clean_environment(tmp_path)
    assert "hf_secret" not in found.values()
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["HF_HOME"].startswith(str(tmp_path))
    assert os.environ["HF_TOKEN"] == "hf_secret"

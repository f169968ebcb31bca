# SPDX-License-Identifier: Apache-2.0
"""What else can be published, and how: pull requests, pinned code, adapters, quantised checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from jai import JaiForCausalLM
from jai.errors import UserError
from jai.hub_card.check import check_checkpoint, check_files
from jai.hub_card.options import PublishOptions
from jai.hub_card.publish import PublishResult, publish
from loopback_hub import LoopbackHub

REPO, BASE = "loopback/tiny", "loopback/base"
INPUT_IDS = torch.arange(5, 21).reshape(2, 8)


@pytest.fixture(autouse=True)
def _own_cache(nobody_logged_in, checked_once, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-jai"
    tiny_model(block_repeats=[1, 2, 1]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny-jai"))


@pytest.fixture
def push(hub: LoopbackHub) -> Callable[..., PublishResult]:
    def run(folder: Path, repo_id: str = REPO, output: StringIO | None = None, **options) -> PublishResult:
        console = Console(file=output or StringIO(), width=200)
        token = options.pop("token", hub.token)
        wanted = PublishOptions(folder=folder, repo_id=repo_id, **{"forward": False, **options})
        return publish(wanted, token=token, endpoint=hub.endpoint, console=console)

    return run


@pytest.fixture
def run_line(run_as_stranger) -> Callable[[str, dict[str, str]], dict]:
    """Run a line that loads a model as a stranger would: its logits' sum, and where its code came from."""

    def run(line: str, environment: dict[str, str]) -> dict:
        code = (
            "import json\n"
            "import torch, transformers\nfrom transformers import AutoModelForCausalLM\n"
            "from peft import AutoPeftModelForCausalLM\n"
            f"model = {line}.eval()\n"
            "inner = model.get_base_model() if hasattr(model, 'get_base_model') else model\n"
            f"logits = model(torch.tensor({INPUT_IDS.tolist()})).logits\n"
            "print(json.dumps({'sum': logits.double().sum().item(), 'module': type(inner).__module__}))"
        )
        finished = run_as_stranger(code, environment)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.strip().splitlines()[-1])

    return run


def sum_of(model) -> float:
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits.double().sum().item()


# Pinned code


def test_the_code_is_tagged_once_for_each_version_and_the_line_loads_it(folder, hub, api, push, run_line):
    output = StringIO()
    first = push(folder, output=output)
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).tags}
    (tag,) = tags
    assert tag.startswith("code-")
    assert tags[tag] == first.commit
    assert f"is tagged {tag}" in output.getvalue()
    assert f'revision="{first.commit}", code_revision="{first.commit}", trust_remote_code=True' in first.revision_line

    # Other weights, the same code: the tag stays where it is, and the line pins both.
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    second = push(folder)
    assert f'revision="{second.commit}", code_revision="{first.commit}"' in second.revision_line
    assert {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).tags} == tags

    # Somebody changes the code of main: who pinned it does not run that.
    bad = CommitOperationAdd("modeling_jai.py", b"raise SystemExit('other code')")
    api.create_commit(REPO, [bad], commit_message="bad")
    found = run_line(second.revision_line, hub.environment())
    assert found["sum"] == pytest.approx(sum_of(JaiForCausalLM.from_pretrained(folder)), abs=1e-4)
    assert first.commit in found["module"]

    # Another version of the code gets another tag.
    path = folder / "modeling_jai.py"
    path.write_text(path.read_text() + "\n# one more line\n")
    third = push(folder)
    assert f'code_revision="{third.commit}"' in third.revision_line
    assert len(api.list_repo_refs(REPO).tags) == 2


def test_a_tag_that_was_moved_is_not_trusted(folder, api, push):
    push(folder)
    (tag,) = (ref.name for ref in api.list_repo_refs(REPO).tags)
    api.create_commit(REPO, [CommitOperationAdd("modeling_jai.py", b"# bad")], commit_message="bad")
    api.delete_tag(REPO, tag=tag)
    api.create_tag(REPO, tag=tag)
    with pytest.raises(UserError, match=f"{tag}.*points to a commit whose modeling_jai.py is another"):
        push(folder)


def test_a_tag_that_fails_is_made_up_for(folder, hub, api, push):
    hub.fail_next(1, status=500, match="/tag/")
    with pytest.raises(UserError, match=r"Published at commit [0-9a-f]{40}, but its code could not be tagged[\s\S]*ag"):
        push(folder)
    output = StringIO()
    result = push(folder, output=output)
    assert "Nothing had changed" in output.getvalue()
    assert [ref.target_commit for ref in api.list_repo_refs(REPO).tags] == [result.commit]


# Pull requests


def test_a_pull_request(folder, hub, api, push, run_line):
    with pytest.raises(UserError, match="There is no loopback/tiny to open a pull request in"):
        push(folder, create_pr=True)
    with pytest.raises(UserError, match="Leave --revision out"):
        push(folder, create_pr=True, revision="try")
    api.create_repo(REPO)
    guest = hub.add_token("guest")
    with pytest.raises(UserError, match="may not write"):
        push(folder, token=guest)
    hub.hang_up_next(1, match="/commit/", after_work=True)
    with pytest.raises(UserError, match="hung up"):
        push(folder, create_pr=True, token=guest)
    # The answer was lost, the pull request was not: the second try finds it, and makes no other.
    output = StringIO()
    result = push(folder, create_pr=True, token=guest, output=output)
    assert "refs/pr/1 with this title is continued" in output.getvalue()
    assert result.url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert set(hub.repo(REPO).head().files) == {".gitattributes"}
    assert hub.content(REPO, "model.safetensors", "refs/pr/1") == (folder / "model.safetensors").read_bytes()
    assert run_line(result.revision_line, hub.environment())["module"].endswith("modeling_jai")
    # Changed and pushed again, it goes on in the same one; with another title there are two.
    path = folder / "LICENSE"
    path.write_text("MIT")
    push(folder, create_pr=True, token=guest)
    push(folder, create_pr=True, token=guest, commit_message="Another try")
    listed = [(pull.num, pull.title) for pull in api.get_repo_discussions(REPO)]
    assert listed == [(2, "Another try"), (1, "Upload tiny-jai with jai publish")]
    assert hub.content(REPO, "LICENSE", "refs/pr/1") == path.read_bytes()
    assert api.list_repo_refs(REPO).tags == []
    api.merge_pull_request(REPO, 1)
    assert hub.content(REPO, "model.safetensors") == (folder / "model.safetensors").read_bytes()


# The check against the source


def test_code_that_computes_something_else_is_refused(folder):
    path = folder / "modeling_jai.py"
    code = path.read_text()
    assert "self.lm_head(" in code
    path.write_text(code.replace("self.lm_head(", "2 * self.lm_head(", 1))
    with pytest.raises(UserError, match="and the installed package give different results: the logits differ by 1"):
        check_checkpoint(folder, source=True)


# A repository's .gitignore


def test_a_gitignore_does_not_take_files_away(folder, hub, api, push, monkeypatch):
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"*.safetensors\n", path_in_repo=".gitignore", repo_id=REPO)
    push(folder)
    assert "model.safetensors" in hub.repo(REPO).head().files


# Adapters


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    """A LoRA on attention and experts, saved by PEFT; it names its base by the folder."""
    model = JaiForCausalLM.from_pretrained(checkpoint)
    config = LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        trainable_token_indices={"embed_tokens": [1, 2, 3]},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    torch.save({}, tmp_path / "adapter" / "training_args.bin")
    return tmp_path / "adapter"


def test_an_adapter(adapter, checkpoint, hub, api, push, run_line):
    with pytest.raises(
        UserError, match=r"base model is .*tiny-jai', which is not a model on the Hub.*--base owner/name"
    ):
        push(adapter)
    with pytest.raises(UserError, match="--base is for adapters"):
        push(checkpoint, base=BASE)
    base = push(checkpoint, BASE)
    for forward in (False, True):  # by names and shapes only, then with the logits
        output = StringIO()
        result = push(adapter, base=BASE, forward=forward, output=output)
    assert f"{BASE} at commit {base.commit}" in output.getvalue()
    assert "bit for bit" in output.getvalue()
    assert "training_args.bin" in output.getvalue()
    files = hub.repo(REPO).head().files
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(hub.content(REPO, "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, base.commit)
    card = ModelCard(hub.content(REPO, "README.md").decode())
    assert (card.data.base_model, card.data.base_model_relation, card.data.library_name) == (BASE, "adapter", "peft")
    assert "| r | 2 |" in card.text
    assert "| trainable_token_indices | 3 of embed_tokens |" in card.text
    assert "**Merge it before you serve it**" in card.text
    assert str(checkpoint) not in card.text + json.dumps(config)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(checkpoint)

    # The base moves on; the adapter keeps the one that it was made for.
    api.create_commit(BASE, [CommitOperationAdd("modeling_jai.py", b"raise SystemExit")], commit_message="bad")
    expected = sum_of(PeftModel.from_pretrained(JaiForCausalLM.from_pretrained(checkpoint), adapter))
    assert run_line(result.revision_line, hub.environment())["sum"] == pytest.approx(expected, abs=1e-4)

    with pytest.raises(UserError, match="holds a PEFT adapter"):
        push(checkpoint, REPO)
    with pytest.raises(UserError, match="holds a complete model"):
        push(adapter, BASE, base=BASE)


def other_base(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0.", "layers.9."): t for name, t in tensors.items()},
        adapter / "adapter_model.safetensors",
    )


def changed(**values) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def pickled(adapter: Path) -> None:
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def piped(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "Pickled weights"),
        (changed(task_type=None), "no task_type"),
        (changed(peft_type=None), "names no peft_type"),
        (changed(peft_type=["LORA"]), "names no peft_type"),
        (changed(base_model_name_or_path={}), "no base_model_name_or_path"),
        (changed(revision=5), "revision 5; expected the name of a commit"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "holds a list, where a JSON object"),
        (lambda a: (a / "adapter_config.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x"), "not a complete safetensors"),
        (piped, "is a named pipe, not a file"),
    ],
)
def test_damaged_adapters_are_refused(damage, message, adapter):
    damage(adapter)
    with pytest.raises(UserError, match=message):
        check_files(adapter)


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`without(package)`: new processes are told that it is not installed."""

    def hide(package: str) -> None:
        (folder := tmp_path / "without" / package).mkdir(parents=True)
        missing = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
        (folder / "__init__.py").write_text(missing)
        # transformers asks for the version alone, and takes none that is so old.
        (about := folder.with_name(f"{package}-0.0.1.dist-info")).mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
        monkeypatch.setenv("PYTHONPATH", str(folder.parent), prepend=os.pathsep)

    return hide


def test_without_peft_an_adapter_cannot_be_checked(adapter, checkpoint, without):
    """Which says nothing about the adapter."""
    without("peft")
    with pytest.raises(UserError, match=r"cannot be checked here: ModuleNotFoundError.*'peft'\s.*jai-llm\[train\]"):
        check_checkpoint(adapter, base=checkpoint)


def test_an_adapter_of_another_base_is_refused(adapter, checkpoint, push):
    push(checkpoint, BASE)
    other_base(adapter)
    with pytest.raises(UserError, match=r"does not load in a clean process.*missing keys .*unexpected keys"):
        push(adapter, base=BASE)


def test_an_adapter_of_experts_is_for_no_quantised_base(adapter, checkpoint, api, push):
    api.create_repo(BASE)
    config = json.loads((checkpoint / "config.json").read_text())
    four = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    api.create_commit(BASE, [CommitOperationAdd("config.json", json.dumps(four).encode())], commit_message="four bits")
    with pytest.raises(UserError, match=rf"{BASE} is quantised.*in 16 or 32 bits that it was made from.*--base OWNER"):
        push(adapter, base=BASE)
    assert not api.repo_exists(REPO)


# Quantised checkpoints


QUANTIZE = """
import sys, torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from jai import JaiForCausalLM

kind, folder, out = sys.argv[1:]
if kind == "torchao":
    from torchao.quantization import Int8WeightOnlyConfig
    how = TorchAoConfig(Int8WeightOnlyConfig())
elif kind == "nf4":
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
else:
    how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "mlp.experts"])
JaiForCausalLM.from_pretrained(folder, quantization_config=how).save_pretrained(out)
"""


@pytest.fixture(scope="session")
def quantizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bitsandbytes and torchao, whose CPU kernels are enough here."""
    folder = tmp_path_factory.mktemp("quantizers")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    run = subprocess.run([*install, "bitsandbytes>=0.50", "torchao>=0.16"], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"bitsandbytes and torchao cannot be installed here: {run.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_a_quantized_checkpoint(kind, tiny_model, quantizers, hub, push, tmp_path, monkeypatch, run_line):
    path = [str(quantizers), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    model, whole, small = tiny_model(hidden_size=64, intermediate_size=64), tmp_path / "whole", tmp_path / "small"
    model.save_pretrained(whole)
    run = subprocess.run([sys.executable, "-P", "-c", QUANTIZE, kind, whole, small], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    output = StringIO()
    push(small, forward=False)
    result = push(small, forward=True, output=output)
    assert f"{model.num_parameters():,} parameters" in output.getvalue()
    assert "logits equal" in output.getvalue()
    assert "quantization_config" in json.loads(hub.content(REPO, "config.json"))
    found = run_line(result.revision_line, {**hub.environment(), "PYTHONPATH": os.environ["PYTHONPATH"]})
    assert found["module"].endswith("modeling_jai")


def test_a_quantized_checkpoint_without_its_library(folder, push, without):
    """By its configuration alone: what loads it is named."""
    without("bitsandbytes")
    path = folder / "config.json"
    quantization = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    with pytest.raises(UserError, match=r"cannot be checked here: ImportError.*hqq"):
        push(folder, forward=True)

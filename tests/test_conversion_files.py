# SPDX-License-Identifier: Apache-2.0
"""Files as users have them: what is damaged, unusual or in the wrong place is one message at once, or is read right."""

import json
import os
import re
import shlex
import shutil
import string
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.verify import verify
from jai.conversion.export.command import export
from jai.conversion.export.options import ExportOptions
from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.inspect_checkpoint import inspect
from jai.conversion.inspect_options import InspectOptions
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import SnapshotOptions, UpcycleOptions
from jai.conversion.upcycle.snapshot import snapshot
from jai.errors import UserError
from jai.files import work_folder

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PLAN = {"block_size": 2, "block_repeats": [1, 2, 1]}


@pytest.fixture(scope="module")
def whole_base(tmp_path_factory, tiny_phi3, tiny_tokenizer) -> Path:
    folder = tiny_phi3(tmp_path_factory.mktemp("base") / "phi3", vocab_size=len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_dense(tmp_path_factory, whole_base) -> Path:
    out = tmp_path_factory.mktemp("dense") / "jai"
    convert(ConvertOptions(base=str(whole_base), out=out, experts=1, skip_alpha=0.0, **PLAN))
    return out


@pytest.fixture
def base(whole_base, tmp_path) -> Path:
    """A phi-3 that a test may damage."""
    return Path(shutil.copytree(whole_base, tmp_path / "base"))


@pytest.fixture
def dense(whole_dense, tmp_path) -> Path:
    """A dense JAI that a test may damage."""
    return Path(shutil.copytree(whole_dense, tmp_path / "dense"))


def run_convert(base: Path, out: Path, **options) -> None:
    convert(ConvertOptions(base=str(base), out=out, **PLAN, **options))


# Each verb that reads a JAI, as a function of the JAI's folder and the output's.
JAI_VERBS: dict[str, Callable[[Path, Path], object]] = {
    "upcycle": lambda model, out: upcycle(UpcycleOptions(dense=str(model), out=out, expert_init="copy")),
    "snapshot": lambda model, out: snapshot(SnapshotOptions(checkpoint=str(model), out=out)),
    "merge": lambda model, out: merge(MergeOptions(models=[str(model), str(model)], out=out)),
    "export": lambda model, out: export(ExportOptions(model=str(model), out=out, to="phi3")),
    "inspect": lambda model, out: inspect(InspectOptions(model=str(model))),
}


def same_files(one: Path, other: Path, *, but: tuple[str, ...]) -> bool:
    """Whether two folders hold the same files, some aside."""

    def contents(folder: Path) -> dict[str, bytes]:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return contents(one) == contents(other)


def refused(run: Callable[[], object], message: str, folder: Path) -> None:
    """It is one error, and nothing new lies in the folder."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        run()
    assert sorted(folder.iterdir()) == before


# --- What is damaged ---


def header(content: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content)) + content + data


def entries(**tensors) -> bytes:
    return json.dumps({name: {"dtype": "F32", "shape": [1], **entry} for name, entry in tensors.items()}).encode()


HEADERS = {
    "deep": (header(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "list": (header(b"[]"), "not a JSON object"),
    "list as an entry": (header(b'{"a": [1, 2]}'), "the entry of a has no dtype, shape and data_offsets"),
    "without dtype": (header(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', b"0000"), "entry of a has no dtype"),
    "dtype of another kind": (header(entries(a={"dtype": 32, "data_offsets": [0, 4]}), b"0000"), "entry of a"),
    "without shape": (header(b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}', b"0000"), "entry of a has no"),
    "negative shape": (header(entries(a={"shape": [-1, -1], "data_offsets": [0, 4]}), b"0000"), "entry of a has no"),
    "shape of text": (header(entries(a={"shape": "1", "data_offsets": [0, 4]}), b"0000"), "entry of a has no"),
    "truth as a size": (header(entries(a={"shape": [True], "data_offsets": [0, 4]}), b"0000"), "entry of a has no"),
    "float offsets": (header(entries(a={"data_offsets": [0.0, 4.0]}), b"0000"), "entry of a has no"),
    "negative offset": (header(entries(a={"data_offsets": [-4, 0]})), "entry of a has no"),
    "one offset": (header(entries(a={"data_offsets": [0]})), "entry of a has no"),
    "offsets turned round": (header(entries(a={"data_offsets": [4, 0]}), b"0000"), "the bytes of a are 4 to 0"),
    "overlap": (
        header(entries(a={"data_offsets": [0, 4]}, b={"data_offsets": [0, 4]}), b"0000"),
        "the bytes of b are 0 to 4, where 4 was expected",
    ),
    "half an overlap": (
        header(entries(a={"shape": [2], "data_offsets": [0, 8]}, b={"data_offsets": [4, 8]}), b"00000000"),
        "the bytes of b are 4 to 8, where 8 was expected",
    ),
    "hole": (
        header(entries(a={"data_offsets": [0, 4]}, b={"data_offsets": [8, 12]}), b"0" * 12),
        "the bytes of b are 8 to 12, where 4 was expected",
    ),
    "hole at the start": (header(entries(a={"data_offsets": [4, 8]}), b"0" * 8), "a are 4 to 8, where 0 was expected"),
    "twice": (
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
               b'"data_offsets":[0,4]}}', b"0000"),
        "it names 'a' twice",
    ),
    "more than it says": (header(entries(a={"data_offsets": [0, 4]}), b"0" * 5), "truncated or damaged"),
    "less than it says": (header(entries(a={"data_offsets": [0, 4]}), b"0"), "truncated or damaged"),
    "more than its shape": (header(entries(a={"data_offsets": [0, 8]}), b"0" * 8), "has 8 bytes, not those of its"),
    "quantised": (header(entries(a={"dtype": "I8", "data_offsets": [0, 1]}), b"0"), "is I8; expected one of"),
    "not UTF-8": (header(b'{"\xff": 1}'), "header cannot be read"),
    "longer than the file": (struct.pack("<Q", 10_000) + b"{}", "its length is 10,000"),
    "longer than any": (struct.pack("<Q", 2**64 - 1) + b"{}", "its length is 18,446"),
    "cut in its length": (b"\x02\x00", "header cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_one_message(tmp_path, content, message):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.*(Fetch|save|start)"):
        CheckpointReader(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_of_a_header_is_refused_or_harmless(tmp_path_factory, data):
    """Bytes of a good file are changed, cut or added anywhere: an error, or tensors that lie whole in the file."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3))
    tensors = {f"t{number}": torch.zeros(shape) for number, shape in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("damaged")
    save_file(tensors, folder / WEIGHTS)
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 6))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"-1", b"1e9", b"[", b'"', b"null", b"99999999", b"},{", b"NaN"])
        )
    (folder / WEIGHTS).write_bytes(content)
    try:
        reader = CheckpointReader(folder)
    except UserError:
        return
    ranges = sorted(
        (part.start, part.start + part.length)
        for part in (reader.copied(name, 0, (reader.shapes[name] or (1,))[0]) for name in reader.shapes)
    )
    start = read_header(folder / WEIGHTS).data_start
    assert [start, *(stop for _, stop in ranges)] == [*(begin for begin, _ in ranges), len(content)]


def damage_index(**content) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def replace_by_pipe(name: str) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return replace


def replace_by_folder(name: str) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return replace


def replace_by_link(name: str, target: str) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return replace


def edit(**values) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | values
        (folder / CONFIG).write_text(json.dumps(content))

    return change


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
# How a checkpoint of any kind may be damaged, and what is said.
DAMAGE = {
    "config: list": (write(CONFIG, "[]"), "config.json holds a list"),
    "config: deep": (write(CONFIG, DEEP), "config.json is JSON that is nested too deeply"),
    "config: cut": (write(CONFIG, '{"model_type": "ph'), "config.json is not valid JSON"),
    "config: not UTF-8": (write(CONFIG, b"\xff\xfe"), "config.json is not JSON: it is not UTF-8"),
    "config: pipe": (replace_by_pipe(CONFIG), "config.json is a named pipe, not a file"),
    "config: folder": (replace_by_folder(CONFIG), "config.json is a folder, not a file"),
    "config: dangling": (replace_by_link(CONFIG, "../blobs/12"), "config.json is a link to ../blobs/12"),
    "config: text for a size": (edit(hidden_size="wide"), "config.json is not valid"),
    "config: text for RoPE": (edit(rope_parameters=5), "config.json is not valid"),
    "config: type in a list": (edit(model_type=["jai"]), "type|model_type"),
    "config: a billion layers": (edit(num_hidden_layers=10**9), "num_hidden_layers is 1e.09, and at most 10,000"),
    "config: a trillion rows": (edit(vocab_size=10**12), "vocab_size is 1e.12, and at most"),
    "index: list": (write(INDEX, "[]"), "index.json holds a list"),
    "index: empty": (damage_index(), "is not an index of weights"),
    "index: no names": (damage_index(weight_map={"a": 1, "b": None}), "is not an index of weights"),
    "index: list of names": (damage_index(weight_map=["model-1.safetensors"]), "is not an index of weights"),
    "index: folder": (damage_index(weight_map={"a": ".."}), "is a folder, not a file"),
    "index: null byte": (damage_index(weight_map={"a": "a\0b"}), "lacks a"),
    "index: long name": (damage_index(weight_map={"a": "a" * 5000}), "lacks aaa|cannot be read"),
    "index: outside": (damage_index(weight_map={"a": "../model.safetensors"}), "not a file beside it"),
    "weights: pipe": (replace_by_pipe(WEIGHTS), "model.safetensors is a named pipe, not a file"),
    "weights: folder": (replace_by_folder(WEIGHTS), "model.safetensors is a folder, not a file"),
    "weights: device": (replace_by_link(WEIGHTS, "/dev/zero"), "model.safetensors is a device, not a file"),
    "weights: dangling": (replace_by_link(WEIGHTS, "../blobs/12"), "model.safetensors is a link to ../blobs/12"),
}  # fmt: skip


def damage(folder: Path, how: Callable[[Path], object]) -> None:
    if how is DAMAGE["index: list"][0]:
        (folder / WEIGHTS).unlink()
    how(folder)


@pytest.mark.parametrize(("how", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_base_is_one_message(base, tmp_path, how, message):
    damage(base, how)
    refused(lambda: run_convert(base, tmp_path / "jai"), message, tmp_path)


@pytest.mark.parametrize(("how", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_jai_is_one_message_of_every_verb(dense, tmp_path, how, message):
    damage(dense, how)
    for run in JAI_VERBS.values():
        refused(lambda run=run: run(dense, tmp_path / "out"), message, tmp_path)


# --- What is unusual, and is read ---


def rename_weights(rename: Callable[[str], str], **added: torch.Tensor) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = {rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors | added, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def with_prefix(prefix: str) -> Callable[[Path], object]:
    return rename_weights(lambda name: prefix + name)


FREQUENCIES = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(6)}
LEFTOVERS = {
    "torch.compile": (with_prefix("_orig_mod."), r"begin with '_orig_mod\.', left there by torch.compile"),
    "DDP": (with_prefix("module."), r"begin with 'module\.', left there by DDP or FSDP"),
    "PEFT": (with_prefix("base_model.model."), r"begin with 'base_model\.model\.', left there by PEFT"),
    "both": (with_prefix("module._orig_mod."), r"begin with 'module\._orig_mod\.', left there by .* and "),
    "RoPE": (rename_weights(str, **FREQUENCIES), r"RoPE's buffers \(6: model\.layers\.0\..*inv_freq, "),
    "RoPE of transformers 4.4x": (
        rename_weights(str, **{"model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float16)}),
        r"RoPE's buffers \(1: model\.rotary_emb\.inv_freq, ",
    ),
}


@pytest.mark.parametrize(("change", "note"), LEFTOVERS.values(), ids=LEFTOVERS)
def test_leftovers_are_left_out_and_the_plan_says_so(whole_base, base, tmp_path, capsys, change, note):
    run_convert(whole_base, tmp_path / "plain")
    change(base)
    capsys.readouterr()
    run_convert(base, tmp_path / "jai", verify=True)
    assert re.search(note, " ".join(capsys.readouterr().out.split()))
    assert same_files(tmp_path / "plain", tmp_path / "jai", but=("provenance.json",))
    assert verify(str(base), tmp_path / "jai").same_function


@pytest.mark.parametrize("verb", JAI_VERBS)
def test_every_verb_leaves_out_leftovers(dense, tmp_path, capsys, verb):
    rename_weights(str)(dense)  # a merge keeps the order of its file
    JAI_VERBS[verb](dense, tmp_path / "plain")
    with_prefix("_orig_mod.")(dense)
    JAI_VERBS[verb](dense, tmp_path / "out")
    assert "begin with '_orig_mod.'" in capsys.readouterr().out
    if verb != "inspect":
        assert same_files(tmp_path / "plain", tmp_path / "out", but=("provenance.json",))


def test_models_of_unknown_architecture_keep_their_names(tmp_path):
    """`module.` may be a part of the model there."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"module.weight": torch.ones(3)}, tmp_path / name / WEIGHTS)
        (tmp_path / name / CONFIG).write_text('{"model_type": "unknown"}')
    merge(MergeOptions(models=[str(tmp_path / "a"), str(tmp_path / "b")], out=tmp_path / "out"))
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == {"module.weight"}


BIAS = {"model.layers.0.self_attn.qkv_proj.bias": torch.zeros(64)}
CAUSES = {
    "biases": (rename_weights(str, **BIAS), "qkv_proj.bias is unknown.*has biases, and neither phi-3 nor JAI has any"),
    "adapter": (
        rename_weights(lambda name: "base_model.model." + name.replace("o_proj.weight", "o_proj.base_layer.weight")),
        r"o_proj.base_layer.weight is unknown.*call `merge_and_unload\(\)`",
    ),
    "compiled inside": (
        rename_weights(lambda name: name.replace("model.", "model._orig_mod.")),
        r"torch.compile left '_orig_mod\.' in some names \(model\._orig_mod\.",
    ),
    "half a prefix": (
        rename_weights(lambda name: name if "lm_head" in name else f"module.{name}"),
        r"DDP or FSDP left 'module\.' in some names",
    ),
    "another": (rename_weights(lambda name: name.replace("norm", "layer_norm")), "Save it again with transformers"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CAUSES.values(), ids=CAUSES)
def test_weights_that_do_not_fit_name_the_cause(base, tmp_path, change, message):
    change(base)
    refused(lambda: run_convert(base, tmp_path / "jai"), message, tmp_path)


FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize("name", ["su", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_longrope_is_read_by_its_old_name(base, tmp_path, name, key):
    """As phi-3's first checkpoints spell it."""
    content = json.loads((base / CONFIG).read_text())
    del content["rope_parameters"]
    rope = {key: name, **FACTORS}
    content |= {"rope_scaling": rope, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    (base / CONFIG).write_text(json.dumps(content))
    run_convert(base, tmp_path / "jai")
    written = json.loads((tmp_path / "jai" / CONFIG).read_text())["rope_parameters"]
    assert written["rope_type"] == "longrope"
    assert {key: written[key] for key in FACTORS} == FACTORS
    assert verify(str(base), tmp_path / "jai").same_function


def test_a_checkpoint_of_links_is_read(whole_base, tmp_path):
    """As the Hub's cache has it: every file is a link to a blob."""
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(whole_base.iterdir())):
        shutil.copyfile(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number}")
    run_convert(tmp_path / "snapshots" / "abc", tmp_path / "linked")
    run_convert(whole_base, tmp_path / "plain")
    assert same_files(tmp_path / "plain", tmp_path / "linked", but=("provenance.json",))
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_named_chat_templates_come_along(base, dense, tmp_path):
    """transformers keeps them in a folder; every verb that copies a tokenizer copies them."""
    for folder in (base, dense):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }} with tools")
    run_convert(base, tmp_path / "convert")
    verbs = ("upcycle", "merge", "export")
    for verb in verbs:
        JAI_VERBS[verb](dense, tmp_path / verb)
    for out in ("convert", *verbs):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / out)
        assert tokenizer.get_chat_template("tools") == "{{ messages }} with tools"
        record = json.loads((tmp_path / out / "provenance.json").read_text())
        assert "additional_chat_templates/tools.jinja" in record["inputs"][0]["files"]


TOKENIZER_DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), ""),
    "list": (lambda path: path.write_text("[]"), ""),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a named pipe|is not a regular file"),
    "dangling": (lambda path: (path.unlink(), path.symlink_to("../blobs/1")), "is a link to|is not a regular file"),
}


@pytest.mark.parametrize(("how", "message"), TOKENIZER_DAMAGE.values(), ids=TOKENIZER_DAMAGE)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damage_beside_the_weights_is_found_before_they_are_written(base, dense, tmp_path, name, how, message):
    for folder in (base, dense):
        how(folder / name)
    said = name if name == "generation_config.json" else "tokenizer"
    refused(lambda: run_convert(base, tmp_path / "out"), f"{said}.*({message})", tmp_path)
    for verb in ("upcycle", "merge", "export"):
        refused(lambda verb=verb: JAI_VERBS[verb](dense, tmp_path / "out"), f"{name}.*{message}", tmp_path)


# --- What it takes ---


def test_conversion_imports_no_model(base, dense, tmp_path):
    """Nor what models import, which is 170 MB."""
    code = f"""
import sys
from jai.cli import main
for words in (
    ["convert", {str(base)!r}, "converted", "--block-size", "2", "--block-repeats", "1,2,1", "--tokenizer",
     {str(base)!r}, "--expert-init", "noise"],
    ["inspect", "converted"],
    ["merge", "merged", "--models", "converted", "converted"],
    ["upcycle", {str(dense)!r}, "upcycled", "--expert-init", "noise"],
    ["snapshot", {str(dense)!r}, "snapshot"],
    ["export", {str(dense)!r}, "exported", "--to", "phi3"],
):
    sys.argv = ["jai", *words]
    try:
        main()
    except SystemExit as exit_:
        assert not exit_.code, words
models = {{"jai.modeling_jai", "transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo"}}
print(sorted(models & sys.modules.keys()))
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory, tiny_phi3, whole_base) -> Path:
    """A phi-3 whose tokenizer has as many pieces as phi-3's, and as many merges: 32,000 and 60,000."""
    folder = tiny_phi3(tmp_path_factory.mktemp("large") / "phi3", vocab_size=32_064)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(whole_base / name, folder / name)
    content = json.loads((folder / "tokenizer.json").read_text())
    model = content["model"]
    vocab, free = model["vocab"], iter(range(max(token["id"] for token in content["added_tokens"]) + 1, 32_000))
    words = ("".join(letters) for length in (1, 2, 3, 4) for letters in product(string.ascii_lowercase, repeat=length))
    new = [(word, id_) for (word, id_) in zip((word for word in words if word not in vocab), free)]
    vocab |= dict(new)
    model["merges"] += [
        pair for word, _ in new for pair in ([word[:-1], word[-1]], [word[0], word[1:]]) if {*pair} <= vocab.keys()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "{base}", "out", "--block-size", "2", "--block-repeats", "1,2,1", "--tokenizer", "{base}"],
        ["merge", "out", "--models", "{base}", "{base}"],
    ],
    ids=["convert", "merge"],
)
def test_a_conversion_takes_at_most_300_mb(large_vocabulary, tmp_path, words):
    """250 are PyTorch with a configuration; a tokenizer that is read after PyTorch is imported adds 60."""
    assert peak_bytes([word.format(base=large_vocabulary) for word in words], tmp_path) < 300e6


@pytest.mark.slow
def test_what_is_computed_of_large_matrices_takes_at_most_300_mb(tiny_phi3, tmp_path):
    """Each matrix has more bytes than are read at a time; they took up to 304."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
    base = str(tiny_phi3(tmp_path / "base", dtype=torch.bfloat16, **shape))
    dense = ["convert", base, "dense", "--layers", "0-1", "--experts", "1"]
    lines = [
        dense,
        ["convert", base, "noise", "--layers", "0-1", "--experts", "2", "--expert-init", "noise"],
        ["convert", base, "wider", "--layers", "0-1", "--experts", "2", "--dtype", "float32"],
        ["upcycle", "dense", "upcycled", "--experts", "2", "--expert-init", "noise"],
        ["merge", "ties", "--models", *["dense"] * 4, "--base", "dense", "--method", "ties", "--dtype", "float32"],
    ]
    for words in lines:
        assert peak_bytes(words, tmp_path) < 300e6, words


def peak_bytes(words: list[str], folder: Path) -> int:
    """The most resident memory of `jai …`, run in a folder."""
    code = f"""
import sys
from jai.cli import main
sys.argv = ["jai", *{words!r}]
try:
    main()
except SystemExit as exit_:
    assert not exit_.code
# The largest that this program was; `ru_maxrss` is also the size of the process that started it.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return 1024 * int(finished.stdout.splitlines()[-1])


# --- Where the output lies ---


@pytest.mark.parametrize("inside", ["jai", "deeper/down/jai", "../base/jai", "link/jai"])
def test_an_output_inside_of_its_input_is_refused(base, tmp_path, inside):
    if inside.startswith("link"):
        (base / "link").symlink_to(base)
    with pytest.raises(UserError, match=r"The output .*jai is inside the input .*base\. Give a folder outside"):
        run_convert(base, base / inside)
    assert not (base / inside).exists()


def test_an_output_inside_of_its_tokenizer_is_refused(whole_base, base, tmp_path):
    with pytest.raises(UserError, match=r"is inside the input .*base\."):
        run_convert(whole_base, base / "jai", tokenizer=str(base))


def test_an_input_where_the_output_is_made_is_refused_and_kept(base, tmp_path):
    """What the journal does not name is removed there."""
    inside = work_folder(tmp_path / "jai") / "files" / "base"
    shutil.copytree(base, inside)
    before = {path.name: path.read_bytes() for path in inside.iterdir()}
    with pytest.raises(UserError, match=r"The input .*base lies where .*jai is made"):
        run_convert(inside, tmp_path / "jai")
    assert {path.name: path.read_bytes() for path in inside.iterdir()} == before


@pytest.mark.parametrize("verb", [verb for verb in JAI_VERBS if verb != "inspect"])
def test_every_verb_refuses_an_output_inside_of_its_input(dense, tmp_path, verb):
    refused(lambda: JAI_VERBS[verb](dense, dense / "out"), "is inside the input", dense)


def test_the_next_command_can_be_pasted(whole_base, tmp_path, capsys):
    out = tmp_path / "my models" / "jai"
    run_convert(whole_base, out)
    printed = capsys.readouterr().out.splitlines()
    command = next(line for line in printed if line.startswith("Next: "))
    assert shlex.split(command.removeprefix("Next: ")) == ["jai", "inspect", str(out)]

# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint was made from: the order of its steps, damaged records, and nothing of the machine in them."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

import jai
from jai.errors import UserError
from jai.provenance import (
    PROVENANCE_FILE,
    chain,
    checkpoint_revision,
    file_hashes,
    input_of,
    read_step,
    versions,
    write_step,
)


def made(step: str, *inputs: dict | None, **more) -> dict:
    """A step whose inputs were made by these steps."""
    entries = [input_of("model", f"lab/{number}", files={}, made_by=made_by) for number, made_by in enumerate(inputs)]
    return {"step": step, "inputs": entries, **more}


def names(step: dict | None) -> list[str]:
    return [f"{one['step']}{one.get('seed', '')}" for one in chain(step)]


# The chain


def test_a_line_is_listed_oldest_first():
    step = made("convert", None)
    for name in ("pretrain", "sft", "dpo"):
        step = made(name, step)
    assert names(step) == ["convert", "pretrain", "sft", "dpo"]
    assert chain(step)[-1] is step
    assert chain(None) == []


def test_of_a_tree_each_step_comes_once_and_after_what_it_needs():
    """Two seeds from one conversion are merged, and the merge is merged with the first seed."""
    start = made("convert", None)
    one, two = (made("sft", start, seed=seed) for seed in (1, 2))
    last = made("dpo", made("merge", made("merge", one, two), one))
    assert names(last) == ["convert", "sft1", "sft2", "merge", "merge", "dpo"]


def test_ancestors_are_shared_after_a_way_through_files(tmp_path):
    """Folders know nothing of each other: what they share is found by what is recorded."""
    convert, seeds, merged = tmp_path / "converted", [tmp_path / "1", tmp_path / "2"], tmp_path / "merged"
    for folder in (convert, *seeds, merged):
        folder.mkdir()
    base = input_of("base", "microsoft/Phi-3-mini-4k-instruct", files={"config.json": "ab"}, made_by=None)
    write_step(convert, {"step": "convert", "inputs": [base]})
    for seed, folder in enumerate(seeds):
        entry = input_of("model", convert, files={}, made_by=read_step(convert))
        write_step(folder, {"step": "sft", "inputs": [entry], "seed": seed})
    entries = [input_of("model", folder, files={}, made_by=read_step(folder)) for folder in (*seeds, convert)]
    write_step(merged, {"step": "merge", "inputs": entries})
    for folder in (convert, *seeds):
        (folder / PROVENANCE_FILE).unlink()
    assert names(read_step(merged)) == ["convert", "sft0", "sft1", "merge"]


# Inputs


def test_folders_are_named_by_their_last_part(tmp_path, monkeypatch):
    (tmp_path / "lab" / "jai").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "lab")
    for name in (tmp_path / "lab" / "jai", "jai", "./jai/", "../lab/jai", str(tmp_path / "is" / "gone" / "jai")):
        entry = input_of("base", name, files={}, made_by=None)
        assert (entry["name"], entry["is_hub_id"]) == ("jai", False), name
    assert input_of("base", ".", files={}, made_by=None)["name"] == "lab"
    monkeypatch.chdir(tmp_path)
    assert not input_of("base", "lab/jai", files={}, made_by=None)["is_hub_id"]  # the folder, as from_pretrained has it


def test_hub_ids_are_kept_whole():
    entry = input_of("snapshot", "lab/jai", files={"model.safetensors": "ab"}, made_by=None)
    expected = {"name": "lab/jai", "is_hub_id": True, "files": {"model.safetensors": "ab"}, "made_by": None}
    assert entry == {"role": "snapshot", **expected}


def test_hashes_are_those_of_the_files(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_text(name * 1000)
    expected = {name: hashlib.sha256(name.encode() * 1000).hexdigest() for name in ("a", "b")}
    assert list(file_hashes([tmp_path / "b", tmp_path / "a"]).items()) == list(expected.items())


def test_versions():
    found = versions("torch", "transformers")
    assert list(found) == ["jai-llm", "python", "torch", "transformers"]
    assert found["jai-llm"] == jai.__version__
    assert found["python"] == sys.version.split()[0]


# What is written


def test_no_folder_of_the_machine_and_no_token_is_written(tmp_path):
    token = "hf_" + "aB3" * 11
    step = {
        "step": "merge",
        "inputs": [input_of("model", tmp_path / "a", files={"/home/me/a/model.safetensors": "ab"}, made_by=None)],
        "options": {
            "out": tmp_path / "out",
            "models": ["/home/me/a", "~/b", "../me/c", "./d", "C:\\Users\\me\\e", "lab/f"],
            "weights": {"/home/me/a": 0.5},
            "token": token,
        },
        "result": {"pieces": ["/", "//", "~", "ก/ข"], "loss": 1.5, "nothing": None},
    }
    write_step(tmp_path, step)
    text = (tmp_path / PROVENANCE_FILE).read_text(encoding="utf-8")
    assert "/me/" not in text
    assert str(tmp_path) not in text
    assert token not in text
    read = read_step(tmp_path)
    assert list(read["inputs"][0]["files"]) == ["model.safetensors"]
    assert read["options"]["out"] == "out"
    assert read["options"]["models"] == ["a", "b", "c", "d", "e", "lab/f"]
    assert read["options"]["weights"] == {"a": 0.5}
    assert read["result"] == step["result"]
    assert "ก/ข" in text  # to be read by people


# What is read


def test_a_folder_without_a_record(tmp_path):
    assert read_step(tmp_path) is None


GOOD = {"role": "base", "name": "x", "is_hub_id": False, "files": {}, "made_by": None}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "names no step"),
        ({"inputs": []}, "names no step"),
        ({"step": "sft"}, "'sft' has no list of inputs"),
        ({"step": "sft", "inputs": {}}, "'sft' has no list of inputs"),
        ({"step": "sft", "inputs": [], "log_history": 1}, "'log_history' of its step 'sft'"),
        ({"step": "sft", "inputs": [], "options": []}, "'options' of its step 'sft' is not a mapping"),
        ({"step": "sft", "inputs": [], "metrics": None}, "'metrics' of its step 'sft' is not a mapping"),
        *[
            ({"step": "sft", "inputs": [{name: value for name, value in GOOD.items() if name != lost}]}, "lacks role")
            for lost in GOOD
        ],
        ({"step": "sft", "inputs": ["x"]}, "lacks role"),
        ({"step": "merge", "inputs": [GOOD, GOOD | {"made_by": {"step": "sft"}}]}, "'sft' has no list of inputs"),
        ({"step": "merge", "inputs": [GOOD, GOOD | {"made_by": "sft"}]}, "names no step"),
    ],
)
def test_damaged_records_are_refused(record, message, tmp_path):
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"{PROVENANCE_FILE} is not a record.*{message}.*Fetch the checkpoint again"):
        read_step(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step": "sft"', "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "holds a list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"step": "sft", "inputs": [{"made_by": ' * 5_000, "nested too deeply"),
        (b'{"step": "sft", "inputs": [{"made_by": ' * 300 + b"0" + b"}]}" * 300, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(content, message, tmp_path):
    (tmp_path / PROVENANCE_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{PROVENANCE_FILE} .*{message}.* Fetch the checkpoint again"):
        read_step(tmp_path)


def test_a_record_by_others_keeps_no_paths_either(tmp_path):
    entry = GOOD | {"name": "/home/me/jai"}
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps({"step": "sft", "inputs": [entry], "notes": ["~/x"]}))
    assert read_step(tmp_path) == {"step": "sft", "inputs": [GOOD | {"name": "jai"}], "notes": ["x"]}


def test_keys_of_later_versions_are_kept(tmp_path: Path):
    step = {"step": "distil", "inputs": [GOOD | {"commit": "abc"}], "teacher": "x"}
    write_step(tmp_path, step)
    assert read_step(tmp_path) == step


# What tells one checkpoint from another


def test_a_look_at_pieces_of_the_weights_tells_trainings_apart_and_reads_no_more(tmp_path):
    weights = tmp_path / "model.safetensors"
    content = bytearray(range(256)) * 4096  # 1 MiB, of which a quarter is looked at
    weights.write_bytes(content)

    def looks() -> tuple[str, str]:
        return tuple(checkpoint_revision(str(tmp_path), reads_weights=whole) for whole in (True, False))

    first = looks()
    weights.touch()  # as a copy has another time
    assert looks() == first
    content[-1] ^= 1
    weights.write_bytes(content)
    assert all(now != before for now, before in zip(looks(), first, strict=True))
    content[-1] ^= 1
    content[4096 + 100] ^= 1  # between two pieces: only the whole tells
    weights.write_bytes(content)
    whole, pieces = looks()
    assert whole != first[0]
    assert pieces == first[1]
    weights.write_bytes(content + b"x")
    assert looks()[1] != first[1]

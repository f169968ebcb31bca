# SPDX-License-Identifier: Apache-2.0
"""Files as they come: whatever is wrong with one, it is one message, at once."""

import io
import json
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from jai.errors import UserError
from jai.files import (
    check_is_file,
    from_json,
    new_folder,
    print_next,
    read_json,
    read_text,
    resumable_folder,
    write_whole,
)
from jai.hub import is_hub_id


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("blobs/1234")


# What may stand in the place of a file, and what the message calls it.
NO_FILES = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (make_folder, "is a folder, not a file"),
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "dangling link": (make_link_to_nothing, "is a link to blobs/1234, which cannot be followed"),
    "circular link": (make_link_to_itself, "is a link to config.json, which cannot be followed"),
}
NO_JSON_OBJECTS = {
    "empty": (b"", "is not valid JSON"),
    "cut": (b'{"a": [1, 2', "is not valid JSON"),
    "deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "binary": (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
    "list": (b"[]", "holds a list, where a JSON object"),
    "text": (b'"a"', "holds a string"),
    "number": (b"1.5", "holds a number"),
    "truth": (b"true", "holds true or false"),
    "null": (b"null", "holds null"),
}


@pytest.mark.parametrize(("make", "message"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, make, message):
    path = tmp_path / "config.json"
    make(path)
    for read in (check_is_file, read_json):
        with pytest.raises(UserError, match=f"config.json {message}.*What to do"):
            read(path, "What to do.")
    with pytest.raises(UserError, match=f"config.json {message}.*Give a UTF-8 text file"):
        read_text(path)


@pytest.mark.parametrize(("content", "message"), NO_JSON_OBJECTS.values(), ids=NO_JSON_OBJECTS)
def test_what_is_no_json_object_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.*Fetch or save it again"):
        read_json(tmp_path / "config.json")


@dataclass(frozen=True)
class Leaf:
    share: float
    kind: Literal["a", "b"] = "a"
    most: int | None = None


@dataclass(frozen=True)
class Tree:
    name: str
    whole: bool = False
    pair: tuple[Leaf, ...] = ()
    by_name: dict[str, list[Leaf]] = field(default_factory=dict)
    free: Any = None


def test_a_dataclass_comes_back_from_json():
    tree = Tree("t", True, (Leaf(0.5), Leaf(1.0, "b", 3)), {"x": [Leaf(2.0)]}, {"any": [1]})
    content = json.loads(json.dumps(asdict(tree)))
    assert from_json(Tree, content) == tree
    content["pair"][0]["share"] = 1  # an integer is a number, too
    assert type(from_json(Tree, content).pair[0].share) is float


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "name"),
        ({"name": None}, "'name' is null"),
        ({"name": "t", "whole": 1}, "'whole' is a number"),
        ({"name": "t", "pair": {}}, "'pair' is an object"),
        ({"name": "t", "pair": [{"share": True}]}, "'share' is true or false"),
        ({"name": "t", "pair": [{"share": 10**400}]}, "'share' is a number"),
        ({"name": "t", "pair": [{"share": 1.0, "kind": "c"}]}, "'kind' is a string"),
        ({"name": "t", "pair": [{"share": 1.0, "most": 1.5}]}, "'most' is a number"),
        ({"name": "t", "by_name": {"x": [[]]}}, "an element of 'x' of 'by_name' is a list"),
        ({"name": "t", "more": 1}, "unknown field 'more'"),
        ([], "it is a list"),
    ],
)
def test_json_of_another_kind_is_no_dataclass(content, message):
    with pytest.raises(TypeError, match=message):
        from_json(Tree, content)


def test_json_is_read_through_links(tmp_path):
    """The Hub's cache has links to blobs."""
    (tmp_path / "blob").write_text(json.dumps({"ภาษา": ["ไทย", None]}), encoding="utf-8")
    (tmp_path / "config.json").symlink_to("blob")
    check_is_file(tmp_path / "config.json")
    assert read_json(tmp_path / "config.json") == {"ภาษา": ["ไทย", None]}


@pytest.mark.parametrize("name", ["plain", "with space", "it's [bold]", "ไทย", "$HOME;ls"])
def test_next_commands_can_be_pasted(name):
    """Whatever a folder is called, and however narrow the terminal."""
    output = io.StringIO()
    words = [["jai", "inspect", Path("/models") / name], ["jai", "generate", Path("/models") / name, "…"]]
    print_next(Console(file=output, width=20), *words)
    first, second = output.getvalue().splitlines()
    assert shlex.split(first.removeprefix("Next: ")) == [str(word) for word in words[0]]
    assert shlex.split(second) == [str(word) for word in words[1]]


@pytest.mark.parametrize("make", [new_folder, lambda out: resumable_folder(out, {})], ids=["new", "resumable"])
def test_ctrl_c_says_that_nothing_was_kept_where_nothing_was(tmp_path, capsys, make):
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert "Nothing was kept." in capsys.readouterr().err


@pytest.mark.parametrize("make", [new_folder, lambda out: resumable_folder(out, {})], ids=["new", "resumable"])
@pytest.mark.parametrize("target", ["nowhere", "empty"])
def test_an_output_that_is_a_link_is_refused_before_the_work(tmp_path, make, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(UserError, match=f"out is a link to {target}"), make(tmp_path / "out"):
        pytest.fail("it began")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "out"}


@pytest.mark.parametrize("make", [new_folder, lambda out: resumable_folder(out, {})], ids=["new", "resumable"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space"), Exception("No space left on device (os error 28)"), ValueError("os error 28")]
)
def test_a_full_disk_is_one_error_whoever_writes(tmp_path, make, error):
    """tokenizers and safetensors, which are written in Rust, raise no OSError."""
    is_full = not isinstance(error, ValueError)
    expected = pytest.raises(UserError, match=r"Could not write .*out: No space left on device. Free some space")
    with expected if is_full else pytest.raises(ValueError, match="os error 28"), make(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_text_is_read_whatever_program_saved_it(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffไทย\r\n".encode())
    assert read_text(tmp_path / "text.txt") == "ไทย\n"
    (tmp_path / "text.txt").write_bytes("ไทย".encode("utf-16"))
    with pytest.raises(UserError, match=r"text.txt is not UTF-8 \(byte 0\). Save it as UTF-8"):
        read_text(tmp_path / "text.txt")


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "new \ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@given(st.text(alphabet="aZ09_-./é ก\n", max_size=12) | st.text(max_size=8))
@example("a" * 96)
@example("a" * 97)
@example("a" * 96 + "/" + "b" * 96)
@example("owner/name.git")
@example("owner.git/name")
@example("a--b/c")
@example("owner/name\n")
@example("")
def test_hub_ids_are_those_of_the_hubs_client(name):
    """Which rules the pattern has, so that a wrong name is refused without the client."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_hub_id(name)
    else:
        assert is_hub_id(name)

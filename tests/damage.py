# SPDX-License-Identifier: Apache-2.0
"""Ways in which files go wrong, as Hypothesis strategies. A damage says what it is and can be laid on any copy."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

# What no key expects, or what only some do.
VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, "", "x", "\0", "../x", "/", "\ud800", "[bold", "ก", "x" * 5000),
    *(0, 1, 2, 3, 7, 16, 64, -1, 0.5, 1.0, -0.0, 1e-300, 1e300, math.inf, -math.inf, math.nan),
    *(10_001, 2**31, 2**32 + 1, 2**63, 2**64, 10**30),
    *([None], ["x"], [[]], [1, 2], [-1], [2**31], {"x": None}, {"": {}}, {"rope_type": "default"}),
    *("silu", "float16", "float64", "auto", "torch", "model.safetensors", "phi3", "jai", "default", "longrope"),
)
# Data of weights that no weight has.
NOT_FINITE = {
    "F32": (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F800000, 0xFF800000),
    "BF16": (0x7FC0, 0xFFC0, 0x7F81, 0x7F80, 0xFF80),
}


@dataclass(frozen=True)
class Damage:
    """One file of a folder, made wrong.

    Attributes:
        file: path within the folder.
        what: what was done, for people.
        content: its bytes; None where there is no file any more.
        kind: "folder", "pipe" or "link" puts that in the file's place.
    """

    file: str
    what: str
    content: bytes | None = None
    kind: str = ""

    def __repr__(self) -> str:
        return f"<{self.file}: {self.what}>"

    def lay_on(self, folder: Path) -> None:
        path = folder / self.file
        path.unlink(missing_ok=True)  # the copy's files may be hard links
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.content is not None:
            path.write_bytes(self.content)
        elif self.kind == "folder":
            path.mkdir()
        elif self.kind == "pipe":
            os.mkfifo(path)
        elif self.kind == "link":
            path.symlink_to(path.name)


def hard_linked(folder: Path, to: Path) -> Path:
    """A copy of a folder that takes no time; whoever changes a file in it must remove it first."""
    return Path(shutil.copytree(folder, to, copy_function=os.link))


def damages(folder: Path) -> st.SearchStrategy[Damage]:
    """Damages of a folder's files, each file as often as another."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return st.sampled_from(files).flatmap(lambda file: damages_of(file, (folder / file).read_bytes()))


def damages_of(file: str, content: bytes) -> st.SearchStrategy[Damage]:
    """Damages of one file, by its kind."""
    places = [Damage(file, "gone"), *(Damage(file, f"is a {kind}", kind=kind) for kind in ("folder", "pipe", "link"))]
    structured = _json_damages
    if file.endswith(".safetensors"):
        structured = _safetensors_damages
    elif file.endswith(".jsonl"):
        structured = _row_damages
    elif file.endswith(".yaml"):
        structured = _yaml_damages
    elif not file.endswith(".json"):
        structured = _byte_damages
    # Of ten, six by structure, three by bytes, one by place.
    kinds = [structured] * 6 + [_byte_damages] * 3
    return st.one_of(*(kind(file, content) for kind in kinds), st.sampled_from(places))


# --- Bytes ---


@st.composite
def _byte_damages(draw: st.DrawFn, file: str, content: bytes) -> Damage:
    at = draw(st.integers(0, max(0, len(content) - 1)))
    what, changed = draw(
        st.sampled_from(
            [
                ("cut", content[:at]),
                ("empty", b""),
                ("ends twice", content + content[at:]),
                ("begins later", content[at:]),
                ("zeros", content[:at] + bytes(len(content) - at)),
                ("a byte order mark", b"\xef\xbb\xbf" + content),
                ("in UTF-16", content.decode("latin-1").encode("utf-16")),
                ("a line more", content + b"\n"),
                ("a zero more", content + b"\0"),
                ("nested", b"[" * 100_000),
                ("nested in an object", b'{"a":' * 100_000),
                ("a long number", b"9" * 5000),
                ("not UTF-8", content[:at] + b"\xff" + content[at:]),
                *((f"byte {value:#x}", content[:at] + bytes([value]) + content[at + 1 :]) for value in b'\0"{}[]:,-e9'),
                *(
                    (f"bit {bit}", content[:at] + bytes([b ^ 1 << bit]) + content[at + 1 :])
                    for b in content[at : at + 1]
                    for bit in range(8)
                ),
            ]
        )
    )
    return Damage(file, f"{what} at {at}", changed)


# --- JSON ---


def _json_damages(file: str, content: bytes) -> st.SearchStrategy[Damage]:
    return changed_objects(json.loads(content)).map(
        lambda change: Damage(file, change[0], json.dumps(change[1], ensure_ascii=True).encode())
    )


def _yaml_damages(file: str, content: bytes) -> st.SearchStrategy[Damage]:
    return changed_objects(yaml.safe_load(content)).map(
        lambda change: Damage(file, change[0], yaml.safe_dump(change[1]).encode(errors="surrogatepass"))
    )


def _row_damages(file: str, content: bytes) -> st.SearchStrategy[Damage]:
    return changed_rows([json.loads(line) for line in content.splitlines()]).map(
        lambda change: Damage(file, change[0], change[1])
    )


def changed_rows(rows: list[Any]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Lines of JSON with one or two places changed: (what was done, the file)."""

    def lines(change: tuple[str, Any]) -> tuple[str, bytes]:
        text, changed = change
        each = changed if isinstance(changed, list) else [changed]
        return text, "".join(f"{json.dumps(row)}\n" for row in each).encode()

    return changed_objects(rows).map(lines)


@st.composite
def changed_objects(draw: st.DrawFn, content: Any, values: tuple[Any, ...] = VALUES) -> tuple[str, Any]:
    """JSON with one or two of its places changed: (what was done, the whole)."""
    texts = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        # Near the top lie the keys that matter, and far below the thousands of a vocabulary.
        depth = draw(st.integers(0, 4))
        places = [place for place in _places(content) if len(place) <= depth] or [()]
        place = draw(st.sampled_from(places))
        text, change = draw(_changes(_at(content, place), values))
        content = _with(content, place, change)
        texts.append(f"{'.'.join(map(str, place))} {text}")
    return "; ".join(texts), content


_GONE = object()


@st.composite
def _changes(draw: st.DrawFn, old: Any, values: tuple[Any, ...]) -> tuple[str, Any]:
    kind = draw(st.sampled_from(["value", "value", "relative", "gone", "more"]))
    if kind == "gone":
        return "gone", _GONE
    if kind == "more" and isinstance(old, dict):
        name, value = draw(st.sampled_from([*map(str, old), "x", "__metadata__", ""])), draw(st.sampled_from(values))
        return f"with {name!r}: {value!r}", {**old, f"{name}_": value, name: old.get(name, value)}
    if kind == "more" and isinstance(old, list):
        return "longer", [*old, *(old[-1:] or [draw(st.sampled_from(values))])]
    if kind == "relative":
        return "from its own", draw(st.sampled_from(_relatives(old)))
    value = draw(st.sampled_from(values))
    return f"= {repr(value)[:40]}", value


def _relatives(old: Any) -> list[Any]:
    """Values that look like the old one."""
    if isinstance(old, int | float) and not isinstance(old, bool):
        return [old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old), [old], old * 1000]
    if isinstance(old, str):
        return [old + " ", old.upper(), old[:-1], [old], {"value": old}, old * 2]
    if isinstance(old, list):
        return [old[:-1], old[::-1], old * 2, [old], dict(enumerate(map(repr, old)))]
    if isinstance(old, dict):
        return [list(old), list(old.values()), [old], {}, {name: name for name in old}]
    return [str(old), not old, [old]]


def _places(content: Any) -> Iterator[tuple]:
    yield ()
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from ((key, *rest) for rest in _places(value))


def _at(content: Any, place: tuple) -> Any:
    for key in place:
        content = content[key]
    return content


def _with(content: Any, place: tuple, new: Any) -> Any:
    if not place:
        return {} if new is _GONE else new
    key, rest = place[0], place[1:]
    if not rest and new is _GONE:
        if isinstance(content, list):
            return [*content[:key], *content[key + 1 :]]
        return {name: value for name, value in content.items() if name != key}
    changed = content.copy()
    changed[key] = _with(content[key], rest, new)
    return changed


# --- Safetensors ---


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: str | dict[str, Any], data: bytes) -> bytes:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@st.composite
def _safetensors_damages(draw: st.DrawFn, file: str, content: bytes) -> Damage:
    header, data = split_safetensors(content)
    tensors = sorted(name for name in header if name != "__metadata__")
    name, other = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
    what, change = draw(st.sampled_from(_SAFETENSORS_CHANGES))
    return Damage(file, f"{name} {what} ({other})", change(draw, header, data, name, other))


def _any_json(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    return join_safetensors(draw(changed_objects(header))[1], data)


def _entry(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    return join_safetensors({**header, name: draw(changed_objects(header[name]))[1]}, data)


def _dtype(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    dtype = draw(st.sampled_from(["F64", "F16", "BF16", "I8", "I32", "I64", "BOOL", "F8_E4M3", "U8", "f32", "C64"]))
    entry = {**header[name], "dtype": dtype}
    if draw(st.booleans()):  # a shape whose bytes are the same
        *rest, last = entry["shape"]
        entry["shape"] = [*rest, last * 2] if dtype in ("F16", "BF16") else [*rest, last, 4]
    return join_safetensors({**header, name: entry}, data)


def _overlap(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    return join_safetensors({**header, name: {**header[name], "data_offsets": header[other]["data_offsets"]}}, data)


def _swapped(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    return join_safetensors({**header, name: header[other], other: header[name]}, data)


def _transposed(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    shape = draw(
        st.sampled_from(
            [header[name]["shape"][::-1], [math.prod(header[name]["shape"])], [1, *header[name]["shape"]], [0], []]
        )
    )
    return join_safetensors({**header, name: {**header[name], "shape": shape}}, data)


def _renamed(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    new = draw(
        st.sampled_from(
            [
                f"_orig_mod.{name}",
                f"module.{name}",
                name.upper(),
                "",
                "lm_head.weight",
                f"{name}\ud800",
                f"{name}.bias",
                name.replace("0", "00", 1),
                name.replace("0", "9", 1),
            ]
        )
    )
    return join_safetensors({new if key == name else key: entry for key, entry in header.items()}, data)


def _all_renamed(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    prefix = draw(st.sampled_from(["_orig_mod.", "module.", "base_model.model.", "model.", "\0", "x/"]))
    return join_safetensors({key if key == "__metadata__" else prefix + key: header[key] for key in header}, data)


def _twice(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    return join_safetensors(f"{{{json.dumps(name)}: {json.dumps(header[other])}, {json.dumps(header)[1:]}", data)


def _without(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    kept, body = {}, b""
    for key, entry in header.items():
        if key not in (name, "__metadata__"):
            start, stop = entry["data_offsets"]
            kept[key] = {**entry, "data_offsets": [len(body), len(body) + stop - start]}
            body += data[start:stop]
    return join_safetensors(kept, body)


def _with_more(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    new = draw(
        st.sampled_from(["x", "lm_head.weight", "model.rotary_emb.inv_freq", "model.layers.99.mlp.x", f"{name}.bias"])
    )
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    return join_safetensors({**header, new: entry}, data + struct.pack("<2f", 1.0, 2.0))


def _hole(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    at = header[name]["data_offsets"][0]
    moved = {
        key: entry
        if key == "__metadata__" or entry["data_offsets"][0] < at
        else {**entry, "data_offsets": [offset + 4 for offset in entry["data_offsets"]]}
        for key, entry in header.items()
    }
    return join_safetensors(moved, data[:at] + b"hole" + data[at:])


def _length(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    whole = join_safetensors(header, data)
    length = draw(st.sampled_from([0, 1, 2, len(whole) - 9, len(whole) - 8, len(whole), 2**31, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + whole[8:]


def _not_finite(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    entry = header[name]
    bits = draw(st.sampled_from(NOT_FINITE[entry["dtype"]]))
    width = 4 if entry["dtype"] == "F32" else 2
    start, stop = entry["data_offsets"]
    at = start + width * draw(st.integers(0, (stop - start) // width - 1))
    return join_safetensors(header, data[:at] + bits.to_bytes(width, "little") + data[at + width :])


def _largest(draw: st.DrawFn, header: dict, data: bytes, name: str, other: str) -> bytes:
    """All values are the largest that there is: finite, and whatever is computed with them is not."""
    width = 4 if header[name]["dtype"] == "F32" else 2
    bits = {4: 0x7F7FFFFF, 2: 0x7F7F}[width] | draw(st.sampled_from([0, 1 << (8 * width - 1)]))
    start, stop = header[name]["data_offsets"]
    return join_safetensors(
        header, data[:start] + bits.to_bytes(width, "little") * ((stop - start) // width) + data[stop:]
    )


_SAFETENSORS_CHANGES: list[tuple[str, Callable[..., bytes]]] = [
    ("any place of the header", _any_json),
    ("its entry", _entry),
    ("another dtype", _dtype),
    ("shares bytes", _overlap),
    ("swapped", _swapped),
    ("another shape", _transposed),
    ("renamed", _renamed),
    ("all renamed", _all_renamed),
    ("given twice", _twice),
    ("left out", _without),
    ("and one more", _with_more),
    ("a hole before it", _hole),
    ("another length of the header", _length),
    ("NaN or infinity", _not_finite),
    ("the largest values", _largest),
]

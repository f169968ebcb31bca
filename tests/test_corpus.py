# SPDX-License-Identifier: Apache-2.0
"""Text to learn from: every kind of file, folders, a Hub dataset, the sample, and what cannot be read."""

import codecs
import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_hub import DatasetHub
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from jai import cli
from jai.errors import UserError
from jai.files import parse_size
from jai.tokenization import corpus
from jai.tokenization.corpus import Document, TextFile, draw_sample, open_sources, sample_table
from jai.tokenization.loading import RECORD_FILE
from jai.tokenization.options import TrainTokenizerOptions
from jai.tokenization.phi3_style import train_phi3_style
from jai.tokenization.train import train_tokenizer

# Ends of line of every kind, separators that are none, and what normalisation or stripping would change.
EXACT = (
    "สวัสดีครับ\r\nบรรทัดที่สอง\rสาม\n\n",
    "a\u2028b\u2029c\x85d\x0ce\x1cf",
    " ํ า  ",
    "\ufeffinside \ufeff",
    "😀\x00\t",
    "",
)
THAI = ("สวัสดีครับ ผมชื่อสมชาย", "น้ำในแม่น้ำใสมาก ปลาก็ว่ายน้ำอยู่ในน้ำ", "กินข้าวหรือยัง กินข้าวแล้ว", "อยู่ที่กรุงเทพมหานคร อยู่ที่เชียงใหม่")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def write(path: Path, texts) -> Path:
    """Write a file of the kind that its ending says; a .txt file takes one text."""
    rows = "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"n": range(len(texts)), "text": list(texts)}), path, row_group_size=2)
    elif path.suffix == ".txt":
        (text,) = texts
        path.write_bytes(text.encode())
    else:
        path.write_bytes(gzip.compress(rows) if path.suffix == ".gz" else rows)
    return path


def train(texts, base: str | Path, out: Path, vocab_size: int, **options) -> Path:
    return train_tokenizer(
        TrainTokenizerOptions(text=[*map(str, texts)], base=str(base), out=out, vocab_size=vocab_size, **options)
    )


def read(*texts) -> list[str]:
    return [document.text for source in open_sources(texts) for part in source.parts for document in part.read()]


def sample(*texts, limit: int = 10**9, seed: int = 0) -> list[str]:
    return list(draw_sample(open_sources(texts), limit, seed))


class TestReading:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_rows_are_kept_exactly(self, tmp_path, suffix):
        assert read(write(tmp_path / f"a{suffix}", EXACT)) == list(EXACT)

    @pytest.mark.parametrize("text", EXACT[:-1])
    def test_txt_is_one_document_kept_exactly(self, tmp_path, text):
        if text.startswith("\ufeff"):
            (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # the first one is the mark
        else:
            write(tmp_path / "a.txt", [text])
        assert read(tmp_path / "a.txt") == [text]

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz"])
    def test_byte_order_mark_is_dropped(self, tmp_path, suffix):
        path = write(tmp_path / f"a{suffix}", ["สวัสดี"])
        content = path.read_bytes()
        if suffix.endswith(".gz"):
            path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + gzip.decompress(content)))
        else:
            path.write_bytes(b"\xef\xbb\xbf" + content)
        assert read(path) == ["สวัสดี"]

    def test_endings_in_capitals_and_gzips_in_members(self, tmp_path):
        packed = b"".join(gzip.compress(json.dumps({"text": text}).encode() + b"\n\n") for text in THAI)
        (tmp_path / "A.JSONL.GZ").write_bytes(packed)
        assert read(tmp_path / "A.JSONL.GZ") == list(THAI)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(st.sampled_from("aก😀 \n\r\u2028"), min_size=1, max_size=80))
    def test_large_txt_comes_in_pieces_that_make_the_whole(self, tmp_path, monkeypatch, text):
        monkeypatch.setattr(corpus, "_PIECE", 8)
        pieces = read(write(tmp_path / "a.txt", [text]))
        assert "".join(pieces) == text
        assert all(pieces)
        assert all(piece.endswith("\n") for piece in pieces[:-1] if "\n" in piece)

    def test_pieces_end_at_line_ends_or_else_at_spaces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus, "_PIECE", 8)
        assert read(write(tmp_path / "a.txt", ["ab\r\ncd ef\nghi\r\n"])) == ["ab\r\n", "cd ef\nghi\r\n"]
        assert read(write(tmp_path / "a.txt", ["abc def ghi jkl"])) == ["abc def ", "ghi jkl"]
        assert read(write(tmp_path / "a.txt", ["ก" * 20])) == ["ก" * 8, "ก" * 8, "ก" * 4]

    def test_source_of_a_document(self, tmp_path):
        rows = [{"text": THAI[0], "source": "law"}, {"text": THAI[1], "source": 7}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        pq.write_table(pa.table({"text": THAI[:2], "source": ["law", None]}), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.parquet"):
            (source,) = open_sources([tmp_path / name])
            assert list(source.parts[0].read()) == [Document(THAI[0], "law"), Document(THAI[1], None)]

    def test_parquet_takes_large_strings_and_leaves_other_columns_alone(self, tmp_path):
        table = pa.table(
            {"bad": [b"\xff"] * 4, "text": pa.array(THAI, pa.large_string()), "more": [[1], [], None, [2]]}
        )
        pq.write_table(table, tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == list(THAI)

    def test_memory_is_bounded(self, tmp_path):
        """48 MB of text a file, in one row group of the parquet and one line of the .txt; the sample is 2 MB."""
        rng = random.Random(0)
        texts = ["".join(rng.choices("abcdefgh ", k=2000)) for _ in range(100)] * 240
        write(tmp_path / "a.txt", ["".join(texts)])
        write(tmp_path / "a.jsonl", texts)
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10**6, use_dictionary=False)
        code = (
            "import re, sys, pyarrow.parquet\n"
            "from jai.tokenization.corpus import draw_sample, open_sources\n"
            "def kilobytes(key):\n"
            "    return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "for name in sys.argv[1:]:\n"
            "    open('/proc/self/clear_refs', 'w').write('5')  # the peak begins anew\n"
            "    before = kilobytes('VmRSS')\n"
            "    print(sum(map(len, draw_sample(open_sources([name]), 2_000_000))), kilobytes('VmHWM') - before)"
        )
        names = [tmp_path / f"a{suffix}" for suffix in (".txt", ".jsonl", ".parquet")]
        run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        for line in run.stdout.splitlines():
            size, grown = map(int, line.split())
            assert 900_000 < size <= 2_000_000
            assert grown < 32_000


class TestFolders:
    def test_files_are_found_sorted_and_the_rest_is_counted(self, tmp_path):
        folder = tmp_path / "corpus"
        for name in ("b.jsonl", "a/z.txt", "a/b/c.parquet", ".git/x.txt", "a/.hidden.txt", "notes.md", "a/d.csv"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, [name]) if path.suffix in (".jsonl", ".txt", ".parquet") else path.touch()
        (tmp_path / "elsewhere").mkdir()
        write(tmp_path / "elsewhere" / "far.jsonl", THAI)
        (folder / "a" / "linked").symlink_to(tmp_path / "elsewhere")
        (folder / "round").symlink_to(folder)
        (source,) = open_sources([folder])
        assert [part.name for part in source.parts] == ["corpus/a/b/c.parquet", "corpus/a/z.txt", "corpus/b.jsonl"]
        assert source.left_out == 6
        assert read(folder) == ["a/b/c.parquet", "a/z.txt", "b.jsonl"]
        assert "3 files" in source.describe()
        assert "6 hidden, with other endings or links to folders left out" in source.describe()

    def test_a_path_that_exists_wins_over_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("owner/name").mkdir(parents=True)
        write(Path("owner/name/a.jsonl"), THAI)
        assert read("owner/name") == list(THAI)

    @pytest.mark.parametrize("names", [["a", "a"], ["a", "a/b.txt"], ["a/b.txt", "a/b.txt"]])
    def test_given_twice(self, tmp_path, monkeypatch, names):
        monkeypatch.chdir(tmp_path)
        Path("a").mkdir()
        write(Path("a/b.txt"), ["x"])
        with pytest.raises(UserError, match=r"a/b.txt is given twice"):
            open_sources(names)


class TestSample:
    @pytest.fixture
    def documents(self) -> list[str]:
        rng = random.Random(1)
        return [f"{n} " + "ก" * rng.randrange(5, 400) for n in range(3000)]

    def test_the_whole_where_it_fits(self, tmp_path, documents):
        write(tmp_path / "a.jsonl", documents)
        size = sum(len(text.encode()) for text in documents)
        sources = open_sources([tmp_path / "a.jsonl"])
        assert sorted(draw_sample(sources, size)) == sorted(documents)
        figures = sources[0].figures
        assert (figures.found.documents, figures.found.bytes) == (3000, size)
        assert figures.sampled == figures.found
        assert len(sample(tmp_path / "a.jsonl", limit=size - 1)) < 3000

    def test_as_much_as_fits_and_no_more(self, tmp_path, documents):
        write(tmp_path / "a.jsonl", documents)
        longest = max(len(text.encode()) for text in documents)
        for limit in (5_000, 50_000, 500_000):
            size = sum(len(text.encode()) for text in sample(tmp_path / "a.jsonl", limit=limit))
            assert limit - longest < size <= limit

    def test_is_the_same_in_any_order_and_any_files(self, tmp_path, documents):
        write(tmp_path / "one.jsonl", documents)
        expected = sample(tmp_path / "one.jsonl", limit=90_000)
        shuffled = random.Random(2).sample(documents, len(documents))
        (tmp_path / "many").mkdir()
        for i, suffix in enumerate(SUFFIXES):
            write(tmp_path / "many" / f"{i}{suffix}", shuffled[i::3])
        assert sample(tmp_path / "many", limit=90_000) == expected
        assert sample(tmp_path / "many" / "2.parquet", *sorted((tmp_path / "many").glob("*l*"))[:2], limit=90_000)
        assert sample(tmp_path / "one.jsonl", limit=90_000, seed=1) != expected

    def test_a_smaller_sample_is_part_of_a_larger_one(self, tmp_path, documents):
        write(tmp_path / "a.jsonl", documents)
        small, large = (sample(tmp_path / "a.jsonl", limit=limit) for limit in (30_000, 300_000))
        assert small == large[: len(small)]

    def test_every_document_has_the_same_chance(self, tmp_path, documents):
        """Position in the file, length, file: the share sampled is the same to within five standard deviations."""
        half = len(documents) // 2
        files = [write(tmp_path / "a.jsonl", documents[:half]), write(tmp_path / "b.parquet", documents[half:])]
        total = sum(len(text.encode()) for text in documents)
        drawn = [sample(*files, limit=total // 5, seed=seed) for seed in range(20)]
        times = {text: sum(text in kept for kept in map(set, drawn)) for text in documents}
        share = sum(times.values()) / len(documents) / 20
        assert share == pytest.approx(0.2, abs=0.01)
        by_length = sorted(documents, key=len)
        for group in (documents[:1000], documents[1000:2000], documents[2000:], by_length[:1000], by_length[2000:]):
            deviation = (share * (1 - share) / (1000 * 20)) ** 0.5
            assert sum(times[text] for text in group) / (1000 * 20) == pytest.approx(share, abs=5 * deviation)
        # One document over many seeds is a coin with that share: no document is favoured or never drawn.
        assert max(times.values()) < 16
        assert min(times.values()) == 0
        assert len(set(map(tuple, drawn))) == 20

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        texts=st.lists(st.text(st.sampled_from("abก"), max_size=6), min_size=1, max_size=40),
        limit=st.integers(1, 60),
        seed=st.integers(-3, 3),
        data=st.data(),
    )
    def test_is_the_longest_start_of_the_ranking(self, tmp_path, texts, limit, seed, data):
        """With copies, documents over the limit, empty ones: order does not matter, and the next would not fit."""
        write(tmp_path / "a.jsonl", texts)
        write(tmp_path / "b.jsonl", data.draw(st.permutations(texts)))
        fitting = [text for text in texts if len(text.encode()) <= limit]
        if not any(fitting):
            with pytest.raises(UserError, match=r"no text in|as small as the sample"):
                sample(tmp_path / "a.jsonl", limit=limit, seed=seed)
            return
        kept = sample(tmp_path / "a.jsonl", limit=limit, seed=seed)
        assert kept == sample(tmp_path / "b.jsonl", limit=limit, seed=seed)
        ranked = sample(tmp_path / "a.jsonl", limit=10**6, seed=seed)
        ranked = [text for text in ranked if len(text.encode()) <= limit]
        assert kept == ranked[: len(kept)]
        sizes = [len(text.encode()) for text in ranked]
        assert sum(sizes[: len(kept)]) <= limit
        assert len(kept) == len(ranked) or sum(sizes[: len(kept) + 1]) > limit

    def test_figures_by_source(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(Path("a.jsonl"), ["ก" * 10] * 5 + ["ข" * 1000])
        write(Path("b.parquet"), ["ค" * 10, "ง" * 10])
        sources = open_sources(["a.jsonl", "b.parquet"])
        kept = list(draw_sample(sources, 150))
        assert len(kept) == 5
        a, b = (source.figures for source in sources)
        assert (a.found.documents, a.found.bytes, b.found.documents, b.found.bytes) == (6, 3150, 2, 60)
        assert a.sampled.documents + b.sampled.documents == 5
        assert a.sampled.documents == kept.count("ก" * 10)
        assert a.record()["too_large_documents"] == 1
        console = Console(width=150, record=True, file=io.StringIO())
        console.print(sample_table(sources))
        printed = console.export_text()
        assert "6 documents, 3.1 kB; 1 document, 3.0 kB too large for the sample" in printed
        assert "8 documents, 3.2 kB" in printed
        assert "5 documents, 150 bytes" in printed
        assert f"{150 / 3210:.2%}" in printed

    @pytest.mark.parametrize("texts", [[], [""], ["", ""]])
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_no_text(self, tmp_path, texts, suffix):
        path = tmp_path / f"a{suffix}"
        write(path, texts) if suffix != ".parquet" else pq.write_table(pa.table({"text": pa.array(texts, "str")}), path)
        with pytest.raises(UserError, match=rf"no text in .*a{suffix}: {len(texts)} document"):
            sample(path)

    def test_limits_that_leave_nothing(self, tmp_path):
        write(tmp_path / "a.jsonl", ["สวัสดี"])
        with pytest.raises(UserError, match=r"as small as the sample, 10 bytes\. Give a larger"):
            sample(tmp_path / "a.jsonl", limit=10)
        with pytest.raises(UserError, match="sample_bytes is 0"):
            sample(tmp_path / "a.jsonl", limit=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1500000", 1_500_000),
        ("7B", 7),
        ("500MB", 500_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5 gb", 1_500_000_000),
        (" 3 KiB ", 3072),
        ("1tb", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "0", "0.5", "-1", "-1MB", "1e9", "500M", "5 MB MB", "inf", "nan", "1,5MB", "๕MBx"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match=r"is not a size. Give a number of bytes.*500MB, 2GiB"):
        parse_size(text)


PARQUET = "parquet"  # stands for a sound parquet file, whose content the test makes
DAMAGED = [
    ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2 is not UTF-8"),
    ("a.txt", "ก".encode()[:2], r"a\.txt, line 1 is not UTF-8"),
    ("a.txt", "กขค".encode("tis-620"), r"a\.txt, line 1 is not UTF-8"),
    ("a.txt", "สวัสดี".encode("utf-16"), r"a\.txt, line 1 is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', r"line 3: not a JSON object with a string `text`"),
    ("a.jsonl", b'{"text": 3}\n', "line 1: not a JSON object"),
    ("a.jsonl", b'{"text": null}\n', "line 1: not a JSON object"),
    ("a.jsonl", b"[]\n", "line 1: not a JSON object"),
    ("a.jsonl", b"{\n", "line 1: not a JSON object"),
    ("a.jsonl", b"[" * 100_000, "line 1: not a JSON object"),
    ("a.jsonl", b'{"text": ["a"]}\n', "line 1: not a JSON object"),
    ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}", "line 1: not a JSON object"),  # longer than Python reads a number
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "x\\ud800y"}\n',
        r"a\.jsonl, line 2 holds '\\ud800', half of a surrogate",
    ),
    ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz is a damaged gzip file after line 0"),
    # mtime: the bytes name the tests, and every worker must give them the same names
    (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-4],
        r"a\.jsonl\.gz is a damaged gzip file after line 100",
    ),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-20], "damaged gzip file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}\n', mtime=0), r"a\.jsonl\.gz, line 1 is not UTF-8"),
    ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet is a damaged parquet file after row 0"),
    ("a.parquet", b"", r"a\.parquet is a damaged parquet file after row 0"),
    ("a.parquet", {"title": ["x"], "body": ["y"]}, r"no string column `text`; its columns are: title, body"),
    ("a.parquet", {"text": [1, 2]}, r"no string column `text`; its `text` is int64"),
    ("a.parquet", {"text": ["a", None]}, r"a\.parquet, row 2 has no `text`"),
    ("a.csv", b"text\na\n", r"a\.csv has an unknown ending"),
    ("a.txt", b"", r"There is no text in .*a\.txt"),
]


@pytest.fixture(scope="module")
def base_folder(sentences, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_phi3_style(sentences[2:] * 4, vocab_size=400).save_pretrained(folder)
    return folder


class TestTrain:
    @pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
    def test_bad_text_leaves_nothing(self, base_folder, tmp_path, name, content, message):
        path = tmp_path / name
        if isinstance(content, dict):
            pq.write_table(pa.table(content), path)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            train([path], str(base_folder), tmp_path / "out", 550)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("น้ำ".encode(), b"\xff" * 9, "row 2 is not UTF-8"),
            ("น้ำ".encode(), "นำ้".encode(), "is a damaged parquet file after row 0"),  # its checksum says so
            (b"PAR1\x15", b"PAR1\xff", "is a damaged parquet file after row 0"),  # the first page's header
        ],
    )
    def test_parquet_that_is_damaged_inside(self, base_folder, tmp_path, old, new, message):
        path = tmp_path / "a.parquet"
        layout = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(pa.table({"text": THAI}), path, write_page_checksum=new[0] != 0xFF, **layout)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(UserError, match=rf"a\.parquet(, | ){message}"):
            train([path], str(base_folder), tmp_path / "out", 550)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none.txt", "none.txt does not exist: there is no such file"),
            ("data/none.parquet", "none.parquet does not exist: there is no such file"),
            ("/none/such", "/none/such does not exist"),
            ("./none", "./none does not exist"),
            ("../none/such", "../none/such does not exist"),
            ("a/b/c", "a/b/c does not exist"),
            ("thai", "thai does not exist"),
            ("", "does not exist|has no file of text"),
        ],
    )
    def test_missing_paths_are_no_hub_lookups(self, tmp_path, monkeypatch, name, message):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(corpus, "_open_dataset", lambda *_: pytest.fail("asked the Hub"))
        with pytest.raises(UserError, match=message):
            train([name], "base", tmp_path / "out", 550)

    def test_nothing_to_read(self, tmp_path):
        with pytest.raises(UserError, match=r"No text was given\. Give files of text"):
            train([], "base", tmp_path / "out", 550)
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "a.pdf").touch()
        with pytest.raises(UserError, match="has no file of text"):
            train([tmp_path / "empty"], "base", tmp_path / "out", 550)

    def test_record_and_output_say_what_was_sampled(self, base_folder, tmp_path, capsys):
        folder = tmp_path / "corpus"
        folder.mkdir()
        write(folder / "a.jsonl", THAI * 50)
        write(folder / "b.parquet", [f"{text} {n}" for n in range(100) for text in THAI])
        write(tmp_path / "c.txt", ["\n".join(THAI)])
        (folder / "readme.md").touch()
        out = train(
            [str(folder), tmp_path / "c.txt"],
            str(base_folder),
            tmp_path / "out folder",
            500,
            script="THAI",
            sample_bytes=20_000,
            seed=7,
        )
        record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
        assert record["options"] == {
            "vocab_size": 500,
            "max_token_chars": 16,
            "script": "Thai",
            "unit": "run",
            "normalize_thai": True,
            "sample_bytes": 20_000,
            "seed": 7,
        }
        a, b, c = record["texts"]
        assert [part["path"] for part in (a, b, c)] == ["corpus/a.jsonl", "corpus/b.parquet", "c.txt"]
        assert [part["documents"] for part in (a, b, c)] == [200, 400, 1]
        assert 19_000 < sum(part["sampled_bytes"] for part in (a, b, c)) <= 20_000
        assert 0 < a["sampled_documents"] < 200
        assert 0 < b["sampled_documents"] < 400
        assert len(c["sha256"]) == 64
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "2 files" in printed
        assert "1 hidden, with other endings or links to folders left out" in printed
        assert "all of it up to 20.0 kB, then evenly by document (seed 7)" in printed
        assert "600 documents" in printed
        assert f"jai tokenizer report '{out}' --text FILE" in printed
        assert f"jai convert BASE OUT --tokenizer '{out}'" in printed

    def test_the_order_of_the_inputs_does_not_matter(self, base_folder, tmp_path):
        files = [write(tmp_path / f"{i}.jsonl", [f"{text} {i} {n}" for n in range(20) for text in THAI]) for i in "ab"]
        made = [
            train(order, str(base_folder), tmp_path / f"out{i}", 500, sample_bytes=8_000) / "tokenizer.json"
            for i, order in enumerate((files, files[::-1]))
        ]
        assert made[0].read_bytes() == made[1].read_bytes()


class TestCommand:
    def run(self, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jai", "tokenizer", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    def test_options_reach_the_record(self, base_folder, tmp_path, monkeypatch, capsys):
        write(tmp_path / "a.jsonl", [f"{text} {n}" for n in range(50) for text in THAI])
        options = [
            "--vocab-size",
            485,
            "--max-token-chars",
            6,
            "--script",
            "tHaI",
            "--sample-bytes",
            "12kB",
            "--seed",
            3,
        ]
        code, _, err = self.run(
            monkeypatch, capsys, tmp_path / "a.jsonl", "--base", base_folder, "--out", tmp_path / "out", *options
        )
        assert code == 0, err
        assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["options"] == {
            "vocab_size": 485,
            "max_token_chars": 6,
            "script": "Thai",
            "unit": "run",
            "normalize_thai": True,
            "sample_bytes": 12_000,
            "seed": 3,
        }
        assert err == ""  # no progress where there is no terminal

    def test_nonsense_is_one_message(self, base_folder, tmp_path, monkeypatch, capsys):
        write(tmp_path / "a.jsonl", THAI)
        common = [tmp_path / "a.jsonl", "--base", base_folder, "--out", tmp_path / "out"]
        code, _, err = self.run(monkeypatch, capsys, *common, "--sample-bytes", "lots")
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith("Error: sample_bytes is 'lots'; expected a size")
        code, _, err = self.run(monkeypatch, capsys, *common, "--unit", "letter")
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith("Error: unit is 'letter'; expected one of")
        assert not (tmp_path / "out").exists()


READ_FROM_HUB = """
import json, os, sys
from jai.errors import UserError
from jai.tokenization.corpus import draw_sample, open_sources
for name, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        sources = open_sources([name])
        texts = list(draw_sample(sources, 10**6))
        print(json.dumps([sorted(texts), sources[0].parts[0].record(), sources[0].describe()]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


class TestHub:
    @pytest.fixture(scope="class")
    def hub(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("hub")
        with DatasetHub(root, user="lab") as hub:
            api = HfApi(endpoint=hub.endpoint, token=hub.token)
            card = (
                "---\nconfigs:\n- config_name: news\n  data_files:\n  - split: train\n    path: news/train*\n"
                "  - split: held_out\n    path: news/test*\n- config_name: chat\n  data_files: chat/*\n---\n"
            )
            sound = {"text": [f"{text} {n}" for n in range(200) for text in THAI], "n": list(range(800))}
            repos = {
                "lab/thai": {"data/train-0.parquet": sound, "data/test-0.parquet": {"text": ["สอบ"], "n": [0]}},
                "lab/several": {
                    "README.md": card.encode(),
                    "news/train.jsonl": b'{"text": "news\\u2028train"}\n',
                    "news/test.jsonl": b'{"text": "news test"}\n',
                    "chat/a.jsonl": b'{"text": "chat"}\n',
                },
                "lab/secret": {"train.parquet": sound},
                "lab/titles": {"train.parquet": {"title": ["x"], "n": [1]}},
                "lab/numbers": {"train.parquet": {"text": [1, 2]}},
                "lab/holes": {"train.jsonl": b'{"text": "a"}\n{"text": null}\n'},
                "lab/broken": {"train.parquet": b"PAR1 no parquet at all PAR1"},
                "lab/empty": {"README.md": b"# nothing\n"},
            }
            for repo_id, files in repos.items():
                api.create_repo(repo_id, repo_type="dataset", private=repo_id == "lab/secret")
                for name, content in files.items():
                    if isinstance(content, dict):
                        sink = pa.BufferOutputStream()
                        pq.write_table(pa.table(content), sink, row_group_size=100)
                        content = sink.getvalue().to_pybytes()
                    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id, repo_type="dataset")
            yield hub

    def test_streamed_through_the_real_client(self, hub):
        cases = {
            "lab/thai": hub.token,
            "lab/thai:test": hub.token,
            "lab/several:news:train": hub.token,
            "lab/several:news:held_out": hub.token,
            "lab/several:chat:train": hub.token,
            "lab/thai:nowhere": hub.token,
            "lab/several": hub.token,
            "lab/none": hub.token,
            "lab/secret": "",
            "lab/titles": hub.token,
            "lab/numbers": hub.token,
            "lab/holes": hub.token,
            "lab/broken": hub.token,
            "lab/empty": hub.token,
        }
        process = subprocess.run(
            [sys.executable, "-c", READ_FROM_HUB, json.dumps(list(cases.items()))],
            env=os.environ | hub.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        found = dict(zip(cases, map(json.loads, process.stdout.splitlines()), strict=True))

        texts, record, description = found["lab/thai"]
        assert texts == sorted(f"{text} {n}" for n in range(200) for text in THAI)
        size = sum(len(text.encode()) for text in texts)
        assert record == {
            "dataset": "lab/thai",
            "config": None,
            "split": "train",
            "revision": hub.repo("lab/thai").head().sha,
            "documents": 800,
            "bytes": size,
            "sampled_documents": 800,
            "sampled_bytes": size,
        }
        assert description == "lab/thai (Hub dataset, streamed)"
        assert found["lab/thai:test"][0] == ["สอบ"]
        assert found["lab/several:news:train"][0] == ["news\u2028train"]
        assert found["lab/several:news:held_out"][0] == ["news test"]
        assert found["lab/several:chat:train"][0] == ["chat"]
        for name, message in {
            "lab/thai:nowhere": "Bad split: nowhere. Available splits: ['train', 'test']",
            "lab/several": "Please pick one among the available configs: ['news', 'chat']",
            "lab/none": "lab/none is neither a file nor a folder, and the Hub did not give a dataset of that name",
            "lab/secret": "`hf auth login` if the dataset is private or gated",
            "lab/titles": "has no string column `text`, but: title (string), n (int64)",
            "lab/numbers": "has no string column `text`, but: text (int64)",
            "lab/holes": "lab/holes, row 2 has no string `text`",
            "lab/broken": "lab/broken",
            "lab/empty": "lab/empty is neither a file nor a folder, and the Hub did not give",
        }.items():
            assert message in found[name], (name, found[name])

    def test_command(self, hub, base_folder, tmp_path):
        command = ["tokenizer", "train", "lab/thai", "--base", base_folder, "--out", "out", "--vocab-size", "500"]
        process = subprocess.run(
            [sys.executable, "-m", "jai", *map(str, command)],
            env=os.environ | hub.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
        assert record["texts"][0]["revision"] == hub.repo("lab/thai").head().sha
        assert "800 documents" in process.stdout

    def test_a_hub_that_cannot_be_reached(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            UserError, match=r"lab/thai is neither a file nor a folder, and the Hub did not .*offline mode"
        ):
            open_sources(["lab/thai"])


def test_files_are_hashed(tmp_path):
    file = TextFile(write(tmp_path / "a.jsonl", THAI), "a.jsonl")
    assert file.sha256 is None
    list(file.read())
    assert file.sha256 == corpus.sha256(tmp_path / "a.jsonl")


class TestChecksComeBeforeTheReading:
    """What is wrong with the options or the base is said before a byte of the text is read."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"script": "Klingon"}, "'Klingon' is not a script that Unicode knows"),
            ({"unit": "word", "script": "Lao"}, "unit word cuts Thai words only"),
            ({"unit": "letter"}, "unit is 'letter'; expected one of run, word, cluster"),
            ({"max_token_chars": 1}, "max_token_chars is 1; expected a whole number from 2"),
            ({"max_token_chars": 0}, "max_token_chars is 0"),
            ({"max_token_chars": -3}, "max_token_chars is -3"),
            ({"sample_bytes": -1}, "sample_bytes is -1; expected a size"),
            ({"sample_bytes": 0}, "sample_bytes is 0; expected a size"),
            ({"vocab_size": -5}, "vocab_size is -5"),
            ({"vocab_size": 100}, "A vocabulary of 100 .* does not fit: the base uses the ids up to"),
            ({"script": "Latin"}, "has .* merges of the script Latin already"),
            ({"out": "full"}, "full exists already"),
        ],
        ids=str,
    )
    def test_by_train(self, base_folder, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "precious").touch()
        write(tmp_path / "a.jsonl", THAI)
        monkeypatch.setattr(TextFile, "read", lambda file: pytest.fail(f"{file.path} was read"))
        values = {"out": "out", "vocab_size": 500, **options}
        with pytest.raises(UserError, match=message):
            train(["a.jsonl"], base_folder, Path(values.pop("out")), **values)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "full"]
        assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["precious"]


class TestOddFiles:
    """Files as users have them, and files that are damaged anywhere: text, or one error that names the file."""

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.txt", codecs.BOM_UTF8 + "ก\r\nข".encode(), ["ก\r\nข"]),
            ("a.txt", b"a\x00b", ["a\x00b"]),
            ("a.jsonl", codecs.BOM_UTF8 + b'{"text": "a"}\r\n\r\n  \n{"text": "b"}', ["a", "b"]),
            ("a.jsonl", b'{"text": "a\\u0000b"}\n\n\n', ["a\x00b"]),
            (
                "a.jsonl.gz",
                gzip.compress(b'{"text": "a"}\n', mtime=0) + gzip.compress(b'{"text": "b"}', mtime=0),
                ["a", "b"],
            ),
        ],
    )
    def test_read(self, tmp_path, name, content, expected):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == expected

    @given(data=st.data())
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_damaged_anywhere(self, tmp_path, data):
        """Cut short or with other bytes at any place."""
        suffix = data.draw(st.sampled_from([".txt", *SUFFIXES]))
        texts = ["\n".join(THAI)] if suffix == ".txt" else [*THAI, *EXACT]
        path = write(tmp_path / f"a{suffix}", texts)
        content = path.read_bytes()
        at = data.draw(st.integers(0, len(content)))
        damage = data.draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=6)))
        path.write_bytes(content[:at] + damage + content[at + len(damage) :] if damage else content[:at])
        try:
            found = read(path)
        except UserError as error:
            message = str(error)
            assert path.name in message
            assert "\n" not in message
        else:
            assert all(isinstance(text, str) for text in found)

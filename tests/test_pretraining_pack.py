# SPDX-License-Identifier: Apache-2.0
"""`jai pack`: what is in the shards, whatever kills it, and what is refused."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from dataset_hub import DatasetHub
from datasets import IterableDataset
from huggingface_hub import HfApi
from rich.console import Console

import jai
from jai.errors import UserError
from jai.files import work_folder
from jai.pretraining.config import corpus_config, read_corpus_config
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.pretraining.plan import SequencePlan
from jai.pretraining.shards import INDEX_FILE, PackedCorpus
from jai.pretraining.shares import Shares
from jai.tokenization.corpus import HubDataset
from jai.tokenization.loading import load_tokenizer

ROOT = Path(jai.__file__).parent
LONG = "ประเทศไทย " * 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return folder


def documents(sentences, count: int) -> list[str]:
    return [f"{number} {sentences[number % len(sentences)]}" * (1 + number % 3) for number in range(count)]


def write_jsonl(path: Path, rows) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture
def corpus(tmp_path, tokenizer, sentences):
    """Three sources of every kind: two files with scores, a Parquet file, and parallel texts."""
    texts = documents(sentences, 40)
    folder = tmp_path / "thai"
    folder.mkdir()
    rows = [{"content": text, "score": float(number)} for number, text in enumerate(texts)]
    write_jsonl(folder / "a.jsonl.gz", [*rows[:10], {"content": " \n", "score": 1.0}, *rows[10:20]])
    write_jsonl(folder / "b.jsonl", rows[20:])
    pq.write_table(pa.table({"text": [*texts[:20], LONG]}), tmp_path / "english.parquet")
    pairs = [{"en": f"{text} a", "th": f"{text} b"} for text in texts[:10]]
    write_jsonl(tmp_path / "pairs.jsonl", [*pairs, {"en": "alone", "th": ""}])
    config = {
        "tokenizer": str(tokenizer),
        "sources": [
            {"name": "thai", "text": str(folder), "language": "th", "column": "content", "quality_column": "score"},
            {"name": "english", "text": [str(tmp_path / "english.parquet")], "language": "en", "licence": "CC0-1.0"},
            {"name": "pairs", "text": str(tmp_path / "pairs.jsonl"), "parallel": {"en": "en", "th": "th"}},
        ],
    }
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(config))
    expected = {
        "thai": texts,
        "english": [*texts[:20], LONG],
        "pairs": [pair[language] for pair in pairs for language in ("en", "th")],
    }
    return tmp_path / "corpus.yaml", expected


def pack(config: Path, out: Path, **options) -> PackedCorpus:
    console = Console(quiet=True)
    return PackedCorpus.open(pack_corpus(PackOptions(out=out, config=config, **{"workers": 1} | options), console))


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name but for the records of the files that were read, which hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


class TestContent:
    def test_tokens_are_the_tokenizers(self, corpus, tmp_path, tokenizer):
        config, expected = corpus
        packed = pack(config, tmp_path / "out", shard_tokens=700)
        loaded = load_tokenizer(tokenizer)
        assert packed.dtype == np.dtype("<u2")
        assert packed.languages == ["en", "th"]
        for source in packed.sources:
            read = [source.read(number).tolist() for number in range(source.documents)]
            assert read == [[*loaded(text)["input_ids"], loaded.eos_token_id] for text in expected[source.name]]
            assert source.lengths(0, source.documents).tolist() == [*map(len, read)]
            assert source.tokens == sum(map(len, read)) == sum(shard.tokens for shard in source.entry.shards)
            assert source.entry.bytes == sum(len(text.encode()) for text in expected[source.name])
            assert [source.tokens_before(number) for number in range(3)] == [0, len(read[0]), len(read[0] + read[1])]
        thai, english, pairs = packed.sources
        assert len(thai.entry.shards) > 2
        assert thai.quality(0, 40).tolist() == [*map(float, range(40))]
        assert (thai.entry.empty, english.entry.empty, pairs.entry.empty) == (1, 0, 1)
        assert english.entry.licence == "CC0-1.0"
        assert english.read(20, 3, 6).tolist() == english.read(20)[3:6].tolist()
        packed.verify()
        packed.check_tokenizer("again", loaded)

    def test_the_same_whatever_the_processes(self, corpus, tmp_path):
        config, _ = corpus
        one = pack(config, tmp_path / "one", shard_tokens=700)
        two = pack(config, tmp_path / "two", shard_tokens=700, workers=2)
        assert one.content_sha256 == two.content_sha256
        assert contents(one.folder) == contents(two.folder)
        other = pack(config, tmp_path / "other", shard_tokens=10**6)
        assert [source.tokens for source in other.sources] == [source.tokens for source in one.sources]

    def test_what_is_read_and_left_out_is_said(self, corpus, tmp_path, tokenizer):
        """And the tokenizer of the command line goes before the file's; without workers, there are all processors."""
        config, _ = corpus
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"tokenizer": "nowhere"}))
        console = Console(file=StringIO(), width=300)
        pack_corpus(PackOptions(out=tmp_path / "out", config=config, tokenizer=str(tokenizer)), console)
        rows = [[cell.strip() for cell in line.split("│")] for line in console.file.getvalue().splitlines()]
        assert f" {len(os.sched_getaffinity(0))} process" in console.file.getvalue()
        assert [row[-2] for row in rows if row[1:2] == ["english"]] == ["CC0-1.0", "0"]
        assert [row[-2] for row in rows if row[1:2] == ["thai"]] == ["–", "1"]

    def test_text_that_two_sources_have_is_said(self, corpus, tmp_path):
        config, _ = corpus
        values = yaml.safe_load(config.read_text())
        thai, english, pairs = values["sources"]
        again = {"name": "again", "text": [f"{thai['text']}/a.jsonl.gz"], "language": "th", "column": "content"}
        console = Console(file=StringIO(), width=300)
        for sources, is_said in (([thai, english, pairs], False), ([thai, again], True)):
            config.write_text(yaml.safe_dump(values | {"sources": sources}))
            pack_corpus(PackOptions(out=tmp_path / f"out-{is_said}", config=config, workers=1), console)
            said = re.findall(r"The sources (.*) both have `content` of .*a\.jsonl\.gz", console.file.getvalue())
            assert said == (["thai and again"] if is_said else [])

    def test_text_that_spells_a_special_token_stays_text(self, tmp_path, tokenizer):
        eos = load_tokenizer(tokenizer).eos_token
        write_jsonl(tmp_path / "a.jsonl", [{"text": f"before{eos}after"}])
        source = {"name": "a", "text": str(tmp_path / "a.jsonl"), "language": "en"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tokenizer": str(tokenizer), "sources": [source]}))
        packed = pack(tmp_path / "c.yaml", tmp_path / "out")
        assert packed.sources[0].read(0).tolist().count(packed.eos_token_id) == 1

    def test_a_plan_over_it(self, corpus, tmp_path):
        config, _ = corpus
        packed = pack(config, tmp_path / "out")
        assert packed.shares == Shares.configured(read_corpus_config(config))
        plan = SequencePlan(packed, 64, strategy="xlda")
        assert sum(plan.tokens_seen(plan.sequences).values()) == plan.sequences * 64


class TestInterruption:
    SHARD = 3000  # tokens

    @pytest.fixture
    def long_corpus(self, tmp_path, tokenizer, sentences):
        """Some 30 shards of two files."""
        for name in ("a.jsonl", "b.jsonl.gz"):
            write_jsonl(tmp_path / name, [{"text": text} for text in documents(sentences, 600)])
        source = {"name": "a", "text": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")], "language": "th"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tokenizer": str(tokenizer), "sources": [source]}))
        return tmp_path / "c.yaml"

    def test_killed_it_goes_on(self, long_corpus, tmp_path):
        whole = pack(long_corpus, tmp_path / "whole", shard_tokens=self.SHARD)
        out = tmp_path / "out"
        words = ["pack", out, "--config", long_corpus, "--shard-tokens", self.SHARD, "--workers", 2]
        command = [sys.executable, "-m", "jai", *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = work_folder(out) / "journal.json"
        while process.poll() is None:
            if journal.exists() and journal.read_text().count(".tokens") > 6:
                break
            time.sleep(0.002)
        children = children_of(process.pid)
        tokenising = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        process.kill()
        process.wait()
        assert not out.exists()
        finished = {path.name: path.stat().st_mtime_ns for path in (work_folder(out) / "files").glob("*.tokens")}
        assert len(finished) > 5

        resumed = pack(long_corpus, out, shard_tokens=self.SHARD)
        assert contents(out) == contents(whole.folder)
        assert resumed.content_sha256 == whole.content_sha256
        assert sum((out / name).stat().st_mtime_ns == time_ for name, time_ in finished.items()) > 5
        assert not work_folder(out).exists()
        assert len(tokenising) == 2
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "processes of a pool have outlived what was killed"
            time.sleep(0.05)

    def test_behind_a_broken_line_that_is_mended(self, long_corpus, tmp_path):
        path, out = tmp_path / "a.jsonl", tmp_path / "out"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:500], "{broken\n", *lines[500:]]))
        with pytest.raises(UserError, match=r"a\.jsonl, line 501: not a JSON object with a string `text`"):
            pack(long_corpus, out, shard_tokens=self.SHARD)
        kept = {path.name: path.stat().st_mtime_ns for path in (work_folder(out) / "files").glob("*.tokens")}
        path.write_text("".join(lines[1:]))
        with pytest.raises(UserError, match=r"a\.jsonl is not what it was when a part of it was packed"):
            pack(long_corpus, out, shard_tokens=self.SHARD)
        path.write_text("".join(lines))
        packed = pack(long_corpus, out, shard_tokens=self.SHARD)
        assert packed.sources[0].documents == 1200
        assert sum((out / name).stat().st_mtime_ns == time_ for name, time_ in kept.items()) > 5

    def test_a_file_that_was_read_to_its_end_must_be_the_same(self, long_corpus, tmp_path):
        second, out = tmp_path / "b.jsonl.gz", tmp_path / "out"
        content = second.read_bytes()
        second.write_bytes(content[:-40])
        with pytest.raises(UserError, match=r"b\.jsonl\.gz is a damaged gzip file after line \d+"):
            pack(long_corpus, out, shard_tokens=self.SHARD)
        second.write_bytes(content)
        os.utime(tmp_path / "a.jsonl", ns=(0, 0))
        with pytest.raises(UserError, match=r"a\.jsonl is not what it was"):
            pack(long_corpus, out, shard_tokens=self.SHARD)

    def test_other_options_are_refused(self, long_corpus, tmp_path, tokenizer):
        (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "{broken\n")
        with pytest.raises(UserError, match="line 601"):
            pack(long_corpus, tmp_path / "out", shard_tokens=self.SHARD)
        with pytest.raises(UserError, match="with other inputs or options: shard_tokens was 3000 and is 4000"):
            pack(long_corpus, tmp_path / "out", shard_tokens=4000)
        other = tmp_path / "other"
        shutil.copytree(tokenizer, other)
        definition = json.loads((other / "tokenizer.json").read_text())
        definition["model"]["merges"].pop()
        (other / "tokenizer.json").write_text(json.dumps(definition))
        with pytest.raises(UserError, match="with other inputs or options: tokenizer was"):
            pack(long_corpus, tmp_path / "out", shard_tokens=self.SHARD, tokenizer=str(other))
        values = yaml.safe_load(long_corpus.read_text())
        (source,) = values["sources"]
        for changes in ({"column": "body"}, {"quality_column": "score"}):
            long_corpus.write_text(yaml.safe_dump(values | {"sources": [source | changes]}))
            with pytest.raises(UserError, match="with other inputs or options: sources"):
                pack(long_corpus, tmp_path / "out", shard_tokens=self.SHARD)

    def test_a_process_that_is_killed_is_one_message(self, long_corpus, tmp_path):
        """As the system does where memory runs out: as soon as there is one."""

        def kill() -> None:
            while not (found := [each for each in psutil.Process().children() if "spawn_main" in str(each.cmdline())]):
                time.sleep(0.001)
            found[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(UserError, match=r"A process that tokenised text was killed.*Give fewer `--workers`"):
            pack(long_corpus, tmp_path / "out", shard_tokens=self.SHARD)
        killer.join()
        assert pack(long_corpus, tmp_path / "out", shard_tokens=self.SHARD).sources[0].documents == 1200


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sources": []}, "has no sources"),
            ({"sources": "a"}, "`sources` is 'a'"),
            ({"sources": ["a"]}, "Source 1 is 'a'"),
            ({"sourcez": []}, "option 'sourcez', which does not exist. Did you mean 'sources'"),
            ({"sources": [{"name": "a", "text": "a", "langauge": "th"}]}, "Did you mean 'language'"),
            ({"sources": [{"text": "a", "language": "th"}]}, "source 1 lacks `name`"),
            ({"sources": [{"name": "a b", "text": "a", "language": "th"}]}, "'a b' names files"),
            ({"sources": [{"name": "a", "text": "a"}]}, "needs either `language` or `parallel`"),
            ({"sources": [{"name": "a", "language": "th"}] * 2}, "two sources of the name 'a'"),
            (
                {"sources": [{"name": name, "language": "th"} for name in ("wiki", "Wiki")]},
                "two sources of the name 'Wiki'",  # one on some file systems
            ),
            ({"sources": [{"name": "a", "parallel": {"en": "en"}}]}, "expected two or more columns by language"),
            ({"sources": [{"name": "a", "parallel": {"en": 1, "th": 2}}]}, "expected two or more columns by language"),
            (
                {"sources": [{"name": "a", "parallel": {"en": "en", "th": "th"}, "column": "body"}]},
                "has both `column` and `parallel`",
            ),
            (
                {
                    "sources": [{"name": "a", "parallel": {"en": "en", "th": "th"}}],
                    "alpha": 0.5,
                    "beta": {"en": 0.5, "th": 0.5},
                },
                "and a parallel source has several. Give weights instead",
            ),
            ({"sources": [{"name": "a", "language": "th", "keep_best": 0.5}]}, "has no `quality_column`"),
            ({"sources": [{"name": "a", "language": "th", "epochs": 0}]}, "epochs is 0; expected a number above 0"),
            ({"sources": [{"name": "a", "language": False}]}, "language is False; expected text"),
            ({"sources": [{"name": "a", "packed": "b"}]}, "The source a is a choice of 'b'; expected another source"),
            ({"sources": [{"name": "a", "packed": "b", "language": "th"}]}, "of b, which has its own language"),
            ({"sources": [{"name": "a", "language": "th", "min_tokens": 9, "max_tokens": 8}]}, "which are none"),
            ({"alpha": 0.5}, "alpha is given without beta"),
            ({"alpha": 0.5, "beta": {"th": 0.9}}, "beta sums to 0.9; it must sum to 1"),
            ({"alpha": 0.5, "beta": {"en": 1.0}}, "beta has en; the sources' languages are th"),
            ({"alpha": 0.5, "beta": {"th": "1"}}, "expected shares by language"),
            ({"alpha": 1.5, "beta": {"th": 1.0}}, "alpha is 1.5; expected a number from 0 up to 1"),
            ({"when_dry": "stop"}, "when_dry is 'stop'; expected one of error, renormalize"),
        ],
    )
    def test_configurations(self, changes, message):
        values = {"sources": [{"name": "a", "text": "a", "language": "th"}]} | changes
        with pytest.raises(UserError, match=message):
            corpus_config(values)

    def test_shares_given_twice_or_in_part(self):
        first, second = ({"name": name, "language": "th", "weight": 1.0} for name in "ab")
        with pytest.raises(UserError, match="The source a has a weight and b has none"):
            corpus_config({"sources": [first, second | {"weight": None}]})
        with pytest.raises(UserError, match="Both weights and alpha with beta"):
            corpus_config({"sources": [first, second], "alpha": 1, "beta": {"th": 1}})

    def test_missing_text_columns_and_scores(self, corpus, tmp_path):
        config, _ = corpus
        values = yaml.safe_load(config.read_text())
        thai = values["sources"][0]
        for changes, message in [
            ({"text": str(tmp_path / "nowhere.jsonl")}, "The source thai: .*nowhere.jsonl does not exist"),
            ({"column": "body"}, r"a\.jsonl\.gz, line 1: not a JSON object with a string `body`"),
            ({"quality_column": "stars"}, r"a\.jsonl\.gz, line 1: `stars` is None; expected a number"),
            (
                {"text": str(tmp_path / "q.jsonl"), "quality_column": "q"},
                r"q\.jsonl, line 1: `q` is 10+; expected a num",
            ),
        ]:
            (tmp_path / "q.jsonl").write_text(json.dumps({"content": "ก", "q": 10**400}) + "\n")
            config.write_text(yaml.safe_dump(values | {"sources": [thai | changes]}))
            with pytest.raises(UserError, match=message):
                pack(config, tmp_path / "out")
            assert not (tmp_path / "out").exists()
            assert not work_folder(tmp_path / "out").exists()

    def test_a_tokenizer_without_an_end_of_sequence(self, corpus, tmp_path, tokenizer):
        loaded = load_tokenizer(tokenizer)
        loaded.eos_token = None
        loaded.save_pretrained(tmp_path / "endless")
        with pytest.raises(UserError, match=r"endless has no eos_token, which ends every document"):
            pack(corpus[0], tmp_path / "out", tokenizer=str(tmp_path / "endless"))

    def test_no_text_at_all(self, tmp_path, tokenizer):
        write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "\n"}])
        source = {"name": "a", "text": str(tmp_path / "a.jsonl"), "language": "en"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tokenizer": str(tokenizer), "sources": [source]}))
        with pytest.raises(UserError, match="The source a has no text: 2 rows, all of them empty"):
            pack(tmp_path / "c.yaml", tmp_path / "out")

    def test_damaged_shards(self, corpus, tmp_path, tokenizer, sentences):
        config, _ = corpus
        folder = pack(config, tmp_path / "out", shard_tokens=700).folder
        for ending in ("ends", "quality", "tokens"):
            middle = folder / f"thai-00001.{ending}"
            content = middle.read_bytes()
            middle.write_bytes(content[:-2])
            with pytest.raises(
                UserError, match=rf"thai-00001\.{ending} has {len(content) - 2:,} bytes; expected {len(content):,}"
            ):
                PackedCorpus.open(folder)
            middle.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            with pytest.raises(UserError, match=rf"thai-00001\.{ending} is damaged"):
                PackedCorpus.open(folder).verify()
            if ending != "tokens":
                middle.write_bytes(content)
        PackedCorpus.open(folder).verify(0, 3)  # of three processes, another one reads it
        PackedCorpus.open(folder).verify(2, 3)
        with pytest.raises(UserError, match=r"thai-00001\.tokens is damaged"):
            PackedCorpus.open(folder).verify(1, 3)
        middle.unlink()
        with pytest.raises(UserError, match=r"thai-00001\.tokens cannot be read: No such file"):
            PackedCorpus.open(folder)
        ends = folder / "thai-00001.ends"
        borders = np.fromfile(ends, "<i8")
        for damage in ("gone", "cut", "longer", "crossed"):
            middle.write_bytes(content)
            packed = PackedCorpus.open(folder)
            if damage == "gone":  # while it is trained on
                middle.unlink()
                said = "tokens cannot be read"
            elif damage == "cut":
                middle.write_bytes(content[:-4])
                said = rf"tokens has {len(content) // 2 - 2:,} entries; expected {len(content) // 2:,}"
            else:
                damaged = borders.copy()
                damaged[-2:] = damaged[-2:] + 1 if damage == "longer" else damaged[:-3:-1]
                damaged.tofile(ends)
                said = r"ends is damaged: its borders do not divide [\d,]+ ids"
            with pytest.raises(UserError, match=rf"thai-00001\.{said}"):
                [packed.sources[0].read(number) for number in range(40)]
        index = json.loads((folder / INDEX_FILE).read_text())
        (folder / INDEX_FILE).write_text(json.dumps(index | {"format": 2}))
        with pytest.raises(UserError, match="has the format 2; this version of JAI reads 1"):
            PackedCorpus.open(folder)
        shards = index["sources"][0].pop("shards")
        for damaged, problem in ((shards[1:], r"have [\d,]+ documents, not"), (5, "'shards' is a number")):
            index["sources"][0]["shards"] = damaged
            (folder / INDEX_FILE).write_text(json.dumps(index))
            with pytest.raises(UserError, match=f"is not an index of packed text .*{problem}"):
                PackedCorpus.open(folder)
        with pytest.raises(UserError, match="is not a folder of packed text"):
            PackedCorpus.open(tmp_path)

    def test_another_tokenizer(self, corpus, tmp_path, sentences):
        from jai.tokenization.phi3_style import train_phi3_style

        config, _ = corpus
        packed = pack(config, tmp_path / "out")
        other = train_phi3_style(sentences * 4, vocab_size=401)
        with pytest.raises(UserError, match=r"packed with the tokenizer .* which is not that of other"):
            packed.check_tokenizer("other", other)


# Packs with so much memory more than there is in use when everything is imported, here and in each of its processes.
LIMITED = """
import resource, sys
from pathlib import Path
from rich.console import Console
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.tokenization.loading import load_tokenizer

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

if __name__ == "__main__":
    config, out, tokenizer, more = sys.argv[1:]
    load_tokenizer(tokenizer)
    limit = memory("VmData") + int(more)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = memory("RssAnon")
    pack_corpus(PackOptions(out=Path(out), config=Path(config), workers=2), Console(quiet=True))
    print(memory("VmHWM") - memory("RssFile") - before)
"""


@pytest.mark.slow
def test_a_corpus_larger_than_memory(tmp_path, tokenizer, sentences, record_property):
    """Four times as much text as a process may take for it, in one file."""
    more = 64 * 2**20
    text = " ".join(sentences) * 8
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        for number in range(4 * more // len(text.encode())):
            file.write(json.dumps({"text": f"{number} {text}"}, ensure_ascii=False) + "\n")
    size = (tmp_path / "a.jsonl").stat().st_size
    assert size > 4 * more
    source = {"name": "a", "text": str(tmp_path / "a.jsonl"), "language": "th"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tokenizer": str(tokenizer), "sources": [source]}))
    (tmp_path / "limited.py").write_text(LIMITED)
    words = [tmp_path / "c.yaml", tmp_path / "out", tokenizer, more]
    finished = subprocess.run(
        [sys.executable, str(tmp_path / "limited.py"), *map(str, words)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    packed = PackedCorpus.open(tmp_path / "out")
    assert packed.sources[0].entry.bytes > 0.95 * size
    grown = int(finished.stdout)
    assert grown < more
    record_property("figures", f"{size / 1e6:.0f} MB of text, {grown / 1e6:.0f} MB of memory beyond the imports")


def test_the_recipe_of_the_public_thai_sets():
    config = read_corpus_config(ROOT / "recipes" / "corpus_thai_public.yaml")
    assert len(config.sources) == 11  # Table 4
    assert {source.language for source in config.sources} == {"th"}
    assert all(source.licence and len(source.text) == 1 for source in config.sources)
    pinned = {source.name for source in config.sources if source.revision}
    assert pinned == {"constitution", "mc4", "xlsum"}


class TestHub:
    @pytest.mark.slow  # a process of its own, as the Hub's client is told once where the Hub is
    def test_streamed_by_column_score_and_revision(self, tmp_path, tokenizer, sentences):
        texts = documents(sentences, 60)
        rows = {"body": texts, "score": [float(number) for number in range(60)]}
        pq.write_table(pa.table(rows), tmp_path / "train.parquet")
        pq.write_table(pa.table({"body": ["later"], "score": [1.0]}), tmp_path / "later.parquet")
        with DatasetHub(tmp_path / "hub", user="lab") as hub:
            api = HfApi(endpoint=hub.endpoint, token=hub.token)
            api.create_repo("lab/news", repo_type="dataset")
            place = {"path_in_repo": "train.parquet", "repo_id": "lab/news", "repo_type": "dataset"}
            commit = api.upload_file(path_or_fileobj=tmp_path / "train.parquet", **place)
            api.upload_file(path_or_fileobj=tmp_path / "later.parquet", **place)
            source = {"name": "news", "text": "lab/news", "revision": commit.oid, "language": "th"}
            source |= {"column": "body", "quality_column": "score"}
            (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tokenizer": str(tokenizer), "sources": [source]}))
            words = ["pack", "out", "--config", "c.yaml", "--shard-tokens", "500", "--workers", "1"]
            environment = os.environ | hub.environment() | {"HF_TOKEN": hub.token}
            command = [sys.executable, "-m", "jai", *words]
            finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert "jai pretrain" in finished.stdout
        loaded = load_tokenizer(tokenizer)
        (news,) = PackedCorpus.open(tmp_path / "out").sources
        assert [news.read(n).tolist()[:-1] for n in range(60)] == [loaded(text)["input_ids"] for text in texts]
        assert news.quality(0, 60).tolist() == rows["score"]
        assert len(news.entry.shards) > 3

    def test_a_stream_is_gone_on_with_at_any_row(self):
        rows = IterableDataset.from_generator(lambda: ({"text": str(number)} for number in range(20)))
        stream = HubDataset("lab/a", "lab/a", None, "train", None, rows)
        assert [row.text for row in stream.read_from(7)] == [str(number) for number in range(7, 20)]

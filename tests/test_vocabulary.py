# SPDX-License-Identifier: Apache-2.0
"""Every row of a converted vocabulary is what its source says: walked row by row, against a BPE written out here."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export.command import export
from jai.conversion.export.options import ExportOptions
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import UpcycleOptions
from jai.errors import UserError
from jai.tokenization.extend import RESERVED_TOKEN, extend_tokenizer

WEIGHTS = "model.safetensors"
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
ENTRIES = 400  # of the tiny tokenizer; its last 11 are special tokens, <|user|> the very last
WORDS = ["กรุงเทพ", "New York", "zzz€"]  # with a space, and with bytes


@dataclass(frozen=True)
class Case:
    """A base with `rows` rows, whose tokenizer `base` changes, and a tokenizer made of that for `--tokenizer`."""

    rows: int
    base: Callable[[PreTrainedTokenizerBase], object] = lambda tokenizer: None
    extended: Callable[[PreTrainedTokenizerBase], object] = lambda tokenizer: None


def add_words(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(WORDS)


def add_special(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})


def add_both(tokenizer: PreTrainedTokenizerBase) -> None:
    add_words(tokenizer)
    add_special(tokenizer)


CASES = {
    "words on spare rows": Case(448, extended=add_words),
    "words beyond the rows": Case(400, extended=add_words),
    "words on both sides of the end": Case(401, extended=add_both),
    "a special token on a spare row": Case(448, extended=add_special),
    "a special token beyond the rows": Case(400, extended=add_special),
    "special tokens of the base without rows": Case(394),
    "words of the base without rows": Case(400, base=add_both),
    "words of the base, some with rows": Case(402, base=add_both),
    "pieces of the base without rows": Case(330, base=add_both),
    "the base without rows, and words": Case(394, extended=add_both),
}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory, tiny_phi3) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("phi3") / "phi3", vocab_size=448, num_hidden_layers=1)


@pytest.fixture
def base_of(phi3, tmp_path) -> Callable[[int, PreTrainedTokenizerBase], Path]:
    """`base_of(rows, tokenizer)`: a base of which only the first rows are left, with this tokenizer."""

    def base_of(rows: int, tokenizer: PreTrainedTokenizerBase) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(phi3, folder)
        tensors = load_file(folder / WEIGHTS)
        save_file(
            {name: tensor[:rows].clone() if name in MATRICES else tensor for name, tensor in tensors.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(folder)
        return folder

    return base_of


def run(base: Path, out: Path, **options) -> None:
    convert(ConvertOptions(base=str(base), out=out, block_size=1, block_repeats=[1], experts=1, **options))


def bpe(tokenizer: PreTrainedTokenizerBase, text: str, rows: int) -> list[int]:
    """Ids of a text by the definition of BPE with byte fallback, of the tokens that have one of the first rows."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = {token: id_ for token, id_ in model["vocab"].items() if id_ < rows}
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    symbols = list(text)
    while True:
        pairs = [
            (ranks[pair], at)
            for at, pair in enumerate(pairwise(symbols))
            if pair in ranks and {*pair, "".join(pair)} <= vocab.keys()
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    ids = []
    for symbol in symbols:
        ids += [vocab[symbol]] if symbol in vocab else [vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


def check_every_row(base: Path, extended: Path, out: Path) -> dict[str, int]:
    """How many rows there are from each source, each of them checked."""
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(extended)
    added = new.added_tokens_decoder
    before, after = load_file(base / WEIGHTS), load_file(out / WEIGHTS)
    rows = len(before[MATRICES[0]])
    tokens = {id_: token for token, id_ in new.get_vocab().items()}
    with_rows = {id_ for id_ in old.get_vocab().values() if id_ < rows}
    counts = dict.fromkeys(("base", "spare", "mean", "random"), 0)
    for name in MATRICES:
        table, result = before[name], after[name]
        mean, std = table.double().mean(dim=0), table.double().std(dim=0)
        drawn = table[:0]
        assert len(result) == max(rows, max(tokens) + 1) == json.loads((out / "config.json").read_text())["vocab_size"]
        for id_, row in enumerate(result):
            token = tokens.get(id_)
            has_pieces = not (
                token is None or token == RESERVED_TOKEN.format(id_) or (id_ in added and added[id_].special)
            )
            if id_ in with_rows or (id_ < rows and token is None):
                kind = "base"
                assert torch.equal(row, table[id_]), (name, id_, token)
            elif has_pieces:
                kind = "mean"
                pieces = bpe(old, token.replace(" ", "▁") if id_ in added else token, rows)
                torch.testing.assert_close(row, table[pieces].mean(dim=0), msg=f"{name} {id_} {token} {pieces}")
            elif id_ < rows:
                kind = "spare"
                assert torch.equal(row, table[id_]), (name, id_, token)
            else:
                kind = "random"
                standard = (row.double() - mean) / std
                assert 0.5 < standard.std() < 1.6, (name, id_, token)
                assert standard.abs().max() < 5, (name, id_, token)
                drawn = torch.cat([drawn, row[None]])
            counts[kind] += 1
        assert len(drawn.unique(dim=0)) == len(drawn), "two rows are drawn alike"
    return {kind: count // len(MATRICES) for kind, count in counts.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_row_is_what_its_source_says(tmp_path, tiny_tokenizer, base_of, case, capsys):
    base_tokenizer = copy.deepcopy(tiny_tokenizer)
    case.base(base_tokenizer)
    base = base_of(case.rows, base_tokenizer)
    extended = copy.deepcopy(base_tokenizer)
    case.extended(extended)
    extended.save_pretrained(tmp_path / "extended")
    run(base, tmp_path / "jai", tokenizer=str(tmp_path / "extended"))
    counts = check_every_row(base, tmp_path / "extended", tmp_path / "jai")
    # The plan says the same, and the model runs on every id of its tokenizer.
    printed = capsys.readouterr().out
    for count, text in (
        (counts["base"] + counts["spare"], "rows kept"),
        (counts["mean"], "mean of their pieces' rows"),
        (counts["random"], "random, with the mean"),
        (counts["spare"], "spare ones for new"),
    ):
        said = [line for line in printed.splitlines() if text in line and "│" in line]
        assert said == [] if not count else f" {count}: " in said[0], (text, printed)
    assert sum(counts.values()) == max(case.rows, len(extended))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jai")
    assert model(torch.arange(len(extended))[None, -100:]).logits.isfinite().all()


@pytest.mark.parametrize("rows", [400, 430, 448, 396])
def test_every_row_of_a_trained_tokenizer(tmp_path, tiny_tokenizer, sentences, base_of, rows):
    """Reserved strings fill the ids up to the next multiple of 64, before or after the base's last row."""
    base = base_of(rows, tiny_tokenizer)
    extend_tokenizer(tiny_tokenizer, sentences * 4, vocab_size=510).save_pretrained(tmp_path / "extended")
    run(base, tmp_path / "jai", tokenizer=str(tmp_path / "extended"))
    counts = check_every_row(base, tmp_path / "extended", tmp_path / "jai")
    kept = min(rows, ENTRIES)
    assert counts == {"base": kept, "spare": max(0, rows - ENTRIES), "mean": 62, "random": 448 - max(rows, kept)}


def test_ids_between_tokens_get_rows_too(tmp_path, tiny_tokenizer, base_of):
    """A tokenizer may leave ids out: `len` is no measure of its rows then."""
    base = base_of(400, tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path / "extended")
    path = tmp_path / "extended" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # Added tokens too, or the library would count them on from the largest id of the rest.
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]} | {"▁zebra": 410}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    run(base, tmp_path / "jai", tokenizer=str(tmp_path / "extended"))
    assert check_every_row(base, tmp_path / "extended", tmp_path / "jai") == {
        "base": 400,
        "spare": 0,
        "mean": 1,
        "random": 10,
    }


def test_a_token_between_those_of_the_base_gets_the_mean_of_its_pieces(tmp_path, tiny_tokenizer, base_of):
    """Its id is not beyond the base's last, and its row is one that no token used."""
    base = base_of(448, tiny_tokenizer)
    shutil.copytree(base, tmp_path / "extended")
    for folder, tokens in ((base, {"▁zebra": 410}), (tmp_path / "extended", {"▁zebra": 410, "▁quixotic": 405})):
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]} | tokens
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    run(base, tmp_path / "jai", tokenizer=str(tmp_path / "extended"))
    counts = check_every_row(base, tmp_path / "extended", tmp_path / "jai")
    assert counts == {"base": 447, "spare": 0, "mean": 1, "random": 0}


def test_ids_far_apart_are_refused(tmp_path, tiny_tokenizer, base_of):
    """Not with four thousand million rows."""
    base = base_of(400, tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path / "extended")
    path = tmp_path / "extended" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]} | {"▁zebra": 4_000_000_000}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(UserError, match=r"ids up to 4,000,000,000, but only 401 entries"):
        run(base, tmp_path / "jai", tokenizer=str(tmp_path / "extended"))


def test_padding_beyond_the_rows_is_refused(tmp_path, tiny_tokenizer, base_of):
    """It could be converted, and the result not be loaded."""
    base = base_of(400, tiny_tokenizer)
    config = json.loads((base / "config.json").read_text())
    for pad, allowed in ((400, False), (32000, False), (399, True), (None, True)):
        (base / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        if not allowed:
            with pytest.raises(UserError, match=f"pad_token_id is {pad}, but the vocabulary has 400 rows"):
                run(base, tmp_path / "jai")
            continue
        run(base, tmp_path / f"{pad}")
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{pad}")


@pytest.mark.parametrize("rows", [394, 330])
def test_a_base_with_tokens_without_rows_is_refused_with_remedies_that_work(tmp_path, tiny_tokenizer, base_of, rows):
    """They were an IndexError when the result was used, or rows of zeros."""
    base = base_of(rows, tiny_tokenizer)
    message = (
        rf"BASE has {ENTRIES - rows} tokens without a row in its embeddings, which are {rows} rows: '.*' \({rows}\),"
    )
    with pytest.raises(UserError, match=message):
        run(base, tmp_path / "jai")
    assert not (tmp_path / "jai").exists()
    run(base, tmp_path / "jai", tokenizer=str(base))
    assert sum(check_every_row(base, base, tmp_path / "jai").values()) == ENTRIES
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "jai")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jai")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
    assert ids["input_ids"].max() >= rows
    assert model.generate(**ids, max_new_tokens=2).shape[1] == ids["input_ids"].shape[1] + 2


def test_other_verbs_refuse_a_tokenizer_beyond_the_rows_with_a_remedy_that_works(tmp_path, tiny_tokenizer, base_of):
    run(base_of(400, tiny_tokenizer), tmp_path / "jai")
    longer = copy.deepcopy(tiny_tokenizer)
    longer.add_tokens(["word"])
    longer.save_pretrained(tmp_path / "jai")
    source, out = str(tmp_path / "jai"), tmp_path / "out"
    verbs = {
        "upcycle": lambda: upcycle(UpcycleOptions(dense=source, out=out, expert_init="copy")),
        "merge": lambda: merge(MergeOptions(models=[source, source], out=out)),
        "export": lambda: export(ExportOptions(model=source, out=out, to="phi3")),
    }
    for verb in verbs.values():
        with pytest.raises(UserError, match=r"has ids up to 400 \('word'\), but the embeddings have 400 rows"):
            verb()
        assert not out.exists()
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(401)
    model.save_pretrained(source)
    for name, verb in verbs.items():
        verb()
        assert len(load_file(out / WEIGHTS)[MATRICES[0]]) == 401
        out.rename(tmp_path / name)

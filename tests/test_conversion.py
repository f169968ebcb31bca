# SPDX-License-Identifier: Apache-2.0
"""phi-3 → JAI: the function is kept where it should be, every tensor comes from where the plan says, and bad input
leaves nothing behind."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM

from jai.conversion import names
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.plan import plan_conversion
from jai.conversion.convert.verify import verify
from jai.conversion.convert.vocabulary import Vocabulary
from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.output.shards import plan_shards
from jai.errors import UserError
from jai.files import sha256
from jai.modeling_jai import JaiForCausalLM
from jai.provenance import PROVENANCE_FILE

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_phi3) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("base") / "phi3")


@pytest.fixture(scope="module")
def base_with_tokenizer(tmp_path_factory, tiny_phi3, tiny_tokenizer) -> Path:
    folder = tiny_phi3(
        tmp_path_factory.mktemp("base") / "phi3",
        vocab_size=len(tiny_tokenizer),
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extended_tokenizer(tmp_path_factory, tiny_tokenizer, sentences) -> Path:
    from jai.tokenization.extend import extend_tokenizer

    folder = tmp_path_factory.mktemp("extended")
    extended = extend_tokenizer(tiny_tokenizer, sentences * 4, vocab_size=510)
    extended.save_pretrained(folder)
    return folder


def run(base: Path, out: Path, **options):
    values = {"block_size": 2, "block_repeats": [1, 3, 2]} | options
    return convert(ConvertOptions(base=str(base), out=out, **values))


@pytest.mark.parametrize(
    ("options", "base_overrides"),
    [
        ({"duplicate_init": "identity"}, {}),
        ({"duplicate_init": "identity", "skip_alpha_normalize": True}, {}),
        ({"duplicate_init": "identity", "experts": 1}, {}),
        ({"block_repeats": [1, 1, 1]}, {}),
        ({"block_repeats": [1, 1, 1], "experts": 1}, {}),
        ({"duplicate_init": "identity"}, {"tie_word_embeddings": True}),
        ({"duplicate_init": "identity"}, {"num_key_value_heads": 4}),
        ({"duplicate_init": "identity"}, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
        (
            {"duplicate_init": "identity"},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ),
    ],
)
def test_function_is_kept(tmp_path, tiny_phi3, options, base_overrides):
    base = tiny_phi3(tmp_path / "base", **base_overrides)
    run(base, tmp_path / "jai", **options)
    result = verify(str(base), tmp_path / "jai")
    assert result.same_function
    assert result.max_difference < 1e-4


def test_longrope_keeps_both_factors(tmp_path, tiny_phi3):
    """32 positions use the short factors, more use the long ones, and generation may cross from one to the other."""
    base = tiny_phi3(tmp_path / "base", rope_parameters=LONGROPE, original_max_position_embeddings=32)
    run(base, tmp_path / "jai", duplicate_init="identity")
    phi3 = Phi3ForCausalLM.from_pretrained(base).eval()
    jai = AutoModelForCausalLM.from_pretrained(tmp_path / "jai").eval()
    for length in (20, 60):
        ids = torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(jai(ids).logits, phi3(ids).logits, atol=1e-4, rtol=1e-4)
    ids = torch.randint(3, 99, (1, 28), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    # Phi-3 without a cache: with one, transformers 5.17's computes only the last token again, and goes wrong.
    assert torch.equal(jai.generate(ids, **settings), phi3.generate(ids, **settings, use_cache=False))


def test_nothing_is_lost_unless_asked_for(tmp_path, base):
    config = run(base, tmp_path / "jai")
    assert set(config.initial_skip_alphas.values()) == {0.0}
    assert verify(str(base), tmp_path / "jai").same_function


def test_papers_way_changes_the_function_and_says_so(tmp_path, base, capsys):
    run(base, tmp_path / "jai", duplicate_init="copy")
    result = verify(str(base), tmp_path / "jai")
    assert not result.same_function
    assert result.kl > 1e-4
    assert "another function" in capsys.readouterr().out


def test_every_tensor_comes_from_its_origin(tmp_path, base):
    config = run(base, tmp_path / "jai", duplicate_init="copy", skip_alpha=0.25)
    phi3 = load_file(base / "model.safetensors")
    jai = load_file(tmp_path / "jai" / "model.safetensors")
    seen = set()
    for planned in config.layer_plan:
        for name, source in names.layer_sources(config, planned.layer, planned.origin).items():
            rows = phi3[source.name][source.start : source.stop]
            copies = jai[name] if names.is_expert_stack(name) else [jai[name]]
            assert all(torch.equal(copy, rows) for copy in copies), name
            seen.add(name)
        seen.add(names.router_name(planned.layer))
        if planned.adds_anchor:
            assert jai[names.skip_alpha_name(planned.layer)].tolist() == [0.25]
            seen.add(names.skip_alpha_name(planned.layer))
    assert [planned.origin for planned in config.layer_plan] == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5]
    assert jai.keys() - seen == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}


def test_name_table_is_exact_both_ways(base, tmp_path):
    """Without repeats and with one expert, the JAI's rows put back together are the phi-3's tensors, all of them."""
    config = run(base, tmp_path / "jai", block_repeats=[1, 1, 1], experts=1)
    phi3 = load_file(base / "model.safetensors")
    jai = load_file(tmp_path / "jai" / "model.safetensors")
    sources = names.outer_sources(config, 99)
    for planned in config.layer_plan:
        sources |= names.layer_sources(config, planned.layer, planned.origin)
    rebuilt: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        target = rebuilt.setdefault(source.name, torch.full(source.source_shape, float("nan")))
        target[source.start : source.stop] = jai[name]
    assert rebuilt.keys() == phi3.keys()
    assert all(torch.equal(rebuilt[name], phi3[name]) for name in phi3)


def test_new_rows_are_means_of_their_pieces(tmp_path, base_with_tokenizer, extended_tokenizer):
    from jai.tokenization.extend import new_token_pieces

    run(base_with_tokenizer, tmp_path / "jai", tokenizer=str(extended_tokenizer))
    old_tokenizer = AutoTokenizer.from_pretrained(base_with_tokenizer)
    new_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "jai")
    pieces = new_token_pieces(old_tokenizer.backend_tokenizer, new_tokenizer.backend_tokenizer)
    assert len(pieces) == len(new_tokenizer) - len(old_tokenizer) > 0
    reserved = {id_ for id_, ids in pieces.items() if not ids}
    assert reserved == set(range(len(old_tokenizer), 448))
    phi3 = load_file(base_with_tokenizer / "model.safetensors")
    jai = load_file(tmp_path / "jai" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(jai[name]) == len(new_tokenizer)
        assert torch.equal(jai[name][: len(old_tokenizer)], phi3[name])
        assert jai[name][sorted(reserved)].std() > 0
        for id_ in pieces.keys() - reserved:
            ids = pieces[id_]
            torch.testing.assert_close(jai[name][id_], phi3[name][ids].mean(0), msg=f"{name}[{id_}]")


@pytest.fixture(scope="module")
def by_init(tmp_path_factory, base_with_tokenizer, extended_tokenizer) -> dict[str, Path]:
    """The same base and tokenizer by each --init, and `random` with another seed."""
    folder = tmp_path_factory.mktemp("by_init")
    for out, options in {
        "mean": {},
        "random": {"init": "random"},
        "random, seed 1": {"init": "random", "seed": 1},
        "mean-normed": {"init": "mean-normed"},
    }.items():
        run(base_with_tokenizer, folder / out, tokenizer=str(extended_tokenizer), block_repeats=[1, 1, 1], **options)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_inits_of_new_rows(by_init, base_with_tokenizer, name):
    from jai.tokenization.extend import new_token_pieces
    from jai.tokenization.loading import load_backend_tokenizer

    pieces = new_token_pieces(*map(load_backend_tokenizer, (base_with_tokenizer, by_init["mean"])))
    reserved = sorted(id_ for id_, ids in pieces.items() if not ids)
    merged = sorted(id_ for id_, ids in pieces.items() if ids)
    base = load_file(base_with_tokenizer / "model.safetensors")[name]
    rows = {init: load_file(path / "model.safetensors")[name] for init, path in by_init.items()}
    for table in rows.values():
        assert torch.equal(table[: len(base)], base)
        assert len(table) == len(base) + len(pieces)

    # Averaging makes rows shorter; mean-normed undoes that and nothing else.
    lengths = torch.stack([base[pieces[id_]].norm(dim=1).mean() for id_ in merged])
    several = torch.tensor([len(set(pieces[id_])) > 1 for id_ in merged])
    assert (rows["mean"][merged].norm(dim=1) < 0.99 * lengths)[several].all()
    torch.testing.assert_close(rows["mean-normed"][merged].norm(dim=1), lengths)
    angles = torch.cosine_similarity(rows["mean-normed"][merged], rows["mean"][merged])
    torch.testing.assert_close(angles, torch.ones(len(merged)))

    # Tokens without pieces are drawn alike whatever the init; with `random` so are all others.
    assert torch.equal(rows["mean"][reserved], rows["random"][reserved])
    assert torch.equal(rows["mean-normed"][reserved], rows["random"][reserved])
    drawn, again = (rows[init][len(base) :] for init in ("random", "random, seed 1"))
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert not torch.isclose(drawn, again).any(dim=1).all()
    for table in (drawn, again):
        standard = (table - base.mean(dim=0)) / base.std(dim=0)
        assert standard.mean().abs() < 5 / standard.numel() ** 0.5
        assert 0.95 < standard.std() < 1.05


def test_random_rows_follow_the_columns_of_the_base(tmp_path, base_with_tokenizer, extended_tokenizer):
    """Each column has its own mean and spread, in bf16 too; a base whose columns differ shows it."""
    phi3 = Phi3ForCausalLM.from_pretrained(base_with_tokenizer)
    means, stds = torch.linspace(-3, 3, 32), torch.linspace(0.01, 2, 32)
    with torch.no_grad():
        for table in (phi3.model.embed_tokens.weight, phi3.lm_head.weight):
            table.copy_(table / table.std(dim=0) * stds + means)
    phi3.bfloat16().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_with_tokenizer).save_pretrained(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "jai", tokenizer=str(extended_tokenizer), init="random")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base = load_file(tmp_path / "base" / "model.safetensors")[name].float()
        new = load_file(tmp_path / "jai" / "model.safetensors")[name][len(base) :].float()
        standard = (new - base.mean(dim=0)) / base.std(dim=0)
        bound = 5 / len(new) ** 0.5
        assert (standard.mean(dim=0).abs() < bound).all()
        assert ((standard.std(dim=0) - 1).abs() < bound).all()


@pytest.mark.parametrize("init", ["mean", "random", "mean-normed"])
def test_new_rows_do_not_depend_on_chunks_or_shards(
    tmp_path, base_with_tokenizer, extended_tokenizer, monkeypatch, init
):
    options = {"tokenizer": str(extended_tokenizer), "init": init, "seed": 3}
    run(base_with_tokenizer, tmp_path / "one", **options)
    monkeypatch.setattr("jai.conversion.convert.embedding_rows._ROWS_CHUNK", 7)
    run(base_with_tokenizer, tmp_path / "many", **options, max_shard_size=40_000)
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    assert len(many.files.names) > 5
    assert all(torch.equal(one.rows(name), many.rows(name)) for name in one.shapes)


@pytest.mark.parametrize("init", ["mean", "random", "mean-normed"])
def test_inits_keep_what_the_base_computes(by_init, base_with_tokenizer, init):
    assert verify(str(base_with_tokenizer), by_init[init]).same_function


def test_tied_embeddings_are_made_once(tmp_path, tiny_phi3, tiny_tokenizer, extended_tokenizer):
    base = tiny_phi3(tmp_path / "base", vocab_size=400, tie_word_embeddings=True)
    tiny_tokenizer.save_pretrained(base)
    run(base, tmp_path / "jai", tokenizer=str(extended_tokenizer), init="mean-normed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jai")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.lm_head.weight) == 510


def test_tokens_without_pieces_are_named(by_init, base_with_tokenizer, extended_tokenizer, tmp_path, capsys):
    record = json.loads((by_init["mean-normed"] / PROVENANCE_FILE).read_text())
    assert record["options"]["init"] == "mean-normed"
    assert record["result"]["new_rows"] == 110
    assert record["result"]["new_row_ids"] == "400-509"  # what `trainable: [new_rows]` reads
    assert record["result"]["new_rows_without_pieces"] == {str(i): f"<|reserved_{i}|>" for i in range(400, 448)}
    options = ConvertOptions(
        base=str(base_with_tokenizer),
        out=tmp_path / "jai",
        tokenizer=str(extended_tokenizer),
        init="random",
        block_size=2,
        block_repeats=[1, 1, 1],
        dry_run=True,
    )
    convert(options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "110: random, with the mean and standard deviation" in printed
    assert "48 new tokens have no pieces; their rows are random" in printed
    assert "<|reserved_400|> (400), <|reserved_401|> (401)" in printed
    assert "<|reserved_409|> (409), …." in printed


@pytest.fixture
def trained_tokenizer(tmp_path, tiny_tokenizer, sentences) -> Path:
    """As `jai tokenizer train` writes it, with its record."""
    from jai.tokenization.options import TrainTokenizerOptions
    from jai.tokenization.train import train_tokenizer

    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("\n".join(sentences * 4), encoding="utf-8")
    return train_tokenizer(
        TrainTokenizerOptions(
            text=[str(tmp_path / "text.txt")],
            base=str(tmp_path / "tiny"),
            out=tmp_path / "trained",
            vocab_size=510,
        )
    )


def test_record_of_the_tokenizer_is_checked(tmp_path, base_with_tokenizer, trained_tokenizer):
    run(base_with_tokenizer, tmp_path / "a", tokenizer=str(trained_tokenizer))
    path = trained_tokenizer / "tokenizer_training.json"
    assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    text = path.read_text(encoding="utf-8")

    def refused(record: str, message: str) -> None:
        path.write_text(record, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            run(base_with_tokenizer, tmp_path / "b", tokenizer=str(trained_tokenizer))
        assert not (tmp_path / "b").exists()

    record = json.loads(text)
    record["new_tokens"]["470"]["pieces"][0] += 1
    record["new_tokens"]["480"]["surface"] = "other"
    token = AutoTokenizer.from_pretrained(trained_tokenizer).convert_ids_to_tokens(470)
    refused(
        json.dumps(record), f"2 of the new tokens differ, first 470, which is {token!r} of the pieces .* in the rec"
    )
    record = json.loads(text)
    del record["new_tokens"]["509"]
    refused(json.dumps(record), "1 of the new tokens differ, first 509, which is missing in the record")
    record = json.loads(text)
    record["new_tokens"]["510"] = {"surface": "x", "pieces": [3]}
    refused(json.dumps(record), "first 510, which is 'x' of the pieces .* and missing by the two tokenizers")
    for broken in ("{", "[]", "{}", '{"new_tokens": [1]}', '{"new_tokens": {"a": {}}}'):
        refused(broken, "is not a record of a tokenizer's training")
    path.unlink()
    run(base_with_tokenizer, tmp_path / "b", tokenizer=str(trained_tokenizer))
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")


def test_init_from_the_command_line(tmp_path, base_with_tokenizer, extended_tokenizer, by_init, monkeypatch):
    from jai import cli

    (tmp_path / "plan.yaml").write_text("block_size: 2\nblock_repeats: [1, 1, 1]\ninit: random\n")
    arguments = ["--config", tmp_path / "plan.yaml", "--tokenizer", extended_tokenizer, "--init", "mean-normed"]
    command = ["jai", "convert", base_with_tokenizer, tmp_path / "jai", *arguments]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert sha256(tmp_path / "jai" / "model.safetensors") == sha256(by_init["mean-normed"] / "model.safetensors")
    assert json.loads((tmp_path / "jai" / PROVENANCE_FILE).read_text())["options"]["init"] == "mean-normed"


def test_more_vocabulary_keeps_the_function(tmp_path, base_with_tokenizer, extended_tokenizer):
    run(base_with_tokenizer, tmp_path / "jai", tokenizer=str(extended_tokenizer), duplicate_init="identity")
    assert verify(str(base_with_tokenizer), tmp_path / "jai").same_function


def test_shards_do_not_change_the_values(tmp_path, base):
    options = {"expert_init": "noise", "seed": 3}
    run(base, tmp_path / "one", **options)
    run(base, tmp_path / "many", **options, max_shard_size=40_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 5
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    assert one.shapes == many.shapes
    assert all(torch.equal(one.rows(name), many.rows(name)) for name in one.shapes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(loaded[name], one.rows(name)) for name in one.shapes)


def test_sharded_base_is_read(tmp_path, base):
    Phi3ForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    run(base, tmp_path / "a")
    run(tmp_path / "sharded", tmp_path / "b")
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")


def test_expert_inits(tmp_path, base):
    name = "model.layers.0.mlp.experts.down_proj"
    stacks = {}
    for init, options in {"copy": {}, "noise": {"expert_noise": 0.01}, "random": {}}.items():
        run(base, tmp_path / init, expert_init=init, **options)
        stacks[init] = load_file(tmp_path / init / "model.safetensors")[name]
    first = stacks["copy"][0]
    assert all(torch.equal(stack[0], first) for stack in stacks.values())
    assert all(torch.equal(expert, first) for expert in stacks["copy"])
    noise = (stacks["noise"][1:] - first).std() / first.std()
    assert 0.008 < noise < 0.012
    assert not torch.equal(stacks["noise"][1], stacks["noise"][2])
    assert (stacks["random"][1:] - first).std() > first.std()


def test_seed_decides_the_bytes(tmp_path, base):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(base, tmp_path / out, expert_init="noise", seed=seed)
    hashes = [sha256(tmp_path / out / "model.safetensors") for out in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_dtype_and_rope_theta(tmp_path, base):
    config = run(base, tmp_path / "jai", dtype="bfloat16", rope_theta=1e6)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert {entry["dtype"] for entry in read_header(tmp_path / "jai" / "model.safetensors").tensors.values()} == {
        "BF16"
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "jai", dtype="auto").dtype == torch.bfloat16


def test_folder_is_complete_and_records_its_making(tmp_path, base_with_tokenizer):
    run(base_with_tokenizer, tmp_path / "jai", duplicate_init="identity", seed=7)
    files = {path.name for path in (tmp_path / "jai").iterdir()}
    assert files >= {
        "config.json",
        "configuration_jai.py",
        "quantization_jai.py",
        "modeling_jai.py",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        PROVENANCE_FILE,
    }
    config = json.loads((tmp_path / "jai" / "config.json").read_text())
    assert config["architectures"] == ["JaiForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_jai.JaiForCausalLM"
    text = (tmp_path / "jai" / PROVENANCE_FILE).read_text()
    record = json.loads(text)
    assert record["inputs"][0]["files"]["model.safetensors"] == sha256(base_with_tokenizer / "model.safetensors")
    assert record["options"]["duplicate_init"] == "identity"
    assert record["options"]["skip_alpha"] == 0.0
    assert record["options"]["seed"] == 7
    assert record["result"]["parameters"] == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "jai").parameters()
    )
    assert str(tmp_path) not in text


def test_dry_run_writes_nothing(tmp_path, base, capsys):
    convert(ConvertOptions(base=str(base), out=tmp_path / "jai", block_size=2, block_repeats=[1, 2, 1], dry_run=True))
    assert list(tmp_path.iterdir()) == []
    assert "Dry run" in capsys.readouterr().out


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def break_model_type(folder: Path) -> None:
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00\x01")


def break_shapes(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)


def break_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_quantised(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})


def break_rope(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_rope, "is not valid"),
        (break_json, "is not valid JSON"),
        (break_model_type, "LlamaForCausalLM of type 'llama'"),
        (break_config, "has no config.json"),
        (break_weights, "truncated or damaged"),
        (break_header, "header cannot be read"),
        (break_shapes, "do not match its config.json"),
        (break_pickle, "no safetensors weights"),
        (break_quantised, "is quantised"),
    ],
)
def test_bad_bases_are_refused(tmp_path, tiny_phi3, damage, message):
    base = tiny_phi3(tmp_path / "base")
    damage(base)
    with pytest.raises(UserError, match=message):
        run(base, tmp_path / "jai")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_repeats": [1, 2]}, r"2 blocks of 2 \(--block-repeats, --block-size\) are 4. Give a plan for 6 layers"),
        (
            {"block_size": 4, "block_repeats": [1]},
            "Give a plan for 6 layers, such as --block-size 1 --block-repeats 1,2,2,2,2,1",
        ),
        ({"block_size": 0}, "block_size is 0; expected a whole number from 1"),
        ({"duplicate_init": "identidy"}, "expected one of identity, copy"),
        ({"init": "zero"}, "expected one of mean, random, mean-normed"),
        ({"expert_init": "copies"}, "expected one of copy, noise, random"),
        ({"dtype": "int8"}, "expected one of float32, bfloat16, float16"),
        ({"block_repeats": "1,x"}, "expected a list of whole numbers"),
        ({"block_repeats": [1, 0, 1]}, "expected a list of whole numbers from 1"),
        ({"experts": 0}, "experts is 0; expected a whole number from 1"),
        ({"skip_alpha": -1.0, "skip_alpha_normalize": True}, "divides by zero"),
    ],
)
def test_bad_options_are_refused(tmp_path, base, options, message):
    with pytest.raises(UserError, match=message):
        run(base, tmp_path / "jai", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_tokenizers_are_refused(tmp_path, base, base_with_tokenizer, tiny_tokenizer, sentences):
    from jai.tokenization.phi3_style import train_phi3_style

    smaller, other = tmp_path / "smaller", tmp_path / "other"
    train_phi3_style(sentences * 4, vocab_size=len(tiny_tokenizer) - 20).save_pretrained(smaller)
    train_phi3_style([sentence.upper() for sentence in sentences * 4], vocab_size=len(tiny_tokenizer)).save_pretrained(
        other
    )
    with pytest.raises(UserError, match="fewer than the base's"):
        run(base_with_tokenizer, tmp_path / "jai", tokenizer=str(smaller))
    with pytest.raises(UserError, match="does not extend its base"):
        run(base_with_tokenizer, tmp_path / "jai", tokenizer=str(other))
    with pytest.raises(UserError, match="BASE has no tokenizer files"):
        run(base, tmp_path / "jai", tokenizer=str(smaller))
    assert not (tmp_path / "jai").exists()


def test_existing_output_is_left_alone(tmp_path, base):
    (tmp_path / "jai").mkdir()
    (tmp_path / "jai" / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(base, tmp_path / "jai")
    assert (tmp_path / "jai" / "precious").read_text() == "mine"


def test_unknown_name_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither a folder nor a Hub id"):
        run(Path("no/such/folder/at/all"), tmp_path / "jai")


MEDIUM = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 32064,
    "sliding_window": 2047,
    "dtype": "bfloat16",
}


def test_phi3_medium_is_planned_without_its_weights(tmp_path, capsys):
    """The dry run plans JAI-1 exactly, shard by shard, from a configuration alone."""
    base = tmp_path / "medium"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(MEDIUM))
    # A tokenizer of 64,000 entries, of which the last 31,936 are new.
    vocabulary = Vocabulary(64000, 32064, {id_: [id_ % 32000] for id_ in range(32064, 64000)})
    options = ConvertOptions(base=str(base), out=tmp_path / "jai", dry_run=True)
    config = convert(options, vocabulary, console=Console(width=120))
    plan = plan_conversion(options, vocabulary)
    with torch.device("meta"):
        model = JaiForCausalLM(config)
    alphas = 6
    assert plan.parameters == 75_315_942_400 + alphas == sum(value.numel() for value in model.state_dict().values())
    assert plan.bytes == 2 * plan.parameters
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    shards = plan_shards(plan.tensors, 5_000_000_000)
    assert max(shard.size for shard in shards) < 5_000_100_000
    out = capsys.readouterr().out
    assert all(shard.name in out and f"{shard.size:,}" in out for shard in shards)
    assert not (tmp_path / "jai").exists()

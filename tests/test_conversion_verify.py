# SPDX-License-Identifier: Apache-2.0
"""`jai convert --verify`: exit code 1 where the function was to be kept and is not, 0 where it was to change."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from jai import cli
from jai.conversion.convert import verify as verifying

SAME = "the same function"
OTHER = "another function"


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_phi3) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("base") / "phi3", num_hidden_layers=3)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(base, *options)`: exit code, standard output and error of `jai convert`."""

    def run(base: Path, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jai", "convert", str(base), str(tmp_path / "jai"), *options, "--verify"])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return exit_.value.code or 0, *(" ".join(text.split()) for text in (printed.out, printed.err))

    return run


BLOCKS = ("--block-size", "1", "--block-repeats", "1,2,2")


@pytest.mark.parametrize(
    "options",
    [
        BLOCKS,
        (*BLOCKS, "--skip-alpha", "0", "--skip-alpha-normalize"),
        (*BLOCKS, "--rope-theta", "10000"),
        ("--layers", "0,1,1,2", "--duplicate-init", "identity"),
        ("--method", "dus-v1", "--k", "2", "--duplicate-init", "identity", "--experts", "1"),
    ],
    ids=" ".join,
)
def test_what_keeps_the_function_is_found_to_keep_it(run, base, options):
    code, out, _ = run(base, *options)
    assert code == 0
    assert SAME in out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((*BLOCKS, "--duplicate-init", "copy"), "later copies begin with the weights of the first"),
        ((*BLOCKS, "--expert-init", "random"), "experts 1 and up begin with expert_init random"),
        ((*BLOCKS, "--rope-theta", "20000"), "the RoPE base is another"),
        ((*BLOCKS, "--dtype", "bfloat16"), "the weights are rounded to bfloat16"),
        (("--layers", "0,2"), "the plan leaves out layers of the base"),
        (("--layers", "0,2,1"), "or changes their order"),
    ],
    ids=" ".join,
)
def test_what_changes_the_function_is_said_and_no_error(run, base, options, why):
    code, out, _ = run(base, *options)
    assert code == 0
    assert OTHER in out
    assert why in out.split("As was to be expected: ")[1]


@pytest.mark.parametrize("normalize", [(), ("--skip-alpha-normalize",)])
def test_an_identity_start_that_is_none_is_an_error_with_remedies_that_work(run, base, tmp_path, normalize):
    code, out, error = run(base, *BLOCKS, "--skip-alpha", "0.5", *normalize)
    assert code == 1
    assert OTHER in out
    assert "skip_alpha 0.5 adds the anchor" in error
    assert "Give --skip-alpha 0 to keep the function, or --duplicate-init copy to change it" in error
    for number, remedy in enumerate((("--skip-alpha", "0"), ("--duplicate-init", "copy"))):
        (tmp_path / "jai").rename(tmp_path / f"before {number}")
        assert run(base, *BLOCKS, *remedy, *normalize)[0] == 0


def test_a_result_that_is_wrong_is_an_error(run, base, monkeypatch):
    """Here because one weight of the output is changed between the writing and the comparison."""
    compare = verifying.verify

    def damage_first(name: str, converted: Path, *arguments, **options):
        tensors = load_file(converted / "model.safetensors")
        tensors["model.norm.weight"] *= 2
        save_file(tensors, converted / "model.safetensors", metadata={"format": "pt"})
        return compare(name, converted, *arguments, **options)

    monkeypatch.setattr(verifying, "verify", damage_first)
    code, _, error = run(base, *BLOCKS)
    assert code == 1
    assert "though no option changes it. Do not use it" in error


def test_logits_that_are_no_numbers_are_an_error(run, tiny_phi3, tmp_path):
    """All weights are finite, but their products are not; even where another function was to be expected."""
    base = tiny_phi3(tmp_path / "base", num_hidden_layers=3)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(1e38)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    code, _, error = run(base, *BLOCKS, "--duplicate-init", "copy")
    assert code == 1
    assert f"{base} computes logits that are not numbers" in error

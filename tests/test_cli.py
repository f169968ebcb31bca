# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: help, errors without tracebacks, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jai import cli
from jai.cli.app import SECTIONS, app
from jai.cli.verb import VERBS as OF_OURS
from jai.version import __version__

MAKING = ("tokenizer", "convert", "snapshot", "upcycle", "merge", "export", "quantize", "merge-adapter")
TRAINING = ("pretrain", "sft", "dpo", "kto", "cpo", "orpo", "reward", "grpo")
VERBS = (*MAKING, "inspect", *TRAINING, "pairs", "difficulty", "score", "generate", "publish", "demo")


@pytest.fixture
def jai(monkeypatch, capsys):
    """Run `jai …` in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        monkeypatch.setattr(sys, "argv", ["jai", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


def test_help_names_every_verb(jai):
    code, out, _ = jai("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("group", [(), ("tokenizer",), ("eval",)], ids=str)
def test_help_shows_what_each_verb_does_in_one_whole_sentence(jai, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = jai(*group, "--help")
    _, *sections = out.split("--help ")[1].split(":\n")
    lines = [line for section in sections for line in section.split("\n\n")[0].splitlines()]
    assert len(lines) >= (len(VERBS) if not group else 3)
    assert all(line.endswith(".") and not line.endswith("..") and len(line) <= 80 for line in lines), lines


def test_help_names_what_is_required_and_hides_what_is_hidden(jai, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = jai("merge", "--help")
    assert out.startswith("Usage: jai merge [OPTIONS] OUT\n")  # without the place of `--models A B`
    _, out, _ = jai("tokenizer", "train", "--help")
    assert out.startswith("Usage: jai tokenizer train [OPTIONS] TEXT...\n")
    assert "Folder or Hub id of the tokenizer to extend. [required]" in " ".join(out.split())


@pytest.mark.parametrize("verb", OF_OURS, ids=[verb.name for verb in OF_OURS])
def test_every_verb_has_help_with_an_example(jai, monkeypatch, verb):
    """The examples are in docs/options.md too, whose commands `test_readme` gives to the program."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = jai(*verb.name.split(), "--help")
    assert code == 0
    assert out.startswith(f"Usage: jai {verb.name} [OPTIONS]")
    assert all(len(line) <= 80 for line in out.splitlines())
    _, _, shown = out.partition("\n\nExample")
    assert verb.examples
    for example in verb.examples:
        assert example.startswith(f"jai {verb.name.removesuffix(' run')} ") or example == f"jai {verb.name}"
        assert all(f"  {line}\n" in shown for line in example.splitlines())


def test_help_shows_every_command_once():
    """In sections; a command that is in none would not be found."""
    names = [info.name or info.callback.__name__.replace("_", "-") for info in every_command(app)]
    names += [group.name for group in app.registered_groups if group.name]
    assert sorted(names) == sorted(name for section in SECTIONS.values() for name in section)


def every_command(program):
    for group in program.registered_groups:
        if not group.name:
            yield from group.typer_instance.registered_commands


@pytest.mark.parametrize("verb", TRAINING)
def test_training_verbs_show_trls_help(jai, verb):
    code, out, _ = jai(verb, "--help")
    assert code == 0
    assert "  --learning_rate FLOAT\n" in out
    assert "  --trainable TEXT" in out
    assert "(default: None)" not in out
    assert "Turn off --router_statistics." in out
    recipe = re.search(rf"example: jai {verb} --config (\S+) --", out)
    assert recipe
    assert (Path(__file__).parents[1] / recipe[1]).is_file()


def test_version(jai):
    assert jai("--version") == (0, f"jai {__version__}\n", "")


@pytest.mark.parametrize("begin", ["from jai.cli.app import main; main()", "import jai.trainers; raise SystemExit"])
def test_no_warning_of_a_kernel_that_is_not_used(begin):
    code = f"""
import logging, sys
sys.argv = ["jai", "--version"]
try:
    {begin}
except SystemExit:
    bitsandbytes, kernels = logging.getLogger("bitsandbytes.backends.cpu.ops"), logging.getLogger("kernels.hf_hub")
bitsandbytes.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "offline")
kernels.warning("Skipping publisher trust check for 'kernels-community/quantization-bitsandbytes'")
bitsandbytes.warning("something else")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr == "something else\n"


def test_completion_is_offered_and_quick():
    """Completion must not load torch: it runs at every TAB."""
    code = (
        "import os, sys; os.environ.update(_JAI_COMPLETE='complete_bash', COMP_WORDS='jai con', COMP_CWORD='1')\n"
        "sys.argv = ['jai']\n"
        "from jai.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.split() == ["convert"], process.stderr


def test_convert_with_yaml_and_overrides(jai, tmp_path, tiny_phi3):
    base = tiny_phi3(tmp_path / "base")
    recipe = tmp_path / "plan.yaml"
    recipe.write_text("block_size: 2\nblock_repeats: [1, 2, 1]\nduplicate_init: identity\nexperts: 2\n")
    code, out, err = jai("convert", base, tmp_path / "jai", "--config", recipe, "--experts", "3", "--verify")
    assert code == 0, err
    assert "the same function" in out
    config = json.loads((tmp_path / "jai" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_local_experts"]) == (8, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "BASE", "OUT", "--block-repeats", "1,x"], "expected whole numbers with commas between"),
        (["convert", "BASE", "OUT", "--config", "missing.yaml"], "missing.yaml does not exist"),
        (
            ["convert", "BASE", "OUT", "--block-size", "4"],
            "layers, such as --block-size 1 --block-repeats 1,2,2,2,2,1.",
        ),
        (
            ["convert", "BASE", "OUT", "--verify", "--verify-text", "missing.txt"],
            "missing.txt does not exist. Give a UTF-8 text file",
        ),
        (["convert", "BASE", "OUT", "--verify", "--verify-text", "BASE/model.safetensors"], "is not UTF-8 (byte"),
        (["convert", "BASE", "OUT", "--verify", "--verify-text", "/dev/null"], "is a device, not a file"),
        (["convert", "BASE", "BASE"], "exists already"),
        (["inspect", "BASE"], "not 'jai'"),
        (["generate", "BASE", ""], "The prompt is empty"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(jai, tmp_path, tiny_phi3, arguments, message):
    base = tiny_phi3(tmp_path / "base")
    names = {"BASE": str(base), "OUT": str(tmp_path / "out"), "BASE/model.safetensors": base / "model.safetensors"}
    code, _, err = jai(*(names.get(argument, argument) for argument in arguments))
    assert code == 1
    assert message in err
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blok_size: 1", "has the option 'blok_size', which does not exist. Did you mean 'block_size'?"),
        ("block-size: 1\nblock-repeats: [1]", "'block-repeats', which does not exist. Did you mean 'block_repeats'?"),
        ("base: other", "has the option 'base', which does not exist"),
        ("[1, 2]", "is not a list of options"),
        ("just words", "is not a list of options"),
        ("1: 2", "is not a list of options"),
        ("a: [", "is not valid YAML"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("? {a: 1}\n: 2", "is not valid YAML"),
        ("seed: hello", "seed is 'hello'; expected a whole number"),
        ("seed: true", "seed is True; expected a whole number"),
        ("expert_noise: big", "expert_noise is 'big'; expected a number above 0"),
        ("rope_theta: abc", "rope_theta is 'abc'; expected a number above 0"),
        ("rope_theta: -5", "rope_theta is -5; expected a number above 0"),
        ("skip_alpha: .nan", "skip_alpha is nan; expected a number"),
        ('block_size: "2"', "block_size is '2'; expected a whole number from 1"),
        ("block_repeats: [1, two]", "expected a list of whole numbers"),
        ("skip_alpha_normalize: maybe", "expected true or false"),
        ("tokenizer: 5", "tokenizer is 5; expected text"),
    ],
)
def test_bad_yaml_is_refused(jai, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = jai("convert", tmp_path / "base", tmp_path / "out", "--config", tmp_path / "bad.yaml")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_wrong_usage_is_exit_code_2(jai):
    code, _, err = jai("convert", "only-one-argument")
    assert code == 2
    assert "OUT" in err


def test_generate_streams_what_it_returns(jai, tmp_path, tiny_phi3, tiny_tokenizer):
    base = tiny_phi3(
        tmp_path / "base",
        vocab_size=len(tiny_tokenizer),
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    tiny_tokenizer.save_pretrained(base)
    assert jai("convert", base, tmp_path / "jai", "--block-size", "6", "--block-repeats", "1")[0] == 0
    for options in (["--temperature", "0"], ["--seed", "3"], ["--raw", "--temperature", "0"]):
        code, out, err = jai("generate", tmp_path / "jai", "สวัสดี hello", "--max-new-tokens", "8", *options)
        assert code == 0, err
        assert out.strip()

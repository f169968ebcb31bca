# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages in docs/ tell a reader to type is taken by the program as it is today."""

import re
import shlex
from pathlib import Path

import pytest
from transformers.utils import is_torch_bf16_gpu_available
from trl import KTOConfig, ModelConfig, ScriptArguments, SFTConfig

from jai.cli.app import app
from jai.cli.verb import VERBS
from jai.options import options_of, read_yaml
from jai.trainers import pretrain
from jai.trainers.arguments import JaiTrainingArguments, parse_arguments
from jai.trainers.cpo import JaiCPOConfig
from jai.trainers.data_arguments import DataArguments
from jai.trainers.dpo import JaiDPOConfig
from jai.trainers.grpo import JaiGRPOConfig
from jai.trainers.orpo import JaiORPOConfig
from jai.trainers.reward import JaiRewardConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_TRL = {
    verb: (ScriptArguments, config, ModelConfig, JaiTrainingArguments, DataArguments)
    for verb, config in {
        "sft": SFTConfig,
        "dpo": JaiDPOConfig,
        "kto": KTOConfig,
        "cpo": JaiCPOConfig,
        "orpo": JaiORPOConfig,
        "reward": JaiRewardConfig,
        "grpo": JaiGRPOConfig,
    }.items()
}
TRAINING = {"pretrain": pretrain.OPTIONS, **OF_TRL}  # their options are TRL's and transformers'
OTHERS = ("serve",)  # its options are transformers'


def typed_commands(page: Path) -> list[str]:
    """Every line `jai …` of a page's shell blocks, continued lines joined, comments away."""
    blocks = re.findall(r"```(?:bash|shell|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("jai ")]


COMMANDS = [pytest.param(line, id=f"{page.name}: {line}") for page in PAGES for line in typed_commands(page)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_shown_command_is_taken(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)[1:]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # all that it needs; who ran the demo has its output in ROOT
    monkeypatch.chdir(tmp_path)
    if words[0] in OTHERS:
        return
    if words[0] in TRAINING:
        if not is_torch_bf16_gpu_available():
            words += ["--bf16", "false"]
        parse_arguments(TRAINING[words[0]], words[1:], prog=f"jai {words[0]}")
        return
    called = []
    for verb in VERBS:
        monkeypatch.setattr(verb, "run", called.append)
    with pytest.raises(SystemExit) as exit_:
        app(words, prog_name="jai")
    assert exit_.value.code == 0
    assert len(called) == 1


def test_the_pages_show_commands():
    shown = {param.values[0].split()[1] for param in COMMANDS}
    assert shown >= {
        "convert",
        "inspect",
        "upcycle",
        "merge",
        "export",
        "sft",
        "dpo",
        "generate",
        "publish",
        "tokenizer",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_running_text_exist(page):
    """`jai convert --dry-run`, and the like: the verb is there, and so is each of its options."""
    flags = {
        verb.name: {each.flag for each in options_of(verb.options).values()} | {"--config", "--help"} for verb in VERBS
    }
    for command in re.findall(r"`jai ([^`\n]+)`", page.read_text(encoding="utf-8")):
        words = command.split()
        pair = " ".join(words[:2])
        name = pair if pair in flags else words[0]
        if name in (*TRAINING, *OTHERS, "--help", "COMMAND", *(verb.split()[0] for verb in flags if " " in verb)):
            continue
        assert name in flags, f"{page.name} names `jai {command}`"
        given = {word.partition("=")[0].replace("--no-", "--", 1) for word in words if word.startswith("--")}
        assert given <= flags[name] | {"--config", "--help"}, f"{page.name} names `jai {command}`"


def test_the_table_of_what_is_trained_is_that_of_the_recipes():
    page = (ROOT / "docs" / "post-training.md").read_text(encoding="utf-8")
    found = 0
    for line in page.split("## What is trained and what is frozen")[1].split("\n## ")[0].splitlines():
        for recipe in re.findall(r"\.\./(recipes/\w+\.yaml)", line):
            learns = re.findall("attention|experts|router|alphas|new_rows", line.split("|")[3])
            assert read_yaml(ROOT / recipe)["trainable"] == learns, recipe
            found += 1
    assert found >= 13


def test_the_script_of_ten_lines_is_the_tested_one():
    script = (ROOT / "examples" / "sft.py").read_text(encoding="utf-8").split('"""\n', 1)[1].strip()
    assert script in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_and_the_tree_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    names = re.findall(r"(?<!\S)[\w/]+(?:\.py|/)(?!\S)", "\n".join(line[:22] for line in tree.splitlines()))
    assert len(names) >= 12
    assert all((ROOT / name).exists() for name in names), names

# SPDX-License-Identifier: Apache-2.0
"""The README shows what is tested."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_of_ten_lines_is_the_tested_one():
    script = (ROOT / "examples" / "sft.py").read_text(encoding="utf-8").split('"""\n', 1)[1].strip()
    assert script in (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_exist():
    """Every `jai verb` and every file that the README names is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^jai (\w+)", text, flags=re.MULTILINE))
    source = (ROOT / "cli.py").read_text(encoding="utf-8")
    assert verbs >= {"convert", "inspect", "sft", "dpo", "generate", "publish"}
    assert all(f"def {verb}(" in source or f'name="{verb}"' in source for verb in verbs)
    tree = text.split("## What is where")[1].split("```")[1]
    names = [
        name
        for line in tree.strip().splitlines()
        for name in re.split(r"  +", line)
        if re.fullmatch(r"\S+(\.py|/)", name)
    ]
    assert len(names) >= 12
    assert all((ROOT / name).exists() for name in names), names

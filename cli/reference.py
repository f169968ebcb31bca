# SPDX-License-Identifier: Apache-2.0
"""The reference page of the command line, docs/options.md: `python -m jai.cli.reference > docs/options.md`."""

from dataclasses import MISSING

from jai.cli.app import app
from jai.cli.verb import VERBS, Verb
from jai.options import Option, default_text, expected_text, options_of

_INTRODUCTION = """# Options

Made from the options themselves by `python -m jai.cli.reference > docs/options.md`; do not edit it by hand.

An option `--like-this` is the key `like_this` of a YAML file, where the verb takes one with `--config`; the command
line wins. A flag has a negative, `--no-like-this`. `jai pretrain`, `sft`, `dpo`, `kto`, `cpo`, `orpo`, `reward` and
`grpo` have transformers' and TRL's options and JAI's own: see their `--help`.
"""


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(verb) for verb in VERBS)])


def _section(verb: Verb) -> str:
    positional = [each for each in options_of(verb.options).values() if each.info.positional]
    arguments = " ".join(str(each.info.metavar) for each in positional)
    lines = [f"## jai {verb.name} {arguments}".rstrip(), "", " ".join(verb.help.split()), ""]
    lines += [f"- `{each.info.metavar}`: {each.info.help}" for each in positional]
    if verb.config:
        lines.append(f"- `--config FILE`: YAML file with any of these options, such as `{verb.config}`.")
    rows = [_row(each) for each in options_of(verb.options).values() if not each.info.positional]
    if rows:
        lines += ["", "| option | value | default | what it does |", "| --- | --- | --- | --- |", *rows]
    if verb.examples:
        lines += ["", "```bash", *verb.examples, "```"]
    return "\n".join([*lines, ""])


def _row(option: Option) -> str:
    default = default_text(option) or ("off" if option.kind is bool else "")
    if option.default is MISSING:
        default = "(required)"
    cells = [cell.replace("|", "&#124;") for cell in (expected_text(option), default, option.info.help)]
    return f"| `{option.flag}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    assert app is not None  # importing it has registered the verbs
    print(reference(), end="")

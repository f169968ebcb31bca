# SPDX-License-Identifier: Apache-2.0
"""Every option of every verb: it arrives from command line and YAML, its value is checked, it is documented."""

import dataclasses
import itertools
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jai.cli.app import app
from jai.cli.reference import reference
from jai.cli.verb import VERBS, Verb
from jai.conversion.convert.options import ConvertOptions
from jai.errors import UserError
from jai.options import Option, Size, check_values, option, options_of, read_yaml

# What an option needs beside it to be taken: others without which it would contradict or do nothing.
COMPANIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("inspect", "sharding"): {"gpus": 8},
    ("inspect", "group"): {"gpus": 42, "sharding": "hsdp"},
    ("convert", "k"): {"method": "dus-v1"},
    ("convert", "method"): {"k": 4},
    ("convert", "init"): {"tokenizer": "extended"},
    ("convert", "expert_noise"): {"expert_init": "noise"},
    ("convert", "verify_text"): {"verify": True},
    ("upcycle", "expert_init"): {"snapshots": []},
    ("upcycle", "expert_noise"): {"experts": 4},
    ("upcycle", "experts"): {"snapshots": ["a", "b"]},
    ("merge", "method"): {"base": "base"},
    ("merge", "t"): {"method": "slerp"},
    ("merge", "base"): {"method": "ties"},
    ("merge", "density"): {"method": "ties", "base": "base"},
    ("merge", "scale"): {"method": "ties", "base": "base"},
    ("merge", "seed"): {"method": "dare-ties", "base": "base"},
}
REQUIRED: dict[str, dict[str, Any]] = {
    "upcycle": {"snapshots": ["a", "b"]},
    "inspect": {"train": "qlora"},
    "merge": {"models": ["a", "b"]},
    "pack": {"config": Path("corpus.yaml")},
    "pairs": {"model": "base"},
    "difficulty": {"model": "base"},
    "score": {"model": "base"},
    "eval contamination": {"suite": ["mgsm"]},
    "tokenizer train": {"base": "base", "out": Path("out")},
    "tokenizer report": {"text": ["text"]},
    "tokenizer ablate": {"config": Path("comparison.yaml")},
}
# Values that a rule of thumb would miss.
VALUES: dict[tuple[str, str], Any] = {
    ("convert", "method"): "dus-v1",
    ("convert", "layers"): [0, 1, 2, 1, 2, 3],
    ("convert", "verify_text"): Path(__file__),
    ("upcycle", "expert_init"): "copy",
    ("upcycle", "experts"): 5,
    ("merge", "method"): "ties",
    ("merge", "models"): ["c", "d"],
    ("merge", "weights"): [0.25, 0.75],
    ("merge", "t"): 0.25,
    ("eval contamination", "ngram"): 20,
    ("pairs", "max_length_ratio"): 3.5,
    ("difficulty", "min_pass_rate"): 0.25,
    ("difficulty", "max_pass_rate"): 0.75,
    ("tokenizer train", "script"): "Lao",
    ("tokenizer ablate", "text"): ["Thai=a.txt", "Thai=b.txt"],
}
OPTIONS = [
    pytest.param(verb, each, id=f"{verb.name} {each.flag}")
    for verb in VERBS
    for each in options_of(verb.options).values()
    if not each.info.positional
]


def other_value(verb: Verb, each: Option) -> Any:
    """A value that the option may have and that is not its default."""
    if (verb.name, each.name) in VALUES:
        return VALUES[verb.name, each.name]
    if each.choices:
        return next(choice for choice in reversed(each.choices) if choice != each.default)
    if each.element is not None:
        return {int: [2, 3], float: [0.25, 0.5], str: ["x", "y"]}[each.element]
    if each.kind is bool:
        return not each.default
    return {int: 7, float: 0.75, str: "other", Path: Path("other"), Size: Size(123_456)}[each.kind]


def positionals(verb: Verb) -> dict[str, Any]:
    required = [each for each in options_of(verb.options).values() if each.info.positional and each.default is MISSING]
    return {each.name: ["text"] if each.element is not None else each.kind(each.name) for each in required}


def command_line(verb: Verb, values: dict[str, Any]) -> list[str]:
    """The values as words of a command line, those of arguments first."""
    known = options_of(verb.options)
    words: list[str] = verb.name.split()
    options: list[str] = []
    for name, value in values.items():
        each = known[name]
        texts = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if each.info.positional:
            words += texts
        elif each.kind is bool:
            options.append(each.flag if value else each.flag.replace("--", "--no-", 1))
        elif each.info.spread:
            options += [each.flag, *texts] if texts else []
        elif each.element is str:
            options += itertools.chain.from_iterable((each.flag, text) for text in texts)
        else:
            options += [each.flag, ",".join(texts)]
    return [*words, *options]


@pytest.fixture
def received(monkeypatch, tmp_path):
    """Run a command line without the verb's work, and give the options object that the verb was called with."""

    monkeypatch.chdir(tmp_path)  # where no earlier output lies

    def run(verb: Verb, words: list[str]) -> Any:
        calls: list[Any] = []
        monkeypatch.setattr(verb, "run", calls.append)
        with pytest.raises(SystemExit) as exit_:
            app(words, prog_name="jai")
        assert exit_.value.code == 0
        (options,) = calls
        assert type(options) is verb.options
        return options

    return run


def expected(verb: Verb, each: Option) -> tuple[dict[str, Any], Any]:
    value = other_value(verb, each)
    values = REQUIRED.get(verb.name, {}) | COMPANIONS.get((verb.name, each.name), {}) | {each.name: value}
    return values, value


@pytest.mark.parametrize(("verb", "each"), OPTIONS)
def test_arrives_from_the_command_line(received, verb, each):
    values, value = expected(verb, each)
    assert value != each.default
    assert getattr(received(verb, command_line(verb, positionals(verb) | values)), each.name) == value


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_arguments_arrive_in_their_order(received, verb):
    known = [each for each in options_of(verb.options).values() if each.info.positional]
    values = {
        each.name: [f"{each.name} 1", f"{each.name} 2"] if each.element else each.kind(each.name) for each in known
    }
    options = received(verb, command_line(verb, values | REQUIRED.get(verb.name, {})))
    assert {name: getattr(options, name) for name in values} == values


@pytest.mark.parametrize(("verb", "each"), [case for case in OPTIONS if case.values[0].config])
def test_arrives_from_yaml_and_the_command_line_wins(received, tmp_path, verb, each):
    values, value = expected(verb, each)
    plain = {name: str(one) if isinstance(one, Path) else one for name, one in values.items()}
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(plain))
    words = [*command_line(verb, positionals(verb)), "--config", str(tmp_path / "file.yaml")]
    assert getattr(received(verb, words), each.name) == value
    if each.kind is bool:
        overridden = received(verb, [*words, each.flag if not value else each.flag.replace("--", "--no-", 1)])
        assert getattr(overridden, each.name) is not value
    elif each.kind is int:
        again = [*words, each.flag, "6"]
        assert getattr(received(verb, again), each.name) == 6


def test_reference_page_is_of_today():
    page = Path(__file__).parent.parent / "docs" / "options.md"
    assert page.read_text() == reference(), "run: python -m jai.cli.reference > docs/options.md"


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=3), st.floats()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["copy", "ties", "slerp", "dus-v1", "5GB", "1e400", "0-99999999999", "-", ",", "1e-5"]),
)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_is_taken_or_refused_in_one_line(verb, data):
    known = options_of(verb.options)
    names = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=5))
    values = positionals(verb) | REQUIRED.get(verb.name, {}) | {name: data.draw(JUNK, label=name) for name in names}
    try:
        options = verb.options(**values)
    except UserError:
        return
    for name, each in known.items():
        value = getattr(options, name)
        numbers = value if isinstance(value, list) else [value]
        assert not any(isinstance(number, float) and number != number for number in numbers), f"{name} is {value}"
        assert value is None or each.kind is Any or each.element is Any or isinstance(value, python_type(each))


def python_type(each: Option) -> type:
    if each.choices:
        return str
    return list if each.element is not None else (int if each.kind is Size else each.kind)


def test_contradictions_are_refused():
    given_values = {"base": "b", "out": Path("o")}
    for values, message in [
        ({"layers": [0, 1], "block_repeats": [1]}, "plain stack, which has no blocks, but block_repeats"),
        ({"method": "dus-v1", "k": 4, "block_size": 2}, "plain stack, which has no blocks, but block_size"),
        ({"layers": [0, 1], "skip_alpha": 0.1}, "plain stack, which has no skip alphas, but skip_alpha is"),
        ({"layers": [0, 1], "skip_alpha_normalize": True}, "plain stack, without skip alphas. Leave skip_alpha_norm"),
        ({"expert_noise": 0.5}, "Only expert_init noise adds noise, but expert_noise"),
        ({"experts": 1, "expert_init": "random"}, "has one MLP a layer, but expert_init"),
        ({"init": "random"}, "Without a tokenizer there are no new rows, but init"),
        ({"verify_text": Path(__file__)}, "verify_text is for --verify"),
    ]:
        with pytest.raises(UserError, match=message):
            ConvertOptions(**given_values | values)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Shells leave it in `--out=~/x`, and a folder named ~ is one that a user then removes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for given_path in ("~/x", Path("~/x")):
        assert ConvertOptions(base="b", out=given_path).out == tmp_path / "x"
    assert ConvertOptions(base="b", out=Path("a~/x")).out == Path("a~/x")


def test_yaml_numbers_without_a_point(tmp_path):
    """YAML 1.1 reads 1e-5 as a string, which users do not expect."""

    @dataclasses.dataclass(kw_only=True)
    class Rate:
        rate: float = option(1.0, help="Rate.", above=0)

    (tmp_path / "rate.yaml").write_text("rate: 1e-5\n")
    rate = Rate(**read_yaml(tmp_path / "rate.yaml"))
    check_values(rate)
    assert rate.rate == 1e-5

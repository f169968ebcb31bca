# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with any values, words and options: one error and nothing written, or a result that is finite, whole and
loadable. Never a traceback."""

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export.command import export
from jai.conversion.export.options import ExportOptions
from jai.conversion.inputs.jai import open_jai
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import UpcycleOptions
from jai.errors import UserError
from jai.files import work_folder

WEIGHTS = "model.safetensors"
ROWED = ("model.embed_tokens.weight", "lm_head.weight")
QUIET = Console(quiet=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# NaN, infinity, what overflows in each dtype or only when it is computed with, denormals, and healthy values.
VALUES = (math.nan, math.inf, -math.inf, 3.4e38, -3e38, 1e38, 1e20, 7e4, 1e-30, 1e-42, -0.0, 1.0)

# Without shrinking, which takes minutes here and would make little of an example that is short already.
few = settings(max_examples=20, deadline=None, suppress_health_check=[*HealthCheck], phases=[Phase.generate])
many = settings(few, max_examples=500)

poison = st.fixed_dictionaries(
    {
        "tensor": st.integers(0, 30),
        "rows": st.sampled_from(["one value", "a row", "all"]),
        "value": st.sampled_from(VALUES),
    }
)
expert_starts = st.sampled_from([{}, {"expert_init": "noise"}, {"expert_init": "noise", "expert_noise": 3.0}])
convert_options = st.builds(
    lambda experts, start, copies, dtype, seed: {
        "experts": experts,
        **(start if experts > 1 else {}),
        **copies,
        "dtype": dtype,
        "seed": seed,
    },
    st.sampled_from([1, 2]),
    st.one_of(expert_starts, st.just({"expert_init": "random"})),
    st.sampled_from([{}, {"duplicate_init": "copy"}, {"skip_alpha": 0.3, "skip_alpha_normalize": True}]),
    st.sampled_from([None, *DTYPES]),
    st.integers(0, 3),
)
words = st.lists(st.tuples(st.text(min_size=1, max_size=12), st.booleans()), max_size=5, unique_by=lambda word: word[0])
vocabularies = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([330, 396, 400, 401, 448]),
        "of_base": words,
        "added": words,
        "init": st.sampled_from([None, "mean", "mean-normed", "random"]),
        "given": st.booleans(),
    }
)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory, tiny_phi3) -> Path:
    return tiny_phi3(
        tmp_path_factory.mktemp("phi3") / "phi3",
        vocab_size=448,
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )


def changed(
    source: Path, out: Path, dtype: torch.dtype, poisons: list[dict[str, Any]], rows: int | None = None
) -> Path:
    """A copy of a checkpoint in another dtype, with fewer rows, and values put into its weights."""
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS)
    if rows is not None:
        tensors |= {name: tensors[name][:rows].clone() for name in ROWED}
        config = json.loads((out / "config.json").read_text()) | {"vocab_size": rows}
        (out / "config.json").write_text(json.dumps(config))
    for each in poisons:
        name = sorted(tensors)[each["tensor"] % len(tensors)]
        flat = tensors[name].view(-1)
        flat[: {"one value": 1, "a row": 16, "all": len(flat)}[each["rows"]]] = each["value"]
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, out / WEIGHTS, metadata={"format": "pt"})
    return out


def is_whole(source: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(source / WEIGHTS).values())


def refused_or_finite(command: Callable[[], object], out: Path, inputs: list[Path]) -> bool:
    """Whether the command wrote something; then it is finite, as its inputs are. Else it left nothing behind."""
    try:
        command()
    except UserError:
        assert not out.exists()
        assert not work_folder(out).exists()
        return False
    assert all(is_whole(source) for source in inputs)
    assert is_whole(out)
    return True


def check_conversions(phi3: Path, tokenizer: PreTrainedTokenizerBase, drawn: dict[str, Any]) -> None:
    vocabulary = drawn["vocabulary"]
    with tempfile.TemporaryDirectory() as folder:
        base = changed(phi3, Path(folder) / "base", DTYPES[drawn["dtype"]], drawn["poisons"], vocabulary["rows"])
        tokenizer = copy.deepcopy(tokenizer)
        for word, is_special in vocabulary["of_base"]:
            tokenizer.add_tokens([word], special_tokens=is_special)
        tokenizer.save_pretrained(base)
        entries = len(tokenizer)
        options = {"init": vocabulary["init"], "tokenizer": str(Path(folder) / "new")} if vocabulary["given"] else {}
        if vocabulary["given"]:
            for word, is_special in vocabulary["added"]:
                tokenizer.add_tokens([word], special_tokens=is_special)
            tokenizer.save_pretrained(options["tokenizer"])
        out = Path(folder) / "jai"
        asked = ConvertOptions(
            base=str(base), out=out, block_size=1, block_repeats=[1, 2], **options, **drawn["options"]
        )
        is_written = refused_or_finite(lambda: convert(asked, console=QUIET), out, [base])
        if not drawn["poisons"] and (vocabulary["given"] or entries <= vocabulary["rows"]):
            assert is_written, "nothing is wrong with it"
        if is_written:
            table = load_file(out / WEIGHTS)[ROWED[0]]
            assert len(table) == open_jai(str(out)).config.vocab_size == max(len(tokenizer), vocabulary["rows"])
            if not drawn["poisons"]:
                assert table[vocabulary["rows"] :].any(dim=1).all(), "a new row of zeros"


def check_verbs_of_jais(dense: Path, drawn: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = [
            changed(dense, Path(folder) / f"model {number}", DTYPES[dtype], poisons)
            for number, (dtype, poisons) in enumerate(zip(drawn["dtypes"], drawn["poisons"]))
        ]
        first, second = map(str, models)
        out = Path(folder) / "out"
        commands = {
            "merge": lambda: merge(
                MergeOptions(out=out, dtype=drawn["dtype"], **drawn["merge"](first, second)), console=QUIET
            ),
            "upcycle": lambda: upcycle(
                UpcycleOptions(dense=first, snapshots=[second], out=out, dtype=drawn["dtype"]), console=QUIET
            ),
            "export": lambda: export(ExportOptions(model=first, out=out, to="phi3"), console=QUIET),
        }
        for name, command in commands.items():
            is_written = refused_or_finite(command, out, models[:1] if name == "export" else models)
            if not any(drawn["poisons"]):
                assert is_written, "nothing is wrong with them"
            if is_written:
                shutil.rmtree(out)


def of_two(method: str, **options) -> Callable[[str, str], dict[str, Any]]:
    return lambda first, second: {"models": [first, second], "method": method, **options}


def of_base(method: str) -> Callable[[str, str], dict[str, Any]]:
    return lambda first, second: {"models": [second], "base": first, "method": method}


conversions = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES]),
        "poisons": st.lists(poison, max_size=2),
        "options": convert_options,
        "vocabulary": vocabularies,
    }
)
verbs_of_jais = st.fixed_dictionaries(
    {
        "dtypes": st.tuples(*[st.sampled_from([*DTYPES])] * 2),
        "poisons": st.tuples(*[st.lists(poison, max_size=1)] * 2),
        "dtype": st.sampled_from([None, *DTYPES]),
        "merge": st.sampled_from(
            [
                of_two("linear"),
                of_two("linear", weights=[3.0, -3.0], normalize=False),
                of_two("slerp", t=0.5),
                of_two("slerp", t=0.0),
                *map(of_base, ("task-arithmetic", "ties", "dare-linear", "dare-ties")),
            ]
        ),
    }
)


@given(conversions)
@few
def test_conversions(phi3, tiny_tokenizer, drawn):
    check_conversions(phi3, tiny_tokenizer, drawn)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, phi3) -> Path:
    out = tmp_path_factory.mktemp("dense") / "jai"
    convert(ConvertOptions(base=str(phi3), out=out, block_size=1, block_repeats=[1, 2], experts=1), console=QUIET)
    return out


@given(verbs_of_jais)
@few
def test_verbs_of_jais(dense, drawn):
    check_verbs_of_jais(dense, drawn)


@pytest.mark.slow
@given(conversions)
@many
def test_many_conversions(phi3, tiny_tokenizer, drawn):
    check_conversions(phi3, tiny_tokenizer, drawn)


@pytest.mark.slow
@given(verbs_of_jais)
@many
def test_many_verbs_of_jais(dense, drawn):
    check_verbs_of_jais(dense, drawn)

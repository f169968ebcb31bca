# SPDX-License-Identifier: Apache-2.0
"""What the generic suites of transformers and PEFT taught us (docs/conformance.md), and the runner that runs them."""

import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.utils import constants
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from jai import JaiConfig, JaiForQuestionAnswering, JaiForTokenClassification, JaiModel
from jai.configuration_jai import AUTO_MAP

INPUT_IDS = torch.arange(5, 25).reshape(2, 10)


def remote_class(folder: Path, auto_class: str) -> type[PreTrainedModel]:
    """The class that `auto_class` loads from a folder where the package is not installed."""
    return get_class_from_dynamic_module(AUTO_MAP[auto_class], folder)


# --- transformers ---


@pytest.mark.parametrize("experts", [4, 1])
def test_every_entry_of_the_tensor_parallel_plan_names_a_module_or_weight(tiny_model, experts):
    model = tiny_model(num_local_experts=experts)
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for entry in model.tp_plan:
        pattern = re.compile(re.escape(entry).replace(r"\*", r"\d+"))
        assert any(pattern.fullmatch(name) for name in names), f"{entry} is nowhere in a JAI of {experts} experts"
    assert "model.layers.*.self_attn.q_proj" in model.tp_plan
    assert any(".mlp." in entry for entry in model.tp_plan)


def test_a_configuration_has_no_window_to_set(tiny_config, tmp_path):
    """transformers takes `hasattr(config, "sliding_window")` for a model that can have one."""
    assert not hasattr(tiny_config(sliding_window=None), "sliding_window")
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("{", '{"sliding_window": null,', 1))  # as saved by earlier versions
    assert not hasattr(JaiConfig.from_pretrained(tmp_path), "sliding_window")
    config = tiny_config()
    config.sliding_window = 4  # a cache would heed it
    with pytest.raises(ValueError, match="`sliding_window` is 4, but JAI has no window"):
        JaiModel(config)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_from_embeddings(tiny_model, cache):
    model = tiny_model()
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(INPUT_IDS, **options)[:, INPUT_IDS.shape[1] :]
    embeddings = model.get_input_embeddings()(INPUT_IDS)
    torch.testing.assert_close(model.generate(inputs_embeds=embeddings, **options), expected)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("auto_class", "model_class", "labels"),
    [
        (AutoModelForTokenClassification, JaiForTokenClassification, {"labels": INPUT_IDS % 3}),
        (
            AutoModelForQuestionAnswering,
            JaiForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
    ],
)
def test_the_heads_of_tokens_and_answers_save_load_and_learn(
    tiny_config, tmp_path, auto_class, model_class, labels, remote
):
    torch.manual_seed(0)
    model = model_class(tiny_config(num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    source = remote_class(tmp_path, auto_class.__name__) if remote else auto_class
    loaded = source.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == model_class.__name__
    assert isinstance(loaded, model_class) != remote
    output = loaded(INPUT_IDS, **labels)
    torch.testing.assert_close(output.loss, model(INPUT_IDS, **labels).loss)
    scores = output.logits if "labels" in labels else torch.stack([output.start_logits, output.end_logits], dim=-1)
    assert scores.shape == (2, 10, 3 if "labels" in labels else 2)
    output.loss.backward()
    assert loaded.model.layers[1].skip_alpha.grad.abs() > 0


# --- PEFT ---


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        (LoraConfig, {}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (VeraConfig, {"r": 4}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (AdaLoraConfig, {"total_step": 1}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (IA3Config, {}, {"k_proj", "v_proj"}),
    ],
)
def test_peft_has_default_targets(tiny_model, tmp_path, monkeypatch, method, options, expected, remote):
    tiny_model().save_pretrained(tmp_path)
    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING"):
            monkeypatch.delitem(table, "jai", raising=False)  # what an earlier model left there
    source = remote_class(tmp_path, "AutoModelForCausalLM") if remote else AutoModelForCausalLM
    model = source.from_pretrained(tmp_path)
    adapted = get_peft_model(model, method(task_type="CAUSAL_LM", **options)).base_model.targeted_module_names
    assert {name.rpartition(".")[2] for name in adapted} == expected


# --- The runner ---


@pytest.fixture
def conformance(monkeypatch) -> Path:
    folder = Path(__file__).parent / "conformance"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_stand_ins_load_by_their_names(conformance, tmp_path, monkeypatch):
    import fixtures

    fixtures.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in fixtures.CAUSAL_LM:
        model = AutoModelForCausalLM.from_pretrained(name)
        assert model.config.model_type == "jai"
        assert model.model.skips == [(1, 2)]
        assert len(AutoTokenizer.from_pretrained(name)) == model.config.vocab_size
    for name in fixtures.SEQUENCE_CLASSIFICATION:
        assert AutoModelForSequenceClassification.from_pretrained(name).config.num_labels == 1
    for name, columns in (
        ("standard_preference", ["prompt", "chosen", "rejected"]),
        ("conversational_language_modeling", ["messages"]),
        ("standard_unpaired_preference", ["prompt", "completion", "label"]),
    ):
        dataset = load_dataset("trl-internal-testing/zen", name, split="train", cache_dir=tmp_path / "cache")
        assert dataset.column_names == columns
        assert len(dataset) == 17


def test_the_report_is_counted_and_reasons_are_grouped(conformance, tmp_path):
    import run

    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite time="1.5">'
        '<testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="first line&#10;second"/></testcase>'
        '<testcase classname="a" name="three"><skipped message="JaiModel has no x"/></testcase>'
        '<testcase classname="a" name="four"><skipped message="JaiForCausalLM has no x"/></testcase>'
        "</testsuite></testsuites>"
    )
    result = run.read_report(report)
    assert (result.passed, result.failures, result.seconds) == (1, {"a::two": "first line\nsecond"}, 1.5)
    assert result.skips == {"the model has no x": 2}

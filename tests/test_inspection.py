# SPDX-License-Identifier: Apache-2.0
"""`jai inspect`: the paper's tables from the shapes, and a checkpoint's from its headers."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import BitsAndBytesConfig, Phi3ForCausalLM

from jai.configuration_jai import JaiConfig
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.inspect_checkpoint import PHI3_MEDIUM, count_parameters, inspect
from jai.conversion.inspect_options import InspectOptions
from jai.conversion.quantize.command import quantize
from jai.conversion.quantize.options import QuantizeOptions
from jai.errors import UserError
from jai.modeling_jai import JaiExperts, JaiForCausalLM


def show(path: str):
    console = Console(record=True, width=140, file=io.StringIO())
    inspection = inspect(InspectOptions(model=path), console=console)
    return inspection, console.export_text()


def test_jai_1_is_the_papers():
    inspection, text = show("jai-1")
    assert inspection.count.total == 75_315_942_400
    assert inspection.count.skip_alphas == 6
    assert inspection.count.active == 40_083_788_800
    assert inspection.checkpoint_bytes is None
    with torch.device("meta"):
        model = JaiForCausalLM(JaiConfig())
        phi3 = Phi3ForCausalLM(PHI3_MEDIUM)
    assert sum(p.numel() for p in model.parameters()) == inspection.count.total + inspection.count.skip_alphas
    # The paper's Table 3 beside it
    assert f"{sum(p.numel() for p in phi3.parameters()):,} (14.0 B)" in text
    assert "75,315,942,400 (75.3 B)" in text
    assert "block" in text
    assert "36-39" in text


@pytest.mark.parametrize("overrides", [{}, {"num_local_experts": 1}, {"tie_word_embeddings": True}])
def test_count_is_the_models(tiny_model, overrides):
    model = tiny_model(**overrides)
    count = count_parameters(model.config)
    assert count.total + count.skip_alphas == sum(p.numel() for p in model.parameters())
    assert (count.active == count.total) == (model.config.num_local_experts == 1)


def test_checkpoint_shows_its_own_alphas_and_size(tmp_path, tiny_phi3):
    base = tiny_phi3(tmp_path / "base")
    convert(ConvertOptions(base=str(base), out=tmp_path / "jai", block_size=3, block_repeats=[1, 2], skip_alpha=0.37))
    config = json.loads((tmp_path / "jai" / "config.json").read_text())
    (tmp_path / "jai" / "config.json").write_text(json.dumps(config | {"skip_alpha": 0.9}))  # the weights win
    inspection, text = show(str(tmp_path / "jai"))
    assert inspection.skip_alphas == {6: pytest.approx(0.37)}
    assert "0.37" in text
    assert inspection.checkpoint_bytes == (tmp_path / "jai" / "model.safetensors").stat().st_size


def test_a_quantised_checkpoint(tmp_path, tiny_model):
    """Its shapes are the quantiser's; what it is made of is the model's."""
    tiny_model(hidden_size=64, intermediate_size=128, skip_alpha=0.37).save_pretrained(tmp_path / "jai")
    quantize(QuantizeOptions(model=str(tmp_path / "jai"), out=tmp_path / "four"), console=Console(file=io.StringIO()))
    inspection, _ = show(str(tmp_path / "four"))
    assert inspection.count == show(str(tmp_path / "jai"))[0].count
    assert [*inspection.skip_alphas.values()] == pytest.approx([0.37] * 4)
    assert inspection.checkpoint_bytes == (tmp_path / "four" / "model.safetensors").stat().st_size


def test_four_bits_are_what_the_model_takes():
    """JAI-1 in NF4 with and without double quantisation, as its modules hold it."""
    text = show("jai-1")[1]
    with torch.device("meta"):
        experts = JaiExperts(JaiConfig())
        layers = len(JaiConfig().running_plan)
        for line, double in (("NF4", False), ("double", True)):
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
            stored = sum(p.numel() * p.element_size() for p in experts.in_four_bits(how).parameters())
            whole = sum(p.numel() for p in experts.parameters())
            attention = 65_536_000 * stored / whole
            rest = 2 * (75_315_942_400 + 6 - layers * (whole + 65_536_000))
            row = next(row for row in text.splitlines() if line in row)
            assert f" {(layers * (stored + attention) + rest) / 1e9:.1f} " in row


def test_other_models_are_refused(tmp_path, tiny_phi3):
    with pytest.raises(UserError, match="type 'phi3', not 'jai'"):
        inspect(InspectOptions(model=str(tiny_phi3(tmp_path / "base"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        inspect(InspectOptions(model=str(tmp_path / "empty")))

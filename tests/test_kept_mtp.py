# SPDX-License-Identifier: Apache-2.0
"""The layer for the second next token, kept in a checkpoint: what drafts with it, trains it on, or leaves it out."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from trl.trainer.utils import add_fused_lm_head

from jai.configuration_jai import JaiConfig
from jai.conversion.inputs.jai import jai_shapes, open_jai
from jai.conversion.merge.curves import parse_curve, value_for
from jai.errors import UserError
from jai.generate import GenerateOptions, generate
from jai.hub_card.clean_load import LoadRequest, load
from jai.modeling_jai import JaiForCausalLM
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.trainers import pretrain
from jai.trainers.second_token import add_second_token_layer

CONTEXT = 32


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_checkpoint, sentences) -> dict[str, Any]:
    """Of a run on two sentences that come again and again."""
    folder = tmp_path_factory.mktemp("text")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentences[number % 2]}) + "\n" for number in range(60)))
    config = folder / "corpus.yaml"
    source = {"name": "thai", "text": str(text), "language": "th", "epochs": 100}
    config.write_text(yaml.safe_dump({"tokenizer": str(checkpoint), "sources": [source]}))
    return {
        "model_name_or_path": checkpoint,
        "packed": pack_corpus(PackOptions(out=folder / "packed", config=config, workers=1), Console(quiet=True)),
        "max_length": CONTEXT,
        "packing_strategy": "concatenated",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "mtp_weight": 0.5,
        "keep_mtp": True,
    }


def run(options: dict[str, Any], out: Path, **more: Any) -> Path:
    values = {**options, "output_dir": out, **more}
    return pretrain.main([part for key, value in values.items() for part in (f"--{key}", str(value))])


@pytest.fixture(scope="module")
def kept(options, tmp_path_factory) -> Path:
    """A checkpoint whose layer has learnt enough to draft."""
    return run(options, tmp_path_factory.mktemp("kept") / "out", max_steps=40, learning_rate=5e-3)


def layer_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if name.startswith("mtp.")}


class TestDrafts:
    def test_generation_is_the_same_in_fewer_steps(self, kept, sentences):
        """Greedy text is equal to the token; the layer's drafts of learnt text are accepted."""
        _, loading = AutoModelForCausalLM.from_pretrained(kept, output_loading_info=True)
        assert not loading["unexpected_keys"]
        assert not loading["missing_keys"]
        given = {"model": str(kept), "prompt": sentences[0][:10], "raw": True, "temperature": 0, "max_new_tokens": 40}
        texts, lines = [], []
        for use_mtp in (False, True):
            console = Console(file=StringIO(), width=200)
            texts.append(generate(GenerateOptions(**given, use_mtp=use_mtp), console=console))
            lines.append(console.file.getvalue().splitlines())
        assert texts[0] == texts[1]
        assert len(texts[0]) > 20
        assert lines[1][:-1] == lines[0]
        accepted, _, made, *rest = lines[1][-1].split()
        assert rest == ["drafts", "accepted"]
        assert int(accepted) > int(made) / 2

    def test_the_layer_drafts_as_it_was_trained(self, tiny_model, tmp_path):
        """transformers' own machinery, from the second token on: logits are those whose loss is trained."""
        model = tiny_model(block_repeats=[2, 3, 2])
        add_fused_lm_head(model)
        add_second_token_layer(model, seed=1, eos_token_id=2)
        model.save_pretrained(tmp_path)
        ids = torch.randint(3, 99, (1, 12), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(12)[None]
        loaded = JaiForCausalLM.from_pretrained(tmp_path).eval()
        layers = MtpModel.from_pretrained(loaded)
        with torch.no_grad():
            trained = model(input_ids=ids, position_ids=positions, labels=ids, fused_lm_head=True)
            states = loaded(ids, output_hidden_states=True).hidden_states[-1]
            # It gives the logits after its last token alone.
            drafted = [
                layers(
                    input_ids=ids[:, 1:end],
                    last_hidden_states=states[:, : end - 1],
                    attention_mask=None,
                    position_ids=positions[:, 1:end],
                    mtp_cache=MtpCache(config=loaded.config.get_mtp_config()),
                )[1][0, 0]
                for end in range(2, 12)
            ]
        loss = F.cross_entropy(torch.stack(drafted), ids[0, 2:], reduction="sum")
        assert trained.second_tokens == 10
        assert trained.second_loss.item() == pytest.approx(loss.item(), rel=1e-5)

    def test_layers_of_a_configuration_are_plain_ones(self):
        config = JaiConfig(num_mtp_layers=3, block_repeats=[3, 1], block_size=1, skip_alpha=[0.1, 0.2])
        assert not [planned for planned in config.get_mtp_config().running_plan if planned.adds_anchor]
        with pytest.raises(Exception, match="`num_mtp_layers` is 0; expected a number from 1"):
            JaiConfig(num_mtp_layers=0)


class TestTrainingOn:
    def test_it_goes_on_with_the_layer(self, options, kept, tmp_path, capsys):
        """At a learning rate of nothing, it is the layer that was kept."""
        out = run(options, tmp_path / "out", model_name_or_path=kept, learning_rate=0)
        shown = " ".join(capsys.readouterr().out.split())
        assert "second token the model's layer for it is trained further, weight 0.5; the layer is kept for" in shown
        before, after = layer_weights(kept), layer_weights(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_without_its_loss_it_is_left_out(self, options, kept, tmp_path, capsys):
        out = run(options, tmp_path / "out", model_name_or_path=kept, mtp_weight=0, keep_mtp=False)
        shown = " ".join(capsys.readouterr().out.split())
        assert "its layer for multi-token prediction is left out: only `jai pretrain`" in shown
        assert not layer_weights(out)
        assert json.loads((out / "config.json").read_text())["num_mtp_layers"] is None
        with pytest.raises(UserError, match="has no layer for multi-token prediction"):
            generate(GenerateOptions(model=str(out), prompt="x", raw=True, use_mtp=True), console=Console(quiet=True))

    def test_what_cannot_be_is_refused(self, options, kept, tmp_path, tiny_phi3, tiny_tokenizer):
        with pytest.raises(UserError, match="`keep_mtp` is on, and `mtp_weight` is 0"):
            run(options, tmp_path / "out", mtp_weight=0)
        phi3 = tiny_phi3(tmp_path / "phi3", vocab_size=len(tiny_tokenizer))
        tiny_tokenizer.save_pretrained(phi3)
        with pytest.raises(UserError, match=r"`keep_mtp` is on, and .* is not a JAI"):
            run(options, tmp_path / "out", model_name_or_path=phi3)
        damaged = shutil.copytree(kept, tmp_path / "damaged")
        weights = load_file(damaged / "model.safetensors")
        del weights["mtp.layers.0.enorm.weight"]
        save_file(weights, damaged / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"cannot be read: .*layers.0.enorm.weight"):
            run(options, tmp_path / "out", model_name_or_path=damaged)
        config = json.loads((kept / "config.json").read_text())
        (damaged / "config.json").write_text(json.dumps(config | {"num_mtp_layers": 2}))
        with pytest.raises(UserError, match="has 2 layers for tokens after the next"):
            run(options, tmp_path / "out", model_name_or_path=damaged)


class TestOtherVerbs:
    def test_checkpoints_made_of_it_have_it_not(self, kept):
        """`jai upcycle`, `jai export` and `jai inspect` open it so."""
        opened = open_jai(str(kept))
        assert opened.reader.shapes.keys() == jai_shapes(opened.config).keys()
        assert opened.config.num_mtp_layers is None
        assert opened.notes == [f"{kept}: its layer for multi-token prediction (13 weights) is left out."]

    def test_a_merge_takes_it_for_the_last_layer(self):
        curve = parse_curve("weights", [{"layer": 0, "value": 0.0}, {"layer": 4, "value": 1.0}])
        assert value_for(curve, "mtp.layers.0.mtp_block.mlp.gate.weight", range(5)) == 1
        assert value_for(curve, "model.layers.0.mlp.gate.weight", range(5)) == 0

    def test_publishing_takes_it_as_it_is(self, kept):
        request = LoadRequest(folder=str(kept), base=None, source=True, forward=False, report="", logits="")
        assert load(request)["auto_class"] == "AutoModelForCausalLM"

# SPDX-License-Identifier: Apache-2.0
"""The paper's pre-training in small: a phi-3 that knows English, converted, through the three phases of recipes/tiny.

What each phase is for is seen in losses on held-out text, by language and by position: run it with `-s` for the table.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import jai.recipes
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.demo.text.corpus import build_text
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.small_model import bits_per_character, build_model, train
from jai.small_model_options import ModelShape, Training
from jai.tokenization.ablation.text import SplitText, encode_stream, reading_order
from jai.tokenization.extend import extend_tokenizer
from jai.tokenization.phi3_style import train_phi3_style
from jai.trainers import pretrain

RECIPES = Path(jai.recipes.__file__).parent
QUIET = Console(quiet=True)
CONTEXT, LONG = 64, 512  # of the base and of phase 3
POSITIONS = ((16, 64), (64, 192), (192, 512))
JOINED = 14  # the demo's documents in one of ours, so that it is longer than the longest context
BASE_TOKENS = 500_000

Losses = dict[str, float]


@pytest.mark.slow
def test_from_phi3_through_three_phases_to_eight_times_the_context(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(RECIPES)
    monkeypatch.chdir(tmp_path)
    text = build_text(0)
    heldout = {"english": joined(text.heldout_en), "thai": joined(text.heldout_th)}
    for language, documents in (("english", text.pretrain_en), ("thai", text.pretrain_th)):
        rows = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in joined(documents))
        Path(f"{language}.jsonl").write_text("".join(rows))

    train_base(joined(text.pretrain_en))
    base = AutoTokenizer.from_pretrained("base")
    extend_tokenizer(base, text.pretrain_th, vocab_size=len(base) + 512).save_pretrained("tokenizer")
    upscaled = {"block_size": 1, "block_repeats": [1, 2, 2, 1], "duplicate_init": "copy", "skip_alpha": 0.1}
    convert(ConvertOptions(base="base", out=Path("converted"), tokenizer="tokenizer", **upscaled), console=QUIET)
    config = Path("recipes/tiny/corpus.yaml")
    pack_corpus(PackOptions(out=Path("packed"), config=config, tokenizer="converted", workers=1), QUIET)

    after = {"base": measured("base", heldout), "converted": measured("converted", heldout)}
    for phase in (1, 2, 3):
        given = ["--config", f"recipes/tiny/phase-{phase}.yaml", "--disable_tqdm", "true", "--use_cpu", "true"]
        out = pretrain.main([*given, "--save_strategy", "no"])
        after[f"phase {phase}"] = measured(str(out), heldout)
    columns = list(after["base"])
    print("\n" + " " * 10 + "".join(f"{column:>18}" for column in columns))
    for step, losses in after.items():
        print(f"{step:10}" + "".join(f"{losses[column]:18.3f}" for column in columns))

    def change(what: str, before: str, then: str) -> float:
        return after[then][what] - after[before][what]

    assert change("english", "base", "converted") > 0.05
    assert change("english", "converted", "phase 1") < -0.05
    assert change("thai", "phase 1", "phase 2") < -0.3
    assert change("english", "phase 1", "phase 2") < 0.1
    config = json.loads((out / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_parameters"]["rope_theta"]) == (LONG, 1e6)
    assert change("english 192-512", "base", "phase 2") > -0.5  # the long context is nobody's yet
    assert change("english 64-192", "phase 2", "phase 3") < -0.5
    assert change("english 192-512", "phase 2", "phase 3") < -1.5
    assert change("thai 192-512", "phase 2", "phase 3") < -0.3
    assert change("english", "phase 2", "phase 3") < 0.3  # another base of RoPE: what was near is learnt anew


def joined(documents: Sequence[str]) -> list[str]:
    whole = len(documents) // JOINED * JOINED
    return ["\n".join(documents[first : first + JOINED]) for first in range(0, whole, JOINED)]


def train_base(texts: Sequence[str]) -> None:
    tokenizer = train_phi3_style(texts, vocab_size=512)
    ordered = reading_order(SplitText({"english": list(texts) * 8}, {}), {"english": 1}, 0)
    stream = encode_stream(tokenizer, ordered, BASE_TOKENS // CONTEXT, CONTEXT)
    shape = ModelShape(hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4)
    model = build_model(shape, len(tokenizer), CONTEXT, seed=0)
    training = Training(
        tokens=BASE_TOKENS, context=CONTEXT, batch_rows=16, learning_rate=4e-3, decay=True, dtype="float32"
    )
    train(model, stream.ids, training, [training.rows])
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")


def measured(checkpoint: str, heldout: dict[str, list[str]]) -> Losses:
    """Bits a character of short pieces by language, and nats a token by position in long documents."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    losses: Losses = {}
    for language, texts in heldout.items():
        sentences = [line for text in texts for line in text.splitlines()]
        losses[language] = bits_per_character(model, tokenizer, sentences, context=CONTEXT)
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = torch.tensor([ids[:LONG] for ids in encoded if len(ids) >= LONG][:32])
        with torch.inference_mode():
            logits = torch.cat([model(part, use_cache=False).logits for part in rows.split(8)])
        nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none").mean(0)
        for start, end in POSITIONS:
            losses[f"{language} {start}-{end}"] = nats[start:end].mean().item()
    return losses

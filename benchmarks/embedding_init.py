# SPDX-License-Identifier: Apache-2.0
"""Rows of new tokens by each `jai convert --init`: bits per character right after extension, and after training.

    python benchmarks/embedding_init.py [--thai FILE.jsonl.gz --english FILE.jsonl.gz] [--seeds 3]

For each seed a small phi-3 is trained on English and a little Thai and extended by Thai pieces. Then each init is
trained on, with as much Thai as English and the same batches. Without files the text is the demo's, which is made from
templates; with files it is a sample of their documents (field `text`). Bits per character are of held-out documents.
About five minutes on one core.
"""

import argparse
import gzip
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
from arms import mean_and_spread
from records import append, provenance
from rich.console import Console
from transformers import Phi3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.demo.base import train_base
from jai.demo.text.corpus import build_text
from jai.modeling_jai import JaiForCausalLM
from jai.small_model import bits_per_character, train
from jai.small_model_options import Training
from jai.tokenization.extend import extend_tokenizer
from jai.tokenization.phi3_style import train_phi3_style

INITS = get_args(get_type_hints(ConvertOptions)["init"])
BASE_VOCABULARY, NEW_PIECES = 2048, 1536
BASE_STEPS = 160
MEASURED_AT = (0, 50, 200)
BATCH, CONTEXT = 4, 128
# The learning rate stays constant after the warm-up, so that what is measured on the way is no half-finished decay.
TRAINING = Training(
    tokens=max(MEASURED_AT) * BATCH * CONTEXT,
    context=CONTEXT,
    batch_rows=BATCH,
    learning_rate=1e-3,
    warmup_steps=10,
    dtype="float32",
)
TRAINING_CHARACTERS, HELD_OUT_CHARACTERS, DOCUMENT_CHARACTERS = 600_000, 20_000, 1000
LANGUAGES = ("thai", "english")


@dataclass(frozen=True)
class Texts:
    """Documents of one language; none is in both parts."""

    training: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Bits:
    """Bits per character of held-out text; `init` is "base" for the model before its vocabulary was extended."""

    init: str
    seed: int
    step: int
    thai: float
    english: float


def demo_texts() -> dict[str, Texts]:
    corpus = build_text(0)
    return {
        "thai": Texts(corpus.pretrain_th, corpus.heldout_th),
        "english": Texts(corpus.pretrain_en, corpus.heldout_en),
    }


def sample_texts(path: Path) -> Texts:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"][:DOCUMENT_CHARACTERS] for line in lines]
    documents = sorted(set(documents))
    random.Random(0).shuffle(documents)
    held_out = _take(documents, HELD_OUT_CHARACTERS)
    return Texts(_take(documents[len(held_out) :], TRAINING_CHARACTERS), held_out)


def _take(documents: list[str], characters: int) -> list[str]:
    taken: list[str] = []
    while characters > 0 and len(taken) < len(documents):
        characters -= len(documents[len(taken)])
        taken.append(documents[len(taken)])
    return taken


def token_stream(texts: dict[str, Texts], tokenizer: PreTrainedTokenizerBase, seed: int, tokens: int) -> np.ndarray:
    """So many ids: documents in the order of the seed, again and again, as much Thai as English."""
    size = min(sum(map(len, texts[language].training)) for language in LANGUAGES)
    documents = [document for language in LANGUAGES for document in _take(texts[language].training, size)]
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < tokens:
        rng.shuffle(documents)
        for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    return np.array(ids[:tokens])


def run_seed(seed: int, texts: dict[str, Texts], scratch: Path) -> list[Bits]:
    thai, english = (texts[language].training for language in LANGUAGES)
    base, tokenizer = scratch / f"base-{seed}", scratch / f"tokenizer-{seed}"
    base_tokenizer = train_phi3_style(english + thai, BASE_VOCABULARY)
    # A tenth of the Thai text: phi-3 has seen some Thai too.
    train_base(english + thai[: len(thai) // 10], base_tokenizer, base, steps=BASE_STEPS, seed=seed)
    extended = extend_tokenizer(base_tokenizer, thai, vocab_size=BASE_VOCABULARY + NEW_PIECES)
    extended.save_pretrained(tokenizer)

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, init: str, step: int) -> Bits:
        thai, english = (bits_per_character(model, tokenizer, texts[language].held_out) for language in LANGUAGES)
        return Bits(init, seed, step, thai, english)

    found = [measure(Phi3ForCausalLM.from_pretrained(base), base_tokenizer, "base", 0)]
    print(f"seed {seed}, base: Thai {found[0].thai:.3f}, English {found[0].english:.3f}", flush=True)
    for init in INITS:
        out = scratch / f"{init}-{seed}"
        plan = {"block_size": 1, "block_repeats": [1] * 6, "experts": 1}  # the vocabulary alone
        convert(
            ConvertOptions(base=str(base), out=out, tokenizer=str(tokenizer), init=init, seed=seed, **plan),
            console=Console(quiet=True),
        )
        model = JaiForCausalLM.from_pretrained(out, dtype=torch.float32)
        found.append(measure(model, extended, init, 0))
        ids = token_stream(texts, extended, seed, TRAINING.tokens + 1)
        train(
            model,
            ids,
            TRAINING,
            [step * BATCH for step in MEASURED_AT[1:]],
            lambda rows, _: found.append(measure(model, extended, init, rows // BATCH)),  # noqa: B023  # called here
        )
        last = found[-1]
        print(f"seed {seed}, {init}, {last.step} steps: Thai {last.thai:.3f}, English {last.english:.3f}", flush=True)
    return found


def summary(found: list[Bits]) -> str:
    """Mean and standard deviation over the seeds, and the difference to `mean` of the same seed."""
    lines = [f"{'':14}{'steps':>6}" + "".join(f"{language:>18}{'to mean':>18}" for language in LANGUAGES)]
    for init in ("base", *INITS):
        for step in MEASURED_AT if init != "base" else (0,):
            rows = [bits for bits in found if (bits.init, bits.step) == (init, step)]
            line = f"{init:14}{step:6}"
            for language in LANGUAGES:
                line += f"{mean_and_spread([getattr(bits, language) for bits in rows], '.3f'):>18}"
                means = {b.seed: getattr(b, language) for b in found if (b.init, b.step) == ("mean", step)}
                differences = [getattr(bits, language) - means[bits.seed] for bits in rows]
                line += f"{mean_and_spread(differences, '.3f') if init not in ('mean', 'base') else '':>18}"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thai", type=Path, help="Thai documents, .jsonl.gz with the field text")
    parser.add_argument("--english", type=Path, help="English documents, in the same form")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if (arguments.thai is None) != (arguments.english is None):
        parser.error("give both --thai and --english, or neither")

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.thai:
        texts = {language: sample_texts(getattr(arguments, language)) for language in LANGUAGES}
    else:
        texts = demo_texts()
    with tempfile.TemporaryDirectory() as scratch:
        found = [bits for seed in range(arguments.seeds) for bits in run_seed(seed, texts, Path(scratch))]
    print(summary(found))
    origin = provenance(("torch", "transformers", "tokenizers"))
    rows = [
        {
            "text": f"{arguments.thai.name}, {arguments.english.name}" if arguments.thai else "demo",
            "init": bits.init,
            "seed": str(bits.seed),
            "step": str(bits.step),
            "thai_bits_per_character": f"{bits.thai:.4f}",
            "english_bits_per_character": f"{bits.english:.4f}",
            **origin,
        }
        for bits in found
    ]
    print("appended to", append("embedding_init", rows))


if __name__ == "__main__":
    main()

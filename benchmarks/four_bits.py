# SPDX-License-Identifier: Apache-2.0
"""What few bits cost, language by language: bits per character with weights in bf16, FP8, int8, NF4.

    python benchmarks/four_bits.py train --text Thai=FILE --text English=FILE --out FOLDER [--seeds 3] [--steps 1200]
    python benchmarks/four_bits.py measure MODEL... --heldout Thai=FILE --heldout English=FILE [--name NAME]

`train` makes small JAIs from nothing, with four experts, on the tokenizer ablation's text, one for each seed, and
writes what it holds out (`heldout_LANGUAGE.txt`). `measure` rounds the weights of each model in each form, computes
everything in float32, and appends to `benchmarks/results/four_bits.csv`: mean over the models, and how far they are
apart. Held-out files have an empty line between texts, as `jai demo` writes them (`corpus/heldout_th.txt`).

Experts and the linear layers of attention are rounded; embeddings, head, routers and norms stay. So only the weights'
rounding is measured: FP8 on a GPU rounds the activations too.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from records import append, provenance
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils import logging as transformers_logging

from jai import JaiConfig, JaiForCausalLM
from jai.modeling_jai import JaiExperts
from jai.small_model import bits_per_character, train
from jai.small_model_options import Training
from jai.tokenization.ablation.text import encode_stream, reading_order, split_text
from jai.tokenization.corpus import open_sources
from jai.tokenization.phi3_style import train_phi3_style

VOCABULARY, CONTEXT, BATCH_ROWS = 4096, 128, 8
TOKENIZER_CHARACTERS, HELDOUT_CHARACTERS, LONGEST = 1_000_000, 40_000, 400
WEIGHTS = {"Thai": 2.0}  # the ablation's mixture, 2 : 1 by characters
# Matrices of multiples of 128, the blocks of FP8.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "block_size": 1,
    "block_repeats": [1, 2, 1],
    "skip_alpha": 0.1,
    "num_local_experts": 4,
    "initializer_range": 0.05,
    "max_position_embeddings": 1024,
}


# --- The forms


@torch.no_grad()
def _round(model: PreTrainedModel, rounded: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """Round the weights of experts and linear layers in place, matrix by matrix."""
    for name, module in model.named_modules():
        if isinstance(module, JaiExperts):
            for stack in (module.gate_up_proj, module.down_proj):
                for matrix in stack:
                    matrix.copy_(rounded(matrix))
        elif isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.copy_(rounded(module.weight))
    return model


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _bf16(folder: Path) -> PreTrainedModel:
    return _round(_load(folder), lambda weight: weight.bfloat16().float())


def _int8(folder: Path) -> PreTrainedModel:
    """A scale for each row, as torchao's `Int8WeightOnlyConfig`."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale.clamp_min(1e-12)).round().clamp(-127, 127) * scale

    return _round(_load(folder), rounded)


def _fp8(folder: Path) -> PreTrainedModel:
    """By transformers' own operation: e4m3, a scale for each block of 128 x 128; what is no multiple of it stays."""
    quantize = Fp8Quantize(FineGrainedFP8HfQuantizer(FineGrainedFP8Config(), pre_quantized=False))

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        made = quantize.convert({"weight": [weight]})
        scale = made.get("weight_scale_inv")
        if scale is None:
            return weight
        rows, columns = (size // blocks for size, blocks in zip(weight.shape, scale.shape))
        return made["weight"].float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    return _round(_load(folder), rounded)


def _nf4(folder: Path, *, double: bool = False, skip: list[str] | None = None) -> PreTrainedModel:
    """As `from_pretrained` quantises; bitsandbytes' products on a CPU may be in bf16, so dequantised."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    return model.dequantize()


ATTENTION = ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj"]
FORMS: dict[str, tuple[float, Callable[[Path], PreTrainedModel]]] = {
    "float32": (4.0, _load),
    "bf16": (2.0, _bf16),
    "int8": (1.0, _int8),
    "FP8": (1.0, _fp8),
    "NF4": (0.5625, _nf4),
    "NF4, double quantisation": (0.516, lambda folder: _nf4(folder, double=True)),
    "NF4, experts only": (0.5625, lambda folder: _nf4(folder, skip=ATTENTION)),
}


# --- Models


def train_models(texts: dict[str, Path], out: Path, seeds: int, steps: int) -> None:
    documents = {name: _documents(path) for name, path in texts.items()}
    text = split_text(documents, 20, HELDOUT_CHARACTERS, LONGEST)
    out.mkdir(parents=True, exist_ok=True)
    for language, pieces in text.heldout.items():
        (out / f"heldout_{language}.txt").write_text("\n\n".join(_flat(pieces)) + "\n", encoding="utf-8")
    tokenizer = train_phi3_style(_beginning(text.train), vocab_size=VOCABULARY)
    training = Training(
        tokens=steps * BATCH_ROWS * CONTEXT,
        context=CONTEXT,
        batch_rows=BATCH_ROWS,
        learning_rate=3e-3,
        warmup_steps=50,
        decay=True,
        dtype="float32",
    )
    weights = {language: WEIGHTS.get(language, 1.0) for language in text.train}
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        if (folder / "tokenizer.json").exists():
            continue
        stream = encode_stream(tokenizer, reading_order(text, weights, seed), training.rows, CONTEXT)
        torch.manual_seed(seed)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
        model = JaiForCausalLM(JaiConfig(vocab_size=len(tokenizer), **ids, **SHAPE))
        train(model, stream.ids, training, [training.rows], on_step=_show(seed))
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _documents(path: Path) -> Iterator[str]:
    return (document.text for source in open_sources([path]) for part in source.parts for document in part.read())


def _beginning(train: dict[str, list[str]]) -> list[str]:
    """So many characters of each language for the tokenizer."""
    kept = []
    for pieces in train.values():
        left = TOKENIZER_CHARACTERS
        for piece in pieces:
            kept.append(piece)
            left -= len(piece)
            if left < 0:
                break
    return kept


def _flat(pieces: list[str]) -> list[str]:
    return [" ".join(piece.split()) for piece in pieces]


def _show(seed: int) -> Callable[[int, float], None]:
    def show(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"seed {seed}, step {step}: {loss:.3f} nats a token", flush=True)

    return show


# --- Measuring


@dataclass(frozen=True)
class Result:
    """Bits per character of one form and language, a value for each model."""

    form: str
    language: str
    bits: list[float]


def measure(folders: list[Path], heldout: dict[str, list[str]]) -> list[Result]:
    results = []
    for form, (_, load) in FORMS.items():
        found: dict[str, list[float]] = {language: [] for language in heldout}
        for folder in folders:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
            model = load(folder).float().eval()
            for language, pieces in heldout.items():
                found[language].append(bits_per_character(model, tokenizer, pieces))
        results += [Result(form, language, bits) for language, bits in found.items()]
        print(form, {language: [round(value, 5) for value in bits] for language, bits in found.items()}, flush=True)
    return results


def report(name: str, results: list[Result]) -> None:
    whole = {result.language: result.bits for result in results if result.form == "float32"}
    rows = []
    for result in results:
        cost = [value / base - 1 for value, base in zip(result.bits, whole[result.language])]
        rows.append(
            {
                "model": name,
                "form": result.form,
                "bytes_a_weight": f"{FORMS[result.form][0]:g}",
                "language": result.language,
                "bits_per_character": f"{statistics.mean(result.bits):.4f}",
                "cost_percent": f"{100 * statistics.mean(cost):.2f}",
                "apart_percent": f"{100 * statistics.stdev(cost):.2f}" if len(cost) > 1 else "",
                "models": str(len(result.bits)),
                **provenance(("torch", "transformers", "bitsandbytes")),
            }
        )
    languages = list(whole)
    print(f"\n| {name} | bytes a weight | {' | '.join(languages)} |\n| --- | --- |{' --- |' * len(languages)}")
    for form in FORMS:
        cells = []
        for row in (row for row in rows if row["form"] == form):
            apart = f" ± {row['apart_percent']}" if row["apart_percent"] else ""
            cells.append(f"{row['bits_per_character']} ({float(row['cost_percent']):+.2f}{apart} %)")
        print(f"| {form} | {FORMS[form][0]:g} | {' | '.join(cells)} |")
    print(f"\nappended to {append('four_bits', rows)}")


def _pairs(words: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (word.partition("=") for word in words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("--text", action="append", required=True, metavar="LANGUAGE=FILE")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--steps", type=int, default=1200)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("models", nargs="+", type=Path)
    measuring.add_argument("--heldout", action="append", required=True, metavar="LANGUAGE=FILE")
    measuring.add_argument("--name", default="small JAI")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.verb == "train":
        train_models(_pairs(arguments.text), arguments.out, arguments.seeds, arguments.steps)
        return
    heldout = {
        language: [text for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()]
        for language, path in _pairs(arguments.heldout).items()
    }
    report(arguments.name, measure(arguments.models, heldout))


if __name__ == "__main__":
    main()

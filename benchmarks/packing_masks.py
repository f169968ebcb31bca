# SPDX-License-Identifier: Apache-2.0
"""Draw what each packing strategy lets a token see, from real plans over a tiny corpus: docs/packing-masks.png.

    python benchmarks/packing_masks.py [--out docs/packing-masks.png]

The masks are the ones that transformers makes of the sequences' positions, as the model gets them.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from transformers.masking_utils import create_causal_mask

from jai import JaiConfig
from jai.pretraining.dataset import PackedSequences
from jai.pretraining.plan import SequencePlan
from jai.pretraining.shards import PackedCorpus, PackedSourceEntry, ShardWriter, write_index
from jai.pretraining.shares import Shares, SourceShare
from jai.reports import BLUE, GREY, INK, ORANGE, figure_style

CONTEXT = 48
LANGUAGES = {"en": BLUE, "th": ORANGE}
STRATEGIES = {
    "isolated": "documents stay whole, and do not see each other",
    "concatenated": "documents follow each other, and see back",
    "xlda": "two languages and more, and documents see back",
    "paired-isolated": "the text of xlda, documents apart",
}


def tiny_corpus(folder: Path) -> PackedCorpus:
    """Documents of 5 to 60 tokens, a quarter of them Thai."""
    random = np.random.default_rng(4)
    entries = []
    for language, count in (("en", 90), ("th", 30)):
        lengths = random.integers(5, 30, count)
        writer = ShardWriter(folder, f"{language}-00000", has_quality=False)
        writer.write(np.ones(lengths.sum(), "<u2"), lengths, None)
        entry = PackedSourceEntry(language, [language], False, count, int(lengths.sum()), shards=[writer.close()])
        entries.append(entry)
    tokenizer = {"name": "none", "sha256": "", "vocabulary": 2, "eos_token_id": 0}
    shares = Shares({language: SourceShare() for language in LANGUAGES})
    write_index(folder, np.dtype("<u2"), tokenizer, entries, shares, {})
    return PackedCorpus.open(folder)


def mask_of(positions: torch.Tensor) -> np.ndarray:
    """Which token (row) sees which (column), `(context, context)`, by transformers."""
    config = JaiConfig(num_hidden_layers=1, block_size=1, block_repeats=[1], attn_implementation="eager")
    mask = create_causal_mask(config, torch.zeros(1, CONTEXT, 1), None, None, position_ids=positions[None])
    return mask[0, 0].numpy() == 0


def draw(axes, plan: SequencePlan, sequence: int, strategy: str) -> None:
    item = PackedSequences(plan)[sequence]
    pieces = plan.pieces(sequence)
    borders = np.cumsum(pieces.lengths)[:-1]
    colors = np.array([to_rgb(LANGUAGES[plan.languages[language]]) for language in item["language_ids"].tolist()])
    image = np.ones((CONTEXT, CONTEXT, 3))
    sees = mask_of(item["position_ids"])
    # What is seen has the colour of the language that it is in, paler where it is in another document.
    document = np.repeat(np.arange(len(pieces)), pieces.lengths)
    same = document[:, None] == document[None]
    strength = np.where(same, 0.95, 0.45)[..., None]
    image = np.where(sees[..., None], strength * colors[None] + (1 - strength), image)
    axes.imshow(image, interpolation="nearest")
    for border in borders:
        axes.axhline(border - 0.5, color=GREY, linewidth=0.5)
        axes.axvline(border - 0.5, color=GREY, linewidth=0.5)
    axes.set_title(f"{strategy}\n", fontweight="bold")
    axes.text(0, 1.02, STRATEGIES[strategy], transform=axes.transAxes, fontsize=7.5)
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/packing-masks.png"))
    arguments = parser.parse_args()
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as scratch, figure_style():
        corpus = tiny_corpus(Path(scratch))
        figure, panels = plt.subplots(1, 4, figsize=(11, 3.3), layout="constrained")
        for axes, strategy in zip(panels, STRATEGIES):
            draw(axes, SequencePlan(corpus, CONTEXT, strategy=strategy, rho=1.0), 2, strategy)
        panels[0].set_ylabel("a token …")
        panels[0].set_xlabel("… sees")
        handles = [Patch(color=color, label=language) for language, color in LANGUAGES.items()]
        handles.append(Patch(color="#fff", label="paler: in another document"))
        figure.legend(handles=handles, loc="outside lower right", ncols=3, labelcolor=INK)
        figure.savefig(arguments.out, dpi=150)
    print("written to", arguments.out)


if __name__ == "__main__":
    main()

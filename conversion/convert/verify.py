# SPDX-License-Identifier: Apache-2.0
"""Prove a conversion by its logits: the same text through phi-3 and through the JAI that was made from it."""

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from rich import filesize
from rich.console import Console
from transformers import Phi3ForCausalLM

from jai.configuration_jai import JaiConfig
from jai.conversion.convert.plan import load_phi3_config
from jai.conversion.inputs.hub import resolve_checkpoint
from jai.conversion.inputs.reader import CheckpointReader
from jai.errors import UserError
from jai.modeling_jai import JaiForCausalLM
from jai.tokenization.loading import has_tokenizer, load_tokenizer

DEFAULT_TEXT = Path(__file__).with_name("verify.txt")
SAME_FUNCTION_KL = 1e-9
_MAX_TOKENS = 512


@dataclass(frozen=True)
class Verification:
    """How far a JAI is from the phi-3 that it was made from, on the same token ids.

    Attributes:
        tokens: predicted tokens.
        kl: mean KL(phi-3 ‖ JAI) over the base's vocabulary, in nats a token.
        max_difference: largest difference of two logits.
        base_loss: phi-3's mean cross-entropy, in nats a token.
        loss: the JAI's mean cross-entropy over the same vocabulary.
        random_ids: whether the ids were drawn at random, because the base has no tokenizer.
    """

    tokens: int
    kl: float
    max_difference: float
    base_loss: float
    loss: float
    random_ids: bool

    @property
    def same_function(self) -> bool:
        return self.kl < SAME_FUNCTION_KL


@torch.inference_mode()
def verify(
    base: str, converted: Path, text: Path = DEFAULT_TEXT, *, console: Console | None = None
) -> Verification | None:
    """Compare a converted checkpoint with its base in fp32 and print the result.

    Both read the ids that the base's tokenizer makes of `text`, in contexts of up to 512 tokens, and the JAI's logits
    are cut to the base's vocabulary: new tokens cannot be compared with anything.

    Args:
        base: folder or Hub id of the phi-3 checkpoint.
        converted: folder of the JAI.
        text: UTF-8 text to compare on.
        console: where to print; None is standard output.

    Returns:
        How far they are, or None where there is too little memory for either of them.

    Raises:
        UserError: if a folder holds no such model, or the text is too short.
    """
    console = console or Console()
    base_folder = resolve_checkpoint(base)
    base_config = load_phi3_config(base_folder)
    context = min(_MAX_TOKENS, base_config.max_position_embeddings, base_config.sliding_window or _MAX_TOKENS)
    ids, random_ids = _token_ids(base_folder, base_config.vocab_size, text)
    contexts = [chunk.unsqueeze(0) for chunk in ids.split(context) if len(chunk) > 1]
    if not contexts:
        raise UserError(f"{text} has {len(ids)} tokens; give a text of at least 2.")

    if not _fits(base_folder, converted, console):
        return None
    phi3 = Phi3ForCausalLM.from_pretrained(base_folder, dtype=torch.float32, local_files_only=True).eval()
    base_logits = [phi3(chunk).logits[0, :-1] for chunk in contexts]
    del phi3  # before the JAI is loaded: the two together may not fit

    jai = JaiForCausalLM.from_pretrained(
        converted, config=JaiConfig.from_pretrained(converted), dtype=torch.float32
    ).eval()
    kl = base_loss = loss = max_difference = 0.0
    tokens = 0
    for chunk, expected_logits in zip(contexts, base_logits):
        logits = jai(chunk).logits[0, :-1, : base_config.vocab_size]
        # In fp64, or the rounding of the softmax itself (1e-9) would pass for a difference.
        expected = F.log_softmax(expected_logits.double(), dim=-1)
        log_probs = F.log_softmax(logits.double(), dim=-1)
        labels = chunk[0, 1:]
        kl += F.kl_div(log_probs, expected, reduction="sum", log_target=True).item()
        base_loss += F.nll_loss(expected, labels, reduction="sum").item()
        loss += F.nll_loss(log_probs, labels, reduction="sum").item()
        max_difference = max(max_difference, (logits - expected_logits).abs().max().item())
        tokens += len(labels)
    result = Verification(tokens, max(kl / tokens, 0.0), max_difference, base_loss / tokens, loss / tokens, random_ids)
    _print(console, result)
    return result


def _fits(base: Path, converted: Path, console: Console) -> bool:
    """Whether the larger of the two fits into memory in fp32; else say that it does not."""
    parameters = max(
        sum(math.prod(shape) for shape in CheckpointReader(folder).shapes.values()) for folder in (base, converted)
    )
    needed, free = parameters * torch.float32.itemsize, psutil.virtual_memory().available
    if needed > free:
        console.print(
            f"[yellow]Note:[/] the logits were not compared: that takes {filesize.decimal(needed)} of memory, and "
            f"{filesize.decimal(free)} are free.",
            highlight=False,
        )
    return needed <= free


def _token_ids(base_folder: Path, vocab_size: int, text: Path) -> tuple[torch.Tensor, bool]:
    if not has_tokenizer(base_folder):
        return torch.randint(vocab_size, (_MAX_TOKENS,), generator=torch.Generator().manual_seed(0)), True
    content = text.read_text(encoding="utf-8")
    return torch.tensor(load_tokenizer(base_folder)(content, add_special_tokens=False)["input_ids"]), False


def _print(console: Console, result: Verification) -> None:
    verdict = "[green]the same function[/]" if result.same_function else "[yellow]another function[/]"
    source = "random ids, as the base has no tokenizer" if result.random_ids else "text"
    console.print(f"Verified on {result.tokens:,} tokens ({source}), in fp32: {verdict}.")
    console.print(f"  KL(phi-3 ‖ JAI)  {result.kl:.3g} nats a token   (the same function: below {SAME_FUNCTION_KL:g})")
    console.print(f"  largest logit difference  {result.max_difference:.3g}")
    console.print(f"  loss  {result.base_loss:.4f} → {result.loss:.4f}  ({result.loss - result.base_loss:+.4f})")

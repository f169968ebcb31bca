# SPDX-License-Identifier: Apache-2.0
"""Prove a conversion by its logits: the same text through phi-3 and through the JAI that was made from it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from rich import filesize
from rich.console import Console
from transformers import Phi3Config, Phi3ForCausalLM

from jai.configuration_jai import JaiConfig
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.plan import origins
from jai.conversion.inputs.hub import resolve_checkpoint
from jai.conversion.inputs.phi3 import load_phi3_config
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.inputs.values import dtype_names, is_rounded
from jai.errors import UserError
from jai.files import read_text
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


def verify_conversion(options: ConvertOptions, *, console: Console | None = None) -> Verification | None:
    """Compare the output of a conversion with its base, and refuse another function where the same was asked for.

    Args:
        options: of the conversion, which is done.
        console: where to print; None is standard output.

    Returns:
        As `verify`.

    Raises:
        UserError: as `verify`, and if the function changed though none of the options changes it. The output stays
            where it is.
    """
    console = console or Console()
    result = verify(options.base, options.out, options.verify_text or DEFAULT_TEXT, console=console)
    if result is None or result.same_function:
        return result
    changes = [*_changes_of_function(options)]
    if changes:
        console.print(f"As was to be expected: {'; '.join(changes)}.", highlight=False, markup=False, soft_wrap=True)
        return result
    if options.start_alpha:
        raise UserError(
            f"The JAI in {options.out} is another function than {options.base} (KL {result.kl:.3g}): its later copies "
            f"begin as the identity, but skip_alpha {options.start_alpha:g} adds the anchor to what they leave alone. "
            "Give --skip-alpha 0 to keep the function, or --duplicate-init copy to change it."
        )
    raise UserError(
        f"The JAI in {options.out} is another function than {options.base} (KL {result.kl:.3g}), though no option "
        "changes it. Do not use it: remove it, and report this with the command and the versions."
    )


def _changes_of_function(options: ConvertOptions) -> Iterator[str]:
    """What in the options lets the output compute something else than the base."""
    folder = resolve_checkpoint(options.base)
    base, config = load_phi3_config(folder), JaiConfig.from_pretrained(options.out)
    layers = origins(options, base.num_hidden_layers)
    first_copies = list(dict.fromkeys(layers))
    if first_copies != list(range(base.num_hidden_layers)):
        yield "the plan leaves out layers of the base, or changes their order"
    if len(layers) > len(first_copies) and options.start_of_copies == "copy":
        yield "later copies begin with the weights of the first"
    if options.experts > 1 and options.start_of_experts != "copy":
        yield f"experts 1 and up begin with expert_init {options.start_of_experts}"
    if options.rope_theta not in (None, (base.rope_parameters or {}).get("rope_theta")):
        yield "the RoPE base is another"
    assert isinstance(config.dtype, torch.dtype)
    if any(is_rounded(dtype, config.dtype) for dtype in CheckpointReader(folder).dtypes.values()):
        yield f"the weights are rounded to {dtype_names([config.dtype])[0]}"


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
        UserError: if a folder holds no such model, the text is too short, or the logits of either are not finite.
    """
    console = console or Console()
    base_folder = resolve_checkpoint(base)
    base_config = load_phi3_config(base_folder)
    context = min(_MAX_TOKENS, base_config.max_position_embeddings, base_config.sliding_window or _MAX_TOKENS)
    ids, random_ids = _token_ids(base_folder, base_config, text)
    contexts = [chunk.unsqueeze(0) for chunk in ids.split(context) if len(chunk) > 1]
    if not contexts:
        raise UserError(f"{text} has {len(ids)} tokens; give a text of at least 2.")

    if not _fits(base_folder, converted, console):
        return None
    prefix = CheckpointReader(base_folder).wrapper_prefix
    phi3 = Phi3ForCausalLM.from_pretrained(
        base_folder,
        config=base_config,
        dtype=torch.float32,
        local_files_only=True,
        key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
    ).eval()
    base_logits = [_finite(phi3(chunk).logits[0, :-1], base) for chunk in contexts]
    del phi3  # before the JAI is loaded: the two together may not fit

    jai = JaiForCausalLM.from_pretrained(
        converted, config=JaiConfig.from_pretrained(converted), dtype=torch.float32
    ).eval()
    kl = base_loss = loss = max_difference = 0.0
    tokens = 0
    for chunk, expected_logits in zip(contexts, base_logits):
        logits = _finite(jai(chunk).logits[0, :-1, : base_config.vocab_size], str(converted))
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


def _finite(logits: torch.Tensor, model: str) -> torch.Tensor:
    if not logits.isfinite().all():
        raise UserError(
            f"{model} computes logits that are not numbers (NaN or infinite) from finite weights, in fp32: some of the "
            "weights are too large. Look at how it was trained, and take another checkpoint."
        )
    return logits


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


def _token_ids(base_folder: Path, base_config: Phi3Config, text: Path) -> tuple[torch.Tensor, bool]:
    vocab_size = base_config.vocab_size
    if not has_tokenizer(base_folder):
        return torch.randint(vocab_size, (_MAX_TOKENS,), generator=torch.Generator().manual_seed(0)), True
    content = read_text(text)
    tokenizer = load_tokenizer(base_folder, config=base_config)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"], dtype=torch.long)
    return ids[ids < vocab_size], False  # the base has no rows for tokens that were added without resizing it


def _print(console: Console, result: Verification) -> None:
    verdict = "[green]the same function[/]" if result.same_function else "[yellow]another function[/]"
    source = "random ids, as the base has no tokenizer" if result.random_ids else "text"
    console.print(f"Verified on {result.tokens:,} tokens ({source}), in fp32: {verdict}.")
    console.print(f"  KL(phi-3 ‖ JAI)  {result.kl:.3g} nats a token   (the same function: below {SAME_FUNCTION_KL:g})")
    console.print(f"  largest logit difference  {result.max_difference:.3g}")
    console.print(f"  loss  {result.base_loss:.4f} → {result.loss:.4f}  ({result.loss - result.base_loss:+.4f})")

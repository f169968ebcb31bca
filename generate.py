# SPDX-License-Identifier: Apache-2.0
"""`jai generate`: text from a checkpoint, streamed as it is made. What needs no model is checked before PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import regex

from jai.auto import load_causal_model
from jai.errors import UserError
from jai.options import argument, check_values, option
from jai.tokenization.chat import check_chat
from jai.tokenization.loading import load_tokenizer, whole_checkpoint
from jai.tokenization.stops import stop_ids

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

_LAST_CLUSTER = regex.compile(r"\X\Z")
_UNFINISHED = "\ufffd"  # what decoders make of bytes that are no character yet


@dataclass(kw_only=True)
class GenerateOptions:
    """What `jai generate` takes."""

    model: str = argument("CKPT", help="Folder or Hub id of a checkpoint with a tokenizer.")
    prompt: str = argument("PROMPT", help="User message; with --raw, the beginning of the text.")
    max_new_tokens: int = option(200, help="Maximum number of tokens to generate.", at_least=1)
    temperature: float = option(0.7, help="Sampling temperature; 0 always takes the most likely token.", at_least=0)
    top_p: float = option(
        0.95, help="Sample from the most likely tokens whose probabilities add up to this.", above=0, at_most=1
    )
    seed: int = option(0, help="Random seed for sampling.", at_least=0, at_most=2**32 - 1)
    raw: bool = option(False, help="Continue the text instead of answering it as a chat message.")
    use_mtp: bool = option(
        False,
        help="Draft tokens with the checkpoint's multi-token prediction layer, for the same text in fewer steps.",
    )
    trust_remote_code: bool = option(
        False, help="Run the model code in the checkpoint instead of the installed package's."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if not self.prompt:
            raise UserError("The prompt is empty. Give some text.")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):  # what a shell makes of other bytes
            raise UserError("The prompt is not UTF-8. Give it in UTF-8.")


def generate(options: GenerateOptions, *, console: Console | None = None) -> str:
    """Generate text and print it as it is made.

    It ends at `max_new_tokens`, or where the checkpoint's `generation_config.json` or its tokenizer end a turn.

    Args:
        options: what to generate from, and how.
        console: where to print; None is standard output.

    Returns:
        The new text, without the prompt and without special tokens.

    Raises:
        UserError: if the checkpoint cannot be loaded, has no tokenizer or one that is larger than its vocabulary, no
            chat template where one is needed, or no layer for multi-token prediction.
    """
    from rich.console import Console

    console = console or Console()
    folder = whole_checkpoint(options.model)
    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    inputs = _encode(tokenizer, options)
    network = _load_model(folder, options)
    rows = cast("torch.Tensor", network.get_input_embeddings().weight).shape[0]
    largest = int(inputs["input_ids"].max())
    if largest >= rows:
        raise UserError(
            f"The tokenizer of {options.model} gives the id {largest} for this prompt, but the model has only {rows:,} "
            "rows in its embeddings. Use the tokenizer that the model was made with."
        )
    if options.use_mtp and not getattr(network.config, "num_mtp_layers", None):
        raise UserError(
            f"{options.model} has no layer for multi-token prediction. `jai pretrain` with `mtp_weight` and `keep_mtp` "
            "makes one; leave --use-mtp out."
        )
    inputs = inputs.to(network.device)

    import torch
    from transformers import set_seed

    set_seed(options.seed)
    if options.temperature == 0:
        sampling: dict[str, Any] = {"do_sample": False}
    else:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    give = partial(console.print, end="", markup=False, highlight=False, soft_wrap=True)
    with torch.inference_mode(), counted_passes(network) as passes:
        output = network.generate(  # type: ignore[operator]  # by the stubs a Tensor
            **inputs,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop_ids(network.generation_config, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            streamer=ClusterStreamer(decode, give),
            use_mtp=options.use_mtp,
            **sampling,
        )
    console.print()
    if options.use_mtp:
        drafts = Drafts.counted(output.shape[1] - inputs["input_ids"].shape[1], len(passes))
        console.print(f"{drafts.accepted} of {drafts.made} drafts accepted", style="dim", highlight=False)
    (text,) = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@dataclass(frozen=True)
class Drafts:
    """Tokens that a layer for the second next token has drafted: one in each pass through the model but the first."""

    made: int
    accepted: int

    @classmethod
    def counted(cls, new_tokens: int, passes: int) -> Drafts:
        """Of one text with so many new tokens: each pass gives one, and one more where it accepts the draft."""
        return cls(passes - 1, new_tokens - passes)


@contextmanager
def counted_passes(network: PreTrainedModel) -> Iterator[list[None]]:
    """A list that grows by one with each forward pass through a model."""
    passes: list[None] = []
    hook = network.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


class ClusterStreamer:
    """A streamer for `generate` that gives out text by grapheme clusters: a letter with all its marks, never a part.

    transformers' `TextStreamer` waits for a space, which Thai has at the end of a phrase. Here a cluster is given
    out as soon as the next one begins, and nothing waits longer. Only one sequence at a time can be streamed.

    Args:
        decode: text of ids, such as `partial(tokenizer.decode, skip_special_tokens=True)`.
        give: called with each piece of text. Together they are the text of all new tokens, unless the model writes
            bytes that are no UTF-8: they are decoded anew with what was before them, which has been given out already.
    """

    def __init__(self, decode: Callable[[list[int]], str], give: Callable[[str], Any]):
        self._decode = decode
        self._give = give
        self._is_prompt = True
        self._ids: list[int] = []
        # Text is decoded from `_window` on: the tokens before `_done` are given out but for `_held`, and are there
        # because what a token stands for depends on the one before it.
        self._window = self._done = 0
        self._held = ""

    def put(self, value: Any) -> None:
        """Take the ids of the prompt, then of each new token: a tensor of shape (1, tokens) or (tokens,)."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        new = self._new_text()
        if new and not new.endswith(_UNFINISHED):
            self._advance(new)

    def end(self) -> None:
        """Give out what is left."""
        self._advance(self._new_text())
        if self._held:
            self._give(self._held)
        self._held = ""
        self._is_prompt = True
        self._ids, self._window, self._done = [], 0, 0

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._window : self._done])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _advance(self, new: str) -> None:
        text = self._held + new
        last = _LAST_CLUSTER.search(text)
        start = last.start() if last else 0
        if start:
            self._give(text[:start])
        self._held = text[start:]
        self._window, self._done = self._done, len(self._ids)


def _encode(tokenizer: PreTrainedTokenizerBase, options: GenerateOptions) -> BatchEncoding:
    if options.raw:
        inputs = tokenizer(options.prompt, return_tensors="pt")
        if not inputs["input_ids"].numel():
            raise UserError("The prompt has no tokens. Give some text.")
        return inputs
    if tokenizer.chat_template is None:
        raise UserError(f"{options.model} has no chat template. Use --raw to continue the text itself.")
    check_chat(options.model, tokenizer, "Use --raw to do without.")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return cast("BatchEncoding", inputs)  # as return_dict asks


def _load_model(folder: Path, options: GenerateOptions) -> PreTrainedModel:
    import torch

    device_map = "auto" if torch.cuda.is_available() else "cpu"
    return cast(
        "PreTrainedModel",
        load_causal_model(
            options.model,
            folder,
            trust_remote_code=options.trust_remote_code,
            dtype="auto",
            device_map=device_map,
        ),
    )

# SPDX-License-Identifier: Apache-2.0
"""Small language models for experiments: built, trained on a stream of tokens, and measured in bits per character.

The tokenizer ablation, the demo's base and the benchmarks train with it; a JAI itself is trained by TRL (`trainers/`).
Shapes: T tokens of a step, H hidden size, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from jai.planning.flops import LEARNS, attention_flops
from jai.small_model_options import ModelShape, Training

# Rows of logits at once. With 64,000 entries in bf16 that is 64 MB, and each pass over them is half as quick as when
# all 4,096 rows of a step are made at once in fp32.
_LOSS_ROWS = 512
_SCORE_ROWS = 128


def build_model(shape: ModelShape, vocab_size: int, context: int, seed: int) -> Phi3ForCausalLM:
    """A phi-3 with random weights. With the same seed the layers are the same for every vocabulary."""

    def build(entries: int) -> Phi3ForCausalLM:
        torch.manual_seed(seed)
        return Phi3ForCausalLM(
            Phi3Config(
                vocab_size=entries,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_hidden_layers=shape.num_hidden_layers,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.num_attention_heads,
                max_position_embeddings=context,
                original_max_position_embeddings=context,
                initializer_range=shape.initializer_range,
                sliding_window=None,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,  # end of text, as which phi-3 pads, must be learnt
            )
        )

    model = build(vocab_size)
    model.model.layers.load_state_dict(build(1).model.layers.state_dict())
    return model


def extend_model(
    model: Phi3ForCausalLM, shape: ModelShape, context: int, vocab_size: int, pieces: dict[int, list[int]], seed: int
) -> Phi3ForCausalLM:
    """The same model for a larger vocabulary: new rows are the mean of their pieces' rows, where they have any."""
    extended = build_model(shape, vocab_size, context, seed)
    extended.model.layers.load_state_dict(model.model.layers.state_dict())
    extended.model.norm.load_state_dict(model.model.norm.state_dict())
    with torch.no_grad():
        for old, new in (
            (model.model.embed_tokens, extended.model.embed_tokens),
            (model.lm_head, extended.lm_head),
        ):
            new.weight[: len(old.weight)] = old.weight
            for i, ids in pieces.items():
                if ids:
                    new.weight[i] = old.weight[ids].mean(0)
    return extended


def flops_per_token(shape: ModelShape, vocab_size: int, context: int) -> tuple[float, float]:
    """Floating-point operations of training on one token, forwards and backwards: of the layers, and of the head."""
    width, layers = shape.hidden_size, shape.num_hidden_layers
    weights = layers * (4 * width * width + 3 * width * shape.intermediate_size)
    return LEARNS * weights + attention_flops(layers, width, context), LEARNS * width * vocab_size


def train(
    model: PreTrainedModel,
    ids: np.ndarray,
    training: Training,
    stops: Sequence[int],
    at_stop: Callable[[int, float], None] = lambda rows, seconds: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on a stream of tokens from its first row to the last of `stops`.

    Args:
        model: a causal language model of a body (`model`) and a head (`lm_head`). Trained in place; on
            `training.device` afterwards.
        ids: tokens, shape (rows × context + 1,): row r predicts `ids[r × context + 1 : (r + 1) × context + 1]`.
        training: how.
        stops: rows after which `at_stop` is called; the step before a stop is shortened to end at it.
        at_stop: called with the rows and the seconds of training so far.
        on_step: called with the number of each step, from 1, and its loss in nats a token.
    """
    device = torch.device(training.device)
    model.to(device).train()  # type: ignore[arg-type]  # transformers' wrapper has no types
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    stream = torch.from_numpy(ids.astype(np.int64)).to(device)
    dtype = getattr(torch, training.dtype)
    context = training.context
    row, step, seconds = 0, 0, 0.0
    for stop in sorted(set(stops)):
        began = time.perf_counter()
        while row < stop:
            rows = min(training.batch_rows, stop - row)
            part = stream[row * context : (row + rows) * context + 1]
            rate = training.learning_rate * _part_of_rate(training, step, row, max(stops))
            for group in optimizer.param_groups:
                group["lr"] = rate
            hidden_TH = _hidden(model, part[:-1].view(rows, context), dtype).flatten(0, 1)
            loss = HeadLoss.apply(hidden_TH, model.lm_head.weight, part[1:], dtype)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            row, step = row + rows, step + 1
            on_step(step, loss.item())
        seconds += time.perf_counter() - began
        at_stop(row, seconds)


def _part_of_rate(training: Training, step: int, row: int, rows: int) -> float:
    if step < training.warmup_steps or not training.decay:
        return min(1.0, (step + 1) / max(training.warmup_steps, 1))
    return 0.5 * (1 + math.cos(math.pi * row / rows))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a language-model head, with gradients made on the way: (T, V) is never in memory.

    The softmax sums in fp32; logits and probabilities are kept in the dtype of the matrix products.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, dtype):
        hidden, weight = hidden_TH.to(dtype), weight_VH.to(dtype)
        tokens, entries = len(hidden), len(weight)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight_VH)
        # Made once: fresh memory for each part costs as much as the matrix products.
        logits = hidden.new_empty(min(_LOSS_ROWS, tokens), entries)
        probabilities = torch.empty_like(logits)
        loss = hidden_TH.new_zeros((), dtype=torch.float32)
        for start in range(0, tokens, _LOSS_ROWS):
            part = hidden[start : start + _LOSS_ROWS]
            targets = targets_T[start : start + _LOSS_ROWS, None]
            out, p = logits[: len(part)], probabilities[: len(part)]
            torch.mm(part, weight.t(), out=out)
            torch.softmax(out, -1, out=p)
            loss -= p.gather(1, targets).float().clamp_min(1e-30).log().sum()
            p.scatter_add_(1, targets, p.new_full((), -1.0).expand_as(targets))
            torch.mm(p, weight, out=grad_hidden[start : start + _LOSS_ROWS])
            grad_weight += p.t() @ part
        ctx.save_for_backward(grad_hidden.to(hidden_TH.dtype).div_(tokens), grad_weight.div_(tokens))
        return loss / tokens

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, grad_weight * grad_output, None, None


@torch.inference_mode()
def bits_per_character(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[str],
    *,
    context: int = 256,
    batch_rows: int = 16,
    dtype: str = "float32",
) -> float:
    """Bits that the model needs for a character of `pieces`: all tokens of each piece, from its start, once.

    Unlike the loss of a token it can be compared between tokenizers. A piece begins after end of text; the end of text
    after it is not counted, for a piece may end anywhere in its document. Pieces longer than the context are read in
    windows that overlap by half of it.
    """
    device, kind = model.device, getattr(torch, dtype)
    model.eval()
    encoded = tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
    windows = [window for ids in encoded for window in _windows([tokenizer.eos_token_id, *ids], context)]
    windows.sort(key=lambda window: len(window[0]))
    nats = 0.0
    for start in range(0, len(windows), batch_rows):
        batch = windows[start : start + batch_rows]
        length = max(len(ids) for ids, _ in batch)
        # Padding stands after the text, where a causal model does not see it.
        padded = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch], device=device)
        places = torch.arange(length, device=device)
        firsts = torch.tensor([first for _, first in batch], device=device)[:, None]
        ends = torch.tensor([len(ids) for ids, _ in batch], device=device)[:, None]
        scored = ((places >= firsts) & (places < ends))[:, 1:]
        hidden = _hidden(model, padded[:, :-1], kind)
        nats += _nats(hidden[scored].to(kind), model.lm_head.weight.to(kind), padded[:, 1:][scored])
    return nats / math.log(2) / sum(map(len, pieces))


def _windows(ids: list[int], context: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most `context` predictions, and the place in each from which tokens are scored."""
    yield ids[: context + 1], 1
    start = context // 2
    scored = context + 1
    while scored < len(ids):
        yield ids[start : start + context + 1], scored - start
        scored = start + context + 1
        start += context // 2


def _nats(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> float:
    logits = hidden_TH.new_empty(min(_SCORE_ROWS, len(hidden_TH)), len(weight_VH))
    nats = 0.0
    for start in range(0, len(hidden_TH), _SCORE_ROWS):
        part = hidden_TH[start : start + _SCORE_ROWS]
        out = torch.mm(part, weight_VH.t(), out=logits[: len(part)])
        scores = torch.log_softmax(out, -1, dtype=torch.float32)
        nats -= scores.gather(1, targets_T[start : start + _SCORE_ROWS, None]).sum().item()
    return nats


def _hidden(model: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

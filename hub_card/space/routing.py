# SPDX-License-Identifier: Apache-2.0
"""Generate text and record, token by token, which experts each layer chose; the page around it is not known here."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# The hooks see whatever runs through the model, so only one reply is made at a time.
_ONE_REPLY = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """The experts that one layer chose for one token, the most weighty first, and their weights, which sum to 1."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Token:
    """One token of a chat.

    Attributes:
        id: its id.
        piece: how the tokenizer spells it ("▁the", "<0xE0>").
        special: whether it marks a turn and is no text.
        made: whether the model made it; else it is part of the prompt.
        choices: one for each layer that has a router; empty until the token has run through the model, which the last
            token of a reply never does.
    """

    id: int
    piece: str
    special: bool
    made: bool
    choices: tuple[Choice, ...] = ()


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of a JAI (or another model of Mixtral's form), in order of their layers; none of a dense one."""
    layers = model.get_decoder().layers
    return [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "experts")]


@contextmanager
def recorded_choices(model: PreTrainedModel) -> Iterator[list[list[Choice]]]:
    """Yield a list that grows, with every token that runs through the model, by that token's choices, layer by layer.

    For one sequence at a time (batch size 1).
    """
    gates = routers(model)
    tokens: list[list[Choice]] = []
    layers: list[tuple[list[list[int]], list[list[float]]]] = []

    def record(_module: nn.Module, _inputs: tuple, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        _, weights_TK, ids_TK = output
        layers.append((ids_TK.tolist(), weights_TK.tolist()))
        if len(layers) == len(gates):  # the last layer: these tokens have run
            for token in range(len(layers[0][0])):
                tokens.append([Choice(tuple(ids[token]), tuple(weights[token])) for ids, weights in layers])
            layers.clear()

    handles = [gate.register_forward_hook(record) for gate in gates]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> Iterator[list[Token]]:
    """Answer a chat; yield all of its tokens, prompt first, each time that one more is made.

    A consumer that goes away (closes the generator) stops the model.

    Args:
        model: a causal language model with routers, or without any.
        tokenizer: its tokenizer, with a chat template, which transformers renders in a sandbox.
        messages: the turns so far, the user's last: `role` and `content`.
        max_new_tokens: most tokens to make.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.

    Raises:
        ValueError: if the chat and the reply do not fit into the model's context.
    """
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    prompt = inputs["input_ids"][0].tolist()
    if len(prompt) + max_new_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"The chat has {len(prompt)} tokens, and {max_new_tokens} more do not fit into the model's context of "
            f"{model.config.max_position_embeddings}. Begin a new chat, or ask for fewer tokens."
        )
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    stops = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|end|>")} - {None}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

    def token(id_: int, made: bool) -> Token:
        return Token(id_, tokenizer.convert_ids_to_tokens(id_), id_ in specials, made)

    arrived: queue.Queue[_Made | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def work() -> None:
        try:
            with _ONE_REPLY, recorded_choices(model) as choices, torch.inference_mode():
                model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=sorted(stops),
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=_Queued(arrived, choices),
                    stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                    **sampling,
                )
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    tokens = [token(id_, made=False) for id_ in prompt]
    ran = 0
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            for choices in item.choices:
                tokens[ran] = replace(tokens[ran], choices=tuple(choices))
                ran += 1
            tokens.append(token(item.id, made=True))
            yield list(tokens)
    finally:
        stop.set()
        worker.join()


def load_by_expert(tokens: list[Token], experts: int) -> list[float]:
    """Share of all choices that each expert got; zeros where nothing was chosen."""
    counts = [0] * experts
    for token in tokens:
        for choice in token.choices:
            for expert in choice.experts:
                counts[expert] += 1
    return [count / max(1, sum(counts)) for count in counts]


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class _Made:
    """A new token, and the choices of the tokens that have run since the one before it."""

    id: int
    choices: list[list[Choice]]


class _Queued(BaseStreamer):
    """Hands on every new token; the first thing that `generate` puts is the prompt."""

    def __init__(self, arrived: queue.Queue, choices: list[list[Choice]]):
        self.arrived = arrived
        self.choices = choices
        self.sent: int | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.sent is not None:
            self.arrived.put(_Made(int(value), self.choices[self.sent :]))
        self.sent = len(self.choices)

    def end(self) -> None:
        pass

# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that answers questions in its chat form."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from jai.errors import UserError
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.progress import counted_progress
from jai.evaluation.reply_cache import ChatReply, ChatRequest
from jai.tokenization.stops import END_OF_TURN

if TYPE_CHECKING:
    from rich.console import Console


class CheckpointAsker:
    """Asks a checkpoint through lm-eval's model classes, as `EndpointClient.ask` asks an endpoint.

    Args:
        model: the model, which has a chat template, and what it has answered already.
        name: of the checkpoint.
        seed: of the sampling.
        console: where progress is shown; None shows none.

    Attributes:
        cut: prompts that were longer than the model takes and lost their beginning.
        unfinished: answers that were cut off at `max_tokens`, by a count of the tokens of their text.
    """

    def __init__(self, model: KeptAnswers, name: str, *, seed: int = 0, console: "Console | None" = None):
        self.cut = self.unfinished = 0
        self._model = model
        self._name = name
        self._seed = seed
        self._console = console
        # lm-eval's classes for transformers and vLLM have these.
        self._lm: Any = model.lm

    def ask(self, requests: Sequence[ChatRequest], what: str = "Answering") -> list[ChatReply]:
        """Have all requests answered that are not yet.

        Args:
            requests: what to ask, with `max_tokens`, `temperature` and perhaps `top_p`.
            what: name of the work, for the progress.

        Returns:
            As many replies, in the same order.

        Raises:
            UserError: if the longest answer leaves no room for a question.
        """
        instances = [self._instance(request, number) for number, request in enumerate(requests)]
        self._model.seed = self._seed
        with counted_progress(self._console, what, len(instances)) as tell:
            self._model.tell = lambda done, total: tell(done)
            texts = self._model.generate_until(instances)
        return [self._reply(request, text) for request, text in zip(requests, texts)]

    def _reply(self, request: ChatRequest, text: str) -> ChatReply:
        is_unfinished = len(self._lm.tok_encode(text)) >= request.parameters["max_tokens"]
        self.unfinished += is_unfinished
        return ChatReply(text, self._name, "length" if is_unfinished else "stop")

    def _instance(self, request: ChatRequest, number: int) -> Instance:
        longest = int(request.parameters["max_tokens"])
        room = self._lm.max_length - longest
        if room < 1:
            raise UserError(
                f"{self._name} takes {self._lm.max_length:,} tokens, and an answer may have {longest:,}: no room is "
                "left for a question. Give a smaller --max-new-tokens."
            )
        prompt = self._model.apply_chat_template(list(map(dict, request.messages)))
        self.cut += len(self._lm.tok_encode(prompt)) > room
        temperature = request.parameters["temperature"]
        # A generation config may name the end of text alone (`stop_ids`).
        stops = [END_OF_TURN] if END_OF_TURN in self._lm.tokenizer.get_vocab() else []
        settings = {
            "until": stops,
            "max_gen_toks": longest,
            "temperature": float(temperature),
            "do_sample": temperature > 0,
            **{name: value for name, value in request.parameters.items() if name == "top_p"},
        }
        return Instance("generate_until", {}, (prompt, settings), number)

# SPDX-License-Identifier: Apache-2.0
"""lm-eval's models behind an OpenAI-compatible API, whose faults are one message and never an answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import ClientError
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from requests import RequestException

from jai.errors import UserError


@contextmanager
def _explaining_faults(address: str) -> Iterator[None]:
    """What stays after lm-eval's own retries."""
    try:
        yield
    except (RequestException, ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"The server at {address} does not answer as OpenAI's API does: {reason}. What it answered before is kept: "
            "fix the server or the address, and give the same command again."
        ) from error


class ServedCompletions(LocalCompletionsAPI):
    """`/completions`: log-likelihoods of given tokens, and text that goes on."""

    def tok_encode(self, string: Any, *_: Any, add_special_tokens: bool = True, **__: Any) -> Any:
        """As the classes for checkpoints: with what a tokenizer begins a text with. Theirs has it never or always."""
        return self.tokenizer(string, add_special_tokens=add_special_tokens, return_attention_mask=False).input_ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with _explaining_faults(self.base_url):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        with _explaining_faults(self.base_url):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)


class ServedChat(LocalChatCompletion):
    """`/chat/completions`: replies to conversations."""

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        with _explaining_faults(self.base_url):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @staticmethod
    def parse_generations(outputs: dict[str, Any] | Sequence[dict[str, Any]], **_: Any) -> list[str]:
        """The replies in order. Theirs takes a body without any for an empty reply, and null for a text of its own.

        Raises:
            ValueError: if a body has no replies.
        """
        replies: list[str] = []
        for output in [outputs] if isinstance(outputs, dict) else outputs:
            choices = output.get("choices")
            if not choices:
                raise ValueError(f"a reply has no choices, but {str(output)[:200]}")
            # A reply that was all thought, or cut off in it, has null: it says nothing.
            replies += [each["message"]["content"] or "" for each in sorted(choices, key=lambda each: each["index"])]
        return replies

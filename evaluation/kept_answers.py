# SPDX-License-Identifier: Apache-2.0
"""A model whose answers are kept as they come, so that a run that was killed goes on without asking them again."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM

from jai.evaluation.fitting import is_too_long, refuse_longest_answers
from jai.evaluation.results import whole_lines

_BATCHES = 8  # of one call of the model; what a killed run loses at most
_REQUESTS = 1024  # the same, of a model that makes its batches itself
ANSWERS_FILE = "answers.jsonl"


class KeptAnswers(LM):
    """Asks a model in batches of a like length, and keeps its answers in a file.

    What is asked together does not depend on what is known already: a batch that was not finished is asked again as a
    whole, so a run that was stopped gets the same answers to the last bit as one that was not. So it is with sampled
    answers, if `seed` is set: a batch draws by it and by its own questions. (vLLM draws by its own seed, anew.)

    Args:
        lm: the model.
        path: the file.
        batch_size: sequences that the model takes at a time.
        tell: called with the number of requests that are answered, and with all of them.

    Attributes:
        lm, tell: as given.
        seed: of sampled answers; None leaves the random state as it is.
        too_long: by task, how many requests were longer than the model takes, where it can tell.
    """

    def __init__(self, lm: LM, path: Path, batch_size: int, tell: Callable[[int, int], None] = lambda *_: None):
        super().__init__()
        self.lm = lm
        self._path = path
        self._chunk = batch_size * _BATCHES
        if getattr(lm, "batch_size", None) == "auto":  # of vLLM, which is slow where it is asked little at a time
            self._chunk = max(self._chunk, _REQUESTS)
        self._known = {key: answer for line in whole_lines(path) for key, answer in [json.loads(line)]}
        self._quietly = {"disable_tqdm": True} if isinstance(lm, TemplateLM) else {}
        self.tell = tell
        self.seed: int | None = None
        self.too_long: Counter[str] = Counter()

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.lm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(float(value), bool(is_greedy)) for value, is_greedy in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answers("generate_until", requests)

    def _answers(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        for request in requests if kind == "generate_until" else ():
            refuse_longest_answers(self.lm, request)
        self.too_long.update(str(request.task_name) for request in requests if is_too_long(self.lm, request))
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            text = json.dumps([kind, request.args], ensure_ascii=False, default=str)
            keys.append(hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest())
            seen[text] += 1  # a question that is asked several times has as many answers
        done = 0
        for chunk in self._chunks(kind, requests):
            if any(keys[index] not in self._known for index in chunk):
                self._begin_drawing(keys[chunk[0]])
                answers = getattr(self.lm, kind)([requests[index] for index in chunk], **self._quietly)
                self._keep([(keys[index], answer) for index, answer in zip(chunk, answers, strict=True)])
            done += len(chunk)
            self.tell(done, len(requests))
        return [self._known[key] for key in keys]

    def _begin_drawing(self, key: str) -> None:
        if self.seed is not None:
            from transformers import set_seed

            set_seed(int(hashlib.sha256(f"{self.seed} {key}".encode()).hexdigest()[:8], 16))

    def _chunks(self, kind: str, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Numbers of requests; those with one context, as a question's choices, stay together.

        What is generated comes by length, the longest first, which takes least padding. Log-likelihoods come in the
        order of the contexts' letters: questions on one passage follow each other, and share it.
        """
        by_context: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_context.setdefault(str(request.args[0]), []).append(index)
        contexts = sorted(by_context)
        if kind == "generate_until":
            contexts.sort(key=lambda context: -len(context))
        chunk: list[int] = []
        for context in contexts:
            chunk += by_context[context]
            if len(chunk) >= self._chunk:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _keep(self, answers: Sequence[tuple[str, Any]]) -> None:
        new = [(key, answer) for key, answer in answers if key not in self._known]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in new)
        # As they are read: a run that goes on then has the same values.
        self._known.update(json.loads(json.dumps(new)))

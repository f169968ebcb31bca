# SPDX-License-Identifier: Apache-2.0
"""Whether what is asked fits a model: lm-eval's classes cut what does not at its beginning, and only log it."""

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from jai.errors import UserError

UNLIMITED = 10**9  # tokens: the length of a server's model, which knows its own


def is_too_long(lm: LM, request: Instance) -> bool:
    """Whether a request is longer than the model takes, and loses its beginning.

    False where there is no telling: a chat server is sent texts, and counts by itself.
    """
    if not _has_length(lm) or request.request_type == "loglikelihood_rolling":
        return False
    text = str(request.args[0])
    if request.request_type == "generate_until":
        room = lm.max_length - _new_tokens(lm, request)
    else:
        text += str(request.args[1])
        room = _room_for_scoring(lm)
    # A token stands for a byte at least, so few requests need be encoded.
    return len(text.encode()) >= room and len(lm.tok_encode(text)) > room


def refuse_longest_answers(lm: LM, request: Instance) -> None:
    """Refuse a request whose answer may take all that the model takes, question included.

    Raises:
        UserError: naming the task.
    """
    if _has_length(lm) and _new_tokens(lm, request) >= lm.max_length:
        raise UserError(
            f"The task {request.task_name} lets the model write {_new_tokens(lm, request)} tokens, and the model takes "
            f"{lm.max_length} in all. Set a smaller max_gen_toks in the suite's settings of the task."
        )


def _has_length(lm: LM) -> bool:
    return isinstance(lm, TemplateLM) and (not isinstance(lm, TemplateAPI) or lm.tokenized_requests)


def _room_for_scoring(lm: TemplateLM) -> int:
    """Tokens of a context and its continuation."""
    if isinstance(lm, HFLM):
        return lm.max_length + 1  # the last one is predicted, and not read
    # A server and vLLM generate a token in any case; lm-eval's class for servers has taken that off already.
    return lm.max_length if isinstance(lm, TemplateAPI) else lm.max_length - 1


def _new_tokens(lm: TemplateLM, request: Instance) -> int:
    default = lm._max_gen_toks if isinstance(lm, TemplateAPI) else lm.max_gen_toks
    return int(normalize_gen_kwargs(request.args[1], default)["max_gen_toks"])

# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` for a JAI: `python -m jai.serve MODEL`, and the options of `transformers serve`.

That server looks for a checkpoint's class among the names of transformers itself, so it finds no class from outside
(transformers 5.16 to 5.23): neither a registered one nor, with `--trust-remote-code`, one in the repository. Here the
name leads to AutoModelForCausalLM, which finds both. A copy of this file runs without the package, as
`python serve.py MODEL --trust-remote-code`.

That server takes no adapter, whose folder has no configuration of a model. Here it is loaded on the base that it names.

That server also takes a temperature and goes on to answer greedily, where the checkpoint's generation config does not
sample: five answers to one prompt are then one and the same. Here a request with a temperature above 0 is sampled, as
by any other server with this API. With `--continuous-batching` the first request decides for all.

And that server believes whatever a request says: a wrong kind of value ends in a traceback and status 500, and a huge
`max_tokens` keeps its only thread busy for ever. Here what cannot be answered is refused with status 400, 422 where it
is no JSON object, and an answer ends where the model's context does.
"""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.cli.transformers import app

_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted.

    Args:
        arguments: a model and the options of `transformers serve`; None is the command line.
    """
    adapt_server()
    app(["serve", *(sys.argv[1:] if arguments is None else arguments)], prog_name="jai")


def adapt_server() -> None:
    """Change transformers' server in this process, once, to what the top of this file says."""
    # Not at the top: what the imports there import puts another module in the place of `transformers`.
    import transformers
    from transformers.cli.serving import model_manager, server, utils

    transformers.JaiForCausalLM = AutoModelForCausalLM  # type: ignore[attr-defined]
    # There is no public way to any of these.
    handler = utils.BaseHandler
    handler._build_generation_config = _sampling_where_asked(handler._build_generation_config)  # type: ignore[method-assign]
    handler._validate_request = _checking(handler._validate_request)  # type: ignore[method-assign]
    for manager in (utils.GenerateManager, utils.CBGenerateManager):
        for name in ("generate_streaming", "generate_non_streaming"):
            setattr(manager, name, _within_context(getattr(manager, name)))
    server.build_server = _refusing(server.build_server)
    models = model_manager.ModelManager
    models._load_model = _loading_adapters(models._load_model)  # type: ignore[method-assign]


def _loading_adapters(load: Callable) -> Callable:
    @wraps(load)
    def load_model(self: Any, model_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        from transformers.utils.peft_utils import find_adapter_config_file

        model, _, revision = model_and_revision.partition("@")
        if find_adapter_config_file(model, revision=revision) is None:
            return load(self, model_and_revision, *args, **kwargs)
        how = self.get_quantization_config()
        return AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision,
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
            device_map=self.device,
            trust_remote_code=self.trust_remote_code,
            **({} if how is None else {"quantization_config": how}),  # a None would hide the checkpoint's own
        )

    return load_model


def _sampling_where_asked(build: Callable) -> Callable:
    @wraps(build)
    def build_and_sample(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = build(self, body, *args, **kwargs)
        temperature = body.get("temperature")
        if temperature is not None:
            config.do_sample = temperature >= _COLDEST
        return config

    return build_and_sample


def _within_context(generate: Callable) -> Callable:
    @wraps(generate)
    def generate_within(self: Any, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kw: Any) -> Any:
        from fastapi import HTTPException

        prompt = inputs["input_ids"]
        length = len(prompt) if isinstance(prompt, list) else prompt.shape[-1]
        context = model.config.get_text_config().max_position_embeddings
        if not 0 < length < context:
            raise HTTPException(400, f"The prompt has {length:,} tokens; expected 1 to {context - 1:,}.")
        config.max_new_tokens = min(config.max_new_tokens or context, context - length)
        return generate(self, model, processor, inputs, config, *args, **kw)

    return generate_within


def _refusing(build_server: Callable) -> Callable:
    @wraps(build_server)
    def build(*args: Any, **kwargs: Any) -> Any:
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
        from jinja2 import TemplateError

        async def is_no_object(request: Any, error: Exception) -> Any:
            # FastAPI repeats what was given, which ends in a traceback where it is nested deeply or NaN.
            return JSONResponse({"detail": "The body is not a JSON object."}, 422)

        async def cannot_be_answered(request: Any, error: Exception) -> Any:
            reason = f"{type(error).__name__}: {error}"[:500].encode(errors="backslashreplace").decode()
            where = traceback.extract_tb(error.__traceback__)[-1]
            # It may be the server's own fault all the same, and then whoever runs it must see where.
            _logger.warning("%s: %s (%s, line %s)", request.url.path, reason, where.filename, where.lineno)
            return JSONResponse({"detail": f"The request cannot be answered as it is. {reason}"}, 400)

        built = build_server(*args, **kwargs)
        built.add_exception_handler(RequestValidationError, is_no_object)
        for kind in (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            TemplateError,
        ):
            built.add_exception_handler(kind, cannot_be_answered)
        return built

    return build


# --- What a request may say ---

_COLDEST = 1e-5  # below, sampling is greedy, as vLLM has it: logits that are divided by less are no numbers


def _is_number(value: Any, least: float = -1e30, most: float = 1e30) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _are_messages(value: Any) -> bool:
    return _are_objects(value) and value and all(_is_message(each) for each in value)


def _is_message(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    has_content = content is None or _is_text(content) or isinstance(content, list)
    return _is_text(message.get("role")) and has_content and all(_is_part(each) for each in parts)


def _is_part(part: Any) -> bool:
    # The server drops others, such as images, without a word.
    is_text = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
    return is_text and _is_text(part.get("text"))


def _are_stops(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return 0 < len(stops) <= 16 and all(_is_text(stop) and 0 < len(stop) <= 200 for stop in stops)


def _is_generation_config(value: Any) -> bool:
    return isinstance(value, str) and isinstance(json.loads(value), dict)


_COUNT = (_is_count, "a whole number from 1")
_OBJECT = (lambda value: isinstance(value, dict), "an object")
_OBJECTS = (_are_objects, "a list of objects")
_EXPECTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "messages": (_are_messages, "a list of messages, each an object with `role` and `content`, which is text"),
    "prompt": (_is_text, "text"),
    "suffix": (_is_text, "text"),
    "instructions": (_is_text, "text"),
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "temperature": (lambda value: _is_number(value, 0), "a number from 0"),
    "top_p": (lambda value: _is_number(value, 1e-9, 1), "a number above 0 up to 1"),
    "frequency_penalty": (lambda value: _is_number(value, -0.999, 2), "a number above -1 up to 2"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**32, "a whole number from 0 up to 4294967295"),
    "stop": (_are_stops, "text, or a list of at most 16 texts, of 1 to 200 characters each"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "tools": _OBJECTS,
    "chat_template_kwargs": _OBJECT,
    "logit_bias": _OBJECT,
    "generation_config": (_is_generation_config, "text that is a JSON object"),
}
_REQUIRED = {"ChatCompletionHandler": "messages", "CompletionHandler": "prompt", "ResponseHandler": "input"}


def _checking(validate: Callable) -> Callable:
    @wraps(validate)
    def check(self: Any, body: dict[str, Any]) -> Any:
        from fastapi import HTTPException

        result = validate(self, body)
        required = _REQUIRED.get(type(self).__name__)
        if required and body.get(required) is None:
            raise HTTPException(400, f"`{required}` is missing.")
        for name, (fits, text) in _EXPECTED.items():
            if body.get(name) is not None and not fits(body[name]):
                raise HTTPException(400, f"`{name}` is not what it should be: {text}.")
        return result

    return check


if __name__ == "__main__":
    main()

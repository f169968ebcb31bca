# SPDX-License-Identifier: Apache-2.0
"""What answers: lm-eval's model classes for a checkpoint or a server."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from jai.auto import load_causal_model
from jai.errors import UserError
from jai.evaluation.fitting import UNLIMITED
from jai.evaluation.options import EvalOptions
from jai.files import read_json
from jai.hub import METADATA_PATTERNS, WEIGHTS_PATTERN, local_folder
from jai.provenance import checkpoint_revision
from jai.tokenization.chat import check_chat
from jai.tokenization.loading import load_tokenizer


def load_answering_model(options: EvalOptions, *, chat: bool) -> LM:
    """The model that the options name.

    Args:
        options: of the command line.
        chat: whether it is asked in its chat form; a server has another address for that.

    Raises:
        UserError: if it cannot be loaded, or what runs it is not installed.
    """
    if options.backend == "openai":
        return _server(options, chat=chat)
    folder = local_folder(options.model, [*METADATA_PATTERNS, WEIGHTS_PATTERN])
    return _vllm(options, folder) if options.backend == "vllm" else _transformers(options, folder)


def check_chat_template(options: EvalOptions) -> None:
    """Refuse a checkpoint that cannot be asked in a chat; a server has its own template.

    Raises:
        UserError: if its tokenizer has no chat template, or one that makes no tokens of a chat.
    """
    if options.backend == "openai":
        return
    tokenizer = load_tokenizer(local_folder(options.model), trust_remote_code=options.trust_remote_code)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{options.model} has no chat template, in which it is asked here. Give a checkpoint that was tuned for "
            "chats, or put a chat_template.jinja into its folder."
        )
    check_chat(options.model, tokenizer)


def revision_of(options: EvalOptions) -> str:
    """What tells the model that answers from others: as `checkpoint_revision`, or a server's address."""
    return str(options.base_url) if options.backend == "openai" else checkpoint_revision(options.model)


def _transformers(options: EvalOptions, folder: Path) -> LM:
    import torch

    from jai.evaluation.prefix_sharing import PrefixSharingLM

    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {options.model} has neither a token that begins a text nor one that ends it, and an "
            "answer needs one of them. Set eos_token in its tokenizer_config.json."
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_causal_model(
        options.model,
        folder,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        device_map="auto" if options.parallelize else device,
    )
    return PrefixSharingLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=options.batch_size,
        max_length=options.max_length,
    )


def _vllm(options: EvalOptions, folder: Path) -> LM:
    if find_spec("vllm") is None:
        raise UserError("--backend vllm needs the package vllm, which is not installed. Install it: pip install vllm")
    if not options.trust_remote_code and "auto_map" in read_json(folder / "config.json", "Give a checkpoint."):
        raise UserError(
            f"vLLM runs {options.model} with the code in its folder. Allow that with --trust-remote-code, or give what "
            "`jai export --to mixtral` makes of it."
        )
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    try:
        return VLLM(
            pretrained=str(folder),
            dtype=options.dtype,
            seed=options.seed,
            batch_size="auto",
            max_model_len=options.max_length,
            trust_remote_code=options.trust_remote_code,
            tensor_parallel_size=torch.cuda.device_count() if options.parallelize else 1,
        )
    except (ValueError, RuntimeError, OSError) as error:  # of its engine, and of its configuration
        raise UserError(f"vLLM cannot load {options.model}: {' '.join(str(error).split())[:500]}") from error


def _server(options: EvalOptions, *, chat: bool) -> LM:
    from jai.evaluation.served_models import ServedChat, ServedCompletions  # brings aiohttp and requests

    # Of several requests that fail, the first ends the run; asyncio would print the traceback of each other one.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    shared: dict[str, Any] = {
        "model": options.model,
        "num_concurrent": options.batch_size,
        "seed": options.seed,
        # lm-eval would cut at 2,048 tokens; a server refuses what its model does not take.
        "max_length": options.max_length or UNLIMITED,
    }
    address = str(options.base_url).rstrip("/")
    if chat:
        return ServedChat(base_url=f"{address}/chat/completions", **shared)
    if options.tokenizer is None:
        raise UserError("Log-likelihoods from a server need --tokenizer, with which the questions are cut into tokens.")
    return ServedCompletions(
        base_url=f"{address}/completions",
        tokenizer=str(local_folder(options.tokenizer)),
        tokenizer_backend="huggingface",
        add_bos_token=True,  # where the tokenizer has one, as a checkpoint's is asked
        **shared,
    )

# SPDX-License-Identifier: Apache-2.0
"""`jai generate`: text from a checkpoint, streamed as it is made."""

from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextStreamer, set_seed

from jai.errors import UserError


@dataclass(kw_only=True)
class GenerateOptions:
    """How to generate.

    Attributes:
        max_new_tokens: most tokens to make.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: seed of the sampling.
        raw: continue the prompt as it stands, instead of as a user's turn of a chat.
        trust_remote_code: run the code in the checkpoint instead of the installed package's.
    """

    max_new_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    raw: bool = False
    trust_remote_code: bool = False


def generate(model: str, prompt: str, options: GenerateOptions | None = None, *, console: Console | None = None) -> str:
    """Generate text and print it as it is made.

    Args:
        model: folder or Hub id of a checkpoint with a tokenizer.
        prompt: the user's turn, or (raw) the beginning of the text.
        options: how to generate.
        console: where to print; None is standard output.

    Returns:
        The new text, without the prompt and without special tokens.

    Raises:
        UserError: if the checkpoint cannot be loaded, or has no tokenizer or no chat template where one is needed.
    """
    options = options or GenerateOptions()
    console = console or Console()
    if not prompt:
        raise UserError("The prompt is empty. Give some text.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=options.trust_remote_code)
        network = AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=options.trust_remote_code, dtype="auto", device_map=_device(), use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{model} cannot be loaded: {error}") from None

    if options.raw:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise UserError(f"{model} has no chat template. Use --raw to continue the text as it stands.")
    else:
        try:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise UserError(f"The chat template of {model} cannot be used: {error} Use --raw to do without.") from error
    inputs = inputs.to(network.device)

    set_seed(options.seed)
    sampling = (
        {"do_sample": False}
        if options.temperature == 0
        else {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
    )
    with torch.inference_mode():
        output = network.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            streamer=_ConsoleStreamer(tokenizer, console),
            **sampling,
        )
    (text,) = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


class _ConsoleStreamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a turn: the end of the text and, in phi-3's chat form, `<|end|>`."""
    ids = [tokenizer.eos_token_id, tokenizer.get_vocab().get("<|end|>")]
    return [id_ for id_ in ids if id_ is not None]


def _device() -> str:
    return "auto" if torch.cuda.is_available() else "cpu"

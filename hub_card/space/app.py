# SPDX-License-Identifier: Apache-2.0
"""Chat with a JAI and see how the text is split and which experts each layer chooses.

It is set by environment variables (on the Hub: the Space's variables):

    JAI_MODEL              Hub id or folder of the model
    JAI_REVISION           its commit; the newest one where this is not set
    JAI_TRUST_REMOTE_CODE  1 to run the code in the model's repository, once you have read it
"""

import os
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
import torch
from page import CSS, routing_html, split_html
from routing import Token, reply
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = ["สวัสดีค่ะ", "เมืองหลวงของประเทศไทยคืออะไร", "What is the capital of Thailand?", "2 + 3 = ?"]
_SECONDS_BETWEEN_UPDATES = 0.1

Chat = list[dict[str, str]]


def load(name: str, revision: str | None, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if the model has code of its own that is not trusted, or the tokenizer has no chat template.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.chat_template is None:
        raise ValueError(f"{name} has no chat template, so it cannot chat. Give a model that was trained on chats.")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True, **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> gr.Blocks:
    """The page."""
    experts = getattr(model.config, "num_local_experts", 1)

    def ask(text: str, chat: Chat) -> tuple[str, Chat, Chat]:
        if text.strip():
            chat = [*chat, {"role": "user", "content": text}]
        return "", chat, _shown(chat)

    def answer(chat: Chat, max_new_tokens: int, temperature: float) -> Iterator[tuple[Chat, Chat, str, str]]:
        if not chat or chat[-1]["role"] != "user":
            return
        tokens, updated = [], 0.0
        try:
            for tokens in reply(model, tokenizer, chat, max_new_tokens=max_new_tokens, temperature=temperature):
                if time.monotonic() - updated > _SECONDS_BETWEEN_UPDATES:
                    yield update(chat, tokens)
                    updated = time.monotonic()
        except ValueError as error:
            raise gr.Error(escape(str(error))) from error
        yield update(chat, tokens)

    def update(chat: Chat, tokens: list[Token]) -> tuple[Chat, Chat, str, str]:
        text = tokenizer.decode([token.id for token in tokens if token.made], skip_special_tokens=True)
        chat = [*chat, {"role": "assistant", "content": text}]
        return chat, _shown(chat), split_html(tokens), routing_html(tokens, experts)

    empty = [[], [], split_html([]), routing_html([], experts)]
    with gr.Blocks(title=f"Chat with {name}", fill_width=True, analytics_enabled=False) as page:
        gr.Markdown(
            f"# Chat with a JAI\n`{name}` · {model.config.num_hidden_layers} layers · {experts} experts in each"
        )
        chat = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                view = gr.Chatbot(show_label=False, height=430, render_markdown=False, buttons=[])
                text = gr.Textbox(placeholder="ถามเป็นภาษาไทยหรือภาษาอังกฤษ · Ask in Thai or English", show_label=False)
                gr.Examples(EXAMPLES, text, label="For example")
                with gr.Row():
                    stop = gr.Button("Stop", size="sm")
                    clear = gr.Button("New chat", size="sm")
                with gr.Accordion("Settings", open=False):
                    max_new_tokens = gr.Slider(1, 500, 100, step=1, label="Most new tokens")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: always the likeliest token)")
            with gr.Column(scale=3, min_width=420):
                split = gr.HTML(empty[2])
                routing = gr.HTML(empty[3])
        shown = [chat, view, split, routing]
        asked = text.submit(ask, [text, chat], [text, chat, view])
        # One at a time: the model is one, and what runs through it at once would be recorded as one.
        answered = asked.then(answer, [chat, max_new_tokens, temperature], shown, concurrency_limit=1)
        stop.click(None, cancels=[answered])
        gr.on([clear.click, view.clear], lambda: empty, None, shown, cancels=[answered])
    return page


def _shown(chat: Chat) -> Chat:
    """The chat for the page: gradio takes tags for tags even where it renders no Markdown."""
    return [{**turn, "content": escape(turn["content"])} for turn in chat]


def main() -> None:
    name = os.environ.get("JAI_MODEL")
    if not name:
        raise SystemExit(
            "JAI_MODEL is not set. Give the Hub id or the folder of a JAI, as in JAI_MODEL=your-name/your-jai."
        )
    trusted = os.environ.get("JAI_TRUST_REMOTE_CODE") == "1"
    try:
        model, tokenizer = load(name, os.environ.get("JAI_REVISION"), trusted)
    except ValueError as error:
        hint = "" if trusted else " If you have read that code, set JAI_TRUST_REMOTE_CODE=1."
        raise SystemExit(f"{name} cannot be loaded: {error}{hint}") from None
    theme = gr.themes.Default(font=["system-ui", "Noto Sans", "Noto Sans Thai", "sans-serif"], font_mono=["monospace"])
    build(model, tokenizer, Path(name).name if Path(name).is_dir() else name).queue(max_size=20).launch(
        theme=theme, css=CSS, show_error=True
    )


if __name__ == "__main__":
    main()

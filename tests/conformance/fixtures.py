# SPDX-License-Identifier: Apache-2.0
"""Tiny JAI checkpoints and texts under the names of the Hub repositories that PEFT's and TRL's tests load.

A folder `owner/name` below the working directory is found before the Hub, so the tests run as they are, without a
network.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from jai import JaiConfig, JaiForCausalLM, JaiForSequenceClassification
from jai.tokenization.phi3_style import train_phi3_style

CAUSAL_LM = (
    "hf-internal-testing/tiny-random-MistralForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2",
    "peft-internal-testing/tiny-random-OPTForCausalLM",
    "trl-internal-testing/tiny-GptOssForCausalLM",
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
    "trl-internal-testing/tiny-Qwen3ForCausalLM",
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM",
    "trl-internal-testing/tiny-random-LlamaForCausalLM",
)
SEQUENCE_CLASSIFICATION = ("trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5",)
# Short enough that TRL's tests of packing count as many packs of 64 tokens as with their own text: three, and one.
QUESTIONS = (
    ("Ugly?", "Beautiful.", "Moot."),
    ("Implicit?", "Explicit.", "Nothing at all."),
    ("Complex?", "Simple.", "A longer, worse answer."),
    ("ซับซ้อน", "เรียบง่าย", "ไม่มี"),
    ("What counts?", "Clarity counts.", "Speed."),
    ("When?", "Now, not never.", "Often."),
)


def tiny_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerBase, model_class: type, **overrides: Any) -> None:
    """Save a JAI of three layers, one of them a repeat with a live skip, and four experts, with its tokenizer."""
    torch.manual_seed(0)
    config = JaiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # keys and values are 32 wide: more than the ranks, up to 20, of PEFT's tests
        block_size=1,
        block_repeats=[1, 2],
        skip_alpha=0.3,
        num_experts=4,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **overrides,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def rows_of_zen() -> dict[str, list[dict[str, Any]]]:
    """TRL's dataset formats, by the name of their configuration in `trl-internal-testing/zen`."""
    shapes: dict[str, Callable[[Any, Any, Any], dict[str, Any]]] = {
        "prompt_only": lambda prompt, good, bad: {"prompt": prompt},
        "prompt_completion": lambda prompt, good, bad: {"prompt": prompt, "completion": good},
        "preference": lambda prompt, good, bad: {"prompt": prompt, "chosen": good, "rejected": bad},
        "implicit_prompt_preference": lambda prompt, good, bad: {"chosen": prompt + good, "rejected": prompt + bad},
    }
    texts = [(question, f" {good}", f" {bad}") for question, good, bad in QUESTIONS]
    chats = [
        (message("user", question), message("assistant", good), message("assistant", bad))
        for question, good, bad in QUESTIONS
    ]
    rows = {"standard_language_modeling": [{"text": question + good} for question, good, _ in texts]}
    rows["conversational_language_modeling"] = [{"messages": question + good} for question, good, _ in chats]
    for style, triples in (("standard", texts), ("conversational", chats)):
        for shape, row_of in shapes.items():
            rows[f"{style}_{shape}"] = [row_of(*triple) for triple in triples]
        rows[f"{style}_unpaired_preference"] = [
            {"prompt": prompt, "completion": good if kept else bad, "label": kept}
            for number, (prompt, good, bad) in enumerate(triples)
            for kept in [number % 2 == 0]
        ]
    return rows


def save_dataset(folder: Path, rows: dict[str, list[dict[str, Any]]], splits: tuple[str, ...]) -> None:
    """Save each configuration as JSON lines, as long as TRL's, with the table of contents that `datasets` reads."""
    configs = []
    for name, content in rows.items():
        (folder / name).mkdir(parents=True)
        files = []
        for split in splits:
            path = f"{name}/{split}.jsonl"
            lines = [json.dumps(row, ensure_ascii=False) for row in (content * 3)[: 17 if split == "train" else 2]]
            (folder / path).write_text("\n".join(lines) + "\n", encoding="utf-8")
            files.append({"split": split, "path": path})
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n", encoding="utf-8")


def build(folder: Path) -> None:
    """Fill `folder` with everything that the tests load from the Hub."""
    lines = [part for row in QUESTIONS for part in row]
    tokenizer = train_phi3_style(lines * 8, vocab_size=400)
    for name in CAUSAL_LM:
        tiny_checkpoint(folder / name, tokenizer, JaiForCausalLM)
    for name in SEQUENCE_CLASSIFICATION:
        tiny_checkpoint(folder / name, tokenizer, JaiForSequenceClassification, num_labels=1)
    save_dataset(folder / "trl-internal-testing/zen", rows_of_zen(), ("train", "test"))
    quotes = {"default": [{"quote": f"{question} {good}"} for question, good, _ in QUESTIONS]}
    save_dataset(folder / "ybelkada/english_quotes_copy", quotes, ("train",))

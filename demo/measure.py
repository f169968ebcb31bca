# SPDX-License-Identifier: Apache-2.0
"""What the demo measures of a checkpoint: bits per character, router load, skip alphas, answers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from jai.generate import stop_ids
from jai.router_load import router_load


@dataclass(frozen=True)
class Answer:
    """One question, what the model said to it, and what was expected."""

    language: str
    question: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        return self.given.strip() == self.expected.strip()

    @property
    def in_language(self) -> bool:
        """Whether it is in Thai exactly where the expected answer is."""
        return bool(self.given.strip()) and _has_thai(self.given) == _has_thai(self.expected)


def _has_thai(text: str) -> bool:
    return any("\u0e00" <= character <= "\u0e7f" for character in text)


class Subject:
    """A checkpoint under measurement, loaded once in fp32."""

    def __init__(self, folder: Path):
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def bits_per_character(self, texts: list[str]) -> float:
        """Bits that the model needs for a character of `texts`.

        Unlike the loss of a token it can be compared between tokenizers. The first token of a text is predicted from
        the end-of-text token.
        """
        nats = 0.0
        for batch in self._batches(texts):
            loss = self.model(**batch, use_cache=False).loss
            nats += loss.item() * (batch["labels"][:, 1:] != -100).sum().item()
        return nats / math.log(2) / sum(map(len, texts))

    def router_load(self, texts: list[str]) -> list[list[float]]:
        """Share of each layer's choices that each expert gets, layer by expert; each layer sums to 1."""
        return router_load(self.model, self._batches(texts))

    def skip_alphas(self) -> dict[int, float]:
        """Value of each skip alpha, by layer."""
        tensors = self.model.state_dict()
        return {int(name.split(".")[2]): tensors[name].item() for name in tensors if name.endswith(".skip_alpha")}

    @torch.inference_mode()
    def answers(self, chats: list[dict], max_new_tokens: int = 40) -> list[Answer]:
        """Answer the first question of each chat (`messages`, `language`) greedily."""
        prompts = [chat["messages"][:-1] for chat in chats]
        inputs = self.tokenizer.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_dict=True,
        )
        assert isinstance(inputs, BatchEncoding)  # as return_dict asks
        outputs = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids(self.model.generation_config, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        given = self.tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [
            Answer(
                language=chat["language"],
                question=chat["messages"][-2]["content"],
                expected=chat["messages"][-1]["content"],
                given=text,
            )
            for chat, text in zip(chats, given)
        ]

    def _batches(self, texts: list[str], size: int = 16, longest: int = 256):
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        # Long texts go in pieces, so that every character is counted.
        rows = [
            torch.tensor([eos, *ids[start : start + longest]])
            for ids in encoded
            for start in range(0, len(ids), longest)
        ]
        rows.sort(key=len)
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            lengths = torch.tensor([len(row) for row in group])
            input_ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=pad)
            mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
            labels = input_ids.masked_fill(~mask, -100)
            yield {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}

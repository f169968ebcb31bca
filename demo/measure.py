# SPDX-License-Identifier: Apache-2.0
"""What the demo measures of a checkpoint: bits per character, router load, skip alphas, answers."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from jai.demo.results import Answer
from jai.router_load import router_load
from jai.small_model import bits_per_character
from jai.tokenization.stops import stop_ids


class MeasuredModel:
    """A checkpoint under measurement, loaded once in fp32."""

    def __init__(self, folder: Path):
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def bits_per_character(self, texts: list[str]) -> float:
        """Bits that the model needs for a character of `texts`."""
        return bits_per_character(self.model, self.tokenizer, texts)

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

    def _batches(self, texts: list[str], size: int = 16, longest: int = 256) -> Iterator[dict[str, torch.Tensor]]:
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        # Long texts go in pieces, so that every token counts.
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
            yield {"input_ids": input_ids, "attention_mask": mask.long()}

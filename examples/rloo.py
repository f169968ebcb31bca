# SPDX-License-Identifier: Apache-2.0
"""Reinforce answers that a function rewards, with TRL alone: python rloo.py MODEL PROMPTS.jsonl OUT STEPS.

A row has `prompt`: a list of messages. The reward here is the share of an answer's letters that are Thai.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer


def thai_share(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    """Reward of each answer, from 0 to 1."""
    answers = ["".join(filter(str.isalpha, completion[0]["content"])) for completion in completions]
    return [sum("\u0e00" <= letter <= "\u0e7f" for letter in answer) / max(len(answer), 1) for answer in answers]


model_id, data, out, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
# `trust_remote_code` again: the trainer loads the reference model by itself.
args = RLOOConfig(
    out, max_steps=int(steps), trust_remote_code=True, max_completion_length=64, bf16=torch.cuda.is_available()
)
dataset = load_dataset("json", data_files=data, split="train")
trainer = RLOOTrainer(model, thai_share, args=args, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
trainer.save_model()

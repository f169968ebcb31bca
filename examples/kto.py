# SPDX-License-Identifier: Apache-2.0
"""Align a JAI with single answers, each good or bad, with TRL alone: python kto.py MODEL ANSWERS.jsonl OUT STEPS.

A row has `prompt` and `completion`, strings or lists of messages, and `label`: true or false.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

model_id, data, out, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
# `trust_remote_code` again: the trainer loads the reference model by itself.
args = KTOConfig(out, max_steps=int(steps), trust_remote_code=True, bf16=torch.cuda.is_available())
dataset = load_dataset("json", data_files=data, split="train")
trainer = KTOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
trainer.save_model()

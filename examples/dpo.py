# SPDX-License-Identifier: Apache-2.0
"""Align a JAI with pairs, with TRL alone: python dpo.py MODEL PREFERENCES.jsonl OUT STEPS.

A row has `prompt`, `chosen` and `rejected`: strings, or lists of messages.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model_id, data, out, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
# `trust_remote_code` again: the trainer loads the reference model by itself.
args = DPOConfig(out, max_steps=int(steps), trust_remote_code=True, bf16=torch.cuda.is_available())
dataset = load_dataset("json", data_files=data, split="train")
trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
trainer.save_model()

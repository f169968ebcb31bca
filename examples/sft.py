# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a JAI with TRL alone: python sft.py MODEL CHATS.jsonl OUT STEPS."""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model_id, data, out, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
args = SFTConfig(out, max_steps=int(steps), assistant_only_loss=True, bf16=torch.cuda.is_available())
dataset = load_dataset("json", data_files=data, split="train")
trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
trainer.save_model()

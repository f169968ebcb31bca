# SPDX-License-Identifier: Apache-2.0
"""How far training drifts from a rollout in another precision, with routing replay and without.

A small mixture of experts with random weights generates in bfloat16 and learns in float32, by GRPO, to write Thai
letters. A sampled token's importance ratio is its probability in training over its probability in the rollout's
precision with the rollout's experts. Arms share their seeds.

    python benchmarks/routing_replay.py --steps 25           # some minutes on a processor

One row a seed and arm goes to results/routing_replay.csv.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from records import append, provenance
from trl import GRPOTrainer

from jai import JaiConfig, JaiForCausalLM
from jai.tokenization.phi3_style import train_phi3_style
from jai.trainers.grpo import JaiGRPOConfig, JaiGRPOTrainer

SENTENCES = (
    "ประเทศไทยมีเจ็ดสิบหกจังหวัด",
    "ฝนตกหนักในฤดูมรสุม",
    "The river is wide and slow.",
    "Rice grows in the wet season.",
)
OUTLIER = 0.2  # a token whose probability is off by more than this share


class MixedPrecisionTrainer(JaiGRPOTrainer):
    """Generates in bfloat16, trains in float32, and notes how far the two are apart."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.log_ratios: list[torch.Tensor] = []
        self._rollout_log_probs: torch.Tensor | None = None

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super()._generate_single_turn(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss; before it, the log-probabilities of the rollout's precision and experts."""
        ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
        kept = inputs["completion_ids"].shape[1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            self._rollout_log_probs = GRPOTrainer._get_per_token_logps_and_entropies(self, model, ids, mask, kept)[0]
        self._completion_mask = inputs["completion_mask"].bool()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._rollout_log_probs is not None:
            self.log_ratios.append((found[0].detach() - self._rollout_log_probs)[self._completion_mask])
            self._rollout_log_probs = None
        return found


def thai_letters(completions: list[str | list[dict[str, str]]], **_: Any) -> list[float]:
    """The share of Thai letters in each answer."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [sum("\u0e00" <= letter <= "\u0e7f" for letter in text) / max(len(text), 1) for text in texts]


def run(seed: int, replays: bool, arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Train one arm; the figures of its first and its last steps."""
    tokenizer = train_phi3_style(SENTENCES * 4, vocab_size=350)
    torch.manual_seed(seed)
    model = JaiForCausalLM(
        JaiConfig(
            vocab_size=len(tokenizer), hidden_size=arguments.hidden, intermediate_size=arguments.hidden,
            num_attention_heads=4, num_key_value_heads=2, block_size=2, block_repeats=[1, 2, 1],
            num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256, initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=tokenizer.eos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    )  # fmt: skip
    prompts = [{"prompt": [{"role": "user", "content": sentence}]} for sentence in SENTENCES * 8]
    trainer = MixedPrecisionTrainer(
        model=model,
        args=JaiGRPOConfig(
            output_dir=str(folder / f"{seed}-{replays}"), routing_replay=replays, seed=seed, max_steps=arguments.steps,
            learning_rate=arguments.learning_rate, per_device_train_batch_size=16, num_generations=8,
            max_completion_length=24, router_aux_loss_coef=0.0, bf16=False, gradient_checkpointing=False,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        ),
        reward_funcs=[thai_letters],
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    ratios = torch.cat(trainer.log_ratios)
    tail = max(len(logs) // 5, 1)
    return {
        "seed": str(seed),
        "replay": str(replays),
        "steps": str(len(logs)),
        "learning_rate": f"{arguments.learning_rate:g}",
        "hidden": str(arguments.hidden),
        "disagreement": f"{fmean(log['routing/disagreement'] for log in logs):.5f}",
        "mean_abs_log_ratio": f"{ratios.abs().mean():.5f}",
        "max_abs_log_ratio": f"{ratios.abs().max():.4f}",
        "share_off_by_20_percent": f"{((ratios.exp() - 1).abs() > OUTLIER).float().mean():.5f}",
        "reward_first": f"{fmean(log['reward'] for log in logs[:tail]):.4f}",
        "reward_last": f"{fmean(log['reward'] for log in logs[-tail:]):.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for replays in (False, True):
                row = run(seed, replays, arguments, Path(folder))
                print(row)
                append("routing_replay", [{**row, **provenance(("torch", "transformers", "trl"))}])


if __name__ == "__main__":
    main()

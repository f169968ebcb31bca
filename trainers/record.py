# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a stage leaves: the model's own settings restored, and the history of its training."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from jai.configuration_jai import AUTO_MAP
from jai.provenance import chain, file_hashes, input_of, versions, write_step
from jai.trainers.data import TrainingData
from jai.trainers.source import END_OF_TURN, Source

LOGS_FOLDER = "training_logs"

# TRL and transformers set these for the training; the model that comes out has the values that went in.
_TRAINING_ONLY = ("use_cache", "output_router_logits", "router_aux_loss_coef")


def write_record(
    out: Path, source: Source, data: TrainingData, trainer: Trainer, stage: str, options: dict[str, Any], metrics: dict
) -> None:
    """Complete a saved checkpoint: its configuration as it was, its history, and nothing that belongs to the run alone.

    Args:
        out: the folder that the trainer saved the model in.
        source: the checkpoint that the stage started from; its history and the logs of its training come along.
        data: what was trained on.
        trainer: the trainer, after training.
        stage: "sft", "dpo" or "pretrain".
        options: the options worth recording.
        metrics: what `train` returned.
    """
    # It is a pickle, it holds the Hub token if one was given, and nothing needs it.
    (out / "training_args.bin").unlink(missing_ok=True)
    _restore_config(out, source)
    _stop_at_end_of_turn(out, source.tokenizer)

    (out / LOGS_FOLDER).mkdir(exist_ok=True)
    earlier = [step["log_history"] for step in chain(source.made_by) if "log_history" in step]
    for name in earlier:
        # Its last part only: a record that came from the Hub must not name a place outside of the folder.
        log_history = f"{LOGS_FOLDER}/{Path(name).name}"
        if (log := source.file(log_history)) is not None:
            shutil.copyfile(log, out / log_history)
    log_history = f"{LOGS_FOLDER}/{len(earlier) + 1:02}_{stage}.json"
    _write_json(out / log_history, trainer.state.log_history)
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    device = trainer.args.device
    files = file_hashes([source.folder / "config.json", *source.folder.glob("*.safetensors")])
    step = {
        "step": stage,
        "inputs": [input_of("model", source.name, files=files, made_by=source.made_by)],
        "dataset": {"name": Path(data.name).name if Path(data.name).exists() else data.name, "rows": data.rows},
        "options": options,
        "metrics": {**metrics, **(evaluations[-1] if evaluations else {})},
        "steps": trainer.state.global_step,
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.args.world_size,
        },
        "versions": versions("torch", "transformers", "trl", "peft", "accelerate", "datasets"),
        "log_history": log_history,
    }
    write_step(out, step)


def _restore_config(out: Path, source: Source) -> None:
    path = out / "config.json"
    if not path.exists():  # an adapter alone
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    original = source.config.to_dict()
    config |= {key: original[key] for key in _TRAINING_ONLY if key in original}
    if source.is_jai:
        config["auto_map"] = AUTO_MAP
    _write_json(path, config)


def _stop_at_end_of_turn(out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`generate` must stop where a chat model ends its turn, which for phi-3 is before the end of text."""
    path = out / "generation_config.json"
    if not path.exists() or END_OF_TURN not in str(tokenizer.chat_template):
        return
    generation = json.loads(path.read_text(encoding="utf-8"))
    stops = generation.get("eos_token_id") or []
    stops = [stops] if isinstance(stops, int) else stops
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end_of_turn not in stops:
        generation["eos_token_id"] = [*stops, end_of_turn]
        _write_json(path, generation)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a stage leaves: the model's own settings restored, and the history of its training."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from jai.configuration_jai import AUTO_MAP
from jai.provenance import Input, chain, file_hashes, input_of, versions, write_step
from jai.tokenization.stops import END_OF_TURN
from jai.trainers.arguments import StageArguments
from jai.trainers.base_model import BaseModel
from jai.trainers.chosen_parts import TRAINED_PARTS
from jai.trainers.data import TrainingData
from jai.trainers.data_arguments import DataArguments
from jai.trainers.first_look import check_model_files
from jai.trainers.parameters import TrainedParameters

LOGS_FOLDER = "training_logs"

# TRL and transformers set these for the training; the model that comes out has the values that went in.
_TRAINING_ONLY = ("use_cache", "output_router_logits", "router_aux_loss_coef")

_RECORDED_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "packing",
    "packing_strategy",
    "assistant_only_loss",
    "completion_only_loss",
    "loss_type",
    "beta",
    "label_smoothing",
    "loss_weights",
    "ld_alpha",
    "cpo_alpha",
    "simpo_gamma",
    "precompute_ref_log_probs",
    "center_rewards_coefficient",
    "rewards",
    "reward_weights",
    "system_prompt",
    "num_generations",
    "max_completion_length",
    "temperature",
    "num_iterations",
    "routing_replay",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "mtp_weight",
    "annealing_mtp_weight",
    "keep_mtp",
    "rho",
    "annealing",
    "annealing_learning_rate",
    "annealing_weight_decay",
    "first_accumulation_steps",
    "batch_ramp",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "seed",
)
_RECORDED_JAI = ("trainable", "new_row_ids", "max_position_embeddings", "rope_theta")
_RECORDED_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "use_dora")


def write_record(
    out: Path,
    step: str,
    arguments: StageArguments,
    base: BaseModel,
    dataset: dict[str, Any],
    parameters: TrainedParameters,
    logs: list[dict[str, Any]],
    steps: int,
    metrics: dict[str, float],
) -> None:
    """Complete a saved checkpoint: its configuration as it was, its history, and nothing that belongs to the run alone.

    Args:
        out: the folder that the trainer saved the model in.
        step: the verb, or "pretrain".
        arguments: the run's.
        base: the checkpoint that the stage started from; its history and the logs of its training come along.
        dataset: what was trained on: its name, and its rows or tokens.
        parameters: what learnt.
        logs: all that the trainer logged.
        steps: optimiser steps that were made.
        metrics: what `train` returned.
    """
    # It is a pickle, it holds the Hub token if one was given, and nothing needs it.
    (out / "training_args.bin").unlink(missing_ok=True)
    _restore_config(out, base)
    _stop_at_end_of_turn(out, base.tokenizer)

    (out / LOGS_FOLDER).mkdir(exist_ok=True)
    earlier = [before["log_history"] for before in chain(base.made_by) if "log_history" in before]
    for name in earlier:
        # Its last part only: a record that came from the Hub must not name a place outside of the folder.
        log_history = f"{LOGS_FOLDER}/{Path(name).name}"
        if (log := base.file(log_history)) is not None:
            shutil.copyfile(log, out / log_history)
    log_history = f"{LOGS_FOLDER}/{len(earlier) + 1:02}_{step}.json"
    _write_json(out / log_history, logs)
    evaluations = [log for log in logs if "eval_loss" in log]
    device = arguments.training.device
    files = file_hashes([base.folder / "config.json", *base.folder.glob("*.safetensors")])
    record = {
        "step": step,
        "inputs": [input_of("model", base.name, files=files, made_by=base.made_by), *_reference(arguments)],
        "dataset": dataset,
        "options": _recorded_options(arguments),
        "result": {TRAINED_PARTS: [each.kind for each in parameters.kinds if each.trained]},
        "metrics": {**metrics, **(evaluations[-1] if evaluations else {})},
        "steps": steps,
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": arguments.training.world_size,
        },
        "versions": versions("torch", "transformers", "trl", "peft", "accelerate", "datasets"),
        "log_history": log_history,
    }
    write_step(out, record)


def _reference(arguments: StageArguments) -> list[Input]:
    """The checkpoint that pairs were held against, where it is not the model itself. Its history stays its own."""
    name = getattr(arguments.training, "ref_model_name_or_path", None)
    if name is None:
        return []
    folder = check_model_files(name)
    files = file_hashes([folder / "config.json", *folder.glob("*.safetensors")])
    return [input_of("reference", name, files=files, made_by=None)]


def recorded_data(data: TrainingData) -> dict[str, Any]:
    """Name and rows, and of a mixture each source's; of local files the last part of the path alone."""

    def name_of(path: str) -> str:
        return Path(path).name if Path(path).exists() else path

    more: dict[str, Any] = {"faulty": data.faulty} if data.faulty else {}
    more |= {"chosen_rows_sha256": data.chosen_rows} if data.chosen_rows else {}
    if len(data.sources) < 2:
        return {"name": name_of(data.name), "rows": data.rows, **more}
    names = dict.fromkeys(name_of(source.path) for source in data.sources)
    revisions = {source.path: {"revision": source.revision} for source in data.sources if source.revision}
    sources = [
        {"name": name_of(path), **revisions.get(path, {}), "category": category, "language": language, "rows": rows}
        for (path, category, language), rows in data.counts.items()
    ]
    return {"name": " + ".join(names), "rows": data.rows, **more, "sources": sources}


def _recorded_options(arguments: StageArguments) -> dict[str, Any]:
    training, model = arguments.training, arguments.model
    options = {name: getattr(training, name) for name in _RECORDED_TRAINING if hasattr(training, name)}
    options |= {name: value for name in _RECORDED_JAI if (value := getattr(arguments.jai, name)) is not None}
    if model.use_peft:
        options |= {name: getattr(model, name) for name in _RECORDED_LORA}
    defaults = vars(DataArguments())
    of_data = {name: value for name, value in vars(arguments.data).items() if value != defaults[name]}
    of_data.pop("datasets", None)  # their paths are this machine's; the record of the data names them
    return options | of_data


def _restore_config(out: Path, base: BaseModel) -> None:
    path = out / "config.json"
    if not path.exists():  # an adapter alone
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    original = base.config.to_dict()
    config |= {key: original[key] for key in _TRAINING_ONLY if key in original}
    if base.is_jai:
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

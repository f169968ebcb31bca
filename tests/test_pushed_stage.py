# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` of a training stage: what is on the Hub is what lies in the output folder, and no secret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from json_lines import write_rows

from jai.hub_card.readme import written_by_hand
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus

OUTPUT = {"config.json", "model.safetensors", "modeling_jai.py", "provenance.json", "README.md", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["full", "merged-adapter"])
def test_the_hub_has_the_output_and_no_token(tiny_checkpoint, tmp_path, hub, sentences, peft):
    """With a push of each checkpoint on the way, which holds a pickle of the arguments, and of LoRA an adapter."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences])
    options = {
        **common(tiny_checkpoint, tmp_path, hub),
        "dataset_name": rows,
        **({"use_peft": True, "merge_adapter": True} if peft else {}),
    }
    check_pushed(["jai", "sft"], options, tmp_path, hub)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_so_has_it_of_pre_training(tiny_checkpoint, tmp_path, hub, sentences, processes):
    """With the adapter merged on one process; on two, one of them pushes, and the other waits."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text * 9} for text in sentences * 9])
    options = common(tiny_checkpoint, tmp_path, hub) | {"max_length": 32, "packed": tmp_path / "packed"}
    config = tmp_path / "corpus.yaml"
    config.write_text(json.dumps({"sources": [{"name": "text", "language": "th", "text": str(rows)}]}))
    tokenizer = str(options["model_name_or_path"])
    pack_corpus(PackOptions(out=tmp_path / "packed", config=config, tokenizer=tokenizer, workers=1))
    program = ["jai", "pretrain"]
    if processes > 1:
        launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        launch += "--dynamo_backend no --main_process_port 0 -m jai.trainers.pretrain"
        program = launch.split()
        options |= {"use_cpu": True, "bf16": False}
    else:
        options |= {"use_peft": True, "merge_adapter": True}
    check_pushed(program, options, tmp_path, hub)


def common(tiny_checkpoint, tmp_path, hub) -> dict:
    """Options of a short run that pushes each of its checkpoints."""
    return {
        "model_name_or_path": tiny_checkpoint(tmp_path / "jai"),
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "hub_always_push": True,
        "report_to": "none",
        "push_to_hub": True,
        "hub_token": hub.token,
        "hub_model_id": f"{hub.user}/pushed",
    }


def check_pushed(program: list[str], options: dict, tmp_path: Path, hub) -> None:
    """Run it, and compare the repository with the output folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {key: value for key, value in hub.environment().items() if key != "HF_TOKEN"}
    command = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", *program, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    out, repo = tmp_path / "out", f"{hub.user}/pushed"
    pushed = set(hub.repo(repo).head().files) - {".gitattributes"}
    here = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert pushed == {name for name in here if not name.startswith("checkpoint-")}
    assert pushed >= OUTPUT
    assert not any(Path(name).name == "training_args.bin" for name in pushed)
    assert {name for name in pushed if name.startswith("adapter_")} == set()
    assert {name: hub.content(repo, name) for name in pushed} == {name: (out / name).read_bytes() for name in pushed}
    commits = hub.repo(repo).commits.values()
    assert any(name == "training_args.bin" for commit in commits for name in commit.files)  # pushes on the way came
    for commit in commits:
        for name in commit.files:
            assert hub.token.encode() not in hub.content(repo, name, commit.sha), name
    for path in out.rglob("*"):
        assert path.is_dir() or hub.token.encode() not in path.read_bytes(), path
    card = (out / "README.md").read_text()
    assert not written_by_hand(card)  # `jai publish` replaces it
    for untrue in (str(tmp_path), "None", "from scratch", "unknown dataset"):
        assert untrue not in card

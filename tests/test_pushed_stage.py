# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` of a training stage: what is on the Hub is what lies in the output folder, and no secret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from json_lines import write_rows

OUTPUT = {"config.json", "model.safetensors", "modeling_jai.py", "provenance.json", "README.md", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["full", "merged-adapter"])
def test_the_hub_has_the_output_and_no_token(tiny_checkpoint, tmp_path, hub, sentences, peft):
    """With a push of each checkpoint on the way, which holds a pickle of the arguments, and of LoRA an adapter."""
    options = {
        "model_name_or_path": tiny_checkpoint(tmp_path / "jai"),
        "dataset_name": write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences]),
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "hub_always_push": True,
        "report_to": "none",
        "push_to_hub": True,
        "hub_token": hub.token,
        "hub_model_id": f"{hub.user}/pushed",
        **({"use_peft": True, "merge_adapter": True} if peft else {}),
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {key: value for key, value in hub.environment().items() if key != "HF_TOKEN"}
    command = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "jai", "sft", *command], env=environment, capture_output=True, text=True
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
    assert str(tmp_path) not in (out / "README.md").read_text()

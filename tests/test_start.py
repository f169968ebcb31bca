# SPDX-License-Identifier: Apache-2.0
"""The start: what is wrong before a model is needed is said before what models need is imported."""

import json
import os
import shlex
import subprocess
import sys

import pytest

# Of processor time: PyTorch 1.5 s and 200 MB, transformers 1 s, the Hub's client 0.25 s, pydantic 0.1 s.
HEAVY = {"torch", "transformers", "huggingface_hub", "pydantic", "trl", "datasets", "numpy"}
# `publish` asks the Hub's client for the access token, so that no message can quote it.
CLIENT = HEAVY - {"huggingface_hub"}

HEADER = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
# The files of some folders that are given to the verbs.
FOLDERS = {
    "empty": {},
    "damaged": {"config.json": '{"model_type": "jai"'},
    "llama": {"config.json": '{"model_type": "llama"}'},
    "phi3": {"config.json": '{"model_type": "phi3"}'},
    "phi3-cut": {
        "config.json": '{"model_type": "phi3"}',
        "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER,
    },
    "phi3-tokenizer": {
        "config.json": '{"model_type": "phi3"}',
        "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(4),
        "tokenizer.json": '{"model"',
    },
    "whole": {
        "config.json": '{"model_type": "phi3"}',
        "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(4),
        "tokenizer.json": "{}",
    },
    "jai": {"config.json": '{"model_type": "jai", "auto_map": {"AutoConfig": "configuration_jai.JaiConfig"}}'},
    "jai-four": {"config.json": '{"model_type": "jai", "quantization_config": {"quant_method": "bitsandbytes"}}'},
    "jai-cut": {"config.json": '{"model_type": "jai"}', "model.safetensors": b"short"},
    "tokenizer-only": {"config.json": "{}", "tokenizer.json": "{}"},
    "adapter": {"adapter_config.json": "{}"},
    "gguf": {"model.gguf": "GGUF"},
    "six": {"config.json": '{"model_type": "phi3", "num_hidden_layers": 6}'},
}
JUDGE = "--judge-model judge --judge-url http://127.0.0.1:9/v1"
CASES = [
    (HEAVY, "--help", 0, ""),
    (HEAVY, "--version", 0, ""),
    (HEAVY, "convert --help", 0, ""),
    (HEAVY, "convert phi3 out --no-such", 2, "No such option"),
    (HEAVY, "convert phi3 out --seed hello", 1, "--seed is 'hello'; expected a whole number"),
    (HEAVY, "convert phi3 out --dtype float12", 1, "dtype is 'float12'; expected one of float32"),
    (HEAVY, "convert phi3 out --skip-alpha nan", 1, "skip_alpha is nan"),
    (HEAVY, "convert phi3 out --block-repeats 1,x", 1, "--block-repeats is '1,x'"),
    (HEAVY, "convert ./none out", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "convert empty out", 1, "empty has no config.json"),
    (HEAVY, "convert phi3 phi3", 1, "exists already"),
    (HEAVY, "convert damaged out", 1, "is not valid JSON"),
    (HEAVY, "convert llama out", 1, "takes a Phi3ForCausalLM"),
    (HEAVY, "convert gguf out", 1, "GGUF is not supported"),
    (HEAVY, "convert gguf/model.gguf out", 1, "model.gguf is a file. Give the folder"),
    (HEAVY, "convert six out --dry-run", 1, "The base has 6 layers, but 10 blocks of 4"),
    (HEAVY, "convert six out --dry-run --layers 0-6", 1, "layers names 6, but the base has layers 0 to 5"),
    (HEAVY, "convert phi3 out --config stage.yaml", 1, "3 of its 3 options are unknown here"),
    (HEAVY, "convert phi3 out", 1, "phi3 has no safetensors weights"),
    (HEAVY, "convert phi3-cut out", 1, "the file is truncated or damaged"),
    (HEAVY, "convert phi3-tokenizer out", 1, "tokenizer.json is not valid JSON"),
    (HEAVY, "convert phi3 out --dry-run --tokenizer phi3-tokenizer", 1, "tokenizer.json is not valid JSON"),
    (HEAVY, "upcycle jai out --snapshots ./none", 1, "jai has no safetensors weights"),
    (HEAVY, "upcycle llama out --snapshots jai", 1, "of type 'llama', not 'jai'"),
    (HEAVY, "snapshot jai-cut out", 1, "its header cannot be read"),
    (HEAVY, "merge out --models phi3-cut phi3", 1, "the file is truncated or damaged"),
    (HEAVY, "merge out --models adapter phi3", 1, "is a LoRA adapter without its model"),
    (HEAVY, "export phi3 out --to mixtral", 1, "of type 'phi3', not 'jai'"),
    (HEAVY, "quantize phi3 out", 1, "of type 'phi3', not 'jai'"),
    (HEAVY, "quantize jai-four out", 1, "jai-four is quantised already (bitsandbytes)"),
    (HEAVY, "merge-adapter jai out", 1, "jai has no adapter_config.json"),
    (HEAVY, "merge-adapter adapter out --base jai-four", 1, "has no adapter_model.safetensors"),
    (HEAVY, "quantize ./none out", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "merge-adapter ./none out", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "report none", 1, "none has no logs of training"),
    (HEAVY, "inspect ./none", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "inspect jai-cut", 1, "its header cannot be read"),
    (HEAVY, "inspect damaged", 1, "is not valid JSON"),
    (HEAVY, "generate ./none hello", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "generate empty hello", 1, "empty has no config.json"),
    (HEAVY, "generate phi3-tokenizer hello", 1, "tokenizer.json is not valid JSON"),
    (HEAVY, "generate phi3 hello --top-p 5", 1, "top_p is 5.0"),
    (HEAVY, "tokenizer train empty/none.txt --base empty --out out", 1, "none.txt"),
    (HEAVY, "tokenizer ablate --config ablation.yaml --out out", 1, "has the option 'arm', which does not exist"),
    (HEAVY, "serve ./none", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "serve empty", 1, "empty has no config.json"),
    (HEAVY, "eval ./none --suite mgsm", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "eval ./none --suite mgsm --backend vllm", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "eval empty --suite mgsm", 1, "empty has no config.json"),
    (HEAVY, "eval jai --suite mgsm", 1, "jai has no tokenizer that can be loaded"),
    (HEAVY, "eval tokenizer-only --suite mgsm", 1, "tokenizer-only has no weights in safetensors files"),
    (HEAVY, "eval ./none --suite mt-bench-th", 1, "--judge-url is not given"),
    (HEAVY, f"eval ./none --suite mt-bench-th {JUDGE}", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, f"eval pairwise none.jsonl data.jsonl {JUDGE}", 1, "none.jsonl does not exist"),
    (HEAVY, f"eval pairwise data.jsonl none.jsonl {JUDGE}", 1, "none.jsonl does not exist"),
    (HEAVY, f"eval pairwise data.jsonl data.jsonl {JUDGE} --data none", 1, "--data none is not a folder"),
    (HEAVY, "eval language data.jsonl none.jsonl", 1, "none.jsonl does not exist"),
    (HEAVY, "eval compare ./none", 1, "none is not a folder"),
    (HEAVY, "eval compare empty --figure chart.gif", 1, "chart.gif has an unknown ending"),
    (HEAVY, "eval contamination data.jsonl", 1, "--suite is not given"),
    (HEAVY, "eval contamination none.jsonl --suite mgsm", 1, "none.jsonl does not exist"),
    (HEAVY, "eval contamination data.jsonl --suite mgsm --run none", 1, "--run none is not a folder"),
    (HEAVY, "sft --config none.yaml", 1, "none.yaml does not exist"),
    (HEAVY, "sft", 1, "No model is given"),
    (HEAVY, "sft recipes/sft.yaml", 1, "'recipes/sft.yaml' follows no option. Name the option, as in `--config"),
    (
        HEAVY,
        "sft --learning-rat 1",
        1,
        "the option 'learning_rat', which does not exist. Did you mean 'learning_rate'?",
    ),
    (HEAVY, "dpo --config stage.yaml --no_remove_unused 1", 1, "Did you mean 'remove_unused_columns'?"),
    (HEAVY, "dpo --no_remove_unused_columns", 1, "No model is given"),  # TRL's parser has it
    (HEAVY, "grpo --config misspelt.yaml", 1, "The configuration file has the option 'num_generation', which does not"),
    (HEAVY, "pretrain --no-such 1", 1, "The command line has the option 'no_such', which does not exist"),
    (HEAVY, "sft --model_name_or_path=phi3", 1, "phi3 has no safetensors weights"),
    (HEAVY, "sft --model-name-or-path phi3-tokenizer", 1, "tokenizer.json is not valid JSON"),
    (HEAVY, "dpo --config stage.yaml --dataset_name none.jsonl", 1, "The data none.jsonl does not exist"),
    (HEAVY, "dpo --config stage.yaml --dataset_name empty.jsonl", 1, "The data empty.jsonl has no rows"),
    (HEAVY, "dpo --config stage.yaml --model_name_or_path adapter", 1, "`jai merge-adapter adapter OUT`"),
    (HEAVY, "dpo --config stage.yaml --output_dir phi3", 1, "phi3 exists already and is not empty"),
    (HEAVY, "dpo --config stage.yaml --model_name_or_path ./none", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "reward --config none.yaml", 1, "none.yaml does not exist"),
    (HEAVY, "grpo --config stage.yaml --dataset_name none.jsonl", 1, "The data none.jsonl does not exist"),
    (HEAVY, "kto", 1, "No model is given"),
    (HEAVY, "cpo --config stage.yaml --dataset_name none.jsonl", 1, "The data none.jsonl does not exist"),
    (HEAVY, "orpo", 1, "No model is given"),
    (HEAVY, f"pairs none.jsonl out --model whole {JUDGE}", 1, "none.jsonl does not exist"),
    (HEAVY, f"pairs data.jsonl out --model ./none {JUDGE}", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, f"pairs data.jsonl out --model whole --off-policy none {JUDGE}", 1, "none does not exist"),
    (HEAVY, "pairs data.jsonl out --model whole --by reward --reward-model ./none", 1, "./none is neither a folder"),
    (HEAVY, "pairs data.jsonl out --model whole --by reward --reward-model jai", 1, "jai has no tokenizer that can"),
    (HEAVY, "difficulty data.jsonl out --model ./none", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "difficulty none.jsonl out --model phi3", 1, "none.jsonl does not exist"),
    (HEAVY, "difficulty stage.yaml out --model phi3 --min-pass-rate 0.95", 1, "nothing between them"),
    (HEAVY, "score none.jsonl out --model phi3", 1, "none.jsonl does not exist"),
    (HEAVY, "score data.jsonl out --model ./none", 1, "./none is neither a folder nor a Hub id"),
    (HEAVY, "score stage.yaml phi3 --model phi3", 1, "phi3 exists already"),
    (HEAVY, "score stage.yaml out --model phi3 --keep-above 2", 1, "keep_above is 2.0"),
    (HEAVY, "demo --seed x", 1, "--seed is 'x'"),
    (HEAVY, "publish jai lab/a--b", 1, "is not a name of a repository"),
    (HEAVY, "publish ./none lab/jai", 1, "none is not a folder"),
    (CLIENT, "publish empty lab/jai", 1, "empty has no config.json"),
    (CLIENT, "publish phi3 lab/jai", 1, "model_type 'phi3', not 'jai'"),
    (CLIENT, "publish jai lab/jai", 1, "lacks configuration_jai.py"),
    # May be on the Hub: the client is asked, which HF_HUB_OFFLINE keeps from asking the Hub.
    (CLIENT, "eval none --suite mgsm", 1, "none is not a local folder, and it is not in the Hub cache"),
    (CLIENT, f"pairs data.jsonl out --model none {JUDGE}", 1, "none is not a local folder"),
    (CLIENT, "difficulty data.jsonl out --model none", 1, "none is not a local folder"),
    (CLIENT, "score data.jsonl out --model none", 1, "none is not a local folder"),
    (CLIENT, "serve none@main", 1, "none is not a local folder"),
]
# Runs the commands one after the other, as the program does, and says what each leaves imported.
RUN = """
import contextlib, io, json, sys
from jai.cli import main

results = []
for line in json.load(sys.stdin):
    sys.argv = ["jai", *line]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
    results.append([code, said.getvalue(), sorted(set(sys.modules) & set(%r))])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Exit code, standard error and heavy imports after each command; those that may import the client come last."""
    folder = tmp_path_factory.mktemp("start")
    for name, files in FOLDERS.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "ablation.yaml").write_text("arm: 1\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    (folder / "stage.yaml").write_text("model_name_or_path: whole\ndataset_name: data.jsonl\noutput_dir: out\n")
    (folder / "misspelt.yaml").write_text("env: {A: b}\nnum_generation: 2\n")
    lines = [shlex.split(line) for _, line, _, _ in CASES]
    process = subprocess.run(
        [sys.executable, "-c", RUN % sorted(HEAVY)],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[line or "nothing" for _, line, _, _ in CASES])
def test_an_error_that_needs_no_model_imports_nothing_heavy(results, number):
    forbidden, _, code, message = CASES[number]
    found_code, said, imported = results[number]
    assert found_code == code, said
    assert message in said
    assert "Traceback" not in said
    assert not forbidden & set(imported)

# SPDX-License-Identifier: Apache-2.0
"""Whether an engine serves a checkpoint as transformers computes it: greedy tokens, and their log-probabilities.

Run it in the engine's own environment; nothing of this package is needed there:

    pip install accelerate vllm     # or, in another environment: pip install accelerate sglang
    python benchmarks/serving_engines.py your-org/your-jai --engine vllm

Every token that the engine chose is judged by transformers on the same text. Where the engine chose another than
transformers would have, the margin says how much likelier transformers' own choice was: in bfloat16 a few tenths are
rounding; in float32 the tokens must be equal. It ends with an error where a margin or a difference of
log-probabilities is larger than `--tolerance`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerator import describe, version
from huggingface_hub import snapshot_download
from records import append, provenance
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "ประเทศไทยมีกี่จังหวัด",
    "Explain why the sky is blue, in two sentences.",
    "เขียนกลอนสั้น ๆ เกี่ยวกับแม่น้ำเจ้าพระยา",
    "What is 17 times 23?",
    "แปลเป็นภาษาอังกฤษ: วันนี้อากาศดีมาก",
    "Write a Python function that reverses a string.",
)


@dataclass(frozen=True)
class Task:
    """What an engine has to do.

    Attributes:
        folder: the checkpoint.
        prompts: token ids.
        new_tokens: of each answer, whatever it says.
        dtype: `bfloat16`, `float16` or `float32`.
        devices: devices that share each layer (tensor parallelism).
        eager: without compiling or capturing, which takes minutes.
    """

    folder: str
    prompts: list[list[int]]
    new_tokens: int
    dtype: str
    devices: int
    eager: bool = False


@dataclass(frozen=True)
class Answer:
    """The tokens that were chosen, and the log-probability of each."""

    tokens: list[int]
    log_probabilities: list[float]


def answer_by_vllm(task: Task) -> list[Answer]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        task.folder,
        trust_remote_code=True,
        dtype=task.dtype,
        tensor_parallel_size=task.devices,
        enforce_eager=task.eager,
        max_model_len=max(map(len, task.prompts)) + task.new_tokens,
    )
    sampling = SamplingParams(temperature=0, max_tokens=task.new_tokens, ignore_eos=True, logprobs=1)
    answers = []
    for request in engine.generate([{"prompt_token_ids": prompt} for prompt in task.prompts], sampling):
        (output,) = request.outputs
        chosen = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs)]
        answers.append(Answer(list(output.token_ids), chosen))
    return answers


def answer_by_sglang(task: Task) -> list[Answer]:
    import sglang

    with tempfile.TemporaryDirectory(dir=".") as split:
        engine = sglang.Engine(
            model_path=str(split_experts(Path(task.folder), Path(split))),
            trust_remote_code=True,
            dtype=task.dtype,
            tp_size=task.devices,
            disable_cuda_graph=task.eager,
        )
        sampling = {"temperature": 0, "max_new_tokens": task.new_tokens, "ignore_eos": True}
        outputs = engine.generate(input_ids=task.prompts, sampling_params=sampling, return_logprob=True)
        engine.shutdown()
    steps = [output["meta_info"]["output_token_logprobs"] for output in outputs]  # (log-probability, token, text)
    return [Answer([step[1] for step in answer], [step[0] for step in answer]) for answer in steps]


def split_experts(folder: Path, out: Path) -> Path:
    """The same checkpoint with a name for each matrix of each expert, for SGLang; dense ones are taken as they are.

    SGLang 0.5.23 skips stacked experts (`mlp.experts.gate_up_proj`) with no more than a warning, and then computes with
    memory that nothing was written to.

    Args:
        folder: a checkpoint in safetensors.
        out: an empty folder; its shards are those of `folder`, and other files are links.

    Returns:
        The folder to serve.
    """
    weight_map, size, stacked = {}, 0, False
    for file in sorted(folder.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file() and file.name != "model.safetensors.index.json":
                (out / file.name).symlink_to(file.resolve())
            continue
        tensors = {}
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  no dictionary
                parts = split_tensor(name, shard.get_tensor(name))
                stacked |= len(parts) > 1
                tensors |= parts
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out if stacked else folder


def split_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """`experts.gate_up_proj` `(E, 2·I, H)` and `experts.down_proj` `(E, H, I)` by expert and matrix; others whole."""
    layer, experts, matrix = name.partition(".experts.")
    if matrix not in ("gate_up_proj", "down_proj"):
        return {name: tensor}
    parts = {}
    for number, expert in enumerate(tensor):
        if matrix == "down_proj":
            matrices = {"down_proj": expert}
        else:
            matrices = dict(zip(("gate_proj", "up_proj"), expert.chunk(2)))
        for part, values in matrices.items():
            parts[f"{layer}{experts}{number}.{part}.weight"] = values.clone()
    return parts


@torch.inference_mode()
def judge(task: Task, answers: list[Answer]) -> list[dict[str, Any]]:
    """What transformers says of each answer, on the text that the engine itself made."""
    spread = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(task.folder, trust_remote_code=True, dtype=task.dtype, **spread).eval()
    results = []
    for prompt, answer in zip(task.prompts, answers):
        ids = torch.tensor([prompt + answer.tokens], device=model.device)
        logits = model(ids, logits_to_keep=len(answer.tokens) + 1).logits[0, :-1].float().cpu()
        log_probabilities = logits.log_softmax(-1)
        own = log_probabilities.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        margins = log_probabilities.max(-1).values - own
        results.append(
            {
                "equal": int((margins == 0).sum()),
                "margin": margins.max().item(),
                "difference": (own - torch.tensor(answer.log_probabilities)).abs().max().item(),
            }
        )
    return results


def tokenize(folder: str, text: Path | None) -> list[list[int]]:
    """The questions (or the lines of `text`) as chats, where the checkpoint has a chat template, else as they are."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    questions = text.read_text(encoding="utf-8").splitlines() if text else QUESTIONS
    if tokenizer.chat_template is None:
        return [tokenizer(question)["input_ids"] for question in questions]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]


ENGINES = {"vllm": answer_by_vllm, "sglang": answer_by_sglang}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or Hub id of a checkpoint. The code in it is run.")
    parser.add_argument("--revision", help="Of a Hub id.")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64, help="New tokens of each answer.")
    parser.add_argument("--devices", type=int, default=1, help="Devices that share each layer.")
    parser.add_argument("--eager", action="store_true", help="Compile nothing: starts sooner, answers later.")
    parser.add_argument("--text", type=Path, help="File with a prompt on each line; default: six questions.")
    parser.add_argument("--tolerance", type=float, help="In nats; default 0.5, or 0.001 in float32.")
    parser.add_argument("--answers", type=Path, help="Only write what the engine answers, to this file.")
    options = parser.parse_args()

    is_folder = Path(options.model).is_dir()
    folder = options.model if is_folder else snapshot_download(options.model, revision=options.revision)
    prompts = tokenize(folder, options.text)
    task = Task(folder, prompts, options.tokens, options.dtype, options.devices, options.eager)
    if options.answers:
        options.answers.write_text(json.dumps([asdict(answer) for answer in ENGINES[options.engine](task)]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        # In a process of its own, so that its memory is free again when transformers judges.
        answers_file = Path(scratch) / "answers.json"
        subprocess.run([sys.executable, *sys.argv, "--answers", answers_file], check=True)
        answers = [Answer(**answer) for answer in json.loads(answers_file.read_text())]
    results = judge(task, answers)

    tokens = sum(len(answer.tokens) for answer in answers)
    equal = sum(result["equal"] for result in results)
    margin = max(result["margin"] for result in results)
    difference = max(result["difference"] for result in results)
    tolerance = options.tolerance or (0.001 if options.dtype == "float32" else 0.5)
    row = {
        **provenance(("torch", "transformers")),
        **describe("cuda" if torch.cuda.is_available() else "cpu"),
        "engine": options.engine,
        "engine version": version(options.engine),
        "model": options.model if not is_folder else Path(folder).name,
        "dtype": options.dtype,
        "devices": str(options.devices),
        "tokens": str(tokens),
        "equal": str(equal),
        "largest margin": f"{margin:.2g}",
        "largest difference": f"{difference:.2g}",
    }
    print(f"{equal} of {tokens} tokens are transformers' own choice; the largest margin is {margin:.2g} nats.")
    print(f"The largest difference of log-probabilities is {difference:.2g}.")
    print(f"Recorded in {append('serving_engines', [row])}")
    if not max(margin, difference) <= tolerance:  # NaN, too
        sys.exit(f"More than {tolerance}: {options.engine} does not compute what transformers computes.")


if __name__ == "__main__":
    main()

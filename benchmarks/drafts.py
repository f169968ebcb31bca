# SPDX-License-Identifier: Apache-2.0
"""How many drafts of a kept layer for the second next token does the model accept, and is it quicker for them?

    python benchmarks/drafts.py CKPT --text English=english.jsonl.gz Thai=thai.jsonl.gz [--record]

The checkpoint is one of `jai pretrain` with `mtp_weight` and `keep_mtp`. Beginnings of documents are continued greedily
by transformers' `generate`, without the layer and with it; texts are compared, as both must be equal.
"""

import argparse
import gzip
import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from records import append, provenance
from transformers import AutoTokenizer

from jai.auto import causal_model_class
from jai.generate import Drafts, counted_passes
from jai.reports import ReportTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE", help="JSON lines with `text`")
    parser.add_argument("--documents", type=int, default=40, help="of each text, the last ones")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--record", action="store_true", help="append the result to benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model_class = causal_model_class(arguments.checkpoint, trust_remote_code=False)
    model = model_class.from_pretrained(arguments.checkpoint).eval()
    if not model.config.num_mtp_layers:
        sys.exit(f"error: {arguments.checkpoint} has no layer for multi-token prediction (`keep_mtp` of jai pretrain)")
    rows = []
    for given in arguments.text:
        name, _, path = given.partition("=")
        prompts = prompts_of(Path(path), tokenizer, arguments)
        rows.append({"text": name} | measure(model, prompts, arguments.new_tokens))
    print(ReportTable([*rows[0]], [[*row.values()] for row in rows], numbers=True).markdown())
    if arguments.record:
        origin = provenance(("torch", "transformers"))
        print(
            "appended to", append("drafts", [{"checkpoint": arguments.checkpoint.name} | row | origin for row in rows])
        )


def prompts_of(path: Path, tokenizer, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """The beginnings of documents that are long enough, the last of the file first."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    length = arguments.prompt_tokens
    encoded = (tokenizer(text[: 20 * length], add_special_tokens=False)["input_ids"] for text in reversed(texts))
    begun = (torch.tensor([ids[:length]]) for ids in encoded if len(ids) >= length)
    return list(islice(begun, arguments.documents))


def measure(model, prompts: list[torch.Tensor], new_tokens: int) -> dict[str, str]:
    """Drafts and times over all prompts."""
    made = accepted = 0
    seconds = {False: 0.0, True: 0.0}
    continued(model, prompts[0], new_tokens, use_mtp=True)  # the first reads the layer's code
    for prompt in prompts:
        texts = []
        for use_mtp in (False, True):
            began = time.perf_counter()
            text, drafts = continued(model, prompt, new_tokens, use_mtp=use_mtp)
            seconds[use_mtp] += time.perf_counter() - began
            texts.append(text)
        if not torch.equal(*texts):
            sys.exit("error: the text with drafts is not that without them")
        made, accepted = made + drafts.made, accepted + drafts.accepted
    return {
        "prompts": str(len(prompts)),
        "drafts": str(made),
        "accepted": f"{accepted / made:.3f}",
        "seconds_without": f"{seconds[False]:.2f}",
        "seconds_with": f"{seconds[True]:.2f}",
    }


def continued(model, prompt: torch.Tensor, new_tokens: int, *, use_mtp: bool) -> tuple[torch.Tensor, Drafts]:
    """The text, of as many tokens for every prompt: no end of text ends it."""
    how = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "use_mtp": use_mtp}
    with torch.inference_mode(), counted_passes(model) as passes:
        text = model.generate(prompt, **how)
    return text, Drafts.counted(text.shape[1] - prompt.shape[1], len(passes))


if __name__ == "__main__":
    main()

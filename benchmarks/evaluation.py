# SPDX-License-Identifier: Apache-2.0
"""Questions per second of `jai eval`'s shared prefixes, beside lm-eval's own loop, on four-way multiple choice.

    python benchmarks/evaluation.py --data DIR --tokenizer CKPT [--questions 16] [--batch-size 4] [--save]

Belebele with the letter as the answer (as lm-eval asks it) and with the answer's text, and XQuAD with the answers to
four questions on one paragraph as the choices. The model is a small JAI with weights that were drawn at random, on one
thread; both loops get the same requests in batches of the same size, and must choose the same answers. Time is the
processor's, so that what else runs on the machine does not count. `--data` is as in `jai eval`: belebele_th.jsonl.gz
and xquad_th.jsonl.gz, or the Hub's names. About a minute.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from records import append, provenance
from rich.console import Console
from rich.table import Table

from jai import JaiConfig, JaiForCausalLM
from jai.evaluation.data import DataSource, local_split
from jai.evaluation.prefix_sharing import PrefixSharingLM
from jai.tokenization.loading import load_tokenizer

PACKAGES = ("torch", "transformers", "lm-eval")
CHOICES = 4


def belebele(rows: Sequence[dict], *, letters: bool) -> list[list[tuple[str, str]]]:
    """Contexts and continuations of each question, in lm-eval's words."""
    questions = []
    for row in rows:
        answers = [row[f"mc_answer{number}"] for number in range(1, CHOICES + 1)]
        listed = "\n".join(f"{letter}: {answer}" for letter, answer in zip("ABCD", answers))
        head = f"P: {row['flores_passage']}\nQ: {row['question'].strip()}\n"
        context = f"{head}{listed}\nAnswer:" if letters else f"{head}Answer:"
        questions.append([(context, f" {choice}") for choice in ("ABCD" if letters else answers)])
    return questions


def xquad(rows: Sequence[dict]) -> list[list[tuple[str, str]]]:
    """Each question with its answer and those of three other questions, on its paragraph first."""
    questions = []
    for row in rows:
        others = sorted(rows, key=lambda other: other["context"] != row["context"])
        answers = dict.fromkeys([row["answers"]["text"][0], *(other["answers"]["text"][0] for other in others)])
        context = f"บริบท: {row['context']}\n\nคำถาม: {row['question']}\n\nคำตอบ:"
        questions.append([(context, f" {answer}") for answer in list(answers)[:CHOICES]])
    return questions


def measure(lm: HFLM, questions: Sequence[Sequence[tuple[str, str]]]) -> tuple[float, list[float]]:
    """Seconds of the processor, and the log-likelihoods."""
    pairs = [pair for question in questions for pair in question]
    requests = [Instance("loglikelihood", {}, pair, index, ("task", index, 1)) for index, pair in enumerate(pairs)]
    begin = time.process_time()
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    return time.process_time() - begin, [value for value, _ in answers]


def chosen(values: Sequence[float]) -> list[int]:
    """Number of the most likely choice of each question."""
    groups = [values[begin : begin + CHOICES] for begin in range(0, len(values), CHOICES)]
    return [max(range(CHOICES), key=group.__getitem__) for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="append the rows to results/evaluation.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = JaiConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 7 // 2,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=arguments.hidden_size // 64,
        block_size=1,
        block_repeats=[1] * arguments.layers,
        num_local_experts=1,
        initializer_range=0.05,
    )
    model = JaiForCausalLM(config).eval()
    shared = {"pretrained": model, "tokenizer": tokenizer, "batch_size": arguments.batch_size, "backend": "causal"}
    passages = local_split(arguments.data, DataSource("facebook/belebele", "tha_Thai", "test"))
    paragraphs = local_split(arguments.data, DataSource("google/xquad", "xquad.th", "validation"))
    assert passages is not None, f"no Belebele in {arguments.data}"
    assert paragraphs is not None, f"no XQuAD in {arguments.data}"
    first = sorted(passages, key=lambda row: row["flores_passage"])[: arguments.questions]  # as all 900 come
    suites = {
        "Belebele, letters": belebele(first, letters=True),
        "Belebele, answers": belebele(first, letters=False),
        "XQuAD, four answers": xquad(list(paragraphs)[: arguments.questions]),
    }
    table = Table(
        "task", "lm-eval, questions/s", "jai eval, questions/s", "ratio", "largest difference of a log-likelihood"
    )
    rows = []
    for name, questions in suites.items():
        theirs, reference = measure(HFLM(**shared), questions)
        ours, values = measure(PrefixSharingLM(**shared), questions)
        assert chosen(values) == chosen(reference), f"{name}: other answers"
        difference = max(abs(a - b) for a, b in zip(values, reference))
        speeds = [len(questions) / seconds for seconds in (theirs, ours)]
        table.add_row(name, *(f"{speed:.3f}" for speed in speeds), f"{theirs / ours:.2f}", f"{difference:.1e}")
        rows.append(
            {
                **provenance(PACKAGES),
                "task": name,
                "questions": str(len(questions)),
                "batch_size": str(arguments.batch_size),
                "hidden_size": str(arguments.hidden_size),
                "layers": str(arguments.layers),
                "lm_eval_questions_per_second": f"{speeds[0]:.4f}",
                "jai_questions_per_second": f"{speeds[1]:.4f}",
                "ratio": f"{theirs / ours:.3f}",
            }
        )
    Console().print(table)
    if arguments.save:
        print(f"Appended to {append('evaluation', rows)}")


if __name__ == "__main__":
    main()

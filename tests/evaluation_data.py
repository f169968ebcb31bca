# SPDX-License-Identifier: Apache-2.0
"""Data for the suites, in the forms that the Hub has, made so that a reader of a question alone knows its answer; and
models that know some of the answers, or always say the same."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from jai.evaluation import suites

RIGHT, WRONG = "ถูก", "ผิด"  # as long as each other: lengths must not tell them apart
LETTERS = "ABCDEFGHIJ"
ITEMS = {"thai_exam": 5, "onet": 3, "arc": 4, "hellaswag": 3, "mmlu": 2, "truthfulqa": 4, "winogrande": 6, "gsm8k": 5}
LENGTHS = {4096: 1536, 8192: 2048, 16384: 2560, 32768: 3072}  # of long contexts, and what tests have in their place


class Chats(LM):
    """What is asked in the chat form as well: there the question is the prompt."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_history[-1]["content"]

    @property
    def tokenizer_name(self) -> str:
        return "none"

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


class Knows(Chats):
    """Knows the answers of some questions, by their numbers, and is wrong on all others.

    What is right it reads from the question: a choice that says `RIGHT`, or the answer after "= "; or from the row.
    """

    def __init__(self, known: Callable[[int], bool] = lambda number: number % 2 == 0):
        super().__init__()
        self.known = known

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [
            (-1.0 if self._is_right(*request.args) == self.known(request.doc_id) else -60.0, False)
            for request in requests
        ]

    @staticmethod
    def _is_right(context: str, continuation: str) -> bool:
        letter = continuation.strip()
        if letter in LETTERS:
            chosen = re.findall(rf"^{letter}[.:] (.*)$", context, re.MULTILINE)[-1]
            return RIGHT in chosen
        return RIGHT in continuation or context.endswith(RIGHT)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [right_reply(request.args[0], request.doc) if self.known(request.doc_id) else "" for request in requests]


def right_reply(prompt: str, doc: Mapping[str, Any]) -> str:
    """What a model says that knows the answer."""
    if "outputs" in doc:  # of RULER: all that the long context holds
        return prompt
    if "gold" in doc:
        return f"<think>x</think>{'คำตอบคือ' if 'ขั้นตอน' in prompt else 'The answer is'} {doc['gold']}"
    if "kwargs" in doc:
        return '"ก"'
    if "th" in doc:
        return doc["th"]
    if "tests" in doc:
        return f"```python\n{_program(doc)}\n```"
    if "entry_point" in doc:
        return "    return 1\n"
    if "code" in doc:
        return doc["code"]
    question = prompt.split("\n\n")[-1]
    choices = re.findall(rf"^([{LETTERS}])\. {RIGHT}", prompt, re.MULTILINE)
    if choices:
        return f"คำตอบคือ ({choices[-1]})"
    return "#### " * ("GSM" in question) + re.findall(r"= ?(\S+)", prompt)[-1]


def _program(doc: Mapping[str, Any]) -> str:
    """One that has the tests by heart."""
    known = {given.strip(): expected.strip() for given, expected in json.loads(doc["tests"])}
    if doc["function"]:
        return f"def {doc['function']}(*a): return json.loads({known!r}['\\n'.join(map(json.dumps, a))])"
    return f"print({known!r}[sys.stdin.read().strip()])"


class Constant(Chats):
    """Takes every choice for as likely as any other, so that the first is taken, and says nothing."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [""] * len(requests)


def choices_of(number: int, count: int) -> tuple[list[str], int]:
    """The texts of a question's choices, and which is right: each in its turn."""
    right = number % count
    return [f"{RIGHT if index == right else WRONG} ข้อ {index}" for index in range(count)], right


def write_rows(folder: Path, name: str, rows: Sequence[dict]) -> None:
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path, mmlu_subjects: Sequence[str]) -> Path:
    """All that the suites that run offline take."""
    for subset in ("onet", "ic", "tgat", "tpat1", "a_level"):
        for split, count in (("train", 5), ("test", ITEMS["thai_exam"])):
            write_rows(folder, f"scb10x/thai_exam/{subset}/{split}", [_thai_exam_row(n) for n in range(count)])
    for number, name in enumerate(_ONET, 8):
        write_rows(folder, f"openthaigpt_{number:02}_{name}", [_onet_row(n) for n in range(ITEMS["onet"] + 1)])
    _write_h6(folder, "thai-h6", "thai-h6", mmlu_subjects=None)
    _write_h6(folder, None, "", mmlu_subjects=mmlu_subjects)
    write_rows(folder, "facebook/belebele/tha_Thai/test", [_belebele_row(n) for n in range(8)])
    write_rows(folder, "cambridgeltl/xcopa/th/test", [_xcopa_row(n) for n in range(4)])
    for language in ("th", "en"):
        write_rows(folder, f"google/xquad/xquad.{language}/validation", [_xquad_row(n) for n in range(6)])
    for kind, count in (("parallel", 4), ("nonparallel", 2)):
        write_rows(folder, f"mrlbenchmarks/global-piqa-{kind}/tha_thai/test", [_piqa_row(n, count) for n in range(4)])
    categories = sorted(_MMLU_PROX)
    for split, count in (("validation", 5), ("test", 2)):
        rows = [_mmlu_prox_row(n, category) for category in categories for n in range(count)]
        write_rows(folder, f"li-lab/MMLU-ProX/th/{split}", rows)
    _write_chats(folder)
    _write_programs(folder)
    for language, sentence in (("th", "แมวนอนอยู่บนเก้าอี้ในบ้าน"), ("en", "The cat sleeps on a chair in the house.")):
        words = " ".join(f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "lmnrst") if language == "en" else ""
        more = "วันนี้อากาศดีมาก เราไปตลาดซื้อผลไม้กับแม่ ประเทศไทยมีกรุงเทพมหานครเป็นเมืองหลวง และมีแม่น้ำเจ้าพระยาไหลผ่าน"
        text = f"{sentence}\n{words}\n{more}"
        (folder / f"haystack_{language}.txt").write_text(text, encoding="utf-8")
    return folder


def mmlu_subjects() -> list[str]:
    """The 57 of lm-eval's tasks."""
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))


def write_whole_data(folder: Path, shared: Path) -> Path:
    """What all suites take but lm-eval's RULER: the shared data, and rows of what it has not."""
    write_data(folder, mmlu_subjects())
    for path in folder.glob("openthaigpt_*"):  # the others' names come before those of the Hub's form
        path.unlink()
    for path in (shared / "eval").iterdir():
        (folder / path.name).symlink_to(path)
    for name, rows in {
        "mt_bench_th": [{"question_id": 1, "category": "math", "turns": ["๑", "๒"], "reference": ["ก", "ข"]}],
        "hall_bench": [{"id": "a", "question": "ใคร", "facts": "เขา"}],
        "hall_bench_298": [{"id": "a", "question": "ใคร", "facts": "เขา"}],
    }.items():
        write_rows(folder, name, rows)
    for language in ("th", "en"):
        with gzip.open(shared / f"train_{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            text = "\n".join(json.loads(next(lines))["text"] for _ in range(4))
        (folder / f"haystack_{language}.txt").write_text(text, encoding="utf-8")
    return folder


def short_suite(name: str, folder: Path, lengths: Mapping[int, int] = LENGTHS) -> Path:
    """A suite of long contexts as a file of one's own, with shorter and fewer ones."""
    text = (Path(suites.__file__).parent / f"{name}.yaml").read_text()
    for long, short in lengths.items():
        text = text.replace(str(long), str(short))
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("metadata: {", "metadata: {samples: 2, "))
    return path


def share_of_first(count: int, choices: int) -> float:
    """Of questions whose right choice is each in its turn, how many have the first."""
    return Counter(number % choices for number in range(count))[0] / count


_ONET = [f"onet_m3_{each}" for each in ("thai", "social", "math", "science", "english")]
_ONET += [f"onet_m6_{each}" for each in ("thai", "math", "social", "science", "english")]
_MMLU_PROX = ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history"]
_MMLU_PROX += ["law", "math", "other", "philosophy", "physics", "psychology"]


def _write_chats(folder: Path) -> None:
    """What is asked in the chat form."""
    for language in ("th", "en"):
        rows = [{"question": f"{n} + 1 = {n + 1}", "answer": None, "answer_number": n + 1} for n in range(4)]
        write_rows(folder, f"juletxara/mgsm/{language}/test", rows)
    problems = [{"problem": f"{n} + 1", "answer": str(n + 1), "solution": "…"} for n in range(4)]
    for name in ("HuggingFaceH4/MATH-500/test", "iapp/math-500-th/test", "iapp/aime_2024-th/train"):
        write_rows(folder, name, problems)
    aime = [{"Problem": row["problem"], "Answer": row["answer"], "ID": "1"} for row in problems]
    write_rows(folder, "Maxwell-Jia/AIME_2024/train", aime)
    types = ["startend:quotation", "punctuation:no_comma"]
    english = [{"key": n, "prompt": "p", "instruction_id_list": types, "kwargs": [{}, {}]} for n in range(4)]
    write_rows(folder, "google/IFEval/train", english)
    thai = [
        {"id": n, "prompts": [{"text": "p"}], "metadata": {"subcategory": "startend:quotation"}, "kwargs": [{}]}
        for n in range(4)
    ]
    write_rows(folder, "aisingapore/Instruction-Following-IFEval/th", thai)
    pairs = [{"en": f"The house {n}.", "th": f"แมวนอนอยู่บนเก้าอี้ในบ้านหลังที่ {n}"} for n in range(4)]
    for name in ("flores", "arc", "mmlu"):
        write_rows(folder, f"translation/{name}/test", pairs)


def _write_programs(folder: Path) -> None:
    """What is answered with programs."""
    humaneval = [
        {"entry_point": "f", "prompt": f"def f():  # {n}\n", "test": "def check(f):\n  assert f() == 1"}
        for n in range(2)
    ]
    mbpp = [{"text": f"Set x ({n}).", "code": "x = 1", "test_list": ["assert x == 1"] * 3} for n in range(4)]
    write_rows(folder, "openai/openai_humaneval/test", humaneval)
    write_rows(folder, "google-research-datasets/mbpp/full/test", mbpp)
    for language in ("en", "th"):
        write_rows(folder, f"livecodebench_{language}", [_contest_row(n) for n in range(2)])


def _contest_row(number: int) -> dict:
    """A program, then a function."""
    case = {"input": "[1]\n3" if number % 2 else "1 3\n", "output": "4"}
    return {
        "question_content": f"โจทย์ {number}",
        "starter_code": "",
        "public_test_cases": json.dumps([case]),
        "private_test_cases": json.dumps([case]),
        "metadata": json.dumps({"func_name": "add"} if number % 2 else {}),
    }


def _thai_exam_row(number: int) -> dict:
    choices, right = choices_of(number, 5)
    return {"question": f"ข้อ {number}", **dict(zip("abcde", choices)), "answer": "abcde"[right], "subject": "thai"}


def _onet_row(number: int) -> dict:
    choices, right = choices_of(number, 4)
    return {
        "year": "2021",
        "instruction": f"ข้อ {number}",
        "input": " ".join(f"({index}) {choice}" for index, choice in enumerate(choices, 1)),
        "result": f"({right + 1}) {choices[right]}",
        "isAnswerable": "TRUE" if number < ITEMS["onet"] else "FALSE",
        "isMultipleChoice": "TRUE",
        "isSingleChoiceSolution": "TRUE",
    }


def _write_h6(folder: Path, owner: str | None, prefix: str, *, mmlu_subjects: Sequence[str] | None) -> None:
    # Where the questions are a validation split, lm-eval draws an example more, for the question may be among them.
    def name(ours: str, theirs: str) -> str:
        return f"thai-h6/{ours}" if owner else theirs

    arc, hellaswag = name("arc", "allenai/ai2_arc/ARC-Challenge"), name("hellaswag", "Rowan/hellaswag")
    write_rows(folder, f"{arc}/train", [_arc_row(n) for n in range(25)])
    write_rows(folder, f"{arc}/test", [_arc_row(n) for n in range(ITEMS["arc"])])
    write_rows(folder, f"{hellaswag}/train", [_hellaswag_row(n) for n in range(11)])
    write_rows(folder, f"{hellaswag}/validation", [_hellaswag_row(n) for n in range(ITEMS["hellaswag"])])
    for subject in mmlu_subjects or [""]:
        mmlu = name("mmlu", f"cais/mmlu/{subject}")
        write_rows(folder, f"{mmlu}/dev", [_mmlu_row(n) for n in range(5)])
        write_rows(folder, f"{mmlu}/test", [_mmlu_row(n) for n in range(ITEMS["mmlu"])])
    truthful = name("truthfulqa", "truthfulqa/truthful_qa/multiple_choice")
    write_rows(folder, f"{truthful}/validation", [_truthful_row(n) for n in range(ITEMS["truthfulqa"])])
    winogrande = name("winogrande", "allenai/winogrande/winogrande_xl")
    write_rows(folder, f"{winogrande}/train", [_winogrande_row(n) for n in range(6)])
    write_rows(folder, f"{winogrande}/validation", [_winogrande_row(n) for n in range(ITEMS["winogrande"])])
    gsm8k = name("gsm8k", "openai/gsm8k/main")
    write_rows(folder, f"{gsm8k}/train", [_gsm8k_row(n) for n in range(5)])
    write_rows(folder, f"{gsm8k}/test", [_gsm8k_row(n) for n in range(ITEMS["gsm8k"])])


def _arc_row(number: int) -> dict:
    choices, right = choices_of(number, 4)
    return {
        "question": f"ข้อ {number}",
        "choices": {"text": choices, "label": list("ABCD")},
        "answerKey": "ABCD"[right],
    }


def _hellaswag_row(number: int) -> dict:
    endings, right = choices_of(number, 4)
    return {
        "activity_label": "งาน",
        "ctx_a": f"ข้อ {number}",
        "ctx_b": "แล้ว",
        "endings": endings,
        "label": str(right),
    }


def _mmlu_row(number: int) -> dict:
    choices, right = choices_of(number, 4)
    return {"question": f"ข้อ {number}", "choices": choices, "answer": right}


def _truthful_row(number: int) -> dict:
    targets = {"choices": [f"{RIGHT} 0", f"{WRONG} 1", f"{WRONG} 2"], "labels": [1, 0, 0]}
    return {"question": f"ข้อ {number}", "mc1_targets": targets, "mc2_targets": targets}


def _winogrande_row(number: int) -> dict:
    options = [RIGHT, WRONG] if number % 2 == 0 else [WRONG, RIGHT]
    return {
        "sentence": f"ข้อ {number} คำว่า _ ดีกว่า",
        "option1": options[0],
        "option2": options[1],
        "answer": str(options.index(RIGHT) + 1),
    }


def _gsm8k_row(number: int) -> dict:
    return {"question": f"GSM ข้อ {number} มีค่า = {number + 10}", "answer": f"คิด\n#### {number + 10}"}


def _belebele_row(number: int) -> dict:
    choices, right = choices_of(number, 4)
    answers = {f"mc_answer{index}": choice for index, choice in enumerate(choices, 1)}
    return {
        "flores_passage": f"บทความ {number // 2}",
        "question": f"ข้อ {number}",
        **answers,
        "correct_answer_num": str(right + 1),
    }


def _xcopa_row(number: int) -> dict:
    choices, right = choices_of(number, 2)
    return {
        "premise": f"เรื่อง {number}.",
        "choice1": choices[0],
        "choice2": choices[1],
        "question": "effect",
        "label": right,
    }


def _xquad_row(number: int) -> dict:
    return {
        "id": str(number),
        "context": f"บทความ {number // 3}",
        "question": f"ค่า = คำตอบ{number}",
        "answers": {"text": [f"คำตอบ{number}"], "answer_start": [0]},
    }


def _piqa_row(number: int, count: int) -> dict:
    choices, right = choices_of(number, count)
    return {
        "prompt": f"ข้อ {number}",
        **{f"solution{index}": choice for index, choice in enumerate(choices)},
        "label": right,
    }


def _mmlu_prox_row(number: int, category: str) -> dict:
    choices, right = choices_of(number, 4)
    options = {f"option_{index}": choices[index] if index < 4 else None for index in range(10)}
    return {
        "question": f"ข้อ {number}",
        **options,
        "answer": LETTERS[right],
        "category": category,
        "cot_content": f"คิด คำตอบคือ ({LETTERS[right]})",
    }


# The metric of lm-eval's HumanEval and MBPP, which `evaluate` downloads. A folder of this name where a process works
# stands in for it: the same interface and, as the original, nothing without HF_ALLOW_CODE_EVAL.
CODE_EVAL = """
import os
import subprocess
import sys
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references, k=(1,)):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("set HF_ALLOW_CODE_EVAL to 1")
        passed = [
            subprocess.run([sys.executable, "-I", "-c", f"{program}\\n{test}"], capture_output=True).returncode == 0
            for programs, test in zip(predictions, references)
            for program in programs
        ]
        return {"pass@1": sum(passed) / len(passed)}, passed
"""

# SPDX-License-Identifier: Apache-2.0
"""`jai difficulty`: how often a model on this machine answers right, and which prompts are kept."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from json_lines import write_rows
from rich.console import Console

import jai.recipes
from chat_endpoint import Answer, ChatEndpoint
from jai.errors import UserError
from jai.evaluation.kept_answers import ANSWERS_FILE
from jai.evaluation.reply_cache import ChatReply
from jai.options import read_options_file
from jai.preferences import difficulty
from jai.preferences.answering import Answered, ask_for_answers, model_options
from jai.preferences.difficulty import TOO_EASY, TOO_HARD, select_prompts
from jai.preferences.options import DifficultyOptions

SYSTEM = "State it in \\boxed{}."
# Right in 0, 1, 2, 3 and 4 of four answers.
PROBLEMS = [
    {"problem": f"{right} of four?", "solution": f"so \\boxed{{{right + 40}}}", "answer": "7", "level": right}
    for right in range(5)
]


def answer_as_often(request: dict, before: int) -> str:
    """Right as often as the question says; the last number alone is no answer."""
    question = next(message["content"] for message in request["messages"] if message["role"] == "user")
    right = int(question[0])
    return f"It is \\boxed{{{right + 40}}}." if before < right else f"It may be {right + 40}, or \\boxed{{7}}."


def run(prompts: Path, out: Path, model: ChatEndpoint, model_name: str = "m", **options):
    server = {"backend": "openai", "base_url": model.url, "model": model_name, "batch_size": 1}
    values = {"candidates": 4, "min_pass_rate": 0.25, "max_pass_rate": 0.75, **server, **options}
    output = io.StringIO()
    path = select_prompts(
        DifficultyOptions(prompts=prompts, out=out, **values), console=Console(file=output, width=300)
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return output.getvalue(), rows, json.loads((out / "difficulty.json").read_text())


@pytest.fixture
def problems(tmp_path) -> Path:
    return write_rows(tmp_path / "problems.jsonl", PROBLEMS)


def test_answers_with_formulae_that_cannot_be_compared_are_not_asked_for(problems, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with ChatEndpoint(answer_as_often) as model:
        with pytest.raises(ModuleNotFoundError, match="math_verify"):
            run(problems, tmp_path / "out", model)
        assert not model.asked
    assert not (tmp_path / "out").exists()


def test_prompts_are_kept_by_their_share_of_right_answers(problems, tmp_path):
    with ChatEndpoint(answer_as_often) as model:
        said, rows, record = run(problems, tmp_path / "out", model, system_prompt=SYSTEM)
        assert rows == [{**row, "pass_rate": row["level"] / 4} for row in PROBLEMS[1:4]]
        assert "3 of 5 prompts are answered right at a rate from 0.25 to 0.75." in said
        assert f"left out: 1 ({TOO_HARD})" in said
        assert f"left out: 1 ({TOO_EASY})" in said
        assert record["left_out"] == {TOO_HARD: 1, TOO_EASY: 1}
        assert record["prompts_by_pass_rate"] == {"0": 1, "0.25": 1, "0.5": 1, "0.75": 1, "1": 1}
        assert (record["answers"]["right"], record["answers"]["wrong"]) == (10, 10)
        assert record["system_prompt"] == SYSTEM
        assert len(model.asked) == 20
        assert all(request["messages"][0] == {"role": "system", "content": SYSTEM} for request in model.asked)
        assert {request["temperature"] for request in model.asked} == {1.0}
        assert model.most_at_once == 1
        rates = [json.loads(line) for line in (tmp_path / "out" / "pass_rates.jsonl").read_text().splitlines()]
        assert rates == [{"id": str(number), "pass_rate": (number - 1) / 4} for number in range(1, 6)]

        # Other rates cost nothing; other answers are another folder's.
        _, rows, _ = run(problems, tmp_path / "out", model, system_prompt=SYSTEM, min_pass_rate=0.5, max_pass_rate=1.0)
        assert [row["level"] for row in rows] == [2, 3, 4]
        assert len(model.asked) == 20
        for change in ({"system_prompt": None}, {"temperature": 0.7}, {"candidates": 5}, {"limit": 2}):
            with pytest.raises(UserError, match="was begun with other inputs or options"):
                run(problems, tmp_path / "out", model, **{"system_prompt": SYSTEM, **change})
        assert len(model.asked) == 20
    with ChatEndpoint(answer_as_often) as again:  # the same server on another port
        _, _, record = run(problems, tmp_path / "out", again, system_prompt=SYSTEM)
        assert again.asked == []
        assert record["base_url"] == again.url


def test_only_the_first_prompts_are_asked(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", PROBLEMS[::-1])
    with ChatEndpoint(answer_as_often) as model:
        _, rows, record = run(file, tmp_path / "out", model, limit=3)
        assert [row["level"] for row in rows] == [3, 2]
        assert list(record["prompts_by_pass_rate"].items()) == [("0.5", 1), ("0.75", 1), ("1", 1)]
        assert len(model.asked) == 12
        with pytest.raises(UserError, match='model was "m" and is "n"'):
            run(file, tmp_path / "out", model, limit=3, model_name="n")
        write_rows(file, PROBLEMS)
        with pytest.raises(UserError, match="prompts_sha256 was"):
            run(file, tmp_path / "out", model, limit=3)
        rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        both = [{**row, **rule, "prompt": row["problem"], "key": row["level"]} for row in PROBLEMS]
        write_rows(file, both)
        run(file, tmp_path / "by", model)
        with pytest.raises(UserError, match='by was "answers" and is "checks"'):
            run(file, tmp_path / "by", model, by="checks")
        assert len(model.asked) == 32


def test_options_reach_the_model(tmp_path):
    """Those of the checkpoint that answers; the others are asked for with each prompt."""
    options = {"model": "m", "backend": "vllm", "batch_size": 3, "dtype": "float16", "seed": 4}
    for values in (options, {"model": "m", "device": "cuda:1", "trust_remote_code": True}):
        given = model_options(DifficultyOptions(prompts=Path("p"), out=Path("o"), **values))
        assert {name: getattr(given, name) for name in values} == values


def test_a_system_turn_of_a_row_stands(tmp_path):
    rows = [{"question": "2 of four?", "answer": "#### 42", "system": "mine"}, {"question": "2 again", "answer": 42}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with ChatEndpoint(answer_as_often) as model:
        run(file, tmp_path / "out", model, system_prompt=SYSTEM)
        assert {request["messages"][0]["content"] for request in model.asked} == {"mine", SYSTEM}


def test_what_was_answered_is_not_asked_again(problems, tmp_path):
    """The server fails in the middle; the same command asks for the rest alone."""

    def fails_at_the_fourth(request: dict, before: int) -> Answer | str:
        return Answer(status=400) if "3 of" in str(request) else answer_as_often(request, before)

    with ChatEndpoint(fails_at_the_fourth) as model:
        with pytest.raises(UserError, match="12 of the 20 replies came and are kept"):
            run(problems, tmp_path / "out", model)
        model.behave = answer_as_often
        model.asked.clear()
        _, rows, _ = run(problems, tmp_path / "out", model)
        assert [row["level"] for row in rows] == [1, 2, 3]
        assert len(model.asked) == 8


def test_instructions_are_checked_in_full(tmp_path):
    both = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    file = write_rows(tmp_path / "if.jsonl", [{"prompt": "a", **both}, {"prompt": "b", **both}])
    texts = {"a": ['"no comma"', '"a, comma"\n"and none"'], "b": ["no quotes", "no quotes, either"]}
    with ChatEndpoint(lambda request, before: texts[request["messages"][0]["content"]][before % 2]) as model:
        _, rows, record = run(file, tmp_path / "out", model, by="checks", language="en")
        assert [(row["prompt"], row["pass_rate"]) for row in rows] == [("a", 0.5)]
        assert record["language"] == "en"


def test_a_repeated_question_is_no_right_answer(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"problem": "คำตอบคือ 42 ใช่ไหม", "solution": "42"}, PROBLEMS[2]])
    with ChatEndpoint(
        lambda request, before: (
            request["messages"][0]["content"] if "ใช่ไหม" in str(request) else answer_as_often(request, before)
        )
    ) as model:
        _, rows, record = run(file, tmp_path / "out", model)
        assert [row["level"] for row in rows] == [2]
        assert record["left_out"] == {TOO_HARD: 1}


def test_cut_answers_count_as_they_stand_and_are_said(problems, tmp_path):
    with ChatEndpoint(lambda request, before: Answer(answer_as_often(request, before), finish="length")) as model:
        said, rows, _ = run(problems, tmp_path / "out", model)
        assert len(rows) == 3
        assert "20 answers were cut off at --max-new-tokens, and are judged as they are." in said


def test_a_checkpoint_answers_and_is_not_asked_again(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Random answers follow a rule now and then; the rates are those of a count of its own answers."""
    ids = {"pad_token_id": tiny_tokenizer.pad_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    model = tiny_model(vocab_size=len(tiny_tokenizer), block_repeats=[1, 1], max_position_embeddings=512, **ids)
    for each in (model, tiny_tokenizer):
        each.save_pretrained(tmp_path / "jai")
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = write_rows(tmp_path / "if.jsonl", [{"prompt": f"{number}?", **rule} for number in range(4)])
    answered: list[list[list[ChatReply]]] = []
    monkeypatch.setattr(
        difficulty,
        "ask_for_answers",
        lambda *args: answered.append(ask_for_answers(*args).replies) or Answered(answered[-1], cut_prompts=3),
    )
    options = {"by": "checks", "candidates": 6, "max_new_tokens": 72, "min_pass_rate": 0.0, "max_pass_rate": 1.0}
    paths = [
        select_prompts(
            DifficultyOptions(prompts=file, out=tmp_path / "out", model=str(tmp_path / "jai"), **options),
            console=Console(file=io.StringIO()),
        )
        for _ in range(2)
    ]
    assert answered[0] == answered[1]
    assert json.loads((tmp_path / "out" / "difficulty.json").read_text())["cut_prompts"] == 3
    drawn = {**options, "limit": 1, "seed": 1}
    select_prompts(
        DifficultyOptions(prompts=file, out=tmp_path / "seed", model=str(tmp_path / "jai"), **drawn),
        console=Console(file=io.StringIO()),
    )
    assert answered[-1][0] != answered[0][0]
    shutil.copytree(tmp_path / "jai", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        select_prompts(DifficultyOptions(prompts=file, out=tmp_path / "new", model=str(tmp_path / "bare"), **options))
    assert not (tmp_path / "new").exists()
    weights = tmp_path / "jai" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"@")  # trained anew under the same name
    with pytest.raises(UserError, match="model_revision was"):
        select_prompts(DifficultyOptions(prompts=file, out=tmp_path / "out", model=str(tmp_path / "jai"), **options))
    rates = [json.loads(line)["pass_rate"] for line in paths[0].read_text(encoding="utf-8").splitlines()]
    assert rates == [sum("," not in reply.text for reply in replies) / 6 for replies in answered[0]]
    assert len(set(rates)) > 1


def kill_when(command: list[str], is_time: Callable[[], bool]) -> None:
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
    while not is_time():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_while_a_server_answers(problems, tmp_path):
    """SIGKILL; the same command asks for the rest, and ends as a run that was left alone."""
    options = ["--candidates", "4", "--min-pass-rate", "0.25", "--max-pass-rate", "0.75", "--batch-size", "1"]
    with ChatEndpoint(lambda request, before: Answer(answer_as_often(request, before), delay=0.1)) as model:
        command = [sys.executable, "-m", "jai", "difficulty", str(problems), str(tmp_path / "out"), "--model", "m"]
        command += ["--backend", "openai", "--base-url", model.url, *options]
        kill_when(command, lambda: len(model.asked) >= 8)
        assert not (tmp_path / "out" / "prompts.jsonl").exists()
        subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
        assert 20 <= len(model.asked) <= 21  # the one that was under way is asked again
    with ChatEndpoint(answer_as_often) as model:
        run(problems, tmp_path / "alone", model)
    for name in ("prompts.jsonl", "pass_rates.jsonl"):  # the record has the address, too
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_killed_while_a_checkpoint_answers(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tmp_path / "jai", block_repeats=[1, 1], max_position_embeddings=512)
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = write_rows(tmp_path / "if.jsonl", [{"prompt": f"{number}?", **rule} for number in range(12)])

    def command(out: str) -> list[str]:
        given = ["--by", "checks", "--candidates", "6", "--max-new-tokens", "48", "--batch-size", "2"]
        given += ["--min-pass-rate", "0", "--max-pass-rate", "1", "--model", str(folder), "--device", "cpu"]
        return [sys.executable, "-m", "jai", "difficulty", str(file), str(tmp_path / out), *given]

    answers = tmp_path / "out" / ANSWERS_FILE
    kill_when(command("out"), lambda: answers.exists() and answers.stat().st_size > 0)
    kept = answers.read_bytes()
    for out in ("out", "alone"):
        subprocess.run(command(out), check=True, env=os.environ, stdout=subprocess.DEVNULL)
    assert 0 < len(kept) < answers.stat().st_size
    assert answers.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])  # what was whole stays
    for name in ("prompts.jsonl", "pass_rates.jsonl", "difficulty.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_bad_input(problems, tmp_path):
    with ChatEndpoint(answer_as_often) as model:
        file = write_rows(tmp_path / "rows.jsonl", [*PROBLEMS, {"problem": "2?", "solution": " "}])
        with pytest.raises(UserError, match="Prompt 6 has no `solution` or `answer`"):
            run(file, tmp_path / "out", model)
        with pytest.raises(UserError, match="no `prompt`, `messages`, `question` or `problem`"):
            run(write_rows(tmp_path / "none.jsonl", [{"solution": "1"}]), tmp_path / "out", model)
        assert model.asked == []
        assert not (tmp_path / "out").exists()
        with pytest.raises(UserError, match=re.escape("No prompt is left;")):
            run(problems, tmp_path / "out", model, min_pass_rate=0.3, max_pass_rate=0.4)
        with pytest.raises(UserError, match="--language does nothing with --by answers"):
            run(problems, tmp_path / "other", model, language="en")
    with pytest.raises(UserError, match=r"--min-pass-rate is 0\.5, and --max-pass-rate 0\.4"):
        DifficultyOptions(prompts=problems, out=tmp_path, model="m", min_pass_rate=0.5, max_pass_rate=0.4)


def test_the_recipe_is_of_today():
    path = Path(jai.recipes.__file__).parent / "difficulty.yaml"
    values = read_options_file(path, DifficultyOptions)
    options = DifficultyOptions(prompts=Path("p"), out=Path("o"), model="m", **values)
    assert (options.candidates, options.min_pass_rate, options.max_pass_rate) == (8, 1 / 8, 7 / 8)
    import yaml

    assert options.system_prompt == yaml.safe_load((path.parent / "grpo.yaml").read_text())["system_prompt"]

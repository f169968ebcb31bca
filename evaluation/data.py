# SPDX-License-Identifier: Apache-2.0
"""Data sets in a folder, in place of those that tasks load from the Hub.

The folder holds a file for each split, as JSON Lines, gzipped or not: `OWNER/NAME/CONFIG/SPLIT.jsonl`, with the columns
that the data set has on the Hub (`NAME/SPLIT.jsonl` where there is no owner or no configuration). Some data sets are
also known by flat names and in other forms, such as SEA-HELM's: `KNOWN_FILES` lists them.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jai.errors import UserError
from jai.evaluation.instructions.scoring import instruction_row
from jai.evaluation.programs import check_program_row

if TYPE_CHECKING:
    from datasets import Dataset

Parsed = TypeVar("Parsed")

_SUFFIXES = (".jsonl", ".jsonl.gz")
_OPENTHAIGPT = (
    "https://raw.githubusercontent.com/OpenThaiGPT/openthaigpt_eval/b0eb95f41f9d0e12276c025402198f3dd04affff/exams/"
)


@dataclass(frozen=True)
class DataSource:
    """A split of a data set as a task names it.

    Attributes:
        path: Hub id, or the address of a file where that is what is loaded.
        config: name of the configuration, None where there is none.
        split: such as "test".
    """

    path: str
    config: str | None
    split: str


@dataclass(frozen=True)
class KnownFile:
    """A file that may stand in for a split.

    Attributes:
        name: without its suffix.
        columns: that each row must have.
        convert: makes a row of the Hub's of a row of the file's.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] = dict


def _belebele_row(row: Mapping[str, Any]) -> dict[str, Any]:
    label = row["label"]  # a letter in the five rows that SEA-HELM sets apart as examples
    answers = {f"mc_answer{number}": row[f"choice{number}"] for number in range(1, 5)}
    return {
        "flores_passage": row["text"],
        "question": row["question"],
        **answers,
        "correct_answer_num": str(1 + ("ABCD".index(label) if isinstance(label, str) else label)),
    }


def _xquad_row(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = row["answers"]
    return {
        **row,
        "answers": {
            "text": [each["text"] for each in answers],
            "answer_start": [each["answer_start"] for each in answers],
        },
    }


def _mgsm_row(row: Mapping[str, Any]) -> dict[str, Any]:
    # On the Hub the answer is the worked one, which only the eight examples for the prompt have.
    return {"question": row["question"], "answer": None, "answer_number": int(row["answer"].replace(",", ""))}


def _instruction_row(language: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it is. A type or an argument that no check can take is refused here, where file and line are known."""
    instruction_row(row, language)
    return dict(row)


def _known_files() -> dict[DataSource, KnownFile]:
    exam = ("question", "choices", "answer")
    onet = ("instruction", "input", "result", "isAnswerable", "isMultipleChoice", "isSingleChoiceSolution")
    known = {
        DataSource("scb10x/thai_exam", subset, split): KnownFile(f"thai_exam_{subset}_{split}", exam)
        for subset in ("a_level", "ic", "onet", "tgat", "tpat1")
        for split in ("train", "test")
    }
    for level, first, subjects in (
        ("m3", 8, ("thai", "social", "math", "science", "english")),
        ("m6", 13, ("thai", "math", "social", "science", "english")),
    ):
        for number, subject in enumerate(subjects, first):
            name = f"{number:02}_onet_{level}_{subject}"
            known[DataSource(f"{_OPENTHAIGPT}{name}.csv", None, "test")] = KnownFile(f"openthaigpt_{name}", onet)
    passage = ("text", "question", "choice1", "choice2", "choice3", "choice4", "label")
    copa = ("premise", "choice1", "choice2", "question", "label")
    known |= {
        DataSource("facebook/belebele", "tha_Thai", "test"): KnownFile("belebele_th", passage, _belebele_row),
        DataSource("cambridgeltl/xcopa", "th", "validation"): KnownFile("xcopa_th_val", copa),
        DataSource("cambridgeltl/xcopa", "th", "test"): KnownFile("xcopa_th_test", copa),
    }
    for language in ("th", "en"):
        known |= {
            DataSource("google/xquad", f"xquad.{language}", "validation"): KnownFile(
                f"xquad_{language}", ("id", "context", "question", "answers"), _xquad_row
            ),
            DataSource("juletxara/mgsm", language, "test"): KnownFile(
                f"mgsm_{language}", ("question", "answer"), _mgsm_row
            ),
        }
    program = ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata")
    known[DataSource("hf://datasets/livecodebench/code_generation_lite/test.jsonl", None, "test")] = KnownFile(
        "livecodebench_en", program, check_program_row
    )
    known[DataSource("iapp/code_generation_lite-th", None, "test")] = KnownFile(
        "livecodebench_th", program, check_program_row
    )
    known[DataSource("aisingapore/Instruction-Following-IFEval", None, "th")] = KnownFile(
        "ifeval_th", ("id", "prompts", "metadata", "kwargs"), partial(_instruction_row, "th")
    )
    known[DataSource("google/IFEval", None, "train")] = KnownFile(
        "ifeval_en", ("key", "prompt", "instruction_id_list", "kwargs"), partial(_instruction_row, "en")
    )
    return known


KNOWN_FILES = _known_files()


def local_split(folder: Path, source: DataSource) -> "Dataset | None":
    """A split from a folder, None where the folder does not have it.

    Raises:
        UserError: if the file is damaged, or a row lacks a column, naming the file and the line.
    """
    known = KNOWN_FILES.get(source)
    if known is not None and (path := rows_file(folder / known.name)) is not None:
        rows = list(read_rows(path, known.columns, known.convert))
    elif (path := rows_file(folder.joinpath(*filter(None, (source.path, source.config)), source.split))) is not None:
        rows = list(read_rows(path))
    else:
        return None
    if not rows:
        raise UserError(f"{path} has no rows. Give a file with a JSON object on each line.")
    from datasets import Dataset

    return Dataset.from_list(rows)


def names_of(source: DataSource) -> list[str]:
    """The files that would be taken for a split, without their suffixes, for messages."""
    known = KNOWN_FILES.get(source)
    is_address = "://" in source.path
    general = [] if is_address else ["/".join(filter(None, (source.path, source.config, source.split)))]
    return [*([known.name] if known else []), *general]


def read_rows(
    path: Path,
    columns: tuple[str, ...] | None = None,
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON Lines, gzipped where its name ends in .gz; empty lines are no rows.

    Args:
        path: the file.
        columns: that each row must have; None are those of the first row.
        convert: is given each row.

    Raises:
        UserError: if the file or a row is damaged, or a row lacks a column, naming the file and the line.
    """
    wanted = columns

    def checked(row: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal wanted
        wanted = tuple(row) if wanted is None else wanted
        missing = [name for name in wanted if name not in row]
        if missing:
            raise ValueError(f"without {missing[0]!r}")
        return convert(row)

    return parsed_rows(path, checked)


def parsed_rows(path: Path, parse: Callable[[Mapping[str, Any]], Parsed]) -> Iterator[Parsed]:
    """What is made of the rows of a file of JSON Lines, gzipped where its name ends in .gz; empty lines are no rows.

    Args:
        path: the file.
        parse: is given each row; it raises ValueError, TypeError, KeyError or AttributeError for one that is wrong.

    Raises:
        UserError: if the file or a row is damaged, or a row is wrong, naming the file and the line.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield parse(row)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged after line {number} ({error}). Fetch it again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give a file that you may read.") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}, is not a row that can be used ({error}). Fix the line, or fetch the file again."
        ) from None


def rows_file(stem: Path) -> Path | None:
    """The file of rows of this name, which may be gzipped; None where there is none."""
    return next((path for suffix in _SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()), None)

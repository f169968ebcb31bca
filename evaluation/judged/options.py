# SPDX-License-Identifier: Apache-2.0
"""What judged suites take from the command line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jai.errors import UserError
from jai.files import check_is_file
from jai.options import argument, check_values, option

if TYPE_CHECKING:
    from jai.evaluation.endpoint import Endpoint

JUDGE_PARAMETERS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2048}


@dataclass(kw_only=True)
class JudgeOptions:
    """Who judges, and how."""

    judge_url: str | None = option(
        None,
        help="URL of the judge's OpenAI-compatible API, such as https://api.openai.com/v1. Required if there is "
        "something to judge.",
        metavar="URL",
    )
    judge_model: str | None = option(
        None, help="Name of the judge on that server, such as gpt-4o-2024-08-06.", metavar="NAME"
    )
    judge_key: str = option("OPENAI_API_KEY", help="Environment variable that holds the API key.", metavar="VARIABLE")
    judge_parameters: list[str] = option(
        [],
        help="Sampling parameter of the judge, in addition to temperature=0 and max_tokens=2048; null removes one. "
        "Repeat the option for several.",
        metavar="NAME=JSON",
    )
    judge_concurrency: int = option(8, help="Requests to the judge in parallel.", at_least=1)
    judge_timeout: float = option(120.0, help="Seconds to wait for each judgement.", above=0)
    judge_attempts: int = option(6, help="Attempts per request before it counts as failed.", at_least=1)
    judge_max_failed: int = option(
        0, help="Failed judgements to tolerate; beyond this the run stops and keeps what it has.", at_least=0
    )
    judge_price: list[float] = option(
        [],
        help="Price per million input and output tokens, such as 2.5,10, to estimate the cost beforehand.",
        at_least=0,
        metavar="INPUT,OUTPUT",
    )
    repeats: int = option(1, help="Times to judge each answer; from 2 on, the agreement is shown.", at_least=1)

    def check_judge(self) -> None:
        """Refuse to judge without a judge, before anything heavy is imported.

        Raises:
            UserError: saying what is missing or wrong.
        """
        if not self.judge_url or not self.judge_model:
            missing = "--judge-model" if self.judge_url else "--judge-url"
            raise UserError(
                f"A judged suite needs a judge, but {missing} is not given. Give the address of an OpenAI-compatible "
                "API and the id of a model there: --judge-url https://api.openai.com/v1 --judge-model "
                "gpt-4o-2024-08-06."
            )
        if len(self.judge_price) not in (0, 2):
            raise UserError(
                f"judge_price has {len(self.judge_price)} numbers; expected two, the price of a million tokens read "
                "and of a million written, such as 2.5,10."
            )
        self.parameters_of_judge()
        self.endpoint_of_judge()

    def endpoint_of_judge(self) -> "Endpoint":
        """Where the judge is asked.

        Raises:
            UserError: if the address is none.
        """
        from jai.evaluation.endpoint import Endpoint

        return Endpoint(
            url=str(self.judge_url),
            model=str(self.judge_model),
            key_variable=self.judge_key,
            concurrency=self.judge_concurrency,
            timeout=self.judge_timeout,
            attempts=self.judge_attempts,
            max_failed=self.judge_max_failed,
            prices=(self.judge_price[0], self.judge_price[1]) if self.judge_price else None,
        )

    def parameters_of_judge(self) -> dict[str, Any]:
        """Parameters of the judge's sampling.

        Raises:
            UserError: if one is no NAME=JSON.
        """
        parameters = dict(JUDGE_PARAMETERS)
        for text in self.judge_parameters:
            name, equals, value = text.partition("=")
            try:
                if not name.strip() or not equals:
                    raise ValueError
                parameters[name.strip()] = json.loads(value)
            except ValueError:
                raise UserError(
                    f"judge_parameters has {text!r}; expected NAME=JSON, such as temperature=1 or "
                    'reasoning_effort="low".'
                ) from None
        return {name: value for name, value in parameters.items() if value is not None}


@dataclass(kw_only=True)
class PairwiseOptions(JudgeOptions):
    """What `jai eval pairwise` takes."""

    first: Path = argument("FIRST", help="Answers of one model, such as eval/NAME/answers-mt-bench-th.jsonl.")
    second: Path = argument("SECOND", help="Answers of another model to the same questions.")
    suite: str = option("mt-bench-th", help="Suite that the questions are from.", metavar="NAME")
    out: Path | None = option(
        None,
        help="Output folder. If it exists, the run resumes.",
        metavar="DIR",
        shown_default="eval/pairwise",
    )
    data: Path | None = option(None, help="Folder with the questions, instead of the Hub.", metavar="DIR")
    limit: int | None = option(None, help="Compare only the answers to the first N questions.", at_least=1, metavar="N")
    seed: int = option(0, help="Random seed for the confidence intervals.", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what cannot be compared, before anything heavy is imported.

        Raises:
            UserError: as `check_judge`, and for a folder or files that are not there.
        """
        self.check_judge()
        if self.data is not None and not self.data.is_dir():
            raise UserError(f"--data {self.data} is not a folder. Give one that exists.")
        for path in (self.first, self.second):
            check_is_file(path, "Give a file of answers, such as answers-mt-bench-th.jsonl of a run.")

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""
        return self.out or Path("eval") / "pairwise"

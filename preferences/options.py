# SPDX-License-Identifier: Apache-2.0
"""What `jai pairs`, `jai difficulty` and `jai score` take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jai.errors import UserError
from jai.evaluation.judged.options import JudgeOptions
from jai.evaluation.options import check_backend
from jai.files import check_is_file, refuse_existing
from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class AnsweringOptions:
    """Who answers prompts, and how."""

    prompts: Path = argument("PROMPTS", help="File of prompts, one a line: .jsonl or .jsonl.gz.")
    out: Path = argument("OUT", help="Folder to make; one that is there already is gone on with.")
    model: str = option(
        help="Folder or Hub id of the checkpoint that answers; with --backend openai, its name on the server."
    )
    backend: Literal["hf", "vllm", "openai"] = option(
        "hf", help="What runs it: transformers, vLLM, or a server with an OpenAI-compatible API."
    )
    base_url: str | None = option(
        None, help="Address of the server's API, such as http://127.0.0.1:8000/v1.", metavar="URL"
    )
    language: Literal["th", "en"] = option("th", help="Language of the instructions of --by checks.")
    temperature: float = option(0.8, help="Temperature of the answers.", above=0)
    top_p: float = option(
        0.95, help="Answers are drawn from the likeliest tokens that add up to this.", above=0, at_most=1
    )
    max_answer_tokens: int = option(1024, help="Longest answer in tokens.", at_least=1)
    limit: int | None = option(None, help="Use only the first prompts.", at_least=1)
    batch_size: int = option(8, help="Sequences in a batch, or requests to the server at a time.", at_least=1)
    device: str | None = option(None, help="Such as cuda:1 or cpu.", shown_default="a GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="Type of the weights; auto is that of the checkpoint."
    )
    seed: int = option(0, help="Seed of the answers; a server draws by its own.", at_least=0, at_most=2**32 - 1)
    trust_remote_code: bool = option(False, help="Run the checkpoint's own code in place of the installed package's.")

    def check_answering(self, *, device_is_used: bool = False) -> None:
        """Refuse options that the backend does nothing with.

        Args:
            device_is_used: by something else than the backend.

        Raises:
            UserError: naming the option.
        """
        ignored = {
            "--device": self.device is not None and self.backend != "hf" and not device_is_used,
            "--dtype": self.dtype != "auto" and self.backend == "openai",
            "--seed": self.seed != 0 and self.backend == "openai",  # one seed would make all answers to a prompt equal
        }
        check_backend(self.backend, self.base_url, ignored)


@dataclass(kw_only=True)
class PairsOptions(AnsweringOptions, JudgeOptions):
    """What `jai pairs` takes."""

    by: Literal["judge", "facts", "checks", "reward"] = option(
        "judge",
        help="What tells the better answer: a judge's grade from 1 to 10, a judge that compares with the row's facts, "
        "the row's instructions (IFEval's form), or a reward model.",
    )
    reward_model: str | None = option(
        None, help="Folder or Hub id of the reward model of --by reward: a sequence classifier with one label."
    )
    candidates: int = option(5, help="Answers to each prompt. The paper's are 5.", at_least=1)
    off_policy: Path | None = option(
        None,
        help="File of other models' answers to the same prompts, which compete with the model's own: `id` or `prompt`, "
        "and `answers`, a list of texts.",
        metavar="FILE",
    )
    min_margin: float | None = option(
        None,
        help="Pairs whose scores are closer than this are dropped, and so are ties. Scores of --by reward are "
        "probabilities, or logits of a reward model without a calibration.",
        at_least=0,
        shown_default="1 for a judge's grades, 0 for the rest",
    )
    max_length_ratio: float = option(
        2.0, help="Pairs of which one answer is more than this many times as long are dropped.", at_least=1
    )

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def margin(self) -> float:
        """The smallest difference of two scores that tells one answer from another."""
        if self.min_margin is not None:
            return self.min_margin
        return 1.0 if self.by == "judge" else 0.0

    def check(self) -> None:
        """Refuse what cannot be run, before anything heavy is imported.

        Raises:
            UserError: for files that are not there, and options that do not go together.
        """
        self.check_answering(device_is_used=self.by == "reward")
        if (self.by == "reward") != (self.reward_model is not None):
            raise UserError("--by reward needs --reward-model, and nothing else does.")
        if self.by in ("judge", "facts"):
            self.check_judge()
        elif self.judge_url or self.judge_model:
            raise UserError(f"There is no judge in --by {self.by}, but --judge-url or --judge-model is given.")
        elif self.repeats != 1:
            raise UserError(
                f"There is no judge in --by {self.by}, and --repeats is how often one judges. Leave it out."
            )
        _check_language(self.by, self.language)
        if self.candidates == 1 and self.off_policy is None:
            raise UserError("One answer makes no pair. Give --candidates 2 or more, or --off-policy.")


@dataclass(kw_only=True)
class DifficultyOptions(AnsweringOptions):
    """What `jai difficulty` takes."""

    by: Literal["answers", "checks"] = option(
        "answers",
        help="What a right answer is: one with the final answer of the row's `solution` or `answer`, or one that "
        "follows all of the row's instructions (IFEval's form). It is what `jai grpo` rewards.",
    )
    candidates: int = option(8, help="Answers to each prompt.", at_least=1)
    min_pass_rate: float = option(
        0.1, help="Prompts whose share of right answers is below this are left out.", at_least=0, at_most=1
    )
    max_pass_rate: float = option(
        0.9, help="Prompts whose share of right answers is above this are left out.", at_least=0, at_most=1
    )
    system_prompt: str | None = option(
        None, help="System turn before every prompt that has none; give `jai grpo` the same one."
    )
    temperature: float = option(1.0, help="Temperature of the answers; that of `jai grpo` is 1.", above=0)
    top_p: float = option(
        1.0, help="Answers are drawn from the likeliest tokens that add up to this.", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.min_pass_rate > self.max_pass_rate:
            raise UserError(
                f"--min-pass-rate is {self.min_pass_rate:g}, and --max-pass-rate {self.max_pass_rate:g}: nothing lies "
                "between them. Give the lower one first."
            )

    def check(self) -> None:
        """Refuse what cannot be run, before anything heavy is imported.

        Raises:
            UserError: for files that are not there, and options that do not go together.
        """
        check_is_file(self.prompts, "Give a file of prompts.")
        self.check_answering()
        _check_language(self.by, self.language)


def _check_language(by: str, language: str) -> None:
    if by != "checks" and language != "th":
        raise UserError(
            f"--language does nothing with --by {by}: it is of instructions that are checked. Leave it out."
        )


@dataclass(kw_only=True)
class ScoreOptions:
    """What `jai score` takes."""

    file: Path = argument(
        "FILE", help="File of conversations that end with an answer, one a line: .jsonl or .jsonl.gz."
    )
    out: Path = argument("OUT", help="Folder to make.")
    model: str = option(help="Folder or Hub id of the reward model, as `jai reward` makes one.")
    keep_above: float | None = option(
        None,
        help="Also write the rows whose calibrated probability is above this to OUT/kept.jsonl.",
        at_least=0,
        at_most=1,
    )
    batch_size: int = option(
        8, help="Conversations in a batch; those in one are about as long as each other.", at_least=1
    )
    device: str | None = option(None, help="Such as cuda:1 or cpu.", shown_default="a GPU where there is one")
    trust_remote_code: bool = option(False, help="Run the checkpoint's own code in place of the installed package's.")

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what cannot be run, before anything heavy is imported.

        Raises:
            UserError: if the file is not there, or the output is.
        """
        check_is_file(self.file, "Give a file of conversations.")
        refuse_existing(self.out)

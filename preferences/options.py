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
from jai.tokenization.loading import whole_checkpoint


@dataclass(kw_only=True)
class AnsweringOptions:
    """Who answers prompts, and how."""

    prompts: Path = argument("PROMPTS", help="File of prompts, one per line: .jsonl or .jsonl.gz.")
    out: Path = argument("OUT", help="Output folder. If it exists, the run resumes.")
    model: str = option(
        help="Folder or Hub id of the model that answers; with --backend openai, its name on the server.",
        metavar="CKPT",
    )
    backend: Literal["hf", "vllm", "openai"] = option(
        "hf", help="What runs the model: transformers (hf), vLLM, or an OpenAI-compatible server."
    )
    base_url: str | None = option(
        None, help="With --backend openai: URL of the API, such as http://127.0.0.1:8000/v1.", metavar="URL"
    )
    language: Literal["th", "en"] = option("th", help="With --by checks: language of the instructions.")
    temperature: float = option(0.8, help="Sampling temperature.", above=0)
    top_p: float = option(
        0.95, help="Sample from the most likely tokens whose probabilities add up to this.", above=0, at_most=1
    )
    max_new_tokens: int = option(1024, help="Longest answer in tokens.", at_least=1)
    limit: int | None = option(None, help="Use only the first N prompts.", at_least=1, metavar="N")
    batch_size: int = option(8, help="Sequences per batch, or requests to the server in parallel.", at_least=1)
    device: str | None = option(None, help="Device, such as cuda:1 or cpu.", shown_default="a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="Data type of the weights; auto is the checkpoint's own."
    )
    seed: int = option(0, help="Random seed for the answers (servers use their own).", at_least=0, at_most=2**32 - 1)
    trust_remote_code: bool = option(
        False, help="Run the model code in the checkpoint instead of the installed package's."
    )

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

    def check_inputs(self) -> None:
        """Refuse prompts that are not there, and a checkpoint that is not whole.

        Raises:
            UserError: naming it.
        """
        check_is_file(self.prompts, "Give a file of prompts.")
        if self.backend != "openai":
            whole_checkpoint(self.model, weights=False)


@dataclass(kw_only=True)
class PairsOptions(AnsweringOptions, JudgeOptions):
    """What `jai pairs` takes."""

    by: Literal["judge", "facts", "checks", "reward"] = option(
        "judge",
        help="How the better answer is found. judge: a judge grades each from 1 to 10; facts: a judge compares it "
        "with the row's facts; checks: a program checks the row's instructions (as in IFEval); reward: a "
        "reward model scores it.",
    )
    reward_model: str | None = option(
        None,
        help="With --by reward: folder or Hub id of the reward model, a sequence classifier with one label.",
        metavar="CKPT",
    )
    candidates: int = option(5, help="Answers per prompt (5 in the paper).", at_least=1)
    off_policy: Path | None = option(
        None,
        help="File of other models' answers to the same prompts, to compete with the model's own: `id` or "
        "`prompt`, and `answers`, a list of texts.",
        metavar="FILE",
    )
    min_margin: float | None = option(
        None,
        help="Drop pairs whose scores differ by less than this, and ties. With --by reward, scores are "
        "probabilities (logits if the reward model is not calibrated).",
        at_least=0,
        shown_default="1 with --by judge, otherwise 0",
    )
    max_length_ratio: float = option(
        2.0, help="Drop pairs in which one answer is longer than the other by more than this factor.", at_least=1
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
            UserError: for files and checkpoints that are not there, and options that do not go together.
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
        self.check_inputs()
        if self.off_policy is not None:
            check_is_file(self.off_policy, "Give a file of answers.")
        if self.reward_model is not None:
            whole_checkpoint(self.reward_model, weights=False)


@dataclass(kw_only=True)
class DifficultyOptions(AnsweringOptions):
    """What `jai difficulty` takes."""

    by: Literal["answers", "checks"] = option(
        "answers",
        help="What counts as right. answers: the final answer matches the row's `solution` or `answer`; checks: "
        "every instruction of the row is followed (as in IFEval). `jai grpo` rewards the same.",
    )
    candidates: int = option(8, help="Answers per prompt.", at_least=1)
    min_pass_rate: float = option(
        0.1, help="Drop prompts with a smaller fraction of right answers.", at_least=0, at_most=1
    )
    max_pass_rate: float = option(
        0.9, help="Drop prompts with a larger fraction of right answers.", at_least=0, at_most=1
    )
    system_prompt: str | None = option(
        None, help="System message for prompts that have none; give `jai grpo` the same one."
    )
    temperature: float = option(1.0, help="Sampling temperature; `jai grpo` uses 1.", above=0)
    top_p: float = option(
        1.0, help="Sample from the most likely tokens whose probabilities add up to this.", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.min_pass_rate > self.max_pass_rate:
            raise UserError(
                f"--min-pass-rate is {self.min_pass_rate:g}, and --max-pass-rate {self.max_pass_rate:g}: there is "
                "nothing between them. Give the lower one first."
            )

    def check(self) -> None:
        """Refuse what cannot be run, before anything heavy is imported.

        Raises:
            UserError: for files and checkpoints that are not there, and options that do not go together.
        """
        self.check_answering()
        _check_language(self.by, self.language)
        self.check_inputs()


def _check_language(by: str, language: str) -> None:
    if by != "checks" and language != "th":
        raise UserError(
            f"--language does nothing with --by {by}: it is of instructions that are checked. Leave it out."
        )


@dataclass(kw_only=True)
class ScoreOptions:
    """What `jai score` takes."""

    file: Path = argument(
        "FILE", help="File of conversations that end with an answer, one per line: .jsonl or .jsonl.gz."
    )
    out: Path = argument("OUT", help="Folder to write; it must not exist.")
    model: str = option(help="Folder or Hub id of a reward model, such as the output of `jai reward`.", metavar="CKPT")
    keep_above: float | None = option(
        None,
        help="Also write the rows with a calibrated probability above this to OUT/kept.jsonl.",
        at_least=0,
        at_most=1,
    )
    batch_size: int = option(8, help="Conversations per batch; each batch holds ones of similar length.", at_least=1)
    device: str | None = option(None, help="Device, such as cuda:1 or cpu.", shown_default="a GPU if there is one")
    trust_remote_code: bool = option(
        False, help="Run the model code in the checkpoint instead of the installed package's."
    )

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what cannot be run, before anything heavy is imported.

        Raises:
            UserError: if the file is not there or the reward model is not whole, or if the output is there.
        """
        check_is_file(self.file, "Give a file of conversations.")
        refuse_existing(self.out)
        whole_checkpoint(self.model, weights=False)

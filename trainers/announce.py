# SPDX-License-Identifier: Apache-2.0
"""What a stage is about to do, printed before it begins."""

import math
from collections.abc import Iterable, Iterator

from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import SchedulerType
from trl import DPOConfig, GRPOConfig, KTOConfig

from jai.trainers.arguments import StageArguments, StageConfig, max_length_of
from jai.trainers.base_model import BaseModel
from jai.trainers.chosen_parts import recorded_new_rows, untaught
from jai.trainers.context import context_of
from jai.trainers.data import TrainingData
from jai.trainers.parameters import TrainedParameters
from jai.trainers.parts import EMBEDDINGS, KIND_TEXTS, NEW_ROWS
from jai.trainers.predicted_memory import memory_rows
from jai.trainers.rows import DatasetType
from jai.trainers.tokens import TokenCount

_NAMED = 12  # targets of LoRA; of single layers there may be hundreds


def estimate_steps(training_args: StageConfig, rows: int | None, tokens: TokenCount) -> int | None:
    """Optimiser steps of the run; None where the number of rows is unknown and no `max_steps` is set."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    if rows is None:
        return None
    if getattr(training_args, "packing", False) and (length := max_length_of(training_args)):
        trained_tokens = (tokens.tokens - tokens.cut) * rows / tokens.rows
        rows = math.ceil(trained_tokens / length)
    # GRPO's sequences are its own answers, and `num_iterations` is how often it learns from each.
    rows *= getattr(training_args, "num_generations", 1) * getattr(training_args, "num_iterations", 1)
    batches = math.ceil(rows / (training_args.per_device_train_batch_size * training_args.world_size))
    steps = max(math.ceil(batches / training_args.gradient_accumulation_steps), 1)
    return math.ceil(steps * training_args.num_train_epochs)


def print_plan(
    console: Console,
    title: str,
    arguments: StageArguments,
    base: BaseModel,
    data: TrainingData,
    lora: LoraConfig | None,
    parameters: TrainedParameters,
    train_tokens: TokenCount,
    evaluation_tokens: TokenCount | None,
) -> None:
    """Print a stage's plan. Steps are an estimate, and so are tokens where a sample of the rows was counted."""
    training_args = arguments.training
    steps = estimate_steps(training_args, data.rows, train_tokens)
    batch = (
        training_args.per_device_train_batch_size,
        training_args.gradient_accumulation_steps,
        training_args.world_size,
    )
    data_name = escape(data.name)
    rows = list(model_rows(arguments, base, lora, parameters))
    rows.append(("data", f"{data_name}: {_size(data.rows, train_tokens)}; {_sequences(training_args)}"))
    for number, line in enumerate(_mixture(data)):
        rows.append(("" if number else "mixture", escape(line)))
    if data.unread:
        rows.append(("not read", escape(f"the columns {', '.join(data.unread)}")))
    if max_length_of(training_args):
        rows.append(("cut off", _cut(train_tokens, training_args, data)))
    rows.append(("context", context_text(training_args, base, train_tokens.longest)))
    if evaluation_tokens is not None:
        evaluated = len(data.evaluation) if isinstance(data.evaluation, Dataset) else None
        rows.append(("evaluation", _size(evaluated, evaluation_tokens)))
        if max_length_of(training_args):
            rows.append(("", f"cut off: {_cut(evaluation_tokens, training_args, data)}"))
    rows.append(("loss on", _loss_on(data, training_args)))
    rows += _reference(training_args, lora)
    rows.append(
        (
            "steps",
            f"{'unknown' if steps is None else f'about {steps:,}'}, each on {math.prod(batch):,} sequences "
            f"({batch[0]} a device x {batch[1]} accumulated x {batch[2]} processes)",
        )
    )
    schedule = SchedulerType(training_args.lr_scheduler_type).value
    rows.append(("learning rate", f"{training_args.learning_rate:g}, {schedule}"))
    rows += memory_rows(arguments, base, lora, parameters)
    rows += device_rows(arguments, lora, parameters)
    print_rows(console, title, rows)


def print_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and their texts, which may have rich's markup, as a plan."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def model_rows(
    arguments: StageArguments, base: BaseModel, lora: LoraConfig | None, parameters: TrainedParameters
) -> Iterator[tuple[str, str]]:
    """The rows of a plan that say which model it is and what of it learns."""
    model_name = escape(base.name)
    if base.is_jai:
        code = "the installed jai package (no code from the checkpoint runs)"
    elif arguments.training.trust_remote_code:
        code = f"[bold]runs the model code in {model_name}[/] (trust_remote_code)"
    else:
        code = "transformers"
    trained = f"{parameters.trained:,} are trained ({parameters.trained / parameters.total:.2%})"
    yield "model", model_name
    if base.loses_mtp:
        yield "", "its layer for multi-token prediction is left out: only `jai pretrain` with `mtp_weight` teaches it"
    yield "code", code
    yield "parameters", f"{parameters.total:,}, of which {trained}"
    yield "adapter", escape(_adapter(lora))
    yield from _parts(arguments, base, parameters)


def device_rows(
    arguments: StageArguments, lora: LoraConfig | None, parameters: TrainedParameters
) -> Iterator[tuple[str, str]]:
    """The rows of a plan that say on what it runs and what it leaves."""
    yield "device", f"{arguments.training.device.type}, {_weights(arguments, parameters)}"
    kind = "adapter" if lora and not arguments.jai.merge_adapter else "full checkpoint"
    yield "output", f"{escape(str(arguments.training.output_dir))} ({kind})"


def _adapter(lora: LoraConfig | None) -> str:
    if lora is None:
        return "none"
    targets = [*sorted(_names(lora.target_modules)), *(lora.target_parameters or [])]
    named = ", ".join(targets[:_NAMED]) + (f" and {len(targets) - _NAMED} more" if len(targets) > _NAMED else "")
    return f"LoRA, rank {lora.r}, on {named}"


def _parts(arguments: StageArguments, base: BaseModel, parameters: TrainedParameters) -> Iterator[tuple[str, str]]:
    """What learns, what does not, and a warning where conversion made something that nothing teaches."""
    label = "learns"
    for each in parameters.kinds:
        if each.trained:
            if each.by_lora:
                how = f"{each.trained:,} of LoRA for {each.total:,}"
            else:
                how = (
                    f"{each.trained:,}, in full"
                    if each.trained == each.total
                    else f"{each.trained:,} of {each.total:,}, in full"
                )
            yield label, f"{KIND_TEXTS[each.kind]}: {how}"
            label = ""
    frozen = [f"{KIND_TEXTS[each.kind]} {each.total:,}" for each in parameters.kinds if each.total and not each.trained]
    yield "frozen", ", ".join(frozen) or "nothing"
    if left := untaught(parameters.kinds, base.made_by):
        yield (
            "",
            f"[bold yellow]{_listed(KIND_TEXTS[kind] for kind in left)} stay as conversion made them[/]: no stage has "
            f"taught them yet. Name them in `trainable`: {', '.join(left)}",
        )
    rows_are_frozen = not any(each.trained for each in parameters.kinds if each.kind in (NEW_ROWS, EMBEDDINGS))
    if base.is_jai and rows_are_frozen and recorded_new_rows(base.made_by) is None:
        yield (
            "",
            "[bold yellow]rows of new tokens, if there are any, are frozen[/]: no record says which they are. Name "
            "them with `new_row_ids`, as in 32064-63999",
        )
    partial = [KIND_TEXTS[each.kind] for each in parameters.kinds if each.is_partial]
    if partial and arguments.training.weight_decay:
        yield "", f"without weight decay, because parts of them are frozen: {', '.join(partial)}"


def _listed(words: Iterable[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def _names(targets: str | set[str] | list[str] | None) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or [])


def _size(rows: int | None, tokens: TokenCount) -> str:
    if rows is None:
        return "streamed"
    about = "about " if tokens.is_sample else ""
    return f"{rows:,} rows, {about}{tokens.tokens * rows / tokens.rows:,.0f} tokens"


def _mixture(data: TrainingData) -> list[str]:
    """What each category gives to a mixture by shares, or each of several sources."""
    if data.mixture is None:
        return [
            f"{path}{''.join(f', {name}' for name in (category, language) if name)}: {rows:,} rows"
            for (path, category, language), rows in (data.counts.items() if len(data.sources) > 1 else ())
        ]
    lines = [
        f"{share.name}: {share.wanted:.2%} of {data.mixture.of}, {share.rows:,} of {share.of_rows:,} rows"
        + ("" if share.tokens is None else f", {share.tokens:,} tokens")
        for share in data.mixture.shares
    ]
    if abs(data.mixture.printed_sum - 100) > 0.01 and abs(data.mixture.printed_sum - 1) > 1e-4:
        lines.append(f"(the shares as given sum to {data.mixture.printed_sum:.2f}, and are divided by that)")
    return lines


def _sequences(training_args: StageConfig) -> str:
    length = (
        f"at most {max_length_of(training_args):,} tokens each" if max_length_of(training_args) else "of any length"
    )
    if not getattr(training_args, "packing", False):
        return length
    if getattr(training_args, "packing_strategy", None) == "wrapped":
        return f"packed (wrapped: documents see the end of the one before them, and are split), {length}"
    if getattr(training_args, "packing_strategy", None) == "bfd_split":
        return f"packed (longer documents continue in another sequence), {length}"
    return f"packed (documents do not see each other), {length}"


def context_text(training_args: StageConfig, base: BaseModel, longest_row: int = 0) -> str:
    """The context that a checkpoint gets, and what of it is to be minded; with rich's markup.

    Args:
        training_args: TRL's options.
        base: the model.
        longest_row: tokens of the longest sequence of the data: of GRPO's, the longest prompt.
    """
    length, theta = context_of(base.config)
    before, theta_before = context_of(base.given_config or base.config)
    text = "unknown" if length is None else f"{length:,} tokens"
    if before != length:
        text = f"{before:,} → {text}"
    if theta is not None:
        text += (
            f", RoPE's base {theta:,.0f}"
            if theta == theta_before
            else f", RoPE's base {theta_before:,.0f} → {theta:,.0f}"
        )
    if theta != theta_before:
        text += (
            "\n[bold yellow]with another base, attention turns positions otherwise than the model has learnt[/]: what "
            "it does is broken until it is trained with it, and stays so if it is not"
        )
    if length is not None and (max_length_of(training_args) or 0) > length:
        text += (
            f"\n[bold yellow]sequences have up to {max_length_of(training_args):,} tokens[/], beyond that; "
            "`max_position_embeddings` sets what the checkpoint says"
        )
    longest = (training_args.max_completion_length or 0) if isinstance(training_args, GRPOConfig) else 0
    if length is not None and longest >= length:
        text += f"\n[bold yellow]answers have up to {longest:,} tokens[/], beyond that; lower `max_completion_length`"
    elif length is not None and longest and longest_row + longest > length:
        text += (
            f"\n[bold yellow]prompts have up to {longest_row:,} tokens, and answers {longest:,}[/], together beyond "
            "that; leave out long prompts, or lower `max_completion_length`"
        )
    return text


def _cut(tokens: TokenCount, training_args: StageConfig, data: TrainingData) -> str:
    if not tokens.cut:
        return f"nothing in the first {tokens.rows:,} rows" if data.rows is None else "nothing"
    where = f" of a sample of {tokens.rows:,} rows" if tokens.is_sample else ""
    remedy = "raise `max_length`"
    if data.is_plain_text:
        remedy += ", or split documents with `packing: true` and `packing_strategy: bfd_split`"
    return (
        f"[bold yellow]{tokens.cut:,} of {tokens.tokens:,} tokens ({tokens.cut / tokens.tokens:.1%}){where}[/]: beyond "
        f"{max_length_of(training_args):,} in their sequence; {remedy}"
    )


def _weights(arguments: StageArguments, parameters: TrainedParameters) -> str:
    training, model = arguments.training, arguments.model
    autocast = ", autocast to bf16" if training.bf16 else ", autocast to fp16" if training.fp16 else ""
    if not parameters.quantized:
        return f"weights in {model.dtype}{autocast}"
    share = parameters.quantized / parameters.total
    return (
        f"{parameters.quantized:,} weights ({share:.0%}) in {parameters.quantization}, the rest in "
        f"{model.dtype}{autocast}"
    )


def _reference(training_args: StageConfig, lora: LoraConfig | None) -> Iterator[tuple[str, str]]:
    """What the answers' log-probabilities are held against, and what of it is in memory."""
    if not isinstance(training_args, DPOConfig | KTOConfig):
        return
    name = getattr(training_args, "ref_model_name_or_path", None)
    who = "the model as it is now" if name is None else escape(name)
    if lora is not None and name is None:
        who = "the model with its adapter off"
    if training_args.precompute_ref_log_probs:
        yield "reference", f"{who}; its log-probabilities are computed beforehand"
    elif lora is not None and name is None:
        yield "reference", f"{who}: no second copy is in memory"
    else:
        yield "reference", f"{who}: a second model in memory; `precompute_ref_log_probs: true` does without it"


def _loss_on(data: TrainingData, training_args: StageConfig) -> str:
    if getattr(training_args, "assistant_only_loss", False):
        return "the assistant's turns"
    if data.type is DatasetType.PROMPT:
        rewards = ", ".join(getattr(training_args, "rewards", ()))
        return f"{getattr(training_args, 'num_generations', 1)} answers to each prompt, by their rewards: {rewards}"
    if data.type is DatasetType.UNPAIRED_PREFERENCE:
        return "each answer, as good or bad"
    if data.type is DatasetType.PREFERENCE:
        return "the chosen answer against the rejected one"
    if data.type is DatasetType.PROMPT_COMPLETION:
        whole = getattr(training_args, "completion_only_loss", None) is False
        return "prompt and completion" if whole else "the completion"
    return "every token of the conversation" if data.conversational else "every token"

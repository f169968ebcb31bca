# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint folder, made from the records that lie beside the weights and from nothing else."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from jai.configuration_jai import JaiConfig
from jai.conversion.inputs.header import StoredTensor
from jai.conversion.inputs.jai import load_jai_config
from jai.conversion.inputs.stored_weights import has_untied_head, read_number, read_tensors
from jai.conversion.inspect_checkpoint import count_parameters
from jai.conversion.names import skip_alpha_name
from jai.errors import UserError
from jai.files import read_json
from jai.hub_card.contents import size_text
from jai.hub_card.evaluation import TOKENS_PER_CHARACTER, Evaluation, Score, read_evaluation
from jai.hub_card.readme import mark_generated
from jai.provenance import Input, Step, chain, read_step, redact
from jai.reports import BlockCopy, ReportTable, layer_plan_svg, markdown_text, router_load_svg

_TEMPLATE = Path(__file__).with_name("card_template.md")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PLAN_IMAGE, _ROUTER_IMAGE = "images/layer_plan.svg", "images/router_load.svg"
_LANGUAGES = {"th": "Thai", "en": "English"}
_BOOKKEEPING = re.compile(r"runtime|per_second|total_flos|^logits/|^logps/")  # metrics of no interest to a reader
_TITLES = {
    "convert": "Conversion",
    "upcycle": "Upcycling",
    "merge": "Merging",
    "quantize": "Quantisation",
    "pretrain": "Pre-training",
}


@dataclass(frozen=True)
class CardStep:
    """A step of how the model was made, as the card shows it: text and tables in Markdown, empty if there is none."""

    title: str
    inputs: str = ""
    dataset: str = ""
    metrics: str = ""
    options: str = ""
    files: str = ""
    other: str = ""


def card_files(folder: str | os.PathLike, repo_id: str | None = None) -> dict[str, str]:
    """The README.md of a checkpoint folder and the figures that it shows, by their paths in the repository.

    They are made from config.json and the headers of the weights, and where they are there from provenance.json,
    evaluation.json and trainer_state.json. What is not recorded is left out.

    Args:
        folder: a checkpoint folder.
        repo_id: the repository that the examples load from.

    Raises:
        UserError: if the folder is no JAI checkpoint, or a record cannot be read.
    """
    folder = Path(folder)
    config = load_jai_config(folder)
    tensors = read_tensors(folder)
    if config.tie_word_embeddings and has_untied_head(folder, tensors):
        config.tie_word_embeddings = False  # so that both are counted
    evaluation = read_evaluation(folder)
    last = read_step(folder)
    steps = chain(last)
    card_steps = [_card_step(step, steps) for step in steps]
    trained = any(step.dataset or step.metrics for step in card_steps)
    if not trained and (folder / "trainer_state.json").is_file():
        card_steps.append(_plain_training(folder / "trainer_state.json"))
        trained = True
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    has_chat = (folder / "chat_template.jinja").is_file()
    bases = _unique(_name(entry) for step in steps if step["step"] == "convert" for entry in _models(step))
    parents = _parents_on_hub(last)
    origins = _origins(config, steps)
    alphas = {
        planned.layer: read_number(folder, name, tensors[name])
        for planned in config.running_plan
        if (name := skip_alpha_name(planned.layer)) in tensors
    }
    plan = layer_plan(config, alphas, origins)
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    quantization = getattr(config, "quantization_config", None)
    branches = any(len(_models(step)) > 1 for step in steps)

    images = {_PLAN_IMAGE: layer_plan_svg(plan)}
    if evaluation and evaluation.router_load:
        loads = {_language(language): load for language, load in evaluation.router_load.items()}
        images[_ROUTER_IMAGE] = router_load_svg(loads)

    tags = ["jai", "depth-up-scaling", "custom_code"]
    tags += ["mixture-of-experts"] if config.num_local_experts > 1 else []
    tags += ["conversational"] if has_chat else []
    data = ModelCardData(
        language=["th", "en"],
        license="mit",  # phi-3's, of which every JAI is a derivative
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=(parents[0] if len(parents) == 1 else parents) or None,
        base_model_relation=_relation(parents, last, quantized=quantization is not None),
        tags=tags,
        datasets=_datasets(steps) or None,
        model_name=name if evaluation else None,
        eval_results=(evaluation.results() or None) if evaluation else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo_id=repo_id or "your-name/your-jai",
        base_text=" and ".join(bases) or "phi-3",
        way="" if branches else " → ".join([*bases, *map(_title, steps)] if bases else []),
        facts=ReportTable(["size and shape", ""], _facts(folder, config, tensors, origins, evaluation)).markdown(),
        has_origins=bool(origins),
        plan=_plan_table(plan).markdown(),
        plan_image=_PLAN_IMAGE,
        block_size=config.block_size,
        has_skips=any(part.copy > 0 for part in plan),
        normalize=config.skip_alpha_normalize,
        experts=config.num_local_experts,
        data_names=[_text(name) for name in _unique(score.dataset_name for score in evaluation.scores)]
        if evaluation
        else [],
        tools=[f"{_text(name)} {_text(version)}" for name, version in evaluation.versions.items()]
        if evaluation
        else [],
        model=_text(evaluation.model) if evaluation else "",
        scores=_score_table(evaluation).markdown() if evaluation and evaluation.scores else "",
        router_text=_text(evaluation.router_load_text) if evaluation else "",
        router_image=_ROUTER_IMAGE if _ROUTER_IMAGE in images else "",
        context=f"{config.max_position_embeddings:,}",
        quantized=_quantized_as(quantization),
        in_four_bits=isinstance(quantization, Mapping) and bool(quantization.get("load_in_4bit")),
        fits_four_bits=not quantization and config.hidden_size % 64 == 0 and config.intermediate_size % 64 == 0,
        tree="\n".join(_tree(steps)) if any(len(step["inputs"]) > 1 for step in steps) else "",
        steps=card_steps,
        trained=trained,
        has_tokenizer=has_tokenizer,
        has_chat=has_chat,
    )
    text = redact(re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n")
    return {"README.md": mark_generated(text), **images}


def _facts(
    folder: Path,
    config: JaiConfig,
    tensors: Mapping[str, StoredTensor],
    origins: list[int],
    evaluation: Evaluation | None,
) -> list[tuple[str, str]]:
    count = count_parameters(config)  # not the tensors' own sizes: quantised ones are packed
    files = {tensor.file for tensor in tensors.values()}
    size = sum((folder / file).stat().st_size for file in files)
    experts = f"{config.num_local_experts}, of which {config.num_experts_per_tok} run for a token"
    rope = config.rope_parameters or {}  # of LongRoPE without its factors, which are long lists
    heads = f"{config.num_attention_heads} for queries, {config.num_key_value_heads} for keys and values"
    facts = [
        ("parameters", f"{count.total + count.skip_alphas:,}"),
        ("parameters that run for a token", f"{count.active + count.skip_alphas:,}"),
        ("layers", f"{config.num_hidden_layers}" + (f", made from {len(set(origins))} of the base" if origins else "")),
        ("experts in a layer", experts if config.num_local_experts > 1 else "1 (dense, no router)"),
        ("hidden size, inner size", f"{config.hidden_size:,}, {config.intermediate_size:,}"),
        ("attention heads", heads),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("longest context", f"{config.max_position_embeddings:,} tokens"),
        ("RoPE", ", ".join(f"{key} {_plain(value)}" for key, value in rope.items() if not isinstance(value, list))),
        ("weights", f"{_dtypes(tensors.values())}, {size_text(size)} in {len(files)} file{'s' * (len(files) > 1)}"),
    ]
    if config.num_mtp_layers:
        facts.insert(3, ("layers for multi-token prediction", f"{config.num_mtp_layers} more, for `use_mtp=True`"))
    for score in evaluation.scores if evaluation else []:
        if score.metric == TOKENS_PER_CHARACTER and evaluation and evaluation.model in score.values:
            others = {model: value for model, value in score.values.items() if model != evaluation.model}
            beside = ", ".join(f"{model}: {_plain(value)}" for model, value in others.items())
            value = _plain(score.values[evaluation.model])
            facts.append((_score_name(score), f"{value} ({beside})" if beside else value))
    return facts


def _quantized_as(quantization: Any) -> str:
    """The form of quantised weights, for people, from the configuration; empty where they are whole."""
    if not isinstance(quantization, Mapping):
        return ""
    if quantization.get("load_in_4bit"):
        double = ", scales in 8 bits" if quantization.get("bnb_4bit_use_double_quant") else ""
        return _text(f"{str(quantization.get('bnb_4bit_quant_type', 'fp4')).upper()} by bitsandbytes{double}")
    if quantization.get("load_in_8bit"):
        return "8 bits by bitsandbytes"
    return _text(str(quantization.get("quant_method")))


def _dtypes(tensors: Iterable[StoredTensor]) -> str:
    return ", ".join(sorted({info.dtype for info in tensors}))


def _origins(config: JaiConfig, steps: list[Step]) -> list[int]:
    """The base's layer that each layer was copied from; empty where the records do not say."""
    options: dict[str, Any] = next((step.get("options", {}) for step in steps if step["step"] == "convert"), {})
    if options.get("layers"):
        by_hand = options["layers"]
        return by_hand if isinstance(by_hand, list) and len(by_hand) == config.num_hidden_layers else []
    if options.get("method") == "dus-v1":  # where its second copy begins depends on the base
        return []
    return [planned.origin for planned in config.running_plan]


def layer_plan(config: JaiConfig, alphas: Mapping[int, float], origins: Sequence[int]) -> list[BlockCopy]:
    """The copies of all blocks, in order.

    Args:
        config: of the model.
        alphas: the value of each skip alpha, by layer.
        origins: for each layer that of the base from which it was made; empty where that is not known.
    """
    plan = []
    for (block, copy), group in groupby(config.running_plan, key=lambda planned: (planned.block, planned.copy)):
        layers = [planned.layer for planned in group]
        plan.append(
            BlockCopy(
                block=block,
                copy=copy,
                copies=config.block_repeats[block],
                layers=_range(layers[0], layers[-1]),
                origins=_range(origins[layers[0]], origins[layers[-1]]) if origins else None,
                alpha=alphas.get(layers[0]),
            )
        )
    return plan


def _plan_table(plan: Sequence[BlockCopy]) -> ReportTable:
    rows = [
        [
            str(part.block + 1),
            f"{part.copy + 1} of {part.copies}",
            part.layers,
            part.origins or "–",
            "–" if part.alpha is None else f"{part.alpha:.4g}",
        ]
        for part in plan
    ]
    return ReportTable(["block", "copy", "layers", "made from layers", "skip α"], rows)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _card_step(step: Step, steps: list[Step]) -> CardStep:
    options, metrics = step.get("options", {}), step.get("metrics", {})
    is_training = bool(metrics) or step.get("dataset") is not None
    # A conversion's choices are few, and make the model what it is; those of training are many.
    shown = {} if is_training else {key: value for key, value in options.items() if not _is_nested(value)}
    figures = {key: value for key, value in metrics.items() if not _BOOKKEEPING.search(key)}
    known = ("step", "inputs", "dataset", "metrics", "options")
    other = {"options": {key: value for key, value in options.items() if key not in shown}}
    other |= {"metrics": {key: value for key, value in metrics.items() if key not in figures}}
    other |= {key: value for key, value in step.items() if key not in known}
    return CardStep(
        title=f"{steps.index(step) + 1}. {_title(step)}",
        inputs=", ".join(_input_text(entry, steps) for entry in step["inputs"]),
        dataset=_text(step["dataset"]) if step.get("dataset") is not None else "",
        metrics=_value_table("measure", figures),
        options=_value_table("option", {key: value for key, value in shown.items() if value is not None}),
        files=_file_table(step),
        other=_yaml({key: value for key, value in other.items() if value not in (None, {})}),
    )


def _file_table(step: Step) -> str:
    rows = [
        [_link(entry), _plain(name), f"`{_plain(digest)}`"]
        for entry in step["inputs"]
        for name, digest in entry["files"].items()
    ]
    return ReportTable(["of", "file", "SHA-256"], rows).markdown() if rows else ""


def _plain_training(path: Path) -> CardStep:
    """What a trainer of transformers or TRL says, of which provenance.json knows nothing."""
    state = read_json(path, "Fix it or remove it.")
    history = state.get("log_history") or []
    if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
        raise UserError(f"log_history in {path} is not a list of what was logged. Fix the file or remove it.")
    metrics = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    for entry in history:  # the last one wins
        metrics |= {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
    known = {key: value for key, value in metrics.items() if value is not None}
    return CardStep("Training", metrics=_value_table("measure", known))


def _tree(steps: list[Step]) -> list[str]:
    """What was made from what, as a nested list; a step that several need is unfolded where it first comes."""
    lines = [f"- this model (step {len(steps)}: {_title(steps[-1])})"]
    unfolded = []

    def unfold(step: Step, indent: str) -> None:
        for entry in step["inputs"]:
            lines.append(f"{indent}- {_input_text(entry, steps)}{_digests(entry)}")
            made_by = entry["made_by"]
            if made_by is not None and made_by not in unfolded:
                unfolded.append(made_by)
                unfold(made_by, indent + "  ")

    unfold(steps[-1], "  ")
    return lines


def _title(step: Step) -> str:
    name = step["step"]
    return _TITLES.get(name) or _text(name.upper() if len(name) <= 4 else name.capitalize())


def _input_text(entry: Input, steps: list[Step]) -> str:
    made_by = entry["made_by"]
    made = f" (step {steps.index(made_by) + 1}: {_title(made_by)})" if made_by else ""
    return f"{_text(entry['role'])} {_name(entry)}{made}"


def _digests(entry: Input) -> str:
    """The first weight files with the beginnings of their hashes; the whole ones are in the step's table."""
    weights = {name: digest for name, digest in entry["files"].items() if str(name).endswith(".safetensors")}
    shown = [f"{_text(name)} `{_text(digest)[:12]}…`" for name, digest in list(weights.items())[:2]]
    more = [f"{len(weights) - 2} more files"] * (len(weights) > 2)
    return ": " + ", ".join(shown + more) if shown else ""


def _name(entry: Input) -> str:
    return markdown_text(_link(entry))


def _link(entry: Input) -> str:
    """An input's name, with a link where it is on the Hub."""
    name = entry["name"]
    return f"[{name}](https://huggingface.co/{name})" if _is_on_hub(entry) else f"`{name}`"


def _is_on_hub(entry: Input) -> bool:
    return entry["is_hub_id"] and _HUB_ID.fullmatch(entry["name"]) is not None


def _models(step: Step) -> list[Input]:
    return [entry for entry in step["inputs"] if entry["role"] != "tokenizer"]


def _parents_on_hub(step: Step | None) -> list[str]:
    """The nearest models on the Hub that this one was made from, for the Hub's own model tree."""
    names: list[str] = []
    for entry in _models(step) if step else []:
        names += [entry["name"]] if _is_on_hub(entry) else _parents_on_hub(entry["made_by"])
    return _unique(names)


def _relation(parents: list[str], last: Step | None, *, quantized: bool) -> str | None:
    if not parents:
        return None
    if quantized:
        return "quantized"
    return "merge" if len(parents) > 1 and any(step["step"] == "merge" for step in chain(last)) else "finetune"


def _datasets(steps: list[Step]) -> list[str]:
    """The data sets of the training that are on the Hub."""
    recorded = [step["dataset"] for step in steps if isinstance(step.get("dataset"), dict)]
    names = [dataset["name"] for dataset in recorded if isinstance(dataset.get("name"), str)]
    return _unique(name for name in names if _HUB_ID.fullmatch(name))


def _score_table(evaluation: Evaluation) -> ReportTable:
    """The scores, model by model; the best one is bold."""
    rows = []
    for score in evaluation.scores:
        best = (max if score.higher_is_better else min)(score.values.values())
        cells = [_score_text(score, model) for model in evaluation.models]
        bold = [
            f"**{cell}**" if score.values.get(model) == best else cell for model, cell in zip(evaluation.models, cells)
        ]
        rows.append([f"{_score_name(score)} {'↑' if score.higher_is_better else '↓'}", *bold])
    return ReportTable(["", *evaluation.models], rows, numbers=True)


def _score_text(score: Score, model: str) -> str:
    """A model's score with its interval, where it has one."""
    if model not in score.values:
        return "–"
    value = _plain(score.values[model])
    return f"{value} ({'–'.join(map(_plain, score.intervals[model]))})" if model in score.intervals else value


def _score_name(score: Score) -> str:
    return f"{_language(score.language)}: {score.metric_name}" if score.language else score.metric_name


def _language(code: str) -> str:
    return _LANGUAGES.get(code, code)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _is_nested(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict | list) for item in items)


def _value_table(name: str, values: Mapping[str, Any]) -> str:
    rows = [[_plain(key), _plain(value)] for key, value in values.items()]
    return ReportTable([name, "value"], rows).markdown() if rows else ""


def _yaml(value: Any) -> str:
    if not value:
        return ""
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=110).strip()


def _plain(value: Any) -> str:
    """A value of a record as text, on one line."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {item}" for key, item in value.items())
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
    elif isinstance(value, float):
        text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    else:
        text = str(value)
    return text


def _text(value: Any) -> str:
    """A value of a record in a sentence of the card."""
    return markdown_text(_plain(value))

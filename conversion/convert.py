# SPDX-License-Identifier: Apache-2.0
"""`jai convert`: a phi-3 checkpoint becomes a JAI (paper, section 3.1).

Three steps, each by rows of tensors: new rows of the vocabulary are made from old ones, blocks of layers are repeated
in place, and the MLP of each layer becomes a stack of experts. Every output tensor is planned first and made when it is
written.
"""

import dataclasses
import inspect
import json
import platform
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from transformers import AutoTokenizer, GenerationConfig, Phi3Config, PreTrainedTokenizerBase

from jai import configuration_jai, modeling_jai
from jai.configuration_jai import JaiConfig
from jai.conversion import names
from jai.conversion.checkpoint import CheckpointReader, PlannedTensor, resolve_checkpoint, write_checkpoint
from jai.errors import UserError
from jai.files import new_folder, sha256
from jai.tokenization.extend import new_token_pieces
from jai.tokenization.train import RECORD_FILE as TOKENIZER_RECORD_FILE
from jai.version import __version__

RECORD_FILE = "conversion.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    TOKENIZER_RECORD_FILE,
)
PAPER_BLOCK_REPEATS = (1, 1, 1, 2, 3, 3, 2, 1, 1, 1)
PAPER_SKIP_ALPHA = 0.1
_ROWS_CHUNK = 4096  # rows made at a time: 4096 x 5120 in fp32 is 84 MB
_COLUMNS_CHUNK = 256  # columns measured at a time: 32064 x 256 in fp32 is 33 MB
_NAMED = 10  # of the tokens without pieces
_INIT_TEXTS = {
    "mean": "mean of their pieces' rows",
    "random": "random, with the mean and standard deviation of the base's columns",
    "mean-normed": "mean of their pieces' rows, as long as those are",
}


@dataclass(kw_only=True)
class ConvertOptions:
    """What `jai convert` does; also the keys of its YAML file.

    Attributes:
        base: folder or Hub id of a `Phi3ForCausalLM` checkpoint.
        out: folder to write; it must not exist.
        tokenizer: folder or Hub id of a tokenizer that extends the base's; None keeps the base's.
        init: rows of new tokens in `embed_tokens` and `lm_head`. `mean` is the mean of the rows of the token's pieces
            (paper, section 3.1.1); `mean-normed` is the same, scaled to the mean norm of those rows, which averaging
            makes shorter; `random` draws each column from a normal distribution with the mean and the standard
            deviation of that column over the base's rows. Tokens without pieces are always drawn so.
        block_size: layers of a block (paper, section 3.1.2).
        block_repeats: how often each block runs in place (paper, Table 2).
        skip_alpha: start value of the skip alphas; None is 0.1 with copied layers and 0 with identity layers.
        skip_alpha_normalize: divide by 1 + alpha after adding the anchor (ours, not the paper's).
        duplicate_init: `copy` gives later copies of a block the block's weights (the paper's way; it changes the
            function); `identity` zeroes the last matrix of each branch, so that each later copy starts as the
            identity and the function is kept exactly.
        experts: experts of a layer; 1 makes the dense JAI.
        expert_init: `copy` starts all experts as the base's MLP (the function is kept exactly), `noise` adds seeded
            noise to experts 1 and up, `random` draws them fresh.
        expert_noise: for `noise`, its standard deviation relative to that of the matrix.
        rope_theta: RoPE base; None keeps the source's. The paper raises it to 1,000,000 for its long-context phase;
            without training that breaks the function.
        dtype: dtype of the output; None keeps the source's.
        seed: seed of routers, noise and random rows.
        max_shard_size: largest output shard, in bytes.
    """

    base: str
    out: Path
    tokenizer: str | None = None
    init: Literal["mean", "random", "mean-normed"] = "mean"
    block_size: int = 4
    block_repeats: list[int] = field(default_factory=lambda: list(PAPER_BLOCK_REPEATS))
    skip_alpha: float | None = None
    skip_alpha_normalize: bool = False
    duplicate_init: Literal["copy", "identity"] = "copy"
    experts: int = 4
    expert_init: Literal["copy", "noise", "random"] = "copy"
    expert_noise: float = 0.01
    rope_theta: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    max_shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        """Refuse what a YAML may hold and the function would misread.

        Raises:
            UserError: for a value that is none of its option's.
        """
        for name, hint in get_type_hints(type(self)).items():
            choices = [
                choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)
            ]
            value = getattr(self, name)
            if choices and value is not None and value not in choices:
                raise UserError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
        if not isinstance(self.block_repeats, list) or not all(type(n) is int for n in self.block_repeats):
            raise UserError(f"block_repeats is {self.block_repeats!r}; expected a list of whole numbers, as [1, 2, 1].")

    @property
    def start_alpha(self) -> float:
        if self.skip_alpha is not None:
            return self.skip_alpha
        return 0.0 if self.duplicate_init == "identity" else PAPER_SKIP_ALPHA


@dataclass(frozen=True)
class Vocabulary:
    """How the output's vocabulary follows from the base's.

    Attributes:
        size: rows of the output's embeddings.
        pieces: ids of the base's pieces for each new row.
        without_pieces: id and string of the new rows that no piece explains; these are drawn at random.
    """

    size: int
    pieces: dict[int, list[int]]
    without_pieces: dict[int, str]

    @property
    def new_rows(self) -> int:
        return len(self.pieces) + len(self.without_pieces)


def convert(options: ConvertOptions, *, dry_run: bool = False, console: Console | None = None) -> JaiConfig:
    """Convert a phi-3 checkpoint into a JAI checkpoint folder, complete for the Hub.

    Args:
        options: what to do.
        dry_run: check everything and print the plan, but write nothing.
        console: where the plan and the progress are printed; None is standard output.

    Returns:
        The configuration of the JAI.

    Raises:
        UserError: for a base that is no phi-3, a plan that does not fit it, a tokenizer that does not extend its
            tokenizer, damaged weights, an output folder that exists, or a full disk. Nothing half-written is kept.
    """
    console = console or Console()
    if options.out.exists():
        raise UserError(f"{options.out} exists already. Give another output folder, or remove this one first.")
    base_folder = resolve_checkpoint(options.base)
    base_config = load_phi3_config(base_folder)
    reader = CheckpointReader(base_folder)
    base_tokenizer = load_tokenizer(base_folder)
    tokenizer_folder = resolve_checkpoint(options.tokenizer) if options.tokenizer else None
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder else None
    if tokenizer_folder and tokenizer is None:
        raise UserError(f"{options.tokenizer} has no tokenizer files. Give a folder that save_pretrained wrote.")
    vocabulary = plan_vocabulary(base_config.vocab_size, base_tokenizer, tokenizer, tokenizer_folder)
    config = plan_config(base_config, reader, options, vocabulary)
    tensors = plan_tensors(config, base_config.vocab_size, reader, options, vocabulary)

    _print_plan(
        console, options, base_config, config, vocabulary, tensors, has_tokenizer=bool(base_tokenizer or tokenizer)
    )
    if dry_run:
        console.print("Dry run: nothing was written.")
        return config

    with new_folder(options.out) as folder:
        total = sum(tensor.bytes for tensor in tensors)
        with _progress(console) as progress:
            task = progress.add_task("writing", total=total)
            for tensor in write_checkpoint(folder, tensors, options.max_shard_size):
                progress.update(task, advance=tensor.bytes)
        config.save_pretrained(folder)
        for module in (configuration_jai, modeling_jai):
            source = Path(inspect.getfile(module))
            shutil.copyfile(source, folder / source.name)
        _generation_config(base_folder, config).save_pretrained(folder)
        _write_tokenizer(folder, tokenizer_folder or base_folder)
        record = _record(options, base_folder, reader, config, vocabulary, tensors)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    console.print(f"[bold green]JAI written to[/] {options.out}", soft_wrap=True)
    console.print(f"Next: jai inspect {options.out}", soft_wrap=True, highlight=False)
    console.print(f"      jai sft --config X.yaml --model_name_or_path {options.out}", soft_wrap=True, highlight=False)
    return config


def load_phi3_config(folder: Path) -> Phi3Config:
    """Read and check the configuration of a phi-3 checkpoint.

    Raises:
        UserError: if the folder holds no phi-3 language model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json, so it is no checkpoint. Give a Phi3ForCausalLM checkpoint.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}). Fetch the base's own.") from None
    architectures = raw.get("architectures") or []
    if raw.get("model_type") != "phi3" or any(name != "Phi3ForCausalLM" for name in architectures):
        raise UserError(
            f"{folder} is {', '.join(architectures) or 'a model'} of type {raw.get('model_type')!r}. `jai convert` "
            "takes a Phi3ForCausalLM (model_type 'phi3'): phi-3-mini, phi-3-medium, phi-3.5-mini, phi-4."
        )
    if raw.get("quantization_config"):
        raise UserError(f"{folder} is quantised. Convert the unquantised checkpoint, and quantise the result.")
    try:
        return Phi3Config.from_dict(raw)
    except (StrictDataclassError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not valid: {type(error).__name__}: {error.__cause__ or error}. Fetch the base's own."
        ) from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, or None where it has no tokenizer files. Runs no code from the folder."""
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def plan_vocabulary(
    base_size: int,
    base: PreTrainedTokenizerBase | None,
    extended: PreTrainedTokenizerBase | None,
    extended_folder: Path | None = None,
) -> Vocabulary:
    """Find the rows to add for an extended tokenizer (paper, section 3.1.1).

    Args:
        base_size: rows of the base model's embeddings.
        base: the base's tokenizer.
        extended: the tokenizer of the output; None keeps the base's vocabulary.
        extended_folder: where `extended` was read from. If its training is recorded there, the pieces must be those
            of the record.

    Raises:
        UserError: if `extended` is smaller than `base`, gives one of its tokens another id, or was trained from
            another base than this.
    """
    if extended is None:
        return Vocabulary(base_size, {}, {})
    if base is None:
        raise UserError(
            "--tokenizer was given, but BASE has no tokenizer files, so the pieces of new tokens cannot be found. Put "
            "the base's tokenizer.json and tokenizer_config.json into its folder."
        )
    if len(extended) < len(base):
        raise UserError(
            f"The tokenizer has {len(extended):,} entries, fewer than the base's {len(base):,}. Give one that extends "
            "the base's (jai tokenizer train)."
        )
    pieces = new_token_pieces(base, extended)
    surfaces = dict(zip(pieces, extended.convert_ids_to_tokens(list(pieces))))
    if extended_folder and (extended_folder / TOKENIZER_RECORD_FILE).exists():
        _check_tokenizer_record(extended_folder / TOKENIZER_RECORD_FILE, pieces, surfaces)
    # Entries without pieces are reserved strings; the base has rows for some of them (phi-3: 32011 to 32063).
    return Vocabulary(
        size=max(len(extended), base_size),
        pieces={id_: ids for id_, ids in pieces.items() if ids},
        without_pieces={id_: surfaces[id_] for id_, ids in pieces.items() if not ids and id_ >= base_size},
    )


def _check_tokenizer_record(path: Path, pieces: dict[int, list[int]], surfaces: dict[int, str]) -> None:
    try:
        recorded = {
            int(id_): (entry["surface"], entry["pieces"])
            for id_, entry in json.loads(path.read_text(encoding="utf-8"))["new_tokens"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is no record of a tokenizer's training. Remove it, or train the tokenizer again "
            "(jai tokenizer train)."
        ) from None
    found = {id_: (surfaces[id_], ids) for id_, ids in pieces.items()}
    differing = sorted(id_ for id_ in found.keys() | recorded.keys() if found.get(id_) != recorded.get(id_))
    if differing:
        first = differing[0]
        raise UserError(
            f"The tokenizer is not the one that {path} records, or BASE is not its base: {len(differing):,} of the new "
            f"tokens differ, first {first}, which is {_token_text(recorded.get(first))} in the record and "
            f"{_token_text(found.get(first))} by the two tokenizers. Give the base that the tokenizer was trained from "
            "and the folder as `jai tokenizer train` wrote it, or train it again."
        )


def _token_text(token: tuple[str, list[int]] | None) -> str:
    return f"{token[0]!r} of the pieces {token[1]}" if token else "missing"


def plan_config(
    base: Phi3Config, reader: CheckpointReader, options: ConvertOptions, vocabulary: Vocabulary
) -> JaiConfig:
    """The configuration of the output.

    Raises:
        UserError: if the plan does not cover the base's layers exactly, or the values do not fit each other.
    """
    if options.block_size < 1:
        raise UserError(f"--block-size is {options.block_size}; a block needs at least 1 layer.")
    blocks, left_over = divmod(base.num_hidden_layers, options.block_size)
    repeats = options.block_repeats
    if left_over or len(repeats) != blocks:
        fitting = (
            f"--block-repeats with {blocks} numbers ({','.join(['1'] * blocks)} repeats nothing)"
            if not left_over
            else f"a --block-size that divides {base.num_hidden_layers}"
        )
        raise UserError(
            f"The base has {base.num_hidden_layers} layers, but --block-size {options.block_size} with "
            f"{len(repeats)} --block-repeats covers {options.block_size * len(repeats)}. Give {fitting}."
        )
    assert base.rope_parameters is not None  # transformers replaces None
    rope = dict(base.rope_parameters)
    if options.rope_theta is not None:
        rope["rope_theta"] = options.rope_theta
    longrope: dict[str, Any] = {}
    if rope["rope_type"] == "longrope":
        longrope["original_max_position_embeddings"] = base.original_max_position_embeddings
    dtype = options.dtype or str(reader.dtypes[names.EMBEDDINGS]).removeprefix("torch.")
    try:
        config = JaiConfig(
            vocab_size=vocabulary.size,
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_key_value_heads,
            head_dim=getattr(base, "head_dim", None),
            hidden_act=base.hidden_act,
            max_position_embeddings=base.max_position_embeddings,
            initializer_range=base.initializer_range,
            rms_norm_eps=base.rms_norm_eps,
            pad_token_id=base.pad_token_id,
            bos_token_id=base.bos_token_id,
            eos_token_id=base.eos_token_id,
            tie_word_embeddings=base.tie_word_embeddings,
            attention_dropout=base.attention_dropout,
            rope_parameters=rope,
            block_size=options.block_size,
            block_repeats=repeats,
            skip_alpha=options.start_alpha,
            skip_alpha_normalize=options.skip_alpha_normalize,
            num_local_experts=options.experts,
            architectures=["JaiForCausalLM"],
            dtype=dtype,
            **longrope,
        )
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"The options do not fit the base: {error.__cause__ or error}") from None
    _check_names(config, base.vocab_size, base.num_hidden_layers, reader)
    return config


def _check_names(config: JaiConfig, vocab_size: int, layers: int, reader: CheckpointReader) -> None:
    expected = {source.name: source.source_shape for source in names.outer_sources(config, vocab_size).values()}
    for layer in range(layers):
        expected |= {source.name: source.source_shape for source in names.layer_sources(config, 0, layer).values()}
    missing = sorted(expected.keys() - reader.shapes.keys())
    extra = sorted(reader.shapes.keys() - expected.keys() - {names.LM_HEAD})
    wrong = sorted(n for n in expected.keys() & reader.shapes.keys() if expected[n] != reader.shapes[n])
    if missing or extra or wrong:
        problems = [
            *(f"{name} is missing" for name in missing[:3]),
            *(f"{name} is unknown" for name in extra[:3]),
            *(f"{name} is {reader.shapes[name]}, not {expected[name]}" for name in wrong[:3]),
        ]
        raise UserError(
            f"The weights in {reader.folder} do not match its config.json: {'; '.join(problems)} ({len(missing)} "
            f"missing, {len(extra)} unknown, {len(wrong)} of another shape). Save the model again with transformers."
        )


def plan_tensors(
    config: JaiConfig, base_vocab_size: int, reader: CheckpointReader, options: ConvertOptions, vocabulary: Vocabulary
) -> list[PlannedTensor]:
    """Every tensor of the output, in the order in which it is written."""
    dtype = config.dtype
    assert isinstance(dtype, torch.dtype)  # transformers turns the name that `plan_config` gives into the dtype

    def planned(name: str, shape: tuple[int, ...], make: Callable[[], Iterable[torch.Tensor]]) -> PlannedTensor:
        return PlannedTensor(name, shape, dtype, lambda: (part.to(dtype) for part in make()))

    tensors = []
    for name, source in names.outer_sources(config, base_vocab_size).items():
        if name == names.FINAL_NORM:
            tensors.append(planned(name, source.shape, _maker(_whole, reader, source)))
        else:
            shape: tuple[int, ...] = (vocabulary.size, config.hidden_size)
            make = _maker(_extended_rows, reader, name, base_vocab_size, vocabulary, options)
            tensors.append(planned(name, shape, make))
    for layer in config.layer_plan:
        starts_as_identity = layer.copy > 0 and options.duplicate_init == "identity"
        for name, source in names.layer_sources(config, layer.layer, layer.origin).items():
            if names.is_expert_stack(name):
                shape = (config.num_local_experts, *source.shape)
            else:
                shape = source.shape
            if starts_as_identity and names.writes_to_residual(name):
                make = _maker(_zeros, shape, dtype)
            elif names.is_expert_stack(name):
                make = _maker(_experts, reader, name, source, config, options)
            else:
                make = _maker(_whole, reader, source)
            tensors.append(planned(name, shape, make))
        if config.num_local_experts > 1:
            shape = (config.num_local_experts, config.hidden_size)
            name = names.router_name(layer.layer)
            make = _maker(_normal, name, shape, config.initializer_range, options.seed)
            tensors.append(planned(name, shape, make))
        if layer.adds_anchor:
            make = _maker(_one_value, config.skip_alphas[layer.layer])
            tensors.append(planned(names.skip_alpha_name(layer.layer), (1,), make))
    return tensors


def _maker(make: Callable[..., Iterable[torch.Tensor]], *arguments: Any) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: make(*arguments)


def _read(reader: CheckpointReader, source: names.RowsOf) -> torch.Tensor:
    return reader.rows(source.name, source.start, source.stop)


def _whole(reader: CheckpointReader, source: names.RowsOf) -> list[torch.Tensor]:
    return [_read(reader, source)]


def _one_value(value: float) -> list[torch.Tensor]:
    return [torch.tensor([value])]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for _ in range(shape[0]):
        yield torch.zeros(shape[1:], dtype=dtype)


def _normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> list[torch.Tensor]:
    """Draw a tensor whose values depend on its name and the seed alone, not on the order of writing."""
    # Hashed together: torch's CPU generator reads only the low 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return [torch.randn(shape, generator=generator) * std]


def _experts(
    reader: CheckpointReader, name: str, source: names.RowsOf, config: JaiConfig, options: ConvertOptions
) -> Iterator[torch.Tensor]:
    """One slice for each expert. Expert 0 is the base's MLP (paper, section 3.1.3)."""
    first = _read(reader, source)
    for expert in range(config.num_local_experts):
        if expert == 0 or options.expert_init == "copy":
            yield first
        elif options.expert_init == "noise":
            std = options.expert_noise * first.float().std().item()
            (noise,) = _normal(f"{name}.{expert}", source.shape, std, options.seed)
            yield first.float() + noise
        else:
            yield _normal(f"{name}.{expert}", source.shape, config.initializer_range, options.seed)[0]


def _extended_rows(
    reader: CheckpointReader, name: str, base_rows: int, vocabulary: Vocabulary, options: ConvertOptions
) -> Iterator[torch.Tensor]:
    """Rows of `embed_tokens` or `lm_head`: the base's, then those of the new tokens (paper, section 3.1.1)."""
    base = reader.rows(name)
    drawn = {*vocabulary.without_pieces, *(vocabulary.pieces if options.init == "random" else ())}
    if drawn:
        mean, std = _column_moments(base)
    for start in range(0, vocabulary.size, _ROWS_CHUNK):
        stop = min(start + _ROWS_CHUNK, vocabulary.size)
        kept = base[start : min(stop, base_rows)].float()
        rows = torch.zeros(stop - start, base.shape[1])
        rows[: len(kept)] = kept
        for id_ in range(start, stop):
            if id_ in drawn:
                (noise,) = _normal(f"{name}.{id_}", mean.shape, 1.0, options.seed)
                rows[id_ - start] = mean + std * noise
            elif id_ in vocabulary.pieces:
                rows[id_ - start] = _merged_row(base[vocabulary.pieces[id_]].float(), options.init == "mean-normed")
        yield rows


def _column_moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column, in fp32."""
    moments = [torch.std_mean(columns.float(), dim=0) for columns in rows.split(_COLUMNS_CHUNK, dim=1)]
    return torch.cat([mean for _, mean in moments]), torch.cat([std for std, _ in moments])


def _merged_row(pieces: torch.Tensor, keep_norm: bool) -> torch.Tensor:
    """Mean of the pieces' rows; with `keep_norm` of their mean norm, for averaging n unlike rows takes a root of n."""
    mean = pieces.mean(dim=0)
    return F.normalize(mean, dim=0) * pieces.norm(dim=1).mean() if keep_norm else mean


def _generation_config(base_folder: Path, config: JaiConfig) -> GenerationConfig:
    if (base_folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(base_folder)
    return GenerationConfig.from_model_config(config)


def _write_tokenizer(folder: Path, source: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    if path.exists():
        # Without an auto_map of its own, and with a class that every transformers 5 knows, the tokenizer loads without
        # a question about remote code.
        tokenizer_config = json.loads(path.read_text())
        tokenizer_config.pop("auto_map", None)
        path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n")


def _record(
    options: ConvertOptions,
    base_folder: Path,
    reader: CheckpointReader,
    config: JaiConfig,
    vocabulary: Vocabulary,
    tensors: list[PlannedTensor],
) -> dict[str, Any]:
    """What was made from what: the first link of the provenance chain that the model card shows."""
    inputs = [base_folder / "config.json", *reader.files]
    inputs += [base_folder / name for name in TOKENIZER_FILES if (base_folder / name).exists()]
    values = dataclasses.asdict(options)
    del values["out"], values["base"]
    values["skip_alpha"] = options.start_alpha
    values["block_repeats"] = config.block_repeats
    values["dtype"] = str(config.dtype).removeprefix("torch.")
    packages = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
    return {
        "base": {
            # A machine's path says nothing elsewhere; a Hub id does.
            "name": Path(options.base).name if Path(options.base).is_dir() else options.base,
            "is_hub_id": not Path(options.base).is_dir(),
            "files": {path.name: sha256(path) for path in inputs},
        },
        "options": values | {"tokenizer": Path(options.tokenizer).name if options.tokenizer else None},
        "versions": {"jai-llm": __version__, "python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "result": {
            "parameters": sum(tensor.numel for tensor in tensors),
            "bytes": sum(tensor.bytes for tensor in tensors),
            "layers": len(config.layer_plan),
            "vocab_size": vocabulary.size,
            "new_rows": vocabulary.new_rows,
            "new_rows_without_pieces": vocabulary.without_pieces,
        },
    }


def _print_plan(
    console: Console,
    options: ConvertOptions,
    base: Phi3Config,
    config: JaiConfig,
    vocabulary: Vocabulary,
    tensors: list[PlannedTensor],
    *,
    has_tokenizer: bool,
) -> None:
    dtype = str(config.dtype).removeprefix("torch.")
    parameters, size = sum(tensor.numel for tensor in tensors), sum(tensor.bytes for tensor in tensors)
    runs = ",".join(map(str, config.block_repeats))
    copies = len(config.skip_alphas)
    later_copies = f"{options.duplicate_init}, {copies} skip alphas at {options.start_alpha:g}" if copies else "none"
    window = getattr(base, "sliding_window", None)
    rope, new_rope = base.rope_parameters, config.rope_parameters
    assert rope is not None  # transformers replaces None
    assert new_rope is not None
    theta, new_theta = rope["rope_theta"], new_rope["rope_theta"]

    table = Table(title=f"{options.base} → {options.out}", title_justify="left")
    for column in ("", "phi-3", "JAI"):
        table.add_column(column)
    table.add_row("layers", str(base.num_hidden_layers), str(len(config.layer_plan)))
    block = "1 layer" if config.block_size == 1 else f"{config.block_size} layers"
    table.add_row("blocks", "", f"{block} each, run {runs} times")
    table.add_row("later copies", "", later_copies)
    table.add_row("experts", "1", f"{config.num_local_experts}, {config.num_experts_per_tok} for a token")
    table.add_row("vocabulary", f"{base.vocab_size:,}", f"{config.vocab_size:,}")
    if vocabulary.new_rows:
        table.add_row("new rows", "", f"{vocabulary.new_rows:,}: {_INIT_TEXTS[options.init]}")
    table.add_row("RoPE base", f"{theta:,g}", f"{new_theta:,g}")
    table.add_row("sliding window", str(window or "none"), "none")
    table.add_row("weights", "", f"{parameters:,} parameters, {filesize.decimal(size)} in {dtype}")
    console.print(table)

    if window is not None and window < base.max_position_embeddings:
        _note(console, f"the window of {window} is dropped, as in the paper: longer contexts attend further back.")
    if new_theta != theta:
        _note(console, "another RoPE base changes the function until the model is trained with it.")
    if copies and (options.duplicate_init == "copy" or options.start_alpha != 0):
        _note(
            console, "later copies change the function; --verify says by how much. --duplicate-init identity keeps it."
        )
    if not has_tokenizer:
        _note(console, "the base has no tokenizer files, so neither will the output.")
    if vocabulary.without_pieces:
        named = [f"{token} ({id_})" for id_, token in vocabulary.without_pieces.items()]
        listed = ", ".join(named[:_NAMED]) + (", …" if len(named) > _NAMED else "")
        _note(console, f"{len(named):,} new tokens have no pieces; their rows are {_INIT_TEXTS['random']}: {listed}.")


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]Note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )

# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights of a checkpoint: configuration, code, tokenizer. Each verb's output is complete."""

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig

from jai import configuration_jai, modeling_jai
from jai.configuration_jai import JaiConfig
from jai.provenance import file_hashes
from jai.tokenization.train import RECORD_FILE as TOKENIZER_RECORD_FILE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    TOKENIZER_RECORD_FILE,
)


def write_beside(folder: Path, config: JaiConfig, *, tokenizer: Path | None, generation: Path) -> None:
    """Write all of a JAI checkpoint but its weights and its provenance.

    Args:
        folder: the checkpoint's folder.
        config: its configuration.
        tokenizer: folder with the tokenizer's files; None writes none.
        generation: folder with a `generation_config.json`, if it has one.
    """
    config.save_pretrained(folder)
    for module in (configuration_jai, modeling_jai):
        source = Path(inspect.getfile(module))
        shutil.copyfile(source, folder / source.name)
    if (generation / "generation_config.json").exists():
        GenerationConfig.from_pretrained(generation).save_pretrained(folder)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    if tokenizer:
        copy_tokenizer(folder, tokenizer)


def copy_tokenizer(folder: Path, source: Path) -> None:
    """Copy the tokenizer's files, so that they load without a question about remote code."""
    for path in _tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    if path.exists():
        # Its class is one that every transformers 5 knows; an auto_map of its own would still ask.
        tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
        tokenizer_config.pop("auto_map", None)
        path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hashes_beside(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's configuration and tokenizer files, by name."""
    config = folder / "config.json"
    return file_hashes([*([config] if config.exists() else []), *_tokenizer_files(folder)])


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    return (folder / name for name in TOKENIZER_FILES if (folder / name).exists())

# SPDX-License-Identifier: Apache-2.0
"""The names of a stage's options, read from the source of the dataclasses that hold them: importing TRL takes 8 s.

Nothing is listed here, so they are the names of the TRL and transformers that are installed.
"""

import ast
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

_OF_EVERY_STAGE = ("jai.trainers.arguments:JaiTrainingArguments", "trl:ModelConfig")
_OF_ROWS = (*_OF_EVERY_STAGE, "trl:ScriptArguments", "jai.trainers.data_arguments:DataArguments")
# The dataclasses of each stage, as its module gives them to `parse_arguments`.
STAGE_DATACLASSES = {
    "pretrain": (*_OF_EVERY_STAGE, "jai.trainers.pretrain_config:PretrainConfig"),
    "sft": (*_OF_ROWS, "jai.trainers.sft:JaiSFTConfig"),
    "dpo": (*_OF_ROWS, "jai.trainers.dpo:JaiDPOConfig"),
    "kto": (*_OF_ROWS, "trl:KTOConfig"),
    "cpo": (*_OF_ROWS, "jai.trainers.cpo:JaiCPOConfig"),
    "orpo": (*_OF_ROWS, "jai.trainers.orpo:JaiORPOConfig"),
    "reward": (*_OF_ROWS, "jai.trainers.reward:JaiRewardConfig"),
    "grpo": (*_OF_ROWS, "jai.trainers.grpo:JaiGRPOConfig"),
}

# What older versions of TRL and transformers called an option, and what gives the same today.
RENAMED = {
    "torch_dtype": "`dtype`",
    "max_seq_length": "`max_length`",
    "max_prompt_length": "`max_length`, of prompt and answer together",
    "evaluation_strategy": "`eval_strategy`",
    "warmup_ratio": "`warmup_steps`, where a number below 1 is a share",
    "group_by_length": "`train_sampling_strategy: group_by_length`",
    "overwrite_output_dir": "another `output_dir`, or `resume_from_checkpoint: true` to resume in the same",
    "rpo_alpha": "`loss_type: [sigmoid, sft]` with `loss_weights`",
    "reward_funcs": "`rewards`, by name",
    "use_flash_attention_2": "`attn_implementation: flash_attention_2`",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
}


def option_names(verb: str) -> set[str] | None:
    """The names of the options of `jai VERB`; None where the source of one of its dataclasses is not found."""
    names: set[str] = set()
    for dataclass in STAGE_DATACLASSES[verb]:
        fields = _field_names(*dataclass.split(":"))
        if fields is None:
            return None
        names |= fields
    return names


def _field_names(module: str, name: str) -> set[str] | None:
    """The fields of a dataclass and of its bases; None where the source of one is not found."""
    path = _source(module)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            names = {
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and "ClassVar" not in ast.unparse(field.annotation)
            }
            for base in node.bases:
                inherited = _field_names(module, ast.unparse(base))
                if inherited is None:
                    return None
                names |= inherited
            return names
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for each in ast.walk(tree):  # those for type checkers too: packages that import lazily name their classes there
        if isinstance(each, ast.ImportFrom) and name in (alias.asname or alias.name for alias in each.names):
            above = package.split(".")[: len(package.split(".")) - each.level + 1] if each.level else []
            return _field_names(".".join([*above, *filter(None, [each.module])]), name)
    return None


def _source(module: str) -> Path | None:
    package, *rest = module.split(".")
    for folder in _folders(package):
        path = Path(folder, *rest)
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


def _folders(package: str) -> Iterable[str | Path]:
    if package == "jai":  # where a folder of that name is in the working directory, `jai` may have another path
        return [Path(__file__).parents[1]]
    spec = find_spec(package)
    return (spec.submodule_search_locations if spec else None) or ()

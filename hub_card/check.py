# SPDX-License-Identifier: Apache-2.0
"""Whether a folder is a whole JAI checkpoint that loads anywhere: first its files, then a load in a clean process.

Of an adapter likewise, on its base model.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.files import read_json
from jai.hub_card.adapter import read_adapter
from jai.hub_card.contents import Contents, Kind, read_contents

_CLEAN_LOAD = Path(__file__).with_name("clean_load.py")
_RELATIVE_IMPORT = re.compile(r"^from \.(\w+) import", re.MULTILINE)
_OTHER_JSON = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_ROUNDINGS = 4  # of the weights' dtype, by which the logits of two processes may differ


@dataclass(frozen=True)
class CheckReport:
    """What a clean process found.

    Attributes:
        contents: the files that were checked, those that the manifest lists.
        auto_class: the Auto class of transformers that loads it, as in "AutoModelForCausalLM".
        parameters: parameters of the model.
        dtype: of its weights, as in "bfloat16".
        logits_sha256: hash of the logits (as float32) of a fixed input; the same weights give the same hash on the same
            machine. `None` without a forward pass.
        tokenizer: name of the tokenizer's class, `None` where the folder has no tokenizer.
        difference: the largest one between these logits and those that the installed package computes, as a share of
            the largest logit. `None` where they were not compared.
    """

    contents: Contents
    auto_class: str
    parameters: int
    dtype: str
    logits_sha256: str | None
    tokenizer: str | None
    difference: float | None = None


def check_files(folder: str | os.PathLike) -> Contents:
    """Check that a folder holds every file of a JAI checkpoint or an adapter, and that its weight files are whole.

    Reads headers only, so it takes no time on a large model.

    Raises:
        UserError: if it does not; the message names the file and what to do.
    """
    contents = read_contents(folder)
    folder = contents.folder
    if contents.kind is Kind.ADAPTER:
        read_adapter(contents)
        return contents
    if "config.json" not in contents.kept:
        raise UserError(
            f"{folder} has no config.json, so it is not a checkpoint. Give the folder that holds the weights."
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "jai":
        raise UserError(
            f"{folder}/config.json has model_type {config.get('model_type')!r}, not 'jai'. Make a JAI of it with "
            "`jai convert`."
        )
    for name in sorted(_OTHER_JSON & contents.kept.keys()):
        read_json(folder / name)
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        raise UserError(
            f"{folder}/config.json has no auto_map, so transformers cannot find the model's code. Load the model with "
            "`jai` imported and save it again with save_pretrained."
        )
    # A tokenizer's entry is a list, of which one may be null.
    entries = [entry if isinstance(entry, list) else [entry] for entry in auto_map.values()]
    places = [where for entry in entries for where in entry if where is not None]
    if not all(isinstance(where, str) and where for where in places):
        raise UserError(
            f"auto_map in {folder}/config.json names no code ({auto_map}). Load the model with `jai` imported and save "
            "it again with save_pretrained."
        )
    modules = sorted({where.split("--")[-1].split(".")[0] + ".py" for where in places})
    missing = [name for name in modules if name not in contents.kept]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}, which auto_map in its config.json names. Load the model with `jai` "
            "imported and save it again with save_pretrained: that puts the code beside the weights."
        )
    imported = {f"{name}.py" for module in modules for name in _RELATIVE_IMPORT.findall(_text_of(folder / module))}
    lost = sorted(imported - contents.kept.keys())
    if lost:
        raise UserError(
            f"{folder} lacks {', '.join(lost)}, which the model's code imports. Load the model with `jai` imported and "
            "save it again with save_pretrained: that puts the code beside the weights."
        )
    foreign = sorted({where for where in places if "--" in where})
    if foreign:
        raise UserError(
            f"auto_map in {folder}/config.json takes code from another repository ({', '.join(foreign)}). "
            "Remove all up to and with `--`, so that the code beside the weights is used."
        )
    from jai.conversion.inputs.stored_weights import read_tensors

    used = {tensor.file for tensor in read_tensors(folder).values()}
    misnamed = sorted(used - contents.kept.keys())
    if misnamed:
        raise UserError(
            f"The weights of {folder} are in {misnamed[0]}, a name under which none are published. Load the model and "
            "save it again with save_pretrained: that names them model.safetensors or model-00001-of-00002.safetensors."
        )
    unused = [name for name in contents.kept if name.endswith(".safetensors") and name not in used]
    if unused:
        raise UserError(
            f"{folder} holds weight files that its index does not name: {', '.join(unused)}. Remove them if they are "
            "left of an earlier save; else write the checkpoint again."
        )
    return contents


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def check_checkpoint(
    folder: str | os.PathLike,
    *,
    forward: bool = True,
    base: Path | None = None,
    source: bool = False,
    source_base: Path | None = None,
) -> CheckReport:
    """Check a folder's files, then load it through the Auto classes in a process that cannot import `jai`.

    That process runs the code in the folder. It sees only the files that would be published, has no network, no token
    and empty caches.

    Args:
        folder: a checkpoint folder, or that of an adapter.
        forward: load the weights and run one forward pass; without, only names and shapes are compared, for models that
            do not fit in memory.
        base: folder of an adapter's base model.
        source: also load it with the installed package, in another process, and compare the logits.
        source_base: the base that the installed package takes, if not `base`.

    Raises:
        UserError: if the folder is no whole JAI checkpoint, does not load, or computes something else than the
            installed package.
    """
    contents = check_files(folder)
    with tempfile.TemporaryDirectory(prefix="jai-check-") as scratch:
        staged = Path(scratch) / "model"
        for name in contents.kept:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to((contents.folder / name).resolve())
        asked = {"folder": str(staged), "forward": forward}
        found = _run(contents, Path(scratch), "clean", {**asked, "base": base and str(base), "source": False})
        difference = None
        if source and forward:
            own_base = source_base or base
            _run(contents, Path(scratch), "source", {**asked, "base": own_base and str(own_base), "source": True})
            difference = _compare_logits(contents.folder, Path(scratch), found["dtype"])
    return CheckReport(contents, **found, difference=difference)


def _run(contents: Contents, scratch: Path, name: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own finds; its logits are then in `NAME.safetensors`."""
    report = scratch / f"{name}.json"
    request |= {"report": str(report), "logits": str(scratch / f"{name}.safetensors")}
    process = subprocess.run(
        [sys.executable, "-P", str(_CLEAN_LOAD), json.dumps(request)],
        env=clean_environment(scratch),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    folder = contents.folder
    if not report.is_file():
        why = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        last = (process.stdout.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"The {name} process that loads {folder} died ({why}: {last}). If it ran out of memory, check without a "
            "forward pass, or on a machine with more memory."
        )
    found = json.loads(report.read_text(encoding="utf-8"))
    if "error" not in found:
        return found
    error = found["error"].replace(request["folder"], str(folder))
    if found["is_package_missing"]:
        raise UserError(
            f"{folder} cannot be checked here: {error}\nInstall the package that is missing, and publish again (PEFT: "
            "pip install 'jai-llm[train]')."
        )
    if request["source"]:
        raise UserError(
            f"{folder} loads in a clean process, but not with the installed package: {error}\nUse the version of jai "
            "that made it."
        )
    raise UserError(
        f"{folder} does not load in a clean process: {error}\nNobody could load it from the Hub either. Fix the "
        "folder, or save the model again with save_pretrained."
    )


def _compare_logits(folder: Path, scratch: Path, dtype: str) -> float:
    import torch
    from safetensors.torch import load_file

    clean, source = (load_file(scratch / f"{name}.safetensors")["logits"] for name in ("clean", "source"))
    difference = ((clean - source).abs().max() / source.abs().max()).item()
    allowed = max(_ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps, 1e-4)
    if not difference <= allowed:  # not a number either
        raise UserError(
            f"The code in {folder} and the installed package give different results: the logits differ by "
            f"{difference:.2g} of the largest. Load the model with `jai` imported and save it again with "
            "save_pretrained, so that the code beside the weights is the one that they were made with."
        )
    return difference


def clean_environment(scratch: Path) -> dict[str, str]:
    """This environment without tokens, network and caches."""
    kept = {key: value for key, value in os.environ.items() if "TOKEN" not in key and not key.startswith("HF_")}
    return kept | {
        "HF_HOME": str(scratch / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }

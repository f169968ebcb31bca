# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint folder as a stranger would: in a process of its own, in which `jai` cannot be imported.

Run by path, with a JSON request as the only argument; the findings go to the file that the request names. It imports
nothing of `jai`, so that only the code that lies in the folder can be what loads the weights. With `source` it is the
other way round: the installed package loads the weights, and no code in the folder is run.
"""

import gc
import hashlib
import importlib.abc
import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadRequest:
    """What to load.

    Attributes:
        folder: a checkpoint folder, or an adapter's where there is a `base`.
        base: folder of the adapter's base model.
        forward: load the weights and run one forward pass; otherwise only their names and shapes are compared.
        source: let the installed package load it.
        report: JSON file for the findings.
        logits: safetensors file for the logits.
    """

    folder: str
    base: str | None
    forward: bool
    source: bool
    report: str
    logits: str


class _NoJai(importlib.abc.MetaPathFinder):
    """Stands before every other finder, also those of editable installs."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jai":
            raise ModuleNotFoundError(
                f"{name} is not there for a stranger: published code must not import it", name=name
            )
        return


def load(request: LoadRequest) -> dict[str, object]:
    """Load the model (and the tokenizer, if there is one), run one forward, and say what came out."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoConfig

    folder = Path(request.folder)
    model_folder = Path(request.base or folder)
    trust = {"trust_remote_code": not request.source}
    config = AutoConfig.from_pretrained(model_folder, **trust)
    architecture = (config.architectures or ["JaiForCausalLM"])[0]
    autos = [auto for auto, where in config.auto_map.items() if where.split(".")[-1] == architecture]
    if not autos:
        raise ValueError(f"config.json says architectures=[{architecture!r}], which its auto_map does not name")
    auto = getattr(transformers, autos[0])
    quantized = getattr(config, "quantization_config", None) is not None

    if request.forward:
        model, loading = auto.from_pretrained(
            model_folder, dtype="auto", use_safetensors=True, output_loading_info=True, **trust
        )
        problems = {kind: sorted(map(str, found)) for kind, found in loading.items() if found}
        if problems:
            raise ValueError(f"the weights do not fit the model: {_shorten(problems)}")
    else:
        with torch.device("meta"):
            model = auto.from_config(config, **trust)
        if request.base is None:
            # Layers for multi-token prediction, which `generate(use_mtp=True)` loads and the model does not.
            weights = _stored(folder.glob("*.safetensors"))
            stored = {name: shape for name, shape in weights.items() if not name.startswith("mtp.")}
            # A tied head may be left out, or stored as a copy or with values of its own.
            spare = {"lm_head.weight"} - stored.keys() if config.tie_word_embeddings else set()
            wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in spare}
            _compare(wanted, stored, quantized)
    module = type(model).__module__
    if module.startswith("transformers_modules") == request.source:
        where = "the installed package" if request.source else "the code in the folder"
        raise ValueError(f"the model came from {module}, not from {where}")
    # `numel` would count the packed bytes of a quantised weight.
    parameters, dtype = model.num_parameters(), str(model.dtype if request.forward else config.dtype)
    if request.base is not None:
        model = _add_adapter(model, folder, request.forward)
        autos = ["AutoPeftModelForCausalLM"]

    fingerprint = None
    if request.forward:
        input_ids = (torch.arange(16) * 7 % config.vocab_size).unsqueeze(0).to(model.device)
        with torch.no_grad():
            logits = model.eval()(input_ids=input_ids)[0].float().cpu().contiguous()
        if not torch.isfinite(logits).all():
            raise ValueError("the logits of a forward pass are not finite numbers")
        fingerprint = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        save_file({"logits": logits}, request.logits)
    return {
        "auto_class": autos[0],
        "parameters": parameters,
        "dtype": dtype.removeprefix("torch."),
        "logits_sha256": fingerprint,
        "tokenizer": None if request.source else _load_tokenizer(folder, config.vocab_size),
    }


def _load_tokenizer(folder: Path, vocab_size: int) -> str | None:
    import transformers

    if not ((folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists()):
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model only vocab_size={vocab_size}: some texts would fail"
        )
    tokenizer("ภาษาไทย and English")
    return type(tokenizer).__name__


def _add_adapter(model, folder: Path, forward: bool):
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    if forward:
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    stored = _stored([folder / "adapter_model.safetensors"])
    # Skip alphas that learnt lie in the file under their own names, and PEFT has loaded them into the model itself.
    alphas = {name: tuple(alpha.shape) for name, alpha in model.state_dict().items() if name.endswith(".skip_alpha")}
    _compare(wanted | {name: shape for name, shape in alphas.items() if name in stored}, stored, quantized=False)
    return model


def _stored(paths) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    stored: dict[str, tuple[int, ...]] = {}
    for path in sorted(paths):
        with safe_open(path, framework="pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return stored


def _compare(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], quantized: bool) -> None:
    if quantized:  # a packed weight has another shape, and brings scales along: what counts is that its layer is there
        layers = {name.rpartition(".")[0] for name in wanted}
        wanted = dict.fromkeys(layers, ())
        stored = {next((layer for layer in _above(name) if layer in layers), name): () for name in stored}
    problems = {
        "missing_keys": sorted(wanted.keys() - stored.keys()),
        "unexpected_keys": sorted(stored.keys() - wanted.keys()),
        "mismatched_keys": sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]),
    }
    if any(problems.values()):
        raise ValueError(f"the weights do not fit the model: {_shorten({k: v for k, v in problems.items() if v})}")


def _above(name: str) -> list[str]:
    """The modules that a tensor may belong to, the innermost first: "a.b.c" is in "a.b" and in "a"."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _shorten(problems: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(found)} {kind.replace('_', ' ')} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in problems.items()
    )


def _is_package_missing(error: Exception) -> bool:
    """Whether this machine lacks a package, as PEFT or bitsandbytes, without which nothing is known of the folder."""
    return isinstance(error, ImportError) and str(error.name).partition(".")[0] != "jai"


def main(argument: str) -> None:
    request = LoadRequest(**json.loads(argument))
    if not request.source:
        sys.meta_path.insert(0, _NoJai())
    try:
        if request.source:
            import jai  # noqa: F401  registers its classes
        found = load(request)
    except Exception as error:  # whatever it is, it is the answer
        found = {"error": f"{type(error).__name__}: {error}", "is_package_missing": _is_package_missing(error)}
    Path(request.report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    gc.disable()  # half a million objects are imported, and then used once: 4.0 s of processor time instead of 4.6
    main(sys.argv[1])

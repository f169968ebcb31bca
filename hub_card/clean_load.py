# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint folder as a stranger would: in a process of its own, in which `jai` cannot be imported.

Run by path, with a JSON request as the only argument; the findings go to the file that the request names. It imports
nothing of `jai`, so that only the code that lies in the folder can be what loads the weights.
"""

import hashlib
import importlib.abc
import json
import sys
from pathlib import Path


class _NoJai(importlib.abc.MetaPathFinder):
    """Stands before every other finder, also those of editable installs."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jai":
            raise ModuleNotFoundError(
                f"{name} is not there for a stranger: published code must not import it", name=name
            )
        return


def load(folder: Path, forward: bool) -> dict[str, object]:
    """Load the model (and the tokenizer, if there is one), run one forward, and say what came out.

    Without `forward` the weights are not read: their names and shapes are compared with the model's.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    architecture = (config.architectures or ["JaiForCausalLM"])[0]
    autos = [auto for auto, where in config.auto_map.items() if where.split(".")[-1] == architecture]
    if not autos:
        raise ValueError(f"config.json says architectures=[{architecture!r}], which its auto_map does not name")
    auto = getattr(transformers, autos[0])

    fingerprint = None
    if forward:
        model, loading = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
        problems = {kind: sorted(map(str, found)) for kind, found in loading.items() if found}
        if problems:
            raise ValueError(f"the weights do not fit the model: {_shorten(problems)}")
        input_ids = (torch.arange(16) * 7 % config.vocab_size).unsqueeze(0)
        with torch.no_grad():
            logits = model.eval()(input_ids=input_ids)[0].float().contiguous()
        if not torch.isfinite(logits).all():
            raise ValueError("the logits of a forward pass are not finite numbers")
        fingerprint = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    else:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=True)
        _compare_shapes(model, folder, tied=config.tie_word_embeddings)

    module = type(model).__module__
    if not module.startswith("transformers_modules"):
        raise ValueError(f"the model came from {module}, not from the code in the folder")
    found = {
        "auto_class": autos[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype if forward else config.dtype).removeprefix("torch."),
        "logits_sha256": fingerprint,
        "tokenizer": None,
    }
    if (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} entries, the model only vocab_size={config.vocab_size}: "
                "some texts would fail"
            )
        tokenizer("ภาษาไทย and English")
        found["tokenizer"] = type(tokenizer).__name__
    return found


def _compare_shapes(model, folder: Path, tied: bool) -> None:
    from safetensors import safe_open

    stored: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        wanted.pop("lm_head.weight", None)
    problems = {
        "missing_keys": sorted(wanted.keys() - stored.keys()),
        "unexpected_keys": sorted(stored.keys() - wanted.keys()),
        "mismatched_keys": sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]),
    }
    if any(problems.values()):
        raise ValueError(f"the weights do not fit the model: {_shorten({k: v for k, v in problems.items() if v})}")


def _shorten(problems: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(found)} {kind.replace('_', ' ')} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in problems.items()
    )


def main(request: str) -> None:
    asked = json.loads(request)
    sys.meta_path.insert(0, _NoJai())
    try:
        found = load(Path(asked["folder"]), asked["forward"])
    except Exception as error:  # whatever it is, it is the answer
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(asked["report"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

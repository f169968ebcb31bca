# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers' Auto classes, so that a JAI folder loads without remote code.

It costs nothing until transformers' Auto classes are imported: whoever imports them gets JAI's with them, whether `jai`
was imported before or after. Importing transformers takes seconds and 400 MB, which `jai --help` must not. Nor must
`jai convert` import the models, which are half of that: every configuration of transformers imports the module of the
Auto classes for models, so these are registered when one of its classes is first asked for.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def register_config() -> None:
    """Make `AutoConfig` know the model type."""
    from transformers import AutoConfig

    from jai.configuration_jai import JaiConfig

    AutoConfig.register(JaiConfig.model_type, JaiConfig, exist_ok=True)


def register_models() -> None:
    """Make `AutoModelForCausalLM` and its like know the model classes."""
    import transformers

    from jai import modeling_jai
    from jai.configuration_jai import AUTO_MAP, JaiConfig

    for auto_class, target in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling_jai, target.partition(".")[2])
            getattr(transformers, auto_class).register(JaiConfig, model_class, exist_ok=True)


_MODELS = "transformers.models.auto.modeling_auto"
# The modules of transformers that hold the Auto classes, and what is registered when they have been imported.
REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    _MODELS: register_models,
}
_registered: set[str] = set()
_SHIPPED = ("jai.modeling_jai", "jai.configuration_jai", "jai.quantization_jai")


class _ModuleOfModels(ModuleType):
    """`modeling_auto`, which registers JAI's models when one of its classes or mappings is first asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("AutoModel") or name.endswith("_MAPPING"):
            sys.modules[_MODELS].__class__ = ModuleType
            if not _WatchingLoader.under_way:
                _register_what_is_imported()
        return ModuleType.__getattribute__(self, name)  # not super(): this may be no longer its class


def _register_what_is_imported() -> None:
    for module, register_one in REGISTRATIONS.items():
        if module in sys.modules and module not in _registered and type(sys.modules[module]) is not _ModuleOfModels:
            _registered.add(module)
            register_one()


class _WatchingLoader(Loader):
    """A module's own loader, with the registration when no import of a watched module is under way any more.

    Not sooner: `from transformers import MixtralForCausalLM` imports the Auto classes from the middle of modules which
    `modeling_jai` needs whole, and so does the import of `modeling_jai` itself.
    """

    under_way = 0

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # for whoever looks at it
        _WatchingLoader.under_way += 1
        try:
            self._loader.exec_module(module)
        finally:
            _WatchingLoader.under_way -= 1
        if module.__name__ == _MODELS:
            module.__class__ = _ModuleOfModels
        if not _WatchingLoader.under_way:
            _register_what_is_imported()


class _WatchingFinder(MetaPathFinder):
    """Finds the modules of transformers, and ours on top of them, as they are found without it, and watches them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(("transformers.", *_SHIPPED)):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchingLoader(spec.loader)
                return spec
        return None


def register() -> None:
    """Register with the Auto classes: at once where they are imported already, else as soon as they are."""
    if not any(isinstance(finder, _WatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchingFinder())
    _register_what_is_imported()


def causal_model_class(folder: Path, *, trust_remote_code: bool) -> Any:
    """What loads the model: with `trust_remote_code` the checkpoint's own class, where it brings one.

    `AutoModelForCausalLM` takes a registered class, as the installed package's is, whatever `trust_remote_code` says
    (transformers 5.17 to 5.23).
    """
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from jai.files import read_json  # here, for `import jai` needs none

    config = folder / "config.json"
    brought = read_json(config).get("auto_map", {}) if trust_remote_code and config.exists() else {}
    if "AutoModelForCausalLM" in brought:
        return get_class_from_dynamic_module(brought["AutoModelForCausalLM"], folder)
    return AutoModelForCausalLM


def load_causal_model(name: str, folder: Path, *, trust_remote_code: bool, **loading: Any) -> Any:
    """A causal language model from a folder: a checkpoint, or an adapter on top of the base that it names.

    Args:
        name: what the user calls it.
        folder: where it is.
        trust_remote_code: as of `causal_model_class`.
        loading: further arguments of `from_pretrained`.

    Raises:
        UserError: if it cannot be loaded, or weights are missing in it or have no place in the model: transformers
            draws the first at random and drops the second, and an adapter of another base has both.
    """
    from jai.errors import UserError

    try:
        model_class = causal_model_class(folder, trust_remote_code=trust_remote_code)
        model, info = model_class.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True, **loading
        )
    except Exception as error:  # of many kinds: OSError, ValueError, JSON's, safetensors', KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be loaded: {reason}") from error
    what = "the checkpoint has no such weight"
    wrong = sorted(info["missing_keys"])
    if (folder / "adapter_config.json").exists():
        what = "adapter and base do not fit, as if it had been trained on another. Give the base that it was trained on"
        wrong += sorted(info["unexpected_keys"])
    if wrong:
        raise UserError(f"{name} cannot be loaded: {wrong[0]} ({len(wrong):,} in all): {what}.")
    return model

# SPDX-License-Identifier: Apache-2.0
"""Tiny models, configurations and data, built by the tests themselves."""

import gc
import os

gc.disable()  # until all is imported (`pytest_collection_finish`): half a million objects, none of them garbage
os.environ["OMP_NUM_THREADS"] = "1"  # also in processes that tests start: other thread counts, other last bits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Triton reads it when it is imported: where there is no GPU, its interpreter runs the kernels.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http, disable_progress_bars
from hypothesis import settings
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase

from fuzzing import Figures, bounds
from jai import JaiConfig, JaiForCausalLM
from jai.files import sha256
from jai.hub_card import publish as publishing
from jai.hub_card.check import CheckReport, check_checkpoint, check_files
from loopback_hub import LoopbackHub

torch.set_num_threads(1)

# Test files that take more than 30 seconds of processor time, by what they take.
LONGEST_FIRST = (
    "test_demo",
    "test_trainers",
    "test_pretrain",
    "test_publish_ways",
    "test_kernels_experts",
    "test_publish",
    "test_serving",
    "test_layout",
    "test_tokenization_properties",
    "test_tokenizer_ablate",
    "test_price_of_depth",
    "test_kernels_training",
    "test_kernels_liger",
    "test_modeling_generation",
    "test_modeling_distributed",
    "test_conversion_crash",
)

# Enough Thai and English for a few hundred merges.
SENTENCES = (
    "ประเทศไทยมีกรุงเทพมหานครเป็นเมืองหลวง และมีแม่น้ำเจ้าพระยาไหลผ่าน",
    "วันนี้อากาศดีมาก เราไปตลาดซื้อผลไม้กับแม่",
    "The quick brown fox jumps over the lazy dog near the river.",
    "Language models learn to predict the next word from the words before it.",
    "แมวนอนอยู่บนเก้าอี้ในบ้าน ส่วนหมาวิ่งเล่นอยู่ในสวน",
    "ราคา 1,250 บาท for 3 kilograms of rice, paid in cash at 10:30.",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """Before test modules are imported, which take what they do not set themselves from this profile."""
    settings.register_profile("quick", max_examples=25, deadline=None)
    settings.register_profile("slow", max_examples=100, deadline=None)
    settings.load_profile("slow" if config.getoption("--run-slow") else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A worker takes the next file when it has done its last: the long ones first, so that all end together.
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if config.getoption("--run-slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: give --run-slow"))


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: each `gc.collect()`, as in every training run, would look at it again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind finds leaks when the process ends


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have counted (`record_property("figures", …)`), a line each."""
    counted = [
        (report.nodeid.partition("::")[2], value)
        for report in terminalreporter.getreports("")  # of what passes after a test: its fixtures have counted by then
        for name, value in report.user_properties
        if name == "figures" and report.when == "teardown"
    ]
    if counted:
        terminalreporter.section("figures")
        for test, value in counted:
            terminalreporter.line(f"{test}: {value}")


def build_tiny_config(**overrides) -> JaiConfig:
    """Seven layers in three blocks, all of them run again; weights wide enough that errors show in the logits."""
    values = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_size": 1,
        "block_repeats": [2, 3, 2],
        "skip_alpha": 0.3,
        "num_local_experts": 4,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return JaiConfig(**{**values, **overrides})


def build_tiny_model(seed: int = 0, **overrides) -> JaiForCausalLM:
    torch.manual_seed(seed)
    return JaiForCausalLM(build_tiny_config(**overrides)).eval()


def build_tiny_phi3(folder: str | os.PathLike, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    values = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "sliding_window": 127,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    Phi3ForCausalLM(Phi3Config(**{**values, **overrides})).to(dtype).save_pretrained(folder)
    return Path(folder)


class Phi3Oracle:
    """A dense JAI with the weights of a Phi-3, by a mapping of the tests' own (not the conversion's)."""

    @staticmethod
    def split(tensors: dict[str, torch.Tensor], config: Phi3Config) -> dict[str, torch.Tensor]:
        """Phi-3's tensors (weights or gradients) under the names of a dense JAI without repeats."""
        head_dim = config.hidden_size // config.num_attention_heads
        rows = [head_dim * config.num_attention_heads] + [head_dim * config.num_key_value_heads] * 2
        parts = {}
        for name, tensor in tensors.items():
            if name.endswith("qkv_proj.weight"):
                for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.split(rows)):
                    parts[name.replace("qkv_proj", projection)] = part
            elif name.endswith("gate_up_proj.weight"):
                for projection, part in zip(("gate_proj", "up_proj"), tensor.chunk(2)):
                    parts[name.replace("gate_up_proj", projection)] = part
            else:
                parts[name] = tensor
        return parts

    @classmethod
    def jai_of(cls, phi3: Phi3ForCausalLM) -> JaiForCausalLM:
        """The JAI that must compute the same, in evaluation mode."""
        config = phi3.config
        shared = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_parameters",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
        model = JaiForCausalLM(
            JaiConfig(
                **{name: getattr(config, name) for name in shared},
                block_size=1,
                block_repeats=[1] * config.num_hidden_layers,
                num_experts=1,
                attn_implementation=config._attn_implementation,
            )
        )
        model.load_state_dict(cls.split(phi3.state_dict(), config), strict=True)
        return model.eval()


@pytest.fixture(scope="session")
def phi3_oracle() -> type[Phi3Oracle]:
    """`phi3_oracle.jai_of(phi3)` and `phi3_oracle.split(tensors, phi3_config)`."""
    return Phi3Oracle


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., JaiConfig]:
    """`tiny_config(**overrides) -> JaiConfig`: 7 layers, 4 experts, vocabulary of 99."""
    return build_tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., JaiForCausalLM]:
    """`tiny_model(seed=0, **config_overrides) -> JaiForCausalLM` with fresh weights, in evaluation mode."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_phi3() -> Callable[..., Path]:
    """`tiny_phi3(folder, seed=0, dtype=torch.float32, **config_overrides) -> folder` with a saved Phi3ForCausalLM.

    Six layers, vocabulary of 99, no tokenizer.
    """
    return build_tiny_phi3


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    """A few Thai and English sentences."""
    return SENTENCES


@pytest.fixture(scope="session")
def tiny_tokenizer(sentences: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """A phi-3-style tokenizer (BPE with byte fallback, special tokens after the vocabulary) of about 400 entries."""
    from jai.tokenization.phi3_style import train_phi3_style

    return train_phi3_style(sentences * 4, vocab_size=400)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """`tiny_checkpoint(folder, seed=0, **config_overrides) -> folder` with a tiny JAI and the tiny tokenizer."""

    def save(folder: Path, seed: int = 0, **overrides) -> Path:
        ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
        values = {"vocab_size": len(tiny_tokenizer), **ids, **overrides}
        build_tiny_model(seed, **values).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with a cache of its own for what `datasets` prepares."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    return tmp_path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real Phi-3 tokenizer and texts; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data, which is not at {folder}")
    return folder


# --- A Hub on this machine


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def nobody_logged_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub without the login and the caches of whoever runs the tests."""
    disable_progress_bars()
    # The Xet client reads it once, at its first use in this process.
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path_factory.getbasetemp() / "xet"))
    for name in ("HF_TOKEN", "HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's retries at once: it would wait 23 seconds in all."""
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda _: None))


@pytest.fixture(scope="session")
def known_checks() -> dict[tuple, CheckReport]:
    """What clean processes found until now, by the bytes that they loaded."""
    return {}


@pytest.fixture
def checked_once(known_checks: dict[tuple, CheckReport], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CheckReport]:
    """`check_checkpoint`, which loads the same files once, however often they are pushed: a process takes 5 seconds."""

    def digests(folder: Path, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, sha256(folder / name)) for name in sorted(names) if name not in ("README.md", "LICENSE"))

    def check(folder: Path, *, forward=True, base=None, source=False, source_base=None) -> CheckReport:
        of_base = base and digests(base, (str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()))
        loaded = (digests(folder, check_files(folder).kept), forward, of_base, source, source_base)
        if loaded not in known_checks:
            options = {"forward": forward, "base": base, "source": source, "source_base": source_base}
            known_checks[loaded] = check_checkpoint(folder, **options)
        return replace(known_checks[loaded], contents=check_files(folder))

    monkeypatch.setattr(publishing, "check_checkpoint", check)
    return check


@pytest.fixture(scope="session")
def run_as_stranger() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_as_stranger(code, environment, *arguments)`: Python without `jai`, and without this process's caches."""

    def run(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        block = "import gc, sys; gc.disable(); sys.modules['jai'] = None\n"  # an import takes a seventh less
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return subprocess.run(
            [sys.executable, "-P", "-c", block + code, *arguments],
            env={**kept, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


# --- Hundreds of damaged inputs (fuzzing.py)


@pytest.fixture
def figures(record_property) -> Iterator[Figures]:
    found = Figures()
    yield found
    record_property("figures", str(found))


@pytest.fixture(scope="module")
def within_bounds() -> Iterator[None]:
    with bounds():
        yield

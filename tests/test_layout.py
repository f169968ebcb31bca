# SPDX-License-Identifier: Apache-2.0
"""The two traps of the layout: files for the Hub must be flat, and the folder `kernels/` must not hide PyPI's."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import jai
from jai.cli.app import EXTRA_OF

ROOT = Path(jai.__file__).parent
SHIPPED = ("configuration_jai.py", "modeling_jai.py", "quantization_jai.py")
OPTIONAL = ("triton", "liger_kernel", "bitsandbytes")
GPU = (*OPTIONAL, "kernels")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
# What is imported and comes with a package that is required, or that is imported before; or is looked for first.
BROUGHT = {
    "aiohttp": "lm-eval[api]",
    "anyio": "openai",
    "cycler": "matplotlib",
    "liger_kernel": "looked for",
    "numpy": "transformers",
    "packaging": "transformers",
    "requests": "lm-eval[api]",
    "tqdm": "transformers",
    "triton": "looked for",
}
HEAVY = (*OPTIONAL, "trl", "peft", "datasets", "matplotlib", "typer", "pythainlp", "torch._inductor")


def run(*arguments: str, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Standard output of a Python process in the working directory `cwd`, with `path` on its search path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    if arguments[0] == "-c":  # an import takes a seventh less
        arguments = ("-c", "import gc; gc.disable()\n" + arguments[1])
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# --- Files for the Hub ---


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_only_what_every_user_has(name):
    allowed = {"torch", "transformers", "huggingface_hub", "packaging"} | set(sys.stdlib_module_names)
    if name == "quantization_jai.py":
        allowed |= {"bitsandbytes", "peft"}  # within functions: see the processes below
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert (node.level, name) == (1, "modeling_jai.py")
            assert f"{node.module}.py" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_finds_the_same_files_by_its_regular_expression(name):
    """It also reads docstrings and `try` blocks, so a mention there would be taken for a file to copy."""
    expected = ["configuration_jai", "quantization_jai"] if name == "modeling_jai.py" else []
    assert sorted(get_relative_imports(ROOT / name)) == expected
    assert sorted(Path(file).name for file in get_relative_import_files(ROOT / name)) == [
        f"{module}.py" for module in expected
    ]


def test_experts_and_attention_live_in_the_models_own_file():
    """transformers searches the source of the class's module for these words."""
    source = (ROOT / "modeling_jai.py").read_text()
    assert "@use_experts_implementation" in source
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source


# --- The folder `kernels/` ---


def kernels_is_installed() -> bool:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(params=["with", "without"])
def site(request, tmp_path) -> Path | None:
    """A folder on the search path that holds the package `kernels` as pip lays it out, or None to have none at all."""
    if request.param == "without":
        if kernels_is_installed():
            pytest.skip("the PyPI package `kernels` is installed here")
        return None
    if not kernels_is_installed():
        # Older than transformers takes, so that only the search for it is at stake.
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
        (tmp_path / "kernels-0.0.1.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n"
        (tmp_path / "kernels-0.0.1.dist-info" / "METADATA").write_text(metadata)
    return tmp_path


def test_kernels_is_a_namespace_folder():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_python_at_the_root_finds_transformers_and_the_right_kernels(site):
    code = """
import json, kernels, transformers
from transformers.utils import is_kernels_available
print(json.dumps([transformers.__file__, kernels.__file__, is_kernels_available()]))
"""
    transformers_file, kernels_file, available = json.loads(run("-c", code, path=site).splitlines()[-1])
    assert not Path(transformers_file).is_relative_to(ROOT) or "site-packages" in transformers_file
    if site is None:
        assert kernels_file is None
        assert not available
    else:
        assert Path(kernels_file).parent.name == "kernels"
        assert Path(kernels_file).parent != ROOT / "kernels"


def test_python_m_jai_works_at_the_root(site):
    assert jai.__version__ in run("-m", "jai", "--version", path=site)


# --- `import jai` ---


# Command lines, each with its exit code. ./none can be no Hub id, so that nobody is asked for it; `full` is a folder
# that holds no model, text.txt a text.
NEED_NOTHING: list[tuple[str, int]] = [
    ("--help", 0),
    ("--version", 0),
    *[
        (f"{verb} --help", 0)
        for verb in (
            "convert",
            "merge",
            "inspect",
            "tokenizer train",
            "tokenizer report",
            "generate",
            "publish",
            "demo",
        )
    ],
    ("convert base", 2),  # no OUT
    ("convert base out --expert-noise 1", 1),
    ("upcycle dense out", 1),
    ("merge out --models a", 1),
    ("snapshot dense out --max-shard-size big", 1),
    ("sft --config missing.yaml", 1),
    ("dpo --config=missing.yaml", 1),
    ("sft --config", 1),
    ("convert ./none out", 1),
    ("convert full out --tokenizer ./none", 1),
    ("convert full full", 1),  # the output is there already
    ("upcycle ./none out --snapshots full", 1),
    ("upcycle full out --snapshots ./none", 1),
    ("upcycle full out --snapshots full --base-weights ./none", 1),
    ("snapshot ./none out", 1),
    ("merge out --models full ./none", 1),
    ("merge out --method ties --models full --base ./none", 1),
    ("export ./none out", 1),
    ("inspect ./none", 1),
    ("generate ./none hello", 1),
    ("generate full hello", 1),  # no config.json
    ("demo full", 1),
    ("publish none owner/name", 1),
    ("publish full name --create-pr --revision branch", 1),
    ("tokenizer train ./none --base full --out out", 1),
    ("tokenizer train text.txt --base ./none --out out", 1),
    ("tokenizer train text.txt --base full --out full", 1),
    ("tokenizer ablate", 1),  # no --config
    ("tokenizer ablate --config missing.yaml", 1),
    ("tokenizer ablate --config missing.yaml --text Thai", 1),
    ("tokenizer report full --text ./none", 1),
    ("tokenizer report ./none --text text.txt", 1),
    ("tokenizer report full --text text.txt --out full", 1),
]
NEED_YAML = [(f"{verb} --config bad.yaml", 1) for verb in ("convert base out", "sft", "dpo", "tokenizer ablate")]
# A name that may be a Hub id, without a network.
NEED_THE_HUBS_CLIENT = [
    (line, 1)
    for line in (
        "convert none out",
        "inspect none",
        "generate none hello",
        "tokenizer train text.txt --base none --out out",
        "tokenizer report none --text text.txt",
        "publish full owner/name",
        "publish full too/many/parts",
    )
]


def outcomes(folder: Path, command_lines: list[tuple[str, int]]) -> list[tuple[str, int, list[str]]]:
    """Run command lines one after another in a new process: each with its exit code and what is imported by then."""
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").touch()
    (folder / "text.txt").write_text("hello")
    (folder / "bad.yaml").write_text("a: [")
    code = f"""
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from jai.cli import main
heavy = {{"torch", "transformers", "numpy", "trl", "yaml", "huggingface_hub"}}
found = []
for line in {[line for line, _ in command_lines]!r}:
    sys.argv = ["jai", *line.split()]
    try:
        main()
    except SystemExit as exit_:
        found.append((line, exit_.code or 0, sorted(heavy & sys.modules.keys())))
print(json.dumps(found))
"""
    return [tuple(each) for each in json.loads(run("-c", code, cwd=folder).splitlines()[-1])]


def test_help_and_errors_that_need_no_model_import_nothing_heavy(tmp_path):
    assert outcomes(tmp_path, NEED_NOTHING) == [(line, code, []) for line, code in NEED_NOTHING]


def test_errors_import_what_they_need_and_no_more(tmp_path):
    found = outcomes(tmp_path, NEED_YAML + NEED_THE_HUBS_CLIENT)
    assert found[: len(NEED_YAML)] == [(line, code, ["yaml"]) for line, code in NEED_YAML]
    both = ["huggingface_hub", "yaml"]  # that client imports yaml itself
    assert found[len(NEED_YAML) :] == [(line, code, both) for line, code in NEED_THE_HUBS_CLIENT]


IMPORTS = [
    "import jai, transformers",
    "import transformers, jai",
    "from transformers import AutoModelForCausalLM; import jai",
    "from transformers import AutoConfig; import jai",
    "import jai; from transformers import AutoConfig",
    "import jai; from transformers import MixtralForCausalLM",  # imports the Auto classes from its middle
    "from jai.modeling_jai import JaiModel",  # so does this
    "import jai.kernels.head.causal_lm",
]


# Some of it where it is installed.
NEEDED_BY_TRANSFORMERS = (
    "accelerate",
    "huggingface_hub.hf_api",
    "scipy.optimize",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.checkpoint",
)


@pytest.fixture(scope="module")
def classes_by_imports(tmp_path_factory) -> dict[str, list[str]]:
    """The classes of models made after each of IMPORTS, in a fork of a process that had what transformers imports."""
    code = f"""
import contextlib, importlib, json, os, sys
for name in {NEEDED_BY_TRANSFORMERS!r}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not [name for name in sys.modules if name.partition(".")[0] in ("jai", "transformers")]
for imports in {IMPORTS!r}:
    if os.fork():
        assert os.wait()[1] == 0, imports
        continue
    exec(imports)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    config = AutoConfig.for_model("jai", vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2,
        num_key_value_heads=1, block_size=1, block_repeats=[1, 2], pad_token_id=0, eos_token_id=1)
    models = [auto.from_config(config) for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification)]
    classes = [type(model).__module__ + "." + type(model).__name__ for model in models]
    print(json.dumps([imports, classes]), flush=True)
    os._exit(0)  # to take all modules apart would take another second
"""
    return dict(json.loads(line) for line in run("-c", code, cwd=tmp_path_factory.mktemp("imports")).splitlines())


@pytest.mark.parametrize("imports", IMPORTS)
def test_jai_is_registered_whichever_is_imported_first(classes_by_imports, imports):
    expected = ["jai.modeling_jai.JaiForCausalLM", "jai.modeling_jai.JaiForSequenceClassification"]
    assert classes_by_imports[imports] == expected


def test_import_jai_costs_nothing_and_does_not_import_transformers(tmp_path):
    code = "import sys, jai; print(sorted({'torch', 'transformers', 'typer', 'rich'} & sys.modules.keys()))"
    assert run("-c", code, cwd=tmp_path).strip() == "[]"


# --- The wheel ---


def test_every_folder_of_code_and_every_file_of_data_is_packaged():
    """They are listed by hand: one that is forgotten is missing only where the package is installed from a wheel."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {package: ROOT / package.partition(".")[2].replace(".", "/") for package in setuptools["packages"]}
    inside = {child for folder in folders.values() for child in folder.iterdir()}
    assert {child for child in inside if (child / "__init__.py").exists()} <= {*folders.values()}
    data = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in folders[package].glob(pattern)
    }
    left = {
        path
        for package, folder in folders.items()
        for path in folder.iterdir()
        if package != "jai" and path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "README.md"
    }
    assert left <= data


# --- Extras ---


def test_every_package_is_required_or_comes_with_an_extra():
    """A package that an extra brings is one that `jai` names the extra of."""
    required = {name.partition(">")[0] for name in PROJECT["dependencies"]}
    extras = {
        extra: {name.partition(">")[0] for name in names} for extra, names in PROJECT["optional-dependencies"].items()
    }
    assert extras["serving"] == {"transformers[serving]"}
    of_transformers = importlib.metadata.requires("transformers") or []
    extras["serving"] = {re.split("[<>=;]", line)[0] for line in of_transformers if 'extra == "serving"' in line}
    for module, extra in EXTRA_OF.items():
        package = module.lower().replace("_", "-")
        assert package in {name.partition("[")[0] for name in extras[extra]}
        assert package not in required


def test_what_is_imported_is_required_or_named_with_its_extra():
    """So that what is not installed is one line that says what to install, and no traceback."""
    required = {re.split("[<>=]", name)[0].lower() for name in PROJECT["dependencies"]} | {"yaml"}  # pyyaml's
    imported: dict[str, str] = {}
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    folders = [ROOT / package.partition(".")[2].replace(".", "/") for package in packages]
    for path in (path for folder in folders for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            imported |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    known = {*sys.stdlib_module_names, "jai", *required, *EXTRA_OF, *BROUGHT}
    assert {name: path for name, path in imported.items() if name not in known} == {}
    assert imported.keys() >= BROUGHT.keys()


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["sft", "--help"], "pip install 'jai-llm[train]'"),
        (["dpo", "--help"], "pip install 'jai-llm[train]'"),
        (["tokenizer", "report", "TOKENIZER", "--text", "TEXT"], "pip install 'jai-llm[tokenizer]'"),
        (
            ["tokenizer", "train", "TEXT", "--base", "x", "--out", "out", "--unit", "word"],
            "pip install 'jai-llm[tokenizer]'",
        ),
        (["serve", "--help"], "pip install 'jai-llm[serving]'"),
        (["serve", "model", "--port", "0"], "pip install 'jai-llm[serving]'"),
        (["demo", "out", "--quick"], "pip install 'jai-llm[demo]'"),
    ],
    ids=str,
)
def test_a_verb_that_needs_an_extra_says_which(tmp_path, tmp_path_factory, tiny_tokenizer, arguments, advice):
    inputs = tmp_path_factory.mktemp("inputs")
    if "TEXT" in arguments:
        tiny_tokenizer.save_pretrained(inputs / "TOKENIZER")
        (inputs / "TEXT").with_suffix(".txt").write_text("hello")
        paths = {"TOKENIZER": str(inputs / "TOKENIZER"), "TEXT": str(inputs / "TEXT.txt")}
        arguments = [paths.get(word, word) for word in arguments]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(EXTRA_OF)!r}))  # each import of them raises ModuleNotFoundError
sys.argv = ["jai", *{arguments!r}]
sys.stderr = sys.stdout
from jai.cli import main
try:
    main()
except SystemExit as exit_:
    print(exit_.code)
"""
    *_, message, exit_code = run("-c", code, cwd=tmp_path).splitlines()
    assert exit_code == "1"
    assert message.startswith("Error: ")
    assert advice in message
    assert list(tmp_path.iterdir()) == []


def test_converting_needs_no_extra(tmp_path, tiny_phi3):
    tiny_phi3(tmp_path / "base")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(EXTRA_OF)!r}))
sys.argv = ["jai", "convert", "base", "jai", "--block-size", "2", "--block-repeats", "1,2,1", "--verify"]
from jai.cli import main
main()
"""
    run("-c", code, cwd=tmp_path)
    assert (tmp_path / "jai" / "model.safetensors").exists()


def test_a_model_imports_nothing_heavy(tmp_path):
    """Nothing but what any other model of transformers imports (which is triton itself, where it is installed)."""
    code = f"""
import sys
from transformers import MixtralForCausalLM
before = set(sys.modules)
import jai
from jai import JaiConfig, JaiModel
JaiModel(JaiConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1,
    block_size=1, block_repeats=[2], pad_token_id=0))
print([name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""
    assert run("-c", code, cwd=tmp_path).strip() == "[]"


def test_jai_registers_works_and_trains_without_the_packages_for_gpus(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({GPU!r}))  # each import of them raises ImportError
import torch, jai, jai.cli
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("jai", vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2,
    num_key_value_heads=1, block_size=1, block_repeats=[1, 2], pad_token_id=0, eos_token_id=1)
model = AutoModelForCausalLM.from_config(config)
print(type(config).__name__, type(model).__name__, *model(torch.arange(6)[None]).logits.shape)
import jai.trainers.dpo, jai.trainers.sft
"""
    assert run("-c", code, cwd=tmp_path).split() == ["JaiConfig", "JaiForCausalLM", "1", "6", "16"]

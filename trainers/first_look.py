# SPDX-License-Identifier: Apache-2.0
"""What a stage is told, as far as it can be checked before PyTorch and TRL are imported: that takes 8 s and 600 MB.

The values of most options are for TRL's parser to read. But their names are known, and which model, which data and
where to are always asked for.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from jai.errors import UserError
from jai.files import read_json
from jai.hub import local_folder
from jai.options import refuse_unknown
from jai.tokenization.loading import tokenizer_folder
from jai.trainers.config_file import read_config_file
from jai.trainers.option_names import RENAMED, option_names

# What `datasets` reads each kind of file with; each may end in .gz besides.
DATA_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
READABLE_DATA = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet or .csv"


def look_at_arguments(verb: str, argv: Sequence[str], *, reads_packed_text: bool = False) -> None:
    """Check the names of a stage's options, and the model, the data and the output folder given.

    Args:
        verb: the stage's, as in `jai VERB`.
        argv: the command line after the verb.
        reads_packed_text: whether the data is a folder that `jai pack` wrote, which `packed` names.

    Raises:
        UserError: for an option that does not exist; if the model, the data or the folder is missing, not there, or no
            such thing (a model on the Hub is asked for).
    """
    config, rest = read_config_file(argv)
    if {"-h", "--help"} & set(rest):
        return
    if rest and not rest[0].startswith("-"):
        raise UserError(f"{rest[0]!r} follows no option. Name the option, as in `--config FILE.yaml`.")
    if known := option_names(verb):
        refuse_unknown(config, known | {"env"}, "The configuration file", RENAMED)
        names = [word.removeprefix("--").partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
        # TRL's parser has --no_NAME too, for what is on where nothing is said.
        refuse_unknown(
            [name for name in names if name and name.removeprefix("no_") not in known],
            known,
            "The command line",
            RENAMED,
        )
    given = config | _options(rest)
    model, data, out, resume = (
        given.get(name) for name in ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")
    )
    # What is no text is for TRL's parser to refuse. Of `datasets`, each is looked at when it is opened.
    if isinstance(model, str | None):
        check_model_files(model, given.get("model_revision"))
    if reads_packed_text:
        packed = given.get("packed")
        if not packed:
            raise UserError("No text is given. Set `packed` to a folder that `jai pack` wrote.")
        from jai.pretraining.shards import PackedCorpus  # imports numpy, which no help should take

        PackedCorpus.open(str(packed))
    elif isinstance(data, str | None) and "datasets" not in given:
        check_data_name(data)
    if isinstance(out, str) and resume in (None, False, "false") and not given.get("preview"):
        refuse_used_output(Path(out))


def _options(argv: Sequence[str]) -> dict[str, str]:
    """The options on a command line that have one value, by name."""
    found = {}
    for word, following in pairwise([*argv, "--"]):
        name, is_joined, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and (is_joined or not following.startswith("--")):
            found[name.replace("-", "_")] = value if is_joined else following
    return found


def check_model_files(name: str | None, revision: str | None = None) -> Path:
    """The folder of the model to train; of a Hub id, with the files beside the weights.

    Raises:
        UserError: if it is not given, not there, an adapter alone, or lacks its configuration, tokenizer or weights.
    """
    if not name:
        raise UserError(
            "No model is given. Set `model_name_or_path` to a checkpoint folder or a Hub id, on the command line or in "
            "a YAML file (--config; recipes/ has examples)."
        )
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(
                f"{name} has no config.json"
                + (
                    f": it is a LoRA adapter without its model. Merge it first, `jai merge-adapter {name} OUT`, and "
                    "give OUT here; or train the earlier stage with `merge_adapter: true`."
                    if (folder / "adapter_config.json").exists()
                    else ", so it is not a checkpoint. Give a folder that `jai convert` or an earlier stage wrote."
                )
            )
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{name} has no safetensors weights. Give a folder that holds a whole checkpoint.")
        read_json(folder / "config.json")
    folder = local_folder(name, revision=revision)
    tokenizer_folder(folder)
    return folder


def check_data_name(name: str | None) -> Path:
    """The data's name as a path, which it may be.

    Raises:
        UserError: if it is not given, looks like a path where nothing is, or is a file that cannot be read.
    """
    if not name:
        raise UserError(
            f"No training data is given. Set `dataset_name` to a Hub id, a folder, or a file that ends in "
            f"{READABLE_DATA}; or, in a YAML file, `datasets` to several of them."
        )
    path = Path(name)
    suffix = data_suffix(path)
    if path.is_file() and suffix not in DATA_BUILDERS:
        raise UserError(f"{name} is not a data file that can be read. Give one that ends in {READABLE_DATA}.")
    looks_local = suffix in DATA_BUILDERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_local and not path.exists():
        raise UserError(f"The data {name} does not exist. Give an existing file or folder, or a Hub id.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"The data {name} has no rows. Give a dataset with at least one example.")
    return path


def data_suffix(path: Path) -> str:
    """How a data file ends, but for .gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def refuse_used_output(out: Path) -> None:
    """Raise `UserError` for a fresh start in a folder that is not empty."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out} exists already and is not empty. Give another `output_dir`, remove this one, or continue the run "
            "in it with `--resume_from_checkpoint true`."
        )

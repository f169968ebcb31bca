# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: lm-eval's own, ours (the YAML files beside this one), and a user's; with data from a folder where one
is given. `lm_eval --include_path` takes this folder as it is."""

import random
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
import numpy as np

from jai.errors import UserError
from jai.evaluation.data import DataSource, local_split, names_of

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

TASKS_FOLDER = Path(__file__).parent
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass
class TaskLoader:
    """Loads tasks.

    Attributes:
        include_path: folder with more tasks than lm-eval's and ours.
        data: folder with data sets that stand in for the Hub's, None for none.
        metadata: for tasks that make their data.
    """

    include_path: Path | None = None
    data: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._managers = [self._manager([TASKS_FOLDER, *([self.include_path] if self.include_path else [])])]

    def _manager(self, folders: Sequence[Path] | None) -> "TaskManager":
        """An index of the tasks in folders; None is lm-eval's own, whose 14,000 files take 10 to 20 seconds to read."""
        from lm_eval.tasks import TaskManager

        return TaskManager(
            include_path=[*folders] if folders else None, include_defaults=folders is None, metadata=self.metadata
        )

    def _manager_of(self, name: str) -> "TaskManager | None":
        """An index that has a name. Tasks lie in folders that their names begin with, so few folders are read first."""
        for manager in self._managers:
            if name in manager.task_index:
                return manager
        if any(manager.include_path is None for manager in self._managers):
            return None
        tasks = Path(lm_eval.tasks.__file__).parent
        likely = [folder for folder in tasks.iterdir() if folder.is_dir() and name.startswith(folder.name)]
        for folders in [likely, None] if likely else [None]:
            manager = self._manager(folders)
            entry = manager.task_index.get(name)
            if entry is not None and (folders is None or entry.cfg):  # the tasks of a tag may lie in many folders
                self._managers.append(manager)
                return manager
        self._managers.append(manager)
        return None

    def _config(self, name: str) -> dict[str, Any]:
        """What a task's or group's file says; functions are their names."""
        manager = self._manager_of(name)
        if manager is None:
            raise UserError(
                f"There is no task {name!r}, neither lm-eval's nor in a folder of --include-path. `lm_eval ls tasks` "
                "lists lm-eval's."
            )
        entry = manager.task_index[name]
        return entry.cfg or {"task": sorted(entry.tags)}

    def load(self, name: str, *, shots: int | None = None, settings: dict[str, Any] | None = None) -> "list[Task]":
        """The tasks that a name stands for: a task's one, or those of a group or tag, in order.

        Args:
            name: of a task, group or tag.
            shots: examples before each question; None leaves it to the task.
            settings: of the tasks' YAML, in place of their own.

        Raises:
            UserError: if there is no such task, its data cannot be had, or there are no examples for the shots.
        """
        return [self._load(leaf, settings, shots) for leaf, settings in self._leaves(name, settings or {})]

    def _leaves(self, name: str, settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of tasks, with the settings that the groups they are in give them."""
        config = self._config(name)
        if not isinstance(members := config.get("task"), list):
            yield name, settings
            return
        for member in members:
            own = {"task": member} if isinstance(member, str) else dict(member)
            child = own.pop("task", None) or own.pop("group", None)
            if not isinstance(child, str) or self._manager_of(child) is None:
                raise UserError(f"The group {name!r} defines {child!r} in place. Name its tasks one by one.")
            yield from self._leaves(child, {**settings, **own})

    def _load(self, name: str, settings: dict[str, Any], shots: int | None) -> "Task":
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        config = {**self._config(name), **settings}
        makes_its_own = "custom_dataset" in config
        local = {} if self.data is None or makes_its_own else self._local_settings(config, shots)
        # A task by itself takes no settings beside those of its file; as a member of a group it does.
        alone = {"group": f"{name} alone", "task": [{**settings, **local, "task": name}]}
        manager = self._manager_of(name)
        assert manager is not None
        random.seed(DEFAULT_RANDOM_SEED)  # as lm-eval's command line does; RULER draws its questions as it is loaded
        np.random.seed(DEFAULT_OTHER_SEED)
        try:
            task = manager.load([alone])["tasks"][name]
        except UserError:
            raise
        except Exception as error:  # of as many kinds as there are data sets
            raise self._refusal(name, config, settings, error, has_data=bool(local)) from error
        task.set_config("num_fewshot", (task.get_config("num_fewshot") or 0) if shots is None else shots)
        _check_shots(task)
        return task

    def _local_settings(self, config: dict[str, Any], shots: int | None) -> dict[str, Any]:
        """What makes a task take its data from the folder; nothing where the folder does not have its questions."""
        assert self.data is not None
        splits: dict[str, Dataset] = {}
        absent: dict[str, DataSource] = {}
        for kind in _SPLITS:
            if (split := config.get(kind)) and split not in splits and split not in absent:
                source = data_source(config, split)
                dataset = local_split(self.data, source)
                if dataset is None:
                    absent[split] = source
                else:
                    splits[split] = dataset
        asked = config.get("test_split") or config.get("validation_split")
        if asked not in splits:
            return {}
        shots = config.get("num_fewshot") or 0 if shots is None else shots
        examples = next((config[kind] for kind in ("fewshot_split", "training_split") if config.get(kind)), None)
        if shots and examples in absent:
            names = " or ".join(names_of(absent[examples]))
            raise UserError(
                f"{config['task']} takes {shots} examples from its {examples} split, which is not in {self.data}. Add "
                f"it as {names}, with the ending .jsonl or .jsonl.gz."
            )
        return {
            "custom_dataset": lambda **_: splits,
            **{kind: None for kind in _SPLITS if config.get(kind) in absent},
        }

    def _refusal(
        self, name: str, config: dict[str, Any], settings: dict[str, Any], error: Exception, *, has_data: bool
    ) -> UserError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        asked = config.get("test_split") or config.get("validation_split") or "test"
        names = names_of(data_source(config, asked)) if config.get("dataset_path") and not has_data else []
        advice = f", or give the folder that has it as {' or '.join(names)}.jsonl with --data" if names else ""
        what = f"the settings ({', '.join(settings)}) and the network" if settings else "the network"
        return UserError(f"The task {name} cannot be loaded ({type(error).__name__}: {reason}). Check {what}{advice}.")


def _check_shots(task: "Task") -> None:
    """Refuse more examples than there are: lm-eval asserts it, in the middle of a run."""
    shots = task.config.num_fewshot
    if not shots:
        return
    examples = task.fewshot_docs()
    count = len(examples) if isinstance(examples, Sized) else sum(1 for _ in examples)
    of_questions = task.config.fewshot_split == (task.config.test_split or task.config.validation_split)
    if count - of_questions < shots:  # a question is no example of its own
        raise UserError(
            f"The task {task.task_name} takes {shots} examples before a question, of {count} that there are. "
            "Give fewer shots, or more examples."
        )


def data_source(config: dict[str, Any], split: str) -> DataSource:
    """Where a task's split comes from, by its configuration."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        of_split = files[split] if isinstance(files, dict) and split in files else str(files)
        return DataSource(of_split if isinstance(of_split, str) else of_split[0], None, split)
    return DataSource(str(config.get("dataset_path")), config.get("dataset_name"), split)

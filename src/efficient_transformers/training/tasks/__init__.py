"""One module per task, and the table of all tasks by name, `TASKS`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..engine.task import Task
from ..settings import CONFIGS, InputError, compose, did_you_mean, read_yaml
from . import (
    answer,
    choose,
    classify,
    classify_images,
    lra,
    match,
    pretrain_clm,
    pretrain_mlm,
    recall,
    tag_tokens,
)

TASKS: dict[str, Task[Any]] = {
    task.name: task
    for task in (
        answer.TASK,
        choose.TASK,
        classify.TASK,
        classify_images.TASK,
        lra.TASK,
        match.TASK,
        pretrain_clm.TASK,
        pretrain_mlm.TASK,
        recall.TASK,
        tag_tokens.TASK,
    )
}


def task_of(settings: Mapping[str, Any]) -> Task[Any]:
    """The task that is named in settings.

    Settings of older runs do not name it, but the file in `configs` that they came from. Raises InputError if there is
    no such task.
    """
    name = settings.get("task")
    config = CONFIGS / f"{str(settings.get('config')).partition('/')[0]}.yaml"
    if name is None and config.exists():
        name = read_yaml(config).get("task")
    if name is None:
        raise InputError(f"The settings name no task: set `task: NAME` in the YAML, one of {', '.join(TASKS)}.")
    if name not in TASKS:
        raise InputError(f"There is no task {name!r}{did_you_mean(str(name), TASKS)}")
    return TASKS[name]


def read_settings(config: Path, variant: str | None, options: Iterable[str]) -> tuple[Task[Any], Any]:
    """The task named in a YAML file, and its settings for a variant, with command-line options applied."""
    values = compose(config, variant)
    task = task_of(values)
    return task, task.settings_class.from_options(values, options)

"""Every number among the settings has a range, which is checked before any work; a refused run leaves no folder."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest
from training_runs import TINY, write_config, write_labelled

from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError, Range
from efficient_transformers.training.tasks import TASKS

NUMBERS = sorted(
    (name, field.name)
    for name, task in TASKS.items()
    for field in dataclasses.fields(task.settings_class)
    if {int, float} & {(hint := get_type_hints(task.settings_class)[field.name]), *get_args(hint)}
)
VALUES = {"data": "era", "model": {"model_type": "et_local"}}


def settings_of(task, **values):
    data = {"recall": "mqar", "lra": "listops"}.get(task, "era")
    return TASKS[task].settings_class.from_dict(VALUES | {"data": data} | values)


@pytest.mark.parametrize(("task", "name"), NUMBERS, ids=map("-".join, NUMBERS))
def test_every_number_has_a_range(task, name):
    (field,) = (field for field in dataclasses.fields(TASKS[task].settings_class) if field.name == name)
    limits = field.metadata["range"]
    bad = [value for value in (limits.above, limits.below) if value is not None]
    bad += [limits.least - 1] if limits.least is not None else []
    bad += [limits.most + 1] if limits.most is not None else []
    if float in {(hint := get_type_hints(TASKS[task].settings_class)[name]), *get_args(hint)}:
        bad += [math.inf, -math.inf, math.nan]
    assert bad
    for value in bad:
        with pytest.raises(InputError, match=f"^{name} .* must "):
            settings_of(task, **{name: value})
    if field.default is not None:
        limits.check(name, field.default)


@pytest.mark.parametrize(
    ("limits", "value", "message"),
    [
        (Range(least=1), 0, "must be at least 1."),
        (Range(least=0, most=1, why="a share"), 2.0, "must lie between 0 and 1: a share."),
        (Range(above=0, most=1), 0.0, "must be more than 0 and at most 1."),
        (Range(above=0), math.inf, "must be a finite number."),
        (Range(above=0), math.nan, "must be more than 0."),
    ],
)
def test_what_is_out_of_a_range_is_said(limits, value, message):
    with pytest.raises(InputError) as error:
        limits.check("x", value)
    assert str(error.value) == f"x ({value}) {message}"


REFUSED = {
    "precision": ["--mixed_precision=fp16"],
    "data": ["--data=gone.jsonl"],
    "column": ["--text_column=body"],
    "model": ["--model.hidden_size=17"],
    "dropout": ["--model.hidden_dropout_prob=1.5"],
    "metric": ["--best_metric=f2"],
    "length": ["--max_length=1000"],
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capsys, options):
    config = write_config(tmp_path, TINY, write_labelled(tmp_path))
    with pytest.raises(SystemExit):
        train.main(["--config", str(config), "--out", str(tmp_path / "runs" / "deep"), *options])
    assert not (tmp_path / "runs").exists()

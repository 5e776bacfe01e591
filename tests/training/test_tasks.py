"""The tasks with labelled examples beyond classification, run from start to end."""

import io
import json
from contextlib import redirect_stdout

import datasets
import pytest
from huggingface_hub import ModelCard
from labelled_rows import OWN, ROWS, TINY_ROWS
from repository import ROOT
from training_runs import (
    assert_same_run,
    composed,
    each_variant_of,
    launch_two,
    read_metrics,
    reset_accelerate,
    stop_and_continue,
    write_config,
    write_rows,
)

from efficient_transformers.cards import loading_code
from efficient_transformers.training.runs import train
from efficient_transformers.training.tasks import answer, choose, match, tag_tokens
from efficient_transformers.training.tasks.match import MatchSettings

TASKS = {"case": tag_tokens.TASK, "facts": answer.TASK, "next": choose.TASK, "president": match.TASK}


REACHED = {
    "case": ("f1", 1.0),
    "facts": ("exact_match", 1.0),
    "next": ("accuracy", 1.0),
    "president": ("accuracy", 0.9),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {task: write_rows(folder / f"{task}.jsonl", [make(i) for i in range(60)]) for task, make in ROWS.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpora):
    """For each task the folder of a run that was never stopped, and what it printed."""
    done = {}

    def run_once(task):
        if task not in done:
            folder = tmp_path_factory.mktemp(task)
            config = write_config(folder, TINY_ROWS | OWN[task], corpora[task])
            with redirect_stdout(io.StringIO()) as printed:
                train.main(["--config", str(config)])
            reset_accelerate()
            done[task] = folder / "out", printed.getvalue()
        return done[task]

    return run_once


each_task = pytest.mark.parametrize("task", TASKS)


@each_task
def test_a_run_learns_and_leaves_a_folder_for_the_hub(finished, task):
    folder, printed = finished(task)
    found = read_metrics(folder)
    name, least = REACHED[task]
    assert found["test"][name] >= least
    assert found["test"]["loss"] < found["history"][0]["loss"]
    assert found["test"]["n"] >= 9
    card = ModelCard.load(folder / "README.md")
    assert {result.metric_value for result in card.data.eval_results} >= {found["test"][name]}
    assert f"training/train.py --config {folder.parent / 'tiny.yaml'}" in card.text
    code = loading_code(str(folder), TASKS[task].auto_class.__name__, found["model"]["max_length"])
    assert code in printed
    with redirect_stdout(io.StringIO()) as shown:
        exec(code, {})
    assert shown.getvalue().strip()


@each_task
def test_a_finished_run_is_evaluated(finished, task):
    folder, _ = finished(task)
    assert TASKS[task].evaluate_folder(folder, ["--eval_batch_size=5"]) == pytest.approx(
        read_metrics(folder)["test"], rel=1e-5
    )


@each_task
def test_sigterm_saves_and_the_run_ends_as_one_never_stopped(monkeypatch, finished, corpora, tmp_path, task):
    folder, _ = finished(task)
    stop_and_continue(monkeypatch, write_config(tmp_path, TINY_ROWS | OWN[task], corpora[task]), 10)
    last = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1]
    files = ("model.safetensors", "matching_head.safetensors")
    if task == "president":  # its head is in a file of its own
        assert [(folder / name).read_bytes() for name in files] == [
            (tmp_path / "out" / name).read_bytes() for name in files
        ]
        assert read_metrics(folder)["history"] == read_metrics(tmp_path / "out")["history"]
    else:
        assert_same_run(tmp_path / "out", folder, last)


@pytest.mark.slow
@each_task
def test_two_processes_score_every_window_once(corpora, tmp_path, task):
    config = write_config(tmp_path, TINY_ROWS | OWN[task] | {"max_steps": 4, "eval_batch_size": 4}, corpora[task])
    launch_two("--config", str(config))
    found = read_metrics(tmp_path / "out")
    assert found["training"]["processes"] == 2
    assert TASKS[task].evaluate_folder(tmp_path / "out", []) == pytest.approx(found["test"], rel=1e-4)


@each_variant_of(*TASKS)
def test_every_config_builds_a_tiny_model_and_its_data(monkeypatch, task, variant, tmp_path):
    """A few documents of each split stand in for all."""
    few = {split: datasets.load_dataset("parquet", data_files=str(ROOT / f"data/sotu/{split}.parquet"),
                                        cache_dir=str(tmp_path / "cache"))["train"].to_list()[:7]
           for split in ("train", "validation", "test")}  # fmt: skip
    for split, rows in few.items():
        write_rows(tmp_path / f"{split}.jsonl", [{**row, "text": row["text"][:9000], "name": "ab"[i % 2]}
                                                 for i, row in enumerate(rows)])  # fmt: skip
    task, chosen = composed(task, variant, f"--data={tmp_path}")
    chosen.model |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    ready = task.ready(chosen)
    assert {key: getattr(ready.model.config, key) for key in chosen.model} == chosen.model
    data = ready.encode("test")
    batch = ready.collate([data[i] for i in range(2)])
    assert batch["input_ids"].shape[-1] <= chosen.max_length
    assert ready.model(**batch).loss.isfinite()


@each_task
def test_a_metric_that_is_none_is_refused_before_training(corpora, tmp_path, task):
    config = write_config(tmp_path, TINY_ROWS | OWN[task], corpora[task], best_metric="acuracy")
    with pytest.raises(SystemExit, match=r"best_metric \('acuracy'\) must be one of loss, "):
        train.main(["--config", str(config)])


def test_a_matcher_goes_on_with_its_head(finished, corpora, tmp_path):
    folder, _ = finished("president")
    values = {"model": {"checkpoint": str(folder)}, "max_steps": 1, "eval_first": True, "gradient_accumulation": 1}
    config = write_config(tmp_path, TINY_ROWS | OWN["president"] | values, corpora["president"])
    train.main(["--config", str(config)])
    best = read_metrics(folder)["validation"]
    assert read_metrics(tmp_path / "out")["before"] == pytest.approx(
        {name: best[name] for name in ("loss", "accuracy")}
    )
    # another head begins anew
    reset_accelerate()
    other = match.run(MatchSettings.from_yaml(config, ["--head_size=8", f"--out={tmp_path / 'other'}"]))
    assert other["before"]["loss"] != pytest.approx(best["loss"], rel=1e-3)
    assert json.loads((tmp_path / "other/matching_head.json").read_text())["head_size"] == 8

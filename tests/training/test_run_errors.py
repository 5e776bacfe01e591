"""Errors of a run before it starts, and a loss that is not finite."""

import pytest
from training_runs import run

from efficient_transformers.training.engine import task
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import classify
from efficient_transformers.training.tasks.classify import ClassifySettings


def test_an_output_folder_with_a_run_is_not_written_over(finished):
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match=r"error: The output folder .* is not empty, it contains a run: --resume"):
        train.main(["--config", str(folder.parent / "tiny.yaml")])
    assert (folder / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("override", ["--overwrite=true", "--resume=true", "--seed=0"])
def test_a_folder_of_something_else_is_left_alone(config, tmp_path, override):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and contains no run: set out to another"):
        run(config, override)
    assert (tmp_path / "out/thesis.tex").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"The folder .*file/out cannot be written \(Not a directory\)"):
        run(config, f"--out={tmp_path / 'file/out'}")


def test_a_run_that_cannot_start_deletes_nothing_and_leaves_nothing(monkeypatch, finished, config, tmp_path):
    folder, _ = finished
    for overwritten in (folder, tmp_path / "out"):
        before = sorted(overwritten.rglob("*"))
        with pytest.raises(InputError, match=r"There is no file missing.jsonl"):
            run(config, "--overwrite=true", "--data=missing.jsonl", f"--out={overwritten}")
        assert sorted(overwritten.rglob("*")) == before


BAD_RUNS = {
    "length": (["--max_length=65"], r"max_length \(65\) must not exceed the model's max_position_embeddings \(64\)"),
    "field": (["--model.hiden_size=4"], "EtLocalConfig has no field 'hiden_size'; did you mean 'hidden_size'"),
    "type": (["--model.model_type=brt"], "The model section cannot be used: .*brt"),
    "size": (["--model.hidden_size=wide"], "The model section cannot be used: .*hidden_size"),
    "vocabulary": (["--model.vocab_size=100"], r"vocab_size \(100\) must be at least the tokenizer's size \(4096\)"),
    "no tokenizer": (["--tokenizer=null"], "A new model needs a tokenizer"),
    "tokenizer": (["--tokenizer=missing/folder"], "The tokenizer 'missing/folder' cannot be loaded"),
    "checkpoint": (["--model.checkpoint=missing/folder"], "The checkpoint 'missing/folder' cannot be loaded"),
    "metric": (["--best_metric=acuracy"], r"best_metric \('acuracy'\) must be one of loss, accuracy, macro_f1"),
    "column": (["--label_column=kind"], "no column 'kind'; there are: label, text"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_runs_are_refused_before_training(monkeypatch, config, tmp_path, overrides, message):
    monkeypatch.setattr(task, "train", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(InputError, match=message):
        run(config, *overrides)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_names_the_step(config, tmp_path):
    settings = ClassifySettings.from_yaml(config, ["--warmup_ratio=0", "--checkpoint_steps=1"])
    settings.learning_rate = 1e30  # out of its range
    with pytest.raises(InputError, match=r"The loss of step 2 is nan: training has diverged.*lower learning_rate"):
        classify.run(settings)
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000000001"]

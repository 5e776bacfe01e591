"""Data, a config and a finished run of a module's settings: its `TINY`, or that of training_runs if it has none."""

import io
from contextlib import redirect_stdout

import pytest
import training_runs
from training_runs import bpe, reset_accelerate, write_config, write_labelled, write_sentences

from efficient_transformers.training.runs import train


def settings_of(request) -> dict:
    return getattr(request.module, "TINY", training_runs.TINY)


@pytest.fixture(scope="module")
def corpus(request, tmp_path_factory):
    """Path of sixty documents: labelled ones for a classifier, sentences for a language model."""
    write = write_labelled if settings_of(request)["task"] == "classify" else write_sentences
    return write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(request, tmp_path, corpus):
    """YAML of the module's settings, with an output folder beside it."""
    return write_config(tmp_path, settings_of(request), corpus)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory, corpus):
    """Output folder of a run that was never interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with redirect_stdout(io.StringIO()) as printed:
        train.main(["--config", str(write_config(folder, settings_of(request), corpus, tracker="tensorboard"))])
    reset_accelerate()
    return folder / "out", printed.getvalue()


@pytest.fixture(scope="module")
def bundled_tokenizer():
    return bpe()

"""Random inputs: each gets an error of this package in one or two sentences, or is rightly accepted; none hangs.

hypothesis draws the same cases in every run. `make test` runs a sample, `make test-all` all of them.
"""

import contextlib
import dataclasses
import io
import json
import math
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from training_runs import MODEL, TINY, TINY_LANGUAGE, bpe
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

import efficient_transformers
from efficient_transformers import VARIANTS, cli
from efficient_transformers.plots import drawn_model
from efficient_transformers.training.data.documents import load_documents
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.engine.building import build_config, build_model, check_memory
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import TASKS, read_settings
from efficient_transformers.training.tasks.classify import ClassifySettings

PACKAGE = Path(efficient_transformers.__file__).parent
SECONDS = 30
LONGEST_MESSAGE = 2000  # characters
SAMPLE, ALL = 15, 220  # examples of each test

sizes = pytest.mark.parametrize("examples", [SAMPLE, pytest.param(ALL, marks=pytest.mark.slow)])


class HangError(BaseException):
    """A case that took longer than SECONDS."""


@contextlib.contextmanager
def time_limit():
    def stop(number, frame):
        raise HangError(f"no result after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_own(error: BaseException) -> bool:
    """Is it raised by a line of this package, not from deep inside another?"""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(PACKAGE)


def result_of(function: Callable[[], Any]) -> Any:
    """What the function returns, or the error of this package that it raises; any other error is a failure."""
    with time_limit():
        try:
            return function()
        except (InputError, ValueError, TypeError) as refused:
            error = refused
    assert isinstance(error, InputError) or is_own(error), "".join(traceback.format_exception(error))
    assert 0 < len(str(error)) < LONGEST_MESSAGE, str(error)
    return error


def check(strategy: st.SearchStrategy, examples: int, test: Callable[[Any], None]) -> None:
    """Run `test` on as many cases as `examples` says."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        test(case)

    run()


def command(*words: str) -> tuple[int, str]:
    """Exit code of a command and what it wrote to stderr."""
    errors = io.StringIO()
    with time_limit(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(list(words))
        except SystemExit as ended:  # argparse
            code = ended.code
    return code, errors.getvalue()


# --- configs

NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from([0.5, 1.5, -1.0, 1e30, 10**6, 10**9, 10**15, -(10**9)]))
VALUES = st.one_of(
    NUMBERS,
    st.sampled_from([None, True, False, "", "yes", "NaN", "rotary", [], [1], [1, 2], {}, {"a": 1}, math.inf, math.nan]),
)
OWN_FIELDS = {
    slug: sorted(set(variant.config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__))
    for slug, variant in VARIANTS.items()
}
COUNTS = {"vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"}


def accepts(hint: Any, value: Any) -> bool:
    """Does a plain annotation of numbers and text have this type? True of all that is not plain."""
    kinds = get_args(hint) or (hint,)
    if not set(kinds) <= {int, float, bool, str, type(None)}:
        return True
    return type(value) in kinds


@sizes
def test_configs(examples):
    fields = st.sampled_from(sorted(VARIANTS)).flatmap(
        lambda slug: st.tuples(st.just(slug), st.sampled_from(OWN_FIELDS[slug]), VALUES, st.booleans())
    )

    def test(case):
        slug, name, value, misspelt = case
        written = name[:-1] + "zq" if misspelt else name
        text = value if isinstance(value, str) else json.dumps(value)
        code, said = command("describe", slug, f"{written}={text}")
        assert code in (0, 2), said
        assert "Traceback" not in said
        assert len(said) < LONGEST_MESSAGE
        hint = VARIANTS[slug].config_class.__dataclass_fields__[name].type
        senseless = isinstance(value, float) and not math.isfinite(value)
        below = name in COUNTS and type(value) is int and value < 1
        if misspelt or senseless or below or not accepts(hint, value):
            assert code == 2, f"{case} was accepted"

    check(fields, examples, test)


# --- masks

LENGTH = 7


@pytest.fixture(scope="module")
def models():
    return {slug: drawn_model(slug, 16) for slug in VARIANTS}


@sizes
def test_masks(examples, models):
    shapes = st.sampled_from(
        [(2, LENGTH)] * 4 + [(LENGTH,), (1, LENGTH), (2, LENGTH + 1), (2, 1, LENGTH), (2, 0), (3, 5)]
    )
    kinds = st.sampled_from([torch.bool, torch.long, torch.float32, torch.int8])
    entries = st.sampled_from([0, 1])
    odd = st.sampled_from([None, None, None, 2, -1, 0.5, math.nan, -math.inf])
    masks = st.tuples(
        st.sampled_from(sorted(VARIANTS)), shapes, kinds, odd, st.lists(entries, min_size=32, max_size=32)
    )

    def test(case):
        slug, shape, kind, wrong, values = case
        count = math.prod(shape)
        mask = torch.tensor(values[:count], dtype=kind).reshape(shape)
        is_wrong = wrong is not None and kind != torch.bool and count and (kind.is_floating_point or wrong in (2, -1))
        if is_wrong:
            mask.view(-1)[0] = wrong
        found = result_of(lambda: models[slug](torch.ones(2, LENGTH, dtype=torch.long), attention_mask=mask))
        fits = shape == (2, LENGTH) and not is_wrong
        if fits and not (kind.is_floating_point and not mask.any()):
            assert not isinstance(found, Exception), found
            assert found.last_hidden_state.isfinite().all()
        elif not fits and shape != (1, LENGTH):
            assert isinstance(found, Exception), f"{case} was accepted"

    with torch.no_grad():
        check(masks, examples, test)


# --- settings

SETTINGS = sorted({field.name for task in TASKS.values() for field in dataclasses.fields(task.settings_class)})


@sizes
def test_settings_files(examples, tmp_path):
    path = tmp_path / "own.yaml"
    names = st.sampled_from([name for name in SETTINGS if name not in ("task", "config")])
    slips = st.tuples(names, VALUES, st.sampled_from(["value", "value", "value", "name", "text", "option"]))
    cases = st.tuples(st.sampled_from(["classify", "pretrain_clm"]), slips, st.text(max_size=12))

    def test(case):
        task, (name, value, kind), text = case
        settings_class = TASKS[task].settings_class
        tiny = (TINY if task == "classify" else TINY_LANGUAGE) | {"task": task, "data": "era"}
        options = []
        if kind == "text":
            path.write_text(text + yaml.safe_dump(tiny), encoding="utf-8", errors="replace")
        elif kind == "option":
            path.write_text(yaml.safe_dump(tiny))
            options = [f"--{name}", text]
        else:
            name = name + "zq" if kind == "name" else name
            path.write_text(yaml.safe_dump({**tiny, name: value}))
        found = result_of(lambda: read_settings(path, None, options)[1])
        if isinstance(found, Exception) or kind in ("text", "option"):
            return
        hints = get_type_hints(settings_class)
        assert name in hints, f"{case} was accepted"
        field = settings_class.__dataclass_fields__[name]
        value = getattr(found, name)
        if value is not None and "range" in field.metadata:
            field.metadata["range"].check(name, value)
        assert settings_class.from_dict(yaml.safe_load(found.to_yaml())) == found

    check(cases, examples, test)


# --- data files

CELLS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Z", "C")), max_size=9)


@sizes
def test_data_files(examples, tmp_path):
    rows = st.lists(st.lists(CELLS, min_size=1, max_size=3), max_size=9)
    damage = st.sampled_from(["none", "bytes", "cut", "lines"])
    cases = st.tuples(st.sampled_from([".csv", ".jsonl", ".txt", ".parquet"]), rows, damage, st.binary(max_size=20))

    def test(case):
        suffix, rows, damage, junk = case
        good = [{"text": f"we are at war {i % 3}", "label": str(i % 2)} for i in range(24)]
        if suffix == ".csv":
            lines = ["text,label", *(f"{row['text']},{row['label']}" for row in good), *map(",".join, rows)]
        elif suffix == ".jsonl":
            lines = [json.dumps(row) for row in good] + [json.dumps(row) for row in rows]
        else:
            lines = [row["text"] + "\n" for row in good] + [" ".join(row) + "\n" for row in rows]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        content = {"bytes": content + junk, "cut": content[: len(content) // 2], "lines": junk + content}.get(
            damage, content
        )
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        own = ClassifySettings.from_dict({"data": str(path), "tokenizer": "data/tokenizer", "model": MODEL})
        documents = result_of(lambda: load_documents(own))
        if not isinstance(documents, Exception):
            assert suffix in (".csv", ".jsonl")
            for texts, labels in documents.splits.values():
                assert len(texts) == len(labels) > 0
                assert all(isinstance(text, str) for text in texts)
        if suffix == ".csv" and damage == "none" and any(len(next_row(row)) not in (0, 2) for row in rows):
            assert isinstance(documents, Exception), f"{case} was accepted"
        if suffix == ".jsonl" and damage == "none" and rows:
            assert isinstance(documents, Exception), f"{case} was accepted"  # lists, not objects
        texts = result_of(lambda: load_texts(own))
        assert isinstance(texts, Exception) or all(texts.values())

    check(cases, examples, test)


def next_row(cells: list[str]) -> list[str]:
    """The fields of a CSV line without quotes and line breaks; of any other line none, which says nothing."""
    line = ",".join(cells)
    return (
        []
        if not line or any(mark in line for mark in '"\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0')
        else line.split(",")
    )


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a small classifier: name → bytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    own = ClassifySettings.from_dict({"data": "era", "tokenizer": "data/tokenizer", "model": MODEL})
    config = build_config(own, bpe(), id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    build_model(own, config, AutoModelForSequenceClassification).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


@sizes
def test_checkpoints(examples, checkpoint, tmp_path):
    tokenizer = bpe()
    cases = st.tuples(
        st.sampled_from(["config.json", "config.json", "model.safetensors"]),
        st.sampled_from(["cut", "flip", "junk", "missing", "field", "field"]),
        st.integers(0, 10**6),
        st.binary(min_size=1, max_size=8),
        VALUES,
    )

    def damaged(name, kind, place, junk, value):
        content = checkpoint[name]
        header = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
        at = place % header  # a flip among the numbers themselves cannot be told from other weights
        if kind == "field" and name == "config.json":
            config = json.loads(content)
            key = sorted(config)[place % len(config)]
            return json.dumps(config | {key: value}).encode()
        if kind == "cut":
            return content[:at]
        if kind == "junk":
            return junk
        return content[:at] + junk[:1] + content[at + 1 :]

    def test(case):
        name, kind, *_ = case
        for old in tmp_path.iterdir():
            old.unlink()
        for other, content in checkpoint.items():
            if other != name:
                (tmp_path / other).write_bytes(content)
            elif kind != "missing":
                (tmp_path / other).write_bytes(damaged(*case))
        own = ClassifySettings.from_dict({"data": "era", "model": {"checkpoint": str(tmp_path)}})

        def load():
            config = build_config(own, tokenizer)
            check_memory(own, config, {"test": [24]}, None)
            return build_model(own, config, AutoModelForSequenceClassification, complete=True)

        found = result_of(load)
        if kind in ("junk", "missing") or (kind == "cut" and name.endswith(".safetensors")):
            assert isinstance(found, Exception), f"{case} was accepted"
        code, said = command("export", str(tmp_path), str(tmp_path.with_name(f"{tmp_path.name}-out") / "new"))
        assert code in (0, 2), said
        assert "Traceback" not in said
        for left in sorted(tmp_path.with_name(f"{tmp_path.name}-out").rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()

    check(cases, examples, test)

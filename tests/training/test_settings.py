"""Settings composed of YAML files and options, their checks, and the command lines of train.py and evaluate.py."""

import os
import subprocess
import sys

import pytest
import yaml
from repository import ROOT
from training_runs import TINY, composed, config_of, write_config, write_labelled
from transformers import AutoConfig

import efficient_transformers
from efficient_transformers.training.runs import evaluate, train
from efficient_transformers.training.runs.train_all import variants_of
from efficient_transformers.training.settings import InputError, compose
from efficient_transformers.training.tasks import TASKS, task_of
from efficient_transformers.training.tasks.classify import ClassifySettings

FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
MODEL = "model: {model_type: bert}\n"


def settings_of(tmp_path, text, *options, variant=None, variant_text=None):
    (tmp_path / "own.yaml").write_text(text)
    if variant_text is not None:
        (tmp_path / "variants").mkdir()
        (tmp_path / f"variants/{variant}.yaml").write_text(variant_text)
    return ClassifySettings.from_yaml(tmp_path / "own.yaml", options, variant)


# --- the files in configs


def test_every_variant_has_a_file():
    assert {path.stem for path in (ROOT / "configs/variants").glob("*.yaml")} == efficient_transformers.VARIANTS.keys()
    assert {task_of(compose(config_of(name), "full")).name for name in FILES} == TASKS.keys()


@pytest.mark.parametrize("name", FILES)
def test_every_variant_of_a_task_has_settings_and_a_config(name):
    """All (task, variant) pairs: the fields of a new model are known, accepted and kept by its config."""
    for variant in variants_of(config_of(name)):
        task, settings = composed(name, variant)
        assert (settings.task, settings.config, settings.out) == (
            task.name,
            f"{name}/{variant}",
            f"runs/{name}-{variant}",
        )
        assert isinstance(settings, task.settings_class)
        fields = dict(settings.model)
        if fields.get("checkpoint"):
            assert fields["checkpoint"] == f"model_cards/{variant}-mlm"
            continue
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        assert config.model_type == f"et_{variant}"
        assert type(config).__dataclass_fields__.keys() >= fields.keys()
        assert {key: getattr(config, key) for key in fields} == fields


def test_a_section_may_name_a_checkpoint_instead_of_a_variant():
    _, settings = composed("era", "minilm")
    assert settings.model["checkpoint"] == "runs/minilm-local"
    assert "hidden_size" not in settings.model
    assert (settings.tokenizer, settings.mixed_precision, settings.epochs) == (
        None,
        "bf16",
        compose(config_of("era"))["epochs"],
    )


# --- composing


def test_the_section_of_a_variant_wins_over_its_file_and_the_file_over_the_task(tmp_path):
    text = """
    data: era
    epochs: 7
    seed: 1
    model: {hidden_size: 8, num_hidden_layers: 2}
    variants: {mine: {seed: 3, model: {hidden_size: 16}}, other: {seed: 4}}
    """
    file = "batch_size: 2\nseed: 2\nmodel: {model_type: bert, hidden_size: 12, num_attention_heads: 4}"
    settings = settings_of(tmp_path, text, variant="mine", variant_text=file)
    assert (settings.data, settings.epochs, settings.batch_size, settings.seed) == ("era", 7, 2, 3)
    fields = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    assert settings.model == fields
    assert (settings.config, settings.out) == ("own/mine", "runs/own-mine")


def test_a_file_elsewhere_knows_the_variants_of_the_repository(tmp_path):
    settings = settings_of(tmp_path, "data: era\nmodel: {hidden_size: 8}", variant="stride")
    assert settings.model == {"hidden_size": 8, "model_type": "et_stride", "stride": 64, "hops": 2}


def test_a_checkpoint_does_not_inherit_the_fields_of_a_new_model(tmp_path):
    text = "data: era\nmodel: {model_type: bert, hidden_size: 8}\nvariants: {kept: {model: {checkpoint: folder}}}\n"
    assert settings_of(tmp_path, text, variant="kept").model == {"checkpoint": "folder"}
    for options in (("--model.checkpoint=x", "--model.pad=0"), ("--model.pad", "0", "--model.checkpoint", "x")):
        assert settings_of(tmp_path, text, *options).model == {"checkpoint": "x", "pad": 0}


def test_a_task_that_starts_from_a_checkpoint_needs_a_variant_only_in_its_name(tmp_path):
    assert settings_of(tmp_path, "data: era\nmodel: {checkpoint: folder}\n", variant="local").model == {
        "checkpoint": "folder"
    }
    with pytest.raises(InputError, match=r"starts from the checkpoint zoo/\{variant\} of a variant: give --variant"):
        settings_of(tmp_path, "data: era\nmodel: {checkpoint: 'zoo/{variant}'}\n")


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"own.yaml has no variant 'locla'; did you mean 'local'\?"):
        settings_of(tmp_path, "data: era\n" + MODEL, variant="locla")
    with pytest.raises(InputError, match=r"variants in .*own.yaml must hold a section of settings for each variant"):
        settings_of(tmp_path, "variants: [local]\n" + MODEL, variant="local")


def test_a_task_without_a_variant_has_no_model():
    with pytest.raises(
        InputError, match=r"model must name either model_type .*: pass --variant, --model.model_type or"
    ):
        composed("era", None)


# --- options


def test_options_win(tmp_path):
    text = "data: era\nseed: 9\nsort_by_length: true\n" + MODEL
    options = [
        "--seed",
        "1",
        "--learning_rate",
        "3e-4",
        "--model.num_hidden_layers",
        "5",
        "--sort_by_length",
        "false",
        "--resume",
    ]
    settings = settings_of(tmp_path, text, *options, "--model.x=[a, b]", "--more_data", "[a.txt, b.txt]")
    assert (settings.seed, settings.learning_rate, settings.sort_by_length, settings.resume) == (1, 3e-4, False, True)
    assert settings.model == {"model_type": "bert", "num_hidden_layers": 5, "x": ["a", "b"]}
    assert settings.more_data == ["a.txt", "b.txt"]


def test_what_yaml_takes_for_text_is_still_a_number(tmp_path):
    text = "data: era\nlearning_rate: 3e-4\nmodel: {model_type: bert, layer_norm_eps: 1e-6}\n"
    settings = settings_of(tmp_path, text, "--weight_decay=1e-2", "--model.dropout", "1e-1")
    assert (settings.learning_rate, settings.weight_decay) == (3e-4, 1e-2)
    assert settings.model == {"model_type": "bert", "layer_norm_eps": 1e-6, "dropout": 0.1}


def test_null_takes_a_setting_back_and_text_stays_text(tmp_path):
    text = "data: era\ntokenizer: data/tokenizer\nmax_length: 3\nlanguage: '1'\n" + MODEL
    settings = settings_of(tmp_path, text, "--tokenizer=null", "--max_length", "null", "--license", "3")
    assert (settings.tokenizer, settings.max_length, settings.license, settings.language) == (None, None, "3", "1")


def test_the_bare_word_no_is_no_truth_value(tmp_path):
    text = "data: era\n" + MODEL
    assert settings_of(tmp_path, text, "--mixed_precision=no").mixed_precision == "no"
    assert settings_of(tmp_path, text + "mixed_precision: no\n").mixed_precision == "no"


def test_settings_survive_their_yaml(tmp_path):
    settings = settings_of(
        tmp_path, "data: era\nextra_metrics: [mcc]\nmixed_precision: no\nrun: 1".replace("run: 1", MODEL)
    )
    assert settings_of(tmp_path, settings.to_yaml()) == settings


def test_the_values_given_are_left_as_they_were():
    values = {"data": "era", "model": {"model_type": "bert", "layer_norm_eps": "1e-6"}}
    assert ClassifySettings.from_dict(values).model["layer_norm_eps"] == 1e-6
    assert values["model"]["layer_norm_eps"] == "1e-6"


BAD_SETTINGS = {
    "unknown": ("sede: 1", "There is no setting 'sede'; did you mean 'seed'?"),
    "nothing near": ("xyzzy: 1", "There is no setting 'xyzzy'; known are data, "),
    "type": ("epochs: many", "epochs ('many') must be an integer."),
    "float for int": ("batch_size: 1.5", "batch_size (1.5) must be an integer."),
    "bool for int": ("seed: true", "seed (True) must be an integer."),
    "bool for float": ("learning_rate: true", "learning_rate (True) must be a number."),
    "int for bool": ("resume: 1", "resume (1) must be true or false."),
    "text for float": ("learning_rate: fast", "learning_rate ('fast') must be a number."),
    "text or null": ("max_length: long", "max_length ('long') must be an integer or null."),
    "int for text": ("text_column: 3", "text_column (3) must be text."),
    "choice": ("schedule: lineal", "schedule ('lineal') must be one of linear, cosine, constant."),
    "choice or null": (
        "mixed_precision: fp8",
        "mixed_precision ('fp8') must be one of no, fp16, bf16 or null.",
    ),
    "list": ("extra_metrics: mcc", "extra_metrics ('mcc') must be a list, e.g. [a, b]."),
    "list of text": ("extra_metrics: [1]", "extra_metrics ([1]) must be a list, e.g. [a, b]."),
    "section": ("model: bert", "model ('bert') must be a section of `field: value` lines."),
    "zero": ("batch_size: 0", "batch_size (0) must be at least 1."),
    "share": ("warmup_ratio: 5", "warmup_ratio (5.0) must lie between 0 and 1"),
    "rate": ("learning_rate: 0", "learning_rate (0.0) must be more than 0 and at most 1."),
    "both": ("resume: true\noverwrite: true", "resume and overwrite contradict each other"),
    "two models": ("model: {model_type: bert, checkpoint: x}", "model must name either model_type"),
    "no model": ("model: {}", "model must name either model_type"),
    "no data": ("data: null", "The setting 'data' is missing: set it in the YAML or with --data."),
    "window": ("window_length: 100\nmax_length: 101", "max_length (101) must not exceed window_length (100)"),
    "not YAML": ("a: [", "cannot be read as YAML"),
    "no mapping": ("- a", "must hold `key: value` lines, not a list."),
}


@pytest.mark.parametrize(("text", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(tmp_path, text, message):
    rest = "".join(line for line in ("data: era\n", MODEL) if line.split(":")[0] not in text)
    with pytest.raises(InputError) as error:
        settings_of(tmp_path, text if text == "- a" else f"{rest}{text}")
    assert message in str(error.value)


BAD_OPTIONS = {
    "misspelt": (["--learnig_rate", "1e-3"], "There is no setting 'learnig_rate'; did you mean 'learning_rate'?"),
    "with its value": (["--learnig_rate=1e-3"], "There is no setting 'learnig_rate'; did you mean 'learning_rate'?"),
    "shortened": (["--learning", "1e-3"], "There is no setting 'learning'; did you mean 'learning_rate'?"),
    "nested": (["--modle.hidden_size", "8"], "There is no setting 'modle'; did you mean 'model'?"),
    "type": (["--learning_rate", "fast"], "learning_rate ('fast') must be a number."),
    "type or null": (["--max_length=long"], "max_length ('long') must be an integer or null."),
    "choice": (["--schedule", "lineal"], "schedule ('lineal') must be one of linear, cosine, constant."),
    "truth value": (["--resume", "maybe"], "resume ('maybe') must be true or false."),
    "no value": (["--learning_rate"], "argument --learning_rate: expected one argument"),
    "no option": (["seed=1"], "unrecognized arguments: seed=1: settings are given as --name value, e.g."),
    "range": (["--batch_size", "0"], "batch_size (0) must be at least 1."),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(InputError) as error:
        settings_of(tmp_path, "data: era\n" + MODEL, *options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_need_data(tmp_path):
    with pytest.raises(InputError, match="The setting 'data' is missing"):
        settings_of(tmp_path, MODEL)


def test_a_missing_yaml_says_what_is_there(tmp_path):
    (tmp_path / "local.yaml").write_text(MODEL)
    with pytest.raises(InputError, match=r"There is no settings file .*locla.yaml; beside it are local.yaml"):
        ClassifySettings.from_yaml(tmp_path / "locla.yaml")


# --- command lines


def test_a_yaml_must_name_a_task(tmp_path):
    (tmp_path / "own.yaml").write_text("data: era\n" + MODEL)
    with pytest.raises(SystemExit, match=r"^error: The settings name no task: set `task: NAME` in the YAML, one of "):
        train.main(["--config", str(tmp_path / "own.yaml")])
    (tmp_path / "own.yaml").write_text("task: clasify\ndata: era\n" + MODEL)
    with pytest.raises(SystemExit, match=r"^error: There is no task 'clasify'; did you mean 'classify'\?$"):
        train.main(["--config", str(tmp_path / "own.yaml")])


def test_settings_of_older_runs_name_their_task_by_their_config():
    assert task_of({"config": "zoo_era/linear"}).name == "classify"
    assert task_of({"config": "mqar/full", "task": None}).name == "recall"
    recorded = yaml.safe_load((ROOT / "model_cards/linear-clm/settings.yaml").read_text())
    assert task_of(recorded).name == "pretrain_clm"


def test_the_command_of_a_run_is_recorded_and_what_it_cannot_use_is_told_in_one_line(monkeypatch):
    ran = []
    monkeypatch.setattr(TASKS["classify"], "run", lambda settings, command: ran.append((settings, command)))
    options = [
        "--config",
        "configs/era.yaml",
        "--variant",
        "local",
        "--learning_rate",
        "1e-3",
        "--model.hidden_size",
        "64",
    ]
    monkeypatch.chdir(ROOT)
    train.main(options)
    ((settings, command),) = ran
    assert command == "accelerate launch training/train.py " + " ".join(options)
    assert (settings.learning_rate, settings.model["hidden_size"], settings.out) == (1e-3, 64, "runs/era-local")
    with pytest.raises(
        SystemExit, match=r"^error: There is no setting 'learnig_rate'; did you mean 'learning_rate'\?$"
    ):
        train.main([*options, "--learnig_rate", "1e-3"])
    with pytest.raises(
        SystemExit, match=r"^error: There is no settings file configs/eras.yaml; beside it are arxiv.yaml, "
    ):
        train.main(["--config", "configs/eras.yaml"])


def test_help_shows_the_settings_of_the_task(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    assert "--variant" in capsys.readouterr().out
    train.main(["--config", str(config_of("era")), "--help"])
    assert "--window_length" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert ended.value.code == 2
    assert "--config is required" in capsys.readouterr().err


def test_a_folder_without_a_run_is_not_evaluated(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .* contains no finished run: it has no metrics.json"):
        evaluate.main([str(tmp_path)])


@pytest.mark.slow
def test_the_scripts_find_the_library_whose_name_one_of_them_has(tmp_path):
    """`evaluate` is a library that train.py needs, and a script beside it."""
    config = write_config(tmp_path, {**TINY, "max_steps": 2, "eval_steps": 2}, write_labelled(tmp_path))
    for command in (["training/train.py", "--config", str(config)], ["training/evaluate.py", str(tmp_path / "out")]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    assert '"accuracy"' in done.stdout

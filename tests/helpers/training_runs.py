"""What the tests of training runs share: a fresh start for each, data and tokenizers, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from repository import ROOT
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from efficient_transformers.training.engine import loop, task
from efficient_transformers.training.runs import train
from efficient_transformers.training.runs.train_all import variants_of
from efficient_transformers.training.tasks import read_settings

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
TEXT = "Antidisestablishmentarianism frightens nobody but philosophers and unsuspecting parliamentarians "


MODEL = {
    "model_type": "et_local",
    "window_size": 5,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.2,
}
TINY = {
    "task": "classify",
    "tokenizer": "data/tokenizer",
    "model": MODEL,
    "max_length": 24,
    "epochs": 4,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "learning_rate": 0.03,
    "eval_steps": 5,
    "checkpoint_steps": 3,
    "keep_checkpoints_at_end": True,
    "tracker": "none",
}  # with the 42 of `write_labelled`'s documents that train: 6 steps an epoch, 24 in all
WIDER = {**MODEL, "hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.1, "hidden_dropout_prob": 0.1}
TINY_LANGUAGE = {
    **TINY,
    "model": {**WIDER, "num_hidden_layers": 2, "position_embedding_type": "rotary"},
    "learning_rate": 0.02,
    "eval_first": True,
}


def reset_accelerate():
    """The next run in this process begins as it would in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same_run(folder, other, last="step-000000024"):
    """Final and last weights, moments and history are equal, bit for bit."""
    for name in ("model.safetensors", *(f"checkpoints/{last}/{part}.safetensors" for part in ("model", "optimizer"))):
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, other))
    for name in ("history", "test", "validation"):
        assert ours[name] == theirs[name]
    assert ours.get("before") == theirs.get("before")
    assert ours["training"]["tokens"] == theirs["training"]["tokens"]


# --- data and tokenizers


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_labelled(folder, count=60):
    """Documents of war and of peace."""
    names = ["peace", "war"]
    rows = [{"text": "we are at " + f"{names[i % 2]} " * (1 + i % 7), "label": names[i % 2]} for i in range(count)]
    return write_rows(folder / "documents.jsonl", rows)


def write_sentences(folder):
    """Sixty documents of three sentences, whose words can be told from those around them."""
    sentences = (
        "we are at war with the states .",
        "the people of the union are at peace .",
        "and god save this land .",
    )
    rows = [{"text": " ".join(sentences[(i + j) % 3] for j in range(1 + i % 5))} for i in range(60)]
    return write_rows(folder / "documents.jsonl", rows)


def write_config(folder, tiny, corpus, **values):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny, "data": str(corpus), "out": str(folder / "out"), **values}))
    return path


def run(config, *options):
    """Metrics of the run that a YAML describes, with options of the command line. Errors are raised, not printed."""
    task, settings = read_settings(config, None, options)
    return task.run(settings)


def config_of(task):
    return ROOT / "configs" / f"{task}.yaml"


def each_variant_of(*tasks):
    """Parametrizes a test by `task` and `variant`, over all variants of files in configs."""
    pairs = [(task, variant) for task in tasks for variant in variants_of(config_of(task))]
    return pytest.mark.parametrize(("task", "variant"), pairs, ids=["-".join(pair) for pair in pairs])


def composed(task, variant, *options):
    """The task of a file in configs, and the settings of a variant."""
    return read_settings(config_of(task), variant, options)


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def bpe():
    return AutoTokenizer.from_pretrained(ROOT / "data/tokenizer")


def wordpiece(has_mask=True):
    """Cuts the words of TEXT after every third letter."""
    words = [[word[at : at + 3] for at in range(0, len(word), 3)] for word in TEXT.lower().split()]
    pieces = {f"{'##' if at else ''}{piece}" for word in words for at, piece in enumerate(word)}
    vocabulary = [*SPECIAL.values(), *(["[MASK]"] if has_mask else []), *sorted(pieces)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]" if has_mask else None, **SPECIAL)


# --- stopped and continued


class PowerCut(BaseException):
    """Nothing is saved on the way out."""


def kill_and_continue(monkeypatch, run, folder, step, total):
    """Ends a run in front of the record of step `step`, at `total` of the metrics, and continues it.

    Returns the name of the newest checkpoint that was left.
    """
    module, name = (task, "metrics_of") if step == total else (loop, "record_step")
    original = getattr(module, name)

    def cut(*arguments):
        if step == total or arguments[1].step == step - 1:
            raise PowerCut
        return original(*arguments)

    monkeypatch.setattr(module, name, cut)
    with pytest.raises(PowerCut):
        run()
    left = [path.name for path in sorted((folder / "checkpoints").glob("step-*"))]
    monkeypatch.undo()
    reset_accelerate()
    torch.manual_seed(1)  # what the process would draw by itself
    run("--resume=true")
    return left[-1] if left else None


def stop_and_continue(monkeypatch, config, step):
    """Sends SIGTERM in step `step` to a run, which ends the process and saves, and continues the run."""
    original = loop.record_step

    def record_step(accelerator, progress, *rest):
        if progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(accelerator, progress, *rest)

    monkeypatch.setattr(loop, "record_step", record_step)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(config)])
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(loop, "record_step", original)
    reset_accelerate()
    torch.manual_seed(1)
    train.main(["--config", str(config), "--resume"])


# --- several processes


def launch_two(*arguments):
    """Runs training/train.py in two processes; `accelerate launch --cpu --num_processes 2` starts one only."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "training/train.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

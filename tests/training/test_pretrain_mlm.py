"""Masked language models: scores, and runs from start to end, interrupted, refused or in two processes."""

import io
import math
from contextlib import redirect_stdout
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from language_runs import TINY_MLM, mlm_settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from training_runs import (
    SPECIAL,
    TEXT,
    assert_same_run,
    bpe,
    composed,
    each_variant_of,
    kill_and_continue,
    launch_two,
    read_metrics,
    reset_accelerate,
    run,
    stop_and_continue,
    wordpiece,
    write_config,
    write_rows,
)
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    CanineTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
)

from efficient_transformers.cards import loading_code
from efficient_transformers.training.data.masking import IGNORED, RemaskedWindows
from efficient_transformers.training.data.packing import Packer, RowCollator
from efficient_transformers.training.engine import task
from efficient_transformers.training.engine.building import build_config, build_model, load_tokenizer, make_accelerator
from efficient_transformers.training.engine.scoring import Evaluator
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_mlm
from efficient_transformers.training.tasks.language_models import PerplexityScorer
from efficient_transformers.training.tasks.pretrain_mlm import TASK, add_mask_token

TINY = TINY_MLM  # the settings that the fixtures of conftest.py take


SCORES = ("loss", "perplexity", "accuracy")


TOTAL = 28
LAST = f"step-{TOTAL:09d}"


# --- scores


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("packing", ["padding", "best_fit"])
def test_every_masked_token_counts_the_same(batch_size, packing, tmp_path):
    values = mlm_settings(eval_batch_size=batch_size, packing=packing, model=TINY_MLM["model"], out=str(tmp_path))
    tokenizer = load_tokenizer(values)
    data = TASK.make_windows("test", [TEXT * 4, " but", " and nobody", " but nobody", TEXT], tokenizer, 60, values)
    model = build_model(values, build_config(values, tokenizer), AutoModelForMaskedLM).eval()
    losses, right = [], []
    windows = data if packing == "padding" else data.windows
    assert (len(data) < len(windows)) == (packing == "best_fit")
    for i in range(len(windows)):
        item = {name: torch.tensor(value)[None] for name, value in windows[i].items()}
        at = item["labels"] != IGNORED
        log_probabilities = model(item["input_ids"]).logits[at].double().log_softmax(-1)
        losses += (-log_probabilities.gather(1, item["labels"][at][:, None])[:, 0]).tolist()
        right += (log_probabilities.argmax(-1) == item["labels"][at]).tolist()
    assert len(losses) == data.counts()["masked_tokens"] > 20

    accelerator = make_accelerator(values)
    collate = RowCollator(DataCollatorForTokenClassification(tokenizer), tokenizer.padding_side)
    scores = Evaluator(accelerator, PerplexityScorer(data, values), collate, batch_size)(model)
    loss = sum(losses) / len(losses)
    assert scores == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "accuracy": sum(right) / len(right)}, rel=1e-5
    )


def test_the_loss_falls(finished):
    found = read_metrics(finished[0])
    assert found["before"]["loss"] == pytest.approx(math.log(4096), abs=1)
    assert found["test"]["loss"] < 0.5 * found["before"]["loss"]
    assert found["test"]["perplexity"] == pytest.approx(math.exp(found["test"]["loss"]))
    losses = [entry["loss"] for entry in found["history"]]
    assert found["validation"]["loss"] == min(losses) < losses[0]
    assert found["training"]["steps"] == TOTAL
    assert found["training"]["tokens"] > 4 * 51 * 24
    assert found["test"]["masked_tokens"] > 2 * found["test"]["n"]


def test_a_new_model_may_begin_at_the_frequencies(config):
    """Of its training text: 2.8, where equal chances of 4,096 tokens have a loss of 8.3."""
    found = run(config, "--frequency_bias=true", "--max_steps=1", "--model.initializer_range=0.001")
    assert found["before"]["loss"] == pytest.approx(2.8, abs=0.2)


def test_a_tiny_corpus_is_learnt_by_heart(config):
    """The frequencies of the words alone have a loss of 2.8."""
    found = run(config, "--epochs=18", "--gradient_accumulation=1", "--learning_rate=0.005",
                "--model.hidden_dropout_prob=0.0", "--eval_steps=1000", "--checkpoint_steps=1000")  # fmt: skip
    assert found["test"]["loss"] < 1.4
    assert found["test"]["accuracy"] > 0.6


def test_the_output_folder_is_ready_for_the_hub(finished):
    folder, printed = finished
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.endswith(".py")} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json",
        "settings.yaml", "runs", "checkpoints",
    }  # fmt: skip
    assert "modeling_local.py" in names
    assert list((folder / "runs").rglob("events.out.tfevents.*"))
    code = loading_code(str(folder), "AutoModelForMaskedLM", 24)
    assert code in printed
    with redirect_stdout(io.StringIO()) as filled:
        exec(code, {})
    assert filled.getvalue().strip() in {"we", "are", "at", "war", "peace", "with", "the", "states", "people", "of",
                                         "union", "and", "god", "save", "this", "land", "."}  # fmt: skip


def test_the_card_of_a_run_is_valid(finished):
    folder, _ = finished
    card, found = ModelCard.load(folder / "README.md"), read_metrics(folder)
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.library_name == "transformers"
    results = {result.metric_type: (result.task_type, result.metric_value) for result in card.data.eval_results}
    scores = {"cross-entropy": "loss", "perplexity": "perplexity", "accuracy": "accuracy"}
    assert results == {name: ("fill-mask", found["test"][score]) for name, score in scores.items()}
    for text in ("AutoModelForMaskedLM", "15 % of the words", "validation before training | loss 8."):
        assert text in card.text
    assert f"training/train.py --config {folder.parent / 'tiny.yaml'}" in card.text


def test_a_finished_run_is_evaluated(finished):
    folder, _ = finished
    found = read_metrics(folder)["test"]
    assert pretrain_mlm.evaluate_folder(folder, []) == pytest.approx(
        {name: found[name] for name in (*SCORES, "n")}, rel=1e-5
    )
    reset_accelerate()
    assert pretrain_mlm.evaluate_folder(folder, ["--max_length=10"])["n"] > found["n"]


def test_evaluations_of_one_model_are_equal(config):
    # no weight moves by more than its rounding
    found = run(config, "--learning_rate=1e-12", "--epochs=1", "--eval_steps=2", "--eval_batch_size=5")
    assert len(found["history"]) == 4
    for entry in found["history"]:
        assert entry["loss"] == pytest.approx(found["before"]["loss"], rel=1e-6)


def test_training_sees_new_masks_in_every_epoch_and_every_window_once(monkeypatch, config):
    seen, original = [], RemaskedWindows.__getitem__

    def getitem(self, index):
        seen.append((*self.epoch, index))
        return original(self, index)

    monkeypatch.setattr(RemaskedWindows, "__getitem__", getitem)
    found = run(config)
    windows = found["training"]["windows"]
    assert sorted(seen) == [(epoch, index) for epoch in range(4) for index in range(windows)]


def test_a_checkpoint_is_trained_on(finished, config, tmp_path):
    folder, _ = finished
    found = run(config, f"--model.checkpoint={folder}", "--tokenizer=null", "--max_steps=3", "--learning_rate=0.001")
    best = read_metrics(folder)["validation"]
    assert found["before"] == pytest.approx({name: best[name] for name in SCORES}, rel=1e-5)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "initialised from | out |" in card.text
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("dense.weight"))
    with pytest.raises(InputError, match="frequency_bias initialises a new model"):
        run(config, f"--model.checkpoint={folder}", "--tokenizer=null", "--frequency_bias=true", "--overwrite=true")


# --- stopped and continued


def test_sigterm_saves_and_the_run_ends_as_one_never_stopped(monkeypatch, capsys, finished, config, tmp_path):
    stop_and_continue(monkeypatch, config, 10)  # in the second epoch
    printed = capsys.readouterr().out
    assert f"train.py --config {config} --resume" in printed
    assert f"Resuming after step 10 of {TOTAL}" in printed
    assert_same_run(tmp_path / "out", finished[0], LAST)


@pytest.mark.parametrize(("step", "saved"), [(2, None), (11, 9), (TOTAL, TOTAL)], ids=["at once", "midway", "at last"])
def test_a_killed_run_ends_as_one_never_stopped(monkeypatch, finished, config, tmp_path, step, saved):
    left = kill_and_continue(monkeypatch, partial(run, config), tmp_path / "out", step, TOTAL)
    assert left == (f"step-{saved:09d}" if saved else None)
    assert_same_run(tmp_path / "out", finished[0], LAST)


# --- a mask token where there is none


def without_mask(folder):
    wordpiece(has_mask=False).save_pretrained(folder / "tokenizer")
    return f"--tokenizer={folder / 'tokenizer'}"


def test_a_missing_mask_token_is_added(config, tmp_path):
    given = (without_mask(tmp_path), "--mask_token=<mask>", "--max_steps=2", "--packing=padding")
    run(config, *given)
    tokenizer, model = (auto.from_pretrained(tmp_path / "out") for auto in (AutoTokenizer, AutoModelForMaskedLM))
    assert tokenizer.mask_token == "<mask>"
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert tokenizer.mask_token_id == len(wordpiece(has_mask=False))


def test_an_added_mask_token_leaves_the_embeddings_of_a_checkpoint():
    tokenizer = wordpiece(has_mask=False)
    values = mlm_settings(model={"checkpoint": "x"}, mask_token="<mask>")
    new = mlm_settings(model=TINY_MLM["model"])
    model = build_model(new, build_config(new, tokenizer), AutoModelForMaskedLM)
    before = model.get_input_embeddings().weight.detach().clone()
    add_mask_token(tokenizer, model, values)
    after = model.get_input_embeddings().weight.detach()
    assert len(after) == len(before) + 1 == len(tokenizer)
    assert torch.equal(after[:-1], before)
    torch.testing.assert_close(after[-1], before.mean(0), atol=1e-3, rtol=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    add_mask_token(tokenizer, model, values)
    assert len(model.get_input_embeddings().weight) == len(after)


# --- errors before any work


BAD_RUNS = {
    "no share": (["--mlm_probability=0"], r"mlm_probability \(0.0\) must be more than 0 and less than 1"),
    "all": (["--mlm_probability=1"], r"mlm_probability \(1.0\) must be more than 0 and less than 1"),
    "packing": (["--packing=tight"], r"packing \('tight'\) must be one of documents, padding"),
    "metric": (["--best_metric=perplexity"], r"best_metric \('perplexity'\) must be loss"),
    "seed": (["--seed=-1"], r"seed \(-1\) must lie between 0 and 4294967295"),
    "label": (["--label_column=label"], "There is no setting 'label_column'"),
    "length": (["--max_length=2"], r"max_length \(2\) must be at least 3: fewer hold no text"),
    "column": (["--text_column=body"], "no column 'body'; there are: text. Set text_column"),
    "frequencies": (
        ["--frequency_bias=true", "--streaming=true", "--max_steps=1"],
        "frequency_bias is computed from all training texts",
    ),
    "causal": (
        ["--model.is_decoder=true"],
        "The model section cannot be used: EtLocalForMaskedLM attends to both sides",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_runs_are_refused_before_training(monkeypatch, config, tmp_path, overrides, message):
    monkeypatch.setattr(task, "train", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(InputError, match=message):
        run(config, *overrides)
    assert not list((tmp_path / "out").glob("*"))


def test_a_model_without_such_a_head_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match=r"The model section cannot be used: .*GPT2Config.* for .*MaskedLM"):
        run(write_config(tmp_path, TINY_MLM, corpus, model={"model_type": "gpt2"}))


def test_a_tokenizer_without_a_mask_token_is_refused(monkeypatch, config, tmp_path):
    monkeypatch.setattr(task, "train", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(
        SystemExit, match=r"error: The tokenizer .* has no mask token: .* set mask_token, e.g. '\[MASK\]'"
    ):
        train.main(["--config", str(config), without_mask(tmp_path)])


def test_a_split_without_text_is_refused(config, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(InputError, match="The test data contains no token that could be masked"):
        run(config, f"--test_data={empty}")


def test_whole_words_need_a_tokenizer_that_knows_them():
    with pytest.raises(InputError, match=r"whole_word needs .* CanineTokenizer is not from the tokenizers library"):
        Packer(CanineTokenizer(), 16, whole_words=True)
    unsplit = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"o": 0, "n": 1}, [])), **SPECIAL)
    with pytest.raises(InputError, match=r"whole_word needs .* treats 'one two' as a single word"):
        Packer(unsplit, 16, whole_words=True)


def test_joining_needs_a_separator():
    tokenizer = bpe()
    tokenizer.sep_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a separator nor an end token .* set packing to best_fit or padding"):
        Packer(tokenizer, 16)
    assert len(Packer(tokenizer, 16, "padding")([" a", " b"])) == 2


# --- the configs, and several processes


@each_variant_of("mlm", "pubmed", "govreport")
def test_every_config_builds_a_tiny_model(task, variant):
    tiny = ("--model.hidden_size=32", "--model.num_hidden_layers=1", "--model.intermediate_size=32")
    _, values = composed(task, variant, *tiny)
    tokenizer = load_tokenizer(values)
    model = build_model(values, build_config(values, tokenizer), AutoModelForMaskedLM)
    data = TASK.make_windows("train", [TEXT * 30], tokenizer, 300, values)
    batch = DataCollatorForTokenClassification(tokenizer)([data[0], data[1]])
    assert model(**batch).loss.item() == pytest.approx(math.log(len(tokenizer)), abs=2)
    assert {key: getattr(model.config, key) for key in values.model} == values.model


@pytest.mark.slow
def test_several_processes_give_the_scores_of_one(config, tmp_path):
    launch_two("--config", str(config), "--eval_batch_size=5")
    found = read_metrics(tmp_path / "out")
    assert found["training"]["processes"] == 2
    scores = pretrain_mlm.evaluate_folder(tmp_path / "out", [])
    assert {name: scores[name] for name in SCORES} == pytest.approx(
        {name: found["test"][name] for name in SCORES}, rel=1e-5
    )

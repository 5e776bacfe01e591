"""Masked language models: reading without labels, packing, masks, scores, and runs that are stopped and continued."""

import io
import math
from contextlib import redirect_stdout
from functools import partial
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, processors
from training_runs import (
    SPECIAL,
    TEXT,
    TINY_LANGUAGE,
    assert_same_run,
    bpe,
    composed,
    each_variant_of,
    kill_and_continue,
    launch_two,
    read_metrics,
    reset_accelerate,
    stop_and_continue,
    wordpiece,
    write_config,
    write_rows,
    write_sentences,
)
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    CanineTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
)

from efficient_transformers.cards import loading_code
from efficient_transformers.training.data.masking import IGNORED, Masker, RemaskedWindows
from efficient_transformers.training.data.packing import NO_WORD, Packer, RowCollator, Window, best_fit
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.engine import task
from efficient_transformers.training.engine.building import build_config, build_model, load_tokenizer, make_accelerator
from efficient_transformers.training.engine.scoring import Evaluator
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_mlm
from efficient_transformers.training.tasks.language_models import PerplexityScorer, check_packing
from efficient_transformers.training.tasks.pretrain_mlm import TASK, MlmSettings, add_mask_token

SCORES = ("loss", "perplexity", "accuracy")

TINY = {**TINY_LANGUAGE, "task": "pretrain_mlm", "whole_word": True}  # 52 windows: 13 batches and 7 steps an epoch
TOTAL = 28
LAST = f"step-{TOTAL:09d}"


TOKENIZERS = {"bpe": bpe, "wordpiece": wordpiece}
both_tokenizers = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)


def starts_word(tokenizer, token):
    """By the marker, not by `word_ids`; holds for words of letters alone."""
    return token.startswith("Ġ") if "Ġthe" in tokenizer.get_vocab() else not token.startswith("##")


def settings(**values):
    return MlmSettings.from_dict({**TINY, "data": "era", "model": {"model_type": "bert"}, **values})


# --- reading


def test_text_needs_no_labels_and_no_document_is_in_two_splits(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(40)])
    splits = load_texts(settings(data=str(path)))
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 28, "validation": 6, "test": 6}
    assert sorted(chain(*splits.values())) == sorted(f"document {i}" for i in range(40))
    assert load_texts(settings(data=str(path), seed=7)) == splits
    assert load_texts(settings(data=str(path), split_seed=7)) != splits


def test_labels_of_a_hub_data_set_do_not_matter(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"train": [{"text": str(i), "label": 0} for i in range(30)], "test": [{"text": "withheld", "label": -1}]}
    loaded = {name: datasets.Dataset.from_list(split, features=features) for name, split in rows.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(loaded))
    splits = load_texts(settings(data="a/b"))
    assert splits["test"] == ["withheld"]
    assert sorted(splits["train"] + splits["validation"]) == sorted(str(i) for i in range(30))


def test_the_bundled_corpus_keeps_its_splits():
    splits = load_texts(settings())
    assert {name: len(set(texts)) for name, texts in splits.items()} == {"train": 163, "validation": 35, "test": 35}
    assert len(set(chain(*splits.values()))) == 233


# --- packing


def inside(windows):
    return [token for window in windows for token in window.ids[1:-1].tolist()]


@both_tokenizers
def test_joined_documents_lose_no_token_and_meet_at_separators(tokenizer):
    texts = [TEXT * 3, "", "but and", TEXT, " nobody"]
    windows = Packer(tokenizer, 16)(texts)
    expected = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [*([tokenizer.sep_token_id] if expected and ids else []), *ids]
    assert inside(windows) == expected
    assert {len(window.ids) for window in windows[:-1]} == {16}
    assert 3 <= len(windows[-1].ids) <= 16
    assert {(window.ids[0], window.ids[-1]) for window in windows} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}


def test_words_of_two_documents_are_two_words():
    (window,) = Packer(bpe(), 64, whole_words=True)([" a", " b c", " d"])
    assert window.words.tolist() == [NO_WORD, 0, NO_WORD, 1, 2, NO_WORD, 3, NO_WORD]


def test_an_end_token_separates_where_there_is_no_separator():
    tokenizer = bpe()
    tokenizer.sep_token, tokenizer.eos_token = None, "[UNK]"
    (window,) = Packer(tokenizer, 64)([" a", " b"])
    assert tokenizer.convert_ids_to_tokens(window.ids[1:-1]) == ["Ġa", "[UNK]", "Ġb"]


@both_tokenizers
def test_padding_keeps_documents_apart(tokenizer):
    texts = [TEXT, "", "but and", TEXT * 2]
    windows = Packer(tokenizer, 16, "padding")(texts)
    rest = list(windows)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        count = math.ceil(len(ids) / 14)
        assert inside(rest[:count]) == ids
        del rest[:count]
    assert rest == []


def test_special_tokens_are_told_by_the_texts_themselves():
    """This tokenizer knows no letter but G, A, T and C."""
    letters = {**{token: i for i, token in enumerate(SPECIAL.values())}, **dict(zip("GATC", range(4, 8), strict=True))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    ids = [(token, letters[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP] [CLS]", special_tokens=ids)
    windows = Packer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL), 5)(["n", "GATTACA"])
    assert [window.ids.tolist() for window in windows] == [[4, 5, 6, 3, 2], [6, 5, 7, 3, 2], [5, 3, 2]]


@pytest.mark.parametrize(("rest", "kept"), [(3, False), (4, True)])
def test_a_short_rest_of_a_document_is_dropped(rest, kept):
    # one token a letter; 14 fill a window of 16, and the rest counts its two special tokens
    windows = Packer(bpe(), 16, "padding", shortest_window=4)([" a" * (14 + rest - 2), " a"])
    assert [len(window.ids) for window in windows] == ([16, rest, 3] if kept else [16, 3])


def test_a_window_of_special_tokens_alone_is_left_out():
    assert Packer(bpe(), 16, "padding")(["[SEP][SEP]", ""]) == []


# --- masks


def long_window(tokenizer, tokens, whole_words=False):
    (window,) = Packer(tokenizer, tokens, whole_words=whole_words)([TEXT * (tokens // 40)])[:1]
    return window


def rng(seed=0):
    return np.random.default_rng(seed)


@both_tokenizers
@pytest.mark.parametrize("whole_words", [False, True], ids=["tokens", "words"])
def test_masks_are_those_of_bert(tokenizer, whole_words):
    window = long_window(tokenizer, 40_000, whole_words)
    masker = Masker.of(tokenizer, 0.15)
    ids, labels = masker(window, rng())
    chosen = labels != IGNORED
    units = len(set(window.words.tolist()) - {NO_WORD})
    assert len(set(window.words[chosen].tolist())) == round(0.15 * units)
    assert chosen.sum() == (pytest.approx(0.15 * len(ids), rel=0.04) if whole_words else round(0.15 * units))
    assert (labels[chosen] == window.ids[chosen]).all()
    assert (ids[~chosen] == window.ids[~chosen]).all()

    replaced = ids[chosen & (ids != window.ids)]
    masked = (replaced == tokenizer.mask_token_id).sum()
    vocabulary = len(tokenizer) - len(tokenizer.all_special_ids)
    deviation = math.sqrt(0.8 * 0.2 / chosen.sum())
    assert masked / chosen.sum() == pytest.approx(0.8, abs=4 * deviation)
    # a random token is the true one now and then
    others = (len(replaced) - masked) / chosen.sum()
    assert others == pytest.approx(0.1 * (1 - 1 / vocabulary), abs=4 * deviation)
    random_ids = set(replaced.tolist()) - {tokenizer.mask_token_id}
    assert not random_ids & set(tokenizer.all_special_ids)
    assert len(random_ids) > 0.1 * vocabulary


def test_every_window_has_something_to_predict():
    window = Window(np.array([2, 70, 71, 3]), np.array([NO_WORD, 0, 1, NO_WORD]))
    for seed in range(20):
        _, labels = Masker.of(bpe(), 0.15)(window, rng(seed))
        assert (labels != IGNORED).sum() == 1


@both_tokenizers
@pytest.mark.parametrize("side", ["right", "left"])
def test_special_tokens_and_padding_are_never_masked(tokenizer, side):
    texts = ["but [SEP] nobody [MASK] and [CLS] but", TEXT]
    data = RemaskedWindows(Packer(tokenizer, 64, "padding")(texts), Masker.of(tokenizer, 0.9), 0)
    collate = DataCollatorForTokenClassification(tokenizer)
    side, tokenizer.padding_side = tokenizer.padding_side, side
    plain = collate([{"input_ids": window.ids.tolist()} for window in data.windows])["input_ids"]
    special = torch.isin(plain, torch.tensor(tokenizer.all_special_ids))
    assert special[0].sum() > 5
    for epoch in range(20):
        data.set_epoch(epoch)
        batch = collate([data[0], data[1]])
        assert batch["attention_mask"].equal((plain != tokenizer.pad_token_id).long())
        assert (batch["labels"][special] == IGNORED).all()
        assert batch["input_ids"][special].equal(plain[special])
        assert ((batch["labels"] != IGNORED).sum(1) == (0.9 * (~special).sum(1)).round()).all()
    tokenizer.padding_side = side


@both_tokenizers
def test_words_are_masked_whole(tokenizer):
    window = long_window(tokenizer, 2000, whole_words=True)
    tokens = tokenizer.convert_ids_to_tokens(window.ids[1:-1])
    words = np.cumsum([starts_word(tokenizer, token) for token in tokens])
    _, labels = Masker.of(tokenizer, 0.15)(window, rng())
    chosen = (labels != IGNORED)[1:-1]
    shares = [chosen[words == word].mean() for word in set(words.tolist())]
    assert set(shares) == {0.0, 1.0}
    assert len(tokens) > 2 * len(shares)  # words have several tokens

    _, labels = Masker.of(tokenizer, 0.15)(long_window(tokenizer, 2000), rng())
    chosen = (labels != IGNORED)[1:-1]
    assert any(0 < chosen[words == word].mean() < 1 for word in set(words.tolist()))


def test_training_masks_are_new_in_every_epoch_and_the_others_are_fixed():
    tokenizer, texts = bpe(), [TEXT * 20]

    def labels(name, epoch=None, **values):
        data = TASK.make_windows(name, texts, tokenizer, 24, settings(whole_word=False, **values))
        if epoch is not None:
            data.set_epoch(epoch)
        return [item["labels"].tolist() for item in (data[i] for i in range(len(data)))]

    epochs = [labels("train", epoch) for epoch in range(3)]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        same = [a == b for a, b in zip(epochs[i], epochs[j], strict=True)]
        assert sum(same) < len(same) / 5
    assert labels("train", 1) == epochs[1]
    assert labels("train", 1, seed=1) != epochs[1]
    assert not hasattr(TASK.make_windows("validation", texts, tokenizer, 24, settings()), "set_epoch")
    for name in ("validation", "test"):
        assert labels(name) == labels(name, seed=1)
        assert labels(name) != labels(name, split_seed=1)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([8, 8], [[0], [1]]),
        ([3, 5, 6, 2], [[2, 3], [1, 0]]),  # 2 goes where it leaves nothing
        ([4, 4, 4, 3], [[0, 1], [2, 3]]),
        ([1] * 9, [[0, 1, 2, 3, 4, 5, 6, 7], [8]]),
    ],
)
def test_windows_are_packed_where_they_leave_the_least_room(lengths, rows):
    assert best_fit(lengths, 8) == rows


def test_rows_are_remade_of_windows_with_new_masks():
    values, tokenizer = settings(packing="best_fit", whole_word=False), bpe()
    data = TASK.make_windows("train", [TEXT * 4, " but", " and nobody"], tokenizer, 40, values)
    assert max(data.lengths) <= 40
    for epoch in range(2):
        data.set_epoch(epoch)
        for row in (data[i] for i in range(len(data))):
            starts = np.flatnonzero(row["position_ids"] == 0)
            assert row["input_ids"][starts].tolist() == [tokenizer.cls_token_id] * len(starts)
            assert row["input_ids"][[*starts[1:] - 1, -1]].tolist() == [tokenizer.sep_token_id] * len(starts)
            assert all((part != IGNORED).any() for part in np.split(row["labels"], starts[1:]))
    first = [data[i]["labels"].tolist() for i in range(len(data))]
    data.set_epoch(0)
    assert first != [data[i]["labels"].tolist() for i in range(len(data))]


def test_models_that_let_documents_read_each_other_are_refused():
    values = settings(packing="best_fit")
    sizes = {"vocab_size": 99, **{name: TINY["model"][name] for name in ("hidden_size", "num_hidden_layers")}}
    for kind, heads in (("bert", {"num_attention_heads": 2}), ("fnet", {})):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **sizes, **heads))
        with pytest.raises(InputError, match=f"packing .*a {kind} model they attend to each other: set packing to"):
            check_packing(model, values)
    check_packing(AutoModelForMaskedLM.from_config(AutoConfig.for_model("et_fnet", **sizes)), values)


# --- scores


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("packing", ["padding", "best_fit"])
def test_every_masked_token_counts_the_same(batch_size, packing, tmp_path):
    values = settings(eval_batch_size=batch_size, packing=packing, model=TINY["model"], out=str(tmp_path))
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


# --- runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path, corpus):
    return write_config(tmp_path, TINY, corpus)


def run(config, *overrides):
    return pretrain_mlm.run(MlmSettings.from_yaml(config, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """The folder of a run that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with redirect_stdout(io.StringIO()) as printed:
        train.main(["--config", str(write_config(folder, TINY, corpus, tracker="tensorboard"))])
    reset_accelerate()
    return folder / "out", printed.getvalue()


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
    values = settings(model={"checkpoint": "x"}, mask_token="<mask>")
    new = settings(model=TINY["model"])
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
    "length": (["--max_length=2"], r"max_length \(2\) leaves no room for text beside the special tokens .* \(2\)"),
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
        run(write_config(tmp_path, TINY, corpus, model={"model_type": "gpt2"}))


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

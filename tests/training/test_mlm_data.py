"""Data of masked language models: reading without labels, packing and masks."""

import math
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from language_runs import TINY_MLM, both_tokenizers, mlm_settings
from tokenizers import Tokenizer, models, processors
from training_runs import SPECIAL, TEXT, bpe, write_rows
from transformers import AutoConfig, AutoModelForMaskedLM, DataCollatorForTokenClassification, PreTrainedTokenizerFast

from efficient_transformers.training.data.masking import IGNORED, Masker, RemaskedWindows
from efficient_transformers.training.data.packing import NO_WORD, Packer, Window, best_fit
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks.language_models import check_packing
from efficient_transformers.training.tasks.pretrain_mlm import TASK


def starts_word(tokenizer, token):
    """By the marker, not by `word_ids`; holds for words of letters alone."""
    return token.startswith("Ġ") if "Ġthe" in tokenizer.get_vocab() else not token.startswith("##")


# --- reading


def test_text_needs_no_labels_and_no_document_is_in_two_splits(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(40)])
    splits = load_texts(mlm_settings(data=str(path)))
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 28, "validation": 6, "test": 6}
    assert sorted(chain(*splits.values())) == sorted(f"document {i}" for i in range(40))
    assert load_texts(mlm_settings(data=str(path), seed=7)) == splits
    assert load_texts(mlm_settings(data=str(path), split_seed=7)) != splits


def test_labels_of_a_hub_data_set_do_not_matter(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"train": [{"text": str(i), "label": 0} for i in range(30)], "test": [{"text": "withheld", "label": -1}]}
    loaded = {name: datasets.Dataset.from_list(split, features=features) for name, split in rows.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(loaded))
    splits = load_texts(mlm_settings(data="a/b"))
    assert splits["test"] == ["withheld"]
    assert sorted(splits["train"] + splits["validation"]) == sorted(str(i) for i in range(30))


def test_the_bundled_corpus_keeps_its_splits():
    splits = load_texts(mlm_settings())
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
        data = TASK.make_windows(name, texts, tokenizer, 24, mlm_settings(whole_word=False, **values))
        if epoch is not None:
            data.set_epoch(epoch)
        return [item["labels"].tolist() for item in (data[i] for i in range(len(data)))]

    epochs = [labels("train", epoch) for epoch in range(3)]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        same = [a == b for a, b in zip(epochs[i], epochs[j], strict=True)]
        assert sum(same) < len(same) / 5
    assert labels("train", 1) == epochs[1]
    assert labels("train", 1, seed=1) != epochs[1]
    assert not hasattr(TASK.make_windows("validation", texts, tokenizer, 24, mlm_settings()), "set_epoch")
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
    values, tokenizer = mlm_settings(packing="best_fit", whole_word=False), bpe()
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
    values = mlm_settings(packing="best_fit")
    sizes = {"vocab_size": 99, **{name: TINY_MLM["model"][name] for name in ("hidden_size", "num_hidden_layers")}}
    for kind, heads in (("bert", {"num_attention_heads": 2}), ("fnet", {})):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **sizes, **heads))
        with pytest.raises(InputError, match=f"packing .*a {kind} model they attend to each other: set packing to"):
            check_packing(model, values)
    check_packing(AutoModelForMaskedLM.from_config(AutoConfig.for_model("et_fnet", **sizes)), values)

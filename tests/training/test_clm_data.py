"""Data of causal language models: windows of documents, bytes of tokens, and tokenizers."""

import numpy as np
import pytest
from language_runs import byte_level, clm_settings
from tokenizers import Tokenizer, models, normalizers, processors
from training_runs import SPECIAL, TEXT, bpe, wordpiece
from transformers import AutoTokenizer, BertTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from efficient_transformers.training.data.causal import CausalPacker, byte_sizes
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.engine.building import build_config
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_clm
from efficient_transformers.training.tasks.pretrain_clm import load_open_tokenizer


def framed():
    """The same with a beginning and an end at every text."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=ids
    )
    return tokenizer


def byte_fallback():
    """A BPE of letters with Llama's frame, which spells what it does not know in bytes."""
    vocabulary = ["<unk>", "▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


# --- windows


WINDOWS = {
    # documents of 5, 0, 1 and 3 letters, a letter a token
    "frame, documents": (framed, "documents", 6, ["^abcde", "$^a$^a", "bc$"]),
    "frame, padding": (framed, "padding", 6, ["^abcde", "^a$", "^abc$"]),
    "end alone, documents": (byte_level, "documents", 4, ["abcd", "e$a$", "abc$"]),
    "end alone, padding": (byte_level, "padding", 4, ["abcd", "e$", "a$", "abc$"]),
    "a last token alone, documents": (byte_level, "documents", 11, ["abcde$a$abc"]),
    "a last token alone, padding": (byte_level, "padding", 5, ["abcde", "a$", "abc$"]),
}


@pytest.mark.parametrize(("make", "packing", "length", "expected"), WINDOWS.values(), ids=WINDOWS)
def test_documents_begin_and_end_where_they_do(make, packing, length, expected):
    tokenizer = make()
    windows = CausalPacker(tokenizer, length, packing)(["abcde", "", "a", "abc"])
    frame = {"<|begin|>": "^", "<|end|>": "$"}
    tokens = [tokenizer.convert_ids_to_tokens(window.ids) for window in windows]
    assert ["".join(frame.get(token, token) for token in window) for window in tokens] == expected


@pytest.mark.parametrize(("shortest", "kept"), [(4, True), (5, False)])
def test_a_short_rest_of_a_document_is_dropped(shortest, kept):
    # nine letters and the end fill a window of 6 and leave 4; the second document has no more than a short window
    windows = CausalPacker(byte_level(), 6, "padding", shortest)(["abcdefghi", "a"])
    assert [len(window.ids) for window in windows] == ([6, 4, 2] if kept else [6, 2])


def test_the_bundled_tokenizer_loses_nothing_of_the_corpus():
    tokenizer, texts = bpe(), load_texts(clm_settings())["test"][:5]
    ids = np.concatenate([window.ids for window in CausalPacker(tokenizer, 1024)(texts)])
    documents = "".join(f"[CLS]{text}[SEP]" for text in texts)
    assert tokenizer.decode(ids) in (documents, documents.removesuffix("[SEP]"))


# --- bytes


HELD = [
    # one token a byte
    ("ascii", byte_level(), "a b", [1, 1, 1]),
    ("letters cut", byte_level(), "é日🙂", [1] * 9),
    # Ð¶ is ж, Ð° is а: a token of the second byte of one letter and the first of the next
    ("a token of two halves", byte_level(("¶", "Ð")), "жжа", [1, 2, 2, 1]),
    ("space and half a letter", byte_level(("Ġ", "Ð")), "a ж", [1, 2, 1]),
    ("trimmed offsets", byte_level(("Ġ", "Ð"), trim_offsets=True), "a ж b", [1, 2, 1, 1, 1]),
    ("a space put in front", byte_level(add_prefix_space=True), "ж", [0, 1, 1]),
    ("composed", byte_level(normalizer=normalizers.NFC()), "e\u0301a", [0, 1, 3]),
    ("expanded", byte_level(normalizer=normalizers.NFKC()), "½a", [2, 0, 0, 0, 0, 1]),
    # what the tokenizer drops counts with what stands behind it, and at the end with the last token
    ("words", wordpiece(), "  BUT  and ", [5, 6]),
    ("pieces", wordpiece(), "nobody", [3, 3]),
    ("byte fallback", byte_fallback(), "aж b", [1, 1, 1, 1, 1]),
    ("byte fallback at first", byte_fallback(), "ж🙂", [0, 1, 1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("tokenizer", "text", "expected"), [case[1:] for case in HELD], ids=[case[0] for case in HELD])
def test_the_bytes_of_a_token(tokenizer, text, expected):
    encoding = tokenizer(text, add_special_tokens=False).encodings[0]
    assert byte_sizes(text, encoding).tolist() == expected
    assert sum(expected) == len(text.encode())


def test_the_bytes_of_the_corpus():
    tokenizer = bpe()
    for text in load_texts(clm_settings())["validation"][:5]:
        encoding = tokenizer(text, add_special_tokens=False).encodings[0]
        sizes = byte_sizes(text, encoding)
        assert sizes.tolist() == [len(token) for token in encoding.tokens]
        assert sizes.sum() == len(text.encode())


PREDICTED = [
    # windows of four bytes, of which the first is not predicted: 日日|日🙂|🙂$
    ("letters cut by windows", byte_level(), ["日日日🙂"], 4, [3, 3, 3, 0]),
    # ^aé|é$^|日$: special tokens have no bytes, those in the text itself neither
    ("special tokens", framed(), ["aéé", "日"], 4, [3, 1, 2]),
    ("special tokens in the text", bpe(), ["a[MASK]é"], 16, [3]),
    ("unknown words", wordpiece(), ["but xyz and"], 16, [7]),
    ("one window", wordpiece(), ["  but  "], 16, [7]),
]


@pytest.mark.parametrize(
    ("tokenizer", "texts", "length", "expected"), [case[1:] for case in PREDICTED], ids=[case[0] for case in PREDICTED]
)
def test_the_bytes_that_are_predicted(tokenizer, texts, length, expected):
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    windows = CausalPacker(tokenizer, length)(texts)
    assert [window.predicted_bytes for window in windows] == expected


def test_every_packing_predicts_the_bytes_of_its_texts():
    texts, tokenizer = ["é日 a" * 7, TEXT, "🙂"], bpe()
    whole = sum(len(text.encode()) for text in texts)
    for packing in ("documents", "padding"):
        windows = CausalPacker(tokenizer, 1000, packing)(texts)
        assert sum(window.predicted_bytes for window in windows) == whole  # [CLS] is the first token
        cut = CausalPacker(tokenizer, 7, packing)(texts)
        assert sum(int(window.sizes.sum()) for window in cut) == whole


# --- tokenizers


def bert_tokenizer():
    vocabulary = [*SPECIAL.values(), "[MASK]", "hello"]
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})


@pytest.mark.parametrize("make", [bpe, wordpiece, bert_tokenizer])
def test_a_saved_tokenizer_puts_no_end_behind_a_prompt(make, tmp_path):
    make().save_pretrained(tmp_path / "given")
    values = clm_settings(tokenizer=str(tmp_path / "given"))
    given = AutoTokenizer.from_pretrained(tmp_path / "given")
    opened = load_open_tokenizer(values, [TEXT, "hello"])
    opened.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "hello but nobody"
    assert given(text)["input_ids"] == [*saved(text)["input_ids"], saved.eos_token_id]
    assert saved.eos_token == "[SEP]"
    assert saved.get_vocab() == given.get_vocab()
    assert set(saved.all_special_tokens) == set(given.all_special_tokens)
    # a run that goes on from the folder sees the same windows
    values.tokenizer = str(tmp_path / "saved")
    windows = [CausalPacker(tokenizer, 8)([text, text]) for tokenizer in (opened, load_open_tokenizer(values, [text]))]
    assert [[window.ids.tolist() for window in ours] for ours in windows] == 2 * [
        [window.ids.tolist() for window in CausalPacker(saved, 8)([text, text])]
    ]


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    byte_level().save_pretrained(tmp_path)
    values = clm_settings(tokenizer=str(tmp_path))
    tokenizer = load_open_tokenizer(values, [TEXT])
    assert tokenizer.pad_token == "<|end|>"
    assert tokenizer("ab")["input_ids"] == tokenizer("ab", add_special_tokens=False)["input_ids"]
    config = build_config(values, tokenizer)
    model = pretrain_clm.TASK.build_model(values, config, tokenizer)
    # else the embedding of the end could be one that is never trained
    assert model.config.pad_token_id is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has neither an end token nor a separator .* set its eos_token"):
        load_open_tokenizer(clm_settings(tokenizer=str(tmp_path)), [TEXT])


def test_a_tokenizer_that_cannot_tell_bytes_is_refused(monkeypatch):
    monkeypatch.setattr(pretrain_clm, "load_tokenizer", lambda *arguments, **options: CanineTokenizer())
    with pytest.raises(InputError, match=r"does not report which bytes .* CanineTokenizer is not from the tokenizers"):
        load_open_tokenizer(clm_settings(), [TEXT])

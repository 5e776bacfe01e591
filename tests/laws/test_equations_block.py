"""Equations of what all variants share: embeddings, blocks, dropout, pooler, heads; and the precision of softmax."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from written_out import (
    DROPOUT,
    EXACT,
    Weights,
    agree,
    attention,
    build,
    dropped,
    encode,
    gelu,
    heads,
    join,
    past,
    rows,
    scaling_dropout,
    softmax,
)

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_kernel_attention import KernelConfig

every_variant = pytest.mark.parametrize("slug", VARIANTS)


def full(w, x, config):
    return w("o_proj", join(attention(*heads(w, x, config), past(len(x), config))))


# Blocks and embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize(
    "fields",
    [{"norm_first": False}, {"norm_first": True}, {"reversible": True}, {"chunk_size_feed_forward": 5}],
    ids=lambda fields: "".join(f"{name}={value}" for name, value in fields.items()),
)
def test_blocks(fields, causal):
    """Norms before the sublayers and once at the end, or after the sums; two streams; the MLP in pieces."""
    agree("full", full, is_decoder=causal, **fields)


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_new": lambda x: x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    agree("full", full, activation=ACTIVATIONS[name], hidden_act=name)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
def test_token_types(position):
    model = build("full", position_embedding_type=position)
    ids, mask = rows()
    types = torch.randint(2, ids.shape)
    padded = model(ids, mask, types).last_hidden_state
    for row, real in enumerate(mask.bool()):
        expected = encode(model, ids[row, real], full, types=types[row, real])
        torch.testing.assert_close(padded[row, real], expected, **EXACT)


def test_no_token_types():
    agree("full", full, type_vocab_size=0, position_embedding_type="none")


def test_constants():
    """What checkpoints of BERT and RoFormer rely on."""
    config = VARIANTS["full"].config_class()
    assert config.layer_norm_eps == 1e-12
    assert config.rope_theta == 10000
    assert (config.hidden_act, config.pooler_act) == ("gelu", "tanh")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.0)


def test_image_patches():
    """One linear map of each patch, patches row by row, and in a patch channels before pixels (Dosovitskiy et al.)."""
    fields = {"image_size": [6, 4], "patch_size": 2, "num_channels": 3, "num_labels": 3}
    model, pixels = build("full", "ImageClassification", **fields), torch.randn(2, 3, 6, 4).double()
    w = Weights(model.state_dict())
    logits = model(pixel_values=pixels).logits
    for row, image in enumerate(pixels):
        patches = [image[:, y : y + 2, x : x + 2].flatten() for y in (0, 2, 4) for x in (0, 2)]
        tokens = w("model.embeddings.patch_embeddings.projection", torch.stack(patches))
        pooled = encode(model.model, tokens, full).mean(0)
        torch.testing.assert_close(logits[row], w("classifier", w("model.pooler.dense", pooled).tanh()), **EXACT)


# Dropout --------------------------------------------------------------------------------------------------------------


EXTRA = {"routing": {"num_clusters": 2}, "big_bird": {"block_size": 4}}
WEIGHTED = [  # have attention weights to drop
    slug for slug, v in VARIANTS.items() if v.attention and not issubclass(v.config_class, KernelConfig)
]


def with_ones_at(slug: str, place: str):
    """A model in which the embeddings, all mixers or all MLPs return ones before dropout, and the others zeros."""
    model = build(slug, norm_first=True, **EXTRA.get(slug, {}))

    def constant(x, name):
        return torch.full_like(x, float(name == place))

    model.embeddings.dropout.register_forward_pre_hook(lambda m, args: (constant(args[0], "embeddings"),))
    for block in model.layers:
        block.mixer.register_forward_hook(lambda m, args, out: (constant(out[0], "mixer"), out[1]))
        if hasattr(block, "mlp"):
            block.mlp.register_forward_hook(lambda m, args, out: constant(out, "mlp"))
    return model


@every_variant
@pytest.mark.parametrize("place", ["embeddings", "mixer", "mlp"])
def test_dropout_of_hidden_states(slug, place):
    """After embeddings, mixer and MLP values are zero with probability p or over 1 - p in training, alone."""
    if place == "mlp" and slug == "gmlp":
        pytest.skip("a block without an MLP")
    model, ids = with_ones_at(slug, place), torch.ones(8, 32, dtype=torch.long)
    for training in (True, False):
        hidden = model.train(training)(ids, output_hidden_states=True).hidden_states[int(place != "embeddings")]
        if model.config.reversible and place != "embeddings":
            hidden = 2 * hidden  # the mean of two streams, one of which is zero
        share = (hidden == 0).double().mean().item()
        assert abs(share - DROPOUT) < 0.03 if training else share == 0
        kept = hidden[hidden != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - DROPOUT * training)))


@pytest.mark.parametrize("slug", WEIGHTED)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_of_attention_weights(slug, implementation):
    """Values that are all one come out as sums of the kept weights over 1 - p: one on average, and one in eval."""
    fields = {"attention_probs_dropout_prob": 0.5, "num_hidden_layers": 1, **EXTRA.get(slug, {})}
    fields |= {"compressed": {"attention_layers": ["compressed"]}}.get(slug, {})
    model = build(slug, attn_implementation=implementation, hidden_dropout_prob=0.0, **fields)
    mixer, seen = model.layers[0].mixer, []
    for name in ("v_proj", "global_v_proj"):
        if hasattr(mixer, name):
            getattr(mixer, name).weight.data.zero_()
            getattr(mixer, name).bias.data.fill_(1)
    if slug == "linformer":
        mixer.projections[0].weight.data.fill_(1 / 64)
    if slug == "compressed":
        mixer.convolution.data[1] = torch.eye(8).double() / 4
    mixer.o_proj.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
    ids = torch.randint(1, 50, (4, 64))
    for _ in range(8):
        model.train()(ids)
    drawn = torch.stack(seen)
    assert drawn.std() > 0.05
    assert abs(drawn.mean() - 1) < 0.05
    model.eval()(ids)
    torch.testing.assert_close(seen[-1], torch.ones_like(seen[-1]), **EXACT)


# Softmax in half precision --------------------------------------------------------------------------------------------


class Exponentials(TorchDispatchMode):
    """Records the dtypes in which softmax and feature maps are computed."""

    NAMES = "_softmax", "_log_softmax", "exp", "logsumexp", "_logcumsumexp", "elu", "cos"

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.NAMES and args[0].dim() > 2:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slug", [slug for slug, variant in VARIANTS.items() if variant.attention])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_eager_softmax_in_half_precision_is_computed_in_float32(slug, dtype, causal):
    """`softmax` of scores in half precision rounds every weight, and float16 overflows at 65,504."""
    if causal and not VARIANTS[slug].causal:
        pytest.skip("not causal")
    model = build(slug, is_decoder=causal, **EXTRA.get(slug, {})).to(dtype)
    ids = rows()[0]
    with torch.no_grad(), Exponentials() as seen:
        if causal:
            cache = None
            for start, stop in pairwise((0, 10, 11, 20)):
                cache = model(ids[:, start:stop], past_key_values=cache).past_key_values
        else:
            model(ids)
    assert seen.dtypes == {torch.float32}


# Pooler ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("slug", ["full", "global"])
def test_pooler(slug, pooling):
    """The mean, first or last real token, then BERT's dense layer and tanh; external tokens do not count."""
    fields = {"global": {"global_token_type": "external", "num_global_tokens": 2}}.get(slug, {})
    model, (ids, mask) = build(slug, classifier_pooling=pooling, **fields), rows()
    out = model(ids, mask)
    for row, real in enumerate(mask.bool()):
        hidden = out.last_hidden_state[row, real]
        pooled = {"mean": hidden.sum(0) / len(hidden), "cls": hidden[0], "last": hidden[-1]}[pooling]
        expected = Weights(model.state_dict())("pooler.dense", pooled).tanh()
        torch.testing.assert_close(out.pooler_output[row], expected, **EXACT)


def test_standardized_pooler():
    """(x - mean) / √(variance + 1e-5) of the examples of training so far, where later ones count more."""
    model, (ids, _) = build("full", standardize_pooled=True, hidden_dropout_prob=0.0), rows()
    dense, seen = Weights(model.state_dict()), []
    mean = variance = torch.zeros(32).double()
    for number, training in enumerate((False, *[True] * 6, False)):
        out = model.train(training)(ids[: 2 + number])
        pooled = out.last_hidden_state.mean(1)
        if training:  # statistics of both, weighted by the share of the new examples
            count, before = len(pooled), sum(seen)
            share = max(count / (before + count), 1 - 0.9**count)
            new, change = pooled.var(0, correction=0), pooled.mean(0) - mean
            variance = (1 - share) * variance + share * new + share * (1 - share) * change**2
            mean = mean + share * change
            seen.append(count)
        expected = (pooled - mean) / (variance + 1e-5) ** 0.5 if seen else pooled
        torch.testing.assert_close(out.pooler_output, dense("pooler.dense", expected).tanh(), **EXACT)


# Heads ----------------------------------------------------------------------------------------------------------------


def cross_entropy(logits, labels):
    """-log of the softmax at the label, mean over labels other than -100. transformers computes losses in float32."""
    chosen = softmax(logits)[labels != -100].gather(-1, labels[labels != -100][..., None])
    return -chosen.log().mean()


def hidden_of(model, ids):
    return torch.stack([encode(model.model, row, full) for row in ids])


def pooled_of(model, ids):
    return Weights(model.state_dict())("model.pooler.dense", hidden_of(model, ids).mean(-2)).tanh()


def test_masked_lm():
    """BERT's: dense, activation, norm, the word embeddings and a bias."""
    model, (ids, _) = build("full", "MaskedLM"), rows()
    w = Weights(model.state_dict())
    labels = ids.where(ids % 3 == 0, -100)
    out, hidden = model(ids, labels=labels), hidden_of(model, ids)
    hidden = w.norm("lm_head.norm", gelu(w("lm_head.dense", hidden)), model.config.layer_norm_eps)
    logits = hidden @ w["model.embeddings.word_embeddings.weight"].T + w["lm_head.decoder.bias"]
    torch.testing.assert_close(out.logits, logits, **EXACT)
    torch.testing.assert_close(
        out.loss.double(), cross_entropy(logits, labels), rtol=1e-5, atol=1e-5
    )  # a loss is float32


def test_causal_lm():
    """The word embeddings without a bias; token t predicts token t + 1."""
    model, (ids, _) = build("full", "CausalLM"), rows()
    out = model(ids, labels=ids)
    logits = hidden_of(model, ids) @ Weights(model.state_dict())["model.embeddings.word_embeddings.weight"].T
    torch.testing.assert_close(out.logits, logits, **EXACT)
    torch.testing.assert_close(out.loss.double(), cross_entropy(logits[:, :-1], ids[:, 1:]), rtol=1e-5, atol=1e-5)
    kept = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, logits[:, -2:], **EXACT)


def test_token_classification():
    model, (ids, _) = build("full", "TokenClassification", num_labels=3), rows()
    labels = (ids % 3).where(ids % 2 == 0, -100)
    out, logits = model(ids, labels=labels), Weights(model.state_dict())("classifier", hidden_of(model, ids))
    torch.testing.assert_close(out.logits, logits, **EXACT)
    torch.testing.assert_close(out.loss.double(), cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)


def test_question_answering():
    """Loss: the mean of those of start and end."""
    model, (ids, _) = build("full", "QuestionAnswering"), rows()
    starts, ends = torch.tensor([1, 5, 0, 7]), torch.tensor([3, 5, 2, 30])
    out = model(ids, start_positions=starts, end_positions=ends)
    logits = Weights(model.state_dict())("qa_outputs", hidden_of(model, ids))
    torch.testing.assert_close(torch.stack([out.start_logits, out.end_logits], -1), logits, **EXACT)
    loss = (cross_entropy(logits[..., 0], starts) + cross_entropy(logits[..., 1], ends)) / 2
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)


def test_multiple_choice():
    model, (ids, _) = build("full", "MultipleChoice"), rows()
    ids, labels = ids.view(2, 2, -1), torch.tensor([1, 0])
    out = model(ids, labels=labels)
    logits = Weights(model.state_dict())("classifier", pooled_of(model, ids.flatten(0, 1)))[:, 0].view(2, 2)
    torch.testing.assert_close(out.logits, logits, **EXACT)
    torch.testing.assert_close(out.loss.double(), cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_sequence_classification(kind):
    """Cross-entropy, binary cross-entropy of each label, or mean squared error."""
    model, (ids, _) = build("full", "SequenceClassification", num_labels=3, problem_type=kind), rows()
    labels = torch.tensor([2, 0, 1, 1])
    if kind != "single_label_classification":
        labels = torch.randn(4, 3).double() if kind == "regression" else F.one_hot(labels, 3).double()
    out, logits = model(ids, labels=labels), Weights(model.state_dict())("classifier", pooled_of(model, ids))
    torch.testing.assert_close(out.logits, logits, **EXACT)
    chances = 1 / (1 + (-logits).exp())
    loss = {
        "single_label_classification": lambda: cross_entropy(logits, labels),
        "multi_label_classification": lambda: -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean(),
        "regression": lambda: (logits - labels).square().mean(),
    }[kind]()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MultipleChoice"])
def test_classifier_dropout(head):
    """Before the classifier, at its own rate, or at that of the hidden states where that is None."""
    for rate in (0.5, None):
        model, (ids, _) = build("full", head, num_labels=3, classifier_dropout=rate).train(), rows()
        ids = ids[:, None] if head == "MultipleChoice" else ids
        with scaling_dropout():
            logits = model(ids).logits
        hidden = torch.stack([encode(model.model, row.flatten(), full, drop=dropped) for row in ids])
        w = Weights(model.state_dict())
        if head != "TokenClassification":
            hidden = w("model.pooler.dense", hidden.mean(1)).tanh()
        expected = w("classifier", hidden * (1 - (DROPOUT if rate is None else rate)))
        torch.testing.assert_close(logits, expected.view_as(logits), **EXACT)


def test_longformer_judges_by_its_first_token_or_the_question():
    """Section 3.1: global attention on the first token for classification, on the question for answering."""
    judge = build("longformer", "SequenceClassification", attention_window=4)
    assert judge.config.num_global_tokens == 1
    model, (ids, _) = build("longformer", "QuestionAnswering", attention_window=4, sep_token_id=49), rows()
    ids = ids.masked_fill(ids == 49, 1)
    ids[:, 6] = 49
    marks = torch.zeros_like(ids)
    marks[:, :6] = 1
    by_hand = model(ids, global_attention_mask=marks)
    torch.testing.assert_close(model(ids).start_logits, by_hand.start_logits, **EXACT)
    nothing = model(ids, global_attention_mask=torch.zeros_like(ids))
    assert not torch.allclose(nothing.start_logits, by_hand.start_logits)

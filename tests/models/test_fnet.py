"""FNet: three ways to one transform, and transformers' own model with the same weights."""

import pytest
import torch
import transformers
from their_models import HEADS, THEIR_SIZES, close, compare_gradients, exact, padded_batch
from zoo import ConfigRefused, build, config, probed

from efficient_transformers import VARIANTS
from efficient_transformers.conversion import convert
from efficient_transformers.models.ops_fourier import fourier_mix, fourier_mix_chirp, fourier_mix_dense

FNET = VARIANTS["fnet"]
WAYS = {
    "fast": lambda x, keep: fourier_mix(x, keep.sum(1).tolist()),
    "chirp": fourier_mix_chirp,
    "dense": fourier_mix_dense,
}
SHAPES = [
    pytest.param([1], 6, id="one-token"),
    pytest.param([7, 7], 1, id="one-feature"),
    pytest.param([12, 5, 0, 12, 1, 2], 9, id="odd-features"),
    pytest.param([127, 61, 64], 8, id="primes"),
]


def batch(lengths, size, dtype=torch.float64):
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*keep.shape, size, dtype=dtype), keep


@pytest.mark.parametrize("mix", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("lengths", "size"), SHAPES)
def test_each_row_is_transformed_at_its_own_length(mix, lengths, size):
    x, keep = batch(lengths, size)
    expected, gradient = torch.zeros_like(x), torch.randn_like(x)
    alone = x.clone().requires_grad_()
    for row, length in enumerate(lengths):
        expected[row, :length] = torch.fft.fft2(alone[row, :length]).real if length else 0
    (alone_grad,) = torch.autograd.grad(expected, alone, gradient)
    x.requires_grad_()
    mixed = mix(x, keep)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(mixed, x, gradient)[0], alone_grad, rtol=0, atol=1e-11)


def test_the_second_derivative_is_there():
    x, keep = batch([5, 3], 4)
    assert torch.autograd.gradgradcheck(lambda x: WAYS["fast"](x, keep) ** 2, x.requires_grad_())


@pytest.mark.parametrize("mix", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(mix, dtype):
    x, keep = batch([61, 32], 16, dtype)
    assert mix(x, keep).dtype == dtype
    torch.testing.assert_close(mix(x, keep), mix(x.float(), keep).to(dtype))


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    x = torch.randn(2, 50, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        fourier_mix(x, [50, 20])
        assert not kept
        torch.fft.fft2(x).real.square()  # the hook sees what others keep
    assert kept


def test_a_model_without_a_mask_is_exported_at_any_length():
    model = build(FNET, {}, dtype=torch.float32)
    ids = torch.randint(99, (2, 50))
    length = {"input_ids": {1: torch.export.Dim("n", min=2, max=128)}}
    program = torch.export.export(model, (ids,), dynamic_shapes=length).module()
    for ids in (torch.randint(99, (2, n)) for n in (2, 7, 128)):
        expected = model(ids).last_hidden_state
        torch.testing.assert_close(program(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_it_cannot_be_causal():
    with pytest.raises(ConfigRefused, match="FNet cannot be causal"):
        config(FNET, {"is_decoder": True})
    changed = config(FNET, {})
    changed.is_decoder = True
    with pytest.raises(ValueError, match="FNet cannot be causal"):
        FNET.model_class()(changed)


# transformers' -------------------------------------------------------------------------------------------------------


def theirs(head=None, dtype=torch.float64, suffix=None):
    sizes = {name: size for name, size in THEIR_SIZES.items() if not name.startswith(("num_attention", "attention"))}
    cfg = transformers.FNetConfig(**sizes, max_position_embeddings=131, type_vocab_size=4, pad_token_id=1)
    cfg.num_labels = 2 if head == "QuestionAnswering" else 3
    model = getattr(transformers, "FNet" + (suffix or (f"For{head}" if head else "Model")))(cfg)
    for parameter in model.parameters():  # transformers initialises biases to 0 and norms to 1, which hides mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.to(dtype).eval()


@exact
@pytest.mark.parametrize("length", [1, 2, 61, 64, 131])
def test_the_whole_model_is_theirs(length, dtype, tolerance):
    """Hidden states of all layers, pooled vector and gradients of all weights."""
    source = theirs(dtype=dtype)
    ours = convert(source, "fnet")
    assert not ours.report.created
    assert not ours.report.left
    ids, types = torch.randint(3, 99, (3, length)), torch.randint(0, 4, (3, length))
    expected, actual = (m(ids, token_type_ids=types, output_hidden_states=True) for m in (source, ours.model))
    for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(one, other, tolerance)
    close(actual.pooler_output, expected.pooler_output, tolerance)
    for output in (expected, actual):
        probed(output.last_hidden_state).backward()
    compared = compare_gradients(source, ours, 10 * tolerance)
    assert any("projection" in name for name in compared)


@exact
@pytest.mark.parametrize("head", HEADS)
def test_their_heads_are_ours(head, dtype, tolerance):
    source = theirs(head, dtype)
    ours = convert(source, "fnet").model
    assert type(ours).__name__ == f"EtFnetFor{head}"
    ids = torch.randint(3, 99, (3, 2, 61) if head == "MultipleChoice" else (3, 61))
    expected, actual = source(ids), ours(ids)
    for name in ("logits", "start_logits", "end_logits"):
        if name in expected:
            close(actual[name], expected[name], tolerance)


@pytest.mark.parametrize("head", HEADS)
def test_with_padding_ours_says_what_theirs_says_without(head):
    """Theirs transforms the padding, too, and takes the first place of a row for its first token."""
    source = theirs(head)
    ours = convert(source, "fnet").model
    ids, mask = padded_batch()
    shape = (3, 2, -1) if head == "MultipleChoice" else (3, -1)
    wide_ids, wide_mask = (x.view(3, *[1] * (len(shape) - 2), -1).expand(*shape).contiguous() for x in (ids, mask))
    together, padded = ours(wide_ids, attention_mask=wide_mask), source(wide_ids, attention_mask=wide_mask)
    for row in range(3):
        real = mask[row].bool()
        alone = source(wide_ids[row : row + 1, ..., real])
        for name in ("logits", "start_logits", "end_logits"):
            if name not in alone:
                continue
            outputs = [output[name][row] for output in (together, padded)]
            if outputs[0].shape[0] == len(real):
                outputs = [output[real] for output in outputs]
            close(outputs[0], alone[name][0], 1e-10)
            if row:
                with pytest.raises(AssertionError):
                    close(outputs[1], alone[name][0], 1e-3)


def test_their_pretraining_checkpoint_is_a_masked_model(tmp_path):
    theirs(dtype=torch.float32, suffix="ForPreTraining").save_pretrained(tmp_path)
    conversion = convert(tmp_path, "fnet")
    assert type(conversion.model).__name__ == "EtFnetForMaskedLM"
    assert conversion.model.config.embedding_projection
    assert {name.split(".")[-2] for name in conversion.report.left} == {"dense", "seq_relationship"}
    ids = torch.randint(3, 99, (2, 61))
    expected = transformers.FNetForMaskedLM.from_pretrained(tmp_path).eval()(ids)
    close(conversion.model(ids).logits, expected.logits, 1e-5)


def test_an_fnet_has_no_weights_for_attention():
    with pytest.raises(ValueError, match="et_full cannot hold the source's 'embeddings"):
        convert(theirs(), "full")


def test_bert_leaves_its_attention_behind():
    """All else is there: words, positions, norms, feed-forward, pooler."""
    sizes = {**THEIR_SIZES, "attention_probs_dropout_prob": 0.1}
    source = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=70)).double().eval()
    conversion = convert(source, "fnet")
    assert not conversion.report.created
    assert len(conversion.report.left) == 2 * 8
    assert "attention.self.query.weight (2 layers): the variant has no attention" in str(conversion.report)
    assert "attention_probs_dropout_prob is 0" in conversion.report.notes[0]
    assert set(conversion.report.copied) == set(conversion.model.state_dict())
    assert not conversion.model.config.embedding_projection
    ids = torch.randint(3, 99, (1, 61))
    expected = source.embeddings(ids)
    for layer in source.encoder.layer:
        expected = layer.attention.output.LayerNorm(expected + torch.fft.fft2(expected).real)
        expected = layer.output(layer.intermediate(expected), expected)
    close(conversion.model(ids).last_hidden_state, expected, 1e-10)

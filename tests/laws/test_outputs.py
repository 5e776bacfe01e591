"""What a forward returns: hidden states, tuples, embeddings, losses, and the same under checkpointing or chunking."""

from copy import deepcopy

import pytest
import torch
from zoo import SETTINGS, build, every_case, every_head, every_variant, inputs, inputs_of, probed

from efficient_transformers import VARIANTS

pytestmark = pytest.mark.usefixtures("never_short")


@every_variant
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant):
    model = build(variant, SETTINGS[variant.slug][0], "SequenceClassification", hidden_dropout_prob=0.1).train()
    ids = inputs(2, 40)
    grads, start = [], deepcopy(model.state_dict())
    for checkpointing in (False, True):
        model.load_state_dict(start)  # buffers may move with each pass
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=torch.tensor([0, 1])).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_case
def test_hidden_states_are_complete_and_in_the_graph(variant, settings):
    model = build(variant, settings)
    ids = inputs(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    outputs = model(ids, attention_mask=mask, output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 21, 32)] * 3
    assert outputs.hidden_states[-1].equal(outputs.last_hidden_state)
    outputs.hidden_states[0].retain_grad()
    probed(outputs.last_hidden_state).backward()
    grad = outputs.hidden_states[0].grad
    assert (grad.abs().sum(-1) > 0).equal(mask.bool())
    as_tuple = model(ids, attention_mask=mask, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].equal(outputs.last_hidden_state)


@every_head
def test_tuples_and_embeddings_say_the_same(variant, head):
    model = build(variant, SETTINGS[variant.slug][0], head)
    ids = inputs_of(model, 2, 9)
    expected = model(ids)
    assert model(ids, return_dict=False)[0].equal(expected[0])
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert embedded[0].equal(expected[0])


@pytest.mark.parametrize("head", ["MaskedLM", "CausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized_and_tied(head, tied):
    model = build(VARIANTS["local"], {}, head, tie_word_embeddings=tied)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == tied
    for size in (120, 50):
        model.resize_token_embeddings(size)
        assert model(inputs(1, 7, 50)).logits.shape[-1] == model.config.vocab_size == size
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_sparse_prediction_is_the_same_training_for_fewer_logits():
    """Loss and gradients of all logits; in evaluation, and without labels, all of them are given."""
    model = build(VARIANTS["local"], {}, "MaskedLM").train()
    ids = inputs(2, 11)
    labels = ids.where(torch.arange(11) % 3 == 0, -100)
    gradients = {}
    for sparse in (False, True):
        model.config.sparse_prediction = sparse
        model.zero_grad()
        output = model(ids, labels=labels)
        output.loss.backward()
        assert output.logits.shape == ((8, 99) if sparse else (2, 11, 99))
        gradients[sparse] = [output.loss.detach(), *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(gradients[True], gradients[False])
    assert model(ids).logits.shape == model.eval()(ids, labels=labels).logits.shape == (2, 11, 99)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_sequence_classification_honours_the_problem_type(problem):
    labels = {
        "regression": torch.randn(3, 3),
        "single_label_classification": torch.tensor([0, 2, 1]),
        "multi_label_classification": torch.randint(0, 2, (3, 3)).float(),
    }[problem]
    model = build(
        VARIANTS["local"], {}, "SequenceClassification", num_labels=3, problem_type=problem, dtype=torch.float32
    )
    output = model(inputs(3, 9), labels=labels)
    functions = {
        "regression": torch.nn.functional.mse_loss,
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
    }
    torch.testing.assert_close(output.loss, functions[problem](output.logits, labels))


@every_variant
def test_chunked_feed_forward_changes_nothing(variant):
    model = build(variant, SETTINGS[variant.slug][0])
    chunked = build(variant, SETTINGS[variant.slug][0], chunk_size_feed_forward=7)
    chunked.load_state_dict(model.state_dict())
    ids = inputs(2, 30)
    torch.testing.assert_close(chunked(ids).last_hidden_state, model(ids).last_hidden_state)

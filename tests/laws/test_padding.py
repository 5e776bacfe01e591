"""Padding and the other documents of a packed row change nothing."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from zoo import MODES, SETTINGS, build, every_case, inputs, pack_rows, probed, used_parameters

from efficient_transformers import VARIANTS

pytestmark = pytest.mark.usefixtures("never_short")


@every_case
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_nothing(variant, settings, implementation):
    model = build(variant, settings)
    model.set_attn_implementation(implementation)
    real = inputs(1, 70)
    alone = model(real)
    places = {
        "right": torch.arange(70),
        "left": torch.arange(70) + 31,
        "holes": torch.randperm(101)[:70].sort().values,
    }
    ids, mask = inputs(5, 101), torch.zeros(5, 101, dtype=torch.long)
    for row, place in enumerate(places.values()):
        ids[row, place], mask[row, place] = real, 1
    mask[3, :99] = 1  # somebody else; the last row is nothing but padding
    output = model(ids, attention_mask=mask)
    for row, (where, place) in enumerate(places.items()):
        torch.testing.assert_close(
            output.last_hidden_state[row, place], alone.last_hidden_state[0], rtol=1e-10, atol=1e-10, msg=where
        )
        torch.testing.assert_close(output.pooler_output[row], alone.pooler_output[0], rtol=1e-10, atol=1e-10, msg=where)
    assert output.last_hidden_state[4].abs().max() == 0
    assert output.last_hidden_state.isfinite().all()
    assert output.pooler_output.isfinite().all()
    poisoned = torch.where(mask.bool(), ids, inputs(5, 101))
    assert model(poisoned, attention_mask=mask).last_hidden_state.equal(output.last_hidden_state)


@every_case
def test_gradients_do_not_leave_the_padding(variant, settings):
    model = build(variant, settings)
    embeds = torch.randn(1, 50, model.config.embedding_width, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(50) >= 13).long()[None]
    probed(model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state).backward()
    assert embeds.grad[0, :13].abs().max() == 0
    assert embeds.grad.isfinite().all()
    assert (embeds.grad[0, 13:].abs().sum(-1) > 0).all()


# --- documents in one row


ROWS = [[40, 1, 5, 33], [61], [30, 3]]  # lengths of documents, in an order in which no two groups of them lie


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
def test_packed_documents_give_what_they_give_alone(variant, settings, decoder):
    model = build(variant, settings, is_decoder=decoder)
    rows = [[inputs(1, length) for length in lengths] for lengths in ROWS]
    packed = pack_rows(*rows, width=82)
    packed["token_type_ids"] = types = packed["input_ids"] % 2 if model.config.type_vocab_size else None
    together = model(**packed, output_hidden_states=True)
    documents = [document for row in rows for document in row]
    alone = [
        model(document, token_type_ids=None if types is None else document % 2, output_hidden_states=True)
        for document in documents
    ]
    real = packed["attention_mask"].bool()
    outputs = [*together.hidden_states, together.last_hidden_state]
    singles = [torch.cat([x[0] for x in layer]) for layer in zip(*(a.hidden_states for a in alone), strict=True)]
    for ours, theirs in zip(outputs, [*singles, singles[-1]], strict=True):
        assert ours.shape == (3, 82, 32)
        torch.testing.assert_close(ours[real], theirs, rtol=1e-10, atol=1e-10)
        assert ours[~real].abs().max() == 0
    pooled = torch.cat([a.pooler_output for a in alone])
    torch.testing.assert_close(together.pooler_output, pooled, rtol=1e-10, atol=1e-10)

    probe, parameters = torch.randn_like(singles[-1]), used_parameters(model)
    grads = [torch.autograd.grad((x * probe).sum(), parameters) for x in (outputs[-1][real], singles[-1])]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("slug", ["local", "reformer", "routing", "linformer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_train_as_a_padded_batch(slug, checkpointing):
    """The same gradients, also where layers run twice, and the same moves of what no gradient moves."""
    settings = SETTINGS[slug][-1]  # of local, linformer: reversible
    model = build(VARIANTS[slug], settings, "MaskedLM").train()
    other = deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    documents = [inputs(1, length) for length in (40, 1, 9)]
    packed = pack_rows(documents, width=50)
    padded = pack_rows(*([document] for document in documents), width=40)
    assert packed.pop("attention_mask").all()  # as transformers' collators leave it out
    del padded["position_ids"]
    for trained, batch in ((model, packed), (other, padded)):
        labels = torch.where(batch["input_ids"] % 3 == 1, batch["input_ids"], -100)
        torch.manual_seed(4)  # the same draws for those that make any
        trained(**batch, labels=labels).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("slug", [v.slug for v in VARIANTS.values() if v.model_class().has_marked_tokens])
def test_marked_tokens_of_packed_documents_are_their_own(slug):
    model = build(VARIANTS[slug], SETTINGS[slug][1])
    documents = [inputs(1, length) for length in (30, 7, 20)]
    marks = [(document % 5 == 0).long() for document in documents]
    together = model(**pack_rows(documents, width=57), global_attention_mask=torch.cat(marks, 1)).last_hidden_state
    alone = [model(d, global_attention_mask=m).last_hidden_state for d, m in zip(documents, marks, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


def test_positions_that_do_not_start_again_divide_nothing():
    """An offset, a gap, another first position, anything at padding on the left: each row is one document."""
    model, real = build(VARIANTS["fnet"], {}), inputs(1, 10)  # in which every token reads every other
    for first in (torch.arange(10) + 7, torch.arange(10) * 3, torch.arange(10).where(torch.arange(10) < 6, 40)):
        together = model(real, position_ids=first[None]).last_hidden_state
        embeds = model.get_input_embeddings()(real).detach()
        embeds[0, -1] = torch.randn(32)
        assert (model(inputs_embeds=embeds, position_ids=first[None]).last_hidden_state != together).any(-1).all()
    mask = (torch.arange(14) >= 4).long()[None]
    for filler in (0, 1):
        positions = torch.cat([torch.full((4,), filler), torch.arange(10)])[None]
        output = model(nn.functional.pad(real, (4, 0)), mask, position_ids=positions).last_hidden_state[:, 4:]
        torch.testing.assert_close(output, model(real).last_hidden_state, rtol=1e-10, atol=1e-10)


def test_compiled_models_keep_documents_apart():
    torch.compiler.reset()
    model = build(VARIANTS["full"], {}, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ([12, 8], [20], [3, 4, 13]):
        batch = pack_rows([inputs(1, length) for length in lengths], width=20)
        with torch.no_grad():
            expected, actual = (m(**batch).last_hidden_state for m in (model, compiled))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

"""What every variant promises, run over the table of variants. A capability is a column there, never a skip here."""

import io
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from zoo import (
    CASES,
    IDS,
    MODES,
    SETTINGS,
    SMALL,
    ConfigRefused,
    build,
    bytes_kept,
    can_be_causal,
    config,
    counted_flops,
    every_case,
    every_head,
    every_variant,
    for_head,
    gradients_in_both_precisions,
    inputs,
    inputs_of,
    one_layer,
    pack_rows,
    probed,
    readable,
    used_parameters,
)

import efficient_transformers
from efficient_transformers import VARIANTS, AttentionPattern, costs
from efficient_transformers.models import attn_pattern
from efficient_transformers.models import attn_pattern_tiled as engine
from efficient_transformers.models.attn_pattern import group_heads
from efficient_transformers.models.base_configuration import PatternConfig
from efficient_transformers.models.base_kernel_attention import KernelConfig
from efficient_transformers.models.modeling_compressed import EtCompressedConfig


@pytest.fixture(autouse=True)
def never_short(monkeypatch):
    """Let short test sequences take the path of long ones."""
    for module in (engine, attn_pattern):
        monkeypatch.setattr(module, "is_short", lambda pattern, *sizes: pattern.is_full)


def test_the_table_is_complete():
    assert SETTINGS.keys() == VARIANTS.keys()
    for variant in VARIANTS.values():
        for head in (None, *variant.heads):
            name = variant.model_class(head).__name__
            assert name in efficient_transformers.__all__
            assert getattr(efficient_transformers, name) is variant.model_class(head)


# 1 · equal to its formula -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
@pytest.mark.parametrize("length", [1, 2, 67, 125])
def test_the_efficient_path_equals_the_written_out_one(variant, settings, length, decoder):
    model = build(variant, settings, is_decoder=decoder)
    ids = inputs(2, length)
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        outputs.append((hidden, torch.autograd.grad(probed(hidden[-1]), used_parameters(model))))
    (sparse, sparse_grads), (dense, dense_grads) = outputs
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_short_mixed_heads_take_one_dense_product(monkeypatch):
    """All kinds of heads in one call, the same numbers."""
    model = build(VARIANTS["mixed"], SETTINGS["mixed"][0])
    ids = inputs(2, 40)
    expected = model(ids).last_hidden_state
    for module in (engine, attn_pattern):
        monkeypatch.setattr(module, "is_short", lambda *sizes: True)
    monkeypatch.setattr(attn_pattern, "tiled_attention", None)
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
def test_training_follows_inference(variant, settings, short, monkeypatch):
    """Masks are kept between calls; those made in inference mode must not spoil a backward."""
    if short:
        for module in (engine, attn_pattern):
            monkeypatch.setattr(module, "is_short", lambda *sizes: True)
    model = build(variant, settings)
    length = 71 if short else 73  # lengths that no other test has made masks for
    ids = inputs(2, length)
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
    output = model(ids).last_hidden_state
    probed(output).backward()
    assert output.equal(expected)


# 2 · padding changes nothing ----------------------------------------------------------------------------------------


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


# documents in one row -------------------------------------------------------------------------------------------------


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


# 3, 4 · causal means causal, the pattern is the pattern -------------------------------------------------------------


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
def test_an_output_depends_on_just_what_the_pattern_shows(variant, settings, decoder):
    model = build(variant, settings, **one_layer(settings), use_cache=False, is_decoder=decoder)
    length, external = 24, getattr(model.config, "num_external_tokens", 0)
    embeds = torch.randn(1, length, model.config.embedding_width, dtype=torch.float64)
    if variant.chooses:  # whom a token reads depends on what stands there
        weights = model(inputs_embeds=embeds, output_attentions=True).attentions[0][0]
        expected = (weights > 0).any(0) | torch.eye(length, dtype=torch.bool)  # a residual goes around the attention
    else:
        expected = drawn_mask(model, length + external).any(0)[external:, external:]
    assert readable(model, embeds).equal(expected)
    if decoder:
        assert not expected.triu(1).any()


def patterns_of(cfg, layer: int) -> list[AttentionPattern]:
    """Who reads whom; through a feature map everybody reads everything."""
    if isinstance(cfg, PatternConfig):
        return cfg.attention_patterns(layer)
    return [AttentionPattern(window=None, causal=cfg.is_decoder)]


def drawn_mask(model, length):
    """(h, n, n) of the first layer, with the heads in the order of their groups."""
    table, masks = getattr(model.layers[0].mixer, "random_blocks", None), []
    for pattern, heads in group_heads(patterns_of(model.config, 0), 4):
        if isinstance(model.config, EtCompressedConfig) and model.config.kind(0) == "compressed" and pattern.causal:
            whole = (torch.arange(length) + 1) // model.config.compression_factor * model.config.compression_factor
            masks.append((torch.arange(length) < whole[:, None]) | torch.eye(length, dtype=torch.bool))
            masks[-1] = masks[-1].expand(len(heads), -1, -1)
            continue
        if table is None:
            masks.append(pattern.dense(length, len(heads)))
            continue
        mask = replace(pattern, num_random_blocks=0).dense(length, len(heads))
        for head, block, key in ((h, i, j) for h in heads for i in range(table.shape[1]) for j in table[h, i].tolist()):
            rows, columns = (slice(b * pattern.block_size, (b + 1) * pattern.block_size) for b in (block, key))
            mask = mask.clone()
            mask[heads.index(head), rows, columns] |= key >= 0
        masks.append(mask)
    return torch.cat(masks)


def test_marked_tokens_read_and_are_read_by_everything():
    model = build(VARIANTS["global"], {"num_global_tokens": 0, "num_hidden_layers": 1})
    marked = torch.zeros(1, 12, dtype=torch.long)
    marked[0, [3, 7]] = 1
    embeds = torch.randn(1, 12, 32, dtype=torch.float64, requires_grad=True)
    output = model(inputs_embeds=embeds, global_attention_mask=marked).last_hidden_state[0]
    probe = torch.randn(32, dtype=torch.float64)
    grads = [torch.autograd.grad(row @ probe, embeds, retain_graph=True)[0][0].abs().sum(-1) > 0 for row in output]
    expected = torch.eye(12, dtype=torch.bool)
    expected[[3, 7]] = expected[:, [3, 7]] = True
    assert torch.stack(grads).equal(expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.attention], ids=lambda v: v.slug)
def test_attentions_are_the_weights_of_the_pattern(variant):
    model = build(variant, SETTINGS[variant.slug][0])
    ids, mask = inputs(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    outputs = model(ids, attention_mask=mask, output_attentions=True)
    assert len(outputs.attentions) == 2
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 20, 20)
        assert weights[0, :, :6].abs().max() == weights[0, :, :, :6].abs().max() == 0
        if variant.normalised:
            torch.testing.assert_close(weights.sum(-1), mask[:, None].expand(-1, 4, -1).double())
    torch.testing.assert_close(outputs.last_hidden_state, model(ids, attention_mask=mask).last_hidden_state)
    outputs = model(ids, output_attentions=True)
    outputs.attentions[0].retain_grad()
    probed(outputs.last_hidden_state).backward()
    assert outputs.attentions[0].grad.abs().max() > 0


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if not v.attention], ids=lambda v: v.slug)
def test_without_attention_there_are_no_attentions(variant):
    model, ids = build(variant, SETTINGS[variant.slug][0]), inputs(2, 20)
    outputs = model(ids, output_attentions=True)
    assert outputs.attentions is None
    assert outputs.last_hidden_state.equal(model(ids).last_hidden_state)
    for field, value in (("position_embedding_type", "rotary"), ("attention_probs_dropout_prob", 0.1)):
        with pytest.raises(ConfigRefused, match=f"{field} .{value!r}?.*no queries to turn and no attention weights"):
            config(variant, {field: value})


# 5 · any length ------------------------------------------------------------------------------------------------------


@every_case
def test_every_length_up_to_the_stated_one(variant, settings):
    model = build(variant, settings, max_position_embeddings=40)
    for length in (*range(1, 41), 3):
        assert model(inputs(1, length)).last_hidden_state.shape == (1, length, 32)
    with pytest.raises(ValueError, match="built for 40 positions and got 41: set max_position_embeddings"):
        model(inputs(1, 41))


# 6 · half precision --------------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_at_8192_tokens(variant, dtype, same_choices):
    shape = {"max_position_embeddings": 8192, "num_hidden_layers": 1, "initializer_range": 0.1}
    settings = variant.config_class(**{**SMALL, **shape}).to_dict()
    model = build(
        variant, {k: v for k, v in settings.items() if k in ("window_size", "stride", "head_patterns")}, **shape
    )
    ids = inputs(1, 8192)
    with torch.no_grad():
        rounded = deepcopy(model).to(dtype)(ids).last_hidden_state
        exact = model(ids).last_hidden_state
        exact_of_rounded = deepcopy(model).to(dtype).double()(ids).last_hidden_state
    assert rounded.isfinite().all()
    error = (rounded.double() - exact_of_rounded).abs().max().item()
    budget = 16 * torch.finfo(dtype).eps * exact.abs().max().item()  # a layer rounds at some sixteen places
    assert error <= budget, f"error {error:.2e} over budget {budget:.2e}"


@every_case
def test_autocast_trains(variant, settings, same_choices):
    """Mixed precision as accelerate does it: products in bfloat16, weights and their gradients in float32."""
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, initializer_range=0.1).train()
    ids, labels = inputs(2, 60), torch.tensor([0, 1])
    grads = gradients_in_both_precisions(model, ids, labels)
    assert grads[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
@pytest.mark.parametrize("length", [61, 128])
def test_counted_flops_equal_costs(variant, settings, length, decoder):
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, is_decoder=decoder, use_cache=False)
    assert counted_flops(model, length) == costs.forward_flops(model, length)


@every_case
def test_the_pairs_in_costs_are_those_of_the_mask(variant, settings):
    cfg = config(variant, settings)
    for layer in range(2):
        for pattern in patterns_of(cfg, layer):
            for length in (1, 30, 61):
                assert costs.pairs(pattern, length) == pattern.dense(length).sum().item()


@pytest.mark.parametrize(
    ("slug", "fields", "most"),
    [
        # doubling the length doubles the cost of a window, of some hops, of some global tokens
        ("local", {"window_size": 64}, 2.1),
        ("stride", {"stride": 64, "hops": 2}, 2.1),
        ("global", {"num_global_tokens": 2}, 2.1),
        ("mixed", {"head_patterns": ["local:64", "stride:64:2", "global:2", "random:2"]}, 2.1),
    ],
)
def test_attention_flops_grow_linearly(slug, fields, most):
    cfg = config(VARIANTS[slug], fields, max_position_embeddings=32768)
    short, long = (costs.attention_flops(cfg, length) for length in (8192, 16384))
    assert 1.8 * short < long < most * short
    full = config(VARIANTS["full"], {}, max_position_embeddings=32768)
    assert long < costs.attention_flops(full, 16384) / 10


def test_half_the_window_is_half_the_work():
    narrow, wide = (
        costs.attention_flops(config(VARIANTS["local"], {"window_size": w}, max_position_embeddings=4096), 4096)
        for w in (64, 128)
    )
    assert narrow < 0.61 * wide  # tiles of 64 queries read 192 keys and 320


@pytest.mark.parametrize("slug", ["local", "stride", "global", "mixed", "reformer", "routing", "sinkhorn"])
def test_memory_for_the_backward_grows_linearly(slug):
    """Bytes that autograd keeps: twice the length, twice the bytes; an N×N tensor would make it four times."""
    fields = {"hops": 2} if slug == "stride" else {}
    model = build(VARIANTS[slug], {**fields}, dtype=torch.float32, max_position_embeddings=4096)
    kept = [bytes_kept(lambda n=n: model(inputs(1, n)).last_hidden_state, model.parameters()) for n in (1024, 2048)]
    assert kept[1] < 2.2 * kept[0]


# 8 · a good citizen of transformers ----------------------------------------------------------------------------------


@pytest.mark.sampled(40)
@every_head
def test_saving_and_loading_changes_nothing(variant, head, tmp_path):
    model = build(variant, SETTINGS[variant.slug][0], head, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"AutoModelFor{head}")
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is variant.model_class(head)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = inputs_of(model, 2, 9)
    for a, b in zip(model(ids).to_tuple(), loaded.eval()(ids).to_tuple(), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.equal(b)
    for name, value in model.config.to_dict().items():
        assert loaded.config.to_dict()[name] == value or name in ("_name_or_path", "dtype"), name
    half = auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@every_case
def test_every_tensor_is_made_where_the_caller_wants_it(variant, settings):
    """As in `with torch.device("cuda"):`, also those that are drawn on the CPU."""
    with torch.device("meta"):
        model = variant.model_class()(config(variant, settings))
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


@every_head
def test_initialisation_after_the_meta_device_leaves_nothing_out(variant, head):
    """`init_weights` sets every weight, whatever it held; constants equal those of a model built directly."""

    def initialise(model):
        for holder in (*model.modules(), *model.parameters()):
            holder._is_hf_initialized = False
        transformers.set_seed(3)
        model.init_weights()
        return model.state_dict()

    cfg = config(variant, SETTINGS[variant.slug][-1], **for_head(head))
    direct = variant.model_class(head)(cfg)
    built = {name: weight.clone() for name, weight in direct.state_dict().items()}
    with torch.device("meta"):
        empty = variant.model_class(head)(cfg)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    empty.tie_weights()
    for parameter in empty.parameters():  # whatever is left uninitialised must show
        torch.nn.init.constant_(parameter, float("nan"))
    again = initialise(direct)
    for name, weight in initialise(empty).items():
        assert weight.equal(again[name]), name
        if weight.numel() < 2:
            continue
        if built[name].unique().numel() == 1:
            assert weight.equal(built[name]), name
        else:  # another draw from the same distribution: within five standard errors of the ratio
            ratio = weight.double().std() / built[name].double().std()
            assert abs(ratio - 1) < 5 / weight.numel() ** 0.5, name


@every_head
def test_every_parameter_gets_a_gradient(variant, head):
    for settings in SETTINGS[variant.slug]:
        if head == "CausalLM" and not can_be_causal(variant, settings):
            continue  # refused by the config
        model = build(variant, settings, head).train()
        loss_of(model, head).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        # a softmax over keys, or over choices, does not see what is added to all of them
        unseen = {"classifier.bias"} if head == "MultipleChoice" else set()
        assert {name for name in without if not name.endswith("k_proj.bias")} <= unseen


def loss_of(model, head: str, length: int = 60):
    if head == "ImageClassification":
        return model(inputs_of(model, 3, length), labels=torch.tensor([0, 1, 1])).loss
    ids = inputs(3, length)
    types = {"token_type_ids": torch.randint(0, 2, ids.shape)} if model.config.type_vocab_size else {}
    match head:
        case "MaskedLM" | "CausalLM":
            # every position there is, so that learned positions have a gradient
            ids = inputs(3, model.config.max_position_embeddings)
            types = {name: torch.randint(0, 2, ids.shape) for name in types}
            return model(ids, labels=inputs(*ids.shape), **types).loss
        case "SequenceClassification":
            labels = {"labels": torch.tensor([0, 1, 1])}
        case "TokenClassification":
            labels = {"labels": torch.randint(0, 2, ids.shape)}
        case "QuestionAnswering":
            labels = {"start_positions": torch.tensor([3, 0, 7]), "end_positions": torch.tensor([4, 9, 7])}
        case "MultipleChoice":
            ids = inputs(6, length).view(3, 2, length)
            types = {name: torch.randint(0, 2, ids.shape) for name in types}
            return model(ids, labels=torch.tensor([0, 1, 1]), **types).loss
    every = model.config.max_position_embeddings
    ids = inputs(3, every)
    if head == "TokenClassification":
        labels = {"labels": torch.randint(0, 2, ids.shape)}
    types = {name: torch.randint(0, 2, ids.shape) for name in types}
    return model(ids, **labels, **types).loss


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


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_reads_real_tokens(pooling):
    model = build(VARIANTS["local"], {}, classifier_pooling=pooling)
    ids, mask = inputs(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = mask[0, 10:] = 0
    output = model(ids, attention_mask=mask)
    hidden = output.last_hidden_state[0, 3:10]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    torch.testing.assert_close(output.pooler_output[0], torch.tanh(model.pooler.dense(vector)))


def standardizing(**fields):
    return build(VARIANTS["local"], {}, "SequenceClassification", num_labels=3, standardize_pooled=True, **fields)


def test_pooled_vectors_are_standardized_by_the_examples_of_training():
    """By all of them, while they are few; then the last ones count most."""
    model = standardizing()
    plain = build(VARIANTS["local"], {}, "SequenceClassification", num_labels=3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pooler.norm" not in k})
    ids = inputs(7, 30)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)  # nothing is known yet

    pooled = model.model(ids).last_hidden_state.mean(1)
    model.train()
    for rows in (ids[:3], ids[3:6], ids[6:]):
        model(rows)
    norm, dense = model.model.pooler.norm, model.model.pooler.dense
    normal = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + norm.EPSILON).sqrt()
    torch.testing.assert_close(norm.mean, pooled.mean(0))
    model.eval()
    torch.testing.assert_close(model.model(ids).pooler_output, torch.tanh(dense(normal)))

    later = pooled + torch.linspace(-5, 5, pooled.shape[1])
    for _ in range(30):
        norm.watch(later)
    torch.testing.assert_close(norm.mean, later.mean(0))
    torch.testing.assert_close(norm.variance, later.var(0, correction=0))


def test_standardized_pooling_learns_from_single_examples():
    """The first example alone has no deviation."""
    model = standardizing(dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for row in inputs(4, 12):
        model(row[None], labels=torch.tensor([1])).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    assert model.model.pooler.norm.seen == 4


def test_the_statistics_of_pooled_vectors_are_saved(tmp_path):
    """In float32, whatever the weights are in; a checkpoint without them begins at none."""
    model = standardizing(dtype=torch.float32).train()
    ids = inputs(5, 30)
    model(ids)
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    rounded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.model.pooler.norm.mean, model.model.pooler.norm.mean)
    torch.testing.assert_close(rounded(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.1)

    build(VARIANTS["local"], {}, "MaskedLM").save_pretrained(tmp_path)
    begun = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, standardize_pooled=True)
    assert begun.model.pooler.norm.seen == 0
    assert not begun.model.pooler.norm.mean.any()


@every_variant
def test_chunked_feed_forward_changes_nothing(variant):
    model = build(variant, SETTINGS[variant.slug][0])
    chunked = build(variant, SETTINGS[variant.slug][0], chunk_size_feed_forward=7)
    chunked.load_state_dict(model.state_dict())
    ids = inputs(2, 30)
    torch.testing.assert_close(chunked(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.slow  # compiles a kernel for every pattern
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if v.model_class()._supports_flex_attn], ids=lambda v: v.slug
)
def test_flex_attention_is_chosen_by_name(variant):
    model = build(variant, SETTINGS[variant.slug][0], dtype=torch.float32, hidden_size=64)
    ids, mask = inputs(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :13] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("flex_attention")
        assert model.config._attn_implementation == "flex_attention"
        actual = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_flex_attention_is_a_part_of_a_compiled_model():
    torch.compiler.reset()
    model = build(VARIANTS["local"], {"window_size": 3}, dtype=torch.float32, hidden_size=64)
    model.set_attn_implementation("flex_attention")
    ids, mask = padded(50)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        compiled = torch.compile(model, fullgraph=True)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(2)
@every_variant
def test_export_at_a_fixed_length_agrees_with_eager(variant):
    """torch.export without a guard on values."""
    for settings in SETTINGS[variant.slug][:2]:
        model = build(variant, settings, dtype=torch.float32, **one_layer(settings))
        ids, mask = padded(50)
        program = torch.export.export(model, (ids,), {"attention_mask": mask})
        compare_program(program, model, [50, 50])


# sympy cannot solve for the length where a stride without limit divides it
ANY_LENGTH = [(case, name) for case, name in zip(CASES, IDS, strict=True) if case[1].get("hops", 0) is not None]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("variant", "settings"), [case for case, _ in ANY_LENGTH], ids=[name for _, name in ANY_LENGTH]
)
def test_export_at_any_length_agrees_with_eager(variant, settings):
    """One program for all lengths from 2 on; behind external tokens the length is checked when it runs."""
    model = build(variant, settings, dtype=torch.float32, **one_layer(settings))
    n = torch.export.Dim("n", min=2, max=model.config.max_position_embeddings)
    ids, mask = padded(50)
    derived = bool(getattr(model.config, "num_external_tokens", 0)) or "stride" in settings
    program = torch.export.export(
        model,
        (ids,),
        {"attention_mask": mask},
        dynamic_shapes={"input_ids": {1: n}, "attention_mask": {1: n}},
        prefer_deferred_runtime_asserts_over_guards=derived,
    )
    compare_program(program, model, [2, 7, 50, 119])


def compare_program(program, model, lengths):
    for length in lengths:
        ids, mask = padded(length)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).last_hidden_state
            exported = program.module()(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)


def padded(length):
    """Two rows, one of them padded on the left."""
    ids, mask = inputs(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, : int(torch.randint(length, ()))] = 0
    return ids, mask


@pytest.mark.sampled(2)
@every_variant
def test_compile_is_one_graph_and_agrees_with_eager(variant):
    torch.compiler.reset()  # all variants share the encoder's code, of which torch keeps eight compiled versions
    model = build(variant, SETTINGS[variant.slug][0], dtype=torch.float32)
    ids, mask = padded(50)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


# 10, 11 · reproducible, learns --------------------------------------------------------------------------------------


@every_case
def test_eval_is_deterministic_and_dropout_is_not(variant, settings):
    rates = {"hidden_dropout_prob": 0.2}
    if variant.attention and not issubclass(variant.config_class, KernelConfig):
        rates["attention_probs_dropout_prob"] = 0.2
    model = build(variant, settings, **rates)
    ids = inputs(2, 30)
    assert model(ids).last_hidden_state.equal(model(ids).last_hidden_state)
    model.train()
    assert not model(ids).last_hidden_state.equal(model(ids).last_hidden_state)
    start = deepcopy(model.state_dict())  # buffers may move with each pass
    torch.manual_seed(5)
    first = model(ids).last_hidden_state
    model.load_state_dict(start)
    torch.manual_seed(5)
    assert model(ids).last_hidden_state.equal(first)


@pytest.mark.sampled(6)
@every_case
def test_one_batch_is_learned(variant, settings):
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, initializer_range=0.05).train()
    ids, labels = inputs(8, 60), torch.arange(8) % 2
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "fields", "message"),
    [
        ("full", {"hidden_size": 30}, "hidden_size.*must be a multiple of num_attention_heads.*change either"),
        ("full", {"num_attention_heads": 0}, r"num_attention_heads \(0\) must be at least 1"),
        ("full", {"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob \(1.0\) must lie in \[0, 1\)"),
        ("full", {"hidden_size": "32"}, "hidden_size"),
        ("full", {"embedding_size": 0}, r"embedding_size \(0\) must be at least 1: None embeds in hidden_size"),
        ("full", {"embedding_size": 7, "position_embedding_type": "sinusoidal"}, r"embedding_size \(7\) must be a"),
        ("full", {"hiden_size": 32}, "no field 'hiden_size'; did you mean 'hidden_size'"),
        ("full", {"position_embedding_type": "rotatory"}, "position_embedding_type"),
        ("full", {"hidden_size": 12, "position_embedding_type": "rotary"}, r"head_dim \(3\) must be a multiple of 2"),
        ("local", {"window_size": 0}, r"window_size \(0\) must be at least 1"),
        ("local", {"window_size": -4}, r"window_size \(-4\) must be at least 1"),
        ("local", {"widnow_size": 8}, "did you mean 'window_size'"),
        ("local", {"window_size": [3, 4, 5]}, "window_size has 3 entries and num_hidden_layers is 2"),
        ("stride", {"stride": 0}, r"stride \(0\) must be at least 1"),
        ("stride", {"hops": 0}, r"hops \(0\) must be at least 1.*None reads all"),
        ("global", {"num_global_tokens": -1}, r"num_global_tokens \(-1\) must be at least 0"),
        ("global", {"global_token_type": "external", "is_decoder": True}, "'external' cannot be causal"),
        ("mixed", {"head_patterns": ["near:3"]}, "'near:3'.* is no attention pattern"),
        ("mixed", {"head_patterns": ["local:3"] * 3}, "cannot be tiled over num_attention_heads"),
        ("mixed", {"head_patterns": []}, "cannot be tiled"),
        ("sinkhorn", {"block_size": 0}, r"block_size \(0\) must be at least 1"),
        ("sinkhorn", {"sinkhorn_iterations": -1}, r"sinkhorn_iterations \(-1\) must be at least 0"),
        ("sinkhorn", {"sinkhorn_temperature": 0}, r"sinkhorn_temperature \(0\) must be above 0"),
        ("sinkhorn", {"sortcut_blocks": 0}, r"sortcut_blocks \(0\) must be at least 1"),
        ("sinkhorn", {"sortcut_blocks": 2, "is_decoder": True}, r"sortcut_blocks \(2\) cannot be causal"),
        ("linear", {"attention_probs_dropout_prob": 0.1}, r"attention_probs_dropout_prob \(0.1\) must be 0"),
        ("rfa", {"num_random_features": 0}, r"num_random_features \(0\) must be at least 1"),
        ("performer", {"feature_redraw_interval": 0}, r"feature_redraw_interval \(0\) must be at least 1: None never"),
        ("performer", {"kernel": "cosine"}, "kernel"),
    ],
)
def test_bad_configs_are_refused(slug, fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(VARIANTS[slug], fields)


def test_strangers_in_a_config_are_kept():
    assert config(VARIANTS["local"], {"my_note": "kept", "num_labels": 3}).my_note == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict, "either input_ids or inputs_embeds"),
        (lambda: {"input_ids": inputs(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, "not both and not neither"),
        (
            lambda: {"input_ids": inputs(2, 4), "attention_mask": torch.ones(2, 5)},
            r"attention_mask must have shape .* = \(2, 4\), got \(2, 5\)",
        ),
        (
            lambda: {"input_ids": inputs(2, 4), "global_attention_mask": torch.ones(2, 4)},
            "takes no global_attention_mask",
        ),
        (lambda: packed_pair(output_attentions=True), "output_attentions cannot go with packed rows.*into 2 documents"),
        (lambda: packed_pair(attention_mask=torch.ones(1, 9)), r"attention_mask must have shape .* = \(1, 8\)"),
        (lambda: packed_pair(100, 140), "built for 128 positions and got 140"),
    ],
)
def test_bad_inputs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(VARIANTS["local"], {}, dtype=torch.float32)(**arguments())


def packed_pair(*lengths: int, **more):
    lengths = lengths or (3, 5)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": inputs(1, sum(lengths)), "position_ids": positions, **more}


def test_packed_rows_have_no_cache():
    model = build(VARIANTS["local"], {}, "CausalLM")
    assert model(**packed_pair()).past_key_values is None
    past = model(inputs(1, 4)).past_key_values
    for name, value in {"use_cache": True, "past_key_values": past}.items():
        with pytest.raises(ValueError, match=f"{name} cannot go with packed rows: position_ids start again at 0"):
            model(**packed_pair(), **{name: value})


def test_a_masked_model_cannot_be_causal():
    with pytest.raises(ValueError, match="is_decoder=True: set is_decoder=False, or use EtLocalForCausalLM"):
        build(VARIANTS["local"], {"is_decoder": True}, "MaskedLM")


def test_pickling_a_model_keeps_it():
    model = build(VARIANTS["mixed"], SETTINGS["mixed"][0])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    ids = inputs(1, 20)
    assert torch.load(buffer, weights_only=False)(ids).last_hidden_state.equal(model(ids).last_hidden_state)

"""`resize_positions`: what stays the same, what moves where, and that every table of positions is declared."""

import pytest
import torch
import transformers
from zoo import CASES, IDS, SETTINGS, build, config, every_case, every_variant, inputs

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_resizing import stretch_positions

OLD, NEW = 40, 97
SIZE = {"max_position_embeddings": OLD}


# a Reformer without num_buckets hashes into as many as suit the longest input
SAME_HASHES = [
    pytest.param(*case, id=name)
    for case, name in zip(CASES, IDS, strict=True)
    if case[0].slug != "reformer" or "num_buckets" in case[1]
]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "settings"), SAME_HASHES)
def test_tiled_tables_change_nothing_up_to_the_old_length(variant, settings):
    model = build(variant, settings, **SIZE)
    ids, mask = inputs(2, OLD), torch.ones(2, OLD, dtype=torch.long)
    mask[0, :9] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    model.resize_positions(NEW, how="tile")
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, expected, rtol=1e-10, atol=1e-10)
    assert model(inputs(2, NEW)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=f"built for {NEW} positions and got {NEW + 1}"):
        model(inputs(1, NEW + 1))


@every_case
@pytest.mark.parametrize("how", ["tile", "interpolate"])
def test_a_resized_model_has_the_sizes_of_a_new_one(variant, settings, how):
    model, fresh = build(variant, settings, **SIZE), config(variant, settings, max_position_embeddings=NEW)
    model.resize_positions(NEW, how)
    expected = variant.model_class()(fresh)
    sizes, wanted = ({name: x.shape for name, x in m.state_dict().items()} for m in (model, expected))
    assert sizes == wanted
    fields, wanted = ({**c.to_diff_dict(), "dtype": None} for c in (model.config, fresh))
    assert fields == wanted
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, expected)]
    assert trained[0] == trained[1]
    model.resize_positions(OLD, how)  # and back
    assert model(inputs(1, OLD)).last_hidden_state.isfinite().all()


@every_variant
def test_a_resized_head_saves_loads_and_learns(variant, tmp_path):
    head = "CausalLM" if variant.causal else "MaskedLM"
    model = build(variant, SETTINGS[variant.slug][-1], variant.heads[0], dtype=torch.float32, **SIZE)
    if head in variant.heads and "sortcut_blocks" not in SETTINGS[variant.slug][-1]:
        model = build(variant, SETTINGS[variant.slug][0], head, dtype=torch.float32, **SIZE)
    model.resize_positions(NEW)
    model.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"AutoModelFor{type(model).__name__.partition('For')[2]}")
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = inputs(2, NEW)
    loaded.eval()
    assert loaded(ids).logits.equal(model(ids).logits)
    loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, name


def stretched(table, axis=0):
    """`table` at twice the positions less one: the old ones and the means of neighbours."""
    rows = table.movedim(axis, 0)
    long = rows.new_empty(2 * len(rows) - 1, *rows.shape[1:])
    long[::2], long[1::2] = rows, (rows[1:] + rows[:-1]) / 2
    return long.movedim(0, axis)


def test_interpolated_tables_keep_their_ends_and_run_straight_on():
    """Every kind of table; what is summed over positions is smaller by as much as there is more of it."""
    long, growth = 2 * OLD - 1, (2 * OLD - 1) / OLD

    def tables(slug, name, **fields):
        model = build(VARIANTS[slug], {"num_hidden_layers": 1, **fields}, **SIZE)
        before = model.state_dict()[name].clone()
        model.resize_positions(long)
        return model.state_dict()[name], before

    for slug, name, fields, axes, smaller in [
        ("full", "embeddings.position_embeddings.weight", {}, [0], 1),
        ("linformer", "layers.0.mixer.projections.0.weight", {"projected_length": 7}, [2], growth),
        ("linformer", "shared.weight", {"projected_length": 7, "projection_sharing": "layerwise"}, [2], growth),
        ("synthesizer", "layers.0.mixer.random_scores", {"synthesizer_type": "random"}, [1, 2], 1),
        ("synthesizer", "layers.0.mixer.fixed_scores", {"synthesizer_type": "fixed"}, [1, 2], 1),
        ("synthesizer", "layers.0.mixer.column_factors", {}, [1], 1),
        ("synthesizer", "layers.0.mixer.dense_weight", {"synthesizer_type": "dense"}, [1], 1),
        ("gmlp", "layers.0.mixer.spatial_weight", {"intermediate_size": 36}, [0, 1], growth),
        ("gmlp", "layers.0.mixer.spatial_bias", {"intermediate_size": 36}, [0], 1),
        ("mlp_mixer", "layers.0.mixer.reading_weight", {}, [1], growth),
        ("mlp_mixer", "layers.0.mixer.writing_weight", {}, [0], 1),
    ]:
        found, before = tables(slug, name, **fields)
        for axis in axes:
            before = stretched(before, axis)
        torch.testing.assert_close(found, before / smaller, rtol=1e-12, atol=1e-12, msg=f"{slug} {name}")


def test_sums_over_positions_keep_their_size():
    """A sequence of equal tokens, twice as long, has projected keys that are nearly the same."""
    model = build(VARIANTS["linformer"], {"position_embedding_type": "none"}, max_position_embeddings=100)
    projection = model.layers[0].mixer.projections[0]
    projection.weight.data = projection.weight.data.cumsum(2)  # smooth over the positions
    before = projection(100).sum(-1)
    model.resize_positions(200)
    after = projection(200).sum(-1)
    assert (after - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stretching_along_an_axis_is_stretching_its_rows(axis):
    table = torch.randn(4, 5, 6)
    for how in ("tile", "interpolate"):
        expected = torch.stack(
            [stretch_positions(x, 11, how) for x in table.movedim(axis, 0).flatten(1).unbind(1)], 1
        ).unflatten(1, table.movedim(axis, 0).shape[1:])
        torch.testing.assert_close(stretch_positions(table, 11, how, axis).movedim(axis, 0), expected)
    assert stretch_positions(table, 3, "tile", axis).equal(table.narrow(axis, 0, 3))
    numbers = torch.arange(4)
    assert stretch_positions(numbers, 6, "interpolate").tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), r"new_length \(0\) must be at least 1"), ((50, "repeat"), r"how \('repeat'\) must be 'tile' or 'interp")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(VARIANTS["full"], {}).resize_positions(*arguments)

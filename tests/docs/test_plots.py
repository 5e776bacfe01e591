"""What is drawn is what the models do: matrices against gradients, pictures against their numbers."""

import sys
from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer
from zoo import CASES, IDS, MODES, SETTINGS, build, inputs, one_layer, readable

from efficient_transformers import VARIANTS, cli, plots
from efficient_transformers.attention_maps import KINDS, Matrix, read_matrices
from efficient_transformers.mixer_maps import default_matrices, influence_matrices
from efficient_transformers.models.base_configuration import PatternConfig
from efficient_transformers.models.base_mixer import SequenceInfo

PATTERNS = [mode for mode in MODES if issubclass(mode.values[0].config_class, PatternConfig)]


@pytest.mark.parametrize(("variant", "settings", "decoder"), PATTERNS)
def test_a_drawn_pattern_is_what_outputs_depend_on(variant, settings, decoder):
    model = build(variant, settings, **one_layer(settings), use_cache=False, is_decoder=decoder)
    ids, external = inputs(1, 23), getattr(model.config, "num_external_tokens", 0)
    drawn = [m for m in read_matrices(model, ids) if m.columns != "segment"]
    depends = readable(model, model.get_input_embeddings()(ids))
    if not drawn:  # compressed keys: what a segment's weight stands for is all its tokens
        assert variant.slug == "compressed"
        factor = model.config.compression_factor
        drawn = read_matrices(model, ids)
        seen = torch.stack([m.values > 0 for m in drawn]).any(0).repeat_interleave(factor, 1)[:, :23]
        if model.config.kernel <= factor:
            assert depends.equal(seen | torch.eye(23, dtype=torch.bool))
        return
    seen = torch.stack([m.values > 0 for m in drawn]).any(0)
    assert (seen | torch.eye(len(seen), dtype=torch.bool))[external:, external:].equal(depends)
    for matrix in drawn:
        if matrix.kinds is not None:
            assert (matrix.kinds > 0).equal(matrix.values > 0)


@pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
def test_rows_sum_to_one_where_the_registry_says_so(variant, settings):
    model = build(variant, settings)
    matrices = read_matrices(model, inputs(1, 23))
    assert matrices
    assert all(m.values.dtype == torch.float64 and m.values.isfinite().all() for m in matrices)
    for matrix in matrices:
        if (variant.normalised and variant.attention) or matrix.columns in ("projected key", "segment"):
            torch.testing.assert_close(matrix.values.sum(1), torch.ones(len(matrix.values), dtype=torch.float64))


def test_kinds_say_which_part_of_the_pattern_gives_a_key():
    local, stride, everywhere, random = range(1, 5)
    assert KINDS == ("nothing", "local", "stride", "global", "random")
    patterns = ["local:1", "stride:3:1", "global:1", "random:1:4"]
    model = build(VARIANTS["mixed"], {"head_patterns": patterns, "num_hidden_layers": 1})
    kinds = [m.kinds for m in read_matrices(model, inputs(1, 8))]
    assert kinds[0][2].tolist() == [0, local, local, local, 0, 0, 0, 0]
    assert kinds[1][4].tolist() == [0, stride, 0, 0, stride, 0, 0, stride]
    assert kinds[2][3].tolist() == [everywhere, 0, 0, local, 0, 0, 0, 0]
    assert kinds[2][0].tolist() == [everywhere] * 8
    assert kinds[3][1].tolist() == [0, local, 0, 0, random, random, random, random]


def test_implied_weights_stand_beside_those_of_full_attention():
    settings = {"num_hidden_layers": 1, "num_random_features": 8}
    performer, ids = build(VARIANTS["performer"], settings), inputs(1, 20)
    matrices = read_matrices(performer, ids)
    full = build(VARIANTS["full"], {"num_hidden_layers": 1})
    full.load_state_dict(performer.state_dict(), strict=False)
    expected = full(ids, output_attentions=True).attentions[0][0]
    own = performer(ids, output_attentions=True).attentions[0][0]
    for head in range(4):
        assert matrices[2 * head].values.equal(own[head])
        torch.testing.assert_close(matrices[2 * head + 1].values, expected[head])
    assert (own - expected).abs().max() > 0.01


@pytest.mark.parametrize("setting", SETTINGS["linformer"], ids=str)
def test_projected_weights_times_the_projection_are_what_the_model_returns(setting):
    model, ids = build(VARIANTS["linformer"], setting), inputs(1, 23)
    expected = model(ids, output_attentions=True).attentions[0][0]
    projection, first, *_ = read_matrices(model, ids)
    torch.testing.assert_close(first.values @ projection.values, expected[0])


@pytest.mark.parametrize("decoder", [False, True])
def test_the_spatial_weight_is_the_one_that_positions_are_multiplied_by(decoder):
    model = build(VARIANTS["gmlp"], {}, is_decoder=decoder)
    weight = model.layers[0].mixer.spatial_weight.detach()[:20, :20]
    found = read_matrices(model, inputs(1, 20))[0].values
    torch.testing.assert_close(found, weight.tril() if decoder else weight)


def test_the_fourier_matrix_is_the_one_of_the_transform():
    cosines, sines = (m.values for m in read_matrices(build(VARIANTS["fnet"], {}), inputs(1, 15)))
    transform = torch.fft.fft(torch.eye(15, dtype=torch.complex128))
    torch.testing.assert_close(torch.complex(cosines, sines), transform)


def test_influences_are_the_weights_of_a_mixer_that_mixes_all_features_alike():
    """The picture of a new mixer that returns no attention weights."""
    weight = torch.randn(9, 9, dtype=torch.float64)
    (found,) = default_matrices(lambda hidden, _: (weight @ hidden, None), *mixer_input(9))
    torch.testing.assert_close(found.values, weight.abs())


@pytest.mark.parametrize("slug", ["sinkhorn", "fnet", "gmlp", "mlp_mixer"])
def test_influences_are_norms_of_the_jacobian_of_a_mixer(slug):
    model = build(VARIANTS[slug], {}, is_decoder=VARIANTS[slug].causal, use_cache=False)
    mixer, (hidden, sequence) = model.layers[0].mixer, mixer_input(12)
    (found,) = influence_matrices(mixer, hidden, sequence)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, sequence)[0][0, 7], hidden)  # (e, 1, n, e)
    torch.testing.assert_close(found.values[7], jacobian[:, 0].square().sum((0, 2)).div(32).sqrt())
    assert not (VARIANTS[slug].causal and found.values.triu(1).any())


def mixer_input(length: int):
    return torch.randn(1, length, 32, dtype=torch.float64), SequenceInfo(torch.arange(length)[None])


def test_reading_leaves_the_model_as_it_was():
    model = build(VARIANTS["routing"], SETTINGS["routing"][0], dtype=torch.float32).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first, second = (read_matrices(model, inputs(1, 20).fill_(3)) for _ in range(2))
    assert model.training
    assert all(x.equal(model.state_dict()[name]) for name, x in before.items())
    assert all(a.values.equal(b.values) for a, b in zip(first, second, strict=True))
    assert not any(block.mixer._forward_pre_hooks for block in model.layers)
    with pytest.raises(ValueError, match=r"layer \(2\) must lie between 0 and num_hidden_layers \(2\)"):
        read_matrices(model, inputs(1, 20), layer=2)


def test_layers_that_differ_are_all_read():
    names = [m.name for m in read_matrices(build(VARIANTS["local"], {"window_size": [2, 70]}), inputs(1, 20))]
    assert names == ["layer 0, all heads: local:2", "layer 1, all heads: local:70"]


def test_colours_differ_in_grey():
    def lightness(colour: str) -> float:
        """L* of a colour, CIE 1976."""
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16

    shades = sorted(lightness(colour) for colour in plots.COLOURS.values())
    assert plots.COLOURS.keys() == set(KINDS)
    assert min(b - a for a, b in pairwise(shades)) > 12


def test_a_picture_shows_the_matrix_and_its_legend():
    model = plots.drawn_model("big_bird", 32)
    matrices = read_matrices(model, plots.word_ids(plots.TEXT, 32, 512))
    figure = plots.pattern_figure(matrices, "BigBird")
    for axes, matrix in zip(figure.axes, matrices, strict=True):
        assert (axes.images[0].get_array() == matrix.kinds.numpy()).all()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["local", "global", "random"]
    assert figure.get_suptitle() == "BigBird"


@pytest.mark.parametrize("signed", [False, True])
def test_zeros_of_weights_stay_white_and_signs_lie_around_the_middle(signed):
    values = torch.tensor([[0.0, 1.0], [0.25, -0.5 if signed else 0.5]], dtype=torch.float64)
    axes = plots.new_figure().subplots()
    plots.draw(axes, Matrix("head 0", values))
    image = axes.images[0]
    at_zero, limits = tuple(image.to_rgba(image.get_array())[0, 0]), image.get_clim()
    if signed:
        assert limits == (-1.0, 1.0)
        assert at_zero == pytest.approx((0.49, 0.49, 0.47, 1), abs=0.02)
    else:
        assert limits == (0.0, torch.tensor([0.25, 0.5, 1.0]).double().quantile(0.99).item())
        assert at_zero == (1.0, 1.0, 1.0, 1.0)


def test_the_commands_write_pictures(tmp_path, capsys, monkeypatch):
    stem = tmp_path / "pictures" / "v1.2"  # a dot is no suffix
    assert cli.main(["plot", "pattern", "local", "--length", "16", "--out", str(stem), "window_size=2"]) == 0
    assert stem.with_name("v1.2.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in stem.with_name("v1.2.svg").read_text()
    assert cli.main(["plot", "pattern", "lcoal"]) == 2
    assert "variant ('lcoal') must be one of full, local" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", "pattern", "local", "--length", "16", "--out", str(stem)]) == 2
    assert "pip install 'efficient-transformers[plots]'" in capsys.readouterr().err


def test_a_checkpoint_reads_its_own_tokens(tmp_path):
    model = plots.drawn_model("local", 24, vocab_size=4096, window_size=2)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("data/tokenizer")
    tokenizer.save_pretrained(tmp_path)
    loaded, ids = plots.load_model(str(tmp_path), None, "the people of the states")
    once = tokenizer("the people of the states")["input_ids"]
    assert ids[0, : len(once)].tolist() == once
    assert ids.shape == (1, 24)
    (matrix,) = read_matrices(loaded, ids)
    assert matrix.values.equal(read_matrices(model, ids)[0].values)
    with pytest.raises(ValueError, match="window_size cannot be changed"):
        plots.load_model(str(tmp_path), None, None, changes={"window_size": 3})

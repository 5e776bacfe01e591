"""Rows of the table of variants are complete, and the pages that derive from it are up to date."""

import re

import pytest
import torch
import transformers
from PIL import Image
from repository import ROOT
from zoo import CASES, CAUSAL, IDS, SETTINGS, build, config, every_variant

import efficient_transformers
from efficient_transformers import VARIANTS, convert, costs, pages, plots
from efficient_transformers.conversion import CREATED
from efficient_transformers.models.base_attention import PatternAttention
from efficient_transformers.registry import variant_of

STALE = "run `make pages`: the page differs from src/efficient_transformers/registry.py"


@every_variant
def test_a_row_says_all_that_is_derived_from_it(variant):
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", variant.paper)
    assert variant.title
    assert variant.cost
    assert variant.attends_to[0].islower() or variant.attends_to[0] == "`"  # completes "a token attends to …"
    assert variant.attends_to[-1] not in ".;,"
    assert (variant.state is not None) == variant.causal
    headline, formula, words = plots.about(variant)
    assert headline
    assert words
    assert formula or variant.slug in ("full", "mixed")


@every_variant
def test_the_settings_of_a_row_are_fields_of_its_config(variant):
    own = variant.config_class.__dataclass_fields__
    for settings in (variant.demo, variant.benchmark, variant.knob_fields(7, 4)):
        assert settings.keys() <= own.keys()
        built = variant.config_class(**{"num_attention_heads": 4, "max_position_embeddings": 512} | dict(settings))
        assert {name: getattr(built, name) for name in settings} == settings
    assert (variant.knob is None) == (variant.knob_fields(7, 4) == {})


def test_the_knob_sets_what_its_position_means():
    assert VARIANTS["local"].knob_fields(5, 4) == {"window_size": 5}
    assert VARIANTS["longformer"].knob_fields(5, 4) == {"attention_window": 10}  # of both sides together
    assert VARIANTS["mixed"].knob_fields(5, 3) == {"head_patterns": ["local:5", "stride:5:3", "global:3"]}
    assert VARIANTS["linear"].knob_fields(5, 4) == {}


@every_variant
def test_linear_layers_that_flops_counts_exist(variant):
    names = [name for settings in SETTINGS[variant.slug] for name, _ in build(variant, settings).named_modules()]
    for part in variant.linears_in_flops:
        assert any(part in name for name in names)


@pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
def test_a_config_finds_its_row(variant, settings):
    assert variant_of(config(variant, settings)) is variant


def test_a_config_of_no_row_is_refused():
    foreign = config(VARIANTS["local"], {})
    foreign.model_type = "bert"
    with pytest.raises(ValueError, match=r"model_type \('bert'\) must be a variant of the zoo: et_full, et_local, "):
        costs.attention_flops(foreign, 10)
    with pytest.raises(ValueError, match=r"variant \(et_fnet\) has no decoder"):
        costs.layer_state_size(config(VARIANTS["fnet"], {}), 0, 10)


def test_every_causal_variant_has_causal_settings():
    assert {variant.slug for (variant, _), _ in CAUSAL} == {v.slug for v in VARIANTS.values() if v.causal}


def test_the_own_weights_of_a_new_mixer_are_initialised_in_a_conversion(monkeypatch):
    """A new variant converts without an entry for its weights. Only the source's projections are never made up."""

    class New(PatternAttention):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.novelty = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setattr(VARIANTS["local"].model_class(), "mixer_class", New)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 38}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99, max_position_embeddings=40))
    conversion = convert(bert, "local")
    name = "layers.0.mixer.novelty"
    assert conversion.report.created[name] == "initialised: the source has no such weights"
    assert conversion.model.get_parameter(name).tolist() == [1, 1, 1]
    for creation in CREATED:
        assert not re.fullmatch(creation.pattern, "model.layers.0.mixer.q_proj.weight")


# pages --------------------------------------------------------------------------------------------------------------


def test_the_readme_has_todays_table():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.with_table(page) == page, STALE
    for slug, variant in VARIANTS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `et_{slug}` ")]
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert cells[0] == f"`{variant.model_type}`"
        assert cells[1:3] == [variant.family, variant.attends_to.replace("|", "\\|")]
        assert variant.paper.removeprefix("arXiv:") in cells[3]
        assert cells[4:] == [variant.cost, "yes" if variant.causal else "no"]


def test_a_table_is_replaced_between_its_marks_only():
    begin, end = pages.MARKS
    page = f"before\n{begin}\nold\n{end}\nafter"
    assert pages.with_table(page) == f"before\n{begin}\n{pages.variants_table()}\n{end}\nafter"
    for broken in ("before after", f"{begin} old", f"old {end}"):
        with pytest.raises(ValueError, match="must contain the marks"):
            pages.with_table(broken)


def test_the_gallery_is_todays():
    docs = ROOT / "docs"
    assert (docs / "gallery.md").read_text(encoding="utf-8") == plots.gallery_page(), STALE
    assert {path.stem for path in (docs / "gallery").glob("*.png")} == VARIANTS.keys(), STALE
    for path in (docs / "gallery").glob("*.png"):
        assert path.stat().st_size < 200_000
    with Image.open(docs / "gallery.png") as image:
        assert image.info["Description"] == plots.montage_description(), STALE


@pytest.mark.parametrize("count", [1, 5, 11])
def test_a_montage_has_a_tile_for_any_number_of_variants(count):
    ids = plots.word_ids(plots.TEXT, 12, 512)
    rows = list(VARIANTS.values())[:count]
    firsts = [(variant, plots.read_matrices(plots.drawn_model(variant.slug, 12), ids)) for variant in rows]
    figure = plots.montage(firsts)
    assert [axes.get_title().replace("\n", " ") for axes in figure.axes if axes.images] == [v.title for v in rows]


def test_the_table_is_complete():
    assert SETTINGS.keys() == VARIANTS.keys()
    for variant in VARIANTS.values():
        for head in (None, *variant.heads):
            name = variant.model_class(head).__name__
            assert name in efficient_transformers.__all__
            assert getattr(efficient_transformers, name) is variant.model_class(head)

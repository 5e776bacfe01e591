"""A config that can be saved can be loaded again, and fields that transformers shares are honoured or refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from zoo import CASES, IDS, SETTINGS, build, config, inputs_of

from efficient_transformers import VARIANTS, EtLocalForSequenceClassification

# a value that loading refuses, and a part of the reason
REFUSED = {
    "widnow_size": (8, "did you mean 'window_size'"),
    "window_size": (-3, "window_size"),
    "hidden_size": (33, "multiple of num_attention_heads"),
    "dtype": (0, "dtype"),
    "id2label": (["no", "yes"], "id2label"),
    "problem_type": ("ranking", "problem_type"),
    "is_encoder_decoder": (True, "is_encoder_decoder"),
    "add_cross_attention": (True, "add_cross_attention"),
    "chunk_size_feed_forward": (-1, "chunk_size_feed_forward"),
    "initializer_range": (-0.1, "initializer_range"),
    "hidden_act": ("guelu", "nearest one is 'gelu'"),
    "pooler_act": ("tan", "nearest one is 'tanh'"),
}
every_refused = pytest.mark.parametrize(("field", "value", "reason"), [(k, *v) for k, v in REFUSED.items()])
ERRORS = (ValueError, TypeError, StrictDataclassError)


@every_refused
def test_construction_refuses_what_cannot_be_done(field, value, reason):
    with pytest.raises(ERRORS, match=reason):
        config(VARIANTS["local"], {}, **{field: value})


def set_and_save(saved, config, field, value, folder):
    """Some fields are refused as soon as they are set."""
    setattr(config, field, value)
    saved.save_pretrained(folder)


@every_refused
def test_saving_refuses_what_loading_would_refuse(field, value, reason, tmp_path):
    """Nothing is written, by the config or by the model."""
    model = build(VARIANTS["local"], {}, "SequenceClassification")
    # a model overwrites the dtype of its config by its own
    for saved in (model.config,) if field == "dtype" else (model, model.config):
        with pytest.raises(ERRORS, match=reason):
            set_and_save(saved, model.config, field, value, tmp_path)
    assert not [*tmp_path.glob("*.json"), *tmp_path.glob("*.safetensors")]


def test_saving_refuses_one_class(tmp_path):
    late = config(VARIANTS["local"], {}, num_labels=1)
    late.problem_type = "single_label_classification"
    with pytest.raises(ERRORS, match="num_labels"):
        late.save_pretrained(tmp_path)
    with pytest.raises(ERRORS, match="num_labels"):
        config(VARIANTS["local"], {}, num_labels=1, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="must be at least 1"):
        EtLocalForSequenceClassification(config(VARIANTS["local"], {}, num_labels=0))


def test_saving_refuses_what_would_be_derived_otherwise(tmp_path):
    late = config(VARIANTS["local"], {})
    late.image_size = 32
    with pytest.raises(ValueError, match="changed after construction"):
        late.save_pretrained(tmp_path)
    late = config(VARIANTS["local"], {})
    late.reason = object()
    with pytest.raises(ValueError, match="not JSON serializable"):
        late.save_pretrained(tmp_path)


@pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
def test_every_config_is_loaded_as_it_was(variant, settings, tmp_path):
    """With the common fields that a model honours, set at construction or later."""
    common = {"return_dict": False, "output_hidden_states": True, "chunk_size_feed_forward": 3, "dtype": torch.bfloat16}
    common |= {"id2label": {0: "no", 1: "yes", 2: "both"}, "problem_type": "multi_label_classification"}
    late = config(variant, settings)
    for name, value in common.items():
        setattr(late, name, value)
    for saved in (config(variant, settings, **common), late):
        saved.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert all(getattr(loaded, name) == value for name, value in common.items())
        assert loaded.num_labels == 3


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_model_of_tuples_is_saved_and_loaded(variant, tmp_path):
    for head in {"SequenceClassification", "CausalLM"} & {*variant.heads}:
        model = build(variant, SETTINGS[variant.slug][0], head, return_dict=False, dtype=torch.float32)
        model.save_pretrained(tmp_path / head)
        loaded = variant.model_class(head).from_pretrained(tmp_path / head).eval()
        x = inputs_of(model, 1, 9)
        assert isinstance(loaded(x), tuple)
        torch.testing.assert_close(loaded(x)[0], model(x)[0])

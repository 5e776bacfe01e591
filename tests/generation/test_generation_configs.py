"""What `generate` takes from a model's config: token ids and what transformers shares by design, nothing else."""

import json

import pytest
import torch
import transformers
from transformers import GenerationConfig
from zoo import SETTINGS, build

from efficient_transformers import VARIANTS
from efficient_transformers.models.modeling_sinkhorn import EtSinkhornConfig, EtSinkhornForCausalLM

SHARED = {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version"}
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 38}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_no_field_of_a_config_steers_generation(variant):
    """transformers copies every field of a model's config whose name is one of GenerationConfig's."""
    config = variant.config_class()
    fields = config.to_dict().keys() | type(config).__dataclass_fields__.keys()
    taken = {field for field in fields & GenerationConfig().to_dict().keys() if not field.startswith("output_")}
    assert taken <= SHARED


@pytest.fixture
def old_checkpoint(tmp_path):
    """A folder as Sinkhorn models were saved when `sinkhorn_temperature` was called `temperature`."""
    model = EtSinkhornForCausalLM(EtSinkhornConfig(**SMALL, sinkhorn_temperature=0.6))
    model.save_pretrained(tmp_path)
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / file).read_text())
        fields.pop("sinkhorn_temperature", None)
        (tmp_path / file).write_text(json.dumps({**fields, "temperature": 0.6, "pad_token_id": 0}))
    return model, tmp_path


@pytest.mark.parametrize("generation_file", [True, False])
def test_old_sinkhorn_checkpoints_load_and_sample_at_temperature_one(old_checkpoint, generation_file):
    model, folder = old_checkpoint
    if not generation_file:
        (folder / "generation_config.json").unlink()
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        again = auto_class.from_pretrained(folder)
        assert again.config.sinkhorn_temperature == 0.6
        assert not hasattr(again.config, "temperature")
        assert again.config.pad_token_id == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    assert again.generation_config.temperature in (None, 1.0)
    again.save_pretrained(folder)
    assert "temperature" not in json.loads((folder / "config.json").read_text())


def test_a_chosen_sampling_temperature_is_kept(tmp_path):
    model = EtSinkhornForCausalLM(EtSinkhornConfig(**SMALL))
    model.generation_config.temperature, model.generation_config.do_sample = 0.9, True
    model.save_pretrained(tmp_path)
    assert EtSinkhornForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.9


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.causal], ids=lambda v: v.slug)
def test_without_a_known_padding_token_no_id_is_padding(variant):
    model = build(variant, SETTINGS[variant.slug][0], "CausalLM")
    ids, how = torch.tensor([[5, 0, 7]]), {"max_new_tokens": 6, "do_sample": False}
    assert model.config.pad_token_id is None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert model.generate(ids, **how).equal(expected)
    assert model.generate(inputs_embeds=model.get_input_embeddings()(ids), **how).equal(expected[:, 3:])

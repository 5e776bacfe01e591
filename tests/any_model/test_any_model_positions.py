"""`resize_positions` in every architecture with a learned table of positions."""

import pytest
import torch
from architectures import inputs_of, text_types, tiny_model
from transformers import AutoModel

from efficient_transformers import resize_positions

FAST = ["bert", "roberta", "distilbert", "electra", "gpt2", "opt", "openai-gpt", "gpt_neo", "xlm-roberta", "llama"]
# BigBird and its Pegasus cut a sequence into blocks and switch to full attention for good after a short one, ProphetNet
# fails by itself on long ones, and LXMERT needs pictures.
FORWARD_FAILS = ("big_bird", "bigbird_pegasus", "prophetnet", "lxmert", "visual_bert")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in text_types()]
)
def test_longer_inputs_are_taken_and_short_ones_give_the_same(kind, tmp_path):
    try:
        model = tiny_model(kind, None)
    except Exception as error:
        pytest.skip(f"cannot be built tiny from its config: {error}")
    try:
        resize_positions(model, 300)
    except ValueError as error:
        assert "no learned position table" in str(error) or "fixed sinusoids" in str(error)  # noqa: PT017
        return
    except NotImplementedError:
        assert kind == "xlnet"  # has no length to set
        return
    if kind in FORWARD_FAILS:
        return
    model = tiny_model(kind, None)  # as it was
    short, long = inputs_of(model, None, 60), inputs_of(model, None, 300)
    expected = model(**short)[0]
    resize_positions(model, 300)
    torch.testing.assert_close(model(**short)[0], expected)
    longest = model(**long)[0]
    assert torch.isfinite(longest).all()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.max_position_embeddings == model.config.max_position_embeddings
    torch.testing.assert_close(again(**long)[0], longest)


@pytest.mark.parametrize(("kind", "offset"), [("bert", 0), ("roberta", 2), ("opt", 2), ("gpt2", 0)])
@pytest.mark.parametrize("how", ["tile", "interpolate"])
def test_the_table(kind, offset, how):
    model = tiny_model(kind, None)
    tables = [p for name, p in model.named_parameters() if "position" in name or "wpe" in name]
    before = tables[0].detach().clone()
    length = len(before) - offset
    resize_positions(model, 2 * length - 1, how)
    (table,) = [p for name, p in model.named_parameters() if "position" in name or "wpe" in name]
    assert table[:offset].equal(before[:offset])
    rows, old = table[offset:], before[offset:]
    assert len(rows) == 2 * length - 1
    if how == "tile":
        assert rows.equal(torch.cat([old, old[:-1]]))
    else:
        torch.testing.assert_close(rows[::2], old)
        torch.testing.assert_close(rows[1::2], (old[1:] + old[:-1]) / 2)
    resize_positions(model, 10)
    assert model.config.max_position_embeddings == 10 + (offset if kind == "roberta" else 0)


def test_models_without_a_table_get_a_message():
    for kind in ("llama", "t5"):
        with pytest.raises(ValueError, match="no learned position table"):
            resize_positions(tiny_model(kind, None), 300)
    with pytest.raises(ValueError, match="must be at least 1"):
        resize_positions(tiny_model("bert", None), 0)
    with pytest.raises(ValueError, match="sinusoids"):
        resize_positions(tiny_model("marian", None), 300)

"""Prompts in pieces: every cache takes pieces of any size, whatever part of them is padding."""

import pytest
import torch
from zoo import CAUSAL, build, inputs

every_causal_case = pytest.mark.parametrize(
    ("variant", "settings"), [case for case, _ in CAUSAL], ids=[n for _, n in CAUSAL]
)
LENGTH = 24
# rows: padding on the left, longer than several pieces; a hole; padding on the right; none; nothing but padding
MASK = torch.ones(5, LENGTH, dtype=torch.long)
MASK[0, :13] = 0
MASK[1, 3:11] = 0
MASK[2, 15:] = 0
MASK[4] = 0
PIECES = {
    "one by one": [1] * LENGTH,
    "even": [5] * 4 + [4],
    "growing": [1, 2, 8, 13],
    "shrinking": [14, 7, 2, 1],
}


@every_causal_case
@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3, 4], [4]], ids=str)
@torch.no_grad()
def test_pieces_of_a_padded_prompt_equal_the_whole(variant, settings, rows):
    model = build(variant, settings, "CausalLM")
    ids, mask = inputs(5, LENGTH)[rows], MASK[rows]
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for sizes in PIECES.values():
        cache, start = None, 0
        for size in sizes:
            stop = start + size
            output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache, real = output.past_key_values, mask[:, start:stop].bool()
            torch.testing.assert_close(output.logits[real], expected[:, start:stop][real], rtol=1e-9, atol=1e-9)
            assert output.logits.isfinite().all()
            start = stop
        assert cache.get_seq_length() == LENGTH


@every_causal_case
def test_generate_prefills_a_padded_prompt_in_chunks(variant, settings):
    model = build(variant, settings, "CausalLM")
    ids, mask = inputs(5, LENGTH)[[0, 3]], MASK[[0, 3]]
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **how)
    for size in (1, 4, 13, 100):
        assert model.generate(ids, **how, prefill_chunk_size=size).equal(expected)
    ids, how["attention_mask"] = inputs(1, LENGTH), MASK[:1]  # whole chunks of nothing but padding
    assert model.generate(ids, **how, prefill_chunk_size=4).equal(model.generate(ids, **how))

"""Memory-compressed attention: full attention where nothing is compressed, loops, and a cache of segments."""

import pytest
import torch
from zoo import ConfigRefused, build, config, inputs

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_cache import PatternCacheLayer
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.modeling_compressed import CompressedCacheLayer

COMPRESSED = VARIANTS["compressed"]
FIELDS = {"attention_layers": ["compressed"], "compression_factor": 4}


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_segments_of_one_token_are_full_attention(decoder, positions):
    """Factor 1, kernel 1, and the identity, which is the mean of one token: as the convolution begins."""
    fields = {"position_embedding_type": positions, "is_decoder": decoder}
    model = build(COMPRESSED, {"attention_layers": ["compressed"], "compression_factor": 1, "kernel_size": 1, **fields})
    full = build(VARIANTS["full"], fields)
    report = full.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert [name.rpartition(".")[2] for name in report.unexpected_keys] == ["convolution"] * 2
    ids, mask = inputs(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    expected = full(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, expected, rtol=1e-10, atol=1e-10)


def by_loops(mixer, hidden):
    """One row (n, e) without padding, token by token."""
    cfg, length, dim = mixer.config, len(hidden), mixer.head_dim
    factor, kernel = cfg.compression_factor, cfg.kernel
    q, k, v = (linear(hidden) for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = torch.zeros_like(hidden)
    for head in range(mixer.num_heads):
        part = slice(head * dim, head * dim + dim)
        pairs = []
        for end in range(factor - 1, length + factor - 1, factor):  # the last token of each segment
            taps = [(t, end - kernel + 1 + t) for t in range(kernel)]
            pairs.append([
                sum(x[j, part] @ mixer.convolution[which, head, t] for t, j in taps if 0 <= j < length)
                for which, x in enumerate((k, v))
            ])  # fmt: skip
        for i in range(length):
            read = [pair for s, pair in enumerate(pairs) if not cfg.is_decoder or (s + 1) * factor - 1 <= i]
            if read:
                keys, values = (torch.stack(x) for x in zip(*read, strict=True))
                out[i, part] = (q[i, part] @ keys.T / dim**0.5).softmax(-1) @ values
    return mixer.o_proj(out)


@torch.no_grad()
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("factor", "kernel"), [(3, None), (4, 6), (2, 7), (30, None)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_mixer_equals_loops(decoder, factor, kernel, implementation):
    fields = {"compression_factor": factor, "kernel_size": kernel, "is_decoder": decoder}
    mixer = build(COMPRESSED, {**FIELDS, **fields}).layers[0].mixer
    mixer.convolution.normal_(std=0.3)
    mixer.config._attn_implementation = implementation
    lengths, hidden = (23, 1, 14, 8), torch.randn(4, 23, 32, dtype=torch.float64)
    keep = torch.arange(23) < torch.tensor(lengths)[:, None]
    positions = (keep.cumsum(1) - 1).masked_fill(~keep, -1)
    out, weights = mixer(hidden, SequenceInfo(positions, padding_mask=keep, lengths=lengths))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], by_loops(mixer, hidden[row, :length]), rtol=1e-10, atol=1e-10)
    assert (weights is None) == (implementation == "sdpa")


def test_weights_stand_in_equal_parts_at_the_tokens_of_a_segment():
    model = build(COMPRESSED, FIELDS, is_decoder=True)
    weights = model(inputs(1, 11), output_attentions=True).attentions[0][0]
    rows = weights.sum(-1)
    assert rows[:, :3].abs().max() == 0  # nothing is whole yet
    torch.testing.assert_close(rows[:, 3:], torch.ones_like(rows[:, 3:]))
    segments = weights[..., :8].unflatten(-1, (2, 4))
    assert segments.equal(segments[..., :1].expand_as(segments))
    assert weights[..., 8:].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("kernel", [None, 10])
def test_the_cache_holds_segments_and_what_is_not_one_yet(kernel):
    fields = {"compression_factor": 4, "kernel_size": kernel, "block_size": 8}
    model = build(COMPRESSED, fields, "CausalLM", max_position_embeddings=512)
    how = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    cache = model.generate(inputs(2, 100), max_new_tokens=101, **how).past_key_values
    local, compressed = cache.layers
    assert isinstance(local, PatternCacheLayer)
    assert isinstance(compressed, CompressedCacheLayer)
    assert local.keys.shape[2] <= 2 * 8
    assert compressed.count == 200 // 4
    assert compressed.stored.shape[3] <= 1.25 * 50 + 16
    assert compressed.pending.shape[3] == (4 if kernel is None else 12)
    assert compressed.get_seq_length() == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression_factor": 0}, r"compression_factor \(0\) must be at least 1: 1 keeps every token"),
        ({"compression_factor": 4, "kernel_size": 3}, r"kernel_size \(3\) must be at least 4: .* no token may go unre"),
        ({"block_size": 0}, r"block_size \(0\) must be at least 1"),
        ({"attention_layers": []}, r"attention_layers \(\[\]\) must name a kind"),
        ({"attention_layers": ["global"]}, "attention_layers"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(COMPRESSED, fields)


def test_kinds_are_tiled_over_the_layers():
    model = build(COMPRESSED, {"num_hidden_layers": 5})
    assert [layer.mixer.is_local for layer in model.layers] == [True, False, True, False, True]  # the paper's LMLML

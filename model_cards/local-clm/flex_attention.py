"""Softmax attention over a drawn pattern by FlexAttention, torch's compiled block-sparse kernel; meant for CUDA."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from .patterns import AttentionPattern


@lru_cache(maxsize=1)
def compiled_flex_attention():
    return torch.compile(flex.flex_attention, dynamic=False)


def flex_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    keep: Tensor | None = None,
    global_mask: Tensor | None = None,
    block_masks: dict | None = None,
) -> Tensor:
    """The sum of `sparse_attention`; shapes as `blocked_attention`. `block_masks` keeps the masks it makes.

    On a CPU the kernel has no backward: ValueError.
    """
    batch, num_heads, length, _ = q.shape
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "attn_implementation='flex_attention' cannot train on a CPU, where the kernel has no backward: "
            "use attn_implementation='sdpa', which is faster there."
        )
    block_masks = {} if block_masks is None else block_masks
    key = (pattern, num_heads)
    if key not in block_masks:
        rows, size = [length] * batch if keep is None else keep.sum(1).tolist(), pattern.block_size
        drawn = torch.empty(0)
        if pattern.num_random_blocks:
            tables = [pattern.random_blocks(num_heads, -(-row // size)) for row in rows]
            most = -(-length // size)
            drawn = torch.stack([F.pad(t, (0, 0, 0, most - t.shape[1]), value=-1) for t in tables]).to(q.device)
        real = torch.tensor(rows, device=q.device)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            allowed = pattern.in_window(i, j) | pattern.is_global(i, real[b]) | pattern.is_global(j, real[b])
            if global_mask is not None:
                allowed = allowed | global_mask[b, i] | global_mask[b, j]
            for draw in range(pattern.num_random_blocks):
                allowed = allowed | (drawn[b, h, i // size, draw] == j // size)
            if pattern.causal:
                allowed = allowed & (j <= i)
            return allowed & (j < real[b]) & (i < real[b])

        alike = keep is None and global_mask is None
        block_masks[key] = flex.create_block_mask(
            mask,
            B=1 if alike else batch,
            H=num_heads if pattern.num_random_blocks else 1,
            Q_LEN=length,
            KV_LEN=length,
            device=q.device,
        )
    out = compiled_flex_attention()(q, k, v, block_mask=block_masks[key])
    return out if keep is None else out.masked_fill(~keep[:, None, :, None], 0)

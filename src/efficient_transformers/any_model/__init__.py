"""Efficient attention inside any transformers model.

`attention.efficient_attention` and `masks.efficient_mask` are registered under the key "efficient", so that
`attn_implementation="efficient"` computes sliding windows sparsely. `set_attention` sets another rule for any layer,
`resize_positions` lengthens a learned position table, and `BoundedCache` keeps only what a windowed decoder needs.
"""

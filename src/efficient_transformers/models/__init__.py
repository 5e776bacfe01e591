"""The shipped folder: every checkpoint carries the files that its variant needs.

It is flat and imports only `from .sibling import name`, the standard library, torch, numpy, transformers and
huggingface_hub, because that is what transformers can copy beside a checkpoint. The prefix of a file is its tier:

    ops_*       arithmetic of tensors and descriptions of what to compute; no transformers
    attn_*      attention rules, functions of tensors: attn_dense is the reference that every other one must equal
    base_*      what all models share: configuration, mixer, embeddings, blocks, packing, cache, backbone, heads
    modeling_*  one page per variant

A file imports files of lower tiers, and of its own tier as long as there is no circle; no variant imports another.

Axes, named once: b batch · n queries · m keys · h heads · d head dim · e hidden size · g global tokens · w window.
"""

"""The shipped folder: every checkpoint carries the files of it that its variant needs.

It is flat and imports only `from .sibling import name`, the standard library, torch, transformers and huggingface_hub,
because that is what transformers can copy beside a checkpoint. Imports point downwards through four tiers:

    0  arithmetic of tensors and descriptions     checks, packing, patterns, tiles, feature_maps, hashing, clustering, …
    1  whole attention rules                      softmax_, sparse_, linear_, slot_, synthetic_attention, …
    2  what every model shares                    configuration, caching, attention, reversible, backbone, heads
    3  one page per variant                       modeling_<variant>

Axes, named once: b batch · n queries · m keys · h heads · d head dim · e hidden size · g global tokens · w window.
"""

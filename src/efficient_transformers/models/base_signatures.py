"""What every `forward` shares: the keywords it accepts, the cache under both of its names, and tuples on request."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed `past_key_values` to `cache`: the argument of `forward` and the field of its output
CACHE_FIELD = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
# Padding-free collators describe packed rows in these as well; here the `position_ids` that they add say the same.
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
# Keywords that Trainer, `generate`, PEFT, TRL and data collators pass to any model.
SHARED = {"cache", "cache_position", "num_items_in_batch", "return_dict", *PACKING}


def keywords(forward: Callable) -> set[str]:
    """Names of the arguments that `forward` lists."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {name for name, parameter in signature(forward).parameters.items() if parameter.kind in named} - {"self"}


def accepts(*more: Iterable[str]) -> Callable[[Callable], Callable]:
    """Decorator of a `forward`: it accepts the keywords it lists, those of `more`, and those in SHARED.

    A keyword that no code looks at would be an option silently dropped, so any other one raises TypeError. `cache`
    reaches `forward` as `past_key_values`; `return_dict=False`, as an argument or in the config, returns a tuple.
    """

    def decorate(forward: Callable) -> Callable:
        accepted = keywords(forward).union(SHARED, *more)

        @wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in accepted:
                    refuse(type(self).__name__, name, accepted)
            settle_cache(kwargs)
            check_packing(kwargs)
            return_dict = kwargs.pop("return_dict", None)
            output = forward(self, *args, **kwargs)
            if return_dict is None:
                return_dict = self.config.return_dict
            return output if return_dict or isinstance(output, tuple) else output.to_tuple()

        return wrapper

    return decorate


def refuse(model: str, name: str, accepted: set[str]) -> None:
    """Raise TypeError for a keyword outside `accepted`, naming the one that was probably meant."""
    nearest = get_close_matches(name, accepted, n=1, cutoff=0.0)[0]
    raise TypeError(
        f"{model}.forward() got {name!r}, which it does not take. The nearest keyword is {nearest!r}; all are: "
        f"{', '.join(sorted(accepted))}."
    )


def settle_cache(kwargs: dict[str, Any]) -> None:
    """Leave the cache under the name `past_key_values`."""
    cache = kwargs.pop("cache", None)
    if cache is None:
        return
    if kwargs.get("past_key_values") is not None:
        raise TypeError("past_key_values and cache are two names of one argument: pass one of them.")
    kwargs["past_key_values"] = cache


def check_packing(kwargs: dict[str, Any]) -> None:
    """Drop what repeats `position_ids` or the cache, and raise ValueError where it would be the only description."""
    given = [name for name in sorted(PACKING) if kwargs.pop(name, None) is not None]
    if given and kwargs.get("position_ids") is None:
        raise ValueError(
            f"{', '.join(given)} cannot divide packed rows without position_ids, which start at 0 in each document: "
            "pass those, as DataCollatorWithFlattening(return_position_ids=True) does."
        )
    kwargs.pop("cache_position", None)  # the cache counts its tokens itself

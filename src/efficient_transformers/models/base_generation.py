"""What `generate` of transformers asks of a causal model with caches of its own."""

from typing import Any, NoReturn

from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from .base_cache import SelectableRows


class OwnCacheGeneration:
    """Mixin of the causal heads. It comes before transformers' GenerationMixin."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """True; transformers decides it by the name of the class, and EtReformer's contains "reformer"."""
        return True

    def check_rollback(self) -> None:
        """Raise ValueError unless tokens can be removed from the cache of this model."""
        for layer in self.model.open_cache(None, True).layers:  # type: ignore[attr-defined]
            layer.activate_past_recording()
            if not layer.is_croppable:
                raise ValueError(
                    f"{type(self).__name__} cannot generate with an assistant or by prompt look-up, nor be an "
                    f"assistant: its cache keeps {layer.kept}, from which rejected candidates cannot be removed. Leave "
                    "out assistant_model and prompt_lookup_num_tokens."
                )

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self.check_rollback()  # before transformers' check, which does not say why
        super()._validate_generation_mode(generation_mode, *args)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: GenerationMode, *args: Any
    ) -> None:
        """Fill the cache with this model's layers at once, so that those of windows record what `crop` will need."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)  # type: ignore[misc]
        if generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant:
            return
        self.check_rollback()
        cache: Cache | None = model_kwargs.get("past_key_values", model_kwargs.get("cache"))
        if cache is not None:
            for layer in self.model.open_cache(cache, True).layers:  # type: ignore[attr-defined]
                assert isinstance(layer, SelectableRows)
                layer.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """What `generate_batch` begins with."""
        raise NotImplementedError(
            f"{type(self).__name__} has no continuous batching (generate_batch): it stores keys and values in pages "
            "that only transformers' own attention functions can attend to, and this model has a cache of its own. Use "
            "generate with a padded batch and its attention_mask."
        )

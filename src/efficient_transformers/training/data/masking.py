"""Masked language modelling: select the tokens to predict, and replace them."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from .packing import IGNORED, NO_WORD, Window, Windows

MASKED, RANDOM = 0.8, 0.1  # the other selected tokens stay unchanged


@dataclass
class Masker:
    """Mask windows as in BERT (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Selects the share `probability` of a window's words (tokens, without whole-word masking), at least one. A selected
    token becomes the mask token with probability 0.8, a random token that is not special with 0.1, and otherwise stays
    unchanged.
    transformers' DataCollatorForLanguageModeling is not used: it draws from one running generator, whose state a
    resumed run cannot restore. For whole words, it also omits the two cases of probability 0.1, treats text without
    spaces as one word, and compares every pair of tokens.
    """

    mask_id: int
    vocabulary: np.ndarray  # ids that may replace a selected token
    probability: float = 0.15

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, probability: float) -> "Masker":
        ids = np.array(sorted(tokenizer.get_vocab().values()))
        mask_id = tokenizer.get_vocab()[str(tokenizer.mask_token)]
        return cls(mask_id, np.setdiff1d(ids, tokenizer.all_special_ids), probability)

    def __call__(self, window: Window, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels."""
        words = np.unique(window.words[window.words != NO_WORD])
        chosen = rng.choice(words, max(1, round(self.probability * len(words))), replace=False)
        is_chosen = np.isin(window.words, chosen)
        draw = rng.random(len(window.ids))
        others = rng.choice(self.vocabulary, len(window.ids))
        ids = np.where(is_chosen & (draw < MASKED), self.mask_id, window.ids)
        ids = np.where(is_chosen & (draw >= MASKED) & (draw < MASKED + RANDOM), others, ids)
        return ids, np.where(is_chosen, window.ids, IGNORED)


class MaskedWindows(Windows):
    """Windows whose masks depend only on the seed and their index: the same at every access, in any batch."""

    epoch: tuple[int, ...] = ()

    def __init__(self, windows: list[Window], masker: Masker, seed: int):
        super().__init__(windows)
        self.masker, self.seed = masker, seed

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, *self.epoch, index))
        ids, labels = self.masker(self.windows[index], rng)
        return {"input_ids": ids, "labels": labels}

    def counts(self) -> dict[str, int]:
        return {"masked_tokens": sum(int((self[i]["labels"] != IGNORED).sum()) for i in range(len(self)))}


class RemaskedWindows(MaskedWindows):
    """Masked windows with different masks in every epoch, which also depend on its number."""

    def set_epoch(self, *epoch: int) -> None:
        self.epoch = epoch

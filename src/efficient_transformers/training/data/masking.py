"""Masked language modelling: which tokens are to be predicted, and what stands in their place."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from .packing import IGNORED, NO_WORD, Window, Windows

MASKED, RANDOM = 0.8, 0.1  # the rest of the chosen tokens stays as it is


@dataclass
class Masker:
    """Masks windows as in BERT (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Of a window's words (without whole words, its tokens) the share `probability` is chosen, at least one. A chosen
    token becomes the mask token with probability 0.8, a random token that is none of the special ones with 0.1, and
    else stays as it is.
    transformers' DataCollatorForLanguageModeling is not used: it draws from one running generator, which a continued
    run cannot take up where the killed one was; and for whole words it leaves out the 0.1 and 0.1, takes what no space
    divides for one word, and compares every token with every other one.
    """

    mask_id: int
    vocabulary: np.ndarray  # ids that may stand in for a chosen token
    probability: float = 0.15

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, probability: float) -> "Masker":
        ids = np.array(sorted(tokenizer.get_vocab().values()))
        mask_id = tokenizer.get_vocab()[str(tokenizer.mask_token)]
        return cls(mask_id, np.setdiff1d(ids, tokenizer.all_special_ids), probability)

    def __call__(self, window: Window, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels."""
        words = np.unique(window.words[window.words != NO_WORD])
        chosen = rng.choice(words, max(1, round(self.probability * len(words))), replace=False)
        is_chosen = np.isin(window.words, chosen)
        draw = rng.random(len(window.ids))
        others = rng.choice(self.vocabulary, len(window.ids))
        ids = np.where(is_chosen & (draw < MASKED), self.mask_id, window.ids)
        ids = np.where(is_chosen & (draw >= MASKED) & (draw < MASKED + RANDOM), others, ids)
        return ids, np.where(is_chosen, window.ids, IGNORED)


class MaskedWindows(Windows):
    """Windows whose masks follow from the seed and their index alone: the same each time, in whatever batch."""

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
    """The same with other masks in every epoch, which follow from its number, too."""

    def set_epoch(self, *epoch: int) -> None:
        self.epoch = epoch

"""Self-critical training (Rennie et al. 2017): the model draws captions, and learns to prefer the better ones.

For each photo, several captions are drawn at random. The advantage of a caption is its CIDEr-D minus the mean CIDEr-D
of the photo's other captions. The loss weighs the log-probability of every word of a caption with its advantage, so
captions above the mean become likelier (Luo 2020, "A better variant of self-critical sequence training").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from captioner.config import DecodingOptions
from captioner.datasets.annotations import Example
from captioner.datasets.batches import Batch
from captioner.metrics import CiderD
from captioner.networks.decoder import Decoder, HiddenState
from captioner.training.network import draw
from captioner.vocabulary import Vocabulary

_DRAWN = 5  # captions a photo


@dataclass(frozen=True)
class Drawn:
    """Captions that the model drew, as a batch to learn from."""

    batch: Batch
    weights: Float[Tensor, " words"]  # of each of the batch's targets: the advantage of its caption, over the words
    reward: float  # mean CIDEr-D, 0 to 10


class Reward:
    """Draws captions of training photos, and scores them against the human captions."""

    def __init__(
        self,
        examples: Sequence[Example],
        rows: npt.NDArray[np.int64],
        vocabulary: Vocabulary,
        *,
        max_words: int = DecodingOptions.max_words,
        device: torch.device | str = "cpu",
    ) -> None:
        """Count the n-grams of the human captions.

        `[end]` counts as a word of theirs, so a drawn caption that breaks off scores less.

        Args:
            examples: photos with their captions.
            rows: row of the source of each example, `(examples,)`.
            vocabulary: words are compared by their ids.
            max_words: words of the longest caption that is drawn, `[end]` included.
            device: where the model draws.
        """
        #: Words that are never drawn.
        self.never = torch.tensor([vocabulary.pad, vocabulary.start, vocabulary.unk], device=device)
        ids = iter(vocabulary.encode([caption for example in examples for caption in example.captions]))
        pairs = zip(rows.tolist(), examples, strict=True)
        self._cider = CiderD({row: [next(ids)[1:] for _ in example.captions] for row, example in pairs})
        self._vocabulary, self._max_words = vocabulary, max_words

    def draw(
        self, decoder: Decoder, state: HiddenState, batch: Batch, generator: torch.Generator | None = None
    ) -> Drawn:
        """Draw captions of a batch's photos, without dropout, and compute their advantages.

        Probabilities are taken among the words that can be drawn, here and in the loss (see `never`). Otherwise the
        words that never are drawn would become likelier whenever a drawn word becomes less likely, and nothing would
        ever make them less likely again.

        Args:
            decoder: the model that draws.
            state: the hidden states that the photos set, `(layers, photos, hidden)` each.
            batch: the photos; its own captions are not used.
            generator: decides which captions are drawn.
        """
        words = (
            self.words(decoder, state, generator).cpu().numpy()
        )  # the host waits for the device here, and nowhere before
        vocabulary = self._vocabulary
        ended = words == vocabulary.end
        lengths = np.where(ended.any(1), ended.argmax(1) + 1, words.shape[1])  # `[end]` included
        captions = [row[:length].tolist() for row, length in zip(words, lengths, strict=True)]
        photo = np.arange(len(batch.rows)).repeat(_DRAWN)
        rows = batch.rows.cpu().numpy()
        scores = self._cider(rows[photo].tolist(), captions).reshape(-1, _DRAWN)
        advantages = (scores - scores.mean(1, keepdims=True)) * (_DRAWN / (_DRAWN - 1))
        tokens = np.concatenate([np.full((len(words), 1), vocabulary.start), words], axis=1)[:, : lengths.max() + 1]
        weights = torch.from_numpy((advantages.flatten() / lengths.sum()).repeat(lengths)).float()
        device = batch.rows.device
        drawn = Batch.of(None, rows, photo, tokens, lengths + 1).to(device)
        return Drawn(replace(drawn, photos=batch.photos), weights.to(device, non_blocking=True), float(scores.mean()))

    @torch.no_grad()
    def words(
        self, decoder: Decoder, state: HiddenState, generator: torch.Generator | None = None
    ) -> Int[Tensor, "captions time"]:
        """Draw the words of several captions a photo, `[end]` and meaningless words behind it included."""
        state = tuple(part.repeat_interleave(_DRAWN, dim=1) for part in state)
        tokens = torch.full((state[0].shape[1],), self._vocabulary.start, device=self.never.device)
        words, over = [], torch.zeros(len(tokens), dtype=torch.bool, device=self.never.device)
        for _ in range(self._max_words):
            logits, state = decoder.step(tokens, state)
            tokens = draw(logits.float().index_fill(1, self.never, -torch.inf), generator)
            words.append(tokens)
            over = over | (tokens == self._vocabulary.end)
            if self._looks(over) and bool(over.all()):
                break
        return torch.stack(words, dim=1)

    @staticmethod
    def _looks(over: Tensor) -> bool:
        """Whether it costs little to ask if all captions have ended: it does where no device has to be waited for."""
        return over.device.type == "cpu"

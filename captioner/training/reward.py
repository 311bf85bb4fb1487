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
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner.config import DecodingOptions, Precision
from captioner.datasets.annotations import Example
from captioner.datasets.batches import Batch
from captioner.decoding.search import decode
from captioner.metrics import CiderD
from captioner.networks.decoder import Decoder
from captioner.networks.inference import TorchDecoder
from captioner.vocabulary import Vocabulary

_DRAWN = 5  # captions a photo


@dataclass(frozen=True)
class Drawn:
    """Captions that the model drew, as a batch to learn from."""

    batch: Batch
    weights: Float[Tensor, " words"]  # of each of the batch's targets: the advantage of its caption
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
        precision: Precision = "auto",
    ) -> None:
        """Count the n-grams of the human captions.

        `[end]` counts as a word of theirs, so a drawn caption that breaks off scores less.

        Args:
            examples: photos with their captions.
            rows: row of the source of each example, `(examples,)`.
            vocabulary: words are compared by their ids.
            max_words: longest caption that is drawn.
            precision: of the drawing.
        """
        # Empty captions may be drawn: the gradient is right only if every caption that has a probability can be.
        self._options = DecodingOptions("sample", num_captions=_DRAWN, min_words=0, max_words=max_words)
        self._precision: Precision = precision
        self._never = torch.tensor([vocabulary.pad, vocabulary.start, vocabulary.unk])
        ids = iter(vocabulary.encode([caption for example in examples for caption in example.captions]))
        pairs = zip(rows.tolist(), examples, strict=True)
        self._cider = CiderD({row: [next(ids)[1:] for _ in example.captions] for row, example in pairs})
        self._vocabulary = vocabulary

    def draw(self, decoder: Decoder, features: Float[Tensor, "photos 4096"], batch: Batch, *, seed: int) -> Drawn:
        """Draw captions of a batch's photos, without dropout, and compute their advantages.

        Args:
            decoder: the model that draws.
            features: of the batch's photos.
            batch: the photos; its own captions are not used.
            seed: decides, together with the features, which captions are drawn.
        """
        vocabulary = self._vocabulary
        options = replace(self._options, seed=seed)
        found = decode(TorchDecoder(decoder, self._precision), features.float().cpu().numpy(), vocabulary, options)
        captions = [[*one.tokens, *([vocabulary.end] if one.finished else [])] for some in found for one in some]
        rows = [row for row in batch.rows.tolist() for _ in range(_DRAWN)]
        scores = self._cider(rows, captions).reshape(-1, _DRAWN)
        advantages = (scores - scores.mean(1, keepdims=True)) * (_DRAWN / (_DRAWN - 1))
        lengths = torch.tensor([len(caption) + 1 for caption in captions])
        tokens = torch.full((len(captions), int(lengths.max())), vocabulary.pad)
        tokens[:, 0] = vocabulary.start
        for row, caption in enumerate(captions):
            tokens[row, 1 : len(caption) + 1] = torch.tensor(caption)
        photo = torch.arange(len(batch.photos)).repeat_interleave(_DRAWN)
        weights = torch.from_numpy(advantages).float().flatten().repeat_interleave(lengths - 1)
        drawn = Batch(batch.photos, batch.rows, photo, tokens, lengths).to(features.device)
        return Drawn(drawn, weights.to(features.device), float(scores.mean()))

    def loss(self, logits: Float[Tensor, "words vocabulary"], drawn: Drawn) -> Float[Tensor, ""]:
        """A loss whose gradient estimates that of minus the expected reward.

        Probabilities are taken among the words that can be drawn. Otherwise the words that never are drawn would become
        likelier whenever a drawn word becomes less likely, and nothing would ever make them less likely again.

        Args:
            logits: of the words of `drawn.batch`.
            drawn: captions and their advantages.
        """
        possible = logits.float().index_fill(1, self._never.to(logits.device), -torch.inf)
        losses = F.cross_entropy(possible, drawn.batch.targets, reduction="none")
        return (losses * drawn.weights).mean()

"""Self-critical training (Rennie et al. 2017): captions that the model draws itself are made likelier or less likely.

Each photo gets several captions, drawn at random. By what a caption's CIDEr-D is above the mean of the photo's other
captions, the log-probability of its words is weighed (Luo 2020, "A better variant of self-critical sequence training").
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

from captioner.config import DecodingOptions
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
    """Captions that were drawn, as a batch to learn from."""

    batch: Batch
    weights: Float[Tensor, " words"]  # of the log-probability of each of the batch's targets
    reward: float  # mean CIDEr-D, 0 to 10


class Reward:
    """What drawn captions are worth, by the human captions of the training photos."""

    def __init__(
        self,
        examples: Sequence[Example],
        rows: npt.NDArray[np.int64],
        vocabulary: Vocabulary,
        options: DecodingOptions | None = None,
    ) -> None:
        """Prepare the references. `[end]` is one of their words, so that a caption which breaks off is worth less.

        Args:
            examples: photos with their captions.
            rows: row of the source of each example, `(examples,)`.
            vocabulary: words are compared by their ids.
            options: whose longest length counts.
        """
        options = options or DecodingOptions()
        # An empty caption may be drawn too: what can be drawn must be what the model gives probability to.
        self._options = DecodingOptions("sample", num_captions=_DRAWN, min_words=0, max_words=options.max_words)
        self._never = torch.tensor([vocabulary.pad, vocabulary.start, vocabulary.unk])
        ids = iter(vocabulary.encode([caption for example in examples for caption in example.captions]))
        pairs = zip(rows.tolist(), examples, strict=True)
        self._cider = CiderD({row: [next(ids)[1:] for _ in example.captions] for row, example in pairs})
        self._vocabulary = vocabulary

    def draw(self, decoder: Decoder, features: Float[Tensor, "photos 4096"], batch: Batch, *, seed: int) -> Drawn:
        """Draw captions of a batch's photos, without dropout, and weigh them.

        Args:
            decoder: writes.
            features: of the batch's photos.
            batch: its own captions are not used.
            seed: decides, together with the features, what is drawn.
        """
        vocabulary = self._vocabulary
        options = replace(self._options, seed=seed)
        found = decode(TorchDecoder(decoder, "fp32"), features.float().cpu().numpy(), vocabulary, options)
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
        """What has the gradient of minus the expected reward.

        The probability of a word is that among the words that could be drawn: those that never are would only ever
        gain by what the others lose.

        Args:
            logits: of the batch of `drawn`.
            drawn: captions and what they are worth.
        """
        possible = logits.float().index_fill(1, self._never.to(logits.device), -torch.inf)
        losses = F.cross_entropy(possible, drawn.batch.targets, reduction="none")
        return (losses * drawn.weights).mean()

"""All that training changes, as one module: captions and photos in, the sum of the words' losses out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner.datasets.batches import Batch
from captioner.networks.decoder import Decoder, HiddenState
from captioner.networks.encoder import Encoder
from captioner.training.loss import word_losses


class Network(nn.Module):
    """The decoder, and the encoder where it is not frozen."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder if encoder.trainable else None
        self.encoder_learns = encoder.trainable

    def forward(
        self,
        batch: Batch,
        weights: Float[Tensor, " words"] | None = None,
        *,
        smoothing: float = 0.0,
        own_words: float = 0.0,
        never: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum of the losses of a batch's words, see `word_losses`.

        Args:
            batch: captions and photos.
            weights: see `word_losses`.
            smoothing: see `word_losses`.
            own_words: share of the words read that the model wrote itself (scheduled sampling, Bengio et al. 2015).
            never: see `word_losses`.
        """
        state = self.start(batch)
        inputs = batch.inputs if own_words == 0 else self._partly_own(batch, state, own_words)
        return word_losses(
            self._hidden(batch, state, inputs), self.decoder.output, batch.targets, weights,
            smoothing=smoothing, never=never,
        )  # fmt: skip

    def features(self, batch: Batch) -> Float[Tensor, "photos 4096"]:
        """Features of a batch's photos."""
        assert batch.photos is not None
        if self.encoder is None:
            return batch.photos
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            features: Tensor = self.encoder(batch.photos)
        return features

    def start(self, batch: Batch) -> HiddenState:
        """The hidden state of each caption, computed once a photo."""
        # An embedding, whose gradient a GPU adds up in fp32 and always in the same order, unlike `index_select`'s.
        return tuple(
            torch.stack([F.embedding(batch.photo, layer) for layer in part])
            for part in self.decoder.start(self.features(batch))
        )

    def train(self, mode: bool = True) -> Network:
        """Set the mode; an encoder that does not learn (yet) keeps its statistics."""
        super().train(mode)
        if self.encoder is not None and not self.encoder_learns:
            self.encoder.eval()
        return self

    def let_encoder_learn(self, learns: bool) -> None:
        """Freeze the encoder for now, or set it free."""
        if self.encoder is not None:
            self.encoder_learns = learns
            self.encoder.requires_grad_(learns)

    def _hidden(
        self, batch: Batch, state: HiddenState, inputs: Int[Tensor, "batch before"]
    ) -> Float[Tensor, "words hidden"]:
        return self.decoder.read(state, inputs).flatten(0, 1).index_select(0, batch.keep)

    @torch.no_grad()
    def _partly_own(self, batch: Batch, state: HiddenState, share: float) -> Int[Tensor, "batch before"]:
        """The words to read, some of them replaced by draws of the model that has read the human words before.

        One more pass over the captions takes the place of a pass word by word (Mihaylova & Martins 2019).
        """
        inputs = batch.inputs.contiguous()
        # A word is read one position behind the one where it is predicted, unless that was the last of its row.
        read = (batch.keep + 1) % inputs.shape[1] != 0
        positions = (batch.keep + 1) * read  # elsewhere the first `[start]`, which stays
        human = inputs.flatten().index_select(0, positions)
        own = draw(self.decoder.output(self._hidden(batch, state, inputs)))
        chosen = read & (torch.rand(read.shape, device=read.device) < share)
        return inputs.flatten().scatter(0, positions, torch.where(chosen, own, human)).view_as(inputs)


def draw(logits: Float[Tensor, "rows vocabulary"], generator: torch.Generator | None = None) -> Int[Tensor, " rows"]:
    """A word a row, as likely as the logits say (Gumbel 1954): nothing here waits for a device."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    drawn: Tensor = (logits.float() - noise.log_()).argmax(1)
    return drawn


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch normalisation use the statistics of a batch without remembering them."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum

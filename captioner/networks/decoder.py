"""The recurrent decoder: 4096 numbers set its first hidden state, then it writes word after word.

This is "init-inject" of Tanti et al. 2018 ("Where to put the image in an image caption generator"): the photo enters
through h0 and c0 and nowhere else. `step` defines the model. `forward` computes the same for whole captions with
torch's fused kernels, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner.config import FEATURE_SIZE, DecoderConfig

#: Hidden state, `(layers, batch, hidden)`; an LSTM has two of them: h and c.
HiddenState = tuple[Tensor, ...]


class Standardise(nn.Module):
    """Zero mean and unit variance a channel: batch normalisation (Ioffe & Szegedy 2015) without scale and shift.

    The features of all photos are much alike, and their differences are small beside their mean; standardised, the
    differences are large. In training, the statistics are those of the batch, unless it is a single photo; elsewhere
    they are running averages over the batches of training.
    """

    _SHARE = 0.02  # weight of a new batch in the running averages, which so extend over about 50 batches

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURE_SIZE))
        self.register_buffer("variance", torch.ones(FEATURE_SIZE))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, features: Float[Tensor, "batch 4096"], *, training: bool) -> Float[Tensor, "batch 4096"]:
        """Standardise features; in training, with the statistics of the batch, which then enter the averages."""
        if not training or len(features) == 1:
            return F.batch_norm(features, self.mean, self.variance)
        with torch.no_grad():
            variance, mean = torch.var_mean(features.detach().to(self.mean.dtype), dim=0)
            self.batches += 1
            # The first 50 batches count alike, so that the average of a few does not depend on its initial value.
            share = (1 / self.batches).clamp(min=self._SHARE)
            self.mean.lerp_(mean, share)
            self.variance.lerp_(variance, share)
        return F.batch_norm(features, None, None, training=True)


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) that draws four masks from one random number, where a processor draws them.

    torch's own takes 10 ns a number there, 8 % of a training step. The share is a multiple of 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share of the numbers, and scale the others so that their sum is expected to stay."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept * (1 / (1 - self.p))


_LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh, "irnn": torch.rnn_relu,
}  # fmt: skip


class Decoder(nn.Module):
    """The recurrent network that writes captions from features."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        E, H, L = config.embedding_size, config.hidden_size, config.layers
        self.embedding = nn.Embedding(vocabulary_size, E)
        if config.cell == "lstm":
            self.rnn: nn.RNNBase = nn.LSTM(E, H, L, batch_first=True)
        elif config.cell == "gru":
            self.rnn = nn.GRU(E, H, L, batch_first=True)
        else:
            self.rnn = nn.RNN(E, H, L, batch_first=True, nonlinearity="relu" if config.cell == "irnn" else "tanh")
        self.states = 2 if config.cell == "lstm" else 1
        if config.feature_norm == "standard":
            self.standard = Standardise()
        self.initial = nn.Linear(FEATURE_SIZE, self.states * L * H)
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(H, vocabulary_size)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        H = self.config.hidden_size
        nn.init.normal_(self.embedding.weight, std=0.1)
        # Small output weights: at first all words are about equally likely, so the first loss is about ln V.
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)
        nn.init.xavier_uniform_(self.initial.weight)
        nn.init.zeros_(self.initial.bias)
        for layer in range(self.config.layers):
            weight_hh: Tensor = getattr(self.rnn, f"weight_hh_l{layer}")
            bias_ih: Tensor = getattr(self.rnn, f"bias_ih_l{layer}")
            bias_hh: Tensor = getattr(self.rnn, f"bias_hh_l{layer}")
            bias_ih.zero_()
            bias_hh.zero_()
            if self.config.cell == "lstm":
                bias_ih[H : 2 * H] = 1.0  # the forget gate starts open (Jozefowicz et al. 2015)
            elif self.config.cell == "irnn":
                weight_hh.copy_(torch.eye(H))  # Le et al. 2015

    def start(self, features: Float[Tensor, "batch 4096"]) -> HiddenState:
        """The hidden state that a photo sets.

        Args:
            features: of the encoder, `(batch, 4096)`.

        Returns:
            h0 (and c0 for an LSTM), `(layers, batch, hidden)` each.
        """
        return self.arrange(self.initial(self.normalise(features, training=self.training)))

    def arrange(self, initial: Float[Tensor, "batch numbers"]) -> HiddenState:
        """Turn the output of `initial`, `(batch, states * layers * hidden)`, into the hidden state."""
        B = initial.shape[0]
        # (B, states * L * H) -> (states, L, B, H)
        parts = initial.view(B, self.states, self.config.layers, self.config.hidden_size).permute(1, 2, 0, 3)
        h0 = F.relu(parts[0]) if self.config.cell == "irnn" else torch.tanh(parts[0])
        return (h0, *parts[1:])

    def step(
        self, tokens: Int[Tensor, " batch"], state: HiddenState
    ) -> tuple[Float[Tensor, "batch vocabulary"], HiddenState]:
        """Read one word, and compute how likely each word is to follow.

        Args:
            tokens: ids of the words read, `(batch,)`.
            state: hidden state, from `start` or from the step before.

        Returns:
            Logits, `(batch, vocabulary)`, and the next hidden state.
        """
        x = self.embedding(tokens)
        layers: list[tuple[Tensor, ...]] = []
        for layer in range(self.config.layers):
            layers.append(self._cell(layer, self.dropout(x), tuple(part[layer] for part in state)))
            x = layers[-1][0]
        following = tuple(torch.stack(parts) for parts in zip(*layers, strict=True))
        return self.output(self.dropout(x)), following

    def forward(
        self, features: Float[Tensor, "batch 4096"], tokens: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Read whole captions at once: position t sees the photo and the words up to t.

        Args:
            features: `(batch, 4096)`.
            tokens: ids, `(batch, time)`, from `[start]` on.

        Returns:
            Logits of the word that follows, `(batch, time, vocabulary)`.
        """
        logits: Tensor = self.output(self.read(self.start(features), tokens))
        return logits

    def read(self, state: HiddenState, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time hidden"]:
        """Read whole captions from the hidden states that photos set, up to the input of the output layer."""
        # Layer by layer: cuDNN's dropout between layers would make the host wait whenever torch gets a new seed, and
        # training gives it one a step.
        x: Tensor = self.embedding(tokens)
        for layer, weights in enumerate(self.rnn.all_weights):
            h0, *c0 = (part[layer : layer + 1].contiguous() for part in state)
            how = (True, 1, 0.0, self.training, False, True)  # with biases, one layer, no dropout, batch first
            x = _LAYERS[self.config.cell](self.dropout(x), [h0, *c0] if c0 else h0, list(weights), *how)[0]
        dropped: Tensor = self.dropout(x)
        return dropped

    def normalise(
        self, features: Float[Tensor, "batch 4096"], *, training: bool = False
    ) -> Float[Tensor, "batch 4096"]:
        """Scale features as `DecoderConfig.feature_norm` says."""
        if self.config.feature_norm == "none":
            return features
        # The signed square root, and then unit length, keep a few active channels from outweighing the others
        # (Perronnin et al. 2010). Times sqrt(4096), the numbers are about 1, as the weights of `initial` expect.
        # At 0 the slope of the root is infinite: the clamp keeps the gradient finite.
        rooted: Tensor = features.sign() * features.abs().clamp_min(1e-12).sqrt()
        scaled: Tensor = F.normalize(rooted, dim=1) * FEATURE_SIZE**0.5
        if self.config.feature_norm == "sqrt":
            return scaled
        standardised: Tensor = self.standard(scaled, training=training)
        return standardised

    def _cell(self, layer: int, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of one layer; the gates are in the order of torch's weights."""
        h = state[0]
        from_input = F.linear(x, getattr(self.rnn, f"weight_ih_l{layer}"), getattr(self.rnn, f"bias_ih_l{layer}"))
        from_hidden = F.linear(h, getattr(self.rnn, f"weight_hh_l{layer}"), getattr(self.rnn, f"bias_hh_l{layer}"))
        if self.config.cell == "lstm":
            i, f, g, o = (from_input + from_hidden).chunk(4, dim=1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        if self.config.cell == "gru":
            input_r, input_z, input_n = from_input.chunk(3, dim=1)
            hidden_r, hidden_z, hidden_n = from_hidden.chunk(3, dim=1)
            n = torch.tanh(input_n + torch.sigmoid(input_r + hidden_r) * hidden_n)
            z = torch.sigmoid(input_z + hidden_z)
            return ((1 - z) * n + z * h,)
        activate = F.relu if self.config.cell == "irnn" else torch.tanh
        return (activate(from_input + from_hidden),)

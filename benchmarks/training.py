"""How fast a decoder learns from features: captions a second, beside a plain loop and the machine's matrix rate.

    python -m benchmarks.training [--rounds N] [--batch-size N] [--device cuda]

The sizes are COCO's: 9,487 words, 512 hidden units, embeddings of 512 numbers, 5 captions of about 11 words a photo.
The ceiling is the rate at which the same machine multiplies the large matrices of a step in the same precision,
measured between the rounds; a step's share of it counts only the products that any program must compute. The plain
loop is what people write: `nn.Embedding`, `nn.LSTM`, `nn.Linear`, `cross_entropy` over padded captions, under autocast.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from benchmarks.common import report
from captioner.config import FEATURE_SIZE, DecoderConfig, EncoderConfig, OptimisationConfig
from captioner.datasets.batches import Batch, CaptionDataset
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.training.loading import Loader
from captioner.training.network import Network
from captioner.training.optimisation import clip, optimiser_of
from captioner.training.rounding import Rounding

WORDS, HIDDEN, EMBEDDING = 9487, 512, 512
PHOTOS, CAPTIONS = 2000, 5
START, END, PAD = 1, 2, 0
STEPS = 20  # a round


def captions(random: np.random.Generator) -> list[list[int]]:
    """Made-up captions with the lengths of COCO's: 10.5 words on average, seldom fewer than 8."""
    lengths = 8 + random.poisson(2.5, PHOTOS * CAPTIONS)
    return [[START, *random.integers(4, WORDS, length).tolist(), END] for length in lengths]


class Plain(nn.Module):
    """The usual captioner."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = nn.Linear(FEATURE_SIZE, 2 * HIDDEN)
        self.embedding = nn.Embedding(WORDS, EMBEDDING)
        self.rnn = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.output = nn.Linear(HIDDEN, WORDS)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits of every position."""
        h, c = self.initial(features).chunk(2, dim=1)
        found, _ = self.rnn(self.embedding(tokens), (h[None].contiguous(), c[None].contiguous()))
        logits: Tensor = self.output(F.dropout(found, 0.5, self.training))
        return logits


def products(batch: Batch) -> float:
    """Operations of the matrix products of a step, forward and backward, of real words alone."""
    words, photos = len(batch.targets), len(batch.rows)
    a_word = HIDDEN * WORDS + (EMBEDDING + HIDDEN) * 4 * HIDDEN
    # The features need no gradient; words are read and predicted.
    return 2 * (3 * words * a_word + 2 * photos * FEATURE_SIZE * 2 * HIDDEN)


def matrix_rate(device: torch.device, dtype: torch.dtype, words: int) -> float:
    """Operations a second of the products of the output layer: the largest of a step, forward and backward."""
    hidden = torch.randn(words, HIDDEN, device=device, dtype=dtype)
    weight = torch.randn(WORDS, HIDDEN, device=device, dtype=dtype)
    gradient = torch.randn(words, WORDS, device=device, dtype=dtype)
    seconds = timed(device, lambda: (hidden @ weight.T, gradient @ weight, gradient.T @ hidden), 5)
    return 3 * 2 * words * HIDDEN * WORDS / seconds


def timed(device: torch.device, work: Callable[[], object], times: int) -> float:
    """Seconds for one of several times."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


class Steps:
    """The project's steps, one a call."""

    def __init__(self, device: torch.device, rounding: Rounding, dataset: CaptionDataset, batch_size: int) -> None:
        random = np.random.default_rng(1)
        features = random.random((PHOTOS, FEATURE_SIZE), np.float32).astype(np.float16)
        self._options = OptimisationConfig(batch_size=batch_size)
        encoder = Encoder(EncoderConfig("tiny", "random", 32))
        decoder = Decoder(DecoderConfig(hidden_size=HIDDEN, embedding_size=EMBEDDING), WORDS)
        self._network = Network(encoder, decoder).to(device).train()
        self._optimiser = optimiser_of(self._network, self._options)
        load = Loader(dataset, features, device)
        self._batches = (
            batch for epoch in itertools.count() for batch in load(dataset.epoch(epoch, batch_size=batch_size, seed=0))
        )
        self._rounding = rounding
        self.parameters = sum(parameter.numel() for parameter in self._network.parameters())
        # Of the steps so far; the last batch of an epoch is smaller.
        self.operations, self.captions, self.words = 0.0, 0, 0

    def __call__(self) -> None:
        """Take a step."""
        batch = next(self._batches)
        self.operations += products(batch)
        self.captions += len(batch.tokens)
        self.words += len(batch.targets)
        with self._rounding.autocast():
            loss = self._network(batch)
        self._optimiser.zero_grad()
        self._rounding.scaled(loss * batch.weight).backward()  # type: ignore[no-untyped-call]
        self._rounding.unscale(self._optimiser)
        clip(self._network, self._options)
        self._rounding.step(self._optimiser)


def plain(device: torch.device, dtype: torch.dtype, ids: list[list[int]], batch_size: int) -> Iterator[float]:
    """Rounds of the plain loop's steps, at random and padded: seconds."""
    random = np.random.default_rng(2)
    network = Plain().to(device)
    optimiser = torch.optim.Adam(network.parameters())
    features = torch.rand(PHOTOS, FEATURE_SIZE)

    def step() -> None:
        chosen = random.integers(0, len(ids), batch_size)
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in chosen], batch_first=True).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = network(features[torch.from_numpy(chosen // CAPTIONS)].to(device), tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=PAD)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()

    while True:
        yield timed(device, step, STEPS)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="captions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rounding = Rounding(arguments.precision, device)
    ids = captions(np.random.default_rng(0))
    dataset = CaptionDataset(ids, np.arange(PHOTOS).repeat(CAPTIONS), PAD)
    size = arguments.batch_size
    mine, theirs = Steps(device, rounding, dataset, size), plain(device, rounding.dtype, ids, size)
    rows = []
    for _ in range(arguments.rounds):
        operations_before, captions_before = mine.operations, mine.captions
        seconds = timed(device, mine, STEPS)
        operations = (mine.operations - operations_before) / (STEPS + 1)
        captions_a_step = (mine.captions - captions_before) / (STEPS + 1)
        rate = matrix_rate(device, rounding.dtype, size * 11)
        rows.append((captions_a_step / seconds, size / next(theirs), operations / seconds / rate, rate / 1e9))
    rows = rows[1:] or rows  # the first one warms up
    captions_s, plain_s, share, rate = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"{device}, {rounding.dtype}, {size} captions a step, median of {len(rows)} rounds")
    report(
        "captions a second of a training step",
        ours={"captions_s": captions_s, "batch_size": size, "precision": str(rounding.dtype)},
        peer={"plain nn.LSTM, captions_s": plain_s},
        ceiling={"matrix products, Gop_s": rate},
        ratios={
            "ours / plain": statistics.median(a / b for a, b, *_ in rows),
            "products of ours / ceiling": share,
        },
    )


if __name__ == "__main__":
    main()

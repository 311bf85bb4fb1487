"""The decoder learns to write from captions without photos: of a photo it gets words of its other captions.

    python -m recipes.mini.hints DATA CAPTIONS.tsv.gz OUTPUT.pt --epochs 2

The words are summed up to a first hidden state, where later the photo's numbers stand. So the decoder learns to say
what that state holds, of many more scenes than there are photos. OUTPUT holds `{"decoder": ..., "hints": ...}`.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captioner.datasets.annotations import load
from captioner.networks.decoder import Decoder, HiddenState
from captioner.vocabulary import Vocabulary
from recipes.mini import common

Ids = npt.NDArray[np.int64]


class Texts:
    """Captions, each with words of the other captions of its photo."""

    def __init__(self, photos: Sequence[Sequence[Ids]], vocabulary: Vocabulary) -> None:
        empty = {*common.UNFINISHED, *(vocabulary.word_of(i) for i in (vocabulary.pad, vocabulary.start))}
        empty |= {vocabulary.word_of(i) for i in (vocabulary.end, vocabulary.unk)}
        self._tells = np.array([vocabulary.word_of(i) not in empty for i in range(len(vocabulary))])
        self.tokens = [caption for captions in photos for caption in captions]
        self.lengths = np.array([len(caption) for caption in self.tokens])
        self._content = [caption[self._tells[caption]] for caption in self.tokens]
        sizes = [len(captions) for captions in photos]
        self.photo = np.repeat(np.arange(len(photos)), sizes)
        self._first = np.concatenate([[0], np.cumsum(sizes)])

    def hint(self, number: int, random: np.random.Generator) -> Ids:
        """Words of some of the other captions of a caption's photo; of its own, if it has no others."""
        if random.random() < 0.1:
            return np.zeros(0, np.int64)
        photo = self.photo[number]
        others = [n for n in range(self._first[photo], self._first[photo + 1]) if n != number]
        if not others:
            return self._some([number], 0.4, random)
        return self._some(random.permutation(others)[: random.integers(len(others)) + 1], 0.7, random)

    def hint_of_photo(self, photo: int, random: np.random.Generator) -> Ids:
        """The same for a caption that is not there."""
        others = random.permutation(np.arange(self._first[photo], self._first[photo + 1]))
        return self._some(others[: random.integers(len(others)) + 1], 0.7, random)

    def _some(self, numbers: Sequence[int] | Ids, share: float, random: np.random.Generator) -> Ids:
        words = np.unique(np.concatenate([self._content[n] for n in numbers]))
        return words[random.random(len(words)) < share]


class Hints(nn.Module):
    """Words -> the first hidden state."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(decoder.vocabulary_size, decoder.initial.out_features, mode="sum")
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, decoder: Decoder, hints: Sequence[Ids]) -> HiddenState:
        """State of each bag of words."""
        return decoder.arrange(self.numbers(hints) + decoder.initial.bias)

    def numbers(self, hints: Sequence[Ids]) -> Tensor:
        """What stands for the output of `decoder.initial` without its bias."""
        starts = np.cumsum([0, *(len(hint) for hint in hints[:-1])])
        found: Tensor = self.words(torch.from_numpy(np.concatenate(hints)), torch.from_numpy(starts))
        return found


def texts(captions: Path, train: common.Set, vocabulary: Vocabulary) -> Texts:
    """Captions without photos (`id<TAB>caption` a line, gzip) that have no unknown word, and those of the photos."""
    with gzip.open(captions, "rt", encoding="utf-8") as lines:
        pairs = [line.rstrip("\n").partition("\t")[::2] for line in lines]
    ids = vocabulary.encode([caption for _, caption in pairs], common.MAX_WORDS)
    found = [(name, np.array(each)) for (name, _), each in zip(pairs, ids, strict=True) if vocabulary.unk not in each]
    photos = [[each for _, each in group] for _, group in groupby(sorted(found, key=lambda f: f[0]), lambda f: f[0])]
    photos += [[train.tokens[number] for number in numbers] for numbers in train.by_photo()]
    return Texts(photos, vocabulary)


class Reading:
    """Batches of texts of about the same length, for ever."""

    def __init__(self, texts: Texts, batch: int, random: np.random.Generator) -> None:
        self._texts, self._batch, self._random = texts, batch, random
        self._left: list[Ids] = []

    def next(self) -> tuple[list[Ids], list[Ids]]:
        """Captions, and a hint of each."""
        if not self._left:
            order = self._random.permutation(len(self._texts.tokens))
            parts = np.array_split(order, max(1, len(order) // (self._batch * 32)))
            lengths = self._texts.lengths
            ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
            batches = list(common.chunks(ordered, self._batch))
            self._left = [batches[number] for number in self._random.permutation(len(batches))]
        chosen = self._left.pop()
        captions = [self._texts.tokens[number] for number in chosen]
        return captions, [self._texts.hint(number, self._random) for number in chosen]


def loss_of(
    decoder: Decoder, hints: Hints, captions: Sequence[Ids], given: Sequence[Ids], pad: int, smoothing: float
) -> Tensor:
    """How surprising captions are after hints."""
    tokens, keep = common.collate(captions, pad)
    state = hints(decoder, given)
    with common.rounded():
        found = common.logits(decoder, state, tokens, keep)
    return common.cross_entropy(found, tokens, keep, smoothing)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("captions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two processes side by side do more than two threads that wait for each other
    torch.manual_seed(arguments.seed)
    random = np.random.default_rng(arguments.seed)
    data = load(arguments.data, check_images=False)
    vocabulary = common.vocabulary_of(data)
    train, val = (common.Set.of(data.split(split), vocabulary) for split in ("train", "val"))
    read = texts(arguments.captions, train, vocabulary)
    unread = Texts([[val.tokens[number] for number in numbers] for numbers in val.by_photo()], vocabulary)
    decoder = common.new_decoder(vocabulary)
    hints = Hints(decoder)
    parameters = [*decoder.parameters(), *hints.parameters()]
    optimiser = torch.optim.Adam(parameters, arguments.rate, betas=(0.9, 0.98), fused=True)
    reading = Reading(read, arguments.batch, random)
    steps = round(arguments.epochs * len(read.tokens) / arguments.batch)
    began, losses = time.monotonic(), []
    decoder.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * max(0.05, common.cosine(step, steps, 100))
        captions, given = reading.next()
        loss = loss_of(decoder, hints, captions, given, vocabulary.pad, 0.0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49 or step + 1 == steps:
            mean = round(float(np.mean(losses[-50:])), 3)
            print(step + 1, steps, mean, round(time.monotonic() - began), flush=True)
            torch.save({"decoder": decoder.state_dict(), "hints": hints.state_dict()}, arguments.output)
    decoder.eval()
    record = {"step": "hints", "captions": len(read.tokens), "steps": steps, "rate": arguments.rate}
    numbers = np.arange(len(unread.tokens))
    for name, hinted in (("val_loss", True), ("val_loss_without_hint", False)):
        found = []
        with torch.inference_mode():
            for some in common.chunks(numbers, 500):
                given = [unread.hint(n, random) if hinted else np.zeros(0, np.int64) for n in some]
                loss = loss_of(decoder, hints, [unread.tokens[n] for n in some], given, vocabulary.pad, 0.0)
                found.append(float(loss))
        record[name] = round(float(np.mean(found)), 4)
    common.log(arguments.output.parent / "runs.jsonl", {**record, "seconds": round(time.monotonic() - began)})


if __name__ == "__main__":
    main()

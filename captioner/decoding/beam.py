"""What is kept of the words that could come next: beam search, diverse beam search and sampling.

A policy sees the captions being written as a grid of `(searches, beams)`. A search is what one beam belongs to: an
image, a group of an image's beam, or one sample of an image. The policy chooses what fills the grid after one more
word, and which captions end here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captioner.config import DecodingOptions

_COLUMNS = 512  # the vocabulary is folded to this many columns to find the likeliest words


class Choice(NamedTuple):
    """The grid after one more word, and what ended instead."""

    parent: Int[Tensor, "searches beams"]  # the beam that was continued
    word: Int[Tensor, "searches beams"]  # with this word
    logprob: Float[Tensor, "searches beams"]  # of all words so far; -inf where nothing could be put
    ended: Float[Tensor, "searches beams"]  # log-probability of each old beam and [end]; -inf where it did not end here


@dataclass(frozen=True)
class Outlook:
    """What may come next, in each row that the model was asked about."""

    logits: Float[Tensor, "rows vocabulary"]
    #: -log of each word's probability, not below 0; inf for words that may not come, NaN where the model knows none.
    surprisal: Float[Tensor, "rows vocabulary"]

    def likeliest(
        self, count: int, always: Int[Tensor, " some"]
    ) -> tuple[Float[Tensor, "rows words"], Int[Tensor, "rows words"]]:
        """Some words, and the likeliest of the others; the surprisals of the former become inf.

        Args:
            count: how many others; fewer are given where the vocabulary has fewer.
            always: ids of the words that come first.

        Returns:
            Log-probabilities in fp32, -inf where there are none, and ids.
        """
        known = self.surprisal.index_select(1, always)
        self.surprisal.index_fill_(1, always, torch.inf)
        least, word = smallest(self.surprisal, min(count, self.surprisal.shape[1]))
        words = torch.cat([always.expand(len(word), -1), word], dim=1)
        return self.logprob(words, torch.cat([known, least], dim=1)), words

    def logprob(
        self, words: Int[Tensor, "rows words"], surprisal: Float[Tensor, "rows words"]
    ) -> Float[Tensor, "rows words"]:
        """Log-probabilities of words, in fp32, from their surprisals; -inf for words that may not come.

        In bfloat16 surprisals are rounded twice, logits once. What both add up to is the same for all words of a row;
        the least surprising one, which should be among them, tells it best.
        """
        surprisal, logits = surprisal.float(), self.logits.gather(1, words).float()
        total = (logits + surprisal).gather(1, surprisal.argmin(dim=1, keepdim=True))
        return torch.where(surprisal < torch.inf, logits - total, -torch.inf)


@dataclass(frozen=True)
class Beams:
    """The captions being written. Only rows in use were shown to the model."""

    logprob: Float[Tensor, "searches beams"]  # of all words so far; -inf in places that are empty
    rows: Int[Tensor, " rows"]  # the places of the flattened grid that the model was asked about, in its order

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """Put `(rows, n)` back into the grid: `(searches, beams, n)`, with `fill` in the rows that are not in use."""
        searches, beams = self.logprob.shape
        if len(self.rows) == searches * beams:
            return values.view(searches, beams, -1)
        grid = values.new_full((searches * beams, values.shape[1]), fill)
        return grid.index_copy_(0, self.rows, values).view(searches, beams, -1)

    def continued(self, logprob: Float[Tensor, "rows n"]) -> Float[Tensor, "searches beams n"]:
        """Log-probability of each caption with one more word, from that of the word."""
        return self.spread(logprob, -torch.inf) + self.logprob[..., None]


class Policy(Protocol):
    """How a search goes on."""

    searches: int  # an image
    beams: int  # a search
    quota: int  # captions that end before a search is over
    wanted: int  # best captions of a search that must not be missed
    distinct: bool  # a caption that was found twice counts once

    def choose(self, outlook: Outlook, beams: Beams) -> Choice:
        """Take the next word of every caption; may overwrite the surprisals."""
        ...


class BeamSearch:
    """Keeps the likeliest captions; in groups, those that differ (Vijayakumar et al. 2018, "Diverse Beam Search").

    One step of a search with W beams: of all W x V continuations and all W endings the W likeliest are taken. The
    endings among them are captions found; the beam goes on with the W likeliest continuations. With groups, a
    continuation is ranked, among the others and the endings, as if `diversity` less likely for each earlier group that
    continues with that word now.
    """

    distinct = True

    def __init__(self, options: DecodingOptions, end: int, device: torch.device) -> None:
        self.searches = options.beam_groups
        self.beams = self.quota = options.width // options.beam_groups
        self.wanted = min(options.num_captions, self.beams)
        self._diversity = options.diversity
        self._end = torch.tensor([end], device=device)

    def choose(self, outlook: Outlook, beams: Beams) -> Choice:
        """See the class."""
        # The words of a row that other groups make dearer are fewer than the whole beam: more is not needed.
        logprob, word = outlook.likeliest(self.searches * self.beams, always=self._end)
        reached, words = beams.continued(logprob), beams.spread(word, 0)
        ended, going, words = reached[..., 0], reached[..., 1:], words[..., 1:]  # (searches, beams[, words])
        if self.searches == 1:
            return self._best(going, words, ended)
        grouped = zip(
            *(part.view(-1, self.searches, *part.shape[1:]).unbind(1) for part in (going, words, ended)), strict=True
        )
        choices: list[Choice] = []
        for going, words, ended in grouped:
            choices.append(self._best(going, words, ended, self._diversity * _times_chosen(words, choices)))
        return Choice(*(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*choices, strict=True)))

    def _best(self, going: Tensor, words: Tensor, ended: Tensor, penalty: Tensor | None = None) -> Choice:
        """The choice of one group, from `(images, beams, n)` continuations and `(images, beams)` endings."""
        rank, best = (going if penalty is None else going - penalty).flatten(1).topk(self.beams)
        parent = best.div(words.shape[2], rounding_mode="floor")
        logprob = going.flatten(1).gather(1, best)
        return Choice(parent, words.flatten(1).gather(1, best), logprob, among_best(ended, rank))


def _times_chosen(words: Int[Tensor, "images beams n"], choices: list[Choice]) -> Tensor:
    """How many of the earlier groups of an image continue with each word."""
    times = torch.zeros_like(words)
    for choice in choices:
        chosen = torch.where(choice.logprob > -torch.inf, choice.word, -1)
        times += (words[..., None] == chosen[:, None, None]).any(dim=-1)
    return times


def among_best(
    ended: Float[Tensor, "searches beams"], going: Float[Tensor, "searches count"]
) -> Float[Tensor, "searches beams"]:
    """Endings that are among the `count` best of themselves and the continuations; -inf in place of the others."""
    least = torch.cat([going, ended], dim=1).topk(going.shape[1]).values[:, -1:]
    return ended.masked_fill(ended < least, -torch.inf)


class Sampling:
    """Draws captions at random, word by word.

    The likelihood of a word is sharpened or flattened by the temperature, then narrowed to the `top_k` likeliest, to
    the nucleus (`top_p`; Holtzman et al. 2020) and to the typical set (`typical_p`; Meister et al. 2023), in this
    order. Log-probabilities are those of the model itself.

    What is drawn depends on the seed, the photo's features, the number of the sample and the position of the word,
    and on nothing else: not on the other photos of the batch, their order or their number.
    """

    beams = quota = wanted = 1
    distinct = False

    def __init__(self, options: DecodingOptions, end: int, features: Float[Tensor, "batch 4096"]) -> None:
        self.searches = options.num_captions
        self._options = options
        self._end = end
        self._time = 0
        samples = torch.arange(self.searches, device=features.device)
        #: One 64-bit number a sample, `(searches,)`.
        self._keys = _mix(_mix(_hash(features)[:, None] + options.seed) + samples).flatten()

    def choose(self, outlook: Outlook, beams: Beams) -> Choice:
        """See the class."""
        # A row without a number, or without a word that is allowed, draws nothing: its total is 0.
        surprisal = outlook.surprisal.float()
        likely = self._narrowed((surprisal / -self._options.temperature).softmax(dim=1).nan_to_num(nan=0.0))
        reached = likely.cumsum(dim=1)
        total = reached[:, -1]
        uniform = _uniform(self._keys[beams.rows] + self._time)
        # Strictly below the total, so that it falls on a word whose probability is not 0.
        target = torch.minimum(uniform * total, total * (1 - 2**-22))
        drawn = torch.searchsorted(reached, target[:, None], right=True).clamp_(max=likely.shape[1] - 1)
        self._time += 1

        words = torch.cat([drawn, surprisal.argmin(dim=1, keepdim=True)], dim=1)
        logprob = beams.continued(outlook.logprob(words, surprisal.gather(1, words))[:, :1])[..., 0]
        logprob = logprob.masked_fill(beams.spread(total[:, None], 0.0)[..., 0] == 0, -torch.inf)
        word = beams.spread(drawn, 0)[..., 0]
        ends = word == self._end
        return Choice(
            torch.zeros_like(word),
            word,
            logprob.masked_fill(ends, -torch.inf),
            logprob.masked_fill(~ends, -torch.inf),
        )

    def _narrowed(self, likely: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        options = self._options
        if 0 < options.top_k < likely.shape[1]:
            kept = likely.topk(options.top_k)
            likely = torch.zeros_like(likely).scatter_(1, kept.indices, kept.values)
        if options.top_p < 1:
            likely = _nucleus(likely, -likely, options.top_p)
        if options.typical_p < 1:
            surprise = -(likely / likely.sum(1, keepdim=True)).log()
            entropy = torch.special.entr(likely / likely.sum(1, keepdim=True)).sum(1, keepdim=True)
            likely = _nucleus(likely, (surprise - entropy).abs(), options.typical_p)
        return likely


def _nucleus(likely: Tensor, strangeness: Tensor, mass: float) -> Tensor:
    """The least strange words that together have at least `mass` of the probability; always one at least."""
    order = strangeness.argsort(dim=1, stable=True)
    ordered = likely.gather(1, order)
    before = ordered.cumsum(dim=1) - ordered
    kept = ordered.masked_fill(before >= mass * ordered.sum(1, keepdim=True), 0.0)
    return torch.zeros_like(likely).scatter_(1, order, kept)


def smallest(
    values: Float[Tensor, "rows columns"], count: int
) -> tuple[Float[Tensor, "rows count"], Int[Tensor, "rows count"]]:
    """The smallest entries of each row, smallest first, and where they are.

    `torch.topk` over a whole vocabulary takes a processor about as long as a softmax. Folded to `_COLUMNS` columns,
    the smallest entries are all in the columns with the smallest minima, which vectorises.

    Args:
        values: none below 0 (and no -0, whose sign would be taken for a number); NaN counts as larger than all others.
        count: how many are wanted, at most as many as there are.
    """
    size = values.shape[1]
    layers = size // _COLUMNS
    if values.device.type != "cpu" or layers < 8 or count > _COLUMNS // 8:
        return values.topk(count, dim=1, largest=False)
    # The bits of floating point numbers that are not negative are in order as integers, which are compared faster.
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    minima = bits[:, : layers * _COLUMNS].view(-1, layers, _COLUMNS).amin(dim=1)
    rest = bits[:, layers * _COLUMNS :]
    minima[:, : rest.shape[1]] = torch.minimum(minima[:, : rest.shape[1]], rest)
    columns = minima.topk(count, dim=1, largest=False).indices
    # (rows, layers + 1, count): the entries of these columns, the last layer only where there is one.
    places = columns[:, None, :] + torch.arange(0, size, _COLUMNS)[:, None]
    beyond = places >= size
    places = places.clamp_(max=size - 1).flatten(1)
    found = bits.gather(1, places).masked_fill_(beyond.flatten(1), torch.iinfo(bits.dtype).max)
    value, which = found.topk(count, dim=1, largest=False)
    return value.view(values.dtype), places.gather(1, which)


def _mix(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Scramble 64-bit integers: the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable generators")."""
    x = x * -7046029254386353131  # the odd integer next to 2**64 over the golden ratio: consecutive inputs part ways
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(keys: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Numbers in [0, 1), one a key, in steps of 2**-24."""
    return _shifted(_mix(keys), 40).float() * 2.0**-24


def _hash(features: Float[Tensor, "batch 4096"]) -> Int[Tensor, " batch"]:
    """64 bits that stand for a row's exact numbers; a sum modulo 2**64, so in any order of summation."""
    bits = features.float().contiguous().view(torch.int32).long()
    places = _mix(torch.arange(1, features.shape[1] + 1, device=features.device))
    return (_mix(bits) * (places | 1)).sum(dim=1)

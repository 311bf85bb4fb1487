"""The search as it grew: every word that was considered, what became of it, and the caption that won."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from captioner.config import DecodingOptions
from captioner.decoding.constraints import SpecialTokens
from captioner.decoding.search import Hypothesis, Step, relaxed, search
from captioner.decoding.step import Floats, StepModel
from captioner.vocabulary import END, Vocabulary

if TYPE_CHECKING:
    from rich.tree import Tree

Fate = Literal["continued", "pruned", "ended", "cut"]


@dataclass(frozen=True)
class Branch:
    """A word in its place, and what came of the caption that it makes."""

    token: int | None  # id of the word or of [end]; None at the root, before the first word
    probability: float  # of this word, after those before it
    logprob: float  # natural log of the probability of all words up to this one
    fate: Fate  # continued; pruned (others were likelier); ended with [end]; or one of the captions, cut at max_words
    winner: bool  # on the way to the best caption
    branches: tuple[Branch, ...] = ()  # the words that could follow, likeliest first


@dataclass(frozen=True)
class Explanation:
    """How the captions of one photo were found."""

    root: Branch
    captions: tuple[Hypothesis, ...]  # best first


@dataclass
class _Node:
    """A `Branch` while it grows."""

    token: int | None = None
    probability: float = 1.0
    logprob: float = 0.0
    fate: Fate = "pruned"
    winner: bool = False
    following: dict[int, _Node] = field(default_factory=dict)

    def follow(self, token: int, logprob: float) -> _Node:
        """The node of a next word; `logprob` is that of the whole caption."""
        if token not in self.following:
            self.following[token] = _Node(token, math.exp(min(0.0, logprob - self.logprob)), logprob)
        return self.following[token]

    def frozen(self) -> Branch:
        """This node and all below it."""
        branches = sorted(self.following.values(), key=lambda node: -node.probability)
        fate = "pruned" if self.fate == "continued" and not branches else self.fate
        below = tuple(node.frozen() for node in branches)
        return Branch(self.token, self.probability, self.logprob, fate, self.winner, below)


def explain(model: StepModel, features: Floats, special: SpecialTokens, options: DecodingOptions) -> Explanation:
    """Write the captions of one photo and keep how they were found.

    Args:
        model: an engine, or an `Ensemble`.
        features: the vector that the encoder made of the photo, `(1, 4096)`.
        special: the vocabulary.
        options: how to search.

    Returns:
        The captions that `decode` returns, and the tree of words they were chosen from: for every caption that was
        being written its likeliest next words, one more than there are beams, and every word that was chosen.

    Raises:
        ValueError: there is not exactly one photo.
        CaptionerError: see `decode`.
    """
    features = np.asarray(features, np.float32)
    if len(features) != 1:
        raise ValueError(f"there are {len(features)} photos; expected one, whose search is explained")
    captions, steps = search(model, features, special, options, watch=True)
    if not captions[0][0].satisfied:
        captions, steps = relaxed(model, features, special, options, watch=True)
    root = _grow(steps, special.end)
    for number, caption in enumerate(captions[0]):
        node = root
        for token in (*caption.tokens, *((special.end,) if caption.finished else ())):
            node = node.following[token]
            node.winner |= number == 0
        if not caption.finished:
            node.fate = "cut"
    return Explanation(root.frozen(), tuple(captions[0]))


def _grow(steps: Sequence[Step], end: int) -> _Node:
    """Replay a search; captions that several beams or groups share become one branch."""
    root = _Node(fate="continued")
    # The node of each caption that is being written, by the number of its search and its place there.
    grid = {(number, place): root for number, row in enumerate(steps[0].beams.logprob) for place in range(len(row))}
    for beams, choice, likeliest, likely_words in steps:
        following: dict[tuple[int, int], _Node] = {}
        parts = (beams.search, beams.logprob, choice.ended, likeliest, likely_words, *choice[:3])
        for number, before, ended, logprobs, words, parents, chosen, reached in zip(
            *(part.tolist() for part in parts), strict=True
        ):
            for place, logprob in enumerate(before):
                if logprob == -math.inf:
                    continue
                node = grid[number, place]
                for more, word in zip(logprobs[place], words[place], strict=True):
                    if more > -math.inf:
                        node.follow(word, logprob + more)
                if ended[place] > -math.inf:
                    node.follow(end, ended[place]).fate = "ended"
            for place, logprob in enumerate(reached):
                if logprob > -math.inf:
                    child = grid[number, parents[place]].follow(chosen[place], logprob)
                    child.fate = "continued"
                    following[number, place] = child
        grid = following
    return root


def render(explanation: Explanation, vocabulary: Vocabulary) -> Tree:
    """Draw the search for a terminal.

    Args:
        explanation: from `explain`.
        vocabulary: whose words they are.

    Returns:
        A tree of words with their probabilities: the winner marked, pruned branches dim.
    """
    from rich.tree import Tree

    tree = Tree("the photo")
    _draw(explanation.root, vocabulary, tree)
    return tree


def _draw(branch: Branch, vocabulary: Vocabulary, tree: Tree) -> None:
    from rich.text import Text

    for child in branch.branches:
        assert child.token is not None
        word = next(iter(vocabulary.words((child.token,))), END)
        style = "bold green" if child.winner else "dim" if child.fate == "pruned" else ""
        label = Text(f"{word} {child.probability:.1%}", style=style)
        if child.fate in ("ended", "cut"):
            label.append(f"  {child.fate}, log-probability {child.logprob:.2f}")
        if child.winner and not any(below.winner for below in child.branches):
            label.append("  ★ the caption")
        _draw(child, vocabulary, tree.add(label))

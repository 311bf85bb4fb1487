"""How captions are searched for, over anything that can `start` and `step`.

One loop writes all captions of many photos at once, word by word (`search`). What is kept after each word is decided
by a policy: beam search, diverse beam search, sampling (`policies.py`) or beam search with required words
(`constraints.py`). The loop keeps no captions, only what was chosen at each step and from which beam: the words are
read off backwards at the end.

Log-probabilities are the model's own: natural logs of a softmax over the whole vocabulary, with `[pad]`, `[start]`
and `[unk]` in it although they are never written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from captioner.config import DecodingOptions
from captioner.decoding.beam import Beams, BeamSearch, Choice, Outlook, Policy, Sampling
from captioner.decoding.constraints import Bans, ConstrainedBeamSearch, SpecialTokens, forbidden_ids

__all__ = ["Hypothesis", "SpecialTokens", "State", "StepModel", "decode"]

_Integers = npt.NDArray[np.int64]

#: Hidden state: tensors of `(layers, batch, hidden)`.
State = tuple[Tensor, ...]

# Rows that the model computes at once. On a processor their logits should about stay in the cache; fewer rows would
# wait more often for Python, which all threads share.
_ROWS_CPU, _ROWS_GPU = 512, 32768
_ROWS_THREAD = 64  # and so many are worth a thread of a processor


class StepModel(Protocol):
    """What the search needs of a model; on a processor, several threads may ask at once."""

    def start(self, features: Float[Tensor, "batch 4096"], /) -> State:
        """The hidden state that a photo sets."""
        ...

    def step(self, tokens: Int[Tensor, " batch"], state: State, /) -> tuple[Float[Tensor, "batch vocabulary"], State]:
        """Read one word; the logits of the word that follows, and the next hidden state."""
        ...


@dataclass(frozen=True)
class Hypothesis:
    """A caption that the search found."""

    tokens: tuple[int, ...]  # ids of the words, without [start] and [end]
    logprob: float  # natural log of the probability of the words (and of [end], where it was found)
    score: float  # what hypotheses are ranked by: logprob after length normalisation
    finished: bool  # ended with [end], rather than cut at max_words or because no word could follow
    satisfied: bool = True  # has every required word


_Captions = list[list[Hypothesis]]  # of photos, best first


@dataclass(frozen=True)
class Step:
    """What happened at one word; `(searches, beams)` each."""

    before: Float[Tensor, "searches beams"]  # log-probabilities of the captions that were to be continued
    choice: Choice  # what became of them
    considered: tuple[Tensor, Tensor] | None = None  # log-probabilities and words, `(searches, beams, n)`, if asked for


@torch.inference_mode()
def decode(
    model: StepModel | Sequence[StepModel],
    features: Float[Tensor, "batch 4096"],
    special: SpecialTokens,
    options: DecodingOptions,
) -> list[list[Hypothesis]]:
    """Write captions.

    A model whose logits give no probabilities (NaN among them, or all of them -inf) cuts the caption there, and every
    photo still gets one, if need be an empty one. The captions of a photo depend neither on the other photos nor on
    their order.

    Args:
        model: the decoder, in evaluation mode; or several that share a vocabulary, whose probabilities are averaged.
        features: what the encoder saw, `(batch, 4096)`.
        special: the vocabulary, or only the ids of its special tokens where the options name no words.
        options: how to search.

    Returns:
        For every photo its captions, best first: `options.num_captions` of them, or fewer where there are no more or
        groups of the beam find the same.

    Raises:
        ValueError: a model is in training mode, or the models differ in the size of their vocabulary.
        CaptionerError: the options name words that cannot be used as asked.
    """
    models = listed(model)
    forbidden_ids(special, options)  # refused even where there is no photo, as everything else is by `_parts`

    def write(some: Tensor) -> _Captions:
        with torch.inference_mode():
            captions, _ = search(models, some, special, options)
            missed = [i for i, best in enumerate(captions) if not best[0].satisfied]
            if missed:
                for i, best in zip(missed, relaxed(models, some[missed], special, options)[0], strict=True):
                    captions[i] = best
            return captions

    return [captions for part in _each(write, _parts(features, special, options)) for captions in part]


def listed(model: StepModel | Sequence[StepModel]) -> list[StepModel]:
    """One model or several, as a list.

    Raises:
        ValueError: there is none, or one is in training mode.
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    if not models:
        raise ValueError("there is no model; expected one or more")
    if any(isinstance(each, torch.nn.Module) and each.training for each in models):
        raise ValueError("the decoder is in training mode, which drops units at random; call .eval() first")
    return models


def search(
    models: Sequence[StepModel],
    features: Float[Tensor, "batch 4096"],
    special: SpecialTokens,
    options: DecodingOptions,
    watch: bool = False,
) -> tuple[list[list[Hypothesis]], list[Step]]:
    """Write the captions of a batch, all at once.

    Args:
        models: whose probabilities are averaged.
        features: `(batch, 4096)`.
        special: the vocabulary, or only the ids of its special tokens.
        options: how to search.
        watch: keep the likeliest words of every caption at every step, whether or not they were chosen.

    Returns:
        For every photo its captions, best first, and what happened at each step.
    """
    images, device = features.shape[0], features.device
    policy = _policy(options, special, features)
    searches, beams = images * policy.searches, policy.beams
    bans = Bans(options, special, searches, device)
    roster = _Roster(searches, beams, device)

    # Every search begins with one beam that has no word yet, and so the first step has one row a search.
    logprob = torch.full((searches, beams), -torch.inf, device=device)
    logprob[:, 0] = 0
    rows = torch.arange(searches, device=device) * beams
    tokens = torch.full((searches,), special.start, dtype=torch.long, device=device)
    starts = [model.start(features) for model in models]
    states = [tuple(part.repeat_interleave(policy.searches, dim=1) for part in state) for state in starts]

    steps: list[Step] = []
    best = torch.full((searches, policy.wanted), -torch.inf, device=device)  # scores of the best that ended
    ended = torch.zeros(searches, dtype=torch.long, device=device)
    for time in range(options.max_words):
        outlook, states = _ask(models, tokens, states)
        now = Beams(logprob, rows)
        bans.apply(outlook.surprisal, time, now)
        considered = _consider(outlook, now) if watch else None
        choice = policy.choose(outlook, now)
        bans.follow(choice)
        steps.append(Step(logprob, choice, considered))

        # A search goes on until as many captions ended as it has beams, or no beam of its photo can be among the best.
        # To drop a single beam sooner would let worse captions end in its place, and so end the search too early; to
        # drop a single group would leave its words to those after it.
        ended = ended + (choice.ended > -torch.inf).sum(dim=1)
        best = torch.cat([best, _score(choice.ended, time + 1, options)], dim=1).topk(policy.wanted).values
        promising = _score(choice.logprob, options.max_words, options) > best[:, -1:]
        over = ~promising.view(images, -1).any(dim=1).repeat_interleave(policy.searches) | (ended >= policy.quota)
        logprob = choice.logprob.masked_fill(over[:, None], -torch.inf)

        before, rows = rows, roster.survivors(logprob)
        if not len(rows):
            break
        parents = (torch.arange(searches, device=device)[:, None] * beams + choice.parent).flatten()[rows]
        slots = torch.zeros(searches * beams, dtype=torch.long, device=device)
        slots[before] = torch.arange(len(before), device=device)
        states = [tuple(part.index_select(1, slots[parents]) for part in state) for state in states]
        tokens = choice.word.flatten()[rows]
    return _captions(steps, logprob, policy, options), steps


def relaxed(
    models: Sequence[StepModel], features: Tensor, special: SpecialTokens, options: DecodingOptions, watch: bool = False
) -> tuple[list[list[Hypothesis]], list[Step]]:
    """As `search`, where what is required cannot be had: captions without it, and marked so, are better than none."""
    captions, steps = search(models, features, special, replace(options, required_words=()), watch)
    return [[replace(hypothesis, satisfied=False) for hypothesis in best] for best in captions], steps


def _policy(options: DecodingOptions, special: SpecialTokens, features: Tensor) -> Policy:
    if options.method == "sample":
        return Sampling(options, special.end, features)
    if options.required_words:
        return ConstrainedBeamSearch(options, special, len(features), features.device)
    return BeamSearch(options, special.end, features.device)


def _parts(features: Tensor, special: SpecialTokens, options: DecodingOptions) -> Sequence[Tensor]:
    """Photos that are searched for at once: not too many for the cache, and equally many for each thread."""
    policy = _policy(options, special, torch.zeros(0, 4096))
    rows = policy.searches * policy.beams  # a photo
    cpu = features.device.type == "cpu"
    count = math.ceil(len(features) / max(1, (_ROWS_CPU if cpu else _ROWS_GPU) // rows))
    if cpu:
        threads = torch.get_num_threads()
        worthwhile = len(features) * rows // _ROWS_THREAD
        count = min(max(count, min(math.ceil(count / threads) * threads, worthwhile)), len(features))
    return features.tensor_split(count) if count else ()


def _each(write: Callable[[Tensor], _Captions], parts: Sequence[Tensor]) -> Iterable[_Captions]:
    """What `write` makes of each part, in order.

    Each thread of a processor writes parts of its own: if all worked on one part together, they would wait for each
    other after every operation, and long where other programs run beside them.
    """
    threads = torch.get_num_threads()
    if len(parts) < 2 or threads < 2 or parts[0].device.type != "cpu":
        return map(write, parts)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(write, parts))
    finally:
        torch.set_num_threads(threads)  # a thread's own number is also that of threads which start later


def _ask(
    models: Sequence[StepModel], tokens: Int[Tensor, " rows"], states: Sequence[State]
) -> tuple[Outlook, list[State]]:
    """What may come next, by the mean probability over models; there is no number where one of them knows none."""
    answers = [model.step(tokens, state) for model, state in zip(models, states, strict=True)]
    logits, *others = (each for each, _ in answers)
    if any(each.shape != logits.shape for each in others):
        sizes = " and ".join(str(each.shape[1]) for each, _ in answers)
        raise ValueError(f"the models know {sizes} words; expected models that share a vocabulary")
    if others:
        each = torch.stack([logits.float().log_softmax(dim=1) for logits, _ in answers])
        logits = each.logsumexp(dim=0) - math.log(len(models))
    return Outlook(logits, logits.log_softmax(dim=1).abs_()), [state for _, state in answers]


def _consider(outlook: Outlook, beams: Beams) -> tuple[Tensor, Tensor]:
    """The likeliest words to follow each caption, for `explain`."""
    nothing = beams.rows.new_empty(0)
    logprob, word = outlook.likeliest(beams.logprob.shape[1] + 1, always=nothing)
    return beams.spread(logprob, -torch.inf), beams.spread(word, 0)


def _score(logprob: Tensor, length: int, options: DecodingOptions) -> Tensor:
    """What captions are ranked by.

    Args:
        logprob: any shape.
        length: predictions that it is the sum of: the words, and `[end]` where it was found.
        options: "gnmt" is equation 14 of Wu et al. 2016 without its coverage term.
    """
    if options.length_normalisation == "average":
        return logprob / length
    if options.length_normalisation == "gnmt":
        return logprob / float(((5 + length) / 6) ** options.gnmt_alpha)
    return logprob


class _Roster:
    """Which rows the model is still needed for.

    A processor knows at once, and drops every beam that is over. A GPU would have to be waited for: there, whether
    a search is over is copied back while it works on, and the search is dropped some steps later.
    """

    def __init__(self, searches: int, beams: int, device: torch.device) -> None:
        self._beams = beams
        self._searches = torch.arange(searches, device=device)
        self._waits = device.type != "cuda"
        self._asked: tuple[Tensor, Any] | None = None

    def survivors(self, logprob: Float[Tensor, "searches beams"]) -> Int[Tensor, " rows"]:
        """Rows of the flattened grid that go on; on a GPU some that are over may be among them."""
        if self._waits:
            return (logprob > -torch.inf).flatten().nonzero()[:, 0]
        if self._asked is None:
            alive = torch.empty(len(logprob), dtype=torch.bool, pin_memory=True)
            alive.copy_((logprob > -torch.inf).any(dim=1), non_blocking=True)
            cuda: Any = torch.cuda
            self._asked = alive, cuda.Event()
            self._asked[1].record()
        elif self._asked[1].query():
            self._searches = self._asked[0].nonzero()[:, 0].to(logprob.device, non_blocking=True)
            self._asked = None
        places = torch.arange(self._beams, device=logprob.device)
        return (self._searches[:, None] * self._beams + places).flatten()


def _captions(
    steps: Sequence[Step], cut: Float[Tensor, "searches beams"], policy: Policy, options: DecodingOptions
) -> list[list[Hypothesis]]:
    """Collect what ended and what was cut, and rank it.

    Args:
        steps: what happened.
        cut: log-probabilities of captions that were still being written after the last step.
        policy: the policy of the search.
        options: what captions are ranked by, and how many are wanted.
    """
    # (words, searches, beams): log-probability of what ended with so many words; in the last place, of what was cut.
    outcomes = torch.stack([*(step.choice.ended for step in steps), cut]).cpu()
    scores = torch.stack([_score(part, min(n + 1, len(steps)), options) for n, part in enumerate(outcomes)])
    before = torch.stack([step.before for step in steps]).cpu()
    # A search in which nothing ended and nothing was cut came to a dead end: its caption is the best that it last had.
    dead = (outcomes == -torch.inf).all(dim=2).all(dim=0)
    last = (before > -torch.inf).any(dim=2).long().cumsum(dim=0).argmax(dim=0)  # the last step that had a caption
    for number in dead.nonzero()[:, 0].tolist():
        n = int(last[number])
        place = n, number, int(before[n, number].argmax())
        outcomes[place] = before[place]
        scores[place] = _score(before[place], max(n, 1), options)

    words, search, beam = np.nonzero(outcomes.numpy() > -np.inf)
    logprob, score = outcomes.numpy()[words, search, beam], scores.numpy()[words, search, beam]
    stuck = dead.numpy()[search]
    finished = (words < len(steps)) & ~stuck
    image = search // policy.searches
    order = np.lexsort((-score, stuck, image))
    # Groups may find the same caption, so that up to `searches` times as many are read.
    rank = np.arange(len(order)) - np.searchsorted(image[order], image[order])
    order = order[rank < options.num_captions * policy.searches]

    captions: list[list[Hypothesis]] = [[] for _ in range(outcomes.shape[1] // policy.searches)]
    tokens = _read_back(steps, words[order], search[order], beam[order])
    for event, row in zip(order.tolist(), tokens, strict=True):
        found = captions[image[event]]
        hypothesis = Hypothesis(
            tokens=tuple(row[: words[event]]),
            logprob=float(logprob[event]),
            score=float(score[event]),
            finished=bool(finished[event]),
            satisfied=not (stuck[event] and options.required_words),
        )
        again = policy.distinct and any(h.tokens == hypothesis.tokens for h in found)
        if len(found) < options.num_captions and not again:
            found.append(hypothesis)
    return captions


def _read_back(steps: Sequence[Step], words: _Integers, search: _Integers, beam: _Integers) -> list[list[int]]:
    """Follow captions from their last word to their first, all at once.

    Args:
        steps: what happened.
        words: how many each caption has, `(captions,)`.
        search: which search each belongs to.
        beam: which beam each was, after so many words.

    Returns:
        The words of each, and after them zeros up to the same length.
    """
    tokens = np.zeros((len(words), len(steps)), dtype=np.int64)
    parent = torch.stack([step.choice.parent for step in steps]).cpu().numpy()
    word = torch.stack([step.choice.word for step in steps]).cpu().numpy()
    for time in reversed(range(len(steps))):
        written = words > time
        tokens[written, time] = word[time, search[written], beam[written]]
        beam = np.where(written, parent[time, search, beam], beam)
    result: list[list[int]] = tokens.tolist()
    return result

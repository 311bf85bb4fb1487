"""Signs that a run goes wrong, found in its records.

Each limit is far from what a healthy run shows; docs/how-it-works.md lists them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from captioner.report.run import Run, Step, Written

_FEW_PHOTOS = 20  # with fewer validation photos, captions tell little
_FEW_STEPS = 10  # with fewer logged steps, their course tells little
_RISING = 3  # epochs in which the validation loss rises one after another
_LEARNING_RATES = (1e-6, 1e-2)  # below and above are extremes, for Adam
_PRETRAINED_LEARNING_RATE = 1e-3  # above, a CNN forgets what it was pretrained for

#: Words with which no caption ends, or few: "a man that the dog runs by".
_OPEN_WORDS = frozenset(
    "a an the and or but with of in on at to from for into onto over under by near behind between through while is are "
    "his her their its that which".split()
)


class Alarm(NamedTuple):
    """A sign that something is wrong."""

    title: str  # without numbers: the same sign has the same title in every epoch
    text: str  # the numbers, and a remedy


def alarms(run: Run) -> list[Alarm]:
    """All alarms of a run as it stands, the gravest first.

    Raises:
        CaptionerError: the file of the last epoch's captions is damaged.
    """
    captions = run.captions(len(run.epochs)).values()
    return [*_loss(run), *_gradient(run), *_overfitting(run), *_captions(run, captions), *_learning_rates(run)]


def _loss(run: Run) -> Iterator[Alarm]:
    bad = next((step for step in run.steps if not math.isfinite(step.loss)), None)
    if bad is not None:
        yield Alarm(
            "The loss is not a number",
            f"It is NaN or infinite at step {bad.step:,} (epoch {bad.epoch:.2f}): lower --optimisation.learning-rate, "
            "or use --precision fp32.",
        )
        return
    if len(run.steps) < _FEW_STEPS:
        return
    means = [fmean(step.loss for step in part) for part in _tenths(run.steps)]
    best, last = min(means), means[-1]
    # More than half of what was gained is lost again, and that is no noise.
    if last - best > max(0.5 * (means[0] - best), 0.2 * max(abs(best), 1)):
        yield Alarm(
            "The training loss diverges",
            f"It had come down to {best:.3g} and is {last:.3g} now (means of a tenth of the steps each): lower "
            "--optimisation.learning-rate, or lengthen --optimisation.warmup-steps.",
        )


def _gradient(run: Run) -> Iterator[Alarm]:
    if len(run.steps) < _FEW_STEPS:
        return
    norms = [step.gradient_norm for step in run.steps if math.isfinite(step.gradient_norm)]
    bad = len(run.steps) - len(norms)
    if bad > 0.05 * len(run.steps):  # in fp16, a few are usual: those steps are left out and the scale is lowered
        yield Alarm(
            "Gradients are not finite",
            f"Their norm is NaN or infinite in {bad:,} of {len(run.steps):,} logged steps: lower "
            "--optimisation.learning-rate, or use --precision fp32.",
        )
        return
    usual, latest = median(norms), median(norms[-len(norms) // 10 :])
    clip = run.settings.optimisation.gradient_clip
    clipped = sum(norm > clip for norm in norms) / len(norms)
    if latest > 10 * usual or max(norms[len(norms) // 10 :]) > 100 * usual:
        yield Alarm(
            "The gradient explodes",
            f"Its norm is {usual:.3g} at most steps, {latest:.3g} in the last tenth of them and {max(norms):.3g} at "
            "most: lower --optimisation.learning-rate or --optimisation.gradient-clip.",
        )
    elif clipped > 0.5:
        yield Alarm(
            "Most gradients are clipped",
            f"The norm is above --optimisation.gradient-clip {clip:g} in {clipped:.0%} of the steps, so that their "
            "size is lost: lower --optimisation.learning-rate, or raise the limit.",
        )


def _overfitting(run: Run) -> Iterator[Alarm]:
    if run.settings.optimisation.objective != "likelihood":  # else it is no longer what training minimises
        return
    rising = 0
    for before, after in pairwise(run.epochs):
        falls = after.get("train_loss", math.nan) < before.get("train_loss", math.nan)
        rising = rising + 1 if after["val_loss"] > before["val_loss"] and falls else 0
    if rising >= _RISING:
        start = run.epochs[-1 - rising]
        yield Alarm(
            "Validation becomes worse while training becomes better",
            f"The validation loss has risen for {rising} epochs, from {start['val_loss']:.3f} to "
            f"{run.epochs[-1]['val_loss']:.3f}, while the training loss fell: the model learns its photos by heart. "
            f"The best epoch by CIDEr, {run.best_epoch}, is kept; more --decoder.dropout or more photos would help.",
        )


def _captions(run: Run, captions: Collection[Written]) -> Iterator[Alarm]:
    """Alarms of the captions of the last epoch."""
    if len(captions) < _FEW_PHOTOS:
        return
    texts = Counter(caption.text for caption in captions)
    (commonest, times), *_ = texts.most_common(1)
    # Large sets of photos have many that ask for the same sentence, so that their share would mislead.
    if len(texts) < 0.1 * min(len(captions), 5000) or times > 0.2 * len(captions):
        yield Alarm(
            "Captions collapse to a few",
            f"{len(captions):,} photos have {len(texts):,} different captions, {times:,} of them “{commonest}”. That "
            "is usual in the first epochs; later, the model does not look at the photo: see that the captions belong "
            "to the photos, and try another --optimisation.learning-rate.",
        )
    ended = [caption for caption in captions if caption.finished]
    broken = [caption.text for caption in ended if _is_open(caption.text)]
    if len(broken) > 0.05 * len(captions):
        yield Alarm(
            "Captions break off",
            f"{len(broken):,} of {len(captions):,} end in a word that cannot be the last, such as “{broken[0]}”: the "
            "model has learned to end early. Training captions that were cut at --max-words have the same fault.",
        )
    cut = len(captions) - len(ended)
    if cut > 0.05 * len(captions):
        yield Alarm(
            "Captions are cut",
            f"{cut:,} of {len(captions):,} captions had not ended after --decoding.max-words "
            f"{run.settings.decoding.max_words}: raise it, or let the model train longer.",
        )


def _is_open(caption: str) -> bool:
    return caption.lower().rstrip(" .").rpartition(" ")[2] in _OPEN_WORDS


def _learning_rates(run: Run) -> Iterator[Alarm]:
    options, (low, high) = run.settings.optimisation, _LEARNING_RATES
    pretrained = run.settings.encoder.weights != "random"
    limits = {
        "learning_rate": high,
        "encoder_learning_rate": _PRETRAINED_LEARNING_RATE if pretrained else high,
    }
    for name, highest in limits.items():
        rate, option = getattr(options, name), f"--optimisation.{name.replace('_', '-')}"
        if rate > highest:
            yield Alarm(f"{option} is extreme", f"It is {rate:g}; Adam seldom learns above {highest:g} here.")
        elif 0 < rate < low:
            yield Alarm(f"{option} is extreme", f"It is {rate:g}; below {low:g}, Adam hardly moves a weight.")


def _tenths(steps: Sequence[Step]) -> list[Sequence[Step]]:
    size = len(steps) / 10
    return [steps[round(part * size) : round((part + 1) * size)] for part in range(10)]

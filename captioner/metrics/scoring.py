"""All scores of a set of captions at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from captioner.metrics.bleu import BleuStatistics, bleu_statistics, caption_bleu, corpus_bleu
from captioner.metrics.cider import CiderWeights
from captioner.metrics.idf import Idf
from captioner.metrics.meteor import Meteor, MeteorStatistics
from captioner.metrics.ngrams import FloatArray, ReferenceIndex
from captioner.metrics.rouge import rouge_l
from captioner.metrics.tokenization import split_words, tokenize_all

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "cider_d")
"""The names of the scores, in the order of tables; `meteor` follows them where it was asked for."""


@dataclass(frozen=True)
class Scores:
    """Scores of one set of hypotheses."""

    ids: tuple[Hashable, ...]  # the images, in the order of the references
    corpus: dict[str, float]  # score of the whole set by name; BLEU and METEOR are not the mean of their captions'
    per_image: dict[str, FloatArray]  # (images,) by name
    bleu: BleuStatistics = field(repr=False)  # corpus BLEU of any subset is computed from these
    meteor: MeteorStatistics | None = field(default=None, repr=False)  # the same of METEOR, where it was asked for


def score(
    references: Mapping[Any, Sequence[str]],
    hypotheses: Mapping[Any, str],
    *,
    idf: Idf | None = None,
    meteor: bool | Meteor = False,
) -> dict[str, float]:
    """Scores raw captions exactly as pycocoevalcap does.

    Args:
        references: one or more captions of each image.
        hypotheses: the caption to score of each image; the same images.
        idf: document frequencies for CIDEr in place of those of `references`.
        meteor: whether METEOR is computed too, which takes most of the time and needs the extra `[meteor]`; or what
            `Meteor.load` returned, which need not be loaded again.

    Returns:
        `bleu_1` to `bleu_4` and `rouge_l`, 0 to 1; `cider` and `cider_d`, 0 to 10; `meteor`, 0 to 1.

    Raises:
        ValueError: the images differ, there are none, one has no reference, a caption is not text, or the data of
            METEOR are missing.
    """
    return evaluate(references, hypotheses, idf=idf, meteor=meteor).corpus


def evaluate(
    references: Mapping[Any, Sequence[str]],
    hypotheses: Mapping[Any, str],
    *,
    idf: Idf | None = None,
    meteor: bool | Meteor = False,
) -> Scores:
    """As `score`, with the scores of every image."""
    check_ids(references, hypotheses)
    for image, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in (*texts, hypotheses[image])):
            raise ValueError(f"captions of image {image!r} are not a list of references and one hypothesis in text")
    # all references in one go, as the server does: how a caption begins can matter to the one before
    tokens = iter(tokenize_all([text for texts in references.values() for text in texts]))
    tokenised = {image: [next(tokens) for _ in texts] for image, texts in references.items()}
    captions = dict(zip(references, tokenize_all([hypotheses[image] for image in references]), strict=True))
    return _evaluate(tokenised, captions, idf, meteor)


def score_tokens(
    references: Mapping[Any, Sequence[Sequence[str]]],
    hypotheses: Mapping[Any, Sequence[str]],
    *,
    idf: Idf | None = None,
    meteor: bool | Meteor = False,
) -> dict[str, float]:
    """As `score`, of captions that are tokenised already."""
    return evaluate_tokens(references, hypotheses, idf=idf, meteor=meteor).corpus


def evaluate_tokens(
    references: Mapping[Any, Sequence[Sequence[str]]],
    hypotheses: Mapping[Any, Sequence[str]],
    *,
    idf: Idf | None = None,
    meteor: bool | Meteor = False,
) -> Scores:
    """As `evaluate`, of captions that are tokenised already."""
    check_ids(references, hypotheses)
    return _evaluate(references, hypotheses, idf, meteor)


def _evaluate(
    references: Mapping[Any, Sequence[Sequence[str]]],
    hypotheses: Mapping[Any, Sequence[str]],
    idf: Idf | None,
    meteor: bool | Meteor,
) -> Scores:
    # ROUGE-L compares tokens; BLEU and CIDEr compare words, of which the token `3 1/2` has two
    index = ReferenceIndex(
        {image: [split_words(tokens) for tokens in sentences] for image, sentences in references.items()}, idf
    )
    images = np.arange(len(references), dtype=np.int64)
    words, lengths = index.number(split_words(hypotheses[image]) for image in references)
    matches = index.match(images, words, lengths)
    statistics = bleu_statistics(index, images, lengths, matches)
    bleu = caption_bleu(statistics)
    cider = CiderWeights(index).score(images, lengths, matches)
    rouge = np.array([rouge_l(sentences, hypotheses[image]) for image, sentences in references.items()])
    corpus = {f"bleu_{n}": float(value) for n, value in enumerate(corpus_bleu(statistics), start=1)}
    corpus |= {"rouge_l": float(rouge.mean()), "cider": float(cider.mean()), "cider_d": float(cider.mean())}
    per_image: dict[str, FloatArray] = {f"bleu_{n + 1}": bleu[:, n] for n in range(bleu.shape[1])}
    per_image |= {"rouge_l": rouge, "cider": cider, "cider_d": cider}
    if not meteor:
        return Scores(tuple(references), corpus, per_image, statistics)
    scorer = meteor if isinstance(meteor, Meteor) else Meteor.load()
    matched = scorer.statistics(
        [[" ".join(tokens) for tokens in sentences] for sentences in references.values()],
        [" ".join(hypotheses[image]) for image in references],
    )
    corpus["meteor"], per_image["meteor"] = matched.corpus(), matched.per_caption()
    return Scores(tuple(references), corpus, per_image, statistics, matched)


def check_ids(references: Mapping[Any, object], hypotheses: Mapping[Any, object]) -> None:
    """Raises a ValueError unless the images of references and hypotheses are the same."""
    if not references:
        raise ValueError("there is nothing to score: no image has references")
    unknown = [image for image in hypotheses if image not in references]
    if unknown:
        raise ValueError(f"{len(unknown)} captioned images have no references, the first is {unknown[0]!r}")
    missing = [image for image in references if image not in hypotheses]
    if missing:
        raise ValueError(f"{len(missing)} images have references but no caption, the first is {missing[0]!r}")

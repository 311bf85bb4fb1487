"""METEOR against `meteor-1.5.jar`, caption by caption and for the corpus, as pycocoevalcap runs it."""

import gzip
import random
import re
from pathlib import Path

import corpora
import numpy as np
import peer
import pytest

from captioner.metrics import tokenize_all
from captioner.metrics.meteor import PARAMETERS, Meteor
from captioner.metrics.meteor_index import load

pytestmark = [pytest.mark.reference, pytest.mark.slow]

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def index():
    peer.require()
    pytest.importorskip("nltk")
    return load()


@pytest.fixture(scope="module")
def share(request):
    """One in so many texts is compared; all of them with `pytest --whole`, which takes minutes."""
    return 1 if request.config.getoption("--whole") else 16


@pytest.fixture(scope="module")
def meteor(index):
    return Meteor(index)


def assert_equal(meteor, references, hypotheses):
    statistics = meteor.statistics(references, hypotheses)
    corpus, per_image, counts = peer.meteor(references, hypotheses, meteor.task)
    wrong = np.flatnonzero((statistics.counts != counts).any(axis=1))
    assert len(wrong) == 0, f"{len(wrong)} of {len(hypotheses)}: {hypotheses[wrong[0]]!r}, {references[wrong[0]]!r}"
    np.testing.assert_allclose(statistics.per_caption(), per_image, atol=TOLERANCE, rtol=0)
    assert statistics.corpus() == pytest.approx(corpus, abs=TOLERANCE, rel=0)


def leave_one_out(images, tokenised):
    captions = [text.replace("\n", " ").replace("\r", " ") for texts in images.values() for text in texts]
    if tokenised:
        captions = [" ".join(tokens) for tokens in tokenize_all(captions)]
    rest = iter(captions)
    together = [[next(rest) for _ in texts] for texts in images.values()]
    return [texts[1:] for texts in together], [texts[0] for texts in together]


@pytest.mark.shared
@pytest.mark.parametrize("tokenised", [True, False], ids=["tokenised", "raw"])
@pytest.mark.parametrize("corpus", [corpora.coco, corpora.flickr8k])
def test_corpora(meteor, corpus, tokenised, share):
    images = corpus()
    assert_equal(meteor, *leave_one_out(dict(list(images.items())[::share]), tokenised))


@pytest.mark.shared
@pytest.mark.parametrize("task", ["adq", "hter"])
def test_other_tasks(index, task, share):
    references, hypotheses = leave_one_out(dict(list(corpora.coco().items())[: 1000 // share]), True)
    assert_equal(Meteor(index, task), references, hypotheses)
    assert task in PARAMETERS


def test_hard_strings(meteor, share):
    choose = random.Random(8)
    pieces = [
        *"abAZ019 .,-'`\"()[]/:;!?&%$#@*+=_~^|<>{}\\éЖß日½°“”‘’–—…\u00a0\u2003\u200b\t😀",
        *[" "] * 10,
        "U.S.",
        "1,000",
    ]
    pieces += [
        "Mr.",
        "No. ",
        "e.g.",
        "vs. ",
        "--",
        "...",
        "''",
        "``",
        "'s",
        "n't",
        " the",
        " a dog",
        " running",
        " runs",
    ]
    hypotheses = ["".join(choose.choices(pieces, k=choose.randint(1, 40))) for _ in range(1900 // share)]
    hypotheses += ["", " ", "|||", ".", "-"] * 10 + corpora.made_up(50, seed=1)
    long = [" ".join(corpora.made_up(40, seed)) for seed in range(20 // share)]
    references = [[altered(text, choose), choose.choice(hypotheses)] for text in hypotheses + long]
    assert_equal(meteor, references, hypotheses + long)


def test_text_that_was_not_written_for_this(meteor, share):
    """Lines of documentation of the machine, with altered lines as their references."""
    choose = random.Random(9)
    lines = set()
    for file in sorted(Path("/usr/share/doc").glob("*/*"))[:600]:
        opener = gzip.open if file.suffix == ".gz" else open
        if file.is_file():
            with opener(file, "rt", encoding="utf-8", errors="ignore") as text:
                lines |= {line.strip() for line in re.split("[\r\n]", text.read(20_000)) if line.strip()}
    if len(lines) < 1000:
        pytest.skip("there is no documentation here")
    hypotheses = choose.sample(sorted(lines), min(4000, len(lines)) // share)
    references = [[altered(text, choose) for _ in range(choose.randint(1, 3))] for text in hypotheses]
    assert_equal(meteor, references, hypotheses)


def test_words_that_match_in_many_ways(meteor, share):
    """Few words, repeated and inflected: the search forgets paths, and ties decide."""
    choose = random.Random(10)
    words = "run runs running runned the a . dog dogs canine walk walked in of couch sofa sofas tv television".split()
    texts = [" ".join(choose.choices(words, k=choose.randint(1, 25))) for _ in range(1500 // share)]
    references = [[text if choose.random() < 0.1 else choose.choice(texts), choose.choice(texts)] for text in texts]
    assert_equal(meteor, references, texts)


def altered(text, choose):
    words = text.split(" ")
    for _ in range(choose.randint(0, 3)):
        place, change = choose.randrange(len(words)), choose.randrange(4)
        if change == 0:
            words[place] += choose.choice(["s", "ing", "ed", "er", ".", ",", "-like"])
        elif change == 1:
            words.insert(place, choose.choice(["the", "a", "of", "dog", "next to"]))
        elif change == 2:
            words = words[place:] + words[:place]
        else:
            words[place] = words[place].upper()
    return " ".join(words)

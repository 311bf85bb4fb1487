"""METEOR worked out by hand and by brute force, with a handful of words; `test_meteor_equal.py` has the real data."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import small_meteor
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import metrics
from captioner.metrics import meteor_index
from captioner.metrics.meteor import PARAMETERS, Meteor
from captioner.metrics.meteor_alignment import EXACT, Hypothesis, Sentence, Word, align, candidates

pytest.importorskip("nltk")


@pytest.fixture
def meteor(tmp_path, monkeypatch):
    small_meteor.install(tmp_path, monkeypatch)
    return Meteor.load()


def score(meteor, hypothesis, *references):
    return meteor.statistics([references], [hypothesis]).corpus()


def by_hand(matched, words, chunks, weight=1.0):
    """The score of matches that are all content words, of one kind, in sentences of content words."""
    precision, recall = (weight * matched / length for length in words)
    mean = 1 / (0.15 / precision + 0.85 / recall)
    return mean * (1 - 0.6 * (chunks / matched) ** 0.2)


def test_by_hand(meteor):
    assert score(meteor, "dog runs", "dog runs") == 1  # no chunk is counted where all is matched in one
    assert score(meteor, "dog", "cat") == score(meteor, "", "cat") == score(meteor, "cat", "") == 0
    assert score(meteor, "", "") == 0
    assert score(meteor, "red dog runs", "dog runs fast today") == pytest.approx(by_hand(2, (3, 4), 1))
    assert score(meteor, "runs dog", "dog runs") == pytest.approx(by_hand(2, (2, 2), 2))
    assert score(meteor, "Dog Runs", "dog runs") == 1


def test_function_words_weigh_a_third_of_content_words(meteor):
    # of the hypothesis "dog" (0.75) of 0.75 + 0.25, of the reference 0.75 of 0.75 + 0.75
    precision, recall = 0.75, 0.5
    expected = 1 / (0.15 / precision + 0.85 / recall) * (1 - 0.6)
    assert score(meteor, "the dog", "dog runs") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "kind", "weight"),
    [
        ("hopped", "hopping", "stem", 0.6),
        ("dogs", "canine", "synonym", 0.8),
        ("puppies", "pup", "synonym", 0.8),
        ("geese", "fowl", "synonym", 0.8),
        ("tv", "television set", "paraphrase", 0.6),
        ("television set", "tv", "paraphrase", 0.6),
    ],
)
def test_kinds_of_matches(meteor, hypothesis, reference, kind, weight):
    statistics = meteor.statistics([[reference]], [hypothesis])
    words = len(hypothesis.split()), len(reference.split())
    counts = statistics.counts[0]
    place = 4 + 4 * ["exact", "stem", "synonym", "paraphrase"].index(kind)
    assert counts[[place, place + 1]].tolist() == [*words]
    assert counts[-3:].tolist() == [1, *words]
    assert statistics.corpus() == pytest.approx(weight)


def test_the_best_reference_counts(meteor):
    references = ["dog", "red dog runs", "red dog runs today"]
    assert score(meteor, "red dog runs", *references) == 1
    assert score(meteor, "red dog", *references) == max(score(meteor, "red dog", text) for text in references)


def test_a_corpus_is_scored_by_its_sums(meteor):
    pairs = [("red dog runs", "dog runs fast today"), ("dog runs", "dog runs"), ("cat", "fowl")]
    statistics = meteor.statistics([[reference] for _, reference in pairs], [hypothesis for hypothesis, _ in pairs])
    singles = [score(meteor, *pair) for pair in pairs]
    np.testing.assert_allclose(statistics.per_caption(), singles, atol=1e-15)
    # 4 words of 6 and 4 of 7, in one chunk: that of the pair that is matched completely is not counted
    assert statistics.corpus() == pytest.approx(by_hand(4, (6, 7), 1))
    assert meteor.statistics([], []).per_caption().shape == (0,)


def test_more_images_than_are_matched_together(meteor, monkeypatch):
    references = [[f"dog {n} runs", "dog"] for n in range(20)]
    hypotheses = [f"dog {n} sits" for n in range(20)]
    whole = meteor.statistics(references, hypotheses).counts
    monkeypatch.setattr("captioner.metrics.meteor._TOGETHER", 3)
    assert (meteor.statistics(references, hypotheses).counts == whole).all()
    monkeypatch.setattr("captioner.metrics.meteor._KEPT", 0)
    assert (meteor.statistics(references, hypotheses).counts == whole).all()


def test_captions_with_the_separator_are_read_as_the_jar_reads_them(meteor):
    assert score(meteor, "dog ||| runs", "dog runs") == 1  # pycocoevalcap removes it from hypotheses
    assert score(meteor, "dog runs", "cat ||| dog runs") == 1  # and leaves it in references, where it makes two of one


def test_tasks(meteor):
    assert set(PARAMETERS) == {"rank", "adq", "hter"}
    pair = [["dog hopping fast"]], ["big dog hopped"]
    scores = {task: Meteor(meteor_index.load(), task).statistics(*pair).corpus() for task in PARAMETERS}
    assert len(set(scores.values())) == 3
    with pytest.raises(ValueError, match="no METEOR for 'li'; there are rank, adq, hter"):
        Meteor(meteor_index.load(), "li")


words = st.lists(st.sampled_from("abc"), max_size=4)


def chunks(matches):
    return sum(
        (reference, hypothesis) != (before[1] + 1, before[3] + 1)
        for before, (_, reference, _, hypothesis, _) in zip([(0, -2, 0, -2, 0), *matches], matches, strict=False)
    )


@given(words, words)
@settings(deadline=None, max_examples=300)
def test_of_short_sentences_the_alignment_is_the_best_there_is(first, second):
    hypothesis, reference = (
        kind([Word(ord(word), ord(word), frozenset(), False) for word in sentence], [])
        for kind, sentence in ((Hypothesis, first), (Sentence, second))
    )
    found = candidates(hypothesis, reference, lambda phrase: {})
    chosen = align(found, len(first))
    assert len({match[1] for match in chosen}) == len({match[3] for match in chosen}) == len(chosen)
    assert all(first[match[3]] == second[match[1]] and match[0] == EXACT for match in chosen)
    best = (0, 0)
    for choice in itertools.product(*([*options, None] for options in found)):
        matches = [match for match in choice if match is not None]
        if len({match[3] for match in matches}) == len(matches):
            best = min(best, (-len(matches), chunks(matches)))
    assert (-len(chosen), chunks(chosen)) == best


def test_with_the_other_scores(tmp_path, monkeypatch):
    small_meteor.install(tmp_path, monkeypatch)
    references = {"x": ["a dog runs on the grass", "the dog is running"], "y": ["a red bus"], "z": ["two geese."]}
    hypotheses = {"z": "Two geese!", "y": "a bus", "x": "a dog runs on the grass"}
    plain, with_meteor = metrics.evaluate(references, hypotheses), metrics.evaluate(references, hypotheses, meteor=True)
    assert list(with_meteor.corpus) == [*metrics.METRICS, "meteor"]
    assert {name: with_meteor.corpus[name] for name in metrics.METRICS} == plain.corpus
    assert with_meteor.per_image["meteor"].tolist()[::2] == [1, 1]  # in the order of the references
    assert with_meteor.per_image["meteor"][1] < with_meteor.corpus["meteor"] < 1
    loaded = Meteor.load()
    assert metrics.score(references, hypotheses, meteor=loaded) == with_meteor.corpus
    tokens = {image: [metrics.tokenize(text) for text in texts] for image, texts in references.items()}
    captions = {image: metrics.tokenize(text) for image, text in hypotheses.items()}
    assert metrics.score_tokens(tokens, captions, meteor=loaded) == pytest.approx(with_meteor.corpus)


def test_intervals_and_comparisons(tmp_path, monkeypatch):
    small_meteor.install(tmp_path, monkeypatch)
    meteor = Meteor.load()
    references = {n: [f"dog {n} runs on the grass", f"the dog {n}"] for n in range(30)}
    good = metrics.evaluate(references, {n: f"the dog {n} runs" for n in references}, meteor=meteor)
    poor = metrics.evaluate(
        references, {n: "runs dog the" if n % 3 else f"dog {n} runs" for n in references}, meteor=meteor
    )
    interval = metrics.bootstrap_intervals(poor, resamples=200)["meteor"]
    assert interval.low < poor.corpus["meteor"] < interval.high
    comparison = metrics.paired_test(good, poor, resamples=200)["meteor"]
    assert comparison.difference == pytest.approx(good.corpus["meteor"] - poor.corpus["meteor"])
    assert comparison.interval.low < comparison.difference < comparison.interval.high
    assert comparison.p_value < 0.01
    assert metrics.paired_test(good, good, resamples=50)["meteor"].p_value == 1
    without = metrics.evaluate(references, dict.fromkeys(references, "a dog"))
    with pytest.raises(ValueError, match="not scored with the same METEOR; ask for the same of both"):
        metrics.paired_test(good, without)


def test_without_nltk(tmp_path, monkeypatch):
    small_meteor.install(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "nltk.stem.snowball", None)
    with pytest.raises(ValueError, match="needs the stemmer of nltk, which is not installed; install it: pip install"):
        Meteor.load()


def test_nltk_is_not_imported_before_it_is_needed():
    program = "import sys; from captioner import metrics; assert not {'nltk', 'pycocoevalcap'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

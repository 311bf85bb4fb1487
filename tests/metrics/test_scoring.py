"""Scores against pycocoevalcap, against the definitions, and against values worked out by hand."""

import math
import subprocess
import sys

import corpora
import numpy as np
import peer
import pytest
import textbook
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import metrics

TOLERANCE = 1e-9

words = st.sampled_from(["a", "man", "dog", "on", "the", "grass", "runs", "red"])
sentences = st.lists(words, max_size=12)


def assert_equal_to(reference, references, hypotheses):
    scores = metrics.evaluate_tokens(references, hypotheses)
    corpus, per_image = reference(references, hypotheses)
    assert list(scores.corpus) == list(metrics.METRICS)
    for name in metrics.METRICS:
        assert scores.corpus[name] == pytest.approx(corpus[name], abs=TOLERANCE, rel=0), name
        np.testing.assert_allclose(scores.per_image[name], per_image[name], atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("reference", [textbook.scores, peer.scores], ids=["textbook", "pycocoevalcap"])
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_equals_the_reference_on_generated_corpora(reference, data):
    images = data.draw(st.integers(1, 6))
    references = {i: data.draw(st.lists(sentences, min_size=1, max_size=4)) for i in range(images)}
    if not any(tokens for texts in references.values() for tokens in texts):
        references[0][0] = ["dog"]  # pycocoevalcap fails where no reference of the corpus has a word
    unseen = st.lists(st.one_of(words, st.just("zebra"), st.just("quagga")), max_size=12)
    hypotheses = {i: data.draw(st.one_of(unseen, st.sampled_from(references[i]))) for i in range(images)}
    assert_equal_to(reference, references, hypotheses)


@pytest.mark.parametrize("reference", [textbook.scores, peer.scores], ids=["textbook", "pycocoevalcap"])
@pytest.mark.parametrize(
    ("references", "hypotheses"),
    [
        ({1: [["a", "dog"]]}, {1: ["a", "dog"]}),
        ({1: [["a", "dog"]]}, {1: []}),
        ({1: [["a", "dog"], []], 2: [["cat"]]}, {1: [], 2: ["cat"]}),
        ({1: [["a"] * 30], 2: [["a", "b"] * 9]}, {1: ["a"] * 40, 2: ["b", "a"] * 3}),
        ({"x": [["one"], ["one", "two"]], "y": [["two"]]}, {"y": ["three"], "x": ["three", "four"]}),
    ],
    ids=["one image", "empty hypothesis", "empty reference", "repetition", "unseen words, other order"],
)
def test_equals_the_reference_at_the_edges(reference, references, hypotheses):
    assert_equal_to(reference, references, {image: hypotheses[image] for image in references})


def test_identical_captions_score_the_maximum():
    references = {i: [f"a {animal} runs on green grass"] for i, animal in enumerate(["dog", "cat", "horse"])}
    scores = metrics.score(references, {image: texts[0] for image, texts in references.items()})
    assert scores["bleu_4"] == pytest.approx(1)
    assert scores["rouge_l"] == pytest.approx(1)
    assert scores["cider"] == pytest.approx(10)


def test_bleu_by_hand():
    scores = metrics.score({1: ["the cat sat on the mat"]}, {1: "the the cat"})
    assert scores["bleu_1"] == pytest.approx(1.0 * math.exp(1 - 6 / 3), abs=1e-8)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(1.0 * 0.5) * math.exp(1 - 6 / 3), abs=1e-8)


def test_case_and_punctuation_do_not_count():
    references = {1: ["A man rides a horse."], 2: ["Two dogs, playing!"]}
    plain = {1: "a man rides a horse", 2: "two dogs playing"}
    assert metrics.score(references, plain)["cider"] == pytest.approx(10 * (1 + 0.75) / 2)


def test_wrong_ids_are_named():
    with pytest.raises(ValueError, match="1 captioned images have no references, the first is 'b'"):
        metrics.score({"a": ["x"]}, {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match="1 images have references but no caption, the first is 'b'"):
        metrics.score({"a": ["x"], "b": ["y"]}, {"a": "x"})
    with pytest.raises(ValueError, match="image 'b' has no reference"):
        metrics.score({"a": ["x"], "b": []}, {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match="captions of image 'a' are not a list"):
        metrics.score({"a": "x"}, {"a": "x"})
    with pytest.raises(ValueError, match="captions of image 'a' are not a list"):
        metrics.score({"a": ["x"]}, {"a": None})
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.score({}, {})


@pytest.mark.reference
@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("corpus", [corpora.coco, corpora.flickr8k])
def test_equals_pycocoevalcap_on_real_captions(corpus, tmp_path):
    references, hypotheses = corpora.leave_one_out(corpus())
    texts = [text for texts in references.values() for text in texts]
    tokens = iter(peer.tokenize(texts, tmp_path))
    tokenised = {image: [next(tokens) for _ in texts] for image, texts in references.items()}
    captions = dict(zip(references, peer.tokenize(list(hypotheses.values()), tmp_path), strict=True))
    corpus_scores, per_image = peer.scores(tokenised, captions)
    scores = metrics.evaluate(references, hypotheses)
    assert scores.ids == tuple(references)
    for name in metrics.METRICS:
        assert scores.corpus[name] == pytest.approx(corpus_scores[name], abs=TOLERANCE, rel=0), name
        np.testing.assert_allclose(scores.per_image[name], per_image[name], atol=TOLERANCE, rtol=0, err_msg=name)


def test_a_fraction_is_one_token_to_rouge_and_two_words_to_the_rest():
    references, hypotheses = {1: ["about 3 1/2 dogs"]}, {1: "about 3 1/2 cats"}
    scores = metrics.score(references, hypotheses)
    assert scores["rouge_l"] == pytest.approx(2 / 3)
    assert scores["bleu_1"] == pytest.approx(3 / 4)


def test_ten_thousand_words():
    words = [f"word{number % 50}" for number in range(10_000)]
    scores = metrics.score_tokens({1: [words, words[::-1]]}, {1: words})
    assert scores["bleu_4"] == pytest.approx(1)
    assert scores["rouge_l"] == pytest.approx(1)


def test_importing_metrics_is_light():
    program = "import sys, captioner.metrics; print({'torch', 'nltk', 'safetensors'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output == "set()\n"

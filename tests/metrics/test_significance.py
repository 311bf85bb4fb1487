"""Intervals cover the truth, and the test tells systems apart when they are apart."""

import random

import numpy as np
import pytest

from captioner import metrics

WORDS = "a the man woman dog cat on in with red green grass street rides holds runs ball horse".split()


def corpus(images, seed, similar):
    """References, and hypotheses that share `similar` of their words with a reference."""
    choose = random.Random(seed)
    references = {image: [choose.choices(WORDS, k=9) for _ in range(3)] for image in range(images)}
    hypotheses = {
        image: [word if choose.random() < similar else choose.choice(WORDS) for word in texts[0]]
        for image, texts in references.items()
    }
    return references, hypotheses


def test_interval_holds_the_score_and_shrinks_with_more_images():
    widths = []
    for images in (50, 800):
        scores = metrics.evaluate_tokens(*corpus(images, 1, 0.5))
        intervals = metrics.bootstrap_intervals(scores, resamples=300)
        assert set(intervals) == set(metrics.METRICS)
        for name, interval in intervals.items():
            assert interval.low < scores.corpus[name] < interval.high, name
        widths.append(intervals["bleu_4"].high - intervals["bleu_4"].low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)


def test_resampled_bleu_is_the_bleu_of_the_resampled_corpus():
    references, hypotheses = corpus(4, 2, 0.7)
    scores = metrics.evaluate_tokens(references, hypotheses)
    possible = set()
    for drawn in np.ndindex(4, 4, 4, 4):
        sample = {place: references[image] for place, image in enumerate(drawn)}
        captions = {place: hypotheses[image] for place, image in enumerate(drawn)}
        possible.add(round(metrics.score_tokens(sample, captions)["bleu_4"], 9))
    interval = metrics.bootstrap_intervals(scores, resamples=400, confidence=0.9999)["bleu_4"]
    assert interval.low >= min(possible)
    assert interval.high <= max(possible)
    assert interval.high > np.median(sorted(possible))


def test_mean_interval_agrees_with_the_normal_one():
    scores = metrics.evaluate_tokens(*corpus(600, 3, 0.5))
    values = scores.per_image["rouge_l"]
    error = 1.96 * values.std() / np.sqrt(len(values))
    interval = metrics.bootstrap_intervals(scores, resamples=2000)["rouge_l"]
    assert interval.low == pytest.approx(values.mean() - error, abs=error / 5)
    assert interval.high == pytest.approx(values.mean() + error, abs=error / 5)


def test_better_system_is_found_and_equal_ones_are_not():
    references, good = corpus(300, 4, 0.7)
    choose = random.Random(5)
    worse = {i: [w if choose.random() < 0.8 else choose.choice(WORDS) for w in good[i]] for i in good}
    first = metrics.evaluate_tokens(references, good)
    apart = metrics.paired_test(first, metrics.evaluate_tokens(references, worse), resamples=500)
    for name, comparison in apart.items():
        assert comparison.difference > 0, name
        assert comparison.interval.low > 0, name
        assert comparison.p_value == pytest.approx(1 / 501), name
    same = metrics.paired_test(first, first, resamples=50)
    assert all(comparison.p_value == 1 and comparison.difference == 0 for comparison in same.values())


def test_p_values_of_equal_systems_are_uniform():
    p_values = []
    for seed in range(40):
        references, _ = corpus(60, seed, 0.5)
        choose = random.Random(1000 + seed)
        systems = [{i: choose.choices(WORDS, k=9) for i in references} for _ in range(2)]
        first, second = (metrics.evaluate_tokens(references, system) for system in systems)
        p_values.append(metrics.paired_test(first, second, resamples=100)["rouge_l"].p_value)
    assert 0.3 < np.mean(p_values) < 0.7
    assert np.mean(np.array(p_values) < 0.2) < 0.45


def test_seeded_and_independent_of_the_order_of_images():
    references, hypotheses = corpus(30, 6, 0.5)
    scores = metrics.evaluate_tokens(references, hypotheses)
    turned = metrics.evaluate_tokens(dict(reversed(references.items())), hypotheses)
    other = metrics.evaluate_tokens(references, {i: tokens[::-1] for i, tokens in hypotheses.items()})
    first = metrics.paired_test(other, scores, resamples=50, seed=7)
    assert first == metrics.paired_test(other, scores, resamples=50, seed=7)
    second = metrics.paired_test(other, turned, resamples=50, seed=7)
    assert second["bleu_4"].p_value == first["bleu_4"].p_value
    assert second["cider"].difference == pytest.approx(first["cider"].difference)


def test_wrong_calls():
    scores = metrics.evaluate_tokens(*corpus(3, 0, 0.5))
    other = metrics.evaluate_tokens({"x": [["a"]]}, {"x": ["a"]})
    with pytest.raises(ValueError, match="scored on different images"):
        metrics.paired_test(scores, other)
    with pytest.raises(ValueError, match="resamples is 0"):
        metrics.bootstrap_intervals(scores, resamples=0)
    with pytest.raises(ValueError, match="confidence is 95"):
        metrics.bootstrap_intervals(scores, confidence=95)

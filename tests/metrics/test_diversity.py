"""Statistics of captions by themselves."""

import pytest

from captioner import metrics


def test_by_hand():
    captions = ["A dog runs.", "a dog runs", "Two cats"]
    result = metrics.diversity(captions, training=["A DOG, runs!", "a cow"], truncated=[False, True, False])
    assert result.captions == 3
    assert result.mean_length == pytest.approx(8 / 3)
    assert result.distinct_1 == pytest.approx(5 / 8)
    assert result.distinct_2 == pytest.approx(3 / 5)
    assert result.vocabulary == 5
    assert result.unique == pytest.approx(2 / 3)
    assert result.in_training == pytest.approx(2 / 3)
    assert result.truncated == pytest.approx(1 / 3)


def test_what_is_not_given_is_not_made_up():
    result = metrics.diversity(["", "dog"])
    assert (result.in_training, result.truncated) == (None, None)
    assert (result.distinct_1, result.distinct_2, result.mean_length) == (1, 0, 0.5)


def test_wrong_calls():
    with pytest.raises(ValueError, match="no captions to describe"):
        metrics.diversity([])
    with pytest.raises(ValueError, match="1 flags for 2 captions"):
        metrics.diversity(["a", "b"], truncated=[True])

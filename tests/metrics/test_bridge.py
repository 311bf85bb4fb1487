"""METEOR and SPICE are computed where they can be, and say what is missing where they cannot."""

import importlib.util
import shutil

import peer
import pytest

from captioner import metrics

REFERENCES = {"x": ["a dog runs on the grass", "the dog is running"], "y": ["a red bus"]}
HYPOTHESES = {"y": "a bus", "x": "a dog runs on the grass"}


def test_without_java(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="meteor needs pycocoevalcap, which is not installed; install it"):
        metrics.java_scores(REFERENCES, HYPOTHESES, "meteor")


def test_without_a_jre(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="meteor needs Java, which is not on the path; install"):
        metrics.java_scores(REFERENCES, HYPOTHESES, "meteor")


def test_wrong_calls():
    with pytest.raises(ValueError, match="there is no Java metric 'bleu'; there are meteor and spice"):
        metrics.java_scores(REFERENCES, HYPOTHESES, "bleu")
    with pytest.raises(ValueError, match="images have references but no caption"):
        metrics.java_scores(REFERENCES, {"x": "a dog"}, "meteor")


@pytest.mark.reference
def test_spice_without_its_models():
    peer.require()
    message = metrics.why_not("spice")
    if message is None:
        pytest.skip("SPICE has its models here")
    assert "python -m pycocoevalcap.spice.get_stanford_models" in message


@pytest.mark.reference
def test_meteor():
    peer.require()
    score, per_image = metrics.java_scores(REFERENCES, HYPOTHESES, "meteor")
    assert per_image.shape == (2,)
    assert per_image[0] == pytest.approx(1)
    assert per_image[1] < 0.6
    assert per_image[1] < score < per_image[0]

"""SPICE is computed where it can be, and says what is missing where it cannot."""

import importlib.util
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from captioner import metrics

REFERENCES = {"x": ["a dog runs on the grass", "the dog is running"], "y": ["a red bus"]}
HYPOTHESES = {"y": "a bus", "x": "a dog runs on the grass"}

NOT_INSTALLED = "spice needs pycocoevalcap, which is not installed; install it"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed pycocoevalcap without SPICE's models."""
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path


def java(monkeypatch, says):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(stderr=says))


def test_without_pycocoevalcap(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=NOT_INSTALLED):
        metrics.java_scores(REFERENCES, HYPOTHESES, "spice")


def test_without_a_jre(package, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="spice needs Java, which is not on the path; install"):
        metrics.java_scores(REFERENCES, HYPOTHESES, "spice")


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15\n', "17"),
        ('java version "1.7.0_80"\n', "7"),
        ("nonsense", "of unknown version"),
    ],
)
def test_with_a_java_that_spice_does_not_run_on(package, monkeypatch, says, version):
    java(monkeypatch, says)
    message = metrics.why_not("spice")
    assert message.startswith(f"spice needs Java 8 to 11, and the one on the path is {version}; install such a JRE")
    assert "\n" not in message


@pytest.mark.parametrize("says", ['openjdk version "1.8.0_402"\n', 'openjdk version "11.0.22" 2024-01-16\n'])
def test_without_the_models(package, monkeypatch, says):
    java(monkeypatch, says)
    assert "python -m pycocoevalcap.spice.get_stanford_models" in metrics.why_not("spice")
    (package / "spice" / "lib").mkdir(parents=True)
    (package / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    assert metrics.why_not("spice") is None


def test_wrong_calls():
    with pytest.raises(ValueError, match="there is no Java metric 'meteor'; there is spice"):
        metrics.java_scores(REFERENCES, HYPOTHESES, "meteor")
    with pytest.raises(ValueError, match="images have references but no caption"):
        metrics.java_scores(REFERENCES, {"x": "a dog"}, "spice")

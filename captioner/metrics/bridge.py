"""SPICE (Anderson et al., ECCV 2016) through pycocoevalcap and Java, for those who need it.

Nothing else here needs Java. SPICE needs Java 8 to 11, and Stanford's models, which pycocoevalcap fetches on its first
use; here nothing is fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioner.metrics.ngrams import FloatArray
from captioner.metrics.scoring import check_ids
from captioner.metrics.tokenization import tokenize_all

JAVA_METRICS = ("spice",)
"""The names of the scores that need Java."""

_SPICE_JAVA = range(8, 12)  # the versions that SPICE runs on


def java_scores(
    references: Mapping[Any, Sequence[str]], hypotheses: Mapping[Any, str], metric: str
) -> tuple[float, FloatArray]:
    """SPICE of raw captions, tokenised as for the other scores.

    Args:
        references: one or more captions of each image.
        hypotheses: the caption to score of each image; the same images.
        metric: "spice".

    Returns:
        The score of the corpus, 0 to 1, and those of the images in the order of `references`, (images,).

    Raises:
        ValueError: something that is needed is missing (the message says what), the images differ, or Java failed.
    """
    if metric not in JAVA_METRICS:
        raise ValueError(f"there is no Java metric {metric!r}; there is {' and '.join(JAVA_METRICS)}")
    check_ids(references, hypotheses)
    missing = why_not(metric)
    if missing:
        raise ValueError(missing)
    tokens = iter(tokenize_all([text for texts in references.values() for text in texts]))
    gts = {row: [" ".join(next(tokens)) for _ in texts] for row, texts in enumerate(references.values())}
    captions = tokenize_all([hypotheses[image] for image in references])
    res = {row: [" ".join(caption)] for row, caption in enumerate(captions)}
    try:
        scorer: Any = getattr(importlib.import_module(f"pycocoevalcap.{metric}.{metric}"), metric.capitalize())()
        score, per_image = scorer.compute_score(gts, res)
    except Exception as error:  # whatever a Java program does when it fails
        raise ValueError(f"{metric} failed in Java: {error}") from None
    return float(score), np.array([scores["All"]["f"] for scores in per_image], dtype=np.float64)


def why_not(metric: str) -> str | None:
    """The reason why a Java metric cannot be computed here, and the remedy; None if it can."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return f"{metric} needs pycocoevalcap, which is not installed; install it: pip install 'captioner[meteor]'"
    if shutil.which("java") is None:
        return f"{metric} needs Java, which is not on the path; install a JRE, such as Debian's default-jre-headless"
    version = _java_version()
    if version not in _SPICE_JAVA:
        return (
            f"{metric} needs Java {_SPICE_JAVA[0]} to {_SPICE_JAVA[-1]}, and the one on the path is {version}; "
            "install such a JRE and put it first on the path"
        )
    library = Path(next(iter(spec.submodule_search_locations))) / "spice" / "lib"
    if not list(library.glob("stanford-corenlp-*-models.jar")):
        return (
            f"{metric} needs Stanford CoreNLP and its models in {library}; fetch them: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    return None


def _java_version() -> int | str:
    """The version of the Java on the path, such as 8 or 17; "of unknown version" if it does not say."""
    try:
        told = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.SubprocessError):
        told = ""
    found = re.search(r'version "(?:1\.)?(\d+)', told)  # Java 8 calls itself 1.8
    return int(found[1]) if found else "of unknown version"

"""Captions and what people wrote -> scores, with how sure they are and what they depend on.

Nothing here needs a model: `captioner evaluate results.json` starts without loading torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from captioner import __version__, files, metrics
from captioner.config import Statistics
from captioner.datasets.annotations import Annotations, Example
from captioner.datasets.formats import ImageId
from captioner.errors import CaptionerError

_NAMED = 3  # ids that an error message names


@dataclass(frozen=True)
class Hypotheses:
    """One caption a photo, and where they come from."""

    captions: Mapping[ImageId, str]
    origin: Mapping[str, Any]  # file or model, hashes and options, in JSON's types
    truncated: Sequence[bool] | None = None  # whether each caption was cut off before its `[end]`; None: not known

    def results(self) -> list[dict[str, ImageId]]:
        """The captions in COCO's result format."""
        return [{"image_id": image_id, "caption": caption} for image_id, caption in self.captions.items()]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of captions."""

    hypotheses: Hypotheses
    scores: metrics.Scores
    intervals: Mapping[str, metrics.Interval]  # by score; empty where none were asked for
    diversity: metrics.Diversity
    java: Mapping[str, tuple[float, npt.NDArray[np.float64]]]  # METEOR and SPICE, where asked for: corpus, per image

    def as_json(self) -> dict[str, Any]:
        """Everything but the scores of single photos."""
        return {
            **self.hypotheses.origin,
            "scores": {**self.scores.corpus, **{name: corpus for name, (corpus, _) in self.java.items()}},
            "intervals": {name: [interval.low, interval.high] for name, interval in self.intervals.items()},
            "diversity": asdict(self.diversity),
        }

    def per_image(self) -> list[dict[str, Any]]:
        """A row a photo: id, caption, scores."""
        origin = {key: value for key, value in self.hypotheses.origin.items() if key == "results"}
        columns = {**self.scores.per_image, **{name: single for name, (_, single) in self.java.items()}}
        return [
            {
                **origin,
                "image_id": image_id,
                "caption": caption,
                **{name: float(values[row]) for name, values in columns.items()},
            }
            for row, (image_id, caption) in enumerate(zip(self.scores.ids, self._in_order(), strict=True))
        ]

    def _in_order(self) -> list[str]:
        captions: Mapping[Any, str] = self.hypotheses.captions
        return [captions[image_id] for image_id in self.scores.ids]


def references_of(examples: Sequence[Example]) -> dict[ImageId, tuple[str, ...]]:
    """What people wrote about photos, by id."""
    return {example.image_id: example.captions for example in examples}


def evaluate(
    references: Mapping[ImageId, Sequence[str]],
    hypotheses: Hypotheses,
    *,
    training: Sequence[str] = (),
    idf: metrics.Idf | None = None,
    statistics: Statistics | None = None,
    java: Sequence[str] = (),
) -> Evaluation:
    """Compare captions with what people wrote.

    Args:
        references: human captions by photo.
        hypotheses: a caption of each of these photos.
        training: captions that the model was trained on, to count copies; may be empty.
        idf: document frequencies of CIDEr in place of those of the references.
        statistics: how intervals are computed.
        java: any of "meteor" and "spice", which need Java and pycocoevalcap.

    Raises:
        CaptionerError: the photos differ, or Java is missing.
    """
    statistics = statistics or Statistics()
    captions = hypotheses.captions
    try:
        scores = metrics.evaluate(references, captions, idf=idf)
        intervals = metrics.bootstrap_intervals(scores, **asdict(statistics)) if statistics.resamples else {}
        return Evaluation(
            hypotheses,
            scores,
            intervals,
            metrics.diversity(
                [captions[image_id] for image_id in references],
                training=training or None,
                truncated=hypotheses.truncated,
            ),
            {name: metrics.java_scores(references, captions, name) for name in java},
        )
    except ValueError as error:
        raise CaptionerError(str(error)) from None


def compare(pair: Sequence[Evaluation], statistics: Statistics) -> dict[str, metrics.Comparison]:
    """Test whether two sets of captions of the same photos differ by more than chance, score by score.

    Raises:
        CaptionerError: the photos differ.
    """
    first, second = pair
    try:
        return metrics.paired_test(first.scores, second.scores, **asdict(statistics))
    except ValueError as error:
        raise CaptionerError(str(error)) from None


def read_results(path: Path, references: Mapping[ImageId, Any]) -> Hypotheses:
    """Read a file in COCO's result format: a JSON list of `{"image_id": ..., "caption": ...}`.

    Raises:
        CaptionerError: the file is not that, names unknown photos, names one twice, or leaves photos out.
    """
    try:
        content = path.read_bytes()
        rows = json.loads(content)
    except OSError as error:
        raise CaptionerError(f"{path}: cannot be read ({error.strerror}); expected a file of results") from None
    except (ValueError, RecursionError) as error:
        raise CaptionerError(f"{path}: not JSON ({error}); expected COCO's result format") from None
    expected = 'expected a list of {"image_id": ..., "caption": "..."}'
    if not isinstance(rows, list) or not rows:
        raise CaptionerError(f"{path}: holds {type(rows).__name__ if rows else 'nothing'}; {expected}")
    captions: dict[ImageId, str] = {}
    times: Counter[ImageId] = Counter()
    for number, row in enumerate(rows, start=1):
        image_id, caption = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(image_id, int | str) or isinstance(image_id, bool) or not isinstance(caption, str):
            raise CaptionerError(f"{path}: entry {number} is {json.dumps(row)[:80]}; {expected}")
        times[image_id] += 1
        captions[image_id] = caption
    unknown = [image_id for image_id in captions if image_id not in references]
    double = [image_id for image_id, count in times.items() if count > 1]
    missing = [image_id for image_id in references if image_id not in captions]
    kinds = (
        ("photos that the references lack", unknown),
        ("photos more than once", double),
        ("photos missing", missing),
    )
    if problems := "; ".join(f"{len(ids):,} {kind} ({_some(ids)})" for kind, ids in kinds if ids):
        if {str(image_id) for image_id in unknown} & {str(image_id) for image_id in missing}:
            problems += "; an id is a number in one and a text in the other"
        raise CaptionerError(f"{path}: {problems}; expected one caption for each of the {len(references):,} photos")
    return Hypotheses(captions, {"results": str(path), "results_sha256": hashlib.sha256(content).hexdigest()})


def read_idf(path: Path) -> metrics.Idf:
    """Read document frequencies.

    Raises:
        CaptionerError: the file is not there, or holds something else.
    """
    try:
        return metrics.Idf.load(path)
    except ValueError as error:
        raise CaptionerError(f"{error}; expected a file that --save-idf wrote") from None


def save_idf(references: Mapping[ImageId, Sequence[str]], path: Path) -> None:
    """Count in how many photos words occur, and save that.

    Raises:
        CaptionerError: the file cannot be written.
    """
    try:
        metrics.Idf.from_references(references).save(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise CaptionerError(f"{path}: cannot be written ({reason}); give another file") from None


def circumstances(annotations: Annotations, idf: Path | None, statistics: Statistics) -> dict[str, Any]:
    """What scores depend on besides the captions, in JSON's types."""
    return {
        "captioner_version": __version__,
        "references": {str(path): files.sha256(path) for path in annotations.source},
        "idf": None if idf is None else {str(idf): files.sha256(idf)},
        "statistics": asdict(statistics),
    }


def _some(ids: Sequence[ImageId]) -> str:
    return ", ".join(repr(image_id) for image_id in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")

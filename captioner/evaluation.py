"""A model and a split, or a file of results -> scores, how sure they are, and all that they depend on.

A model on a split, and a file of results:

    evaluation = evaluate_model(Captioner.from_pretrained("runs/flickr8k"), DataConfig(Path("data/flickr8k")))
    evaluation = evaluate_results("results.json", read_references("annotations/captions_val2017.json"))
    print(evaluation.scores.corpus["cider"], evaluation.intervals["cider"])
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from captioner import __version__, files, metrics
from captioner.config import DataConfig, Statistics
from captioner.datasets.annotations import Annotations, Example, captions_sha256, load, load_dataset
from captioner.datasets.formats import ImageId, Split
from captioner.errors import AnnotationError, CaptionerError, ImageError
from captioner.runtime import OnnxEngine

if TYPE_CHECKING:
    from captioner.datasets.batches import Source
    from captioner.model import Caption, Captioner

log = logging.getLogger(__name__)

_NAMED = 3  # ids that an error message names
_TOGETHER = 256  # photos that are read and captioned together


@dataclass(frozen=True)
class References:
    """Human captions of the photos that are scored."""

    captions: Mapping[ImageId, Sequence[str]]  # one or more of each photo
    split: str = "all"  # "train", "val" or "test"; "all" where the captions are not divided
    files: tuple[Path, ...] = ()  # caption files that they were read from
    unreadable: tuple[str, ...] = ()  # photos of the split that are left out, and why
    training: tuple[str, ...] = ()  # captions that the model has learned from, where they are known


@dataclass(frozen=True)
class Hypotheses:
    """One caption of each photo, and where they come from."""

    captions: Mapping[ImageId, str]
    origin: Mapping[str, Any]  # file or model, hashes and options, in JSON's types
    truncated: Sequence[bool] | None = None  # whether each caption was cut off before its `[end]`; None: not known

    def results(self) -> list[dict[str, ImageId]]:
        """The captions in COCO's result format."""
        return [{"image_id": image_id, "caption": caption} for image_id, caption in self.captions.items()]


@dataclass(frozen=True)
class Measures:
    """How captions are scored."""

    idf: metrics.Idf | None = None  # document frequencies of CIDEr in place of those of the references
    statistics: Statistics = field(default_factory=Statistics)  # how intervals are computed
    meteor: bool | metrics.Meteor = False  # METEOR too, which needs the extra [meteor]; or the result of `load_meteor`
    java: Sequence[str] = ()  # "spice", which needs Java and pycocoevalcap, or nothing


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of captions."""

    references: References
    hypotheses: Hypotheses
    scores: metrics.Scores
    intervals: Mapping[str, metrics.Interval]  # by score; empty where none were asked for
    diversity: metrics.Diversity
    java: Mapping[str, tuple[float, npt.NDArray[np.float64]]]  # SPICE, where asked for: corpus, per image

    def as_json(self) -> dict[str, Any]:
        """Everything but the scores of single photos."""
        return {
            **self.hypotheses.origin,
            "scores": {**self.scores.corpus, **{name: corpus for name, (corpus, _) in self.java.items()}},
            "intervals": {name: [interval.low, interval.high] for name, interval in self.intervals.items()},
            "diversity": asdict(self.diversity),
        }

    def per_image(self) -> list[dict[str, Any]]:
        """A row for each photo: id, caption, scores."""
        origin = {key: value for key, value in self.hypotheses.origin.items() if key == "results"}
        columns = {**self.scores.per_image, **{name: single for name, (_, single) in self.java.items()}}
        captions: Mapping[Any, str] = self.hypotheses.captions
        return [
            {
                **origin,
                "image_id": image_id,
                "caption": captions[image_id],
                **{name: float(values[row]) for name, values in columns.items()},
            }
            for row, image_id in enumerate(self.scores.ids)
        ]


# A model on a split, a file of results -----------------------------------------------------------------------------


def evaluate_model(
    captioner: Captioner,
    data: DataConfig,
    split: Split = "val",
    measures: Measures | None = None,
) -> Evaluation:
    """Caption the photos of a split with a model, and score the captions.

    Args:
        captioner: the model; it searches with its own options.
        data: photos and human captions. Photos that the model's training kept back for validation are kept back here:
            `restval` and `val_share` are the model's own where it has them.
        split: of the data.
        measures: scores and intervals; by default all that need no more than the captions.

    Raises:
        CaptionerError: the data cannot be read, or no photo of the split can.
    """
    trained = captioner.training
    data = replace(data, **{name: trained[name] for name in ("restval", "val_share") if name in trained})
    captions = load_dataset(data)
    examples = captions.split(split)
    found, unreadable = _caption_examples(captioner, captions, examples, data.features)
    readable = [example for example in examples if example.image_id in found]
    if not readable:
        reason = next(iter(unreadable.values()))
        raise AnnotationError(f"{captions.name}: none of the {len(examples):,} photos can be read, e.g. {reason}")
    known = [example for example in captions.examples if example.split == "train"]
    # Copies of training captions are counted only where these are known to be the captions that the model learned.
    counted = split != "train" and trained.get("train_sha256") == captions_sha256(known)
    references = References(
        references_of(readable),
        split,
        captions.source,
        tuple(map(str, unreadable.values())),
        tuple(caption for example in known for caption in example.captions) if counted else (),
    )
    hypotheses = Hypotheses(
        {image_id: caption.text for image_id, caption in found.items()},
        {**_identity(captioner), "vocabulary_sha256": captioner.vocabulary.sha256}
        | {"decoding": asdict(captioner.options), "training": captioner.training},
        [not caption.finished for caption in found.values()],
    )
    return evaluate(references, hypotheses, measures)


def evaluate_results(
    path: str | Path,
    references: References,
    measures: Measures | None = None,
) -> Evaluation:
    """Score a file in COCO's result format.

    Args:
        path: of the file.
        references: human captions of the same photos, see `read_references`.
        measures: scores and intervals; by default all that need no more than the captions.

    Raises:
        CaptionerError: the file cannot be read, or is of other photos.
    """
    hypotheses = read_results(Path(path), references.captions)
    return evaluate(references, hypotheses, measures)


def evaluate(
    references: References,
    hypotheses: Hypotheses,
    measures: Measures | None = None,
) -> Evaluation:
    """Compare captions with human ones.

    Args:
        references: human captions.
        hypotheses: a caption of each of their photos.
        measures: scores and intervals; by default all that need no more than the captions.

    Raises:
        CaptionerError: the photos differ, or METEOR's data or Java is missing.
    """
    measures = measures or Measures()
    statistics = measures.statistics
    humans, captions = references.captions, hypotheses.captions
    meteor = load_meteor() if measures.meteor is True else measures.meteor
    try:
        scores = metrics.evaluate(humans, captions, idf=measures.idf, meteor=meteor)
        return Evaluation(
            references,
            hypotheses,
            scores,
            metrics.bootstrap_intervals(scores, **asdict(statistics)) if statistics.resamples else {},
            metrics.diversity(
                [captions[image_id] for image_id in humans],
                training=references.training or None,
                truncated=hypotheses.truncated,
            ),
            {name: metrics.java_scores(humans, captions, name) for name in measures.java},
        )
    except ValueError as error:
        raise CaptionerError(str(error)) from None


def load_meteor() -> metrics.Meteor:
    """METEOR with its data; the first time on a machine they are indexed, and a bar shows how far that is.

    Raises:
        CaptionerError: the extra `[meteor]` is not installed, its data are damaged, or the cache is not writable.
    """
    from captioner.progress import Progress

    with Progress("Indexing METEOR's data", 1, "MB") as progress:
        try:
            return metrics.Meteor.load(progress=lambda done, total: progress.set(done // 10**6, total // 10**6))
        except ValueError as error:
            raise CaptionerError(str(error)) from None


def compare(first: Evaluation, second: Evaluation, statistics: Statistics) -> dict[str, metrics.Comparison]:
    """Test whether two sets of captions of the same photos differ by more than chance, score by score.

    Raises:
        CaptionerError: the photos differ.
    """
    try:
        return metrics.paired_test(first.scores, second.scores, **asdict(statistics))
    except ValueError as error:
        raise CaptionerError(str(error)) from None


def circumstances(references: References, idf: Path | None, statistics: Statistics) -> dict[str, Any]:
    """Everything that scores depend on besides the captions, in JSON's types."""
    return {
        "captioner_version": __version__,
        "references": {str(path): files.sha256(path) for path in references.files},
        "split": references.split,
        "photos": len(references.captions),
        "unreadable": list(references.unreadable),
        "idf": None if idf is None else {str(idf): files.sha256(idf)},
        "statistics": asdict(statistics),
    }


# Captions of a model -----------------------------------------------------------------------------------------------


def caption_rows(captioner: Captioner, source: Source, rows: npt.NDArray[np.int64]) -> list[Caption]:
    """Write the best caption of each row, in constant memory.

    Args:
        captioner: the model.
        source: features `(rows, 4096)`, or pixels `(rows, 3, height, width)` from 0 to 255.
        rows: which of them.
    """
    captions: list[Caption] = []
    for start in range(0, len(rows), _TOGETHER):
        batch = source[rows[start : start + _TOGETHER]]
        features = captioner.features(batch) if batch.dtype == np.uint8 else batch.astype(np.float32)
        captions += [best for best, *_ in captioner.describe(features)]
    return captions


def _caption_examples(
    captioner: Captioner, captions: Annotations, examples: Sequence[Example], features: Path | None
) -> tuple[dict[ImageId, Caption], dict[ImageId, ImageError]]:
    """Caption photos; those that cannot be read are in the second result, with the reasons."""
    if not isinstance(captioner.engine, OnnxEngine):  # but torch, whose features are kept from run to run
        from captioner.datasets.features import stored_features
        from captioner.networks.inference import TorchEngine

        assert isinstance(captioner.engine, TorchEngine)
        store, failures = stored_features(captions, examples, captioner.engine.encoder, features)
        readable = [example for example in examples if example.image_id not in failures]
        row_of = store.row_of
        rows = np.array([row_of[example.image_id] for example in readable], np.int64)
        best = caption_rows(captioner, store.features(), rows)
        return {example.image_id: caption for example, caption in zip(readable, best, strict=True)}, failures
    if features is not None:
        raise CaptionerError("--features is of the engine torch only: onnxruntime keeps no features; leave it out")
    from captioner.bulk.pipeline import caption_photos
    from captioner.progress import Progress

    found: dict[ImageId, Caption] = {}
    failures = {}
    with Progress("captions", len(examples), "photos") as progress:
        photos = caption_photos(captioner, [example.path for example in examples], captioner.options)
        for example, photo in zip(examples, photos, strict=True):
            if photo.error is None:
                found[example.image_id] = photo.captions[0]
            else:
                failures[example.image_id] = photo.error
                log.warning("left out: %s", photo.error)
            progress.advance(1)
    return found, failures


def _identity(captioner: Captioner) -> dict[str, Any]:
    """The network that computes captions, in JSON's types."""
    if isinstance(captioner.engine, OnnxEngine):
        folder = captioner.engine.folder
        hashes = {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        return {"engine": "onnx", "graphs_sha256": hashes}
    from captioner.networks.inference import TorchEngine
    from captioner.networks.weights import fingerprint

    assert isinstance(captioner.engine, TorchEngine)
    encoder, decoder = captioner.engine.encoder, captioner.engine.decoder
    return {
        "engine": "torch",
        "precision": str(captioner.engine.dtype).removeprefix("torch."),
        "encoder": {**asdict(encoder.config), "weights_sha256": encoder.weights_sha256},
        "decoder_sha256": fingerprint(decoder.state_dict()),
    }


# Files -------------------------------------------------------------------------------------------------------------


def references_of(examples: Sequence[Example]) -> dict[ImageId, tuple[str, ...]]:
    """Human captions by the id of their photo."""
    return {example.image_id: example.captions for example in examples}


def read_references(
    path: str | Path, split: Split | None = None, *, on_problem: Literal["error", "skip"] = "error"
) -> References:
    """Read human captions; their photos need not be there.

    Args:
        path: any caption file or folder that training takes.
        split: of which photos; by default "val", or all where the captions are not divided into splits.
        on_problem: see `annotations.load`.

    Raises:
        AnnotationError: the captions cannot be read, have problems, or lack the split.
    """
    # Where captions are not divided into splits, none are kept back for validation, unless a split is asked for.
    share = 0 if split is None else DataConfig.val_share
    captions = load(Path(path), on_problem=on_problem, val_share=share, check_images=False)
    if split is None and len({example.split for example in captions.examples}) == 1:
        return References(references_of(captions.examples), "all", captions.source)
    return References(references_of(captions.split(split or "val")), split or "val", captions.source)


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
    from safetensors import SafetensorError

    try:
        metrics.Idf.from_references(references).save(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise CaptionerError(f"{path}: cannot be written ({reason}); give another file") from None


def _some(ids: Sequence[ImageId]) -> str:
    return ", ".join(repr(image_id) for image_id in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")

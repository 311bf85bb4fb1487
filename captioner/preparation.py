"""Caption files -> what training reads: checked captions, and features that are computed once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator

from captioner import features, images
from captioner.annotations import Annotations, Example, load
from captioner.config import TrainingConfig
from captioner.dataset import Source
from captioner.encoder import Encoder
from captioner.errors import ImageError
from captioner.features import FeatureStore, ImageId, Stamp
from captioner.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The photos of a split."""

    examples: Sequence[Example]
    source: Source  # of their features, or of their pixels where the encoder learns
    rows: npt.NDArray[np.int64]  # row of `source` of each example


@dataclass(frozen=True)
class Data:
    """What training reads."""

    name: str
    encoder: Encoder
    train: Split
    val: Split


def prepare(config: TrainingConfig, accelerator: Accelerator) -> Data:
    """Read and check the captions; compute the features that are not stored yet, where the encoder is frozen."""
    where = config.data
    captions = load(
        where.data,
        images=where.images,
        restval=where.restval,
        on_problem=where.on_problem,
        val_share=where.val_share,
        seed=config.seed,
    )
    log.info("%s: %s", captions.name, captions.problems.report())
    encoder = Encoder(config.encoder, trainable=config.optimisation.encoder_learning_rate > 0).to(accelerator.device)
    if encoder.trainable:
        photos = images.Photos([example.path for example in captions.examples], config.encoder.image_size)
        source: Source = photos
        row_of = {example.image_id: row for row, example in enumerate(captions.examples)}
        failures = {captions.examples[row].image_id: error for row, error in photos.check().items()}
    else:
        with accelerator.main_process_first():
            store, failures = _features(captions, encoder, where.features, accelerator.is_main_process)
        source, row_of = store.features(), store.row_of
    for error in failures.values():
        log.warning("left out: %s", error)

    def split(name: Literal["train", "val"]) -> Split:
        kept = [example for example in captions.split(name) if example.image_id not in failures]
        return Split(kept, source, np.array([row_of[example.image_id] for example in kept], np.int64))

    return Data(captions.name, encoder, split("train"), split("val"))


def _features(
    captions: Annotations, encoder: Encoder, folder: Path | None, shown: bool
) -> tuple[FeatureStore, dict[ImageId, ImageError]]:
    """The store that holds the features of all photos; those that are not in it yet are computed."""
    stamp = Stamp.of(encoder)
    store = FeatureStore(folder or features.default_folder(captions, stamp), stamp)
    log.info("features of %s are kept in %s", stamp.encoder, store.folder)
    with Progress("features", 0, "photos", shown=shown) as progress:
        return store, features.add_photos(store, encoder, captions.examples, progress=progress.set)

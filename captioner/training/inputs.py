"""Caption files -> what training reads: checked captions, and features that are computed once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from torch import Tensor

from captioner import images
from captioner.config import DataConfig, TrainingConfig
from captioner.datasets import features
from captioner.datasets.annotations import Annotations, Example, load
from captioner.datasets.batches import Source
from captioner.datasets.features import FeatureStore, Stamp
from captioner.datasets.formats import ImageId
from captioner.errors import AnnotationError, ImageError
from captioner.networks.encoder import Encoder
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


def read(where: DataConfig) -> Annotations:
    """Read and check the captions of a data set, and say what was wrong with them.

    Raises:
        AnnotationError: they cannot be read, or have problems that `where` does not allow.
    """
    captions = load(
        where.data,
        images=where.images,
        restval=where.restval,
        on_problem=where.on_problem,
        val_share=where.val_share,
    )
    log.info("%s: %s", captions.name, captions.problems.report())
    return captions


def prepare(config: TrainingConfig, accelerator: Accelerator, state: Mapping[str, Tensor] | None = None) -> Data:
    """Read and check the captions; compute the features that are not stored yet, where the encoder is frozen.

    Args:
        config: all settings.
        accelerator: device and processes.
        state: weights of the encoder, if they are not those that the settings name.
    """
    captions = read(config.data)
    trainable = config.optimisation.encoder_learning_rate > 0
    encoder = Encoder(config.encoder, state, trainable=trainable).to(accelerator.device)
    splits = {name: captions.split(name) for name in ("train", "val")}
    examples = [*splits["train"], *splits["val"]]
    if encoder.trainable:
        photos = images.Photos([example.path for example in examples], config.encoder.image_size)
        source: Source = photos
        row_of = {example.image_id: row for row, example in enumerate(examples)}
        failures = {examples[row].image_id: error for row, error in photos.check().items()}
        for error in failures.values():
            log.warning("left out: %s", error)
    else:
        with accelerator.main_process_first():
            store, failures = stored_features(
                captions, examples, encoder, config.data.features, shown=accelerator.is_main_process
            )
        source, row_of = store.features(), store.row_of

    def split(name: Literal["train", "val"]) -> Split:
        kept = [example for example in splits[name] if example.image_id not in failures]
        if not kept:
            reason = failures[splits[name][0].image_id]
            raise AnnotationError(
                f"{captions.name}: none of the {len(splits[name]):,} photos of {name!r} can be read, e.g. {reason}"
            )
        return Split(kept, source, np.array([row_of[example.image_id] for example in kept], np.int64))

    return Data(captions.name, encoder, split("train"), split("val"))


def stored_features(
    captions: Annotations, examples: Sequence[Example], encoder: Encoder, folder: Path | None, *, shown: bool = True
) -> tuple[FeatureStore, dict[ImageId, ImageError]]:
    """The store that holds the features of photos; those that are not in it yet are computed.

    Args:
        captions: the data set, which has a folder of its own where none is given.
        examples: its photos whose features are wanted.
        encoder: what looks at them.
        folder: of the store.
        shown: whether to draw a progress bar.

    Returns:
        The store, and the photos that could not be decoded, with the reasons.

    Raises:
        FeatureStoreError: the folder holds other features, or cannot be written.
    """
    stamp = Stamp.of(encoder)
    store = FeatureStore(folder or features.default_folder(captions, stamp), stamp)
    log.info("features of %s are kept in %s", stamp.encoder, store.folder)
    with Progress("features", 0, "photos", shown=shown) as progress:
        failures = features.add_photos(store, encoder, examples, progress=progress.set)
    for error in failures.values():
        log.warning("left out: %s", error)
    return store, failures

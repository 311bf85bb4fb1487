"""Settings -> the examples, and the features or photos, that training reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from captioner.config import TrainingConfig
from captioner.datasets.annotations import Example, load_dataset
from captioner.datasets.batches import Source
from captioner.datasets.features import stored_features
from captioner.datasets.photos import Augmentation, Photos
from captioner.errors import AnnotationError
from captioner.networks.encoder import Encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitInputs:
    """The photos of a split with their captions."""

    examples: Sequence[Example]
    source: Source  # of their features, or of their pixels where the encoder learns
    rows: npt.NDArray[np.int64]  # row of `source` of each example


@dataclass(frozen=True)
class Inputs:
    """Everything that training reads."""

    name: str  # of the data set
    encoder: Encoder
    train: SplitInputs
    val: SplitInputs
    problems: tuple[str, ...] = ()  # faults of the captions, and photos that cannot be read; a line each


def load_inputs(config: TrainingConfig, accelerator: Accelerator, state: Mapping[str, Tensor] | None = None) -> Inputs:
    """Load the captions and the encoder; where the encoder is frozen, compute the features that are not stored yet.

    Args:
        config: all settings.
        accelerator: device and processes.
        state: weights of the encoder, if they are not those that the settings name.

    Raises:
        CaptionerError: captions, weights or feature store cannot be used, or no photo of a split can be read.
    """
    # The first process of each computer goes first: computers may have no disk in common, or have one.
    with accelerator.local_main_process_first():
        captions = load_dataset(config.data)
    trainable = config.optimisation.encoder_learning_rate > 0
    with accelerator.local_main_process_first():  # which downloads the weights
        encoder = Encoder(config.encoder, state, trainable=trainable).to(accelerator.device)
    splits = {name: captions.split(name) for name in ("train", "val")}
    examples = [*splits["train"], *splits["val"]]
    if encoder.trainable:
        options = config.optimisation
        augmentation = Augmentation(options.mirror, options.crop, options.colour)
        photos = Photos([example.path for example in examples], config.encoder.image_size, augmentation, config.seed)
        source: Source = photos
        row_of = {example.image_id: row for row, example in enumerate(examples)}
        share = np.arange(accelerator.process_index, len(examples), accelerator.num_processes)
        found = list(photos.check(share).items())
        unreadable = dict(gather_object(found) if accelerator.num_processes > 1 else found)
        failures = {examples[row].image_id: unreadable[row] for row in sorted(unreadable)}
        for error in failures.values():
            log.warning("left out: %s", error)
    else:
        with accelerator.local_main_process_first():
            store, failures = stored_features(
                captions, examples, encoder, config.data.features,
                shown=accelerator.is_main_process, wait=accelerator.num_processes > 1,
            )  # fmt: skip
        source, row_of = store.features(), store.row_of

    def inputs(name: Literal["train", "val"]) -> SplitInputs:
        kept = [example for example in splits[name] if example.image_id not in failures]
        if not kept:
            reason = failures[splits[name][0].image_id]
            raise AnnotationError(
                f"{captions.name}: none of the {len(splits[name]):,} photos of {name!r} can be read, e.g. {reason}"
            )
        return SplitInputs(kept, source, np.array([row_of[example.image_id] for example in kept], np.int64))

    problems = (*(captions.problems.report().splitlines() if captions.problems else ()), *map(str, failures.values()))
    return Inputs(captions.name, encoder, inputs("train"), inputs("val"), problems)

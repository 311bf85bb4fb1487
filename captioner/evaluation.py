"""A model and the photos of a split -> captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch

from captioner.datasets.annotations import Example
from captioner.datasets.batches import Source
from captioner.datasets.features import FeatureStore
from captioner.model import Caption, Captioner
from captioner.networks.weights import fingerprint
from captioner.scoring import Hypotheses

#: Photos that are read and captioned together.
_TOGETHER = 256


def describe(captioner: Captioner, source: Source, rows: npt.NDArray[np.int64]) -> list[Caption]:
    """Caption photos in constant memory.

    Args:
        captioner: the model.
        source: features or pixels.
        rows: which of them.

    Returns:
        The best caption of each row.
    """
    captions: list[Caption] = []
    for start in range(0, len(rows), _TOGETHER):
        photos = torch.from_numpy(source[rows[start : start + _TOGETHER]]).to(captioner.device)
        captions += [best for best, *_ in captioner.describe(captioner.features(photos))]
    return captions


def caption_split(captioner: Captioner, store: FeatureStore, examples: Sequence[Example]) -> Hypotheses:
    """Caption photos whose features are stored."""
    row_of = store.row_of
    rows = np.array([row_of[example.image_id] for example in examples], np.int64)
    captions = describe(captioner, store.features(), rows)
    origin = {
        "encoder": {**asdict(captioner.encoder.config), "weights_sha256": captioner.encoder.weights_sha256},
        "decoder_sha256": fingerprint(captioner.decoder.state_dict()),
        "vocabulary_sha256": captioner.vocabulary.sha256,
        "decoding": asdict(captioner.options),
        "training": captioner.training,
    }
    found = {example.image_id: caption.text for example, caption in zip(examples, captions, strict=True)}
    return Hypotheses(found, origin, [not caption.finished for caption in captions])

"""Checkpoint and split -> captions -> scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from captioner import metrics
from captioner.annotations import Example
from captioner.dataset import Source
from captioner.features import ImageId
from captioner.model import Caption, Captioner

#: Photos that are read and captioned together.
_TOGETHER = 256


@dataclass(frozen=True)
class Evaluation:
    """Captions of a split and how good they are."""

    captions: dict[ImageId, Caption]
    scores: dict[str, float]  # see `metrics.score`

    def results(self) -> list[dict[str, ImageId]]:
        """The captions in COCO's result format."""
        return [{"image_id": image_id, "caption": caption.text} for image_id, caption in self.captions.items()]


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


def score(examples: Sequence[Example], captions: Sequence[Caption]) -> Evaluation:
    """Compare captions of photos with what people wrote about them."""
    found = {example.image_id: caption for example, caption in zip(examples, captions, strict=True)}
    references = {example.image_id: example.captions for example in examples}
    return Evaluation(found, metrics.score(references, {key: caption.text for key, caption in found.items()}))

"""Checkpoint and split -> captions -> scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from captioner import metrics
from captioner.annotations import Example
from captioner.features import FeatureStore, ImageId
from captioner.model import Caption, Captioner

#: Photos whose features are read from disk at once.
_READ_TOGETHER = 1024


@dataclass(frozen=True)
class Evaluation:
    """Captions of a split and how good they are."""

    captions: dict[ImageId, Caption]
    scores: dict[str, float]  # see `metrics.score`

    def results(self) -> list[dict[str, ImageId]]:
        """The captions in COCO's result format."""
        return [{"image_id": image_id, "caption": caption.text} for image_id, caption in self.captions.items()]


def describe(captioner: Captioner, store: FeatureStore, examples: Sequence[Example]) -> dict[ImageId, Caption]:
    """Caption photos whose features are stored, in constant memory."""
    features, rows = store.features(), store.rows([example.image_id for example in examples])
    captions: list[Caption] = []
    for start in range(0, len(rows), _READ_TOGETHER):
        some = torch.from_numpy(features[rows[start : start + _READ_TOGETHER]])
        captions += [best for best, *_ in captioner.describe(some.to(captioner.device))]
    return {example.image_id: caption for example, caption in zip(examples, captions, strict=True)}


def evaluate(captioner: Captioner, store: FeatureStore, examples: Sequence[Example]) -> Evaluation:
    """Caption photos whose features are stored, and compare with what people wrote."""
    captions = describe(captioner, store, examples)
    references = {example.image_id: example.captions for example in examples}
    return Evaluation(captions, metrics.score(references, {key: caption.text for key, caption in captions.items()}))

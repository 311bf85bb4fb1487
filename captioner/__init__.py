"""Image captioning: a CNN looks, an LSTM writes.

    from captioner import Captioner

    print(Captioner.from_pretrained("runs/coco").caption("photo.jpg"))

Names are imported when they are first used, so that `import captioner` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.annotations import Annotations, Example
    from captioner.bulk import caption_photos
    from captioner.config import (
        PRESETS,
        DataConfig,
        DecoderConfig,
        DecodingOptions,
        EncoderConfig,
        OptimisationConfig,
        TrainingConfig,
    )
    from captioner.decoder import Decoder
    from captioner.decoding import decode
    from captioner.encoder import Encoder
    from captioner.errors import CaptionerError
    from captioner.features import FeatureStore
    from captioner.model import Caption, Captioner
    from captioner.training import train
    from captioner.vocabulary import Vocabulary

__version__ = "0.1.0"

_HOME = {
    "PRESETS": "config",
    "Annotations": "annotations",
    "Caption": "model",
    "Captioner": "model",
    "CaptionerError": "errors",
    "DataConfig": "config",
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "DecodingOptions": "config",
    "Encoder": "encoder",
    "EncoderConfig": "config",
    "Example": "annotations",
    "FeatureStore": "features",
    "OptimisationConfig": "config",
    "TrainingConfig": "config",
    "Vocabulary": "vocabulary",
    "caption_photos": "bulk",
    "decode": "decoding",
    "train": "training",
}

__all__ = [
    "PRESETS",
    "Annotations",
    "Caption",
    "Captioner",
    "CaptionerError",
    "DataConfig",
    "Decoder",
    "DecoderConfig",
    "DecodingOptions",
    "Encoder",
    "EncoderConfig",
    "Example",
    "FeatureStore",
    "OptimisationConfig",
    "TrainingConfig",
    "Vocabulary",
    "caption_photos",
    "decode",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    return getattr(import_module(f"captioner.{_HOME[name]}"), name)

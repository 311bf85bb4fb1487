"""Image captioning: a CNN looks, an LSTM writes.

    from captioner import Captioner

    print(Captioner.from_pretrained("runs/coco").caption("photo.jpg"))

Names are imported when they are first used, so that `import captioner` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.bulk.pipeline import caption_photos
    from captioner.config import (
        DataConfig,
        DecoderConfig,
        DecodingOptions,
        EncoderConfig,
        OptimisationConfig,
        TrainingConfig,
    )
    from captioner.datasets.annotations import Annotations, Example
    from captioner.datasets.features import FeatureStore
    from captioner.decoding.search import decode
    from captioner.errors import CaptionerError
    from captioner.evaluation import evaluate_model, evaluate_results
    from captioner.model import Caption, Captioner
    from captioner.networks.decoder import Decoder
    from captioner.networks.encoder import Encoder
    from captioner.training.presets import PRESETS
    from captioner.training.trainer import train
    from captioner.vocabulary import Vocabulary

__version__ = "0.1.0"

_HOME = {
    "PRESETS": "training.presets",
    "Annotations": "datasets.annotations",
    "Caption": "model",
    "Captioner": "model",
    "CaptionerError": "errors",
    "DataConfig": "config",
    "Decoder": "networks.decoder",
    "DecoderConfig": "config",
    "DecodingOptions": "config",
    "Encoder": "networks.encoder",
    "EncoderConfig": "config",
    "Example": "datasets.annotations",
    "FeatureStore": "datasets.features",
    "OptimisationConfig": "config",
    "TrainingConfig": "config",
    "Vocabulary": "vocabulary",
    "caption_photos": "bulk.pipeline",
    "decode": "decoding.search",
    "evaluate_model": "evaluation",
    "evaluate_results": "evaluation",
    "train": "training.trainer",
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
    "evaluate_model",
    "evaluate_results",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    return getattr(import_module(f"captioner.{_HOME[name]}"), name)

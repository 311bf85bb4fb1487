"""The named recipes of `train.py`: complete configurations, any part of which the command line may override."""

from __future__ import annotations

from pathlib import Path

from captioner.config import (
    DataConfig,
    DecoderConfig,
    DecodingOptions,
    EncoderConfig,
    OptimisationConfig,
    TrainingConfig,
)

#: One line about each preset, for the help.
DESCRIPTIONS = {
    "coco": "VGG16 on MSCOCO: the default recipe",
    "flickr8k": "Flickr8k: 8,000 photos, for machines without a GPU",
    "shapes": "coloured shapes that are drawn on the spot: trains from nothing, offline, in minutes",
}

PRESETS: dict[str, TrainingConfig] = {
    "coco": TrainingConfig(data=DataConfig(data=Path("data/coco")), output=Path("runs/coco")),
    "flickr8k": TrainingConfig(
        data=DataConfig(data=Path("data/flickr8k")),
        output=Path("runs/flickr8k"),
        optimisation=OptimisationConfig(epochs=10, learning_rate=1e-3, label_smoothing=0.1),
        decoding=DecodingOptions(length_normalisation="average", no_repeat_ngram=3, unique_words=True),
    ),
    "shapes": TrainingConfig(
        data=DataConfig(data=Path("data/shapes")),
        output=Path("runs/shapes"),
        encoder=EncoderConfig(name="tiny", weights="random", image_size=64),
        decoder=DecoderConfig(hidden_size=256, embedding_size=128, dropout=0.0, feature_norm="none"),
        optimisation=OptimisationConfig(
            epochs=10, batch_size=80, learning_rate=3e-3, encoder_learning_rate=3e-3, warmup_steps=100
        ),
        min_count=1,
    ),
}

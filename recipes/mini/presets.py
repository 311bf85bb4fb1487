"""Settings of the four trainings that made the model in the box: the CNN, its decoder, both together, with a reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from captioner.config import DataConfig, DecoderConfig, EncoderConfig, OptimisationConfig, TrainingConfig
from captioner.errors import CaptionerError

DESCRIPTIONS = {
    "mini": "the decoder of the model in the box, on features of its CNN",
    "mini-joint": "then its decoder and CNN together",
    "mini-cider": "then its decoder alone, with CIDEr as the reward",
}

PRESETS: dict[str, TrainingConfig] = {
    "mini": TrainingConfig(
        data=DataConfig(data=Path("data/flickr8k")),
        output=Path("runs/mini"),
        encoder=EncoderConfig(name="mini", weights="runs/distil/encoder.safetensors", image_size=144),
        decoder=DecoderConfig(embedding_size=256),
        optimisation=OptimisationConfig(epochs=10, learning_rate=1e-3, label_smoothing=0.1),
    ),
    "mini-joint": TrainingConfig(
        data=DataConfig(data=Path("data/flickr8k")),
        output=Path("runs/mini-joint"),
        start="runs/mini",
        optimisation=OptimisationConfig(
            epochs=10,
            batch_size=320,
            learning_rate=5e-4,
            encoder_learning_rate=1e-4,
            mirror=True,
            label_smoothing=0.1,
        ),
    ),
    "mini-cider": TrainingConfig(
        data=DataConfig(data=Path("data/flickr8k")),
        output=Path("runs/mini-cider"),
        start="runs/mini-joint",
        optimisation=OptimisationConfig(
            objective="cider", epochs=4, batch_size=320, learning_rate=5e-5, warmup_steps=50
        ),
    ),
}


@dataclass(frozen=True)
class DistillationConfig:
    """Train a CNN of this project to see what a teacher sees."""

    data: DataConfig  # its training photos are learned from, its captions are not
    teacher: Path  # a network for photos in LiteRT's format (.tflite)
    output: Path  # folder of the run; the same command goes on with the run that it holds
    photos: tuple[Path, ...] = ()  # more photos, or folders of photos; those of the data set are passed over
    views: int = 5  # of each photo: the whole, and random parts; all views are kept on disk, 120 KB each
    view_size: int = 144  # height and width that views are kept at, in pixels
    sizes: tuple[int, ...] = (64, 96, 96, 96, 128)  # height and width that the student sees, each for as many epochs
    epochs: int = 40  # passes over all photos, one view of each
    batch_size: int = 64
    learning_rate: float = 2e-3  # AdamW's, after the warm-up
    warmup_steps: int = 300  # the learning rate rises over these, at most a quarter of all, then falls to 0
    weight_decay: float = 0.05  # of the weights of convolutions
    gradient_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # decides views, initial weights, order and augmentation

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("views", 1), ("epochs", 1), ("batch_size", 1), ("view_size", 32)):
            _at_least(name, getattr(self, name), least)
        for name in ("warmup_steps", "weight_decay", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise CaptionerError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not self.sizes or not all(32 <= size <= self.view_size for size in self.sizes):
            raise CaptionerError(f"sizes are {self.sizes}; expected numbers from 32 to view_size, {self.view_size}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise CaptionerError(f"{name} is {value}; expected {low} or more")

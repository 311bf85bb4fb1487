"""Small things that many tests need: photos, a data set, a model and a training configuration."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from captioner.config import (
    DataConfig,
    DecoderConfig,
    DecodingOptions,
    EncoderConfig,
    OptimisationConfig,
    TrainingConfig,
)
from captioner.datasets import shapes
from captioner.model import Captioner
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchEngine
from captioner.vocabulary import Vocabulary

ENCODER = EncoderConfig(name="tiny", weights="random", image_size=32)
DECODER = DecoderConfig(hidden_size=16, embedding_size=8, dropout=0.2, feature_norm="none")
SENTENCES = ("a red circle above a blue square", "two dogs don't run", "the man's green star is small")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches, keys and accounts of whoever runs the tests are neither read nor written."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name in ("XDG_CACHE_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC", "HF_HOME"):
        monkeypatch.setenv(name, str(home / name.lower()))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 12 photos of training and 4 of validation, with five captions each; not to be changed."""
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def make_data(folder: Path) -> Path:
    """Draw a data set: `captions.jsonl` and `images/`."""
    shapes.generate(folder, train=12, val=4, size=32)
    return folder


def make_photo(path: Path, colour: tuple[int, int, int] = (200, 60, 60)) -> Path:
    """Write a photo of one colour with a darker corner."""
    image = Image.new("RGB", (40, 32), colour)
    image.paste((20, 20, 20), (0, 0, 12, 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def make_model(
    encoder: EncoderConfig = ENCODER, options: DecodingOptions | None = None, *, seed: int = 0, **training: Any
) -> Captioner:
    """A model whose captions depend on the photo, although nobody trained it."""
    vocabulary = Vocabulary.build(SENTENCES, min_count=1)
    torch.manual_seed(seed)
    decoder = Decoder(DECODER, len(vocabulary))
    torch.nn.init.normal_(decoder.output.weight, std=2.0)  # sure of itself, so that no two captions are a tie
    engine = TorchEngine(Encoder(encoder), decoder, precision="fp32", device="cpu")
    return Captioner(engine, vocabulary, options or DecodingOptions(max_words=6), training)


def make_config(data: Path, output: Path, epochs: int = 2, **optimisation: Any) -> TrainingConfig:
    """A training run of seconds, with a frozen encoder."""
    return TrainingConfig(
        data=DataConfig(data=data, features=output.parent / "features"),
        output=output,
        encoder=ENCODER,
        decoder=DECODER,
        optimisation=replace(
            OptimisationConfig(epochs=epochs, batch_size=16, learning_rate=0.01, warmup_steps=2, patience=100),
            **optimisation,
        ),
        decoding=DecodingOptions(max_words=8),
        min_count=1,
        precision="fp32",
        tracking="none",
    )


def train_arguments(data: Path, output: Path, *more: str) -> Sequence[str]:
    """The same run for the command line, with one epoch."""
    return (
        f"shapes --data {data} --output {output} --features {output.parent / 'features'} --tracking none "
        "--encoder.image-size 32 --decoder.hidden-size 16 --decoder.embedding-size 8 --precision fp32 "
        "--optimisation.epochs 1 --optimisation.batch-size 16 --optimisation.encoder-learning-rate 0 --max-words 8"
    ).split() + list(more)


def spoil(path: Path, old: bytes, new: bytes) -> None:
    """Change some bytes of a file."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


class StoppedError(Exception):
    """As if somebody had pulled the plug."""


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """End the next run in the middle of an epoch."""
    from captioner.training.trainer import Trainer  # takes a while, and few tests need it

    schedule = Trainer._schedule

    def stop(self: Trainer, step: int) -> float:
        if self.history.epoch == number - 1 and step % self.steps_an_epoch == self.steps_an_epoch // 2:
            raise StoppedError
        return schedule(self, step)

    monkeypatch.setattr(Trainer, "_schedule", stop)

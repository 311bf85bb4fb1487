"""The saved model that a run begins with, and the settings that it brings."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from captioner.config import DecoderConfig, EncoderConfig, TrainingConfig
from captioner.errors import CaptionerError, WeightsError
from captioner.model import Captioner
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchEngine
from captioner.training.presets import PRESETS
from captioner.vocabulary import Vocabulary


class Start(NamedTuple):
    """The parts of a saved model that a run begins with."""

    encoder: Encoder
    decoder: Decoder
    vocabulary: Vocabulary


def load_start(config: TrainingConfig) -> Start:
    """Load the model that `config.start` names.

    Raises:
        CaptionerError: it cannot be loaded, or the settings ask for another encoder or decoder than it has.
    """
    assert config.start is not None
    try:
        model = Captioner.from_pretrained(config.start, engine="torch", device="cpu")
    except WeightsError:
        if config.encoder.weights == "default":
            raise
        weights_file = config.encoder.weights
        model = Captioner.from_pretrained(config.start, engine="torch", device="cpu", encoder_weights=weights_file)
    assert isinstance(model.engine, TorchEngine)
    start = Start(model.engine.encoder, model.engine.decoder, model.vocabulary)
    # Settings that are a preset's, or the default, were not asked for: they are replaced by those of the model.
    pairs: list[tuple[str, Any, Any, list[Any]]] = [
        ("encoder", config.encoder, start.encoder.config, [EncoderConfig(), *(p.encoder for p in PRESETS.values())]),
        ("decoder", config.decoder, start.decoder.config, [DecoderConfig(), *(p.decoder for p in PRESETS.values())]),
    ]
    for name, given, own, usual in pairs:
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            known = [getattr(each, field.name) for each in (own, *usual)]
            if field.name != "weights" and value not in known:  # `encoder.weights` says where to find the model's own
                raise CaptionerError(
                    f"{name}.{field.name} is {value!r}, and the model to start with has {known[0]!r}; "
                    f"leave out --{name}.{field.name.replace('_', '-')}, or leave out --start"
                )
    return start

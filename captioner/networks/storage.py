"""Networks of torch <-> saved models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from captioner import checkpoint
from captioner.checkpoint import Checkpoint
from captioner.config import DecodingOptions, Precision
from captioner.errors import CheckpointError, WeightsError
from captioner.networks import weights
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder, is_file
from captioner.networks.inference import TorchEngine
from captioner.vocabulary import Vocabulary

_NO_FILE = ("default", "random")  # values of `EncoderConfig.weights` that are no path


def load(
    folder: Path,
    saved: Checkpoint,
    *,
    encoder_weights: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
) -> TorchEngine:
    """Build the network of a saved model.

    Args:
        folder: of the model, for messages.
        saved: its contents, with weights.
        encoder_weights: the file of the CNN's weights, if it is not where the model says.
        device: by default a GPU if there is one.
        precision: see `TorchEngine`.

    Raises:
        CheckpointError: the weights do not fit, or are not those that the model was trained with.
        WeightsError: the encoder's weights are not there.
    """
    config = saved.encoder
    stored = saved.encoder_state is not None
    if encoder_weights is not None and stored:
        raise CheckpointError(
            f"{folder}: has the weights of its encoder in itself; leave out those given ({encoder_weights})"
        )
    if encoder_weights is not None:
        config = dataclasses.replace(config, weights=encoder_weights)
    elif not stored and config.weights not in _NO_FILE and not is_file(Path(config.weights)):
        raise WeightsError(
            f"{config.weights}: no such weight file for {config.name}, which {folder} was trained with; give a "
            f"file of these weights (SHA-256 {saved.encoder_sha256[:12]}) with --encoder.weights FILE, or use the "
            "model in the box: --model mini"
        )
    try:
        encoder = Encoder(config, None if saved.encoder_state is None else weights.tensors_of(saved.encoder_state))
    except WeightsError as error:
        if not stored:
            raise
        raise CheckpointError(f"{folder / checkpoint.WEIGHTS}: {error}; fetch the model again") from None
    if encoder.weights_sha256 != saved.encoder_sha256:
        source = "it has in itself" if stored else f"those of {config.weights!r}"
        remedy = "fetch the model again" if stored else "give the right file with --encoder.weights FILE"
        raise CheckpointError(
            f"{folder}: was trained with other {config.name} weights than {source} "
            f"({saved.encoder_sha256[:12]}, not {encoder.weights_sha256[:12]}); {remedy}"
        )
    decoder = Decoder(saved.decoder, len(saved.vocabulary))
    weights.fill(decoder, saved.decoder_state, str(folder / checkpoint.WEIGHTS))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TorchEngine(encoder, decoder, precision=precision, device=device)


def checkpoint_of(
    engine: TorchEngine, vocabulary: Vocabulary, options: DecodingOptions, training: Mapping[str, Any]
) -> Checkpoint:
    """The contents of the saved model that a network becomes.

    The weights of an encoder that are to be had elsewhere are named, and known again by their hash.
    """
    encoder, decoder = engine.encoder, engine.decoder
    state, stored = encoder.body.state_dict(), not encoder.elsewhere
    config = encoder.config
    if config.weights not in _NO_FILE:  # the model is to load from any working directory
        path = Path(config.weights)
        config = dataclasses.replace(config, weights=path.name if stored else str(path.absolute()))
    return Checkpoint(
        encoder=config,
        encoder_sha256=weights.fingerprint(state) if stored else encoder.weights_sha256,
        decoder=decoder.config,
        decoding=options,
        vocabulary=vocabulary,
        decoder_state=weights.arrays(decoder.state_dict()),
        encoder_state=weights.arrays(state) if stored else None,
        training=training,
    )

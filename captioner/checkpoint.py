"""Saved models: folders in the Hugging Face convention.

`model.safetensors` (the decoder, and the encoder where no one else has its weights), `config.json` (how to build them,
which encoder weights belong to them, and the SHA-256 of the other files), `tokenizer.json` and `README.md` (the model
card). Nothing is pickled. A folder appears whole or not at all: the one that was there before is replaced only when
every byte of the new one is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from captioner import __version__, files
from captioner.config import DecoderConfig, DecodingOptions, EncoderConfig
from captioner.errors import CaptionerError, CheckpointError
from captioner.networks import weights
from captioner.vocabulary import Vocabulary

WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
_FORMAT = 1
_ENCODER, _DECODER = "encoder.", "decoder."  # what the names of tensors begin with
_FULL = (errno.ENOSPC, errno.EDQUOT)  # no space on the disk, or none left to this user
_TYPES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", tuple: "a list of texts"}
_Settings = TypeVar("_Settings", EncoderConfig, DecoderConfig, DecodingOptions)


@dataclass(frozen=True)
class Checkpoint:
    """What a saved model consists of."""

    encoder: EncoderConfig
    encoder_sha256: str  # of the encoder's weights, see `weights.fingerprint`
    decoder: DecoderConfig
    decoding: DecodingOptions  # what captions are searched with, where nothing else is said
    vocabulary: Vocabulary
    decoder_state: Mapping[str, Tensor]
    encoder_state: Mapping[str, Tensor] | None  # None: the weights are found where `encoder.weights` says
    training: Mapping[str, Any]  # what made it: data, options, seed, scores


def write(folder: Path, checkpoint: Checkpoint, card: str, *, packed: bool = False) -> None:
    """Write the files of a model into a folder.

    Args:
        folder: exists; best the one that `replacing` yields.
        checkpoint: what to save.
        card: the text of README.md.
        packed: write the weights in 8 bits, see `weights.pack`.
    """
    state = {_DECODER + name: tensor for name, tensor in checkpoint.decoder_state.items()}
    state |= {_ENCODER + name: tensor for name, tensor in (checkpoint.encoder_state or {}).items()}
    state = weights.pack(state) if packed else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    (folder / WEIGHTS).write_bytes(save(tensors))  # `save_file` would keep the file from everyone else
    checkpoint.vocabulary.save(folder / TOKENIZER)
    (folder / CARD).write_text(card, encoding="utf-8")
    config = {
        "model_type": "captioner",
        "format": _FORMAT,
        "captioner_version": __version__,
        "encoder": {
            **dataclasses.asdict(checkpoint.encoder),
            "weights_sha256": checkpoint.encoder_sha256,
            "stored": checkpoint.encoder_state is not None,
        },
        "decoder": dataclasses.asdict(checkpoint.decoder),
        "decoding": dataclasses.asdict(checkpoint.decoding),
        "vocabulary_size": len(checkpoint.vocabulary),
        "sha256": {name: files.sha256(folder / name) for name in (WEIGHTS, TOKENIZER)},
        "training": dict(checkpoint.training),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Checkpoint:
    """Read a model, and check that its files are the ones that were saved together.

    Raises:
        CheckpointError: a file is missing, altered or of another version; the message says which and how.
    """
    while True:
        recover(folder)
        before = _identity(folder)
        try:
            return _read(folder)
        except CheckpointError:
            if _identity(folder) == before:
                raise  # and not because the model was replaced while it was read


def _read(folder: Path) -> Checkpoint:
    config = _read_config(folder)
    try:
        for key in ("encoder", "decoder", "decoding", "sha256", "training"):
            if not isinstance(config[key], dict):
                raise CheckpointError(f"{key} is {config[key]!r:.60}; expected an object")
        encoder = dict(config["encoder"])
        encoder_sha256 = _value("encoder.weights_sha256", encoder.pop("weights_sha256"), str)
        stored = _value("encoder.stored", encoder.pop("stored"), bool)
        encoder_config = _settings(EncoderConfig, "encoder", encoder)
        decoder_config = _settings(DecoderConfig, "decoder", config["decoder"])
        decoding = _settings(DecodingOptions, "decoding", config["decoding"])
        hashes = config["sha256"]
        size = _value("vocabulary_size", config["vocabulary_size"], int)
        training = config["training"]
    except (KeyError, TypeError, RecursionError, CaptionerError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{folder / CONFIG}: not what captioner {__version__} writes ({what}); correct it, or fetch the model again"
        ) from None
    for name in (WEIGHTS, TOKENIZER):
        _check_file(folder / name, hashes.get(name))
    vocabulary = Vocabulary.load(folder / TOKENIZER)
    if len(vocabulary) != size:
        raise CheckpointError(
            f"{folder / TOKENIZER}: has {len(vocabulary)} words, the model was trained with {size}; fetch it again"
        )
    state = weights.unpack(weights.read(folder / WEIGHTS))
    return Checkpoint(
        encoder=encoder_config,
        encoder_sha256=encoder_sha256,
        decoder=decoder_config,
        decoding=decoding,
        vocabulary=vocabulary,
        decoder_state=weights.below(_DECODER, state),
        encoder_state=weights.below(_ENCODER, state) if stored else None,
        training=training,
    )


def _settings(kind: type[_Settings], where: str, given: dict[str, Any]) -> _Settings:
    """Build a configuration from JSON, whose values are of the types of the defaults."""
    types = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    return kind(**{name: _value(f"{where}.{name}", v, types.get(name)) for name, v in given.items()})


def _value(name: str, value: Any, kind: type | None) -> Any:
    """Return a value of JSON, which must be of a type of Python (None: of any)."""
    if kind is tuple and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)  # JSON has lists where the options have tuples
    if kind is None or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise CheckpointError(f"{name} is {value!r:.60}; expected {_TYPES[kind]}")


def fill(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load tensors into a module after comparing names and shapes.

    Raises:
        CheckpointError: something differs; the message says what.
    """
    if different := weights.differences(module.state_dict(), state):
        raise CheckpointError(f"{what}: does not fit its config.json: {different}; fetch the model again")
    module.load_state_dict(dict(state))


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends without an error.

    A second process that saves to the same place waits. Where `folder` is a link, what it leads to is replaced.

    Raises:
        CheckpointError: the new folder cannot be written (a full disk, say); the old one is as it was.
    """
    folder = _resolved(folder)
    new, old = folder.with_name(f".{folder.name}.new"), _previous(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            _put_back(folder)
            shutil.rmtree(new, ignore_errors=True)
            try:
                new.mkdir()
                yield new
                for path in new.iterdir():
                    _sync(path)
                _sync(new)
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                _sync(folder.parent)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                _put_back(folder)
                shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        kept = "; the checkpoint that was there before is kept" if folder.exists() else ""
        reason = getattr(error, "strerror", None) or error
        # The library that writes tensors has the number in its message alone.
        full = any(getattr(error, "errno", None) == n or f"os error {n})" in str(error) for n in _FULL)
        remedy = "make room" if full else "choose a folder that can be written"
        raise CheckpointError(f"{folder}: cannot be saved ({reason}){kept}; {remedy} and run again") from None


def foreign(folder: Path) -> str | None:
    """Name something in a place that no saved model has there, and that must not be replaced together with one."""
    if folder.is_dir():
        names = (path.name for path in folder.iterdir())
        return next((name for name in names if name not in (WEIGHTS, CONFIG, TOKENIZER, CARD)), None)
    return "a file" if folder.exists() else None


def recover(folder: Path) -> bool:
    """Put back what a process that was killed between the two renames of `replacing` had moved away.

    Returns:
        Whether there is a folder now.
    """
    folder = _resolved(folder)
    if not folder.exists() and _previous(folder).exists():
        with contextlib.suppress(OSError), _lock(folder):  # a process that is alive finishes first
            _put_back(folder)
    return folder.exists()


def _resolved(folder: Path) -> Path:
    """The folder itself, where a link was given; a link that leads to itself stays as it is."""
    return Path(os.path.realpath(folder))


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _put_back(folder: Path) -> None:
    """Undo a replacement that was not finished, or remove what one that was has left."""
    old = _previous(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)


def _identity(folder: Path) -> int | None:
    """Tells one folder from another that took its place."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a saved model or the output of train.py")
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a saved model, it has no {CONFIG}; train.py writes one to OUTPUT/best")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error}); fetch the model again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
    if not isinstance(config, dict) or config.get("model_type") != "captioner":
        raise CheckpointError(
            f"{path}: not of a model of captioner; a training run has one from its first validation on, in OUTPUT/best"
        )
    if config.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: is format {config.get('format')!r}, this captioner {__version__} reads {_FORMAT}; "
            f"install captioner {config.get('captioner_version')}, which wrote it"
        )
    return config


def _check_file(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; a saved model consists of {WEIGHTS}, {CONFIG} and {TOKENIZER}: fetch it again"
        )
    if (found := files.sha256(path)) != expected:
        raise CheckpointError(
            f"{path}: altered, or of another model (SHA-256 {found[:12]}, {CONFIG} says {str(expected)[:12]}); "
            "fetch the model again"
        )

"""Saved models: folders in the Hugging Face convention.

`model.safetensors` (the decoder, and the encoder where no one else has its weights), `config.json` (how to build them,
which encoder weights belong to them, and the SHA-256 of the other files), `tokenizer.json` and `README.md` (the model
card). A model that was exported has `onnx/` as well: graphs, and the weights that they use. Nothing is pickled. A
folder appears whole or not at all: the one that was there before is replaced only when every byte of the new one is on
the disk.

A folder may come from a stranger: the sizes that its config.json states are compared with the shapes in its files
before a tensor is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from safetensors import SafetensorError

from captioner import __version__, files, graphs, tensors
from captioner.config import FEATURE_SIZE, RETIRED, DecoderConfig, DecodingOptions, EncoderConfig, from_json, typed
from captioner.errors import CaptionerError, CheckpointError, WeightsError
from captioner.tensors import Array, Entry
from captioner.vocabulary import Vocabulary

if TYPE_CHECKING:
    from filelock import FileLock

WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
#: The files of an exported model: the weights, and the graphs that use them.
EXPORTED = "onnx"
ENCODER_GRAPH, START_GRAPH, STEP_GRAPH = "encoder_model.onnx", "decoder_start_model.onnx", "decoder_model.onnx"
EXPORTED_FILES = tuple(f"{EXPORTED}/{name}" for name in (ENCODER_GRAPH, START_GRAPH, STEP_GRAPH, WEIGHTS))

_FORMAT = 1
_ENCODER, _DECODER = "encoder.", "decoder."  # the beginnings of the names of tensors
_FULL = (errno.ENOSPC, errno.EDQUOT)  # no space on the disk, or none left to this user
_LARGEST_CONFIG = 16 << 20  # bytes
_LARGEST_FILE = 2 << 30
#: The largest sizes of a model that is not taken for a mistake or an attack.
_LARGEST = {
    "encoder.image_size": 4096,
    "decoder.hidden_size": 1 << 16,
    "decoder.embedding_size": 1 << 16,
    "decoder.layers": 64,
}
_MISSING = (
    "{path}: missing; a saved model consists of model.safetensors, config.json and tokenizer.json: fetch it again"
)
_Settings = TypeVar("_Settings", EncoderConfig, DecoderConfig, DecodingOptions)

#: The types of what is told about a training, where it is told; other entries are kept as they are.
_TRAINING: Mapping[str, Any] = {
    "data": str,
    "train_photos": int,
    "val_photos": int,
    "captions_sha256": str,
    "train_sha256": str,
    "val_share": float,
    "restval": str,
    "start": str | None,
    "objective": str,
    "epoch": int,
    "seed": int,
    "seconds": float,
    "scores": dict[str, float],
}
#: The same of an export.
_EXPORT: Mapping[str, Any] = {
    "precision": Literal["int8", "fp32"],
    "scores_before": dict[str, float],
    "scores_after": dict[str, float],
    "sha256": dict[str, str],
}


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a saved model."""

    encoder: EncoderConfig
    encoder_sha256: str  # of the encoder's weights, see `weights.fingerprint`
    decoder: DecoderConfig
    decoding: DecodingOptions  # how captions are searched for, where nothing else is said
    vocabulary: Vocabulary
    decoder_state: Mapping[str, Array]  # empty where it was not asked for, see `read`
    encoder_state: Mapping[str, Array] | None  # None: the weights are found where `encoder.weights` says
    training: Mapping[str, Any] = field(default_factory=dict)  # how it was made: data, options, seed, scores
    export: Mapping[str, Any] | None = None  # how `onnx/` was made, and its hashes; None: there is no such folder


def write(folder: Path, checkpoint: Checkpoint, card: str) -> None:
    """Write the files of a model into a folder.

    Args:
        folder: exists; best the one that `replacing` yields. Of an exported model, it has the files of `onnx/` already.
        checkpoint: the model. Without a `decoder_state`, its weights are those of `onnx/` alone.
        card: the text of README.md.

    Raises:
        CheckpointError: an entry of `training` or `export` has the wrong type: the model could not be read again.
    """
    from safetensors.numpy import save

    hashed = [TOKENIZER]
    if checkpoint.decoder_state:
        state = {_DECODER + name: array for name, array in checkpoint.decoder_state.items()}
        state |= {_ENCODER + name: array for name, array in (checkpoint.encoder_state or {}).items()}
        # The library reads memory as it lies. `save_file` would keep the file from everyone else.
        (folder / WEIGHTS).write_bytes(save({name: _in_order(array) for name, array in state.items()}))
        hashed.insert(0, WEIGHTS)
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
        "sha256": {name: files.sha256(folder / name) for name in hashed},
        "training": _entries("training", checkpoint.training, _TRAINING),
    }
    if checkpoint.export is not None:
        config["export"] = {
            **_entries("export", checkpoint.export, _EXPORT),
            "sha256": {name: files.sha256(folder / name) for name in EXPORTED_FILES},
        }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _in_order(array: Array) -> Array:
    """The same numbers, little-endian and row by row in memory."""
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)


def read(folder: Path, *, weights: bool = True) -> Checkpoint:
    """Read a model, and check that its files are the ones that were saved together.

    Args:
        folder: of the model.
        weights: whether the tensors are wanted, as a network of torch needs them. Otherwise they are neither read nor
            hashed, and `decoder_state` is empty (`encoder_state` is too, unless it is None); see `check_graphs`.

    Raises:
        CheckpointError: a file is missing, altered or of another version, or two contradict each other; the message
            says which and how.
    """
    while True:
        recover(folder)
        before = _identity(folder)
        try:
            return _read(folder, weights)
        except CheckpointError:
            if _identity(folder) == before:
                raise  # and not because the model was replaced while it was read


def check_graphs(folder: Path, saved: Checkpoint) -> None:
    """Check the files of `onnx/` before they are run: whole, of this model, and harmless (see `graphs.check`).

    Raises:
        CheckpointError: the model has no graphs, or a file of them is missing, altered, or does what none of ours does.
    """
    if saved.export is None:
        raise CheckpointError(f"{folder}: was not exported for onnxruntime; run `captioner export {folder}`")
    for name in EXPORTED_FILES:
        _check_file(folder / name, saved.export["sha256"].get(name))
    path = folder / EXPORTED / WEIGHTS
    header = _header(path)
    for name in (ENCODER_GRAPH, START_GRAPH, STEP_GRAPH):
        graphs.check(folder / EXPORTED / name, header)
    try:
        floats = {name: entry for name, entry in header.items() if entry.dtype.startswith("float")}
        for _ in tensors.each(path, floats):  # which refuses numbers that are not finite
            pass
    except WeightsError as error:
        raise CheckpointError(str(error)) from None


class _Config(NamedTuple):
    """config.json, checked by itself."""

    encoder: EncoderConfig
    encoder_sha256: str
    stored: bool
    decoder: DecoderConfig
    decoding: DecodingOptions
    vocabulary_size: int
    sha256: Mapping[str, str]
    training: Mapping[str, Any]
    export: Mapping[str, Any] | None


def _read(folder: Path, weights: bool) -> Checkpoint:
    config = _parse(folder, _read_config(folder))
    inside = WEIGHTS in config.sha256 or config.export is None  # else onnx/ has the weights in 8 bits, and alone
    place = WEIGHTS if inside and (weights or config.export is None) else f"{EXPORTED}/{WEIGHTS}"
    hashes = config.sha256 if place == WEIGHTS else (config.export or {})["sha256"]
    if weights or config.export is None:
        _check_file(folder / place, hashes.get(place))
    header = _header(folder / place)
    if different := _unexpected(config, header, place):
        raise CheckpointError(f"{folder / place}: does not fit its {CONFIG}: {different}; fetch the model again")
    _check_file(folder / TOKENIZER, config.sha256.get(TOKENIZER))
    vocabulary = Vocabulary.load(folder / TOKENIZER)
    if len(vocabulary) != config.vocabulary_size:
        raise CheckpointError(
            f"{folder / TOKENIZER}: has {len(vocabulary)} words, the model was trained with {config.vocabulary_size}; "
            "fetch it again"
        )
    decoder: dict[str, Array] = {}
    encoder: dict[str, Array] = {}
    if weights:
        try:
            state = tensors.read(folder / place, [name for name in header if name.startswith((_DECODER, _ENCODER))])
        except WeightsError as error:
            raise CheckpointError(str(error)) from None
        state = tensors.unpack(state)
        decoder, encoder = tensors.below(_DECODER, state), tensors.below(_ENCODER, state)
    return Checkpoint(
        encoder=config.encoder,
        encoder_sha256=config.encoder_sha256,
        decoder=config.decoder,
        decoding=config.decoding,
        vocabulary=vocabulary,
        decoder_state=decoder,
        encoder_state=encoder if config.stored else None,
        training=config.training,
        export=config.export,
    )


def _header(path: Path) -> dict[str, Entry]:
    """Describe the tensors of a file of weights."""
    if not path.is_file():
        raise CheckpointError(_MISSING.format(path=path))
    try:
        return tensors.header(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None


def _unexpected(config: _Config, header: Mapping[str, Entry], place: str) -> str:
    """Say how the tensors of a file differ from those that config.json describes; empty if they do not."""
    state: dict[str, Entry] = {}
    for name, entry in header.items():
        mine = name.startswith((_DECODER, _ENCODER))
        base = name.removesuffix(tensors.STEP)
        if not mine:  # the graphs have numbers of their own
            if place == WEIGHTS:
                return f"{name[:60]} is unknown"
            continue
        needed = "int64" if name.endswith("num_batches_tracked") else "float32"
        if base != name and base in header:
            rows = header[base].shape[:1]
            if len(header[base].shape) < 2 or entry.shape != rows or entry.dtype != "float32":
                return f"{name[:60]} is {entry.shape} of {entry.dtype} instead of {rows} of float32"
            continue
        if name + tensors.STEP in header:
            needed = "int8"
        if entry.dtype != needed:
            return f"{name[:60]} is {entry.dtype} instead of {needed}"
        state[name] = entry._replace(dtype="float32") if needed == "int8" else entry
    if config.decoder.layers > len(header):
        return f"it has {len(header)} tensors, too few for {config.decoder.layers} layers"
    given = tensors.below(_DECODER, state)
    shapes = decoder_shapes(config.decoder, config.vocabulary_size)
    return tensors.differences({name: _Shape(shape) for name, shape in shapes.items()}, given)


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    dtype: str = "float32"


def decoder_shapes(config: DecoderConfig, words: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a decoder; those of `networks.decoder.Decoder`, which are not built to know them.

    Args:
        config: of the decoder.
        words: of its vocabulary.
    """
    E, H, L = config.embedding_size, config.hidden_size, config.layers
    gates = {"lstm": 4, "gru": 3}.get(config.cell, 1)
    states = 2 if config.cell == "lstm" else 1
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (words, E)}
    for layer in range(L):
        shapes |= {
            f"rnn.weight_ih_l{layer}": (gates * H, E if layer == 0 else H),
            f"rnn.weight_hh_l{layer}": (gates * H, H),
            f"rnn.bias_ih_l{layer}": (gates * H,),
            f"rnn.bias_hh_l{layer}": (gates * H,),
        }
    if config.feature_norm == "standard":
        shapes |= {"standard.mean": (FEATURE_SIZE,), "standard.variance": (FEATURE_SIZE,), "standard.batches": ()}
    return shapes | {
        "initial.weight": (states * L * H, FEATURE_SIZE),
        "initial.bias": (states * L * H,),
        "output.weight": (words, H),
        "output.bias": (words,),
    }


def _parse(folder: Path, config: dict[str, Any]) -> _Config:
    """Check the types and ranges of config.json."""
    try:
        for key in ("encoder", "decoder", "decoding", "sha256", "training"):
            if not isinstance(config[key], dict):
                raise CheckpointError(f"{key} is {config[key]!r:.60}; expected an object")
        encoder = dict(config["encoder"])
        sha256 = typed(str, encoder.pop("weights_sha256"), "encoder.weights_sha256")
        stored = typed(bool, encoder.pop("stored"), "encoder.stored")
        size = typed(int, config["vocabulary_size"], "vocabulary_size")
        export = config.get("export")
        if export is not None:
            if not isinstance(export, dict):
                raise CheckpointError(f"export is {export!r:.60}; expected an object")
            export = _entries("export", {"sha256": {}, **export}, _EXPORT)
        for group, settings in (("encoder", encoder), ("decoder", config["decoder"]), ("decoding", config["decoding"])):
            _refuse_unknown(group, settings, config.get("captioner_version"))
        return _Config(
            _settings(EncoderConfig, "encoder", encoder),
            sha256,
            stored,
            _settings(DecoderConfig, "decoder", config["decoder"]),
            _settings(DecodingOptions, "decoding", config["decoding"]),
            size,
            typed(dict[str, str], config["sha256"], "sha256"),
            _entries("training", config["training"], _TRAINING),
            export,
        )
    except (KeyError, RecursionError, CaptionerError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{folder / CONFIG}: not what captioner {__version__} writes ({reason}); "
            "correct it, or fetch the model again"
        ) from None


_KINDS = {"encoder": EncoderConfig, "decoder": DecoderConfig, "decoding": DecodingOptions}


def _refuse_unknown(group: str, given: Mapping[str, Any], version: Any) -> None:
    """Refuse settings that this version does not know, and say which version does."""
    known = {each.name for each in dataclasses.fields(_KINDS[group])} | RETIRED.get(_KINDS[group], frozenset())
    for name in given:
        if name not in known:
            newer = isinstance(version, str) and _release(version) > _release(__version__)
            remedy = f", install captioner {version:.40}, which wrote it" if newer else ""
            raise CheckpointError(f"{group}.{name:.60} is unknown{remedy}")


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare; of one that has others than numbers, the first of them."""
    parts = version[:40].split(".")
    numbers = [int(part) if part.isascii() and part.isdigit() else -1 for part in parts]
    return tuple(numbers[: numbers.index(-1)] if -1 in numbers else numbers)


def _settings(kind: type[_Settings], group: str, given: Mapping[str, Any]) -> _Settings:
    """Build a configuration from JSON, and refuse sizes beyond reason."""
    settings = from_json(kind, given, group)
    for name, largest in _LARGEST.items():
        value = getattr(settings, name.rpartition(".")[2]) if name.startswith(f"{group}.") else 0
        if value > largest:
            raise CheckpointError(f"{name} is {value!r:.40}; expected {largest:,} at most")
    return settings


def _entries(group: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """A group of entries of which some are known: these are of their types, the others are kept.

    Raises:
        CheckpointError: a known entry is of another type.
    """
    try:
        return {
            name: typed(hints[name], each, f"{group}.{name}") if name in hints else each for name, each in given.items()
        }
    except CaptionerError as error:
        raise CheckpointError(str(error)) from None


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
                for path in new.rglob("*"):
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
    if not folder.is_dir():
        return "a file" if folder.exists() else None
    known = {WEIGHTS, CONFIG, TOKENIZER, CARD, EXPORTED, *EXPORTED_FILES}
    exported = folder / EXPORTED
    inner = exported.iterdir() if exported.is_dir() and not exported.is_symlink() else ()
    names = [path.relative_to(folder).as_posix() for path in (*folder.iterdir(), *inner)]
    return next((name for name in names if name not in known), None)


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
    from filelock import FileLock  # here, since readers seldom lock

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
        config = files.read_json(path, _LARGEST_CONFIG)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error}); fetch the model again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
    if not isinstance(config, dict) or config.get("model_type") != "captioner":
        raise CheckpointError(
            f"{path}: not of a model of captioner; a training run has one from its first validation on, in OUTPUT/best"
        )
    if config.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: is format {config.get('format')!r:.40}, this captioner {__version__} reads {_FORMAT}; "
            f"install captioner {config.get('captioner_version')!s:.40}, which wrote it"
        )
    return config


def _check_file(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise CheckpointError(_MISSING.format(path=path))
    if (size := path.stat().st_size) > _LARGEST_FILE:
        raise CheckpointError(f"{path}: has {size:,} bytes; expected {_LARGEST_FILE:,} at most")
    try:
        found = files.sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
    if found != expected:
        raise CheckpointError(
            f"{path}: altered, or of another model (SHA-256 {found[:12]}, {CONFIG} says {str(expected)[:12]}); "
            "fetch the model again"
        )

"""A trained network -> graphs for `captioner.runtime`, in 8 bits or in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from captioner import checkpoint, hub, images, metrics, tensors
from captioner.checkpoint import Checkpoint
from captioner.config import DataConfig
from captioner.datasets.annotations import Annotations, Example
from captioner.datasets.annotations import load as load_annotations
from captioner.errors import CaptionerError, CheckpointError
from captioner.export.decoder import DecoderExport
from captioner.export.encoder import EncoderExport
from captioner.export.graph import Weights
from captioner.model import Captioner
from captioner.networks import storage, weights
from captioner.networks.inference import TorchEngine
from captioner.runtime import OnnxEngine

ExportPrecision = Literal["int8", "fp32"]

_COMPARED = 16  # photos whose features are compared after the export
_TOGETHER = 64  # photos that are captioned together
_SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


@dataclass(frozen=True)
class ExportReport:
    """The result of an export."""

    folder: Path
    bytes: int  # of all files in the folder
    differences: Mapping[str, float]  # from torch in fp32, by what is compared
    scores_before: Mapping[str, float] | None  # validation scores of the network in fp32, where there is data
    scores_after: Mapping[str, float] | None  # the same of the graphs


def export(
    model: str | Path,
    folder: Path | None = None,
    *,
    precision: ExportPrecision = "int8",
    data: DataConfig | None = None,
    photos: int = 192,
    encoder_weights: str | None = None,
) -> ExportReport:
    """Write the graphs of a model, run them at once, and compare them with torch.

    Args:
        model: a saved model, see `hub.find`.
        folder: of the exported model; by default the graphs are added to the model. A model in 8 bits in a folder of
            its own has no other weights than those of its graphs.
        precision: "int8" is static quantisation, per channel, calibrated on training photos; "fp32" rounds nothing.
        data: photos and captions: training photos calibrate, and validation photos tell what the export costs.
        photos: number of training photos that calibrate.
        encoder_weights: the file of the CNN's weights, if it is not where the model says.

    Returns:
        Sizes, differences and scores.

    Raises:
        CaptionerError: the model or the data do not allow it; a model that was there stays as it was.
    """
    source = hub.find(model)
    target = source if folder is None else Path(folder).absolute()
    if folder is not None and (foreign := checkpoint.foreign(target)):
        raise CheckpointError(f"{target}: holds files that are not of a model ({foreign}); choose another folder")
    if precision == "int8" and data is None:
        raise CaptionerError(
            "8 bits need photos to calibrate on; give those that the model was trained with: --data DIR, or "
            "--precision fp32"
        )
    saved = checkpoint.read(source)
    network = storage.load(source, saved, encoder_weights=encoder_weights, device="cpu", precision="fp32")
    annotations = None if data is None else _annotations(data)
    some = _pixels(annotations, photos, network.image_size)
    alone = target != source and precision == "int8"
    with checkpoint.replacing(target) as new:
        if target == source:
            shutil.copytree(source, new, dirs_exist_ok=True)
        built = write_graphs(new / checkpoint.EXPORTED, network, some if precision == "int8" else None)
        content = _content(saved, network, built, precision, alone=alone)
        engine = OnnxEngine(
            new / checkpoint.EXPORTED, image_size=network.image_size, vocabulary_size=network.vocabulary_size
        )
        differences = _differences(network, engine, some[:_COMPARED])
        before = after = None
        if annotations is not None and any(example.split == "val" for example in annotations.examples):
            before, after = (
                _scores(Captioner(each, saved.vocabulary, saved.decoding), annotations.split("val"))
                for each in (network, engine)
            )
            content = replace(
                content, export={**(content.export or {}), "scores_before": before, "scores_after": after}
            )
        checkpoint.write(new, content, hub.model_card(content))
        checkpoint.check_graphs(new, checkpoint.read(new))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return ExportReport(target, size, differences, before, after)


def _annotations(data: DataConfig) -> Annotations:
    return load_annotations(
        data.data, images=data.images, restval=data.restval, on_problem=data.on_problem, val_share=data.val_share
    )


def _pixels(annotations: Annotations | None, count: int, size: int) -> npt.NDArray[np.uint8]:
    """Training photos, evenly through the data set; noise where there is no data, which serves to compare alone."""
    if annotations is None:
        return np.random.default_rng(0).integers(0, 256, (2, 3, size, size), np.uint8)
    examples = annotations.split("train")
    chosen = examples[:: max(1, len(examples) // count)][:count]
    read = images.stream([example.path for example in chosen], size, batch_size=_TOGETHER)
    pixels = np.concatenate([batch.pixels for batch in read])
    if not len(pixels):
        raise CaptionerError(f"none of {len(chosen)} training photos can be read; give other --data")
    return pixels


def write_graphs(
    folder: Path,
    network: TorchEngine,
    photos: npt.NDArray[np.uint8] | None,
    features: npt.NDArray[np.float32] | None = None,
) -> Weights:
    """Write the three graphs of a network, and the file of weights that they share.

    Args:
        folder: is made anew.
        network: in fp32.
        photos: calibration photos, `(photos, 3, height, width)`; None writes graphs in fp32.
        features: calibrate the decoder; by default those of the photos.

    Returns:
        The tensors of the file.
    """
    built = Weights()
    seen = None if photos is None else network.features(photos) if features is None else features
    looks = EncoderExport(network.encoder, built, None if photos is None else torch.from_numpy(photos))
    writes = DecoderExport(network.decoder, built, None if seen is None else torch.from_numpy(seen))
    graphs = [looks.graph(), writes.start(), writes.step()]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    content, places = built.serialise()
    (folder / Weights.FILE).write_bytes(content)
    for graph in graphs:
        (folder / f"{graph.name}.onnx").write_bytes(graph.build(places))
    return built


def _content(saved: Checkpoint, network: TorchEngine, built: Weights, precision: str, *, alone: bool) -> Checkpoint:
    """The contents of the exported model; `alone` are the weights of the graphs its only ones."""
    content = replace(saved, export={"precision": precision})
    if not alone:
        return content
    config = network.encoder.config
    stored = tensors.below("encoder.", tensors.unpack(built.tensors))
    return replace(
        content,
        encoder=replace(config, weights=Path(config.weights).name),
        encoder_sha256=weights.fingerprint(stored),
        encoder_state={},
        decoder_state={},
    )


def _differences(network: TorchEngine, engine: OnnxEngine, photos: npt.NDArray[np.uint8]) -> dict[str, float]:
    """How far the graphs are from torch: root mean squares of differences, as shares of the numbers themselves."""
    features = network.features(photos)
    pairs = {"features": (features, engine.features(photos))}
    words, rows = np.full(len(photos), min(1, network.vocabulary_size - 1)), np.arange(len(photos))
    first, _ = network.step_all(words, rows, network.start(features))
    pairs["log-probabilities of the first word"] = first, engine.step_all(words, rows, engine.start(features))[0]
    return {
        name: float(np.sqrt(np.square(ours - theirs).mean() / max(float(np.square(theirs).mean()), 1e-30)))
        for name, (theirs, ours) in pairs.items()
    }


def _scores(captioner: Captioner, examples: Sequence[Example]) -> dict[str, float]:
    """Scores of the best captions of some photos; photos that cannot be read are passed over."""
    captions: dict[Any, str] = {}
    for batch in images.stream([example.path for example in examples], captioner.image_size, batch_size=_TOGETHER):
        if batch.indices:
            found = captioner.describe(captioner.features(batch.pixels))
            captions |= {examples[i].image_id: best.text for i, (best, *_) in zip(batch.indices, found, strict=True)}
    references = {example.image_id: example.captions for example in examples if example.image_id in captions}
    scores = metrics.score(references, captions)
    return {name: float(scores[name]) for name in _SCORES}

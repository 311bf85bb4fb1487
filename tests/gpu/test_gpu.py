"""The same on a GPU as on a processor: losses, gradients, features, captions; and no step makes the host wait.

pytest tests/gpu
"""

# ruff: noqa: F811

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DECODER, ENCODER, StoppedError, data, isolated, make_config, stop_in_epoch  # noqa: F401
from torch import Tensor

from captioner.config import DecodingOptions, EncoderConfig, OptimisationConfig
from captioner.datasets.annotations import Example
from captioner.datasets.batches import Batch, CaptionDataset
from captioner.decoding.search import decode
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchDecoder
from captioner.training.loading import Loader
from captioner.training.network import Network
from captioner.training.optimisation import Average, clip, optimiser_of
from captioner.training.reward import Reward
from captioner.training.rounding import Rounding
from captioner.training.trainer import train
from captioner.vocabulary import Vocabulary

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
PHOTOS = 64
SENTENCES = [f"a w{n % 7} thing w{n % 11} and a w{n}" for n in range(PHOTOS)]
EXAMPLES = [Example(str(n), Path(f"{n}.jpg"), (SENTENCES[n], SENTENCES[n - 1]), "train") for n in range(PHOTOS)]
VOCABULARY = Vocabulary.build(SENTENCES, 1)


def network(device: torch.device, *, dropout: float = 0.0, trainable: bool = False, layers: int = 1) -> Network:
    torch.manual_seed(0)
    config = replace(DECODER, dropout=dropout, feature_norm="standard", hidden_size=64, layers=layers)
    decoder = Decoder(config, len(VOCABULARY))
    return Network(Encoder(ENCODER, trainable=trainable), decoder).to(device)


def batches(device: torch.device, *, pixels: bool = False, batch_size: int = 32, epochs: int = 1) -> Iterator[Batch]:
    random = np.random.default_rng(0)
    source: Any = random.random((PHOTOS, 4096), np.float32).astype(np.float16)
    if pixels:
        source = random.integers(0, 256, (PHOTOS, 3, 32, 32), np.uint8)
    dataset = CaptionDataset.of(EXAMPLES, VOCABULARY, np.arange(PHOTOS))
    load = Loader(dataset, source, device)
    for epoch in range(epochs):
        yield from load(dataset.epoch(epoch, batch_size=batch_size, seed=0, by_photo=pixels))


@pytest.fixture
def exact() -> None:
    """Products in fp32 are computed in fp32."""
    Rounding("fp32", torch.device("cuda"))


def test_batches_that_are_copied_ahead_are_those_of_the_host(gpu: torch.device) -> None:
    """Features that lie on the card, and batches on another stream, under work that keeps the card busy."""
    work = torch.randn(2048, 2048, device=gpu)
    for pixels in (False, True):
        for there, here in zip(
            batches(gpu, pixels=pixels, batch_size=4, epochs=5),
            batches(CPU, pixels=pixels, batch_size=4, epochs=5),
            strict=True,
        ):
            for _ in range(20):
                work = (work @ work).tanh()
            assert all(
                torch.equal(one.cpu(), other) for one, other in zip(there.tensors(), here.tensors(), strict=True)
            )


def gradients(device: torch.device, precision: Any) -> tuple[float, dict[str, Tensor]]:
    model, rounding = network(device).train(), Rounding(precision, device)
    batch = next(iter(batches(device)))
    with rounding.autocast():
        loss = model(batch, smoothing=0.1) * batch.weight
    optimiser = optimiser_of(model, OptimisationConfig())
    rounding.scaled(loss).backward()  # type: ignore[no-untyped-call]
    rounding.unscale(optimiser)
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.02)])
def test_loss_and_gradients_are_those_of_a_processor(gpu: torch.device, precision: str, near: float) -> None:
    loss, found = gradients(gpu, precision)
    expected_loss, expected = gradients(CPU, "fp32")
    assert loss == pytest.approx(expected_loss, rel=near)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= near * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("pixels", [False, True], ids=["features", "photos"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layers", [1, 2])
def test_no_step_waits(gpu: torch.device, pixels: bool, precision: Any, layers: int) -> None:
    options = OptimisationConfig(average="ema", gradient_clip_value=1.0)
    model = network(gpu, dropout=0.3, trainable=pixels, layers=layers).train()
    rounding = Rounding(precision, gpu)
    optimiser, average = optimiser_of(model, options), Average(model, options)
    some = list(batches(gpu, pixels=pixels))
    for number, batch in enumerate([*some, *some], 1):
        torch.manual_seed(number)
        if number > 2:  # the first steps set things up
            torch.cuda.set_sync_debug_mode("error")
        try:
            with rounding.autocast():
                loss = model(batch, smoothing=0.1, own_words=0.2)
            optimiser.zero_grad()
            rounding.scaled(loss * batch.weight).backward()  # type: ignore[no-untyped-call]
            rounding.unscale(optimiser)
            clip(model, options)
            rounding.step(optimiser)
            average.after_step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_no_draw_waits(gpu: torch.device) -> None:
    reward = Reward(EXAMPLES, np.arange(PHOTOS), VOCABULARY, max_words=8, device=gpu)
    model, batch = network(gpu).eval(), next(iter(batches(gpu)))
    reward.words(model.decoder, model.decoder.start(model.features(batch)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        words = reward.words(model.decoder, model.decoder.start(model.features(batch)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert words.shape == (5 * len(batch.rows), 8)


def test_captions_are_those_of_a_processor(gpu: torch.device, exact: None) -> None:
    model = network(CPU)
    torch.nn.init.normal_(model.decoder.output.weight, std=2.0)  # sure of itself: no two captions are a tie
    features = np.random.default_rng(1).random((16, 4096), np.float32)
    here, there = (
        [
            [one.tokens for one in some]
            for some in decode(TorchDecoder(model.decoder, "fp32", device), features, VOCABULARY, DecodingOptions())
        ]
        for device in (CPU, gpu)
    )
    assert here == there


def test_features_are_near_those_of_a_processor(gpu: torch.device) -> None:
    photos = np.random.default_rng(2).integers(0, 256, (8, 3, 64, 64), np.uint8)
    encoder = Encoder(EncoderConfig("resnet50", "random", 64))
    here = encoder.features(photos)
    there = encoder.to(gpu).features(photos)
    assert np.linalg.norm(here - there) <= 0.01 * np.linalg.norm(here)


def test_a_search_waits_once_a_word(gpu: torch.device) -> None:
    model = network(gpu)
    engine = TorchDecoder(model.decoder)
    features = np.random.default_rng(1).random((8, 4096), np.float32)
    rows, named = np.arange(8), np.array([VOCABULARY.end])
    state = engine.start(features)
    engine.step(np.full(8, VOCABULARY.start), rows, state, 6, named)  # the first step sets things up
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.step(np.full(8, VOCABULARY.start), rows, state, 6, named)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_that_was_stopped_goes_on_with_its_scale(
    data: Path, tmp_path: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    whole, parts = (
        replace(make_config(data, tmp_path / name, epochs=4), precision=precision) for name in ("whole", "parts")
    )
    train(whole)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 3)
        with pytest.raises(StoppedError):
            train(parts)
    file = tmp_path / "parts" / "last" / "training.json"
    saved = json.loads(file.read_text())
    assert saved["scale"]["scale"] > 0
    saved["scale"]["scale"] = 1024.0  # not the one that torch begins with, which grows after 2,000 steps at the soonest
    file.write_text(json.dumps(saved))
    train(parts)
    resumed, undisturbed = (
        json.loads((tmp_path / name / "last" / "training.json").read_text()) for name in ("parts", "whole")
    )
    assert resumed["epochs"][-1]["train_loss"] < resumed["epochs"][0]["train_loss"]
    assert resumed["scale"]["scale"] == 1024.0
    assert undisturbed["scale"]["scale"] != 1024.0
    for one, other in zip(resumed["epochs"], undisturbed["epochs"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)

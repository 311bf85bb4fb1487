"""The prepared encoder computes what the encoder computes."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from helpers import make_model

from captioner.config import EncoderConfig, EncoderName, Precision
from captioner.networks import prepared_encoder
from captioner.networks.encoder import Encoder
from captioner.networks.prepared_encoder import PreparedEncoder

SIZE = 96


def encoder(name: EncoderName) -> Encoder:
    """With statistics that normalisation has something to do with."""
    made = Encoder(EncoderConfig(name, "random", SIZE))
    torch.manual_seed(0)
    for buffer_name, buffer in made.body.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return made


def photos(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["tiny", "mini", "vgg16_bn", "alexnet", "resnet50", "squeezenet1_1", "googlenet"])
def test_prepared_equals_the_encoder(name: EncoderName) -> None:
    plain = encoder(name)
    expected = plain(photos())
    exact, rounded = (PreparedEncoder(plain, precision) for precision in get_args(Precision)[1:])
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert exact(photos()).dtype == rounded(photos()).dtype == torch.float32
    assert distance(exact(photos()), expected) < 1e-5
    assert distance(rounded(photos()), expected) < 0.02
    assert distance(rounded(photos()), expected) > 1e-5
    assert torch.equal(plain(photos()), expected)  # the encoder is as it was


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_photo_does_not_depend_on_those_beside_it(precision: Precision) -> None:
    prepared = PreparedEncoder(encoder("mini"), precision)
    together = prepared(photos(5))
    assert torch.equal(torch.cat([prepared(photo[None]) for photo in photos(5)]), together)


def test_without_onednn_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encoder("mini")
    expected = PreparedEncoder(plain, "fp32")(photos())
    monkeypatch.setattr(prepared_encoder._Convolution, "_onednn", lambda self, x: None)
    assert distance(PreparedEncoder(plain, "fp32")(photos()), expected) < 1e-5


def test_photos_of_another_size() -> None:
    plain = encoder("mini")
    larger = torch.randint(0, 256, (2, 3, 130, 110), dtype=torch.uint8)
    assert distance(PreparedEncoder(plain, "fp32")(larger), plain(larger)) < 1e-5


def test_a_captioner_looks_in_the_precision_of_its_options() -> None:
    model = make_model()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = {p: model.features(pixels, replace(model.options, precision=p)) for p in get_args(Precision)}
    assert distance(found["fp32"], model.encoder(pixels)) < 1e-5
    assert distance(found["bf16"], model.encoder(pixels)) > 1e-5
    assert any(torch.equal(found["auto"], found[p]) for p in ("fp32", "bf16"))
    features = found["fp32"]
    assert model.features(features) is features

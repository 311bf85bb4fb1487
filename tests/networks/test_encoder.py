"""Every network yields the 4096 numbers that it should, from weights that are its own."""

import hashlib
import http.server
import math
import threading
from types import SimpleNamespace
from typing import get_args
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812
from torchvision import models
from torchvision.transforms.functional import normalize

from captioner import images
from captioner.config import EncoderConfig, EncoderName
from captioner.errors import CaptionerError, WeightsError
from captioner.networks import encoder as module
from captioner.networks import weights
from captioner.networks.encoder import OWN, Encoder

LARGE = {"vgg16", "vgg16_bn", "vgg19", "alexnet", "resnet101", "resnet152"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in get_args(EncoderName)]


def encoder(name="squeezenet1_1", file="random", size=64, **options):
    return Encoder(EncoderConfig(name, str(file), size), **options)


def photos(count=2, size=96):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def grid_average(maps, rows, columns):
    """Averages over a grid of cells, whose borders are rounded outwards, a cell at a time."""
    height, width = maps.shape[2:]
    down = [slice(r * height // rows, math.ceil((r + 1) * height / rows)) for r in range(rows)]
    across = [slice(c * width // columns, math.ceil((c + 1) * width / columns)) for c in range(columns)]
    cells = [maps[:, :, r, c] for r in down for c in across]
    return torch.stack([cell.mean((2, 3)) for cell in cells], dim=2).flatten(1)


@torch.no_grad()
def by_hand(name, state, pixels):
    """What an encoder should yield, from torchvision's own modules."""
    with torch.device("meta"):  # no time and memory for weights that are replaced
        network = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    network.load_state_dict(state, strict=False, assign=True)
    network.eval()
    x = normalize(pixels / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    if name.startswith("vgg"):
        fc6, fc7 = network.classifier[0], network.classifier[3]
        x = network.avgpool(network.features(x)).flatten(1)
        return fc7(fc6(x).relu()).relu()
    if name == "alexnet":
        fc6, fc7 = network.classifier[1], network.classifier[4]
        x = network.avgpool(network.features(x)).flatten(1)
        return fc7(fc6(x).relu()).relu()
    if name.startswith("resnet"):
        x = network.maxpool(network.bn1(network.conv1(x)).relu())
        return grid_average(network.layer4(network.layer3(network.layer2(network.layer1(x)))), 1, 2)
    if name == "squeezenet1_1":
        return grid_average(network.features(x), 2, 4)
    assert name == "googlenet"
    x = pixels / 127.5 - 1  # its weights come from TensorFlow, which scales photos to -1 .. 1
    for layer in "conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b maxpool3".split():
        x = getattr(network, layer)(x)
    for layer in "inception4a inception4b inception4c inception4d inception4e maxpool4 inception5a inception5b".split():
        x = getattr(network, layer)(x)
    return grid_average(x, 2, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_yields_4096_numbers(name):
    network = encoder(name)
    features = network(photos())
    assert features.shape == (2, 4096)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert name == "efficientnet_lite2" or (features >= 0).all()
    assert (features > 0).any()
    assert network(photos(0)).shape == (0, 4096)
    if name not in OWN:
        expected = by_hand(name, network.body.state_dict(), photos())
        assert torch.allclose(features, expected, rtol=1e-3, atol=expected.max().item() * 1e-5)


@pytest.mark.parametrize("size", [32, 64, 100, 224])
def test_the_grid_does_not_depend_on_the_size_of_photos(size):
    for name in ("squeezenet1_1", "googlenet", "tiny", "mini"):
        assert encoder(name)(photos(1, size)).shape == (1, 4096)


def test_a_photo_too_small_for_the_network():
    with pytest.raises(CaptionerError, match=r"^encoder\.image_size is 62; alexnet expects 63 or more$"):
        encoder("alexnet", size=62)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "tiny", "mini"])
def test_random_weights_are_the_same_every_time(name, caplog, monkeypatch):
    torch.manual_seed(1)
    with monkeypatch.context() as patch:  # `torch.manual_seed` would reseed the generators of all GPUs
        patch.setattr(torch, "manual_seed", lambda *_: pytest.fail("reseeds the caller's GPUs"))
        patch.setattr(torch.cuda, "manual_seed_all", lambda *_: pytest.fail("reseeds the caller's GPUs"))
        first = encoder(name)
    assert f"the weights of {name} are random: good for tests, not for photos" in caplog.text
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # building it draws nothing from the caller's random numbers
    second = encoder(name)
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(first(photos()), second(photos()))


def test_features_of_arrays():
    network = encoder("tiny", size=32, trainable=True)
    pixels = photos(3, 32)
    features = network.features(pixels.numpy())
    assert features.dtype == np.float32
    assert np.array_equal(features, network(pixels).detach().numpy())


def test_a_batch_equals_its_singles():
    network = encoder()
    together = network(photos(5))
    for index, photo in enumerate(photos(5)):
        assert torch.allclose(network(photo[None])[0], together[index], rtol=1e-4, atol=1e-4)


def test_features_tell_photos_apart():
    network = encoder()
    black, white = (torch.full((1, 3, 64, 64), value, dtype=torch.uint8) for value in (0, 255))
    assert not torch.allclose(network(black), network(white))
    turned = network(photos(1).flip(1))  # blue, green, red
    assert not torch.allclose(network(photos(1)), turned)


def test_a_frozen_network_stays_as_it_is():
    network = encoder("tiny")
    network.train()
    assert not any(part.training for part in network.modules())
    before = weights.fingerprint(network.state_dict())
    features = network(photos(4, 64))
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert weights.fingerprint(network.state_dict()) == before == weights.fingerprint(encoder("tiny").state_dict())


def test_a_network_that_learns():
    network = encoder("tiny", trainable=True)
    assert torch.equal(network(photos(4, 64)), encoder("tiny")(photos(4, 64)))  # until it is set to training
    network.train()
    counted = network.body.state_dict()
    counter = next(name for name in counted if name.endswith("num_batches_tracked"))
    network(photos(4, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert network.body.state_dict()[counter] == 1  # batch normalisation learns too
    network.eval()
    assert torch.equal(network(photos(4, 64)), network(photos(4, 64)))
    assert network.body.state_dict()[counter] == 1
    with torch.no_grad():
        assert not network(photos(1, 64)).requires_grad


@pytest.mark.slow
def test_dropout_is_on_in_training_alone():
    network = encoder("alexnet", trainable=True).train()
    assert not torch.equal(network(photos(1)), network(photos(1)))
    network.eval()
    assert torch.equal(network(photos(1)), network(photos(1)))


# Weights


@pytest.fixture(scope="module")
def torchvision_state():
    """Weights as torchvision's file has them, the classifier included, unlike those of `random`."""
    torch.manual_seed(5)
    return models.squeezenet1_1(weights=None).state_dict()


def test_files_of_weights(tmp_path, torchvision_state):
    save_file(torchvision_state, tmp_path / "a.safetensors")
    torch.save(torchvision_state, tmp_path / "a.pth")
    headless = {name: tensor for name, tensor in torchvision_state.items() if not name.startswith("classifier")}
    save_file(headless, tmp_path / "headless.safetensors")
    networks = [encoder(file=tmp_path / name) for name in ("a.safetensors", "a.pth", "headless.safetensors")]
    assert len({network.weights_sha256 for network in networks}) == 1
    assert networks[0].weights_sha256 != encoder().weights_sha256
    expected = by_hand("squeezenet1_1", torchvision_state, photos())
    for network in networks:
        assert torch.allclose(network(photos()), expected, rtol=1e-3, atol=1e-5)


def test_weights_of_half_precision_compute_in_single(tmp_path, torchvision_state):
    save_file({name: tensor.half() for name, tensor in torchvision_state.items()}, tmp_path / "half.safetensors")
    assert encoder(file=tmp_path / "half.safetensors")(photos()).dtype == torch.float32


def test_weights_that_a_checkpoint_carries(torchvision_state):
    carried = Encoder(EncoderConfig("squeezenet1_1", "nowhere.pth"), torchvision_state)
    assert torch.allclose(
        carried(photos()), by_hand("squeezenet1_1", torchvision_state, photos()), rtol=1e-3, atol=1e-5
    )


def test_counters_of_training_steps_may_be_missing(tmp_path):
    whole = encoder("tiny")
    state = {name: tensor.contiguous() for name, tensor in whole.body.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    save_file(old, tmp_path / "old.safetensors")
    networks = [encoder("tiny", tmp_path / name) for name in ("whole.safetensors", "old.safetensors")]
    assert all(torch.equal(network(photos()), whole(photos())) for network in networks)
    assert networks[0].weights_sha256 == networks[1].weights_sha256


def test_weights_of_another_network(tmp_path, torchvision_state):
    path = tmp_path / "a.safetensors"
    save_file(torchvision_state, path)
    with pytest.raises(
        WeightsError, match=rf"^tiny weights \({path}\) belong to another network: [\w.]+ is missing; .* and \d+ more$"
    ):
        encoder("tiny", path)
    save_file(torchvision_state | {"features.0.weight": torch.zeros(64, 3, 5, 5)}, path)
    with pytest.raises(
        WeightsError, match=r"network: features\.0\.weight is \(64, 3, 5, 5\) instead of \(64, 3, 3, 3\)$"
    ):
        encoder(file=path)
    save_file({name: tensor for name, tensor in torchvision_state.items() if name != "features.3.squeeze.bias"}, path)
    with pytest.raises(WeightsError, match=r"another network: features\.3\.squeeze\.bias is missing$"):
        encoder(file=path)


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(
        WeightsError,
        match=r"none\.pth: no such weight file for squeezenet1_1; .*efficientnet_lite2 --encoder\.image-size 192",
    ):
        encoder(file=tmp_path / "none.pth")
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(WeightsError, match=r"a\.safetensors: cannot be read as weights \(.+\); delete it and fetch it"):
        encoder(file=tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"^tiny has no pretrained weights; give a file, or train it: "):
        encoder("tiny", "default")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Torch's cache, empty, on a machine without a network."""

    def refuse(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "file"),
    # The first ImageNet weights of torchvision, which the literature used.
    [
        ("vgg16", "vgg16-397923af.pth"),
        ("resnet50", "resnet50-0676ba61.pth"),
        ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
    ],
)
def test_no_network_and_no_file(cache, name, file):
    with pytest.raises(
        WeightsError,
        match=rf"^no weights for {name}: https://download\.pytorch\.org/models/{file} cannot be downloaded "
        rf"\(Name or service not known\); put that file at {cache / file}, pass --encoder\.weights FILE, "
        r"or use the one of the package registry: .*--encoder\.name efficientnet_lite2 .*$",
    ):
        encoder(name, "default")


def test_a_file_that_was_put_into_the_cache(cache, torchvision_state):
    cache.mkdir(parents=True)
    torch.save(torchvision_state, cache / "squeezenet1_1-b8a52dc0.pth")
    network = encoder(file="default")
    assert torch.allclose(
        network(photos()), by_hand("squeezenet1_1", torchvision_state, photos()), rtol=1e-3, atol=1e-5
    )


def test_a_damaged_file_in_the_cache(cache, torchvision_state):
    cache.mkdir(parents=True)
    path = cache / "squeezenet1_1-b8a52dc0.pth"
    torch.save(torchvision_state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(
        WeightsError, match=rf"^{path}: cannot be read as weights \(.+\); delete it and fetch it again$"
    ):
        encoder(file="default")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file."""

    content = b""
    asked = 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(cache, tmp_path, monkeypatch, torchvision_state):
    """Default weights that lie on a server of this machine: their address and the folder they are kept in."""
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.save(torchvision_state, tmp_path / "served.pth")
    Server.content, Server.asked = (tmp_path / "served.pth").read_bytes(), 0
    digest = hashlib.sha256(Server.content).hexdigest()[:8]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        entry = SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/net-{digest}.pth")
        monkeypatch.setattr(module.models, "get_model_weights", lambda name: {"IMAGENET1K_V1": entry})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield cache
        server.shutdown()


def test_default_weights_are_downloaded_once(served, torchvision_state):
    first, second = encoder(file="default"), encoder(file="default")
    assert Server.asked == 1
    assert len(list(served.iterdir())) == 1
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(first.body.state_dict()["features.0.bias"], torchvision_state["features.0.bias"])


def test_a_download_that_was_damaged_on_the_way_is_not_kept(served):
    Server.content = Server.content[:-1] + b"?"
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(invalid hash value .*\); put that file at"):
        encoder(file="default")
    assert list(served.iterdir()) == []


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), http.client.RemoteDisconnected("gone")])
def test_a_server_that_hangs_up(served, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(.+\); put that file at"):
        encoder(file="default")


# Golden tensors: the tap, the grid, the preprocessing and the real weights together.


def drawn():
    """A picture that is the same on every machine."""
    y, x = np.mgrid[0:240, 0:320]
    checks = (x // 16 + y // 12) % 2 * 100
    picture = np.stack([x * 255 // 320, y * 255 // 240, checks + (x * y) % 97], axis=-1)
    return Image.fromarray(picture.astype(np.uint8))


@pytest.fixture
def real(shared):
    return encoder(file=shared / "weights/squeezenet1_1.safetensors", size=224)


@pytest.mark.shared
def test_golden_tensor_of_a_drawn_picture(real):
    assert real.weights_sha256 == "ef7efb1afa1ac494811b4ebcae68813083abe4d7fa16fa3a94e85c7e6244a8d7"
    (features,) = real(torch.from_numpy(images.load(drawn(), 224))[None])
    largest = features.topk(8)
    assert features.norm().item() == pytest.approx(212.161, rel=1e-4)
    assert dict(zip(largest.indices.tolist(), largest.values.tolist(), strict=True)) == pytest.approx(
        {
            2015: 53.0852,
            3860: 47.2709,
            2011: 40.0191,
            167: 36.3394,
            2660: 35.1937,
            2663: 33.1251,
            3383: 31.4199,
            80: 30.5248,
        },
        rel=1e-3,
    )
    assert int((features > 0).sum()) == pytest.approx(741, abs=5)


@pytest.mark.shared
def test_golden_tensor_of_a_real_photo(real, shared):
    photo = images.load(shared / "flickr8k/images/1000268201_693b08cb0e.jpg", 224)
    (features,) = real(torch.from_numpy(photo)[None])
    largest = features.topk(8)
    # Decoders of JPEG may differ by a shade.
    assert features.norm().item() == pytest.approx(306.987, rel=5e-3)
    assert dict(zip(largest.indices.tolist(), largest.values.tolist(), strict=True)) == pytest.approx(
        {2572: 54.428, 1418: 52.424, 531: 50.831, 482: 48.153, 1062: 47.352, 1580: 45.920, 3630: 40.908, 1414: 39.410},
        rel=2e-2,
    )


@pytest.mark.shared
def test_real_weights_give_a_batch_what_they_give_its_singles(real, shared):
    paths = sorted((shared / "flickr8k/images").iterdir())[:6]
    pixels = torch.from_numpy(np.stack([images.load(path, 224) for path in paths]))
    together = real(pixels)
    assert torch.allclose(torch.cat([real(photo[None]) for photo in pixels]), together, rtol=1e-4, atol=1e-3)
    similar = F.cosine_similarity(together[:, None], together[None], dim=2)
    assert similar.triu(1).max() < 0.9  # six photos of six things

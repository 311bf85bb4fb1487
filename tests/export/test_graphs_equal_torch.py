"""The graphs compute what torch computes: exactly in fp32, nearly in 8 bits."""

from itertools import product

import numpy as np
import onnx
import pytest
import torch

from captioner.config import DecoderConfig, EncoderConfig
from captioner.export import write_graphs
from captioner.export.eight_bits import MOST, Scale, codes
from captioner.export.encoder import EncoderExport
from captioner.export.graph import Weights
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchEngine
from captioner.runtime import OnnxEngine
from captioner.tensors import below, unpack

WORDS = 60


def noise(count, size, seed=0):
    """Photos of a few large spots of colour, as photos are: not noise, which CNNs average away."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (count, 3, 4, 4))
    return np.kron(small, np.ones((1, 1, -(-size // 4), -(-size // 4)), int))[:, :, :size, :size].astype(np.uint8)


def network(name="tiny", size=40, **decoder):
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(name=name, weights="random", image_size=size))
    with torch.no_grad():
        for module in encoder.modules():  # as training would leave them, a negative factor among them
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.weight[0] = -0.7
                module.bias.normal_(std=0.1)
    writes = Decoder(DecoderConfig(**{"hidden_size": 32, "embedding_size": 16, **decoder}), WORDS).eval()
    with torch.no_grad():
        writes.output.weight.normal_(std=0.5)
        writes.output.bias.normal_()
        if writes.config.feature_norm == "standard":
            writes.standard.mean.normal_()
            writes.standard.variance.uniform_(0.5, 2)
    return TorchEngine(encoder, writes, precision="fp32", device="cpu")


def exported(folder, engine, photos=None, features=None, **options):
    write_graphs(folder / "onnx", engine, photos, features)
    return OnnxEngine(folder / "onnx", image_size=engine.image_size, vocabulary_size=engine.vocabulary_size, **options)


def likely_features(count, seed=0):
    return np.random.default_rng(seed).gamma(0.5, 1.0, (count, 4096)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "size"),
    [*product(["tiny", "mini", "squeezenet1_1", "googlenet"], [40, 57]), ("efficientnet_lite2", 96)],
)
def test_features(tmp_path, name, size):
    engine = network(name, size)
    photos = noise(12, size)
    expected = engine.features(photos)
    close = exported(tmp_path, engine).features(photos)
    assert np.allclose(close, expected, atol=1e-4 * np.abs(expected).max())
    eight = exported(tmp_path, engine, noise(24, size, seed=1)).features(photos)
    assert np.corrcoef(eight.ravel(), expected.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "irnn"])
@pytest.mark.parametrize("norm", ["standard", "sqrt", "none"])
def test_words(tmp_path, cell, layers, norm):
    engine = network(cell=cell, layers=layers, feature_norm=norm)
    features = likely_features(6)
    for calibration, share in ((None, 1e-5), (likely_features(64, seed=1), 0.05)):
        ours = exported(tmp_path, engine, None if calibration is None else noise(2, 40), calibration)
        state, theirs = ours.start(features), engine.start(features)
        tokens, parents = np.full(9, 1), np.array([0, 0, 1, 2, 3, 5, 4, 4, 1])
        for time in range(4):
            named = np.array([2, 7])
            everything, _ = engine.step_all(tokens, parents, theirs)
            found, following = ours.step(tokens, parents, state, 5, named)
            tolerance = share * np.abs(everything).max()
            assert np.abs(found.named - everything[:, named]).max() < tolerance
            assert np.abs(found.logprob - np.take_along_axis(everything, found.word, 1)).max() < tolerance
            assert (np.diff(found.logprob, axis=1) <= 0).all()
            if calibration is None:
                assert (found.word == np.argsort(-everything, axis=1, kind="stable")[:, :5]).all()
            all_ours, _ = ours.step_all(tokens, parents, state)
            assert np.allclose(np.take_along_axis(all_ours, found.word, 1), found.logprob, atol=1e-5)
            assert np.allclose(np.exp(all_ours).sum(1), 1, atol=1e-4)
            _, theirs = engine.step(tokens, parents, theirs, 5, named)
            state, tokens, parents = following, everything.argmax(axis=1), np.roll(np.arange(9), time)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_convolution_behind_which_is_averaged_is_computed_on_the_grid(tmp_path, precision):
    """EfficientNet-Lite2's last: four products of 1280 x 1024 a photo, though its map has nine places."""
    engine = network("efficientnet_lite2", 96)
    graph = EncoderExport(
        engine.encoder, Weights(), None if precision == "fp32" else torch.from_numpy(noise(4, 96))
    ).graph()
    sizes = {name: weight.shape for name, weight in graph.weights.tensors.items()}
    assert sizes["graph.grid.3x3.2x2"] == (9, 4)
    kinds = [node.op_type for node in onnx.load_from_string(graph.build(graph.weights.serialise()[1])).graph.node]
    last = {"fp32": "Conv", "int8": "MatMulIntegerToFloat"}[precision]
    assert last in kinds[kinds.index("MatMul") :]
    assert kinds.count("MatMul") == 1


@pytest.mark.parametrize(("name", "size"), [("mini", 57), ("efficientnet_lite2", 96)])
def test_a_photo_does_not_depend_on_those_beside_it(tmp_path, name, size):
    """Bit for bit: scales are fixed, and sums of whole numbers are exact in any order."""
    engine = exported(tmp_path, network(name, size), noise(16, size, seed=1))
    photos = noise(11, size)
    together = engine.features(photos)
    assert all((engine.features(photo[None])[0] == row).all() for photo, row in zip(photos, together, strict=True))
    state = engine.start(together)
    rows = np.arange(11)
    found, following = engine.step(rows, rows, state, 4, rows[:1])
    for row in rows:
        alone = engine.start(together[row : row + 1])
        assert all((a[0] == b[row]).all() for a, b in zip(alone, state, strict=True))
        word, after = engine.step(rows[row : row + 1], np.array([0]), alone, 4, rows[:1])
        assert all((a[0] == b[row]).all() for a, b in zip(word, found, strict=True))
        assert all((a[0] == b[row]).all() for a, b in zip(after, following, strict=True))


@pytest.mark.parametrize("calibrated", [False, True])
def test_threads_change_no_bit(tmp_path, calibrated):
    photos = noise(5, 57)
    engine = network("mini", 57)
    calibration = noise(8, 57, seed=1) if calibrated else None
    one, three = (exported(tmp_path, engine, calibration, threads=threads) for threads in (1, 3))
    assert (one.features(photos) == three.features(photos)).all() or not calibrated
    assert np.allclose(one.features(photos), three.features(photos), atol=1e-5)


def test_training_reads_the_weights_back(tmp_path):
    """Whatever the sign of a normalisation's factor: each weight to half a step."""
    engine = network()
    built = write_graphs(tmp_path / "onnx", engine, noise(4, 40))
    state = below("encoder.", unpack(built.tensors))
    expected = {k: v for k, v in engine.encoder.body.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = tensor.numpy().reshape(len(tensor), -1)
        most = np.abs(rows).max(axis=1, keepdims=True) / MOST / 2 if tensor.ndim > 1 else 0
        assert (np.abs(state[name].reshape(rows.shape) - rows) <= most * 1.001 + 1e-7).all(), name
    state = below("decoder.", unpack(built.tensors))
    assert state.keys() == engine.decoder.state_dict().keys()


def test_no_processor_can_overflow_16_bits():
    """Processors without VNNI add two products of an activation and a weight in 16 bits."""
    assert 2 * 255 * MOST <= 2**15 - 1
    stored, _ = codes(np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32))
    assert np.abs(stored).max() == MOST


@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-1.0, 1.0), (-2.0, -1.0), (0.0, 0.0), (-0.1, 700.0)])
def test_a_scale_holds_zero_exactly_and_the_ends_nearly(low, high):
    scale = Scale.over(low, high)
    assert 0 <= scale.zero <= 255
    for value in (low, high):
        stored = min(255, max(0, round(value / scale.step) + scale.zero))
        assert abs((stored - scale.zero) * scale.step - value) <= scale.step

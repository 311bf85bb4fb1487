"""Beam search: captions a second of ours in 8 bits, of the commit before, of a plain search, and the 8-bit ceiling.

    python -m benchmarks.decoding [--photos 1000] [--rounds 5] [--before CHECKOUT]

Every caption takes 16 steps of a beam of 5 over 9,487 words (the network: LSTM, 512 hidden, 4096 numbers a photo), so
that nothing is gained by captions that end. The ceiling is the rate of onnxruntime's product of 8-bit matrices, of the
shape of the output layer, in as many threads. All systems take turns within a round; medians over rounds are printed,
and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from benchmarks.common import Before, ratio, report, seconds, take_turns
from captioner.config import FEATURE_SIZE, DecoderConfig, DecodingOptions, EncoderConfig
from captioner.decoding.search import decode
from captioner.export import write_graphs
from captioner.machine import processors
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchEngine
from captioner.runtime import OnnxEngine

VOCABULARY, HIDDEN, BEAM, STEPS = 9487, 512, 5, 16
SPECIAL = SimpleNamespace(pad=0, start=1, end=2, unk=3)
OPTIONS = DecodingOptions(beam_size=BEAM, min_words=STEPS, max_words=STEPS)
# The first step has one row a photo, the others one a beam.
ROWS = 1 + (STEPS - 1) * BEAM
#: Multiplications a photo: the output layer, and both matrices of the LSTM.
PRODUCTS = ROWS * HIDDEN * (VOCABULARY + 8 * HIDDEN) + FEATURE_SIZE * 2 * HIDDEN
TOGETHER = 192  # rows of the product that is measured


def plain_batched(decoder: Decoder, features: Tensor, together: int = 64) -> list[list[int]]:
    """The beams of many photos in one batch, in torch, in the obvious way."""
    captions: list[list[int]] = []
    for some in features.split(together):
        photos = len(some)
        state = decoder.start(some.repeat_interleave(BEAM, dim=0))
        tokens = torch.full((photos * BEAM,), SPECIAL.start)
        sums = torch.full((photos, BEAM), -torch.inf)
        sums[:, 0] = 0
        history = torch.zeros(photos, BEAM, 0, dtype=torch.long)
        for _ in range(STEPS):
            logits, state = decoder.step(tokens, state)
            logprobs = torch.log_softmax(logits, dim=1)
            logprobs[:, [SPECIAL.pad, SPECIAL.start, SPECIAL.end, SPECIAL.unk]] = -torch.inf
            sums, index = (sums[..., None] + logprobs.view(photos, BEAM, -1)).flatten(1).topk(BEAM, dim=1)
            parents, words = index // VOCABULARY, index % VOCABULARY
            history = torch.cat([history.gather(1, parents[..., None].expand_as(history)), words[..., None]], dim=2)
            rows = (torch.arange(photos)[:, None] * BEAM + parents).flatten()
            state = tuple(part[:, rows] for part in state)
            tokens = words.flatten()
        captions += history[:, 0].tolist()
    return captions


def product_rate(threads: int) -> float:
    """Multiplications a second of 8-bit matrices, in onnxruntime, each thread on a product of its own."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, [TOGETHER, HIDDEN])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [TOGETHER, VOCABULARY])]
    random = np.random.default_rng(0)
    constants = {
        "w": random.integers(-63, 64, (HIDDEN, VOCABULARY)).astype(np.int8),
        "scale": np.float32(1 / 127),
        "scales": np.full(VOCABULARY, 0.01, np.float32),
        "zero": np.uint8(128),
        "none": np.int8(0),
    }
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "scale", "scales", "zero", "none"], ["y"], domain="com.microsoft"
    )
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "product", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = random.integers(0, 256, (TOGETHER, HIDDEN)).astype(np.uint8)
    times = 20

    def work(_: int) -> None:
        for _ in range(times):
            session.run(None, {"x": x})

    with ThreadPoolExecutor(threads) as pool:
        taken = seconds(lambda: list(pool.map(work, range(threads))))
    return threads * times * TOGETHER * HIDDEN * VOCABULARY / taken


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of the commit b0db82f, to measure too")
    arguments = parser.parse_args()
    workers = processors()

    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(hidden_size=HIDDEN, embedding_size=HIDDEN), VOCABULARY).eval()
    decoder.output.weight.mul_(100)  # as far apart as a trained model's
    encoder = Encoder(EncoderConfig(name="tiny", weights="random", image_size=64))
    features = torch.rand(arguments.photos, FEATURE_SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "features.npy", features.numpy())
        network = TorchEngine(encoder, decoder, precision="fp32", device="cpu")
        noise = np.random.default_rng(0).integers(0, 256, (64, 3, 64, 64)).astype(np.uint8)
        write_graphs(folder / "onnx", network, noise, features=features[:64].numpy())
        engine = OnnxEngine(folder / "onnx", image_size=64, vocabulary_size=VOCABULARY)
        few = features[: arguments.photos // 10]

        def rate(count: int, taken: float) -> float:
            return count / taken

        systems: dict[str, Any] = {
            "ours": lambda: rate(
                len(features), seconds(lambda: decode(engine, features.numpy(), SPECIAL, OPTIONS, workers))
            ),
            "plain_batched": lambda: rate(len(few), seconds(lambda: plain_batched(decoder, few))),
            "products": lambda: product_rate(workers),
        }
        before = None
        if arguments.before:
            before = Before(arguments.before, "decoding", str(folder / "features.npy"))
            systems["before"] = lambda: rate(len(features), before())
        systems["ours"]()
        found = take_turns(systems, arguments.rounds)
        if before is not None:
            before.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    ceiling = [products / PRODUCTS for products in found["products"]]
    ratios = {
        "to_plain_batched": ratio(found["ours"], found["plain_batched"]),
        "of_8_bit_rate": ratio(found["ours"], ceiling),
    }
    if "before" in found:
        ratios["to_before"] = ratio(found["ours"], found["before"])
    for system in ("ours", "before", "plain_batched"):
        if system in medians:
            print(f"{medians[system]:8.1f} captions/s  {system}")
    report(
        f"captions a second, beam {BEAM}, {STEPS} steps, {VOCABULARY} words, hidden {HIDDEN}, {workers} threads",
        ours={"captions": medians["ours"]},
        peer={name: medians[name] for name in ("plain_batched", "before") if name in medians},
        ceiling={"products_a_second": medians["products"], "captions": statistics.median(ceiling)},
        ratios=ratios,
    )


if __name__ == "__main__":
    main()

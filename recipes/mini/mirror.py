"""The decoder learns to see in a photo alone what the photo and its mirror image show together.

    python -m recipes.mini.mirror DATA MODEL OUTPUT --features mirrored.npy --unrounded FEATURES

The mean of both features makes better captions, but takes twice the time. So the layer that reads the photo is fitted
anew, by ridge regression: from the features of the photo (or of its mirror image) to the first hidden state that the
mean of both sets. MODEL is an exported one in 8 bits; OUTPUT gets its files, of which only that layer differs.
`--features` holds the features of training photos, `(2, photos, 4096)`, and is made where it is missing. With
`--unrounded`, the states to be reached are those of the CNN before its weights were rounded: its features of the photos
and of their mirror images are the files `train-0.npy` and `train-1.npy` there, see `recipes.mini.features`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from captioner.datasets.annotations import load
from captioner.export.eight_bits import codes
from captioner.files import sha256
from captioner.model import Captioner
from captioner.networks.inference import TorchEngine
from recipes.mini import common
from recipes.mini.looks import look_together


@torch.no_grad()
def fitted(
    engine: TorchEngine, features: np.ndarray, strength: float, unrounded: Sequence[np.ndarray] = ()
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that reads the photo.

    Args:
        engine: the model.
        features: of `looks.look`.
        strength: of the pull towards the weights that are there, as a share of the mean variance of its input.
        unrounded: the same features of the CNN before rounding, of which the states to be reached are computed.
    """
    decoder = engine.decoder
    size, weight = decoder.initial.in_features, decoder.initial.weight
    squares, products = torch.zeros(size, size), torch.zeros(size, len(weight))
    inputs, changes, count = torch.zeros(size), torch.zeros(len(weight)), 0
    for rows in common.chunks(np.arange(features.shape[1]), 1000):
        two = torch.from_numpy(features[:, rows]).float()
        better = torch.from_numpy(np.stack([each[rows] for each in unrounded])).float() if len(unrounded) else two
        wanted = decoder.initial(decoder.normalise(better.mean(0)))
        for one in two:
            x = decoder.normalise(one)
            change = wanted - decoder.initial(x)
            squares.addmm_(x.T, x)
            products.addmm_(x.T, change)
            inputs, changes, count = inputs + x.sum(0), changes + change.sum(0), count + len(x)
    inputs, changes = inputs / count, changes / count
    squares -= count * torch.outer(inputs, inputs)
    products -= count * torch.outer(inputs, changes)
    squares.diagonal().add_(strength * squares.diagonal().mean())
    more = torch.linalg.solve(squares, products).T
    return weight + more, decoder.initial.bias + changes - more @ inputs


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--unrounded", type=Path)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if not arguments.features.exists():
        paths = [example.path for example in load(arguments.data).split("train")]
        np.save(arguments.features, look_together(arguments.model, paths, arguments.processes))
    engine = Captioner.from_pretrained(arguments.model, engine="torch", device="cpu", precision="fp32").engine
    assert isinstance(engine, TorchEngine)
    folder = arguments.unrounded
    unrounded = [] if folder is None else [np.load(folder / f"train-{view}.npy", mmap_mode="r") for view in (0, 1)]
    weight, bias = fitted(engine, np.load(arguments.features, mmap_mode="r"), arguments.strength, unrounded)

    shutil.copytree(arguments.model, arguments.output, dirs_exist_ok=True)
    file = arguments.output / "onnx" / "model.safetensors"
    tensors = load_file(file)
    stored, step = codes(weight.numpy())
    new = {"decoder.initial.weight": stored, "decoder.initial.weight.step": step, "decoder.initial.bias": bias.numpy()}
    assert all(tensors[name].shape == tensor.shape for name, tensor in new.items())
    file.write_bytes(save(tensors | new))  # of the same sizes and in the same order, as the graphs refer to them
    config = arguments.output / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["export"] = {name: value for name, value in content["export"].items() if not name.startswith("scores")}
    content["export"]["sha256"]["onnx/model.safetensors"] = sha256(file)
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Several looks at a photo: the whole of it and its middle, each with its mirror image.

    python -m recipes.mini.looks DATA MODEL FEATURES

Writes the mean features of the four looks at each training photo, for `recipes.mini.joint --teachers`: to
`FEATURES/train-0.npy` and, as a photo and its mirror image have the same four, to `FEATURES/train-1.npy`, which are
(photos, 4096) in float16; and the decoder of MODEL to `FEATURES/decoder.pt`. MODEL is an exported one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioner import images
from captioner.datasets.annotations import load
from captioner.model import Captioner
from recipes.mini import common
from recipes.mini.late import learned

_MIDDLE = 0.9  # of the height and of the width


def look(model: Path, paths: Sequence[Path], share: float = 1.0) -> np.ndarray:
    """Features of photos and of their mirror images, `(2, photos, 4096)`, float16.

    Args:
        model: an exported one.
        paths: of the photos.
        share: how much of the height and of the width of a photo is looked at, in the middle.
    """
    captioner = Captioner.from_pretrained(model)
    size = captioner.image_size
    found = np.zeros((2, len(paths), 4096), np.float16)
    for rows in common.chunks(np.arange(len(paths)), 16):
        some = [paths[row] for row in rows]
        pixels = np.stack([images.load(path, size) if share == 1 else _middle(path, size, share) for path in some])
        found[0, rows] = captioner.features(pixels)
        found[1, rows] = captioner.features(np.ascontiguousarray(pixels[..., ::-1]))
    return found


def look_together(model: Path, paths: Sequence[Path], processes: int, share: float = 1.0) -> np.ndarray:
    """The same as `look`, by several processes."""
    found = np.empty((2, len(paths), 4096), np.float16)
    with ProcessPoolExecutor(processes) as pool:
        parts = [pool.submit(look, model, paths[start::processes], share) for start in range(processes)]
        for start, part in enumerate(parts):
            found[:, start::processes] = part.result()
    return found


def _middle(path: Path, size: int, share: float) -> np.ndarray:
    """The middle of a photo, `(3, size, size)`, uint8."""
    image = Image.open(path).convert("RGB")
    left, top = image.width * (1 - share) / 2, image.height * (1 - share) / 2
    box = left, top, image.width - left, image.height - top
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.save(learned(arguments.model)[1], arguments.output / "decoder.pt")
    paths = [example.path for example in load(arguments.data).split("train")]
    total = np.zeros((len(paths), 4096), np.float32)
    for share in (1.0, _MIDDLE):
        for one in look_together(arguments.model, paths, arguments.processes, share):
            total += one
    for view in (0, 1):
        np.save(arguments.output / f"train-{view}.npy", (total / 4).astype(np.float16))


if __name__ == "__main__":
    main()

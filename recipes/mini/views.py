"""Photos -> maps of the CNN's first stages, which stay frozen: the whole photo, and changed views of it.

    python -m recipes.mini.views DATA CACHE --views 8

View 0 is the whole photo; the others are parts of it, half of them mirrored, in other light. With `--mirrored` there
are two views, the whole photo and its mirror image. One file a view and split,
`CACHE/{train,val}-VIEW.npy`: bfloat16 in the bits of 16-bit integers, (photos, rows, columns, channels).
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from captioner.datasets.annotations import load
from recipes.mini import common
from recipes.mini.late import FROZEN, fold, pretrained

SIZE = 192  # height and width that the CNN sees, in pixels
_TOGETHER = 32
_SHAPE = (SIZE // 16, SIZE // 16, 88)  # of a map: rows, columns, channels


def look(path: Path, view: int | Literal["mirrored"], seed: int) -> np.ndarray:
    """A view of a photo, `(3, SIZE, SIZE)`, uint8."""
    if view == "mirrored":
        return np.ascontiguousarray(look(path, 0, seed)[..., ::-1])
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if view:
        random = np.random.default_rng((seed, view))
        image = _changed(image, random)
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _changed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A part of a photo, 60 % of it or more, perhaps mirrored, in other light."""
    share, aspect = random.uniform(0.6, 1), math.exp(random.uniform(-0.2, 0.2))
    width = min(image.width, round(image.width * math.sqrt(share * aspect)))
    height = min(image.height, round(image.height * math.sqrt(share / aspect)))
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    image = image.crop((left, top, left + width, top + height))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(random.uniform(0.75, 1.25))
    return image


def _early() -> nn.Module:
    features: Any = pretrained().features
    early = nn.Sequential(features.stem, *features.blocks[:FROZEN])
    fold(early)
    return early.to(common.FAST).to(memory_format=torch.channels_last)


@torch.inference_mode()
def write(file: Path, paths: Sequence[Path], view: int | Literal["mirrored"], start: int, stop: int) -> None:
    """Fill some rows of a file."""
    torch.set_num_threads(1)
    early = _early()
    maps = np.lib.format.open_memmap(file, "r+")
    for first in range(start, stop, _TOGETHER):
        rows = range(first, min(first + _TOGETHER, stop))
        pixels = torch.from_numpy(np.stack([look(paths[row], view, row) for row in rows]))
        x = ((pixels.float() - 127) / 128).to(common.FAST).contiguous(memory_format=torch.channels_last)
        maps[rows.start : rows.stop] = early(x).permute(0, 2, 3, 1).bfloat16().contiguous().view(torch.int16).numpy()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--mirrored", action="store_true", help="two views: the whole photo, and its mirror image")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    data = load(arguments.data)
    with ProcessPoolExecutor(arguments.processes) as pool:
        for view in range(2 if arguments.mirrored else arguments.views):
            for split in ("val", "train") if view == 0 else ("train",):
                file = arguments.cache / f"{split}-{view}.npy"
                if file.exists():
                    continue
                paths = [example.path for example in data.split(split)]
                new = file.with_suffix(".new")
                np.lib.format.open_memmap(new, "w+", np.int16, (len(paths), *_SHAPE)).flush()
                cuts = np.linspace(0, len(paths), arguments.processes + 1).astype(int).tolist()
                kind = "mirrored" if view and arguments.mirrored else view
                parts = [pool.submit(write, new, paths, kind, a, b) for a, b in itertools.pairwise(cuts)]
                for part in parts:
                    part.result()
                new.rename(file)
                print(file, flush=True)


if __name__ == "__main__":
    main()

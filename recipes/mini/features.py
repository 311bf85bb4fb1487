"""Maps of the frozen stages -> 4096 numbers of each photo, and the decoder, of a joint training.

    python -m recipes.mini.features CACHE JOINT FEATURES --views 2

JOINT is the folder of a joint training, a saved model (`captioner/pretrained/mini`), or `imagenet`.

Writes `FEATURES/{train,val}-VIEW.npy`, (photos, 4096) in float16, and `FEATURES/decoder.pt`.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from recipes.mini.joint import Maps, features
from recipes.mini.late import Late, learned


def late_of(joint: Path) -> Late:
    """The CNN's last stages alone."""
    return learned(joint)[0]


def part(cache: Path, joint: Path, split: str, view: int, rank: int, processes: int) -> np.ndarray:
    """Features of every photo whose number leaves `rank`, divided by `processes`."""
    torch.set_num_threads(1)
    return features(late_of(joint), Maps(cache, split), view, rank, processes).numpy().astype(np.float16)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("joint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.save(learned(arguments.joint)[1], arguments.output / "decoder.pt")
    count = arguments.processes
    with ProcessPoolExecutor(count) as pool:
        for split, view in [("val", 0), *(("train", view) for view in range(arguments.views))]:
            parts = [pool.submit(part, arguments.cache, arguments.joint, split, view, r, count) for r in range(count)]
            found = [each.result() for each in parts]
            whole = np.empty((sum(map(len, found)), 4096), np.float16)
            for rank, some in enumerate(found):
                whole[rank::count] = some
            np.save(arguments.output / f"{split}-{view}.npy", whole)
            print(split, view, whole.shape, flush=True)


if __name__ == "__main__":
    main()

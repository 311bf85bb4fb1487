"""The model in the box: milliseconds for one photo on one core, and photos a second of many on all of them.

    python -m benchmarks.pretrained [--photos DIR] [--count 1000] [--rounds 3]

Photos are 224 x 224 JPEGs: those of a folder, or parts of the sample photos of scikit-image and scikit-learn. All
systems take turns within a round; medians over rounds are printed, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from captioner import Captioner, caption_photos, images

_SAMPLES = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_SIZE = 224


def samples() -> list[Path]:
    """The photos that the packages of the test extra ship."""
    found = []
    for package, names in _SAMPLES.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: pip install -e '.[test]', or give --photos DIR")
        found += [Path(spec.origin).parent / _FOLDERS[package] / name for name in names]
    return found


def photos(folder: Path, sources: list[Path], count: int) -> list[Path]:
    """Write JPEGs of `_SIZE`: random parts of photos."""
    chance = random.Random(0)
    opened = [Image.open(path).convert("RGB") for path in sources]
    paths = []
    for number in range(count):
        photo = opened[number % len(opened)]
        side = chance.randint(min(photo.size) // 2, min(photo.size))
        left, top = chance.randint(0, photo.width - side), chance.randint(0, photo.height - side)
        part = photo.crop((left, top, left + side, top + side)).resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
        paths.append(folder / f"{number}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.inference_mode()
def cnn_alone(captioner: Captioner, pixels: torch.Tensor) -> None:
    """What the CNN needs for photos that are decoded already: nothing can be faster than that."""
    for batch in pixels.split(64):
        captioner.features(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of 224 x 224 JPEGs")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    began = time.perf_counter()
    captioner = Captioner.from_pretrained()
    loading = time.perf_counter() - began
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.photos:
            paths = images.find([arguments.photos])[: arguments.count]
        else:
            paths = photos(Path(folder), samples(), arguments.count)
        few = paths[:50]
        pixels = torch.stack([images.load(path, captioner.encoder.config.image_size) for path in paths])
        for path in few[:3]:
            captioner.caption(path)
        found: dict[str, list[float]] = {"one_photo_one_core_ms": [], "bulk": [], "one_at_a_time": [], "cnn_alone": []}
        for number in range(arguments.rounds):
            torch.set_num_threads(1)
            single = [seconds(lambda path=path: captioner.caption(path)) for path in few]
            found["one_photo_one_core_ms"].append(1000 * statistics.median(single))
            torch.set_num_threads(cores)
            found["bulk"].append(len(paths) / seconds(lambda: list(caption_photos(captioner, paths))))
            found["one_at_a_time"].append(len(few) / seconds(lambda: [captioner.caption(path) for path in few]))
            found["cnn_alone"].append(len(paths) / seconds(lambda: cnn_alone(captioner, pixels)))
            print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in found.items()))
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    print(f"{medians['one_photo_one_core_ms']:8.1f} ms         one photo on one core, after loading ({loading:.1f} s)")
    for name in ("bulk", "one_at_a_time", "cnn_alone"):
        print(f"{medians[name]:8.1f} photos/s   {name.replace('_', ' ')}")
    result = {
        "what": f"photos a second, {_SIZE} x {_SIZE} JPEG, beam {captioner.options.beam_size}, model in the box",
        "ours": {name: medians[name] for name in ("bulk", "one_photo_one_core_ms")},
        "peer": {"one_at_a_time": medians["one_at_a_time"]},
        "ceiling": {"cnn_alone": medians["cnn_alone"]},
        "ratios": {
            "to_one_at_a_time": round(medians["bulk"] / medians["one_at_a_time"], 2),
            "of_cnn_alone": round(medians["bulk"] / medians["cnn_alone"], 2),
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {cores} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

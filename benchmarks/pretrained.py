"""The model in the box: milliseconds for one photo on one core, and photos a second of many on all of them.

    python -m benchmarks.pretrained [--photos DIR] [--count 1000] [--rounds 5] [--before CHECKOUT]

Photos are 224 x 224 JPEGs: those of a folder, or parts of the sample photos of scikit-image and scikit-learn. All
systems take turns within a round; medians over rounds are printed, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import Before, ratio, report, seconds, take_turns
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of 224 x 224 JPEGs")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of the commit b0db82f, to measure too")
    arguments = parser.parse_args()
    captioner = Captioner.from_pretrained()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.photos:
            for number, path in enumerate(images.find([arguments.photos])[: arguments.count]):
                (folder / f"{number}.jpg").symlink_to(path.resolve())
            paths = images.find([folder])
        else:
            paths = photos(folder, samples(), arguments.count)
        few = paths[:50]
        pixels = np.stack([images.load(path, captioner.image_size) for path in paths])

        def single() -> float:
            """Milliseconds on one core: the engine has one thread, and so has this program meanwhile."""
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cores)})
            try:
                return 1000 * statistics.median(seconds(lambda path=path: captioner.caption(path)) for path in few)
            finally:
                os.sched_setaffinity(0, cores)

        systems = {
            "one_photo_one_core_ms": single,
            "bulk": lambda: len(paths) / seconds(lambda: list(caption_photos(captioner, paths))),
            "decoding_alone_one_core": lambda: (
                len(few) / seconds(lambda: [images.load(path, captioner.image_size) for path in few])
            ),
            "cnn_alone_one_core": lambda: 200 / seconds(lambda: captioner.features(pixels[:200])),
        }
        before = Before(arguments.before, "bulk", str(folder)) if arguments.before else None
        if before is not None:
            systems["before"] = lambda: len(paths) / before()
        systems["bulk"]()
        found = take_turns(systems, arguments.rounds)
        if before is not None:
            before.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{medians['one_photo_one_core_ms']:8.1f} ms         one photo on one core, after loading")
    for system in ("bulk", "before", "decoding_alone_one_core", "cnn_alone_one_core"):
        if system in medians:
            print(f"{medians[system]:8.1f} photos/s   {system.replace('_', ' ')}")
    report(
        f"photos a second, {_SIZE} x {_SIZE} JPEG, beam {captioner.options.beam_size}, model in the box",
        ours={name: medians[name] for name in ("bulk", "one_photo_one_core_ms")},
        peer={"before": medians["before"]} if "before" in medians else {},
        ceiling={name: medians[name] for name in ("decoding_alone_one_core", "cnn_alone_one_core")},
        ratios={"to_before": ratio(found["bulk"], found["before"])} if "before" in found else {},
    )


if __name__ == "__main__":
    main()

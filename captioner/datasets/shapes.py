"""A small generated data set: two coloured shapes in a relation, with captions that are exactly true.

With it, training can be tried without a download, in minutes, and a test can ask whether a model describes
combinations that it has never seen. A *combination* is two coloured shapes and their relation ("a red circle above a
blue square", which is the same combination as "a blue square below a red circle"). Combinations of validation never
occur in training, although every word and every coloured shape does.
"""

import io
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from captioner import files
from captioner.errors import AnnotationError

FOLDER = Path("data/shapes")  # of the preset; it is drawn where it is missing

COLOURS = {  # RGB; far enough apart that the jitter of COLOUR_JITTER cannot turn one into another
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (150, 50, 170),
}
SHAPES = ("circle", "square", "triangle", "star")
INVERSE = {"above": "below", "to the left of": "to the right of", "inside": "around"}
HELD_OUT = 0.2  # the share of all combinations that only validation shows
COLOUR_JITTER = 18  # most that a channel (0 to 255) of a shape's colour moves
SUPERSAMPLING = 4  # shapes are drawn this much larger and averaged down, which gives smooth edges
FORMAT = 1  # raised whenever the same settings would give other pictures or captions, so that old folders are renewed

# Radius as a share of the picture's side, from and to. "small" and "large" never come close to each other.
RADIUS = {"small": (0.090, 0.110), "large": (0.160, 0.190)}
RADIUS_AROUND = (0.340, 0.380)  # of a shape that has another one inside
EXTENT = 1.2  # no shape reaches farther from its centre than this many radii


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The contents of a picture: `first` stands in `relation` (a key of `INVERSE`) to `second`."""

    first: Thing
    second: Thing
    relation: str
    first_size: str  # "small" or "large"
    second_size: str

    def captions(self) -> tuple[str, ...]:
        """Five sentences, each of them true of the picture."""
        one, two, relation, inverse = self.first, self.second, self.relation, INVERSE[self.relation]
        return (
            f"a {one} {relation} a {two}",
            f"a {two} {inverse} a {one}",
            f"a {self.first_size} {one} {relation} a {self.second_size} {two}",
            f"there is a {one} {relation} a {two}",
            f"a {one} is {relation} a {two}",
        )


def combinations(seed: int) -> tuple[list[tuple[Thing, Thing, str]], list[tuple[Thing, Thing, str]]]:
    """Divide all combinations into those of training and those of validation.

    The first ten for training contain each coloured shape once and each relation at least once, so that even a tiny
    training set knows every word that validation needs.
    """
    rng = random.Random(seed)
    # Neighbours in this order differ in colour, as a shape inside another must in order to be seen.
    things = [Thing(colour, shape) for shape in SHAPES for colour in COLOURS]
    every = [
        (one, two, name)
        for one, two in itertools.permutations(things, 2)
        for name in INVERSE
        if name != "inside" or one.colour != two.colour
    ]
    names = itertools.cycle(INVERSE)
    cover = [(one, two, next(names)) for one, two in zip(things[::2], things[1::2], strict=True)]
    rest = [combination for combination in every if combination not in cover]
    rng.shuffle(rest)
    held_out = round(HELD_OUT * len(every))
    return cover + rest[held_out:], rest[:held_out]


def scenes(*, train: int, val: int, seed: int = 0) -> Iterator[tuple[str, Scene]]:
    """Yield `(split, scene)` for every picture of the data set, in order: first training, then validation."""
    rng = random.Random(f"{seed} scenes")
    for split, count, choices in zip(("train", "val"), (train, val), combinations(seed), strict=True):
        for one, two, relation in itertools.islice(itertools.cycle(choices), count):
            # The shape inside is small and the one around it large; elsewhere any size goes with any other.
            sizes = ("small", "large") if relation == "inside" else (rng.choice(list(RADIUS)), rng.choice(list(RADIUS)))
            yield split, Scene(one, two, relation, *sizes)


def draw(scene: Scene, *, size: int, seed: str) -> Image.Image:
    """Draw a scene as an RGB picture of `size` × `size` pixels; places, sizes, tilts and colours vary with `seed`."""
    rng = random.Random(seed)
    side = size * SUPERSAMPLING
    canvas = Image.fromarray(_background(rng, size), "RGB").resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    placed = _place(scene, rng)
    # The second shape is drawn first, so that a shape inside lies on top of the one around it.
    for thing, (x, y, radius) in ((scene.second, placed[1]), (scene.first, placed[0])):
        colour = tuple(
            min(255, max(0, channel + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for channel in COLOURS[thing.colour]
        )
        _fill(pen, thing.shape, x, y, radius, colour, side, rng)
    return canvas.resize((size, size), Image.Resampling.BOX)


def generate(folder: Path, *, train: int = 3000, val: int = 300, size: int = 64, seed: int = 0) -> None:
    """Write the data set: `images/*.png`, and `captions.jsonl` with `image`, `caption` and `split` in each row.

    `captions.jsonl` is written last and in one step, so that a run that is killed leaves nothing that looks finished.
    Where the same data set is there already, nothing is done; one with other settings is replaced.

    Args:
        folder: Where to write; made if it is not there.
        train: Pictures for training, at least 10 (fewer cannot show every coloured shape).
        val: Pictures for validation, at least 1.
        size: Side of a picture in pixels, at least 32 (in smaller ones a star is no longer a star).
        seed: Another seed gives another data set; the same one gives the same bytes.

    Raises:
        AnnotationError: A setting is out of range, the folder holds other captions, or it cannot be written.
    """
    for name, value, least in (("train", train, 10), ("val", val, 1), ("size", size, 32)):
        if value < least:
            raise AnnotationError(f"shapes: {name} is {value}; expected at least {least}")
    settings = {"format": FORMAT, "train": train, "val": val, "size": size, "seed": seed}
    captions, stamp, images = folder / "captions.jsonl", folder / "shapes.json", folder / "images"
    try:
        if captions.exists():
            if not stamp.exists():
                raise AnnotationError(
                    f"{captions}: holds captions that were not generated here; give another folder for the shapes"
                )
            if _same(stamp, settings) and sum(1 for _ in images.glob("*.png")) == train + val:
                return
            captions.unlink()
        images.mkdir(parents=True, exist_ok=True)
        files.write(stamp, json.dumps(settings))
        rows: list[str] = []
        names: set[str] = set()
        for index, (split, scene) in enumerate(scenes(train=train, val=val, seed=seed)):
            name = f"shapes-{index:06d}.png"
            names.add(name)
            png = io.BytesIO()
            draw(scene, size=size, seed=f"{seed} {index}").save(png, "PNG")
            files.write(images / name, png.getvalue(), durable=False)
            row = {"image": f"images/{name}", "split": split}
            rows.extend(json.dumps({**row, "caption": caption}) for caption in scene.captions())
        for left in images.glob("shapes-*.png"):  # of a larger data set that was here before
            if left.name not in names:
                left.unlink()
        files.write(captions, "\n".join(rows) + "\n")
    except OSError as error:
        raise AnnotationError(
            f"{folder}: the shapes cannot be written ({error}); free space or give another folder"
        ) from error


def _same(stamp: Path, settings: dict[str, int]) -> bool:
    try:
        return bool(json.loads(stamp.read_text(encoding="utf-8")) == settings)
    except ValueError:
        return False


def _background(rng: random.Random, size: int) -> npt.NDArray[np.uint8]:
    """Return a pale colour that fades across the picture, with a little noise: (size, size, 3), 0 to 255."""
    corners = np.array([rng.uniform(185, 250) for _ in range(12)]).reshape(2, 2, 3)  # (top/bottom, left/right, RGB)
    grey = corners.mean(axis=-1, keepdims=True)
    corners = grey + 0.4 * (corners - grey)  # washed out, so that no shape has the colour of its background
    ends = np.linspace([1.0, 0.0], [0.0, 1.0], size)  # (size, 2): how much of either end is in each row or column
    fade = ends @ np.tensordot(ends, corners, 1)  # first down the two sides, then across: (size, size, 3)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 3, (size, size, 1))
    return np.asarray(np.clip(fade + noise, 0, 255), dtype=np.uint8)


def _place(scene: Scene, rng: random.Random) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return (x, y, radius) of both shapes as shares of the side, so that the relation is plain to see."""
    one, two = rng.uniform(*RADIUS[scene.first_size]), rng.uniform(*RADIUS[scene.second_size])
    if scene.relation == "inside":
        two = rng.uniform(*RADIUS_AROUND)
        x, y = (rng.uniform(EXTENT * two, 1 - EXTENT * two) for _ in range(2))
        return (x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03), one), (x, y, two)
    # Along the relation's direction: a margin, the first, a gap, the second. Across it: almost in line.
    room = 1 - 2 * EXTENT * (one + two)
    gap = rng.uniform(0.03, room) if room > 0.03 else room
    start = rng.uniform(0, room - gap)
    along = (start + EXTENT * one, start + EXTENT * (2 * one + two) + gap)
    widest = EXTENT * max(one, two)
    middle = rng.uniform(widest + 0.05, 1 - widest - 0.05)
    across = (middle + rng.uniform(-0.05, 0.05), middle + rng.uniform(-0.05, 0.05))
    if scene.relation == "above":
        return (across[0], along[0], one), (across[1], along[1], two)
    return (along[0], across[0], one), (along[1], across[1], two)


def _fill(
    pen: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    radius: float,
    colour: tuple[int, ...],
    side: int,
    rng: random.Random,
) -> None:
    """Draw one filled shape, tilted by up to ten degrees, at (x, y) with `radius`, all as shares of `side` pixels."""
    if shape == "circle":
        box = [(x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side]
        pen.ellipse(box, fill=colour)
        return
    # Corners on circles around the centre, in radii; chosen so that all shapes cover about the same area.
    corners = {"square": [1.2] * 4, "triangle": [EXTENT] * 3, "star": [EXTENT, 0.52] * 5}[shape]
    tilt = math.radians(rng.uniform(-10, 10)) - math.pi / 2 + (math.pi / 4 if shape == "square" else 0)
    points = []
    for index, reach in enumerate(corners):
        angle = tilt + 2 * math.pi * index / len(corners)
        points.append(((x + radius * reach * math.cos(angle)) * side, (y + radius * reach * math.sin(angle)) * side))
    pen.polygon(points, fill=colour)

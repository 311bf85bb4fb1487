"""Photos -> views, and what a teacher sees in each: what `distillation` learns from.

A view is a photo whole, or a random part of it. The teacher looks at the part that the student will get, for
"consistent teaching" (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent"), once:
its answers are kept on disk, since it is slow and the student looks at every view many times.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner import files, images
from captioner.errors import CaptionerError, WeightsError
from captioner.progress import Progress

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

_SCALE = (0.3, 1.0)  # share of a photo's area that a part covers
_RATIO = (3 / 4, 4 / 3)  # its width by its height
_TOGETHER = 512  # photos between two notes of how far it has come
_PIXELS, _ANSWERS, _STAMP = "pixels.npy", "answers.npy", "views.json"


class Teacher:
    """A network in LiteRT's format (`.tflite`) whose input is a photo and which has a map of non-negative numbers.

    The map is the last one before they are averaged: what the teacher knows about each place of the photo.
    """

    def __init__(self, path: Path) -> None:
        """Read the network.

        Raises:
            WeightsError: it cannot be read, or is no network of this kind.
        """
        if not path.is_file():
            raise WeightsError(f"{path}: no such file; give the teacher's .tflite file with --teacher")
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise WeightsError(
                "the teacher needs the package ai-edge-litert; install it: pip install ai-edge-litert"
            ) from None
        self.sha256 = files.sha256(path)

        def load() -> Interpreter:
            with warnings.catch_warnings():  # the map is inside the network: a matter for debugging, says the package
                warnings.simplefilter("ignore")
                loaded = Interpreter(str(path), experimental_preserve_all_tensors=True, num_threads=1)
            loaded.allocate_tensors()
            return loaded

        self._load = load
        try:
            interpreter = load()
        except (ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or ["damaged"])[0]
            raise WeightsError(f"{path}: cannot be read as a LiteRT network ({reason}); fetch it again") from None
        given = interpreter.get_input_details()[0]
        maps = [
            tensor
            for tensor in interpreter.get_tensor_details()
            if tensor["name"]
            and len(tensor["shape"]) == 4
            and tensor["shape"][0] == 1
            and min(tensor["shape"][1:3]) > 1
        ]
        shape = tuple(int(n) for n in given["shape"])
        self._input, self.size = int(given["index"]), shape[1] if len(shape) == 4 else 0
        photo = given["dtype"] is np.uint8 and shape == (1, self.size, self.size, 3)
        last = maps[-1] if maps else given
        if not photo or last["index"] == self._input or last["dtype"] is not np.uint8 or last["quantization"][1] != 0:
            raise WeightsError(
                f"{path}: expected 8-bit RGB input and a last map of 8 bits without negative numbers; "
                "give another teacher"
            )
        self._map = int(last["index"])
        self.shape = tuple(int(n) for n in last["shape"][1:])  # rows, columns, channels
        self.scale = float(last["quantization"][0])  # what a step of the 8 bits is worth
        self._idle = [interpreter]

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Look at a photo; several threads may, each has a copy of the network.

        Args:
            pixels: RGB, `(size, size, 3)`.

        Returns:
            The map in units of `scale`, `shape`.
        """
        try:
            interpreter = self._idle.pop()
        except IndexError:
            interpreter = self._load()
        interpreter.set_tensor(self._input, pixels[None])
        interpreter.invoke()
        answer: npt.NDArray[np.uint8] = interpreter.get_tensor(self._map)[0]
        self._idle.append(interpreter)
        return answer


@dataclass(frozen=True)
class Views:
    """Views and answers, mapped from disk."""

    pixels: npt.NDArray[np.uint8]  # RGB, (photos, views, 3, size, size)
    answers: npt.NDArray[np.uint8]  # (photos, views, rows, columns, channels), in units of `scale`
    scale: float


def cut_views(
    folder: Path, teacher: Teacher, paths: Sequence[Path], *, views: int, size: int, seed: int, shown: bool = True
) -> Views:
    """Cut views out of photos and note what the teacher sees; goes on where an earlier run was stopped.

    Args:
        folder: where they are kept.
        teacher: looks at them.
        paths: the photos.
        views: of each photo; the first is the whole photo, squeezed onto a square.
        size: height and width of the views that are kept, in pixels. The teacher sees them at its own size.
        seed: decides the parts.
        shown: whether to draw a progress bar.

    Raises:
        ImageError: a photo cannot be read.
        CaptionerError: the folder holds other views, or cannot be written.
    """
    stamp: dict[str, Any] = {
        "teacher": teacher.sha256,
        "photos": [f"{path.parent.name}/{path.name}" for path in paths],
        "views": views,
        "size": size,
        "seed": seed,
        "preprocessing": images.PREPROCESSING,
    }
    note = folder / _STAMP
    shapes = {_PIXELS: (len(paths), views, 3, size, size), _ANSWERS: (len(paths), views, *teacher.shape)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _done(note, stamp)
        pixels, answers = (
            np.lib.format.open_memmap(folder / name, "r+" if done else "w+", np.uint8, None if done else shape)
            for name, shape in shapes.items()
        )
        if not done:  # a disk that fills is an error now, and the death of the process once it is written to in memory
            for name, array in ((_PIXELS, pixels), (_ANSWERS, answers)):
                _reserve(folder / name, array.nbytes)

        def look(photo: int) -> None:
            whole = images.load(paths[photo], teacher.size)
            for view in range(views):
                part = _part(whole, (seed, photo, view)) if view else whole
                picture = Image.fromarray(np.ascontiguousarray(part.transpose(1, 2, 0)))
                large, small = (picture.resize((s, s), Image.Resampling.BILINEAR) for s in (teacher.size, size))
                answers[photo, view] = teacher(np.asarray(large))
                pixels[photo, view] = np.asarray(small).transpose(2, 0, 1)

        with ThreadPoolExecutor() as pool, Progress("teacher", len(paths), "photos", shown=shown) as progress:
            while done < len(paths):
                chunk = range(done, min(done + _TOGETHER, len(paths)))
                for _ in pool.map(look, chunk):
                    done += 1
                    progress.set(done, len(paths))
                pixels.flush()
                answers.flush()
                files.write(note, json.dumps({**stamp, "done": done}) + "\n")
    except ValueError as error:
        raise CaptionerError(f"{folder}: damaged ({error}); delete it") from None
    except OSError as error:
        raise CaptionerError(
            f"{folder}: cannot be written ({error.strerror}); make room, or give another folder"
        ) from None
    return Views(pixels, answers, teacher.scale)


def _reserve(path: Path, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _done(note: Path, stamp: dict[str, Any]) -> int:
    """Photos that an earlier run has finished."""
    if not note.exists():
        return 0
    try:
        before = dict(json.loads(note.read_text(encoding="utf-8")))
        done = int(before.pop("done"))
    except (ValueError, KeyError) as error:
        raise CaptionerError(f"{note}: damaged ({error}); delete its folder") from None
    if different := [name for name, value in stamp.items() if before.get(name) != value]:
        raise CaptionerError(f"{note.parent}: holds other views ({', '.join(different)}); give another folder")
    return done


def _part(whole: npt.NDArray[np.uint8], entropy: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """A random rectangle of a photo `(3, size, size)` (Szegedy et al. 2015)."""
    random = np.random.default_rng(entropy)
    side = whole.shape[-1]
    area, ratio = random.uniform(*_SCALE), math.exp(random.uniform(*np.log(_RATIO)))
    height, width = (min(side, round(side * math.sqrt(share))) for share in (area / ratio, area * ratio))
    top, left = (int(random.integers(side - length + 1)) for length in (height, width))
    return whole[:, top : top + height, left : left + width]

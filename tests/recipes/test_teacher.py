"""Views and what a teacher says of them: the right pixels, the same every time, nothing lost when it is stopped."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_photo
from PIL import Image

from captioner import files, images
from captioner.errors import CaptionerError, ImageError, WeightsError
from recipes.mini import teacher
from recipes.mini.teacher import Teacher, Views, _part


class Colours:
    """A teacher of six channels that sees how much of each colour is in each of 2 x 2 places, and of its contrary."""

    sha256, size, shape, scale = "colours", 48, (2, 2, 6), 0.5

    def __init__(self, fail_after: int = 10**9) -> None:
        self.seen: list[np.ndarray] = []
        self._left = fail_after
        self._lock = threading.Lock()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            self.seen.append(pixels)
        places = pixels.reshape(2, 24, 2, 24, 3).mean((1, 3))
        return np.concatenate([places, 255 - places], 2).astype(np.uint8)


def photos(folder: Path, count: int = 5) -> list[Path]:
    return [make_photo(folder / f"{n}.png", (40 * n, 200 - 30 * n, 90)) for n in range(count)]


def prepare(folder: Path, paths: list[Path], seen: Any = None, **changes: Any) -> Views:
    return teacher.cut_views(folder, seen or Colours(), paths, **({"views": 3, "size": 32, "seed": 0} | changes))


def test_the_first_view_is_the_whole_photo(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos")
    views = prepare(tmp_path / "views", paths)
    assert views.pixels.shape == (5, 3, 3, 32, 32)
    assert views.answers.shape == (5, 3, 2, 2, 6)
    for number, path in enumerate(paths):
        whole = images.load(path, 48).transpose(1, 2, 0)
        small = Image.fromarray(whole).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(views.pixels[number, 0], np.asarray(small).transpose(2, 0, 1))
        assert np.array_equal(views.answers[number, 0], Colours()(whole))


def test_the_teacher_sees_what_the_student_will(tmp_path: Path) -> None:
    views = prepare(tmp_path / "views", photos(tmp_path / "photos"))
    for pixels, answer in zip(views.pixels.reshape(-1, 3, 32, 32), views.answers.reshape(-1, 2, 2, 6), strict=True):
        places = pixels.reshape(3, 2, 16, 2, 16).mean((2, 4)).transpose(1, 2, 0)
        assert np.allclose(places, answer[..., :3], atol=12)  # of 255: both were resized
    assert len({view.tobytes() for view in views.pixels[0]}) == 3


def test_parts_are_rectangles_of_the_photo_and_follow_from_the_seed() -> None:
    rows, columns = np.indices((100, 100), np.uint8)
    whole = np.stack([rows, columns, np.zeros_like(rows)])
    shares, ratios = [], []
    for number in range(300):
        part = _part(whole, (0, number, 1))
        height, width = part.shape[1:]
        top, left = int(part[0, 0, 0]), int(part[1, 0, 0])
        assert np.array_equal(part, whole[:, top : top + height, left : left + width])
        shares.append(height * width / 100**2)
        ratios.append(width / height)
        assert np.array_equal(part, _part(whole, (0, number, 1)))
    assert 0.27 < min(shares) < 0.4
    assert 0.85 < max(shares) <= 1
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert not np.array_equal(_part(whole, (0, 1, 1)), _part(whole, (1, 1, 1)))


def test_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_TOGETHER", 2)
    paths = photos(tmp_path / "photos")
    whole = prepare(tmp_path / "whole", paths)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "parts", paths, Colours(fail_after=9))
    assert json.loads((tmp_path / "parts" / "views.json").read_text())["done"] == 2
    rest = Colours()
    parts = prepare(tmp_path / "parts", paths, rest)
    assert len(rest.seen) == 9  # three photos
    assert np.array_equal(parts.pixels, whole.pixels)
    assert np.array_equal(parts.answers, whole.answers)
    again = Colours()
    prepare(tmp_path / "parts", paths, again)
    assert not again.seen


def test_views_of_something_else_are_not_touched(tmp_path: Path) -> None:
    paths, folder = photos(tmp_path / "photos"), tmp_path / "views"
    prepare(folder, paths)
    before = {path.name: files.sha256(path) for path in folder.iterdir()}
    changes: list[tuple[str, dict[str, Any]]] = [("seed", {"seed": 1}), ("views", {"views": 2}), ("size", {"size": 40})]
    for what, change in changes:
        with pytest.raises(CaptionerError, match=rf"^{folder}: holds other views \({what}\); give another folder$"):
            prepare(folder, paths, **change)
    with pytest.raises(CaptionerError, match=r"holds other views \(photos\)"):
        prepare(folder, paths[:4])
    assert {path.name: files.sha256(path) for path in folder.iterdir()} == before
    (folder / "views.json").write_text("[")
    with pytest.raises(CaptionerError, match=r"views\.json: damaged \(.*\); delete its folder$"):
        prepare(folder, paths)


def test_a_photo_that_cannot_be_read(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos")
    paths[3].write_bytes(b"rubbish")
    with pytest.raises(ImageError, match=r"3\.png: not a photo"):
        prepare(tmp_path / "views", paths)


def test_what_is_no_teacher(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(
        WeightsError, match=r"none\.tflite: no such file; give the teacher's \.tflite file with --teacher"
    ):
        Teacher(tmp_path / "none.tflite")
    (tmp_path / "bad.tflite").write_bytes(b"rubbish" * 100)
    with pytest.raises(WeightsError, match=r"bad\.tflite: cannot be read as a LiteRT network \(.+\); fetch it again$"):
        Teacher(tmp_path / "bad.tflite")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(WeightsError, match=r"needs the package ai-edge-litert; install it: pip install "):
        Teacher(Path(__file__))


@pytest.mark.shared
def test_a_real_teacher(shared: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    network = Teacher(shared / "weights" / "mobilenet_edgetpu_224_1.0_uint8.tflite")
    assert (network.size, network.shape) == (224, (7, 7, 1280))
    assert network.scale == pytest.approx(0.17057, abs=1e-5)
    some = sorted((shared / "coco" / "val2017").glob("*.jpg"))[:3]
    answers = [network(np.ascontiguousarray(images.load(path, 224).transpose(1, 2, 0))) for path in some]
    assert all(answer.shape == (7, 7, 1280) and answer.dtype == np.uint8 for answer in answers)
    # The network's own average of the map, which is what its classifier reads.
    average = network._idle[0].get_tensor(192)[0, 0, 0]
    assert np.abs(answers[-1].mean((0, 1)) - average).max() <= 1
    assert not np.array_equal(answers[0], answers[1])

"""The generated data set: its captions are true of its pictures, and validation asks for what training never shows."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from captioner import cli
from captioner.datasets.annotations import load
from captioner.datasets.shapes import COLOURS, INVERSE, SHAPES, Scene, Thing, draw, generate, scenes
from captioner.errors import AnnotationError

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "shapes.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def words(captions: list[str]) -> set[str]:
    return {word for caption in captions for word in caption.split()}


@pytest.mark.parametrize(("train", "val", "seed"), [(10, 300, 0), (3000, 300, 0), (200, 60, 7)])
def test_validation_holds_what_training_never_shows(train: int, val: int, seed: int) -> None:
    by_split: dict[str, list[Scene]] = {"train": [], "val": []}
    for split, scene in scenes(train=train, val=val, seed=seed):
        by_split[split].append(scene)
    assert {split: len(each) for split, each in by_split.items()} == {"train": train, "val": val}
    combinations = {
        split: {(scene.first, scene.second, scene.relation) for scene in each} for split, each in by_split.items()
    }
    assert not combinations["train"] & combinations["val"]
    things = {thing for scene in by_split["train"] for thing in (scene.first, scene.second)}
    assert things == {Thing(colour, shape) for colour in COLOURS for shape in SHAPES}
    captions = {split: [c for scene in each for c in scene.captions()] for split, each in by_split.items()}
    assert words(captions["val"]) <= words(captions["train"])
    assert len(words(captions["train"])) < 30
    assert not set(captions["train"]) & set(captions["val"])  # no sentence can be had by heart


def test_no_way_of_saying_it_gives_a_combination_away() -> None:
    """What is 'above' in one split never comes back as 'below' in the other: relations have one canonical side."""
    assert not set(INVERSE) & set(INVERSE.values())
    for _, scene in scenes(train=50, val=50):
        assert scene.relation in INVERSE
        assert str(scene.first) != str(scene.second)
        assert len(set(scene.captions())) == 5


def mask(pixels: npt.NDArray[np.int64], colour: str) -> npt.NDArray[np.bool_]:
    return np.abs(pixels - np.array(COLOURS[colour])).max(axis=-1) <= 30


def shape_of(region: npt.NDArray[np.bool_]) -> str:
    """Tell a shape by its corners: its outline, walked once around, comes near and goes far as often as it has them."""
    ys, xs = np.nonzero(region)
    y, x = ys - ys.mean(), xs - xs.mean()
    angle = ((np.arctan2(y, x) + np.pi) / (2 * np.pi) * 60).astype(int) % 60
    outline = np.array([np.hypot(y, x)[angle == a].max(initial=0) for a in range(60)])
    waves = np.abs(np.fft.rfft(outline))  # waves[n]: how much of it goes n times around
    corners = 3 + int(waves[3:6].argmax())
    return {3: "triangle", 4: "square", 5: "star"}[corners] if waves[corners] > 0.025 * waves[0] else "circle"


def test_captions_are_true_of_the_pictures() -> None:
    side, looked_at = 192, dict.fromkeys(INVERSE, 0)
    for index, (_, scene) in enumerate(itertools.islice(scenes(train=150, val=1), 150)):
        if scene.first.colour == scene.second.colour:
            continue
        pixels = np.asarray(draw(scene, size=side, seed=str(index)), dtype=np.int64)
        first, second = mask(pixels, scene.first.colour), mask(pixels, scene.second.colour)
        (y1, x1), (y2, x2) = (np.argwhere(region).mean(axis=0) for region in (first, second))
        (top1, left1), (bottom1, right1) = np.argwhere(first).min(axis=0), np.argwhere(first).max(axis=0)
        (top2, left2), (bottom2, right2) = np.argwhere(second).min(axis=0), np.argwhere(second).max(axis=0)
        looked_at[scene.relation] += 1
        assert shape_of(first) == scene.first.shape
        if scene.relation == "above":
            assert bottom1 < top2
            assert abs(x1 - x2) < (y2 - y1) / 2  # nobody would say "to the left of"
        elif scene.relation == "to the left of":
            assert right1 < left2
            assert abs(y1 - y2) < (x2 - x1) / 2
        else:
            assert top2 < top1
            assert bottom1 < bottom2
            assert left2 < left1
            assert right1 < right2
        if scene.relation != "inside":  # there, the hole where the other one lies would confuse this measure
            assert shape_of(second) == scene.second.shape
        for region, size in ((first, scene.first_size), (second, scene.second_size)):
            places = np.argwhere(region)
            reach = np.hypot(*(places - places.mean(axis=0)).T).max() / side
            assert (0.08 < reach < 0.14) if size == "small" else (0.15 < reach < 0.5)
        assert min(top1, left1, top2, left2) > 0  # nothing is cut off
        assert max(bottom1, right1, bottom2, right2) < side - 1
    assert min(looked_at.values()) > 20


def test_captions_say_the_same_from_both_sides() -> None:
    scene = Scene(Thing("red", "circle"), Thing("blue", "square"), "above", "small", "large")
    assert scene.captions() == (
        "a red circle above a blue square",
        "a blue square below a red circle",
        "a small red circle above a large blue square",
        "there is a red circle above a blue square",
        "a red circle is above a blue square",
    )


def test_pictures_vary(tmp_path: Path) -> None:
    scene = Scene(Thing("red", "circle"), Thing("blue", "square"), "above", "small", "large")
    one, two = (np.asarray(draw(scene, size=64, seed=seed), dtype=np.int64) for seed in ("1", "2"))
    assert (one != two).mean() > 0.9
    assert (one == np.asarray(draw(scene, size=64, seed="1"))).all()


def test_the_files(tmp_path: Path) -> None:
    generate(tmp_path / "shapes", train=12, val=4, size=48)
    loaded = load(tmp_path / "shapes")
    assert loaded.name == "shapes"
    assert not loaded.problems
    assert [len(loaded.split("train")), len(loaded.split("val"))] == [12, 4]
    assert {len(example.captions) for example in loaded.examples} == {5}
    for example, (split, scene) in zip(loaded.examples, scenes(train=12, val=4), strict=True):
        assert (example.split, example.captions) == (split, scene.captions())
        with Image.open(example.path) as picture:
            assert (picture.size, picture.mode, picture.format) == ((48, 48), "RGB", "PNG")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate(tmp_path / name, train=12, val=2, size=32, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["captions.jsonl"] != contents(tmp_path / "c")["captions.jsonl"]


def test_what_is_there_is_kept_and_what_differs_replaced(tmp_path: Path) -> None:
    generate(tmp_path, train=14, val=2, size=32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    generate(tmp_path, train=14, val=2, size=32)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "images/shapes-000003.png").unlink()  # somebody lost one: it comes back
    generate(tmp_path, train=14, val=2, size=32)
    assert len(load(tmp_path).examples) == 16
    generate(tmp_path, train=10, val=2, size=32)
    assert len(load(tmp_path).examples) == 12
    assert len(list((tmp_path / "images").iterdir())) == 12


def test_stopped_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def stop(*arguments: object, **options: object) -> None:
        drawn.append(arguments)
        if len(drawn) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original = Image.Image.save
        patch.setattr(Image.Image, "save", lambda *a, **k: (stop(), original(*a, **k)))
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path, train=10, val=2, size=32)
    with pytest.raises(AnnotationError, match="holds no caption file"):
        load(tmp_path)
    generate(tmp_path, train=10, val=2, size=32)
    assert len(load(tmp_path).examples) == 12


def test_nobody_s_captions_are_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "captions.jsonl"
    own.write_text('{"image": "a.jpg", "caption": "mine"}\n')
    with pytest.raises(AnnotationError, match="holds captions that were not generated here; give another folder"):
        generate(tmp_path, train=10, val=2, size=32)
    assert "mine" in own.read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"train": 9}, "train is 9; expected at least 10"), ({"val": 0}, "val is 0"), ({"size": 31}, "size is 31")],
)
def test_settings_are_checked(tmp_path: Path, setting: dict[str, int], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        generate(tmp_path / "new", **({"train": 10, "val": 2} | setting))
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AnnotationError, match=r"cannot be written .*; free space or give another folder"):
        generate(tmp_path / "file" / "shapes", train=10, val=2)


def test_the_script(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--train", "10", "--val", "2", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 pictures for training and 2 for validation" in done.stdout
    with (tmp_path / "out/captions.jsonl").open() as file:
        assert sorted(json.loads(next(file))) == ["caption", "image", "split"]
    refused = subprocess.run([*command[:4], "1"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == ["error: shapes: train is 1; expected at least 10"]


def test_pictures_are_small_files() -> None:
    scene = next(scenes(train=10, val=1))[1]
    file = io.BytesIO()
    draw(scene, size=64, seed="0").save(file, "PNG")
    assert len(file.getvalue()) < 12_000


@pytest.mark.slow
def test_the_preset_learns_to_describe_what_it_has_never_seen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """`python train.py shapes` for half of its epochs: from nothing, offline, to new combinations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request.addfinalizer(AcceleratorState._reset_state)  # a process keeps to one precision; other tests have theirs
    AcceleratorState._reset_state()
    assert cli.run("train", ["shapes", "--tracking", "none", "--optimisation.epochs", "5"]) == 0
    history = json.loads((tmp_path / "runs/shapes/last/training.json").read_text())
    assert history["best_cider"] >= 3
    assert cli.run("caption", [str(tmp_path / "data/shapes/images/shapes-003000.png"), "--model", "runs/shapes"]) == 0
    sentence = capsys.readouterr().out.splitlines()[-1].split()
    assert set(sentence) & set(COLOURS)
    assert set(sentence) & set(SHAPES)

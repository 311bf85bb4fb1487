"""COCO as it is published, 2014 and 2017, from the first step to a caption of the exported model.

`shared` has real photos; the others are drawn, and lie where COCO's would.
"""

# ruff: noqa: F811

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import data, isolated  # noqa: F401

from captioner import cli
from captioner.training.trainer import Trainer

YEARS = {"2014": "COCO_{split}2014_{image_id:012}.jpg", "2017": "{image_id:012}.jpg"}
TINY = (
    "--encoder.name tiny --encoder.weights random --encoder.image-size 32 --decoder.hidden-size 16 "
    "--decoder.embedding-size 8 --min-count 1 --optimisation.batch-size 16"
).split()


def write_captions(folder: Path, split: str, year: str, photos: dict[int, tuple[Path, list[str]]]) -> None:
    """Write the caption file of a split, with every field that COCO's has, and link its photos."""
    place = folder / f"{split}{year}"
    place.mkdir(parents=True)
    images, captions = [], []
    for image_id, (path, sentences) in photos.items():
        name = YEARS[year].format(split=split, image_id=image_id)
        (place / name).symlink_to(path)
        url = f"http://images.cocodataset.org/{split}{year}/{name}"
        images.append(
            {"license": 3, "file_name": name, "coco_url": url, "height": 480, "width": 640, "id": image_id}
            | {"date_captured": "2013-11-14 17:02:52", "flickr_url": ""}
        )
        captions += [
            {"image_id": image_id, "id": 10 * image_id + number, "caption": sentence}
            for number, sentence in enumerate(sentences)
        ]
    info = {"description": f"COCO {year} Dataset", "version": "1.0", "year": int(year)}
    document = {"info": info, "licenses": [], "images": images, "annotations": captions}
    path = folder / "annotations" / f"captions_{split}{year}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def drawn(data: Path, folder: Path, year: str) -> Path:
    """The generated data set as COCO of a year."""
    photos: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    for line in (data / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        photos[row["split"]].setdefault(row["image"], []).append(row["caption"])
    first = 9
    for split, captions in photos.items():
        found = {
            first + n: (data / "images" / Path(name).name, said) for n, (name, said) in enumerate(captions.items())
        }
        write_captions(folder, split, year, found)
        first += 1000
    return folder


def arguments(folder: Path, output: Path, *more: str) -> Sequence[str]:
    shared = "--tracking none --precision fp32 --optimisation.epochs 2 --max-words 8 --checkpoint-minutes 0"
    return ["coco", "--data", str(folder), "--output", str(output), *shared.split(), *more]


def kill_in_step(number: int, command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in a process of its own that gets SIGKILL in the middle of a step."""
    loss = Trainer._loss

    def killed(self: Trainer, *arguments: Any) -> Any:
        if self.history.step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", killed)
        process = multiprocessing.get_context("fork").Process(target=cli.run, args=("train", command))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL


class Commands:
    """Runs commands that must succeed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.capsys, self.caplog = capsys, caplog
        caplog.set_level(logging.INFO, "captioner")

    def __call__(self, command: str, *arguments: str) -> tuple[str, str]:
        """Run one: what it printed, and what it logged."""
        self.capsys.readouterr()
        self.caplog.clear()
        assert cli.run(command, arguments) == 0, self.capsys.readouterr().err
        return self.capsys.readouterr().out, self.caplog.text


@pytest.fixture
def succeed(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Commands:
    return Commands(capsys, caplog)


def to_the_end(folder: Path, year: str, tmp_path: Path, more: Sequence[str], succeed: Commands) -> None:
    """Go on with a run that was killed, then evaluate, report, export, and caption with what was exported."""
    output, exported = tmp_path / "run", tmp_path / "exported"
    before = json.loads((output / "last" / "training.json").read_text())
    assert before["epoch_step"] > 0
    _, said = succeed("train", *arguments(folder, output, *more))
    assert f"coco{year}: no problems" in said
    assert f"going on after epoch 0, step {before['step']}" in said
    scores = tmp_path / "scores.json"
    succeed("evaluate", "--model", str(output), "--data", str(folder), "--output", str(scores))
    assert json.loads(scores.read_text())["evaluations"]
    succeed("report", str(output))
    assert "data:image/jpeg" in (output / "report.html").read_text("utf-8")
    shown, _ = succeed("export", str(output), str(exported), "--data", str(folder))
    assert "cider: " in shown
    photos = sorted((folder / f"val{year}").iterdir())[:2]
    shown, _ = succeed("caption", *map(str, photos), "--model", str(exported))
    assert [line.split(": ")[0] for line in shown.splitlines()] == list(map(str, photos))


@pytest.mark.parametrize(
    ("year", "cnn"),
    [
        ("2014", ()),
        (
            "2017",
            ("--optimisation.encoder-learning-rate", "1e-4", "--optimisation.mirror", "--optimisation.crop", "0.6"),
        ),
    ],
    ids=["2014", "2017-with-the-cnn"],
)
def test_coco_end_to_end(
    data: Path,
    tmp_path: Path,
    year: str,
    cnn: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    succeed: Commands,
) -> None:
    folder = drawn(data, tmp_path / "coco", year)
    kill_in_step(2, arguments(folder, tmp_path / "run", *TINY, *cnn), monkeypatch)
    to_the_end(folder, year, tmp_path, [*TINY, *cnn], succeed)


def test_part_of_the_photos(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], succeed: Commands) -> None:
    """As after a download that was stopped: one line says what to do, and each command can do it."""
    folder, output = drawn(data, tmp_path / "coco", "2017"), tmp_path / "run"
    for split, number in (("train", 4), ("val", 1)):
        for path in sorted((folder / f"{split}2017").iterdir())[:number]:
            path.unlink()
    command = {
        "train": arguments(folder, output, *TINY),
        "evaluate": ["--model", str(output), "--data", str(folder)],
        "export": [str(output), str(tmp_path / "exported"), "--data", str(folder)],
    }
    for name, given in command.items():
        capsys.readouterr()
        assert cli.run(name, given) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "missing photos: 5 (e.g. 000000000009.jpg; looked in " in said
        assert said.endswith("or leave these out with --on-problem skip, which keeps 11 of 16 photos")
        _, said = succeed(name, *given, "--on-problem", "skip")
        assert "missing photos: 5 (left out)" in said


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("year", YEARS)
def test_real_photos(
    shared: Path, tmp_path: Path, year: str, monkeypatch: pytest.MonkeyPatch, succeed: Commands
) -> None:
    """Some photos of COCO, in the names and the files of a year."""
    photos: dict[str, dict[int, tuple[Path, list[str]]]] = {"train": {}, "val": {}}
    if year == "2014":
        for entry in json.loads((shared / "coco_mini" / "dataset_coco.json").read_text())["images"]:
            split = entry["filename"].removeprefix("COCO_").partition("2014")[0]
            if split in photos and len(photos[split]) < {"train": 16, "val": 4}[split]:
                path = shared / "coco_mini" / "images" / entry["filename"]
                photos[split][entry["cocoid"]] = (path, [sentence["raw"] for sentence in entry["sentences"]])
    else:
        official = json.loads((shared / "coco" / "annotations" / "captions_val2017.json").read_text())
        said: dict[int, list[str]] = {}
        for annotation in official["annotations"]:
            said.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for number, path in enumerate(sorted((shared / "coco" / "val2017").iterdir())[:20]):
            photos["train" if number < 16 else "val"][int(path.stem)] = (path, said[int(path.stem)])
    folder = tmp_path / "coco"
    for split, found in photos.items():
        write_captions(folder, split, year, found)
    weights = str(shared / "weights" / "squeezenet1_1.safetensors")
    more = ["--encoder.name", "squeezenet1_1", "--encoder.weights", weights, "--optimisation.batch-size", "16"]
    kill_in_step(2, arguments(folder, tmp_path / "run", *more), monkeypatch)
    to_the_end(folder, year, tmp_path, more, succeed)

"""The records of a run: whole after any stop, nothing twice, and no reason to stop."""

# ruff: noqa: F811

import json
import logging
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import data, isolated, make_config, make_data  # noqa: F401
from test_resume import stop_at_step

from captioner import files
from captioner.datasets.annotations import Example, load
from captioner.errors import CaptionerError
from captioner.model import Caption
from captioner.report.alarms import alarms
from captioner.report.run import Run, Step, Written, read, read_steps
from captioner.training import trainer
from captioner.training.records import Records, environment
from captioner.training.trainer import Trainer, train

TRAIN = [Example("a.jpg", Path("photos/a.jpg"), ("a dog",), "train")]
VAL = [Example(7, Path("photos/v.jpg"), ("a cat", "the cat"), "val"), Example("w", Path("/w\udce9.jpg"), ("x",), "val")]


def begin(records: Records, step: int = 0, epoch: int = 0, **changed: Any) -> None:
    given = {"train": TRAIN, "val": VAL, "problems": ["missing photos: 1"], "environment": {"command": "train.py"}}
    records.begin(step=step, epoch=epoch, **{**given, **changed})


def log_step(records: Records, number: int, loss: float = 2.5) -> None:
    records.step(number, epoch=number / 40, loss=loss, gradient_norm=1.5, learning_rate=1e-3, seconds=number / 10)


def caption(text: str, *, finished: bool = True) -> Caption:
    return Caption(text, tuple(text.split()), -3.5, -3.5, finished, True)


def settled(output: Path, epochs: int) -> Run:
    """Write what the trainer itself writes, and read the run."""
    (output / "config.json").write_text(json.dumps({"data": {"data": "x"}, "output": str(output)}))
    (output / "last").mkdir(exist_ok=True)
    record = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.0, "cider": 0.5}
    history = {"best_epoch": 1 if epochs else 0, "seconds": 1.0, "epochs": [record] * epochs}
    (output / "last" / "training.json").write_text(json.dumps(history))
    return read(output)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = Records(tmp_path)
    begin(records)
    for number in (1, 20, 40):
        log_step(records, number, loss=math.nan if number == 40 else 2.5)
    records.epoch(1, VAL, [caption("a cat"), caption("a cat in a", finished=False)])
    run = settled(tmp_path, 1)
    assert run.steps[:2] == [Step(1, 0.025, 2.5, 1.5, 0.001, 0.1), Step(20, 0.5, 2.5, 1.5, 0.001, 2.0)]
    assert math.isnan(run.steps[2].loss)
    assert run.captions(1) == {7: Written("a cat", -3.5, True), "w": Written("a cat in a", -3.5, False)}
    assert [photo.path for photo in run.photos.values()] == ["photos/v.jpg", "/w\udce9.jpg"]
    assert run.photos[7].captions == ("a cat", "the cat")
    assert run.problems == ["missing photos: 1"]
    assert run.train_photos == 1
    assert run.starts == [{"step": 0, "command": "train.py"}]


def test_captions_are_results_as_coco_has_them(tmp_path: Path) -> None:
    from captioner.evaluation import read_results

    records = Records(tmp_path)
    begin(records)
    records.epoch(3, VAL, [caption("a cat"), caption("a dog")])
    assert read_results(tmp_path / "captions" / "0003.json", {7: 1, "w": 1}).captions == {7: "a cat", "w": "a dog"}


def test_what_comes_again_is_taken_back(tmp_path: Path) -> None:
    """A process is killed after epoch 2 and step 95, half of which is written; the last checkpoint is of step 45."""
    first = Records(tmp_path)
    begin(first)
    for number in (1, 20, 40, 60, 80):
        log_step(first, number)
    for epoch in (1, 2):
        first.epoch(epoch, VAL, [caption("a cat"), caption("a dog")])
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 95, "epoch": 2.')
    (tmp_path / ".steps.jsonl.123").write_text("left by a kill")
    (tmp_path / "captions" / ".0003.json.123").write_text("left by a kill")

    again = Records(tmp_path)
    begin(again, step=45, epoch=1)
    assert [step.step for step in read_steps(tmp_path / "steps.jsonl")] == [1, 20, 40]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "0001.json", "environment.json", "steps.jsonl", "validation.json",
    ]  # fmt: skip
    log_step(again, 60)
    assert [step.step for step in read_steps(tmp_path / "steps.jsonl")] == [1, 20, 40, 60]
    assert [start["step"] for start in json.loads((tmp_path / "environment.json").read_text())["starts"]] == [0, 45]


def test_a_half_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    records = Records(tmp_path)
    begin(records)
    (tmp_path / "steps.jsonl").write_text('{"step": 20, "epo')
    begin(records, step=10)
    log_step(records, 20)
    assert [step.step for step in read_steps(tmp_path / "steps.jsonl")] == [20]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path, write=False)
    begin(records)
    log_step(records, 1)
    records.epoch(1, VAL, [caption("a"), caption("b")])
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write", full)
    records = Records(tmp_path)
    with caplog.at_level(logging.WARNING):
        begin(records)
        records.epoch(1, VAL, [caption("a"), caption("b")])
    assert caplog.text.count("No space left on device") == 1
    assert "`captioner report` will lack a part of this run" in caplog.text


def test_faults_without_end_are_counted(tmp_path: Path) -> None:
    begin(Records(tmp_path), problems=[f"{number}.jpg: not a photo" for number in range(1234)])
    problems = settled(tmp_path, 0).problems
    assert len(problems) == 201
    assert problems[-1] == "and 1,034 more"


def test_the_environment_says_what_ran_on_what() -> None:
    found = environment(torch.device("cpu"), 2)
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["processes"] == 2
    assert found["device"] == "cpu"
    assert found["command"]
    json.dumps(found)


# In training -------------------------------------------------------------------------------------------------------


def test_a_stopped_run_has_the_records_of_one_that_was_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_LOG_EVERY", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_config(data, whole, epochs=3))
    with monkeypatch.context() as patch:
        stop_at_step(patch, 6, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(make_config(data, parts, epochs=3))
    with (parts / "steps.jsonl").open("a") as file:
        file.write('{"step": 8, "epoch": 2.0, "loss": 1.0, "gradient_norm": 1, "learning_rate": 1, "seconds": 1}\n{"st')
    train(make_config(data, parts, epochs=3))
    one, two = read(whole), read(parts)
    assert [step._replace(seconds=0) for step in two.steps] == [step._replace(seconds=0) for step in one.steps]
    assert [step.step for step in two.steps] == [*range(1, 13)]
    assert all(before.seconds < after.seconds for before, after in zip(two.steps, two.steps[1:], strict=False))
    for epoch in (1, 2, 3):
        assert two.captions(epoch) == one.captions(epoch)
    best = json.loads((parts / "captions_val.json").read_text())
    assert [row["caption"] for row in best] == [written.text for written in two.captions(two.best_epoch).values()]
    assert [start["step"] for start in two.starts] == [0, 7]


def test_a_run_whose_loss_is_no_number_raises_an_alarm(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_LOG_EVERY", 1)
    schedule = Trainer._schedule
    monkeypatch.setattr(Trainer, "_schedule", lambda self, step: schedule(self, step) if step < 6 else 1e38)
    with pytest.raises(CaptionerError, match="the loss is"):
        train(make_config(data, tmp_path / "run", epochs=3))
    assert "The loss is not a number" in [alarm.title for alarm in alarms(read(tmp_path / "run"))]


def test_photos_that_were_left_out_are_on_record(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data")
    bad = load(folder).split("train")[3]
    bad.path.write_text("no photo")
    train(make_config(folder, tmp_path / "run", epochs=1))
    run = read(tmp_path / "run")
    assert [line for line in run.problems if f"{bad.path}: not a photo" in line]
    assert run.train_photos == 11
    assert len(run.photos) == 4

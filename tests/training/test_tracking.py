"""What a run tells Weights & Biases, read back from the files that it would upload."""

# ruff: noqa: F811

import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import wandb
from helpers import data, isolated, make_config, make_photo  # noqa: F401
from report.made import make_run
from wandb.proto import wandb_internal_pb2

from captioner.training.tracking import Tracker
from captioner.training.trainer import train

_BLOCK, _HEADER = 32768, 7


@pytest.fixture(autouse=True)
def fresh(isolated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases reads the environment once a process: let it read that of each test; and nobody may be asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("asked for a key"))
    wandb.teardown()
    yield
    wandb.teardown()


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Read a `.wandb` file: a header, then records in the framing of LevelDB's log, each a protocol buffer."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, record = _HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # no room for a header: the rest of the block is padding
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, place)
        part = content[place + _HEADER : place + _HEADER + length]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        place += _HEADER + length
        record = part if kind in (1, 2) else record + part  # whole, first; middle, last
        if kind in (1, 4):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found


def items(record: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record}


class OfflineRun:
    """An offline run, as `wandb sync` would read it."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        found = list(records(path))
        self.id = next(record.run.run_id for record in found if record.HasField("run"))
        self.project = next(record.run.project for record in found if record.HasField("run"))
        self.config: dict[str, Any] = {}
        for record in found:
            self.config |= items(record.run.config.update) | items(record.config.update)
        self.history = [items(record.history.item) for record in found if record.HasField("history")]
        self.summary: dict[str, Any] = {}
        for record in found:
            self.summary |= items(record.summary.update)
        #: Of each table, the files that belong to it: by name, where they lie.
        self.tables = [
            {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            for record in found
            if record.HasField("artifact")
        ]
        self.exit = next((record.exit.exit_code for record in found if record.HasField("exit")), None)

    def values(self, name: str) -> list[Any]:
        return [row[name] for row in self.history if name in row]


def offline_runs(output: Path) -> list[OfflineRun]:
    wandb.teardown()  # as at the end of a process: now everything is in the files
    return [OfflineRun(path) for path in sorted(output.glob("wandb/offline-run-*/*.wandb"))]


def test_without_a_key_a_run_is_kept_and_tells_everything(
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    config = replace(make_config(data, tmp_path / "run", epochs=3), tracking="wandb", project="dogs")
    history = train(config)
    (run,) = offline_runs(tmp_path / "run")

    assert f"offline; upload this run with `wandb login` and `wandb sync {run.folder}`" in caplog.text
    assert capfd.readouterr().out == ""  # and nothing of Weights & Biases's own on the screen
    assert run.project == "dogs"
    assert run.exit == 0
    assert run.id == history.run_id == json.loads((tmp_path / "run" / "last" / "training.json").read_text())["run_id"]

    assert run.config["optimisation"]["learning_rate"] == 0.01
    assert run.config["decoder"]["cell"] == "lstm"
    assert run.config["data"]["data"] == str(data)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: run.config[name] for name in settings} == settings

    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "cider_d"):
        assert run.values(f"val/{name}") == [epoch[name] for epoch in history.epochs]
    assert run.values("val/loss") == [epoch["val_loss"] for epoch in history.epochs]
    steps = [row["step"] for row in run.history if "val/cider" in row]
    assert steps == [4, 8, 12]
    for name in ("loss", "gradient_norm", "learning_rate", "epoch"):
        (value,) = run.values(f"train/{name}")  # of the first step; the next would be the 20th
        assert value > 0
    assert run.values("train/learning_rate") == [0.005]  # the first of two steps of warm-up
    assert run.summary["best_epoch"] == history.best_epoch
    assert run.summary["best_cider"] == history.best_cider

    assert [next(path for path in table if path.endswith(".table.json")) for table in run.tables] == [
        f"{name}.table.json" for _ in range(3) for name in ("samples", "best", "worst")
    ]
    files = run.tables[3 * (history.best_epoch - 1)]
    best = json.loads(files["samples.table.json"].read_text(encoding="utf-8"))
    results = json.loads((tmp_path / "run" / "captions_val.json").read_text())
    assert best["columns"] == ["photo", "caption", "log-probability", "human captions"]
    assert [row[1] for row in best["data"]] == [row["caption"] for row in results]
    for photo, caption, logprob, human in best["data"]:
        assert files[photo["path"]].read_bytes().startswith(b"\x89PNG")
        assert caption
        assert logprob < 0
        assert len(human.split("\n")) == 5


def test_alarms_are_raised_once_and_the_best_photos_are_shown(tmp_path: Path) -> None:
    """From the records of a run that writes one sentence about all photos but one."""
    folder = make_run(tmp_path / "run", caption=lambda photo, epoch: "a red dog runs" if photo else "a red cat sits")
    run = mock.Mock(settings=wandb.Settings())
    tracker = Tracker(run)
    for step in (750, 1000):
        tracker.judge(step, folder)
    tracker.judge(1000, folder)  # computed again after a kill
    (alert,) = run.alert.call_args_list
    assert alert.args[0] == "Captions collapse to a few"
    assert "40 photos have 2 different captions" in alert.args[1]
    logged = [call.args[0] for call in run.log.call_args_list]
    assert [(*row,) for row in logged] == [("best", "step"), ("worst", "step")] * 2
    (_, best, cider, people), *_ = logged[0]["best"].data
    assert best == "a red dog runs"
    assert cider > 1
    assert people.startswith("a red ")
    assert people.count("\n") == 1
    assert len(logged[1]["worst"].data) == 8

    (folder / "validation.json").write_text("damaged")
    tracker.judge(1250, folder)
    assert run.log.call_count == 4


def test_a_run_that_goes_on_keeps_its_id(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(make_config(data, tmp_path / "run", epochs=3), tracking="wandb")
    with monkeypatch.context() as patch:
        report = Tracker.samples

        def stop(self: Tracker, step: int, *rest: Any) -> None:
            if step == 8:
                raise RuntimeError("stopped")
            report(self, step, *rest)

        patch.setattr(Tracker, "samples", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train(config)
        assert wandb.run is None  # the run was ended, so that the next is not mixed with it
    history = train(config)
    first, second = sorted(offline_runs(tmp_path / "run"), key=lambda run: run.values("step")[0])
    assert first.id == second.id == history.run_id
    assert (first.exit, second.exit) == (1, 0)
    scored = [[row["step"] for row in run.history if "val/cider" in row] for run in (first, second)]
    assert scored == [[4, 8], [12]]


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_mode_that_was_chosen_is_respected(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("logged in"))
    caplog.set_level(logging.INFO)
    train(replace(make_config(data, tmp_path / "run", epochs=1), tracking="wandb"))
    assert len(offline_runs(tmp_path / "run")) == (mode == "offline")
    assert ("wandb sync" in caplog.text) == (mode == "offline")


def test_no_tracking_is_no_tracking(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("started a run"))
    assert train(make_config(data, tmp_path / "run", epochs=1)).run_id is None
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize("failing", ["login", "init"])
def test_a_server_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    """A key is there, and it is wrong, or nothing answers: training goes on all the same."""
    caplog.set_level(logging.INFO)
    init = wandb.init

    def login(**options: Any) -> bool:
        assert options == {"prompt": False}
        if failing == "login":
            raise wandb.errors.AuthenticationError("this key is wrong\nreally")
        return True

    def begin(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("nothing answers\nreally")
        return init(**options)

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "init", begin)
    tracker = Tracker.start(tmp_path, "dogs", {"a": 1}, "myid")
    tracker.log(1, {"train/loss": 2.5})
    tracker.samples(1, ("caption", "photo"), [("a dog", make_photo(tmp_path / "dog.png"))])
    tracker.finish({"best": 3.0})
    reason = {"login": "this key is wrong", "init": "nothing answers"}[failing]
    assert f"Weights & Biases cannot be used ({reason})" in caplog.text
    (run,) = offline_runs(tmp_path)
    assert (run.id, tracker.run_id, run.config["a"], run.summary["best"]) == ("myid", "myid", 1, 3.0)
    assert run.values("train/loss") == [2.5]
    assert json.loads(run.tables[0]["samples.table.json"].read_text(encoding="utf-8"))["data"][0][0] == "a dog"


def test_nothing_is_a_tracker_too() -> None:
    tracker = Tracker(None)
    tracker.log(1, {"a": 1.0})
    tracker.samples(1, ("photo",), [])
    tracker.finish({})
    tracker.abandon()
    assert tracker.run_id is None


def test_steps_that_are_computed_again_are_not_reported_twice(tmp_path: Path) -> None:
    """A run that goes on from step 20 computes steps up to 40 again, which it had reported before it was killed."""
    logged: list[tuple[int, str]] = []

    class Run:
        def log(self, values: dict[str, float]) -> None:
            logged.extend((int(values["step"]), name) for name in values if name != "step")

    first = Tracker(Run(), tmp_path / "reported.json")  # type: ignore[arg-type]
    for step in (20, 40):
        first.log(step, {"train/loss": 1.0})
    first.log(40, {"val/cider": 0.5})
    again = Tracker(Run(), tmp_path / "reported.json")  # type: ignore[arg-type]
    for step in (40, 60):
        again.log(step, {"train/loss": 1.0})
        again.log(step, {"val/cider": 0.5})
    assert logged == [(20, "train/loss"), (40, "train/loss"), (40, "val/cider"), (60, "train/loss"), (60, "val/cider")]
    (tmp_path / "reported.json").write_text("damaged")
    Tracker(Run(), tmp_path / "reported.json").log(1, {"train/loss": 1.0})  # type: ignore[arg-type]

"""`captioner train` as it is typed: presets, settings that are shown, errors in one line."""

# ruff: noqa: F811

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import data, isolated, train_arguments  # noqa: F401

from captioner import cli
from captioner.cli.train import parse
from captioner.training import trainer


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of the errors, where nothing was printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_training_prints_where_the_model_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["captioner", "train", *train_arguments(data, tmp_path / "run")])
    assert cli.main() == 0
    text = capsys.readouterr().out
    assert text.startswith("best epoch 1 of 1: validation BLEU-4 0.")
    assert text.rstrip().endswith(f"the model is in {tmp_path / 'run' / 'best'}")
    photo = next((data / "images").iterdir())
    assert cli.run("caption", [str(photo), "--model", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip()


def test_training_that_is_not_possible(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("train", train_arguments(tmp_path / "nothing", tmp_path / "run")) == 2
    assert "nothing: is not there; give a caption file or the folder of a data set" in one_line(capsys)
    assert cli.run("train", [*train_arguments(data, tmp_path / "run"), "--optimisation.epochs", "0"]) == 2
    assert "optimisation.epochs is 0; expected 1 or more" in one_line(capsys)
    assert not (tmp_path / "run" / "best").exists()


def test_options_override_the_preset(tmp_path: Path) -> None:
    from captioner.training.presets import PRESETS

    assert parse(["shapes"], "train.py") == PRESETS["shapes"]
    config = parse(["flickr8k", "--data", str(tmp_path), "--decoding.beam-size", "5"], "train.py")
    preset = PRESETS["flickr8k"]
    assert config == replace(
        preset, data=replace(preset.data, data=tmp_path), decoding=replace(preset.decoding, beam_size=5)
    )


@pytest.mark.parametrize(
    "option", [("--encoder.name", "mini"), ("--decoder.hidden_size", "512"), ("--decoder.hidden-size=256",)]
)
def test_a_model_to_start_with_has_its_own_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...]
) -> None:
    """Even where the value is a preset's or the default, which `train` cannot tell from one that was not asked for."""
    assert cli.run("train", ["shapes", "--start", str(tmp_path), "--output", str(tmp_path / "run"), *option]) == 2
    name = option[0].partition("=")[0].replace("_", "-")
    assert f"{name} cannot be chosen, as --start brings the model's own; leave one" in one_line(capsys)
    assert parse(["shapes", "--start", "mini", "--encoder.weights", "file.pth"], "train.py").start == "mini"


def test_a_request_to_end_saves_first(data: Path, tmp_path: Path) -> None:
    """SIGTERM, as a cluster sends it: the exit status is the one that shells give, and the run can go on."""
    arguments = train_arguments(data, tmp_path / "run", "--optimisation.epochs", "100000", "--checkpoint-minutes", "0")
    with subprocess.Popen([sys.executable, "-m", "captioner", "train", *arguments], stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 120
            while not (tmp_path / "run" / "last").exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors.decode()
    assert b"which is saved; the same command goes on" in errors
    assert (tmp_path / "run" / "last" / "training.json").exists()


def test_fp16_is_for_gpus(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("train", [*train_arguments(data, tmp_path / "run"), "--precision", "fp16"]) == 2
    assert "precision is fp16, which is for GPUs, and the device is cpu" in capsys.readouterr().err


def test_an_interruption_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_epoch", interrupt)
    assert cli.run("train", train_arguments(data, tmp_path / "run")) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; what was saved is kept")


def test_only_the_first_of_several_processes_speaks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train_arguments(data, tmp_path / "run")
    assert cli.run("train", arguments) == 0
    assert capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert cli.first_process() is False
    monkeypatch.setenv("RANK", "0")
    assert cli.first_process() is True

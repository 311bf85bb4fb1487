"""A run that is killed at any moment, as often as it may be, ends as one that was left alone."""

# ruff: noqa: F811

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import data, isolated, make_config  # noqa: F401
from test_trainer import assert_same

from captioner.config import TrainingConfig
from captioner.errors import CheckpointError
from captioner.training.trainer import Trainer, train


def configuration(data: Path, output: Path, *, epochs: int = 3, **optimisation: Any) -> TrainingConfig:
    """Epochs of four steps, saved after every step."""
    config = make_config(data, output, epochs, **optimisation)
    return replace(config, checkpoint_minutes=0.0, decoder=replace(config.decoder, feature_norm="standard"))


def history(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / "last" / "training.json").read_text()))
    except FileNotFoundError:  # there is none yet, or it is being replaced at this moment
        return {}


def start(config: TrainingConfig) -> Any:
    """Train in a process of its own, which begins with everything imported."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(config,))
    process.start()
    return process


def stop_at_step(monkeypatch: pytest.MonkeyPatch, number: int, by: int) -> None:
    """Let a signal arrive in the middle of a step."""
    loss = Trainer._loss

    def signalled(self: Trainer, *arguments: Any) -> Any:
        if self.history.step == number:
            os.kill(os.getpid(), by)
        return loss(self, *arguments)

    monkeypatch.setattr(Trainer, "_loss", signalled)


@pytest.mark.slow
@pytest.mark.parametrize("optimisation", [{}, {"encoder_learning_rate": 0.01, "mirror": True}], ids=["decoder", "cnn"])
def test_killed_at_random_moments(data: Path, tmp_path: Path, optimisation: dict[str, Any]) -> None:
    whole, parts = (configuration(data, tmp_path / name, epochs=12, **optimisation) for name in ("whole", "parts"))
    chance = random.Random(0)
    began = time.monotonic()
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    step = (time.monotonic() - began) / history(whole.output)["step"]  # seconds, on this machine in this hour
    kills, inside = 0, 0
    while True:
        before = history(parts.output).get("step", 0)
        process = start(parts)
        if kills == 12:
            process.join()
        while process.is_alive() and history(parts.output).get("step", 0) == before:
            time.sleep(0.002)
        process.join(chance.uniform(0, 3 * step))  # it may be in any of some steps, or save, or validate
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL  # it did not end by itself
        kills += 1
        inside += bool(history(parts.output).get("epoch_step"))
    assert kills >= 10
    assert inside >= 3
    assert_same(whole.output, parts.output)


@pytest.mark.parametrize(("by", "said"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: int, said: type[BaseException]
) -> None:
    whole, parts = (
        replace(configuration(data, tmp_path / name), checkpoint_minutes=10.0) for name in ("whole", "parts")
    )
    train(whole)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for step in (2, 7, 8):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step, by)
            with pytest.raises(said):
                train(parts)
        saved = history(parts.output)
        assert (saved["step"], saved["epoch"]) == (step + 1, step // 4)
        assert saved["epoch_step"] == step + 1 - 4 * (step // 4)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(parts)
    assert_same(whole.output, parts.output)


def test_a_signal_in_validation(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (configuration(data, tmp_path / name) for name in ("whole", "parts"))
    train(whole)
    validate = Trainer._validate

    def signalled(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", signalled)
        with pytest.raises(SystemExit) as caught:
            train(parts)
    assert caught.value.code == 128 + signal.SIGTERM
    assert (history(parts.output)["epoch"], history(parts.output)["epoch_step"]) == (0, 4)
    train(parts)
    assert_same(whole.output, parts.output)


def test_how_often_it_is_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Trainer._save_last

    def note(self: Trainer) -> None:
        saved.append(self.history.step)
        save(self)

    monkeypatch.setattr(Trainer, "_save_last", note)
    train(replace(configuration(data, tmp_path / "often")))
    assert saved == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    saved.clear()
    train(replace(configuration(data, tmp_path / "seldom"), checkpoint_minutes=10.0))
    assert saved == [4, 8, 12]  # at the end of each epoch


def test_weights_that_are_not_finite_are_not_saved_inside_an_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Trainer._schedule
    monkeypatch.setattr(Trainer, "_schedule", lambda self, step: schedule(self, step) if step != 2 else float("nan"))
    with pytest.raises(Exception, match="the loss is nan at step 3"):
        train(configuration(data, tmp_path / "run"))
    assert history(tmp_path / "run")["step"] == 2


def test_another_number_of_processes_inside_an_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(data, tmp_path / "run")
    stop_at_step(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(config)
    path = config.output / "last" / "training.json"
    path.write_text(json.dumps({**history(config.output), "processes": 4}))
    with pytest.raises(
        CheckpointError, match="inside an epoch that 4 processes share, and now there are 1; go on with 4"
    ):
        train(config)


def test_dropout_differs_from_step_to_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    loss = Trainer._loss

    def note(self: Trainer, *arguments: Any) -> Any:
        with torch.random.fork_rng():
            drawn.append(float(torch.rand(())))
        return loss(self, *arguments)

    monkeypatch.setattr(Trainer, "_loss", note)
    train(configuration(data, tmp_path / "run"))
    assert len(set(drawn)) == len(drawn) == 12

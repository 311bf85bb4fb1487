"""Training learns, saves what it learnt, goes on exactly where it stopped, and refuses what cannot be gone on with."""

# ruff: noqa: F811

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (  # noqa: F401
    ENCODER,
    StoppedError,
    data,
    isolated,
    make_config,
    make_data,
    make_photo,
    stop_in_epoch,
    train_arguments,
)
from metrics import small_meteor
from safetensors.torch import load_file, save_file

from captioner import Captioner, checkpoint, cli, files, metrics
from captioner.config import DataConfig, TrainingConfig
from captioner.datasets import shapes
from captioner.datasets.annotations import load, load_dataset
from captioner.errors import CaptionerError, CheckpointError
from captioner.networks.encoder import Encoder
from captioner.networks.inference import trains_in_bf16
from captioner.training import run as run_folder
from captioner.training import trainer
from captioner.training.presets import PRESETS
from captioner.training.rounding import Rounding
from captioner.training.trainer import History, Trainer, train

ROOT = Path(__file__).resolve().parents[2]


def scores_in_order(monkeypatch: pytest.MonkeyPatch, *cider: float) -> None:
    """Let validation say these CIDEr scores, one an epoch."""
    said = iter(cider)
    names = [name for name in metrics.METRICS if name != "cider"]
    monkeypatch.setattr(metrics, "score", lambda *_, **__: {**dict.fromkeys(names, 0.1), "cider": next(said)})


def load_model(run: Path) -> Captioner:
    """The best model of a run, with the arithmetic of validation."""
    return Captioner.from_pretrained(run, engine="torch", precision="fp32")


def everything_learnt(run: Path) -> dict[str, Any]:
    """All numbers of a run, without those that tell the time."""
    history = json.loads((run / "last" / "training.json").read_text())
    del history["seconds"]
    return {
        "history": history,
        "captions": (run / "captions_val.json").read_bytes(),
        **{
            f"{name}/{file}": load_file(run / name / f"{file}.safetensors")
            for name, file in (("best", "model"), ("last", "model"), ("last", "training_state"))
        },
    }


def assert_same(one: Path, other: Path) -> None:
    first, second = everything_learnt(one), everything_learnt(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict) and "history" not in name:
            assert value.keys() == second[name].keys()
            for tensor in value:
                assert torch.equal(value[tensor], second[name][tensor]), (name, tensor)
        else:
            assert value == second[name]


# A whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingConfig, History]:
    """A run of eight epochs that went to its end; not to be changed."""
    config = make_config(data, tmp_path_factory.mktemp("run") / "run", epochs=8, learning_rate=0.03)
    return config, train(config)


def test_a_run_leaves_what_others_need(finished: tuple[TrainingConfig, History]) -> None:
    config, history = finished
    run = config.output
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "best", "last", "config.json", "captions_val.json",
        "captions", "environment.json", "steps.jsonl", "validation.json",
    }  # fmt: skip
    settings = json.loads((run / "config.json").read_text())
    assert settings["optimisation"]["epochs"] == 8
    assert settings["data"]["data"] == str(config.data.data)
    saved = json.loads((run / "last" / "training.json").read_text())
    assert saved["epoch"] == history.epoch == 8
    assert saved["step"] == 8 * 4  # 60 captions, 16 a step
    assert len(saved["epochs"]) == 8
    assert history.best_cider == max(epoch["cider"] for epoch in history.epochs)
    assert history.epochs[history.best_epoch - 1]["cider"] == history.best_cider


def test_meteor_where_it_is_asked_for(
    finished: tuple[TrainingConfig, History], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nltk")
    assert "meteor" not in finished[1].epochs[0]
    small_meteor.install(tmp_path, monkeypatch)
    history = train(replace(make_config(data, tmp_path / "run", epochs=1), meteor=True))
    assert 0 < history.epochs[0]["meteor"] <= 1


def test_the_loss_falls(finished: tuple[TrainingConfig, History]) -> None:
    _, history = finished
    losses = [epoch["train_loss"] for epoch in history.epochs]
    assert abs(losses[0] - np.log(27)) < 0.3  # at first it knows nothing
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert history.epochs[-1]["val_loss"] < history.epochs[0]["val_loss"] - 0.4


def test_the_best_model_writes_the_captions_that_were_scored(finished: tuple[TrainingConfig, History]) -> None:
    config, history = finished
    results = json.loads((config.output / "captions_val.json").read_text())
    examples = load(config.data.data).split("val")
    model = load_model(config.output)
    assert [row["image_id"] for row in results] == [example.image_id for example in examples]
    assert [row["caption"] for row in results] == [model.caption(example.path).text for example in examples]
    scores = metrics.score(
        {example.image_id: example.captions for example in examples},
        {row["image_id"]: row["caption"] for row in results},
    )
    best = history.epochs[history.best_epoch - 1]
    assert {name: best[name] for name in scores} == pytest.approx(scores, abs=1e-12)
    assert model.training["scores"]["cider"] == scores["cider"]
    assert (model.training["epoch"], model.training["train_photos"], model.training["val_photos"]) == (
        history.best_epoch, 12, 4,
    )  # fmt: skip
    assert model.options == config.decoding


def test_a_finished_run_does_nothing_and_says_so(
    finished: tuple[TrainingConfig, History], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, history = finished
    before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*/*")}
    monkeypatch.setattr(Trainer, "_epoch", lambda *_: pytest.fail("trains"))
    caplog.set_level(logging.INFO)
    again = train(replace(config, tracking="wandb"))
    assert again == history
    assert {path: path.stat().st_mtime_ns for path in config.output.rglob("*/*")} == before
    assert f"this run is finished (8 epochs, the best is {history.best_epoch}); choose another --output" in caplog.text
    assert not (config.output / "wandb").exists()


def test_the_encoder_learns_where_it_may(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", epochs=3, encoder_learning_rate=0.01)
    history = train(config)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    assert not (tmp_path / "features").exists()
    states = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("best", "last")]
    untrained = Encoder(config.encoder).body.state_dict()
    assert all(not torch.equal(states[1][f"encoder.{name}"], untrained[name]) for name in untrained)
    results = json.loads((tmp_path / "run" / "captions_val.json").read_text())
    model = load_model(tmp_path / "run")
    assert [row["caption"] for row in results] == [
        model.caption(example.path).text for example in load(data).split("val")
    ]


# Stopped and started again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimisation",
    [
        {},
        {"encoder_learning_rate": 0.01},
        {"average": "ema", "accumulate": 2, "weight_decay": 0.01},
        {"average": "epochs", "scheduled_sampling": 0.5, "schedule": "step", "gradient_clip_value": 0.1},
        {"encoder_learning_rate": 0.01, "unfreeze_after": 2, "crop": 0.6, "mirror": True, "colour": 0.2},
        {"language_captions": "red square\na small blue circle\n"},
    ],
    ids=["decoder", "encoder", "ema", "epochs", "augmented", "language"],
)
def test_resumed_equals_uninterrupted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimisation: dict[str, Any]
) -> None:
    if text := optimisation.get("language_captions"):
        (tmp_path / "captions.txt").write_text(text)
        optimisation = {"language_captions": tmp_path / "captions.txt"}
    whole = make_config(data, tmp_path / "whole", epochs=4, **optimisation)
    parts = make_config(data, tmp_path / "parts", epochs=4, **optimisation)
    train(whole)
    for number in (1, 3, 4):  # before any checkpoint, then after two, then after another one
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, number)
            with pytest.raises(StoppedError):
                train(parts)
    train(parts)
    assert_same(whole.output, parts.output)


def test_standard_features_are_resumed_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics are part of what is saved."""
    whole, parts = (make_config(data, tmp_path / name, epochs=3) for name in ("whole", "parts"))
    whole, parts = (replace(c, decoder=replace(c.decoder, feature_norm="standard", layers=2)) for c in (whole, parts))
    train(whole)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 3)
        with pytest.raises(StoppedError):
            train(parts)
    train(parts)
    assert_same(whole.output, parts.output)


@pytest.mark.slow
def test_killed_and_started_again(data: Path, tmp_path: Path) -> None:
    """With SIGKILL, at whatever moment after the second epoch was saved."""
    epochs = ("--optimisation.epochs", "40")
    whole, parts = (train_arguments(data, tmp_path / name, *epochs) for name in ("whole", "parts"))
    process = subprocess.Popen([sys.executable, "train.py", *parts], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2:"):
            break
    else:
        pytest.fail("the run ended by itself")
    process.kill()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    saved = json.loads((tmp_path / "parts" / "last" / "training.json").read_text())["epoch"]
    assert 1 <= saved < 40
    assert cli.run("train", parts) == cli.run("train", whole) == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_stopped_while_saving(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best is saved and the last is not: the epoch is done again."""
    whole, parts = (make_config(data, tmp_path / name, epochs=3) for name in ("whole", "parts"))
    train(whole)
    with monkeypatch.context() as patch:

        def stop(*_: object) -> None:
            raise StoppedError

        patch.setattr(run_folder, "save_state", stop)
        with pytest.raises(StoppedError):
            train(parts)
    assert (parts.output / "best").exists()
    assert not (parts.output / "last").exists()
    train(parts)
    assert_same(whole.output, parts.output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, seed=1), "seed was 0, now 1"),
        (lambda c: replace(c, min_count=2), "min_count was 1, now 2"),
        (lambda c: replace(c, decoder=replace(c.decoder, cell="gru")), "decoder.cell was 'lstm', now 'gru'"),
        (
            lambda c: replace(c, optimisation=replace(c.optimisation, batch_size=8, epochs=9)),
            r"optimisation.(batch_size was 16, now 8|epochs was 2, now 9).*; optimisation",
        ),
        (lambda c: replace(c, decoding=replace(c.decoding, forbidden_words=("red",))), r"was \[\], now \['red'\]"),
    ],
)
def test_other_settings_are_refused(
    data: Path,
    tmp_path: Path,
    change: Callable[[TrainingConfig], TrainingConfig],
    said: str,
) -> None:
    config = make_config(data, tmp_path / "run", epochs=2)
    train(config)
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=f"run: holds a run with other settings: .*{said}.*; choose another"):
        train(change(config))
    assert {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()} == before


def test_settings_may_be_corrected_until_training_begins(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", epochs=1)
    wrong = replace(config, data=DataConfig(data=tmp_path / "nothing"), seed=3)
    with pytest.raises(CaptionerError, match="nothing: is not there"):
        train(wrong)
    train(config)
    assert json.loads((config.output / "config.json").read_text())["data"]["data"] == str(data)
    train(replace(config, tracking="none", project="another"))  # these may always change


def test_other_settings_are_refused_before_the_first_checkpoint_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data, tmp_path / "run", epochs=1)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        with pytest.raises(StoppedError):
            train(config)
    with pytest.raises(CheckpointError, match=r"seed was 0, now 1; choose another --output, or delete this one, in w"):
        train(replace(config, seed=1))
    assert not (tmp_path / "run" / "best").exists()


def test_one_run_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run, with other settings or the same, is refused for as long as the first one lives."""
    config = make_config(data, tmp_path / "run", epochs=2)
    epoch, refused = Trainer._epoch, []

    def meanwhile(self: Trainer, *arguments: Any) -> dict[str, float]:
        for other in (config, replace(config, seed=1)):
            with pytest.raises(CheckpointError, match=r"run: another process is training there; wait until it ends"):
                train(other)
            refused.append(other)
        return epoch(self, *arguments)

    monkeypatch.setattr(Trainer, "_epoch", meanwhile)
    train(config)
    assert len(refused) == 4
    monkeypatch.setattr(Trainer, "_epoch", epoch)
    assert train(config).epoch == 2  # the lock went with the run


def test_a_run_of_an_earlier_version_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings lack some of today's, and have some that are gone."""
    whole, parts = (make_config(data, tmp_path / name, epochs=2) for name in ("whole", "parts"))
    train(whole)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        with pytest.raises(StoppedError):
            train(parts)
    path = parts.output / "config.json"
    settings = json.loads(path.read_text())
    del settings["start"], settings["optimisation"]["mirror"], settings["decoding"]["forbidden_words"]
    settings["decoding"] |= {"precision": "fp32", "typical_p": 1.0}
    path.write_text(json.dumps(settings))
    train(parts)
    assert_same(whole.output, parts.output)


def test_a_setting_of_a_later_version(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", epochs=1)
    train(config)
    path = config.output / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(CheckpointError, match=r"config.json: not the settings of a run .*colour is no setting"):
        train(config)


@pytest.mark.parametrize(
    "damage",
    [
        None, [], "text", {"optimisation": None}, {"optimisation": {"epochs": "two"}}, {"optimisation": {"epochs": -2}},
        {"decoding": 3}, {"data": {"data": None}}, {"seed": 1.5}, {"output": []}, {"seed": 10**30},
    ],
)  # fmt: skip
def test_damaged_settings_are_one_line(finished: tuple[TrainingConfig, History], tmp_path: Path, damage: Any) -> None:
    (tmp_path / "run").mkdir()
    settings = json.loads((finished[0].output / "config.json").read_text())
    changed = {**settings, **damage} if isinstance(damage, dict) else damage
    (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"config.json: not the settings .*; choose another --output") as caught:
        train(replace(finished[0], output=tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": -1}, "epoch is -1; expected 0 or more"),
        ({"epoch": 7}, "epoch is 7, and epochs holds 8 records"),
        ({"epoch": None}, "epoch is null; expected a whole number"),
        ({"epoch": 2.0}, "epoch is 2.0; expected a whole number"),
        ({"best_epoch": 9}, "the best of 8 epochs is 9"),
        ({"best_cider": float("nan")}, "the best of 8 epochs is"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"run_id": 3}, "run_id is 3; expected a text"),
        ({"epochs": {}}, r"epochs is \{\}; expected a list"),
        ({"epochs": [{"cider": "high"}] * 8}, r"epochs\[0\].cider is 'high'; expected a number"),
        ({"epochs": [{"cider": float("nan")}] * 8}, "epochs holds numbers that are not finite"),
        ({"epochs": [{}] * 8}, "training.json lacks scores of an epoch"),
        ({"best_epoch": 0}, "training.json lacks scores of an epoch"),
    ],
)
def test_a_history_that_was_edited(
    finished: tuple[TrainingConfig, History], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    shutil.copytree(finished[0].output, tmp_path / "run")
    path = tmp_path / "run" / "last" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said) as caught:
        train(replace(finished[0], output=tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_leftovers_of_killed_runs_are_swept(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", epochs=1)
    config.output.mkdir()
    for name in (".config.json.123", ".captions_val.json.4567", ".config.json.mine", "config.json.123"):
        (config.output / name).touch()
    train(config)
    left = {path.name for path in config.output.iterdir()}
    assert {".config.json.mine", "config.json.123"} <= left
    assert not left & {".config.json.123", ".captions_val.json.4567"}


def test_words_that_are_all_too_rare(data: Path, tmp_path: Path) -> None:
    config = replace(make_config(data, tmp_path / "run"), min_count=100_000)
    with pytest.raises(
        CaptionerError, match=r"no word of the captions is seen 100,000 times .*; give a lower --min-count"
    ):
        train(config)


def test_the_generated_shapes_are_drawn_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train(PRESETS["shapes"])` needs no command line and no download."""
    monkeypatch.chdir(tmp_path)
    draw, drawn = shapes.generate, []

    def generate(folder: Path) -> None:
        drawn.append(folder)
        draw(folder, train=12, val=4, size=32)

    monkeypatch.setattr(shapes, "generate", generate)
    preset = PRESETS["shapes"]
    small = replace(preset.optimisation, epochs=1, batch_size=16, encoder_learning_rate=0.0)
    decoder = replace(preset.decoder, hidden_size=16, embedding_size=8)
    changes = {"optimisation": small, "decoder": decoder, "encoder": ENCODER}
    train(replace(preset, **changes, tracking="none", precision="fp32"))
    assert drawn == [Path("data/shapes")]
    assert (tmp_path / "runs" / "shapes" / "best").is_dir()
    assert load_dataset(preset.data).split("val")


def change_captions(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "captions.jsonl"
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("a red", "a crimson", 1),
        lambda text: "".join(reversed(text.splitlines(keepends=True))),  # the same words, and the same vocabulary
        lambda text: text.replace('"train"', '"val"', 5),
    ],
    ids=["words", "order", "splits"],
)
def test_other_captions_are_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    config = make_config(make_data(tmp_path / "data"), tmp_path / "run", epochs=1)
    train(config)
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    change_captions(tmp_path / "data", change)
    with pytest.raises(CheckpointError, match=r"was trained with other photos or captions .*choose another --out"):
        train(config)
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("training.json", b"{", "the state of the training cannot be read"),
        ("training.json", b'{"epok": 3}', "the state of the training cannot be read .*sha256"),
        ("training_state.safetensors", b"12345678", "the state of the training cannot be read .*training_state"),
        ("training.json", None, "the state of the training cannot be read .*No such file"),
        ("training_state.safetensors", None, "the state of the training cannot be read .*training_state"),
        ("model.safetensors", None, "model.safetensors: missing"),
        ("tokenizer.json", b"{}", "tokenizer.json: altered"),
    ],
)
def test_a_damaged_state_is_named(
    finished: tuple[TrainingConfig, History], tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    config = replace(finished[0], output=tmp_path / "run")
    shutil.copytree(finished[0].output, tmp_path / "run")
    path = tmp_path / "run" / "last" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        train(config)
    assert str(tmp_path / "run") in str(caught.value)


def test_settings_that_are_not_json(finished: tuple[TrainingConfig, History], tmp_path: Path) -> None:
    shutil.copytree(finished[0].output, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: damaged, not JSON .*; choose another --output"):
        train(replace(finished[0], output=tmp_path / "run"))


# When it ends ------------------------------------------------------------------------------------------------------


def test_the_epoch_with_the_best_cider_is_kept(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores_in_order(monkeypatch, 0.1, 0.4, 0.3, 0.3)
    config = make_config(data, tmp_path / "run", epochs=4)
    history = train(config)
    assert (history.best_epoch, history.best_cider, history.epoch) == (2, 0.4, 4)
    best, last = (checkpoint.read(tmp_path / "run" / name) for name in ("best", "last"))
    assert (best.training["epoch"], last.training["epoch"]) == (2, 4)
    assert best.training["scores"]["cider"] == 0.4
    results = json.loads((tmp_path / "run" / "captions_val.json").read_text())
    model = load_model(tmp_path / "run")
    assert [row["caption"] for row in results] == [model.caption(e.path).text for e in load(data).split("val")]


def test_it_stops_when_nothing_gets_better(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(data, tmp_path / "run", epochs=50, patience=2)
    scores_in_order(monkeypatch, 0.1, 0.2, 0.19, 0.15)
    history = train(config)
    assert (history.best_epoch, history.epoch) == (2, 4)
    assert train(config) == history  # and is finished


@pytest.mark.parametrize("rate", [0.01, -0.01])
def test_where_cider_tells_nothing_the_loss_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rate: float
) -> None:
    """CIDEr of a single photo is always 0. A learning rate below 0 makes the loss rise."""
    scores_in_order(monkeypatch, 0.0, 0.0, 0.0)
    schedule = Trainer._schedule
    monkeypatch.setattr(Trainer, "_schedule", lambda self, step: schedule(self, step) * rate / 0.01)
    with caplog.at_level(logging.WARNING):
        history = train(make_config(data, tmp_path / "run", patience=1, epochs=3))
    assert (history.epoch, history.best_epoch) == ((3, 3) if rate > 0 else (2, 1))
    assert (tmp_path / "run" / "best").exists()
    assert "validation has 4 photos: that is few to choose the best epoch by" in caplog.text


# What goes wrong ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(data, tmp_path / "run", epochs=4)
    schedule = Trainer._schedule
    monkeypatch.setattr(Trainer, "_schedule", lambda self, step: schedule(self, step) if step < 10 else 1e38)
    with pytest.raises(CaptionerError, match=r"the loss is (nan|inf) at step \d+; .*are kept: lower --optimisation.l"):
        train(config)
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["epoch"] == 2
    for name in ("best", "last"):
        state = load_file(tmp_path / "run" / name / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_weights_that_became_no_numbers_in_the_last_step_are_not_saved(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The losses of the epoch were all finite; those of validation are not."""
    schedule = Trainer._schedule
    monkeypatch.setattr(Trainer, "_schedule", lambda self, step: schedule(self, step) if step != 7 else float("nan"))
    with pytest.raises(CaptionerError, match="the loss is nan at step 8"):
        train(make_config(data, tmp_path / "run", epochs=4))
    assert checkpoint.read(tmp_path / "run" / "last").training["epoch"] == 1


@pytest.mark.parametrize("fails", ["best", "last", "captions"])
def test_a_disk_that_fills_while_saving(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    arguments = train_arguments(data, tmp_path / "run", "--optimisation.epochs", "3")
    with monkeypatch.context() as patch:
        scores_in_order(patch, 0.1, 0.2, 0.3)
        save, write_text = checkpoint.write, files.write

        def fail_to_save(folder: Path, saved: checkpoint.Checkpoint, card: str) -> None:
            if saved.training["epoch"] == 2 and fails in folder.name:
                raise full
            save(folder, saved, card)

        def fail_to_write(path: Path, text: str) -> None:
            if fails in path.name and (tmp_path / "run" / "last").exists():
                raise full
            write_text(path, text)

        patch.setattr(checkpoint, "write", fail_to_save)
        patch.setattr(files, "write", fail_to_write)
        assert cli.run("train", arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert "make room and run again" in error
    assert checkpoint.read(tmp_path / "run" / "last").training["epoch"] == 1
    Captioner.from_pretrained(tmp_path / "run")
    with monkeypatch.context() as patch:
        scores_in_order(patch, 0.2, 0.3)
        assert cli.run("train", arguments) == 0
    assert "best epoch 3 of 3" in capsys.readouterr().out


def test_an_output_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/run: cannot be written"):
        train(make_config(data, tmp_path / "file" / "run"))


@pytest.mark.parametrize("rate", [0.0, 0.01], ids=["features", "photos"])
def test_a_photo_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, rate: float) -> None:
    folder = make_data(tmp_path / "data")
    examples = load(folder)
    bad = [examples.split("train")[3], examples.split("val")[1]]
    for example in bad:
        example.path.write_text("no photo")
    config = make_config(folder, tmp_path / "run", epochs=2, encoder_learning_rate=rate)
    with caplog.at_level(logging.WARNING):
        train(config)
    for example in bad:
        assert f"left out: {example.path}: not a photo" in caplog.text
    model = load_model(tmp_path / "run")
    assert (model.training["train_photos"], model.training["val_photos"]) == (11, 3)
    results = json.loads((tmp_path / "run" / "captions_val.json").read_text())
    kept = [example for example in examples.split("val") if example not in bad]
    assert [(row["image_id"], row["caption"]) for row in results] == [
        (example.image_id, model.caption(example.path).text) for example in kept
    ]
    make_photo(bad[0].path)  # now it can be read: that is another data set
    with pytest.raises(CheckpointError, match=r"11 photos of training then, 12 now"):
        train(config)


@pytest.mark.parametrize("rate", [0.0, 0.01], ids=["features", "photos"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_photo_can_be_read(tmp_path: Path, rate: float, split: Any) -> None:
    folder = make_data(tmp_path / "data")
    for example in load(folder).split(split):
        example.path.write_text("no photo")
    with pytest.raises(CaptionerError, match=rf"data: none of the \d+ photos of '{split}' can be read, e.g. .*not"):
        train(make_config(folder, tmp_path / "run", encoder_learning_rate=rate))


def test_data_without_validation(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data")
    change_captions(folder, lambda text: text.replace('"val"', '"train"'))
    with pytest.raises(CaptionerError, match="holds no 'val' photos; the splits there are: train"):
        train(make_config(folder, tmp_path / "run"))


@pytest.mark.skipif(not trains_in_bf16(torch.device("cpu")), reason="this processor cannot train in bf16")
def test_precision_is_what_was_asked_for(data: Path, tmp_path: Path) -> None:
    config = replace(make_config(data, tmp_path / "run"), precision="bf16")
    train(config)
    train(replace(config, precision="fp32", output=tmp_path / "exact"))
    rounded, exact = (
        [epoch["train_loss"] for epoch in json.loads((path / "last" / "training.json").read_text())["epochs"]]
        for path in (tmp_path / "run", tmp_path / "exact")
    )
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_a_precision_that_cannot_be_used(
    finished: tuple[TrainingConfig, History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(finished[0], output=tmp_path / "run")
    with pytest.raises(CaptionerError, match="precision is fp16, which is for GPUs, and the device is cpu"):
        train(replace(config, precision="fp16"))
    monkeypatch.setattr("captioner.training.rounding.trains_in_bf16", lambda device: False)  # a processor with AVX2
    with pytest.raises(CaptionerError, match="precision is bf16, which this processor cannot train in; give auto"):
        train(replace(config, precision="bf16"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("asked", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_what_accelerate_launch_asks_for_is_heard(monkeypatch: pytest.MonkeyPatch, asked: str, dtype: Any) -> None:
    monkeypatch.setattr("captioner.training.rounding.trains_in_bf16", lambda device: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert Rounding("auto", torch.device("cpu")).dtype == dtype
    assert Rounding("fp32", torch.device("cpu")).dtype == torch.float32


def test_the_cnn_waits_until_it_is_its_turn(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", epochs=2, encoder_learning_rate=0.01, unfreeze_after=2)
    train(config)
    untrained = Encoder(config.encoder).body.state_dict()
    saved = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(torch.equal(saved[f"encoder.{name}"], untrained[name]) for name in untrained)
    later = replace(make_config(data, tmp_path / "later", 3, encoder_learning_rate=0.01, unfreeze_after=2))
    train(later)
    saved = load_file(tmp_path / "later" / "last" / "model.safetensors")
    assert all(not torch.equal(saved[f"encoder.{name}"], untrained[name]) for name in untrained)


def test_the_best_model_has_the_averaged_weights(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", epochs=2, average="ema", ema_decay=0.9)
    train(config)
    best, last = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("best", "last"))
    state = load_file(tmp_path / "run" / "last" / "training_state.safetensors")
    for name in ("output.weight", "initial.bias"):
        assert not torch.equal(best[f"decoder.{name}"], last[f"decoder.{name}"])
        if json.loads((tmp_path / "run" / "last" / "training.json").read_text())["best_epoch"] == 2:
            assert torch.equal(state[f"average.decoder.{name}"], best[f"decoder.{name}"])


def test_steps_of_several_batches(data: Path, tmp_path: Path) -> None:
    """Without dropout, two batches a step are one of twice the size."""
    config = make_config(data, tmp_path / "one", epochs=1, batch_size=60)
    config = replace(config, decoder=replace(config.decoder, dropout=0.0))
    halves = replace(
        config, output=tmp_path / "two", optimisation=replace(config.optimisation, batch_size=30, accumulate=2)
    )
    one, two = train(config), train(halves)
    assert one.step == two.step == 1
    assert one.epochs[0]["train_loss"] == pytest.approx(two.epochs[0]["train_loss"], rel=1e-5)
    weights = [
        load_file(tmp_path / name / "last" / "model.safetensors")["decoder.output.bias"] for name in ("one", "two")
    ]
    assert torch.allclose(*weights, atol=1e-4)


def test_the_language_comes_first(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions without photos are learned from, once, even if the run is stopped in its first epoch."""
    (tmp_path / "captions.tsv").write_text("1\ta red circle\n2\ta red circle is above\n3\tunheard-of words\n")
    config = make_config(data, tmp_path / "run", 1, language_captions=tmp_path / "captions.tsv", language_epochs=60)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        with pytest.raises(StoppedError):
            train(config)
    saved = load_file(tmp_path / "run" / "language.safetensors")  # mapped into memory, hence copied
    learned = {name: tensor.clone() for name, tensor in saved.items()}
    assert not learned["initial.weight"].any()  # all photos look the same
    (tmp_path / "run" / "language.safetensors").write_bytes(b"cut off")
    with pytest.raises(CaptionerError, match=r"language\.safetensors"):
        train(config)
    save_file(learned, tmp_path / "run" / "language.safetensors")
    monkeypatch.setattr(trainer, "learn_language", lambda *_: pytest.fail("learns it again"))
    train(config)


def test_a_disk_that_is_full_after_the_language(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions.txt").write_text("a red circle\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", full)
    config = make_config(data, tmp_path / "run", 1, language_captions=tmp_path / "captions.txt")
    with pytest.raises(CheckpointError, match=r"language\.safetensors: cannot be written .*No space.*; make room"):
        train(config)
    assert not list((tmp_path / "run").glob("language*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "captions.txt: captions without photos cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"\x1f\x8b broken", "cannot be read"),
        (b"\n \n", "holds no caption; expected text in UTF-8, a caption a line"),
        (b"nothing known here", "every caption has words that those of the photos lack"),
    ],
)
def test_captions_without_photos_that_are_none(data: Path, tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(CaptionerError, match=said):
        train(make_config(data, tmp_path / "run", 1, language_captions=tmp_path / "captions.txt"))


def test_the_learning_rate_rises_and_falls(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    schedule = Trainer._schedule

    def record(self: Trainer, step: int) -> float:
        shares.append(schedule(self, step))
        return shares[-1]

    monkeypatch.setattr(Trainer, "_schedule", record)
    train(make_config(data, tmp_path / "run", epochs=4, warmup_steps=4))
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert 0.01 < shares[-1] < 0.1
    shares.clear()
    train(make_config(data, tmp_path / "short", epochs=2, warmup_steps=100))
    assert shares[:4] == pytest.approx([0.5, 1.0, 1.0, 0.93], abs=0.01)  # a quarter of all steps, of which there are 8


# Several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_one_model(data: Path, tmp_path: Path) -> None:
    """As `torchrun` starts them, on processors: what the first process saves is what both validated."""
    arguments = train_arguments(data, tmp_path / "run", "--optimisation.epochs", "2")
    arguments = [*arguments, "--optimisation.encoder-learning-rate", "0.01", "--decoder.feature-norm", "standard"]
    script = tmp_path / "both.py"
    script.write_text(
        "import json, os, sys\n"
        "from captioner import cli\n"
        "from captioner.training import trainer\n"
        "run = trainer.Trainer.run\n"
        "def note(self):\n"
        "    history = run(self)\n"
        f"    path = os.path.join({str(tmp_path)!r}, 'rank' + os.environ['RANK'] + '.json')\n"
        "    json.dump([history.epoch, history.step, history.best_epoch, [e['cider'] for e in history.epochs],\n"
        "        [e['val_loss'] for e in history.epochs]], open(path, 'w'))\n"
        "    return history\n"
        "trainer.Trainer.run = note\n"
        "sys.exit(cli.run('train', sys.argv[1:]))\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
            *("--standalone", str(script), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 300
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[:2] == [2, 2 * 2]  # 60 captions, 32 a step
    assert done.stdout.count("best epoch") == 1
    assert done.stderr.count("epoch 1: loss") == 1
    results = json.loads((tmp_path / "run" / "captions_val.json").read_text())
    model = load_model(tmp_path / "run")
    assert [row["caption"] for row in results] == [model.caption(e.path).text for e in load(data).split("val")]

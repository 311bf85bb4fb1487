"""Alarms are raised by runs that go wrong, one by one, and by none that goes well."""

import math
from pathlib import Path
from typing import Any

import pytest
from made import falling, good_caption, make_run

from captioner.report.alarms import alarms
from captioner.report.run import read
from captioner.training.presets import PRESETS


def titles(run: Path) -> list[str]:
    return [alarm.title for alarm in alarms(read(run))]


@pytest.mark.parametrize("epochs", [0, 2, 4])
def test_a_good_run_raises_none(tmp_path: Path, epochs: int) -> None:
    assert titles(make_run(tmp_path / "run", epochs=epochs)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_of_the_presets_are_no_extremes(tmp_path: Path, preset: str) -> None:
    from captioner.config import as_json

    assert titles(make_run(tmp_path / "run", settings=as_json(PRESETS[preset]))) == []


@pytest.mark.parametrize(
    ("changed", "title"),
    [
        ({"loss": lambda step: math.nan if step > 500 else 3.0}, "The loss is not a number"),
        ({"loss": lambda step: falling(step) + max(0, step - 600) / 50}, "The training loss diverges"),
        (  # in the first epoch of a small run
            {
                "loss": lambda step: 6.5 if step < 100 else step / 12,
                "epochs": 1,
                "caption": lambda photo, epoch: good_caption(photo, 2),
            },
            "The training loss diverges",
        ),
        ({"norm": lambda step: math.inf if step > 900 else 1.0}, "Gradients are not finite"),
        ({"norm": lambda step: 1.0 if step < 900 else 40.0}, "The gradient explodes"),
        ({"norm": lambda step: 500.0 if step == 600 else 1.0}, "The gradient explodes"),
        ({"norm": lambda step: 8.0}, "Most gradients are clipped"),
        ({"val_loss": (3.0, 3.1, 3.2, 3.4)}, "Validation becomes worse while training becomes better"),
        ({"caption": lambda photo, epoch: "a man in a shirt"}, "Captions collapse to a few"),
        (
            {"caption": lambda photo, epoch: good_caption(photo, epoch) + (" in A ." if photo % 4 == 0 else "")},
            "Captions break off",
        ),
        ({"finished": lambda photo: photo % 5 > 0}, "Captions are cut"),
        ({"settings": {"optimisation": {"learning_rate": 0.5}}}, "--optimisation.learning-rate is extreme"),
        ({"settings": {"optimisation": {"learning_rate": 1e-8}}}, "--optimisation.learning-rate is extreme"),
        (
            {"settings": {"optimisation": {"encoder_learning_rate": 5e-3}}},
            "--optimisation.encoder-learning-rate is extreme",
        ),
    ],
)
def test_each_fault_raises_its_alarm_alone(tmp_path: Path, changed: dict[str, Any], title: str) -> None:
    assert titles(make_run(tmp_path / "run", **changed)) == [title]


def test_alarms_say_numbers_and_a_remedy(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run", caption=lambda photo, epoch: "a man" if photo % 2 else f"dog {photo}"))
    (alarm,) = alarms(run)
    assert "40 photos have 21 different captions, 20 of them “a man”" in alarm.text
    run = read(make_run(tmp_path / "other", val_loss=(3.0, 3.1, 3.2, 3.4)))
    (alarm,) = alarms(run)
    assert "risen for 3 epochs, from 3.000 to 3.400" in alarm.text
    assert "The best epoch by CIDEr, 3, is kept" in alarm.text


def test_what_is_usual_raises_none(tmp_path: Path) -> None:
    """A validation loss that rises while the reward is CIDEr; one odd end; a noisy start; steps that fp16 skips."""
    rewarded = {"optimisation": {"objective": "cider", "epochs": 4}, "start": "mini"}
    run = make_run(
        tmp_path / "reward",
        settings=rewarded,
        val_loss=(3.0, 3.1, 3.2, 3.4),
        loss=lambda step: -0.8 - step / 5000,
    )
    assert titles(run) == []
    run = make_run(
        tmp_path / "odd", caption=lambda photo, epoch: "a path to walk on" if photo == 7 else good_caption(photo, epoch)
    )
    assert titles(run) == []
    assert titles(make_run(tmp_path / "start", norm=lambda step: 400.0 if step == 1 else 1.0)) == []
    assert titles(make_run(tmp_path / "fp16", norm=lambda step: math.inf if step in (1, 500) else 1.0)) == []

"""`captioner export` as it is typed; what it writes is tested with `captioner.export`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from captioner import cli, export
from captioner.cli.export import summary
from captioner.config import DataConfig


def test_arguments_reach_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    report = SimpleNamespace(
        folder=tmp_path / "new",
        bytes=3_200_000,
        differences={"features": 0.0123},
        scores_before=None,
        scores_after=None,
    )

    def note(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return report

    monkeypatch.setattr(export, "export", note)
    assert cli.run("export", ["mini"]) == 0
    shown = f"{tmp_path / 'new'}: 3.2 MB\nlargest difference from torch, features: 0.0123\n"
    assert capsys.readouterr().out == shown
    assert (
        cli.run(
            "export",
            f"mini {tmp_path} --precision fp32 --data a.csv --images b --on-problem skip --calibration 9".split(),
        )
        == 0
    )
    usual = {"data": None, "photos": 192, "encoder_weights": None}
    data = DataConfig(data=Path("a.csv"), images=Path("b"), on_problem="skip")
    assert calls == [
        (("mini", None), {"precision": "int8", **usual}),
        (("mini", tmp_path), {**usual, "precision": "fp32", "data": data, "photos": 9}),
    ]


def test_scores_are_shown_before_and_after() -> None:
    report: Any = SimpleNamespace(
        folder=Path("new"),
        bytes=1_000_000,
        differences={},
        scores_before={"cider": 0.416, "bleu_4": 0.175},
        scores_after={"cider": 0.422, "bleu_4": 0.176},
    )
    assert summary(report).splitlines()[1:] == [
        "cider: 0.4160 before, 0.4220 after",
        "bleu_4: 0.1750 before, 0.1760 after",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--images photos", "--images has no meaning without --data"),
        ("--on-problem skip", "--on-problem has no meaning without --data"),
        ("--calibration 0", "--calibration is 0; expected 1 photo or more"),
    ],
)
def test_arguments_without_a_meaning(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("export", ["mini", *options.split()]) == 2
    assert said in capsys.readouterr().err

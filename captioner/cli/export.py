"""`captioner export`: a trained model -> graphs that caption without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from captioner.cli import output
from captioner.cli.arguments import parse
from captioner.errors import CaptionerError

if TYPE_CHECKING:
    from captioner.export import ExportReport


@dataclass(frozen=True)
class ExportArguments:
    """Write a model's graphs for onnxruntime: small, fast, and free of torch.

    Each graph is run as soon as it is written, and compared with torch.
    """

    # a saved model or training run, owner/name on the Hugging Face Hub, or "mini"
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # folder of the new model; by default the graphs are added to MODEL
    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER]")] = None
    precision: Literal["int8", "fp32"] = "int8"  # "int8": a quarter of the size, and fastest; "fp32": as trained
    data: Path | None = None  # photos and captions: 8-bit scales are taken from them, and validation scores
    images: Path | None = None  # folder of the photos, where the layout does not say it
    on_problem: Literal["error", "skip"] = "error"  # missing photos, double ids and so on: stop, or leave them out
    calibration: int = 192  # photos that the 8-bit scales are taken from
    encoder_weights: Annotated[
        str | None,
        tyro.conf.arg(name="encoder.weights", help="file of the CNN's weights, where the model does not hold them"),
    ] = None


def command(arguments: Sequence[str], prog: str) -> int:
    """Export a model, and return the exit status."""
    chosen = parse(ExportArguments, arguments, prog)
    for name, given in {"images": chosen.images is not None, "on-problem": chosen.on_problem != "error"}.items():
        if given and chosen.data is None:
            raise CaptionerError(f"--{name} has no meaning without --data; give both, or leave it out")
    if chosen.calibration < 1:
        raise CaptionerError(f"--calibration is {chosen.calibration}; expected 1 photo or more")

    from captioner import export
    from captioner.config import DataConfig

    data = None
    if chosen.data is not None:
        data = DataConfig(data=chosen.data, images=chosen.images, on_problem=chosen.on_problem)
    report = export.export(
        chosen.model,
        chosen.folder,
        precision=chosen.precision,
        data=data,
        photos=chosen.calibration,
        encoder_weights=chosen.encoder_weights,
    )
    with output.writer(None) as out:
        print(summary(report), file=out)
    return 0


def summary(report: ExportReport) -> str:
    """An export in a few lines."""
    lines = [f"{output.one_line(report.folder)}: {report.bytes / 1e6:.1f} MB"]
    lines += [f"largest difference from torch, {name}: {value:.3g}" for name, value in report.differences.items()]
    if report.scores_before and report.scores_after:
        lines += [
            f"{name}: {before:.4f} before, {report.scores_after[name]:.4f} after"
            for name, before in report.scores_before.items()
            if name in report.scores_after
        ]
    return "\n".join(lines)

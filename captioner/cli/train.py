"""`captioner train`: a preset and the options that override it -> a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from captioner.cli import first_process, output
from captioner.cli.arguments import CONFIG
from captioner.config import DataConfig, TrainingConfig


@dataclass(frozen=True)
class TrainArguments(TrainingConfig):
    """Settings of a training run: those of the preset, except for the ones given here."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")]  # options without a prefix

    def __post_init__(self) -> None:
        """Check nothing: the settings are checked when they are complete."""

    def config(self) -> TrainingConfig:
        """The settings, checked.

        Raises:
            CaptionerError: they contradict each other.
        """
        return TrainingConfig(**vars(self))


def command(arguments: Sequence[str], prog: str) -> int:
    """Train a model, or go on with a run that was stopped; return the exit status."""
    config = parse(arguments, prog)

    from captioner.training.trainer import train

    history = train(config)
    best = history.epochs[history.best_epoch - 1]
    if first_process():
        with output.writer(None) as out:
            print(
                f"best epoch {history.best_epoch} of {history.epoch}: validation BLEU-4 {best['bleu_4']:.4f}, "
                f"CIDEr {best['cider']:.4f}; {history.seconds / 60:.1f} minutes; "
                f"the model is in {output.one_line(config.output / 'best')}",
                file=out,
            )
    return 0


def parse(arguments: Sequence[str], prog: str) -> TrainingConfig:
    """Parse a preset's name and options.

    Raises:
        CaptionerError: the settings contradict each other.
    """
    from captioner.training.presets import DESCRIPTIONS, PRESETS

    presets = {name: (DESCRIPTIONS[name], TrainArguments(**vars(preset))) for name, preset in PRESETS.items()}
    return tyro.extras.overridable_config_cli(presets, args=arguments, prog=prog, config=CONFIG).config()

"""`captioner train`: a preset and the options that override it -> a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from captioner.cli import first_process, output
from captioner.cli.arguments import CONFIG
from captioner.config import DataConfig, TrainingConfig
from captioner.errors import CaptionerError


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

    if first_process():
        for line in summary(config):
            output.say(line)
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
        CaptionerError: an option has no meaning beside the others.
    """
    from captioner.training.presets import DESCRIPTIONS, PRESETS

    presets = {name: (DESCRIPTIONS[name], TrainArguments(**vars(preset))) for name, preset in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, args=arguments, prog=prog, config=CONFIG).config()
    if config.start is not None:
        preset = PRESETS[next(argument for argument in arguments if argument in PRESETS)]
        ignored = [
            f"--{part}.{field.name}".replace("_", "-")
            for part in ("encoder", "decoder")
            for field in dataclasses.fields(getattr(config, part))
            if field.name != "weights"  # says where the weights are that the model was trained with
            and getattr(getattr(config, part), field.name) != getattr(getattr(preset, part), field.name)
        ]
        if ignored:
            raise CaptionerError(
                f"{', '.join(ignored)} has no meaning with --start, whose model has a CNN and a decoder already; "
                "leave it out"
            )
    return config


def summary(config: TrainingConfig) -> list[str]:
    """The settings that matter most, in a few lines."""
    data, encoder, decoder, learning = config.data, config.encoder, config.decoder, config.optimisation
    layers = f"{decoder.layers} layers" if decoder.layers > 1 else "1 layer"
    cnn = f"learns at {learning.encoder_learning_rate:g}" if learning.encoder_learning_rate else "frozen"
    size = f"{encoder.image_size} x {encoder.image_size}"
    rows = {
        "data": str(data.data) + (f", photos in {data.images}" if data.images else ""),
        "start": config.start or "",
        "encoder": f"{encoder.name}, weights {encoder.weights}, photos at {size}, {cnn}" if not config.start else cnn,
        "decoder": f"{decoder.cell}, {layers} of {decoder.hidden_size}, embeddings of {decoder.embedding_size}, "
        f"dropout {decoder.dropout:g}"
        if not config.start
        else "",
        "learning": f"{learning.objective}, up to {learning.epochs} epochs, batches of {learning.batch_size}, "
        f"rate {learning.learning_rate:g}",
        "run": f"seed {config.seed}, precision {config.precision}, tracking {config.tracking}",
        "output": f"{config.output}, with all settings in config.json",
    }
    return [f"{name:<10}{value}" for name, value in rows.items() if value]

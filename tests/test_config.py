"""Settings: the presets are complete, and what cannot be meant is refused in one clear line."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tyro

from captioner.config import (
    PRESETS,
    DataConfig,
    DecoderConfig,
    DecodingOptions,
    EncoderConfig,
    OptimisationConfig,
    Statistics,
    TrainingConfig,
)
from captioner.errors import CaptionerError

KINDS = (DataConfig, DecoderConfig, DecodingOptions, EncoderConfig, OptimisationConfig, Statistics, TrainingConfig)


def refused(build: Any, text: str, **settings: Any) -> None:
    with pytest.raises(CaptionerError, match=text) as caught:
        build(**settings)
    message = str(caught.value)
    assert "\n" not in message
    for name, value in settings.items():
        assert name in message
        assert str(value) in message or repr(value) in message


@pytest.mark.parametrize("name", ["hidden_size", "embedding_size", "layers"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_of_the_decoder(name: str, value: int) -> None:
    refused(DecoderConfig, f"decoder.{name} is {value}; expected 1 or more", **{name: value})


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, math.nan])
def test_confidence(value: float) -> None:
    refused(Statistics, f"is {value}; expected more than 0 and less than 1", confidence=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_shares(value: float) -> None:
    text = f"is {value}; expected 0 or more and less than 1"
    refused(DecoderConfig, text, dropout=value)
    refused(OptimisationConfig, text, label_smoothing=value)
    with pytest.raises(CaptionerError, match=f"val_share {text}"):
        DataConfig(data=Path("data"), val_share=value)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "patience"])
def test_counts_of_training(name: str) -> None:
    refused(OptimisationConfig, f"optimisation.{name} is 0; expected 1 or more", **{name: 0})


@pytest.mark.parametrize("name", ["learning_rate", "gradient_clip"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan])
def test_what_is_more_than_nothing(name: str, value: float) -> None:
    refused(OptimisationConfig, f"optimisation.{name} is {value}; expected more than 0", **{name: value})


@pytest.mark.parametrize("name", ["encoder_learning_rate", "warmup_steps"])
def test_what_is_nothing_or_more(name: str) -> None:
    refused(OptimisationConfig, f"optimisation.{name} is -1; expected 0 or more", **{name: -1})
    OptimisationConfig(**{name: 0})


def test_names() -> None:
    refused(EncoderConfig, "encoder.name is 'vgg11'; expected one of vgg16, vgg16_bn, ", name="vgg11")
    refused(DecoderConfig, "decoder.cell is 'LSTM'; expected one of lstm, gru, rnn, irnn", cell="LSTM")
    refused(DecoderConfig, "decoder.feature_norm is 'l2'; expected one of", feature_norm="l2")
    refused(EncoderConfig, "encoder.image_size is 31; expected 32 or more", image_size=31)
    refused(Statistics, "statistics.resamples is -1; expected 0 or more", resamples=-1)


@pytest.mark.parametrize("name", ["min_count", "max_words"])
def test_counts_of_words(name: str) -> None:
    preset = PRESETS["coco"][1]
    with pytest.raises(CaptionerError, match=f"{name} is 0; expected 1 or more"):
        dataclasses.replace(preset, **{name: 0})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"beam_size": 0}, "expected 1 to 1000"),
        ({"beam_size": 1001}, "expected 1 to 1000"),
        ({"num_captions": 0}, "expected 1 to 1000"),
        ({"num_captions": 1001}, "expected 1 to 1000"),
        ({"max_words": 0}, "expected 1 to 500"),
        ({"max_words": 501}, "expected 1 to 500"),
        ({"beam_groups": 0}, "expected 1 to 1000"),
        ({"min_words": -1}, "expected 0 or more"),
        ({"no_repeat_ngram": -1}, "expected 0 or more"),
        ({"top_k": -1}, "expected 0 or more"),
        ({"min_words": 9, "max_words": 8}, "expected min_words <= max_words"),
        ({"gnmt_alpha": -0.5}, "expected 0 to 10"),
        ({"gnmt_alpha": 11.0}, "expected 0 to 10"),
        ({"diversity": math.inf}, "expected 0 to 1000"),
        ({"diversity": math.nan}, "expected 0 to 1000"),
        ({"temperature": 1e-6}, "expected 0.001 to 1000"),
        ({"temperature": math.inf}, "expected 0.001 to 1000"),
        ({"top_p": 0.0}, "expected a probability above 0, and 1 at most"),
        ({"beam_groups": 2}, "does not divide the beam of 3"),
        ({"method": "greedy"}, "expected one of beam, sample"),
        ({"length_normalisation": "mean"}, "expected one of none, average, gnmt"),
    ],
)
def test_decoding(settings: dict[str, Any], text: str) -> None:
    refused(DecodingOptions, text, **settings)


def test_decoding_that_contradicts_itself() -> None:
    for settings in (
        {"required_words": ("dog",), "method": "sample"},
        {"required_words": ("dog",), "beam_groups": 3},
    ):
        with pytest.raises(CaptionerError, match='required_words need method "beam"'):
            DecodingOptions(**settings)  # type: ignore[arg-type]
    with pytest.raises(CaptionerError, match="num_captions is 100001; expected 1 to 100000"):
        DecodingOptions(method="sample", num_captions=100_001)
    with pytest.raises(CaptionerError, match='beam_groups need method "beam"'):
        DecodingOptions(beam_groups=3, method="sample")


def test_the_beam_is_as_wide_as_what_is_wanted() -> None:
    assert DecodingOptions(beam_size=3, num_captions=5).width == 5
    assert DecodingOptions(beam_size=3, num_captions=2).width == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_explained_and_cannot_be_changed_later(kind: Any) -> None:
    """The comment behind a field is its help text on the command line."""
    assert kind.__dataclass_params__.frozen
    import inspect

    source = inspect.getsource(kind)
    for each in dataclasses.fields(kind):
        line = re.search(rf"^    {each.name}: .*$", source, re.MULTILINE)
        assert line is not None
        nested = dataclasses.is_dataclass(get_type_hints(kind)[each.name])
        assert "  # " in line[0] or nested, f"{kind.__name__}.{each.name} has no comment"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_and_parse(name: str) -> None:
    description, preset = PRESETS[name]
    assert description
    assert tyro.extras.overridable_config_cli(PRESETS, args=[name]) == preset
    options = f"{name} --data some/where --output out --optimisation.epochs 3 --decoder.cell gru --seed 9".split()
    found = tyro.extras.overridable_config_cli(PRESETS, args=options)
    assert found == dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, data=Path("some/where")),
        output=Path("out"),
        optimisation=dataclasses.replace(preset.optimisation, epochs=3),
        decoder=dataclasses.replace(preset.decoder, cell="gru"),
        seed=9,
    )


def test_the_presets_are_those_that_the_manual_names() -> None:
    assert list(PRESETS) == ["coco", "flickr8k", "mini", "mini-joint", "mini-cider", "shapes"]
    coco = PRESETS["coco"][1]
    assert coco.encoder == EncoderConfig(name="vgg16", weights="default")
    assert (coco.decoder.cell, coco.decoder.hidden_size, coco.decoder.embedding_size) == ("lstm", 512, 512)
    assert (coco.decoder.dropout, coco.optimisation.learning_rate) == (0.5, 5e-4)
    assert coco.optimisation.encoder_learning_rate == 0
    shapes = PRESETS["shapes"][1]
    assert (shapes.encoder.name, shapes.encoder.weights) == ("tiny", "random")  # trains from nothing
    assert shapes.optimisation.encoder_learning_rate > 0


@pytest.mark.parametrize("name", get_args(get_type_hints(EncoderConfig)["name"]))
def test_every_encoder_has_a_config(name: Any) -> None:
    assert EncoderConfig(name=name).image_size == 224

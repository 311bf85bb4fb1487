"""Settings: the presets are complete, and what cannot be meant is refused in one clear line."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from captioner.config import (
    DataConfig,
    DecoderConfig,
    DecodingOptions,
    EncoderConfig,
    OptimisationConfig,
    Statistics,
    TrainingConfig,
    from_json,
)
from captioner.errors import CaptionerError
from captioner.training.presets import DESCRIPTIONS, PRESETS

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


@pytest.mark.parametrize("name", ["learning_rate", "encoder_learning_rate"])
def test_learning_rates_beyond_sense(name: str) -> None:
    refused(OptimisationConfig, f"optimisation.{name} is 1.5; expected 1 or less", **{name: 1.5})
    with pytest.raises(CaptionerError, match="expected"):
        OptimisationConfig(**{name: math.inf})  # type: ignore[arg-type]


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
    preset = PRESETS["coco"]
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


def test_every_preset_has_a_description() -> None:
    assert list(PRESETS) == list(DESCRIPTIONS) == ["coco", "flickr8k", "shapes"]
    assert all(isinstance(preset, TrainingConfig) for preset in PRESETS.values())


def test_the_presets_are_those_that_the_manual_names() -> None:
    coco = PRESETS["coco"]
    assert coco.encoder == EncoderConfig(name="vgg16", weights="default")
    assert (coco.decoder.cell, coco.decoder.hidden_size, coco.decoder.embedding_size) == ("lstm", 512, 512)
    assert (coco.decoder.dropout, coco.optimisation.learning_rate) == (0.5, 5e-4)
    assert coco.optimisation.encoder_learning_rate == 0
    shapes = PRESETS["shapes"]
    assert (shapes.encoder.name, shapes.encoder.weights) == ("tiny", "random")  # trains from nothing
    assert shapes.optimisation.encoder_learning_rate > 0


@pytest.mark.parametrize("name", get_args(get_type_hints(EncoderConfig)["name"]))
def test_every_encoder_has_a_config(name: Any) -> None:
    assert EncoderConfig(name=name).image_size == 224


# From JSON ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Newer:
    """Settings of every kind; the last ones were added by a later version."""

    path: Path
    inner: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    words: tuple[str, ...] = ()
    added: float | None = None
    share: float = 0.5


def as_saved(settings: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


@pytest.mark.parametrize("name", PRESETS)
def test_saved_settings_are_read_as_they_were(name: str) -> None:
    assert from_json(TrainingConfig, as_saved(PRESETS[name])) == PRESETS[name]


def test_settings_that_were_not_there_take_their_defaults() -> None:
    assert from_json(Newer, {"path": "x"}) == Newer(Path("x"))
    assert from_json(Newer, {"path": "x", "inner": {"name": "tiny"}}).inner == EncoderConfig(name="tiny")
    for value in (None, 0.25, 1):
        assert from_json(Newer, as_saved(Newer(Path("x"), added=value))).added == value
    saved = as_saved(PRESETS["coco"])
    del saved["optimisation"]["patience"], saved["seed"]
    assert from_json(TrainingConfig, saved) == PRESETS["coco"]


def test_settings_that_are_no_longer_there_are_passed_over() -> None:
    """The precision, which was an option of the search, and typical sampling."""
    saved = {**as_saved(DecodingOptions(beam_size=4)), "precision": "fp32", "typical_p": 0.9}
    assert from_json(DecodingOptions, saved) == DecodingOptions(beam_size=4)


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (None, "the document is null; expected an object"),
        ([], r"the document is \[\]; expected an object"),
        ({}, "path is missing"),
        ({"path": 3}, "path is 3; expected a path"),
        ({"path": "x", "share": None}, "share is null; expected a number"),
        ({"path": "x", "share": "1"}, "share is '1'; expected a number"),
        ({"path": "x", "share": True}, "share is True; expected a number"),
        ({"path": "x", "share": 10**400}, "share is 1000.*; expected a number"),
        ({"path": "x", "words": "ab"}, "words is 'ab'; expected a list"),
        ({"path": "x", "words": ["a", 1]}, r"words\[1\] is 1; expected a text"),
        ({"path": "x", "inner": 3}, "inner is 3; expected an object"),
        ({"path": "x", "inner": {"name": ["vgg16"]}}, "inner.name is .*; expected one of vgg16"),
        ({"path": "x", "inner": {"image_size": 224.0}}, "inner.image_size is 224.0; expected a whole number"),
        ({"path": "x", "inner": {"colour": 1}}, "inner.colour is no setting of this version; expected name, weights, "),
    ],
)
def test_settings_that_cannot_be_read(saved: Any, text: str) -> None:
    with pytest.raises(CaptionerError, match=f"^{text}") as caught:
        from_json(Newer, saved)
    assert len(str(caught.value)) < 200


def test_nothing_heavy_is_imported_for_settings() -> None:
    code = (
        "import sys, captioner.config, captioner.training.presets; print({'tyro', 'torch', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""The card says what a model is, and no text of a stranger gets out of its line."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captioner import checkpoint, hub
from captioner.checkpoint import Checkpoint
from captioner.config import DecoderConfig, DecodingOptions, EncoderConfig
from captioner.errors import CheckpointError
from captioner.files import PRETRAINED
from captioner.vocabulary import Vocabulary

ModelCard = pytest.importorskip("huggingface_hub").ModelCard

SCORES = {"bleu_4": 0.21349, "cider": 0.71}


def make(**changed: Any) -> Checkpoint:
    saved = Checkpoint(
        encoder=EncoderConfig(name="tiny", weights="folder/cnn.safetensors", image_size=32),
        encoder_sha256="0123abcd",
        decoder=DecoderConfig(hidden_size=16),
        decoding=DecodingOptions(beam_size=4),
        vocabulary=Vocabulary.build(["a red dog runs"], min_count=1),
        decoder_state={},
        encoder_state={},
        training={"data": "flickr8k", "epoch": 7, "seed": 3, "scores": SCORES},
    )
    return replace(saved, **changed)


def test_the_card_tells_what_the_model_is() -> None:
    text = hub.model_card(make())
    for said in (
        "| bleu_4 | 0.2135 |",
        "| cider | 0.7100 |",
        "(beam 4)",
        "training data: flickr8k",
        "epochs: 7, seed 3",
        "`lstm`, 1 layer(s) of 16 units",
        "writes with 8 words",
        "`tiny`, weights stored with the model, SHA-256 `0123abcd`",
    ):
        assert said in text


def test_the_hub_reads_the_front_matter() -> None:
    data = ModelCard(hub.model_card(make())).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("captioner", "image-to-text", ["image-captioning"])
    assert {(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results or ()} == {
        ("flickr8k", "bleu_4", 0.2135),
        ("flickr8k", "cider", 0.71),
    }


def test_the_card_of_an_exported_model_has_both_scores() -> None:
    export = {"precision": "int8", "scores_before": SCORES, "scores_after": {"bleu_4": 0.2, "cider": 0.7051}}
    text = hub.model_card(make(export=export))
    assert "| score | before the export | exported |" in text
    assert "| cider | 0.7100 | 0.7051 |" in text
    assert "graphs for onnxruntime in `onnx/`: int8" in text
    results = ModelCard(text).data.eval_results or ()
    assert {each.metric_type: each.metric_value for each in results} == {"bleu_4": 0.2, "cider": 0.7051}


def test_the_card_of_a_model_that_nobody_trained() -> None:
    text = hub.model_card(make(training={}, encoder_state=None))
    assert "Scores" not in text
    assert "`cnn.safetensors`, by reference" in text
    assert not ModelCard(text).data.eval_results
    assert "(greedy search)" in hub.model_card(
        make(training={"scores": {"cider": 1.0}}, decoding=DecodingOptions(beam_size=1))
    )


def test_texts_of_a_stranger_stay_in_their_line() -> None:
    evil = "x\n---\n# pwned\x1b[31m\u202e`|"
    training = {"data": evil, "epoch": 1, "start": evil, "objective": evil, "scores": {evil: 1.0}}
    text = hub.model_card(
        make(training=training, encoder_sha256=evil, encoder=EncoderConfig(weights=evil), encoder_state=None)
    )
    assert all(line.isprintable() for line in text.splitlines())
    assert not re.search("^# pwned", text, re.MULTILINE)
    assert ModelCard(text).data.library_name == "captioner"


def test_names_of_models(tmp_path: Path) -> None:
    assert hub.find("mini") == PRETRAINED / "mini"
    assert hub.find(tmp_path) == tmp_path
    for name in ("nothing", "no\0thing", "x" * 300, "\x1b[31m\nred"):
        with pytest.raises(CheckpointError, match="no such model") as caught:
            hub.find(name)
        assert str(caught.value).isprintable()


def test_an_exported_model_is_fetched_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert hub.find("someone/dogs") == tmp_path
    wanted = {checkpoint.CONFIG, checkpoint.TOKENIZER, checkpoint.CARD, checkpoint.WEIGHTS, *checkpoint.EXPORTED_FILES}
    assert set(asked["allow_patterns"]) == wanted  # no pickles, no code


def test_a_model_in_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """The Hub's cache holds links to its files."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    shapes = checkpoint.decoder_shapes(make().decoder, 8)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    checkpoint.write(blobs, make(decoder_state=state), "")
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert checkpoint.read(snapshot).decoder_state.keys() == state.keys()

"""A saved model comes back as it was, or an error says which file is at fault; saving never loses what was there."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SENTENCES, isolated, make_model, spoil  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from captioner import checkpoint, files, tensors
from captioner.checkpoint import CARD, CONFIG, TOKENIZER, WEIGHTS, Checkpoint
from captioner.config import DecoderConfig, DecodingOptions, EncoderConfig
from captioner.errors import CaptionerError, CheckpointError
from captioner.export.eight_bits import codes
from captioner.hub import model_card
from captioner.model import Captioner
from captioner.networks import weights
from captioner.networks.decoder import Decoder
from captioner.vocabulary import Vocabulary

FILES = {WEIGHTS, CONFIG, TOKENIZER, CARD}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def alter_config(folder: Path, *where: str, to: Any = None) -> None:
    """Set a field of config.json, or remove it."""
    config = json.loads((folder / CONFIG).read_text())
    inner = config
    for key in where[:-1]:
        inner = inner[key]
    if to is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = to
    (folder / CONFIG).write_text(json.dumps(config))


def alter_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Put other tensors in a model, with the right hash."""
    save_file(state, folder / WEIGHTS)
    alter_config(folder, "sha256", WEIGHTS, to=files.sha256(folder / WEIGHTS))


def fails(folder: Path, text: str) -> None:
    """Loading names `text`, and what to do."""
    with pytest.raises(CheckpointError, match=text) as caught:
        Captioner.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def pack(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as an exported model has them: matrices in 8 bits, and a step a row."""
    packed = dict(state)
    for name, array in state.items():
        if array.ndim > 1:
            packed[name], packed[name + tensors.STEP] = codes(array)
    return packed


def make_checkpoint(**changed: Any) -> Checkpoint:
    """A model that no network of torch has made."""
    gru = DecoderConfig("gru", hidden_size=7, embedding_size=5, layers=2, feature_norm="sqrt")
    config = changed.get("decoder", gru)
    vocabulary = Vocabulary.build(SENTENCES, min_count=1)
    random = np.random.default_rng(0)
    shapes = checkpoint.decoder_shapes(config, len(vocabulary))
    return replace(
        Checkpoint(
            encoder=EncoderConfig(name="alexnet", weights="some/file.pth", image_size=99),
            encoder_sha256="0123abcd",
            decoder=config,
            decoding=DecodingOptions(max_words=9),
            vocabulary=vocabulary,
            decoder_state={name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
            encoder_state={
                "conv.weight": random.normal(size=(2, 3, 3, 1)).astype(np.float32).transpose(0, 3, 2, 1),
                "norm.num_batches_tracked": np.array(3),
            },
            training={"data": "bücher", "scores": {"cider": 0.5}, "epoch": 3},
        ),
        **changed,
    )


def equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def test_every_field_comes_back(tmp_path: Path) -> None:
    options = DecodingOptions(
        beam_size=4,
        num_captions=2,
        max_words=9,
        min_words=2,
        length_normalisation="gnmt",
        gnmt_alpha=0.7,
        no_repeat_ngram=3,
        forbidden_words=("red", "blue"),
        beam_groups=2,
        diversity=0.3,
        temperature=0.9,
        seed=5,
    )
    saved = make_checkpoint(decoding=options)
    checkpoint.write(tmp_path, saved, "the card: ü")
    found = checkpoint.read(tmp_path)
    for name in ("encoder", "encoder_sha256", "decoder", "decoding", "training", "export"):
        assert getattr(found, name) == getattr(saved, name)
    assert found.vocabulary.to_json() == saved.vocabulary.to_json()
    assert equal(found.decoder_state, saved.decoder_state)
    assert found.encoder_state is not None
    assert equal(found.encoder_state, saved.encoder_state or {})
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "the card: ü"
    described = checkpoint.read(tmp_path, weights=False)
    assert (described.decoder_state, described.encoder_state) == ({}, {})
    assert described.training == saved.training
    checkpoint.write(tmp_path, replace(saved, encoder_state=None), "")
    assert checkpoint.read(tmp_path).encoder_state is None
    assert checkpoint.read(tmp_path, weights=False).encoder_state is None


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "irnn"])
@pytest.mark.parametrize("norm", ["standard", "sqrt", "none"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_shapes_are_those_of_the_network(cell: Any, norm: Any, layers: int) -> None:
    config = DecoderConfig(cell, hidden_size=6, embedding_size=4, layers=layers, feature_norm=norm)
    state = Decoder(config, 9).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == checkpoint.decoder_shapes(config, 9)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_the_files_are_those_of_the_field(folder: Path) -> None:
    from tokenizers import Tokenizer

    assert contents(folder).keys() == FILES
    ids = Tokenizer.from_file(str(folder / TOKENIZER)).encode("A red CIRCLE.").tokens
    assert ids == ["[start]", "a", "red", "circle", "[end]"]
    assert all(name.startswith(("decoder.", "encoder.")) for name in load_file(folder / WEIGHTS))


# Altered files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, CONFIG])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    fails(folder, f"{name}.*(fetch it again|train.py writes one to OUTPUT/best)")


def test_a_model_without_its_card_is_complete(folder: Path) -> None:
    (folder / CARD).unlink()
    Captioner.from_pretrained(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_altered_byte_is_found(folder: Path, name: str, place: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (folder / name).write_bytes(content)
    fails(folder, rf"model/{name}: altered, or of another model \(SHA-256 \w+, config.json says \w+\); fetch")


def test_a_file_cut_short_is_found(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    fails(folder, f"{WEIGHTS}: altered")


def test_the_vocabulary_of_another_model_is_found(folder: Path) -> None:
    other = Vocabulary.build(["completely different words"], min_count=1)
    other.save(folder / TOKENIZER)
    fails(folder, f"{TOKENIZER}: altered, or of another model")
    alter_config(folder, "sha256", TOKENIZER, to=files.sha256(folder / TOKENIZER))
    fails(folder, rf"{TOKENIZER}: has {len(other)} words, the model was trained with \d+; fetch")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged, not JSON"),
        (b'{"model_type": "capt', "damaged, not JSON"),
        (b"\xff\xfe{}", "damaged, not JSON"),
        (b'{"model_type": ' + b"[" * 100_000, "damaged, not JSON"),
        (b"[]", "not of a model of captioner"),
        (b'{"model_type": "vit"}', "not of a model of captioner"),
    ],
)
def test_a_config_that_is_none_is_named(folder: Path, content: bytes, said: str) -> None:
    (folder / CONFIG).write_bytes(content)
    fails(folder, f"model/{CONFIG}: {said}")


def test_another_format_says_which_version_wrote_it(folder: Path) -> None:
    alter_config(folder, "format", to=2)
    alter_config(folder, "captioner_version", to="7.8.9")
    fails(folder, rf"{CONFIG}: is format 2, this captioner \S+ reads 1; install captioner 7\.8\.9")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (("encoder",), "has no 'encoder'"),
        (("encoder", "weights_sha256"), "has no 'weights_sha256'"),
        (("encoder", "stored"), "has no 'stored'"),
        (("decoder",), "has no 'decoder'"),
        (("decoding",), "has no 'decoding'"),
        (("sha256",), "has no 'sha256'"),
        (("vocabulary_size",), "has no 'vocabulary_size'"),
        (("training",), "has no 'training'"),
    ],
)
def test_a_key_that_is_lacking_is_named(folder: Path, where: tuple[str, ...], said: str) -> None:
    alter_config(folder, *where)
    fails(folder, rf"{CONFIG}: not what captioner \S+ writes \({said}\); correct it, or fetch the model again")


@pytest.mark.parametrize(
    ("where", "to", "said"),
    [
        (("encoder", "name"), "vgg99", "encoder.name is 'vgg99'; expected one of"),
        (("decoder", "cell"), "transformer", "decoder.cell is 'transformer'"),
        (("decoder", "hidden_size"), "many", "decoder.hidden_size is 'many'; expected a whole number"),
        (("decoder", "hidden_size"), 16.0, "decoder.hidden_size is 16.0; expected a whole number"),
        (("decoder", "layers"), True, "decoder.layers is True; expected a whole number"),
        (("decoder", "dropout"), "0", "decoder.dropout is '0'; expected a number"),
        (("encoder", "weights"), 5, "encoder.weights is 5; expected a text"),
        (("encoder", "name"), ["tiny"], "encoder.name is .'tiny'.; expected one of"),
        (("encoder", "image_size"), 64.5, "encoder.image_size is 64.5; expected a whole number"),
        (("encoder", "weights_sha256"), 1, "encoder.weights_sha256 is 1; expected a text"),
        (("encoder", "stored"), "no", "encoder.stored is 'no'; expected true or false"),
        (("decoding", "forbidden_words"), [1], r"decoding.forbidden_words\[0\] is 1; expected a text"),
        (("decoding", "forbidden_words"), "red", "decoding.forbidden_words is 'red'; expected a list"),
        (("decoding", "seed"), "x", "decoding.seed is 'x'; expected a whole number"),
        (("decoding",), [["seed", 1]], "decoding is .*; expected an object"),
        (("decoder", "colour"), 3, "decoder.colour is unknown"),
        (("decoding", "beam_size"), 0, "beam_size is 0; expected 1 to 1000"),
        (("sha256",), 3, "sha256 is 3; expected an object"),
        (("training",), 3, "training is 3; expected an object"),
        (("vocabulary_size",), "x", "vocabulary_size is 'x'; expected a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_named(folder: Path, where: tuple[str, ...], to: Any, said: str) -> None:
    alter_config(folder, *where, to=to)
    fails(folder, rf"{CONFIG}: not what captioner \S+ writes \(.*{said}")


def test_a_whole_number_is_a_number_too(folder: Path) -> None:
    alter_config(folder, "decoding", "temperature", to=2)
    assert checkpoint.read(folder).decoding.temperature == 2


def test_a_missing_tensor_is_named(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["decoder.output.bias"]
    alter_tensors(folder, state)
    fails(folder, f"{WEIGHTS}: does not fit its config.json: output.bias is missing; fetch")


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    alter_config(folder, "decoder", "hidden_size", to=17)
    fails(folder, rf"{WEIGHTS}: does not fit its config.json: rnn.weight_ih_l0 is \(64, 8\) instead of \(68, 8\)")


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    alter_tensors(folder, load_file(folder / WEIGHTS) | {"decoder.surplus": torch.zeros(1)})
    fails(folder, f"{WEIGHTS}: .*surplus is unknown")


def test_tensors_of_the_encoder_are_compared_too(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    alter_tensors(folder, {name: value for name, value in state.items() if name != "encoder.features.0.weight"})
    fails(folder, f"{WEIGHTS}: tiny weights .* belong to another network: features.0.weight is missing; fetch")
    alter_tensors(folder, state | {"encoder.features.0.weight": torch.zeros(16, 3, 3, 3)})
    fails(folder, "was trained with other tiny weights")


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a file of the user was unpickled",))


def test_no_pickle_is_ever_loaded(folder: Path) -> None:
    for name in (WEIGHTS, TOKENIZER):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Trap()))
        alter_config(folder, "sha256", name, to=files.sha256(folder / name))
        with pytest.raises(Exception, match=name) as caught:
            Captioner.from_pretrained(folder)
        assert "cannot be read as weights" in str(caught.value) or "not a tokenizer.json" in str(caught.value)
        (folder / name).write_bytes(before)
        alter_config(folder, "sha256", name, to=files.sha256(folder / name))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):  # what other libraries would look for
        (folder / name).write_bytes(pickle.dumps(Trap()))
    Captioner.from_pretrained(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    fails(tmp_path / "nothing", r"nothing: no such model; give the folder of one, use the one in the box")
    with pytest.raises(CheckpointError, match="nothing: no such folder; expected a saved model or the output of train"):
        checkpoint.read(tmp_path / "nothing")
    (tmp_path / "file").touch()
    fails(tmp_path / "file", "no such folder")


# Settings of other versions ----------------------------------------------------------------------------------------


def test_settings_of_earlier_versions(folder: Path) -> None:
    """Those that mean nothing now are passed over, those that came later take their defaults."""
    before = checkpoint.read(folder)
    alter_config(folder, "decoding", "typical_p", to=0.9)
    alter_config(folder, "decoding", "precision", to="fp32")
    alter_config(folder, "decoding", "gnmt_alpha")
    alter_config(folder, "decoder", "dropout")
    alter_config(folder, "encoder", "weights")
    found = checkpoint.read(folder)
    assert found.decoding == before.decoding
    assert found.decoder == replace(before.decoder, dropout=DecoderConfig().dropout)
    assert found.encoder == replace(before.encoder, weights=EncoderConfig().weights)


def test_precision_is_not_saved_with_a_model(folder: Path) -> None:
    assert not {"precision", "typical_p"} & json.loads((folder / CONFIG).read_text())["decoding"].keys()


@pytest.mark.parametrize("newer", ["7.8.9", "0.10", "99.0rc1"])
def test_a_setting_of_a_later_version(folder: Path, newer: str) -> None:
    alter_config(folder, "decoder", "colour", to=3)
    fails(folder, r"\(decoder.colour is unknown\); correct it, or fetch the model again$")
    alter_config(folder, "captioner_version", to=newer)
    fails(folder, rf"\(decoder.colour is unknown, install captioner {re.escape(newer)}, which wrote it\)")


# Exported models ---------------------------------------------------------------------------------------------------


def make_exported(folder: Path, *, whole: bool) -> Checkpoint:
    """A model with graphs, whose weights are in 8 bits beside them, and, where it is whole, in 32 bits as well."""
    saved = make_checkpoint()
    state = {f"decoder.{name}": array for name, array in saved.decoder_state.items()}
    state |= {f"encoder.{name}": array for name, array in (saved.encoder_state or {}).items()}
    packed = pack({name: array.copy() for name, array in state.items()})
    packed["decoder.output.weight.step"][1] *= -1  # as a batch normalisation may turn it
    packed["decoder.output.weight"][1] *= -1
    packed["graphs.scale"] = np.ones(3, np.float32)
    (folder / "onnx").mkdir(parents=True)
    save_arrays(packed, folder / "onnx" / WEIGHTS)
    for name in (checkpoint.ENCODER_GRAPH, checkpoint.START_GRAPH, checkpoint.STEP_GRAPH):
        (folder / "onnx" / name).write_bytes(GRAPH)
    given = replace(saved, export={"precision": "int8", "scores_after": {"cider": 0.4}})
    checkpoint.write(folder, given if whole else replace(given, decoder_state={}), "")
    return given


#: A graph that does nothing, in ONNX's format.
GRAPH = b"\x3a\x00"


def rehash(folder: Path, name: str) -> None:
    """State the right hash of a file of an exported model."""
    config = json.loads((folder / CONFIG).read_text())
    (config["export"] if name.startswith("onnx/") else config)["sha256"][name] = files.sha256(folder / name)
    (folder / CONFIG).write_text(json.dumps(config))


def test_an_exported_model_comes_back(tmp_path: Path) -> None:
    given = make_exported(tmp_path / "model", whole=True)
    found = checkpoint.read(tmp_path / "model")
    assert equal(found.decoder_state, given.decoder_state)
    assert found.export is not None
    assert found.export["precision"] == "int8"
    assert set(found.export["sha256"]) == set(checkpoint.EXPORTED_FILES)
    assert checkpoint.foreign(tmp_path / "model") is None
    checkpoint.check_graphs(tmp_path / "model", found)


def test_the_weights_in_8_bits_are_enough(tmp_path: Path) -> None:
    given = make_exported(tmp_path / "model", whole=False)
    assert not (tmp_path / "model" / WEIGHTS).exists()
    found = checkpoint.read(tmp_path / "model")
    assert equal(found.decoder_state, tensors.unpack(pack(given.decoder_state)))
    assert found.encoder_state is not None
    assert equal(found.encoder_state, tensors.unpack(pack(given.encoder_state or {})))
    described = checkpoint.read(tmp_path / "model", weights=False)
    assert described.decoder_state == {}
    checkpoint.check_graphs(tmp_path / "model", described)


def test_weights_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    """They may be missing or damaged, as long as the graphs and their weights are there."""
    make_exported(tmp_path / "model", whole=True)
    (tmp_path / "model" / WEIGHTS).write_bytes(b"damaged")
    checkpoint.check_graphs(tmp_path / "model", checkpoint.read(tmp_path / "model", weights=False))
    (tmp_path / "model" / WEIGHTS).unlink()
    checkpoint.check_graphs(tmp_path / "model", checkpoint.read(tmp_path / "model", weights=False))
    with pytest.raises(CheckpointError, match=rf"model/{WEIGHTS}: missing"):
        checkpoint.read(tmp_path / "model")


def test_a_model_that_was_not_exported(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, make_checkpoint(), "")
    with pytest.raises(CheckpointError, match=r"was not exported for onnxruntime; run `captioner export .*`$"):
        checkpoint.check_graphs(tmp_path, checkpoint.read(tmp_path, weights=False))


@pytest.mark.parametrize("name", checkpoint.EXPORTED_FILES)
def test_a_file_of_the_graphs_is_missing_or_altered(tmp_path: Path, name: str) -> None:
    make_exported(tmp_path, whole=True)
    saved = checkpoint.read(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name}: altered, or of another model"):
        checkpoint.check_graphs(tmp_path, saved)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        checkpoint.check_graphs(tmp_path, saved)


def test_graphs_of_a_stranger(tmp_path: Path) -> None:
    make_exported(tmp_path, whole=True)
    (tmp_path / "onnx" / checkpoint.STEP_GRAPH).write_bytes(b"\x3a\x08\x0a\x06\x22\x04Loop")
    rehash(tmp_path, f"onnx/{checkpoint.STEP_GRAPH}")
    with pytest.raises(CheckpointError, match=r"decoder_model.onnx: .* \(the operator 'Loop', which captioner do"):
        checkpoint.check_graphs(tmp_path, checkpoint.read(tmp_path))
    (tmp_path / "onnx" / checkpoint.STEP_GRAPH).write_bytes(GRAPH)
    rehash(tmp_path, f"onnx/{checkpoint.STEP_GRAPH}")
    state = load_arrays(tmp_path / "onnx" / WEIGHTS)
    save_arrays(state | {"graphs.scale": np.array([1, np.nan], np.float32)}, tmp_path / "onnx" / WEIGHTS)
    rehash(tmp_path, f"onnx/{WEIGHTS}")
    with pytest.raises(CheckpointError, match=r"onnx/model.safetensors: graphs.scale holds numbers that are not fi"):
        checkpoint.check_graphs(tmp_path, checkpoint.read(tmp_path))


def test_only_the_files_of_an_export_are_replaced_with_it(tmp_path: Path) -> None:
    make_exported(tmp_path / "model", whole=True)
    (tmp_path / "model" / "onnx" / "thesis.tex").touch()
    assert checkpoint.foreign(tmp_path / "model") == "onnx/thesis.tex"


# Hostile and damaged models ----------------------------------------------------------------------------------------


def refused(folder: Path, said: str) -> None:
    """A model ends in one line, soon and without memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(CheckpointError, match=said) as caught:
            checkpoint.read(folder)
        assert time.process_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model that no network of torch has made."""
    (tmp_path / "plain").mkdir()
    checkpoint.write(tmp_path / "plain", make_checkpoint(), "")
    return tmp_path / "plain"


@pytest.mark.parametrize("size", [2**62, 10**19, 10**9, 10**300])
@pytest.mark.parametrize(
    "where", ["encoder.image_size", "decoder.hidden_size", "decoder.embedding_size", "decoder.layers"]
)
def test_sizes_beyond_reason(plain: Path, where: str, size: int) -> None:
    alter_config(plain, *where.split("."), to=size)
    refused(plain, rf"{where} is 1?[0-9]+(\.\.\.)?; expected ([0-9,]+ at most|a whole number)")


@pytest.mark.parametrize(
    ("where", "to", "said"),
    [
        ("decoder.hidden_size", 8, r"rnn.weight_ih_l0 is \(21, 5\) instead of \(24, 5\)"),
        ("decoder.hidden_size", 60_000, r"rnn.weight_ih_l0 is \(21, 5\) instead of \(180000, 5\)"),
        ("decoder.hidden_size", 0, "decoder.hidden_size is 0; expected 1 or more"),
        ("decoder.hidden_size", -(2**62), "decoder.hidden_size is -4611686018427387904; expected 1 or more"),
        ("decoder.embedding_size", 60_000, r"embedding.weight is \([0-9]+, 5\) instead of \([0-9]+, 60000\)"),
        ("decoder.layers", 3, "rnn.weight_ih_l2 is missing"),
        ("decoder.layers", 1, "rnn.[a-z_]+_l1 is unknown"),
        ("decoder.layers", 64, "it has [0-9]+ tensors, too few for 64 layers"),
        ("decoder.cell", "lstm", "rnn.weight_ih_l0 is"),
        ("decoder.feature_norm", "standard", "standard.mean is missing"),
        ("decoder.dropout", float("nan"), "decoder.dropout is nan"),
        ("decoder.dropout", 10**400, r"decoder.dropout is 10{59}\.\.\.; expected a number"),
        ("vocabulary_size", 10**19, r"embedding.weight is .* instead of \(10000000000000000000, 5\)"),
        ("vocabulary_size", -1, "embedding.weight is .* instead of .-1, 5."),
        ("decoding.beam_size", 10**19, "beam_size is 10000000000000000000; expected 1 to 1000"),
        ("decoding.max_words", 2**62, "max_words is 4611686018427387904; expected 1 to 500"),
        ("decoding.forbidden_words", [["red"]], r"decoding.forbidden_words\[0\] is .*; expected a text"),
        ("encoder.weights", {}, "encoder.weights is {}; expected a text"),
        ("encoder.\x1b[31m", 1, r"encoder\..x1b.31m is unknown"),
        ("encoder.name", "\x1b[31m\u202egg", r"encoder.name is '.x1b.31m.u202egg'; expected one of"),
        ("format", "\x1b[31m", r"is format '.x1b.31m'"),
        ("sha256", {TOKENIZER: 5}, "sha256.tokenizer.json is 5; expected a text"),
        ("sha256", {}, "missing|altered, or of another model"),
        ("training", [], "training is \\[\\]; expected an object"),
        ("training.scores", [0.5], r"training.scores is \[0.5\]; expected an object"),
        ("training.scores", {"cider": "x\n\x1b"}, "training.scores.cider is .*; expected a number"),
        ("training.data", 5, "training.data is 5; expected a text"),
        ("training.epoch", "many", "training.epoch is 'many'; expected a whole number"),
        ("training.start", 5, "training.start is 5; expected a text"),
        ("export", 5, "export is 5; expected an object"),
        ("export", {"precision": 8}, "export.precision is 8; expected one of int8, fp32"),
        (
            "export",
            {"scores_after": {"cider": None}},
            "export.scores_after.cider is null; expected a number",
        ),
    ],
)
def test_hostile_settings(plain: Path, where: str, to: Any, said: str) -> None:
    alter_config(plain, *where.split("."), to=to)
    refused(plain, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model_type": "captioner", "format": ' + b"1" * 5000 + b"}", "damaged, not JSON"),
        (b'{"model_type": ' + b"[" * 500 + b"]" * 500 + b"}", "damaged, not JSON .nested too deeply"),
        (b'{"model_type": ' + b'{"a":' * 100_000, "damaged, not JSON .nested too deeply"),
        (b'{"model_type": "captioner", "model_type": "x"}', "damaged, not JSON .the key 'model_type' twice"),
        (b"\x00" * 100, "damaged, not JSON"),
        (b'"' + b"x" * (17 << 20) + b'"', "damaged, not JSON .more than 16,777,216 bytes"),
    ],
)
def test_hostile_json(plain: Path, content: bytes, said: str) -> None:
    (plain / CONFIG).write_bytes(content)
    refused(plain, said)


def packed_wrongly(steps: Any) -> dict[str, Any]:
    """An output layer in 8 bits, with other steps than it could have."""
    shape = checkpoint.decoder_shapes(make_checkpoint().decoder, len(make_checkpoint().vocabulary))["output.weight"]
    return {"decoder.output.weight": np.ones(shape, np.int8), "decoder.output.weight.step": steps}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda old: {"decoder.output.bias": old.astype(np.float64)}, "output.bias is float64 instead of float32"),
        (lambda old: {"decoder.output.bias": old.astype(np.float16)}, "output.bias is float16 instead of float32"),
        (lambda old: {"decoder.output.bias": old.astype(np.int64)}, "output.bias is int64 instead of float32"),
        (lambda old: {"decoder.output.bias": old.astype(np.int8)}, "output.bias is int8 instead of float32"),
        (lambda old: {"decoder.output.bias": old.astype(np.complex64)}, "output.bias is complex64 instead of float32"),
        (lambda old: {"decoder.output.bias": old[None]}, r"output.bias is \(1, [0-9]+\) instead of"),
        (lambda old: {"decoder.output.bias": old * np.nan}, "decoder.output.bias holds numbers that are not finite"),
        (lambda old: {"decoder.output.bias": old + np.inf}, "decoder.output.bias holds numbers that are not finite"),
        (lambda old: {"encoder.conv.weight": np.zeros((2, 2), np.int32)}, "conv.weight is int32 instead of float32"),
        (
            lambda old: {"encoder.conv.weight": np.full((2, 2), np.inf, "f4")},
            "conv.weight holds numbers that are not",
        ),
        (lambda old: {"encoder.norm.num_batches_tracked": np.ones(())}, "tracked is float64 instead of int64"),
        (lambda old: {"decoder.\x1b[31m": old}, r".x1b.31m is unknown"),
        (lambda old: {"other": old}, "other is unknown"),
        (lambda old: {"decoder.output.weight.step": old}, "output.weight is float32 instead of int8"),
        (lambda old: {"decoder.output.bias.step": old[:1]}, "output.bias is float32 instead of int8"),
        (
            lambda old: packed_wrongly(old[:1]),
            r"output.weight.step is \(1,\) of float32 instead of \([0-9]+,\)",
        ),
        (lambda old: packed_wrongly(old.astype(np.int32)), "output.weight.step is .* of int32 instead of"),
        (lambda old: packed_wrongly(old * np.nan), "output.weight.step holds numbers that are not finite"),
        (lambda old: {"decoder.none.step": old}, "none.step is unknown"),
        (
            lambda old: {f"decoder.{n}": old for n in range(2000)},
            "0 is unknown; 1 is .* and 1997 more",
        ),
    ],
)
def test_hostile_tensors(plain: Path, change: Callable[[Any], dict[str, Any]], said: str) -> None:
    state = load_arrays(plain / WEIGHTS)
    save_arrays(state | change(state["decoder.output.bias"]), plain / WEIGHTS)
    rehash(plain, WEIGHTS)
    refused(plain, said)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, TOKENIZER])
def test_other_things_than_files(plain: Path, name: str) -> None:
    (plain / name).unlink()
    os.mkfifo(plain / name)  # which nobody writes to: reading it would last for ever
    refused(plain, f"{name}: missing|it has no {name}")
    (plain / name).unlink()
    (plain / name).mkdir()
    refused(plain, f"{name}: missing|it has no {name}")
    (plain / name).rmdir()
    (plain / name).symlink_to("/dev/zero")
    refused(plain, f"{name}: missing|it has no {name}")
    (plain / name).unlink()
    (plain / name).symlink_to(name)
    refused(plain, f"{name}: missing|it has no {name}")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, TOKENIZER])
def test_files_of_terabytes(plain: Path, name: str) -> None:
    with (plain / name).open("r+b") as file:
        file.truncate(1 << 40)  # of which the disk holds nothing
    refused(plain, f"{name}: has 1,099,511,627,776 bytes; expected|more than 16,777,216 bytes")


def test_a_card_is_never_read(plain: Path) -> None:
    (plain / CARD).write_bytes(b"\xff\x1b[31m")
    checkpoint.read(plain)


def test_a_model_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"training\.epoch is 'x'; expected a whole number"):
        checkpoint.write(tmp_path, make_checkpoint(training={"epoch": "x"}), "")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([CONFIG, TOKENIZER, WEIGHTS]),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4
    ),
)
def test_mutated_models_raise_nothing_else(plain: Path, name: str, edits: list[tuple[float, bytes]]) -> None:
    """Bytes of a file are replaced, its hash is right, and nothing but a line of text comes out."""
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    content = bytearray(before[name])
    header = min(len(content), 2500)  # of the weights, what describes them
    for place, new in edits:
        at = int(place * header)
        content[at : at + len(new)] = new
    try:
        (plain / name).write_bytes(content)
        if name != CONFIG:
            rehash(plain, name)
        with contextlib.suppress(CaptionerError):
            checkpoint.read(plain)
    finally:
        for other, old in before.items():
            (plain / other).write_bytes(old)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.sampled_from(
        "encoder decoder decoding training export sha256 format vocabulary_size encoder.name encoder.weights "
        "encoder.image_size decoder.cell decoder.layers decoder.hidden_size decoder.dropout decoding.beam_size "
        "decoding.forbidden_words decoding.seed training.scores training.epoch sha256.tokenizer.json".split()
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_value_raises_nothing_else(plain: Path, where: str, value: Any) -> None:
    before = (plain / CONFIG).read_bytes()
    config = json.loads(before)
    group, _, key = where.partition(".")
    if key:
        config[group][key] = value
    else:
        config[group] = value
    try:
        (plain / CONFIG).write_text(json.dumps(config))
        model_card(checkpoint.read(plain))
    except CaptionerError as error:
        line = str(error)
        assert line.isprintable()
    finally:
        (plain / CONFIG).write_bytes(before)


def test_a_model_is_read_without_torch_and_other_libraries(tmp_path: Path) -> None:
    make_exported(tmp_path / "model", whole=False)
    code = (
        "import sys\n"
        "for name in 'torch torchvision tokenizers huggingface_hub onnx jaxtyping safetensors.torch'.split():\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from captioner import checkpoint, hub, errors\n"
        "from captioner.vocabulary import Vocabulary\n"
        "folder = hub.find(sys.argv[1])\n"
        "saved = checkpoint.read(folder)\n"
        "checkpoint.check_graphs(folder, checkpoint.read(folder, weights=False))\n"
        "checkpoint.write(folder, saved, '')\n"
        "print(len(checkpoint.read(hub.find('mini')).decoder_state), len(saved.decoder_state))\n"
        "for ask in (lambda: hub.find('owner/model'), lambda: hub.model_card(saved), lambda: hub.push(print, 'a/b')):\n"
        "    try:\n"
        "        ask()\n"
        "    except errors.CaptionerError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        cwd=Path(checkpoint.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    remedy = "huggingface_hub is not installed; pip install 'captioner[train]'"
    counts, *errors = done.stdout.splitlines()
    assert counts == f"12 {len(checkpoint.decoder_shapes(make_checkpoint().decoder, 1))}"
    assert errors == [
        f"owner/model: no such model here, nor can the Hugging Face Hub be asked: {remedy}",
        remedy,
        remedy,
    ]


# Saving ------------------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> set[str]:
    """What lies beside a saved model, but for the lock."""
    return {path.name for path in folder.parent.iterdir()} - {folder.name, f".{folder.name}.lock", "home"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that is full: no file can grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, 100_000])  # the first file fails, the tokenizer, the weights
def test_the_old_model_survives_a_write_that_fails(folder: Path, size: int) -> None:
    before = contents(folder)
    with (
        largest_file(size),
        pytest.raises(CheckpointError, match=r"model: cannot be saved .* that was there before is kept; choose a"),
    ):
        make_model(seed=1).save_pretrained(folder)
    assert contents(folder) == before
    assert not leftovers(folder)
    make_model(seed=1).save_pretrained(folder)
    assert contents(folder) != before


def test_a_first_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(CheckpointError, match="cannot be saved") as caught:
        make_model().save_pretrained(tmp_path / "model")
    assert "is kept" not in str(caught.value)
    assert not (tmp_path / "model").exists()
    assert not leftovers(tmp_path / "model")


def save_half(folder: Path, error: BaseException) -> None:
    """Begin to save, and fail."""
    with checkpoint.replacing(folder) as new:
        (new / WEIGHTS).write_bytes(b"half of")
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_the_middle(folder: Path, error: Exception) -> None:
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"No space left on device.*is kept; make room and run again"):
        save_half(folder, error)
    assert contents(folder) == before
    assert not leftovers(folder)


def test_what_a_link_leads_to_is_replaced(folder: Path, tmp_path: Path) -> None:
    link, before = tmp_path / "links" / "link", contents(folder)
    link.parent.mkdir()
    link.symlink_to(folder)
    for seed in (1, 2):
        make_model(seed=seed).save_pretrained(link)
        assert link.is_symlink()
        assert contents(link) == contents(folder) != before
        before = contents(folder)
    folder.rename(folder.parent / f".{folder.name}.old")  # killed between the renames
    assert contents(Captioner.from_pretrained(link) and link) == before
    assert list(link.parent.iterdir()) == [link]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"loop: cannot be saved \(.+\); choose a folder that can be written and"):
        make_model().save_pretrained(tmp_path / "loop")


def test_an_error_in_the_block_is_passed_on(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        save_half(folder, KeyboardInterrupt())
    assert contents(folder) == before
    assert not leftovers(folder)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    before = contents(folder)
    rename, calls = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match=r"Operation not permitted.*is kept"):
        make_model(seed=1).save_pretrained(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert not leftovers(folder)


def test_killed_between_the_renames(folder: Path) -> None:
    """What a process leaves that is killed after the old folder moved away and before the new one came."""
    before = contents(folder)
    (folder.parent / f".{folder.name}.new").mkdir()
    folder.rename(folder.parent / f".{folder.name}.old")
    Captioner.from_pretrained(folder)
    assert contents(folder) == before

    folder.rename(folder.parent / f".{folder.name}.old")
    assert checkpoint.recover(folder)
    assert contents(folder) == before

    folder.rename(folder.parent / f".{folder.name}.old")
    make_model(seed=1).save_pretrained(folder)
    assert contents(folder) != before
    assert not leftovers(folder)
    assert not checkpoint.recover(folder.parent / "another")


def test_killed_after_the_renames(folder: Path) -> None:
    before = contents(folder)
    old = folder.parent / f".{folder.name}.old"
    old.mkdir()
    (old / CONFIG).touch()
    assert checkpoint.recover(folder)
    assert contents(folder) == before
    make_model(seed=1).save_pretrained(folder)
    assert not leftovers(folder)


def _save_often(folder: Path, text: str) -> None:
    for _ in range(20):
        with checkpoint.replacing(folder) as new:
            for name in ("one", "two"):
                (new / name).write_text(text)


def test_two_processes_that_save_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_often, args=(folder, text)) for text in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(set(contents(folder).values())) == 1  # both files of the same one
    assert not leftovers(folder)


def test_a_model_that_is_replaced_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json is the old one's, its other files are the new one's: it is read again."""
    new = make_model(seed=1)
    read_config, calls = checkpoint._read_config, []

    def replace_after(where: Path) -> dict[str, Any]:
        config = read_config(where)
        calls.append(where)
        if len(calls) == 1:
            new.save_pretrained(folder)
        return config

    monkeypatch.setattr(checkpoint, "_read_config", replace_after)
    found = checkpoint.read(folder)
    assert weights.fingerprint(found.decoder_state) == weights.fingerprint(new.engine.decoder.state_dict())
    assert len(calls) == 2


def test_reading_while_another_saves(folder: Path) -> None:
    """A model is never half the old one and half the new one."""
    models = [make_model(seed=seed) for seed in (0, 1)]
    hashes = {weights.fingerprint(model.engine.decoder.state_dict()) for model in models}
    stop = threading.Event()
    failures: list[Exception] = []

    def save() -> None:
        try:
            while not stop.is_set():
                for model in models:
                    model.save_pretrained(folder)
        except CheckpointError as error:
            failures.append(error)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        found = {weights.fingerprint(checkpoint.read(folder).decoder_state) for _ in range(40)}
    finally:
        stop.set()
        writer.join()
    assert not failures
    assert found <= hashes


def test_only_a_model_is_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "thesis.tex").write_text("three years of work")
    with pytest.raises(CheckpointError, match=r"files that are not of a model \(thesis.tex\); choose another"):
        make_model(seed=1).save_pretrained(folder)
    assert (folder / "thesis.tex").read_text() == "three years of work"
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=r"not of a model \(a file\)"):
        make_model().save_pretrained(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    make_model().save_pretrained(tmp_path / "empty")
    make_model().save_pretrained(str(tmp_path / "a" / "b" / "model"))
    assert contents(tmp_path / "empty").keys() == contents(tmp_path / "a" / "b" / "model").keys() == FILES


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model: cannot be saved \(.*\)"):
        make_model().save_pretrained(tmp_path / "file" / "model")


def test_spoil_is_noticed_only_in_files_that_matter(folder: Path) -> None:
    spoil(folder / CARD, b"Image captioning", b"My own words")
    Captioner.from_pretrained(folder)

"""A saved model comes back as it was, or an error says which file is at fault; saving never loses what was there."""

import errno
import json
import multiprocessing
import pickle
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SENTENCES, isolated, make_model, spoil  # noqa: F401
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from captioner import checkpoint, files
from captioner.checkpoint import CARD, CONFIG, TOKENIZER, WEIGHTS, Checkpoint
from captioner.config import DecoderConfig, DecodingOptions, EncoderConfig
from captioner.errors import CheckpointError
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
        (("encoder", "name"), ["tiny"], "encoder.name is .'tiny'.; expected a text"),
        (("encoder", "image_size"), 64.5, "encoder.image_size is 64.5; expected a whole number"),
        (("encoder", "weights_sha256"), 1, "encoder.weights_sha256 is 1; expected a text"),
        (("encoder", "stored"), "no", "encoder.stored is 'no'; expected true or false"),
        (("decoding", "forbidden_words"), [1], "decoding.forbidden_words is .1.; expected a list of texts"),
        (("decoding", "forbidden_words"), "red", "decoding.forbidden_words is 'red'; expected a list of texts"),
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
    assert weights.fingerprint(found.decoder_state) == weights.fingerprint(new.decoder.state_dict())
    assert len(calls) == 2


def test_reading_while_another_saves(folder: Path) -> None:
    """A model is never half the old one and half the new one."""
    models = [make_model(seed=seed) for seed in (0, 1)]
    hashes = {weights.fingerprint(model.decoder.state_dict()) for model in models}
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
    with pytest.raises(CheckpointError, match=r"holds what is not of a model \(thesis.tex\); choose another folder"):
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

"""A model is put together, saved, found again and shared; and it says so where its parts are not to be had."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import ENCODER, isolated, make_model, make_photo  # noqa: F401
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import save_file

from captioner import Captioner, checkpoint
from captioner.checkpoint import CARD, CONFIG, TOKENIZER, WEIGHTS
from captioner.config import DecodingOptions
from captioner.errors import CheckpointError, ImageError, WeightsError
from captioner.networks import weights
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchEngine

#: Loads in arithmetic that gives the same captions as the model that was saved.
load = partial(Captioner.from_pretrained, device="cpu", precision="fp32")

FILES = {WEIGHTS, CONFIG, TOKENIZER, CARD}


def shake(encoder: Encoder) -> dict[str, torch.Tensor]:
    """The weights of an encoder, changed a little."""
    random = torch.Generator().manual_seed(7)
    return {
        name: (tensor + 0.1 * torch.rand(tensor.shape, generator=random)).contiguous()
        for name, tensor in encoder.body.state_dict().items()
        if tensor.is_floating_point()
    }


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return [
        make_photo(tmp_path / f"{n}.png", colour) for n, colour in enumerate([(250, 0, 0), (0, 0, 90), (9, 200, 9)])
    ]


@pytest.fixture
def by_reference(tmp_path: Path) -> tuple[Captioner, Path]:
    """A model that names a file with the weights of its encoder."""
    path = tmp_path / "cnn.safetensors"
    save_file(shake(Encoder(ENCODER)), path)
    model = make_model(replace(ENCODER, weights=str(path)))
    model.save_pretrained(tmp_path / "model")
    return model, path


def sentences(model: Captioner, photos: Sequence[Path]) -> list[str]:
    return [str(model.caption(photo)) for photo in photos]


# Captioning --------------------------------------------------------------------------------------------------------


def test_a_photo_is_a_path_a_name_or_an_image(photos: list[Path]) -> None:
    model = make_model()
    found = model.caption(photos[0])
    assert found == model.caption(str(photos[0])) == model.caption(Image.open(photos[0]))
    assert str(found) == found.text == " ".join(found.tokens).replace(" n't", "n't").replace(" 's", "'s")
    assert found.logprob < 0
    assert not set(found.tokens) & {"[pad]", "[start]", "[end]", "[unk]"}
    assert len({*sentences(model, photos)}) > 1  # it looks


def test_the_name_of_an_engine_tells_precisions_apart() -> None:
    engines = [
        Captioner.from_pretrained("mini", engine="torch", device="cpu", precision=name) for name in ("fp32", "bf16")
    ]
    names = [captioner.engine_name for captioner in [Captioner.from_pretrained("mini"), *engines]]
    assert names == ["onnx", "torch, float32", "torch, bfloat16"]


def test_options_are_the_models_own_unless_given(photos: list[Path]) -> None:
    model = make_model(options=DecodingOptions(max_words=2, min_words=2))
    assert len(model.caption(photos[0]).tokens) == 2
    longer = model.caption(photos[0], DecodingOptions(max_words=7, min_words=7))
    assert len(longer.tokens) == 7
    features = model.features(np.zeros((2, 3, 32, 32), np.uint8))
    found = model.describe(features, DecodingOptions(num_captions=3, max_words=4))
    assert [len(captions) for captions in found] == [3, 3]
    assert [c.logprob for c in found[0]] == sorted((c.logprob for c in found[0]), reverse=True)


def test_a_caption_says_whether_it_was_cut(photos: list[Path]) -> None:
    for bias, finished in ((-30.0, False), (30.0, True)):
        model = make_model(options=DecodingOptions(max_words=3))
        network = model.engine
        with torch.no_grad():
            network.decoder.output.bias[model.vocabulary.end] = bias
        changed = Captioner(TorchEngine(network.encoder, network.decoder, "fp32"), model.vocabulary, model.options)
        assert changed.caption(photos[0]).finished == finished


def test_what_is_no_photo(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(ImageError, match=r"text.jpg: not a photo"):
        make_model().caption(tmp_path / "text.jpg")
    with pytest.raises(ImageError, match=r"nothing.jpg: no such file"):
        make_model().caption(tmp_path / "nothing.jpg")


# Saved and loaded --------------------------------------------------------------------------------------------------


def test_the_same_captions_after_saving(tmp_path: Path, photos: list[Path]) -> None:
    model = make_model(options=DecodingOptions(max_words=5, beam_size=2), epoch=3, scores={"cider": 0.5})
    model.save_pretrained(tmp_path / "model")
    found = load(tmp_path / "model")
    assert [found.caption(photo) for photo in photos] == [model.caption(photo) for photo in photos]
    assert found.options == model.options
    assert found.training == model.training
    found.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    assert sentences(load(str(tmp_path / "elsewhere")), photos) == sentences(model, photos)


def test_random_weights_are_stored(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    saved = checkpoint.read(tmp_path / "model")
    assert saved.encoder_state is not None
    assert weights.fingerprint(saved.encoder_state) == saved.encoder_sha256 == Encoder(ENCODER).weights_sha256


def test_a_fine_tuned_encoder_stays_with_its_model(by_reference: tuple[Captioner, Path], photos: list[Path]) -> None:
    """Also after it was loaded, and saved again: nobody else has these weights."""
    model, path = by_reference
    tuned = Encoder(model.engine.encoder.config, trainable=True)
    tuned.body.load_state_dict(shake(tuned), strict=False)
    tuned.eval()
    engine = TorchEngine(tuned, model.engine.decoder, "fp32")
    first = Captioner(engine, model.vocabulary, model.options)
    first.save_pretrained(path.parent / "first")
    second = load(path.parent / "first")
    second.save_pretrained(path.parent / "second")
    path.unlink()
    third = load(path.parent / "second")
    assert sentences(first, photos) == sentences(second, photos) == sentences(third, photos)
    assert third.engine.encoder.weights_sha256 != model.engine.encoder.weights_sha256


def test_known_weights_are_stored_by_reference(by_reference: tuple[Captioner, Path], photos: list[Path]) -> None:
    model, path = by_reference
    saved = checkpoint.read(path.parent / "model")
    assert saved.encoder_state is None
    assert saved.encoder.weights == str(path)
    assert sentences(load(path.parent / "model"), photos) == sentences(model, photos)


def test_weights_that_have_moved(by_reference: tuple[Captioner, Path], photos: list[Path]) -> None:
    model, path = by_reference
    folder, moved = path.parent / "model", path.with_name("moved.safetensors")
    path.rename(moved)
    with pytest.raises(WeightsError, match="no such weight file for tiny") as caught:
        load(folder)
    assert str(caught.value) == (
        f"{path}: no such weight file for tiny, which {folder} was trained with; give a file of these weights "
        f"(SHA-256 {model.engine.encoder.weights_sha256[:12]}) with --encoder.weights FILE, or use the model in the "
        "box: --model mini"
    )
    with pytest.raises(
        WeightsError, match=r"other.pth: no such weight file for tiny; give a .safetensors or .pth file"
    ):
        load(folder, encoder_weights="other.pth")
    found = load(folder, encoder_weights=str(moved))
    assert sentences(found, photos) == sentences(model, photos)
    found.save_pretrained(folder)  # and now it knows where they are
    assert sentences(load(folder), photos) == sentences(model, photos)


def test_weights_are_found_from_any_working_directory(
    by_reference: tuple[Captioner, Path], photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = by_reference
    (path.parent / "elsewhere").mkdir()
    monkeypatch.chdir(path.parent)
    model = make_model(replace(ENCODER, weights=path.name))
    model.save_pretrained("relative")
    monkeypatch.chdir("elsewhere")
    assert sentences(load("../relative"), photos) == sentences(model, photos)


def test_a_model_that_stores_its_encoder_takes_no_other(by_reference: tuple[Captioner, Path], tmp_path: Path) -> None:
    _, path = by_reference
    make_model().save_pretrained(tmp_path / "stored")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "stored", encoder_weights=str(path))
    assert str(caught.value) == (
        f"{tmp_path / 'stored'}: has the weights of its encoder in itself; leave out those given ({path})"
    )


def test_weights_in_another_format_are_the_same_weights(by_reference: tuple[Captioner, Path]) -> None:
    model, path = by_reference
    torch.save(model.engine.encoder.body.state_dict(), path.with_suffix(".pth"))
    found = load(path.parent / "model", encoder_weights=str(path.with_suffix(".pth")))
    assert found.engine.encoder.weights_sha256 == model.engine.encoder.weights_sha256


def test_other_weights_are_refused(by_reference: tuple[Captioner, Path]) -> None:
    model, path = by_reference
    save_file(shake(model.engine.encoder), path)
    with pytest.raises(CheckpointError, match=r"was trained with other tiny weights than those of .*--encoder.weights"):
        load(path.parent / "model")
    with pytest.raises(CheckpointError, match=r"was trained with other tiny weights than those of 'random'"):
        load(path.parent / "model", encoder_weights="random")


# Runs and the Hub --------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_means_its_best_model(tmp_path: Path, photos: list[Path]) -> None:
    best, last = make_model(seed=1), make_model(seed=2)
    assert sentences(best, photos) != sentences(last, photos)
    run = tmp_path / "run"
    best.save_pretrained(run / "best")
    (run / "config.json").write_text("{}")
    assert sentences(load(run), photos) == sentences(best, photos)
    last.save_pretrained(run / "last")
    assert sentences(load(run), photos) == sentences(best, photos)
    assert sentences(load(run / "last"), photos) == sentences(last, photos)
    (run / "best").rename(run / ".best.old")  # killed while the best was replaced
    assert sentences(load(run), photos) == sentences(best, photos)


def test_a_run_without_a_best_model(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "run" / "last")
    with pytest.raises(CheckpointError, match=r"run: has no best checkpoint yet; wait for its first validation"):
        load(tmp_path / "run")
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match=r"new: not a saved model, it has no config.json; train.py writes one"):
        load(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(json.dumps({"data": {}, "output": "new"}))
    with pytest.raises(CheckpointError, match=r"not of a model.*from its first validation on, in OUTPUT/best"):
        load(tmp_path / "new")


def test_a_name_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Path]) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "cache")
    asked: list[tuple[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["allow_patterns"]))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sentences(load("someone/dogs"), photos) == sentences(model, photos)
    ((name, patterns),) = asked
    assert name == "someone/dogs"
    assert {*FILES, "onnx/model.safetensors", "onnx/encoder_model.onnx"} <= {*patterns}
    assert all(pattern.endswith((".json", ".safetensors", ".onnx", "README.md")) for pattern in patterns)  # no code


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("Cannot find it\nand a second line"),
        errors.OfflineModeIsEnabled("Cannot find it"),
        errors.HFValidationError("Cannot find it"),
        OSError("Cannot find it"),
        RuntimeError("Cannot find it"),
    ],
)
def test_an_unknown_name_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(repo_id: str, **_: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        load("no/model")
    assert str(caught.value) == (
        "no/model: no such model here, nor on the Hugging Face Hub (Cannot find it); "
        'give the folder of one, use the one in the box ("mini"), or train one: python train.py shapes'
    )


@pytest.mark.parametrize(
    "name",
    ["nothing", "a/b/c", "../nothing", "/no/thing", "./no", "runs/coco", "here/model", "x" * 300],
)
def test_what_is_no_name_on_the_hub_is_not_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="no such model") as caught:
        load(name)
    assert re.fullmatch(
        rf"{name}: no such model( \(.+\))?; give the folder of one, .*\(\"mini\"\), .* python train.py shapes",
        str(caught.value),
    )


class Hub:
    """Stands in for the Hugging Face Hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.token: str | None = None
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, bytes] = {}

    def __call__(self, token: str | None = None) -> "Hub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.created = {"repo_id": repo_id, **options}
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert repo_id == self.created["repo_id"]
        assert commit_message
        self.uploaded = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_a_model_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    assert model.push_to_hub("me/dogs", private=True, token="secret") == "https://huggingface.co/me/dogs"
    assert hub.uploaded == {name: (tmp_path / "model" / name).read_bytes() for name in FILES}
    assert hub.created == {"repo_id": "me/dogs", "private": True, "exist_ok": True}
    assert hub.token == "secret"


@pytest.mark.parametrize("error", [OSError("No way"), RuntimeError("No way\nthere"), ValueError("No way")])
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(error))
    with pytest.raises(CheckpointError, match=r"^me/dogs: cannot be uploaded \(No way\); see `hf auth login`"):
        make_model().push_to_hub("me/dogs")

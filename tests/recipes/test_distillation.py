"""A student learns what its teacher sees, and a run that is stopped loses nothing."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import isolated, make_data, make_photo  # noqa: F401
from safetensors.torch import load_file
from test_teacher import Colours

from captioner.config import DataConfig, EncoderConfig
from captioner.datasets.annotations import load
from captioner.errors import CaptionerError, CheckpointError
from captioner.networks.encoder import Encoder
from recipes.mini import distillation
from recipes.mini.__main__ import main
from recipes.mini.distillation import Distiller, _augment, _mix, distil
from recipes.mini.presets import DistillationConfig
from recipes.mini.teacher import Views


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "Teacher", lambda path: Colours())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "pictures")


def configuration(pictures: Path, output: Path, **changes: Any) -> DistillationConfig:
    config = DistillationConfig(
        data=DataConfig(pictures),
        teacher=Path("colours.tflite"),
        output=output,
        photos=(pictures / "images",),
        views=2,
        view_size=64,
        sizes=(32, 64),
        epochs=2,
        batch_size=6,
        warmup_steps=2,
    )
    return replace(config, **changes)


def random_views(count: int = 8, scale: float = 0.1) -> Views:
    random = np.random.default_rng(0)
    answers = random.integers(256, size=(count, 1, 7, 7, 5), dtype=np.uint8)
    return Views(random.integers(256, size=(count, 1, 3, 64, 64), dtype=np.uint8), answers, scale)


def test_learns_what_the_teacher_sees(pictures: Path, tmp_path: Path) -> None:
    history = distil(configuration(pictures, tmp_path, epochs=12, view_size=32, sizes=(32,), learning_rate=5e-3))
    losses = [epoch["train_loss"] for epoch in history.epochs]
    assert losses[0] > 0.8  # at first the student says what the teacher says on average
    assert losses[-1] < 0.7 * losses[0]


def test_what_a_run_leaves_is_an_encoder(pictures: Path, tmp_path: Path) -> None:
    distil(configuration(pictures, tmp_path, epochs=1))
    weights = load_file(tmp_path / "encoder.safetensors")
    encoder = Encoder(EncoderConfig("mini", str(tmp_path / "encoder.safetensors"), 64))
    student = load_file(tmp_path / "last" / "student.safetensors")
    assert all(torch.equal(tensor, student[f"encoder.body.{name}"]) for name, tensor in weights.items())
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 4096)


def test_stopped_and_started_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole, parts = (configuration(pictures, tmp_path / name) for name in ("whole", "parts"))
    expected = distil(whole)
    with monkeypatch.context() as patch:
        epoch = Distiller._epoch

        def stop(self: Distiller) -> float:
            if self.history.epoch == 1:
                raise KeyboardInterrupt
            return epoch(self)

        patch.setattr(Distiller, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            distil(parts)
    torch.manual_seed(123)
    found = distil(parts)
    assert f"{parts.output / 'last'}: going on after epoch 1" in caplog.text
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    for name in ("encoder.safetensors", "last/student.safetensors", "last/training_state.safetensors"):
        assert (whole.output / name).read_bytes() == (parts.output / name).read_bytes()


def test_other_settings_need_another_folder(pictures: Path, tmp_path: Path) -> None:
    config = configuration(pictures, tmp_path, epochs=1)
    distil(config)
    with pytest.raises(CheckpointError, match=r"holds a run with other settings: learning_rate was 0\.002, now 0\.1"):
        distil(replace(config, learning_rate=0.1))
    (tmp_path / "config.json").write_text('{"optimisation": {}}')
    with pytest.raises(CheckpointError, match=r"config\.json: not the settings of a run .*; choose another --output"):
        distil(config)


def test_which_photos_are_learned_from(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of training and others, each once, but none of validation, and none that cannot be read."""
    caplog.set_level(logging.WARNING, "captioner")
    others = tmp_path / "others"
    others.mkdir()
    make_photo(others / "good.png")
    (others / "bad.png").write_bytes(b"rubbish")
    monkeypatch.chdir(pictures.parent)
    found = distillation._photos(
        configuration(pictures, tmp_path, photos=(others, pictures / "images", Path(pictures.name), others))
    )
    training = [example.path for example in load(pictures).split("train")]
    assert found == [*training, others / "good.png"]
    assert [record.message for record in caplog.records] == [
        f"left out: {others / 'bad.png'}: not a photo; expected JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
    ]
    assert configuration(pictures, tmp_path, seed=1).seed == 1
    with pytest.raises(CaptionerError, match="seed is -1; expected 0 or more"):
        configuration(pictures, tmp_path, seed=-1)


def test_photos_held_out_are_not_learned_from() -> None:
    config = DistillationConfig(DataConfig(Path("data")), Path("teacher"), Path("output"))
    run = Distiller(config, random_views(101))
    assert run.held_out.tolist() == [0, 50, 100]
    assert sorted([*run.photos, *run.held_out]) == list(range(101))
    with pytest.raises(CaptionerError, match="data: has one photo for training; a student needs more"):
        Distiller(config, random_views(1))


def test_the_loss_is_the_share_of_variance_that_is_not_explained() -> None:
    run = Distiller(DistillationConfig(DataConfig(Path("data")), Path("teacher"), Path("output")), random_views(200))
    photos = run.photos
    pixels, roots = run._batch(photos, np.zeros(len(photos), np.int64))
    answers = run.views.answers[photos, 0].transpose(0, 3, 1, 2) * run.views.scale
    assert torch.allclose(roots, torch.from_numpy(np.sqrt(answers)).float(), atol=1e-6)
    loss = run._loss(pixels, roots, (2, 1))
    assert torch.allclose(loss, torch.ones(2), atol=0.01)  # of one who always says the average


def test_augmentation_keeps_photo_and_answer_together() -> None:
    left = torch.zeros(64, 3, 72, 72)
    left[..., :36] = 200.0
    roots = torch.zeros(64, 1, 4, 4)
    roots[..., :2] = 1.0
    pixels, answers = _augment(left, roots, 64, np.random.default_rng(0))
    assert pixels.shape == (64, 3, 64, 64)
    assert 0 <= pixels.min() < pixels.max() <= 255
    brighter = pixels[..., :20].mean((1, 2, 3)) > pixels[..., -20:].mean((1, 2, 3))
    assert torch.equal(brighter, answers[:, 0, 0, 0] == 1)
    assert 10 < int(brighter.sum()) < 54  # some are mirrored
    assert len({round(float(photo.max())) for photo in pixels}) > 10  # and none is as bright as the next


def test_mixing_keeps_photo_and_answer_together() -> None:
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 56, 56)  # the number of the photo, at every place
    roots = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 7, 7)
    random = np.random.default_rng(0)
    shares = []
    for _ in range(40):
        mixed, answers = _mix(pixels, roots, random)
        assert torch.equal(mixed[:, :1, ::8, ::8], answers[:, :1])  # eight pixels are a place
        assert torch.equal(mixed[:, :1], answers[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3))
        photo = torch.arange(4)[:, None, None, None]
        assert bool(((answers == photo) | (answers == (photo - 1) % 4)).all())  # itself and its neighbour alone
        shares.append(float((answers == photo).float().mean()))
    assert 10 < sum(share == 1 for share in shares) < 30  # every other batch is as it was
    assert min(shares) < 0.3


def test_a_loss_that_is_no_number(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CaptionerError, match=r"^the loss is (nan|inf) at step \d+; what was saved before is kept: lower"
    ):
        distil(configuration(pictures, tmp_path, learning_rate=1e30, warmup_steps=0))
    assert not (tmp_path / "encoder.safetensors").exists()


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        f"--data {pictures} --teacher t.tflite --output {tmp_path} --views 1 --view-size 32 --sizes 32 --epochs 1"
    )
    assert main(["distil", *arguments.split()]) == 0
    assert "1 epochs: " in (said := capsys.readouterr().out)
    assert said.endswith(f"the CNN is in {tmp_path / 'encoder.safetensors'}\n")
    assert json.loads((tmp_path / "config.json").read_text())["sizes"] == [32]
    assert main(["distil", *arguments.split(), "--sizes", "64"]) == 2
    assert "error: sizes are (64,); expected numbers from 32 to view_size, 32" in capsys.readouterr().err

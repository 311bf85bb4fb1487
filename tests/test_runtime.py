"""Captioning without torch: the engine of onnxruntime, and the choice of an engine."""

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import isolated, make_model, make_photo  # noqa: F401 - fixtures

from captioner import CaptionerError, DecodingOptions
from captioner.export import export
from captioner.model import Captioner
from captioner.networks.inference import TorchEngine
from captioner.runtime import OnnxEngine

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "jaxtyping", "accelerate", "onnx", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "plain"
    make_model(options=DecodingOptions(beam_size=2, max_words=5)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "exported"
    shutil.copytree(saved, folder)
    export(folder, precision="fp32")
    return folder


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (9, 3, 192, 192)).astype(np.uint8)


def without_torch(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_model_in_the_box_needs_no_torch(tmp_path):
    code = "from captioner import Captioner; print(Captioner.from_pretrained().caption(sys.argv[1]))"
    done = without_torch(code, make_photo(tmp_path / "photo.jpg"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3


def test_a_model_that_was_not_exported_says_which_command_makes_it_fit(saved, exported, tmp_path):
    code = "from captioner.cli import main; sys.exit(main(sys.argv[1:]))"
    photo = make_photo(tmp_path / "photo.jpg")
    done = without_torch(code, "caption", photo, "--model", saved)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"captioner export {saved}" in done.stderr
    assert "pip install 'captioner[train]'" in done.stderr
    done = without_torch(code, "caption", photo, "--model", exported)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_engine_is_the_one_that_was_asked_for(saved, exported):
    assert isinstance(Captioner.from_pretrained(saved).engine, TorchEngine)
    assert isinstance(Captioner.from_pretrained(exported).engine, OnnxEngine)
    assert isinstance(Captioner.from_pretrained(exported, engine="torch").engine, TorchEngine)
    assert isinstance(Captioner.from_pretrained(exported, device="cpu").engine, TorchEngine)
    with pytest.raises(CaptionerError, match=r"was not exported .*captioner export"):
        Captioner.from_pretrained(saved, engine="onnx")
    with pytest.raises(CaptionerError, match="settings of the engine torch"):
        Captioner.from_pretrained(exported, engine="onnx", device="cpu")
    with pytest.raises(CaptionerError, match="engine is 'tf'; expected one of auto, onnx, torch"):
        Captioner.from_pretrained(exported, engine="tf")


def test_both_engines_write_the_same_in_fp32(exported, photos):
    ours = Captioner.from_pretrained(exported)
    theirs = Captioner.from_pretrained(exported, engine="torch", precision="fp32")
    photos = photos[:, :, :32, :32]
    assert np.allclose(ours.features(photos), theirs.features(photos), atol=1e-5)
    for one, other in zip(*(each.describe(theirs.features(photos)) for each in (ours, theirs)), strict=True):
        assert [caption.text for caption in one] == [caption.text for caption in other]
        assert one[0].logprob == pytest.approx(other[0].logprob, abs=1e-4)


def test_captions_do_not_depend_on_batch_order_or_threads(photos):
    captioner = Captioner.from_pretrained()
    features = captioner.features(photos)
    expected = [found[0] for found in captioner.describe(features)]
    alone = [captioner.describe(captioner.features(photo[None]))[0][0] for photo in photos]
    backwards = [found[0] for found in captioner.describe(captioner.features(photos[::-1].copy()))][::-1]
    several = [found[0] for found in captioner.describe(features, workers=3)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda photo: captioner.describe(captioner.features(photo[None]))[0][0], photos))
    assert alone == backwards == several == at_once == expected


def caption_in_another_process(captioner, photo, answers):
    answers.put(captioner.describe(captioner.features(photo))[0][0].text)


@pytest.mark.parametrize("way", ["spawn", "fork"])
def test_other_processes_may_use_a_captioner_that_was_used(way, photos):
    captioner = Captioner.from_pretrained()
    expected = captioner.describe(captioner.features(photos[:1]))[0][0].text
    context = multiprocessing.get_context(way)
    answers = context.Queue()
    process = context.Process(target=caption_in_another_process, args=(captioner, photos[:1], answers))
    process.start()
    assert answers.get(timeout=60) == expected
    process.join()
    assert pickle.loads(pickle.dumps(captioner)).engine is not captioner.engine


def test_a_copy_keeps_its_graphs(exported, tmp_path):
    Captioner.from_pretrained(exported).save_pretrained(tmp_path / "copy")
    assert isinstance(Captioner.from_pretrained(tmp_path / "copy", engine="onnx").engine, OnnxEngine)

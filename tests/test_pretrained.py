"""The model in the box: it is there, it fits, it says what it said when it was made, and that is about the photo.

The photos are scikit-image's and scikit-learn's: it has not learned from them, nor from any of their kind on purpose.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from captioner import Captioner, checkpoint, files, images
from captioner.networks.inference import TorchEngine
from captioner.runtime import OnnxEngine

MINI = files.PRETRAINED / "mini"
ROOT = Path(__file__).resolve().parents[1]


def sample(package: str, name: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, "pip install -e '.[test]'"
    assert spec.origin is not None
    return Path(spec.origin).parent / name


PHOTOS = {
    "astronaut": sample("skimage", "data/astronaut.png"),
    "camera": sample("skimage", "data/camera.png"),
    "chelsea": sample("skimage", "data/chelsea.png"),
    "coffee": sample("skimage", "data/coffee.png"),
    "motorcycle": sample("skimage", "data/motorcycle_left.png"),
    "rocket": sample("skimage", "data/rocket.jpg"),
    "flower": sample("sklearn", "datasets/images/flower.jpg"),
    "china": sample("sklearn", "datasets/images/china.jpg"),
}


@pytest.fixture(scope="module")
def mini() -> Captioner:
    return Captioner.from_pretrained()


def test_it_fits_into_the_box(mini: Captioner) -> None:
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) <= 24_000_000
    assert {path.name for path in MINI.iterdir()} == {"onnx", "config.json", "tokenizer.json", "README.md"}
    assert isinstance(mini.engine, OnnxEngine)
    assert mini.options.beam_size == 3


def test_golden(mini: Captioner) -> None:
    """Features and captions of now are those of when the model was made; see the end of this file."""
    golden = json.loads((Path(__file__).parent / "golden" / "mini.json").read_text("utf-8"))
    assert golden.keys() == PHOTOS.keys()
    for name, path in PHOTOS.items():
        features = mini.features(images.load(path, mini.image_size)[None])[0]
        expected = np.array(golden[name]["features"], np.float32)
        assert np.allclose(features[:: len(features) // len(expected)], expected, rtol=1e-3, atol=1e-3), name
        caption = mini.caption(path)
        assert caption.text == golden[name]["caption"], name
        assert caption.logprob == pytest.approx(golden[name]["logprob"], abs=1e-3), name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("astronaut", {"man", "woman", "girl", "boy", "person"}),
        ("camera", {"man", "person"}),
        ("motorcycle", {"motorcycle", "motorbike", "bike", "bicycle"}),
        ("chelsea", {"cat", "dog", "animal"}),  # a cat, which the model has hardly seen: an animal is what can be asked
    ],
)
def test_captions_are_about_the_photo(mini: Captioner, name: str, words: set[str]) -> None:
    assert words & set(mini.caption(PHOTOS[name]).tokens)


def test_photos_get_captions_of_their_own(mini: Captioner) -> None:
    assert len({mini.caption(path).text for path in PHOTOS.values()}) == len(PHOTOS)


def test_the_network_of_the_box_is_for_everyone() -> None:
    """Training reads back the weights that the graphs use, and begins where the graphs are."""
    ours, theirs = Captioner.from_pretrained(), Captioner.from_pretrained(engine="torch", precision="fp32")
    assert isinstance(theirs.engine, TorchEngine)
    assert theirs.engine.encoder.weights_sha256 == checkpoint.read(MINI).encoder_sha256
    pixels = np.stack([images.load(path, ours.image_size) for path in PHOTOS.values()])
    similar = np.corrcoef(ours.features(pixels).ravel(), theirs.features(pixels).ravel())[0, 1]
    assert similar > 0.97


def test_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mini").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(Captioner.from_pretrained("mini").engine, OnnxEngine)


def test_without_a_network_from_any_folder(tmp_path: Path) -> None:
    """The command of the first page, where nothing but the package is to be had."""
    blocked = "import socket; socket.socket.connect = None; import runpy, sys; sys.argv[0] = 'caption.py'; "
    command = [sys.executable, "-c", f"{blocked}runpy.run_path({str(ROOT / 'caption.py')!r}, run_name='__main__')"]
    done = subprocess.run([*command, PHOTOS["astronaut"]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) >= 4


if __name__ == "__main__":  # writes the golden file anew, after the model in the box was made anew
    model = Captioner.from_pretrained()
    found = {}
    for name, path in PHOTOS.items():
        vector = model.features(images.load(path, model.image_size)[None])[0]
        caption = model.caption(path)
        found[name] = {
            "caption": caption.text,
            "logprob": round(caption.logprob, 5),
            "features": [round(float(number), 5) for number in vector[::256]],
        }
        print(f"{name}: {caption.text}")
    target = Path(__file__).parent / "golden" / "mini.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

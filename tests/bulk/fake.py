"""A model that needs no weights: its captions say the colour of a photo, and it is fast."""

import time
from pathlib import Path

import numpy as np

from captioner.bulk.run import Provenance
from captioner.config import DecodingOptions
from captioner.model import Caption


class Fake:
    image_size = 16
    concurrent = True

    def __init__(self, delay=0.0):
        self.delay = delay  # seconds a photo

    def features(self, photos):
        time.sleep(self.delay * len(photos))
        features = np.zeros((len(photos), 4096), np.float32)
        features[:, :3] = photos.mean(axis=(2, 3))
        return features

    def describe(self, features, options=None):
        count = (options or DecodingOptions()).num_captions
        return [[caption(*row[:3].round().astype(int), rank) for rank in range(count)] for row in features]


def caption(red, green, blue, rank=0):
    text = f"a photo of {red} red and {green} green and {blue} blue" + (f" number {rank}" if rank else "")
    return Caption(text, tuple(text.split()), -1.5 - rank, -0.5 - rank, True, True)


def provenance(model="m", **options):
    return Provenance(name="fake", model=model, options=DecodingOptions(**options), engine="fake")


def photo(path, number=0):
    """A photo whose colour is its number."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 7)).save(path)
    return path

"""Runs inside a checkout of the commit b0db82f, the last one that captioned with torch: see `common.Before`.

    before.py bulk PHOTOS         captions the photos of a folder with the model in the box
    before.py decoding FEATURES   captions features (.npy) as `benchmarks.decoding` does, in bfloat16 where fast

Prints "ready", and then the seconds that one run took for every line that it reads.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace


def bulk(folder):
    from captioner import Captioner, caption_photos, images

    captioner, paths = Captioner.from_pretrained(), images.find([Path(folder)])
    return lambda: list(caption_photos(captioner, paths))


def decoding(path):
    import numpy as np
    import torch
    from captioner.decoder import Decoder
    from captioner.prepared import PreparedDecoder

    from captioner.config import DecoderConfig, DecodingOptions
    from captioner.decoding import decode

    words, hidden, beam, steps = 9487, 512, 5, 16
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(hidden_size=hidden, embedding_size=hidden), words).eval()
    with torch.no_grad():
        decoder.output.weight.mul_(100)
    prepared, features = PreparedDecoder(decoder), torch.from_numpy(np.load(path))
    special = SimpleNamespace(pad=0, start=1, end=2, unk=3)
    options = DecodingOptions(beam_size=beam, min_words=steps, max_words=steps)
    return lambda: decode(prepared, features, special, options)


work = {"bulk": bulk, "decoding": decoding}[sys.argv[1]](sys.argv[2])
work()
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    work()
    print(time.perf_counter() - began, flush=True)

"""Scores of decoders, alone and together, on features of the validation photos.

python -m recipes.mini.measure DATA FEATURES DECODER.pt ... [--together | --mean]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from captioner.datasets.annotations import load
from captioner.decoding.search import decode
from captioner.decoding.step import Ensemble, StepModel
from captioner.networks.inference import TorchDecoder
from recipes.mini import common


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("features", type=Path)
    parser.add_argument("decoders", type=Path, nargs="+")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--together", action="store_true", help="the mean of their probabilities")
    how.add_argument("--mean", action="store_true", help="the mean of their weights")
    parser.add_argument("--write", type=Path, help="a file for captions of every view of the training photos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load(arguments.data, check_images=False)
    vocabulary = common.vocabulary_of(data)
    val = data.split("val")
    features = np.load(arguments.features / "val-0.npy").astype(np.float32)
    states = [torch.load(path) for path in arguments.decoders]
    if arguments.mean:
        states = [{name: sum(state[name] for state in states) / len(states) for name in states[0]}]
    decoders = []
    for state in states:
        decoders.append(common.new_decoder(vocabulary).eval())
        decoders[-1].load_state_dict(state)
    models = [TorchDecoder(decoder, "auto") for decoder in decoders]
    chosen: list[StepModel] = [Ensemble(models)] if arguments.together else [*models]
    for model in chosen:
        began = time.monotonic()
        found = decode(model, features, vocabulary, common.SEARCH)
        record = common.report(val, [vocabulary.decode(best.tokens) for best, *_ in found])
        names = [str(path) for path in arguments.decoders]
        record = {"step": "measure", "decoders": names, "together": arguments.together, "mean": arguments.mean} | record
        common.log(arguments.features.parent / "runs.jsonl", {**record, "seconds": round(time.monotonic() - began)})
    if arguments.write:
        captions: list[list[str]] = [[] for _ in data.split("train")]
        for file in sorted(arguments.features.glob("train-*.npy")):
            found = decode(chosen[0], np.load(file).astype(np.float32), vocabulary, common.SEARCH)
            for some, (best, *_) in zip(captions, found, strict=True):
                some.append(vocabulary.decode(best.tokens))
        arguments.write.write_text(json.dumps(captions), encoding="utf-8")


if __name__ == "__main__":
    main()

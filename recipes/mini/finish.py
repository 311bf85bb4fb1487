"""CNN of a joint training and weights of a decoder (or the mean of several) -> a saved model, its captions and scores.

    python -m recipes.mini.finish DATA JOINT OUTPUT DECODER.pt ...

Writes the model to `OUTPUT/best`, replaced as a whole, and captions of the validation photos to
`OUTPUT/captions_{flickr8k,coco}_val.json` in COCO's result format. Photos go through the whole network in fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from captioner import metrics
from captioner.config import EncoderConfig
from captioner.datasets.annotations import load
from captioner.datasets.photos import Photos
from captioner.networks.encoder import Encoder
from recipes.mini import common
from recipes.mini.features import late_of


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("joint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("decoders", type=Path, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load(arguments.data)
    vocabulary = common.vocabulary_of(data)
    states = [torch.load(path) for path in arguments.decoders]
    decoder = common.new_decoder(vocabulary).eval()
    decoder.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    network = late_of(arguments.joint).unfolded()
    encoder = Encoder(EncoderConfig("efficientnet_lite2", "default", 192), network)
    val = data.split("val")
    photos = Photos([example.path for example in val], 192)
    seen = arguments.joint / "features_val.npy"  # the CNN is the same, whatever the decoder
    if not seen.exists():
        with torch.inference_mode():
            rows = np.array_split(np.arange(len(val)), max(1, len(val) // 50))
            features = torch.cat([encoder(torch.from_numpy(photos[some])) for some in rows])
        np.save(seen, features.numpy())
    features = torch.from_numpy(np.load(seen))
    captions = common.describe(decoder, features, vocabulary)
    record = common.report(val, captions)
    training = {"scores": {}}
    for name in ("flickr8k", "coco"):
        found = [(e, c) for e, c in zip(val, captions, strict=True) if str(e.image_id).startswith(name)]
        references = {e.image_id: e.captions for e, _ in found}
        scored = metrics.evaluate(references, dict(zip(references, (c for _, c in found), strict=True)))
        intervals = metrics.bootstrap_intervals(scored)
        record[f"{name}_intervals"] = {
            key: [round(scored.corpus[key], 4), round(i.low, 4), round(i.high, 4)] for key, i in intervals.items()
        }
        training["scores"] |= {f"{name}_{key}": round(scored.corpus[key], 4) for key in ("bleu_4", "cider")}
        results = [{"image_id": str(e.image_id).partition("-")[2], "caption": c} for e, c in found]
        (arguments.output / f"captions_{name}_val.json").write_text(json.dumps(results, indent=0), encoding="utf-8")
    common.save(arguments.output / "best", network, decoder, vocabulary, training)
    common.log(
        arguments.output / "runs.jsonl", {"step": "finish", "decoders": [str(p) for p in arguments.decoders], **record}
    )


if __name__ == "__main__":
    main()

"""The decoder learns to write from captions without photos.

python -m recipes.mini.language DATA CAPTIONS.tsv.gz OUTPUT.pt --epochs 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from captioner.datasets.annotations import load
from recipes.mini import common


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("captions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two processes side by side do more than two threads that wait for each other
    torch.manual_seed(arguments.seed)
    random = np.random.default_rng(arguments.seed)
    data = load(arguments.data, check_images=False)
    vocabulary = common.vocabulary_of(data)
    val = common.Set.of(data.split("val"), vocabulary).tokens
    train = common.text_only(arguments.captions, vocabulary) + common.Set.of(data.split("train"), vocabulary).tokens
    lengths = np.array([len(each) for each in train])
    decoder = common.new_decoder(vocabulary)
    optimiser = torch.optim.Adam(decoder.parameters(), arguments.rate, betas=(0.9, 0.98))

    def loss_of(captions: list[np.ndarray], smoothing: float) -> torch.Tensor:
        tokens, keep = common.collate(captions, vocabulary.pad)
        # A photo like every other: its numbers are 0, and the first state is what the bias says.
        state = decoder.arrange(decoder.initial.bias[None]) if decoder.states == 2 else ()
        with common.rounded():
            found = common.logits(decoder, [part.expand(-1, len(tokens), -1) for part in state], tokens, keep)
        return common.cross_entropy(found, tokens, keep, smoothing)

    steps = round(arguments.epochs * len(train) / arguments.batch)
    began, step = time.monotonic(), 0
    decoder.train()
    while step < steps:
        order = random.permutation(len(train))
        parts = np.array_split(order, max(1, len(order) // (arguments.batch * 32)))
        ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        batches = list(common.chunks(ordered, arguments.batch))
        for number in random.permutation(len(batches)):
            for group in optimiser.param_groups:
                group["lr"] = arguments.rate * max(0.05, common.cosine(step, steps, 100))
            loss = loss_of([train[i] for i in batches[number]], 0.0)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
            optimiser.step()
            step += 1
            if step % 20 == 0:
                print(step, steps, round(float(loss), 3), round(time.monotonic() - began), flush=True)
            if step % 200 == 0 or step == steps:
                torch.save(decoder.state_dict(), arguments.output)
            if step == steps:
                break
    decoder.eval()
    with torch.inference_mode():
        losses = [float(loss_of(val[i : i + 500], 0.0)) for i in range(0, len(val), 500)]
    record = {"step": "language", "captions": len(train), "val_loss": round(float(np.mean(losses)), 4)}
    common.log(arguments.output.parent / "runs.jsonl", {**record, "seconds": round(time.monotonic() - began)})


if __name__ == "__main__":
    main()

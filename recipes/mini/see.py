"""The decoder learns to say what features of photos hold, while it goes on to write from words.

    python -m recipes.mini.see DATA CAPTIONS.tsv.gz FEATURES HINTS.pt OUTPUT --epochs 6

HINTS.pt is of `recipes.mini.hints`. The layer that reads the photo begins as the ridge regression of the first
hidden state that words of a photo's captions set. Every step learns from captions of photos and, so that nothing of
the language is lost, from captions without photos. With `--teacher` files, probabilities of words are learned from
the mean of those decoders too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner.datasets.annotations import load
from captioner.networks.decoder import Decoder, HiddenState
from captioner.vocabulary import Vocabulary
from recipes.mini import common
from recipes.mini.hints import Hints, Reading, Texts, loss_of, texts

_DRAWS = 8  # hints a photo that the regression's target is the mean of


@torch.no_grad()
def standardise(decoder: Decoder, views: Sequence[np.ndarray]) -> None:
    """Give a decoder the statistics of features."""
    standard = decoder.standard
    standard.mean.zero_()
    standard.variance.fill_(1)
    total, squares = torch.zeros_like(standard.mean), torch.zeros_like(standard.mean)
    for view in views:
        for rows in common.chunks(np.arange(len(view)), 1000):
            x = decoder.normalise(torch.from_numpy(view[rows]).float())
            total += x.sum(0)
            squares += x.square().sum(0)
    count = sum(map(len, views))
    standard.mean.copy_(total / count)
    standard.variance.copy_(squares / count - standard.mean.square())
    standard.batches.fill_(50)  # as many as the running averages extend over


@torch.no_grad()
def regress(decoder: Decoder, views: Sequence[np.ndarray], targets: Tensor, strength: float) -> None:
    """Let the layer that reads the photo find the targets, `(photos, numbers)`, by ridge regression."""
    size = decoder.initial.in_features
    squares, products = torch.zeros(size, size), torch.zeros(size, targets.shape[1])
    middle = targets.mean(0)
    for view in views:
        for rows in common.chunks(np.arange(len(view)), 1000):
            x = decoder.normalise(torch.from_numpy(view[rows]).float())
            squares.addmm_(x.T, x)
            products.addmm_(x.T, targets[rows] - middle)
    squares.diagonal().add_(strength * len(views))
    decoder.initial.weight.copy_(torch.linalg.solve(squares, products).T)
    decoder.initial.bias.add_(middle)


@torch.no_grad()
def targets_of(hints: Hints, read: Texts, photos: range, random: np.random.Generator) -> Tensor:
    """What hints of photos set, on average."""
    draws = [hints.numbers([read.hint_of_photo(photo, random) for photo in photos]) for _ in range(_DRAWS)]
    return torch.stack(draws).mean(0)


def explained(decoder: Decoder, features: Tensor, targets: Tensor, bias: Tensor) -> float:
    """Share of the targets' variance that the layer finds in photos."""
    with torch.no_grad():
        found = decoder.initial(decoder.normalise(features)) - bias
        return 1 - float((found - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def looked(decoder: Decoder, features: Tensor, dropout: float) -> HiddenState:
    """The state that features set, some of them left out."""
    x = decoder.normalise(features, training=decoder.training)
    return decoder.arrange(decoder.initial(F.dropout(x, dropout, decoder.training)))


def begin(data: Path, captions: Path) -> tuple[Vocabulary, common.Set, common.Set, Texts]:
    """Vocabulary, photos of training and validation with their captions, and captions without photos."""
    annotations = load(data, check_images=False)
    vocabulary = common.vocabulary_of(annotations)
    train, val = (common.Set.of(annotations.split(split), vocabulary) for split in ("train", "val"))
    return vocabulary, train, val, texts(captions, train, vocabulary)


@torch.no_grad()
def mean_chances(teachers: Sequence[Decoder], features: Tensor, photo: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """Mean of the probabilities that teachers give to each word."""
    total = torch.zeros(())
    for teacher in teachers:
        with common.rounded():
            state = [part[:, photo] for part in teacher.start(features)]
            found = common.logits(teacher, state, tokens, keep)
        total = total + found.float().softmax(1)
    return total / len(teachers)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("captions", type=Path)
    parser.add_argument("features", type=Path, help="folder of train-VIEW.npy and val-0.npy")
    parser.add_argument("hints", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--start", type=Path, help="weights of a decoder that has learned to see")
    parser.add_argument("--teacher", type=Path, nargs="+", default=[], help="weights of decoders")
    parser.add_argument("--teacher-weight", type=float, default=0.7)
    parser.add_argument("--written", type=Path, help="captions of training photos by a teacher, a JSON list of lists")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--photos", type=int, default=64, help="a step")
    parser.add_argument("--per-photo", type=int, default=5, help="captions of each photo, an epoch, at most")
    parser.add_argument("--texts", type=int, default=96, help="captions without photos, a step")
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--strength", type=float, default=10000, help="of the ridge")
    parser.add_argument("--dropout", type=float, default=0.3, help="of features")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--average", type=float, default=0.995)
    parser.add_argument("--every", type=float, default=2, help="epochs between validations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    random = np.random.default_rng(arguments.seed)
    vocabulary, train, val, read = begin(arguments.data, arguments.captions)
    captions_of = [[train.tokens[number] for number in numbers] for numbers in train.by_photo()]
    if arguments.written:
        written = json.loads(arguments.written.read_text(encoding="utf-8"))
        for some, captions in zip(captions_of, written, strict=True):
            some += [np.array(ids) for ids in vocabulary.encode(captions, common.MAX_WORDS)]
    views = [np.load(file) for file in sorted(arguments.features.glob("train-*.npy"))]
    val_features = torch.from_numpy(np.load(arguments.features / "val-0.npy")).float()

    decoder = common.new_decoder(vocabulary)
    hints = Hints(decoder)
    learned = torch.load(arguments.hints)
    hints.load_state_dict(learned["hints"])
    decoder.load_state_dict(learned["decoder"])
    standardise(decoder, views)
    log = arguments.output.parent / "runs.jsonl"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if not isinstance(v, list)}
    common.log(log, {"step": "see", "settings": settings, "teachers": [str(p) for p in arguments.teacher]})
    if arguments.start:
        decoder.load_state_dict(torch.load(arguments.start))
    else:
        photos = int(read.photo[-1]) + 1
        targets = targets_of(hints, read, range(photos - len(captions_of), photos), random)
        unread = Texts([[val.tokens[number] for number in numbers] for numbers in val.by_photo()], vocabulary)
        wanted = targets_of(hints, unread, range(len(val.examples)), random)
        bias = decoder.initial.bias.detach().clone()
        regress(decoder, views, targets, arguments.strength)
        shares = [
            explained(decoder, f, t, bias)
            for f, t in ((torch.from_numpy(views[0][:2000]).float(), targets[:2000]), (val_features, wanted))
        ]
        common.log(log, {"step": "regress", "train": round(shares[0], 4), "val": round(shares[1], 4)})
    teachers = []
    for path in arguments.teacher:
        teachers.append(common.new_decoder(vocabulary).eval())
        teachers[-1].load_state_dict(torch.load(path))
    parameters = [*decoder.parameters(), *hints.parameters()]
    optimiser = torch.optim.Adam(parameters, arguments.rate, betas=(0.9, 0.98), fused=True)
    average = common.Average(decoder, arguments.average)
    reading = Reading(read, max(arguments.texts, 1), random)
    steps_an_epoch = -(-len(captions_of) // arguments.photos)
    steps, step = round(arguments.epochs * steps_an_epoch), 0
    every = max(1, round(arguments.every * steps_an_epoch))
    began, losses = time.monotonic(), []

    def validate() -> None:
        averaged = common.new_decoder(vocabulary).eval()
        averaged.load_state_dict(average.state)
        torch.save(average.state, arguments.output / f"step-{step}.pt")
        torch.save(average.state, arguments.output / "average.pt")
        captions = common.describe(averaged, val_features, vocabulary, "auto")
        record = {"step": "see", "run": arguments.output.name, "steps": step}
        record |= {"loss": [round(float(x), 4) for x in np.mean(losses, 0)]} if losses else {}
        record |= {"seconds": round(time.monotonic() - began), **common.report(val.examples, captions)}
        common.log(log, record)
        losses.clear()

    validate()
    while step < steps:
        for rows in common.chunks(random.permutation(len(captions_of)), arguments.photos):
            which = random.integers(len(views), size=len(rows))
            features = torch.from_numpy(np.stack([views[v][row] for v, row in zip(which, rows, strict=True)])).float()
            for group in optimiser.param_groups:
                group["lr"] = arguments.rate * max(0.02, common.cosine(step, steps, 50))
            decoder.train()
            numbers = [random.permutation(len(captions_of[row]))[: arguments.per_photo] for row in rows]
            chosen = [captions_of[row][n] for row, some in zip(rows, numbers, strict=True) for n in some]
            tokens, keep = common.collate(chosen, vocabulary.pad)
            photo = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(some) for some in numbers]))
            state = [part[:, photo] for part in looked(decoder, features, arguments.dropout)]
            with common.rounded():
                found = common.logits(decoder, state, tokens, keep)
            loss = common.cross_entropy(found, tokens, keep, arguments.smoothing)
            parts = [float(loss.detach())]
            if teachers:
                chances = mean_chances(teachers, features, photo, tokens, keep)
                taught = -(chances * found.float().log_softmax(1)).sum(1).mean()
                parts.append(float(taught.detach()))
                loss = (1 - arguments.teacher_weight) * loss + arguments.teacher_weight * taught
            if arguments.text_weight:
                captions, given = reading.next()
                text = loss_of(decoder, hints, captions, given, vocabulary.pad, arguments.smoothing)
                parts.append(float(text.detach()))
                loss = loss + arguments.text_weight * text
            losses.append(parts)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimiser.step()
            average.update(decoder)
            step += 1
            if step % every == 0 or step == steps:
                validate()
            if step == steps:
                break


if __name__ == "__main__":
    main()

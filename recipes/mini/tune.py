"""The decoder learns on alone, from features of the CNN: by a reward, from human captions, from captions of a teacher.

    torchrun --nproc-per-node 2 -m recipes.mini.tune DATA FEATURES START.pt OUTPUT --reward 1 --likelihood 0.1

The reward is CIDEr-D of captions that the decoder draws itself, with [end] as a word ("self-critical": Rennie et al.
2017), less a penalty for each word of meaning said again. Each caption is weighed by what it is above the mean of
the others drawn for its photo (Luo 2020).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner.datasets.annotations import load
from captioner.metrics import CiderD
from captioner.networks.decoder import Decoder
from captioner.vocabulary import Vocabulary
from recipes.mini import common
from recipes.mini.joint import share

_DRAWN = 5  # captions a photo


@torch.no_grad()
def draw(decoder: Decoder, state: Sequence[Tensor], vocabulary: Vocabulary) -> list[list[int]]:
    """A caption of each row of a state, drawn word by word, [end] included where it was drawn."""
    h, c = state
    never = torch.tensor([vocabulary.pad, vocabulary.start, vocabulary.unk])
    tokens = torch.full((h.shape[1],), vocabulary.start)
    words, over = [], torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(common.MAX_WORDS + 1):
        with common.rounded():
            found, (h, c) = decoder.step(tokens, (h, c))
        chances = found.float().index_fill(1, never, -torch.inf).softmax(1)
        tokens = torch.multinomial(chances, 1)[:, 0].masked_fill(over, vocabulary.pad)
        words.append(tokens)
        over = over | (tokens == vocabulary.end)
        if bool(over.all()):
            break
    return [[word for word in row if word != vocabulary.pad] for row in torch.stack(words, 1).tolist()]


class Rewards:
    """What captions are worth."""

    def __init__(self, train: common.Set, vocabulary: Vocabulary, penalty: float) -> None:
        references = {row: [train.tokens[n][1:].tolist() for n in ns] for row, ns in enumerate(train.by_photo())}
        self._cider = CiderD(references)
        self._penalty = penalty
        words = {i: vocabulary.word_of(i) for i in range(len(vocabulary))}
        self._meaning = {i for i, word in words.items() if common.has_meaning(word)}

    def __call__(self, rows: Sequence[int], captions: Sequence[Sequence[int]]) -> np.ndarray:
        """One number a caption."""
        again = np.array([self._again(caption) for caption in captions])
        return self._cider(rows, captions) - self._penalty * again

    def _again(self, caption: Sequence[int]) -> int:
        content = [word for word in caption if word in self._meaning]
        return len(content) - len(set(content))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("features", type=Path, help="folder of train-VIEW.npy and val-0.npy")
    parser.add_argument("start", type=Path, help="weights of a decoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", type=Path, help="captions of training photos, as a JSON list of lists")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--photos", type=int, default=64, help="a step, of all processes")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--reward", type=float, default=0.0, help="weight of the reward")
    parser.add_argument("--penalty", type=float, default=0.2, help="for each word said again")
    parser.add_argument("--likelihood", type=float, default=1.0, help="weight of the human captions")
    parser.add_argument("--captions", type=int, default=5, help="human captions of each photo, an epoch, at most")
    parser.add_argument("--average", type=float, default=0.99)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()

    data = load(arguments.data, check_images=False)
    vocabulary = common.vocabulary_of(data)
    train, val = (common.Set.of(data.split(split), vocabulary) for split in ("train", "val"))
    captions_of = [[train.tokens[number] for number in numbers] for numbers in train.by_photo()]
    if arguments.teacher:
        taught = json.loads(arguments.teacher.read_text(encoding="utf-8"))
        for some, captions in zip(captions_of, taught, strict=True):
            some += [np.array(ids) for ids in vocabulary.encode(captions, common.MAX_WORDS)]
    views = [np.load(file, mmap_mode="r") for file in sorted(arguments.features.glob("train-*.npy"))]
    val_features = torch.from_numpy(np.load(arguments.features / "val-0.npy")[rank::processes]).float()
    rewards = Rewards(train, vocabulary, arguments.penalty) if arguments.reward else None
    never = torch.tensor([vocabulary.pad, vocabulary.start, vocabulary.unk])

    decoder = common.new_decoder(vocabulary)
    decoder.load_state_dict(torch.load(arguments.start))
    optimiser = torch.optim.Adam(decoder.parameters(), arguments.rate, betas=(0.9, 0.98), fused=True)
    average = common.Average(decoder, arguments.average)
    steps_an_epoch = -(-len(captions_of) // arguments.photos)
    steps, step = round(arguments.epochs * steps_an_epoch), 0
    began, worth, losses = time.monotonic(), [], []

    def validate() -> None:
        path = arguments.output / "average.pt"
        if rank == 0:
            torch.save(average.state, path)
        distributed.barrier()
        averaged = common.new_decoder(vocabulary).eval()
        averaged.load_state_dict(torch.load(path))
        gathered: list[list[str]] = [[] for _ in range(processes)]
        distributed.all_gather_object(gathered, common.describe(averaged, val_features, vocabulary, "auto"))
        captions = [gathered[i % processes][i // processes] for i in range(len(val.examples))]
        if rank == 0:
            torch.save(average.state, arguments.output / f"step-{step}.pt")
            record = {"step": "tune", "run": arguments.output.name, "steps": step}
            record |= {"reward": round(float(np.mean(worth)), 4)} if worth else {}
            record |= {"loss": round(float(np.mean(losses)), 4)} if losses else {}
            record |= {"seconds": round(time.monotonic() - began), **common.report(val.examples, captions)}
            common.log(arguments.output.parent / "runs.jsonl", record)
        worth.clear()
        losses.clear()

    while step < steps:
        random = np.random.default_rng((arguments.seed, step))
        torch.manual_seed((arguments.seed * 1000 + step) * processes + rank)
        for together in common.chunks(random.permutation(len(captions_of)), arguments.photos):
            which = random.integers(len(views), size=len(together))[rank::processes]
            rows = together[rank::processes]
            features = torch.from_numpy(np.stack([views[v][row] for v, row in zip(which, rows, strict=True)])).float()
            for group in optimiser.param_groups:
                group["lr"] = arguments.rate * max(0.05, common.cosine(step, steps, 20))
            loss = torch.zeros(())
            if rewards is not None:
                decoder.eval()  # the captions are drawn, and made likelier, by the decoder without dropout
                state = [part.repeat_interleave(_DRAWN, 1) for part in decoder.start(features)]
                captions = draw(decoder, [part.detach() for part in state], vocabulary)
                scores = rewards(np.repeat(rows, _DRAWN).tolist(), captions).reshape(-1, _DRAWN)
                worth.append(float(scores.mean()))
                advantages = (scores - scores.mean(1, keepdims=True)) * (_DRAWN / (_DRAWN - 1))
                tokens, keep = common.collate([np.array([vocabulary.start, *c]) for c in captions], vocabulary.pad)
                with common.rounded():
                    found = common.logits(decoder, state, tokens, keep)
                possible = found.float().index_fill(1, never, -torch.inf)
                surprise = F.cross_entropy(possible, tokens[:, 1:][keep], reduction="none")
                weights = torch.from_numpy(advantages).float().flatten().repeat_interleave(keep.sum(1))
                loss = loss + arguments.reward * (surprise * weights).mean()
            if arguments.likelihood:
                decoder.train()
                numbers = [random.permutation(len(captions_of[row]))[: arguments.captions] for row in rows]
                chosen = [captions_of[row][n] for row, some in zip(rows, numbers, strict=True) for n in some]
                tokens, keep = common.collate(chosen, vocabulary.pad)
                photo = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(some) for some in numbers]))
                with common.rounded():
                    found = common.logits(decoder, [p[:, photo] for p in decoder.start(features)], tokens, keep)
                likelihood = common.cross_entropy(found, tokens, keep, 0.1)
                losses.append(float(likelihood.detach()))
                loss = loss + arguments.likelihood * likelihood
            optimiser.zero_grad()
            loss.backward()
            share(decoder)
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
            optimiser.step()
            if rank == 0:
                average.update(decoder)
            step += 1
            if step % arguments.every == 0 or step == steps:
                validate()
            if step == steps:
                break


if __name__ == "__main__":
    main()

"""The decoder and the CNN's last stages learn together from photos and their captions.

    torchrun --nproc-per-node 2 -m recipes.mini.joint DATA CACHE OUTPUT --language language.pt --epochs 12

Goes on with what OUTPUT holds. Every batch holds all captions of its photos, so the CNN looks at a photo once. The
weights that are kept are exponential moving averages. Each process has one thread: two processes that wait for each
other once a step do more than two threads that wait for each other after every operation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn

from captioner.datasets.annotations import load
from captioner.vocabulary import Vocabulary
from recipes.mini import common
from recipes.mini.late import Late, learned, pretrained

_EVALUATED_TOGETHER = 100


class Maps:
    """Maps of the frozen stages, see `recipes.mini.views`."""

    def __init__(self, cache: Path, split: str) -> None:
        self.views = [np.load(file, mmap_mode="r") for file in sorted(cache.glob(f"{split}-*.npy"))]

    def __call__(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """(photos, 12, 12, 88), of type `common.FAST`."""
        maps = np.stack([self.views[view][row] for row, view in zip(rows, views, strict=True)])
        return torch.from_numpy(maps).view(torch.bfloat16).to(common.FAST)


@torch.inference_mode()
def features(late: Late, maps: Maps, view: int = 0, rank: int = 0, processes: int = 1) -> Tensor:
    """4096 numbers of each photo (of every second one, for two processes), in the arithmetic of training."""
    mine = np.arange(rank, len(maps.views[view]), processes)
    parts = []
    for rows in common.chunks(mine, _EVALUATED_TOGETHER):
        with common.rounded():
            parts.append(late(maps(rows, np.full(len(rows), view))).float())
    return torch.cat(parts)


class Teachers:
    """Models that learned before: the mean of the probabilities that they give every word of a caption."""

    def __init__(
        self, folders: Sequence[Path], of_coco: Sequence[Path], train: common.Set, vocabulary: Vocabulary
    ) -> None:
        """Read features and decoders, see `recipes.mini.features`.

        Those `of_coco` are asked about COCO's photos alone.
        """
        self._parts = []
        coco = [str(example.image_id).startswith("coco") for example in train.examples]
        self._asked = [torch.ones(len(coco))] * len(folders) + [torch.tensor(coco).float()] * len(of_coco)
        for folder in [*folders, *of_coco]:
            decoder = common.new_decoder(vocabulary)
            decoder.load_state_dict(torch.load(folder / "decoder.pt"))
            views = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("train-*.npy"))]
            self._parts.append((decoder.eval(), views))

    @torch.no_grad()
    def __call__(self, rows: np.ndarray, views: np.ndarray, photo: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
        """(words, vocabulary), of the words kept."""
        total, weights = torch.zeros(()), torch.zeros(())
        words = photo.repeat_interleave(keep.sum(1))  # photo of each word
        for (decoder, numbers), asked in zip(self._parts, self._asked, strict=True):
            features = np.stack([numbers[view][row] for row, view in zip(rows, views, strict=True)])
            state = decoder.start(torch.from_numpy(features).float())
            found = common.logits(decoder, [part[:, photo] for part in state], tokens, keep)
            weight = asked[torch.from_numpy(rows)][words][:, None]
            total, weights = total + weight * found.float().softmax(1), weights + weight
        return total / weights


def share(network: nn.Module) -> None:
    """Give all processes the mean of their gradients."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def groups_of(late: Late, rate: float, decay: float) -> list[dict[str, object]]:
    """Parameters of the CNN, with a learning rate for each.

    Adam moves a weight by about its learning rate a step, whatever the scale of the weights; `rate` is a share of
    the root mean square of a tensor. Each stage nearer to the photo gets `decay` times the rate of the one behind it.
    """
    stages: list[nn.Module] = [*late.units, late.head, late.projection]
    groups: list[dict[str, object]] = []
    for number, stage in enumerate(stages):
        share = rate * decay ** (len(stages) - 1 - number)
        for parameter in stage.parameters():
            scale = max(float(parameter.detach().square().mean().sqrt()), 0.01)
            groups.append({"params": [parameter], "full": share * scale, "lr": share * scale})
    return groups


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--language", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--photos", type=int, default=64, help="a step, of all processes")
    parser.add_argument("--captions", type=int, default=3, help="of each photo, an epoch, at most")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--cnn-rate", type=float, default=1e-3, help="a share of a tensor's root mean square; 0: frozen"
    )
    parser.add_argument("--cnn-decay", type=float, default=0.9)
    parser.add_argument("--cnn-blocks", type=int, default=6, help="that learn, of the last 10")
    parser.add_argument("--cnn-from", type=float, default=1, help="epochs before the CNN learns too")
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--every", type=int, default=2, help="epochs between validations")
    parser.add_argument(
        "--begin-with", type=Path, help="joint training or saved model to begin with, in place of --language"
    )
    parser.add_argument("--teachers", type=Path, nargs="*", default=[], help="folders of recipes.mini.features")
    parser.add_argument("--coco-teachers", type=Path, nargs="*", default=[], help="the same, for COCO's photos alone")
    parser.add_argument("--teacher-weight", type=float, default=0.7, help="of the teachers' words, beside people's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = load(arguments.data, check_images=False)
    vocabulary = common.vocabulary_of(data)
    train, val = (common.Set.of(data.split(split), vocabulary) for split in ("train", "val"))
    captions_of = train.by_photo()
    maps, val_maps = Maps(arguments.cache, "train"), Maps(arguments.cache, "val")

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(arguments.seed)
    decoder = common.new_decoder(vocabulary)
    if arguments.language:
        decoder.load_state_dict(torch.load(arguments.language))
    late = Late(pretrained())
    if arguments.begin_with:
        late, state = learned(arguments.begin_with)
        decoder.load_state_dict(state)
    teachers = Teachers(arguments.teachers, arguments.coco_teachers, train, vocabulary) if arguments.teachers else None
    network = nn.ModuleDict({"late": late, "decoder": decoder})
    groups = [{"params": list(decoder.parameters()), "full": arguments.rate, "lr": arguments.rate}]
    groups += groups_of(late, arguments.cnn_rate, arguments.cnn_decay)
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True)
    average = common.Average(network, arguments.average)
    steps_an_epoch = -(-len(captions_of) // arguments.photos)
    steps, step, first = arguments.epochs * steps_an_epoch, 0, 0
    last = arguments.output / "last.pt"
    if last.exists():
        saved = torch.load(last)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        average.state, average.steps = saved["average"], saved["steps"]
        first = saved["epoch"]
        step = first * steps_an_epoch

    for epoch in range(first, arguments.epochs):
        began = time.monotonic()
        random = np.random.default_rng((arguments.seed, epoch))
        torch.manual_seed((arguments.seed * 1000 + epoch) * processes + rank)
        network.train()
        total, words = 0.0, 0
        for together in common.chunks(random.permutation(len(captions_of)), arguments.photos):
            views = random.integers(len(maps.views), size=len(together))[rank::processes]
            rows = together[rank::processes]
            chosen = [random.permutation(captions_of[row])[: arguments.captions] for row in together][rank::processes]
            numbers = [number for some in chosen for number in some]
            tokens, keep = common.collate([train.tokens[number] for number in numbers], vocabulary.pad)
            photo = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(some) for some in chosen]))
            looked_at = maps(rows, views)
            for group in optimiser.param_groups:
                group["lr"] = group["full"] * common.cosine(step, steps, 100)
            learns = arguments.cnn_rate > 0 and step >= arguments.cnn_from * steps_an_epoch
            with common.rounded():
                averages = late.averages(looked_at, arguments.cnn_blocks if learns else 0)
                state = decoder.start(late.project(averages).float())
                found = common.logits(decoder, [part[:, photo] for part in state], tokens, keep)
                taught = None if teachers is None else teachers(rows, views, photo, tokens, keep)
            if taught is None:
                loss = common.cross_entropy(found, tokens, keep, 0.1)
            else:
                of_teachers = -(taught * found.float().log_softmax(1)).sum(1).mean()
                of_people = common.cross_entropy(found, tokens, keep, 0)
                loss = of_people + arguments.teacher_weight * (of_teachers - of_people)
            optimiser.zero_grad()
            loss.backward()
            share(network)
            for part in (late, decoder):
                torch.nn.utils.clip_grad_norm_(part.parameters(), 5.0)
            optimiser.step()
            if rank == 0:
                average.update(network)
            step += 1
            total, words = total + float(loss.detach()) * len(found), words + len(found)
            if rank == 0 and step % 20 == 0:
                print(epoch + 1, step, steps, round(total / words, 3), round(time.monotonic() - began), flush=True)
        record = {"step": "joint", "run": arguments.output.name, "epoch": epoch + 1, "loss": round(total / words, 4)}
        record |= {"seconds": round(time.monotonic() - began)}
        validated = (epoch + 1) % arguments.every == 0 or epoch + 1 == arguments.epochs
        if rank == 0:
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "average": average.state}
            new = last.with_suffix(".new")
            torch.save({**state, "steps": average.steps, "epoch": epoch + 1}, new)
            new.rename(last)
            if validated:
                torch.save(average.state, arguments.output / "average.pt")
        if validated:
            distributed.barrier()
            averaged = nn.ModuleDict({"late": Late(pretrained()), "decoder": common.new_decoder(vocabulary)}).eval()
            averaged.load_state_dict(torch.load(arguments.output / "average.pt"))
            mine = features(averaged["late"], val_maps, rank=rank, processes=processes)
            gathered: list[list[str]] = [[] for _ in range(processes)]
            distributed.all_gather_object(gathered, common.describe(averaged["decoder"], mine, vocabulary))
            captions = [gathered[i % processes][i // processes] for i in range(len(val.examples))]
            record |= common.report(val.examples, captions)
        if rank == 0:
            common.log(arguments.output.parent / "runs.jsonl", record)
    if rank == 0:
        averaged = nn.ModuleDict({"late": Late(pretrained()), "decoder": common.new_decoder(vocabulary)}).eval()
        averaged.load_state_dict(torch.load(arguments.output / "average.pt"))
        settings = {name: value for name, value in vars(arguments).items() if isinstance(value, (int, float))}
        state = averaged["late"].unfolded()
        common.save(arguments.output / "model", state, averaged["decoder"], vocabulary, {"recipe": settings})


if __name__ == "__main__":
    main()

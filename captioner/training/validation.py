"""The validation photos: captions with their scores, and the loss of the human captions; all in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from captioner import metrics
from captioner.datasets.batches import Batch
from captioner.evaluation import caption_rows, references_of
from captioner.model import Caption, Captioner
from captioner.training.inputs import SplitInputs
from captioner.training.network import Network

_CHUNK = 1024  # photos that are captioned between two calls of `between`


def caption_validation(
    captioner: Captioner,
    split: SplitInputs,
    accelerator: Accelerator,
    *,
    meteor: bool | metrics.Meteor = False,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[Caption], dict[str, float]]:
    """Caption the photos of a split, of which each process takes a share, and score the captions in every process.

    Args:
        captioner: the model.
        split: photos and human captions.
        accelerator: the processes.
        meteor: whether METEOR is computed too.
        between: is called between parts of the work.

    Returns:
        A caption a photo, and the scores by name.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    rows, captions = split.rows[rank::processes], []
    for start in range(0, len(rows), _CHUNK):
        between()
        captions += caption_rows(captioner, split.source, rows[start : start + _CHUNK])
    if processes > 1:
        numbered = gather_object(list(zip(range(rank, len(split.rows), processes), captions, strict=True)))
        captions = [caption for _, caption in sorted(numbered, key=lambda pair: pair[0])]
    references = references_of(split.examples)
    hypotheses = dict(zip(references, (caption.text for caption in captions), strict=True))
    return captions, metrics.score(references, hypotheses, meteor=meteor)


@torch.no_grad()
def validation_loss(network: Network, batches: Iterable[Batch], between: Callable[[], None] = lambda: None) -> float:
    """Mean cross-entropy of the words, in nats.

    Args:
        network: in evaluation mode.
        batches: of the split, on the network's device.
        between: is called between batches.
    """
    total, words = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        between()
        total = total.to(batch.rows.device) + network(batch)
        words += len(batch.targets)
    return float(total) / words

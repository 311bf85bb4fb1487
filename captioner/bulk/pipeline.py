"""Many photos -> captions, in a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner import images
from captioner.config import DecodingOptions
from captioner.errors import ImageError
from captioner.model import Caption, Captioner


@dataclass(frozen=True)
class Captioned:
    """What became of one photo."""

    path: Path
    captions: tuple[Caption, ...]  # best first; empty if the photo could not be decoded
    error: ImageError | None = None


def caption_photos(
    captioner: Captioner, paths: Sequence[Path], options: DecodingOptions | None = None, *, batch_size: int = 64
) -> Iterator[Captioned]:
    """Caption photos in their order, in constant memory; one that cannot be decoded does not stop the others.

    Args:
        captioner: the model.
        paths: photos.
        options: how to search; by default as the model was validated.
        batch_size: photos that are encoded and captioned together.
    """
    for batch in images.stream(paths, captioner.encoder.config.image_size, batch_size):
        captions: dict[int, tuple[Caption, ...]] = {}
        if batch.indices:
            found = captioner.describe(captioner.features(batch.pixels.to(captioner.device), options), options)
            captions = {index: tuple(some) for index, some in zip(batch.indices, found, strict=True)}
        for index in sorted([*captions, *batch.failures]):
            yield Captioned(paths[index], captions.get(index, ()), batch.failures.get(index))

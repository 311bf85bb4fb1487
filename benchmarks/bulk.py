"""Many photos, from files to JSON lines: ours beside BLIP-base and ViT-GPT2, and where the time goes.

    python -m benchmarks.bulk [--photos DIR] [--count 500] [--rounds 3] [--peer-count 16] [--megapixels 12] [--no-peers]
    python -m benchmarks.bulk --memory 50000

The peers are the networks of `transformers` with random weights, which are as fast as trained ones, in bf16 and greedy,
with captions of 12 words, on all cores. They are given pixels: reading and decoding photos is not counted for them.
Ours reads and decodes files, and searches with a beam of 3. The ceiling is the rate if all workers were at one of the
stages all the time. All take turns within a round; one JSON object is printed at the end. `--memory` captions so many
photos, hard links of a few hundred, and compares the resident memory at the end with that after a tenth.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import ratio, report, seconds, take_turns
from benchmarks.pretrained import photos, samples
from captioner import Captioner, images
from captioner.bulk.job import Job
from captioner.bulk.run import Provenance, Report, run

_BATCH = 8  # of the peers


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-count", type=int, default=16)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--memory", type=int)
    arguments = parser.parse_args()
    if arguments.memory:
        _memory(arguments.memory)
        return
    captioner = Captioner.from_pretrained("mini")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.photos:
            paths = images.find([arguments.photos])[: arguments.count]
        else:
            paths = photos(folder, samples(), arguments.count)
        listed = folder / "photos.txt"
        listed.write_text("\n".join(map(str, paths)))
        reports: list[Report] = []

        def ours() -> float:
            job = Job(list=str(listed), output=folder / "out.jsonl", overwrite=True, quiet=True)
            began = time.perf_counter()
            reports.append(run(job, captioner, Provenance("mini", "", captioner.options)))
            return len(paths) / (time.perf_counter() - began)

        systems: dict[str, Callable[[], float]] = {"ours": ours}
        if not arguments.no_peers:
            systems |= {
                "blip": _peer(_blip(), 384, arguments.peer_count),
                "vit_gpt2": _peer(_vit_gpt2(), 224, arguments.peer_count),
            }
        rates = take_turns(systems, arguments.rounds)
        large, decode = _large(captioner, folder, arguments.megapixels)
    busy = statistics.median(each.busy for each in reports)
    figures = {name: statistics.median(values) for name, values in rates.items()}
    shares = {f"share_{stage}": share for stage, share in reports[-1].shares.items()}
    report(
        f"{len(paths)} photos from files to JSON lines; photos a second",
        ours={"bulk": figures["ours"], "workers_busy": busy, "large_photos": large, **shares},
        peer={name: value for name, value in figures.items() if name != "ours"},
        ceiling={"bulk": figures["ours"] / busy, "large_photos_decode_alone": decode},
        ratios={
            "ours_to_ceiling": busy,
            **{f"ours_to_{name}": ratio(rates["ours"], values) for name, values in rates.items() if name != "ours"},
        },
    )


def _large(captioner: Captioner, folder: Path, megapixels: float) -> tuple[float, float]:
    """Photos a second of large photos on one worker: with all stages, and decoding alone."""
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    path = folder / "large.jpg"
    Image.open(samples()[0]).convert("RGB").resize((width, width * 3 // 4)).save(path, quality=90)
    listed = folder / "large.txt"
    copies = []
    for number in range(24):
        copies.append(folder / f"large-{number}.jpg")
        copies[-1].hardlink_to(path)
    listed.write_text("\n".join(map(str, copies)))
    job = Job(list=str(listed), output=folder / "large.jsonl", workers=1, quiet=True)
    decode = seconds(lambda: [images.load(copy, captioner.image_size) for copy in copies])
    whole = seconds(lambda: run(job, captioner, Provenance("mini", "", captioner.options)))
    return len(copies) / whole, len(copies) / decode


def _memory(count: int) -> None:
    captioner = _Weighed(Captioner.from_pretrained("mini"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "few").mkdir()
        few = photos(folder / "few", samples(), 500)
        for number in range(count):
            (folder / "many" / f"{number // 1000:03}").mkdir(parents=True, exist_ok=True)
            (folder / "many" / f"{number // 1000:03}" / f"{number:06}.jpg").hardlink_to(few[number % len(few)])
        job = Job(photos=(str(folder / "many"),), output=folder / "out.jsonl")
        took = seconds(lambda: run(job, captioner, Provenance("mini", "", captioner.captioner.options)))
    tenth, whole = captioner.after(count // 10), captioner.after(count)
    ours = {"MiB after a tenth": tenth, "MiB at the end": whole, "photos a second": count / took}
    report(f"resident memory while {count:,} photos are captioned", ours=ours, ratios={"end to a tenth": whole / tenth})


class _Weighed:
    """A model that notes the resident memory whenever it looks at photos."""

    concurrent = True

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner
        self.image_size, self.describe = captioner.image_size, captioner.describe
        self._seen = 0
        self._noted: list[tuple[int, float]] = []  # photos so far, MiB

    def features(self, pixels: Any) -> Any:
        self._seen += len(pixels)
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
        self._noted.append((self._seen, pages * resource.getpagesize() / 2**20))
        return self.captioner.features(pixels)

    def after(self, count: int) -> float:
        """MiB after so many photos: the median over the last tenth of them."""
        return statistics.median(size for seen, size in self._noted if 0.9 * count <= seen <= count)


def _peer(caption: Callable[[Any], object], size: int, count: int) -> Callable[[], float]:
    import torch

    pixels = torch.rand(_BATCH, 3, size, size).bfloat16()

    def measure() -> float:
        with torch.inference_mode():
            return count / seconds(lambda: [caption(pixels) for _ in range(max(1, count // _BATCH))])

    return measure


def _blip() -> Callable[[Any], object]:
    from transformers import BlipConfig, BlipForConditionalGeneration

    model = BlipForConditionalGeneration(BlipConfig()).bfloat16().eval()
    return lambda pixels: model.generate(pixels, max_new_tokens=12, min_new_tokens=12, num_beams=1, do_sample=False)


def _vit_gpt2() -> Callable[[Any], object]:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config())
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 50256
    model = VisionEncoderDecoderModel(config=config).bfloat16().eval()
    return lambda pixels: model.generate(
        pixels, max_new_tokens=12, min_new_tokens=12, num_beams=1, do_sample=False,
        decoder_start_token_id=50256, pad_token_id=50256, eos_token_id=50256,
    )  # fmt: skip


if __name__ == "__main__":
    main()

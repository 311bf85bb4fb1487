"""Beam search: captions a second of ours, of the way research code usually does it, and what the processor allows.

    python -m benchmarks.decoding [--images 100 1000] [--rounds 5] [--device cpu]

Every caption takes 16 steps of a beam of 5 over 9,487 words (the network: LSTM, 512 hidden, 4096 numbers a photo), so
that nothing is gained by captions that end. All systems take turns within a round; medians over rounds are printed,
and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from captioner.config import FEATURE_SIZE, DecoderConfig, DecodingOptions
from captioner.decoding.search import decode
from captioner.networks.decoder import Decoder
from captioner.networks.inference import PreparedDecoder, has_fast_bf16

VOCABULARY, HIDDEN, BEAM, STEPS = 9487, 512, 5, 16
CLOCK: list[Callable[[], float]] = [time.perf_counter]  # the last one counts
SPECIAL = SimpleNamespace(pad=0, start=1, end=2, unk=3)
OPTIONS = DecodingOptions(beam_size=BEAM, min_words=STEPS, max_words=STEPS)
# The first step has one row a photo, the others one a beam; the word's own product is looked up. That beams share the
# products of a hidden state is not counted: how many do depends on the model.
ROWS = 1 + (STEPS - 1) * BEAM
FLOPS = ROWS * 2 * HIDDEN * (VOCABULARY + 4 * HIDDEN) + 2 * FEATURE_SIZE * 2 * HIDDEN


def one_at_a_time(decoder: Decoder, features: Tensor) -> list[list[int]]:
    """A beam for one photo after another, kept in lists: the way most research code does it."""
    captions = []
    for photo in features:
        state = decoder.start(photo[None].expand(BEAM, -1))
        tokens = torch.full((BEAM,), SPECIAL.start, device=features.device)
        sums = torch.zeros(BEAM, device=features.device)
        beams: list[list[int]] = [[] for _ in range(BEAM)]
        for step in range(STEPS):
            logits, state = decoder.step(tokens, state)
            logprobs = torch.log_softmax(logits, dim=1)
            logprobs[:, [SPECIAL.pad, SPECIAL.start, SPECIAL.end, SPECIAL.unk]] = -torch.inf
            ordered, indices = torch.sort(logprobs, dim=1, descending=True)
            candidates = [
                (float(sums[row] + ordered[row, column]), row, int(indices[row, column]))
                for column in range(BEAM)
                for row in range(1 if step == 0 else BEAM)
            ]
            best = sorted(candidates, key=lambda candidate: -candidate[0])[:BEAM]
            beams = [[*beams[row], word] for _, row, word in best]
            parents = torch.tensor([row for _, row, _ in best], device=features.device)
            state = tuple(part[:, parents] for part in state)
            sums = torch.tensor([value for value, _, _ in best], device=features.device)
            tokens = torch.tensor([word for _, _, word in best], device=features.device)
        captions.append(beams[0])
    return captions


def plain_batched(decoder: Decoder, features: Tensor, together: int = 64) -> list[list[int]]:
    """The beams of many photos in one batch, in the obvious way."""
    captions: list[list[int]] = []
    for some in features.split(together):
        photos = len(some)
        state = decoder.start(some.repeat_interleave(BEAM, dim=0))
        tokens = torch.full((photos * BEAM,), SPECIAL.start, device=features.device)
        sums = torch.full((photos, BEAM), -torch.inf, device=features.device)
        sums[:, 0] = 0
        history = torch.zeros(photos, BEAM, 0, dtype=torch.long, device=features.device)
        for _ in range(STEPS):
            logits, state = decoder.step(tokens, state)
            logprobs = torch.log_softmax(logits, dim=1)
            logprobs[:, [SPECIAL.pad, SPECIAL.start, SPECIAL.end, SPECIAL.unk]] = -torch.inf
            sums, index = (sums[..., None] + logprobs.view(photos, BEAM, -1)).flatten(1).topk(BEAM, dim=1)
            parents, words = index // VOCABULARY, index % VOCABULARY
            history = torch.cat([history.gather(1, parents[..., None].expand_as(history)), words[..., None]], dim=2)
            rows = (torch.arange(photos, device=features.device)[:, None] * BEAM + parents).flatten()
            state = tuple(part[:, rows] for part in state)
            tokens = words.flatten()
        captions += history[:, 0].tolist()
    return captions


def product_rate(device: torch.device, dtype: torch.dtype, rows: int = 320) -> Callable[[], float]:
    """Floating point operations a second of the output layer's product, by the fastest way that this torch has."""
    decoder = Decoder(DecoderConfig(hidden_size=HIDDEN, embedding_size=HIDDEN), VOCABULARY).to(device)
    packed = PreparedDecoder(decoder, "bf16" if dtype == torch.bfloat16 else "fp32").output
    weight, bias = decoder.output.weight.detach().to(dtype), decoder.output.bias.detach().to(dtype)
    x = torch.randn(rows, HIDDEN, device=device).to(dtype)
    ways = (lambda: packed(x), lambda: torch.nn.functional.linear(x, weight, bias))

    def measure() -> float:
        rates = []
        for way in ways:
            for _ in range(3):
                way()
            seconds = min(timed(way, device) for _ in range(20))
            rates.append(2 * rows * HIDDEN * VOCABULARY / seconds)
        return max(rates)

    return measure


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = CLOCK[-1]()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return CLOCK[-1]() - start


def machine(device: torch.device) -> str:
    """What ran this, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not a file that a path helps with
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = platform.processor()
    bf16 = "with" if has_fast_bf16(device) else "without"
    return f"{name or platform.machine()}, {torch.get_num_threads()} thread(s), {bf16} fast bf16, {CLOCK[-1].__name__}"


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--one-core", action="store_true", help="one thread, in processor time: for a machine that is busy"
    )
    arguments = parser.parse_args()
    if arguments.one_core:
        torch.set_num_threads(1)
        CLOCK.append(time.process_time)
    device = torch.device(arguments.device)

    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(hidden_size=HIDDEN, embedding_size=HIDDEN), VOCABULARY).eval().to(device)
    decoder.output.weight.mul_(100)  # as far apart as a trained model's
    features = torch.rand(max(arguments.images), FEATURE_SIZE, device=device)
    few = features[: min(arguments.images)]
    fast = has_fast_bf16(device)
    precisions = ["fp32", *(["bf16"] if fast else [])]

    agreed = check(decoder, few[:20])
    systems: dict[str, tuple[int, Callable[[], object]]] = {}
    for precision in precisions:
        prepared = PreparedDecoder(decoder, precision)  # type: ignore[arg-type]
        for count in arguments.images:
            photos = features[:count]
            systems[f"ours {precision}, {count} images"] = (
                count,
                lambda prepared=prepared, photos=photos: decode(prepared, photos, SPECIAL, OPTIONS),
            )
    systems[f"plain batched beam fp32, {len(few)} images"] = len(few), lambda: plain_batched(decoder, few)
    alone = f"one photo at a time fp32, {len(few[:20])} images"
    systems[alone] = len(few[:20]), lambda: one_at_a_time(decoder, few[:20])
    gauges = {p: product_rate(device, torch.bfloat16 if p == "bf16" else torch.float32) for p in precisions}

    found: dict[str, list[float]] = {name: [] for name in [*systems, *gauges]}
    for name, (_, call) in systems.items():
        if name.startswith("ours"):
            call()  # warm
    for number in range(arguments.rounds):
        for precision, gauge in gauges.items():
            found[precision].append(gauge())
        for name, (count, call) in systems.items():
            found[name].append(count / timed(call, device))
        print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items()))
    medians = {name: statistics.median(values) for name, values in found.items()}

    def fraction(name: str, precision: str) -> float:
        """Of the machine's product rate, round by round."""
        return statistics.median(a * FLOPS / b for a, b in zip(found[name], found[precision], strict=True))

    for name in systems:
        precision = "bf16" if "bf16" in name else "fp32"
        print(f"{medians[name]:8.1f} captions/s  {fraction(name, precision):5.0%} of the {precision} rate  {name}")
    most = max(arguments.images)
    ours = {f"{p}_{n}": medians[f"ours {p}, {n} images"] for p in precisions for n in arguments.images}
    peer = medians[alone]
    batched = medians[f"plain batched beam fp32, {len(few)} images"]
    best = medians[f"ours {precisions[-1]}, {most} images"]
    result = {
        "what": f"captions a second, beam {BEAM}, {STEPS} steps, {VOCABULARY} words, hidden {HIDDEN}",
        "ours": ours,
        "peer": {"one_photo_at_a_time": peer, "plain_batched": batched},
        "ceiling": {p: {"flops": medians[p], "captions": medians[p] / FLOPS} for p in precisions},
        "ratios": {
            "to_one_photo_at_a_time": best / peer,
            "to_plain_batched": best / batched,
            **{f"of_{p}_ceiling": fraction(f"ours {p}, {most} images", p) for p in precisions},
        },
        "same_captions_as_peer": agreed,
        "machine": machine(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(result))


def check(decoder: Decoder, features: Tensor) -> float:
    """The share of photos for which all three fp32 searches find the same caption."""
    prepared = PreparedDecoder(decoder, "fp32")
    ours = [list(found[0].tokens) for found in decode(prepared, features, SPECIAL, OPTIONS)]
    peers = one_at_a_time(decoder, features), plain_batched(decoder, features)
    return sum(a == b == c for a, b, c in zip(ours, *peers, strict=True)) / len(ours)


if __name__ == "__main__":
    main()

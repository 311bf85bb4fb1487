"""COCO scores beside pycocoevalcap: seconds and peak memory, first call, imports and JVM included.

    python -m benchmarks.metrics [--runs 5] [--captions captions_val2017.json]

Both sides tokenise and score the same 5,000 captions against four references each (BLEU-1 to -4, ROUGE-L, CIDEr), each
time in a process of its own, the two taking turns. Seconds count from before the import to the last score; reading the
file is not counted. Medians are quoted. Without COCO's annotation file a corpus of the same size is made up. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COCO = Path(__file__).parents[2] / "shared" / "coco" / "annotations" / "captions_val2017.json"
IMAGES, REFERENCES = 5_000, 4

Corpus = tuple[dict[str, list[str]], dict[str, str]]


def corpus(file: Path) -> Corpus:
    """References and hypotheses: the first caption of each image against the next four."""
    images: dict[str, list[str]] = {}
    if file.exists():
        for annotation in json.loads(file.read_text())["annotations"]:
            images.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    else:
        choose = random.Random(0)
        # word frequencies fall off as in real captions
        words = [f"{a}{b}{c}" for a in "bdfghklmnprst" for b in "aeiou" for c in "bdfghklmnprst"]
        weights = [1 / rank for rank in range(1, len(words) + 1)]
        for image in range(IMAGES):
            images[str(image)] = [
                " ".join(choose.choices(words, weights, k=choose.randint(8, 14))).capitalize() + "."
                for _ in range(REFERENCES + 1)
            ]
    complete = {image: texts for image, texts in images.items() if len(texts) > REFERENCES}
    chosen = dict(list(complete.items())[:IMAGES])
    return (
        {image: texts[1 : REFERENCES + 1] for image, texts in chosen.items()},
        {image: texts[0] for image, texts in chosen.items()},
    )


def ours(references: dict[str, list[str]], hypotheses: dict[str, str]) -> dict[str, float]:
    from captioner import metrics

    return metrics.score(references, hypotheses)


def peer(references: dict[str, list[str]], hypotheses: dict[str, str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({image: [{"caption": text} for text in texts] for image, texts in references.items()})
    res = tokenizer.tokenize({image: [{"caption": text}] for image, text in hypotheses.items()})
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    scores = {f"bleu_{n + 1}": value for n, value in enumerate(bleu)}
    return scores | {"rouge_l": Rouge().compute_score(gts, res)[0], "cider": Cider().compute_score(gts, res)[0]}


SIDES: dict[str, Callable[..., dict[str, float]]] = {"ours": ours, "peer": peer}


def measure(side: str, file: str) -> dict[str, Any]:
    """Runs one side once, in this fresh process."""
    references, hypotheses = json.loads(Path(file).read_text())
    started = time.perf_counter()
    scores = SIDES[side](references, hypotheses)
    seconds = time.perf_counter() - started
    # Java is a process of its own; the larger of the two is less than what they take together
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "peak_mib": peak / 1024, "scores": {name: float(scores[name]) for name in scores}}


def reward(captions_file: Path) -> dict[str, float]:
    """Hypotheses per second of CIDEr-D with prepared references, beside pycocoevalcap's Cider on the same."""
    from captioner import metrics

    references, hypotheses = corpus(captions_file)
    tokens = {image: [metrics.tokenize(text) for text in texts] for image, texts in references.items()}
    captions = {image: metrics.tokenize(text) for image, text in hypotheses.items()}
    images, batch, rates = list(tokens), 500, {}
    scorer = metrics.CiderD(tokens)
    for kind in ("first", "ours"):  # the second time counts
        started = time.perf_counter()
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            scorer(part, [captions[image] for image in part])
        rates[kind] = len(images) / (time.perf_counter() - started)
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return {"ours": rates["ours"]}
    gts = {image: [" ".join(words) for words in texts] for image, texts in tokens.items()}
    res = {image: [" ".join(words)] for image, words in captions.items()}
    started = time.perf_counter()
    Cider().compute_score(gts, res)
    return {"ours": rates["ours"], "peer": len(images) / (time.perf_counter() - started)}


def child(*arguments: str) -> dict[str, Any]:
    """Runs this program in a fresh process and returns the JSON object on its last line."""
    command = [sys.executable, "-m", "benchmarks.metrics", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(terse=True)}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("captioner", "numpy", "pycocoevalcap"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if shutil.which("java"):
        found["java"] = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--captions", type=Path, default=COCO, help="a COCO caption annotation file")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--reward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(*options.side)))
        return
    if options.reward:
        print(json.dumps(reward(options.captions)))
        return

    sides = ["ours", "peer"]
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        print("pycocoevalcap or Java is not installed: ours alone")
        sides = ["ours"]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corpus.json"
        file.write_text(json.dumps(corpus(options.captions)))
        for run in range(options.runs):
            for side in sides if run % 2 else sides[::-1]:
                results[side].append(child("--side", side, str(file)))
                print(f"{side}: {results[side][-1]['seconds']:.2f} s, {results[side][-1]['peak_mib']:.0f} MiB")
    report: dict[str, Any] = {
        "what": f"tokenise and score {IMAGES:,} captions against {REFERENCES} references each, in seconds",
        "corpus": options.captions.name if options.captions.exists() else "made up",
        "runs": options.runs,
    }
    for side in sides:
        report[side] = round(statistics.median(result["seconds"] for result in results[side]), 3)
        report[f"{side}_peak_mib"] = round(statistics.median(result["peak_mib"] for result in results[side]), 1)
    rates = child("--reward", "--captions", str(options.captions))
    report["reward_hypotheses_per_second"] = {side: round(rate) for side, rate in rates.items()}
    if "peer" in sides:
        pairs = zip(results["ours"], results["peer"], strict=True)
        report["ratios"] = {"to_peer": round(statistics.median(b["seconds"] / a["seconds"] for a, b in pairs), 2)}
        ours_scores, peer_scores = results["ours"][0]["scores"], results["peer"][0]["scores"]
        report["largest_difference"] = max(abs(ours_scores[name] - peer_scores[name]) for name in peer_scores)
    print(json.dumps(report | {"machine": machine(), "versions": versions()}))


if __name__ == "__main__":
    main()

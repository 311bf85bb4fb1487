"""METEOR beside `meteor-1.5.jar`: seconds and peak memory, imports and JVM included; and how long the index takes.

    python -m benchmarks.meteor [--rounds 3] [--captions captions_val2017.json] [--build]

Both sides score the same 5,000 tokenised captions against four references each, in a process of their own, and take
turns; the jar is run by pycocoevalcap. The index is there before the first round. `--build` measures making it too, in
a cache of its own. Without COCO's annotation file a corpus of the same size is made up. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ratio, report, take_turns
from benchmarks.metrics import COCO, IMAGES, REFERENCES, corpus


def ours(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    from captioner.metrics import Meteor

    statistics = Meteor.load().statistics(references, hypotheses)
    return [statistics.corpus(), *statistics.per_caption().tolist()]


def jar(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    from pycocoevalcap.meteor.meteor import Meteor

    corpus, single = Meteor().compute_score(
        dict(enumerate(references)), {n: [text] for n, text in enumerate(hypotheses)}
    )
    return [corpus, *single]


def build(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    from captioner.metrics import Meteor

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        Meteor.load()
    return []


SIDES = {"ours": ours, "jar": jar, "build": build}


def measure(side: str, file: str) -> dict[str, Any]:
    """Runs one side once, in this fresh process."""
    references, hypotheses = json.loads(Path(file).read_text())
    began = time.perf_counter()
    scores = SIDES[side](references, hypotheses)
    seconds = time.perf_counter() - began
    # the jar is a process of its own, of which nothing is known before it has ended
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "scores": scores}


def child(side: str, file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.meteor", "--side", side, str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captions", type=Path, default=COCO, help="a COCO caption annotation file")
    parser.add_argument("--build", action="store_true", help="measure making the index as well")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(*options.side)))
        return

    from captioner.metrics import Meteor, tokenize_all

    Meteor.load()
    references, hypotheses = corpus(options.captions)
    tokens = iter(tokenize_all([text for texts in references.values() for text in texts]))
    together = [[" ".join(next(tokens)) for _ in texts] for texts in references.values()]
    captions = [" ".join(words) for words in tokenize_all(list(hypotheses.values()))]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corpus.json"
        file.write_text(json.dumps([together, captions]))

        def run(side: str) -> float:
            results[side] = child(side, file)
            return float(results[side]["seconds"])

        found = take_turns({"ours": lambda: run("ours"), "jar": lambda: run("jar")}, options.rounds)
        if options.build:
            run("build")
    figures = {"seconds": statistics.median(found["ours"]), "peak_mib": results["ours"]["peak_mib"]}
    if options.build:
        figures |= {"index_s": results["build"]["seconds"], "index_peak_mib": results["build"]["peak_mib"]}
    pairs = list(zip(results["ours"]["scores"], results["jar"]["scores"], strict=True))
    figures |= {
        "corpus": pairs[0][0],
        "differ_by_more_than_1e-9": sum(abs(one - other) > 1e-9 for one, other in pairs),
        "largest_difference": max(abs(one - other) for one, other in pairs),
    }
    report(
        f"METEOR of {IMAGES:,} captions against {REFERENCES} references each, in seconds",
        ours=figures,
        peer={"seconds": statistics.median(found["jar"]), "corpus": pairs[0][1]},
        ratios={"to_jar": ratio(found["jar"], found["ours"])},
    )


if __name__ == "__main__":
    main()

"""pycocoevalcap, asked in bulk."""

import importlib.util
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from captioner.metrics.tokenization import PUNCTUATION


def require():
    """Skips the test where pycocoevalcap or Java is missing."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")


def tokenize(captions, folder):
    """The tokens of each caption, from the program and with the options that pycocoevalcap runs it with."""
    require()
    package = Path(next(iter(importlib.util.find_spec("pycocoevalcap").submodule_search_locations)))
    file = Path(folder) / "captions.txt"
    file.write_text("\n".join(caption.replace("\n", " ") for caption in captions), encoding="utf-8")
    command = ["java", "-cp", str(package / "tokenizer" / "stanford-corenlp-3.4.1.jar")]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    lines = output.decode().split("\n")
    assert len(lines) == len(captions)
    return [[word for word in line.rstrip().split(" ") if word and word not in PUNCTUATION] for line in lines]


def scores(references, hypotheses):
    """Scores of tokenised captions: of the corpus, and of each image."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = {image: [" ".join(tokens) for tokens in texts] for image, texts in references.items()}
    res = {image: [" ".join(tokens)] for image, tokens in hypotheses.items()}
    corpus, per_image = {}, {}
    totals, lists = Bleu(4).compute_score(gts, res, verbose=0)
    for n in range(4):
        corpus[f"bleu_{n + 1}"], per_image[f"bleu_{n + 1}"] = totals[n], lists[n]
    corpus["rouge_l"], per_image["rouge_l"] = Rouge().compute_score(gts, res)
    corpus["cider"], per_image["cider"] = Cider().compute_score(gts, res)
    corpus["cider_d"], per_image["cider_d"] = corpus["cider"], per_image["cider"]
    return corpus, per_image


def meteor(references, hypotheses, task="rank"):
    """METEOR from the jar, run as pycocoevalcap runs it: of the corpus, of each caption, and the statistics of each."""
    require()
    folder = Path(next(iter(importlib.util.find_spec("pycocoevalcap").submodule_search_locations))) / "meteor"
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-jar",
        "-Xmx2G",
        "meteor-1.5.jar",
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    command += ["-t", task]
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as jar:

        def ask(lines, answers):
            writer = threading.Thread(target=lambda: (jar.stdin.writelines(lines), jar.stdin.flush()))
            writer.start()
            found = [jar.stdout.readline().decode().strip() for _ in range(answers)]
            writer.join()
            return found

        cleaned = [text.replace("|||", "").replace("  ", " ") for text in hypotheses]
        lines = [" ||| ".join(["SCORE", *texts, text]) for texts, text in zip(references, cleaned, strict=True)]
        statistics = ask([f"{line}\n".encode() for line in lines], len(lines))
        *per_image, corpus = ask([f"{' ||| '.join(['EVAL', *statistics])}\n".encode()], len(lines) + 1)
        jar.stdin.close()
    counts = np.array([[float(number) for number in line.split()] for line in statistics])
    return float(corpus), np.array([float(score) for score in per_image]), counts

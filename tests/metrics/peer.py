"""pycocoevalcap, asked in bulk."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

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

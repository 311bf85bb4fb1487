"""COCO scores without Java: the tokens and the numbers of pycocoevalcap, as pure functions.

`tokenize` and `score` are what everything else is built from. Nothing here imports the rest of the project or torch.
"""

from captioner.metrics.bridge import JAVA_METRICS, java_scores, why_not
from captioner.metrics.cider import CiderD
from captioner.metrics.diversity import Diversity, diversity
from captioner.metrics.idf import Idf
from captioner.metrics.meteor import Meteor
from captioner.metrics.scoring import METRICS, Scores, evaluate, evaluate_tokens, score, score_tokens
from captioner.metrics.significance import Comparison, Interval, bootstrap_intervals, paired_test
from captioner.metrics.tokenization import tokenize, tokenize_all

__all__ = [
    "JAVA_METRICS",
    "METRICS",
    "CiderD",
    "Comparison",
    "Diversity",
    "Idf",
    "Interval",
    "Meteor",
    "Scores",
    "bootstrap_intervals",
    "diversity",
    "evaluate",
    "evaluate_tokens",
    "java_scores",
    "paired_test",
    "score",
    "score_tokens",
    "tokenize",
    "tokenize_all",
    "why_not",
]

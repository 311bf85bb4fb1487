"""The scores as their papers and the COCO server define them, without any cleverness."""

import math
from collections import Counter

import numpy as np


def ngrams(words, n):
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def bleu(pairs):
    """BLEU-1 to -4 of (references, hypothesis) pairs taken together."""
    product, result = 1.0, []
    closest = [min((abs(len(r) - len(h)), len(r)) for r in references)[1] for references, h in pairs]
    ratio = (sum(len(h) for _, h in pairs) + 1e-15) / (sum(closest) + 1e-9)
    for n in range(1, 5):
        correct = guess = 0
        for references, hypothesis in pairs:
            for ngram, count in ngrams(hypothesis, n).items():
                correct += min(count, max(ngrams(reference, n)[ngram] for reference in references))
            guess += max(0, len(hypothesis) - n + 1)
        product *= (correct + 1e-15) / (guess + 1e-9)
        result.append(product ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return result


def common_subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_l(references, hypothesis):
    references, hypothesis = [reference or [""] for reference in references], hypothesis or [""]
    common = [common_subsequence(reference, hypothesis) for reference in references]
    precision = max(length / len(hypothesis) for length in common)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision and recall else 0.0


def cider(references, hypotheses):
    """CIDEr of each image, with document frequencies of these references."""
    result = []
    frequency = Counter()
    for texts in references.values():
        frequency.update({ngram for text in texts for n in range(1, 5) for ngram in ngrams(text, n)})

    def vector(words, n):
        weights = {
            ngram: count * (math.log(len(references)) - math.log(max(1, frequency[ngram])))
            for ngram, count in ngrams(words, n).items()
        }
        return weights, math.sqrt(sum(weight**2 for weight in weights.values()))

    for image, texts in references.items():
        total = 0.0
        for text in texts:
            gap = max(0, len(hypotheses[image]) - 1) - max(0, len(text) - 1)  # lengths in bigrams, as published
            for n in range(1, 5):
                (mine, my_norm), (theirs, their_norm) = vector(hypotheses[image], n), vector(text, n)
                if my_norm and their_norm:
                    both = mine.keys() & theirs.keys()
                    product = sum(min(mine[ngram], theirs[ngram]) * theirs[ngram] for ngram in both)
                    penalty = math.exp(-(gap**2) / (2 * 6**2))
                    total += product / my_norm / their_norm * penalty
        result.append(10 * total / 4 / len(texts))
    return np.array(result)


def scores(references, hypotheses):
    """Scores of tokenised captions: of the corpus, and of each image."""
    pairs = [(texts, hypotheses[image]) for image, texts in references.items()]
    per_image = {f"bleu_{n + 1}": [bleu([pair])[n] for pair in pairs] for n in range(4)}
    per_image["rouge_l"] = [rouge_l(*pair) for pair in pairs]
    per_image["cider"] = per_image["cider_d"] = cider(references, hypotheses)
    corpus = {f"bleu_{n + 1}": bleu(pairs)[n] for n in range(4)}
    corpus |= {name: float(np.mean(per_image[name])) for name in ("rouge_l", "cider", "cider_d")}
    return corpus, per_image

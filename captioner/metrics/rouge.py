"""ROUGE-L (Lin, 2004) as the COCO caption server computes it.

The F-measure with beta 1.2 of the best precision and the best recall over the references, each from the longest
common subsequence of words.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

_BETA_SQUARED = 1.2**2


def common_subsequence_length(positions: dict[Hashable, int], length: int, other: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of two sentences, with one row of the table per machine word.

    The bit-parallel method of Hyyrö (2004), "Bit-parallel LCS-length computation revisited": a zero bit in `row`
    says that the length of the subsequence grows at that word.

    Args:
        positions: for each word of the first sentence, the set of its positions as bits.
        length: number of words of the first sentence.
        other: the second sentence.
    """
    everything = (1 << length) - 1
    row = everything
    for word in other:
        matching = positions.get(word)
        if matching is not None:
            kept = row & matching
            row = ((row + kept) | (row - kept)) & everything
    return length - row.bit_count()


def rouge_l(references: Sequence[Sequence[Hashable]], hypothesis: Sequence[Hashable]) -> float:
    """ROUGE-L of one tokenised caption, 0 to 1.

    An empty sentence counts as one empty word, as on the server: it equals another empty one and nothing else.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("ROUGE-L needs at least one reference")
    hypothesis = hypothesis or ("",)
    positions: dict[Hashable, int] = {}
    for place, word in enumerate(hypothesis):
        positions[word] = positions.get(word, 0) | (1 << place)
    precision = recall = 0.0
    for sentence in references:
        reference = sentence or ("",)
        common = common_subsequence_length(positions, len(hypothesis), reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if precision == 0.0 or recall == 0.0:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)

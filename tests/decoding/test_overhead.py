"""The time that the search itself takes for a word, with a model that takes none."""

import time

import numpy as np
import pytest
from searches import SPECIAL

from captioner.config import DecodingOptions
from captioner.decoding.search import decode
from captioner.decoding.step import Likeliest


class Instantaneous:
    """Answers with what it made up before, and never lets a caption end early."""

    def __init__(self, vocabulary_size, rows):
        self.vocabulary_size = vocabulary_size
        self.steps = 0
        self.spent = 0.0
        generator = np.random.default_rng(0)
        words = 6 + np.argsort(generator.random((rows, vocabulary_size - 6)), axis=1)[:, :30]
        surprisal = np.sort(generator.exponential(2, (rows, 30)), axis=1).astype(np.float32)
        self.answer = Likeliest(-surprisal, words, np.full((rows, 1), -5, np.float32))

    def start(self, features):
        return None

    def step(self, tokens, parents, state, count, named):
        start = time.thread_time()
        self.steps += 1
        rows = np.s_[: len(tokens)]
        answer = Likeliest(
            self.answer.logprob[rows, :count].copy(), self.answer.word[rows, :count].copy(), self.answer.named[rows]
        )
        self.spent += time.thread_time() - start
        return answer, state


@pytest.mark.parametrize(
    ("photos", "beam_size", "vocabulary_size", "words", "milliseconds"),
    [(1, 3, 2_500, 12, 0.3), (64, 3, 2_500, 12, 1.0), (150, 5, 9_487, 16, 2.0)],
)
def test_a_word_costs_little(photos, beam_size, vocabulary_size, words, milliseconds):
    features = np.zeros((photos, 4096), np.float32)
    options = DecodingOptions(
        beam_size=beam_size,
        min_words=words,
        max_words=words,
        length_normalisation="average",
        no_repeat_ngram=3,
    )
    model, took = Instantaneous(vocabulary_size, photos * beam_size), []
    for _ in range(20):
        model.steps, model.spent = 0, 0.0
        start = time.thread_time()
        decode(model, features, SPECIAL, options)
        took.append(1000 * (time.thread_time() - start - model.spent) / model.steps)
        assert model.steps == words
    print(f"{photos} photos, beam {beam_size}, {vocabulary_size} words: {min(took):.3f} ms a word")
    assert min(took) < milliseconds

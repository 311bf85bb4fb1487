"""The tree that is shown holds exactly what the search did."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from searches import SPECIAL, Table, logprobs, models, photos

from captioner.config import DecodingOptions
from captioner.decoding.explain import explain, render
from captioner.decoding.search import decode
from captioner.vocabulary import Vocabulary


def leaves(branch, tokens=()):
    for child in branch.branches:
        path = (*tokens, child.token)
        yield from leaves(child, path) if child.branches else [(path, child)]


def every(branch, tokens=()):
    for child in branch.branches:
        yield (*tokens, child.token), child
        yield from every(child, (*tokens, child.token))


WAYS = [
    {"beam_size": 1},
    {"beam_size": 3, "num_captions": 3},
    {"beam_size": 4, "beam_groups": 2, "num_captions": 2},
    {"required_words": ("a",)},
    {"method": "sample", "num_captions": 2},
    {"method": "sample", "top_k": 1},
    {"no_repeat_ngram": 1, "length_normalisation": "average"},
]


@settings(max_examples=30, deadline=None)
@given(models, st.integers(0, 900), st.sampled_from(WAYS))
def test_tree_is_the_search(model, photo, way):
    options = DecodingOptions(max_words=5, **way)
    explanation = explain(model, photos(photo), SPECIAL, options)
    assert list(explanation.captions) == decode(model, photos(photo), SPECIAL, options)[0]

    nodes = dict(every(explanation.root))
    for tokens, node in list(nodes.items())[:30]:
        following = logprobs(model, photo, tokens[:-1])
        assert node.probability == pytest.approx(math.exp(following[node.token]), rel=1e-3)
        assert node.logprob == pytest.approx(
            sum(logprobs(model, photo, tokens[:n])[token] for n, token in enumerate(tokens)), abs=1e-3
        )
    for caption in explanation.captions:
        path = caption.tokens + (SPECIAL.end,) * caption.finished
        assert nodes[path].fate == ("ended" if caption.finished else "cut")
        assert nodes[path].logprob == pytest.approx(caption.logprob, abs=1e-4)
    best = explanation.captions[0]
    path = best.tokens + (SPECIAL.end,) * best.finished
    assert {tokens for tokens, node in nodes.items() if node.winner} == {path[:n] for n in range(1, len(path) + 1)}
    assert all(node.fate != "continued" for _, node in leaves(explanation.root))
    assert all(node.fate in ("ended", "pruned") for node in nodes.values() if node.token == SPECIAL.end)


def test_pruned_words_are_in_the_tree():
    explanation = explain(Table(), photos(3), SPECIAL, DecodingOptions(beam_size=2, max_words=3))
    first = explanation.root.branches
    assert len(first) == 3
    assert [child.fate for child in first].count("pruned") >= 1
    assert [child.probability for child in first] == sorted((c.probability for c in first), reverse=True)


def test_drawing():
    vocabulary = Vocabulary.build(["a cat sits on a mat", "a dog runs"], min_count=1)
    model = Table(2, size=len(vocabulary))
    explanation = explain(model, photos(3), vocabulary, DecodingOptions(max_words=4))
    console = Console(width=100, record=True, force_terminal=False)
    console.print(render(explanation, vocabulary))
    text = console.export_text()
    best = explanation.captions[0]
    assert text.count("★") == 1
    (last,) = [line for line in text.splitlines() if "★" in line]
    assert (f"log-probability {best.logprob:.2f}") in last
    for word in vocabulary.words(best.tokens):
        assert f"{word} " in text
    assert "%" in text


def test_drawing_marks_winner_and_dims_pruned():
    vocabulary = Vocabulary.build(["a cat sits on a mat", "a dog runs"], min_count=1)
    explanation = explain(
        Table(2, size=len(vocabulary)), photos(3), vocabulary, DecodingOptions(beam_size=2, max_words=4)
    )
    tree = render(explanation, vocabulary)
    for child, branch in zip(tree.children, explanation.root.branches, strict=True):
        expected = "bold green" if branch.winner else "dim" if branch.fate == "pruned" else ""
        assert child.label.style == expected


def test_one_photo_at_a_time():
    with pytest.raises(ValueError, match="there are 2 photos; expected one"):
        explain(Table(), np.zeros((2, 4096)), SPECIAL, DecodingOptions())


def test_words_that_cannot_be_had_are_explained_away():
    model, options = Table(), DecodingOptions(required_words=("a",))
    model.logits[:, SPECIAL.encode(["a"])[0][1]] = -np.inf
    explanation = explain(model, photos(1), SPECIAL, options)
    assert list(explanation.captions) == decode(model, photos(1), SPECIAL, options)[0]
    assert not explanation.captions[0].satisfied


def test_a_model_that_breaks_has_a_bare_tree():
    model = Table()
    model.logits[:] = math.nan
    explanation = explain(model, photos(1), SPECIAL, DecodingOptions())
    assert explanation.root.branches == ()
    assert explanation.captions[0].tokens == ()

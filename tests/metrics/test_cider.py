"""CIDEr with prepared references and with saved document frequencies."""

import numpy as np
import pytest
import textbook
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import metrics

ANIMALS = ["dog", "cat", "horse", "bird", "cow", "bear"]
REFERENCES = {
    f"{animal}.jpg": [f"a {animal} on the grass", f"one {animal} is standing in a green field", f"the {animal}"]
    for animal in ANIMALS
}
TOKENS = {image: [metrics.tokenize(text) for text in texts] for image, texts in REFERENCES.items()}

sentences = st.lists(st.integers(0, 6), max_size=9)


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_prepared_references_score_like_the_definition(data):
    references = data.draw(st.dictionaries(st.integers(0, 9), st.lists(sentences, min_size=1, max_size=3), min_size=1))
    hypotheses = {image: data.draw(sentences) for image in references}
    scores = metrics.CiderD(references)(list(references), list(hypotheses.values()))
    np.testing.assert_allclose(scores, textbook.cider(references, hypotheses), atol=1e-9)


def test_any_number_of_hypotheses_per_image_in_any_order():
    reward = metrics.CiderD(TOKENS)
    images = ["cow.jpg", "dog.jpg", "cow.jpg", "cow.jpg"]
    hypotheses = [["a", "cow"], ["a", "unicorn"], [], ["the", "cow"]]
    batch = reward(images, hypotheses)
    singles = [reward([image], [tokens])[0] for image, tokens in zip(images, hypotheses, strict=True)]
    np.testing.assert_allclose(batch, singles, atol=1e-12)
    assert batch.argmax() == 3
    assert batch[2] == 0
    assert reward([], []).shape == (0,)


def test_length_and_repetition_are_punished():
    honest, gamed = ["a", "dog", "on", "the", "grass"], ["a", "dog", "dog", "dog", "dog", "on", "the", "grass"]
    scores = metrics.CiderD(TOKENS)(["dog.jpg"] * 2, [honest, gamed])
    assert scores[1] / scores[0] < 0.7


def test_wrong_calls():
    reward = metrics.CiderD(TOKENS)
    with pytest.raises(ValueError, match=r"image 'x\.jpg' has no references"):
        reward(["x.jpg"], [["a"]])
    with pytest.raises(ValueError, match="2 images for 1 hypotheses"):
        reward(["dog.jpg"] * 2, [["a"]])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        metrics.CiderD({1: []})


def test_saved_frequencies_give_the_same_scores(tmp_path):
    hypotheses = {image: f"a {image[:-4]} is on the lawn" for image in REFERENCES}
    file = tmp_path / "animals.safetensors"
    metrics.Idf.from_references(REFERENCES).save(file)
    again = tmp_path / "again.safetensors"
    metrics.Idf.from_references(REFERENCES).save(again)
    assert file.read_bytes() == again.read_bytes()

    idf = metrics.Idf.load(file)
    plain, saved = metrics.evaluate(REFERENCES, hypotheses), metrics.evaluate(REFERENCES, hypotheses, idf=idf)
    np.testing.assert_allclose(saved.per_image["cider"], plain.per_image["cider"], atol=1e-12)
    # one photo by itself scores 0, and with the frequencies what it scores among the others
    one = {"dog.jpg": REFERENCES["dog.jpg"]}, {"dog.jpg": hypotheses["dog.jpg"]}
    assert metrics.score(*one)["cider"] == 0
    assert metrics.score(*one, idf=idf)["cider"] == pytest.approx(plain.per_image["cider"][0])
    # words that only the frequencies know weigh as they do there
    few = {"dog.jpg": [["dog"]]}
    assert metrics.CiderD(few, idf=idf)(["dog.jpg"], [["dog", "bear"]])[0] == pytest.approx(
        metrics.CiderD({**TOKENS, **few}, idf=idf)(["dog.jpg"], [["dog", "bear"]])[0]
    )


def test_files_that_are_no_frequencies(tmp_path):
    from safetensors.numpy import load_file, save_file

    with pytest.raises(ValueError, match="cannot be read as document frequencies"):
        metrics.Idf.load(tmp_path / "missing")
    wrong = tmp_path / "wrong"
    wrong.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as document frequencies"):
        metrics.Idf.load(wrong)
    save_file({"words": np.zeros(1)}, wrong)
    with pytest.raises(ValueError, match="holds no document frequencies"):
        metrics.Idf.load(wrong)
    metrics.Idf.from_references(REFERENCES).save(wrong)
    tensors = load_file(wrong) | {"frequency_1": np.full(3, 99, dtype=np.int32)}
    save_file(tensors, wrong, metadata={"captioner-idf-1-images": "6"})
    with pytest.raises(ValueError, match="is damaged"):
        metrics.Idf.load(wrong)
    with pytest.raises(ValueError, match="only document frequencies of words"):
        metrics.Idf.from_tokens({1: [[5]], 2: [[5]]}).save(wrong)
    with pytest.raises(ValueError, match="no references to count"):
        metrics.Idf.from_references({})

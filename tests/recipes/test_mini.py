"""The steps of the recipe compute what they say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captioner import files
from captioner.config import DecoderConfig, EncoderConfig
from captioner.datasets.annotations import load
from captioner.networks import efficientnet
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from recipes.mini import common, hints, late, looks, merge, mirror, see, tune, views


def network():
    """EfficientNet-Lite2 with random weights and statistics that are not those of nothing."""
    torch.manual_seed(0)
    result = efficientnet.efficientnet_lite2().eval()
    for module in result.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return result


@torch.no_grad()
def test_the_last_stages_are_those_of_the_network(monkeypatch):
    whole = network()
    encoder = Encoder(EncoderConfig("efficientnet_lite2", "random", 192), whole.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 192, 192), dtype=torch.uint8)
    want = encoder(pixels)
    features = whole.features
    maps = features.blocks[: late.FROZEN](features.stem((pixels - 127.0) / 128)).permute(0, 2, 3, 1)
    copy = network()
    copy.load_state_dict(whole.state_dict())
    last = late.Late(copy)
    torch.testing.assert_close(last(maps), want, rtol=1e-3, atol=1e-4)

    monkeypatch.setattr(late, "pretrained", lambda: whole)
    again = Encoder(EncoderConfig("efficientnet_lite2", "random", 192), last.unfolded())
    torch.testing.assert_close(again(pixels), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (5, 2)])
def test_the_gradient_of_a_depthwise_convolution(kernel, stride):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def convolution(x, bias):
        return late._Depthwise.apply(x, weight, bias, stride, (kernel - stride) // 2)

    assert torch.autograd.gradcheck(convolution, (x, bias))


def test_blocks_that_do_not_learn_get_no_gradient():
    last = late.Late(network())
    last.averages(torch.rand(1, 12, 12, 88), learning=2).sum().backward()
    learned = [unit.bias.grad is not None for unit in last.units]
    assert learned == [False] * 8 + [True] * 2
    assert last.head.weight.grad is not None


def karpathy(folder, name, key):
    (folder / "images").mkdir(parents=True)
    images = []
    for number, split in enumerate(("train", "train", "val")):
        (folder / "images" / f"{number}.jpg").write_bytes(b"")
        sentences = [{"raw": "a dog runs"}, {"raw": "a dog sits"}]
        images.append(
            {"filename": f"{number}.jpg", "split": split, "sentences": sentences, "imgid": number, key: number}
        )
    (folder / f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": images}))
    return folder / f"dataset_{name}.json"


def merged(folder):
    files = [karpathy(folder / "a", "flickr8k", "imgid"), karpathy(folder / "b", "coco", "cocoid")]
    (folder / "merged.json").write_text(json.dumps(merge.merge(files)))
    return load(folder / "merged.json")


def test_merged_data_sets_keep_their_splits_and_folders(tmp_path):
    data = merged(tmp_path)
    assert [example.image_id for example in data.split("val")] == ["flickr8k-2", "coco-2"]
    assert [example.path for example in data.split("train")] == [
        tmp_path / folder / "images" / f"{number}.jpg" for folder in "ab" for number in (0, 1)
    ]


def test_views_of_a_photo_are_the_same_every_time_and_differ(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    seen = [views.look(tmp_path / "photo.png", view, seed=3) for view in (0, 1, 2, 1)]
    assert all(each.shape == (3, 192, 192) for each in seen)
    assert np.array_equal(seen[1], seen[3])
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])
    assert np.array_equal(views.look(tmp_path / "photo.png", "mirrored", seed=3), seen[0][:, :, ::-1])


def test_a_look_at_the_mirror_image_is_a_look_at_a_mirrored_photo(tmp_path):
    from PIL import Image, ImageOps

    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((192, 192))
    photo.save(tmp_path / "photo.png")
    ImageOps.mirror(photo).save(tmp_path / "mirrored.png")
    model, paths = files.PRETRAINED / "mini", [tmp_path / "photo.png", tmp_path / "mirrored.png"]
    for share in (1.0, 0.9):
        found = looks.look(model, paths, share).astype(np.float32)
        assert np.allclose(found[0, 0], found[1, 1], atol=0.05 * np.abs(found).max())
        assert not np.allclose(found[0, 0], found[0, 1], atol=0.05 * np.abs(found).max())
    assert np.array_equal(looks.look_together(model, paths, 2), looks.look(model, paths))


def test_a_decoder_that_has_not_learned_sees_no_photo(tmp_path):
    decoder = common.new_decoder(common.vocabulary_of(merged(tmp_path))).eval()
    first, second = (decoder.start(torch.randn(1, 4096))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_drawn_captions_are_worth_less_for_a_word_said_again(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MIN_COUNT", 1)
    data = merged(tmp_path)
    vocabulary = common.vocabulary_of(data)
    train = common.Set.of(data.split("train"), vocabulary)
    runs = vocabulary.id_of("runs")
    caption = [*vocabulary.encode(["a dog runs"])[0][1:-1], runs, vocabulary.end]
    free, punished = (tune.Rewards(train, vocabulary, penalty)([0], [caption])[0] for penalty in (0.0, 0.2))
    assert punished == pytest.approx(free - 0.2)


def test_captions_are_drawn_until_they_end(tmp_path):
    vocabulary = common.vocabulary_of(merged(tmp_path))
    decoder = common.new_decoder(vocabulary).eval()
    drawn = tune.draw(decoder, decoder.start(torch.randn(50, 4096)), vocabulary)
    assert all(vocabulary.end not in caption[:-1] for caption in drawn)
    assert not {vocabulary.pad, vocabulary.start, vocabulary.unk} & {word for caption in drawn for word in caption}


def test_an_average_forgets_its_first_value():
    module = torch.nn.Linear(2, 2)
    average = common.Average(module, 0.9)
    torch.nn.init.ones_(module.weight)
    for _ in range(100):
        average.update(module)
    torch.testing.assert_close(average.state["weight"], torch.ones(2, 2), atol=1e-3, rtol=0)


def test_a_hint_is_of_the_other_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MIN_COUNT", 1)
    data = merged(tmp_path)
    vocabulary = common.vocabulary_of(data)
    train = common.Set.of(data.split("train"), vocabulary)
    photos = [[train.tokens[number] for number in numbers] for numbers in train.by_photo()]
    texts = hints.Texts(photos, vocabulary)
    random = np.random.default_rng(0)
    drawn = [{vocabulary.word_of(i) for i in texts.hint(0, random)} for _ in range(50)]  # of "a dog runs"
    assert set().union(*drawn) == {"dog", "sits"}


def test_reading_goes_through_all_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MIN_COUNT", 1)
    data = merged(tmp_path)
    vocabulary = common.vocabulary_of(data)
    train = common.Set.of(data.split("train"), vocabulary)
    texts = hints.Texts([train.tokens], vocabulary)
    reading = hints.Reading(texts, 3, np.random.default_rng(0))
    read = [caption for _ in range(3) for caption in reading.next()[0]]
    assert len(read) == len(texts.tokens) == 8
    assert {id(caption) for caption in read} == {id(caption) for caption in texts.tokens}


def test_the_layer_that_reads_photos_begins_as_a_regression(tmp_path):
    torch.manual_seed(0)
    decoder = common.new_decoder(common.vocabulary_of(merged(tmp_path))).eval()
    features = np.random.default_rng(0).normal(size=(60, 4096)).astype(np.float32)
    see.standardise(decoder, [features])
    normal = decoder.normalise(torch.from_numpy(features))
    torch.testing.assert_close(normal.mean(0), torch.zeros(4096), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal.square().mean(0), torch.ones(4096), atol=1e-2, rtol=0)
    targets = torch.randn(60, 1024)
    bias = decoder.initial.bias.detach().clone()
    see.regress(decoder, [features], targets, strength=1.0)
    assert see.explained(decoder, torch.from_numpy(features), targets, bias) > 0.99


def test_the_layer_that_reads_photos_learns_what_the_mirror_image_adds():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(hidden_size=4, embedding_size=4, feature_norm="sqrt"), 9).requires_grad_(False)
    two = np.random.default_rng(0).random((2, 30, 4096)).astype(np.float16)
    inputs = [model.normalise(torch.from_numpy(each).float()) for each in two]
    wanted = model.initial(model.normalise(torch.from_numpy(two).float().mean(0)))

    def missing(weight, bias):
        return float(sum((x @ weight.T + bias - wanted).square().sum() for x in inputs))

    before = missing(model.initial.weight, model.initial.bias)
    engine = SimpleNamespace(decoder=model)
    assert torch.allclose(mirror.fitted(engine, two, 1e6)[0], model.initial.weight, atol=1e-4)
    assert missing(*mirror.fitted(engine, two, 0.01)) < 0.1 * before

    other = np.random.default_rng(1).random((2, 30, 4096)).astype(np.float16)  # states of other features to be reached
    wanted = model.initial(model.normalise(torch.from_numpy(other).float().mean(0)))
    before = missing(model.initial.weight, model.initial.bias)
    assert missing(*mirror.fitted(engine, two, 0.01, other)) < 0.1 * before

"""Self-critical training: the right captions are made likelier, and captions get better by it."""

# ruff: noqa: F811

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import data, isolated, make_config, make_model  # noqa: F401

from captioner import Captioner, checkpoint
from captioner.config import TrainingConfig
from captioner.datasets.annotations import Example
from captioner.datasets.batches import Batch
from captioner.errors import CaptionerError
from captioner.metrics import CiderD
from captioner.networks.decoder import Decoder
from captioner.networks.inference import TorchEngine
from captioner.training.network import Network
from captioner.training.reward import Drawn, Reward
from captioner.training.trainer import train


def some_batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    nothing = torch.zeros(count, 1, dtype=torch.int64)
    numbers, none = torch.arange(count), torch.zeros(0, dtype=torch.int64)
    return Batch(torch.rand(count, 4096, generator=generator), numbers + 10, numbers, nothing, none, none)


def draw(reward: Reward, model: Captioner, batch: Batch, *, seed: int) -> Drawn:
    decoder = decoder_of(model).eval()
    assert batch.photos is not None
    return reward.draw(decoder, decoder.start(batch.photos), batch, torch.Generator().manual_seed(seed))


def decoder_of(model: Captioner) -> Decoder:
    assert isinstance(model.engine, TorchEngine)
    return model.engine.decoder


@pytest.fixture
def model() -> Captioner:
    model = make_model()
    torch.nn.init.normal_(decoder_of(model).output.weight, std=0.3)  # unsure, so that it draws different captions
    return model


@pytest.fixture
def examples(model: Captioner) -> list[Example]:
    captions = ("a red circle", "two dogs run", "the man's green star is small", "a blue square above a circle")
    return [Example(str(n), Path(f"{n}.jpg"), (captions[n], captions[n - 1]), "train") for n in range(4)]


def test_what_is_drawn_is_weighed_by_what_it_is_worth(model: Captioner, examples: list[Example]) -> None:
    vocabulary, batch = model.vocabulary, some_batch(4)
    reward = Reward(examples, np.arange(10, 14), vocabulary)
    drawn = draw(reward, model, batch, seed=1)
    found = drawn.batch
    assert found.photo.tolist() == [n for n in range(4) for _ in range(5)]
    assert (found.tokens[:, 0] == vocabulary.start).all()
    lengths = torch.bincount(found.keep // found.inputs.shape[1]).tolist()  # words of each caption
    hypotheses = [
        [vocabulary.word_of(index) for index in row[1 : length + 1]]
        for row, length in zip(found.tokens.tolist(), lengths, strict=True)
    ]
    assert [vocabulary.id_of(word) for words in hypotheses for word in words] == found.targets.tolist()
    assert any("[end]" in words for words in hypotheses)
    assert all("[end]" not in words[:-1] and "[pad]" not in words for words in hypotheses)
    references = {
        n: [[*vocabulary.words(ids[1:]), "[end]"] for ids in vocabulary.encode(list(example.captions))]
        for n, example in enumerate(examples)
    }
    scores = CiderD(references)(found.photo.tolist(), hypotheses).reshape(4, 5)
    assert drawn.reward == pytest.approx(scores.mean())
    assert scores.any()
    weights = iter((drawn.weights * len(found.targets)).split(lengths))  # the loss is a mean over the words
    for photo in range(4):
        for caption in range(5):
            others = np.delete(scores[photo], caption).mean()
            assert torch.allclose(next(weights), torch.tensor(scores[photo, caption] - others).float(), atol=1e-5)


def test_another_seed_draws_other_captions(model: Captioner, examples: list[Example]) -> None:
    reward, batch = Reward(examples, np.arange(10, 14), model.vocabulary), some_batch(4)
    one, same, other = (draw(reward, model, batch, seed=seed).batch for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)


def test_its_gradient_raises_the_expected_reward(model: Captioner, examples: list[Example]) -> None:
    reward, batch = Reward(examples, np.arange(10, 14), model.vocabulary), some_batch(4)
    decoder = decoder_of(model)
    assert isinstance(model.engine, TorchEngine)
    network = Network(model.engine.encoder, decoder)
    optimiser = torch.optim.Adam(decoder.parameters(), 0.01)
    rewards = []
    for step in range(150):
        drawn = draw(reward, model, batch, seed=step)
        rewards.append(drawn.reward)
        loss = network(drawn.batch, drawn.weights, never=reward.never)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert np.mean(rewards[-10:]) > 2 * np.mean(rewards[:10])


def test_what_is_never_drawn_gains_nothing(model: Captioner, examples: list[Example]) -> None:
    vocabulary, batch = model.vocabulary, some_batch(4)
    reward = Reward(examples, np.arange(10, 14), vocabulary)
    drawn = draw(reward, model, batch, seed=1)
    decoder = decoder_of(model)
    assert isinstance(model.engine, TorchEngine)
    Network(model.engine.encoder, decoder)(drawn.batch, drawn.weights, never=reward.never).backward()
    assert decoder.output.bias.grad is not None
    gains = decoder.output.bias.grad.abs() > 0
    never = {vocabulary.pad, vocabulary.start, vocabulary.unk}
    assert {index for index, gain in enumerate(gains.tolist()) if not gain} == never
    assert not {*found_words(drawn)} & never


def found_words(drawn: Drawn) -> list[int]:
    return drawn.batch.targets.tolist()


# Training ----------------------------------------------------------------------------------------------------------


def second(config: TrainingConfig, output: Path, **optimisation: Any) -> TrainingConfig:
    """A run that begins with the model of another."""
    changed = replace(config.optimisation, **optimisation)
    return replace(config, start=str(config.output), output=output, optimisation=changed)


def test_a_run_begins_with_the_model_of_another(data: Path, tmp_path: Path) -> None:
    first = make_config(data, tmp_path / "first", epochs=1)
    train(first)
    still = second(first, tmp_path / "second", learning_rate=1e-12)
    train(replace(still, min_count=3))
    one, two = (checkpoint.read(tmp_path / name / "best") for name in ("first", "second"))
    assert one.decoder == two.decoder
    assert one.vocabulary.sha256 == two.vocabulary.sha256
    for name, tensor in one.decoder_state.items():
        if not name.startswith("standard"):
            assert np.allclose(tensor, two.decoder_state[name], atol=1e-8)
    train(second(first, tmp_path / "third", encoder_learning_rate=0.01))
    third = checkpoint.read(tmp_path / "third" / "best")
    assert one.encoder_state is not None
    assert third.encoder_state is not None
    assert any(not np.array_equal(tensor, third.encoder_state[name]) for name, tensor in one.encoder_state.items())
    fourth = second(replace(first, output=tmp_path / "third"), tmp_path / "fourth")
    train(replace(fourth, data=replace(first.data, features=tmp_path / "others")))  # its CNN is with it
    last = checkpoint.read(tmp_path / "fourth" / "best")
    assert last.encoder_sha256 == third.encoder_sha256
    assert last.encoder_state is not None


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        (
            "decoder",
            {"hidden_size": 999},
            "decoder.hidden_size is 999, and the model to start with has 16; leave out",
        ),
        ("encoder", {"image_size": 48}, "encoder.image_size is 48, and the model to start with has 32; leave out"),
    ],
)
def test_a_model_to_start_with_has_its_own_networks(
    data: Path, tmp_path: Path, part: str, settings: dict[str, Any], said: str
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "first")
    config = second(make_config(data, tmp_path / "first"), tmp_path / "second")
    with pytest.raises(CaptionerError, match=said):
        train(replace(config, **{part: replace(getattr(config, part), **settings)}))
    assert not (tmp_path / "second").exists()


def test_a_run_with_reward_goes_on_where_it_was_stopped(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "captioner")
    first = make_config(data, tmp_path / "first", epochs=1)
    train(first)
    whole, parts = (second(first, tmp_path / name, objective="cider", epochs=2) for name in ("whole", "parts"))
    expected = train(whole)
    from captioner.training.trainer import Trainer

    epoch = Trainer._epoch

    def stop(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.history.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    found = train(parts)
    assert [e["train_loss"] for e in found.epochs] == [e["train_loss"] for e in expected.epochs]
    assert found.epochs[0]["train_loss"] <= 0  # minus the reward
    one, two = (checkpoint.read(tmp_path / name / "last") for name in ("whole", "parts"))
    assert all(np.array_equal(tensor, two.decoder_state[name]) for name, tensor in one.decoder_state.items())


def test_a_reward_needs_a_model_that_writes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CaptionerError, match=r'objective "cider" needs a model that writes already; give one with --st'
    ):
        make_config(data, tmp_path, objective="cider")


def test_a_model_whose_weights_are_not_finite(data: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "first")
    broken = Captioner.from_pretrained(tmp_path / "first", engine="torch")
    torch.nn.init.constant_(decoder_of(broken).output.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    config = second(make_config(data, tmp_path / "broken"), tmp_path / "second", objective="cider")
    with pytest.raises(CaptionerError, match=r"decoder.output.weight holds numbers that are not finite"):
        train(config)

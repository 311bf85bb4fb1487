"""A step of training: what it computes, what it reads, what it never asks of a device; processes agree on it."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DECODER, ENCODER
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from captioner.config import OptimisationConfig
from captioner.datasets.annotations import Example
from captioner.datasets.batches import Batch, CaptionDataset
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import trains_in_bf16
from captioner.training.loading import Loader
from captioner.training.network import Network, draw, statistics_kept
from captioner.training.optimisation import Average, clip, optimiser_of
from captioner.training.reward import Reward
from captioner.training.rounding import Rounding
from captioner.vocabulary import Vocabulary

CAPTIONS = ("a red circle", "two dogs run over the green grass", "the star is small", "a blue square above a circle")
EXAMPLES = [Example(str(n), Path(f"{n}.jpg"), (CAPTIONS[n], CAPTIONS[n - 1]), "train") for n in range(4)]
VOCABULARY = Vocabulary.build(CAPTIONS, 1)
CPU = torch.device("cpu")


def network(*, trainable: bool = False, **decoder: Any) -> Network:
    torch.manual_seed(0)
    encoder = Encoder(ENCODER, trainable=trainable)
    return Network(encoder, Decoder(replace(DECODER, **{"dropout": 0.0} | decoder), len(VOCABULARY)))


def batches(*, pixels: bool = False, batch_size: int = 8, rank: int = 0, processes: int = 1) -> list[Batch]:
    random = np.random.default_rng(0)
    dataset = CaptionDataset.of(EXAMPLES, VOCABULARY, np.arange(4))
    source: Any = random.random((4, 4096), np.float32).astype(np.float16)
    if pixels:
        source = random.integers(0, 256, (4, 3, 32, 32), np.uint8)
    shares = dataset.epoch(0, batch_size=batch_size, seed=0, rank=rank, processes=processes, by_photo=pixels)
    return list(Loader(dataset, source, CPU)(shares))


# What it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "sqrt"])
def test_the_loss_is_that_of_each_caption_by_itself(norm: Any) -> None:
    model, (batch,) = network(feature_norm=norm), batches()
    assert batch.photos is not None
    logits = model.decoder(batch.photos[batch.photo], batch.inputs)
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), ignore_index=VOCABULARY.pad, reduction="sum"
    )
    assert model(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(batch).item() * batch.weight == pytest.approx(expected.item() / len(batch.targets), rel=1e-5)


def test_own_words_are_read_where_they_may_be() -> None:
    model, (batch,) = network(), batches()
    with torch.no_grad():
        model.decoder.output.bias[VOCABULARY.unk] = 1000.0  # a model that always writes [unk]
    state = model.start(batch)
    inputs = model._partly_own(batch, state, 1.0)
    changed = inputs == VOCABULARY.unk
    # All words but `[start]`, and but those behind the last that is predicted, of which nothing is learned.
    time = batch.inputs.shape[1]
    expected = torch.zeros_like(changed)
    for row, length in enumerate(torch.bincount(batch.keep // time).tolist()):
        expected[row, 1 : min(length + 1, time)] = True
    assert torch.equal(changed, expected)
    assert torch.equal(inputs[~changed], batch.inputs[~changed])
    assert torch.equal(model._partly_own(batch, state, 0.0), batch.inputs)
    torch.manual_seed(0)
    some = (model._partly_own(batch, state, 0.5) == VOCABULARY.unk).sum() / changed.sum()
    assert 0.25 < float(some) < 0.75
    assert model(batch, own_words=1.0).item() != model(batch).item()


def test_words_are_drawn_as_often_as_the_logits_say() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20000, 4)
    drawn = torch.bincount(draw(logits, torch.Generator().manual_seed(0)), minlength=4) / 20000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.015)


def test_statistics_of_a_batch_can_be_used_and_forgotten() -> None:
    layer = nn.BatchNorm2d(3)
    x = torch.rand(4, 3, 5, 5) + 3
    with statistics_kept(layer):
        inside = layer(x)
    assert not layer.running_mean.any()  # type: ignore[union-attr, operator]
    assert torch.equal(layer(x), inside)
    assert layer.running_mean.all()  # type: ignore[union-attr, operator]


def test_an_encoder_learns_when_it_is_let() -> None:
    model, (batch,) = network(trainable=True), batches(pixels=True)
    assert model.encoder is not None
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    model.let_encoder_learn(False)
    model.train()
    model(batch).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    model.let_encoder_learn(True)
    model.train()
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


# What it never asks ------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses the operations whose result has a size, or is a number, that the host must know: they stop a GPU."""

    _WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "equal", "unique", "item", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        boolean = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if boolean or any(name.removeprefix("_").startswith(each.removeprefix("_")) for each in self._WAITING):
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: bool((x > 0).all()),
    ],
)
def test_the_watch_sees_what_it_should(wait: Any) -> None:
    x = torch.rand(3)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        wait(x)


@pytest.mark.parametrize("pixels", [False, True], ids=["features", "photos"])
@pytest.mark.parametrize("average", ["none", "ema"])
@pytest.mark.parametrize("own_words", [0.0, 0.3])
def test_no_step_waits(pixels: bool, average: Any, own_words: float) -> None:
    options = OptimisationConfig(average=average, gradient_clip_value=1.0, weight_decay=0.01)
    model = network(trainable=pixels, feature_norm="standard", dropout=0.3).train()
    optimiser, averaged = optimiser_of(model, options), Average(model, options)
    rounding = Rounding("bf16" if trains_in_bf16(CPU) else "fp32", CPU)
    total = torch.zeros((), dtype=torch.float64)
    some = batches(pixels=pixels, batch_size=4)
    with NoWaiting():
        for step, batch in enumerate(some, 1):
            with rounding.autocast():
                loss = model(batch, smoothing=0.1, own_words=own_words)
            optimiser.zero_grad()
            rounding.scaled(loss * batch.weight).backward()  # type: ignore[no-untyped-call]
            rounding.unscale(optimiser)
            clip(model, options)
            rounding.step(optimiser)
            averaged.after_step(step)
            total += loss.detach()
    assert total.isfinite()


def test_no_draw_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are drawn, and learned from, without a look at the words; one copy between brings them to the host."""
    monkeypatch.setattr(Reward, "_looks", staticmethod(lambda over: False))  # as on a GPU
    reward = Reward(EXAMPLES, np.arange(4), VOCABULARY, max_words=6)
    model, (batch,) = network(feature_norm="standard").eval(), batches()
    with NoWaiting():
        words = reward.words(model.decoder, model.decoder.start(model.features(batch)))
    assert words.shape == (20, 6)
    drawn = reward.draw(model.decoder, model.decoder.start(model.features(batch)), batch)
    with NoWaiting():
        model.train()(drawn.batch, drawn.weights, never=reward.never).backward()


# Several processes -------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: Path, pixels: bool, batch_size: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = network(trainable=pixels)
    wrapped = DistributedDataParallel(model)
    for batch in batches(pixels=pixels, batch_size=batch_size, rank=rank, processes=2):
        (wrapped(batch, smoothing=0.1) * batch.weight).backward()
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
# Of 8 captions: the same share for both processes, and unequal ones.
@pytest.mark.parametrize(("pixels", "batch_size"), [(False, 4), (True, 3)], ids=["features", "photos"])
def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path, pixels: bool, batch_size: int) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, tmp_path, pixels, batch_size)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    together = torch.load(tmp_path / "gradients.pt")
    model = network(trainable=pixels)
    for batch in batches(pixels=pixels, batch_size=2 * batch_size):
        (model(batch, smoothing=0.1) * batch.weight).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(together[name], parameter.grad, atol=1e-6, rtol=1e-4), name


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

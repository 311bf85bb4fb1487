"""Learning rates of steps and layers, clipping, and averaged weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import DECODER, ENCODER
from torch import nn

from captioner.config import OptimisationConfig
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.training.network import Network
from captioner.training.optimisation import Average, clip, optimiser_of, warmed


def network(trainable: bool) -> Network:
    return Network(Encoder(ENCODER, trainable=trainable), Decoder(DECODER, 9))


# Learning rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_every_schedule_warms_up_first(schedule: Any) -> None:
    config = OptimisationConfig(epochs=10, warmup_steps=4, schedule=schedule)
    assert [warmed(config, step, 10) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_what_schedules_come_to() -> None:
    config = OptimisationConfig(epochs=12, warmup_steps=0)
    assert warmed(config, 119, 10) == pytest.approx(0.01, abs=1e-3)
    assert warmed(config, 60, 10) == pytest.approx(0.505)
    assert {warmed(replace(config, schedule="constant"), step, 10) for step in range(120)} == {1.0}
    falling = replace(config, schedule="step", step_epochs=3, step_share=0.5)
    assert [warmed(falling, step, 10) for step in (0, 29, 30, 59, 60, 119)] == [1, 1, 0.5, 0.5, 0.25, 0.125]


def test_layers_at_the_beginning_of_a_cnn_learn_less() -> None:
    model = network(trainable=True)
    config = OptimisationConfig(learning_rate=0.1, encoder_learning_rate=0.01, encoder_layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimiser_of(model, config).param_groups for p in group["params"]}
    assert {rates[id(parameter)] for parameter in model.decoder.parameters()} == {0.1}
    assert model.encoder is not None
    found = [rates[id(parameter)] for parameter in model.encoder.parameters()]
    assert found == sorted(found)
    assert found[-1] == 0.01
    assert sorted(set(found)) == pytest.approx([0.01 * 0.5**n for n in reversed(range(len(set(found))))])
    assert len(set(found)) > 2


def test_matrices_decay_and_biases_do_not() -> None:
    model = network(trainable=False)
    config = OptimisationConfig(learning_rate=0.5, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = optimiser_of(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * (0.95 if parameter.dim() > 1 else 1)), name


def test_clipping_bounds_numbers_and_norm() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 8.0), torch.full((2,), -0.5)
    norm = clip(layer, OptimisationConfig(gradient_clip=1e9, gradient_clip_value=2.0))
    assert layer.weight.grad.tolist() == [[2.0] * 3] * 2
    assert layer.bias.grad.tolist() == [-0.5] * 2
    assert float(norm) == pytest.approx((6 * 4 + 2 * 0.25) ** 0.5)
    clip(layer, OptimisationConfig(gradient_clip=0.1))
    assert float(nn.utils.get_total_norm([layer.weight.grad, layer.bias.grad])) == pytest.approx(0.1, rel=1e-4)


# Averages ----------------------------------------------------------------------------------------------------------


def run(config: OptimisationConfig, values: list[float], steps_an_epoch: int = 1) -> tuple[nn.Linear, Average]:
    """Weights that take these values, one a step."""
    layer = nn.Linear(2, 1)
    average = Average(layer, config)
    for step, value in enumerate(values, 1):
        nn.init.constant_(layer.weight, value)
        average.after_step(step)
        if step % steps_an_epoch == 0:
            average.after_epoch(step // steps_an_epoch)
    return layer, average


def mean(layer: nn.Linear, average: Average) -> float:
    with average.in_use():
        return float(layer.weight[0, 0])


def test_a_moving_average_forgets_the_past_slowly() -> None:
    config = OptimisationConfig(average="ema", ema_decay=0.5)
    expected = 1.0
    for step, value in enumerate([2.0, 3.0, 4.0], 2):
        expected += (value - expected) * (1 - min(0.5, (1 + step) / (10 + step)))
    assert mean(*run(config, [1.0, 2.0, 3.0, 4.0])) == pytest.approx(expected)
    steady = replace(config, ema_decay=0.9)
    assert mean(*run(steady, [*[1.0] * 50, *[0.0] * 20])) == pytest.approx(0.9**20, rel=0.6)


def test_the_epochs_of_the_second_half_count_alike() -> None:
    config = OptimisationConfig(average="epochs", epochs=6)
    values = [float(n) for n in range(1, 13)]
    assert mean(*run(config, values, steps_an_epoch=2)) == pytest.approx((8 + 10 + 12) / 3)
    layer, average = run(config, values, steps_an_epoch=2)
    average.after_epoch(6)  # a run that was stopped while it validated says so again
    assert mean(layer, average) == pytest.approx(10)


def test_the_weights_come_back() -> None:
    layer, average = run(OptimisationConfig(average="ema", ema_decay=0.5), [1.0, 5.0])
    with average.in_use():
        inside = float(layer.weight[0, 0])
        with average.own_weights():
            assert float(layer.weight[0, 0]) == 5
        assert float(layer.weight[0, 0]) == inside != 5
    assert float(layer.weight[0, 0]) == 5
    with average.own_weights():
        assert float(layer.weight[0, 0]) == 5


def test_without_averages_the_weights_are_the_last() -> None:
    layer, average = run(OptimisationConfig(), [1.0, 5.0])
    assert mean(layer, average) == 5
    assert average.state() == {}


def test_without_averages_nothing_is_kept() -> None:
    assert not Average(nn.Linear(2, 1), OptimisationConfig())._tensors

"""Moments of parameters that a cut multiplies with numbers, of optimizers that do not keep one of each entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import MAMBA1_FAMILY, lively, selection_plan, silence_states, train
from training import KEPT, SILENT

from hf_compressm import compress_, find_mixers


def second_moment(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the optimizer divides by, squared; Adafactor keeps its averages over rows and over columns."""
    if "row_var" in state:
        return state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)
    if "exp_avg_sq_row" in state:
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return rows[..., :, None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
    return next(state[key] for key in ("variance", "exp_avg_sq", "square_avg") if key in state)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
    "transformers Adafactor": lambda parameters: transformers.Adafactor(parameters),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["falcon_mamba", "jamba"])
def test_moments_follow_the_gradients(name, optimizer):
    """A gradient is divided by what its parameter is multiplied with; RMSprop's buffer is of steps, and stays."""
    model = lively(MAMBA1_FAMILY[name].build())
    silence_states(model, SILENT)
    held = OPTIMIZERS[optimizer](model.parameters())
    train(model, held, range(2))
    plan, parameters = selection_plan(model, KEPT), dict(model.named_parameters())
    axes = {
        next(key for key, parameter in parameters.items() if parameter is axis.tensor): (axis, plan.layers[layer])
        for layer, mixer in find_mixers(model).items()
        for axis in mixer.axes
    }
    expected, buffers = {}, {}
    for key, parameter in parameters.items():
        state = held.state[parameter]
        expected[key], buffers[key] = second_moment(state).clone(), state.get("momentum_buffer")
        if key in axes:
            axis, layer = axes[key]
            expected[key] = axis.take(expected[key], layer.kept, 8)
            buffers[key] = None if buffers[key] is None else axis.take(buffers[key], layer.kept, 8)
            factors = axis.factors(layer.scales, 4)
            if factors is not None:
                expected[key] = expected[key].movedim(axis.dim, -1).div(factors.float() ** 2).movedim(-1, axis.dim)
    compress_(model, plan, held)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(second_moment(held.state[parameter]), expected[key], rtol=1e-4, atol=0, msg=key)
        if buffers[key] is not None:
            assert torch.equal(held.state[parameter]["momentum_buffer"], buffers[key]), key

"""`bn_act_fake_quant` in C++: csrc/cpu/bn_act_fake_quant.cpp."""

from __future__ import annotations

from torch import Tensor

from dfq_kernels.bn_act_fake_quant import schema
from dfq_kernels.extension import address, native, where, workspace
from dfq_kernels.memory import ACTIVATIONS, DTYPES, Updated, dense, fp32, in_order_of, optional, view
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    observe: bool,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out, mean, var, used)`, copies of the statistics that normalised and of the scale and zero point that rounded;
    stored statistics and range are updated in place."""
    x, weight, bias = dense(x), optional(weight), optional(bias)
    out, mean, var, used = schema.allocate(x)
    stored = Updated((running_mean, running_var), training)
    moving = Updated((running_min, running_max, scale, zero_point), observe)
    stored_mean, stored_var, *parameters = [value.data_ptr() for value in (*stored.values, *moving.values)]
    shape = view(x, 1)
    room = workspace(x, shape)
    native().bn_act_fake_quant_forward(
        DTYPES[x.dtype], where(x, room), *shape, x.data_ptr(), address(weight), address(bias),
        stored_mean, stored_var, training, observe, momentum, eps, ACTIVATIONS[activation], *parameters,
        averaging_constant, quant_min, quant_max, symmetric, out.data_ptr(), mean.data_ptr(), var.data_ptr(),
        used.data_ptr(),
    )  # fmt: skip
    stored.done()
    moving.done()
    return out, mean, var, used


@register(schema.BACKWARD, "native")
def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    quant_min: int,
    quant_max: int,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, scale and zero_point, the last two of no dimensions; without elements if not
    learned."""
    x, weight, bias, mean, var = dense(x), optional(weight), optional(bias), fp32(mean), fp32(var)
    scale, zero_point, grad_out = fp32(scale), fp32(zero_point), in_order_of(x, grad_out)
    grads = schema.allocate_grads(grad_out, x, learned)
    grad_x, grad_weight, grad_bias, *of_range = [grad.data_ptr() for grad in grads]
    shape = view(x, 1)
    room = workspace(x, shape)
    native().bn_act_fake_quant_backward(
        DTYPES[x.dtype], where(x, room), *shape, grad_out.data_ptr(), x.data_ptr(), address(weight),
        address(bias), mean.data_ptr(), var.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), training, eps,
        ACTIVATIONS[activation], quant_min, quant_max, grad_x, grad_weight, grad_bias,
        *(of_range if learned else (0, 0)),
    )  # fmt: skip
    return grads

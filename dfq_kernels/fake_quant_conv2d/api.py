"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import FLOATS, check_device, check_float, check_scalar
from dfq_kernels._eager import once, recorded
from dfq_kernels._integer_checks import Geometry, check_geometry, require
from dfq_kernels.dispatch import named, resolve
from dfq_kernels.int_conv2d.schema import out_shape

OP = "fake_quant_conv2d"


def fake_quant_conv2d(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution of fake-quantized values, by their integers where that is faster.

        out = conv2d(x, weight) + bias = x_scale * weight_scale[c] * conv2d(q_x, q_weight) + bias[c]
        q_x = rne(x * (1 / x_scale));  q_weight = rne(weight * (1 / weight_scale[c]))

    `native` (CPU) multiplies the integers: their sums are exact, and three roundings follow (`float(acc)`, the product
    with `x_scale * weight_scale[c]`, the bias); so it is what `int_conv2d` makes of the same integers. It refuses what
    does not fit: values that are no bytes (NaN, more than 8 bits), or in bf16 above 127 in magnitude, where they do not
    say which integer it was. `reference` is `F.conv2d` of the values, as on a GPU. `backend=None` takes it for what
    `native` refuses, and for layers that torch's floats are faster at: few pixels, groups of few channels, depthwise.

    Gradients of x, weight and bias: those of `conv2d(x, weight) + bias`, once. The scales have none here; theirs come
    from `fake_quant`, which made the values.

    Args:
        x: `[N, C, H, W]`, multiples of x_scale in a span of 256: float32, bfloat16 or float16 (float64: `reference`).
            A value between two multiples is taken for the nearer one by `native`.
        x_scale: one number, fp32.
        weight: `[O, C / groups, kh, kw]`, float; multiples of its scales, in [-128, 127] of them.
        weight_scale: `[O]`, or one number.
        bias: `[O]`, or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, integers.
        dtype: of the result; None: of x. Under autocast `F.conv2d` would take `torch.get_autocast_dtype(...)`.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        `[N, O, OH, OW]`, channels-last where x or weight is.

    Raises:
        ValueError: a wrong shape, dtype or device; an explicit `native` with values that are no bytes.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2018 (arXiv 1712.05877) section 2.2.
    """
    geometry = _check(x, x_scale, weight, weight_scale, bias, (stride, padding, dilation, groups))
    dtype = x.dtype if dtype is None else dtype
    require(OP, dtype in FLOATS, "dtype", "float32, bfloat16, float16 or float64", dtype)
    like = x.new_empty(0, dtype=torch.float64) if torch.float64 in (weight.dtype, dtype) else x
    impl, strict = resolve(OP, backend, like, x, weight, *geometry), named(OP, backend) is not None
    constants = x_scale.detach(), weight.detach(), weight_scale.detach().reshape(-1).expand(len(weight))
    if not hasattr(impl, "backward"):
        return impl.forward(x, x_scale, weight, weight_scale, bias, *geometry, dtype, strict)
    if not recorded(x, weight, bias):
        return impl.forward(x, *constants, bias, *geometry, dtype, strict)
    link = None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        link = OfWeight.apply(weight, bias, x.detach(), geometry, dtype, impl)
    shift = None if bias is None else bias.detach()
    return OfX.apply(x, link, *constants, shift, geometry, dtype, strict, impl)


def _check(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> Geometry:
    for name, value in (("x", x), ("weight", weight)):
        check_float(OP, name, value)
        fits = value.dim() == 4 and 0 not in value.shape[1:]
        rule = "[N, C, H, W] of at least one channel and pixel" if name == "x" else "[O, C / groups, kh, kw]"
        require(OP, fits, name, rule, tuple(value.shape))
    require(OP, len(weight) > 0, "weight", "[O, C / groups, kh, kw]", tuple(weight.shape))
    check_device(OP, "weight", weight, x)
    check_scalar(OP, x, x_scale=x_scale)
    check_float(OP, "weight_scale", weight_scale)
    fits = tuple(weight_scale.shape) in ((len(weight),), (1,), ())
    require(OP, fits, "weight_scale", f"one number or of shape ({len(weight)},)", tuple(weight_scale.shape))
    check_device(OP, "weight_scale", weight_scale, x)
    if bias is not None:
        check_float(OP, "bias", bias)
        require(OP, tuple(bias.shape) == (len(weight),), "bias", f"of shape ({len(weight)},)", tuple(bias.shape))
        check_device(OP, "bias", bias, x)
    return check_geometry(OP, x.shape, weight.shape, *geometry)


class OfWeight(torch.autograd.Function):
    """Gives a result's gradient to weight and bias: zeros of its shape that take no memory.

    A node of its own, so that a backward that leaves out the weights (a generator's, through its student) does not
    make their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, geometry: Geometry, dtype: torch.dtype,
        impl: ModuleType,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.impl, ctx.bias_dtype = geometry, impl, None if bias is None else bias.dtype
        return x.new_zeros((), dtype=dtype).expand(out_shape(x, weight, *geometry[:3]))

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = False, *ctx.needs_input_grad[:2]
        _, grad_weight, grad_bias = ctx.impl.backward(grad_out, x, weight, ctx.geometry, wanted)
        grad_bias = grad_bias if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return grad_weight, grad_bias, None, None, None, None


class OfX(torch.autograd.Function):
    """The convolution, and the gradient of x; what it gives to `link` goes on to weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, link: Tensor | None, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
        bias: Tensor | None, geometry: Geometry, dtype: torch.dtype, strict: bool, impl: ModuleType,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.impl = geometry, impl
        out: Tensor = impl.forward(x, x_scale, weight, weight_scale, bias, *geometry, dtype, strict)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.impl.backward(grad_out, *ctx.saved_tensors, ctx.geometry, (True, False, False))[0]
        return grad_x, grad_out if ctx.needs_input_grad[1] else None, *[None] * 8

"""Integer convolutions layer by layer: `python -m benchmarks.layers [--out FILE]`.

Each layer of 8-bit activations, with its rounding to 8 bits, as an operator whose weights are packed: on a CPU against
oneDNN's int8 convolution through torch's private operator (where this torch has it), on a GPU in a CUDA graph against
fp16 in channels-last; and on a CPU what a student's layer costs in training, fake-quantized to 4 bits, against torch's
convolution of the same values. Ceiling, in the same rounds: torch's int8 product of 2048 x 2048 matrices, to int32.
The integers must be the reference's and, but for its own order of roundings at halves, oneDNN's: else the row is red.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dfq_kernels as k
from benchmarks.machine import results_file
from benchmarks.outcome import Red, finish
from benchmarks.timing import captured, interleaved, per_graph
from dfq_kernels.dispatch import missing
from dfq_kernels.int_conv2d.native import one_step
from dfq_kernels.integers import Epilogue, flat

SIDE = 2048  # of the matrix product
GRID, OUT = k.Grid(0.1, 3, 0, 255), k.Grid(0.05, 100, 0, 255)


class Layer(NamedTuple):
    """Channels in, side of the square map, channels out, kernel, stride."""

    given: int
    side: int
    made: int
    kernel: int = 3
    stride: int = 1

    def products(self, batch: int) -> int:
        return batch * (self.side // self.stride) ** 2 * self.given * self.made * self.kernel**2


# of WRN-16-1, of MobileNet-v2 (the dense ones), of ResNet-18
LAYERS = (
    Layer(3, 32, 16), Layer(16, 32, 16), Layer(32, 16, 32), Layer(64, 8, 64),
    Layer(96, 16, 24, 1), Layer(32, 8, 192, 1),
    Layer(3, 224, 64, 7, 2), Layer(64, 56, 64), Layer(128, 28, 128), Layer(256, 14, 256), Layer(512, 7, 512),
)  # fmt: skip
BATCHES = {"cpu": (1, 8, 128), "cuda": (64, 256)}
NEAR = {torch.bfloat16: 2.0**-6, torch.float32: 1e-5}  # torch's sums are rounded on their way
LARGEST = {"cpu": 2**24, "cuda": 2**28}  # elements of x


def tensors(layer: Layer, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, multipliers and biases of integers that fill their grid."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, layer.given, layer.side, layer.side
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (layer.made, layer.given, layer.kernel, layer.kernel), generator=generator)
    mult = torch.rand(layer.made, generator=generator) / (layer.given * layer.kernel**2 * 80)
    bias = torch.randn(layer.made, generator=generator)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    return x, weight.to(device, torch.int8), mult.to(device), bias.to(device)


def on_cpu(layer: Layer, x: Tensor, weight: Tensor, mult: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """This library's program of one step, and oneDNN where torch has its operator."""
    packed, pair = k.pack_weight(weight), [layer.stride] * 2
    padding, settings = [layer.kernel // 2] * 2, Epilogue(None, (OUT,), (8,)).flat()
    step = one_step(
        x, flat(GRID, 8), packed.q, packed.sums, 8, mult, bias, pair, padding, [1, 1], 1, None, [], *settings
    )
    calls: dict[str, Callable[[], Tensor]] = {"native": lambda: step.run(x)[0]}
    try:
        scales, zeros = mult / GRID.scale, torch.zeros(layer.made, dtype=torch.int64)
        theirs = torch.ops.onednn.qconv_prepack(
            weight, scales, GRID.scale, GRID.zero_point, pair, padding, [1, 1], 1, list(x.shape)
        )
    except (AttributeError, RuntimeError) as error:  # a private operator: other versions have another, or none
        print(f"no oneDNN: {str(error).splitlines()[0]}")
        return calls
    calls["onednn"] = lambda: torch.ops.onednn.qconv2d_pointwise(
        x, GRID.scale, GRID.zero_point, theirs, scales, zeros, bias, pair, padding, [1, 1], 1, OUT.scale,
        OUT.zero_point, torch.uint8, "none", [], "",
    )  # fmt: skip
    return calls


def on_gpu(layer: Layer, x: Tensor, weight: Tensor, mult: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The Triton kernel at W8A8 and W4A4, and fp16 by the fastest of cuDNN's algorithms."""
    torch.backends.cudnn.benchmark = True
    geometry: Any = {"stride": layer.stride, "padding": layer.kernel // 2}
    half = x.half().contiguous(memory_format=torch.channels_last)
    factors = weight.half().contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Tensor]] = {
        "torch fp16": lambda: torch.nn.functional.conv2d(half, factors, bias.half(), **geometry)
    }
    for name, bits in (("triton", 8), ("triton W4A4", 4)):
        packs = bits < 8 and layer.given % 2 == 0
        grid, out = (GRID, OUT) if bits == 8 else (k.Grid(0.1, 3, 0, 15), k.Grid(0.05, 7, 0, 15))
        real = ((x >> (8 - bits)).float() - grid.zero_point) * grid.scale  # of the same integers
        values = k.quantize(real, grid, packed=packs, check_nan=False)
        packed = k.pack_weight(weight >> (8 - bits), bits)
        calls[name] = lambda v=values, w=packed, out=out, packs=packs: (
            k.int_conv2d(  # type: ignore[misc]
                v, w, mult, bias, out, packed=packs, backend="triton", **geometry
            )[0].q
        )
    return calls


def check(
    calls: dict[str, Callable[[], Tensor]], x: Tensor, weight: Tensor, mult: Tensor, bias: Tensor, layer: Layer
) -> None:
    """The integers of the reference, and nearly all of oneDNN's."""
    name = next(iter(set(calls) & {"native", "triton"}))
    found = calls[name]()
    (expected,) = k.int_conv2d(
        k.QuantizedTensor(x[:1], GRID), k.pack_weight(weight), mult, bias, OUT, stride=layer.stride,
        padding=layer.kernel // 2, backend="reference",
    )  # fmt: skip
    if not torch.equal(found[:1], expected.q):
        raise Red(f"{name} must equal the reference before it is measured, {layer} does not")
    if "onednn" in calls:
        off = (calls["onednn"]().int() - found.int()).abs()
        if int(off.max()) > 1 or float(off.float().mean()) > 1e-3:
            raise Red(f"oneDNN must compute the same layer, {layer} does not")


def measure(
    layer: Layer, batch: int, device: torch.device, seconds: float, *, as_on_gpu: bool | None = None
) -> dict[str, Any]:
    """One row: microseconds of each call, and rates in 1e9 operations (two a product) per second.

    as_on_gpu: the calls of a GPU, in graphs; None: where the device is one.
    """
    gpu = device.type == "cuda" if as_on_gpu is None else as_on_gpu
    arguments = tensors(layer, batch, device)
    calls = (on_gpu if gpu else on_cpu)(layer, *arguments)
    check(calls, *arguments, layer)
    one, other = (torch.randint(-127, 128, (SIDE, SIDE), device=device, dtype=torch.int8) for _ in "ab")
    variants: dict[str, Callable[[], object]] = {**calls, "matmul": lambda: torch._int_mm(one, other.t())}
    repeated = 1
    if gpu:
        repeated = per_graph(arguments[0].nbytes)
        variants = {name: captured(call, repeated) for name, call in variants.items()}
    times = {name: value.median for name, value in interleaved(variants, seconds=seconds, calls=repeated).items()}
    ours, ceiling = times["triton" if gpu else "native"], 2 * SIDE**3 / times.pop("matmul")
    rate = 2 * layer.products(batch) / ours
    row = {"layer": list(layer), "batch": batch, "gops": round(rate / 1e9, 1), "of_matmul": round(rate / ceiling, 3)}
    return row | {f"{name}_us": round(value * 1e6, 1) for name, value in times.items()}


def training(layer: Layer, batch: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """One row: a forward of `fake_quant_conv2d` on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, layer.given, layer.side, layer.side
    scale, scales = torch.tensor(0.25), torch.rand(layer.made, generator=generator) + 0.5
    x = (torch.randint(0, 16, shape, generator=generator) * scale).to(dtype)
    q = torch.randint(-7, 8, (layer.made, layer.given, layer.kernel, layer.kernel), generator=generator)
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, q * scales.reshape(-1, 1, 1, 1)))
    settings: Any = {"stride": layer.stride, "padding": layer.kernel // 2}

    def call(backend: str) -> Tensor:
        return k.fake_quant_conv2d(x, scale, weight, scales, **settings, backend=backend)

    found, expected = call("native").float(), call("reference").float()
    if float((found - expected).norm() / expected.norm()) > NEAR[dtype]:
        raise Red(f"native must be near the reference before it is measured, {layer} is not")
    torch_s = partial(torch.conv2d, **settings)
    times = interleaved(
        {"native": lambda: call("native"), "torch": lambda: torch_s(x, weight.to(dtype))}, seconds=seconds
    )
    ours, theirs = times["native"].median, times["torch"].median
    return {"layer": list(layer), "batch": batch, "training": str(dtype).removeprefix("torch."),
            "native_us": round(ours * 1e6, 1), "torch_us": round(theirs * 1e6, 1),
            "times_torch": round(theirs / ours, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; default: one of this machine's name")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = "triton" if device.type == "cuda" else "native"
    if (reason := missing("int_conv2d", backend, device.type)) is not None:
        raise SystemExit(f"benchmarks: {backend} must be there to be measured: {reason}")
    rows: list[dict[str, Any]] = []

    def note(call: Callable[[], dict[str, Any]], **what: Any) -> None:
        try:
            rows.append(call())
        except Red as red:
            rows.append({**what, "red": str(red)})
        print(json.dumps(rows[-1]), flush=True)

    for layer in LAYERS:
        for batch in BATCHES[device.type]:
            if batch * layer.given * layer.side**2 <= LARGEST[device.type]:
                note(partial(measure, layer, batch, device, arguments.seconds), layer=list(layer), batch=batch)
    if device.type == "cpu":
        batch = BATCHES["cpu"][-1]
        fitting = [layer for layer in LAYERS if batch * layer.given * layer.side**2 <= LARGEST["cpu"]]
        for layer, dtype in product(fitting, (torch.bfloat16, torch.float32)):
            note(partial(training, layer, batch, dtype, arguments.seconds), layer=list(layer), batch=batch)
    finish(arguments.out or results_file("layers"), rows)


if __name__ == "__main__":
    main()

"""Compiles every Triton kernel without a GPU: `python -m tests.triton_compile sm_80 sm_90 sm_100`.

Operators are called on CPU tensors while `launch` records instead of running; what it was given is compiled to cubin.
One JSON line per kernel: how it loads, whether products and sums are fused, what the assembler says it uses, and how
many instructions the kernel and a turn of its longest loop have.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dfq_kernels as k
from dfq_kernels import dispatch, tiles
from dfq_kernels.dispatch import TABLE, written
from tests.sass import TOOLS, counted

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
            torch.int32: "*i32"}  # fmt: skip
BACKENDS = {op: importlib.import_module(f"dfq_kernels.{op}.triton") for op in TABLE if written(op, "triton", "cuda")}
Launch = tuple[Any, str, tuple[Any, ...], dict[str, Any]]


def specialized(kernel: Any, arguments: tuple[Any, ...], compile_time: dict[str, Any]) -> ASTSource:
    """The source as Triton's own launcher would specialize it: None and 1 are constants, multiples of 16 are known."""
    types: dict[str, Any] = dict.fromkeys(compile_time, "constexpr")
    constants: dict[Any, Any] = dict(compile_time)
    known: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, *path: int) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(item, *path, index) for index, item in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path if len(path) > 1 else kernel.arg_names[path[0]]] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            known[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return ("i32" if value < 2**31 else "i64") if isinstance(value, int) else "fp32"

    pairs = zip(kernel.arg_names, arguments, strict=False)
    types |= {name: kind(value, index) for index, (name, value) in enumerate(pairs)}
    return ASTSource(kernel, types, constexprs=constants, attrs=known)


def record_launches() -> dict[str, Launch]:
    """Every kernel that the operators launch, by operator, name, storage type and compile-time arguments."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, name: str, programs: int, like: Any, *arguments: Any, **compile_time: Any) -> None:
        types = "/".join(POINTERS[a.dtype] for a in arguments[:2] if isinstance(a, torch.Tensor))
        key = f"{kernel.fn.__module__.split('.')[1]} {kernel.fn.__name__} {types} {sorted(compile_time.items())}"
        found.setdefault(key, (kernel, name, arguments, compile_time))

    for module in (tiles, *BACKENDS.values()):
        module.launch = record  # type: ignore[attr-defined]
    for dtype, memory_format in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        call_training(torch.randn(64, 32, 16, 16).to(dtype).contiguous(memory_format=memory_format))
    with mock.patch.object(dispatch, "missing", lambda *_: None):  # Triton on the CPU, for it only records
        call_integers()
    return found


def call_training(x: torch.Tensor) -> None:
    """Every forward and backward of every training operator; results are not looked at."""
    c, s, lists = torch.ones(32), torch.ones(()), [[torch.ones(32), torch.ones(64)]] * 4
    b = BACKENDS
    for axis, scale in ((None, s), (1, c)):
        out, mask = b["fake_quant"].forward(x, scale, scale, 0, 15, axis)
        b["fake_quant"].backward_learned(out, x, scale, scale, 0, 15, axis)
    b["fake_quant"].backward(x, mask, x.stride())
    b["observe_fake_quant"].forward(x, *[s.clone() for _ in range(4)], 0.01, 0, 15, False)
    b["fake_quant_weights"].forward([x, x[:1]], [4, 8], torch.bfloat16)
    b["bn_stats"].forward(x)
    b["bn_stats"].backward(c, c, x, c)
    b["bn_act_stats"].forward(x, c, c, c, c, 1e-5, "relu")
    b["bn_act_stats"].backward(x, c, c, x, c, c, c, c, c, 1e-5, "relu")
    b["bn_stat_loss"].forward(*lists, [1e-5, 1e-3])
    b["bn_stat_loss"].backward(s, *lists, [1e-5, 1e-3])
    for training in (True, False):
        ranges = [s.clone() for _ in range(4)]
        settings = (training, 0.1, 1e-5, "relu", True, 0.01, 0, 15, False)
        b["bn_act_fake_quant"].forward(x, c, c, c.clone(), c.clone(), *ranges, *settings)
        b["bn_act_fake_quant"].backward(x, x, c, c, c, c, s, s, training, 1e-5, "relu", 0, 15, training)


def call_integers() -> None:
    """Every integer operator in every storage; results are not looked at."""
    vectors = {name: torch.ones(64) for name in ("mean", "mult", "bias")}
    for bits, weight_bits, signed in ((8, 8, False), (8, 4, True), (4, 4, False), (4, 4, True), (2, 2, False)):
        low = -(2 ** (bits - 1)) if signed else 0
        grid = k.Grid(0.5, low, low, low + 2**bits - 1)
        x = k.quantize(torch.zeros(64, 64, 16, 16), grid, packed=True, backend="reference")
        kept = {"packed": True, "backend": "triton"}
        ends = {"outs": (grid,), "activation": "relu", "then": k.Requantize((grid,), **vectors), **kept}
        for inner, window in ((64, {"padding": 1}), (1, {"padding": 1, "groups": 64})):
            weight = k.pack_weight(torch.ones(64, inner, 3, 3, dtype=torch.int8), weight_bits)
            k.int_conv2d(x, weight, vectors["mult"], vectors["bias"], residual=x, **window, **ends)
        pixels = k.pack_weight(torch.ones(64, 64, 1, 1, dtype=torch.int8), weight_bits)
        k.int_conv2d(x, pixels, vectors["mult"], vectors["bias"], **kept)
        k.quantize(torch.zeros(64, 64, 16, 16), grid, **kept)
        k.requantize(x, other=x, **vectors, **ends)
        call_functions(x, kept)
        k.int_pool(x, grid, output_size=1, **kept)
        k.int_pool(x, grid, kernel_size=3, stride=2, padding=1, count_include_pad=False, **kept)
        one = k.QuantizedTensor(x.q[:1, :, :8, :8], grid, bits)
        weight = k.pack_weight(torch.ones(64, 64, 3, 3, dtype=torch.int8), weight_bits)
        k.int_conv2d(one, weight, vectors["mult"], vectors["bias"], padding=1, **kept)
        k.int_pool(x, mode="max", kernel_size=2, backend="triton")
    images = k.quantize(torch.zeros(64, 3, 32, 32), k.Grid(0.5, 128, 0, 255), backend="triton")
    stem = k.pack_weight(torch.ones(64, 3, 3, 3, dtype=torch.int8))
    k.int_conv2d(images, stem, vectors["mult"], vectors["bias"], padding=1, backend="triton")


def call_functions(x: k.QuantizedTensor, kept: dict[str, Any]) -> None:
    """Tables, slopes, products and resizes, with activations that have numbers."""
    table, slope, grid = torch.ones(x.grid.levels), torch.ones(64), x.grid
    k.requantize(x, grid, table=table, then=k.Requantize((grid,), table=table, activation="leaky_relu(0.1)"), **kept)
    k.requantize(x, grid, slope=slope, then=k.Requantize((grid,), slope=slope, activation="hardsigmoid"), **kept)
    vector = k.QuantizedTensor(x.q[:, :, :1, :1], grid, x.bits)
    k.requantize(x, grid, other=vector, product_scale=0.5, activation="hardswish", **kept)
    k.requantize(x, grid, other=vector, activation="hardtanh(-1,1)", **kept)
    one = k.QuantizedTensor(torch.zeros(64, 1, 16, 16, dtype=torch.uint8), k.Grid(0.5, 0, 0, 255))
    k.requantize(x, grid, other=one, product_scale=0.5, **kept)
    places, weights = torch.arange(16, dtype=torch.int32).expand(2, 16), torch.ones(16)
    k.int_resize(x, grid, rows=places, row_weights=weights, columns=places, column_weights=weights, **kept)


COUNTED = "sm_90"  # the architecture whose instructions are held to bounds; disassembling takes as long as compiling


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)[0]
    return dict(zip(("registers", "stack", "local"), map(int, numbers), strict=True))


def main() -> None:
    for name, (kernel, kind, arguments, compile_time) in record_launches().items():
        for arch in sys.argv[1:]:
            target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
            source = specialized(kernel, arguments, compile_time)
            compiled = triton.compile(source, target=target, options=tiles.options(kind))
            ptx = compiled.asm["ptx"]
            print(json.dumps({
                "kernel": name, "kind": kind, "arch": arch, "fused": len(re.findall(r"\bfma\.[\w.]*f32", ptx)),
                "vector_loads": len(re.findall(r"ld\.global[.\w:]*\.v[24]\.", ptx)),
                "async_loads": len(re.findall(r"cp\.async\.c[ag]\.\S+ .*0x10", ptx)),
                "products": len(re.findall(r"mma\S*\.s32\.s8\.s8|mma\S*\.s8\.s8\.s32|kind::i8", ptx)),
                "four_at_once": ptx.count(".reg .b32 t;"),
                **(counted(compiled.asm["cubin"]) if arch == COUNTED else {}), **resources(compiled.asm["cubin"]),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

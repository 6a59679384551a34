"""What the tests cannot see: launches on a wrong stream, results that another graph wrote over, too many layers.

`python -m tools.gpu_check.smoke --rows FILE --stage smoke [--dry]`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

import dfq_kernels as k
from dfq_kernels import dispatch, extension
from tools.gpu_check.notes import arguments
from tools.gpu_check.place import Place, place, tensors

BACKENDS = ("native", "triton")
TYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def machine(on: Place) -> dict[str, Any]:
    """Versions, the GPU, which backends are missing and why, whether plain calls are one C function."""
    import triton

    gpu = {} if on.dry else torch.cuda.get_device_properties(0)
    missing = {f"{op} {backend}": reason for op, backend in product(dispatch.TABLE, BACKENDS)
               if (reason := dispatch.missing(op, backend, on.device.type)) is not None}  # fmt: skip
    return {"torch": torch.__version__, "triton": triton.__version__, "gpu": str(gpu), "missing": missing,
            "whole_calls": extension.calls() is not None}  # fmt: skip


def same_when_replayed(on: Place, call: Callable[[], tuple[Tensor, ...]], x: Tensor) -> list[bool]:
    """Whether a replay on another x gives what a call on it gives: a launch on a wrong stream is not in the graph."""
    replay, outs = on.capture(call)
    with torch.no_grad():
        for out in outs:
            out.fill_(123)
        x.data.copy_(-x.data.flip(0))
    replay()
    on.synchronize()
    found = [out.clone() for out in outs]
    expected = call()
    on.synchronize()
    return [bool(torch.equal(one, other)) for one, other in zip(found, expected, strict=True)]


def operators(x: Tensor, backend: str | None) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Operators of a training step on x, forward and backward; None takes the C function from tensors to tensors."""
    scale, zero, grad = torch.tensor(0.1, device=x.device), torch.zeros((), device=x.device), torch.randn_like(x)
    weight, bias, mean, var = (torch.rand(x.shape[1], device=x.device) + 0.5 for _ in range(4))

    def fake_quant() -> tuple[Tensor, ...]:
        y = k.fake_quant(x, scale, zero, -8, 7, backend=backend)
        return y.detach(), *torch.autograd.grad(y, x, grad)

    def bn_stats() -> tuple[Tensor, ...]:
        return tuple(out.detach() for out in k.bn_stats(x.detach(), backend=backend))

    def teacher() -> tuple[Tensor, ...]:
        y, found_mean, found_var = k.bn_act_stats(x, weight, bias, mean, var, backend=backend)
        loss = k.bn_stat_loss([found_mean], [found_var], [mean], [var], backend=backend)
        return y.detach(), *torch.autograd.grad((y * grad).sum() + loss, x)

    def student() -> tuple[Tensor, ...]:
        moving = zero.clone(), scale.clone(), scale.clone(), zero.clone()
        y = k.bn_act_fake_quant(x, weight, bias, mean.clone(), var.clone(), *moving, training=True, quant_max=15,
                                backend=backend)  # fmt: skip
        return y.detach(), *torch.autograd.grad(y, x, grad)

    return {"fake_quant": fake_quant, "bn_stats": bn_stats, "teacher": teacher, "student": student}


def captured_operators(on: Place) -> dict[str, Any]:
    """Every operator, backend, layout and type in a graph of its own."""
    shape, found = on.pick((32, 16, 16, 16), (4, 4, 4, 4)), dict[str, Any]()
    layouts, types = on.pick((list(LAYOUTS), TYPES), (["channels_last"], TYPES[1:]))
    for layout, dtype, backend in product(layouts, types, BACKENDS):
        if (reason := dispatch.missing("fake_quant", backend, on.device.type)) is not None:
            found[f"{backend} {dtype} {layout}"] = reason  # an automatic choice would take another backend
            continue
        x = torch.randn(shape, device=on.device).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        for name, call in operators(x, None if backend == "native" else backend).items():
            try:
                found[f"{name} {backend} {dtype} {layout}"] = same_when_replayed(on, call, x)
            except Exception as error:  # the others may still work
                found[f"{name} {backend} {dtype} {layout}"] = f"{type(error).__name__}: {error}"[:300]
                on.synchronize()
    bad = {name: same for name, same in found.items() if isinstance(same, str) or not all(same)}
    if bad:
        raise AssertionError(f"{len(bad)} of {len(found)} captured operators are red: {bad}")
    return {"checked": len(found)}


def captured_training(on: Place) -> dict[str, Any]:
    """Metrics and states apart: equal states with other metrics are results that another graph wrote over."""
    from tests.test_execution import LONGER, task

    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    recipe, works = replace(LONGER, warm_up=on.pick(6, 4)), []
    for mode in ("off", "on", "off"):
        work = task(recipe, steps=on.pick(12, 5), device=str(on.device))
        work.execution = work.pool.execution = on.execution(mode, work)
        works.append(work)
    differ, itself = list[Any](), 0
    for index in range(works[0].total_steps):
        eager, captured, again = (work.step(index) for work in works)
        differ += [[index, name, float(value), float(captured[name])] for name, value in eager.items()
                   if not torch.equal(value, captured[name])]  # fmt: skip
        itself += sum(not torch.equal(value, again[name]) for name, value in eager.items())
    states = zip(*(tensors(work.state_dict()) for work in works[:2]), strict=True)
    found = {"eager_differs_from_itself": itself, "recorded": len(works[1].execution.recorded), "metrics": len(differ),
             "first": differ[:8], "states": sum(not torch.equal(one, other) for one, other in states)}  # fmt: skip
    if itself or differ or found["states"] or not found["recorded"]:
        raise AssertionError(f"captured steps are not the steps: {found}")
    return found


def many_layers(on: Place) -> dict[str, Any]:
    """Addresses in tuples: 49 layers are two launches."""
    count = on.pick(49, 3)
    weights = [torch.randn(8 + index, 3 + index, 3, 3) for index in range(count)]
    vectors = [[torch.rand(8 + index) + 0.1 for index in range(count)] for _ in range(4)]
    there = [backend for backend in BACKENDS if dispatch.missing("bn_stat_loss", backend, on.device.type) is None]
    red = [] if there or on.dry else ["no backend is there"]
    for backend in there:
        found = k.fake_quant_weights([weight.to(on.device) for weight in weights], 4, backend=backend)
        expected = k.fake_quant_weights(weights, 4, backend="reference")
        pairs = (zip(mine, theirs, strict=True) for mine, theirs in zip(found, expected, strict=True))
        different = sum(not torch.equal(one.cpu(), other) for pair in pairs for one, other in pair)
        moved = [[value.to(on.device) for value in values] for values in vectors]
        loss, reference = (float(k.bn_stat_loss(*values, backend=name))
                           for values, name in ((moved, backend), (vectors, "reference")))  # fmt: skip
        if different or abs(loss - reference) > 1e-4 * abs(reference):
            red.append(f"{backend}: {different} tensors differ, loss {loss}, reference {reference}")
    if red:
        raise AssertionError("; ".join(red))
    return {"backends": there}


if __name__ == "__main__":
    options, notes = arguments(__doc__)
    here = place(options.dry)
    for section in (machine, captured_operators, captured_training, many_layers):
        notes.section(section.__name__, lambda section=section: section(here))
    notes.end()

"""Programs of the native module (csrc/cpu/program.h): planes and steps, and one operator as a program of one step.

A network packs its weights once, into one program; an operator packs them at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.activations import activation_of
from dfq_kernels.extension import native
from dfq_kernels.integers import Constants, Epilogue, Grid, allocate, channels_last, pack_channels

# the kinds of steps
QUANTIZE, CONVOLVE, RESCALE, ADD, AVERAGE_POOL, MAX_POOL, TABLE, MULTIPLY, MOVE, RESIZE = range(10)
CODES = 256  # integers of a byte
LANES = 16  # channels that kernels read constants of at once
ALIGNMENT = 64


def make_plane(
    grid: Grid, channels: int, height: int, width: int, frame: Sequence[int] = (0, 0), offset: int = 0, stride: int = 0,
    kept: bool = True,
) -> Any:  # fmt: skip
    """A value of one image, inside a frame of zero points.

    Args:
        offset: of its first byte.
        stride: bytes of a pixel of the plane that it is a slice of; 0: it is none.
        kept: whether it is stored at all.
    """
    made = native().Plane()
    made.offset, made.height, made.width, made.channels = offset, height, width, channels
    made.stride = stride or stride_of(channels)
    made.room, made.kept = channels if stride else made.stride, kept
    made.frame_y, made.frame_x = frame
    made.scale, made.inverse = grid.scale, grid.inverse
    made.zero_point, made.quant_min, made.quant_max = grid.zero_point, grid.quant_min, grid.quant_max
    made.shift = shift_of(grid)
    return made


def shift_of(grid: Grid) -> int:
    """What integers are stored above themselves."""
    return 128 if grid.signed else 0


def stride_of(channels: int) -> int:
    """Bytes of a pixel."""
    return -(-channels // 4) * 4


def make_step(kind: int, activation: str | None, shape: Sequence[int], x: int, outs: Sequence[int]) -> Any:
    """A step that reads and writes planes by their numbers; shape: `(C, H, W)` of its results."""
    made = native().Step()
    known = activation_of(activation)
    made.kind, made.activation, made.x, made.outs = kind, known.code, x, list(outs)
    made.a, made.b = known.bounds or (known.a, known.b)
    made.out_channels, made.out_height, made.out_width = shape
    return made


def set_layer(made: Any, weight: Tensor, mult: Tensor, bias: Tensor, groups: int = 1) -> None:
    """A convolution's constants; weight: int8 `[O, I, kh, kw]`."""
    weight = weight.permute(0, 2, 3, 1).contiguous()
    made.set_weight(weight.data_ptr(), weight.numel())
    made.kernel_y, made.kernel_x = weight.shape[1:3]
    made.mult, made.bias, made.groups = padded(mult), padded(bias), groups


def set_window(made: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)) -> None:
    """Where a window begins and which places it sees."""
    (made.stride_y, made.stride_x), (made.pad_y, made.pad_x) = stride, padding
    made.dilation_y, made.dilation_x = dilation


def set_norm(made: Any, norm: Sequence[Tensor]) -> None:
    """A rescale step's batch norm (mean, mult and bias), where it has one."""
    if norm:
        made.mean, made.mult, made.bias = (padded(vector) for vector in norm)


def set_constants(made: Any, constants: Constants, grid: Grid) -> None:
    """What makes real numbers of the integers of a grid: of a rescale or a table step."""
    set_norm(made, constants.norm)
    if constants.slope is not None:
        made.slope = padded(constants.slope)
    if constants.table is not None:
        set_table(made, constants.table, grid)


def set_table(made: Any, values: Tensor, grid: Grid) -> None:
    """values: one for every integer of the grid of x; bytes that are none of its integers have those at its ends."""
    codes = torch.arange(CODES) - shift_of(grid) - grid.quant_min
    made.values = values.float()[codes.clamp(0, len(values) - 1)].tolist()


def set_average(made: Any, multipliers: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
    """An average pool's windows; multipliers: one of every window, `[OH, OW]`; spans: of `set_windows`."""
    made.mult = multipliers.flatten().tolist()
    set_windows(made, spans)


def set_windows(made: Any, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Begin and end of every row's windows, of every column's, inside the map."""
    made.windows = [edge for axis in spans for span in axis for edge in span]


def set_resize(
    made: Any, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor, scale: float
) -> None:
    """rows, columns: int32 `[2, n]`, the two neighbours of each; scale: of the grid of x."""
    made.windows = [*rows.T.flatten().tolist(), *columns.T.flatten().tolist()]
    made.weights = [*row_weights.float().tolist(), *column_weights.float().tolist()]
    made.scale = scale


def padded(values: Tensor) -> list[float]:
    """With room for a whole vector from any channel on: groups begin where they like."""
    return torch.nn.functional.pad(values.float(), (0, LANES)).tolist()


class OneStep:
    """An operator as a program of one step, and what follows it.

    Args:
        kind: of the step.
        shape: `[N, C]` or `[N, C, H, W]` of its results.
        epilogue: their grids.
        inputs: integers and their grids, bytes `[N, C, H, W]` channels-last; the first is read through windows.
        frame: padding of the first.
        fill: what else the step needs, of the step.
    """

    def __init__(
        self, kind: int, shape: Sequence[int], epilogue: Epilogue, inputs: Sequence[tuple[Tensor, Grid]] = (),
        frame: Sequence[int] = (0, 0), fill: Callable[[Any], None] | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.epilogue = shape, epilogue
        self._runner: Any = None
        self.inputs = [channels_last(q) for q, _ in inputs]
        self.program, sides = native().Program(), (*shape[1:], 1, 1)[:3]
        self.planes: list[Any] = []
        for q, (_, grid) in zip(self.inputs, inputs, strict=True):
            self._add(grid, q.shape[1:], (0, 0) if self.planes else frame)
        first = len(self.planes)
        for grid, _ in epilogue.results:
            self._add(grid, sides)
        places, count = list(range(first, len(self.planes))), len(epilogue.outs)
        step = make_step(kind, epilogue.activation, sides, 0 if inputs else -1, places[:count])
        step.other = 1 if len(inputs) > 1 else -1
        if fill is not None:
            fill(step)
        if epilogue.then is not None:
            then = epilogue.then
            kind = RESCALE if then.table is None else TABLE
            following = make_step(kind, then.activation, sides, first, places[count:])
            set_constants(following, Constants(*then.constants), epilogue.outs[0])
            step.chained = [following]
        self.program.planes, self.program.steps = self.planes, [step]
        self.program.inputs, self.program.outputs = list(range(first)), places

    def _add(self, grid: Grid, shape: Sequence[int], frame: Sequence[int] = (0, 0)) -> None:
        offset = self.program.arena_bytes
        channels, height, width = shape
        self.planes.append(make_plane(grid, channels, height, width, frame, offset))
        self.program.arena_bytes = -(-(offset + self.planes[-1].bytes) // ALIGNMENT) * ALIGNMENT

    def run(self, like: Tensor, images: Tensor | None = None) -> list[Tensor]:
        """The results; images: fp32 `[N, C, H, W]` that a quantize step reads."""
        results = allocate(like, self.shape, self.epilogue)
        if 0 in self.shape:
            return results
        wide = self.epilogue.byte_wide()
        written = results if wide == self.epilogue else allocate(like, self.shape, wide)
        if images is not None:
            self.program.image_channels, self.program.image_height, self.program.image_width = images.shape[1:]
        addresses = [out.data_ptr() for out in written]
        reals, integers = ([], addresses) if self.epilogue.outs else (addresses, [])
        if self._runner is None or images is not None:  # packs the weights; it keeps the images' size
            self._runner = native().Runner(self.program)
        self._runner.run(
            0 if images is None else images.data_ptr(), self.shape[0], reals, torch.get_num_threads(), False,
            [q.data_ptr() for q in self.inputs], integers,
        )  # fmt: skip
        for result, out, (_, bits) in zip(results, written, self.epilogue.results, strict=False):
            if result is not out:
                result.copy_(pack_channels(out, bits))
        return results

"""One file for every kind of layer; importing this folder makes all of them known."""

from dfq.layers import (
    activation,
    add,
    average_pool,
    batch_norm,
    convolution,
    linear,
    max_pool,
    moves,
    multiply,
    prelu,
    resize,
    scale,
    softmax,
    table,
    transposed,
)
from dfq.layers.batch_norm import BatchNorm
from dfq.layers.kind import AS_IT_IS, ON_A_GRID, STREAM, Float, Kind, Layer, kind_of, register
from dfq.layers.tail import Tail
from dfq.layers.weighted import QuantLayer, Weighted

__all__ = [
    "AS_IT_IS",
    "ON_A_GRID",
    "STREAM",
    "BatchNorm",
    "Float",
    "Kind",
    "Layer",
    "QuantLayer",
    "Tail",
    "Weighted",
    "activation",
    "add",
    "average_pool",
    "batch_norm",
    "convolution",
    "kind_of",
    "linear",
    "max_pool",
    "moves",
    "multiply",
    "prelu",
    "register",
    "resize",
    "scale",
    "softmax",
    "table",
    "transposed",
]  # fmt: skip

"""Small networks, one for every kind of layer and every way of writing it: `network(name)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Part = Callable[["Body", Tensor], Tensor]


class Body(nn.Module):
    """A convolution with batch norm and ReLU, a part that a test chooses, and a linear head on what it gives."""

    def __init__(self, part: Part, channels: int = 8, modules: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.part = part
        self.conv, self.bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.side = nn.Conv2d(channels, channels, 1)
        self.parts = nn.ModuleDict(modules or {})
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self, F.relu(self.bn(self.conv(x)))).flatten(1))


def _signed(f: Callable[[Tensor], Tensor]) -> Part:
    """A function of values of both signs."""
    return lambda net, x: f(net.side(x))


class Vector(nn.Module):
    """Of vectors: one more axis for a convolution of one axis, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv1d(1, 6, 5, stride=2), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x[:, None, :])))
        x = F.avg_pool1d(F.max_pool1d(x, 3, 2, 1), 2)
        return torch.sigmoid(self.fc(x.mean(-1)))


class Tokens(nn.Module):
    """Linear layers along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.one, self.two = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.BatchNorm1d(9), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.two(F.gelu(self.one(x)))
        return self.head(self.norm(x).mean(1))


class Outputs(nn.Module):
    """Several outputs, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.map = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        x = F.relu(self.conv(x))
        logits = self.fc(x.mean((2, 3)))
        return {"classes": F.softmax(logits, 1), "maps": (self.map(x), x), "turned": self.map(x).permute(0, 2, 3, 1)}


class PooledOutput(nn.Module):
    """A value that is an output, as it is, and that a maximum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv(x))
        return x, self.fc(x.amax((2, 3)))


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.out, self.norm = nn.Conv2d(8, 3, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.norm(self.down(x)))
        deep = F.relu(self.deep(F.max_pool2d(wide, 2)))
        return self.out(F.relu(self.join(torch.cat([wide, self.up(deep)], 1))))


def _shuffle(net: Body, x: Tensor) -> Tensor:
    for _ in range(2):
        first, second = x.chunk(2, 1)
        both = torch.cat([first, F.relu(net.parts["branch"](second))], 1)
        x = both.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(both.shape)
    return x


def _dense(net: Body, x: Tensor) -> Tensor:
    features = [x]
    for name in ("one", "two"):
        features.append(net.parts[name](F.relu(net.parts[f"{name}_norm"](torch.cat(features, 1)))))
    return torch.cat(features, 1)


def _excite(net: Body, x: Tensor) -> Tensor:
    gate = net.parts["excite"](F.silu(net.parts["squeeze"](x.mean((2, 3), keepdim=True))))
    return net.side(x * gate.sigmoid())


def _eca(net: Body, x: Tensor) -> Tensor:
    gate = net.parts["eca"](x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid().view(x.shape[0], -1, 1, 1)
    return x * gate.expand_as(x)


def _written(net: Body, x: Tensor) -> Tensor:
    out = net.side(x)
    out[:, 2:5] = x[:, :3]
    out[:, :, 1] = 2 * x[:, :, 0]
    return out


def _constant_pad(net: Body, x: Tensor) -> Tensor:
    return net.side(F.pad(x, (1, 2, 0, 1), value=0.75))


_ACTIVATIONS: dict[str, Part] = {
    name: _signed(function) for name, function in {
        "silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "gelu tanh": partial(F.gelu, approximate="tanh"),
        "tanh": torch.tanh, "elu": F.elu, "selu": F.selu, "celu": F.celu, "softplus": F.softplus, "mish": F.mish,
        "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "leaky relu": partial(F.leaky_relu, negative_slope=0.2),
        "hardtanh": partial(F.hardtanh, min_val=-0.5, max_val=0.7), "relu6": F.relu6, "clamp": lambda x: x.clamp(min=-0.25),
        "clamp max": lambda x: x.clamp(max=0.5), "square": lambda x: x.square(), "abs": lambda x: x.abs(),
        "in place": lambda x: F.silu(x, inplace=True) + 1,
    }.items()
}  # fmt: skip
_PARTS: dict[str, Part] = {
    **_ACTIVATIONS,
    "multiply": lambda net, x: x * net.side(x), "multiply by itself": lambda net, x: net.side(x) * net.side(x),
    "add both": lambda net, x: net.side(x) + x, "add constant": lambda net, x: net.side(x) * 0.5 + 0.25,
    "subtract": lambda net, x: 1 - (x - net.side(x)) / 2, "spread channel": lambda net, x: x + x.mean((2, 3), True),
    "spread map": lambda net, x: net.side(x) * torch.sigmoid(x.mean(1, keepdim=True)),
    "spatial attention": lambda net, x: x * torch.sigmoid(torch.cat([x.mean(1, True), x.amax(1, True)], 1).mean(1, True)),
    "split": lambda net, x: torch.cat(x.split([3, 5], 1)[::-1], 1), "stack": lambda net, x: torch.stack([x, net.side(x)], 1),
    "slice": lambda net, x: net.side(x)[:, :, 1:, ::2], "select": lambda net, x: net.side(x)[:, :, 2] + x[:, :, 1],
    "flip and roll": lambda net, x: net.side(x).flip(3).roll(1, 2), "pixel shuffle": lambda net, x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda net, x: F.pixel_unshuffle(net.side(x), 2), "channel shuffle": lambda net, x: F.channel_shuffle(net.side(x), 4),
    "permute": lambda net, x: net.side(x).permute(0, 2, 3, 1) * 0.5, "expand": lambda net, x: x.mean((2, 3), True).expand(-1, -1, 2, 3),
    "repeat": lambda net, x: x.repeat(1, 2, 1, 1), "unflatten": lambda net, x: net.side(x).unflatten(1, (2, 4)).mean(1),
    "zero pad": lambda net, x: net.side(F.pad(x, (1, 0, 2, 1))), "constant pad": _constant_pad,
    "reflect pad": lambda net, x: F.pad(x, (1, 1, 2, 2), "reflect"), "replicate pad": lambda net, x: F.pad(x, (1, 1, 2, 2), "replicate"),
    "minus infinity pad": lambda net, x: F.max_pool2d(F.pad(net.side(x), (0, 1, 0, 1), value=-torch.inf), 2),
    "crop": lambda net, x: F.pad(x, (-1, -2, 0, -1)),
    "nearest": lambda net, x: F.interpolate(x, scale_factor=2), "nearest size": lambda net, x: F.interpolate(x, size=(5, 17)),
    "bilinear": lambda net, x: F.interpolate(net.side(x), scale_factor=2, mode="bilinear"),
    "bilinear corners": lambda net, x: F.interpolate(x, size=(7, 5), mode="bilinear", align_corners=True),
    "average ceil": lambda net, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), "average uncounted": lambda net, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average ceil uncounted": lambda net, x: F.avg_pool2d(net.side(x), 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average divisor": lambda net, x: F.avg_pool2d(x, 2, divisor_override=3), "adaptive uneven": lambda net, x: F.adaptive_avg_pool2d(x, (5, 3)),
    "adaptive larger": lambda net, x: F.adaptive_avg_pool2d(x, (13, 14)), "adaptive side": lambda net, x: F.adaptive_avg_pool2d(x, (None, 2)),
    "max ceil": lambda net, x: F.max_pool2d(net.side(x), 3, 2, 1, ceil_mode=True), "global max": lambda net, x: x.amax((2, 3)),
    "adaptive max": lambda net, x: F.adaptive_max_pool2d(net.side(x), (5, 3)), "max pool dilated": lambda net, x: F.max_pool2d(x, 2, 1, 0, 2),
    "sum": lambda net, x: net.side(x).sum((2, 3)), "mean of rows": lambda net, x: x.mean(3), "max of channels": lambda net, x: x.max(1)[0],
    "functional batch norm": lambda net, x: F.relu(F.batch_norm(net.side(x), net.bn.running_mean, net.bn.running_var, net.bn.weight)),
    "written in place": _written,
    "twice the sums": lambda net, x: (lambda y: y + y)(net.side(x)), "power": lambda net, x: net.side(x) ** 3,
    "a pool beside a layer of other bits": lambda net, x: (lambda y: net.side(y) + F.silu(F.max_pool2d(y, 3, 1, 1)))(F.relu(net.side(x))),
    "no move": lambda net, x: net.side(x.contiguous().clone().view(x.shape)),
}  # fmt: skip
_CONV = partial(nn.Conv2d, 8, 8)
_MODULES: dict[str, tuple[Part, Callable[[], dict[str, nn.Module]]]] = {
    "channel shuffle block": (_shuffle, lambda: {"branch": nn.Conv2d(4, 4, 3, padding=1)}),
    "dense block": (_dense, lambda: {"one": nn.Conv2d(8, 4, 3, padding=1), "one_norm": nn.BatchNorm2d(8),
                                     "two": nn.Conv2d(12, 4, 1), "two_norm": nn.BatchNorm2d(12)}),
    "squeeze and excitation": (_excite, lambda: {"squeeze": nn.Conv2d(8, 2, 1), "excite": nn.Conv2d(2, 8, 1)}),
    "eca": (_eca, lambda: {"eca": nn.Conv1d(1, 1, 3, padding=1)}),
    "prelu": (lambda net, x: net.parts["act"](net.side(x)), lambda: {"act": nn.PReLU(8)}),
    "prelu of one": (lambda net, x: net.parts["act"](net.side(x)), lambda: {"act": nn.PReLU()}),
    "transposed apart": (lambda net, x: net.parts["up"](x), lambda: {"up": nn.ConvTranspose2d(8, 6, 2, stride=2)}),
    "transposed": (lambda net, x: F.relu(net.parts["up"](x)), lambda: {"up": nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2)}),
    "transposed dilated": (lambda net, x: net.parts["up"](x), lambda: {"up": nn.ConvTranspose2d(8, 4, (3, 2), (1, 2), (1, 0), dilation=(2, 1))}),
    "same padding": (lambda net, x: net.parts["same"](x), lambda: {"same": _CONV(4, padding="same")}),
    "reflecting": (lambda net, x: net.parts["conv"](x), lambda: {"conv": _CONV(3, padding=1, padding_mode="reflect")}),
    "circular": (lambda net, x: net.parts["conv"](x), lambda: {"conv": _CONV(3, padding=1, padding_mode="circular")}),
    "weight norm": (lambda net, x: net.parts["conv"](x), lambda: {"conv": nn.utils.parametrizations.weight_norm(_CONV(3))}),
    "zero pad module": (lambda net, x: net.parts["conv"](net.parts["pad"](x)), lambda: {"pad": nn.ZeroPad2d((0, 1, 0, 1)), "conv": _CONV(3, 2)}),
    "one layer twice": (lambda net, x: net.parts["conv"](F.relu(net.parts["conv"](x))), lambda: {"conv": _CONV(3, padding=1)}),
}  # fmt: skip


def _body(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    part, modules = (_PARTS[name], dict) if name in _PARTS else _MODULES[name]
    return Body(part, modules=modules()), (3, 12, 10)


class Chain(nn.Module):
    """Parts one after the other; a convolution in front of each makes the channels that it wants."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList()
        for part in parts:
            self.bodies.append(Body(part))
            self.bodies[-1].head = nn.Identity()
            self.bodies[-1].conv = nn.LazyConv2d(8, 3, padding=1)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        for body in self.bodies:
            x = body.part(body, F.relu(body.bn(body.conv(x))))
            x = x if x.dim() == 4 else x.flatten(1)[:, :8, None, None].expand(-1, -1, 3, 3)
        return self.head(x.flatten(1))


MIXED = sorted(set(_PARTS) - {"pixel unshuffle", "crop", "reflect pad"})  # those need a map of some size


def chained(names: list[str], sides: tuple[int, int]) -> tuple[nn.Module, tuple[int, ...]]:
    """The parts of these names in a chain, on images of 3 channels; batch norms have seen noise."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(len(names) + sides[0])
        model = Chain([_PARTS[name] for name in names])
        with torch.no_grad():
            for _ in range(2):
                model.train()(torch.randn(4, 3, *sides))
    return model.eval(), (3, *sides)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    **{name: partial(_body, name) for name in (*_PARTS, *_MODULES)},
    "vector": lambda: (Vector(), (64,)), "tokens": lambda: (Tokens(), (3, 12, 12)),
    "outputs": lambda: (Outputs(), (3, 8, 6)), "pooled output": lambda: (PooledOutput(), (3, 8, 6)), "u-net": lambda: (Unet(), (3, 12, 8)),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network in evaluation mode; its batch norms have seen noise."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model, shape = NETWORKS[name]()
        with torch.no_grad():
            for _ in range(3):
                model.train()(torch.randn(8, *shape))
    return model.eval(), shape

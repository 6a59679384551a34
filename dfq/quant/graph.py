"""What the float graph is made of: tracing, and the kinds of nodes that have a quantized form."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from dfq.classifier import evaluation
from dfq.errors import first_line


class PrepareError(ValueError):
    """The model has a part without a quantized form."""


class Kind(Enum):
    """What a node does to a value."""

    INPUT = auto()
    OUTPUT = auto()
    CONV = auto()
    LINEAR = auto()
    BATCH_NORM = auto()
    ACTIVATION = auto()
    ADD = auto()
    AVG_POOL = auto()
    MAX_POOL = auto()
    MOVE = auto()
    SIZE = auto()


LAYERS = (Kind.CONV, Kind.LINEAR)
MODULES: dict[type[nn.Module], Kind] = {
    nn.Conv2d: Kind.CONV, nn.Linear: Kind.LINEAR,
    nn.BatchNorm1d: Kind.BATCH_NORM, nn.BatchNorm2d: Kind.BATCH_NORM,
    nn.ReLU: Kind.ACTIVATION, nn.ReLU6: Kind.ACTIVATION,
    nn.AvgPool2d: Kind.AVG_POOL, nn.AdaptiveAvgPool2d: Kind.AVG_POOL, nn.MaxPool2d: Kind.MAX_POOL,
    nn.Flatten: Kind.MOVE, nn.Dropout: Kind.MOVE, nn.Dropout2d: Kind.MOVE, nn.Identity: Kind.MOVE,
}  # fmt: skip
FUNCTIONS: dict[Any, Kind] = {
    F.relu: Kind.ACTIVATION, torch.relu: Kind.ACTIVATION, F.relu6: Kind.ACTIVATION,
    operator.add: Kind.ADD, operator.iadd: Kind.ADD, torch.add: Kind.ADD,
    F.avg_pool2d: Kind.AVG_POOL, F.adaptive_avg_pool2d: Kind.AVG_POOL, F.max_pool2d: Kind.MAX_POOL,
    torch.flatten: Kind.MOVE, F.dropout: Kind.MOVE, torch.mean: Kind.AVG_POOL, torch.reshape: Kind.MOVE,
    getattr: Kind.SIZE, operator.getitem: Kind.SIZE,
}  # fmt: skip
METHODS = {
    "relu": Kind.ACTIVATION, "relu_": Kind.ACTIVATION, "add": Kind.ADD, "add_": Kind.ADD,
    "flatten": Kind.MOVE, "contiguous": Kind.MOVE, "view": Kind.MOVE, "reshape": Kind.MOVE,
    "mean": Kind.AVG_POOL, "size": Kind.SIZE,
}  # fmt: skip
ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", "relu": "relu",
    "relu_": "relu",
}  # fmt: skip
PADDING_MODES = ("zeros",)


RESERVED = ("weight_quantizers", "quantizers", "pools")
"""Submodules of the new graph that are not the model's."""


_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())


class _Proxy(fx.Proxy):
    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """fx's own proxies let `x += y` fall back to `x + y`, and nothing would show that x has changed."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module) -> list[fx.Node]:
    """The nodes of the model's forward that its output depends on, in order.

    Raises:
        PrepareError: the forward depends on values, calls one layer or batch norm more than once, or reads a value
            that was changed in place.
    """
    _check_modules(model)
    try:
        with evaluation(model), _unchanged(model):  # a dropout written as a function does nothing and may be dropped
            traced = _Tracer().trace(model)
    except Exception as error:  # fx raises whatever the model's own code raises on its proxies
        raise PrepareError(
            f"prepare: model must be traceable by torch.fx, got {type(error).__name__}: {first_line(error)}; "
            "move control flow that depends on tensors out of forward()"
        ) from error
    _check_changes_in_place(list(traced.nodes), model)
    _drop_unread(traced)
    nodes = list(traced.nodes)
    if sum(node.op == "placeholder" for node in nodes) != 1:
        raise PrepareError("prepare: model must take one tensor, the images")
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    for name, count in calls.items():
        module = model.get_submodule(name)
        if count > 1 and MODULES.get(type(module)) in (*LAYERS, Kind.BATCH_NORM):
            raise PrepareError(
                f"prepare: {name} ({type(module).__name__}) must be called once, got {count} calls; copy it"
            )
    return nodes


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What tracing and a forward that keeps values leave on the modules is gone afterwards."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)


def traced(model: nn.Module) -> fx.GraphModule:
    """The model as the graph that `prepare` starts from, on the same modules.

    Raises:
        PrepareError: as `trace`, or a node without a quantized form.
    """
    nodes = trace(model)
    for node in nodes:
        kind_of(node, model)
    return fx.GraphModule(model, nodes[0].graph)


@torch.no_grad()
def check_traced(model: nn.Module, images: Tensor) -> None:
    """Tracing sees no branch on what the images are (isinstance, hasattr, try): it takes a side for all of them.

    Raises:
        PrepareError: the traced graph fails on the images, or gives other logits than the model.
    """
    rule = "prepare: model must compute the same when torch.fx traces it"
    expected = model(images)
    try:
        found = fx.Interpreter(traced(model)).run(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's own operations raise
        raise PrepareError(f"{rule}, got {type(error).__name__}: {first_line(error)}") from error
    off, size = float((found - expected).norm()), float(expected.norm())
    if bool(torch.isfinite(expected).all()) and not off <= 1e-3 * size:  # training stops where logits are not finite
        hint = "a branch in forward() on what its input is (isinstance, hasattr, try) takes another side there"
        raise PrepareError(f"{rule}, got logits that differ by {off / max(size, 1e-30):.1%}; {hint}")


def _check_modules(model: nn.Module) -> None:
    for name, _ in model.named_children():
        if name in RESERVED or hasattr(_EMPTY, name):
            raise PrepareError(f"prepare: a submodule must not have a name of the quantized graph's own, got {name!r}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise PrepareError(
                f"prepare: {name or 'model'} must have no forward hooks (old weight_norm and pruning are hooks, remove "
                f"them to keep their result), got {type(module).__name__} with hooks"
            )
        if "forward" in vars(module):  # fx reads the class's
            raise PrepareError(
                f"prepare: {name or 'model'} must have its class's forward, got a {type(module).__name__} with another"
            )


def _drop_unread(traced: fx.Graph) -> None:
    """Removes what nothing reads, and then what only that read."""
    for node in reversed(traced.nodes):
        if not node.users and node.op not in ("output", "placeholder"):
            traced.erase_node(node)


def _check_changes_in_place(nodes: list[fx.Node], model: nn.Module) -> None:
    """A change in place is traced as a new value: whoever reads the old one afterwards would not see the change."""
    position = {node: index for index, node in enumerate(nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # the node whose memory a node's result may lie in
    for node in nodes:
        changes = _changes_its_input(node, model)
        shares = changes or kind_or_none(node, model) is Kind.MOVE
        memory[node] = memory[node.all_input_nodes[0]] if shares and node.all_input_nodes else node
        if changes and not node.users:
            raise PrepareError(f"prepare: the result of {node.name} must be used (x = relu(x)), got an in-place call")
        if not changes:
            continue
        if memory[node].op == "placeholder":
            raise PrepareError(f"prepare: {node.name} must not change the images, got a change in place")
        for reader in nodes[position[node] + 1 :]:
            for value in [] if kind_or_none(reader, model) is Kind.SIZE else reader.all_input_nodes:
                if position[value] < position[node] and memory[value] is memory[node]:
                    raise PrepareError(
                        f"prepare: {reader.name} must read the result of {node.name}, got a read of the value that "
                        f"{node.name} has changed in place"
                    )


def _changes_its_input(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":  # a dropout changes nothing in evaluation
        module = model.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and not isinstance(module, _DropoutNd)
    if node.target is F.dropout:
        return False
    name = getattr(node.target, "__name__", str(node.target))
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "iadd"
    return node.op in ("call_function", "call_method") and (in_place or bool(node.kwargs.get("inplace", False)))


def kind_or_none(node: fx.Node, model: nn.Module) -> Kind | None:
    """The kind of a call by what it calls, without a look at its arguments; None if it has no quantized form."""
    if node.op == "call_module":
        return MODULES.get(type(model.get_submodule(str(node.target))))
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def activation_of(node: fx.Node, model: nn.Module) -> str:
    """`relu` or `relu6`, of a node whose kind is `ACTIVATION`."""
    called = type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    if called not in ACTIVATIONS:
        raise _unsupported(f"{called}, an activation")
    return ACTIVATIONS[called]


def kind_of(node: fx.Node, model: nn.Module) -> Kind:
    """The kind of a node.

    Raises:
        PrepareError: it has no quantized form; the text names it and says what to do.
    """
    if node.op == "placeholder":
        return Kind.INPUT
    if node.op == "output":
        return Kind.OUTPUT
    if node.op == "call_module":
        return _module_kind(str(node.target), model.get_submodule(str(node.target)))
    kind = kind_or_none(node, model)
    if kind is None:
        what = f"method .{node.target}()" if node.op == "call_method" else f"{node.op} {node.target}"
        raise _unsupported(f"{what} (node {node.name})")
    if "out" in node.kwargs:
        raise _unsupported(f"a call with out= (node {node.name})")
    if node.target is F.dropout and (list(node.args[2:3]) or [node.kwargs.get("training", True)])[0]:
        raise _unsupported(f"a dropout that is on in evaluation (node {node.name}; training=self.training is missing)")
    if kind is Kind.SIZE and node.op == "call_function" and not _reads_a_size(node):
        raise _unsupported(f"{node.name}, an access to something else than a shape")
    if kind is Kind.ADD and node.kwargs.get("alpha", 1) != 1:
        raise _unsupported(f"an addition with alpha {node.kwargs['alpha']} (node {node.name})")
    if kind is Kind.ADD and len(node.all_input_nodes) != 2:
        raise _unsupported(f"an addition of a constant or of a value to itself (node {node.name})")
    return kind


def _reads_a_size(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] == "shape"
    source = node.args[0]
    is_size = isinstance(source, fx.Node) and (source.target is getattr or source.target == "size")
    return is_size


def _module_kind(name: str, module: nn.Module) -> Kind:
    kind = MODULES.get(type(module))
    if kind is None:
        raise _unsupported(f"{name} ({type(module).__name__})")
    if kind in LAYERS and not isinstance(module.weight, nn.Parameter):
        raise PrepareError(f"prepare: weight of {name} must be an nn.Parameter, got {type(module.weight).__name__}")
    if kind is Kind.CONV and module.padding_mode not in PADDING_MODES:
        raise PrepareError(f"prepare: padding_mode of {name} must be zeros, got {module.padding_mode}")
    if kind is Kind.BATCH_NORM and not module.track_running_stats:
        raise PrepareError(f"prepare: track_running_stats of {name} must be True, got False")
    if kind is Kind.MAX_POOL and module.return_indices:
        raise PrepareError(f"prepare: return_indices of {name} must be False, got True")
    return kind


def _unsupported(what: str) -> PrepareError:
    known = ", ".join(sorted({kind.__name__ for kind in MODULES}))
    return PrepareError(
        f"prepare: model must be made of {known}, additions and their functional forms, got {what}; "
        "replace it by one of these before prepare()"
    )

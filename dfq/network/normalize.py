"""Calls in fewer words: what torch.export says in several ways is said in one.

Copies, detachments and dropouts are gone; an evaluating batch norm is one call with one result; pieces of a split are
slices; a subtraction is an addition, a division by a constant a multiplication; whatever is spread over a larger shape
for an addition or a multiplication is left as it is, because these spread it themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfq.network.calls import MODULE, arguments_of, is_size, target_of

aten = torch.ops.aten
_SAME = ("aten.clone.default", "aten.alias.default", "aten.contiguous.default", "aten.detach.default",
         "aten.lift_fresh_copy.default", "aten.positive.default")  # fmt: skip
_DROPOUTS = ("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
             "aten.feature_alpha_dropout.default", "aten.native_dropout.default")  # fmt: skip
_CASTS = ("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device", "aten.type_as.default")
_BATCH_NORMS = ("aten._native_batch_norm_legit_no_training.default", "aten.native_batch_norm.default",
                "aten._native_batch_norm_legit.default", "aten.cudnn_batch_norm.default")  # fmt: skip
_SPREAD = ("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
_PAIRS = ("aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "aten.div.Tensor")


def normalize(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """Rewrites a captured graph in place; `tensors` are its constants by name."""
    for rewrite in _REWRITES:
        for node in list(graph.nodes):
            if node.op == "call_function":
                rewrite(node, tensors)
        graph.eliminate_dead_code()
    graph.lint()


def put(before: fx.Node, target: Any, *arguments: Any, like: fx.Node | None = None, **keywords: Any) -> fx.Node:
    """A new call in front of a node; it takes the meta of `like` (the node itself, if none is given)."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, arguments, keywords)
    source = like or before
    made.meta |= {key: source.meta[key] for key in ("val", MODULE) if key in source.meta}
    return made


def _instead(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def largest_of_windows(x: Tensor, output_size: list[int]) -> Tensor:
    """An adaptive max pool without the places of its values: ATen has no call for it."""
    pools = aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default
    found: Tensor = pools[len(output_size) - 1](x, output_size)[0]
    return found


ADAPTIVE_MAX = largest_of_windows.__name__


def _drop_checks(node: fx.Node, _: dict[str, Tensor]) -> None:
    """Assertions about what is known: shapes are static here."""
    if target_of(node).startswith(("aten._assert", "aten.sym_constrain")) and not node.users:
        node.graph.erase_node(node)


def _drop_copies(node: fx.Node, _: dict[str, Tensor]) -> None:
    name, source = target_of(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return
    off = name in _DROPOUTS and not arguments_of(node).get("train", False)
    cast = name in _CASTS and node.meta["val"].dtype == source.meta["val"].dtype
    if name in _SAME or off or cast:
        _instead(node, source)


def _writes(node: fx.Node, _: dict[str, Tensor]) -> None:
    """What writing into a part of a value leaves: a copy over all of it, a scatter into the whole of an axis."""
    name, given = target_of(node), arguments_of(node)
    if name == "aten.copy.default":
        source, whole = given["src"], node.meta["val"]
        if [str(side) for side in source.meta["val"].shape] == [str(side) for side in whole.shape]:
            _instead(node, source)
        else:
            sides = [-1, *whole.shape[1:]]
            _instead(node, put(node, aten.expand.default, source, [int(side) for side in sides]))
    elif name == "aten.slice_scatter.default":
        begin, end, axis = given["start"], given["end"], given["dim"]
        side = node.meta["val"].shape[axis]
        last = end is None or (isinstance(end, int) and (end >= 2**62 or (isinstance(side, int) and end >= side)))
        if begin in (None, 0) and last and given["step"] == 1:
            _instead(node, given["src"])


def _views(node: fx.Node, _: dict[str, Tensor]) -> None:
    """A view of what lies otherwise in memory than it did for torch.export would fail."""
    if target_of(node) in ("aten.view.default", "aten._unsafe_view.default"):
        node.target = aten.reshape.default


def _batch_norms(node: fx.Node, _: dict[str, Tensor]) -> None:
    if target_of(node) not in _BATCH_NORMS:
        return
    given = arguments_of(node)
    if given.get("training", False):
        return
    values = [given.get(key) for key in ("input", "weight", "bias", "running_mean", "running_var")]
    for reader in list(node.users):
        if reader.target is not operator.getitem or reader.args[1] != 0:
            return
    for reader in list(node.users):
        eps = given.get("eps", given.get("epsilon"))
        rest = False, given.get("momentum", 0.1), eps, False
        _instead(reader, put(reader, aten.batch_norm.default, *values, *rest))


def _pieces(node: fx.Node, _: dict[str, Tensor]) -> None:
    """`split(x)[i]` is a slice, `unbind(x)[i]` a selection."""
    name = target_of(node)
    if name not in ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int"):
        return
    given, parts = arguments_of(node), node.meta["val"]
    source, axis = given["self"], given["dim"]
    if not all(reader.target is operator.getitem for reader in node.users):
        return
    sizes = [1 if name == "aten.unbind.int" else part.shape[axis] for part in parts]
    for reader in list(node.users):
        index = int(reader.args[1]) % len(sizes)  # type: ignore[arg-type]
        begin = sum(sizes[:index])
        if name == "aten.unbind.int":
            _instead(reader, put(reader, aten.select.int, source, axis, index))
        else:
            _instead(reader, put(reader, aten.slice.Tensor, source, axis, begin, begin + sizes[index]))


def _first_results(node: fx.Node, _: dict[str, Tensor]) -> None:
    """The values of a maximum whose places nobody reads."""
    name = target_of(node)
    alone = all(reader.target is operator.getitem and reader.args[1] == 0 for reader in node.users)
    calls: dict[str, Callable[..., Any]] = {
        "aten.max.dim": aten.amax.default, "aten.max_pool2d_with_indices.default": aten.max_pool2d.default,
        "aten.adaptive_max_pool1d.default": largest_of_windows, "aten.adaptive_max_pool2d.default": largest_of_windows,
    }  # fmt: skip
    if name not in calls or not alone:
        return
    given = list(arguments_of(node).values())
    if name == "aten.max.dim":
        given[1] = [given[1]]
    for reader in list(node.users):
        _instead(reader, put(reader, calls[name], *given))


def _constant(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, fx.Node) and value.op == "get_attr")


def _arithmetic(node: fx.Node, tensors: dict[str, Tensor]) -> None:
    """Additions and multiplications are the only arithmetic left where these can say it."""
    name, given = target_of(node), arguments_of(node)
    if name == "aten.neg.default":
        _instead(node, put(node, aten.mul.Tensor, given["self"], -1.0))
        return
    if name in ("aten.rsub.Scalar", "aten.rsub.Tensor"):  # other - alpha * self
        turned = put(node, aten.mul.Tensor, given["self"], -float(given["alpha"]), like=given["self"])
        _instead(node, put(node, aten.add.Tensor, turned, given["other"]))
        return
    if name not in ("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.div.Tensor",
                    "aten.div.Scalar", "aten.mul.Scalar"):  # fmt: skip
        return
    first, second = given["self"], given["other"]
    if name.startswith("aten.mul"):
        node.target = aten.mul.Tensor
    elif name.startswith("aten.div"):
        if not isinstance(second, (int, float)) and not _constant(second):
            return
        _instead(node, put(node, aten.mul.Tensor, first, _times(second, tensors, node, inverse=True)))
    else:
        factor = float(given["alpha"]) * (-1.0 if "sub" in name else 1.0)
        if factor != 1.0 or not name.endswith("add.Tensor"):
            _instead(node, put(node, aten.add.Tensor, first, _times(second, tensors, node, factor=factor)))


def _times(value: Any, tensors: dict[str, Tensor], node: fx.Node, *, factor: float = 1.0, inverse: bool = False) -> Any:
    """A number or constant times a factor, or one over it; a multiplication of a value."""
    if isinstance(value, (int, float)):
        return 1.0 / float(value) if inverse else float(value) * factor
    if value.op != "get_attr":
        return value if factor == 1.0 else put(node, aten.mul.Tensor, value, factor, like=value)
    if factor == 1.0 and not inverse:
        return value
    name = f"constants.{node.name}_other"
    source = tensors[str(value.target)]
    tensors[name] = made_of([source], 1.0 / source if inverse else source * factor)
    with node.graph.inserting_before(node):
        made = node.graph.get_attr(name)
    made.meta |= value.meta
    return made


def made_of(sources: list[Tensor], value: Tensor) -> Tensor:
    """A constant computed from others: a parameter if one of them is, so that students train what models train."""
    trained = any(isinstance(source, nn.Parameter) for source in sources) and value.is_floating_point()
    needs_grad = any(source.requires_grad for source in sources)
    if not trained:
        return value.detach()
    return nn.Parameter(value.detach().clone(), requires_grad=needs_grad)  # an optimizer cannot change a view


def _spreads(node: fx.Node, _: dict[str, Tensor]) -> None:
    """`x * y.expand_as(x)` is `x * y`."""
    if target_of(node) not in _PAIRS:
        return
    for place, item in enumerate(node.args[:2]):
        if not isinstance(item, fx.Node) or target_of(item) not in _SPREAD:
            continue
        source, other = item.args[0], node.args[1 - place]
        if not isinstance(source, fx.Node) or not isinstance(other, fx.Node) or is_size(other):
            continue
        one, two = source.meta.get("val"), other.meta.get("val")
        whole, spread = node.meta["val"], item.meta["val"]
        if not isinstance(one, Tensor) or not isinstance(two, Tensor) or not one.dim() == two.dim() == spread.dim():
            continue
        broad = [str(b) if str(a) == "1" else str(a) for a, b in zip(one.shape, two.shape, strict=True)]
        if broad == [str(side) for side in whole.shape]:
            node.update_arg(place, source)


_REWRITES = (
    _drop_checks, _drop_copies, _writes, _views, _batch_norms, _pieces, _first_results, _arithmetic, _spreads
)  # fmt: skip

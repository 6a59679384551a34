"""A network captured by torch.export: one graph of ATen calls, whatever its forward is written in.

Static shapes but for the batch; what does not depend on the images is computed now; evaluation mode, so that dropouts
are gone and batch norms use what they have stored. Source: PyTorch 2 export (torch.export, non-strict).
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dfq.errors import first_line
from dfq.network.calls import MODULE, is_size, target_of
from dfq.network.normalize import made_of, normalize
from dfq.network.outputs import evaluation

BATCH = 2  # images of the example: torch.export takes a batch of 1 for a constant


class PrepareError(ValueError):
    """A network that cannot be captured, or of which nothing can be quantized."""


@dataclass(frozen=True)
class Network:
    """A captured network.

    graph: of ATen calls on one placeholder, the images; tensors are `get_attr` nodes by name. Its output is a tuple.
    tensors: parameters, buffers and computed constants; the first two are the model's own.
    structure: how the outputs are nested. input_shape: of one image. modules: the model's, by name.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    structure: pytree.TreeSpec
    input_shape: tuple[int, ...]
    modules: dict[str, nn.Module]


def capture(model: nn.Module, example: tuple[int, ...] | Tensor, owner: str = "prepare") -> Network:
    """The calls that `model` makes on images in evaluation mode.

    Args:
        model: of one floating-point tensor; stays as it is, with the same parameters.
        example: the shape of one image, or images `[N, ...]`.
        owner: who is named in errors.

    Raises:
        PrepareError: torch.export refuses the model; names the module and gives its first line.
    """
    images = example_images(example, model, owner)
    quiet = logging.root.manager.disable  # torch prints what is raised here, too, and whole graphs
    try:
        with evaluation(model), _unchanged(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export's, on its own internals
            expected = model(images.clone())  # a model may write into them
            logging.disable(logging.CRITICAL)
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                program = _exported(model, images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's own code raises on torch.export's tensors
        where = _module_of(error.__traceback__, model)
        rule = f"model must run on images of shape {tuple(images.shape[1:])} and be captured by torch.export"
        hint = "; its batch must stay a variable (x.shape[0], not len(x))" if "specialized" in str(error) else ""
        reason = f"{type(error).__name__} in {where}: {first_line(error)}{hint}"
        raise PrepareError(f"{owner}: {rule}, got {reason}") from error
    finally:
        logging.disable(quiet)
    graph, tensors = _lifted(program, model)
    normalize(graph, tensors)
    graph = _named(graph)
    assert program.call_spec.out_spec is not None
    network = Network(graph, tensors, program.call_spec.out_spec, tuple(images.shape[1:]), dict(model.named_modules()))
    _check_same(network, images, pytree.tree_leaves(expected), owner)
    return network


@torch.no_grad()
def _check_same(network: Network, images: Tensor, expected: list[Any], owner: str) -> None:
    """torch.export sees no branch on values, and takes what is random for what it is once."""
    found = run(network, images)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(other, Tensor) or not other.is_floating_point() or not bool(other.isfinite().all()):
            continue
        off, size = float((one - other).norm()), float(other.norm())
        if not off <= 1e-3 * size:
            rule = f"{owner}: model must compute the same when torch.export captures it"
            raise PrepareError(f"{rule}, got an output {number} that differs by {off / max(size, 1e-30):.1%}")


def run(network: Network, images: Tensor) -> list[Any]:
    """The captured calls on images: the outputs, one after the other."""
    values: dict[fx.Node, Any] = {}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            values[node] = images
        elif node.op == "get_attr":
            values[node] = network.tensors[str(node.target)]
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda item: values[item]))
        else:
            arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda item: values[item])
            values[node] = node.target(*arguments, **keywords)
    raise AssertionError("a graph ends in its output")


def example_images(example: Any, model: nn.Module, owner: str) -> Tensor:
    """Images to capture with, on the model's device.

    Raises:
        PrepareError: neither a shape nor images.
    """
    rule = "input_shape must be the shape of one image, or images [N, ...] of floating point"
    if isinstance(example, Tensor):
        if not example.is_floating_point() or example.dim() < 2 or len(example) == 0:
            raise PrepareError(f"{owner}: {rule}, got {example.dtype} {tuple(example.shape)}")
        images = example.detach()
        return images if len(images) >= BATCH else images.repeat(BATCH, *[1] * (images.dim() - 1))
    sides = tuple(example) if isinstance(example, (tuple, list)) else ()
    if not sides or not all(type(side) is int and side > 0 for side in sides):
        raise PrepareError(f"{owner}: {rule}, got {example!r}")
    first = next(model.parameters(), None)
    where = torch.device("cpu") if first is None else first.device
    return torch.randn(BATCH, *sides, generator=torch.Generator().manual_seed(0)).to(where)


def _exported(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("n", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
    return program.run_decompositions({})  # nothing is written in place afterwards


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What capturing leaves on the modules is gone afterwards."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)


def _module_of(trace: TracebackType | None, model: nn.Module) -> str:
    """The user's module whose forward was the innermost when an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = names.get(id(owner), "") or found if isinstance(owner, nn.Module) else found
        trace = trace.tb_next
    return found or "the model"


def _lifted(program: torch.export.ExportedProgram, model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The program's graph with its lifted tensors as `get_attr` nodes, and these tensors by name."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = dict(signature.inputs_to_lifted_tensor_constants)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    new: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        name = names.get(node.name)
        if node.op == "placeholder" and name is not None:
            tensors[name] = own[name] if name in own else program.state_dict[name]
            new[node] = graph.get_attr(name)
        elif node.op == "placeholder" and node.name in constants:
            name = f"constants.{node.name}"
            tensors[name] = program.constants[constants[node.name]].detach()
            new[node] = graph.get_attr(name)
        elif node.op == "get_attr":
            name = f"programs.{node.target}".replace(".", "_")
            tensors[name] = getattr(program.graph_module, str(node.target))  # a graph of a higher-order operator
            new[node] = graph.get_attr(name)
        elif node.op == "output":
            kinds = [spec.kind for spec in signature.output_specs]  # what is written in place is an output, too
            own_outputs = tuple(item for item, kind in zip(node.args[0], kinds, strict=True)
                                if kind == torch.export.graph_signature.OutputKind.USER_OUTPUT)  # fmt: skip
            new[node] = graph.output(fx.map_arg(own_outputs, lambda item: new[item]))  # type: ignore[arg-type]
        else:
            new[node] = graph.node_copy(node, lambda item: new[item])
            new[node].meta[MODULE] = _module_name(node)
    _fold(graph, tensors)
    return graph, tensors


def _named(graph: fx.Graph) -> fx.Graph:
    """The same graph with names that say what is called where: `layer1_0_add`."""
    named = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        name = node.name
        if node.op == "call_function":
            where = str(node.meta.get(MODULE, "")).replace(".", "_")
            call = target_of(node).removeprefix("aten.").split(".")[0].strip("_")
            name = f"{where}_{call}" if where else call
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda item: new[item])
        new[node] = named.create_node(node.op, node.target, arguments, keywords, name)
        new[node].meta |= node.meta
    return named


def _module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry[0] for key, entry in stack.items() if not str(key).startswith("_empty")]
    name = str(entries[-1]) if entries else ""
    return name.removeprefix("L['self']").lstrip(".").split("@")[0]


@torch.no_grad()
def _fold(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """Computes what does not depend on the images."""
    for node in list(graph.nodes):
        if node.op != "call_function" or is_size(node) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        known = all(item.op == "get_attr" and isinstance(tensors.get(str(item.target)), Tensor)
                    for item in node.all_input_nodes)  # fmt: skip
        single = isinstance(node.meta.get("val"), Tensor)
        symbols = any(isinstance(side, torch.SymInt) for side in getattr(node.meta.get("val"), "shape", ()))
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        if not known or not single or symbols or random or not node.target._schema.returns:
            continue
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda item: tensors[str(item.target)])
        name = f"constants.{node.name}"
        sources = [tensors[str(item.target)] for item in node.all_input_nodes]
        tensors[name] = made_of(sources, node.target(*arguments, **keywords))
        with graph.inserting_before(node):
            folded = graph.get_attr(name)
        folded.meta |= {"val": node.meta["val"], MODULE: node.meta.get(MODULE, "")}
        node.replace_all_uses_with(folded)
        graph.erase_node(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    for name in set(tensors) - read:
        del tensors[name]

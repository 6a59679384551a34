"""What a network's outputs mean, and how far two networks are apart in them.

    D = sum over outputs of
        classes:  KL(softmax(teacher) || softmax(student)) over dim 1, mean over images and positions
        values:   (teacher - student)^2 / variance of teacher, mean over all

Entropies, and labels to ask a generator for, are where there are classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dfq.errors import check
from dfq.method import losses
from dfq.network.outputs import wording

KINDS = ("classes", "values")


@dataclass(frozen=True)
class Objective:
    """Of a network's outputs, in the order of their nesting.

    Args:
        kinds: of every output: `classes` (logits along dim 1: `[N, K]`, or `[N, K, H, W]` for every pixel) or `values`
            (numbers: an embedding, coordinates, whatever a mean square is right for).
        shapes: of every output, for one image.
    """

    kinds: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def num_classes(self) -> int | None:
        """Of a classifier of whole images; None for every other network."""
        classifier = self.kinds == ("classes",) and len(self.shapes[0]) == 1
        return self.shapes[0][0] if classifier else None

    def describe(self) -> str:
        """`classes [N, 10]`, `classes [N, 11, 64, 64]`, `values [N, 64], values [N, 4]`."""
        return ", ".join(
            f"{kind} [{', '.join(['N', *map(str, shape)])}]"
            for kind, shape in zip(self.kinds, self.shapes, strict=True)
        )

    def distance(self, measure: str, teacher: Any, student: Any) -> Tensor:
        """`D`, a mean over the batch; its gradient goes to both.

        Args:
            measure: `kl`, as above, or `l1`: absolute differences, of logits as they are, of values in units of the
                teacher's deviation.
            teacher, student: what the networks return.
        """
        apart = {
            ("classes", "kl"): losses.distillation,
            ("classes", "l1"): losses.logit_distance,
            ("values", "kl"): lambda wanted, got: losses.normalised_squares(wanted, got).mean(),
            ("values", "l1"): losses.normalised_distance,
        }
        pairs = zip(self.kinds, pytree.tree_leaves(teacher), pytree.tree_leaves(student), strict=True)
        return _sum([apart[kind, measure](wanted, got) for kind, wanted, got in pairs])

    def divergences(self, teacher: Any, student: Any) -> Tensor:
        """`D` of each image, `[N]`: nats of classes, shares of the teacher's variance of values."""
        apart = {"classes": losses.divergences, "values": losses.normalised_squares}
        pairs = zip(self.kinds, pytree.tree_leaves(teacher), pytree.tree_leaves(student), strict=True)
        return _sum([apart[kind](wanted, got) for kind, wanted, got in pairs])

    def entropies(self, teacher: Any) -> Mapping[str, Tensor]:
        """`instance` and `batch` of the outputs that are classes, summed; none of them, nothing."""
        classes = [
            leaf for kind, leaf in zip(self.kinds, pytree.tree_leaves(teacher), strict=True) if kind == "classes"
        ]
        if not classes:
            return {}
        return {
            "instance": _sum([losses.instance_entropy(logits) for logits in classes]),
            "batch": _sum([losses.batch_negentropy(logits) for logits in classes]),
        }


def classifier(num_classes: int) -> Objective:
    """Logits `[N, num_classes]`."""
    return Objective(("classes",), ((num_classes,),))


def objective_of(
    outputs: Sequence[Tensor], kinds: str | Sequence[str] | None, num_classes: int | None, *, owner: str, name: str
) -> Objective:
    """The objective of a network that returns `outputs`.

    Args:
        kinds: of each output, or one for all. None: an only output is classes if it is `[N, K]` or `[N, K, H, W]` with
            two channels or more; everything else, and each of several outputs, is values.
        num_classes: that the network must have, if that was said.

    Raises:
        ValueError: another number of kinds, an unknown one, classes along a dimension that is not there, or other
            classes than `num_classes`.
    """
    shapes = tuple(tuple(output.shape[1:]) for output in outputs)
    if num_classes is not None and (len(shapes) != 1 or shapes[0] != (num_classes,)):
        got = " ".join(str(tuple(output.shape)) for output in outputs)
        raise ValueError(f"{owner}: {name} must give {wording([(num_classes,)])}, got {got}")
    if kinds is None:
        only = len(shapes) == 1 and len(shapes[0]) in (1, 3) and shapes[0][0] >= 2
        kinds = "classes" if only else "values"
    rule = f"{' or '.join(KINDS)}, for each of the {len(shapes)} outputs or one for all"
    many = [kinds] * len(shapes) if isinstance(kinds, str) else list(kinds) if isinstance(kinds, Sequence) else []
    check(owner, "objective", kinds, rule, len(many) == len(shapes) and all(kind in KINDS for kind in many))
    for kind, shape in zip(many, shapes, strict=True):
        fits = kind == "values" or (len(shape) >= 1 and shape[0] >= 2)
        rule = "values where an output has no dim 1 of two classes or more"
        check(owner, "objective", f"{kind} for {wording([shape])}", rule, fits)
    return Objective(tuple(many), shapes)


def _sum(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

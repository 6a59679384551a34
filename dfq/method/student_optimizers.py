"""What moves a student: SGD its weights, Adam the logarithms of its step sizes, where these are learned."""

from __future__ import annotations

import torch
from torch import nn

from dfq.config import Recipe
from dfq.quant import range_parameters
from dfq.running.optimizers import adam, sgd

Optimizers = tuple[torch.optim.Optimizer, ...]


def student_optimizers(students: list[nn.Module], recipe: Recipe) -> list[Optimizers]:
    """Of each student, for all parameters that it has now."""
    return [_of_one(student, recipe) for student in students]


def _of_one(student: nn.Module, recipe: Recipe) -> Optimizers:
    ranges = range_parameters(student)
    learned = {id(parameter) for parameter in ranges}
    weights = [parameter for parameter in student.parameters() if id(parameter) not in learned]
    slow = sgd(weights, recipe.student_learning_rate, weight_decay=recipe.weight_decay)
    return (slow, adam(ranges, recipe.range_learning_rate)) if ranges else (slow,)

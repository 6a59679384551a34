"""The terms of the objective: pure functions of outputs, no weights inside. Source: arXiv 2005.04136 section 3.

Logits are `[N, K]`, or `[N, K, positions...]` with a distribution at each position. The batch-norm term is
`BnStatistics.loss`. All are finite for one-hot distributions: `p log p` at 0 is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.running import ranks


def divergences(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`KL(softmax(teacher) || softmax(student))` of each image, `[N]`, mean over positions, in nats."""
    teacher = F.log_softmax(teacher_logits.float(), dim=1)
    student = F.log_softmax(student_logits.float(), dim=1)
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def distillation(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`D = KL(softmax(teacher) || softmax(student))`, mean over the batch and positions, in nats."""
    teacher = F.log_softmax(teacher_logits.float(), dim=1)
    student = F.log_softmax(student_logits.float(), dim=1)
    total = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return total if teacher.dim() == 2 else total / teacher[:1, :1].numel()


def logit_distance(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`|teacher - student|`, mean over logits and batch. Its gradient does not fade as both agree.

    Source: G. Fang et al., Data-Free Adversarial Distillation, arXiv 1912.11006, section 3.2.
    """
    return (teacher_logits.float() - student_logits.float()).abs().mean()


def normalised_squares(teacher: Tensor, student: Tensor) -> Tensor:
    """`(teacher - student)^2 / variance of teacher` of each image, `[N]`: 0 for the same values, 1 for their mean."""
    squares = (teacher.float() - student.float()).square()
    return squares.flatten(1).mean(1) / _variance(teacher) if squares.dim() > 1 else squares / _variance(teacher)


def normalised_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """`|teacher - student| / deviation of teacher`, mean over all values."""
    return (teacher.float() - student.float()).abs().mean() / _variance(teacher).sqrt()


def _variance(values: Tensor) -> Tensor:
    """About the mean of each channel (dim 1), over the batch and positions; mean over channels. No gradient.

    At least a millionth of the mean square: values that never change are no unit to measure by.
    """
    values = values.detach().float()
    mean = ranks.mean(values.mean((0, *range(2, values.dim())), keepdim=True))
    variance, power = ranks.mean(torch.stack([(values - mean).square().mean(), values.square().mean()])).unbind()
    return torch.maximum(variance, 1e-6 * power).clamp(min=1e-12)


def instance_entropy(teacher_logits: Tensor) -> Tensor:
    """`L_inst`: mean entropy of each image's classes, in nats; small when the teacher is sure of every image."""
    log_p = F.log_softmax(teacher_logits.float(), dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


def batch_negentropy(teacher_logits: Tensor) -> Tensor:
    """`L_batch`: minus the entropy of the batch's mean class distribution, in nats; small when all classes occur."""
    probabilities = F.softmax(teacher_logits.float(), dim=1)
    mean = ranks.mean(probabilities.mean((0, *range(2, probabilities.dim()))))
    return (mean * mean.clamp(min=1e-30).log()).sum()


def label_cross_entropy(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the teacher to the labels that a conditional generator was asked for, in nats."""
    return F.cross_entropy(teacher_logits.float(), labels)

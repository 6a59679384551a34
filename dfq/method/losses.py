"""The terms of the objective: pure functions of logits, no weights inside. Source: arXiv 2005.04136 section 3.

The batch-norm term is `BnStatistics.loss`. All are finite for one-hot distributions: `p log p` at 0 is 0.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergences(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`KL(softmax(teacher) || softmax(student))` of each image, `[N]`, in nats."""
    teacher = F.log_softmax(teacher_logits.float(), dim=1)
    student = F.log_softmax(student_logits.float(), dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def distillation(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`D = KL(softmax(teacher) || softmax(student))`, mean over the batch, in nats; `[N, K]` each."""
    teacher = F.log_softmax(teacher_logits.float(), dim=1)
    student = F.log_softmax(student_logits.float(), dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def logit_distance(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`|teacher - student|`, mean over logits and batch; `[N, K]` each. Its gradient does not fade as both agree.

    Source: G. Fang et al., Data-Free Adversarial Distillation, arXiv 1912.11006, section 3.2.
    """
    return (teacher_logits.float() - student_logits.float()).abs().mean()


def instance_entropy(teacher_logits: Tensor) -> Tensor:
    """`L_inst`: mean entropy of each image's classes, in nats; small when the teacher is sure of every image."""
    log_p = F.log_softmax(teacher_logits.float(), dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


def batch_negentropy(teacher_logits: Tensor) -> Tensor:
    """`L_batch`: minus the entropy of the batch's mean class distribution, in nats; small when all classes occur."""
    mean = F.softmax(teacher_logits.float(), dim=1).mean(0)
    return (mean * mean.clamp(min=1e-30).log()).sum()


def label_cross_entropy(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the teacher to the labels that a conditional generator was asked for, in nats."""
    return F.cross_entropy(teacher_logits.float(), labels)

"""What holds in every test on a GPU, seen without one; and tensors that reach a GPU as the views that they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.data.images import Images
from dfq_kernels.specs import all_specs
from tests.conftest import SEED
from tests.gpu_settings import refuse_interpreter
from tests.views import moved

SPECS = all_specs()


def test_fp32_is_fp32_and_repeats() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_an_interpreted_test_on_a_gpu_is_refused() -> None:
    with pytest.raises(pytest.fail.Exception, match="TRITON_INTERPRET=0"):
        refuse_interpreter("1", "gpu")
    with pytest.raises(pytest.skip.Exception, match="TRITON_INTERPRET=0"):
        refuse_interpreter("1", "")
    refuse_interpreter("0", "gpu"), refuse_interpreter(None, "")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", SPECS)
def test_views_arrive_as_views(op: str, device: str) -> None:
    """`Tensor.to` makes a slice, a misaligned or an expanded tensor dense."""
    strided = 0
    for case in SPECS[op].cases:
        for name, value in case.make(torch.Generator().manual_seed(SEED))[0].items():
            if not isinstance(value, Tensor):
                continue
            found = moved(value, device)
            assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride()), name
            assert found.storage_offset() == value.storage_offset()
            assert found.untyped_storage().nbytes() == value.untyped_storage().nbytes()
            assert device == "meta" or torch.equal(found.isnan(), value.isnan())
            assert device == "meta" or torch.equal(found.nan_to_num(), value.nan_to_num())
            strided += value.numel() * value.element_size() != value.untyped_storage().nbytes()
    assert strided or "slice" not in [case.name for case in SPECS[op].cases]


class ForbidNumbersAsDivisors(TorchDispatchMode):
    """Raises where a tensor is divided by a Python number: a GPU multiplies by its reciprocal, one ulp off."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and result.is_floating_point():
            divisor = args[1]
            if not isinstance(divisor, Tensor) and abs(math.frexp(divisor)[0]) != 0.5:  # a power of two is exact
                raise AssertionError(f"a tensor is divided by the number {divisor}")
        return result


@pytest.mark.parametrize("op", [op for op, spec in SPECS.items() if spec.exact])
def test_no_exact_reference_divides_by_a_number(op: str) -> None:
    for case in SPECS[op].cases:
        tensors, keywords = case.make(torch.Generator().manual_seed(SEED))
        with ForbidNumbersAsDivisors():
            SPECS[op].call(**tensors, **keywords, backend="reference")


def test_images_are_not_divided_by_a_number() -> None:
    images = Images(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), (0.5,), (0.5,), 10)
    with ForbidNumbersAsDivisors():
        images.normalize(images.pixels)


def test_a_division_by_a_number_is_noticed() -> None:
    with ForbidNumbersAsDivisors(), pytest.raises(AssertionError, match="the number 7"):
        torch.ones(3) / 7

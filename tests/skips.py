"""Every reason for which a test of this suite may be skipped, and when a machine justifies it.

A skip for another reason, or for one that this machine does not justify, makes the run red: whatever disappears behind
a skip (kernels that were not built, a program that is not there) is seen at once.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from dfq_kernels import extension
from tests.build_script import build_script


def _compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _built_with(*settings: str) -> bool:
    """Whether whoever built the native module left something out on purpose."""
    return any(f"DFQ_BUILD_NATIVE={value}" in str(extension.missing("cuda")) for value in settings)


def _no_module() -> bool:
    return not _compiler() or _built_with("0")


def _capability(name: str) -> bool:
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(name))


# (pattern of the whole reason, when it is justified)
ALLOWED: tuple[tuple[str, Callable[[], bool]], ...] = (
    (r"torch sees no CUDA device", lambda: not torch.cuda.is_available()),
    (r"tests on a GPU need TRITON_INTERPRET=0", lambda: os.environ.get("TRITON_INTERPRET") == "1"),
    (r"no native kernels|the native module was not built: .*", _no_module),
    (r"no native module, or torch is older than 2\.10",
     lambda: _no_module() or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")),
    (r"the native module was built without CUDA kernels: .*",
     lambda: build_script().find_nvcc() is None or _built_with("cpu", "0")),
    (r"no compiled CUDA kernels to look at: .*",
     lambda: build_script().find_nvcc() is None or _built_with("cpu", "0")),
    (r"nvcc was not found", lambda: build_script().find_nvcc() is None),
    (r"there is no (native|triton) kernel for device type (cpu|cuda)", lambda: True),  # what dispatch.TABLE says
    (r"Triton runs on the CPU only interpreted .*|Triton is not interpreted",
     lambda: os.environ.get("TRITON_INTERPRET") != "1"),
    (r"Triton cannot be imported: .*", lambda: find_spec("triton") is None),
    (r"no g\+\+( to build the emulation with)?", lambda: shutil.which("g++") is None),
    (r"needs nm of the binutils", lambda: shutil.which("nm") is None),
    (r"the build is tested on Linux", lambda: sys.platform != "linux"),
    (r"AMX shares the packing of VNNI, which this processor does not have", lambda: not _capability("avx512_vnni")),
    (r"this torch does not say what a CPU can do", lambda: not hasattr(torch.cpu, "get_capabilities")),
    (r"needs \d+ GiB of memory, there are \d+", lambda: True),  # the number stands there
    (r"no module for x86-64, or no objdump to look into it with",
     lambda: platform.machine() != "x86_64" or _no_module() or shutil.which("objdump") is None),
)  # fmt: skip


def justified(reason: str) -> bool:
    """Whether the reason is on the list, and true here. Conformance puts operator, backend and device in front."""
    bare = re.sub(r"^\w+ (native|triton|reference) (cpu|cuda): ", "", reason.removeprefix("Skipped: "))
    return any(re.fullmatch(pattern, bare, re.DOTALL) and holds() for pattern, holds in ALLOWED)


_unjustified: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2]
        if reason in _unjustified or not justified(reason):
            _unjustified.setdefault(reason, []).append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unjustified and not hasattr(session.config, "workerinput"):  # xdist's workers report to their controller
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, tests in _unjustified.items():
        text = f"SKIPPED without a reason that holds here (tests/skips.py): {reason}: {len(tests)} tests, {tests[0]}"
        terminalreporter.write_line(text, red=True)

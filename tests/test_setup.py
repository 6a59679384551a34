"""The install: from a source distribution, without compiler or nvcc, and with ones that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a compiler that makes empty files at once; what it says when it fails
PRETENDS = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -o) shift; : > "$1"; made="$1";; -MF) shift; : > "$1"; dependencies="$1";; esac; shift
done
[ -z "$dependencies" ] || echo "$made:" > "$dependencies"
"""
FAILS = "#!/bin/sh\necho 'x.cpp:1:1: error: no such thing'\nexit 1\n"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the build is tested on Linux")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def build(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The native build into `folder`, with nothing on the path; what it said, and where it left it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"),
               "--build-temp", str(folder / "temp")]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**clean, "PATH": "/bin-that-is-not", **environment}
    )
    return done, folder / "lib" / "dfq_kernels"


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line about native kernels."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dfq-kernels: ")]
    return line.removeprefix("dfq-kernels: ")


def test_no_compiler_still_installs_and_says_why(tmp_path: Path) -> None:
    done, package = build(tmp_path)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler was found (g++, clang++, c++)"
    assert said(done) == f"no native kernels: {reason}"
    assert (package / "_native.txt").read_text() == f"{reason}\n" and not list(package.glob("_native*.so"))


def test_a_compiler_that_fails_still_installs(tmp_path: Path) -> None:
    compiler = script(tmp_path / "cxx", FAILS)
    done, package = build(tmp_path, CXX=str(compiler), PATH="/bin:/usr/bin", DFQ_BUILD_NATIVE="cpu")
    assert done.returncode == 0, done.stderr
    expected = f"{compiler} could not compile it: x.cpp:1:1: error: no such thing"
    assert (package / "_native.txt").read_text() == f"{expected}\n"


@pytest.mark.parametrize("compiles", [False, True])
def test_an_editable_install_has_the_module_or_the_reason_beside_its_sources(tmp_path: Path, compiles: bool) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "dfq_kernels", "dfq"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    package = tmp_path / "dfq_kernels"
    (package / "_native.txt").unlink(missing_ok=True)
    left = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    left.write_text("of an earlier build")
    compiler = script(tmp_path / "cxx", PRETENDS if compiles else FAILS)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "CXX": str(compiler), "DFQ_BUILD_NATIVE": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert left.exists() == compiles and (not compiles or left.read_text() == "")
    assert (package / "_native.txt").exists()


def test_kernels_that_must_be_built_fail_the_install(tmp_path: Path) -> None:
    done, _ = build(tmp_path, DFQ_BUILD_NATIVE="1")
    assert done.returncode != 0
    assert said(done).startswith("DFQ_BUILD_NATIVE=1, but no C++ compiler was found")
    home = toolkit(tmp_path / "cuda", FAILS)
    compiler = script(tmp_path / "cxx", PRETENDS)
    done, _ = build(tmp_path, DFQ_BUILD_NATIVE="1", CXX=str(compiler), CUDA_HOME=home, PATH="/bin:/usr/bin")
    assert done.returncode != 0 and "nvcc could not compile it: x.cpp:1:1: error: no such thing" in said(done)


def test_the_build_can_be_left_out(tmp_path: Path) -> None:
    done, package = build(tmp_path, DFQ_BUILD_NATIVE="0")
    assert done.returncode == 0
    assert (package / "_native.txt").read_text() == "it was built with DFQ_BUILD_NATIVE=0\n"


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    done, _ = build(tmp_path, DFQ_BUILD_NATIVE="yes")
    assert done.returncode != 0 and said(done) == "DFQ_BUILD_NATIVE must be auto, 0, cpu or 1, got 'yes'"


def toolkit(folder: Path, nvcc: str) -> str:
    """A CUDA folder with this nvcc."""
    script(folder / "bin" / "nvcc", nvcc)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    return str(folder)


@pytest.mark.parametrize("nvcc_works", [True, False])
def test_cuda_kernels_are_built_where_nvcc_can(tmp_path: Path, nvcc_works: bool) -> None:
    compiler = script(tmp_path / "cxx", PRETENDS)
    home = toolkit(tmp_path / "cuda", PRETENDS if nvcc_works else FAILS)
    done, package = build(tmp_path, CXX=str(compiler), CUDA_HOME=home, PATH="/bin:/usr/bin")
    assert done.returncode == 0, done.stderr
    assert len(list(package.glob("_native*.so"))) == 1
    if nvcc_works:
        assert said(done).endswith("; CUDA kernels") and not (package / "_native.txt").exists()
    else:
        assert "no CUDA kernels: " in said(done)
        assert "WARNING: dfq-kernels is installed WITHOUT its CUDA kernels." in done.stderr
        assert len(done.stderr.partition("*" * 100)[2].splitlines()) > 5
        assert (package / "_native.txt").read_text().endswith("could not compile it: x.cpp:1:1: error: no such thing\n")


@pytest.mark.parametrize(
    ("nvcc", "expected"),
    [
        ("#!/bin/sh\necho \"nvcc fatal   : Unsupported gpu architecture 'compute_90a'\"\nexit 1\n",
         "nvcc fatal   : Unsupported gpu architecture 'compute_90a'"),
        ("#!/bin/sh\necho working\necho out of licences\nexit 1\n", "out of licences"),
        ("#!/bin/sh\nexit 1\n", "it said nothing"),
        ("#!/bin/sh\nkill -SEGV $$\n", "Segmentation fault"),
        ("", "Permission denied"),
    ],
)  # fmt: skip
def test_a_compiler_without_the_word_error_is_quoted(tmp_path: Path, nvcc: str, expected: str) -> None:
    home = toolkit(tmp_path / "cuda", nvcc)
    if not nvcc:
        (tmp_path / "cuda" / "bin" / "nvcc").chmod(0o644)
    _, package = build(tmp_path, CXX=str(script(tmp_path / "cxx", PRETENDS)), CUDA_HOME=home, PATH="/bin:/usr/bin")
    assert (package / "_native.txt").read_text().strip().endswith(expected)


STRICT = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
after = {{words[i + 1] for i, word in enumerate(words) if word in ("-o", "-MF", "-ccbin")}}
for word in set(words) - after:
    path = word[2:] if word[:2] in ("-I", "-L") else word if word[0] != "-" else None
    if path is not None and not os.path.exists(path):
        sys.exit("error: no such file " + path)
for flag in ("-o", "-MF"):
    if flag in words:
        open(words[words.index(flag) + 1], "w").write(words[words.index("-o") + 1] + ":\\n" if flag == "-MF" else "")
"""


def test_paths_may_have_spaces_and_dollars(tmp_path: Path) -> None:
    """Of the environment with pybind11, of the CUDA folder, and of where the module goes."""
    import pybind11

    odd = tmp_path / "a $b c"
    shutil.copytree(Path(pybind11.__file__).parent, odd / "pybind11")
    home, compiler = toolkit(odd / "cuda", STRICT), script(tmp_path / "cxx", STRICT)
    done, package = build(odd / "out", CXX=str(compiler), CUDA_HOME=home, PATH="/bin:/usr/bin", PYTHONPATH=str(odd))
    assert done.returncode == 0 and said(done).endswith("; CUDA kernels"), done.stderr
    assert len(list(package.glob("_native*.so"))) == 1


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_source_distribution_builds_and_its_wheel_runs(tmp_path: Path) -> None:
    """Unoptimised, because nobody waits for its kernels."""
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=ROOT, check=True)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "dfq", "dfq_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert set(tracked.stdout.split()) <= inside
    compiler = script(tmp_path / "cxx", '#!/bin/sh\nexec g++ $(echo "$@" | sed "s/-O3/-O0/")\n')
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), source],
        check=True, env={**os.environ, "CXX": str(compiler), "DFQ_BUILD_NATIVE": "cpu"},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import dfq_kernels as k, torch; print(k.__file__, k.fake_quant(torch.ones(9), 0.3, 0, backend='native')[8])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout and "0.9000" in done.stdout

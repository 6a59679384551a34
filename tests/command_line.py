"""`dfq` commands in processes of their own: forks of one that has imported everything, three seconds less each."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
# The command with the recipe `default` made small; everything else is the real thing.
RUN = """
import dataclasses, sys
import dfq.config
from tests.conftest import SMALL_RECIPE
dfq.config.RECIPES["default"] = dataclasses.replace(SMALL_RECIPE, name="default")
from dfq.cli.app import main
"""
FORKS = """
import json, os, traceback
import dfq.cli.commands
for line in sys.stdin:
    arguments, folder, out, err = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for descriptor, path, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, how), descriptor)
    os.chdir(folder)
    sys.argv, code = ["dfq", *arguments], 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)
"""


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """Takes a command a line and answers with its exit code."""
    parent = subprocess.Popen(
        [sys.executable, "-c", RUN + FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    atexit.register(parent.kill)
    return parent


def dfq_command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `dfq` with these arguments ends with and prints, in a folder."""
    parent = _parent()
    assert parent.stdin is not None and parent.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        print(json.dumps([arguments, str(cwd), out.name, err.name]), file=parent.stdin, flush=True)
        code = int(parent.stdout.readline())
        return subprocess.CompletedProcess(["dfq", *arguments], code, out.read(), err.read())

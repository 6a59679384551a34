"""Options that several commands of `dfq` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfq.data import DATASETS

Data = Annotated[
    str | None,
    typer.Option(
        help=f"Real test images to judge by ({', '.join(DATASETS)}). Default: fashion-mnist for the embedded teacher, "
        "none otherwise."
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of the data set's files. Default: $DFQ_DATA/NAME, else ~/.cache/dfq/NAME.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Backend = Annotated[str | None, typer.Option(help="native or reference. Default: the best that is there.")]

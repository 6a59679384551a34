"""Options that several commands of `dfq` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfq.data.images import DATASETS, Normalization
from dfq.errors import check

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
Mean = Annotated[
    str | None,
    typer.Option(help="What is subtracted from pixels / 255, one number per channel: 0.485,0.456,0.406. With --std."),
]
Std = Annotated[str | None, typer.Option(help="What that is divided by, one number per channel. With --mean.")]


def normalization(mean: str | None, std: str | None) -> Normalization | None:
    """The options --mean and --std as numbers; None where neither is given.

    Raises:
        ValueError: one without the other, or no numbers.
    """
    if mean is None and std is None:
        return None
    rule = "numbers with commas between them, both or neither"
    check("dfq", "mean and std", (mean, std), rule, mean is not None and std is not None)
    try:
        first, second = (tuple(float(number) for number in str(part).split(",")) for part in (mean, std))
    except ValueError as error:
        raise ValueError(f"dfq: mean and std must be {rule}, got {mean!r}, {std!r}") from error
    return first, second


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Backend = Annotated[str | None, typer.Option(help="native or reference. Default: the best that is there.")]

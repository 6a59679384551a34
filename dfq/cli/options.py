"""Options that several commands of `dfq` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfq.config import RECIPES
from dfq.data.images import DATASETS, Normalization
from dfq.errors import check
from dfq.models import MODEL_NAMES
from dfq.running.execution import MODES

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

Model = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(MODEL_NAMES)}, timm:NAME, torchvision:NAME, or package.module:factory. "
        "Default: the embedded WRN-16-1 teacher for Fashion-MNIST."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The model's weights: .safetensors, or a torch.save state dict (read with weights_only). "
        "Needed with a named --model."
    ),
]
ModelKwargs = Annotated[str | None, typer.Option(help="Keyword arguments of a factory, as a JSON object.")]
Stem = Annotated[
    str | None,
    typer.Option(help="First layers of named models: cifar (stride 1) or imagenet (stride 4). Default: cifar."),
]
InputShape = Annotated[str | None, typer.Option(help="Images of the model as C,H,W. Default: those of --data.")]
NumClasses = Annotated[
    int | None,
    typer.Option(
        help="Classes of the model. Default: as many as it has logits; needed for a named one without --data."
    ),
]
Seed = Annotated[
    int, typer.Option(help="Seed of everything random; the same seed and number of threads give the same bits.")
]
Out = Annotated[Path, typer.Option(help="A new folder for config, metrics, pictures and checkpoints.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Precision = Annotated[
    str, typer.Option(help="Of training: auto, fp32 or bf16. Accuracy is always judged by the exact forward.")
]
Capture = Annotated[
    str,
    typer.Option(
        help=f"Steps as CUDA graphs: {', '.join(MODES)}. auto: on a GPU, in one process, and as they are where that "
        "fails."
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Networks through torch.compile: a minute at the start.")]
RecipeName = Annotated[
    str | None, typer.Option(help=f"Instead of --effort, how images are made and students learn: {', '.join(RECIPES)}.")
]
Minutes = Annotated[
    float | None,
    typer.Option(
        help="Instead of --effort, how long it may take: does the best that a few tried images say is no longer."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Student steps. Default: the recipe's.")]
ObjectiveWords = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="What the outputs are: classes (logits) or values, one word for each output, as in classes,values, or one "
        "for all. Default: found from their shapes.",
    ),
]
RealImages = Annotated[
    Path | None,
    typer.Option(
        help="Real images, if there are a few, without labels: a folder of pictures, or a NumPy file. Half of every "
        "batch is drawn from them."
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        help="package.module:function that judges a network: it gets a function of normalised images, returns a number."
    ),
]
AverageBits = Annotated[
    float | None,
    typer.Option(
        help="Bits of a weight, 2 to 8, over all layers: each layer's are chosen by how much the outputs suffer. "
        "Activations keep those of --preset."
    ),
]
Size = Annotated[
    str | None, typer.Option(help="Instead of --average-bits, of the integer network's file: 300kB, 1.5MB, or bytes.")
]

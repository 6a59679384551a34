"""Integer inference against what users have: `python -m benchmarks.integer [--out FILE] [--models ...]`.

Images per second of this engine (W8A8, W4A4, W2A2). On a CPU against torch fp32 and bf16 in channels-last, both under
`torch.compile`; ONNX Runtime fp32, int8 (the same W8A8 network as QDQ) and own int8 (what its quantizer makes of the
float network); OpenVINO fp32 and int8 (what `nncf` makes of the float network). Networks are ours, or `timm:NAME` and
`torchvision:NAME` in an environment that has these packages. On a GPU against torch fp16 in channels-last, captured in
a CUDA graph, and compiled (`max-autotune`); images and logits are on the GPU, every call ends when its logits are there.
Medians of interleaved calls in one process. ONNX Runtime's threads spin for up to a tenth of a second after a call and
would take another's cores: each variant waits for that long, then calls once unmeasured, so that its own are awake.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import results_file, write_results
from benchmarks.timing import interleaved, record
from dfq.cli.app import keep_freed_memory
from dfq.config import quant_config
from dfq.engine import Engine, IntegerGraph
from dfq.export import export
from dfq.export.onnx import save_onnx
from dfq.models import ModelSpec, build_model
from dfq.models.embedded import load_teacher
from dfq.models.registry import ZOOS
from dfq.quant import freeze_ranges, prepare, set_adapting
from dfq.quant.quantizers import learn_ranges
from dfq.running.seeds import seeded_initialisation

Calls = dict[str, Callable[[Tensor], Any]]
Chosen = Callable[[str], bool]  # whether a variant is measured
Round = tuple[int, dict[str, Callable[[], None]], int, float]
NETWORKS = {"wrn-16-1": 32, "resnet20": 32, "mobilenet-v2": 32, "resnet18": 224}  # side of the images
PRESETS = ("W8A8", "W4A4", "W2A2")
PAUSE, CALLS = 0.1, 10
OURS = "dfq-kernels"
ONNX = ("ONNX Runtime fp32", "ONNX Runtime int8", "ONNX Runtime own int8")
OPENVINO = ("OpenVINO fp32", "OpenVINO int8")


def network(name: str, side: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """The embedded teacher, or random weights whose batch norms have seen noise."""
    if name == "wrn-16-1":
        return load_teacher(), (1, side, side)
    backbone = {"weights_backbone": None} if "lraspp" in name else {}  # nothing is downloaded
    with seeded_initialisation(0, name):
        spec = ModelSpec(name, 3, 10 if side < 64 else 1000, "cifar" if side < 64 else "imagenet", backbone)
        model = build_model(spec).train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(8, 3, side, side))
    return model.eval(), (3, side, side)


def integers(model: nn.Module, shape: tuple[int, int, int], preset: str) -> IntegerGraph:
    """`model` with ranges from noise: the speed of a network does not depend on its accuracy."""
    config = quant_config(preset)
    student = prepare(copy.deepcopy(model), shape, config).train()
    set_adapting(student, True, batch_norms=False)
    with torch.no_grad():
        student(torch.randn(8, *shape))
    set_adapting(student, False)
    learn_ranges(student, config)
    freeze_ranges(student)
    return export(student.eval())


def torch_calls(model: nn.Module) -> Calls:
    """fp32 and bf16, as they are and compiled."""
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(network: Callable[[Tensor], Any], low: bool) -> Callable[[Tensor], Any]:
        @torch.no_grad()
        def run(images: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                return network(images)

        return run

    compiled = torch.compile(plain, dynamic=False)
    return {
        "torch fp32": call(plain, False), "torch bf16": call(plain, True),
        "compiled fp32": call(compiled, False), "compiled bf16": call(compiled, True),
    }  # fmt: skip


def gpu_calls(model: nn.Module, images: Tensor) -> Calls:
    """fp16 in a CUDA graph by the fastest of cuDNN's algorithms, and compiled with its choices tuned."""
    torch.backends.cudnn.benchmark = True
    half = copy.deepcopy(model).to(images.device, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    own = images.half().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        graph, logits = record(lambda: half(own))
        compiled = torch.compile(half, mode="max-autotune", dynamic=False)

    def replayed(images: Tensor) -> Tensor:
        own.copy_(images)
        graph.replay()
        result: Tensor = logits.clone()
        torch.cuda.synchronize()
        return result

    @torch.no_grad()
    def run_compiled(images: Tensor) -> Tensor:
        own.copy_(images)
        result: Tensor = compiled(own).clone()
        torch.cuda.synchronize()
        return result

    return {"torch fp16 captured": replayed, "compiled fp16": run_compiled}


class Noise:
    """Calibration images for ONNX Runtime's quantizer."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.batches = iter([{"images": torch.randn(4, *shape).numpy()} for _ in range(2)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def onnx_calls(
    model: nn.Module, shape: tuple[int, int, int], graph: IntegerGraph, folder: Path, chosen: Chosen
) -> Calls:
    """ONNX Runtime: the float network, the integer one as QDQ, and what its own quantizer makes of the float one."""
    import onnxruntime
    from onnxruntime import quantization

    names = {name: folder / f"{name.removeprefix('ONNX Runtime ')}.onnx" for name in ONNX}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is the old one
        torch.onnx.export(model, (torch.zeros(1, *shape),), str(names["ONNX Runtime fp32"]), dynamo=False,
                          input_names=["images"], dynamic_axes={"images": {0: "N"}}, opset_version=17)  # fmt: skip
    save_onnx(graph, names["ONNX Runtime int8"])
    if chosen("ONNX Runtime own int8"):
        quantization.shape_inference.quant_pre_process(str(names["ONNX Runtime fp32"]), str(folder / "prepared.onnx"))
        quantization.quantize_static(
            str(folder / "prepared.onnx"), str(names["ONNX Runtime own int8"]), Noise(shape), per_channel=True
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3

    def call(path: Path) -> Callable[[Tensor], Any]:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images.numpy()})

    return {name: call(path) for name, path in names.items() if chosen(name)}


def openvino_calls(model: nn.Module, shape: tuple[int, int, int], chosen: Chosen) -> Calls:
    """OpenVINO with as many threads as torch has and one stream: the float network, and as nncf quantizes it."""
    import nncf
    import openvino

    plain = openvino.convert_model(model, example_input=torch.zeros(1, *shape))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}

    def call(network: Any) -> Callable[[Tensor], Any]:
        compiled = openvino.Core().compile_model(network, "CPU", settings)
        return lambda images: compiled(images.numpy())

    calls: Calls = {}
    if chosen("OpenVINO fp32"):
        calls["OpenVINO fp32"] = call(plain)
    if chosen("OpenVINO int8"):
        batches = [torch.randn(4, *shape).numpy() for _ in range(2)]
        calls["OpenVINO int8"] = call(nncf.quantize(plain, nncf.Dataset(batches), subset_size=len(batches)))
    return calls


def repeated(call: Callable[[Tensor], Any], images: Tensor, count: int) -> Callable[[], None]:
    """`count` calls on the same images."""

    def run() -> None:
        for _ in range(count):
            call(images)

    return run


def gpu_batches(
    model: nn.Module, graphs: dict[str, IntegerGraph], shape: tuple[int, int, int], chosen: Chosen
) -> Iterator[Round]:
    """Of every batch size the calls to compare, how often each is made, and how long to wait before."""
    ours: Calls = {f"{OURS} {preset}": Engine(graph, "cuda") for preset, graph in graphs.items()}
    for batch in (1, 128, 2048) if shape[1] < 64 else (1, 64):
        images = torch.randn(batch, *shape, device="cuda")
        torch.compiler.reset()
        calls = {key: call for key, call in (ours | gpu_calls(model, images)).items() if chosen(key)}
        yield batch, {key: repeated(call, images, CALLS) for key, call in calls.items()}, CALLS, 0.0


def cpu_batches(
    model: nn.Module, graphs: dict[str, IntegerGraph], shape: tuple[int, int, int], chosen: Chosen
) -> Iterator[Round]:
    """Of every batch size the calls to compare, how often each is made, and how long to wait before."""
    calls: Calls = {f"{OURS} {preset}": Engine(graph) for preset, graph in graphs.items()}
    torch.compiler.reset()
    calls |= torch_calls(model)
    calls = {key: call for key, call in calls.items() if chosen(key)}
    with tempfile.TemporaryDirectory() as folder:
        if any(chosen(name) for name in ONNX):
            calls |= onnx_calls(model, shape, graphs["W8A8"], Path(folder), chosen)
    if any(chosen(name) for name in OPENVINO):
        calls |= openvino_calls(model, shape, chosen)
    for batch in (1, 128 if shape[1] < 64 else 8):
        images = torch.randn(batch, *shape)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        count = CALLS if batch == 1 else 1
        yield batch, {key: repeated(call, channels_last if "torch" in key or "compiled" in key else images, count)
                      for key, call in calls.items()}, count, PAUSE  # fmt: skip


def measure(name: str, side: int, seconds: float, chosen: Chosen) -> Iterator[dict[str, Any]]:
    """One row for each batch size: rates, and of those that were measured the strongest and what they are to others."""
    model, shape = network(name, side)
    needed = [preset for preset in PRESETS if chosen(f"{OURS} {preset}") or preset == "W8A8"]
    graphs = {preset: integers(model, shape, preset) for preset in needed}
    batches = gpu_batches if torch.cuda.is_available() else cpu_batches
    for batch, calls, count, pause in batches(model, graphs, shape, chosen):
        times = interleaved(calls, seconds=seconds, least=9, pause=pause, calls=count)
        rates = {key: round(batch / value.median, 1) for key, value in times.items()}
        row: dict[str, Any] = {"model": name, "size": side, "batch": batch, "images_per_second": rates}
        others = [key for key in rates if not key.startswith((OURS, *OPENVINO))]  # the newest competitor stands apart
        strongest = max(others, key=lambda key: rates[key], default=None)
        if strongest is not None and f"{OURS} W8A8" in rates:
            row |= {"strongest": strongest, "times_strongest": round(rates[f"{OURS} W8A8"] / rates[strongest], 2)}
        if "OpenVINO int8" in rates and f"{OURS} W8A8" in rates:
            row["times_openvino_int8"] = round(rates[f"{OURS} W8A8"] / rates["OpenVINO int8"], 2)
        if "ONNX Runtime int8" in rates and "ONNX Runtime fp32" in rates:
            row["onnx_int8_times_fp32"] = round(rates["ONNX Runtime int8"] / rates["ONNX Runtime fp32"], 2)
        yield row


def size_of(text: str) -> tuple[str, int]:
    """`mobilenet-v2`, `mobilenet-v2:224` or `torchvision:resnet50:224`: a network and the side of its images."""
    name, _, side = text.rpartition(":") if text.rpartition(":")[2].isdecimal() else (text, "", "")
    known = name in NETWORKS or (side and name.partition(":")[0] in ZOOS)
    if not known:
        rule = f"one of {', '.join(NETWORKS)}, with :SIDE or without, or timm:NAME:SIDE or torchvision:NAME:SIDE"
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return name, int(side or NETWORKS[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; default: one of this machine's name")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--models", nargs="*", default=list(NETWORKS.items()), type=size_of, metavar="NAME[:SIDE]",
                        help="networks and sides of images; default: all")  # fmt: skip
    parser.add_argument("--variants", nargs="*", default=[""], metavar="BEGINNING",
                        help="of the names of what is measured, such as 'ONNX Runtime'; default: all")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.variants != [""] and arguments.out is None:
        parser.error("--variants needs --out: the file of this machine's name holds all variants")
    keep_freed_memory()
    results = []
    for name, side in arguments.models:
        for row in measure(name, side, arguments.seconds, lambda key: key.startswith(tuple(arguments.variants))):
            results.append(row)
            print(json.dumps(row), flush=True)
    write_results(arguments.out or results_file("integer"), results)


if __name__ == "__main__":
    main()

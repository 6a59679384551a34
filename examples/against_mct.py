"""Sony's model-compression-toolkit on the networks and the images of `data_free.py`.

It is the maintained product that quantizes without data: images from batch-norm statistics, then post-training
quantization. `pip install model-compression-toolkit ccexam torchvision`; settings are its own defaults but for pixels:
its generator knows ImageNet's normalisation only, so images are made in the network's own input space. Its tracer
refuses ccexam's check of image sizes, so it gets the same layers in a row, and EfficientNet-Lite0's convolutions that
pad their own input, so it gets the padding and the convolution apart. `--real`: its images are crops of
photographs, other places than those that judge; then it is not without data, and has the best images there are.

    python examples/against_mct.py [--network NAME] [--images N] [--real] [--photographs FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import model_compression_toolkit as mct
import torch
from data_free import NETWORKS, crops, photographs
from measure import write
from model_compression_toolkit.data_generation import ImageNormalizationType, get_pytorch_data_generation_config
from torch import Tensor, nn
from torch.nn import functional as F

OTHER_PLACES = 1000  # a seed of crops that the judging ones do not have
BATCH = 128
PRODUCT = f"model-compression-toolkit {mct.__version__}"


def plain(name: str, model: nn.Module) -> nn.Module:
    """The same function of layers that the product's tracer takes."""
    if name == "svhn":
        return nn.Sequential(model.features, nn.Flatten(1), model.classifier)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and hasattr(module, "static_padding"):
            settings = (module.in_channels, module.out_channels, module.kernel_size, tuple(module.stride))
            conv = nn.Conv2d(*settings, groups=module.groups, bias=module.bias is not None)
            conv.load_state_dict(module.state_dict())
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Sequential(module.static_padding, conv))
    return model


def generated(model: nn.Module, count: int, side: int) -> Tensor:
    """Images of the product's own generator."""
    plain = ImageNormalizationType.NO_NORMALIZATION
    config = get_pytorch_data_generation_config(
        data_gen_batch_size=min(BATCH, count), image_normalization_type=plain, image_clipping=False
    )
    made = mct.data_generation.pytorch_data_generation_experimental(
        model=model, n_images=count, output_image_size=side, data_generation_config=config
    )
    return torch.cat([item if item.dim() == 4 else item[None] for item in made]).cpu()


def quantized(model: nn.Module, images: Tensor, bits: int | None) -> nn.Module:
    """Post-training quantization, with a budget of so many bits a weight."""

    def batches() -> Iterator[list[Tensor]]:
        for part in images.split(32):
            yield [part]

    budget, settings = None, {}
    if bits is not None:
        layers = [item for item in model.modules() if isinstance(item, nn.Conv2d | nn.Linear)]
        weights = sum(layer.weight.numel() for layer in layers)
        budget = mct.core.ResourceUtilization(weights_memory=weights * bits / 8)
        mixed = mct.core.MixedPrecisionQuantizationConfig()
        settings = {"core_config": mct.core.CoreConfig(mixed_precision_config=mixed)}
    network, _ = mct.ptq.pytorch_post_training_quantization(
        model, batches, target_resource_utilization=budget, **settings
    )
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=("svhn", "efficientnet"), default="svhn")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--real", action="store_true", help="crops of photographs (efficientnet only)")
    parser.add_argument("--photographs", type=Path, help="a folder of more photographs (*.jpg)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.real and arguments.network != "efficientnet":
        parser.error("--real: must be with --network efficientnet, got svhn")
    model, judged, _, described = NETWORKS[arguments.network](arguments.photographs)
    with torch.no_grad():
        wanted = torch.cat([model.eval()(part) for part in judged.split(50)])
        model = plain(arguments.network, model).eval()
        assert torch.allclose(model(judged[:10]), wanted[:10], rtol=1e-3, atol=1e-3), "not the same network"
    began = time.monotonic()
    if arguments.real:
        found = photographs(arguments.photographs)
        each = -(-arguments.images // len(found))
        images = torch.cat([crops(item, each, OTHER_PLACES + number) for number, item in enumerate(found)])
        images = images[:: max(1, len(images) // arguments.images)][: arguments.images]
        source = f"{len(images)} crops of photographs"
    else:
        images = generated(model, arguments.images, judged.shape[-1])
        source = f"{len(images)} images from batch-norm statistics"
    spent = time.monotonic() - began
    print(f"{source} in {spent:.0f} s", flush=True)
    rows = []
    for name, bits in (("W8A8", None), ("weights of 4 bits on average, activations of 8", 4)):
        began = time.monotonic()
        network = quantized(model, images, bits)
        seconds = round(spent + time.monotonic() - began, 1)
        with torch.no_grad():
            got = torch.cat([network(part) for part in judged.split(50)])
        same = round(float(100 * (got.argmax(1) == wanted.argmax(1)).double().mean()), 2)
        nats = F.kl_div(got.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        rows.append({"network": arguments.network, "judged_on": described, "product": PRODUCT, "images": source,
                     "bits": name, "same_class": same, "kl": round(float(nats), 4), "seconds": seconds})  # fmt: skip
        print(rows[-1], flush=True)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()

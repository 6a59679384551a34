"""Sony's model-compression-toolkit on ccexam's SVHN classifier and the same rendered digits as `data_free.py`.

It is the maintained product that quantizes without data: images from batch-norm statistics, then post-training
quantization. `pip install model-compression-toolkit ccexam torchvision`; settings are its own defaults but for pixels:
its generator knows ImageNet's normalisation only, so images are made in the network's own input space. Its tracer
refuses the package's check of image sizes, so it gets the same layers in a row.

    python examples/against_mct.py [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import model_compression_toolkit as mct
import torch
from data_free import svhn
from measure import write
from model_compression_toolkit.data_generation import ImageNormalizationType, get_pytorch_data_generation_config
from torch.nn import functional as F

IMAGES, BATCH = 256, 128
PRODUCT = f"model-compression-toolkit {mct.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    model, judged, _, described = svhn(None)
    model = torch.nn.Sequential(model.features, torch.nn.Flatten(1), model.classifier).eval()
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in judged.split(50)])
    began = time.monotonic()
    plain = ImageNormalizationType.NO_NORMALIZATION
    config = get_pytorch_data_generation_config(
        data_gen_batch_size=BATCH, image_normalization_type=plain, image_clipping=False
    )
    made = mct.data_generation.pytorch_data_generation_experimental(
        model=model, n_images=IMAGES, output_image_size=judged.shape[-1], data_generation_config=config
    )
    images = torch.cat([item if item.dim() == 4 else item[None] for item in made]).cpu()
    generated = time.monotonic() - began
    print(f"{len(images)} images in {generated:.0f} s", flush=True)

    def batches() -> Iterator[list[torch.Tensor]]:
        for part in images.split(32):
            yield [part]

    rows = []
    for name, bits in (("W8A8", None), ("weights of 4 bits on average, activations of 8", 4)):
        began = time.monotonic()
        budget, settings = None, {}
        if bits is not None:
            layers = [item for item in model.modules() if isinstance(item, torch.nn.Conv2d | torch.nn.Linear)]
            weights = sum(layer.weight.numel() for layer in layers)
            budget = mct.core.ResourceUtilization(weights_memory=weights * bits / 8)
            mixed = mct.core.MixedPrecisionQuantizationConfig()
            settings = {"core_config": mct.core.CoreConfig(mixed_precision_config=mixed)}
        network, _ = mct.ptq.pytorch_post_training_quantization(
            model, batches, target_resource_utilization=budget, **settings
        )
        with torch.no_grad():
            got = torch.cat([network(part) for part in judged.split(50)])
        same = round(float(100 * (got.argmax(1) == wanted.argmax(1)).double().mean()), 2)
        nats = F.kl_div(got.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        seconds = round(generated + time.monotonic() - began, 1)
        rows.append({"network": "svhn", "judged_on": described, "product": PRODUCT,
                     "bits": name, "same_class": same, "kl": round(float(nats), 4), "seconds": seconds})  # fmt: skip
        print(rows[-1], flush=True)
    if path:
        write(path, rows)


if __name__ == "__main__":
    main()

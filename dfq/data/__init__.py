"""Images: data sets by name, and the formats that their files have."""

from dfq.data.images import DATASETS, Images, Normalization, check_normalization, load_images

__all__ = ["DATASETS", "Images", "Normalization", "check_normalization", "load_images"]

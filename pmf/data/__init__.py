"""Training data: the digits, image folders, shards and tables, and the order in which images are seen."""

from pmf.data.datasets import FolderImages, ImageDataset, load_dataset
from pmf.data.digits import load_digits
from pmf.data.images import centre_crop, read_image, to_float
from pmf.data.memory import MemoryImages
from pmf.data.stream import ShuffledStream
from pmf.pictures import ImageGrid, image_grid, save_png, to_uint8

__all__ = [
    "FolderImages",
    "ImageDataset",
    "ImageGrid",
    "MemoryImages",
    "ShuffledStream",
    "centre_crop",
    "image_grid",
    "load_dataset",
    "load_digits",
    "read_image",
    "save_png",
    "to_float",
    "to_uint8",
]

"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) as sequences of pixels, from the files of the Debian package."""

import gzip
from pathlib import Path

import numpy as np

from ..settings import InputError

PACKAGE = "dataset-fashion-mnist"
FOLDER = f"/usr/share/datasets/{PACKAGE.removeprefix('dataset-')}"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PIXELS = tuple(map(str, range(256)))


def read_fashion_mnist(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 28, 28), 0 to 255, and labels (n,) of the two original splits."""
    return {
        split: (_read(folder, f"{stem}-images-idx3-ubyte.gz"), _read(folder, f"{stem}-labels-idx1-ubyte.gz"))
        for split, stem in (("train", "train"), ("test", "t10k"))
    }


def load_fashion_mnist(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Like `read_fashion_mnist`, with the last tenth of the training data as validation split."""
    splits = read_fashion_mnist(folder)
    images, labels = splits["train"]
    cut = len(images) - len(images) // 10
    return {"train": (images[:cut], labels[:cut]), "validation": (images[cut:], labels[cut:]), "test": splits["test"]}


def _read(folder: str, name: str) -> np.ndarray:
    """Read an array in IDX format: two zero bytes, type, number of axes, their sizes in four bytes each, the values."""
    path = Path(folder, name)
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: install the Debian package {PACKAGE} (apt-get install {PACKAGE}), or set "
            "image_folder to the folder of its four files."
        ) from None
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    axes = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(data, ">i4", axes, 4)
    if not axes or len(data) != 4 + 4 * axes + shape.prod():
        raise InputError(f"{path} is not an array of bytes in IDX format: use the file of the package {PACKAGE}.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)

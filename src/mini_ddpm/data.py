"""Images for training: a Hub dataset, a folder in a Hub dataset's layout, or a folder of pictures.

`datasets` opens them; this module finds the columns, checks every picture and turns it into a tensor.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import datasets

# Names of folders that hold a split. `datasets` takes them for classes if they have no sub-folders.
_SPLIT_FOLDERS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}


class ImageDataset(Dataset[dict[str, Any]]):
    """Pictures of one size, each an item `{"images": (C, H, W) float32 in [-1, 1], "class_labels": int}`.

    Use [`image_dataset`] or [`ImageDataset.from_tensors`] to make one. Items of a dataset without labels have no
    `"class_labels"`. If the first picture is grey, all are converted to grey, else all to colour. 16-bit grey is
    scaled to 8 bits, and transparent pixels become white.

    Attributes:
        shape: (C, H, W) of every picture; C is 1 for grey and 3 for colour.
        id2label: Class names by index, or `None` if there are no labels.
    """

    def __init__(
        self, rows: datasets.Dataset, image_column: str, label_column: str | None, resolution: int | None
    ) -> None:
        self._rows = rows
        self._image_column = image_column
        self._resolution = resolution
        self._images: torch.Tensor | None = None  # all pictures, once they are decoded
        self._mode: str | None = None
        self._mode = "L" if self._decode(0).mode in ("1", "L", "LA") else "RGB"
        self.shape: tuple[int, int, int] = self.pixels(0).shape
        self.id2label: dict[int, str] | None = None
        self._labels: list[int] | None = None
        if label_column is not None:
            self._labels = list(rows[label_column])
            names = getattr(rows.features[label_column], "names", None)
            end = len(names) if names else math.inf
            for index, label in enumerate(self._labels):
                if type(label) is not int or not 0 <= label < end:
                    allowed = f"0 to {end - 1}" if names else "0, 1, ..."
                    raise ValueError(
                        f"Label column {label_column!r} must hold class indices ({allowed}), "
                        f"but image {self._name(index)} has {label!r}."
                    )
            self.id2label = dict(enumerate(names or map(str, range(max(self._labels) + 1))))

    @classmethod
    def from_tensors(
        cls, images: torch.Tensor, class_labels: torch.Tensor | None = None, id2label: dict[int, str] | None = None
    ) -> ImageDataset:
        """Make a dataset of pictures in memory.

        Args:
            images: (N, C, H, W) uint8 in [0, 255].
            class_labels: (N,) int64, or `None`.
            id2label: Class names by index. Default: "0" to the largest label.

        Raises:
            ValueError: The images are no bytes of this shape, or the labels do not fit them.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"images must be uint8 of shape (N, C, H, W), but are {images.dtype} of {tuple(images.shape)}."
            )
        dataset = cls.__new__(cls)
        dataset._images, dataset._labels, dataset.id2label = images, None, None
        channels, height, width = images.shape[1:]
        dataset.shape = (channels, height, width)
        if class_labels is not None:
            if class_labels.shape != images.shape[:1] or class_labels.is_floating_point() or class_labels.min() < 0:
                raise ValueError(f"class_labels must hold {len(images)} class indices, one for each image.")
            dataset._labels = class_labels.tolist()
            dataset.id2label = id2label or {label: str(label) for label in range(max(dataset._labels) + 1)}
            if max(dataset._labels) not in dataset.id2label:
                raise ValueError(f"class_labels holds {max(dataset._labels)}, which id2label does not name.")
        return dataset

    def __len__(self) -> int:
        return len(self._rows) if self._images is None else len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"images": to_model_range(torch.from_numpy(self.pixels(index)))}
        if self._labels is not None:
            item["class_labels"] = self._labels[index]
        return item

    def pixels(self, index: int) -> np.ndarray[Any, Any]:
        """Return one picture as uint8, (C, H, W) in [0, 255].

        A picture that cannot be decoded or differs in size from the first is a `ValueError`, which names it.
        """
        if self._images is not None:
            return self._images[index].numpy()
        image = self._decode(index)
        if self._resolution is not None:
            image = ImageOps.fit(image, (self._resolution, self._resolution))
        pixels = np.asarray(image)
        pixels = np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))  # (C, H, W)
        shape = getattr(self, "shape", pixels.shape)
        if pixels.shape != shape:
            raise ValueError(
                f"Image {self._name(index)} has {pixels.shape[2]}x{pixels.shape[1]} pixels, but the first has "
                f"{shape[2]}x{shape[1]}. All must have one size: set resolution=... to crop and resize them."
            )
        return pixels

    def stack(self, progress: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode all into memory: images, (N, C, H, W) uint8 in [0, 255], and class labels, (N,) int64, or `None`.

        The images stay in memory for later calls. Errors are those of [`ImageDataset.pixels`].
        """
        if self._images is None:
            images = np.empty((len(self), *self.shape), dtype=np.uint8)
            for index in tqdm(range(len(self)), desc="Decoding images", unit="img", disable=not progress, leave=False):
                images[index] = self.pixels(index)
            self._images = torch.from_numpy(images)
        return self._images, torch.tensor(self._labels) if self._labels is not None else None

    def _decode(self, index: int) -> Image.Image:
        """Decode one picture, turned upright, to 8 bits without transparency and to the mode of the dataset."""
        record = self._rows[index][self._image_column]
        try:
            if record is None:
                raise ValueError("this row has no image")
            with Image.open(io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]) as file:
                image = ImageOps.exif_transpose(file)  # also decodes the pixels; `open` reads only the header
            if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would clip these at 255
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("its pixels have more than 16 bits")
                image = Image.fromarray(np.round(values / 257).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, whose range is unknown")
            elif image.has_transparency_data:
                grey = image.mode in ("1", "L", "LA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if grey else "RGB")
            return image if self._mode is None else image.convert(self._mode)
        except Exception as error:  # PIL raises many types for a damaged file
            name = self._name(index)
            raise ValueError(f"Image {name} cannot be decoded ({error}). Remove or replace it.") from error

    def _name(self, index: int) -> str:
        """Return how error messages refer to a picture."""
        path = (self._rows[index][self._image_column] or {}).get("path")
        return f"{path!r} (number {index})" if path else f"number {index}"


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Scale uint8 images in [0, 255] to float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def image_dataset(
    name: str | Path,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
) -> ImageDataset:
    """Open the images of a dataset.

    Args:
        name: A Hub id such as "ylecun/mnist", a local folder in a Hub dataset's layout, or a folder of pictures. If it
            has one sub-folder per class, the folder names are the class names.
        split: The split to open.
        image_column: The column of pictures. `None`: the first that holds images.
        label_column: The column of class indices. `None`: the first of class labels, else "label" or "labels", if
            there is one.
        resolution: Crop to the centre square and resize to this many pixels. `None`: keep the pictures' size, which
            must be the same for all.

    Raises:
        ValueError: The dataset, split or column does not exist or cannot be read, holds no images, a label is not a
            class index, or the first picture is corrupt.
    """
    import datasets

    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution={resolution} must be at least 1.")
    folder = Path(name).expanduser()
    is_local = folder.exists() or folder.is_absolute() or str(name).startswith((".", "~"))
    if is_local and not folder.is_dir():
        raise ValueError(f"Dataset {str(name)!r} is {'a file, not a folder' if folder.exists() else 'not there'}.")
    rows = _open_split(str(folder if is_local else name), split, is_local)
    classes = rows.features.get("label")
    if is_local and isinstance(classes, datasets.ClassLabel) and set(classes.names) <= _SPLIT_FOLDERS:
        rows = rows.remove_columns("label")

    columns = ", ".join(rows.column_names)
    for column in (image_column, label_column):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"Dataset {str(name)!r} has no column {column!r}; it has {columns}.")
    if image_column is None:
        pictures = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not pictures:
            raise ValueError(f"Dataset {str(name)!r} holds no images; its columns are {columns}. Set image_column.")
        image_column = pictures[0]
    if label_column is None:
        classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        label_column = next((key for key in (*classes, "label", "labels") if key in rows.column_names), None)
    try:
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"Column {image_column!r} of {str(name)!r} holds no images.") from error
    return ImageDataset(rows, image_column, label_column, resolution)


def _open_split(name: str, split: str, is_local: bool) -> datasets.Dataset:
    """Open one split of a folder or of a Hub dataset. If the Hub cannot be reached, the cache is used.

    A dataset or a split that does not exist, or cannot be read, is a `ValueError`.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    was_offline, had_progress_bars = datasets.config.HF_HUB_OFFLINE, not datasets.are_progress_bars_disabled()
    hint = ""
    if not is_local:
        hint = " It is not a folder either."
        try:
            HfApi().dataset_info(name, timeout=10)
        except (HfHubHTTPError, HFValidationError):
            pass  # the Hub has answered, or the name is invalid: the error of `datasets` below says more
        except Exception:
            # The Hub cannot be reached. Online, `datasets` would retry for half a minute before it reads its cache.
            datasets.config.HF_HUB_OFFLINE = True
            hint = ", and it is not in the cache. Connect to the network, or pass a folder."
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # `datasets` raises many unrelated types
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Cannot open dataset {name!r}, split {split!r}: {lines[0]}{hint}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if had_progress_bars:
            datasets.enable_progress_bars()

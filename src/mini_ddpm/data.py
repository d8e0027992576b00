"""Images for training: rows that `sources` opens, or data in memory. Every picture is checked and becomes a tensor."""

from __future__ import annotations

import io
import math
import operator
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, TensorDataset
from tqdm.auto import tqdm

from .folders import picture_formats, short_hash
from .options import require
from .sampling import Arrays, cache_folder, cached
from .sources import open_rows

if TYPE_CHECKING:
    import datasets

_MAX_HEADERS = 100_000  # read at opening to find colour
_LEAST_TO_CACHE = 5_000  # fewer pictures are decoded in a second or two
MAX_BYTES_IN_MEMORY = 2_000_000_000  # of all pictures of a dataset, unless more are asked for

# Keys of an item that holds a picture and its class, as diffusers, transformers and datasets call them.
_IMAGE_KEYS, _LABEL_KEYS = ("images", "image", "pixel_values", "img"), ("class_labels", "label", "labels", "target")


class ImageDataset(Dataset[dict[str, Any]]):
    """Pictures of one size, each an item `{"images": (C, H, W) float32 in [-1, 1], "class_labels": int}`.

    Use [`image_dataset`], [`as_image_dataset`] or [`ImageDataset.from_tensors`] to make one. Without labels, items
    have no `"class_labels"`. If any picture has colour, all are converted to colour. The mode in a file's header
    decides, not its pixels. The headers of up to 100,000 pictures are read, evenly spread over the dataset; if these
    are grey, any other picture with colour is an error when it is decoded. 16-bit grey is scaled to 8 bits, and
    transparent pixels become white.

    Attributes:
        shape: (C, H, W) of every picture; C is 1 for grey and 3 for colour.
        id2label: Class names by index, or `None` if there are no labels.
        is_fixed: Whether a picture is the same each time it is read. One that a random transform makes is not.
    """

    is_fixed = True

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str | None,
        resolution: int | None,
        split: str | None = None,
        files_hash: str | None = None,
    ) -> None:
        self._split, self._files_hash = split, files_hash
        self._rows = rows
        self._image_column = image_column
        self._resolution = resolution
        self._images: torch.Tensor | None = None  # all pictures, once they are decoded
        self._mode: str | None = None
        self._mode = "L" if _is_grey(self._decode(0).mode) and not self._has_colour() else "RGB"
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
            images: (N, C, H, W) or (N, H, W): uint8 in [0, 255], or floats in [-1, 1] or [0, 1]. Floats are rounded to
                256 levels. If none is negative, their range is [0, 1].
            class_labels: (N,) int64, or `None`.
            id2label: Class names by index. Default: "0" to the largest label.

        Raises:
            TypeError: The images are no tensor.
            ValueError: The images have another shape or range, or the labels do not fit them.
        """
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images must be a tensor, but is of type {type(images).__name__}.")
        shape = tuple(images.shape)
        images = images[:, None] if images.ndim == 3 else images
        if images.ndim != 4 or 0 in shape or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have the shape (N, C, H, W) with C = 1 or 3, but have {shape}.")
        dataset = cls.__new__(cls)
        dataset._images, dataset._labels, dataset.id2label = _to_bytes(images, "images").cpu(), None, None
        dataset._split, dataset._files_hash = None, None
        dataset.shape = (images.shape[1], images.shape[2], images.shape[3])
        if class_labels is None:
            if id2label is not None:
                raise ValueError("id2label names classes, but class_labels is None.")
            return dataset
        if class_labels.shape != shape[:1] or class_labels.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise ValueError(
                f"class_labels must hold {shape[0]} class indices (int64), one for each image, but is "
                f"{class_labels.dtype} of shape {tuple(class_labels.shape)}."
            )
        dataset._set_labels(class_labels.tolist(), id2label)
        return dataset

    def _set_labels(self, labels: list[int], id2label: dict[int, str] | None) -> None:
        """Set the label of each picture and the names of the classes, after a check."""
        self._labels, self.id2label = labels, id2label or {label: str(label) for label in range(max(labels) + 1)}
        for index, label in enumerate(labels):
            if label not in self.id2label:
                allowed = "id2label does not name" if id2label else "is not a class index (0, 1, ...)"
                raise ValueError(f"class_labels[{index}] is {label}, which {allowed}.")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this dataset from another, for JSON: split, number of images, classes, labels, shape, files.

        `"labels"` is a hash of all labels and `"files"` one of the names and sizes of the pictures in a folder; each
        is `None` where there is none. No picture is decoded, and the pixels are not compared.
        """
        labels = None if self._labels is None else short_hash([np.array(self._labels, dtype="<i8").tobytes()])
        return {
            "split": self._split,
            "num_images": len(self),
            "classes": None if self.id2label is None else [self.id2label[label] for label in sorted(self.id2label)],
            "labels": labels,
            "shape": list(self.shape),
            "files": self._files_hash,
        }

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

        The images stay in memory for later calls, and from 5,000 pictures on in the cache folder for later processes.
        Errors are those of [`ImageDataset.pixels`].
        """
        if self._images is None:
            decoded: Arrays = {}

            def decode() -> Arrays:
                images = np.empty((len(self), *self.shape), dtype=np.uint8)
                title = "Decoding images"
                for index in tqdm(range(len(self)), desc=title, unit="img", disable=not progress, leave=False):
                    images[index] = self.pixels(index)
                decoded["images"] = images
                return decoded

            key = self._cache_key() if len(self) >= _LEAST_TO_CACHE else None
            if key is None:
                decode()
            else:
                try:
                    decoded = cached(cache_folder() / "decoded", key, decode)
                except OSError:
                    if not decoded:
                        raise  # else only the cache cannot be written
            self._images = torch.from_numpy(decoded["images"])
        return self._images, torch.tensor(self._labels) if self._labels is not None else None

    def _cache_key(self) -> list[Any] | None:
        """Return what determines the decoded pictures, or `None` if that is not known."""
        fingerprint = getattr(self._rows, "_fingerprint", None)  # of the table: with bytes, or with paths alone

        def files() -> Iterator[bytes]:
            for batch in self._rows.with_format("arrow").iter(1000):
                for picture in batch[self._image_column]:
                    if picture.is_valid and not picture["bytes"].is_valid:
                        path = picture["path"].as_py()
                        status = os.stat(path)
                        yield os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n")

        if fingerprint is None:
            return None
        try:
            key = [fingerprint, self._image_column, self._resolution, self._mode, *self.shape, short_hash(files())]
        except OSError:  # a picture is missing; decoding it says which
            return None
        return [*key, PIL.__version__]

    def _decode(self, index: int) -> Image.Image:
        """Decode one picture, turned upright, to 8 bits without transparency and to the mode of the dataset."""
        record = self._rows[index][self._image_column]
        try:
            if record is None:
                raise ValueError("this row has no image")
            if record["bytes"] is None and not os.path.isfile(record["path"]):  # a pipe would block for ever
                raise FileNotFoundError("there is no such file")
            source: Any = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
            with Image.open(source, formats=picture_formats()) as file:
                image = _to_8_bits(file)  # also decodes the pixels; `open` reads only the header
            if self._mode == "L" and not _is_grey(image.mode):
                raise ValueError("it has colour, but the dataset was opened as grey; convert it to grey")
            return image if self._mode is None else image.convert(self._mode)
        except Exception as error:  # PIL raises many types for a damaged file
            name = self._name(index)
            raise ValueError(f"Image {name} cannot be decoded ({error}). Remove or replace it.") from error

    def _has_colour(self) -> bool:
        """Return whether the header of any picture says that it has colour. Headers that are damaged say nothing."""
        rows = self._rows.with_format("arrow")
        if len(rows) > _MAX_HEADERS:
            rows = rows.select(range(0, len(rows), -(-len(rows) // _MAX_HEADERS)))
        for batch in rows.iter(1000):
            for picture in batch[self._image_column]:  # Arrow's view of it: no copy of the whole file
                if picture.is_valid and _header_has_colour(picture["bytes"].as_buffer(), picture["path"].as_py()):
                    return True
        return False

    def _name(self, index: int) -> str:
        """Return how error messages refer to a picture."""
        path = (self._rows[index][self._image_column] or {}).get("path")
        return f"{path!r} (number {index})" if path else f"number {index}"


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a picture turned upright, of 8 bits a channel, without transparency."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would clip these at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("L" if _is_grey(image.mode) else "RGB")
    return image


def _header_has_colour(content: Any, path: str | None) -> bool:
    """Return whether the header of a picture says that it has colour, of its bytes, or of its file if that is `None`.

    `False` if it cannot be read.
    """
    try:
        source: Any = path
        if content is not None:
            head, source = bytes(content[:26]), io.BytesIO(content)
        elif path and os.path.isfile(path):
            with open(path, "rb") as file:
                head = file.read(26)
        else:
            return False
        if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":  # Pillow takes thirty times as long
            return head[25] not in (0, 4)
        with Image.open(source, formats=picture_formats()) as image:
            return not _is_grey(image.mode)
    except Exception:  # PIL raises many types for a damaged file; decoding it names it
        return False


def _to_bytes(images: torch.Tensor, name: str, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    """Return images of bytes unchanged, and floats in [-1, 1] or [0, 1] as bytes: uint8 in [0, 255], any shape.

    Without a `value_range` it is [-1, 1] if any value is negative, else [0, 1].
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"{name} must be uint8 in [0, 255] or floats, but is {images.dtype}.")
    least, most = images.min().item(), images.max().item()
    low, high = value_range or ((-1, 1) if least < 0 else (0, 1))
    if not (least > low - 1e-3 and most < high + 1e-3):  # false for NaN
        raise ValueError(
            f"{name} holds values from {least:.4g} to {most:.4g}. Scale floats to [-1, 1], where -1 is black, or to "
            "[0, 1]; or use uint8 in [0, 255]."
        )
    return ((images.detach().float() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


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

    In a folder of pictures the sub-folders are the classes, sorted by name, each with all pictures below it. Pictures
    without sub-folders, and a single sub-folder, have no classes. Folders called `train`, `test`, `val` and the like
    are splits if there are no others, or if the class folders lie in them. Links are followed, hidden files ignored,
    and one line on stderr says what else was left out. With a `metadata.csv`, `.jsonl` or `.parquet` that has a
    `file_name`, its rows are the pictures and its columns the labels, as `datasets` reads an "imagefolder".

    Args:
        name: A Hub id such as "ylecun/mnist", a local folder in a Hub dataset's layout, a folder of pictures, or a
            `.parquet` or `.arrow` file.
        split: The split to open, or a part of it such as "train[:1000]". Where there are no splits, all is "train".
        image_column: The column of pictures. `None`: the first that holds images.
        label_column: The column of class indices. `None`: the first of class labels, else "label" or "labels", if
            there is one.
        resolution: Crop to the centre square and resize to this many pixels. `None`: keep the pictures' size, which
            must be the same for all.

    Raises:
        ValueError: The dataset, split or column does not exist or cannot be read, holds no images, a label is not a
            class index, it is not clear what a folder's classes are, or the first picture is corrupt.
        ImportError: The package `datasets` is not installed.
        OSError: A folder cannot be read.
    """
    require("train", "datasets")
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution={resolution} must be at least 1.")
    rows, files_hash = open_rows(name, split)
    return _from_rows(rows, str(name), image_column, label_column, resolution, split, files_hash)


def _from_rows(
    rows: datasets.Dataset,
    name: str,
    image_column: str | None,
    label_column: str | None,
    resolution: int | None,
    split: str | None,
    files_hash: str | None = None,
) -> ImageDataset:
    """Find the columns of pictures and of class indices; see [`image_dataset`]."""
    import datasets

    columns = ", ".join(rows.column_names)
    for column in (image_column, label_column):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"Dataset {name!r} has no column {column!r}; it has {columns}.")
    if image_column is None:
        pictures = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not pictures:
            raise ValueError(f"Dataset {name!r} holds no images; its columns are {columns}. Set image_column.")
        image_column = pictures[0]
    if label_column is None:
        classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        label_column = next((key for key in (*classes, "label", "labels") if key in rows.column_names), None)
    try:
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"Column {image_column!r} of {name!r} holds no images.") from error
    return ImageDataset(rows, image_column, label_column, resolution, split, files_hash)


def as_image_dataset(
    data: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
    progress: bool = True,
) -> ImageDataset:
    """Make an [`ImageDataset`] of pictures that are in memory, or that another dataset reads.

    Args:
        data: One of these:

            - an `ImageDataset`, which is returned as it is;
            - images, or a tuple of images and class labels, as [`ImageDataset.from_tensors`] takes them;
            - a `datasets.Dataset`, with columns as in [`image_dataset`];
            - any other dataset with `len(data)` and `data[index]`, such as those of torch and torchvision. An item is
              a picture, a pair (picture, class index), or a dict with "image" and "label" (or "images",
              "pixel_values", "class_labels"). A picture is a PIL image, a uint8 array (H, W, C), or a tensor
              (C, H, W), uint8 or in [-1, 1] or [0, 1].
        image_column: See [`image_dataset`].
        label_column: See [`image_dataset`].
        resolution: See [`image_dataset`]. It does not apply to tensors.
        progress: Whether to show a progress bar while items are read.

    Raises:
        TypeError: It is no such dataset.
        ValueError: Its pictures or labels cannot be used.
    """
    if isinstance(data, ImageDataset):
        return data
    pair: Any = data.tensors if isinstance(data, TensorDataset) else data
    arrays = (torch.Tensor, np.ndarray)
    pair = (pair,) if isinstance(pair, arrays) else pair
    if isinstance(pair, tuple) and len(pair) in (1, 2) and all(isinstance(part, arrays) for part in pair):
        labels = torch.as_tensor(pair[1]) if len(pair) == 2 else None
        return ImageDataset.from_tensors(torch.as_tensor(pair[0]), labels)
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset) and data.format["type"] != "custom":
        split = None if data.split is None else str(data.split)
        name = data.info.dataset_name or "given"
        return _from_rows(data.with_format(None), name, image_column, label_column, resolution, split)
    if isinstance(data, Mapping):
        raise TypeError(f"dataset holds several splits ({', '.join(map(str, data))}). Pass one: dataset['train'].")
    if isinstance(data, (str, Path)):
        raise TypeError(
            f"dataset={str(data)!r} is a name. Set dataset_name to it, or pass image_dataset({str(data)!r})."
        )
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise TypeError(
            f"dataset of type {type(data).__name__} must hold pictures and have len() and [index]. Pass an "
            "ImageDataset, a datasets.Dataset, a torch Dataset, or tensors of images and labels."
        )
    return _ItemDataset(data, resolution, progress)


class _ItemDataset(ImageDataset):
    """The pictures of any dataset with `len()` and `[index]`; see [`as_image_dataset`]."""

    def __init__(self, items: Any, resolution: int | None, progress: bool) -> None:
        self._split, self._files_hash, self._rows, self._resolution = None, None, items, resolution
        self._images, self._labels, self.id2label, self._mode = None, None, None, None
        pictures = [self._item(index)[0] for index in _spread(len(items), 100)]
        # One picture may lack black, many do not.
        self._value_range = (-1, 1) if any(p.dtype != torch.uint8 and p.min() < 0 for p in pictures) else (0, 1)
        self.shape: tuple[int, int, int] = self.pixels(0).shape
        self.is_fixed = all(np.array_equal(self.pixels(i), self.pixels(i)) for i in _spread(len(items), 16))
        is_labelled = self._item(0)[1] is not None
        is_kept = self.is_fixed and len(items) * math.prod(self.shape) < MAX_BYTES_IN_MEMORY
        if not is_kept and not is_labelled:
            return
        labels, images = [], np.empty((len(items) if is_kept else 0, *self.shape), dtype=np.uint8)
        for index in tqdm(range(len(items)), desc="Reading images", unit="img", disable=not progress, leave=False):
            picture, label = self._item(index)
            if is_kept:
                images[index] = self._pixels(index, picture)
            if is_labelled:
                try:
                    labels.append(operator.index(label))
                except TypeError as error:
                    raise ValueError(
                        f"The class of item {index} must be an index (0, 1, ...), not {label!r}."
                    ) from error
        self._images = torch.from_numpy(images) if is_kept else None
        if is_labelled:
            names = getattr(items, "classes", None) or []
            is_named = len(names) > max(labels) and all(isinstance(name, str) for name in names)
            self._set_labels(labels, dict(enumerate(names)) if is_named else None)

    def pixels(self, index: int) -> np.ndarray[Any, Any]:
        """Return one picture as uint8, (C, H, W) in [0, 255]; see [`ImageDataset.pixels`]."""
        return super().pixels(index) if self._images is not None else self._pixels(index, self._item(index)[0])

    def _pixels(self, index: int, picture: torch.Tensor) -> np.ndarray[Any, Any]:
        """Return the picture of item `index`, (C, H, W), as bytes, after a check of its range and shape."""
        pixels = _to_bytes(picture, f"item {index}", self._value_range).numpy()
        shape = getattr(self, "shape", pixels.shape)
        if pixels.shape != shape or pixels.shape[0] not in (1, 3):
            raise ValueError(
                f"Item {index} has the shape {pixels.shape}, the first {shape}. All must have one shape (C, H, W), "
                "with C = 1 or 3."
            )
        return pixels

    def _item(self, index: int) -> tuple[torch.Tensor, Any]:
        """Return the picture of one item, (C, H, W) uint8 or float, and its class or `None`."""
        item = self._rows[index]
        label = None
        if isinstance(item, Mapping):
            key = next((key for key in _IMAGE_KEYS if key in item), None)
            if key is None:
                raise ValueError(f"Item {index} has no picture: its keys are {', '.join(map(str, item))}.")
            item, label = item[key], next((item[key] for key in _LABEL_KEYS if key in item), None)
        elif isinstance(item, (tuple, list)):
            item, label = item[0], item[1] if len(item) > 1 else None
        if isinstance(item, Image.Image):
            item = _to_8_bits(item)
            self._mode = self._mode or ("L" if _is_grey(item.mode) else "RGB")
            item = item.convert("L" if self._mode == "L" and _is_grey(item.mode) else "RGB")
            if self._resolution is not None:
                item = ImageOps.fit(item, (self._resolution, self._resolution))
            item = np.asarray(item)
        if isinstance(item, np.ndarray):
            item = torch.tensor(item if item.ndim == 2 else item.transpose(2, 0, 1))
        if not isinstance(item, torch.Tensor) or item.ndim not in (2, 3):
            raise ValueError(f"Item {index} holds no picture, but {type(item).__name__}.")
        return (item if item.ndim == 3 else item[None]), label


def _spread(length: int, count: int) -> range:
    """Return at most `count` indices, evenly spread over `length`."""
    return range(0, length, -(-length // count))

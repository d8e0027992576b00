"""Images for training: a Hub dataset, a folder in a Hub dataset's layout, or a folder of pictures.

A folder of pictures is listed here, file by file; `datasets` opens the others. This module finds the columns, checks
every picture and turns it into a tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from . import folders
from .folders import ARCHIVES, IDX_FILE, SPLITS, TABLES, Parts, is_below, picture_formats, some

if TYPE_CHECKING:
    import datasets

_WILDCARDS = re.compile(r"[*?\[\]]|::")  # what `datasets` does not take literally in a path
_MAX_HEADERS = 100_000  # read at opening to find colour

_IDX_HINT = (
    "MNIST's own format (idx) is not read. Use the Hub's copy, such as 'ylecun/mnist', or save the pictures as PNG "
    "files, in one folder per class"
)


class ImageDataset(Dataset[dict[str, Any]]):
    """Pictures of one size, each an item `{"images": (C, H, W) float32 in [-1, 1], "class_labels": int}`.

    Use [`image_dataset`] or [`ImageDataset.from_tensors`] to make one. Items of a dataset without labels have no
    `"class_labels"`. If any picture has colour, all are converted to colour. The mode in a file's header decides, not
    its pixels. The headers of up to 100,000 pictures are read, evenly spread over the dataset; if these are grey, any
    other picture with colour is an error when it is decoded. 16-bit grey is scaled to 8 bits, and transparent pixels
    become white.

    Attributes:
        shape: (C, H, W) of every picture; C is 1 for grey and 3 for colour.
        id2label: Class names by index, or `None` if there are no labels.
    """

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
            images: (N, C, H, W) uint8 in [0, 255].
            class_labels: (N,) int64, or `None`.
            id2label: Class names by index. Default: "0" to the largest label.

        Raises:
            ValueError: The images are no bytes of this shape, or the labels do not fit them.
        """
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images must be a tensor, but is of type {type(images).__name__}.")
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in shape or shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 of shape (N, C, H, W) with C = 1 or 3, but are {images.dtype} of {shape}."
            )
        dataset = cls.__new__(cls)
        dataset._images, dataset._labels, dataset.id2label = images.cpu(), None, None
        dataset._split, dataset._files_hash = None, None
        dataset.shape = (shape[1], shape[2], shape[3])
        if class_labels is None:
            if id2label is not None:
                raise ValueError("id2label names classes, but class_labels is None.")
            return dataset
        if class_labels.shape != shape[:1] or class_labels.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise ValueError(
                f"class_labels must hold {shape[0]} class indices (int64), one for each image, but is "
                f"{class_labels.dtype} of shape {tuple(class_labels.shape)}."
            )
        dataset._labels = class_labels.tolist()
        dataset.id2label = id2label or {label: str(label) for label in range(max(dataset._labels) + 1)}
        for index, label in enumerate(dataset._labels):
            if label not in dataset.id2label:
                allowed = "id2label does not name" if id2label else "is not a class index (0, 1, ...)"
                raise ValueError(f"class_labels[{index}] is {label}, which {allowed}.")
        return dataset

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this dataset from another, for JSON: split, number of images, classes, labels, shape, files.

        `"labels"` is a hash of all labels and `"files"` one of the names and sizes of the pictures in a folder; each
        is `None` where there is none. No picture is decoded, and the pixels are not compared.
        """
        labels = None if self._labels is None else _short_hash([np.array(self._labels, dtype="<i8").tobytes()])
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
            if record["bytes"] is None and not os.path.isfile(record["path"]):  # a pipe would block for ever
                raise FileNotFoundError("there is no such file")
            source: Any = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
            with Image.open(source, formats=picture_formats()) as file:
                image = ImageOps.exif_transpose(file)  # also decodes the pixels; `open` reads only the header
            if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would clip these at 255
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("its pixels have more than 16 bits")
                image = Image.fromarray(np.round(values / 257).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, whose range is unknown")
            elif image.has_transparency_data:
                grey = _is_grey(image.mode)
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if grey else "RGB")
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


def _short_hash(parts: Iterable[bytes]) -> str:
    """Return sixteen hexadecimal digits of the SHA-256 of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")


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
    try:
        import datasets
    except ImportError as error:
        hint = "pip install 'mini-ddpm[train]'"
        raise ImportError(f"Opening a dataset needs the package `datasets` ({error}): {hint}.") from error

    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution={resolution} must be at least 1.")
    path, files_hash = Path(name).expanduser(), None
    if not (path.exists() or path.is_absolute() or str(name).startswith((".", "~"))):
        rows = _open_hub_dataset(str(name), split)
    elif path.is_dir():
        rows, files_hash = _open_folder(str(name), path.absolute(), split)
    else:
        rows = _open_file(str(name), path, split)

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
    return ImageDataset(rows, image_column, label_column, resolution, split, files_hash)


# What `datasets` opens


def _load(name: str, split: str, load: Callable[[], Any], hint: str = "") -> Any:
    """Return what `load` does, without progress bars; any error in it becomes a `ValueError` of one line."""
    import datasets

    had_progress_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # `datasets` raises many unrelated types
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].partition(" with any supported extension")[0]  # three hundred follow
        raise ValueError(f"Cannot open dataset {name!r}, split {split!r}: {reason}{hint}") from error
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()


def _open_hub_dataset(name: str, split: str) -> datasets.Dataset:
    """Open one split of a Hub dataset. If the Hub cannot be reached, the cache is used."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    was_offline = datasets.config.HF_HUB_OFFLINE
    hint = " It is not a folder either."
    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        pass  # the Hub has answered, or the name is invalid: the error of `datasets` below says more
    except Exception:
        # The Hub cannot be reached. Online, `datasets` would retry for half a minute before it reads its cache.
        datasets.config.HF_HUB_OFFLINE = True
        hint = ", and it is not in the cache. Connect to the network, or pass a folder."
    try:
        rows: datasets.Dataset = _load(name, split, lambda: datasets.load_dataset(name, split=split), hint)
        return rows
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _open_file(name: str, path: Path, split: str) -> datasets.Dataset:
    """Open a parquet or Arrow file; the error for any other says what to do."""
    import datasets

    builder = TABLES.get(path.suffix.lower())
    if builder is None or not path.is_file():
        reason = "a file, not a folder" if path.exists() else "not there"
        if path.is_file() and IDX_FILE.search(path.name):
            reason += f": {_IDX_HINT}"
        elif path.is_file() and path.suffix.lower() in ARCHIVES:
            reason += ": unpack the archive, and pass the folder of pictures"
        raise ValueError(f"Dataset {name!r} is {reason}.")
    files = {"train": str(_without_wildcards(path))}
    rows: datasets.Dataset = _load(name, split, lambda: datasets.load_dataset(builder, data_files=files, split=split))
    return rows


def _open_hub_layout(name: str, folder: Path, split: str) -> datasets.Dataset:
    """Open one split of a folder in a Hub dataset's layout, or of one that `Dataset.save_to_disk` wrote."""
    import datasets

    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = _load(name, split, lambda: datasets.load_from_disk(str(folder)).with_format(None))
        return _part(name, split, {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded)
    path = str(folder)
    if _WILDCARDS.search(path):  # a link does not help: `datasets` resolves it
        raise ValueError(
            f"Dataset {name!r} cannot be opened: `datasets` takes {_WILDCARDS.findall(path)[0]!r} in its path for a "
            "pattern. Rename the folder, or pass a .parquet file in it."
        )
    rows: datasets.Dataset = _load(name, split, lambda: datasets.load_dataset(path, split=split))
    classes = rows.features.get("label")
    if isinstance(classes, datasets.ClassLabel) and SPLITS.keys() >= set(classes.names):
        rows = rows.remove_columns("label")  # `datasets` takes folders of splits for classes
    return rows


def _open_metadata(name: str, split: str, files: list[Path]) -> datasets.Dataset:
    """Open the pictures that metadata files name, with their columns."""
    import datasets

    paths = {"train": [str(_without_wildcards(file.parent) / file.name) for file in files]}
    rows: datasets.Dataset = _load(
        name, split, lambda: datasets.load_dataset("imagefolder", data_files=paths, split="train")
    )
    return rows


def _without_wildcards(path: Path) -> Path:
    """Return an absolute path that `datasets` does not take for a pattern: if need be, a link to it in the cache."""
    import datasets

    path = path.absolute()
    if not _WILDCARDS.search(str(path)):
        return path
    link = Path(datasets.config.HF_DATASETS_CACHE, "mini-ddpm-links", _short_hash([os.fsencode(path)]))
    link = link.with_suffix(path.suffix.lower() if path.is_file() else "")
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # of an earlier call, or of another process
        link.symlink_to(path)
    return link


def _part(name: str, split: str, splits: Mapping[str, Any]) -> datasets.Dataset:
    """Return the rows that `split` asks for, such as "train", "train[:10]" or "train+test".

    `splits` holds the rows of each split by name; of those not asked for only the number is needed.
    """
    import datasets

    def read() -> datasets.Dataset:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({key: len(rows) for key, rows in splits.items()})
        rows = datasets.concatenate_datasets(
            [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
        )
        if not len(rows):
            raise ValueError("there is no data in it.")
        return rows

    rows: datasets.Dataset = _load(name, split, read)
    return rows


def _card_has_configs(folder: Path) -> bool:
    """Return whether the card of a Hub dataset lies in a folder, and names the files of each split."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except Exception:  # not a card
        return False


def _open_folder(name: str, folder: Path, split: str) -> tuple[datasets.Dataset, str | None]:
    """Open one split of a folder. Return its rows, and for pictures a hash of their names and sizes."""
    import datasets

    if _card_has_configs(folder):
        return _open_hub_layout(name, folder, split), None
    files = folders.list_files(folder)
    has_shards = any(re.search(r"-\d{5}-of-\d{5}", parts[-1]) for parts in files.tables)
    if files.tables and files.pictures and not has_shards:
        raise ValueError(
            f"Dataset {name!r} holds {some('picture{s}', files.pictures)} and {some('table{s}', files.tables)}. Pass "
            "the table itself, or move it out of the folder."
        )
    if not files.pictures and not files.tables:
        if any(IDX_FILE.search(parts[-1]) for parts in (*files.others, *files.archives)):
            raise ValueError(f"Dataset {name!r} holds no pictures: {_IDX_HINT}.")
        if any(not parts[-1].lower().endswith(".tar") for parts in files.archives):  # a .tar may be a WebDataset
            raise ValueError(
                f"Dataset {name!r} holds no pictures, but {some('archive{s}', files.archives)}. Unpack before use."
            )
    if files.tables or not files.pictures:
        return _open_hub_layout(name, folder, split), None

    asked = {part.partition("[")[0].strip() for part in split.split("+")}
    roots = folders.find_splits(name, files.pictures, asked)
    read, unread = {roots[key] for key in roots.keys() & asked}, {roots[key] for key in roots.keys() - asked}
    unread -= read
    pictures = {root: [parts for parts in files.pictures if is_below([root], parts)] for root in read | unread}
    metadata = {root: [parts for parts in files.metadata if is_below([root], parts)] for root in read | unread}
    listed = {root: paths for root, paths in pictures.items() if not metadata[root]}
    classes, labels = folders.find_classes(name, listed, read)
    splits: dict[Parts, Any] = dict(pictures)
    notes = []
    for root in sorted(read):
        if metadata[root]:
            splits[root] = rows = _open_metadata(name, split, [folder.joinpath(*parts) for parts in metadata[root]])
            used = some("metadata file{s}", metadata[root])
            notes.append(f"{len(rows)} rows and their labels come from {used} beside {len(pictures[root])} pictures")
            continue
        paths = [os.path.join(folder, *parts) for parts in pictures[root]]
        for path in paths:
            if re.search(r"[\ud800-\udfff]", path):
                raise ValueError(f"Dataset {name!r}: the name of picture {path!a} is not UTF-8. Rename it.")
        columns: dict[str, Any] = {"image": paths}
        features: dict[str, Any] = {"image": datasets.Image(decode=False)}
        if labels[root] is not None:
            columns["label"] = labels[root]
            features["label"] = datasets.ClassLabel(names=classes)
        splits[root] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows = _part(name, split, {key: splits[root] for key, root in roots.items()})

    rest = folders.left_out(files, read, unread, [parts for root in read for parts in metadata[root]])
    notes += [rest] if rest else []
    if notes and os.environ.get("RANK", "0") == "0":  # once, not in each process of a run
        print(f"Dataset {name!r}, split {split!r}: {'; '.join(notes)}.", file=sys.stderr)
    lines = (f"{'/'.join(parts)}\0{files.pictures[parts]}\n" for root in sorted(read) for parts in pictures[root])
    return rows, _short_hash(line.encode() for line in lines)

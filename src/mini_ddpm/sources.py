"""Open the rows of a dataset: a Hub dataset, a folder in a Hub dataset's layout, a folder of pictures, or a table.

A folder of pictures is listed by `folders`, file by file; `datasets` opens the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import folders
from .folders import ARCHIVES, IDX_FILE, SPLITS, TABLES, Parts, is_below, short_hash, some

if TYPE_CHECKING:
    import datasets

_WILDCARDS = re.compile(r"[*?\[\]]|::")  # what `datasets` does not take literally in a path

_IDX_HINT = (
    "MNIST's own format (idx) is not read. Use the Hub's copy, such as 'ylecun/mnist', or save the pictures as PNG "
    "files, in one folder per class"
)


def open_rows(name: str | Path, split: str) -> tuple[datasets.Dataset, str | None]:
    """Open one split. Return its rows, and for a folder of pictures a hash of their names and sizes.

    What cannot be opened is a `ValueError` that names it, a folder that cannot be read an `OSError`.
    """
    path = Path(name).expanduser()
    if not (path.exists() or path.is_absolute() or str(name).startswith((".", "~"))):
        return _open_hub_dataset(str(name), split), None
    if path.is_dir():
        return _open_folder(str(name), path.absolute(), split)
    return _open_file(str(name), path, split), None


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
    link = Path(datasets.config.HF_DATASETS_CACHE, "mini-ddpm-links", short_hash([os.fsencode(path)]))
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
    return rows, short_hash(line.encode() for line in lines)

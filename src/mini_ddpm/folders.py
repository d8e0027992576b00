"""What lies in a folder of pictures: the files, the splits and the classes.

`datasets` guesses these from names and skips what it does not know. Here every file is listed, and what is not read
is named. Paths are tuples of their parts, relative to the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Collection, Iterable, Set
from pathlib import Path

from PIL import Image

Parts = tuple[str, ...]

# Folder names that `datasets` knows for the three splits, in lower case.
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar"}
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # and how `datasets` calls what opens them
IDX_FILE = re.compile(r"[-.]idx\d-u?byte(\.gz)?$")  # MNIST's own format
# What file managers and systems leave in folders, in lower case. Names that start with a dot are ignored as well.
_JUNK = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_JUNK |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
# Pillow hands EPS files to Ghostscript, which executes them, and cannot decode the others by itself.
_NO_PICTURES = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


@dataclasses.dataclass
class Listing:
    """The files and folders below a folder that are not hidden, sorted by path."""

    pictures: dict[Parts, int] = dataclasses.field(default_factory=dict)  # with their sizes in bytes
    metadata: list[Parts] = dataclasses.field(default_factory=list)  # of an "imagefolder"
    tables: list[Parts] = dataclasses.field(default_factory=list)
    archives: list[Parts] = dataclasses.field(default_factory=list)
    others: list[Parts] = dataclasses.field(default_factory=list)
    folders: list[Parts] = dataclasses.field(default_factory=list)
    repeated: list[Parts] = dataclasses.field(default_factory=list)  # links to folders that are read already


@functools.cache
def picture_formats() -> tuple[str, ...]:
    """Return the names of the formats that the installed Pillow decodes."""
    Image.preinit()  # the common formats first: `Image.open` tries one after the other
    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_PICTURES)


def list_files(folder: Path) -> Listing:
    """List all that lies below a folder. Links are followed, but never in a circle.

    Raises:
        OSError: A folder cannot be read.
    """
    formats = set(picture_formats())
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    found = Listing()
    above = frozenset((status.st_dev, status.st_ino) for status in map(os.stat, [folder, *folder.resolve().parents]))
    seen: set[tuple[Parts, tuple[int, int]]] = set()
    waiting: list[tuple[Parts, frozenset[tuple[int, int]]]] = [((), above)]
    while waiting:
        inside, above = waiting.pop()
        for name in os.listdir(os.path.join(folder, *inside)):
            if name.startswith(".") or name.lower() in _JUNK:
                continue
            parts, suffix = (*inside, name), os.path.splitext(name)[1].lower()
            path = os.path.join(folder, *parts)
            try:
                status = os.stat(path)
            except OSError:  # a link that leads nowhere
                found.others.append(parts)
                continue
            identity = (status.st_dev, status.st_ino)
            if stat.S_ISDIR(status.st_mode):
                # Two classes may link to one folder. Below them it is read once: links to links could go on for ever.
                if identity in above or (parts[:2], identity) in seen:
                    found.repeated.append(parts)
                else:
                    seen.add((parts[:2], identity))
                    found.folders.append(parts)
                    waiting.append((parts, above | {identity}))
            elif not stat.S_ISREG(status.st_mode):
                found.others.append(parts)
            elif suffix in suffixes:
                found.pictures[parts] = status.st_size
            elif _is_metadata(Path(path)):
                found.metadata.append(parts)
            elif suffix in TABLES:
                found.tables.append(parts)
            else:
                (found.archives if suffix in ARCHIVES else found.others).append(parts)
    for paths in (found.metadata, found.tables, found.archives, found.others, found.folders, found.repeated):
        paths.sort(key="/".join)
    found.pictures = {parts: found.pictures[parts] for parts in sorted(found.pictures, key="/".join)}
    return found


def _is_metadata(path: Path) -> bool:
    """Return whether a file is the metadata of an "imagefolder": it has that name, and names files."""
    if path.name not in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        return False
    with path.open("rb") as file:
        return path.suffix == ".parquet" or re.search(rb"file_names?\b", file.readline(1 << 20)) is not None


def find_splits(name: str, pictures: Collection[Parts], asked: Set[str]) -> dict[str, Parts]:
    """Return the folder of each split, by every name that it can be asked for.

    Folders that are called like splits, or as asked for, are splits in three cases: there are no other folders; two of
    them hold the same class folders; one other than "train" is asked for and holds class folders. Else all pictures
    are the split "train".

    Raises:
        ValueError: A folder "train" with folders in it lies beside others that are not splits.
    """
    depth, tops, _ = _first_fork(pictures, 0, stop=SPLITS.keys() | asked)
    like = {top for top in tops if top.lower() in SPLITS or top in asked}
    classes: dict[str, set[str]] = {top: set() for top in like}  # of the splits that hold nothing but class folders
    for parts in pictures:
        if len(parts) == depth + 2:
            classes.pop(parts[depth], None)
        elif len(parts) > depth + 2 and parts[depth] in classes:
            classes[parts[depth]].add(parts[depth + 1])
    if like != tops and not any(one & other for one, other in itertools.combinations(classes.values(), 2)):
        wanted = {top for top in classes if _canonical(top) in map(_canonical, asked)}
        like = set(classes) if any(_canonical(top) != "train" for top in wanted) else set()
        if wanted and not like:
            top, beside = min(wanted), sorted((other,) for other in tops - wanted)
            raise ValueError(
                f"Dataset {name!r}: the folder {top!r} may be a split or a class. It holds folders and lies beside "
                f"{some('other{s}', beside)}. Pass the folder {top!r} itself to read that split, or rename it."
            )
    if not like:
        return {"train": ()}
    prefix = next(iter(pictures))[:depth]
    roots = {top: (*prefix, top) for top in sorted(like)}
    for alias in sorted({*map(_canonical, like), *asked} - like):
        same = [top for top in like if _canonical(top) == _canonical(alias)]
        if len(same) == 1:
            roots[alias] = (*prefix, same[0])
    return roots


def _canonical(split: str) -> str:
    return SPLITS.get(split.lower(), split)


def find_classes(
    name: str, pictures: dict[Parts, list[Parts]], asked: Set[Parts]
) -> tuple[list[str], dict[Parts, list[str] | None]]:
    """Return the names of the classes, sorted, and the class of each picture of each split asked for.

    Args:
        name: How the dataset is called in errors.
        pictures: The pictures of each split, by its folder.
        asked: The folders of splits whose classes are returned; `None` stands for no classes. An index means the same
            class in all splits, so those not asked for count as well.

    Raises:
        ValueError: Pictures lie beside the class folders.
    """
    forks = {root: _first_fork(paths, len(root)) for root, paths in pictures.items()}
    classes = sorted({top for _, tops, loose in forks.values() if len(tops) > 1 and not loose for top in tops})
    labels: dict[Parts, list[str] | None] = {}
    for root in asked & forks.keys():
        depth, tops, loose = forks[root]
        if tops and loose:
            folders = some("folder{s}", sorted((top,) for top in tops))
            raise ValueError(
                f"Dataset {name!r}: {some('picture{s}', loose)} beside {folders}. If folders are classes, move these "
                "pictures into one, or out of the dataset."
            )
        level: int | None = depth
        if not tops:  # all lie in one folder: that of a class, if another split has a class of its name
            level = next((i for i in range(len(root), depth) if pictures[root][0][i] in classes), None)
        labels[root] = None if level is None else [parts[level] for parts in pictures[root]]
    return classes, labels


def _first_fork(
    pictures: Collection[Parts], depth: int, stop: Set[str] = frozenset()
) -> tuple[int, set[str], list[Parts]]:
    """Return a depth, the names of the folders there that hold pictures, and the pictures beside these.

    It is the first, from `depth` on, where pictures lie, or more than one folder, or a folder called as in `stop`.
    """
    while True:
        loose = [parts for parts in pictures if len(parts) == depth + 1]
        tops = {parts[depth] for parts in pictures if len(parts) > depth + 1}
        if loose or len(tops) != 1 or stop & {name for top in tops for name in (top, top.lower())}:
            return depth, tops, loose
        depth += 1


def left_out(listing: Listing, read: Set[Parts], unread: Set[Parts], metadata: Collection[Parts]) -> str | None:
    """Say what lies in a folder of pictures and is not read, or return `None`.

    Args:
        listing: All of the folder.
        read: The folders of the splits that are read.
        unread: The folders of other splits, of which nothing is said.
        metadata: The metadata files that are read.
    """
    holders = {parts[:length] for parts in listing.pictures for length in range(len(parts))}
    empty = [parts for parts in listing.folders if parts not in holders and parts[:-1] in holders]
    kinds: dict[str, Collection[Parts]] = {
        "picture{s} beside the splits": [parts for parts in listing.pictures if not is_below(read, parts)],
        "folder{s} without pictures": empty,
        "link{s} to folders that are read already": listing.repeated,
        "archive{s}": listing.archives,
        "other file{s}": listing.others + [parts for parts in listing.metadata if parts not in metadata],
    }
    here = {kind: [parts for parts in paths if not is_below(unread, parts)] for kind, paths in kinds.items()}
    texts = [some(kind, paths) for kind, paths in here.items() if paths]
    return f"left out: {', '.join(texts)}" if texts else None


def is_below(roots: Iterable[Parts], parts: Parts) -> bool:
    """Return whether a path lies in one of the folders."""
    return any(parts[: len(root)] == root for root in roots)


def some(phrase: str, paths: Collection[Parts]) -> str:
    """Return a number, what is counted and the first names: "5 pictures ('a.png', 'b.png', 'c.png', ...)"."""
    names = [repr("/".join(parts)) for parts in itertools.islice(paths, 3)] + ["..."] * (len(paths) > 3)
    return f"{len(paths)} {phrase.format(s='' if len(paths) == 1 else 's')} ({', '.join(names)})"


def short_hash(parts: Iterable[bytes]) -> str:
    """Return sixteen hexadecimal digits of the SHA-256 of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]

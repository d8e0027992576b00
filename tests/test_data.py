"""Images: what is read is what is in the files, and what cannot be read is named."""

import gc
import io
import json
import os
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mini_ddpm import data
from mini_ddpm.data import ImageDataset, image_dataset, to_model_range


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_pixels():
    """Makes random pictures, the first two of them all black and all white."""

    def make(count, *shape):
        pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
        pixels[0], pixels[1] = 0, 255
        return pixels

    return make


def png(pixels, mode=None, **options):
    """A picture's bytes, from an array or an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write(folder, *pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        (folder / f"{index}.png").write_bytes(picture if isinstance(picture, bytes) else png(picture))
    return folder


def write_hub_layout(folder, features, **splits):
    """A folder as `push_to_hub` lays it out: a card that names the files, and a parquet file per split."""
    card = "---\nconfigs:\n- config_name: mnist\n  data_files:\n"
    for split, columns in splits.items():
        name = f"mnist/{split}-00000-of-00001.parquet"
        (folder / "mnist").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(folder / name)
        card += f"  - split: {split}\n    path: {name}\n"
    (folder / "README.md").write_text(card + "---\n")
    return folder


def message(*args, **kwargs):
    """The error that a dataset raises, which is one line."""
    with pytest.raises(ValueError) as error:
        image_dataset(*args, **kwargs).stack(progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read


def test_folder_of_grey_pictures_in_class_folders(tmp_path, make_pixels, capsys):
    pixels = make_pixels(4, 5, 5)
    write(tmp_path / "cat", *pixels[:2])
    write(tmp_path / "dog", *pixels[2:])
    dataset = image_dataset(str(tmp_path))
    assert (len(dataset), dataset.shape, dataset.id2label) == (4, (1, 5, 5), {0: "cat", 1: "dog"})

    images, labels = dataset.stack(progress=False)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(images[:, 0], pixels)
    assert labels.tolist() == [0, 0, 1, 1]
    assert "Decoding images" not in capsys.readouterr().err
    assert dataset.stack()[0] is images  # decoded once
    image_dataset(tmp_path).stack()
    assert "Decoding images" in capsys.readouterr().err
    for index in range(4):
        item = dataset[index]
        assert item.keys() == {"images", "class_labels"} and item["class_labels"] == labels[index]
        assert item["images"].dtype == torch.float32
        assert torch.equal(item["images"], to_model_range(images[index]))
    assert (dataset[0]["images"] == -1).all() and (dataset[1]["images"] == 1).all()


def test_model_range_is_exact_and_invertible():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(values)
    assert (scaled[0], scaled[255]) == (-1, 1)
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), values)


def test_colour_pictures_not_square_without_labels(tmp_path, make_pixels):
    pixels = make_pixels(3, 4, 6, 3)
    dataset = image_dataset(write(tmp_path, *pixels))
    images, labels = dataset.stack(progress=False)
    assert (dataset.shape, dataset.id2label, labels) == ((3, 4, 6), None, None)
    assert np.array_equal(images.permute(0, 2, 3, 1), pixels)
    assert dataset[2].keys() == {"images"}


def test_folders_of_splits_are_no_classes(tmp_path, make_pixels):
    pixels = make_pixels(5, 4, 4)
    write(tmp_path / "train", *pixels[:3])
    write(tmp_path / "test", *pixels[3:])
    for split, expected in (("train", pixels[:3]), ("test", pixels[3:])):
        dataset = image_dataset(tmp_path, split)
        images, labels = dataset.stack(progress=False)
        assert (dataset.id2label, labels) == (None, None)
        assert np.array_equal(images[:, 0], expected)


def test_hub_layout_with_columns_found_and_given(tmp_path, make_pixels):
    pixels = [Image.fromarray(picture) for picture in make_pixels(6, 4, 4)]
    features = {
        "id": datasets.Value("int64"),
        "digit": datasets.ClassLabel(names=["zero", "one", "two"]),
        "size": datasets.Value("int64"),
        "image": datasets.Image(),
        "flipped": datasets.Image(),
    }
    columns = {"id": range(6), "digit": [0, 1, 2, 2, 1, 0], "size": [1, 0, 3, 1, 0, 3], "image": pixels}
    columns["flipped"] = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pixels]
    first = {key: list(values)[:2] for key, values in columns.items()}
    write_hub_layout(tmp_path, features, train=columns, test=first)

    found = image_dataset(tmp_path)
    images, labels = found.stack(progress=False)
    assert found.id2label == {0: "zero", 1: "one", 2: "two"}
    assert labels.tolist() == columns["digit"]
    assert np.array_equal(images[:, 0], make_pixels(6, 4, 4))
    assert len(image_dataset(tmp_path, split="test")) == 2

    given = image_dataset(tmp_path, image_column="flipped", label_column="size")
    assert torch.equal(given.stack(progress=False)[0], images.flip(-1))
    assert given.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}  # numbers without names: up to the largest
    assert given.stack(progress=False)[1].tolist() == columns["size"]


def test_resolution_crops_to_the_centre_and_resizes(tmp_path):
    wide = np.zeros((8, 16), dtype=np.uint8)
    wide[:, 4:12] = 255  # the centre square
    tall = wide.T.copy()
    dataset = image_dataset(write(tmp_path, wide, tall), resolution=4)
    images, _ = dataset.stack(progress=False)
    assert dataset.shape == (1, 4, 4)
    assert (images > 230).all()  # the cubic kernel reaches a little beyond the crop


def test_kinds_of_grey_picture(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures = [ramp, png(ramp.astype(np.uint16) * 257), png(ramp, "LA"), png(ramp, "RGB"), png(ramp, "P")]
    integers = io.BytesIO()
    Image.fromarray(ramp.astype(np.int32) * 257).save(integers, "TIFF")  # read as some Pillows read a 16-bit PNG
    for index, picture in enumerate([*pictures, integers.getvalue()]):
        dataset = image_dataset(write(tmp_path / str(index), ramp, picture))
        assert np.array_equal(dataset.pixels(1)[0], ramp), index
    assert [image_dataset(write(tmp_path / f"alone{i}", pictures[i])).shape[0] for i in range(5)] == [1, 1, 1, 3, 3]

    black_and_white = Image.fromarray(ramp > 100)
    assert black_and_white.mode == "1"
    bilevel = image_dataset(write(tmp_path / "bilevel", black_and_white))
    assert np.array_equal(bilevel.pixels(0)[0], (ramp > 100) * np.uint8(255))


def test_colours_of_palettes_and_what_is_transparent(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]] * 4, dtype=np.uint8)
    palette = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    alpha = np.full((4, 4, 1), 255, dtype=np.uint8)
    alpha[:, 3] = 0  # the last column is transparent, whatever its colour
    shown = colours.copy()
    shown[:, 3] = 255
    clear = palette.getpixel((3, 0))
    see_through = png(palette, transparency=bytes(0 if index == clear else 255 for index in range(4)))
    pictures = [(png(palette), colours), (png(np.concatenate([colours, alpha], axis=2)), shown), (see_through, shown)]
    for index, (picture, expected) in enumerate(pictures):
        dataset = image_dataset(write(tmp_path / str(index), picture))
        assert np.array_equal(dataset.pixels(0).transpose(1, 2, 0), expected), index


def test_orientation_of_photographs(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "turned.png").write_bytes(png(pixels, exif=exif))
    assert np.array_equal(image_dataset(tmp_path).pixels(0)[0], np.rot90(pixels, -1))


def test_mnist():
    folder = os.environ.get("MINI_DDPM_MNIST")
    if folder is None:
        pytest.skip("MINI_DDPM_MNIST does not name a folder with MNIST in the Hub's layout")
    dataset = image_dataset(folder, split="test")
    assert (len(dataset), dataset.shape) == (10_000, (1, 28, 28))
    assert dataset.id2label == {digit: str(digit) for digit in range(10)}
    images, labels = dataset.stack(progress=False)
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.double().mean().item() / 255 == pytest.approx(0.13251, abs=1e-5)


# Folders of pictures


GREY, RED = np.full((2, 2), 7, dtype=np.uint8), np.full((2, 2, 3), (255, 0, 0), dtype=np.uint8)


def fill(folder, *names, picture=GREY):
    """Write a picture, or what else `picture` holds, to each of these files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture if isinstance(picture, bytes) else png(picture))
    return folder


def opened(capfd, folder, split="train", **options):
    """The number of pictures, the class of each, and what is said on stderr, which is one line at most."""
    capfd.readouterr()
    dataset = image_dataset(folder, split, **options)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == (err != ""), (out, err)
    labels = dataset.stack(progress=False)[1]
    names = None if labels is None else [dataset.id2label[label] for label in labels.tolist()]
    assert len(dataset) == len(dataset.stack(progress=False)[0])
    return len(dataset), names, err


@pytest.mark.parametrize("name", ["train", "test", "val", "evaluation"])
def test_a_class_may_be_called_like_a_split(tmp_path, capfd, name):
    classes = sorted(["bus", "car", name])
    fill(tmp_path, *(f"{label}/{i}.png" for label in classes for i in range(4)))
    assert opened(capfd, tmp_path) == (12, [label for label in classes for _ in range(4)], "")
    assert "Unknown split" in message(tmp_path, split="validation")


def test_files_called_like_splits_are_pictures(tmp_path, capfd):
    fill(tmp_path, *(f"{kind}_{i}.png" for kind in ("train", "test", "val") for i in range(3)), "a-test.png")
    assert opened(capfd, tmp_path) == (10, None, "")
    fill(tmp_path / "in-classes", "bus/test_1.png", "bus/x.png", "car/train-2.png", "car/validation.png")
    assert opened(capfd, tmp_path / "in-classes") == (4, ["bus", "bus", "car", "car"], "")


def test_splits_with_classes_in_them(tmp_path, capfd):
    fill(tmp_path, "train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "test/cat/0.png", "test/elk/deep/0.png")
    fill(tmp_path, "README.md", "test/notes.txt", picture=b"about")
    count, names, said = opened(capfd, tmp_path)
    assert (count, names) == (3, ["cat", "cat", "dog"])
    assert "left out: 1 other file ('README.md')" in said
    assert (
        image_dataset(tmp_path).id2label == image_dataset(tmp_path, "test").id2label == {0: "cat", 1: "dog", 2: "elk"}
    )
    assert opened(capfd, tmp_path, "test")[:2] == (2, ["cat", "elk"])
    assert opened(capfd, tmp_path, "train[1:]+test[:1]")[:2] == (3, ["cat", "dog", "cat"])
    assert "Should be one of ['test', 'train']" in message(tmp_path, split="validation")

    # other spellings, a folder around all, one class only in the test split, and a split that the user named
    other = fill(tmp_path / "other", "data/Training/cat/0.png", "data/Training/dog/0.png", "data/Testing/dog/0.png")
    assert opened(capfd, other) == (2, ["cat", "dog"], "")
    assert opened(capfd, other, "test") == (1, ["dog"], "")
    assert opened(capfd, other, "Testing") == (1, ["dog"], "")
    fill(tmp_path / "held", "train/cat/0.png", "train/dog/0.png", "held/cat/0.png", "held/dog/0.png", "held/dog/1.png")
    assert opened(capfd, tmp_path / "held", "held") == (3, ["cat", "dog", "dog"], "")


def test_splits_beside_other_pictures(tmp_path, capfd):
    fill(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "docs/figure.png", "logo.png")
    count, names, said = opened(capfd, tmp_path)
    assert (count, names) == (2, ["cat", "dog"])
    assert "left out: 2 pictures beside the splits ('docs/figure.png', 'logo.png')" in said
    text = message(fill(tmp_path / "one", "bus/0.png", "car/0.png", "train/freight/0.png", "train/tram/0.png"))
    assert "'train' may be a split or a class" in text and "2 others ('bus', 'car')" in text
    assert len(image_dataset(tmp_path / "one" / "train")) == 2


def test_wildcards_in_paths(tmp_path, capfd):
    for name in ("cats [v1]", "cats*", "cats?", "{a,b}", "a::b"):
        fill(tmp_path / name, "x[1].png", "x[2].png")
        assert opened(capfd, tmp_path / name) == (2, None, "")
    layout = tmp_path / "hub [v1]"
    layout.mkdir()
    write_hub_layout(layout, {"image": datasets.Image()}, train={"image": [Image.fromarray(GREY)]})
    assert "takes '[' in its path for a pattern. Rename the folder" in message(layout)
    assert opened(capfd, layout / "mnist" / "train-00000-of-00001.parquet") == (1, None, "")
    fill(layout / "a [b]", "0.png")
    (layout / "a [b]" / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 1}\n')
    assert len(image_dataset(layout / "a [b]")) == 1


def test_links_are_followed_but_not_for_ever(tmp_path, capfd):
    fill(tmp_path, "far/away/0.png", "far/away/1.png", "set/cat/0.png", "set/cat/more/1.png")
    folder = tmp_path / "set"
    (folder / "dog").symlink_to(tmp_path / "far" / "away")
    (folder / "elk").symlink_to(tmp_path / "far" / "away")  # the same pictures in two classes are the user's wish
    (folder / "cat" / "2.png").symlink_to(tmp_path / "far" / "away" / "0.png")
    assert opened(capfd, folder) == (7, ["cat"] * 3 + ["dog"] * 2 + ["elk"] * 2, "")

    (folder / "cat" / "up").symlink_to(folder)
    (folder / "cat" / "root").symlink_to("/")
    (folder / "cat" / "more" / "self").symlink_to(folder / "cat" / "more")
    (folder / "cat" / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (folder / "cat" / "circle.png").symlink_to(folder / "cat" / "circle.png")
    os.mkfifo(folder / "cat" / "pipe.png")
    count, names, said = opened(capfd, folder)
    assert (count, len(names)) == (7, 7)
    assert "3 links to folders that are read already ('cat/more/self', 'cat/root', 'cat/up')" in said
    assert "3 other files ('cat/circle.png', 'cat/nowhere.png', 'cat/pipe.png')" in said


def test_links_to_links_end(tmp_path, capfd):
    """Thirty folders with two links to the next: 2^30 paths."""
    for level in range(30):
        fill(tmp_path / "chain", f"{level}/x.png")
        for name in "ab":
            (tmp_path / "chain" / str(level) / name).symlink_to(tmp_path / "chain" / str(level + 1))
    fill(tmp_path, "set/cat/0.png", "set/dog/0.png")
    (tmp_path / "set" / "cat" / "chain").symlink_to(tmp_path / "chain" / "0")
    count, _, said = opened(capfd, tmp_path / "set")
    assert count == 32 and "links to folders that are read already" in said


@pytest.mark.parametrize("suffix", [".PNG", ".WebP", ".avif", ".Jpeg", ".jp2", ".tga", ".qoi", ".TIF", ".gif", ".bmp"])
def test_formats_and_suffixes(tmp_path, capfd, suffix):
    known = Image.registered_extensions()
    if known.get(suffix.lower()) not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {suffix}")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(RED).resize((16, 16)).save(tmp_path / name / f"x{suffix}", known[suffix.lower()])
    assert opened(capfd, tmp_path) == (2, ["cat", "dog"], "")


def test_what_is_left_out_is_said(tmp_path, capfd):
    fill(tmp_path, "bus/0.png", "bus/1.png", "car/0.png", "car/1.png")
    fill(tmp_path, ".ipynb_checkpoints/0.png", "__MACOSX/bus/0.png", "bus/._0.png", "bus/@eaDir/0.png")
    fill(tmp_path, "bus/.DS_Store", "bus/Thumbs.db", "desktop.ini", picture=b"junk")
    assert opened(capfd, tmp_path)[2] == ""
    fill(tmp_path, *(f"{name}/{i}.{kind}" for name in ("bus", "car") for i in (0, 1) for kind in ("txt", "json")))
    fill(tmp_path, "old.zip", "bus/photos.tar.gz", "metadata.csv", picture=b"id,breed\n")
    fill(tmp_path, "bus/page.eps", picture=b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "bird" / "none").mkdir(parents=True)
    count, names, said = opened(capfd, tmp_path)
    assert (count, names) == (4, ["bus", "bus", "car", "car"])
    assert said == (
        f"Dataset {str(tmp_path)!r}, split 'train': left out: 1 folder without pictures ('bird'), 2 archives "
        "('bus/photos.tar.gz', 'old.zip'), 10 other files ('bus/0.json', 'bus/0.txt', 'bus/1.json', ...).\n"
    )


def test_captions_and_flat_folders(tmp_path, capfd):
    flat = fill(tmp_path / "flat", "0.png", "1.png")
    fill(flat, "0.txt", "1.txt", "captions.json", picture=b"{}")
    count, names, said = opened(capfd, flat)
    assert (count, names) == (2, None) and "3 other files" in said
    assert opened(capfd, fill(tmp_path / "alone", "img/0.png", "img/1.png")) == (2, None, "")
    wrapped = fill(tmp_path / "wrapped", "x/y/cat/0.png", "x/y/dog/1.png", "x/y/dog/more/2.png")
    assert opened(capfd, wrapped) == (3, ["cat", "dog", "dog"], "")
    text = message(fill(tmp_path / "mixed", "cat/0.png", "dog/0.png", "x.png"))
    assert "1 picture ('x.png') beside 2 folders ('cat', 'dog')" in text and "move these pictures into one" in text


def test_names_of_classes_and_pictures(tmp_path, capfd):
    names = ["10", "2", "Été", "new\nline", "猫", "a b|c"]
    fill(tmp_path, *(f"{name}/0.png" for name in names))
    assert opened(capfd, tmp_path) == (6, sorted(names), "")
    bad = os.fsencode(tmp_path / "bad") + b"/\xff.png"
    fill(tmp_path, "bad/0.png")
    with open(bad, "wb") as file:
        file.write(png(GREY))
    assert "is not UTF-8. Rename it." in message(tmp_path / "bad")


def test_folder_called_like_a_module_of_datasets(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("imagefolder", "text", "csv"):
        assert opened(capfd, fill(tmp_path / name, "0.png").name) == (1, None, "")
    (tmp_path / "parquet").mkdir()
    write_hub_layout(tmp_path / "parquet", {"image": datasets.Image()}, train={"image": [Image.fromarray(GREY)]})
    assert opened(capfd, "parquet") == (1, None, "")


def test_files_that_hold_datasets(tmp_path, capfd, make_pixels):
    pixels = make_pixels(3, 2, 2)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    columns = {"image": [Image.fromarray(picture) for picture in pixels], "label": [2, 0, 1]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    table = tmp_path / "table [v1].parquet"
    rows.to_parquet(str(tmp_path / "table.parquet"))
    (tmp_path / "table.parquet").rename(table)
    assert np.array_equal(image_dataset(table).stack(progress=False)[0][:, 0], pixels)
    assert opened(capfd, table, "train[1:]") == (2, ["0", "1"], "")
    assert "split 'test'" in message(table, split="test")
    rows.save_to_disk(tmp_path / "saved")
    assert opened(capfd, tmp_path / "saved") == (3, ["2", "0", "1"], "")
    assert opened(capfd, next((tmp_path / "saved").glob("*.arrow"))) == (3, ["2", "0", "1"], "")
    datasets.DatasetDict(test=rows, train=rows.select([1])).save_to_disk(tmp_path / "dict")
    assert opened(capfd, tmp_path / "dict") == (1, ["0"], "")

    fill(tmp_path / "both", "0.png")
    rows.to_parquet(str(tmp_path / "both" / "train.parquet"))
    assert "1 picture ('0.png') and 1 table ('train.parquet')" in message(tmp_path / "both")


def test_files_that_are_no_datasets_have_a_hint(tmp_path):
    fill(tmp_path, "raw/train-images-idx3-ubyte", "raw/train-labels-idx1-ubyte.gz", "zips/a.zip", picture=b"x")
    assert "ylecun/mnist" in message(tmp_path / "raw") and "idx" in message(
        tmp_path / "raw" / "train-images-idx3-ubyte"
    )
    assert "1 archive ('a.zip'). Unpack" in message(tmp_path / "zips")
    assert "unpack the archive" in message(tmp_path / "zips" / "a.zip")
    fill(tmp_path, "broken.parquet", picture=b"x")
    assert "Cannot open dataset" in message(tmp_path / "broken.parquet")


# `datasets` leaves the CSV file open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_metadata_gives_the_labels(tmp_path, capfd, make_pixels):
    write(tmp_path / "csv" / "cat", *make_pixels(3, 2, 2))
    fill(tmp_path / "csv", "dog/test_1.png")
    (tmp_path / "csv" / "metadata.csv").write_text("file_name,label\ncat/0.png,1\ncat/2.png,0\ndog/test_1.png,1\n")
    count, names, said = opened(capfd, tmp_path / "csv")
    assert (count, names) == (3, ["1", "0", "1"])
    assert "3 rows and their labels come from 1 metadata file ('metadata.csv') beside 4 pictures" in said
    gc.collect()  # the warning belongs to this test
    for split, label in (("train", 0), ("test", 1)):
        fill(tmp_path / "jsonl", f"{split}/0.png")
        line = {"file_name": "0.png", "kind": label}
        (tmp_path / "jsonl" / split / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert opened(capfd, tmp_path / "jsonl", "test", label_column="kind")[:2] == (1, ["1"])


def test_script_in_a_folder_is_not_executed(tmp_path, capfd):
    folder = fill(tmp_path / "cats", "0.png", "1.png")
    (folder / "cats.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert opened(capfd, folder)[0] == 2
    write_hub_layout(folder, {"image": datasets.Image()}, train={"image": [Image.fromarray(GREY)]})
    with pytest.raises(ValueError, match="script"):
        image_dataset(folder)
    assert not (tmp_path / "executed").exists()


def test_postscript_is_never_opened(tmp_path):
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\nshowpage\n"
    assert "cannot be decoded" in message(fill(tmp_path, "0.png", picture=text))


# Grey or colour


def test_any_picture_with_colour_makes_all_colour(tmp_path):
    for kind in ("png", "jpg", "bmp"):
        folder = tmp_path / kind
        folder.mkdir()
        for index in range(9):
            Image.fromarray(RED if index == 5 else GREY).save(folder / f"{index}.{kind}")
        dataset = image_dataset(folder)
        assert dataset.shape == (3, 2, 2)
        images = dataset.stack(progress=False)[0]
        assert (images[0] == 7).all() and images[5, 0].min() > 200 and images[5, 1:].max() < 50
    (tmp_path / "hub").mkdir()
    pictures = [Image.fromarray(GREY), None, Image.fromarray(GREY), Image.fromarray(RED)]
    write_hub_layout(tmp_path / "hub", {"image": datasets.Image()}, train={"image": pictures})
    assert image_dataset(tmp_path / "hub").shape == (3, 2, 2)
    assert image_dataset(tmp_path / "hub", split="train[:3]").shape == (1, 2, 2)


def test_colour_beyond_the_headers_that_are_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_MAX_HEADERS", 2)
    write(tmp_path, GREY, RED, GREY, GREY)
    dataset = image_dataset(tmp_path)
    assert dataset.shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"1\.png.*has colour, but .* opened as grey; convert"):
        dataset.stack(progress=False)
    write(tmp_path, GREY, GREY, RED, GREY)
    assert image_dataset(tmp_path).shape == (3, 2, 2)  # evenly spread: numbers 0 and 2 of 4


# What tells one dataset from another


def test_fingerprint(tmp_path, monkeypatch):
    folder = fill(tmp_path / "a", "cat/0.png", "cat/1.png", "dog/0.png")
    first = image_dataset(folder).fingerprint
    assert json.loads(json.dumps(first)) == first
    assert first.keys() == {"split", "num_images", "classes", "labels", "shape", "files"}
    assert (first["split"], first["num_images"], first["classes"]) == ("train", 3, ["cat", "dog"])
    assert first["shape"] == [1, 2, 2] and len(first["labels"]) == len(first["files"]) == 16

    folder = folder.rename(tmp_path / "moved")
    assert image_dataset(folder).fingerprint == first
    changes = [
        lambda: (folder / "cat").rename(folder / "elk"),  # another order of the classes
        lambda: (folder / "dog" / "0.png").rename(folder / "dog" / "9.png"),
        lambda: (folder / "dog" / "9.png").rename(folder / "elk" / "9.png") and fill(folder, "dog/x.png"),
        lambda: fill(folder, "dog/new.png"),
        lambda: fill(folder, "dog/new.png", picture=png(GREY, dpi=(72, 72))),
    ]
    seen = [first]
    for change in changes:
        change()
        seen.append(image_dataset(folder).fingerprint)
    assert all(one != other for index, one in enumerate(seen) for other in seen[:index])
    assert image_dataset(folder, "train[:2]").fingerprint["num_images"] == 2

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    (tmp_path / "hub").mkdir()
    columns = {"image": [Image.fromarray(GREY)] * 2, "label": [0, 1]}
    write_hub_layout(tmp_path / "hub", features, train=columns, test=columns | {"label": [1, 0]})
    train, test = (image_dataset(tmp_path / "hub", split) for split in ("train", "test"))
    monkeypatch.setattr(ImageDataset, "_decode", None)  # no picture is decoded
    assert train.fingerprint["files"] is None and train.fingerprint["labels"] != test.fingerprint["labels"]


# Pictures in memory


def test_from_tensors(make_pixels):
    images = torch.from_numpy(make_pixels(4, 3, 5, 6))
    plain = ImageDataset.from_tensors(images)
    assert (len(plain), plain.shape, plain.id2label) == (4, (3, 5, 6), None)
    assert torch.equal(plain.stack()[0], images) and plain.stack()[1] is None
    assert plain[2].keys() == {"images"} and torch.equal(plain[2]["images"], to_model_range(images[2]))
    assert np.array_equal(plain.pixels(3), images[3])
    expected = {"split": None, "num_images": 4, "classes": None, "labels": None, "shape": [3, 5, 6], "files": None}
    assert plain.fingerprint == expected

    labels = torch.tensor([0, 2, 1, 2])
    numbered = ImageDataset.from_tensors(images, labels)
    assert numbered.id2label == {0: "0", 1: "1", 2: "2"}
    assert numbered[1]["class_labels"] == 2 and type(numbered[1]["class_labels"]) is int
    assert torch.equal(numbered.stack()[1], labels)
    named = ImageDataset.from_tensors(images, labels, {1: "b", 0: "a", 2: "c", 3: "d"})
    assert named.fingerprint["classes"] == ["a", "b", "c", "d"]
    assert named.fingerprint["labels"] == numbered.fingerprint["labels"] != None  # noqa: E711


@pytest.mark.parametrize(
    ("images", "labels", "id2label", "text"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), None, None, "torch.int64"),
        (torch.full((2, 1, 4, 4), 255.0), None, None, "from 255 to 255"),
        (torch.full((2, 1, 4, 4), -1.1), None, None, "from -1.1 to -1.1"),
        (torch.full((2, 1, 4, 4), float("nan")), None, None, "from nan"),
        (torch.zeros(4, 4, dtype=torch.uint8), None, None, "(N, C, H, W)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), None, None, "C = 1 or 3"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), None, None, "(0, 1, 4, 4)"),
        (None, torch.zeros(3, dtype=torch.int64), None, "2 class indices"),
        (None, torch.zeros(2), None, "torch.float32"),
        (None, torch.tensor([True, False]), None, "torch.bool"),
        (None, torch.tensor([0, -1]), None, "class_labels[1] is -1"),
        (None, torch.tensor([0, 2]), {0: "a", 1: "b"}, "class_labels[1] is 2, which id2label does not name"),
        (None, torch.tensor([0, 1]), {0: "a", 2: "c"}, "class_labels[1] is 1"),
        (None, None, {0: "a"}, "class_labels is None"),
    ],
)
def test_from_tensors_that_do_not_fit(images, labels, id2label, text):
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8) if images is None else images
    with pytest.raises(ValueError) as error:
        ImageDataset.from_tensors(images, labels, id2label)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_from_tensors_of_another_type():
    with pytest.raises(TypeError, match="ndarray"):
        ImageDataset.from_tensors(np.zeros((2, 1, 4, 4), dtype=np.uint8))


# What cannot be read


def test_folder_that_is_none(tmp_path):
    (tmp_path / "file.png").write_bytes(png(np.zeros((2, 2), dtype=np.uint8)))
    assert message(tmp_path / "nowhere") == f"Dataset {str(tmp_path / 'nowhere')!r} is not there."
    assert message("./nowhere") == "Dataset './nowhere' is not there."
    assert message(tmp_path / "file.png").endswith("file.png' is a file, not a folder.")


def test_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "any data files" in message(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "poem.txt").write_text("roses\nare\n")
    assert "holds no images; its columns are text. Set image_column." in message(tmp_path / "text")
    write(tmp_path / "one", np.zeros((2, 2), dtype=np.uint8))
    text = message(tmp_path / "one", split="train[:0]")
    assert "split 'train[:0]'" in text and "no data" in text


def test_unknown_split_column_and_resolution(tmp_path, make_pixels):
    write(tmp_path / "cat", *make_pixels(2, 4, 4))
    write(tmp_path / "dog", *make_pixels(2, 4, 4))
    text = message(tmp_path, split="validation")
    assert "'validation'" in text and "['train']" in text
    assert "no column 'picture'; it has image, label" in message(tmp_path, image_column="picture")
    assert "no column 'class'; it has image, label" in message(tmp_path, label_column="class")
    assert "Column 'label' of" in message(tmp_path, image_column="label")
    assert message(tmp_path, resolution=0) == "resolution=0 must be at least 1."


def test_mixed_sizes_name_the_file_and_the_cure(tmp_path, make_pixels):
    write(tmp_path, *make_pixels(2, 4, 5), np.zeros((4, 7), dtype=np.uint8))
    text = message(tmp_path)
    assert "2.png" in text and "has 7x4 pixels" in text and "the first has 5x4" in text and "resolution=..." in text
    assert len(image_dataset(tmp_path, resolution=4).stack(progress=False)[0]) == 3


def test_corrupt_first_image_fails_at_once(tmp_path, make_pixels):
    write(tmp_path, b"no picture", *make_pixels(2, 4, 4))
    with pytest.raises(ValueError, match=r"0\.png.*cannot be decoded"):
        image_dataset(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_picture_cut_anywhere_is_named_or_whole(tmp_path, kind):
    """Cut in the header, in the pixels, or in what follows them, which may do no harm."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    whole = buffer.getvalue()
    cuts = sorted({0, 1, 10, *np.linspace(12, len(whole) - 1, 25).astype(int)})
    for index, cut in enumerate([len(whole), *cuts]):
        (tmp_path / f"{index:03}.{kind.lower()}").write_bytes(whole[:cut])
    dataset = image_dataset(tmp_path)
    failed = 0
    for index in range(1, len(dataset)):
        try:
            damaged = dataset.pixels(index)
        except ValueError as error:
            assert f"{index:03}.{kind.lower()}" in str(error) and "cannot be decoded" in str(error)
            failed += 1
        else:
            assert np.array_equal(damaged, dataset.pixels(0)), cuts[index - 1]
    assert failed > len(cuts) / 2
    with pytest.raises(ValueError, match="cannot be decoded"):
        dataset.stack(progress=False)


def test_flipped_bits_in_the_pixels(tmp_path, make_pixels):
    whole = make_pixels(3, 16, 16)[2]
    damaged = bytearray(png(whole))
    start = damaged.index(b"IDAT") + 20
    damaged[start : start + 8] = bytes(8 * [0xFF])
    assert Image.open(io.BytesIO(damaged)).size == (16, 16)  # the header is sound
    text = message(write(tmp_path, whole, bytes(damaged)))
    assert "1.png" in text and "cannot be decoded" in text


def test_pixels_beyond_sixteen_bits_are_refused(tmp_path):
    floats = tmp_path / "float"
    floats.mkdir()
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(floats / "0.tiff")
    assert "0.tiff" in message(floats) and "floating-point" in message(floats)
    wide = tmp_path / "wide"
    wide.mkdir()
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(wide / "0.tiff")
    assert "0.tiff" in message(wide) and "16 bits" in message(wide)


def test_row_without_a_picture(tmp_path):
    picture = Image.fromarray(np.zeros((2, 2), dtype=np.uint8))
    write_hub_layout(tmp_path, {"image": datasets.Image()}, train={"image": [picture, None]})
    assert "Image number 1 cannot be decoded (this row has no image)" in message(tmp_path)


@pytest.mark.parametrize(
    ("kind", "labels", "named"),
    [
        (datasets.Value("string"), ["cat", "dog"], "'cat'"),
        (datasets.Value("int64"), [0, -1], "-1"),
        (datasets.Value("int64"), [0, None], "None"),
        (datasets.Value("float32"), [0.0, 0.5], "0.0"),
        (datasets.ClassLabel(names=["cat", "dog"]), [1, -1], "-1"),
    ],
)
def test_labels_that_are_no_class_indices(tmp_path, kind, labels, named):
    pictures = [Image.fromarray(np.zeros((2, 2), dtype=np.uint8))] * 2
    features = {"image": datasets.Image(), "label": kind}
    write_hub_layout(tmp_path, features, train={"image": pictures, "label": labels})
    text = message(tmp_path)
    assert "'label'" in text and "class indices" in text and named in text
    assert ("(0 to 1)" if isinstance(kind, datasets.ClassLabel) else "(0, 1, ...)") in text


def test_damaged_parquet_file(tmp_path):
    picture = Image.fromarray(np.zeros((2, 2), dtype=np.uint8))
    write_hub_layout(tmp_path, {"image": datasets.Image()}, train={"image": [picture]})
    file = tmp_path / "mnist" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-10])
    text = message(tmp_path)
    assert "Cannot open dataset" in text and "Parquet" in text


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch, capfd):
    """Says so at once; `datasets` alone retries for half a minute and reports each try."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    was_offline = datasets.config.HF_HUB_OFFLINE
    assert not datasets.are_progress_bars_disabled()
    assert "not in the cache. Connect to the network, or pass a folder" in message("someone/pictures")
    assert "Retrying" not in "".join(capfd.readouterr())
    assert datasets.config.HF_HUB_OFFLINE is was_offline
    assert not datasets.are_progress_bars_disabled()


def test_without_the_package_datasets(tmp_path, monkeypatch):
    write(tmp_path, GREY)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'mini-ddpm\[train\]'"):
        image_dataset(tmp_path)


def test_path_in_a_row_that_is_a_pipe(tmp_path):
    """It is not opened: that would block for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    picture = {"path": str(tmp_path / "pipe.png"), "bytes": None}
    rows = datasets.Dataset.from_dict(
        {"image": [picture]}, features=datasets.Features(image=datasets.Image(decode=False))
    )
    with pytest.raises(ValueError, match="there is no such file"):
        ImageDataset(rows, "image", None, None)

"""Images: what is read is what is in the files, and what cannot be read is named."""

import io
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mini_ddpm.data import image_dataset, to_model_range


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
    dataset.stack()
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

"""Pictures: the place of each tile, the content of each frame, and errors."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from mini_ddpm import MiniDDPMScheduler, plots
from mini_ddpm.plots import (
    denoising_film,
    evaluation_curves,
    noising_strip,
    sample_grid,
    sampling_options,
    save_film,
)

GAP = 2


def flat_images(count: int, channels: int = 1, size: int = 8) -> np.ndarray:
    """Images of one brightness each: 10, 20, 30, ..."""
    values = 10 * np.arange(1, count + 1, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, size, size, channels))


def test_tiles_lie_row_by_row_and_are_enlarged_without_smoothing():
    page = np.asarray(sample_grid(flat_images(6), columns=3, scale=2))
    assert page.shape == (GAP + 2 * (16 + GAP), GAP + 3 * (16 + GAP), 3)
    for i in range(6):
        row, column = divmod(i, 3)
        top, left = GAP + row * (16 + GAP), GAP + column * (16 + GAP)
        assert (page[top : top + 16, left : left + 16] == 10 * (i + 1)).all()
    tiles = sum((page == 10 * (i + 1)).all(-1).sum() for i in range(6))
    assert tiles + (page == 255).all(-1).sum() == page.shape[0] * page.shape[1]  # the rest is paper


def test_default_grid_is_about_square_and_never_wider_than_its_images():
    assert sample_grid(flat_images(9), scale=1).size == (GAP + 3 * (8 + GAP),) * 2
    assert sample_grid(flat_images(2), columns=10, scale=1).size == (GAP + 2 * (8 + GAP), GAP + 8 + GAP)


def test_default_scale_is_two_and_default_grid_has_no_labels():
    page = sample_grid(flat_images(4))
    assert page == sample_grid(flat_images(4), None, columns=2, scale=2)
    assert page.size == (GAP + 2 * (16 + GAP),) * 2
    trajectory = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    film = denoising_film(trajectory)
    assert film == denoising_film(trajectory, None, columns=2, scale=2) and len(film) == 3
    assert denoising_film(trajectory, trajectory[1:])[0].width > 1.9 * film[0].width
    assert denoising_film(trajectory, columns=1)[0].height > film[0].height
    scheduler, images = MiniDDPMScheduler(), torch.zeros(1, 1, 28, 28)
    strips = [
        noising_strip(images, scheduler, generator=torch.Generator().manual_seed(0), **options)
        for options in ({}, {"timesteps": [125, 250, 375, 500, 624, 749, 874, 999], "scale": 2})
    ]
    assert strips[0] == strips[1]


def test_default_noise_is_random():
    strips = [noising_strip(torch.zeros(1, 1, 8, 8), MiniDDPMScheduler()) for _ in range(2)]
    assert strips[0] != strips[1]


def test_pil_and_rgb_images_are_drawn_as_they_are():
    grey = [Image.fromarray(image[..., 0]) for image in flat_images(4)]
    assert sample_grid(grey) == sample_grid(flat_images(4))
    red = flat_images(1, channels=3) * np.array([1, 0, 0], dtype=np.uint8)
    assert sample_grid(red, scale=1).getpixel((GAP, GAP)) == (10, 0, 0)


def forms(channels: int) -> dict[str, tuple[object, tuple[float, float] | None]]:
    """Four images, from black to white, in every form, and the range where it has to be given."""
    images = flat_images(4, channels).copy()
    images[0, ..., 0], images[3] = 0, 255
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # (B, C, H, W) in [0, 1]
    scaled = (floats * 2 - 1).requires_grad_()  # a batch of a DataLoader
    found = {
        "bytes": (images, None),
        "PIL": ([Image.fromarray(image.squeeze()) for image in images], None),
        "np": (images / np.float32(255), None),
        "pt": (floats, None),
        "latent": (scaled, None),
        "half": (scaled.bfloat16(), None),
        "list of tensors": (list(scaled), None),
        "list of arrays": (list(images), None),
        "told": (floats, (0, 1)),
        "bytes as floats": (floats * 255, (0, 255)),
        "integers": (images.astype(int), (0, 255)),
        "bytes in a tensor": (torch.from_numpy(images).permute(0, 3, 1, 2), None),
        "channels first in an array": (scaled.detach().numpy(), None),
        "channels last in a tensor": (scaled.permute(0, 2, 3, 1), None),
    }
    if channels == 1:
        found |= {"grey array": (images[..., 0], None), "grey tensor": (scaled[:, 0], None)}
    return found


@pytest.mark.parametrize(("channels", "name"), [(channels, name) for channels in (1, 3) for name in forms(channels)])
def test_images_in_any_form_give_one_grid(channels, name):
    images, value_range = forms(channels)[name]
    expected = sample_grid(forms(channels)["bytes"][0])
    page = sample_grid(images, value_range=value_range)
    assert np.abs(np.asarray(page, dtype=int) - np.asarray(expected)).max() <= (name == "half")


def test_one_image_without_a_batch():
    red = np.zeros((8, 8, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    expected = sample_grid(red[None])
    for image in (red, Image.fromarray(red), torch.from_numpy(red), red / 255):
        assert sample_grid(image) == expected
    grey = flat_images(1)[0]
    for image in (grey, grey[..., 0], torch.from_numpy(grey.copy()).permute(2, 0, 1), Image.fromarray(grey[..., 0])):
        assert sample_grid(image) == sample_grid(grey[None])


def test_pictures_of_other_modes():
    picture = Image.new("RGB", (8, 8), (0, 204, 0))
    assert sample_grid([picture.convert("P"), picture.convert("RGBA")]) == sample_grid([picture] * 2)
    assert sample_grid([Image.new("L", (8, 8), 7), picture]).getpixel((GAP, GAP)) == (7, 7, 7)
    white = Image.new("1", (8, 8), 1)
    for one in (white, [white], np.asarray(white)):
        assert sample_grid(one).getpixel((GAP, GAP)) == (255, 255, 255)


def test_values_beyond_the_range_are_clipped():
    images = torch.tensor([-1.4, 1.4, -0.5, 0.0]).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    page = sample_grid(images, scale=1, columns=4)
    assert [page.getpixel((GAP + 10 * i, GAP))[0] for i in range(4)] == [0, 255, 64, 128]
    told = sample_grid(3 * images, scale=1, columns=4, value_range=(-3, 3))
    assert page == told


def test_labels_in_a_tensor():
    images = flat_images(2)
    assert sample_grid(images, torch.tensor([3, 1])) == sample_grid(images, [3, 1]) == sample_grid(images, ["3", "1"])


def test_labels_are_written_once_per_column_where_they_agree():
    images = flat_images(6, size=28)
    plain = sample_grid(images, columns=3)
    once = sample_grid(images, [3, 1, 4] * 2, columns=3)
    each = sample_grid(images, [3, 1, 4, 1, 5, 9], columns=3)
    caption = once.height - plain.height
    assert caption > 8 and each.height - plain.height == 2 * caption
    head = np.asarray(once)[:caption]
    for column in range(3):  # something dark stands over each column, and not the same thing
        assert (head[:, GAP + column * 58 : (column + 1) * 58] < 128).any()
    assert (head[:, :58] != head[:, 58:116]).any()


def test_a_long_label_widens_its_column():
    images = flat_images(2, size=8)
    wide = sample_grid(images, ["ankle boot", "bag"], scale=1)
    assert wide.width > sample_grid(images, ["a", "b"], scale=1).width
    length = math.ceil(ImageFont.load_default(size=10).getlength("ankle boot"))
    assert wide.width == GAP + 2 * (length + 3 * GAP + GAP)  # room between two labels


LONG = [
    "American black bear, black bear, Ursus americanus", "golden retriever", "n02085620_Chihuahua", "automobile",
    *(f"a class with a long name, number {i}" for i in range(13)),
]  # fmt: skip


def test_long_labels_are_wrapped_or_numbered_with_a_legend():
    images = flat_images(34, size=28)
    page = sample_grid(images, LONG * 2, columns=17)
    assert page.width < 17 * 120 and page.width < sample_grid(images, columns=17).width * 2
    legend = page.info["legend"].splitlines()
    assert legend == [f"#{i + 1} {name}" for i, name in enumerate(LONG) if i not in (1, 2, 3)]
    without = sample_grid(images, ["automobile"] * 34, columns=17)
    assert "legend" not in without.info
    rows = (np.asarray(page) < 128).any(axis=(1, 2))
    assert not rows[: without.height].all() and rows[-40:].any()  # the legend is below the grid
    one = sample_grid(flat_images(1, size=8), ["x" * 100_000], scale=1)
    assert one.width <= 24 * 10 and one.height < 100


def test_a_label_of_one_line_or_two_keeps_clear_of_the_images():
    names = ["golden retriever", "bag", "n02085620_Chihuahua", *LONG[4:7]]
    page, plain = (np.asarray(sample_grid(flat_images(6), chosen, columns=3)) for chosen in (names, None))
    for i in range(6):
        assert (page == 10 * (i + 1)).all(-1).sum() == (plain == 10 * (i + 1)).all(-1).sum()


NAMES = ["猫", "собака", "🐱", "naïve", "line\nbreak", "\ud800", ""]


@pytest.mark.parametrize("fallbacks", [plots._FALLBACK_FONTS, ()])
def test_no_label_is_an_empty_box(monkeypatch, fallbacks):
    monkeypatch.setattr(plots, "_FALLBACK_FONTS", fallbacks)
    plots._fonts.cache_clear()
    captions, legend = plots._captions(NAMES, 18, 108)
    plots._fonts.cache_clear()
    for name, (lines, font) in captions.items():
        assert all(plots._has_glyph(font, character) for line in lines for character in line), name
    for lines, font in legend.values():
        assert all(plots._has_glyph(font, character) for line in lines for character in line), lines
    assert len({(*caption.lines,) for caption in captions.values()}) == len(NAMES)  # told apart
    assert captions["line\nbreak"].lines == ["line break"]
    if not fallbacks:
        assert captions["собака"].lines == ["#2"] and legend["#2 собака"].lines == [
            "#2 \\u0441\\u043e\\u0431\\u0430\\u043a\\u0430"
        ]
    page = sample_grid(flat_images(7), NAMES, columns=7)
    assert page.height > sample_grid(flat_images(7), columns=7).height


def test_labels_touch_no_image():
    images = flat_images(6, size=28)
    for labels in (["g", "j", "y"] * 2, list("gjyqpg")):  # letters that reach below the line
        page, plain = (np.asarray(sample_grid(images, chosen, columns=3)) for chosen in (labels, None))
        for i in range(6):
            assert (page == 10 * (i + 1)).all(-1).sum() == (plain == 10 * (i + 1)).all(-1).sum() == 56**2


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (flat_images(0), {}, "images is empty"),
        (flat_images(2, channels=2), {}, "grey or RGB"),
        (flat_images(2), {"labels": ["1"]}, "labels holds 1 labels for 2 images"),
        (flat_images(2), {"columns": 0}, "columns=0 must be at least 1"),
        (flat_images(2), {"value_range": (1, 0)}, r"value_range=\(1, 0\) must be two numbers"),
        (
            flat_images(2).astype(int),
            {},
            r"int64 from 10 to 20, whose range is unclear. Pass value_range=\(black, whi",
        ),
        (flat_images(2) * 1.0, {}, r"float64 from 10 to 20, whose .* \(0, 255\)"),
        (torch.full((2, 1, 8, 8), 0.5), {}, r"float32 from 0.5 to 0.5, whose .* such as \(-1, 1\), \(0, 1\)"),
        (torch.linspace(-2, 2.6, 64).reshape(1, 1, 8, 8), {}, "from -2 to 2.6"),  # standardized
        (torch.linspace(-0.01, 1.01, 64).reshape(1, 1, 8, 8), {}, "from -0.01 to 1.01"),  # resized in [0, 1]
        (torch.tensor([[[0.0, float("nan")]]]), {"value_range": (0, 1)}, "NaN or infinite"),
        (torch.zeros(3, 8, 8), {}, r"\(3, 8, 8\). Pass images\[None\] for one in RGB, images\[:, None\] if grey"),
        (np.zeros((1, 2, 3, 4, 5)), {}, r"not \(1, 2, 3, 4, 5\)"),
        ([np.zeros((8, 8)), np.zeros((9, 8))], {}, r"one size, but have the shapes \(8, 8\), \(9, 8\)"),
        ([Image.new("L", (8, 9)), Image.new("RGB", (8, 8))], {}, r"shapes \(9, 8, 3\), \(8, 8, 3\)"),
        ([Image.new("I;16", (8, 8))], {}, "more than 8 bits"),
        ({"images": flat_images(2)}, {}, r"PIL images, arrays or tensors, such as pipe\(...\).images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_grid(images, **arguments)


def test_film_goes_from_noise_to_sample_beside_the_prediction():
    steps, count = 4, 4
    x0 = torch.full((count, 1, 8, 8), 0.5)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    trajectory = torch.stack([x0 + (1 - i / steps) * noise for i in range(steps + 1)])
    frames = denoising_film(trajectory, x0.expand(steps, *x0.shape), scale=1)
    assert len(frames) == steps + 1 and len({frame.size for frame in frames}) == 1

    still = sample_grid(((x0.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8), scale=1)
    last = np.asarray(frames[-1])
    half = (last.shape[1] + 4 * GAP) // 2
    top = last.shape[0] - still.height
    for left in (0, half):  # both halves end at x_0
        assert (last[top:, left : left + still.width] == np.asarray(still)).all()
    first = np.asarray(frames[0])
    assert (first[top:, half : half + still.width] == np.asarray(still)).all()
    assert (first[top:, : still.width] != np.asarray(still)).any()


def test_a_film_of_images_in_any_form():
    """Steps of tensors, arrays or PIL images; one step has no value below 0, in whichever form."""
    steps = torch.linspace(-1, 0.5, 4)[:, None, None, None, None].expand(4, 2, 1, 8, 8)
    film = denoising_film(steps, steps[1:])
    bytes_ = ((steps + 1) * 127.5).round().byte()  # (steps, B, C, H, W)
    pictures = [[Image.fromarray(image[0].numpy()) for image in step] for step in bytes_]
    for one in (list(steps), steps.permute(0, 1, 3, 4, 2).numpy(), bytes_.numpy()[:, :, 0], bytes_, pictures):
        assert denoising_film(one, one[1:]) == film
    assert denoising_film(steps * 3, value_range=(-3, 3)) == denoising_film(steps)
    with pytest.raises(ValueError, match=r"latents_trajectory must have the shape .*, but has \(4, 1, 8, 8\)"):
        denoising_film(steps[:, 0])


def test_a_notebook_plays_a_film():
    film = denoising_film(torch.linspace(-1, 1, 5)[:, None, None, None, None].expand(5, 1, 1, 8, 8))
    head, _, data = film._repr_html_().removesuffix('">').partition(",")
    assert head == '<img src="data:image/webp;base64'
    file = io.BytesIO(base64.b64decode(data))
    assert durations(file) == [800] * 4 + [2000]


def test_film_brings_the_scale_of_sigma_space_samplers_back():
    noise = torch.randn(1, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    near, far = (denoising_film(torch.cat([scale * noise, noise]), scale=1)[0] for scale in (2.0, 1e4))
    assert near == far


def test_film_refuses_predictions_of_another_trajectory():
    with pytest.raises(
        ValueError, match=r"pred_original_samples has the shape \(3, 1, 1, 8, 8\).*needs 2 predictions"
    ):
        denoising_film(torch.zeros(3, 1, 1, 8, 8), torch.zeros(3, 1, 1, 8, 8))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_is_written_with_every_frame_and_repeats(tmp_path, suffix):
    trajectory = torch.linspace(-1, 1, 5)[:, None, None, None, None].expand(5, 1, 1, 8, 8)
    save_film(denoising_film(trajectory), tmp_path / f"film{suffix}", seconds=1)
    assert durations(tmp_path / f"film{suffix}") == [200] * 4 + [2000]
    with Image.open(tmp_path / f"film{suffix}") as film:
        assert film.n_frames == 5
        assert film.info["loop"] == 0
    save_film(denoising_film(trajectory), tmp_path / f"slow{suffix}")
    assert durations(tmp_path / f"slow{suffix}") == [800] * 4 + [2000]
    save_film(denoising_film(trajectory), tmp_path / f"fast{suffix}", seconds=0.01)
    assert durations(tmp_path / f"fast{suffix}") == [20] * 4 + [2000]  # browsers slow down shorter frames


def durations(file) -> list[int]:
    """The duration of each frame of a film, in milliseconds."""
    with Image.open(file) as film:
        found = []
        for frame in range(film.n_frames):
            film.seek(frame)
            film.load()
            found.append(film.info["duration"])
    return found


def test_noising_strip_begins_clean_and_ends_in_noise():
    scheduler = MiniDDPMScheduler()
    images = torch.full((2, 1, 28, 28), -1.0)
    strip = noising_strip(images, scheduler, timesteps=[0, 500, 999], generator=torch.Generator().manual_seed(0))
    page = np.asarray(strip)[..., 0].astype(float)
    cell = (strip.width - GAP) // 4
    left = [GAP + k * cell + (cell - GAP - 56) // 2 for k in range(4)]
    tiles = [page[-(56 + GAP) : -GAP, x : x + 56] for x in left]
    spread = [tile.std() for tile in tiles]
    assert spread[0] == 0 and tiles[0].max() == 0
    assert spread[1] < spread[2] < spread[3]
    # a standard normal clipped to [-1, 1] has the standard deviation 0.718, in bytes 91.6
    assert spread[3] == pytest.approx(91.6, rel=0.05)


def test_noising_strip_takes_images_in_any_form():
    scheduler, x0 = MiniDDPMScheduler(), torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    x0 = (x0 + 1).mul(127.5).round() / 127.5 - 1
    strip = noising_strip(x0, scheduler, timesteps=[0, 500], generator=torch.Generator().manual_seed(3))
    picture = Image.fromarray(((x0 + 1) * 127.5).round().byte()[0, 0].numpy())
    for images, options in (
        (picture, {}),
        ([picture], {}),
        (np.asarray(picture)[None, ..., None] / 255, {}),
        (x0 / 2 + 0.5, {}),
        (2 * x0, {"value_range": (-2, 2)}),
        (x0.double().requires_grad_(), {}),
    ):
        other = noising_strip(images, scheduler, timesteps=[0, 500], generator=3, **options)
        assert np.abs(np.asarray(other, dtype=int) - np.asarray(strip)).max() <= 1
    with pytest.raises(ValueError, match=r"timesteps=\[0, 1000\]: 1000 must be 0 to 999"):
        noising_strip(x0, scheduler, timesteps=[0, 1000])


def row(scheduler: str, evaluations: int, fid: float, **options) -> dict:
    figures = {"unet_evaluations": evaluations, "seconds_per_image": evaluations / 10, "fid": fid}
    return {"images": "generated", "scheduler": scheduler, "eta": 0.0, **options, **figures}


def test_options_of_a_sampler_in_words():
    assert sampling_options(row("DDIMScheduler", 1, 1.0)) == ""
    assert sampling_options(row("DDIMScheduler", 1, 1.0, eta=0.5)) == ", eta 0.5"
    assert sampling_options(row("DDIMScheduler", 1, 1.0, guidance_scale=1.5)) == ", guidance 1.5"
    options = {"guidance_scale": 2.0, "guidance_interval": [0.35, 0.6], "eta": 1.0}
    assert sampling_options(row("DDIMScheduler", 1, 1.0, **options)) == ", guidance 2 from 0.35 to 0.6, eta 1"


def test_curves_show_every_row(monkeypatch):
    import matplotlib.backends.backend_agg as backend

    figures, canvas_class = [], backend.FigureCanvasAgg
    monkeypatch.setattr(backend, "FigureCanvasAgg", lambda figure: figures.append(figure) or canvas_class(figure))
    rows = [
        {"images": "real", "fid": 0.5},
        row("DDIMScheduler", 20, 3.0),
        row("DDIMScheduler", 10, 5.0),
        row("DDPMScheduler", 40, 9.0, guidance_scale=1.5),
    ]
    picture = evaluation_curves(rows)
    assert (picture.size, picture.mode) == ((1200, 480), "RGB")
    for axes, name, factor in zip(figures[0].axes, ("network evaluations", "seconds"), (1, 10), strict=True):
        curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        assert curves.pop("real images: 0.50")[1] == [0.5, 0.5]
        assert curves == {
            "DDIM": ([10 / factor, 20 / factor], [5.0, 3.0]),  # by cost
            "DDPM, guidance 1.5": ([40 / factor], [9.0]),
        }
        assert axes.get_xlabel() == f"{name} per image" and axes.get_xscale() == axes.get_yscale() == "log"
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["FID", ""]
    assert [axes.get_legend() is not None for axes in figures[0].axes] == [False, True]
    others = [{("frechet_distance" if key == "fid" else key): value for key, value in row.items()} for row in rows]
    evaluation_curves(others)
    assert figures[1].axes[0].get_ylabel() == "Fréchet distance"


def test_curves_without_a_positive_value():
    """The axes are logarithmic; matplotlib would warn about a floor of zero."""
    assert evaluation_curves([{"images": "real", "fid": 0.0}]).size == (1200, 480)

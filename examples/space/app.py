"""A Gradio app that draws digits: what is typed, in a handwriting that a slider changes, step by step.

pip install -r examples/space/requirements.txt
python examples/space/app.py
"""

import os
import re

import gradio as gr
import numpy as np
import torch
from PIL import Image

from mini_ddpm import load_pipeline

SCALE = 4  # shown pixels per pixel of a digit
MAX_CHARACTERS = 24

pipe = load_pipeline(os.environ.get("PIPELINE", "mnist-distilled"))  # many calls may share it at once
pipe.set_progress_bar_config(disable=True)
torch.set_num_threads(1)  # a call's digits are few; more calls at once use the other cores


def noise(count, seed, degrees):
    """Return the noise of each digit, (B, C, H, W), at an angle of a circle through two pictures of noise.

    It is standard normal at every angle. A digit's noise depends on its place and not on what else is typed.
    """
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    angle = torch.deg2rad(torch.tensor(float(degrees % 360)))
    latents = []
    for position in range(count):
        generator = torch.Generator().manual_seed(seed * MAX_CHARACTERS + position)
        start, quarter = torch.randn(2, *shape, generator=generator)
        latents.append(torch.cos(angle) * start + torch.sin(angle) * quarter)
    return torch.stack(latents)


def row(text, digits):
    """Return digits, (B, 1, H, W) in [0, 1], side by side in black, (H, pixels). Other characters are gaps."""
    digits, size = iter(1 - digits[:, 0].numpy()), digits.shape[-1]
    tiles = [next(digits) if character in "0123456789" else np.ones((size, size // 2)) for character in text]
    return np.concatenate(tiles, axis=1)


def to_image(pixels):
    """Return pixels, (H, W) in [0, 1], as an image of `SCALE` times the size."""
    image = Image.fromarray(np.uint8(np.rint(255 * pixels)))
    return image.resize((SCALE * image.width, SCALE * image.height), Image.Resampling.NEAREST)


def draw(text, seed, degrees):
    """Return the picture of a text, and its film: the noise and below it the picture after each step."""
    text = text.strip()[:MAX_CHARACTERS]
    labels = [int(digit) for digit in re.findall("[0-9]", text)]
    if not labels:
        raise gr.Error("Type at least one digit.")
    latents = noise(len(labels), int(seed), degrees)
    result = pipe(labels, latents=latents, output_type="pt", return_trajectory=True)
    film = (result.latents_trajectory / 2 + 0.5).clamp(0, 1)
    film[-1] = result.images  # in which white is the white of the dataset
    return to_image(row(text, result.images)), to_image(np.concatenate([row(text, frame) for frame in film]))


with gr.Blocks(title="Digits from noise", analytics_enabled=False) as demo:
    gr.Markdown("# Digits from noise\nType a number. A diffusion model turns noise into handwriting, in a few steps.")
    picture = gr.Image(label="Picture", format="png", interactive=False, height=200, elem_id="picture")
    with gr.Row():
        text = gr.Textbox("314", label="Digits", info="Others become gaps.", max_length=MAX_CHARACTERS, scale=3)
        seed = gr.Number(7, label="Seed", info="Same seed, same picture.", precision=0, minimum=0, maximum=999999)
    degrees = gr.Slider(0, 360, 0, step=5, label="Handwriting", info="Walks through the noise in a circle.")
    button = gr.Button("Draw", variant="primary")
    film = gr.Image(label="Step by step, from noise to digits", format="png", interactive=False, height=400)
    # The queue runs two calls at once; the others wait their turn, and a full queue says so.
    gr.on(
        [demo.load, button.click, text.submit, degrees.release], draw, [text, seed, degrees], [picture, film],
        api_name="draw", concurrency_limit=2,
    )  # fmt: skip
demo.queue(max_size=64)

if __name__ == "__main__":
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # from no other host
    demo.launch(theme=gr.themes.Default(**fonts))

"""Spherical interpolation between two latents: handwriting that changes from one style to another.

    python examples/interpolate.py

writes `interpolate.png`, a digit per row, and the same as a film, `interpolate.gif`. All rows have the same latents:
the class decides which digit is drawn, the latents decide how.
"""

from pathlib import Path

import torch

from mini_ddpm import load_pipeline, sample_grid


def slerp(start, end, weights):
    """Return latents (N, C, H, W) on the arc from `start` to `end`, (C, H, W), for weights (N,) in [0, 1].

    A straight line would leave the sphere near which noise lies: its midpoint has a standard deviation of √½, not 1.
    """
    angle = torch.arccos((start * end).sum() / (start.norm() * end.norm()))
    weights = weights[:, None, None, None]
    return (torch.sin((1 - weights) * angle) * start + torch.sin(weights * angle) * end) / torch.sin(angle)


def main(labels=(2, 3, 4, 5, 6), num_frames=11, num_inference_steps=20, seed=1, out="interpolate.png"):
    """Draw a row of frames for each label; return them, (rows, frames, C, H, W) in [0, 1]."""
    pipe = load_pipeline("mnist-class-conditional")
    size = pipe.unet.config.sample_size
    ends = torch.randn(2, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(seed))
    latents = slerp(*ends, torch.linspace(0, 1, num_frames))
    images = pipe(
        [label for label in labels for _ in range(num_frames)],
        latents=latents.repeat(len(labels), 1, 1, 1),
        num_inference_steps=num_inference_steps,
        eta=0.0,  # DDIM without noise: the image is a continuous function of x_T
        output_type="pt",
    ).images

    sample_grid(images, columns=num_frames, value_range=(0, 1)).save(out)
    rows = images.unflatten(0, (len(labels), num_frames))
    film = [sample_grid(rows[:, i], columns=len(labels), value_range=(0, 1)) for i in range(num_frames)]
    film += film[-2:0:-1]  # and back
    film[0].save(Path(out).with_suffix(".gif"), save_all=True, append_images=film[1:], duration=80, loop=0)
    return rows


if __name__ == "__main__":
    main()

"""All equations of DDIM sampling in a dozen lines, compared with the pipeline.

    python examples/every_equation.py

draws four digits by hand and with the pipeline, and prints the largest difference between the images.
"""

import math

import torch

from mini_ddpm import load_pipeline
from mini_ddpm.plots import sample_grid


def alpha_bar(t: int, T: int, s: float = 0.008) -> float:
    """Return ᾱ_t of the cosine schedule (arXiv 2102.09672, eq. 17): x_t holds √ᾱ_t of the image."""

    def f(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    product = 1.0
    for i in range(t + 1):
        product *= 1 - min(1 - f((i + 1) / T) / f(i / T), 0.999)  # 1 - β_i
    return product


@torch.no_grad()
def main(pipeline: str = "mnist", num_inference_steps: int = 20, out: str = "every_equation.png") -> float:
    """Draw by hand and with the pipeline; return the largest difference between two pixels in [0, 1]."""
    pipe = load_pipeline(pipeline)
    T, n = pipe.scheduler.config.num_train_timesteps, num_inference_steps
    c = pipe.scheduler.config.clip_sample_range  # pixels are in [-1, 1]; saturation_margin trains black below -1
    x_T = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    x = x_T
    timesteps = [round(i * T / n) - 1 for i in range(n, 0, -1)]
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, a_next = alpha_bar(t, T), alpha_bar(t_next, T)  # ᾱ_{-1} = 1: the clean image
        v = pipe.unet(x, t).sample  # the velocity v = √ᾱ ε - √(1-ᾱ) x_0 (arXiv 2202.00512, app. D)
        x_0 = (math.sqrt(a) * x - math.sqrt(1 - a) * v).clamp(-c, c)  # solved for x_0
        epsilon = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)  # x_t = √ᾱ x_0 + √(1-ᾱ) ε, solved for ε
        x = math.sqrt(a_next) * x_0 + math.sqrt(1 - a_next) * epsilon  # DDIM with η = 0 (arXiv 2010.02502, eq. 12)

    white = pipe.config.get("white_level", 255) / 255  # MNIST's white is 253
    by_hand = (x / 2 + 0.5).clamp(0, white)
    by_pipeline = pipe(batch_size=4, num_inference_steps=n, latents=x_T, output_type="pt").images
    difference = (by_hand - by_pipeline).abs().max().item()
    images = torch.cat([by_hand, by_pipeline]).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    sample_grid(images, ["by hand"] * 4 + ["pipeline"] * 4, columns=4).save(out)
    print(f"{out}: the largest difference is {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

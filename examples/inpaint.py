"""RePaint (arXiv 2201.09865): keep the left half of digits and fill in the rest, with weights that never learned to.

    python examples/inpaint.py

draws ten digits and writes `inpaint.png`: the digits, what is kept of them, and two completions of each.
"""

import torch

from mini_ddpm import load_pipeline, sample_grid


class RePaint:
    """A `callback_on_step_end` that keeps the pixels of x_0 (B, C, H, W) where the mask (H, W) is true."""

    def __init__(self, x_0, mask, jumps, generator):
        self.x_0, self.mask, self.jumps, self.generator = x_0, mask, jumps, generator

    def __call__(self, pipe, i, t, tensors):
        """Return x_{t-1} after step i (algorithm 1 of the paper; U is `jumps`)."""
        scheduler, x = pipe.scheduler, self.with_known_part(pipe, i, tensors["latents"])
        for _ in range(self.jumps - 1 if i + 1 < pipe.num_timesteps else 0):
            # Back to x_t, and the same step again: the filled part comes to fit the known one.
            alpha_bar, alpha_bar_next = scheduler.alphas_cumprod[scheduler.timesteps[i : i + 2]]
            alpha = alpha_bar / alpha_bar_next
            x = alpha.sqrt() * x + (1 - alpha).sqrt() * torch.randn(x.shape, generator=self.generator)
            x = scheduler.step(pipe.unet(x, t).sample, t, x, eta=1.0, generator=self.generator).prev_sample
            x = self.with_known_part(pipe, i, x)
        return {"latents": x}

    def with_known_part(self, pipe, i, x):
        """Return x_{t-1} with the known part out of q(x_{t-1} | x_0)."""
        if i + 1 == pipe.num_timesteps:
            return torch.where(self.mask, self.x_0, x)
        noise = torch.randn(x.shape, generator=self.generator)
        t_next = pipe.scheduler.timesteps[i + 1].expand(len(x))
        return torch.where(self.mask, pipe.scheduler.add_noise(self.x_0, noise, t_next), x)


def main(labels=range(10), num_inference_steps=50, jumps=5, out="inpaint.png"):
    """Inpaint two times; return originals (B, C, H, W) and completions (2B, C, H, W), both about [-1, 1]."""
    originals = load_pipeline("mnist-class-conditional")(labels, generator=0, output_type="latent").images
    mask = torch.arange(originals.shape[3]) < originals.shape[3] // 2  # (W,): the left half is known
    pipe = load_pipeline("mnist")  # does not know the classes
    x_0, generator = originals.repeat(2, 1, 1, 1), torch.Generator().manual_seed(0)
    filled = pipe(
        len(x_0), num_inference_steps=num_inference_steps, eta=1.0, generator=generator, output_type="latent",
        callback_on_step_end=RePaint(x_0, mask, jumps, generator),
    ).images  # fmt: skip
    masked = torch.where(mask, originals, 0.0)  # grey is unknown
    images = torch.cat([originals, masked, filled]).clamp(-1, 1)
    sample_grid(images, columns=len(originals), value_range=(-1, 1)).save(out)
    return originals, filled


if __name__ == "__main__":
    main()

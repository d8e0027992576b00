"""The plain training loop of the Hugging Face diffusion course, with parts of mini-ddpm and of diffusers.

    python examples/hf_course_loop.py

trains our network with diffusers' scheduler and pipeline, then the reverse, an epoch of MNIST each (minutes on a CPU).
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.utils.data import DataLoader

from mini_ddpm import MiniDDPMPipeline, MiniDDPMScheduler, MiniUNet2DModel, image_dataset, sample_grid


def train_loop(unet, scheduler, dataset, num_epochs=1, batch_size=64, learning_rate=1e-3):
    """Train in place; return the loss of each step."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    losses = []
    for _ in range(num_epochs):
        for batch in DataLoader(dataset, batch_size, shuffle=True):
            clean_images = batch["images"]  # (B, C, H, W) in [-1, 1]
            noise = torch.randn_like(clean_images)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean_images),))
            noisy_images = scheduler.add_noise(clean_images, noise, timesteps)  # the forward process

            noise_pred = unet(noisy_images, timesteps, return_dict=False)[0]
            loss = F.mse_loss(noise_pred, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def main(dataset=None, num_inference_steps=50, out="hf_course_loop.png", **loop):
    """Train both, and draw; return the losses of both. `dataset` and `loop` are arguments of `train_loop`."""
    dataset = dataset or image_dataset("ylecun/mnist", "train")
    channels, size, _ = dataset.shape
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    their_unet = UNet2DModel(
        **shape, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pairs = [
        (MiniUNet2DModel(**shape), DDPMScheduler(beta_schedule="squaredcos_cap_v2"), DDPMPipeline),
        (their_unet, MiniDDPMScheduler(), MiniDDPMPipeline),  # squaredcos_cap_v2, epsilon
    ]
    losses, images = [], []
    for unet, scheduler, pipeline_class in pairs:
        losses.append(train_loop(unet, scheduler, dataset, **loop))
        pipe = pipeline_class(unet=unet.eval(), scheduler=scheduler)
        images += pipe(batch_size=8, num_inference_steps=num_inference_steps).images
        print(f"{type(unet).__name__}, {type(scheduler).__name__}: loss {losses[-1][-1]:.4f}")
    sample_grid(images, columns=8).save(out)
    return losses


if __name__ == "__main__":
    main()

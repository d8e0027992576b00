"""Italic digits after a hundred steps: a LoRA adapter for the shipped weights, through PEFT.

    python examples/lora.py  # needs `pip install peft`

draws digits, slants them, trains an adapter on those, saves it in `runs/lora`, opens it again, and writes `lora.png`:
digits without and with the adapter, from the same noise.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig

from mini_ddpm import compute_loss, load_pipeline, sample_grid


def italic(images):
    """Slant images, (B, C, H, W): the top goes to the right. Replace it by a style of your own."""
    black = images.min()
    shear = torch.tensor([[1, 0.7, 0], [0, 1, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(shear, images.shape, align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black


def main(
    folder="runs/lora", num_images=100, max_train_steps=100, batch_size=32, num_inference_steps=20, out="lora.png"
):
    """Train, save, load, and draw; return images before and after, (10, C, H, W) in [0, 1]."""
    pipe = load_pipeline("mnist-class-conditional")
    unet, num_train_timesteps = pipe.unet, pipe.scheduler.config.num_train_timesteps
    labels = torch.arange(num_images) % 10
    # "latent": in the range that the network has learned, which is a bit larger than [-1, 1]
    dataset = italic(pipe(labels, num_inference_steps=10, generator=0, output_type="latent").images)

    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv_in", "conv1", "conv2", "conv_out"]
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))  # the other weights are frozen
    optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=3e-3)
    for step in range(max_train_steps):
        batch = torch.randint(num_images, (batch_size,))
        images, timesteps = dataset[batch], torch.randint(num_train_timesteps, (batch_size,))
        is_null = torch.rand(batch_size) < 0.1  # guidance needs the null label, the last
        class_labels = labels[batch].masked_fill(is_null, unet.config.num_class_embeds - 1)
        loss = compute_loss(unet, pipe.scheduler, images, torch.randn_like(images), timesteps, class_labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    unet.save_lora_adapter(folder)

    pipe = load_pipeline("mnist-class-conditional")
    call = {"class_labels": range(10), "num_inference_steps": num_inference_steps, "generator": 0}
    before = pipe(**call, output_type="pt").images
    pipe.unet.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    after = pipe(**call, output_type="pt").images
    sample_grid(torch.cat([before, after]), columns=10, value_range=(0, 1)).save(out)
    return before, after


if __name__ == "__main__":
    main()

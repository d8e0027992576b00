"""An adversarial loss for students of few steps: a critic learns to tell their images from those of the dataset.

    L_critic  = E[max(0, 1 - D(x_s))] + E[max(0, 1 + D(x̂_s))]
    L_student = L_distillation - w E[D(x̂_s)]

(The hinge loss of arXiv 1705.02894, eq. 3 and 4.) x_s is an image of the dataset, noised to the level s; x̂_s is where
one step of the student ends. At the end of the last step, where s would be the image itself, both are noised to a
random level. A student of one step that only imitates its teacher draws the mean of what it cannot tell apart, which
is blurred; the critic sees that, the distillation's loss does not.

D consists of small convolutions on the activations of the frozen teacher, which knows images at every level of noise
(arXiv 2405.14867).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .loss import noise_and_predict, prediction_losses

WIDTH = 64
LEARNING_RATE = 5e-4
LEVELS = 0.02, 0.3
"""Finished images are noised to a random level between these shares of the noise levels."""


class Critic(nn.Module):
    """Small convolutions on activations of a frozen network; the mean of what they say is D.

    Args:
        widths: Channels of each of the activations.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width, affine=False),
                nn.Conv2d(width, WIDTH, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2),
                nn.SiLU(),
                nn.Conv2d(WIDTH, 1, 1),
            )
            for width in widths
        )

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return what each head says of each place: positive for a real image. Lists of (B, C, H, W)."""
        return [head(feature.float()) for head, feature in zip(self.heads, features, strict=True)]


class AdversarialTeacher:
    """A teacher of distillation with a critic: its `loss` is that of a round.

    Args:
        teacher: Gives the targets, as [`DDIMTeacher`] does; the critic looks at the activations of its network.
        weight: w, above 0.
    """

    def __init__(self, teacher: Any, weight: float) -> None:
        self.teacher, self.scheduler, self.weight = teacher, teacher.student_scheduler, weight
        self.timesteps = teacher.timesteps
        self.run_settings = teacher.run_settings | {"adversarial_weight": weight}
        self.pipeline_defaults = teacher.pipeline_defaults
        self._levels = [round(share * self.scheduler.config.num_train_timesteps) for share in LEVELS]
        self._real: torch.Tensor | None = None
        unet = teacher.unet
        if not (hasattr(unet, "mid_block") and hasattr(unet, "up_blocks")):
            raise ValueError("adversarial_weight needs a network with mid_block and up_blocks. Use a weight of 0.")
        self._features: dict[str, torch.Tensor] = {}  # of the network's last call
        for name, block in (("middle", unet.mid_block), ("last", unet.up_blocks[-1])):
            block.register_forward_hook(functools.partial(self._keep, name))
        self.trained_parts: list[Any] = []

    def prepare(self, device: torch.device, compiled: bool) -> None:
        """Make a new critic on `device`, move there, and compile the teacher's network if `compiled`."""
        self.teacher.prepare(device, compiled)
        widths = self.teacher.unet.config.block_out_channels
        critic = Critic([widths[-1], widths[0]]).to(device)
        self.trained_parts = [critic, torch.optim.Adam(critic.parameters(), LEARNING_RATE, (0.0, 0.99))]

    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the target and the noise of [`DDIMTeacher`]. The images are kept for the next call of `loss`."""
        self._real = images
        target: tuple[torch.Tensor, torch.Tensor] = self.teacher(images, noise, timesteps, class_labels)
        return target

    def loss(
        self,
        unet: nn.Module,
        scheduler: Any,
        images: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the student's loss of each image, (B,); the arguments are those of [`compute_loss`].

        Where gradients are recorded, the critic takes a step of its own first.
        """
        sample, prediction = noise_and_predict(unet, scheduler, images, noise, timesteps, class_labels)
        snr_floor = self.teacher.snr_floor
        losses = prediction_losses(prediction, scheduler, images, noise, timesteps, snr_floor=snr_floor)
        if not torch.is_grad_enabled():  # a validation loss
            return losses
        stepped = self.scheduler.step(prediction.float(), timesteps, sample.float(), use_clipped_model_output=True)
        generated, levels = stepped.prev_sample, self.teacher.end[timesteps]
        is_image = levels < 0
        levels = torch.where(is_image, torch.randint_like(levels, *self._levels), levels)
        noised = self.scheduler.add_noise(generated, torch.randn_like(generated), levels)
        generated = torch.where(is_image[:, None, None, None], noised, generated)
        assert self._real is not None
        real = self.scheduler.add_noise(self._real, torch.randn_like(self._real), levels)

        with torch.no_grad():
            seen_real = self._activations(real, levels, class_labels)
        seen = self._activations(generated, levels, class_labels)
        critic, optimizer = self.trained_parts
        parts = [F.relu(1 - said).mean() for said in critic(seen_real)]
        parts += [F.relu(1 + said).mean() for said in critic([feature.detach() for feature in seen])]
        optimizer.zero_grad()
        torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        critic.requires_grad_(False)  # the student's loss trains the student alone
        says = torch.stack([said.mean(dim=(1, 2, 3)) for said in critic(seen)]).mean(0)
        critic.requires_grad_(True)
        return losses - self.weight * says

    def _activations(
        self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return the activations of the middle block and of the last upward block, (B, C, H, W) each."""
        self.teacher.unet(sample, timesteps, class_labels)
        return [self._features["middle"], self._features["last"]]

    def _keep(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Keep the activations of a block."""
        self._features[name] = output

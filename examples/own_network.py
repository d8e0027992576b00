"""A network and a loss of your own, and early stopping, in the training loop of mini-ddpm.

    python examples/own_network.py

trains on MNIST until the validation loss has not fallen for two checkpoints; `runs/own-network/samples/` has pictures.
"""

import torch.nn.functional as F

from mini_ddpm import MiniUNet2DModel, TrainCallback, TrainConfig, load_pipeline, train


class ClippedUNet(MiniUNet2DModel):
    """A U-Net with a clipped output. Any `ModelMixin` that is called like diffusers' `UNet2DModel` will do."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        """Predict v, (B, C, H, W), in [-4, 4]."""
        output = super().forward(sample, timestep, class_labels)
        output["sample"] = F.hardtanh(output.sample, -4, 4)
        return output if return_dict else output.to_tuple()


def huber_loss(unet, scheduler, images, noise, timesteps, class_labels):
    """Return the Huber loss of each image, (B,): large errors count less than in the squared error."""
    prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample  # without classes
    target = scheduler.get_velocity(images, noise, timesteps)
    return F.huber_loss(prediction, target, reduction="none", delta=0.5).mean(dim=(1, 2, 3))


class EarlyStopping(TrainCallback):
    """Stop after `patience` measurements of the validation loss without a new minimum."""

    def __init__(self, patience):
        self.patience, self.best, self.waited = patience, 1e9, 0

    def on_log(self, state):
        """Count: the validation loss is measured before each checkpoint."""
        if (loss := state.log.get("validation_loss")) is not None:
            self.best, self.waited = min(loss, self.best), 0 if loss < self.best else self.waited + 1
            if self.waited >= self.patience:
                state.stop()

    def state_dict(self):
        """Return what each checkpoint keeps, so that a resumed run counts on."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict):
        """Take it back."""
        vars(self).update(state_dict)


def main(output_dir="runs/own-network", patience=2, unet=None, **settings):
    """Train, and open the pipeline. The folder holds the source of the network, so that others can open it too."""
    config = TrainConfig(output_dir=output_dir, validation_share=0.02, **settings)
    folder = train(config, unet=unet or ClippedUNet(), loss_fn=huber_loss, callbacks=[EarlyStopping(patience)])
    return load_pipeline(folder, unet=ClippedUNet.from_pretrained(folder, subfolder="unet"))


if __name__ == "__main__":
    main()

"""What the pipelines share: checks of their arguments and the denoising loop."""

DEFAULT_NUM_INFERENCE_STEPS = 20

"""The denoising network."""

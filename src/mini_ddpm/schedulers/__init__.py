"""The noise schedule and its samplers."""

"""Measuring a pipeline."""

"""Sampling loops, and how a pipeline is saved."""

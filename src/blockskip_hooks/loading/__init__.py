"""Weights from a checkpoint to the device: index, checks, quantised layers, download."""

"""Weights from a checkpoint to the device: index, resident and streamed weights, quantisation, LoRA, checks."""

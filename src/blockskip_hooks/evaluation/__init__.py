"""Metrics of a trained LoRA and their report."""

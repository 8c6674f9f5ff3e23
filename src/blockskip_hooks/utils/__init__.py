"""Helpers of every room: atomic files, errors, formatting, the machine, what a stage costs."""

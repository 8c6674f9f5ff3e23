"""Helpers of every room: atomic files, the machine, what a stage costs."""

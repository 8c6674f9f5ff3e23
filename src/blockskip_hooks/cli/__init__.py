"""Flags and files to settings, and errors to one line."""

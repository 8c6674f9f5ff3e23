"""Run tests on the stand-in: ``pytest -n 0 -p tests.accelerator.plugin tests/test_families.py``."""

from tests.accelerator import device


device.activate()

"""Bad input: every script, with settings, models and pictures that are wrong, and what goes wrong in a run."""

import pytest


pytest.register_assert_rewrite("tests.bad_input.harness")

"""Memory, FLOPs and disk of a run, computed before anything loads."""

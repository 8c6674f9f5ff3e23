"""The training script's flags, group by group in the order of ``--help``, and the types of their values."""

"""The training script's flags, group by group in the order of ``--help``.

What a flag is called, what it takes and what it means is said here alone: the parser and
:class:`~blockskip_hooks.training.settings.TrainSettings` are made of these groups.
"""

"""Photos, captions and datasets to crops, by a sample plan that is a pure function of the seed."""

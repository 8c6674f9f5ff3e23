"""Records of residual features: made, stored, read back in batches."""

"""Which blocks to skip, measured by masking the text in a model's first and last blocks."""

"""Images from models whose skipped blocks stream, and the encoders that judge them."""

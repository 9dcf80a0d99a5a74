"""A checkpoint and its parts."""

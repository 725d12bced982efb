"""Checkpoints: the name table, the original's layouts, the distributed format."""

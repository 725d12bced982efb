"""Parallel layouts: checks, process groups, starting processes, the CPU mode."""

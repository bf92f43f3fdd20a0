"""Losses, optimiser, step, checkpoints, run folders and several hosts."""

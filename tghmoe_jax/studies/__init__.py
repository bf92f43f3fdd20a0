"""Ablations, hard ways of asking, and transfer to the second drawing style."""

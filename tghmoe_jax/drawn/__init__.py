"""Synthetic data: phantoms in several styles, patients, 2D scenes, and the training of the embedded tokeniser."""

"""Synthetic data: phantoms in two styles, 2D scenes, and the training of the embedded tokeniser."""

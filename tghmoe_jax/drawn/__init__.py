"""Data that are drawn: phantoms in two styles, patients, 2D scenes, and the training of the embedded tokeniser."""

"""Scores, controls and tables of a run: numpy only, no jax and no model code."""

DISCLAIMER = "Research output of a machine-learning model, not for clinical use."

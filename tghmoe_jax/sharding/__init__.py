"""The device mesh, and where each parameter lives on it."""

"""The families of 2D models: one file each."""

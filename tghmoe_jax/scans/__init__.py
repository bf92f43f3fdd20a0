"""From a file to a volume in HU, and from there to the slices that the tower sees."""

"""The one way to ask a model: about test questions, one scan, or a picture of a 2D base."""

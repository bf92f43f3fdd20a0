"""Text-guided hierarchical mixture-of-experts for 3D CT, in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load":
        from tghmoe_jax.reader.opening import load

        return load
    raise AttributeError(f"module 'tghmoe_jax' has no attribute {name!r}")

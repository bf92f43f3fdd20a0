"""Full scale with one layer of experts and one of the decoder, in their real width: what `test_aot` compiles for a TPU.

As little else as can be, since the compiler takes as long for a layer as for a scanned run of it.
"""

from configs import stage2


def get_config(arg: str | None = None):
    c = stage2.get_config("phi3v")
    c.base_config.num_hidden_layers = 1
    c.base_config.vision_config = {"num_hidden_layers": 2}  # the upper one is not run
    c.model.attn3d_layers = c.model.tgh.layers = (0,)
    c.model.remat = "none"
    c.trainable = tuple(pattern for pattern in c.trainable if not pattern.startswith("decoder"))
    c.data.update({"slices": 2, "text_length": 160})
    c.mesh.update({"data": 1, "fsdp": 2, "expert": 2})
    c.train.batch = 16
    return c

"""Full scale with few layers, of every kind and in their real width: what `test_aot` compiles for a TPU."""

from configs import stage2


def get_config(arg: str | None = None):
    c = stage2.get_config("phi3v")
    c.base_config.num_hidden_layers = 2
    c.base_config.vision_config = {"num_hidden_layers": 5}  # the top one is not run
    c.model.attn3d_layers, c.model.tgh.layers = (2, 3), (3,)
    c.data.update({"slices": 4, "text_length": 160})
    c.mesh.update({"data": 1, "fsdp": 2, "expert": 2})
    c.train.batch = 16
    return c

"""A base goes from disk onto a mesh part by part, and arrives as it was."""

import collections

import numpy as np
import pytest

from configs import stage1
from tests import tiny_run
from tghmoe_jax import train
from tghmoe_jax.bases.base import EMBEDDED, load_base, tokenizer_of
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.training import loading, program
from tghmoe_jax.weights import storage
from tghmoe_jax.weights.storage import Lazy


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = stage1.get_config()
    config.base = str(tiny_run.write_base(tmp_path_factory.mktemp("base")))
    config.data.update({"size": tiny_run.SIZE, "slices": tiny_run.SLICES})
    config.model.update({"attn3d_layers": (1, 2), "aux_findings": False, "patch_depth": 2})
    config.model.depth_rope.rotary_dim = 8
    config.model.tgh.layers = (1,)
    return config


def test_leaves_of_a_base_stay_on_disk_until_they_are_placed(config, monkeypatch):
    reads = collections.Counter()
    plain = storage.read_tensor
    monkeypatch.setattr(storage, "read_tensor", lambda file, name: reads.update([name]) or plain(file, name))
    origin = train.load_origin(config)
    assert not reads and all(isinstance(leaf, Lazy) for leaf in origin.params.values())

    model = program.build_model(config, origin.config, (), tokenizer_of(EMBEDDED, origin.config), ())
    shapes = loading.param_shapes(model, config.data)
    canonical, fresh, _ = train.assemble(origin, shapes, "average")
    made = {name for name in canonical if not isinstance(canonical[name], Lazy)}
    assert made == {name for name in canonical if "/experts/" in name or name == "vision/patch/kernel"}

    mesh = make_mesh()
    shardings = loading.param_shardings(shapes, mesh)
    expected = load_base(config.base).params
    for path in (path for path in shapes if path not in fresh):
        found = np.asarray(train.placed(path, canonical, shardings[path], np.dtype(np.float32)))
        parts = found if leaf_names.is_stacked(path) else [found]
        for name, part in zip(leaf_names.canonical_names(path), parts, strict=True):
            if name in expected and part.shape == expected[name].shape:
                np.testing.assert_array_equal(part, expected[name].astype(np.float32))


def test_a_sample_longer_than_the_bases_positions_is_refused(config):
    origin = train.load_origin(config)
    short = origin.config | {"max_position_embeddings": 90, "original_max_position_embeddings": 90}
    with pytest.raises(UserError, match="positions and the base has 90"):
        program.build_model(config, short, (), tokenizer_of(EMBEDDED, short), ())

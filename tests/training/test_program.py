"""What a program refuses to be built for."""

import jax
import pytest

from configs import stage2
from tests import tiny
from tghmoe_jax.errors import UserError
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.training import program


def test_the_ragged_transport_is_refused_on_devices_without_its_exchange():
    model = tiny.model(tgh={"transport": "ragged"})
    with pytest.raises(UserError, match="tgh.transport=ragged needs a TPU; use all_to_all or gather"):
        program.build(stage2.get_config(), model, None, make_mesh(devices=jax.devices()[:1]))

"""The auxiliary finding head: what a label's cells may and may not do to its logit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tghmoe_jax.models.mllm import AuxHead

B, L, A, W = 2, 6, 5, 8


def draw(seed: int, scale: float = 3.0):
    """Parameters of any sign, tokens, and phrases."""
    rng = np.random.default_rng(seed)
    params = {"scale": scale * rng.standard_normal((2, A)), "bias": rng.standard_normal(A)}
    return {"params": params}, rng.standard_normal((B, L, W)), rng.standard_normal((A, W))


def logits(params, tokens, mask, confined, phrases):
    return np.asarray(AuxHead(A).apply(params, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(confined), phrases))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_the_cells_of_a_label_alone_never_make_it_likelier(seed):
    """Only true labels are confined: were a smaller region worth a higher logit, nothing would have to be seen."""
    params, tokens, phrases = draw(seed)
    rng = np.random.default_rng(seed)
    mask = rng.random((B, L)) < 0.8
    mask[:, 0] = True
    everywhere = np.broadcast_to(mask[..., None], (B, L, A))
    confined = everywhere & (rng.random((B, L, A)) < 0.5)
    confined[:, 0] = True
    found, whole = (logits(params, tokens, mask, cells, phrases) for cells in (confined, everywhere))
    assert (found <= whole + 1e-5).all()


def test_a_token_along_a_labels_words_states_it_and_no_other_label():
    shapes = jnp.zeros((1, L, W)), jnp.ones((1, L), bool), jnp.ones((1, L, A), bool), jnp.ones((A, W))
    params = AuxHead(A).init(jax.random.key(0), *shapes)
    phrases = np.eye(A, W)
    tokens = np.zeros((1, L, W))
    tokens[0, 2] = 7 * phrases[3]
    mask = np.ones((1, L), bool)
    found = logits(params, tokens, mask, np.ones((1, L, A), bool), phrases)[0]
    assert found[3] > 3 and (np.delete(found, 3) < 0).all()
    hidden = mask.copy()
    hidden[0, 2] = False
    found = logits(params, tokens, hidden, np.broadcast_to(hidden[..., None], (1, L, A)), phrases)
    assert (found < 0).all(), "a token that is not visible states nothing"


@pytest.mark.parametrize("visible", [True, False])
def test_a_label_is_read_off_its_cells_unless_none_of_them_is_visible(visible):
    """The second of two slabs holds the label; where padding hides that slab, every visible token may state it."""
    model = tiny.model(layout="flat")
    model = model.clone(cfg=dataclasses.replace(model.cfg, aux_labels=((5,), (6, 7))))
    params = tiny.params(model)
    batch = tiny.batch(rows=2, slices=2)
    batch["slice_mask"][:, 1] = visible
    cells = np.zeros((2, 2, 2, 2, 2), bool)
    cells[:, 1, 0, 0] = True

    def aux(self, batch, cells):
        return self.aux_logits(self.encode(batch), cells)

    confined, free = (model.apply(tiny.tree(params), batch, c, method=aux) for c in (cells, None))
    assert np.allclose(confined, free) != visible

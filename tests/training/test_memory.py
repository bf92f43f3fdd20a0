"""Memory before the first step: refused where it cannot fit, told where it may not, nothing compiled twice."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tghmoe_jax.errors import UserError
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.tools.chips import GIB
from tghmoe_jax.training import memory


@jax.jit
def product(x):
    return jnp.sin(x @ x.T).sum() + (x.T @ x).sum()


X = np.ones((700, 600), np.float32)


def room(monkeypatch, total: float, free: float, device: bool = False) -> None:
    """A machine with so many bytes, whose two devices share them; or a device of its own memory."""
    monkeypatch.setattr(memory, "_of_device", lambda: (total, free, 1, "a device") if device else None)
    monkeypatch.setattr(memory, "_of_host", lambda: (total, free, 2, "of this machine's memory"))


def needs() -> tuple[int, int]:
    """Bytes of `product` for X: all of them, and those beside its argument."""
    analysis = product.lower(X).compile().memory_analysis()
    return memory.peak(analysis), memory.peak(analysis) - X.nbytes


@pytest.mark.parametrize("device", [True, False])
def test_a_program_is_refused_just_where_all_memory_is_too_little(monkeypatch, device):
    whole, more = needs()
    assert whole >= X.nbytes + 600 * 600 * 4 and more >= 600 * 600 * 4  # newer compilers never store the larger product
    programs = 1 if device else 2
    room(monkeypatch, programs * whole, programs * more, device)
    said = []
    assert memory.fitting("train", product, X, warn=said.append)(X) == product(X) and not said
    room(monkeypatch, programs * whole - 1, GIB, device)
    with pytest.raises(
        UserError, match="the train step needs 0.0. GiB (a device|of this machine's memory) and"
    ) as error:
        memory.fitting("train", product, X)
    assert error.value.code == 2 and "lower train.batch" in str(error.value) and "too few" in str(error.value)


@pytest.mark.parametrize("device", [True, False])
def test_a_program_that_needs_more_than_is_free_is_told_and_runs(monkeypatch, device):
    whole, more = needs()
    room(monkeypatch, GIB, (1 if device else 2) * more - 1, device)
    said = []
    assert memory.fitting("answer", product, X, warn=said.append)(X) == product(X)
    assert len(said) == 1 and said[0].startswith("warning: the answer step needs 0.") and "--new-tokens" in said[0]


def test_nothing_is_compiled_twice_and_shapes_of_another_kind_are_looked_at_again(monkeypatch, caplog):
    """What is looked at through a Reader's call is the program that then runs."""

    @jax.jit
    def encode(model, variables, x, shift):
        return x * variables + shift

    reader = Reader.__new__(Reader)
    reader.model, reader.variables, reader._programs = jnp.float32(0), jnp.float32(2), {}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for rows in (3, 3, 4):
            reader._call("encode", encode, jnp.zeros(rows), jnp.float32(1))
    lines = [one.getMessage() for one in caplog.records]
    assert sum("Finished XLA compilation of jit(encode)" in line for line in lines) == 2
    room(monkeypatch, 10, 10)
    reader._call("encode", encode, jnp.zeros(4), jnp.float32(1))
    with pytest.raises(UserError, match="the answer step needs"):
        reader._call("encode", encode, jnp.zeros(5), jnp.float32(1))


def test_without_a_figure_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "_of_device", lambda: None)
    monkeypatch.setattr(memory, "_of_host", lambda: None)
    assert memory.fitting("train", product, X)(X) == product(X)


def test_what_a_compiler_refuses_itself_is_the_same_sentence(monkeypatch):
    class Refusing:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm."
            )

    room(monkeypatch, 15.75 * GIB, GIB, device=True)
    with pytest.raises(UserError, match="needs 17.50 GiB a chip and 15.75 are there, 1.75 too few"):
        memory.fitting("train", Refusing())


@pytest.mark.parametrize(
    ("line", "files"),
    [
        (
            "0::/job\n",
            {"job/memory.max": "3000", "job/memory.current": "2500", "job/memory.stat": "anon 9\ninactive_file 700"},
        ),
        # A container, which sees its own group as the root.
        ("0::/job\n", {"memory.max": "3000", "memory.current": "2500", "memory.stat": "inactive_file 700"}),
        (
            "4:memory:/job\n1:cpu:/\n",
            {"memory/job/memory.limit_in_bytes": "3000", "memory/job/memory.usage_in_bytes": "2500",
             "memory/job/memory.stat": "inactive_file 700"},
        ),
    ],
)  # fmt: skip
def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path, line, files):
    (tmp_path / "cgroup").write_text(line)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "fs")
    assert memory._of_host()[:3] == (3000, 1200, jax.local_device_count())
    (tmp_path / "fs" / next(iter(files))).write_text("max\n")
    total, free, *_ = memory._of_host()
    assert total > GIB and 0 < free <= total

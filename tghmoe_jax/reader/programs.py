"""Programs that answer, traced once: the next process takes over what was traced, and its compiled form.

On a mesh each process traces its own.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import export

from tghmoe_jax.models.mllm import MLLM, EncodedVolume
from tghmoe_jax.models.tgh_moe import MoEStats
from tghmoe_jax.training import compile_cache

for _kind in (EncodedVolume, MoEStats):
    export.register_namedtuple_serialization(_kind, serialized_name=f"tghmoe_jax.{_kind.__name__}")


def prepare(function: Callable, model: MLLM, variables: Any, arguments: tuple) -> tuple[Callable, Callable]:
    """(program, given) with program(*given(variables, arguments)) = function(model, variables, *arguments).

    Both are jitted; `function` is static in its model and in the arguments that hold no array, `program` serves all
    arguments of these shapes.
    """
    if not (jax.sharding.get_mesh().empty and compile_cache.keeps_traced()):
        return function, lambda variables, arguments: (model, variables, *arguments)
    fixed = {i: one for i, one in enumerate(arguments) if not any(hasattr(x, "dtype") for x in jax.tree.leaves(one))}

    def given(variables, arguments):
        return variables, *(one for i, one in enumerate(arguments) if i not in fixed)

    def called(variables, *arrays):
        rest = iter(arrays)
        return _named(
            function(model, variables, *(fixed[i] if i in fixed else next(rest) for i in range(len(arguments))))
        )

    name = f"{function.__module__}.{function.__qualname__} of {model} for {fixed}"
    traced = compile_cache.recall_traced(name, jax.jit(called), *given(variables, arguments))

    def program(*arrays):
        return _numbered(traced(*arrays))

    program.__name__ = function.__name__  # for profiles
    return jax.jit(program), given


def _named(result: Any) -> Any:
    """The statistics of layers under texts: keys of what is kept must be."""
    if isinstance(result, EncodedVolume):
        return result._replace(stats={str(layer): one for layer, one in result.stats.items()})
    return result


def _numbered(result: Any) -> Any:
    if isinstance(result, EncodedVolume):
        return result._replace(stats={int(layer): one for layer, one in result.stats.items()})
    return result

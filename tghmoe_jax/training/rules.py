"""One regex language for which leaves train, at which rate and with which decay; exactly one rule decides each.

Patterns match canonical names (models/leaf_names.py) in full.
"""

from collections.abc import Iterable, Sequence

from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names


def trainable(paths: Iterable[str], patterns: Sequence[str]) -> dict[str, bool]:
    """{leaf path: trains}. UserError where a pattern matches nothing or only some layers of a scanned run."""
    paths = list(paths)
    result = dict.fromkeys(paths, False)
    for pattern in patterns:
        hits = [path for path in paths if _match(pattern, path, "trainable")]
        if not hits:
            raise UserError(
                f"--config.trainable holds the pattern {pattern!r}, which matches no parameter; correct or remove it."
            )
        result.update(dict.fromkeys(hits, True))
    return result


def first_match(
    paths: Iterable[str], rules: Sequence[tuple[str, float]], default: float, flag: str
) -> dict[str, float]:
    """{leaf path: value of the first rule that matches}, else the default."""
    result = {}
    for path in paths:
        result[path] = next((value for pattern, value in rules if _match(pattern, path, flag)), default)
    return result


def _match(pattern: str, path: str, flag: str) -> bool:
    try:
        return leaf_names.matches(pattern, path)
    except ValueError as error:
        raise UserError(f"--config.{flag}: {error}.") from error

"""The texts about synthetic data, read from wordings.toml; lists become tuples."""

import tomllib
from pathlib import Path
from typing import Any


def _fixed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _fixed(part) for name, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


TEXTS: dict[str, Any] = _fixed(tomllib.loads(Path(__file__).with_name("wordings.toml").read_text(encoding="utf-8")))

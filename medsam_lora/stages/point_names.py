"""What the points of a sweep are called: names that a reader understands and every file system takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from medsam_lora.errors import ConfigError

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
# File systems take 255 bytes; a point's name is part of the names of temporary files as well.
_LONGEST: Final = 180


def key_names(keys: Sequence[str]) -> dict[str, str]:
    """Short names of keys: the last part, or the section of a ``name``; the whole key where two would share one.

    Examples
    --------
    >>> key_names(["method.rank", "slicing.name", "train.seed"])
    {'method.rank': 'rank', 'slicing.name': 'slicing', 'train.seed': 'seed'}
    >>> key_names(["slicing.seed", "train.seed"])
    {'slicing.seed': 'slicing.seed', 'train.seed': 'train.seed'}
    """
    short = {key: key.rpartition(".")[2] if not key.endswith(".name") else key.partition(".")[0] for key in keys}
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key for key, name in short.items()}


def text_of(value: Any) -> str:
    """A value as part of a name.

    Examples
    --------
    >>> [text_of(value) for value in (16, 1e-4, True, None, "alpha/sqrt(r)", ["q", "v"])]
    ['16', '0.0001', 'true', 'null', 'alpha-sqrt-r', 'q-v']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list):
        return "-".join(text_of(part) for part in value)
    text = _UNSAFE.sub("-", str(value)).strip("-") if isinstance(value, str) else str(value)
    return text or "empty"


def labelled(key: str, values: Any) -> dict[str, Any]:
    """The values of a key by their names: those given in a mapping, else made from the values.

    Raises
    ------
    ConfigError
        Where two values have one name, or a name cannot be part of a folder's.

    Examples
    --------
    >>> labelled("method.scaling", {"alpha": "alpha/r", "none": "none"}), labelled("method.rank", [4, 8])
    ({'alpha': 'alpha/r', 'none': 'none'}, {'4': 4, '8': 8})
    """
    if isinstance(values, Mapping):
        for name in values:
            if _UNSAFE.search(str(name)):
                raise ConfigError(
                    f"{key}: the name {name!r} has a character that folders do not take",
                    remedy="Use letters, digits and ._+- only.",
                )
        return {str(name): value for name, value in values.items()}
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"{key} needs a list of values, or a mapping of names to values", remedy=f"Write {key}: [1, 2]."
        )
    names = [text_of(value) for value in values]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two values of {key} are called {twice}", remedy="Give each once, or names: {alpha: alpha/r, none: none}."
        )
    return dict(zip(names, values, strict=True))


def check_names(label: str) -> None:
    """Refuse a name that is too long for a folder.

    Raises
    ------
    ConfigError
    """
    if len(label.encode()) > _LONGEST:
        raise ConfigError(
            f"the name of the point {label[:60]}… is too long for a folder",
            remedy="Give the values short names: {alpha: alpha/r}.",
        )

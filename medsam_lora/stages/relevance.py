"""Which settings have a say in what a method gives."""

from __future__ import annotations

from medsam_lora.config import Config, MethodConfig
from medsam_lora.errors import ConfigError, nearest
from medsam_lora.peft import LOW_RANK_OPTIONS, METHODS, method_spec

# What prediction needs of the settings of training.
_WITHOUT_TRAINING = ("train.regions", "train.postprocess")

DECIDING = ("method.name", "method.decoder", "method.scaling", "method.layers")
"""The keys on which it depends what else `reads` finds to be read."""


def check_key(key: str) -> None:
    """Refuse what is no key of the configuration.

    Raises
    ------
    ConfigError
        With the nearest key.

    Examples
    --------
    >>> check_key("method.rnak")
    Traceback (most recent call last):
        ...
    medsam_lora.errors.ConfigError: unknown key method.rnak; did you mean method.rank?...
    """
    known = [f"{s}.{k}" for s, field in Config.model_fields.items() for k in type(field.default).model_fields]
    if key not in known:
        guess = nearest(key, known)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"unknown key {key}{hint}", remedy="See medsam-lora config --schema for every key.")


def reads(config: Config, key: str) -> bool:
    """Whether a key has a say in the results of a method.

    Parameters
    ----------
    config : Config
        Of a run: its method, and what decides whether that reads the key.
    key : str
        ``section.key``.

    Examples
    --------
    >>> from medsam_lora.config import build_config
    >>> lora, zero_shot = (build_config({"method": {"name": name}}) for name in ("lora", "zero_shot"))
    >>> [reads(config, key) for config in (lora, zero_shot) for key in ("method.rank", "train.seed", "data.modalities")]
    [True, True, True, False, False, True]
    """
    section, _, name = key.partition(".")
    if section == "method":
        return name == "name" or _reads_option(config.method, name)
    # Nothing is trained, not even a learned fusion: `assemble.build_segmenter` freezes it.
    if config.method.name == "zero_shot":
        return (section not in ("train", "slicing") and key != "prompt.jitter_px") or key in _WITHOUT_TRAINING
    return True


def _reads_option(method: MethodConfig, name: str) -> bool:
    if name not in method_spec(method.name).options:
        return False
    parts = method.name.split("+")
    if name in LOW_RANK_OPTIONS:
        scaled = name != "alpha" or method.scaling != "none"
        return scaled and ("lora" in parts or method.decoder == "lora")
    if name == "blocks":
        # The neck and the patch embedding, which sam_parser decomposes, are in no block.
        return any(
            name in METHODS[part].options and (part != "sam_parser" or "linears" in method.layers) for part in parts
        )
    return True

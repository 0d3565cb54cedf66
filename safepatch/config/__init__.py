"""Configuration: a dataclass is the schema, a YAML file overrides its defaults, the command line overrides both.

Nothing misspelt and nothing of a wrong type gets through: each is one `ConfigError` line that says where it was
written, its full dotted key and what would be right.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from safepatch.config.nodes import choose, merge
from safepatch.config.sources import (
    COMMAND_LINE,
    Source,
    assigned,
    first_line,
    read_file,
    read_overrides,
    spelled_out,
    written_out,
)
from safepatch.errors import ConfigError, SafepatchError

__all__ = ["assigned", "load_config", "to_dict", "to_yaml"]

T = TypeVar("T")
Choices = Mapping[str, Mapping[str, type]]


def load_config(
    schema: type[T],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    choices: Choices | None = None,
    short: Mapping[str, str] | None = None,
) -> T:
    """The `schema` instance that `path` and then `overrides` describe.

    Args:
        schema: a dataclass; its defaults are the starting point.
        path: a YAML file, or None.
        overrides: `key.key=value` items, values in YAML.
        choices: for each polymorphic node, by dotted key, the dataclasses its `name` picks from, e.g.
            `{"objective": {"esd": ESDConfig}}`. Each of them has a field `name`.
        short: of nodes that may be written as one scalar, by their key, the field which that is: with
            `{"model": "path"}`, `model: x` is `model: {path: x}`.

    Raises:
        ConfigError: for anything unknown, missing, unreadable or of a wrong type.
    """
    sources = [Source(str(path), read_file(path))] if path is not None else []
    sources.append(Source(COMMAND_LINE, read_overrides([written_out(item, short or {}) for item in overrides])))
    sources = [Source(source.where, spelled_out(source.values, short or {})) for source in sources]
    config = OmegaConf.structured(schema)
    for key, table in (choices or {}).items():
        choose(config, key, table, sources)
    for source in sources:
        merge(config, source.values, source.where)
    return cast(T, _instantiate(config))


def to_dict(config: object) -> dict[str, Any]:
    """A config instance as plain dicts, lists and scalars: paths as text, enums by name."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(cast(Any, config))}


def to_yaml(config: object) -> str:
    """A config instance as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _instantiate(config: DictConfig) -> object:
    try:
        return OmegaConf.to_object(config)
    except Exception as error:
        raise (_own_error(error) or error) from None


def _own_error(error: BaseException) -> SafepatchError | None:
    """The error a `__post_init__` raised, whatever OmegaConf wrapped around it, or one for OmegaConf's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SafepatchError):
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key
        return ConfigError(f"no value for '{key}'; set it in the file or as {key}=... on the command line")
    if isinstance(error, OmegaConfBaseException):
        return ConfigError(f"'{error.full_key}': {first_line(error)}")
    return None

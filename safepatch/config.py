"""Configuration: a dataclass is the schema, a YAML file overrides its defaults, the command line overrides both.

Nothing misspelt and nothing of a wrong type gets through: each is one `ConfigError` line that says where it was
written, its full dotted key and what would be right.
"""

import dataclasses
import reprlib
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml  # OmegaConf's own parser, for its errors
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from safepatch.errors import ConfigError, SafepatchError, UnknownName, lookup, nearest

T = TypeVar("T")
Values = Mapping[Any, Any]
Choices = Mapping[str, Mapping[str, type]]

COMMAND_LINE = "command line"
MALFORMED = (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError)  # all that OmegaConf raises about input


@dataclasses.dataclass(frozen=True)
class Source:
    """One place where values were written, `where` being what an error calls it."""

    where: str
    values: Values


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
    sources = [Source(str(path), _read_file(path))] if path is not None else []
    sources.append(Source(COMMAND_LINE, _read_overrides([_written_out(item, short or {}) for item in overrides])))
    sources = [Source(source.where, _spelled_out(source.values, short or {})) for source in sources]
    config = OmegaConf.structured(schema)
    for key, table in (choices or {}).items():
        _choose(config, key, table, sources)
    for source in sources:
        _merge(config, source.values, source.where)
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


# Reading


def _read_file(path: Path) -> Values:
    try:
        content = OmegaConf.create(path.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}") from None
    except MALFORMED as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} holds a list; a config is `key: value` lines")
    return _raw(content)


def _read_overrides(overrides: Sequence[str]) -> Values:
    content = OmegaConf.create({})
    for item in overrides:
        if not item.partition("=")[0].strip() or "=" not in item:
            raise ConfigError(f"{COMMAND_LINE}: '{item}' is not key=value")
        try:
            content.merge_with_dotlist([item])
        except MALFORMED:
            raise ConfigError(
                f"{COMMAND_LINE}: cannot read '{item}'; the value must be YAML, quote it if in doubt"
            ) from None
    return _raw(content)


def _spelled_out(values: Values, short: Mapping[str, str]) -> Values:
    """`values` with each scalar that is short for a mapping written as that mapping."""
    return {
        key: {short[key]: value} if key in short and isinstance(value, str | int | float) else value
        for key, value in values.items()
    }


def _written_out(item: str, short: Mapping[str, str]) -> str:
    """`model=x` as `model.path=x`, so that it may stand beside `model.dtype=y`; `objective=esd` likewise."""
    key, equals, value = item.partition("=")
    is_short = equals and key.strip() in short and not value.lstrip().startswith("{")
    return f"{key.strip()}.{short[key.strip()]}={value}" if is_short else item


def _raw(content: DictConfig) -> Values:
    return cast(Values, OmegaConf.to_container(content, resolve=False))


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f", line {mark.line + 1}" if mark else ""
    return f"{line}: not valid YAML: {problem or _first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


# Choosing the schema of a polymorphic node


def _choose(config: DictConfig, key: str, table: Mapping[str, type], sources: Sequence[Source]) -> None:
    """Put the dataclass that the last given `<key>.name` picks from `table` in place of node `key`."""
    default = OmegaConf.select(config, key)
    name, where = (default.get("name") if isinstance(default, DictConfig) else None), "default"
    mentioned = False
    for source in sources:
        found, node = _dig(source.values, key)
        mentioned |= found
        if found and not isinstance(node, Mapping):
            raise ConfigError(f"{source.where}: {_is(key, node)}, expected a mapping with a name: {', '.join(table)}")
        if found and "name" in node:
            cast(dict, node)["name"] = name = _spelled(table, node["name"])
            where = source.where
    if name is None and mentioned:
        raise ConfigError(f"no value for '{key}.name'; known: {', '.join(table)}")
    if name is not None:
        _replace(config, key, _named(table, name, key, where))


def _named(table: Mapping[str, type], name: object, key: str, where: str) -> type:
    try:
        return lookup(table, str(name), what=key)
    except UnknownName as error:
        raise ConfigError(f"{where}: {error}") from None


def _spelled(table: Mapping[str, type], name: object) -> object:
    """`adv-unlearn` as the table has it, `adv_unlearn`."""
    plain = str(name).replace("-", "_")
    return plain if plain in table else name


def _dig(values: object, key: str) -> tuple[bool, Any]:
    """Whether the dotted `key` is in nested mappings, and what is there."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False, None
        values = values[part]
    return True, values


def _replace(config: DictConfig, key: str, schema: type) -> None:
    parent, _, leaf = key.rpartition(".")
    holder = OmegaConf.select(config, parent) if parent else config
    current = OmegaConf.select(holder, leaf)
    if current is None or OmegaConf.get_type(current) is not schema:  # an instance keeps its own values as defaults
        OmegaConf.set_readonly(holder, False)
        holder[leaf] = OmegaConf.structured(schema)


# Merging, dataclass by dataclass, so that every error knows its full key


def _merge(node: DictConfig, values: Values, where: str, prefix: str = "") -> None:
    """Write `values` into `node`, the node of a dataclass."""
    OmegaConf.set_readonly(node, False)  # OmegaConf makes the node of a frozen dataclass read-only
    schema = _schema_of(node)
    hints, fields = get_type_hints(schema), [field.name for field in dataclasses.fields(cast(Any, schema))]
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{name}' in {schema.__name__}{nearest(str(key), fields)}")
        current = None if OmegaConf.is_interpolation(node, key) else OmegaConf.select(node, key)
        try:
            _set(node, key, _typed(value, hints[key], current, where, name))
        except ConfigError:
            raise
        except MALFORMED:
            raise ConfigError(f"{where}: {_is(name, value)}, expected {_expected(hints[key])}") from None


def _set(node: DictConfig, key: str, value: object) -> None:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if any(isinstance(item, DictConfig) for item in items):
        node[key] = value  # merging would refill a frozen dataclass field by field, which OmegaConf refuses
    else:
        node.merge_with({key: value})  # assigning would warn where YAML's 1 becomes a float's 1.0


def _schema_of(node: DictConfig) -> type:
    """The dataclass whose node this is, or `dict`."""
    return OmegaConf.get_type(node) or dict


def _typed(value: object, hint: object, current: object, where: str, name: str) -> object:
    """`value` merged into `current`, with each mapping that stands for a dataclass made that dataclass's node.

    Built here because OmegaConf can neither fill a frozen dataclass nor name the full key inside a list.
    """
    hint, old = _without_none(hint), current if isinstance(current, DictConfig) else None
    if isinstance(value, Mapping) and (
        dataclasses.is_dataclass(hint) or (old is not None and _schema_of(old) is not dict)
    ):
        node = OmegaConf.structured(hint) if old is None else old
        _merge(node, value, where, f"{name}.")
        return node
    inner = get_args(hint) or (object, object)
    if isinstance(value, Mapping):
        merged = dict(old.items_ex(resolve=False)) if old is not None else {}
        items = {key: _typed(item, inner[-1], merged.get(key), where, f"{name}.{key}") for key, item in value.items()}
        return merged | items
    if isinstance(value, list):
        return [_typed(item, inner[0], None, where, f"{name}[{index}]") for index, item in enumerate(value)]
    return value


def _without_none(hint: object) -> object:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    left = [kind for kind in get_args(hint) if kind is not type(None)]
    return left[0] if len(left) == 1 else hint


def _is(name: str, value: object) -> str:
    return f"'{name}' is {reprlib.repr(value)} ({type(value).__name__})"


def _expected(hint: object) -> str:
    if dataclasses.is_dataclass(_without_none(hint)):
        return "a mapping"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


# Making the instance


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
        return ConfigError(f"'{error.full_key}': {_first_line(error)}")
    return None

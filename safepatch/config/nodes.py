"""Values on their way into OmegaConf's nodes, dataclass by dataclass, so that every error knows its full key."""

import dataclasses
import reprlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from safepatch.config.sources import MALFORMED, Source, Values
from safepatch.errors import ConfigError, UnknownName, lookup, nearest

# Choosing the schema of a polymorphic node


def choose(config: DictConfig, key: str, table: Mapping[str, type], sources: Sequence[Source]) -> None:
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


# Merging


def merge(node: DictConfig, values: Values, where: str, prefix: str = "") -> None:
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
        merge(node, value, where, f"{name}.")
        return node
    inner = get_args(hint) or (object, object)
    if isinstance(value, Mapping):
        merged = dict(old.items_ex(resolve=False)) if old is not None else {}
        items = {key: _typed(item, inner[-1], merged.get(key), where, f"{name}.{key}") for key, item in value.items()}
        return merged | items
    if isinstance(value, list):
        return [_typed(item, inner[0], None, where, f"{name}[{index}]") for index, item in enumerate(value)]
    if hint is float and str(value).lstrip(".").lower() == "nan":  # which passes comparisons that are to refuse it
        raise ConfigError(f"{where}: '{name}' is not a number (nan); write one")
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

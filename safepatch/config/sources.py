"""Where values are written: YAML files and the command line, read without knowing what they are for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml  # OmegaConf's own parser, for its errors
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from safepatch.errors import ConfigError

Values = Mapping[Any, Any]

COMMAND_LINE = "command line"
# All that OmegaConf raises about input.
MALFORMED = (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Source:
    """One place where values were written, `where` being what an error calls it."""

    where: str
    values: Values


def assigned(name: str, value: object) -> str:
    """`name=value` as the command line takes it, a text or a path being no YAML, whatever stands in it."""
    return f"{name}={json.dumps(str(value), ensure_ascii=False) if isinstance(value, str | Path) else value}"


def read_file(path: Path) -> Values:
    """What a YAML file says; raises `ConfigError` where it cannot be read, or holds no mapping."""
    try:
        content = OmegaConf.create(path.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}") from None
    except MALFORMED as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} holds a list; a config is `key: value` lines")
    return _raw(content)


def read_overrides(overrides: Sequence[str]) -> Values:
    """What `key.key=value` items say, the later before the earlier; raises `ConfigError` for one that is none."""
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


def spelled_out(values: Values, short: Mapping[str, str]) -> Values:
    """`values` with each scalar that is short for a mapping written as that mapping."""
    return {
        key: {short[key]: value} if key in short and isinstance(value, str | int | float) else value
        for key, value in values.items()
    }


def written_out(item: str, short: Mapping[str, str]) -> str:
    """`model=x` as `model.path=x`, so that it may stand beside `model.dtype=y`; `objective=esd` likewise."""
    key, equals, value = item.partition("=")
    is_short = equals and key.strip() in short and not value.lstrip().startswith("{")
    return f"{key.strip()}.{short[key.strip()]}={value}" if is_short else item


def _raw(content: DictConfig) -> Values:
    return cast(Values, OmegaConf.to_container(content, resolve=False))


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f", line {mark.line + 1}" if mark else ""
    return f"{line}: not valid YAML: {problem or first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an error says, without where in a file of OmegaConf's it happened."""
    return str(error).partition("\n")[0]

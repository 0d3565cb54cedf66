"""Detectors whose networks are ONNX files of other packages: found where the user installed them, never shipped."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch.detectors.weights import first_line, sha256_of
from safepatch.errors import ConfigError, ModelNotFound, UnsupportedModel

Network = Callable[[NDArray], NDArray]  # its one input, float32, to its first output


class OnnxFile(NamedTuple):
    """A network's file.

    Attributes:
        path: of it.
        version: for people.
        sha256: of it.
    """

    path: Path
    version: str
    sha256: str


def find_file(detector: str, source: str | Path | None, package: str, module: str, name: str) -> OnnxFile:
    """The file that `source` names, itself or its folder; by default the one in an installed package, unimported.

    Args:
        detector: whose, for messages.
        source: a file, a folder, or None.
        package: to install, by its name on PyPI.
        module: that it installs.
        name: of the file in it.

    Raises:
        ModelNotFound: when there is no such file; it says what to install.
    """
    if source is not None:
        path = Path(source).expanduser()
        path = path / name if path.is_dir() else path
        if not path.is_file():
            raise ModelNotFound(f"no {path} for detector '{detector}'; give its ONNX file: {detector}@FILE")
        return OnnxFile(path, str(source), sha256_of([path]))
    found = importlib.util.find_spec(module)
    path = Path(found.origin).parent / name if found and found.origin else None
    if path is None or not path.is_file():
        raise ModelNotFound(
            f"detector '{detector}' needs a package that is not installed: pip install {package} onnxruntime; or give "
            f"its ONNX file: {detector}@FILE"
        )
    return OnnxFile(path, f"{package} {name}", sha256_of([path]))


def open_session(path: Path) -> Network:
    """The network in a file, on the CPU.

    Raises:
        ConfigError: without onnxruntime.
        UnsupportedModel: when the file cannot be read.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports] -- an extra
    except ImportError:
        raise ConfigError(f"{path.name} needs onnxruntime: pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedModel(f"{path} cannot be read as ONNX ({first_line(error)}); install it again") from error
    entry = session.get_inputs()[0].name
    return lambda values: np.asarray(session.run(None, {entry: values})[0])

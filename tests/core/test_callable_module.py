"""A package that can be called: it stays a package, and the call reaches the verb with everything it was given."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from robustvlm.core.registry import make_callable


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kitchen"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from robustvlm.core.registry import make_callable\n"
        "SALT = 1\n"
        "class Pot: pass\n"
        "make_callable(__name__, 'kitchen.stove:cook')\n"
    )
    (folder / "stove.py").write_text("def cook(dish, *, minutes=5):\n    return dish, minutes\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("kitchen", "kitchen.stove"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.usefixtures("kitchen")
def test_called_it_hands_on_and_otherwise_it_is_the_module_that_it_was() -> None:
    package = importlib.import_module("kitchen")
    assert "kitchen.stove" not in sys.modules
    assert callable(package)
    assert package("soup", minutes=7) == ("soup", 7)
    with pytest.raises(TypeError, match=r"cook\(\) got an unexpected keyword argument 'hours'"):
        package("soup", hours=1)
    assert package.SALT == 1
    assert sys.modules["kitchen"] is package
    assert importlib.import_module("kitchen.stove").cook("rice") == package("rice")
    with pytest.raises(AttributeError, match="module 'kitchen' has no attribute 'pepper'"):
        _ = package.pepper
    assert isinstance(pickle.loads(pickle.dumps(package.Pot())), package.Pot)
    again = importlib.reload(package)
    assert again is package
    assert again("tea", minutes=1) == ("tea", 1)


def test_a_module_that_was_not_imported_cannot_be_made_callable() -> None:
    with pytest.raises(KeyError):
        make_callable("no_such_module_here", "math:hypot")


def test_it_loads_nothing() -> None:
    code = "import sys, robustvlm.core.registry; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"

"""How mkdocstrings is to read the docstrings: our `Example:` is what it calls `Examples:`, a block of doctests."""

from __future__ import annotations

from typing import Any

import griffe


class OneExample(griffe.Extension):
    """Call the section by the name that is known."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it in the docstring of whatever has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

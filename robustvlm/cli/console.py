"""The console of rich that every command draws on; it trusts no text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.errors import MarkupError
from rich.segment import Segment
from rich.text import Text

from robustvlm.text import visible, without_secrets


class Console(RichConsole):
    r"""A console that shows control characters in texts as escapes, cuts secrets, and leaves `:names:` as they are.

    Example:
        >>> console = Console(width=60)
        >>> console.print("a\x1b[2Jb :cat: [/no markup]")
        a\x1b[2Jb :cat: [/no markup]
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, quiet=quiet, width=width, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a string as a text; one that is no valid markup is taken as it stands."""
        text = _fit(text)
        try:
            return super().render_str(text, **settings)
        except MarkupError:
            return super().render_str(text, **(settings | {"markup": False}))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything that can be drawn."""
        if isinstance(renderable, Text) and _fit(renderable.plain) != renderable.plain:
            renderable = Text(
                _fit(renderable.plain),
                renderable.style,
                justify=renderable.justify,
                overflow=renderable.overflow,
                no_wrap=renderable.no_wrap,
                end=renderable.end,
            )
        return super().render(renderable, options)


def _fit(text: str) -> str:
    return visible(without_secrets(text))

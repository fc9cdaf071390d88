"""What `mkdocs` is told beyond mkdocs.yml: pages that lie outside docs/, links between them, notebooks to download.

The files keep links that work where they lie, in a checkout; here they become links of the site. Benchmarks, examples
and the change log have the addresses `benchmarks/...`, `examples/...` and `CHANGELOG.md` beside the pages of docs/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "examples/*")

_LINK = re.compile(r"(?P<before>\]\()(?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?(?P<after>\))")


def outside() -> list[str]:
    """Return the files that the site takes from outside docs/, as paths from the root."""
    found = (path for pattern in OUTSIDE for path in ROOT.glob(pattern) if path.is_file())
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def in_repository(page: str) -> str:
    """Return where a page of the site lies, as a path from the root.

    Example:
        >>> in_repository("attacks.md"), in_repository("benchmarks/README.md")
        ('docs/attacks.md', 'benchmarks/README.md')
    """
    return page if page.startswith(("benchmarks/", "examples/")) or page in OUTSIDE else f"docs/{page}"


def in_site(file: str) -> str:
    """Return the address of a file, given as a path from the root: the inverse of `in_repository`."""
    return file.removeprefix("docs/")


def links_of(text: str) -> list[tuple[str, str]]:
    """Return path and anchor of every relative link of a page.

    Example:
        >>> links_of("[a](runs.md#resume), [b](https://c.d/e), [f](#here)")
        [('runs.md', '#resume')]
    """
    return [(link["path"], link["anchor"] or "") for link in _LINK.finditer(text)]


def linked(text: str, page: str) -> str:
    """Return the Markdown of a page with its relative links as they have to be in the site.

    Example:
        >>> linked("[figures](../benchmarks/README.md#start)", "checks.md")
        '[figures](benchmarks/README.md#start)'
        >>> linked("[how](../docs/models.md)", "examples/README.md")
        '[how](../models.md)'
    """
    here = posixpath.dirname(in_repository(page))

    def moved(link: re.Match[str]) -> str:
        target = in_site(posixpath.normpath(posixpath.join(here, link["path"])))
        path = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{link['before']}{path}{link['anchor'] or ''}{link['after']}"

    return _LINK.sub(moved, text)


def notebooks() -> dict[str, Path]:
    """Return the notebooks that `python -m tools.tutorials` has made, by their addresses in the site."""
    return {f"notebooks/{path.name}": path for path in sorted((ROOT / "build/notebooks").glob("*.ipynb"))}


def on_files(files: Any, config: Any) -> Any:
    """Add the files from outside docs/ (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    for address, path in ({name: ROOT / name for name in outside()} | notebooks()).items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Move the links of a page, and say where the notebook of a tutorial is (a hook of mkdocs)."""
    address = page.file.src_uri
    text = linked(markdown, address)
    notebook = f"notebooks/{Path(address).stem}.ipynb"
    if address.startswith("tutorials/") and notebook in notebooks():
        link = f"[Download as a notebook](../{notebook}){{ .notebook download }}"
        text = text.replace("\n\n", f"\n\n{link}\n\n", 1)
    return text

"""Where the project lives: written once into what is published, when there is such a place.

    python -m tools.address https://host.example/group/robustvlm

writes the URLs into pyproject.toml and the repository into CITATION.cff, for a person to commit. Until then neither
names a place, and `make upload` refuses: a package index shows links of a release for ever. The README's links into
the checkout are made whole in the copy that a release is built from, as GitHub, GitLab, Forgejo and Gitea have them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
_SECTION = re.compile(r"\[project\.urls\]\n(?:[^\[\n][^\n]*\n|\n(?!\[))*\n*")
_BEFORE = "[project.scripts]\n"
_CITED = re.compile(r"^repository-code: .*\n", re.M)
_LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<path>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)")


def checked(address: str) -> str:
    """Return the address of a repository without a slash at its end.

    Raises:
        ValueError: it is none that a reader could follow.

    Example:
        >>> checked("https://host.example/group/name/")
        'https://host.example/group/name'
    """
    parts = urlsplit(address)
    if parts.scheme != "https" or not parts.hostname or not parts.path.strip("/"):
        raise ValueError(f"'{address}' is no address of a repository, such as https://host.example/group/robustvlm")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"'{parts.hostname}{parts.path}' carries a name, a password, a query or a fragment")
    return address.rstrip("/")


def with_urls(pyproject: str, address: str) -> str:
    """Return the text of pyproject.toml with its URLs, in the place of those that it has.

    Example:
        >>> print(with_urls("[project.scripts]\\na = 1\\n", "https://host.example/a/b"))
        [project.urls]
        Homepage = "https://host.example/a/b"
        Source = "https://host.example/a/b"
        Issues = "https://host.example/a/b/issues"
        <BLANKLINE>
        [project.scripts]
        a = 1
        <BLANKLINE>
    """
    places = {"Homepage": address, "Source": address, "Issues": f"{address}/issues"}
    section = "".join(f'{name} = "{place}"\n' for name, place in places.items())
    before, found, after = _SECTION.sub("", pyproject).partition(_BEFORE)
    if not found:
        raise ValueError(f"pyproject.toml has no section {_BEFORE.strip()} to put the URLs before")
    return f"{before}[project.urls]\n{section}\n{found}{after}"


def with_repository(citation: str, address: str) -> str:
    """Return the text of CITATION.cff with the repository.

    Example:
        >>> with_repository("type: software\\n", "https://host.example/a/b")
        'type: software\\nrepository-code: "https://host.example/a/b"\\n'
    """
    return f'{_CITED.sub("", citation).rstrip()}\nrepository-code: "{address}"\n'


def address_in(pyproject: str) -> str | None:
    """Return the address that the text of pyproject.toml names, or None."""
    found = re.search(r'^\[project\.urls\]\n(?:[^\[]*\n)?Source = "([^"]+)"', pyproject, re.M)
    return found[1] if found else None


def whole_links(readme: str, address: str) -> str:
    """Return Markdown with links that lead from anywhere, where they led from the root of a checkout.

    Example:
        >>> whole_links("[a](docs/a.md#b), ![c](d.png), [e](https://f.g), [h](#i)", "https://github.com/x/y")
        '[a](https://github.com/x/y/blob/HEAD/docs/a.md#b), ![c](https://github.com/x/y/raw/HEAD/d.png), [e](https://f.g), [h](#i)'
    """  # noqa: E501
    host = urlsplit(address).hostname or ""
    page, file = "blob/HEAD", "raw/HEAD"
    if "gitlab" in host:
        page, file = "-/blob/HEAD", "-/raw/HEAD"
    elif any(name in host for name in ("codeberg", "forgejo", "gitea")):
        page, file = "src/branch/main", "raw/branch/main"

    def whole(link: re.Match[str]) -> str:
        way = file if link["image"] else page
        return f"{link['image']}[{link['words']}]({address}/{way}/{link['path']}{link['anchor'] or ''})"

    return _LINK.sub(whole, readme)


def main(root: Path = ROOT) -> None:
    """Write the address into the two files."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        address = checked(sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
    for name, change in (("pyproject.toml", with_urls), ("CITATION.cff", with_repository)):
        path = root / name
        path.write_text(change(path.read_text(encoding="utf-8"), address), encoding="utf-8")
    print(f"pyproject.toml and CITATION.cff name {address}: look at them, and commit them")


if __name__ == "__main__":
    main()

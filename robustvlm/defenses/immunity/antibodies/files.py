"""Antibodies in files: JSON by class, a CSV table, or lines; and writing them, so that they can be read and edited."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robustvlm.core.reading import parse_json
from robustvlm.data.names import name_key, read_text
from robustvlm.defenses.immunity.antibodies.entries import Entry, to_proposal
from robustvlm.defenses.immunity.antibodies.texts import HARD_NEGATIVE, AntibodySource, AntibodyText, Proposal
from robustvlm.errors import UserError, nearest

_LONGEST = 300
_FORM = '{"classes": {"dog": {"same": [...], "look_alikes": ["wolf", ...], "impossible": [...]}}} or {"dog": ["wolf"]}'


class FileSource(AntibodySource):
    """Antibodies in a file of the user's.

    * `.json`: `{"classes": {CLASS: {"same": [...], "look_alikes": [...], "impossible": [...]}}}`, the form of the
      bundled banks, or in short `{CLASS: [TEXT, ...]}`;
    * `.csv`: a header `class,text` and, if wanted, `kind` (hard-negative or context);
    * anything else: lines `CLASS: TEXT`; blank lines and # comments are skipped.

    Classes are matched without regard to case, "_" and "-"; those that the data does not have are an error.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def propose(self, class_names: Sequence[str]) -> Proposal:
        """Return what the file holds.

        Raises:
            UserError: no such file, not of its form, an unknown class, an empty or overlong text, nothing in it.
        """
        text = read_text(self.path, "antibodies")
        known = {name_key(name): name for name in class_names}
        suffix = self.path.suffix.lower()
        if suffix == ".json":
            proposal = to_proposal({self._class(name, known): entry for name, entry in self._json(text).items()})
        else:
            rows = self._csv(text) if suffix == ".csv" else self._lines(text)
            proposal = Proposal(tuple(AntibodyText(text, self._class(name, known), kind) for name, text, kind in rows))
        if not proposal.texts:
            raise UserError(f"the antibodies file {self.path} holds no text")
        for item in proposal.texts:
            if not item.text.strip() or len(item.text) > _LONGEST:
                what = "an empty text" if not item.text.strip() else f"a text of {len(item.text)} characters"
                raise UserError(f"{self.path}: '{item.of_class}' has {what}: write noun phrases, as 'wolf'")
        return proposal

    def _class(self, name: str, known: Mapping[str, str]) -> str:
        if name_key(name) not in known:
            raise UserError(f"{self.path}: '{name}' is no class of the data: {nearest(name, known.values())}")
        return known[name_key(name)]

    def _json(self, text: str) -> dict[str, Entry]:
        try:
            content: Any = parse_json(text)
        except ValueError as error:
            raise UserError(f"{self.path} is not valid JSON: {error}") from None
        classes = content.get("classes", content) if isinstance(content, dict) else None
        if not isinstance(classes, dict):
            raise UserError(f"{self.path} must hold {_FORM}")
        entries = {}
        for name, entry in classes.items():
            try:
                entries[name] = Entry.model_validate({"look_alikes": entry} if isinstance(entry, list) else entry)
            except ValidationError:
                raise UserError(f"{self.path}: the entry of '{name}' is not of the form {_FORM}") from None
        return entries

    def _csv(self, text: str) -> list[tuple[str, str, str]]:
        table = csv.DictReader(io.StringIO(text))
        try:
            return self._rows(table)
        except csv.Error as error:
            raise UserError(f"{self.path} is not valid CSV: {error}") from None

    def _rows(self, table: csv.DictReader[str]) -> list[tuple[str, str, str]]:
        columns = [name.strip().lower() for name in table.fieldnames or ()]
        if not {"class", "text"} <= set(columns):
            raise UserError(f"{self.path}: a CSV of antibodies begins with the header class,text or class,text,kind")
        table.fieldnames = columns
        return [
            ((row["class"] or "").strip(), (row["text"] or "").strip(), (row.get("kind") or HARD_NEGATIVE).strip())
            for row in table
        ]

    def _lines(self, text: str) -> list[tuple[str, str, str]]:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, colon, phrase = line.partition(":")
            if not colon:
                raise UserError(f"{self.path}: line {number} must be CLASS: TEXT, as 'dog: wolf', got '{line[:60]}'")
            rows.append((name.strip(), phrase.strip(), HARD_NEGATIVE))
        return rows

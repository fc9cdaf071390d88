"""What every run's files hold and how they are read back: parts of summaries, rows, and conditions put to them."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from robustvlm.core.files import first_line, read_object, replacing, require_regular
from robustvlm.errors import UserError, nearest
from robustvlm.runs.manifest import NAME, require_shape

# What every run's summary is made of

Level = Literal["ok", "note", "warning", "fault"]


class Record(BaseModel):
    """What a file of a run holds: fixed once made, and nothing in it that this version does not know."""

    # Releases of pydantic before 2.10 warn of names that begin with "model_".
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Passes(Record):
    """Encoder passes by what they were made for; together they are all passes of the run.

    Args:
        images: given to images under attack, what rows and attacks count as theirs, for all goals.
        spare: rows that only filled a batch up, or whose work was lost when a session ended.
        clean: of the clean pass, and of further looks at clean images that a goal needs.
        questions: put to the model before the attacks.
        checks: of the extra attacks on a sample.
        untold: of sessions that did not tell them apart.
    """

    images: int = 0
    spare: int = 0
    clean: int = 0
    questions: int = 0
    checks: int = 0
    untold: int = 0

    @property
    def total(self) -> int:
        """All passes."""
        return self.images + self.spare + self.clean + self.questions + self.checks + self.untold


class Cost(Record):
    """Encoder passes (one image through the encoder once) and wall time; `model_seconds` is the part inside it.

    `passes` says what forward and backward passes were made for, and sums to both together.
    """

    forward_passes: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    passes_per_second: float = 0.0
    passes: Passes | None = None


class Drawn(Record):
    """How a random model is asked: draws under a gradient, draws that judge, and more in which a success is to hold."""

    eot: int
    draws: int
    upholding: int


def read_drawn(path: Path) -> Drawn | None:
    """Return how the run of a summary asked a random model; None where there is no summary or it does not say."""
    try:
        known = read_object(path).get("drawn")
    except FileNotFoundError:
        return None
    if known is None:
        return None
    require_shape(Drawn, known, path)
    return Drawn.model_validate(known)


class Estimate(Record):
    """What the attacks will cost at least (all images fall at the first point) and at most (all stay robust).

    Args:
        images: images still to be attacked.
        passes_least, passes_most: encoder passes, padded rows included.
        seconds_least, seconds_most: wall time on the processes of the run, from the speed of the first passes.
        unknown: attacks of other packages, whose cost is not known and comes on top.
        second_looks: so do second looks at more than one apparent success of an image.
        likely_least, likely_most: passes of the whole run as its first finished images let expect, no bounds;
            likely_after: how many answers there were by then. None where the run was over before.
    """

    images: int
    passes_least: int
    passes_most: int
    seconds_least: float
    seconds_most: float
    unknown: list[str] = []
    likely_least: int | None = None
    likely_most: int | None = None
    likely_after: int | None = None
    second_looks: bool = False


class Check(Record):
    """A check of the evaluation itself, with its finding in words."""

    name: str
    level: Level
    message: str


class UnreadableImage(Record):
    """An image that could not be decoded, and why."""

    id: str
    reason: str


# Finished runs read back: which folder is meant, its JSON files, and its rows; one clear error for what is wrong


def find_run(name: str | Path, *, root: Path = Path("runs")) -> Path:
    """Return the folder of a run, or of several, given by path or by its name under `root`; UserError for none.

    Where both are folders, one without a run in it, such as the images that a run is named after, is not meant.
    """
    folders = [folder for folder in (Path(name), root / name) if folder.is_dir()]
    if folders:
        return next(filter(_has_runs, folders), folders[0])
    known = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    none = f"there are no runs under '{root}/': make one with `robustvlm attack` or `robustvlm certify`"
    hint = nearest(str(name), known) if known else none
    raise UserError(f"no run '{name}': expected a run folder or the name of one under '{root}/'; {hint}")


def _has_runs(folder: Path) -> bool:
    try:
        return any((place / NAME).is_file() for place in (folder, *folder.iterdir()))
    except OSError:
        return False


def read_rows(path: Path, wanted: pa.Schema, *, if_absent: str, again: str) -> pa.Table:
    """Return the table of a finished run, all its columns, after a look at those that are `wanted`.

    Args:
        wanted: names and types; a type of the same family (another width) will do. Fields that are not nullable must
            hold a value in every row.
        if_absent: what to say where there is no file; again: how the run is made again.

    Raises:
        UserError: there is no such file, it is damaged, or a column is missing or of another kind.
    """
    try:
        require_regular(path)
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(if_absent) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}' ({first_line(error)}): {again}") from None
    for field in wanted:
        if field.name not in table.column_names:
            raise UserError(f"'{path}' lacks the column '{field.name}': {again}")
        column = table.column(table.column_names.index(field.name))
        if _family(column.type) != _family(field.type) and not (field.nullable and pa.types.is_null(column.type)):
            raise UserError(f"the column '{field.name}' of '{path}' is {column.type}, expected {field.type}: {again}")
        if column.null_count and not field.nullable:
            raise UserError(f"the column '{field.name}' of '{path}' has rows without a value: {again}")
    return table


def required(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Return some fields of a schema, as ones that every row has a value of.

    Example:
        >>> from robustvlm.commands.attack.store import SCHEMA
        >>> required(SCHEMA, ["label"]).field("label").nullable
        False
    """
    return pa.schema([pa.field(name, schema.field(name).type, nullable=False) for name in names])


def _family(kind: pa.DataType) -> str:
    tests = (
        ("whole numbers", pa.types.is_integer),
        ("numbers", pa.types.is_floating),
        ("text", lambda one: pa.types.is_string(one) or pa.types.is_large_string(one)),
        ("truth values", pa.types.is_boolean),
    )
    return next((name for name, test in tests if test(kind)), str(kind))


def write_rows(path: Path, table: pa.Table) -> None:
    """Write the rows as Parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


# Conditions put to a summary, as `--fail-if` writes them: a comparison, and when it holds

_FORM = re.compile(r"\s*([^\s<>=]+?)(?:\.(low|high))?\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*(%?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


class Bounded(Protocol):
    """A number with its interval; `value` is None where nothing was counted."""

    @property
    def value(self) -> float | None:
        """The number itself."""

    @property
    def low(self) -> float:
        """Lower end of its interval."""

    @property
    def high(self) -> float:
        """Upper end of its interval."""


@dataclass(frozen=True)
class Comparison:
    """A quantity, or an end of its interval, set against a threshold.

    Args:
        text: the comparison as it was written.
        left: what is compared, which every command reads in its own way.
        part: "value", "low" or "high"; sign: ">", "<", ">=" or "<=".
        threshold: the number, a hundredth of what was written where that was in per cent; percent: whether it was.
    """

    text: str
    left: str
    part: str
    sign: str
    threshold: float
    percent: bool = False

    def require_share(self) -> None:
        """Raise a UserError unless the threshold is one that a share of images can have."""
        if not 0 <= self.threshold <= 1:
            # A share never gets there, so a mistyped percentage would switch the check off without a word.
            meant = not self.percent and 1 < self.threshold <= 100
            hint = f": for per cent write {self.left}{self.sign}{self.threshold:g}%" if meant else ""
            raise UserError(f"the threshold in '{self.text}' is outside [0, 1]{hint}")

    def holds_for(self, found: Bounded | float | None) -> bool:
        """Whether it is true of a number.

        What has no value, or NaN, cannot be checked. A gate that nobody could check must not open, so the comparison
        counts as true then.
        """
        number = self._number(found)
        return number is None or math.isnan(number) or _COMPARE[self.sign](number, self.threshold)

    def _number(self, found: Bounded | float | None) -> float | None:
        """Return the part that is compared; None where there is no value, whatever the interval says."""
        if found is None or isinstance(found, (int, float)):
            return found
        if found.value is None or math.isnan(found.value):
            return None
        return {"value": found.value, "low": found.low, "high": found.high}[self.part]


def parse_comparison(text: str, left: re.Pattern[str], *, example: str) -> Comparison:
    """Return the comparison of a text `LEFT[.low|.high] (>|<|>=|<=) NUMBER[%]`.

    Args:
        left: what the left side may look like; example: what an error shows.

    Raises:
        UserError: the text is no such comparison.

    Example:
        >>> parse_comparison("asr.low > 50%", re.compile("[a-z]+"), example="asr>0.5")
        Comparison(text='asr.low > 50%', left='asr', part='low', sign='>', threshold=0.5, percent=True)
    """
    match = _FORM.fullmatch(text)
    if not match or not left.fullmatch(match[1]):
        raise UserError(f"cannot read the condition '{text}': expected for example {example}")
    name, part, sign, number, percent = match.groups()
    try:
        threshold = float(number) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"'{number}' in the condition '{text}' is no number") from None
    return Comparison(text, name, part or "value", sign, threshold, bool(percent))

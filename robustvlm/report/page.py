"""The page every report is, made of a template and values, and the pictures on it."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from robustvlm import __version__
from robustvlm.core.files import require_regular, write_text
from robustvlm.errors import UserError
from robustvlm.report import copies, words
from robustvlm.report import sections as doc
from robustvlm.report.words import percent, plain
from robustvlm.runs.manifest import FILES, NAME
from robustvlm.text import one_line

# The page every report is: one HTML file that needs no network and no script, made of a template and values


def page(template: str, **values: Any) -> str:
    """Return a template of this package filled with `values`, everything in them escaped; a value it lacks raises."""
    return _environment().get_template(template).render(**values)


def page_of(report: doc.Report) -> str:
    """Return a report as a page.

    Example:
        >>> from robustvlm.report.sections import Report, Section, Text, Verdict
        >>> report = Report("test", "run", "Test", "on data", [Verdict(["<b>"])], [Section("One", [Text("two")])])
        >>> "<p>&lt;b&gt;</p>" in page_of(report)
        True
    """
    return page("report.html.j2", report=report)


_PAGES = {"report.html", "report.md", "report.tex"}


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all; UserError where that cannot be done, or would be over a run's own files."""
    own = FILES.keys() - _PAGES
    if (path.parent / NAME).is_file() and (path.name in own or path.name.startswith("journal")):
        raise UserError(f"'{path}' is a file of the run itself: choose another name for the report")
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write the report to '{path}': {error.strerror or error}") from error


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong inside while a report is drawn into one line: the run's numbers are there all the same."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error, limit=200)}"
        raise UserError(
            f"the report of '{folder}' could not be drawn ({said}); its numbers are whole, in summary.json beside it: "
            "please report this with that file"
        ) from error


def write_report_of(folder: Path, out: Path | None, told: Callable[[Path], doc.Report]) -> Path:
    """Write the report of a run, by default to `report.html` in its folder, whole or not at all; return its path.

    Args:
        told: what reads the run in a folder and says all of it.

    Raises:
        UserError: the folder holds no finished run of that kind, or the report cannot be written.
    """
    path = out or folder / "report.html"
    with drawing(folder):
        text = page_of(told(folder))
    write_page(path, text)
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robustvlm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        plain=words.plain,
        percent=words.percent,
        interval=words.interval,
        moment=words.moment,
        norm=words.norm_name,
        sentence=words.sentence,
        line=_line,
        heads=_heads,
        on_page=_on_page,
        copies=copies.copies,
        too_long=copies.cut_to,
        kind=lambda block: type(block).__name__,
    )
    environment.globals.update(version=__version__, bar=words.bar)
    return environment


def _line(line: doc.Line) -> Markup:
    """Return a line of text as HTML; `format` escapes what is put in."""
    return Markup("").join(_word(part) for part in doc.parts_of(line))


def _word(part: str | doc.Code | doc.Name | doc.Small | doc.Measure) -> Markup:
    if isinstance(part, doc.Code):
        return Markup("<code>{}</code>").format(words.plain(part.text, part.limit))
    if isinstance(part, doc.Name):
        return Markup("<bdi>{}</bdi>").format(words.plain(part.text, part.limit))
    if isinstance(part, doc.Small):
        return Markup('<span class="small">{}</span>').format(doc.straight(part.text))
    if isinstance(part, doc.Measure):
        text = Markup("<strong>{}</strong>").format(doc.straight(part.text))
        return (
            text + Markup(' <span class="small">{}</span>').format(doc.straight(part.interval))
            if part.interval
            else text
        )
    return Markup("{}").format(doc.straight(part))


def _heads(columns: Sequence[doc.Column]) -> list[dict[str, Any]]:
    """Return the cells of the upper row of headings: groups of columns, and single columns, which reach down."""
    heads: list[dict[str, Any]] = []
    for group, some in groupby(columns, key=lambda column: column.group):
        if group:
            heads.append({"name": group, "title": None, "columns": list(some)})
        else:
            heads += [{"name": "", "title": column.title, "columns": [column]} for column in some]
    return heads


def _on_page(blocks: Sequence[doc.Block]) -> list[doc.Block]:
    return [
        block for block in blocks if not isinstance(block, doc.Closing) and getattr(block, "only", "both") != "terminal"
    ]


# Adversarial examples as pictures: clean, adversarial and their amplified difference, embedded as PNG

Pixels = npt.NDArray[np.float32]

_MAX_SIDE = 256
"""Larger pictures are scaled down for the page, or a gallery would weigh tens of megabytes."""


@dataclass(frozen=True)
class Example:
    """One gallery entry, ready to show: three data URIs, names and confidences in words."""

    image_id: str
    clean: str
    adversarial: str
    difference: str
    gain: int
    label: str
    clean_prediction: str
    prediction: str
    clean_confidence: str
    confidence: str
    attack: str
    eps: str
    clean_words: str | None = None
    words: str | None = None


def load_gallery(
    folder: Path, class_names: Sequence[str], eps_texts: dict[float, str], *, refused: str = "rejected"
) -> list[Example]:
    """Return the examples stored in `folder` in order of file name; files that cannot be read are left out.

    Args:
        refused: what stands in place of the class of an image that the model does not accept.
    """
    examples = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            examples.append(_load(path, class_names, eps_texts, refused))
        except (SafetensorError, OSError, KeyError, ValueError, IndexError):
            continue
    return examples


def _load(path: Path, class_names: Sequence[str], eps_texts: dict[float, str], refused: str) -> Example:
    require_regular(path)
    with safe_open(path, framework="np") as file:
        clean, adversarial = file.get_tensor("clean"), file.get_tensor("adversarial")
        about = file.metadata() or {}
    if clean.ndim != 3 or clean.shape[0] != 3 or clean.shape != adversarial.shape:
        raise ValueError(f"{path.name}: need two images of one shape [3, H, W]")
    shown, gain = amplified_difference(clean, adversarial)
    return Example(
        image_id=plain(about["image_id"]),
        clean=data_uri(clean),
        adversarial=data_uri(adversarial),
        difference=data_uri(shown),
        gain=gain,
        label=_name(class_names, about["label"], "an unknown class"),
        clean_prediction=_name(class_names, about["clean_prediction"], refused),
        prediction=_name(class_names, about["prediction"], refused),
        clean_confidence=percent(float(about["clean_confidence"])),
        confidence=percent(float(about["confidence"])),
        attack=plain(about["attack"]),
        eps=eps_texts.get(float(about["eps"]), about["eps"]),
        clean_words=_said(about, "clean_words"),
        words=_said(about, "words"),
    )


def _said(about: Mapping[str, str], name: str) -> str | None:
    return plain(about[name], 200) if name in about else None


def _name(class_names: Sequence[str], index: str, none: str) -> str:
    if int(index) == -1:
        return none
    if not 0 <= int(index) < len(class_names):
        raise ValueError(f"class {index} is not among {len(class_names)} classes")
    return class_names[int(index)]


def amplified_difference(clean: Pixels, adversarial: Pixels) -> tuple[Pixels, int]:
    """Return grey plus `gain` times the difference, and the largest whole gain that needs no clipping (at least 1).

    Example:
        >>> image = np.zeros((3, 1, 1), dtype=np.float32)
        >>> shown, gain = amplified_difference(image, image + 0.01)
        >>> (gain, shown.max().round(2).item())
        (50, 1.0)
    """
    difference = adversarial - clean
    largest = float(np.abs(difference).max(initial=0.0))
    # The small allowance keeps float32 rounding from turning 50 into 49.
    gain = max(1, int(0.5 / largest + 1e-3)) if largest > 0 else 1
    return np.clip(0.5 + gain * difference, 0.0, 1.0), gain


def data_uri(pixels: Pixels) -> str:
    """Return an image [3, H, W] with values in [0, 1] as a PNG data URI of 8 bits, at most 256 pixels a side."""
    array = np.rint(np.clip(np.nan_to_num(pixels), 0.0, 1.0) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

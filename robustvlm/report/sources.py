"""The papers behind attacks, certificates, methods, defences and scores: `references.bib`, and what rests on which.

Facts only: authors, title, year, place, arXiv number. Scores and test-time defences name their paper in their own
catalogues, by arXiv number; what attacks, claims and methods of training rest on stands in `OF`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_ENTRY = re.compile(r"^@\w+\{(\w+),\n(.*?)\n\}$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^  (\w+) = \{(.*)\},?$", re.MULTILINE)
_ARXIV = re.compile(r"(?<!\d)\d{4}\.\d{4,5}(?!\d)")
_UNNUMBERED = {"Liu et al., CVPR 2023": "liu2023", "Tong, Lai, Pan, Yin, CVPR 2025": "tong2025"}


@dataclass(frozen=True)
class Source:
    """A paper: its key, the fields of its entry, and the entry itself.

    Example:
        >>> print(papers()["goodfellow2015"].bibtex)
        @inproceedings{goodfellow2015,
          author = {Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian},
          title = {{Explaining and Harnessing Adversarial Examples}},
          booktitle = {International Conference on Learning Representations (ICLR)},
          year = {2015},
          eprint = {1412.6572},
          archivePrefix = {arXiv}
        }
    """

    key: str
    author: str
    title: str
    year: int
    arxiv: str
    bibtex: str

    @property
    def short(self) -> str:
        """The paper as a text cites it.

        Example:
            >>> papers()["croce2020fab"].short, papers()["perez2021"].short
            ('Croce and Hein, 2020', 'Pérez et al., 2021')
        """
        names = [name.partition(",")[0].replace("{\\'e}", "é") for name in self.author.split(" and ")]
        some = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
        return f"{some}, {self.year}"


@cache
def papers() -> dict[str, Source]:
    """Return every paper by its key, in the order of the file."""
    text = files("robustvlm.report").joinpath("references.bib").read_text(encoding="utf-8")
    found = {}
    for entry in _ENTRY.finditer(text):
        fields = dict(_FIELD.findall(entry[2]))
        title = fields["title"].strip("{}")
        about = (fields["author"], title, int(fields["year"]), fields.get("eprint", ""))
        found[entry[1]] = Source(entry[1], *about, entry[0])
    return found


OF: dict[str, dict[str, tuple[str, ...]]] = {
    "attack": {
        "fgsm": ("goodfellow2015",),
        "pgd": ("madry2018",),
        "apgd-ce": ("croce2020apgd",),
        "apgd-dlr": ("croce2020apgd",),
        "apgd-t": ("croce2020apgd",),
        "fab": ("croce2020fab",),
        "fab-t": ("croce2020fab",),
        "square": ("andriushchenko2020",),
        "fmn": ("pintor2021",),
        "autoattack": ("croce2020apgd",),
        "torchattacks": ("kim2020",),
    },
    "claim": {
        "feature": ("cohen2019", "xia2026"),
        "joint": ("cohen2019", "kumar2020", "xia2026"),
        "tokens": ("cohen2019", "xia2026"),
        "class": ("cohen2019", "kumar2020"),
        "vote": ("cohen2019",),
        "named": ("cohen2019",),
        "open-vote": ("cohen2019",),
        "topk": ("cohen2019", "jia2020"),
        "recall": ("cohen2019", "kumar2020"),
        "openset": ("cohen2019", "kumar2020", "fang2026"),
    },
    "threat": {
        "l2": (),
        "8bit": ("voracek2023",),
        "l1": ("yang2020",),
        **dict.fromkeys(("brightness", "contrast", "light", "gamma", "colour", "translation", "rotation"), ("li2021",)),
        **dict.fromkeys(("ellipsoid", "spectrum"), ("eiras2022",)),
    },
    "method": {
        "hierarchical": ("dong2026",),
        "tecoa": ("mao2023",),
        "fare": ("schlarmann2024",),
        "pmg": ("wang2024pmg",),
        "simclip": ("hossain2024",),
        "agft": ("cui2026",),
        "ucat": ("lu2026",),
        "distill": ("li2023distill", "zi2021"),
        "clean": (),  # fine-tuning without an attack, the control
    },
    "trainable": {"all": (), "lora": ("hu2022",), "ssf": ("lian2022",), "last": ()},
}
"""What attacks, claims and threats of certificates and methods of fine-tuning rest on, by their names."""


def of(kind: str, name: str) -> tuple[str, ...]:
    """Return the keys of the papers behind an attack, claim or method; none for the user's own.

    Options behind the name are left aside.

    Example:
        >>> of("attack", "apgd-ce:steps=50"), of("attack", "mine:attack")
        (('croce2020apgd',), ())
    """
    return OF[kind].get(name.partition("@" if kind == "threat" else ":")[0], ())


def named_in(text: str) -> tuple[str, ...]:
    """Return the keys of the papers that a catalogue's reference names.

    Example:
        >>> named_in("arXiv 2010.03759"), named_in("Liu et al., CVPR 2023"), named_in("a control of the same cost")
        (('liu2020',), ('liu2023',), ())
    """
    numbers = set(_ARXIV.findall(text))
    found = tuple(key for key, source in papers().items() if source.arxiv in numbers)
    return (*found, *(key for said, key in _UNNUMBERED.items() if said == text))


def cited(keys: Iterable[str]) -> str:
    """Return papers as a text cites them, in brackets; "" for none.

    Example:
        >>> cited(["cohen2019", "kumar2020"]), cited([])
        (' (Cohen et al., 2019; Kumar et al., 2020)', '')
    """
    said = "; ".join(papers()[key].short for key in keys)
    return f" ({said})" if said else ""


def bibliography(keys: Iterable[str]) -> str:
    """Return the BibTeX of papers, each once, in the order of the file; KeyError for one that there is not."""
    wanted = {papers()[key].key for key in keys}
    return "\n\n".join(source.bibtex for key, source in papers().items() if key in wanted)

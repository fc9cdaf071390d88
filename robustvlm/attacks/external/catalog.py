"""What the published packages offer for a ball of given norm and radius, and what they need."""

from __future__ import annotations

# How names of their attacks begin on the command line.
PACKAGES = ("torchattacks", "autoattack")

LINF, BOTH = ("Linf",), ("Linf", "L2")

# Attacks of torchattacks that keep inside a ball of radius eps, with the norms that they know.
TORCHATTACKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "DIFGSM", "TIFGSM", "Jitter",
            "NIFGSM", "PGDRS", "SINIFGSM", "VMIFGSM", "VNIFGSM", "SPSA", "PIFGSM", "PIFGSMPP",
        ),
        LINF,
    ),
    "PGDL2": ("L2",),
    "PGDRSL2": ("L2",),
    **dict.fromkeys(("APGD", "APGDT", "FAB", "Square", "AutoAttack"), BOTH),
}  # fmt: skip

_SMALLEST = "it looks for the smallest change instead of keeping inside eps: take fab-t"
_SPARSE = "it changes few pixels by any amount, which neither Linf nor L2 bounds"
_OTHER = "it is no attack inside a ball"

# Why the other names of torchattacks are refused.
UNBOUNDED: dict[str, str] = {
    **dict.fromkeys(("CW", "DeepFool", "EADEN", "EADL1"), _SMALLEST),
    **dict.fromkeys(("SparseFool", "OnePixel", "Pixle", "JSMA"), _SPARSE),
    **dict.fromkeys(("VANILA", "GN", "MultiAttack", "LGV"), _OTHER),
}

# What the run decides, so that no option may.
DECIDED = ("model", "eps", "max_epsilon", "norm", "seed", "verbose", "n_classes")

VERSIONS = ("standard", "plus", "rand")
SINGLE = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# Options of autoattack: steps of APGD and FAB, restarts, target classes, queries of Square.
AUTOATTACK_OPTIONS = ("steps", "restarts", "targets", "queries")

_DLR = "its DLR loss compares the first and the third logit"
_DLR_TARGETED = "its targeted DLR loss compares the first, the third and the fourth logit"


def fewest_classes(package: str, kind: str, options: dict[str, object]) -> tuple[int, str]:
    """Return how many classes an attack of a package needs at least, and why.

    Example:
        >>> fewest_classes("pyautoattack", "standard", {})
        (4, 'its targeted DLR loss compares the first, the third and the fourth logit')
    """
    targeted = {"pyautoattack": ("standard", "plus", "apgd-t"), "torchattacks": ("APGDT",)}[package]
    dlr = {"pyautoattack": ("rand", "apgd-dlr"), "torchattacks": ()}[package]
    if kind == "AutoAttack":
        return (3, _DLR) if options.get("version") == "rand" else (4, _DLR_TARGETED)
    if kind in targeted:
        return 4, _DLR_TARGETED
    if kind in dlr or options.get("loss") == "dlr":
        return 3, _DLR
    return 2, ""

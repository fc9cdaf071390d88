"""The end of every help page: commands to try as they stand, and where the page of the documentation is."""

import sysconfig
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "attack": (
        ("The bundled model and images, a few minutes", "robustvlm attack"),
        (
            "A security curve of an open_clip model on your images",
            "robustvlm attack ViT-B-32/openai --data imagefolder:photos --eps 1/255,2/255",
        ),
        (
            "A gate: exit code 1 if the lower bound is too low",
            "robustvlm attack tiny-robust --fail-if 'robust_accuracy.low<30%'",
        ),
    ),
    "certify": (
        ("Radii of the class, on few images", "robustvlm certify --claim class --sigma 0.05 --samples 500 --limit 24"),
        ("Attack the certificates of a finished run", "robustvlm certify --audit runs/certified"),
    ),
    "evaluate": (
        ("Clean accuracy of the bundled model", "robustvlm evaluate"),
        ("Of an open_clip model on your images", "robustvlm evaluate ViT-B-32/openai --data imagefolder:photos"),
        ("Under all common corruptions at severity 3", "robustvlm evaluate tiny --corrupt all:3 --limit 200"),
        ("Image-text retrieval", "robustvlm evaluate ViT-B-32/openai --data 'parquet:f.parquet?captions=text'"),
    ),
    "predict": (
        ("A table of a few drawings", "robustvlm predict tiny --data 'emoji?split=near' --limit 5 --top 3"),
        ("Your images into a file", "robustvlm predict tiny photos/ --classes names.txt --to found.csv"),
    ),
    "detect": (
        ("All scores on the bundled sets", "robustvlm detect --limit 200"),
        (
            "Two scores on your images, under attack too",
            "robustvlm detect --id imagefolder:known --ood imagefolder:new --under-attack",
        ),
    ),
    "judge": (
        ("Two published defences, on few images", "robustvlm judge tiny+clipure,tiny+bits:3 --limit 20 --steps 20"),
    ),
    "finetune": (
        ("TeCoA on the bundled images", "robustvlm finetune tiny --method tecoa --steps 200 --name robust"),
        ("What it brought", "robustvlm attack runs/robust"),
    ),
    "soup": (
        ("The average of two fine-tuned models", "robustvlm soup runs/robust runs/other --name soup"),
        (
            "Only those that help, by images they have not seen",
            "robustvlm soup runs/robust runs/other --method greedy --val 'emoji?split=val'",
        ),
    ),
    "immunize": (
        ("From the bundled images", "robustvlm immunize tiny --name immune"),
        ("Can it be made to accept what it does not know?", "robustvlm attack runs/immune --goal intrude"),
    ),
    "tune-prompts": (("From four images a class", "robustvlm tune-prompts tiny --shots 4 --name prompts"),),
    "export": (
        ("For open_clip", "robustvlm export tiny exported"),
        ("For transformers, in 16 bits", "robustvlm export runs/robust exported --to transformers --half"),
    ),
    "purify": (
        ("A denoiser and a mapper for one noise level", "robustvlm purify tiny --sigma 0.25 --name pure"),
        ("What they bring", "robustvlm certify runs/pure+smooth:0.25 --claim class"),
    ),
    "build": (
        (
            "All parts in one folder",
            "robustvlm build --purify runs/pure --smooth 0.25:64 --immunize runs/immune",
        ),
    ),
    "report": (
        ("The page of one run", "robustvlm report runs/robust"),
        ("Two runs side by side", "robustvlm report runs/before runs/after --out both.html"),
        ("What was checked, as test cases for CI", "robustvlm report runs/gate --format junit --out gate.xml"),
    ),
    "models": (
        ("All forms and names", "robustvlm models"),
        ("Names that contain a text", "robustvlm models --filter siglip"),
    ),
    "data": (
        ("What the bundled data holds", "robustvlm data"),
        ("Which images cannot be read", "robustvlm data imagefolder:photos --check"),
    ),
}
"""For every command: what an example shows, and the line to type."""

PAGES = {
    "attack": "attacks.md",
    "certify": "certify.md",
    "evaluate": "evaluate.md",
    "predict": "predict.md",
    "detect": "detect.md",
    "judge": "judge.md",
    "finetune": "finetune.md",
    "soup": "finetune.md",
    "immunize": "immunize.md",
    "tune-prompts": "tune-prompts.md",
    "export": "models.md",
    "purify": "purify.md",
    "build": "purify.md",
    "report": "runs.md",
    "models": "models.md",
    "data": "data.md",
}
"""The page of the documentation that tells more of a command."""

GROUPS = {
    "Measure": ("attack", "certify", "evaluate", "predict", "detect", "judge"),
    "Defend": ("finetune", "soup", "immunize", "tune-prompts", "purify", "build", "export"),
    "Look up": ("report", "models", "data"),
}
"""The commands under the headings of the program's own help."""


def group_of(command: str) -> str:
    """Return the heading of a command in the program's help."""
    return next(group for group, names in GROUPS.items() if command in names)


def documentation(page: str) -> str | None:
    """Return where a page of the documentation is: on the site that the package names, else the file on this machine.

    A checkout has the pages in `docs`; a wheel puts them into `share/doc/robustvlm` of its environment. None: neither.
    """
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        for entry in metadata("robustvlm").get_all("Project-URL") or ():
            name, _, site = entry.partition(",")
            if name.strip().lower() == "documentation":
                return f"{site.strip().rstrip('/')}/{page}"
    except PackageNotFoundError:
        pass
    root = Path(__file__).resolve().parents[2]
    checkout = [root / "docs"] if (root / "pyproject.toml").is_file() else []
    for folder in (*checkout, Path(sysconfig.get_path("data")) / "share" / "doc" / "robustvlm"):
        if (folder / page).is_file():
            return str(folder / page)
    return None


class HelpfulCommand(TyperCommand):
    """A command whose help ends in examples, one to a line however narrow the terminal, and where to read more."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page, and below it what `ending` holds."""
        super().format_help(ctx, formatter)
        for line in ending(self.name or ""):
            typer.secho(f" {line}".rstrip(), bold=line.endswith(":"))
        typer.echo()

    def get_help_option(self, ctx: Any) -> Any:
        """Put --help beside the other options that all commands have."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Run"
        return option


def ending(command: str) -> list[str]:
    """Return the last lines of a command's help."""
    lines = ["Examples:"]
    for meaning, line in EXAMPLES[command]:
        lines += [f"  # {meaning}", f"  {line}"]
    page = documentation(PAGES[command])
    return lines if page is None else [*lines, "", "Documentation:", f"  {page}"]

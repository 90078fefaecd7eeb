"""A page of sections, each with text, a picture and a table: one HTML file, and the same as PNG and CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"


@dataclass
class Section:
    """A part of the page."""

    title: str
    text: list[str] = field(default_factory=list)
    figure: Figure | None = None
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    @property
    def slug(self) -> str:
        return re.sub("[^a-z0-9.]+", "-", self.title.lower().replace("'s", "")).strip("-")


@dataclass
class Report:
    """What the page holds."""

    title: str
    about: str
    conclusions: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def write(report: Report, folder: Path) -> Path:
    """index.html, which needs no other file, and each section's PNG and CSV beside it; returns the page."""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    titles: Counter[str] = Counter()
    for section in report.sections:  # of two machines without a name, say
        titles[section.title] += 1
        if titles[section.title] > 1:
            section.title += f" ({titles[section.title]})"
    pictures: dict[str, str] = {}
    for section in report.sections:
        if section.figure is not None:
            held = io.BytesIO()
            section.figure.savefig(held, dpi=150, format="png")
            (folder / f"{section.slug}.png").write_bytes(held.getvalue())
            pictures[section.slug] = base64.b64encode(held.getvalue()).decode()
        if section.rows:
            with (folder / f"{section.slug}.csv").open("w", newline="") as f:
                csv.writer(f).writerows([section.header, *section.rows])
    loader = jinja2.PackageLoader("gfrnn.scaling", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        report=report, pictures=pictures, date=time.strftime("%Y-%m-%d")
    )
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def written(report: Report, folder: Path) -> list[Path]:
    """The files that `write` has made of it: the folder may hold others."""
    names = [PAGE, *(f"{section.slug}{ending}" for section in report.sections for ending in (".png", ".csv"))]
    return [folder / name for name in names if (folder / name).exists()]

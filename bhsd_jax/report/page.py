"""The report of a run as one self-contained HTML page, and as Markdown."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.ct.dicom import segment_codes
from bhsd_jax.platform import files
from bhsd_jax.report.figures import data_uri
from bhsd_jax.report.result_tables import Table

_LINK = re.compile(r"\{(\w[^{}|]*)\|([\w./-]+)\}")  # in sentences: {text|file beside the page}

NOTICE = "Research use only. Not a medical device; not for diagnosis, triage or treatment."
_WEAK = (
    "Known weak spots: thin subdural, epidural and subarachnoid bleeds, and false alarms in scans "
    "without hemorrhage."
)


def notice(classes: Iterable[str]) -> str:
    """What stands over all that networks say; of those that draw bleeds, where these are weak."""
    return f"{NOTICE} {_WEAK}" if segment_codes.is_any_bleed(classes) else NOTICE


_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d9e2ec; --warn: #fff4e5; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { line-height: 1.2; margin-bottom: .2rem } h2 { margin-top: 2.4rem }
.notice { background: var(--warn); border-left: 4px solid #f0a020; padding: .6rem 1rem; }
.banner { background: #fde8e8; border-left: 4px solid #c53030; padding: .6rem 1rem;
  font-weight: 600 }
.lead { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0 }
.figure { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; min-width: 11rem }
.figure b { display: block; font-size: 1.8rem; line-height: 1.2 }
.figure span { color: var(--soft); font-size: .9rem }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem;
  font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right }
th:first-child, td:first-child, .words { text-align: left } th { vertical-align: bottom }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
figure { margin: 1.2rem 0 } figcaption, .note { color: var(--soft); font-size: .9rem }
.key { display: inline-block; width: 1.1em; height: .35em; margin: 0 .3em .2em 0 }
"""


@dataclass(frozen=True)
class Section:
    """A heading, then sentences, tables and pictures in the order given."""

    title: str
    parts: tuple["str | Table | Picture", ...] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Page:
    """A report: title, headline figures, sections, footer."""

    title: str
    subtitle: str
    headline: tuple[tuple[str, str], ...]  # big number, what it is
    sections: tuple[Section, ...] = field(default=())
    footer: str = ""
    banners: tuple[str, ...] = ()  # what must not be missed, above everything else
    notice: str = NOTICE

    def to_html(self) -> str:
        """One file without scripts, which needs no other; links lead to files beside it."""
        figures = "".join(
            f'<div class="figure"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'
            for value, what in self.headline
        )
        sections = "".join(
            f"<h2>{html.escape(section.title)}</h2>" + "".join(map(_html, section.parts))
            for section in self.sections
        )
        banners = "".join(f'<p class="banner">{html.escape(text)}</p>' for text in self.banners)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            f'<h1>{html.escape(self.title)}</h1><p class="note">{html.escape(self.subtitle)}</p>'
            f'{banners}<p class="notice">{html.escape(self.notice)}</p>'
            f'<div class="lead">{figures}</div>{sections}'
            f'<p class="note">{html.escape(self.footer)}</p></body></html>\n'
        )

    def to_markdown(self, pictures: str = "") -> str:
        """The words and tables; pictures are files in the folder `pictures`, named by `save`.

        Without a folder their captions stand for them.
        """
        lines = [f"# {self.title}", self.subtitle]
        lines += [f"> **{text}**" for text in self.banners]
        lines.append(f"> {self.notice}")
        lines.append("\n".join(f"- **{value}** {what}" for value, what in self.headline))
        for section in self.sections:
            lines.append(f"## {section.title}")
            lines.extend(self._markdown(part, pictures) for part in section.parts)
        return "\n\n".join([*lines, self.footer]) + "\n"

    def pictures(self) -> "dict[str, Picture]":
        """All pictures by their file names, in the order of the page."""
        found = [p for s in self.sections for p in s.parts if isinstance(p, Picture)]
        return {f"picture_{index:02d}.png": picture for index, picture in enumerate(found, start=1)}

    def _markdown(self, part: "str | Table | Picture", pictures: str) -> str:
        if isinstance(part, Table):
            return part.to_markdown()
        if isinstance(part, str):
            return _LINK.sub(r"[\1](\2)", part)
        if not pictures:
            return f"*{part.caption}*"
        name = next(name for name, other in self.pictures().items() if other is part)
        return f"![{part.caption}]({pictures}/{name})\n\n*{part.caption}*"


def save(page: Page, folder: Path, name: str = "report") -> Path:
    """Writes `<name>.html` and `<name>.md` with its pictures in `<name>_pictures/`; the first.

    Pictures that an earlier page has left there are removed.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    pictures = page.pictures()
    beside = folder / f"{name}_pictures"
    for file, picture in pictures.items():
        files.write_bytes(beside / file, picture.png)
    for old in set(beside.glob("picture_*.png")) - {beside / file for file in pictures}:
        old.unlink(missing_ok=True)
    files.write_text(folder / f"{name}.md", page.to_markdown(beside.name))
    files.write_text(folder / f"{name}.html", page.to_html())
    return folder / f"{name}.html"


def _html(part: "str | Table | Picture") -> str:
    if isinstance(part, Table):
        return f'<div class="wide">{part.to_html()}</div>'
    if isinstance(part, Picture):
        caption = html.escape(part.caption)
        image = f'<img alt="{caption}" src="{data_uri(part.png)}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f"<p>{_LINK.sub(_anchor, _keys(html.escape(part)))}</p>"


def _anchor(link: re.Match[str]) -> str:
    return f'<a href="{link[2]}">{link[1]}</a>'


def _keys(text: str) -> str:
    """Turns [#19d3f3] into a stroke of that color."""
    pieces = text.split("[#")
    out = pieces[0]
    for piece in pieces[1:]:
        color, _, rest = piece.partition("]")
        out += f'<span class="key" style="background:#{color}"></span>{rest}'
    return out

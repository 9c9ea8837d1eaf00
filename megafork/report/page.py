"""The HTML page: its skeleton, and the few building blocks of its sections.

A single file without scripts or external fonts and pictures: the content security policy forbids all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megafork.files import full_disk, whole
from megafork.recipe import RecipeError
from megafork.report.style import STYLE

CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | dict.fromkeys(
    (0x7F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)), 0xFFFD
)
"""Maps control characters to their pictures; text direction overrides and halves of surrogate pairs to the replacement character."""


def page(title: str, *, header: str, sections: Sequence[tuple[str, str]], footer: str, refresh: float | None = None) -> str:
    """The whole document. `sections` are (heading, HTML) in order; those without HTML are omitted.

    Titles and headings are escaped here; `header`, `footer` and the sections' HTML must already be safe. Control characters, which could
    hide or reorder the text around them, are made visible everywhere. `refresh`: seconds after which a browser reloads the page, rounded,
    at least 1; None: never.
    """
    shown = [(f"s{number}", heading, body) for number, (heading, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in shown)
    bodies = "\n".join(f'<section id="{anchor}"><h2>{escape(heading)}</h2>\n{body}</section>' for anchor, heading, body in shown)
    again = "" if refresh is None else f'\n<meta http-equiv="refresh" content="{max(1, round(refresh))}">'
    document = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">{again}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>{header}<nav aria-label="Sections">{links}</nav></header>
<main>
{bodies}
</main>
<footer>{footer}</footer>
</body>
</html>
"""
    return document.translate(CONTROLS)


def write(path: Path, document: str) -> Path:
    """Replace the file atomically, so that a reader never sees half a page. Raises RecipeError where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path, alone=False) as unfinished:  # a run that ends and a command that watches it may both write
            unfinished.write_text(document, encoding="utf-8")
    except OSError as error:
        if full_disk(error):
            raise
        raise RecipeError(f"the page {str(path)!r} can't be written ({error.strerror}): give another file as --out") from None
    return path


def numbers_row(items: Sequence[tuple[str, str, str]]) -> str:
    """The headline numbers from (label, value, remark), the first one large; an arrow in a value separates before from after."""
    cells = []
    for place, (label, value, remark) in enumerate(items):
        shown = escape(value).replace("→", "<i>→</i>")
        below = f"<span>{escape(remark)}</span>" if remark else ""
        cells.append(f'<div class="figure"><span>{escape(label)}</span><b{"" if place else " class=big"}>{shown}</b>{below}</div>')
    return f'<div class="figures">{"".join(cells)}</div>' if cells else ""


def figure(heading: str, note: str, svg: str, key: Sequence[tuple[str, str]] = ()) -> str:
    """A card with a heading, a line of explanation, an optional legend of (colour class, text), and the drawing."""
    caption = f'<figcaption><h3>{escape(heading)}</h3><p class="note">{escape(note)}</p></figcaption>'
    return f"<figure>{caption}{legend(key)}{svg}</figure>"


def legend(key: Sequence[tuple[str, str]]) -> str:
    """The legend of a figure, from (colour class, text)."""
    entries = "".join(f'<li><i class="{style}"></i>{escape(text)}</li>' for style, text in key)
    return f'<ul class="key">{entries}</ul>' if key else ""


def charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def share_strip(parts: Sequence[tuple[str, str, float]]) -> str:
    """A strip divided in proportion to (colour class, text, share), with the list of shares below it."""
    strip = "".join(f'<i class="{style}" style="flex:{share:.5f}" title="{escape(text)}: {share:.1%}"></i>' for style, text, share in parts)
    rows = "".join(f'<li><i class="{style}"></i><span>{escape(text)}</span><b>{share:.1%}</b></li>' for style, text, share in parts)
    return f'<div class="strip" aria-hidden="true">{strip}</div><ul class="share">{rows}</ul>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"

"""The frame of a report: one HTML page with everything inside it, no scripts and no network."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape

__all__ = ["bullets", "duration", "page", "paragraph", "picture", "section", "table"]


def page(title: str, body: Iterable[str]) -> str:
    """The whole page, of parts that are HTML already."""
    return _FRAME.format(title=escape(title), style=_STYLE, body="\n".join(body))


def paragraph(text: str, kind: str) -> str:
    """Text of the class ``summary`` or ``note``."""
    return f'<p class="{kind}">{escape(text)}</p>'


def bullets(points: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def section(heading: str, content: str) -> str:
    """A heading over HTML."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def picture(png: bytes, name: str, note: str) -> str:
    """A PNG inside the page, with a line below it."""
    source = f"data:image/png;base64,{b64encode(png).decode('ascii')}"
    return (
        f'<figure><img src="{source}" alt="{escape(name)}">'
        f"<figcaption>{escape(note)}</figcaption></figure>"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of text; the first column names its rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(_table_row(row) for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _table_row(row: Iterable[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """\
:root { color-scheme: light dark; --page: #fff; --ink: #222; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e4e4e2; --faint: #a0a4a8; --line: #3a3e43; }
}
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
.summary { margin: 0; color: var(--faint); overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-size: .85rem; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 400; }
figure { margin: 0 0 1rem; }
p.note { margin: .6rem 0 0; }
img { display: block; box-sizing: border-box; width: 100%; height: auto; background: #fff; }
figcaption { margin-top: .4rem; color: var(--faint); font-size: .85rem; }
ul { margin: 0; padding-left: 1.1rem; }
li { margin-bottom: .4rem; }
@media (prefers-color-scheme: dark) { img { padding: .6rem; border-radius: 6px; } }
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --faint: #444; --line: #bbb; }
  main { max-width: none; padding: 0; }
  img { padding: 0; max-height: 22cm; object-fit: contain; object-position: left; }
  figure, table, li { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

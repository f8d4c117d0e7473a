"""A report as Markdown with figures beside it, and as one self-contained HTML file."""

import base64
import html
import pathlib
import re

from markdown_it import MarkdownIt

from afkd_jax.checkpoints.files import write_atomic

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 70rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap; }
td[style*="left"] { white-space: normal; min-width: 16rem; }
thead th { border-bottom: 2px solid #444; }
img { max-width: 100%; height: auto; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  div.table { overflow: visible; }
  table { font-size: 8pt; }
  td { white-space: normal; padding: 0.2rem 0.3rem; }
  img, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def write(folder: pathlib.Path, markdown: str, figures: dict[str, bytes]) -> list[pathlib.Path]:
    """Writes report.md, its figures and report.html; returns the paths of the two.

    Args:
      folder: exists.
      markdown: with figures as ![words](report_figures/NAME.svg).
      figures: NAME -> SVG.
    """
    images = folder / 'report_figures'
    images.mkdir(exist_ok=True)
    for name, content in figures.items():
        write_atomic(images / f'{name}.svg', content)
    body = MarkdownIt('commonmark').enable('table').render(markdown)
    body = body.replace('<table>', '<div class="table"><table>')
    body = body.replace('</table>', '</table></div>')

    def inline(match: re.Match[str]) -> str:
        content = base64.b64encode(figures[match[1]]).decode()
        return f'src="data:image/svg+xml;base64,{content}"'

    body = re.sub(r'src="report_figures/([^"]+)\.svg"', inline, body)
    title = html.escape(markdown.splitlines()[0].lstrip('# '))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><style>{_STYLE}</style></head><body>\n{body}</body></html>\n'
    )
    paths = folder / 'report.md', folder / 'report.html'
    for path, text in zip(paths, (markdown, page), strict=True):
        write_atomic(path, text.encode())
    return list(paths)


def table(columns: list[str], rows: list[list[str]], text: str = '') -> str:
    """Returns a Markdown table.

    Args:
      columns: their names; the first holds labels, the others numbers.
      rows: cells.
      text: the column that holds sentences; '' if none does.
    """
    marks = ['---', *(':---' if name == text else '---:' for name in columns[1:])]
    return '\n'.join(
        '| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |'
        for row in (columns, marks, *rows)
    )

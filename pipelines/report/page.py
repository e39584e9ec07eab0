"""The parts of an HTML page that needs no other file: its frame, tables, and pictures for both colour schemes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from pipelines.report.plots import INK, PAPER, Plot


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Text cells, escaped; a line break stays one. numbers: all columns but the first are set to the right."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    kind = "numbers" if numbers else "words"
    return f"<div class=scroll><table class={kind}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def picture(plot: Plot, alt: str) -> str:
    """The light or the dark PNG, as the reader's browser asks."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in plot)
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>'
    )


def pairs(items: Sequence[tuple[str, str]]) -> str:
    """Names with their values, many on little room."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f"<dl class=pairs>{cells}</dl>"


def note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def page(title: str, body: str) -> str:
    """A whole page; body is ready HTML."""
    return _PAGE.format(
        title=escape(title), body=body, ink=INK[False], paper=PAPER[False], dark_ink=INK[True], dark_paper=PAPER[True]
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: {ink}; --soft: #666; --line: #d8d8d8; --paper: {paper}; --raised: #f6f6f4; --accent: #0072b2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {dark_ink}; --soft: #a0a0a0; --line: #3a3d42; --paper: {dark_paper}; --raised: #1f2227;
    --accent: #56b4e9; }}
}}
* {{ box-sizing: border-box; }}
body {{ color: var(--ink); background: var(--paper); font: 16px/1.55 system-ui, sans-serif;
  max-width: 66rem; margin: 2.5rem auto 4rem; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.4rem; }}
h2 {{ font-size: 1.15rem; margin: 2.6rem 0 0.6rem; }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 0.4rem; }}
.headline {{ background: var(--raised); border-left: 4px solid var(--accent); padding: 0.8rem 1.1rem;
  margin: 1.4rem 0; }}
.headline p {{ margin: 0.35rem 0 0; }}
.headline ul {{ margin: 0 0 0.7rem; padding-left: 1.2rem; }}
img {{ max-width: 100%; height: auto; display: block; margin: 0.6rem 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.3rem 1.1rem 0.3rem 0;
  border-bottom: 1px solid var(--line); white-space: pre-line; }}
th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child {{ white-space: nowrap; }}
.numbers th:not(:first-child), .numbers td:not(:first-child) {{ text-align: right; }}
.numbers td:not(:first-child) {{ white-space: pre; }}
tbody tr:hover {{ background: var(--raised); }}
.pairs {{ columns: 18rem; column-gap: 2rem; font-size: 0.88rem; margin: 0.4rem 0; }}
.pairs div {{ display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;
  border-bottom: 1px solid var(--line); padding: 0.15rem 0; }}
.pairs dt {{ color: var(--soft); }} .pairs dd {{ margin: 0; text-align: right; }}
.note {{ color: var(--soft); font-size: 0.88rem; }}
summary {{ cursor: pointer; margin: 0.6rem 0; }}
pre, code {{ font: 0.82rem/1.5 ui-monospace, monospace; }}
pre {{ overflow-x: auto; background: var(--raised); padding: 0.8rem 1rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

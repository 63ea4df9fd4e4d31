"""The report's HTML pieces: the page with its style sheet, sections, tables, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ov3fast.evaluation.palette import scale_css

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d1f23;--soft:#5d636e;--rule:#e3e4e7;--good:#1a7f4b;--bad:#b3372b;
--c0:#2f6fdb;--c1:#d9772b;--c2:#2b9a66;--c3:#a34fc1;--c4:#c43d5d;--c5:#7d7a35}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1c1f25;--ink:#e8e9ec;--soft:#9aa1ad;--rule:#30343c;--good:#58c48b;
--bad:#f0857a;--c0:#74a5f7;--c1:#f0a05f;--c2:#63c697;--c3:#c98be0;--c4:#ef8099;--c5:#bdb868}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.005em}
h3{font-size:14px;margin:22px 0 6px;color:var(--soft);font-weight:600}
p{margin:0 0 12px;max-width:76ch}
.note,figcaption,.tick{color:var(--soft)}
.note{font-size:13.5px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 18px;margin:12px 0;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:600;font-size:12.5px;color:var(--soft);text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--rule)}
td{padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child td{border-bottom:0}
tr.group td{font-weight:600;padding-top:14px}
.num{text-align:right;white-space:nowrap}
.strong{font-weight:650}
.met{color:var(--good);font-weight:600}.missed{color:var(--bad);font-weight:600}
.grid{display:grid;gap:14px}
.charts{grid-template-columns:repeat(auto-fill,minmax(320px,1fr))}
.chart{width:100%;height:auto;display:block;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:8px}
.chart-title{font-size:12px;font-weight:600;fill:var(--ink)}
.chart .tick{font-size:10px;fill:var(--soft)}
.chart .grid{stroke:var(--rule);stroke-width:.7}.chart .axis{stroke:var(--soft);stroke-width:.8;fill:none}
.chart .boundary{stroke:var(--soft);stroke-width:.8;stroke-dasharray:3 3}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}.raw{opacity:.28;stroke-width:1}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
figure{margin:0;min-width:0}
figure img{display:block;width:100%;height:auto;border-radius:5px;background:#fff}
figcaption{font-size:12px;line-height:1.35;margin-top:4px;overflow-wrap:anywhere}
.triples{grid-template-columns:repeat(auto-fill,minmax(500px,1fr))}
.triple{display:grid;grid-template-columns:repeat(5,1fr);gap:6px}
.queries{grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:18px 28px}
.query{display:grid;grid-template-columns:minmax(96px,1fr) 5fr;gap:12px;align-items:start}
.five{display:grid;grid-template-columns:repeat(5,1fr);gap:6px}
.right img{outline:3px solid var(--good);outline-offset:-3px}
.answers{margin:0;padding-left:22px;font-size:13.5px}.answers .right{color:var(--good);font-weight:650}
.captions{grid-template-columns:repeat(auto-fill,minmax(190px,1fr))}
.captions figcaption b{color:var(--ink);font-weight:600}
.scale{display:inline-block;width:120px;height:9px;border-radius:3px;vertical-align:middle;margin:0 6px;background:SCALE}
details{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 18px;margin:12px 0}
summary{cursor:pointer;font-weight:600}
pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-x:auto;margin:10px 0 4px}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
@media(max-width:560px){main{padding:24px 14px 48px}.triples,.queries{grid-template-columns:1fr}}
@media print{.card,.chart,figure,.query{break-inside:avoid}}
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole HTML document that asks for nothing from outside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE.replace('SCALE', scale_css())}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="note">{escape(subtitle)}</p>\n'
        + "\n".join(part for part in sections if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A heading, a note in plain text, and HTML; nothing where the body is empty."""
    if not body:
        return ""
    explained = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{explained}\n{body}</section>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Plain-text cells; `numbers` are the columns set to the right. A row of one cell is a group's heading."""

    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="num"' if column in numbers else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(columns))
    body = "".join(
        f'<tr class="group"><td colspan="{len(columns)}">{escape(row[0])}</td></tr>'
        if len(row) == 1
        else f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>"
        for row in rows
    )
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(data: str, caption: str = "", alt: str = "", right: bool = False) -> str:
    """An image from a data: address with a plain-text caption; `right` frames it."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    frame = ' class="right"' if right else ""
    return f'<figure{frame}><img src="{data}" alt="{escape(alt or caption, quote=True)}">{below}</figure>'


def grid(kind: str, items: Sequence[str]) -> str:
    return f'<div class="grid {kind}">{"".join(items)}</div>' if items else ""


def details(summary: str, text: str) -> str:
    """Preformatted plain text behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"

"""A report as one HTML page: no scripts, nothing from elsewhere, and every text of a run escaped."""

from collections.abc import Sequence

from dskd.report import charts
from dskd.report.document import Block, Cell, Chart, Document, Example, Figures, Section, Table
from dskd.report.escape import html

MARK = '<meta name="generator" content="dskd report">'
"""By which a page is known to be one that may be written again."""
LONG = 32
"""Characters of a cell above which its lines may break anywhere."""
# Were a text ever not escaped, a browser would still neither run nor load anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root{--paper:#fff;--ink:#1a1a1a;--faint:#5c5c5c;--rule:#c8c8c8;--soft:#f4f4f2}
@media screen and (prefers-color-scheme:dark){
:root{--paper:#16181b;--ink:#e8e8e6;--faint:#a6a6a6;--rule:#44474c;--soft:#212429}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.5rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,"Segoe UI","Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;margin:0 0 .5rem}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:.5rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .25rem}
p{margin:.4rem 0;max-width:50rem}
nav a{margin-right:1rem;white-space:nowrap}
a{color:inherit}
small{display:block;color:var(--faint);font-size:.8em;font-weight:400}
.wide{overflow-x:auto;margin:.75rem 0 1.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);
white-space:nowrap}
thead th{white-space:normal}
.long{white-space:normal;overflow-wrap:anywhere;min-width:11rem}
thead th{vertical-align:bottom;border-bottom:2px solid var(--ink)}
tbody th{font-weight:400}
.best{font-weight:700}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.25rem}
figure{margin:0;break-inside:avoid}
figcaption{font-size:.9rem;font-weight:600}
.chart{width:100%;height:auto;display:block}
.chart text{font:12px system-ui,"Segoe UI","Helvetica Neue",Arial,sans-serif;fill:var(--faint)}
.chart .label{fill:var(--ink)}
.axis{fill:none;stroke:var(--faint)}
.grid{fill:none;stroke:var(--rule);stroke-width:.5}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.lead{fill:none;stroke-width:1}
.restart{stroke:var(--paper);stroke-width:1}
.range{opacity:.45}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;font-size:.9rem}
.sample{width:2.6rem;height:.6rem;margin-right:.4rem;vertical-align:middle}
.example{break-inside:avoid;margin:1rem 0 1.75rem}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:.5rem;margin-top:.6rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:.5rem .65rem;font-size:.85rem;margin:0}
.answers h4{margin:0 0 .2rem;font-size:.85rem}
@media print{@page{size:A4;margin:12mm}
body{max-width:none;padding:0;font-size:10.5pt}nav{display:none}h2{break-after:avoid;margin-top:1.2rem}
.wide{overflow:visible}table{font-size:8pt}th,td{padding-right:.4rem}.long{min-width:6rem}
thead{display:table-header-group}tr{break-inside:avoid}
.figures{grid-template-columns:1fr 1fr;gap:.75rem}.text{font-size:8.5pt;border:1px solid var(--rule)}}
"""


def page(document: Document) -> str:
    sections = [section_text(section, f"part{i}") for i, section in enumerate(document.sections)]
    links = " ".join(f'<a href="#part{i}">{html(s.title)}</a>' for i, s in enumerate(document.sections))
    head = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta name="viewport" content="width=device-width,initial-scale=1">{MARK}',
        f"<title>{html(document.title)}</title><style>{STYLE}{charts.style_sheet()}</style></head><body>",
        f"<h1>{html(document.title)}</h1>{paragraphs(document.text)}<nav>{links}</nav>",
    ]
    return "\n".join([*head, *sections, "</body></html>\n"])


def paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{html(text)}</p>" for text in texts)


def section_text(section: Section, name: str) -> str:
    inner = "\n".join(block_text(block) for block in section.blocks)
    return f'<section id="{name}"><h2>{html(section.title)}</h2>{paragraphs(section.text)}\n{inner}</section>'


def block_text(block: Block) -> str:
    if isinstance(block, Table):
        return table(block)
    return figures(block) if isinstance(block, Figures) else example(block)


def table(found: Table) -> str:
    head = "".join(f'<th scope="col"{" class=long" * (len(text) > LONG)}>{html(text)}</th>' for text in found.head)
    rows = "\n".join(f"<tr>{''.join(cell(each, i == 0) for i, each in enumerate(row))}</tr>" for row in found.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def cell(found: Cell, first: bool) -> str:
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    classes = ["best"] * found.bold + ["long"] * (max(len(found.text), len(found.detail)) > LONG)
    style = f' class="{" ".join(classes)}"' if classes else ""
    detail = f"<small>{html(found.detail)}</small>" if found.detail else ""
    return f"<{tag}{scope}{style}>{html(found.text)}{detail}</{tag}>"


def figures(found: Figures) -> str:
    numbered = len(found.legend) > charts.MOST_LABELS
    names = [f"{style + 1}: {name}" if numbered else name for name, style in found.legend]
    legend = "".join(
        f"<li>{charts.sample(style)}{html(name)}</li>" for name, (_, style) in zip(names, found.legend, strict=True)
    )
    drawn = "\n".join(
        f"<figure><figcaption>{html(chart.title)}</figcaption>"
        f"{charts.line_chart(chart) if isinstance(chart, Chart) else charts.range_chart(chart)}</figure>"
        for chart in found.charts
    )
    return (f'<ul class="legend">{legend}</ul>' if legend else "") + f'<div class="figures">{drawn}</div>'


def example(found: Example) -> str:
    references = "".join(f'<div><h4>reference</h4><p class="text">{html(text)}</p></div>' for text in found.references)
    answers = "".join(
        f'<div><h4>{html(label)} · {html(score)}</h4><p class="text">{html(text)}</p></div>'
        for label, score, text in found.answers
    )
    return (
        f'<div class="example"><h3>{html(found.title)}</h3><p class="text">{html(found.prompt)}</p>'
        f'<div class="answers">{references}{answers}</div></div>'
    )

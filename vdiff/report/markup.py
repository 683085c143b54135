"""The HTML that the pages share: a few elements, the style sheet, and a file written whole or not at all.

Pictures are inlined, so the file can be mailed; there is no script and nothing is fetched. It follows the
reader's light or dark setting and fits a phone.
"""

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template


def wrap(tag: str, name: str, parts: Iterable[str]) -> str:
    """Put the parts in an element of a class; without parts, nothing."""
    inner = "\n".join(part for part in parts if part)
    return f'<{tag} class="{name}">\n{inner}\n</{tag}>' if inner else ""


def paragraph(name: str, text: str) -> str:
    """Write a text, escaped, as a paragraph of a class; without text, nothing."""
    return f'<p class="{name}">{escape(text)}</p>' if text else ""


def grid(head: str, rows: Iterable[str]) -> str:
    """Make a table of the cells of its head and of each row, which scrolls on a narrow screen."""
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def figure(path: Path, caption: str, *, alt: str = "", heading: str = "", link: str = "") -> str:
    """Inline a PNG above its caption.

    Args:
        path: the PNG.
        caption: the text below the picture.
        alt: a text for who cannot see it, by default the caption.
        heading: a text above the picture.
        link: where the heading and the picture lead.

    Returns:
        The element, with the size and the aspect by which the style sheet places it.

    Raises:
        ValueError: if the file is not a PNG.
    """
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"figures: got {path}, expected a PNG; write it with vdiff.report")
    width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = f'<img src="{source}" alt="{escape(alt or caption)}" width="{width}" height="{height}">'
    opening, closing = (f'<a href="{escape(link)}">', "</a>") if link else ("", "")
    title = f"<h3>{opening}{escape(heading)}{closing}</h3>" if heading else ""
    style = f"--aspect:{width / height:.3f};--width:{0.52 * width:.0f}px"  # sharp on fine screens
    return (
        f'<figure style="{style}">{title}{opening}{image}{closing}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def write(path: Path, title: str, lead: str, body: Sequence[str]) -> Path:
    """Write a page of a title, one sentence and the parts of its body, whole or not at all."""
    text = _PAGE.substitute(
        title=escape(title), lead=paragraph("lead", lead), body="\n".join(part for part in body if part)
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { --ground: #fff; --raised: #f4f5f7; --ink: #14171c; --soft: #5b6470; --line: #e2e5e9;
  --mark: #2b78c0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171c; --raised: #1e2229; --ink: #e8eaed; --soft: #9aa3ae; --line: #2d333b;
    --mark: #5aa7e8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 3rem 1.25rem 4rem; background: var(--ground);
  color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 3.5rem 0 .75rem; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 0 0 .6rem; font-size: 1.05rem; }
p { margin: 0; }
a { color: var(--mark); text-decoration-thickness: 1px; text-underline-offset: .2em; }
.lead { margin-top: .75rem; max-width: 46rem; font-size: 1.15rem; color: var(--soft); }
.facts { margin-top: .75rem; font-size: .9rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13.5rem), 1fr));
  gap: .75rem; margin: 2rem 0 0; }
.tiles > div { padding: 1rem 1.15rem 1.1rem; background: var(--raised); border-radius: .75rem; }
dt { font-size: .9rem; font-weight: 600; color: var(--soft); }
dd { margin: .2rem 0 0; }
.value { font-size: 2rem; font-weight: 650; line-height: 1.2; letter-spacing: -.02em; }
.value, .error, .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.error, .unit, .note { color: var(--soft); }
.unit, .note { font-size: .9rem; }
.figures { --height: 20rem; --limit: 100rem; display: flex; flex-wrap: wrap; gap: 2.5rem 2rem;
  margin: 2.5rem 0 0; }
.small { --height: 13rem; --limit: 22rem; }
figure { flex: var(--aspect) 1 calc(var(--aspect) * var(--height)); min-width: 0; margin: 0;
  max-width: min(var(--width), var(--aspect) * var(--limit)); }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .7rem; font-size: .95rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .95rem; overflow-wrap: normal; }
th, td { padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-size: .85rem; font-weight: 600; color: var(--soft); }
th.number, td.number { text-align: right; }
.chart { width: 20%; min-width: 8rem; }
.scale { position: relative; height: 1.5rem; }
.scale::before { content: ""; position: absolute; inset: 50% 0 auto; border-top: 1px solid var(--line); }
.scale i { position: absolute; top: calc(50% - 2px); height: 4px; border-radius: 2px;
  background: var(--soft); }
.scale b { position: absolute; top: calc(50% - 6px); width: 12px; height: 12px; margin-left: -6px;
  border-radius: 50%; background: var(--soft); }
.best i, .best b { background: var(--mark); }
details { margin-top: .75rem; padding: .8rem 1.15rem; background: var(--raised); border-radius: .75rem; }
.scroll + details, .figures + details { margin-top: 3.5rem; }
summary { cursor: pointer; font-weight: 600; }
details .scroll { margin-top: .5rem; }
details td { font: .85rem/1.5 ui-monospace, SFMono-Regular, Consolas, monospace; overflow-wrap: anywhere; }
details td:first-child { width: 14rem; }
details th.number, details td.number { text-align: left; }
@media (max-width: 40rem) {
  .chart { display: none; }
  details td:first-child { width: 9rem; }
}
</style>
</head>
<body>
<h1>$title</h1>
$lead
<main>
$body
</main>
</body>
</html>
""")

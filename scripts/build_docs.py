"""Build `site/`: the pages of `docs/` and a reference of every public module from its docstrings, with pdoc."""

import sys
from pathlib import Path

import pdoc
import pdoc.render

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"


def write_pages() -> list[str]:
    """Turn each Markdown page and model card into HTML beside the reference; returns their names."""
    names = []
    targets = {page: SITE / "pages" / page.relative_to(ROOT / "docs") for page in sorted((ROOT / "docs").rglob("*.md"))}
    targets |= {card: SITE / card.relative_to(ROOT) for card in sorted((ROOT / "checkpoints").glob("*/README.md"))}
    for page, place in targets.items():
        target = place.with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        body = pdoc.render_helpers.to_html(page.read_text()).replace(".md", ".html")
        target.write_text(html_page(page.stem, body))
        names.append(str(target.relative_to(SITE)))
    return names


STYLE = """<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1e293b; margin: 0; }
main { max-width: 900px; margin: 0 auto; padding: 24px 20px 60px; }
table { border-collapse: collapse; } td, th { border: 1px solid #cbd5e1; padding: 4px 10px; text-align: left; }
pre, code { font-family: ui-monospace, monospace; font-size: 14px; }
pre { background: #f1f5f9; padding: 12px; overflow-x: auto; }
img { max-width: 100%; }
</style>"""


def html_page(title: str, body: str) -> str:
    """A whole HTML page."""
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title>{STYLE}<main>{body}</main>\n'


def main() -> int:
    """Build everything."""
    sys.path.insert(0, str(ROOT / "src"))
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc("headrace", output_directory=SITE)
    pages = write_pages()
    links = "".join(f'<li><a href="../{name}">{name.removesuffix(".html")}</a></li>' for name in pages)
    home = SITE / "pages" / "index.html"
    home.write_text(
        html_page(
            "headrace",
            '<h1>headrace</h1><p><a href="../headrace.html">Reference from the docstrings</a></p>'
            f"<ul>{links.replace('>pages/', '>')}</ul>",
        )
    )
    print(f"wrote {home.relative_to(ROOT)} ({len(pages)} pages) and the reference in {SITE.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Charts to pictures. Three renderers with one interface: Mermaid in Chromium, Graphviz, and a plain Pillow one."""

import shutil
import warnings
from typing import Literal, Protocol

from headrace.datasets.flowlearn.chart_picture import Picture
from headrace.datasets.flowlearn.generate import Chart

RendererName = Literal["auto", "mermaid", "graphviz", "pillow"]


class Renderer(Protocol):
    """Draws charts until it is closed."""

    name: str

    def draw(self, chart: Chart) -> Picture:
        """Draw one chart."""

    def close(self) -> None:
        """Give back what was opened."""


def open_renderer(name: RendererName = "auto") -> Renderer:
    """Open a renderer; `auto` takes Mermaid where it can run, else Graphviz, else Pillow.

    Raises:
        FileNotFoundError: The named renderer lacks its program; says which.
    """
    from headrace.datasets.flowlearn.render_graphviz import GraphvizRenderer
    from headrace.datasets.flowlearn.render_mermaid import MermaidRenderer, mermaid_is_here
    from headrace.datasets.flowlearn.render_pillow import PillowRenderer

    if name == "auto":
        return _first_that_opens(mermaid=mermaid_is_here(), graphviz=shutil.which("dot") is not None)
    classes: dict[str, type[Renderer]] = {
        "mermaid": MermaidRenderer,
        "graphviz": GraphvizRenderer,
        "pillow": PillowRenderer,
    }
    if name not in classes:
        raise ValueError(f"unknown renderer {name!r} (known: auto, {', '.join(classes)})")
    return classes[name]()


def _first_that_opens(*, mermaid: bool, graphviz: bool) -> Renderer:
    """Mermaid if it opens; a failure to fetch or start it is told by a warning and the next one is taken."""
    if mermaid:
        try:
            return open_renderer("mermaid")
        except (FileNotFoundError, RuntimeError, OSError) as error:
            warnings.warn(f"Mermaid cannot be used ({error}); drawing otherwise, see the manifest", stacklevel=3)
    return open_renderer("graphviz" if graphviz else "pillow")

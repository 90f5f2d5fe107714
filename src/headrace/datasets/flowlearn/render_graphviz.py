"""Draw with Graphviz `dot`, in colours close to Mermaid's. Used where no Chromium is; needs the `dot` program."""

import io
import json
import shutil
import subprocess

from PIL import Image

from headrace.datasets.flowlearn.chart_picture import Picture, with_boxes
from headrace.datasets.flowlearn.generate import Chart

_EDGE = {"plain": "style=solid", "thick": "penwidth=3.5", "dotted": "style=dotted"}
_DPI, _POINTS = 96, 72


def dot_source(chart: Chart) -> str:
    """The chart in Graphviz' language."""
    rankdir = "TB" if chart.graph.direction == "TD" else chart.graph.direction
    rows = [
        f'digraph g {{ rankdir={rankdir}; bgcolor="#{chart.background}"; pad=0.1; outputorder=edgesfirst;',
        'node [shape=box style="rounded,filled" fillcolor="#ECECFF" color="#9370DB" fontsize=12];',
        'edge [color="#333333"];',
    ]
    rows += [f"{node.id} [label={json.dumps(node.label)}];" for node in chart.graph.nodes]
    rows += [f"{edge.source} -> {edge.target} [{_EDGE[edge.style]}];" for edge in chart.graph.edges]
    return "\n".join([*rows, "}"])


class GraphvizRenderer:
    """One `dot` process per chart and output."""

    def __init__(self) -> None:
        self.program = shutil.which("dot")
        if self.program is None:
            raise FileNotFoundError("the Graphviz renderer needs the program `dot`; install graphviz or take another")
        said = subprocess.run([self.program, "-V"], capture_output=True, text=True).stderr.split()
        self.name = "graphviz-" + next((word for word in said if word[:1].isdigit()), "unknown")

    def _run(self, source: str, kind: str) -> bytes:
        command = [str(self.program), f"-T{kind}", f"-Gdpi={_DPI}"]
        done = subprocess.run(command, input=source.encode(), capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-300:]
            raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {said or 'it said nothing'}")
        return done.stdout

    def draw(self, chart: Chart) -> Picture:
        """Draw one chart; raises RuntimeError with what `dot` said when it fails."""
        source = dot_source(chart)
        image = Image.open(io.BytesIO(self._run(source, "png"))).convert("RGB")
        layout = json.loads(self._run(source, "json"))
        x0, y0, x1, y1 = (float(v) for v in layout["bb"].split(","))
        scale = _DPI / _POINTS
        pad = (image.width / scale - (x1 - x0)) / 2, (image.height / scale - (y1 - y0)) / 2
        boxes = {}
        for item in layout["objects"]:
            x, y = (float(v) for v in item["pos"].split(","))
            half = float(item["width"]) * _POINTS / 2, float(item["height"]) * _POINTS / 2
            left, top = x - x0 + pad[0], y1 - y + pad[1]
            corners = (left - half[0], top - half[1], left + half[0], top + half[1])
            boxes[item["name"]] = tuple(v * scale for v in corners)
        return Picture(image, with_boxes(chart.graph, boxes), self.name)

    def close(self) -> None:
        """Nothing is kept open."""

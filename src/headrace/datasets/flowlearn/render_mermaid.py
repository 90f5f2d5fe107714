"""Draw with Mermaid's own JavaScript in a headless Chromium: the closest to the released pictures. Works offline.

Mermaid comes once through npm into a cache folder (`install_mermaid`), or from a file named by `HEADRACE_MERMAID_JS`.
"""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

from PIL import Image

from headrace.datasets.flowlearn.browser import Browser, find_browser
from headrace.datasets.flowlearn.chart_picture import Picture, with_boxes
from headrace.datasets.flowlearn.generate import Chart
from headrace.datasets.flowlearn.mermaid import format_mermaid

VERSION = "10.9.1"
MARGIN = 8  # [px] around the drawing, as in the released pictures
_PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><style>
body{margin:0} #chart{position:absolute;left:0;top:0} svg{display:block}</style>
<script src="%s"></script></head><body><div id="chart"></div><script>
mermaid.initialize({startOnLoad:false,securityLevel:"loose"});
let count=0;
async function draw(code,back){
  const {svg}=await mermaid.render("m"+(count++),code);
  const place=document.getElementById("chart"); place.innerHTML=svg; document.body.style.background=back;
  const root=place.querySelector("svg"), view=root.viewBox.baseVal;
  root.style.maxWidth="none"; root.setAttribute("width",view.width); root.setAttribute("height",view.height);
  const boxes={};
  for(const node of place.querySelectorAll("g.node")){
    const shape=node.querySelector("rect.label-container, .label-container")||node;
    const r=shape.getBoundingClientRect(), id=(node.dataset.id||node.id.replace(/^flowchart-/,"").replace(/-\\d+$/,""));
    boxes[id]=[r.left,r.top,r.right,r.bottom];
  }
  const paths={};
  for(const line of place.querySelectorAll("path.flowchart-link")){
    const names=[...line.classList], end=p=>(names.find(n=>n.startsWith(p))||p).slice(3);
    const length=line.getTotalLength(), count=Math.max(1,Math.round(length/12)), place=line.getScreenCTM();
    paths[end("LS-")+" "+end("LE-")]=Array.from({length:count+1},(_,i)=>{
      const p=line.getPointAtLength(length*i/count).matrixTransform(place);
      return [Math.round(p.x*10)/10,Math.round(p.y*10)/10];
    });
  }
  return {width:Math.ceil(view.width),height:Math.ceil(view.height),boxes,paths};
}</script></body></html>"""


def cache_folder() -> Path:
    """Where Mermaid is kept: `HEADRACE_CACHE`, or headrace's folder in the user's cache."""
    root = os.environ.get("HEADRACE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "headrace"
    )
    return Path(root) / f"mermaid-{VERSION}"


def find_mermaid() -> Path | None:
    """The Mermaid bundle, or None if it was not installed yet."""
    named = os.environ.get("HEADRACE_MERMAID_JS")
    path = Path(named) if named else cache_folder() / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"
    return path if path.is_file() else None


def mermaid_is_here() -> bool:
    """Whether this renderer can run without fetching anything, or npm could fetch Mermaid."""
    return find_browser() is not None and (find_mermaid() is not None or shutil.which("npm") is not None)


def install_mermaid() -> Path:
    """Install Mermaid through npm into the cache folder, once; returns the bundle's path.

    Raises:
        FileNotFoundError: npm is not here or could not fetch it; says what to do.
    """
    found = find_mermaid()
    if found:
        return found
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "Mermaid is not installed and npm is not here; set HEADRACE_MERMAID_JS to mermaid.min.js"
        )
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=30000"]
    command = [npm, "install", "--prefix", str(folder), *options, f"mermaid@{VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise FileNotFoundError(
            f"npm did not fetch mermaid {VERSION} within 5 minutes; set HEADRACE_MERMAID_JS"
        ) from error
    found = find_mermaid()
    if done.returncode or not found:
        raise FileNotFoundError(f"npm could not install mermaid {VERSION}: {done.stderr.strip()[-400:]}")
    return found


class MermaidRenderer:
    """One browser for any number of charts. About 15 pictures a second on two cores that do nothing else."""

    def __init__(self) -> None:
        bundle = install_mermaid()
        self.browser = Browser()
        try:
            page = Path(self.browser.profile, "page.html")
            page.write_text(_PAGE % bundle.resolve().as_uri(), encoding="utf-8")
            self.browser.open(page.as_uri())
            self.name = "mermaid-" + self._version(bundle)
        except BaseException:
            self.browser.close()
            raise

    @staticmethod
    def _version(bundle: Path) -> str:
        package = bundle.parents[1] / "package.json"
        return json.loads(package.read_text())["version"] if package.is_file() else "unknown"

    def draw(self, chart: Chart) -> Picture:
        """Draw one chart; RGB at Mermaid's natural size."""
        code = format_mermaid(chart.graph, fence=False)
        size = self.browser.evaluate(f"draw({json.dumps(code)},{json.dumps('#' + chart.background)})")
        png = self.browser.screenshot(size["width"], size["height"])
        image = Image.open(io.BytesIO(png)).convert("RGB")
        boxes = {key: tuple(value) for key, value in size["boxes"].items()}
        paths = {key: tuple((x, y) for x, y in points) for key, points in size["paths"].items()}
        return Picture(image, with_boxes(chart.graph, boxes, paths), self.name)

    def close(self) -> None:
        """Stop the browser."""
        self.browser.close()

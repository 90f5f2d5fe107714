"""Latent actions of one clip drive another: as a picture, and as one HTML page that needs nothing else."""
# Shape letters: B pairs of clips, T frames, S side of a frame.

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headrace.nn.pretrained import void, write_atomically
from headrace.robot.latent_action import LatentActionModel

PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Latent actions carried over</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
figure { margin: 0 0 2.5rem; } img { width: 100%; image-rendering: pixelated; border: 1px solid #ccc; }
figcaption { margin-bottom: .4rem; } code { font-size: 12px; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } img { border-color: #444; } }
</style></head><body>
"""


class Transfer(NamedTuple):
    """Pairs of clips and what the model makes of them; all frames uint8 RGB.

    Attributes:
        driver: Whose latent actions are taken, shape (B, T, S, S, 3).
        start: The clip whose first frame they are applied to, same shape.
        driven: The second clip's first frame and the predictions from it, same shape.
        own: The same with the second clip's own latent actions, same shape.
        codes: Latent actions of `driver`, int64, shape (B, T-1, N).
    """

    driver: np.ndarray
    start: np.ndarray
    driven: np.ndarray
    own: np.ndarray
    codes: np.ndarray


@torch.inference_mode()
def carry_over(model: LatentActionModel, driver: Tensor, start: Tensor) -> Transfer:
    """Predict on from the first frame of `start` with the latent actions of `driver`, feeding predictions back.

    Args:
        model: Predicts pixels; in eval mode.
        driver: Clips in [0, 1], shape (B, T, 3, S, S), on any device.
        start: Same shape.

    Raises:
        ValueError: Shapes differ, or the model predicts features.
    """
    if driver.shape != start.shape:
        raise ValueError(f"clips must have one shape, got {tuple(driver.shape)} and {tuple(start.shape)}")
    driver, start = driver.to(model.device), start.to(model.device)
    actions = [model.encode(clip) for clip in (driver, start)]
    driven, own = (torch.cat((start[:, :1], model.rollout(start[:, :1], a.vectors)), 1) for a in actions)
    codes = actions[0].codes.cpu().numpy()
    return Transfer(_pixels(driver), _pixels(start), _pixels(driven), _pixels(own), codes)


def picture(transfer: Transfer, row: int, *, scale: int = 2) -> Image.Image:
    """Four strips of frames, one above the other: driver, its actions on the other clip, own actions, the true clip."""
    strips = (transfer.driver[row], transfer.driven[row], transfer.own[row], transfer.start[row])
    sheet = np.concatenate([np.concatenate(list(frames), 1) for frames in strips], 0)
    image = Image.fromarray(sheet)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write_page(transfer: Transfer, path: Path, *, title: str, note: str = "") -> None:
    """Write an HTML page with one figure per pair, pictures included in it.

    Args:
        transfer: What to show.
        path: Of the page.
        title: Its heading.
        note: A paragraph below it, such as model, data and date.
    """
    parts = [PAGE_HEAD, f"<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>"]
    parts.append(
        "<p>Each figure, from above: the clip whose latent actions are taken; these actions from the first frame of "
        "another clip on, every frame predicted from the ones predicted before; the same with that clip's own latent "
        "actions; that clip as it was.</p>"
    )
    for row in range(len(transfer.codes)):
        buffer = io.BytesIO()
        picture(transfer, row).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        words = " | ".join(" ".join(map(str, step)) for step in transfer.codes[row].tolist())
        parts.append(
            f"<figure><figcaption>Pair {row + 1}, codes <code>{words}</code></figcaption>"
            f'<img alt="four strips of frames" src="data:image/png;base64,{data}"></figure>'
        )
    parts.append("</body></html>\n")
    write_atomically(path, lambda target: void(target.write_text("".join(parts))))


def _pixels(clip: Tensor) -> np.ndarray:
    return (clip.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 1, 3, 4, 2).contiguous().numpy()

"""`headrace tokenizer eval` and `reconstruct`: measure a tokenizer, and look at what it gives back."""

import base64
import html
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np


def evaluate(
    tokenizer: str,
    /,
    *,
    data: str,
    count: int = 256,
    batch_size: int = 16,
    compare_at: int | None = None,
    fit: Literal["crop", "squash"] | None = None,
    device: str = "auto",
    steps: tuple[int, ...] = (),
    noise_seed: int = 0,
    vgg: Path | None = None,
    inception: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> int:
    """Measure how well a tokenizer gives pictures back: PSNR, SSIM, perceptual and Fréchet distances, use of codes.

    Prints one JSON object: what was measured and how, and the figures; with several `steps` a `sweep` of figures, one
    per number of steps. A decoder that integrates a flow patch by patch (UniFlow) also gets its seam ratio.

    Args:
        tokenizer: Folder, Hub id, or a name such as `tokenflow:tiny` (random weights).
        data: A folder of pictures, or `crops`, `shapes`, `mixed` (held-out ones).
        count: Pictures at most.
        batch_size: Pictures per pass.
        compare_at: Side at which pictures are compared [px]: protocol B, 256 in published tables. They go up to the
            tokenizer's size, through it and down again. Default: protocol A, the tokenizer's own size.
        fit: How pictures are made square. Default: the tokenizer's own way. The published row of TokenFlow-XL is from
            the centre crop, and its own way is to squash.
        device: Where the tokenizer runs; `auto` is the GPU when there is one. Measures are taken on the CPU.
        steps: Euler steps of a flow decoder (UniFlow), one or several; default the tokenizer's own.
        noise_seed: Of the noise that a flow decoder begins with.
        vgg: VGG-16 weights for LPIPS; left out without.
        inception: Inception weights of torch-fidelity for rFID; left out without.
        out: JSON file to write.
        seed: Of the built-in pictures.
    """
    from headrace.cli.tokenizer_pictures import in_batches, open_pictures
    from headrace.nn.perceptual import EfficientNetLite0, LpipsVGG
    from headrace.nn.pretrained import void, write_atomically
    from headrace.tokenizers.auto import load_tokenizer
    from headrace.tokenizers.compared_at import ComparedAt
    from headrace.tokenizers.reconstruction import evaluate as measure
    from headrace.tokenizers.uniflow import UniFlow

    loaded = load_tokenizer(tokenizer).to(_device(device))
    flow = loaded if isinstance(loaded, UniFlow) else None
    if noise_seed and flow is None:
        raise ValueError(
            f"--noise-seed is for decoders that integrate a flow (UniFlow); {type(loaded).__name__} draws no noise"
        )
    if steps and flow is None:
        raise ValueError(f"--steps is for decoders that integrate a flow (UniFlow); {type(loaded).__name__} has none")
    model = loaded if compare_at is None else ComparedAt(loaded, size=compare_at)
    preprocessing = model.preprocessing if fit is None else replace(model.preprocessing, fit=fit)
    pictures = open_pictures(data, preprocessing, part="held_out", count=count, seed=seed)
    try:
        offline = EfficientNetLite0.from_package(side=128)
    except ModuleNotFoundError:
        offline = None
    lpips = None if vgg is None else LpipsVGG.from_files(vgg)
    # Resizing moves and smears the borders of patches, so seams are measured at the tokenizer's own size only.
    patch = flow.config.encoder.patch if flow is not None and compare_at is None else None
    own = None if flow is None else flow.step_grid.steps if flow.step_grid is not None else flow.config.steps
    numbers: tuple[int | None, ...] = steps or (own,)
    figures: list[dict[str, Any]] = []
    for number in numbers:
        report = measure(
            model,
            in_batches(pictures, count, batch_size),
            efficientnet=offline,
            lpips=lpips,
            inception=inception,
            decoding=None if flow is None else {"seed": noise_seed} | ({"steps": number} if steps else {}),
            patch=patch,
        )
        figures.append({"steps": number, **asdict(report)})
    facts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "data": data,
        "seed": seed,
        "fit": preprocessing.fit,
        "protocol": "A" if compare_at is None else "B",
        "compared_at": preprocessing.size,
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
        "noise_seed": None if flow is None else noise_seed,
    }
    facts |= figures[0] if len(figures) == 1 else {"sweep": figures}
    text = json.dumps(facts, indent=2)
    print(text)
    if out is not None:
        write_atomically(out, lambda path: void(path.write_text(text + "\n")))
    return 0


def reconstruct(
    tokenizer: str,
    /,
    *,
    data: str,
    out: Path = Path("reconstruction"),
    count: int = 16,
    device: str = "auto",
    seed: int = 0,
) -> int:
    """Write a PNG grid of pictures and their reconstructions, and an HTML page with PSNR and coarse previews.

    Args:
        tokenizer: Folder, Hub id, or a name such as `tokenflow:tiny` (random weights).
        data: A folder of pictures, or `crops`, `shapes`, `mixed` (held-out ones).
        out: Folder of `grid.png` and `index.html`.
        count: Pictures at most.
        device: Where the tokenizer runs; `auto` is the GPU when there is one.
        seed: Of the built-in pictures.
    """
    import torch
    from PIL import Image

    from headrace.cli.tokenizer_pictures import open_pictures
    from headrace.nn.pretrained import void, write_atomically
    from headrace.tokenizers.auto import load_tokenizer
    from headrace.tokenizers.tokenflow import TokenFlow
    from headrace.tokenizers.uniflow_protocol import psnr

    model = load_tokenizer(tokenizer).to(_device(device))
    pictures = open_pictures(data, model.preprocessing, part="held_out", count=count, seed=seed)
    inputs = pictures.batch(np.arange(min(count, len(pictures))))
    columns = [("picture", inputs)]
    with torch.no_grad():
        tokens = model.encode(inputs.to(model.device))
        if isinstance(model, TokenFlow):
            ends = np.cumsum(model.config.quantizer.counts)[:-1]
            for end in (ends[len(ends) // 3], ends[2 * len(ends) // 3]):
                columns.append((f"first {end} codes", model.decode(tokens[:, :end])))
        columns.append(("reconstruction", model.decode(tokens)))
    scores = psnr(model.preprocessing.to_unit(inputs), model.preprocessing.to_unit(columns[-1][1]).cpu())
    shown = [(name, model.preprocessing.to_uint8(images)) for name, images in columns]
    grid = np.concatenate([np.concatenate(list(images), axis=0) for _, images in shown], axis=1)
    write_atomically(out / "grid.png", lambda path: Image.fromarray(grid).save(path, format="PNG"))
    page = _page(tokenizer, [(name, [_embedded(p) for p in images]) for name, images in shown], scores.tolist())
    write_atomically(out / "index.html", lambda path: void(path.write_text(page, encoding="utf-8")))
    print(f"mean PSNR {scores.mean():.2f} dB over {len(scores)} pictures; see {out / 'index.html'}")
    return 0


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _embedded(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(title: str, columns: list[tuple[str, list[str]]], scores: list[float]) -> str:
    """One self-contained page: a row per picture, a column per stage."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns) + "<th>PSNR [dB]</th>"
    rows = "".join(
        "<tr>"
        + "".join(f'<td><img src="{images[i]}" alt="{html.escape(name)} {i}"></td>' for name, images in columns)
        + f"<td>{score:.2f}</td></tr>"
        for i, score in enumerate(scores)
    )
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:4px;text-align:center}img{min-width:96px}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><p>{len(scores)} pictures.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></html>\n"
    )

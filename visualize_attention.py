"""Look at the locality a student has learned: one page of all, and a figure for each part of it.

    python visualize_attention.py                       # the newest finished run under runs/
    python visualize_attention.py RUN [RUN ...]         # these, e.g. cikd, kd and scratch together
    python visualize_attention.py --image cat.jpg       # your own picture instead of test images
    python visualize_attention.py --index 3 8 --query 2,5 --block 0 --head 1 --format pdf

The first run named (a cikd run, if there is one) is shown before training, after ALI and after LM,
others at their end. "Attention": the student's softmax(q kᵀ / sqrt(d)) among patches alone: CLS is
left out, as in ALI. The teacher, a ResNet, has none: its surrogate is shown.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # a notebook hands its own backend on to `!python`; we draw files
    os.environ["MPLBACKEND"] = "agg"

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

import cikd
from cikd import need

COLORS = {                                      # Okabe and Ito's palette; alike in all figures
    "before training": "#999999", "after ALI": "#E69F00", "after LM": "#0072B2", "cikd": "#0072B2",
    "joint": "#CC79A7", "kd": "#009E73", "scratch": "#D55E00", "twin": "#56B4E9"}
SHADES = {"ALI": "#E69F00", "LM": "#0072B2"}    # the curriculum's stages, behind curves

# %% 1. Runs: settings, models, images -------------------------------------------------------------
class Run(NamedTuple):
    """A finished run. `students` in the order of training: before training, after ALI, after LM."""
    folder: Path
    cfg: cikd.Config
    classes: list[str]
    students: dict[str, cikd.VisionTransformer]
    teacher: cikd.ResNetTeacher | None
    rows: list[dict]                            # of metrics.csv
    images_hash: str
    grid: int                                   # patches along a side
    pairs: list[tuple[int, int]]                # block, layer

def newest_run(output_dir: str | Path = "runs") -> Path:
    """The finished run under `output_dir` with the newest student.pt. Raises CIKDError."""
    found = sorted(Path(output_dir).glob("*/student.pt"), key=os.path.getmtime)
    need(found, f"{output_dir}: holds no finished run; make one with `python cikd.py`, or name one")
    return found[-1].parent

def load_run(folder: str | Path) -> Run:
    """A finished run's models, rebuilt from its settings. Raises CIKDError."""
    last, classes, cfg = cikd.load_student(folder)
    folder, students, teacher = Path(folder).expanduser().absolute(), {}, None
    for file, name in {"student_init": "before training", "student_ali": "after ALI"}.items():
        if (folder / f"{file}.pt").exists():
            students[name] = cikd.build_student(cfg, len(classes)).eval()
            cikd.load(folder / f"{file}.pt", students[name])
    students["after LM" if cfg.method == "cikd" else f"after {cfg.method}"] = last
    facts = json.loads((folder / "settings.json").read_text())
    if facts["teacher_file"]:
        file = folder.parent / facts["teacher_file"]
        teacher = cikd.ResNetTeacher(cfg.teacher, len(classes), cfg.image_size).eval()
        cikd.load(file, teacher)
        need(cikd.hash_of(file.read_bytes()) == facts["teacher_hash"],
             f"{file}: is not the teacher that {folder} learned from; bring that back")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    grid, pairs = cfg.image_size // cfg.patch_size, cikd.parse_pairs(cfg.pairs, cfg.student)
    return Run(folder, cfg, classes, students, teacher, rows, facts["images"], grid, pairs)

def run_images(run: Run, image: str | None, data_dir: str | None) -> tuple:
    """uint8 [n, 3, S, S] and labels [n]: the run's own test images, or one picture and None."""
    if image is not None:
        return cikd.to_rgb(cikd.open_image(image), run.cfg.image_size)[None], None
    run.cfg.data_dir = data_dir or run.cfg.data_dir
    data = cikd.load_dataset(run.cfg)           # shapes: other CPUs may round a pixel differently
    need(data.images_hash == run.images_hash or run.cfg.dataset == "shapes",
         f"{run.folder}: learned other images than {run.cfg.data_dir} holds; see --data-dir")
    return data.test

# %% 2. Numbers: what the figures show, and what the tests check -----------------------------------
def attention_kernels(maps: torch.Tensor) -> torch.Tensor:
    """Attention by offset from query to key (Cordonnier 2020): [..., N, N] -> [..., 2g-1, 2g-1].
    Summed over queries, divided by how many have a key at that offset; the centre is (0, 0)."""
    g = round(maps.shape[-1] ** 0.5)
    total = maps.new_zeros(*maps.shape[:-2], 2 * g - 1, 2 * g - 1)
    for query in range(g * g):
        row, col = g - 1 - query // g, g - 1 - query % g        # the first key's offset
        total[..., row:row + g, col:col + g] += maps[..., query, :].unflatten(-1, (g, g))
    keys = g - torch.arange(1 - g, g).abs()                     # along one axis
    return total / (keys[:, None] * keys)

def summary(images: torch.Tensor, maps_of) -> dict[str, torch.Tensor]:
    """Means over images of maps_of(images) -> maps [n, H, N, N] block by block: distance (patches)
    [blocks, H] and kernels [blocks, H, 2g-1, 2g-1]. Only one block's maps are held at a time."""
    total, n = {}, 0
    for part in cikd.probe(images):
        shown = [(cikd.attention_distance(maps).sum(0), attention_kernels(maps).sum(0))
                 for maps in maps_of(cikd.to_float(part))]
        for name, values in zip(("distance", "kernels"), zip(*shown)):
            total[name] = total.get(name, 0) + torch.stack(values)
        n += len(part)
    return {name: values / n for name, values in total.items()}

@torch.no_grad()
def surrogate_maps(run: Run, images: torch.Tensor, layer: int) -> torch.Tensor:
    """The teacher's surrogate at a layer, from 1: float [n, 3, S, S] -> [n, H, N, N]."""
    _, features = run.teacher.forward_taps(images, [layer], classify=False)
    return cikd.teacher_attention(features[layer], run.grid, run.cfg.heads, run.cfg.tau)

def stages_of(runs: list[Run]) -> list[tuple[Run, str, cikd.VisionTransformer, str]]:
    """(run, label, student, colour): all stages of the first run, then how the others ended."""
    methods = [run.cfg.method for run in runs]
    shown = [(runs[0], name, student, COLORS.get(name, COLORS[methods[0]]))
             for name, student in runs[0].students.items()]
    for i, run in enumerate(runs[1:], 1):
        twin, last = methods.count(methods[i]) > 1, list(run.students.values())[-1]
        label = methods[i] + f" {i + 1}, {run.folder.name[-20:]}" * twin
        shown.append((run, label, last, COLORS["twin" if twin else methods[i]]))
    return shown

def facts_of(run: Run) -> str:
    """What a figure is of, for its small print."""
    cfg = run.cfg
    data = Path(cfg.data_dir).absolute().name if cfg.dataset == "folder" else cfg.dataset
    teacher = f"teacher {cfg.teacher}, " if run.teacher else ""
    return f"{data}, {cfg.student}, {teacher}{cfg.epochs} epochs, seed {cfg.seed}"

def measure(runs: list[Run], images: torch.Tensor) -> tuple[list[dict], list[dict]]:
    """Summaries with label and accuracy (percent, or None): of each stage shown, and of references:
    uniform attention and the surrogates that the first run's student imitated."""
    first, N, students = runs[0], runs[0].grid ** 2, []
    for run, label, student, color in stages_of(runs):
        epoch = {"before training": None, "after ALI": run.cfg.ali_epochs - 1}.get(label, -1)
        accuracy = None if epoch is None else float(run.rows[epoch]["accuracy"])
        students.append(dict(label=label, color=color, accuracy=accuracy)
                        | summary(images, lambda x: cikd.student_maps(student, x)))
    found = {"uniform": summary(images[:1], lambda _: [torch.full((1, 1, N, N), 1 / N)])}
    for layer in sorted({layer for _, layer in first.pairs}) if first.teacher else []:
        maps = summary(images, lambda x: [surrogate_maps(first, x, layer)])
        found[f"surrogate, layer{layer}"] = maps
    return students, [dict(label=name, accuracy=None) | maps for name, maps in found.items()]

def print_table(rows: list[dict]) -> None:
    print(f"{'':20} accuracy  on itself  distance (patches): mean, then each block")
    for row in rows:
        accuracy, centre = row["accuracy"], row["kernels"].shape[-1] // 2
        itself = 100 * row["kernels"][..., centre, centre].mean()       # at offset (0, 0)
        each = " ".join(f"{distance:.2f}" for distance in row["distance"].mean(1))
        print(f"{row['label'][:20]:20} {'' if accuracy is None else f'{accuracy:.1f} %':>8} "
              f"{itself:8.1f} %  {row['distance'].mean():.2f}   {each}")

# %% 3. Figures ------------------------------------------------------------------------------------
def draw(figure: Figure, path: Path, run: Run) -> None:
    """Write it as path's ending says, with a line of small print."""
    height = 0.2 / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, height, 1, 1 - height))
    figure.text(0.995, 0.2 * height, facts_of(run), ha="right", fontsize=7.5, color="#555555")
    memory = io.BytesIO()
    figure.savefig(memory, format=path.suffix[1:])
    cikd.save(path, memory.getvalue())

def looks(runs: list[Run], images: torch.Tensor, query: int | None, block: int, head: int | None):
    """Where one patch of each image looks: its number [n], {column: maps [n, g, g]}, their scale.
    No `query`: the patch whose surrogate is most selective (lowest entropy), else a fixed one."""
    run, grid, x, whole = runs[0], runs[0].grid, cikd.to_float(images), {}
    layer = dict(run.pairs).get(block)
    if run.teacher and layer:
        whole[f"surrogate, layer{layer}"] = surrogate_maps(run, x, layer)
    for _, label, student, _ in stages_of(runs):
        maps = (maps for i, maps in enumerate(cikd.student_maps(student, x)) if i == block)
        whole[label] = next(maps)
    whole = {name: maps.mean(1) if head is None else maps[:, head] for name, maps in whole.items()}
    chosen = torch.full((len(x),), grid * grid // 2 + grid // 4 if query is None else query)
    if query is None and run.teacher and layer:
        surrogate = next(iter(whole.values()))                              # [n, N, N]
        chosen = torch.xlogy(surrogate, surrogate).sum(-1).argmax(1)
    columns = {name: maps[torch.arange(len(x)), chosen].unflatten(1, (grid, grid))
               for name, maps in whole.items()}
    top = np.quantile(torch.stack(list(columns.values())), 0.99)
    return chosen, columns, Normalize(0, float(top))

def show(a, image: torch.Tensor, query: int, grid: int, maps=None, norm=None) -> None:
    """An image [3, S, S] with its query patch framed; over it, if given, attention [g, g]."""
    picture, extent = image.permute(1, 2, 0).numpy(), (0, grid, grid, 0)
    if maps is None:
        a.imshow(picture, extent=extent)
    else:                                       # where there is little attention, the image
        a.imshow(picture.mean(2) * 0.5, cmap="gray", vmin=0, vmax=255, extent=extent)
        a.imshow(maps, cmap="magma", norm=norm, extent=extent,
                 alpha=np.clip(0.2 + norm(maps.numpy()), 0, 0.95))
    a.add_patch(Rectangle((query % grid, query // grid), 1, 1, fill=False, color="#56B4E9", lw=2))
    a.set(xticks=[], yticks=[])

def heatmaps(runs: list[Run], images: torch.Tensor, labels: torch.Tensor | None, path: Path,
             query: int | None, block: int, head: int | None = None) -> dict:
    """Where a patch looks: surrogate and trained students. Returns {column: [n, g, g]}."""
    run, grid = runs[0], runs[0].grid
    queries, columns, norm = looks(runs, images, query, block, head)
    columns.pop("before training")              # even, as the uniform value in the bar's label
    with torch.no_grad():
        p, predicted = list(run.students.values())[-1](cikd.to_float(images)).softmax(1).max(1)
    size = 1.7 * len(columns) + 4.2, 1.75 * len(images) + 1
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for i, (image, place) in enumerate(zip(images, queries.tolist())):
        text = "" if labels is None else f"true: {run.classes[int(labels[i])]}\n"
        text += f"predicted by {run.cfg.method}:\n{run.classes[predicted[i]]} ({100 * p[i]:.0f} %)"
        axes[i, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=10)
        show(axes[i, 0], image, place, grid)
        for a, maps in zip(axes[i, 1:], columns.values()):
            show(a, image, place, grid, maps[i], norm)
    for a, name in zip(axes[0], ["image and query", *columns]):
        a.set_title(name, fontsize=11)
    bar = figure.colorbar(ScalarMappable(norm, "magma"), ax=axes, shrink=0.9, extend="max")
    bar.set_label(f"attention\n(uniform: {1 / grid ** 2:.3f})", fontsize=9)
    heads = "mean of heads" if head is None else f"head {head}"
    figure.suptitle(f"Where the framed patch looks: block {block}, {heads}", fontsize=13)
    draw(figure, path, run)
    return columns

def distances(students: list[dict], references: list[dict], path: Path, run: Run) -> None:
    """Mean attention distance of each head against depth (Raghu 2021)."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes, blocks = figure.subplots(), np.arange(len(students[0]["distance"]))
    for i, m in enumerate(students):
        place, values = blocks + (i - (len(students) - 1) / 2) * 0.12, m["distance"].numpy()
        axes.plot(np.repeat(place, values.shape[1]), values.reshape(-1), "o", color=m["color"],
                  alpha=0.45, markersize=4, markeredgewidth=0)
        axes.plot(place, values.mean(1), color=m["color"], linewidth=2, label=m["label"])
    for m, style in zip(references, ("--", ":", "-.", (0, (1, 3)), (0, (5, 5)))):
        far, name = float(m["distance"].mean()), m["label"]
        axes.axhline(far, color="black", linestyle=style, linewidth=1, label=f"{name}: {far:.2f}")
    axes.set(xlabel="block (dots: heads; lines: their mean; drawn side by side)", xticks=blocks,
             ylabel="attention distance (patches)", title="How far the student looks, by depth")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    draw(figure, path, run)

def mosaic(a, panel: torch.Tensor):
    """Kernels [blocks, H, 2g-1, 2g-1], blocks downwards, heads to the right, on a logarithmic
    colour scale, so that no centre is cut off. Returns the image drawn, for a colour bar."""
    blocks, heads, side, _ = panel.shape
    tiles = torch.nn.functional.pad(panel, (1, 1, 1, 1), value=float("nan"))    # gaps
    tiles = tiles.permute(0, 2, 1, 3).reshape(blocks * (side + 2), heads * (side + 2))
    a.set(xticks=(np.arange(heads) + 0.5) * (side + 2) - 0.5, xticklabels=range(heads),
          yticks=(np.arange(blocks) + 0.5) * (side + 2) - 0.5, yticklabels=range(blocks))
    a.tick_params(length=0)
    return a.imshow(tiles, cmap="magma", norm=LogNorm(1e-3, 1, clip=True))

def kernels(panels: dict[str, torch.Tensor], tile: float = 0.75) -> Figure:
    """A figure of the mosaic of each panel, side by side."""
    blocks, heads, side, _ = next(iter(panels.values())).shape
    figure = Figure(figsize=(tile * heads * len(panels) + 1.9, tile * blocks + 1.1),
                    layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for a, (name, panel) in zip(axes, panels.items()):
        drawn = mosaic(a, panel)
        a.set(title=name, xlabel="head")
    axes[0].set_ylabel("block")
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8, extend="min")
    uniform = 4 / (side + 1) ** 2
    bar.set_label(f"mean attention at this offset,\nlogarithmic (uniform: {uniform:.3f})")
    figure.suptitle(f"each tile: query in its centre, edges {side // 2} patches away", fontsize=9)
    return figure

def curves(a, runs: list[Run], name: str, skip_zeros: bool = False) -> dict[str, list[float]]:
    """A column of metrics.csv by epoch, over the first run's stages. Returns {run: values}."""
    cfg, drawn = runs[0].cfg, {}
    others = stages_of(runs)[len(runs[0].students):]
    for run, label, _, color in [(runs[0], cfg.method, None, COLORS[cfg.method]), *others]:
        drawn[label] = [float(row[name]) for row in run.rows]
        epochs = [i for i, value in enumerate(drawn[label]) if value or not skip_zeros]
        a.plot(np.add(epochs, 1), [drawn[label][i] for i in epochs], color=color, linewidth=2,
               label=label, marker="o" if len(epochs) == 1 else None)
    longest = max(len(run.rows) for run in runs)
    a.set(xlabel="epoch", xlim=(1, max(2, longest)))
    a.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    a.grid(alpha=0.3)
    if cfg.method == "cikd":
        spans = {"ALI": (1, cfg.ali_epochs + 0.5), "LM": (cfg.ali_epochs + 0.5, cfg.epochs)}
        for stage, (begin, end) in spans.items():
            a.axvspan(begin, end, color=SHADES[stage], alpha=0.1, linewidth=0)
            a.text((begin + end) / 2, 0.98, stage, transform=a.get_xaxis_transform(), ha="center",
                   va="top", fontsize=9, color="#555555")
    if name == "accuracy":
        chance = 100 / len(runs[0].classes)
        a.axhline(chance, color="black", linestyle=":", linewidth=1)
        a.annotate("chance", (longest, chance), (-2, 2), textcoords="offset points", ha="right",
                   fontsize=8)
        a.set_ylim(bottom=0)
    return drawn

def curriculum(runs: list[Run], path: Path) -> dict[str, dict[str, list[float]]]:
    """Loss terms, accuracy and attention distance by epoch. Returns {panel: {run: values}}."""
    panels = {"ali": "ALI, training (nats)", "ce": "cross-entropy, training (nats)",
              "dkd": "DKD, training (nats)", "accuracy": "test accuracy (%)",
              "attention_distance": "attention distance (patches)"}
    above = [name for name in ("ali", "ce", "dkd")
             if any(float(row[name]) for run in runs for row in run.rows)]
    figure = Figure(figsize=(9, 5.8), layout="constrained")
    axes = figure.subplot_mosaic([[name for name in above for _ in range(6 // len(above))],
                                  ["accuracy"] * 3 + ["attention_distance"] * 3])
    drawn = {}
    for name, a in axes.items():
        drawn[name] = curves(a, runs, name, skip_zeros=name in above)
        a.set_title(panels[name], fontsize=10)
    figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle("The curriculum, epoch by epoch (shaded: its stages)", fontsize=12)
    draw(figure, path, runs[0])
    return drawn

def scheme(a) -> None:
    """The method in two drawings: ALI, LM."""
    for left, stage, title in ((0, "ALI", "Stage 1, ALI: learn where to look (no labels)"),
                               (10.4, "LM", "Stage 2, LM: learn what to say")):
        a.add_patch(Rectangle((left, 0), 9.6, 4, color=SHADES[stage], alpha=0.1, linewidth=0))
        a.text(left + 0.2, 3.6, title, fontsize=11, weight="bold", va="center")
    for x, y, text in (
            (1.2, 2.5, "CNN teacher\n(frozen)"), (4.7, 2.5, "maps: patches that\nlook alike to it"),
            (1.2, 0.8, "ViT student"), (4.7, 0.8, "attention of its\nfirst and last block"),
            (8.2, 1.65, "KL: imitate\nthe maps"), (11.6, 2.5, "CNN teacher\n(frozen)"),
            (14.6, 2.5, "logits"), (18.3, 2.5, "DKD: imitate\nthe logits"), (14.6, 0.8, "logits"),
            (11.6, 0.8, "ViT student"), (18.3, 0.8, "cross-entropy\nwith the labels")):
        a.text(x, y, text, ha="center", va="center", fontsize=10,
               bbox=dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor="#555555"))
    for *begin, x, y in ((2.1, 2.5, 3.2, 2.5), (2.1, 0.8, 3.4, 0.8), (6.2, 2.3, 7.4, 1.9),
                         (6, 1, 7.4, 1.4), (12.5, 2.5, 14.1, 2.5), (12.5, 0.8, 14.1, 0.8),
                         (15.1, 2.5, 17.3, 2.5), (15.1, 0.8, 17.3, 0.8), (15.1, 1, 17.3, 2.2)):
        a.annotate("", (x, y), begin, arrowprops=dict(arrowstyle="->", color="#555555"))
    a.annotate("", (10.4, 2), (9.6, 2), arrowprops=dict(arrowstyle="simple", color="#555555"))
    a.set(xlim=(0, 20), ylim=(0, 4))
    a.axis("off")

def overview(runs: list[Run], students: list[dict], image: torch.Tensor, path: Path,
             query: int | None, block: int, head: int | None) -> None:
    """One page for a slide: the scheme; one image [1, 3, S, S]; kernels; accuracy by epoch."""
    run, grid = runs[0], runs[0].grid
    few = [run, *(other for other in runs[1:] if other.cfg.method == "scratch")]
    queries, columns, norm = looks(few, image, query, block, head)
    figure = Figure(figsize=(12, 9.4), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.3, 2.6, 4.2))
    scheme(top.subplots())
    top.suptitle("CIKD: a CNN teaches a Vision Transformer, from easy to difficult", fontsize=14)
    axes = middle.subplots(1, len(columns) + 1)
    for a, (name, maps) in zip(axes, {"image and query patch": None, **columns}.items()):
        show(a, image[0], int(queries[0]), grid, None if maps is None else maps[0], norm)
        a.set_title(name, fontsize=10)
    middle.suptitle(f"Where the framed patch looks (block {block})", fontsize=11)
    left, right = bottom.subfigures(1, 2, width_ratios=(1.15, 1))
    for a, m in zip(left.subplots(1, len(run.students), squeeze=False)[0], students):
        mosaic(a, m["kernels"])
        a.set_title(m["label"], fontsize=10)
        a.set(xlabel="head", ylabel="block" if m is students[0] else None)
    left.suptitle("Attention by offset from the query (a tile's centre)", fontsize=11)
    upper, lower = right.subplots(2, 1, height_ratios=(2, 1))
    curves(upper, runs, "accuracy")
    upper.set_ylabel("test accuracy (%)")
    methods, ends = zip(*((r.cfg.method, float(r.rows[-1]["accuracy"])) for r in runs))
    bars = lower.barh(range(len(runs)), ends, 0.6, color=[COLORS[method] for method in methods])
    lower.bar_label(bars, fmt=" %.1f %%", fontsize=9)
    lower.set(yticks=range(len(runs)), yticklabels=methods, xlim=(0, 115), xticks=range(0, 101, 20),
              ylim=(max(2, len(runs)) - 0.5, -0.5), xlabel="test accuracy after the last epoch (%)")
    draw(figure, path, run)

def locality_gif(run: Run, images: torch.Tensor, path: Path) -> dict[int, torch.Tensor]:
    """The kernels epoch by epoch, from what --snapshot-every kept. Returns {epoch: kernels}."""
    files = sorted((run.folder / "snapshots").glob("epoch_*.pt"))
    need(files, f"{run.folder}: holds no snapshots for --gif; train with --snapshot-every 1")
    student, frames = cikd.build_student(run.cfg, len(run.classes)).eval(), {}
    for file in [run.folder / "student_init.pt", *files]:
        cikd.load(file, student)
        epoch = int(file.stem[6:]) if file in files else 0
        frames[epoch] = summary(images, lambda x: cikd.student_maps(student, x))["kernels"]
    pictures = []
    for epoch, frame in frames.items():
        stage = run.rows[epoch - 1]["stage"] if epoch else "before training"
        canvas = FigureCanvasAgg(kernels({f"epoch {epoch}: {stage}": frame}))
        canvas.figure.dpi = 80
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    memory = io.BytesIO()
    pictures[0].save(memory, "GIF", save_all=True, append_images=pictures[1:], duration=400, loop=0)
    cikd.save(path, memory.getvalue())
    return frames

# %% 4. Command line -------------------------------------------------------------------------------
def visualize(args: argparse.Namespace) -> Path:
    """All figures of the runs named. Returns their folder. Raises CIKDError."""
    runs = [load_run(folder) for folder in args.runs or [newest_run()]]
    runs.sort(key=lambda run: run.cfg.method != "cikd")         # a cikd run comes first
    first, cfg, grid = runs[0], runs[0].cfg, runs[0].grid
    for run in runs:
        need((run.images_hash, run.grid, run.cfg.student, run.cfg.heads)
             == (first.images_hash, grid, cfg.student, cfg.heads),
             f"{run.folder}: has other images, patches or heads than {first.folder}; show it alone")
    last, block = cikd.STUDENTS[cfg.student]["depth"] - 1, args.block
    block = first.pairs[-1][0] if block is None else block
    need(0 <= block <= last, f"--block: must be from 0 to {last}")
    need(0 <= (args.head or 0) < cfg.heads, f"--head: must be from 0 to {cfg.heads - 1}")
    given = re.fullmatch(r"(\d{1,4}),(\d{1,4})", args.query or "0,0")
    row, column = [int(part) for part in given.groups()] if given else (grid, grid)
    need(max(row, column) < grid, f"--query: must be ROW,COL, both from 0 to {grid - 1}")
    query = row * grid + column if args.query else None
    images, labels = run_images(first, args.image, args.data_dir)
    index = args.index or [0]
    if not args.index and labels is not None:   # one image of each of the first four classes
        index = [int((labels == k).int().argmax()) for k in labels.unique()[:4]]
    need(0 <= min(index) <= max(index) < len(images), f"--index: must be below {len(images)}")
    out = Path(args.output_dir or first.folder / "figures").expanduser()
    students, references = measure(runs, images)
    print_table(references + students)
    if args.image:
        with torch.no_grad():
            p = list(first.students.values())[-1](cikd.to_float(images)).softmax(1)[0]
        best = [f"{first.classes[i]} {100 * p[i]:.1f} %" for i in p.argsort(descending=True)[:3]]
        print(f"{args.image}: {', '.join(best)}")
    scratch = [run for run in runs[1:] if run.cfg.method == "scratch"]
    few = [first, *scratch] if scratch else runs
    labels, images_shown = labels if labels is None else labels[index], images[index]
    def file(name):
        return out / f"{name}.{args.format}"
    look = query, block, args.head
    overview(runs, students, images_shown[:1], file("summary"), *look)
    heatmaps(few, images_shown, labels, file("heatmaps"), *look)
    kept = {label for _, label, _, _ in stages_of(few)}
    distances([m for m in students if m["label"] in kept], references[1:], file("distance"), first)
    panels = {m["label"]: m["kernels"] for m in students[:len(first.students)]}
    draw(kernels(panels, tile=min(0.75, 10 / (cfg.heads * len(panels)))), file("kernels"), first)
    curriculum(runs, file("curriculum"))
    if args.gif:
        locality_gif(first, images, out / "locality.gif")
    print(f"see {', '.join(sorted(p.name for p in out.iterdir()))} in {out}")
    return out

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("visualize_attention.py", allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message} (--help lists all that can be given)")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs [the newest under runs/]")
    add("--image", metavar="FILE", help="draw everything, averages too, from this picture")
    add("--index", type=int, nargs="+", metavar="I", help="test images [one of four classes]")
    add("--query", metavar="ROW,COL", help="query patch [where the surrogate is most selective]")
    add("--block", type=int, help="block of the heatmaps [the last that ALI taught]")
    add("--head", type=int, help="head of the heatmaps, from 0 [mean of all]")
    add("--data-dir", metavar="DIR", help="where the run's images lie now [where they lay]")
    add("--output-dir", metavar="DIR", help="where the figures go [RUN/figures]")
    add("--format", choices=("png", "pdf", "svg"), default="png", help="of the figures [png]")
    add("--gif", action="store_true", help="also locality.gif; needs --snapshot-every")
    return cikd.run_command("visualize_attention", lambda: visualize(parser.parse_args(argv)))

if __name__ == "__main__" and (not hasattr(sys, "ps1") or sys.argv[0].endswith("attention.py")):
    sys.exit(main())                            # but not where cells are run one by one

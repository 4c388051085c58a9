"""Look at the locality a student has learned: one page of all, and a figure for each part of it.

    python visualize_attention.py                       # the newest finished run under runs/
    python visualize_attention.py RUN [RUN ...]         # these, e.g. cikd, kd and scratch together
    python visualize_attention.py --image cat.jpg       # your own picture instead of test images
    python visualize_attention.py --index 3 8 --query 2 5 --format pdf --html

The first run named (a cikd run, if there is one) is shown before training, after ALI and after LM,
others at their end; heatmaps and distances show only scratch of them. CLS is left out, as in ALI.
"""
from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import sys
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

import cikd
from cikd import need

COLORS = {"before training": "#999999", "after ALI": "#E69F00", "after LM": "#0072B2",
          "cikd": "#0072B2", "joint": "#CC79A7", "kd": "#009E73", "scratch": "#D55E00",
          "twins": ("#56B4E9", "#F0E442", "#000000", "#882255", "#44AA99")}     # Okabe, Ito; Tol

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
    found = sorted(Path(output_dir).glob("*/student.pt"), key=lambda file: file.stat().st_mtime)
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
        label = f"{methods[i]} {i} …{run.folder.name[-9:]}" if twin else methods[i]
        shown.append((run, label, last, COLORS["twins"][i % 5] if twin else COLORS[methods[i]]))
    return shown

def facts_of(run: Run) -> str:
    """What a figure is of, for its small print."""
    cfg = run.cfg
    data = Path(cfg.data_dir).absolute().name if cfg.dataset == "folder" else cfg.dataset
    teacher = f", teacher {cfg.teacher}" if run.teacher else ""
    return f"{data}, {cfg.student}{teacher}, {cfg.epochs} epochs, seed {cfg.seed}"

def measure(runs: list[Run], images: torch.Tensor) -> tuple[list[dict], list[dict]]:
    """Summaries with label and accuracy (percent, or None): of each stage shown, and of references,
    the surrogates of the first run's teacher."""
    students, run = [], runs[0]
    layers = sorted({layer for _, layer in run.pairs}) if run.teacher else []
    for shown, label, student, color in stages_of(runs):
        epoch = {"before training": None, "after ALI": run.cfg.ali_epochs - 1}.get(label, -1)
        accuracy = None if epoch is None else float(shown.rows[epoch]["accuracy"])
        students.append(dict(label=label, color=color, accuracy=accuracy)
                        | summary(images, lambda x: cikd.student_maps(student, x)))
    return students, [dict(label=f"surrogate, layer{layer}", accuracy=None) | summary(
        images, lambda x: [surrogate_maps(run, x, layer)]) for layer in layers]

def print_table(rows: list[dict]) -> None:
    print(f"{'':20} accuracy  distance (patches): mean, then each block")
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1f} %"
        label, far = row["label"], row["distance"].mean(1)
        print(f"{label:20} {accuracy:>8}  {far.mean():.2f}   " + " ".join(f"{x:.2f}" for x in far))

# %% 3. Figures -----------------------------------------------------------------------------------
def written(save, *args, **kwargs) -> bytes:                # what save(file, ...) writes
    memory = io.BytesIO()
    save(memory, *args, **kwargs)
    return memory.getvalue()

def draw(figure: Figure, path: Path, run: Run) -> None:
    """Write it as path's ending says, with a line of small print."""
    figure.supxlabel(facts_of(run), x=0.99, ha="right", fontsize=7.5, color="#555555")
    cikd.save(path, written(figure.savefig, format=path.suffix[1:]))

def looks(runs: list[Run], images: torch.Tensor, query: int | None) -> tuple[torch.Tensor, dict]:
    """Where one patch of each image looks in the last block that imitates, mean of heads, in the
    first run and scratch: its number [n], {column: maps [n, g, g]}. No `query`: the patch whose
    surrogate is most selective (lowest entropy), without a teacher a fixed one."""
    run, grid, x, whole = runs[0], runs[0].grid, cikd.to_float(images), {}
    block, layer = max(run.pairs)
    chosen = torch.full((len(x),), grid * grid // 2 + grid // 4 if query is None else query)
    if run.teacher:
        whole[f"surrogate, layer{layer}"] = maps = surrogate_maps(run, x, layer).mean(1)
        if query is None:
            chosen = torch.xlogy(maps, maps).sum(-1).argmax(1)
    for shown, label, student, _ in stages_of(runs):
        if shown is run or shown.cfg.method == "scratch":
            whole[label] = list(cikd.student_maps(student, x))[block].mean(1)       # [n, N, N]
    return chosen, {name: maps[torch.arange(len(x)), chosen].unflatten(1, (grid, grid))
                    for name, maps in whole.items()}

def show(figure, images: torch.Tensor, queries: torch.Tensor, columns: dict) -> tuple:
    """A row for each image: itself, its query patch framed, and over it each column's attention."""
    grid = len(next(iter(columns.values()))[0])
    norm = Normalize(0, float(np.quantile(torch.stack(list(columns.values())), 0.99)))
    axes = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for row, image, query, *maps in zip(axes, images, queries.tolist(), *columns.values()):
        picture, extent = image.permute(1, 2, 0).numpy(), (0, grid, grid, 0)
        row[0].imshow(picture, extent=extent)
        for a, attention in zip(row[1:], maps):         # where there is little of it, the image
            a.imshow(picture.mean(2) * 0.5, cmap="gray", vmin=0, vmax=255, extent=extent)
            a.imshow(attention, cmap="magma", norm=norm, extent=extent,
                     alpha=np.clip(0.2 + norm(attention.numpy()), 0, 0.95))
        for a in row:
            place = query % grid, query // grid
            a.add_patch(Rectangle(place, 1, 1, fill=False, color="#56B4E9", linewidth=2))
            a.set(xticks=[], yticks=[])
    for a, name in zip(axes[0], ["image and query", *columns]):
        a.set_title(name, fontsize=10)
    return axes, norm

def heatmaps(runs: list[Run], images: torch.Tensor, captions: list[str], path: Path,
             query: int | None) -> dict[str, torch.Tensor]:
    """Where a patch looks: surrogate and trained students. Returns {column: [n, g, g]}."""
    queries, columns = looks(runs, images, query)
    columns.pop("before training", None)        # even, as the uniform value in the bar's label
    figure = Figure((1.7 * len(columns) + 4.2, 1.75 * len(images) + 1), layout="constrained")
    axes, norm = show(figure, images, queries, columns)
    for a, caption in zip(axes[:, 0], captions):
        a.set_ylabel(caption, rotation=0, ha="right", va="center", parse_math=False)
    bar = figure.colorbar(ScalarMappable(norm, "magma"), ax=axes, shrink=0.9, extend="max")
    bar.set_label(f"attention, mean of heads\n(uniform: {1 / runs[0].grid ** 2:.3f})", fontsize=9)
    figure.suptitle(f"Where the framed patch looks: block {max(runs[0].pairs)[0]}", fontsize=13)
    draw(figure, path, runs[0])
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
    for m, style in zip(references, ("--", ":", "-.", (0, (1, 3)))):
        far, name = float(m["distance"].mean()), m["label"]
        axes.axhline(far, color="black", linestyle=style, linewidth=1, label=f"{name}: {far:.2f}")
    axes.set(xlabel="block (dots: heads; lines: their mean)", xticks=blocks,
             ylabel="attention distance (patches)", title="How far the student looks, by depth")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    draw(figure, path, run)

def kernels(panels: dict[str, torch.Tensor], figure=None) -> Figure:
    """For each panel its kernels [blocks, H, 2g-1, 2g-1], blocks downwards, heads to the right, on
    one logarithmic colour scale, so that no centre is cut off."""
    blocks, heads, side, _ = next(iter(panels.values())).shape
    tile = min(0.75, 10 / (heads * len(panels)), 6 / blocks)
    size = tile * heads * len(panels) + 2.9, tile * blocks + 1.2
    figure = figure or Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for a, (name, panel) in zip(axes, panels.items()):
        tiles = torch.nn.functional.pad(panel, (1, 1, 1, 1), value=float("nan"))    # gaps
        mosaic = tiles.permute(0, 2, 1, 3).reshape(blocks * (side + 2), heads * (side + 2))
        drawn = a.imshow(mosaic, cmap="magma", norm=LogNorm(1e-3, 1, clip=True))
        a.set(xlabel="head", xticks=(np.arange(heads) + 0.5) * (side + 2) - 0.5,
              xticklabels=range(heads), yticks=(np.arange(blocks) + 0.5) * (side + 2) - 0.5,
              yticklabels=range(blocks))
        a.set_title(name, fontsize=10)
        a.tick_params(length=0)
    axes[0].set_ylabel("block")
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8, extend="min")
    bar.set_label(f"mean attention, logarithmic\n(uniform: {4 / (side + 1) ** 2:.3f})", fontsize=9)
    figure.suptitle(f"mean attention around a query (tiles: ±{side // 2} patches)", fontsize=10)
    return figure

def curves(a, runs: list[Run], name: str) -> dict[str, list[float]]:
    """A column of metrics.csv by epoch, over the first run's stages. Returns {run: values}."""
    cfg, drawn, chance = runs[0].cfg, {}, 100 / len(runs[0].classes)
    others = stages_of(runs)[len(runs[0].students):]
    for run, label, _, color in [(runs[0], cfg.method, None, COLORS[cfg.method]), *others]:
        drawn[label] = [float(row[name]) for row in run.rows]
        epochs = [i for i, value in enumerate(drawn[label]) if value or name == "accuracy"]
        a.plot(np.add(epochs, 1), [drawn[label][i] for i in epochs], color=color, linewidth=2,
               label=label, marker="o" if len(epochs) == 1 else None)
    longest = max(len(run.rows) for run in runs)
    a.set(xlabel="epoch", xlim=(1, max(2, longest)))
    a.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    a.grid(alpha=0.3)
    switch, end = cfg.ali_epochs + 0.5, cfg.epochs
    for stage, x, to in (("ALI", 1, switch), ("LM", switch, end)) if cfg.method == "cikd" else ():
        a.axvspan(x, to, color=COLORS[f"after {stage}"], alpha=0.1, linewidth=0)
        a.text((x + to) / 2, 0.98, stage, transform=a.get_xaxis_transform(), ha="center", va="top")
    if name == "accuracy":
        a.axhline(chance, color="black", linestyle=":", linewidth=1)
        a.text(longest, chance, "chance ", ha="right", va="bottom", fontsize=8)
        a.set_ylim(bottom=0)
    return drawn

def curriculum(runs: list[Run], path: Path) -> dict[str, dict[str, list[float]]]:
    """Loss terms, accuracy and attention distance by epoch. Returns {panel: {run: values}}."""
    panels = {"ali": "ALI, training (nats)", "ce": "cross-entropy, training (nats)",
              "dkd": "DKD, training (nats)", "accuracy": "test accuracy (%)",
              "attention_distance": "attention distance (patches)"}
    figure, drawn = Figure(figsize=(10, 5.6), layout="constrained"), {}
    axes = figure.subplots(2, 3)
    for (name, title), a in zip(panels.items(), axes.flat):
        drawn[name] = curves(a, runs, name)
        a.set_title(title, fontsize=10)
    axes[1, 2].axis("off")
    axes[1, 2].legend(*a.get_legend_handles_labels(), loc="center")
    figure.suptitle("The curriculum, epoch by epoch (shaded: its stages)", fontsize=12)
    draw(figure, path, runs[0])
    return drawn

def scheme(a) -> None:
    """The method in two drawings: ALI, LM."""
    for left, stage, title in ((0, "after ALI", "Stage 1, ALI: learn where to look (no labels)"),
                               (10.4, "after LM", "Stage 2, LM: learn what to say")):
        a.add_patch(Rectangle((left, 0), 9.6, 4, color=COLORS[stage], alpha=0.1, linewidth=0))
        a.text(left + 0.2, 3.6, title, fontsize=11, weight="bold", va="center")
    for x, y, text in (
            (1.2, 2.5, "CNN teacher\n(frozen)"), (4.7, 2.5, "maps: patches that\nlook alike to it"),
            (1.2, 0.8, "ViT student"), (4.7, 0.8, "attention of its\nblocks"),
            (8.2, 1.65, "KL: imitate\nthe maps"), (11.6, 2.5, "CNN teacher\n(frozen)"),
            (14.6, 2.5, "logits"), (18.3, 2.5, "DKD: imitate\nthe logits"), (14.6, 0.8, "logits"),
            (11.6, 0.8, "ViT student"), (18.3, 0.8, "cross-entropy\nwith the labels")):
        a.text(x, y, text, ha="center", va="center", fontsize=10,
               bbox=dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor="#555555"))
    for *begin, x, y in ((2.1, 2.5, 3.4, 2.5), (2.1, 0.8, 3.4, 0.8), (6.1, 2.3, 7.4, 1.9),
                         (6.1, 1, 7.4, 1.4), (12.5, 2.5, 14.1, 2.5), (12.5, 0.8, 14.1, 0.8),
                         (15.1, 2.5, 17.3, 2.5), (15.1, 0.8, 17.3, 0.8), (15.1, 1, 17.3, 2.2)):
        a.annotate("", (x, y), begin, arrowprops=dict(arrowstyle="->", color="#555555"))
    a.set(xlim=(0, 20), ylim=(0, 4))
    a.axis("off")

def overview(runs: list[Run], panels: dict, image: torch.Tensor, query: int | None,
             path: Path) -> None:
    """One page for a slide: the scheme; one image [1, 3, S, S]; kernels; accuracy by epoch."""
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.3, 2.6, 4.4))
    scheme(top.subplots())
    top.suptitle("CIKD: a CNN teaches a Vision Transformer, from easy to difficult", fontsize=14)
    show(middle, image, *looks(runs, image, query))
    middle.suptitle(f"Where the framed patch looks (block {max(runs[0].pairs)[0]})", fontsize=10)
    left, right = bottom.subfigures(1, 2, width_ratios=(1.2, 1))
    kernels(panels, left)
    upper, lower = right.subplots(2, 1, height_ratios=(2, 1))
    curves(upper, runs, "accuracy")
    upper.set_ylabel("test accuracy (%)")
    ends = [float(run.rows[-1]["accuracy"]) for run in runs]
    colors, names = zip(*((line.get_color(), line.get_label()) for line in upper.lines[:len(runs)]))
    bars = lower.barh(range(len(runs)), ends, 0.6, color=colors)
    lower.bar_label(bars, fmt=" %.1f %%", fontsize=9)
    lower.set(yticks=range(len(runs)), yticklabels=names, xlim=(0, 115), xticks=range(0, 101, 20),
              ylim=(max(2, len(runs)) - 0.5, -0.5), xlabel="test accuracy after the last epoch (%)")
    draw(figure, path, runs[0])

def locality_gif(run: Run, images: torch.Tensor, path: Path) -> dict[int, torch.Tensor]:
    """The kernels epoch by epoch, from what --snapshot-every kept. Returns {epoch: kernels}."""
    files = sorted((run.folder / "snapshots").glob("epoch_*.pt"))
    need(files, f"{run.folder}: holds no snapshots; train with --snapshot-every 1 --overwrite")
    student, frames, pictures = cikd.build_student(run.cfg, len(run.classes)).eval(), {}, []
    for file in [run.folder / "student_init.pt", *files]:
        cikd.load(file, student)
        epoch = int(file.stem[6:]) if file in files else 0
        stage = run.rows[epoch - 1]["stage"] if epoch else "before training"
        frames[epoch] = summary(images, lambda x: cikd.student_maps(student, x))["kernels"]
        picture = written(kernels({f"epoch {epoch}: {stage}": frames[epoch]}).savefig, dpi=80)
        pictures.append(Image.open(io.BytesIO(picture)).convert("RGB"))
    cikd.save(path, written(pictures[0].save, "GIF", save_all=True, append_images=pictures[1:],
                            duration=400, loop=0))
    return frames

# %% 4. Explorer: a page for the seminar room -----------------------------------------------------
PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Where does a patch look?</title><style>
  body { font: 16px/1.4 sans-serif; max-width: 1000px; margin: 1em auto; padding: 0 1em }
  main { display: flex; flex-wrap: wrap; gap: 16px } figure { margin: 0; text-align: center }
  figure div { position: relative; height: 224px } figcaption { width: 14em; white-space: pre-wrap }
  img, canvas { position: absolute; left: 0; width: 224px; image-rendering: pixelated }
  canvas { cursor: crosshair } figure + figure img { filter: grayscale(1) brightness(0.4) }</style>
<h1>Where does a patch look?</h1>
<p>Move over a patch. A click keeps it, another lets it go. Bright is much attention: each map is
scaled by its own maximum. Distance: how far this patch looks on average, in patches. <i>$FACTS</i>
<p>image <select>$IMAGES</select> block <select>$BLOCKS</select> head <select>$HEADS</select></p>
<main>$PANELS</main>
<script type="application/json" id="data">$DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent), grid = data.grid;
const maps = Uint8Array.from(atob(data.maps), character => character.charCodeAt(0));
const selects = [...document.querySelectorAll("select")], step = 224 / grid;
function draw() {
  const [image, block, head] = selects.map(select => select.selectedIndex);
  document.querySelectorAll("figure").forEach((figure, i) => {
    const context = figure.querySelector("canvas").getContext("2d");
    figure.querySelector("img").src = "data:image/png;base64," + data.images[image];
    let text = data.captions[image];
    context.clearRect(0, 0, 224, 224);
    if (i > 0) {                        // after the image itself come the panels
      const at = [image, block, i - 1, head, data.query].reduce((n, k, d) => n * data.shape[d] + k);
      maps.slice(at * grid ** 2, (at + 1) * grid ** 2).forEach((value, key) => {
        context.fillStyle = `rgba(255, 220, 90, ${value / 255})`;
        context.fillRect(key % grid * step, Math.floor(key / grid) * step, step, step);
      });
      text = `distance ${data.distances[at].toFixed(2)}`;
    }
    figure.querySelector("span").textContent = text;
    Object.assign(context, {strokeStyle: "#56B4E9", lineWidth: 3});
    context.strokeRect(data.query % grid * step, Math.floor(data.query / grid) * step, step, step);
  });
}
function look(event) {
  if (event.type == "click") data.kept = !data.kept;
  else if (data.kept) return;
  const place = offset => Math.min(grid - 1, Math.floor(Math.max(0, offset) / step));
  data.query = place(event.offsetY) * grid + place(event.offsetX);
  draw();
}
document.querySelectorAll("canvas").forEach(canvas => canvas.onpointermove = canvas.onclick = look);
selects.forEach(select => select.onchange = draw);
draw();
</script>
"""

def explorer(runs: list[Run], images: torch.Tensor, captions: list[str], path: Path) -> None:
    """A page that works offline: where each patch looks, in the blocks that imitate. Its maps
    [n, blocks, panels, H, N, N] are 8 bits, each scaled by its own maximum. n fits 1 MB or is 1."""
    run, grid, x, layers = runs[0], runs[0].grid, cikd.to_float(images), dict(runs[0].pairs)
    panels = {}                                 # name: colour, [n, H, N, N] of each block
    if run.teacher:
        panels["teacher's surrogate"] = "#000", [surrogate_maps(run, x, i) for i in layers.values()]
    for _, label, student, color in stages_of(runs):
        found = {i: maps for i, maps in enumerate(cikd.student_maps(student, x)) if i in layers}
        panels[label] = color, [found[block] for block in layers]
    maps = torch.stack([torch.stack(found, 1) for _, found in panels.values()], 2)
    maps = maps[:max(1, 680_000 // maps[0].numel())]            # base64 needs a third more
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    far = (maps * torch.cdist(place, place)).sum(-1).flatten().tolist()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:len(maps)]]
    pictures = [base64.b64encode(written(image.save, "PNG")).decode() for image in pictures]
    data = dict(
        grid=grid, query=grid * grid // 2 + grid // 4, shape=maps.shape[:5], captions=captions,
        images=pictures, distances=[round(distance, 3) for distance in far],
        maps=base64.b64encode((255 * maps / maps.amax(-1, True)).round().byte().numpy()).decode())
    figure = ('<figure><div><img><canvas width="224" height="224"></canvas></div><figcaption>'
              '<b style="color: {}">{}</b><br><span></span></figcaption></figure>')
    page = Template(PAGE).safe_substitute(
        FACTS=facts_of(run), IMAGES="".join(f"<option>{i + 1}" for i in range(len(maps))),
        BLOCKS="".join(f"<option>{b}, beside layer{layer}" for b, layer in layers.items()),
        HEADS="".join(f"<option>{i}" for i in range(run.cfg.heads)),
        PANELS=figure.format("black", "image") + "".join(
            figure.format(color, name) for name, (color, _) in panels.items()),
        DATA=json.dumps(data).replace("<", "\\u003c"))
    cikd.save(path, page.encode())

# %% 5. Command line -------------------------------------------------------------------------------
def visualize(args: argparse.Namespace) -> Path:
    """All figures of the runs named. Returns their folder. Raises CIKDError."""
    runs = [load_run(folder) for folder in args.runs or [newest_run()]]
    runs.sort(key=lambda run: run.cfg.method != "cikd")         # a cikd run comes first
    first, cfg, grid = runs[0], runs[0].cfg, runs[0].grid
    for run in runs:
        need((run.images_hash, run.grid, run.cfg.student, run.cfg.heads)
             == (first.images_hash, grid, cfg.student, cfg.heads),
             f"{run.folder}: has other images, patches or heads than {first.folder}; show it alone")
    row, column = args.query or (0, 0)
    need(0 <= min(row, column) <= max(row, column) < grid, f"--query: must be below {grid}")
    query = row * grid + column if args.query else None
    images, labels = run_images(first, args.image, args.data_dir)
    index = args.index or [0]
    if not args.index and labels is not None:   # one image of each of the first four classes
        index = [int((labels == k).int().argmax()) for k in labels.unique()[:4]]
    need(0 <= min(index) <= max(index) < len(images), f"--index: must be below {len(images)}")
    out = Path(args.output_dir or first.folder / "figures").expanduser()
    students, references = measure(runs, images)
    print_table(references + students)
    with torch.no_grad():
        p = list(first.students.values())[-1](cikd.to_float(images[index])).softmax(1)
    captions = []
    for i, chance in zip(index, p):
        said = [f"{first.classes[k]} {100 * chance[k]:.1f} %" for k in (-chance).argsort()[:3]]
        true = "" if labels is None else f"true: {first.classes[int(labels[i])]}\n"
        captions.append(f"{true}{cfg.method}: {said[0]}")
        print(f"{args.image or f'test image {i}'}: {', '.join(said)}")
    def file(name):
        return out / f"{name}.{args.format}"
    panels = {m["label"]: m["kernels"] for m in students[:len(first.students)]}
    overview(runs, panels, images[index][:1], query, file("summary"))
    heatmaps(runs, images[index], captions, file("heatmaps"), query)
    kept = students[:len(first.students)] + [m for m in students if m["label"][:7] == "scratch"]
    distances(kept, references, file("distance"), first)
    draw(kernels(panels), file("kernels"), first)
    curriculum(runs, file("curriculum"))
    if args.html:
        explorer(runs, images[index], captions, out / "explorer.html")
    if args.gif:
        locality_gif(first, images, out / "locality.gif")
    print(f"see {out}")
    return out

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("visualize_attention.py", allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message} (--help lists all that can be given)")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs [the newest under runs/]")
    add("--image", metavar="FILE", help="draw everything, averages too, from this picture")
    add("--index", type=int, nargs="+", metavar="I", help="test images [one each of four classes]")
    add("--query", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="patch [a selective one]")
    add("--data-dir", metavar="DIR", help="where the run's images lie now [where they lay]")
    add("--output-dir", metavar="DIR", help="where the figures go [RUN/figures]")
    add("--format", choices=("png", "pdf", "svg"), default="png", help="of the figures [png]")
    add("--html", action="store_true", help="also explorer.html: where any patch looks")
    add("--gif", action="store_true", help="also locality.gif; needs --snapshot-every")
    return cikd.run_command("visualize_attention", lambda: visualize(parser.parse_args(argv)))

if __name__ == "__main__" and (not hasattr(sys, "ps1") or sys.argv[0].endswith("attention.py")):
    sys.exit(main())                            # but not where cells are run one by one

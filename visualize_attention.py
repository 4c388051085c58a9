"""Look at the locality a student has learned: heatmaps, distances, kernels, curves of runs.

    python visualize_attention.py                       # the newest finished run under runs/
    python visualize_attention.py RUN [RUN ...]         # these, e.g. cikd, kd and scratch together
    python visualize_attention.py --image cat.jpg       # your own picture instead of test images
    python visualize_attention.py --index 3 8 --query 2,5 --block 0 --head 1

It rebuilds the models from a run's settings.json and never trains. The first run named (a cikd run,
if there is one) is shown before training, after ALI and after LM, others at their end. Each figure
is a function. "Attention" is the student's softmax(q kᵀ / sqrt(d)) among patches alone: CLS is left
out, as in ALI. The teacher, a ResNet, has none; `cikd.teacher_attention`, its surrogate, is shown.
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

COLORS = {"before training": "#999999", "after ALI": "#E69F00"}         # Okabe and Ito's palette
LAST, OTHERS = "#0072B2", ["#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"]


# %% 1. Runs: settings, models, images
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


# %% 2. Numbers: what the figures show, and what the tests check
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
    shown = [(runs[0], name, student, COLORS.get(name, LAST))
             for name, student in runs[0].students.items()]
    for i, run in enumerate(runs[1:]):
        twins = [other for other in runs if other.cfg.method == run.cfg.method]
        label = run.cfg.method + f" {i + 2}, {run.folder.name[-20:]}" * (len(twins) > 1)
        shown.append((run, label, list(run.students.values())[-1], OTHERS[i % len(OTHERS)]))
    return shown

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


# %% 3. Figures
def draw(figure: Figure, path: Path) -> None:
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    cikd.save(path, memory.getvalue())

def heatmaps(runs: list[Run], images: torch.Tensor, labels: torch.Tensor | None, path: Path,
             query: tuple[int, int], block: int, head: int | None = None) -> dict:
    """Where the query patch looks: surrogate and each student. Returns {column: [n, g, g]}."""
    run, (row, col), grid, x, columns = runs[0], query, runs[0].grid, cikd.to_float(images), {}
    def from_query(maps):                       # [n, H, N, N] -> [n, g, g]
        maps = maps.mean(1) if head is None else maps[:, head]
        return maps[:, row * grid + col].view(-1, grid, grid)
    if run.teacher and block in dict(run.pairs):
        layer = dict(run.pairs)[block]
        columns[f"surrogate,\nlayer{layer}"] = from_query(surrogate_maps(run, x, layer))
    for _, label, student, _ in stages_of(runs):
        maps = (maps for i, maps in enumerate(cikd.student_maps(student, x)) if i == block)
        columns[f"student\n{label}"] = from_query(next(maps))
    with torch.no_grad():
        p, predicted = list(run.students.values())[-1](x).softmax(1).max(1)
    norm = Normalize(0, float(np.quantile(torch.stack(list(columns.values())), 0.99)))
    figure = Figure(figsize=(1.3 * len(columns) + 3.3, 1.32 * len(images) + 0.95),
                    layout="constrained")
    axes = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):          # [S, S, 3]
        text = "" if labels is None else f"true: {run.classes[int(labels[i])]}\n"
        text += f"predicted by {run.cfg.method}:\n{run.classes[predicted[i]]} ({100 * p[i]:.0f} %)"
        axes[i, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
        axes[i, 0].imshow(image, extent=(0, grid, grid, 0))
        for a, maps in zip(axes[i, 1:], columns.values()):
            alpha = np.clip(0.2 + norm(maps[i].numpy()), 0, 0.95)   # little attention: the image
            a.imshow(image.mean(2) * 0.5, cmap="gray", vmin=0, vmax=255, extent=(0, grid, grid, 0))
            a.imshow(maps[i], cmap="magma", norm=norm, alpha=alpha, extent=(0, grid, grid, 0))
        for a in axes[i]:
            a.set(xticks=[], yticks=[])
            a.add_patch(Rectangle((col, row), 1, 1, fill=False, color="#56B4E9", linewidth=2))
    for a, name in zip(axes[0], ["image and\nquery patch", *columns]):
        a.set_title(name, fontsize=10)
    bar = figure.colorbar(ScalarMappable(norm, "magma"), ax=axes, shrink=0.9, extend="max")
    bar.set_label(f"attention\n(uniform: {1 / grid ** 2:.3f})")
    heads = "mean of heads" if head is None else f"head {head}"
    figure.suptitle(f"Where the framed patch looks: block {block}, {heads}", fontsize=12)
    draw(figure, path)
    return columns

def distances(students: list[dict], references: list[dict], path: Path) -> None:
    """Mean attention distance of each head against depth (Raghu 2021)."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes, blocks = figure.subplots(), np.arange(len(students[0]["distance"]))
    for i, m in enumerate(students):
        place, values = blocks + (i - (len(students) - 1) / 2) * 0.12, m["distance"].numpy()
        axes.plot(np.repeat(place, values.shape[1]), values.reshape(-1), "o", color=m["color"],
                  alpha=0.45, markersize=4, markeredgewidth=0)
        axes.plot(place, values.mean(1), color=m["color"], linewidth=2, label=m["label"])
    for m, style in zip(references, (":", "--", "-.", (0, (1, 3)), (0, (5, 5)))):
        far, name = float(m["distance"].mean()), m["label"]
        axes.axhline(far, color="black", linestyle=style, linewidth=1, label=f"{name}: {far:.2f}")
    axes.set(xlabel="block (dots: heads; lines: their mean; drawn side by side)", xticks=blocks,
             ylabel="attention distance (patches)", title="How far the student looks, by depth")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    draw(figure, path)

def kernels(panels: dict[str, torch.Tensor], tile: float = 0.75) -> Figure:
    """For each panel its kernels [blocks, H, 2g-1, 2g-1], blocks downwards, heads to the right, on
    one logarithmic colour scale, so that no centre is cut off."""
    blocks, heads, side, _ = next(iter(panels.values())).shape
    figure = Figure(figsize=(tile * heads * len(panels) + 1.9, tile * blocks + 1.1),
                    layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for a, (name, panel) in zip(axes, panels.items()):
        tiles = torch.nn.functional.pad(panel, (1, 1, 1, 1), value=float("nan"))    # gaps
        mosaic = tiles.permute(0, 2, 1, 3).reshape(blocks * (side + 2), heads * (side + 2))
        drawn = a.imshow(mosaic, cmap="magma", norm=LogNorm(1e-3, 1, clip=True))
        a.set(title=name, xlabel="head", xticks=(np.arange(heads) + 0.5) * (side + 2) - 0.5,
              xticklabels=range(heads), yticks=(np.arange(blocks) + 0.5) * (side + 2) - 0.5,
              yticklabels=range(blocks))
        a.tick_params(length=0)
    axes[0].set_ylabel("block")
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8, extend="min")
    bar.set_label(f"mean attention at this offset\n(uniform: {4 / (side + 1) ** 2:.3f})")
    figure.suptitle(f"each tile: query in its centre, edges {side // 2} patches away", fontsize=9)
    return figure

def curriculum(runs: list[Run], path: Path) -> dict[str, dict[str, list[float]]]:
    """Loss terms, accuracy and attention distance by epoch. Returns {panel: {run: values}}."""
    panels = {"ali": "ALI, training (nats)", "ce": "cross-entropy, training (nats)",
              "dkd": "DKD, training (nats)", "accuracy": "test accuracy (%)",
              "attention_distance": "attention distance (patches)"}
    first, others = runs[0].cfg, [shown for shown in stages_of(runs) if shown[0] is not runs[0]]
    lines = [(runs[0], first.method, None, LAST), *others]
    drawn = {name: {label: [float(row[name]) for row in run.rows] for run, label, _, _ in lines}
             for name in panels}
    above = [name for name in ("ali", "ce", "dkd") if any(map(any, drawn[name].values()))]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplot_mosaic([[name for name in above for _ in range(6 // len(above))],
                                  ["accuracy"] * 3 + ["attention_distance"] * 3])
    for name, a in axes.items():
        for _, label, _, color in lines:
            epochs = [i for i, v in enumerate(drawn[name][label]) if v or name not in above]
            a.plot(np.add(epochs, 1), [drawn[name][label][i] for i in epochs], color=color,
                   linewidth=2, label=label, marker="o" if len(epochs) == 1 else None)
        if first.method == "cikd":
            a.axvline(first.ali_epochs + 0.5, color="black", linestyle="--", linewidth=1)
        a.set(xlabel="epoch", xlim=(1, max(len(run.rows) for run in runs)))
        a.set_title(panels[name], fontsize=10)
        a.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        a.grid(alpha=0.3)
    figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle("The curriculum, epoch by epoch (dashed: the switch)", fontsize=12)
    draw(figure, path)
    return drawn

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


# %% 4. Command line
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
    query = re.fullmatch(r"(\d{1,4}),(\d{1,4})", args.query or f"{grid // 2},{grid // 4}")
    query = [int(part) for part in query.groups()] if query else [grid]
    need(max(query) < grid, f"--query: must be ROW,COL, both from 0 to {grid - 1}")
    images, labels = run_images(first, args.image, args.data_dir)
    index = args.index or [0]
    if not args.index and labels is not None:   # one image of each of the first four classes
        index = [int((labels == k).int().argmax()) for k in labels.unique()[:4]]
    need(0 <= min(index) <= max(index) < len(images), f"--index: must be below {len(images)}")
    out = Path(args.output_dir or first.folder / "figures").expanduser()
    students, references = measure(runs, images)
    print_table(references + students)
    labels = labels if labels is None else labels[index]
    heatmaps(runs, images[index], labels, out / "heatmaps.png", query, block, args.head)
    distances(students, references, out / "distance.png")
    panels, tile = {m["label"]: m["kernels"] for m in students}, 10 / (cfg.heads * len(students))
    draw(kernels(panels, tile=min(0.75, tile)), out / "kernels.png")
    curriculum(runs, out / "curriculum.png")
    if args.gif:
        locality_gif(first, images, out / "locality.gif")
    print(f"see {', '.join(sorted(p.name for p in out.glob('*.[pg][ni][gf]')))} in {out}")
    return out

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("visualize_attention.py", allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message} (--help lists all that can be given)")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs [the newest under runs/]")
    add("--image", metavar="FILE", help="draw everything, averages too, from this picture")
    add("--index", type=int, nargs="+", metavar="I", help="test images [one of four classes]")
    add("--query", metavar="ROW,COL", help="query patch of the heatmaps [left of the middle]")
    add("--block", type=int, help="block of the heatmaps [the last that ALI taught]")
    add("--head", type=int, help="head of the heatmaps, from 0 [mean of all]")
    add("--data-dir", metavar="DIR", help="where the run's images lie now [where they lay]")
    add("--output-dir", metavar="DIR", help="where the figures go [RUN/figures]")
    add("--gif", action="store_true", help="also locality.gif; needs --snapshot-every")
    return cikd.run_command("visualize_attention", lambda: visualize(parser.parse_args(argv)))

if __name__ == "__main__" and (not hasattr(sys, "ps1") or sys.argv[0].endswith("attention.py")):
    sys.exit(main())                            # but not where cells are run one by one

"""Look at the locality a student has learned: one page of all, and a figure for each part of it.

    python visualize_attention.py                       # the newest finished run under runs/
    python visualize_attention.py RUN [RUN ...]         # these, e.g. cikd, kd and scratch together
    python visualize_attention.py RUN --image a.jpg b.jpg       # classify, draw your pictures
    python visualize_attention.py --index 3 8 --query 2 5 --format pdf --html

The first run that has several stages (else the first one named) is shown before training and after
each stage, the others at their end. Of the others, heatmaps and distances show only those that had
no teacher (scratch), and kernels none. CLS is left out, as in ALI.
"""
from __future__ import annotations

import argparse
import base64
import html
import io
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from string import Template
from typing import NamedTuple

# A script only writes files. The backend that a notebook names for its `!python` may be missing
# here, and then matplotlib cannot be imported. Who imports this file keeps the backend.
if __name__ == "__main__" and not hasattr(sys, "ps1"):
    os.environ["MPLBACKEND"] = "agg"

import matplotlib.style
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

COLORS = {                              # Okabe, Ito: told apart by colour-blind readers, too
    "before training": "#999999",
    "after ALI": "#E69F00",             # also after any other stage before the switch
    "after LM": "#0072B2",
    "cikd": "#0072B2",
    "joint": "#CC79A7",
    "kd": "#009E73",
    "scratch": "#D55E00",
}
# For further runs of one method, and for methods that a reader adds (Tol; Okabe and Ito).
SPARE_COLORS = ("#882255", "#44AA99", "#56B4E9", "#000000", "#F0E442")
FRAME_COLOR = "#56B4E9"
QUIET_COLOR = "#555555"
DRAWN = 4                               # images in a figure
DIMMED = 0.35                           # brightness of an image under its map


# %% 1. Runs: settings, models, images -------------------------------------------------------------
class Span(NamedTuple):
    """A stage as metrics.csv has it."""
    stage: str
    first: int                                  # epoch, from 1
    last: int
    accuracy: float                             # percent, after the last epoch


class Moment(NamedTuple):
    """A student at one moment of its training."""
    label: str                                  # before training, after ALI, after scratch, ...
    student: cikd.VisionTransformer
    span: Span | None                           # that has just ended; None before training


class Run(NamedTuple):
    """A finished run."""
    folder: Path
    cfg: cikd.Config
    classes: list[str]
    moments: list[Moment]                       # in the order of training
    teacher: cikd.ResNetTeacher | None
    teacher_accuracy: float | None              # percent, where its training lies beside the run
    rows: list[dict]                            # of metrics.csv
    spans: list[Span]                           # one, or two if the stage was switched
    images_hash: str
    grid: int                                   # patches along a side
    pairs: list[tuple[int, int]]                # block, layer


def newest_run(output_dir: str | Path = "runs") -> Path:
    """The finished run under `output_dir` with the newest student.pt. Raises CIKDError."""
    found = sorted(Path(output_dir).glob("*/student.pt"), key=lambda file: file.stat().st_mtime)
    need(found, f"{output_dir}: holds no finished run; make one with `python cikd.py`, or name one")
    return found[-1].parent


def spans_of(rows: list[dict]) -> list[Span]:
    """The stages of a run, from its own rows: METHODS may have changed since."""
    spans = []
    first = 1
    for stage, group in groupby(rows, key=lambda row: row["stage"]):
        stage_rows = list(group)
        last = first + len(stage_rows) - 1
        accuracy = float(stage_rows[-1]["accuracy"])
        spans.append(Span(stage, first, last, accuracy))
        first = last + 1
    return spans


def earlier_moments(folder: Path, student: cikd.VisionTransformer,
                    spans: list[Span]) -> list[Moment]:
    """The student before training and at each switch of stage, where the file was kept."""
    def moment(label, file, span):
        earlier = deepcopy(student)
        cikd.load(file, earlier)
        return Moment(label, earlier, span)

    moments = []
    start = folder / "student_init.pt"
    if start.exists():
        moments.append(moment("before training", start, None))
    for span in spans[:-1]:
        switch = folder / f"student_{span.stage.lower()}.pt"
        if switch.exists():
            moments.append(moment(f"after {span.stage}", switch, span))
    return moments


def load_teacher(file: Path, folder: Path, cfg: cikd.Config, facts: dict) -> cikd.ResNetTeacher:
    """The teacher in `file`, from which the run in `folder` learned. Raises CIKDError."""
    teacher = cikd.ResNetTeacher(cfg.teacher, len(facts["classes"]), cfg.image_size).eval()
    cikd.load(file, teacher)
    need(cikd.hash_of(file.read_bytes()) == facts["teacher_hash"],
         f"{file}: is not the teacher that {folder} learned from; bring that back")
    return teacher


def teacher_accuracy(file: Path, cfg: cikd.Config) -> float | None:
    """Of the teacher in `file`, after its own training; unknown of one that was brought along."""
    metrics = file.with_name("metrics.csv")
    if cfg.teacher_checkpoint or not metrics.exists():
        return None
    return float(cikd.read_rows(metrics, cfg.teacher_epochs)[-1]["accuracy"])


def load_run(folder: str | Path) -> Run:
    """A finished run's models, rebuilt from its settings. Raises CIKDError, OSError."""
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    student, classes, cfg = cikd.load_student(folder)
    facts = cikd.read_facts(folder)
    rows = cikd.read_rows(folder / "metrics.csv", cfg.epochs)
    spans = spans_of(rows)
    end = spans[-1].stage if len(spans) > 1 else cfg.method
    moments = earlier_moments(folder, student, spans)
    moments.append(Moment(f"after {end}", student, spans[-1]))
    teacher = None
    accuracy = None
    if facts["teacher_file"]:
        file = folder.parent / facts["teacher_file"]
        teacher = load_teacher(file, folder, cfg, facts)
        accuracy = teacher_accuracy(file, cfg)
    return Run(
        folder=folder,
        cfg=cfg,
        classes=classes,
        moments=moments,
        teacher=teacher,
        teacher_accuracy=accuracy,
        rows=rows,
        spans=spans,
        images_hash=facts["images"],
        grid=cfg.image_size // cfg.patch_size,
        pairs=cikd.parse_pairs(cfg.pairs, cfg.student),
    )


def run_images(run: Run, pictures: list[str] | None = None,
               data_dir: str | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 [n, 3, S, S] and class numbers [n]: the run's own test images, or these picture files
    and None. Raises CIKDError."""
    if pictures:
        opened = []
        for picture in pictures:
            need(not Path(picture).is_dir(),
                 f"{picture}: is a folder; name runs before --image, and after it picture files, "
                 f"such as {picture}/*.jpg")
            opened.append(cikd.to_rgb(cikd.open_image(picture), run.cfg.image_size))
        return torch.stack(opened), None
    where = os.path.expanduser(data_dir or run.cfg.data_dir or "")      # shapes lie nowhere
    remedy = "name the folder where they lie by --data-dir, or pictures by --image"
    try:
        data = cikd.load_dataset(replace(run.cfg, data_dir=where))
    except cikd.CIKDError as error:
        # What names an option is advice for a training.
        reasons = [part for part in str(error).split("; ") if " --" not in f" {part}"]
        reason = "; ".join(reasons) or f"{where} holds others"
        raise cikd.CIKDError(f"{run.folder}: cannot read its images ({reason}); {remedy}") from None
    # Shapes are made anew, and another CPU may round a pixel differently.
    need(data.images_hash == run.images_hash or run.cfg.dataset == "shapes",
         f"{run.folder}: learned other images than {where} holds; {remedy}")
    return data.test


# %% 2. Numbers: what the figures show, and what the tests check -----------------------------------
def attention_kernels(maps: torch.Tensor) -> torch.Tensor:
    """Attention by offset from query to key (Cordonnier 2020): [..., N, N] -> [..., 2g-1, 2g-1].
    Summed over queries, divided by how many have a key at that offset; the centre is (0, 0)."""
    grid = round(maps.shape[-1] ** 0.5)
    total = maps.new_zeros(*maps.shape[:-2], 2 * grid - 1, 2 * grid - 1)
    for query in range(grid * grid):
        top = grid - 1 - query // grid                          # the first key's offset
        left = grid - 1 - query % grid
        keys = maps[..., query, :].unflatten(-1, (grid, grid))          # [..., g, g]
        total[..., top:top + grid, left:left + grid] += keys
    counts = grid - torch.arange(1 - grid, grid).abs()          # of such queries, along one axis
    return total / (counts[:, None] * counts)


def measure_maps(images: torch.Tensor, maps_of) -> dict[str, torch.Tensor]:
    """Means over images of maps_of(images) -> maps [n, H, N, N] block by block: distance (patches)
    [blocks, H] and kernels [blocks, H, 2g-1, 2g-1]. Only one block's maps are held at a time."""
    distance = 0
    kernel = 0
    n = 0
    for part in cikd.probe(images):
        distance_by_block = []
        kernel_by_block = []
        for maps in maps_of(cikd.to_float(part)):
            distance_by_block.append(cikd.attention_distance(maps).sum(0))      # [H]
            kernel_by_block.append(attention_kernels(maps).sum(0))      # [H, 2g-1, 2g-1]
        distance = distance + torch.stack(distance_by_block)
        kernel = kernel + torch.stack(kernel_by_block)
        n += len(part)
    return {"distance": distance / n, "kernels": kernel / n}


@torch.no_grad()
def surrogate_maps(run: Run, floats: torch.Tensor, layer: int) -> torch.Tensor:
    """The teacher's surrogate at a layer, from 1: float [n, 3, S, S] -> [n, H, N, N]."""
    _, features = run.teacher.forward_taps(floats, [layer], classify=False)
    return cikd.teacher_attention(features[layer], run.grid, run.cfg.heads, run.cfg.tau)


class Line(NamedTuple):
    """A run as figures by epoch show it."""
    run: Run
    label: str
    color: str


class Entry(NamedTuple):
    """A student as the other figures show it."""
    label: str
    color: str
    moment: Moment
    own: bool               # of the first run, whose kernels are drawn; else for comparison
    detailed: bool          # heatmaps and distances show it, too


def lines_of(runs: list[Run]) -> list[Line]:
    """Each run with a label and a colour that tell it from the others."""
    methods = [run.cfg.method for run in runs]
    spare = cycle(SPARE_COLORS)
    lines = []
    for number, run in enumerate(runs):
        label = run.cfg.method
        color = COLORS.get(label) or next(spare)
        earlier = methods[:number].count(label)
        if earlier:
            label = f"{label} {earlier + 1} …{run.folder.name[-9:]}"
            color = next(spare)
        lines.append(Line(run, label, color))
    return lines


def color_after(line: Line, span: Span) -> str:
    """After its last stage a student has its run's colour."""
    if span == line.run.spans[-1]:
        return line.color
    return COLORS.get(f"after {span.stage}", COLORS["after ALI"])


def entries_of(lines: list[Line]) -> list[Entry]:
    """All moments of the first run, then how the others ended."""
    first = lines[0]
    entries = []
    for moment in first.run.moments:
        color = color_after(first, moment.span) if moment.span else COLORS["before training"]
        entries.append(Entry(moment.label, color, moment, own=True, detailed=True))
    for line in lines[1:]:
        alone = line.run.teacher is None
        last = line.run.moments[-1]
        entries.append(Entry(line.label, line.color, last, own=False, detailed=alone))
    return entries


class Measured(NamedTuple):
    """A student's locality, or that of a surrogate, as means over images."""
    label: str
    color: str
    accuracy: float | None      # percent
    distance: torch.Tensor      # patches, [blocks, H]
    kernels: torch.Tensor       # [blocks, H, 2g-1, 2g-1]


def measure_students(entries: list[Entry], images: torch.Tensor) -> list[Measured]:
    table = []
    for entry in entries:
        found = measure_maps(images, partial(cikd.student_maps, entry.moment.student))
        span = entry.moment.span
        accuracy = span.accuracy if span else None
        table.append(Measured(entry.label, entry.color, accuracy, **found))
    return table


def measure_surrogates(run: Run, images: torch.Tensor) -> list[Measured]:
    """What the teacher shows at each layer that the student imitates; without one, nothing."""
    def measure(layer):
        found = measure_maps(images, lambda floats: [surrogate_maps(run, floats, layer)])
        return Measured(f"surrogate, layer{layer}", "black", None, **found)

    layers = sorted({layer for _, layer in run.pairs}) if run.teacher else []
    return [measure(layer) for layer in layers]


def print_table(table: list[Measured]) -> None:
    width = max(20, *(len(measured.label) for measured in table))
    print(f"{'':{width}} accuracy  distance (patches): mean, then each block")
    for measured in table:
        accuracy = "" if measured.accuracy is None else f"{measured.accuracy:.1f} %"
        by_block = measured.distance.mean(1)
        numbers = " ".join(f"{value:.2f}" for value in by_block)
        print(f"{measured.label:{width}} {accuracy:>8}  {by_block.mean():.2f}   {numbers}")


class Column(NamedTuple):
    label: str
    maps: torch.Tensor          # [n, g, g]
    trained: bool


class Looks(NamedTuple):
    """Where one patch of each image looks in the last block that imitates, mean of heads."""
    block: int
    images: torch.Tensor        # uint8 [n, 3, S, S]
    queries: torch.Tensor       # [n], the patches' numbers
    columns: list[Column]       # of the surrogate and of students


def patch_or_usual(query: int | None, grid: int) -> int:
    """The patch asked for; else one on the middle row, left of the middle."""
    if query is not None:
        return query
    row = grid // 2
    column = grid // 4
    return row * grid + column


def selective_patches(maps: torch.Tensor) -> torch.Tensor:
    """The patch that looks most selectively (lowest entropy) in each of the maps: [n, N, N] -> [n].
    Only an inner one, where there are any: at the border there is often nothing to see."""
    grid = round(maps.shape[-1] ** 0.5)
    score = torch.xlogy(maps, maps).sum(-1)                     # minus the entropy, [n, N]
    if grid >= 3:
        border = torch.ones(grid, grid, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        score = score.masked_fill(border.flatten(), -torch.inf)
    return score.argmax(1)


def looks(run: Run, entries: list[Entry], images: torch.Tensor, query: int | None) -> Looks:
    """Looks of uint8 images [n, 3, S, S] in the surrogate of `run` and in the students. No `query`:
    the most selective patch of the surrogate, without a teacher the usual one."""
    block, layer = max(run.pairs)
    floats = cikd.to_float(images)
    every = torch.arange(len(images))
    queries = torch.full_like(every, patch_or_usual(query, run.grid))
    columns = []
    if run.teacher:
        maps = surrogate_maps(run, floats, layer).mean(1)       # [n, N, N]
        if query is None:
            queries = selective_patches(maps)
        shown = maps[every, queries].unflatten(1, (run.grid, run.grid))
        columns.append(Column(f"surrogate, layer{layer}", shown, trained=True))
    for entry in entries:
        maps = list(cikd.student_maps(entry.moment.student, floats))[block].mean(1)
        shown = maps[every, queries].unflatten(1, (run.grid, run.grid))
        columns.append(Column(entry.label, shown, trained=entry.moment.span is not None))
    return Looks(block, images, queries, columns)


@torch.no_grad()
def probabilities_of(run: Run, images: torch.Tensor) -> torch.Tensor:
    """What the finished student says: uint8 [n, 3, S, S] -> [n, K]."""
    student = run.moments[-1].student
    return torch.cat([student(cikd.to_float(part)).softmax(1) for part in images.split(100)])


# %% 3. Figures -----------------------------------------------------------------------------------
@contextmanager
def our_settings():
    """matplotlib's own settings instead of a user's, some of which turn pictures upside down
    (image.origin) or need LaTeX (text.usetex). Fonts stay. A name with a $ is no formula."""
    ours = {"text.parse_math": False}
    for name in matplotlib.rcParams:
        if name.startswith("font.") and name != "font.size":
            ours[name] = matplotlib.rcParams[name]
    with matplotlib.style.context(["default", ours]):
        yield


def bytes_of(write, *args, **kwargs) -> bytes:
    """What write(file, ...) writes."""
    memory = io.BytesIO()
    write(memory, *args, **kwargs)
    return memory.getvalue()


def small_print(run: Run) -> str:
    """Which run a figure is of."""
    cfg = run.cfg
    data = Path(cfg.data_dir).absolute().name if cfg.dataset == "folder" else cfg.dataset
    student = f"{cfg.method} on {data}, {cfg.student}, {cfg.epochs} epochs, seed {cfg.seed}"
    if not run.teacher:
        return student
    if cfg.teacher_checkpoint:                  # nobody knows for how long it was trained
        return f"{student}; teacher {cfg.teacher}"
    return f"{student}; teacher {cfg.teacher}, {cfg.teacher_epochs} epochs"


@our_settings()
def draw(figure: Figure, path: Path, run: Run) -> None:
    """Write it as path's ending says, with a line of small print. Raises CIKDError."""
    figure.supxlabel(small_print(run), x=0.99, ha="right", fontsize=7.5, color=QUIET_COLOR)
    cikd.save(path, bytes_of(figure.savefig, format=path.suffix[1:]))


def scale_of(columns: list[Column], count: int) -> Normalize:
    """One scale of colours for all maps of the first images; the largest hundredth is cut off."""
    maps = torch.stack([column.maps[:count] for column in columns])
    return Normalize(0, float(np.quantile(maps.numpy(), 0.99)))


def show(figure, looked: Looks, scale: Normalize, count: int) -> np.ndarray:
    """A row for each of the first images: itself, its query patch framed, and over it each column's
    attention. Returns the axes [count, 1 + columns]."""
    grid = looked.columns[0].maps.shape[-1]
    extent = (0, grid, grid, 0)                 # left, right, bottom, top, in patches
    all_axes = figure.subplots(count, len(looked.columns) + 1, squeeze=False)
    for row in range(count):
        image = looked.images[row].permute(1, 2, 0).numpy()     # [S, S, 3]
        all_axes[row, 0].imshow(image, extent=extent)
        for axes, column in zip(all_axes[row, 1:], looked.columns):
            maps = column.maps[row].numpy()
            opacity = np.clip(0.2 + scale(maps), 0, 0.95)       # with little attention, the image
            axes.imshow(image.mean(2) * DIMMED, cmap="gray", vmin=0, vmax=255, extent=extent)
            axes.imshow(maps, cmap="magma", norm=scale, extent=extent, alpha=opacity)
        query = int(looked.queries[row])
        corner = (query % grid, query // grid)
        for axes in all_axes[row]:
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, color=FRAME_COLOR, linewidth=2))
            axes.set(xticks=[], yticks=[])
    all_axes[0, 0].set_title("image and query", fontsize=10)
    for axes, column in zip(all_axes[0, 1:], looked.columns):
        axes.set_title(column.label, fontsize=10)
    return all_axes


@our_settings()
def heatmaps(run: Run, looked: Looks, captions: list[str], path: Path) -> dict[str, torch.Tensor]:
    """Where a patch looks: surrogate and trained students. Returns {column: [n, g, g]}."""
    # Before training all is even, as the uniform value in the bar's label says.
    columns = [column for column in looked.columns if column.trained]
    figure = Figure(layout="constrained")
    scale = scale_of(columns, len(captions))
    all_axes = show(figure, looked._replace(columns=columns), scale, len(captions))
    texts = []
    for axes, caption in zip(all_axes[:, 0], captions):
        texts.append(axes.text(-0.05, 0.5, caption, transform=axes.transAxes, ha="right",
                               va="center", in_layout=False))
    bar = figure.colorbar(ScalarMappable(scale, "magma"), ax=all_axes, shrink=0.9, extend="max")
    bar.set_label("attention, mean of heads, over the dimmed image\n"
                  f"(uniform: {1 / run.grid ** 2:.3f})", fontsize=9)
    figure.suptitle(f"Where the framed patch looks: block {looked.block}", fontsize=13)
    # The layout would cut long captions off: their room is measured and kept out of it.
    figure.draw_without_rendering()
    widest = max(text.get_window_extent().width for text in texts)
    room = widest / figure.dpi + 0.1                            # inches
    width = room + 1.7 * (len(columns) + 1) + 1.5
    figure.set_size_inches(width, 1.75 * len(captions) + 1)
    figure.get_layout_engine().set(rect=(room / width, 0, 1 - room / width, 1))
    draw(figure, path, run)
    return {column.label: column.maps for column in columns}


@our_settings()
def distances(students: list[Measured], surrogates: list[Measured], path: Path, run: Run) -> None:
    """Mean attention distance of each head against depth (Raghu 2021)."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    blocks = np.arange(len(students[0].distance))
    for number, measured in enumerate(students):
        values = measured.distance.numpy()                      # [blocks, H]
        shift = 0.12 * (number - (len(students) - 1) / 2)       # so that no dot hides another
        beside = blocks + shift
        axes.plot(beside, values, "o", color=measured.color, alpha=0.45, markersize=4,
                  markeredgewidth=0)
        axes.plot(beside, values.mean(1), color=measured.color, linewidth=2, label=measured.label)
    for measured, style in zip(surrogates, cycle(["--", ":", "-.", (0, (1, 3))])):
        mean = float(measured.distance.mean())
        axes.axhline(mean, color=measured.color, linestyle=style, linewidth=1,
                     label=f"{measured.label}: {mean:.2f}")
    axes.set(xlabel="block (dots: heads; lines: their mean)", xticks=blocks,
             ylabel="attention distance (patches)", title="How far the student looks, by depth")
    figure.legend(loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    draw(figure, path, run)


@our_settings()
def kernels(panels: dict[str, torch.Tensor], figure=None) -> Figure:
    """For each panel its kernels [blocks, H, 2g-1, 2g-1], blocks downwards, heads to the right, on
    one logarithmic colour scale, so that no centre is cut off."""
    blocks, heads, side, _ = next(iter(panels.values())).shape
    if figure is None:
        tile = min(0.75, 10 / (heads * len(panels)), 6 / blocks)        # inches
        size = (tile * heads * len(panels) + 2.9, tile * blocks + 1.2)
        figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    scale = LogNorm(1e-3, 1, clip=True)
    step = side + 2                                             # a tile and the gap around it
    for axes, (label, panel) in zip(all_axes, panels.items()):
        tiles = torch.nn.functional.pad(panel, (1, 1, 1, 1), value=torch.nan)
        mosaic = tiles.permute(0, 2, 1, 3).reshape(blocks * step, heads * step)
        axes.imshow(mosaic.numpy(), cmap="magma", norm=scale)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("head")
        axes.set_xticks((np.arange(heads) + 0.5) * step - 0.5, range(heads))
        axes.set_yticks((np.arange(blocks) + 0.5) * step - 0.5, range(blocks))
        axes.tick_params(length=0)
    all_axes[0].set_ylabel("block")
    colors = ScalarMappable(scale, "magma")
    bar = figure.colorbar(colors, ax=list(all_axes), shrink=0.8, extend="min", format="%g")
    grid = (side + 1) // 2
    bar.set_label(f"mean attention, logarithmic\n(uniform: {1 / grid ** 2:.3f})", fontsize=9)
    figure.suptitle("mean attention by offset from the query "
                    f"(middle of a tile; ±{grid - 1} patches)", fontsize=10)
    return figure


def shade_stages(axes, line: Line) -> None:
    """The stages of a run that has several, behind what is drawn by epoch."""
    spans = line.run.spans
    if len(spans) == 1:
        return
    axes.margins(y=0.15)                        # room for the names above what is drawn
    for span in spans:
        left = max(1, span.first - 0.5)
        right = min(len(line.run.rows), span.last + 0.5)
        axes.axvspan(left, right, color=color_after(line, span), alpha=0.1, linewidth=0)
        axes.text((left + right) / 2, 0.98, span.stage, transform=axes.get_xaxis_transform(),
                  ha="center", va="top")


def curves(axes, lines: list[Line], name: str) -> None:
    """A column of metrics.csv by epoch, over the first run's stages."""
    for line in lines:
        values = np.array([float(row[name]) for row in line.run.rows])
        # A loss of exactly 0 is one that this stage does not learn.
        learned = np.arange(len(values)) if name == "accuracy" else np.flatnonzero(values)
        marker = "o" if len(learned) == 1 else None
        axes.plot(learned + 1, values[learned], color=line.color, linewidth=2, label=line.label,
                  marker=marker)
    longest = max(len(line.run.rows) for line in lines)
    axes.set(xlabel="epoch", xlim=(1, max(2, longest)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    shade_stages(axes, lines[0])
    if name == "accuracy":
        guessing = 100 / len(lines[0].run.classes)
        axes.axhline(guessing, color="black", linestyle=":", linewidth=1)
        axes.text(longest, guessing, "guessing ", ha="right", va="bottom", fontsize=8)
        axes.set_ylim(0, 1.15 * axes.dataLim.ymax)


@our_settings()
def curriculum(lines: list[Line], path: Path) -> None:
    """Loss terms, accuracy and attention distance by epoch."""
    titles = {
        "ali": "ALI, training (nats)",
        "ce": "cross-entropy, training (nats)",
        "dkd": "DKD, training (nats)",
        "accuracy": "test accuracy (%)",
        "attention_distance": "attention distance (patches)",
    }
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    all_axes = figure.subplots(2, 3).flatten()
    for axes, (name, title) in zip(all_axes, titles.items()):
        curves(axes, lines, name)
        axes.set_title(title, fontsize=10)
    handles, labels = all_axes[0].get_legend_handles_labels()
    all_axes[-1].axis("off")
    all_axes[-1].legend(handles, labels, loc="center")
    shaded = f" (shaded: stages of {lines[0].label})" if len(lines[0].run.spans) > 1 else ""
    figure.suptitle(f"The curriculum, epoch by epoch{shaded}", fontsize=12)
    draw(figure, path, lines[0].run)


def scheme(axes) -> None:
    """The method in two drawings: ALI, LM."""
    def stage(left, color, title):
        axes.add_patch(Rectangle((left, 0), 9.6, 4, color=color, alpha=0.1, linewidth=0))
        axes.text(left + 0.2, 3.6, title, fontsize=11, weight="bold", va="center")

    def box(x, y, text):
        style = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=QUIET_COLOR)
        axes.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style)

    def arrow(x, y, to_x, to_y):
        style = dict(arrowstyle="->", color=QUIET_COLOR)
        axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)

    upper = 2.5                                 # the height of the teacher's boxes
    lower = 0.8
    stage(0, COLORS["after ALI"], "Stage 1, ALI: learn where to look (no labels)")
    box(1.2, upper, "CNN teacher\n(frozen)")
    box(4.7, upper, "maps: patches that\nlook alike to it")
    box(1.2, lower, "ViT student")
    box(4.7, lower, "attention of its\nblocks")
    box(8.2, 1.65, "KL: imitate\nthe maps")
    arrow(2.1, upper, 3.4, upper)
    arrow(2.1, lower, 3.7, lower)
    arrow(6.0, 2.3, 7.4, 1.9)
    arrow(5.7, 1.0, 7.4, 1.4)
    stage(10.4, COLORS["after LM"], "Stage 2, LM: learn what to say")
    box(11.6, upper, "CNN teacher\n(frozen)")
    box(14.6, upper, "logits")
    box(18.3, upper, "DKD: imitate\nthe logits")
    box(11.6, lower, "ViT student")
    box(14.6, lower, "logits")
    box(18.3, lower, "cross-entropy\nwith the labels")
    arrow(12.5, upper, 14.1, upper)
    arrow(12.5, lower, 14.1, lower)
    arrow(15.1, upper, 17.3, upper)
    arrow(15.1, lower, 17.3, lower)
    arrow(15.1, 1.0, 17.3, 2.2)
    axes.set(xlim=(0, 20), ylim=(0, 4))
    axes.axis("off")


def bars(axes, lines: list[Line]) -> None:
    """How accurate each run was at its end, and the first run's teacher."""
    labels = [line.label for line in lines]
    accuracies = [line.run.spans[-1].accuracy for line in lines]
    colors = [line.color for line in lines]
    if lines[0].run.teacher_accuracy:
        labels.append("(CNN)")
        accuracies.append(lines[0].run.teacher_accuracy)
        colors.append(QUIET_COLOR)
    rows = range(len(labels))
    drawn = axes.barh(rows, accuracies, 0.6, color=colors)
    axes.bar_label(drawn, fmt=" %.1f %%", fontsize=9)
    axes.set_yticks(rows, labels)
    axes.set_ylim(max(2, len(labels)) - 0.5, -0.5)
    axes.set(xlabel="test accuracy after the last epoch (%)", xticks=range(0, 101, 20),
             xlim=(0, 115))                     # room for the number behind the longest bar


@our_settings()
def overview(lines: list[Line], panels: dict[str, torch.Tensor], looked: Looks,
             path: Path) -> None:
    """One page for a slide: the scheme; the first image; kernels; accuracy by epoch."""
    run = lines[0].run
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.3, 2.6, 4.4))
    scheme(top.subplots())
    top.suptitle("CIKD: a CNN teaches a Vision Transformer, from easy to difficult", fontsize=14)
    show(middle, looked, scale_of(looked.columns, 1), 1)
    middle.suptitle(f"Where the framed patch looks (block {looked.block}; bright: much attention, "
                    "on a scale of its own)", fontsize=10)
    left, right = bottom.subfigures(1, 2, width_ratios=(1.2, 1))
    kernels(panels, left)
    upper, lower = right.subplots(2, 1, height_ratios=(2, 1))
    curves(upper, lines, "accuracy")
    upper.set_ylabel("test accuracy (%)")
    bars(lower, lines)
    draw(figure, path, run)


def snapshots_of(run: Run) -> dict[int, Path]:
    """{epoch: file} of what --snapshot-every kept, and of the start. Raises CIKDError."""
    files = {0: run.folder / "student_init.pt"}
    for file in sorted((run.folder / "snapshots").glob("epoch_*.pt")):
        files[int(file.stem.removeprefix("epoch_"))] = file
    need(len(files) > 1,
         f"{run.folder}: holds no snapshots; train with --snapshot-every 1 --overwrite")
    return files


@our_settings()
def locality_gif(run: Run, images: torch.Tensor, path: Path) -> dict[int, torch.Tensor]:
    """The kernels epoch by epoch. Returns {epoch: kernels}. Raises CIKDError."""
    student = cikd.build_student(run.cfg, len(run.classes)).eval()
    found = {}
    frames = []
    for epoch, file in snapshots_of(run).items():
        cikd.load(file, student)
        stage = run.rows[epoch - 1]["stage"] if epoch else "before training"
        found[epoch] = measure_maps(images, partial(cikd.student_maps, student))["kernels"]
        figure = kernels({f"epoch {epoch}: {stage}": found[epoch]})
        frame = Image.open(io.BytesIO(bytes_of(figure.savefig, dpi=80)))
        frames.append(frame.convert("RGB"))
    cikd.save(path, bytes_of(frames[0].save, "GIF", save_all=True, append_images=frames[1:],
                             duration=400, loop=0))             # milliseconds a frame; for ever
    return found


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

FIGURE = """<figure><div><img><canvas width="224" height="224"></canvas></div>
<figcaption><b style="color: $COLOR">$NAME</b><br><span></span></figcaption></figure>"""


class Panel(NamedTuple):
    name: str
    color: str
    maps: torch.Tensor          # [n, blocks, H, N, N]


def explorer_panels(run: Run, entries: list[Entry], images: torch.Tensor) -> list[Panel]:
    """The surrogate and all students, in the blocks that imitate."""
    floats = cikd.to_float(images)
    panels = []
    if run.teacher:
        maps = [surrogate_maps(run, floats, layer) for _, layer in run.pairs]
        panels.append(Panel("teacher's surrogate", "#000", torch.stack(maps, 1)))
    for entry in entries:
        every = list(cikd.student_maps(entry.moment.student, floats))
        maps = [every[block] for block, _ in run.pairs]
        panels.append(Panel(entry.label, entry.color, torch.stack(maps, 1)))
    return panels


def explorer_data(run: Run, panels: list[Panel], images: torch.Tensor, captions: list[str],
                  query: int | None) -> dict:
    """What the page's program reads. Maps [n, blocks, panels, H, N, N] are 8 bits, each scaled by
    its own maximum; of the n images as many as fit 1 MB, or one."""
    maps = torch.stack([panel.maps for panel in panels], 2)
    maps = maps[:max(1, 680_000 // maps[0].numel())]            # base64 needs a third more
    distance = cikd.distance_by_query(maps)                     # [n, blocks, panels, H, N]
    scaled = (255 * maps / maps.amax(-1, keepdim=True)).round().byte()
    pictures = []
    for image in images[:len(maps)].permute(0, 2, 3, 1).numpy():
        picture = bytes_of(Image.fromarray(image).save, "PNG")
        pictures.append(base64.b64encode(picture).decode())
    return dict(
        grid=run.grid,
        query=patch_or_usual(query, run.grid),
        shape=list(distance.shape),
        captions=captions[:len(maps)],
        images=pictures,
        distances=[round(value, 3) for value in distance.flatten().tolist()],
        maps=base64.b64encode(scaled.numpy().tobytes()).decode(),
    )


def explorer_page(run: Run, panels: list[Panel], data: dict) -> str:
    """PAGE, filled in."""
    def options(names):
        return "".join(f"<option>{name}" for name in names)

    figures = [Template(FIGURE).substitute(COLOR="black", NAME="image")]
    for panel in panels:
        name = html.escape(panel.name)
        figures.append(Template(FIGURE).substitute(COLOR=panel.color, NAME=name))
    blocks = [f"{block}, beside layer{layer}" for block, layer in run.pairs]
    return Template(PAGE).safe_substitute(      # "safe": it leaves JavaScript's own ${...} alone
        FACTS=html.escape(small_print(run)),
        IMAGES=options(range(1, len(data["images"]) + 1)),
        BLOCKS=options(blocks),
        HEADS=options(range(run.cfg.heads)),
        PANELS="".join(figures),
        DATA=json.dumps(data).replace("<", "\\u003c"),          # no class name ends the script
    )


def explorer(run: Run, entries: list[Entry], images: torch.Tensor, captions: list[str],
             path: Path, query: int | None = None) -> None:
    """A page that works offline: where each patch looks, in the blocks that imitate."""
    panels = explorer_panels(run, entries, images)
    data = explorer_data(run, panels, images, captions, query)
    cikd.save(path, explorer_page(run, panels, data).encode())


# %% 5. Command line -------------------------------------------------------------------------------
def load_runs(folders: list[str]) -> list[Run]:
    """Runs that can be shown together, one of several stages first. Raises CIKDError, OSError."""
    runs = [load_run(folder) for folder in folders or [newest_run()]]
    several = [run for run in runs if len(run.spans) > 1]
    single = [run for run in runs if len(run.spans) == 1]
    runs = several + single

    def must_agree(run):
        return run.images_hash, run.grid, run.cfg.student, run.cfg.heads

    for run in runs:
        need(must_agree(run) == must_agree(runs[0]), f"{run.folder}: has other images, patches, "
             f"student or heads than {runs[0].folder}; show it alone")
    return runs


def check_writable(folder: Path) -> None:
    """Make the folder, before minutes are spent on what goes there. Raises CIKDError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cikd.CIKDError(f"{folder}: cannot be written ({error}); name another folder "
                             "by --output-dir") from None


def patch_number(query: list[int] | None, grid: int) -> int | None:
    """--query ROW COLUMN as the number of a patch. Raises CIKDError."""
    if query is None:
        return None
    need(0 <= min(query) and max(query) < grid, f"--query: must be from 0 to {grid - 1}")
    return query[0] * grid + query[1]


def choose_images(index: list[int] | None, n: int, truth: torch.Tensor | None) -> list[int]:
    """The images to draw: those of --index; of a test set one of each of the first classes; else
    the first ones. Raises CIKDError."""
    if index:
        need(0 <= min(index) and max(index) < n, f"--index: must be from 0 to {n - 1}")
        return index
    if truth is None:
        return list(range(min(n, DRAWN)))
    return [int((truth == number).int().argmax()) for number in truth.unique()[:DRAWN]]


def shorten(name: str) -> str:
    """A class name as figures have room for it: its beginning and its end."""
    return name if len(name) <= 24 else f"{name[:14]}…{name[-9:]}"


def best(classes: list[str], probabilities: torch.Tensor) -> list[str]:
    """The three likeliest classes, each with its percentage. Probabilities [K]."""
    order = probabilities.argsort(descending=True)[:3].tolist()
    return [f"{classes[number]} {100 * probabilities[number]:.1f} %" for number in order]


def captions_of(run: Run, probabilities: torch.Tensor, truth: torch.Tensor | None) -> list[str]:
    """What is true, where that is known, and what the student says: probabilities [n, K], class
    numbers [n]."""
    classes = [shorten(name) for name in run.classes]
    captions = [f"{run.cfg.method}: {best(classes, each)[0]}" for each in probabilities]
    if truth is None:
        return captions
    return [f"true: {classes[number]}\n{said}" for number, said in zip(truth.tolist(), captions)]


def visualize(args: argparse.Namespace) -> Path:
    """All figures of the runs named. Returns their folder. Raises CIKDError, OSError."""
    need(not (args.image and args.data_dir), "--data-dir: contradicts --image; give one")
    runs = load_runs(args.runs)
    first = runs[0]
    query = patch_number(args.query, first.grid)
    images, truth = run_images(first, args.image, args.data_dir)
    index = choose_images(args.index, len(images), truth)
    names = args.image or [f"test image {number}" for number in index]
    usual = "figures-own" if args.image else "figures"          # these stay beside each other
    out = Path(os.path.expanduser(args.output_dir or first.folder / usual))
    check_writable(out)
    if args.gif:
        snapshots_of(first)                     # says now what it lacks, not after minutes

    lines = lines_of(runs)
    entries = entries_of(lines)
    students = measure_students(entries, images)
    surrogates = measure_surrogates(first, images)
    print_table(surrogates + students)
    drawn = images[index]
    described = images if args.image else drawn
    for name, probabilities in zip(names, probabilities_of(first, described)):
        print(f"{name}: {', '.join(best(first.classes, probabilities))}")

    drawn_truth = None if truth is None else truth[index]
    captions = captions_of(first, probabilities_of(first, drawn), drawn_truth)
    detailed = [entry for entry in entries if entry.detailed]
    looked = looks(first, detailed, drawn, query)
    panels = {}
    close = []                                  # the students of which heads are shown
    for entry, measured in zip(entries, students):
        if entry.own:
            panels[measured.label] = measured.kernels
        if entry.detailed:
            close.append(measured)
    overview(lines, panels, looked, out / f"summary.{args.format}")
    heatmaps(first, looked, captions, out / f"heatmaps.{args.format}")
    distances(close, surrogates, out / f"distance.{args.format}", first)
    draw(kernels(panels), out / f"kernels.{args.format}", first)
    curriculum(lines, out / f"curriculum.{args.format}")
    if args.html:
        explorer(first, entries, drawn, captions, out / "explorer.html", query)
    if args.gif:
        locality_gif(first, images, out / "locality.gif")
    print(f"see {out}")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("visualize_attention.py", allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message} (--help lists all that can be given)")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs [the newest under runs/]")
    add("--image", nargs="+", metavar="FILE", help="classify these pictures and draw from them, "
        "averages too, instead of test images")
    add("--index", type=int, nargs="+", metavar="I", help="the images drawn, from 0 [one each of "
        "four classes; the first four pictures]")
    add("--query", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="patch [a selective one]")
    add("--data-dir", metavar="DIR", help="where the run's images are now [where it read them]")
    add("--output-dir", metavar="DIR", help="where the figures go [RUN/figures; of your pictures "
        "RUN/figures-own]")
    add("--format", choices=("png", "pdf", "svg"), default="png", help="of the figures [png]")
    add("--html", action="store_true", help="also explorer.html: where any patch looks")
    add("--gif", action="store_true", help="also locality.gif; needs --snapshot-every")
    return cikd.run_command("visualize_attention",
                            lambda: visualize(parser.parse_intermixed_args(argv)))


# Not where cells are run one by one.
if __name__ == "__main__" and (not hasattr(sys, "ps1") or sys.argv[0].endswith("attention.py")):
    sys.exit(main())

"""Look at the locality a student has learned: heatmaps, distances, kernels and curves of runs of cikd.py.

    python visualize_attention.py                             # the newest finished run under runs/
    python visualize_attention.py RUN [RUN ...]               # these, e.g. cikd, kd and scratch together
    python visualize_attention.py --image cat.jpg             # your own picture instead of test images
    python visualize_attention.py --index 3 8 --query 2,5 --block 0 --head 1

It rebuilds the models from a run's settings.json, loads them strictly and never trains. The first
run named (a cikd run, if there is one) is shown before training, after ALI and after LM, others at their end.
Each figure is a function that also returns the numbers it drew.

"Attention" here is the student's softmax(q kᵀ / sqrt(d)): among patches alone, CLS left out and the rows made
to sum to 1 again, as in ALI; the CLS figure shows what CLS gives each patch, rescaled to sum to 1. The
teacher, a ResNet, has none: what is shown for it is the surrogate that ALI imitates,
`cikd.teacher_attention`.
"""

# %% 1. Runs: settings, models, images
from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg          # no display is needed
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import cikd
from cikd import CIKDError

COLORS = {"before": "#999999", "ALI": "#E69F00", "LM": "#0072B2"}     # Okabe and Ito's, for the colour-blind
OTHERS = ["#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"]     # further runs, in the order given
MAP = "magma"


class Run(NamedTuple):
    """One finished run. `students` in the order of training: before training, after ALI, after LM."""
    folder: Path
    cfg: cikd.Config
    classes: list[str]
    students: dict[str, cikd.VisionTransformer]
    teacher: cikd.ResNetTeacher | None
    rows: list[dict]
    fingerprint: str

    @property
    def grid(self) -> int:
        return self.cfg.image_size // self.cfg.patch_size


def newest_run(output_dir: str | Path = "runs") -> Path:
    """The finished run under `output_dir` with the newest student.pt. Raises CIKDError if there is none."""
    found = sorted(Path(output_dir).glob("*/student.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise CIKDError(f"{output_dir}: holds no finished run; make one with `python cikd.py`, or name one")
    return found[-1].parent


def load_run(folder: str | Path) -> Run:
    """Rebuild a finished run's models from its settings. Raises CIKDError that says what does not fit."""
    folder = Path(folder)
    facts, rows = cikd.read_run(folder)
    if not (folder / "student.pt").exists():
        raise CIKDError(f"{folder}: is not finished; go on with `python cikd.py --resume {folder}`")
    here = dict(device="cpu", teacher_checkpoint=None)       # not needed: the teacher's file is named apart
    cfg, classes = cikd.resolve(cikd.Config(**facts["settings"] | here)), facts.get("classes")
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(c, str) for c in classes) or \
            not isinstance(facts.get("teacher_file", ""), str):
        raise CIKDError(f"{folder}: settings.json is not as it was written; train again with --overwrite")
    teacher_file = facts.get("teacher_file")
    if teacher_file and not Path(teacher_file).exists():     # the runs were moved: look beside this one
        teacher_file = folder.parent / "teachers" / Path(teacher_file).parent.name / "teacher.pt"
    names = {"student_init": "before training", "student_ali": "after ALI",
             "student": "after LM" if cfg.method == "cikd" else f"after {cfg.method}"}
    students = {}
    for file, name in names.items():
        if file != "student_ali" or cfg.method == "cikd":
            students[name] = cikd.build_student(cfg, len(classes)).eval()
            cikd.load_strictly(students[name], folder / f"{file}.pt")
    teacher = None
    if teacher_file:
        if not Path(teacher_file).is_file():
            raise CIKDError(f"{folder}: its teacher, {facts['teacher_file']}, is not there; bring it back")
        if cikd.file_hash(teacher_file) != facts.get("teacher"):
            raise CIKDError(f"{teacher_file}: is not the teacher that {folder} learned from; bring that back")
        teacher = cikd.freeze(cikd.ResNetTeacher(cfg.teacher, len(classes), cfg.image_size))
        cikd.load_strictly(teacher, teacher_file)
    return Run(folder, cfg, classes, students, teacher, rows, facts["data"])


def run_images(run: Run, image: str | None, data_dir: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 [n, 3, S, S] and labels [n]: the run's own test images, or one picture and None."""
    if image is not None:
        return cikd.to_rgb(cikd.open_image(image), run.cfg.image_size)[None], None
    run.cfg.data_dir = data_dir or run.cfg.data_dir
    data = cikd.load_dataset(run.cfg)
    drawn = run.cfg.dataset == "shapes"              # anew, and other CPUs may round a pixel differently
    if data.fingerprint != run.fingerprint and not drawn:
        raise CIKDError(f"{run.folder}: learned other images than {run.cfg.data_dir} holds; see --data-dir")
    return data.test_images, data.test_labels


# %% 2. Numbers: what the figures show, and what the tests check
def cls_and_patch_maps(student: cikd.VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """Attention as the student uses it, with CLS: float [B, 3, S, S] -> of each block [B, H, N+1, N+1]."""
    with torch.no_grad():
        _, tapped = student.forward_taps(images, range(len(student.blocks)), classify=False)
        return [cikd.relation(q, k).exp() for q, k, _ in tapped.values()]


def patch_maps(student: cikd.VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Attention among patches: uint8 [n, 3, S, S] -> [blocks, n, H, N, N]."""
    parts = [torch.stack(cikd.student_maps(student, cikd.to_float(x))) for x in images.split(16)]
    return torch.cat(parts, 1)


def surrogate_maps(run: Run, images: torch.Tensor, stage: int) -> torch.Tensor:
    """The teacher's surrogate at a stage (from 0): uint8 [n, 3, S, S] -> [n, H, N, N]."""
    cfg = run.cfg
    with torch.no_grad():
        features = run.teacher(cikd.to_float(images), stage + 1)[1][stage]
        return cikd.teacher_attention(features, run.grid, cfg.heads, cfg.tau, cfg.teacher_maps == "shared")


def neighbourhood_share(maps: torch.Tensor) -> torch.Tensor:
    """Share of attention within the query's 3 x 3 neighbourhood (less at borders): [..., N, N] -> [...]."""
    grid = int(maps.shape[-1] ** 0.5)
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    near = torch.cdist(place, place, p=torch.inf) <= 1                              # [N, N]
    return (maps * near).sum(-1).mean(-1)


def self_share(maps: torch.Tensor) -> torch.Tensor:
    """Share of attention on the query itself: [..., N, N] -> [...]."""
    return maps.diagonal(dim1=-2, dim2=-1).mean(-1)


def rollout(maps: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema 2020): full maps of all blocks -> [B, N+1, N+1], rows sum to 1.

    Heads are averaged, the residual connection is an identity of the same weight, and blocks are multiplied.
    """
    joint = torch.eye(maps[0].shape[-1]).expand(len(maps[0]), -1, -1)
    for of_block in maps:
        joint = (of_block.mean(1) / 2 + torch.eye(of_block.shape[-1]) / 2) @ joint
    return joint


def stages_of(runs: list[Run]) -> list[tuple[Run, str, cikd.VisionTransformer, str, str]]:
    """(run, stage, student, label, colour): all stages of the first run, then how the others ended."""
    first = runs[0]
    colors = dict(zip(first.students, (COLORS["before"], COLORS["ALI"], COLORS["LM"])
                      if len(first.students) == 3 else (COLORS["before"], COLORS["LM"])))
    shown = [(first, stage, student, stage, colors[stage]) for stage, student in first.students.items()]
    for i, run in enumerate(runs[1:]):
        stage, student = list(run.students.items())[-1]
        twins = [other.folder.name.split("-") for other in runs if other.cfg.method == run.cfg.method]
        apart = [p for p in run.folder.name.split("-") if any(p not in twin for twin in twins)]    # its own
        label = run.cfg.method + (f" ({'-'.join(apart)[-30:] or i + 2})" if len(twins) > 1 else "")
        label = cikd.plain(label) + f" #{i + 2}" * any(label == other[3] for other in shown)
        shown.append((run, stage, student, label, OTHERS[i % len(OTHERS)]))
    return shown


def measure(runs: list[Run], images: torch.Tensor) -> list[dict]:
    """For each stage shown: distance [blocks, H] (patches), share [blocks, H], accuracy (percent) or None."""
    out = []
    for run, stage, student, label, color in stages_of(runs):
        maps = patch_maps(student, images)
        at = {"before training": None, "after ALI": run.cfg.ali_epochs - 1}.get(stage, -1)
        out.append(dict(run=run.folder.name, label=label, color=color,
                        distance=cikd.attention_distance(maps).mean(1),
                        share=neighbourhood_share(maps).mean(1), self=self_share(maps).mean(1),
                        accuracy=None if at is None else float(run.rows[at]["accuracy"])))
    return out


def print_table(measured: list[dict], references: dict[str, torch.Tensor]) -> None:
    """The table on stdout. references: name -> maps [..., N, N]."""
    last = len(measured[0]["distance"]) - 1
    print(f"{'':20} accuracy  on itself  in 3 x 3  distance (patches): mean, then block 0 to {last}")

    def line(name, accuracy, itself, share, distance):
        accuracy = "" if accuracy is None else f"{accuracy:.1f} %"
        each = "   " + " ".join(f"{d:.2f}" for d in distance.mean(1)) if distance.ndim > 1 else ""
        print(f"{name[:20]:20} {accuracy:>8} {100 * itself.mean():8.1f} % {100 * share.mean():7.1f} %  "
              f"{distance.mean():.2f}{each}")

    for name, maps in references.items():
        line(name, None, self_share(maps), neighbourhood_share(maps), cikd.attention_distance(maps).flatten())
    for run in dict.fromkeys(m["run"] for m in measured):
        print(run)
        for m in measured:
            if m["run"] == run:
                name = "  " + m["label"].replace(r"\$", "$")        # stdout needs no escape
                line(name, m["accuracy"], m["self"], m["share"], m["distance"])


# %% 3. Figures: each draws into a file and returns its numbers
def show_map(axes, image: np.ndarray, values: torch.Tensor | None, norm: Normalize, query=None) -> None:
    """A map [g, g] over the dimmed grey image [S, S, 3], or the image alone; the query patch is framed."""
    axes.set(xticks=[], yticks=[])
    if values is None:
        axes.imshow(image, extent=(0, 1, 1, 0))
    else:                                                    # where little attention goes, the image shows
        axes.imshow(image.mean(2) * 0.5, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        axes.imshow(values.numpy(), cmap=MAP, norm=norm, alpha=np.clip(0.2 + norm(values.numpy()), 0, 0.95),
                    extent=(0, 1, 1, 0), interpolation="nearest")
    if query is not None:
        row, col, grid = query
        axes.plot(np.array([col, col + 1, col + 1, col, col]) / grid,
                  np.array([row, row, row + 1, row + 1, row]) / grid, color="#56B4E9", linewidth=2)


def picture_table(run: Run, images: torch.Tensor, labels: torch.Tensor | None, columns: dict, title: str,
                  unit: str, path: Path, query: tuple[int, int] | None = None) -> None:
    """A row for each image, a column for each of `columns` (name -> maps [n, g, g]), on one colour scale."""
    n, width = len(images), len(columns) + 1
    shared = torch.stack([maps for name, maps in columns.items() if name != "rollout"])
    norm = Normalize(0, float(np.quantile(shared, 0.99)))
    figure = Figure(figsize=(1.3 * width + 2.0, 1.32 * n + 0.95), layout="constrained")
    axes = figure.subplots(n, width, squeeze=False)
    for i, text in enumerate(row_labels(run, images, labels)):
        picture, frame = images[i].permute(1, 2, 0).numpy(), query and (*query, run.grid)
        show_map(axes[i, 0], picture, None, norm, frame)
        axes[i, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
        for a, (name, maps) in zip(axes[i, 1:], columns.items()):
            own = Normalize(float(maps.min()), float(maps.max()))           # rollout is nearly uniform
            show_map(a, picture, maps[i], own if name == "rollout" else norm, frame)
            if i == 0:
                a.set_title("rollout (lowest\nto highest)" if name == "rollout" else name, fontsize=10)
    axes[0, 0].set_title("image" if query is None else "image and\nquery patch", fontsize=10)
    bar = figure.colorbar(ScalarMappable(norm, MAP), ax=axes, shrink=0.9, extend="max", aspect=30)
    bar.set_label(f"{unit} (uniform: {1 / run.grid ** 2:.3f}; weak is transparent)")
    figure.suptitle(title, fontsize=12)
    cikd.save(path, figure)


def row_labels(run: Run, images: torch.Tensor, labels: torch.Tensor | None) -> list[str]:
    """True class, predicted class and its probability, by the run's last student."""
    with torch.no_grad():
        p = list(run.students.values())[-1](cikd.to_float(images)).softmax(1)
    by, classes = f"predicted by {run.cfg.method}", [cikd.plain(name) for name in run.classes]
    text = [f"{by}:\n{classes[int(k)]} ({100 * float(c):.0f} %)" for c, k in zip(*p.max(1))]
    return text if labels is None else [f"true: {classes[int(y)]}\n{t}" for y, t in zip(labels, text)]


def heatmaps(runs: list[Run], images: torch.Tensor, labels: torch.Tensor | None, path: Path,
             query: tuple[int, int], block: int, head: int | None = None) -> dict[str, torch.Tensor]:
    """Where the query patch looks: teacher's surrogate and each student. Returns {column: [n, g, g]}."""
    first, grid, pick = runs[0], runs[0].grid, query[0] * runs[0].grid + query[1]
    columns, stage = {}, dict(cikd.parse_pairs(first.cfg)).get(block)

    def from_query(maps):                                        # [n, H, N, N] -> [n, g, g]
        maps = maps.mean(1) if head is None else maps[:, head]
        return maps[:, pick].view(-1, grid, grid)

    if first.teacher is not None:
        shown = cikd.parse_pairs(first.cfg)[-1][1] if stage is None else stage
        what = "surrogate" if stage is not None else "not its target"
        columns[f"teacher, layer{shown + 1}\n({what})"] = from_query(surrogate_maps(first, images, shown))
    for run, _, student, label, _ in stages_of(runs):
        columns[f"student\n{label}"] = from_query(patch_maps(student, images)[block])
    heads = "mean of heads" if head is None else f"head {head}"
    title = f"Where the framed patch looks: block {block}, {heads}"
    picture_table(first, images, labels, columns, title, "attention", path, query)
    return columns


def distances(patch: int, measured: list[dict], references: dict, path: Path) -> list[dict]:
    """Mean attention distance of each head against depth (Raghu 2021). Returns `measured`."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    blocks = np.arange(len(measured[0]["distance"]))
    for i, m in enumerate(measured):
        shift = (i - (len(measured) - 1) / 2) * 0.12
        values = m["distance"].numpy()
        axes.plot(np.repeat(blocks + shift, values.shape[1]), values.reshape(-1), "o", color=m["color"],
                  alpha=0.45, markersize=4, markeredgewidth=0)
        axes.plot(blocks + shift, values.mean(1), color=m["color"], linewidth=2, label=m["label"])
    for (name, maps), style in zip(references.items(), (":", "--", "-.", (0, (1, 3)), (0, (5, 5)))):
        value = float(cikd.attention_distance(maps).mean())
        axes.axhline(value, color="black", linestyle=style, linewidth=1, label=f"{name}: {value:.2f}")
    low = min([float(m["distance"].min()) for m in measured]
              + [float(cikd.attention_distance(maps).mean()) for maps in references.values()])
    axes.set(xlabel="block (dots: heads; lines: their mean; drawn side by side)", xticks=blocks,
             ylabel="mean attention distance (patches)", title="How far the student looks, by depth",
             ylim=(0.85 * low, None))
    axes.secondary_yaxis("right", functions=(lambda y: y * patch, lambda y: y / patch)).set_ylabel("(pixels)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    cikd.save(path, figure)
    return measured


def mosaic(kernels: torch.Tensor) -> np.ndarray:
    """[blocks, H, 2g-1, 2g-1] -> one picture, blocks downwards, heads to the right, gaps of NaN between."""
    padded = torch.nn.functional.pad(kernels, (1, 1, 1, 1), value=float("nan"))
    return torch.cat([torch.cat(list(row), 1) for row in padded], 0).numpy()


def draw_kernels(figure: Figure, panels: dict[str, torch.Tensor], top: float) -> None:
    """One mosaic for each panel name, on one logarithmic colour scale, so that no centre is cut off."""
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for a, (name, kernels) in zip(axes, panels.items()):
        blocks, heads, side, _ = kernels.shape
        norm = LogNorm(1e-3, top, clip=True)
        drawn = a.imshow(mosaic(kernels), cmap=MAP, norm=norm, interpolation="nearest")
        a.set(title=name, xlabel="head", xticks=(np.arange(heads) + 0.5) * (side + 2) - 0.5,
              xticklabels=range(heads), yticks=(np.arange(blocks) + 0.5) * (side + 2) - 0.5,
              yticklabels=range(blocks))
        a.tick_params(length=0)
        a.spines[:].set_visible(False)
    axes[0].set_ylabel("block")
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8, extend="min")
    bar.set_label(f"mean attention at this offset\n(uniform: {4 / (side + 1) ** 2:.3f})")


def kernels(runs: list[Run], images: torch.Tensor, path: Path) -> dict[str, torch.Tensor]:
    """The convolution kernel of each head (Cordonnier 2020). Returns {stage: [blocks, H, 2g-1, 2g-1]}."""
    panels = {}
    for run, _, student, label, _ in stages_of(runs):
        panels[label] = cikd.attention_kernels(patch_maps(student, images)).mean(1)
    blocks, heads = next(iter(panels.values())).shape[:2]
    tile = min(0.75, 10 / (heads * len(panels)))
    figure = Figure(figsize=(tile * heads * len(panels) + 1.7, tile * blocks + 1.1), layout="constrained")
    draw_kernels(figure, panels, max(float(panel.max()) for panel in panels.values()))
    figure.suptitle("Attention by offset from the query: each tile's centre is the query itself, its edges "
                    f"{runs[0].grid - 1} patches away", fontsize=11)
    cikd.save(path, figure)
    return panels


def cls_attention(run: Run, images: torch.Tensor, labels: torch.Tensor | None, path: Path,
                  block: int) -> dict[str, torch.Tensor]:
    """What the CLS token reads: mean of heads, each head, and rollout. Returns {column: [n, g, g]}."""
    student, grid = list(run.students.values())[-1], run.grid
    maps = cls_and_patch_maps(student, cikd.to_float(images))
    here = maps[block][:, :, 0, 1:].view(len(images), -1, grid, grid)                     # [n, H, g, g]
    columns = {"mean of heads": here.mean(1)} | {f"head {h}": here[:, h] for h in range(here.shape[1])}
    columns["rollout"] = rollout(maps)[:, 0, 1:].view(-1, grid, grid)
    columns = {name: values / values.sum((1, 2), keepdim=True) for name, values in columns.items()}
    title = f"What CLS reads in block {block} and, by rollout, through all blocks ({run.cfg.method})"
    picture_table(run, images, labels, columns, title, "CLS attention, rescaled over patches", path)
    return columns


def curriculum(runs: list[Run], path: Path) -> dict[str, dict[str, list[float]]]:
    """Loss terms, accuracy and attention distance against epoch. Returns {panel: {run: values}}."""
    panels = {"ali": "ALI, training (nats)", "ce": "cross-entropy, training (nats)",
              "dkd": "DKD, training (nats)", "accuracy": "test accuracy (%)",
              "attention_distance": "attention distance (patches)"}
    losses = ("ali", "ce", "dkd")                            # 0 where a stage does not learn them
    labels = [label for run, _, _, label, _ in stages_of(runs) if run is not runs[0]]
    labels = [runs[0].cfg.method, *labels]
    drawn = {name: {label: [float(r[name]) for r in run.rows] for run, label in zip(runs, labels)
                    if name not in losses or any(float(r[name]) for r in run.rows)}
             for name in panels}
    drawn = {name: lines for name, lines in drawn.items() if lines}                       # no empty panels
    above = [name for name in losses if name in drawn]
    layout = [[name for name in above for _ in range(6 // len(above))],
              ["accuracy"] * 3 + ["attention_distance"] * 3]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplot_mosaic(layout)
    switch = runs[0].cfg.ali_epochs if runs[0].cfg.method == "cikd" else None
    for name, lines in drawn.items():
        a = axes[name]
        for i, (label, values) in enumerate(lines.items()):
            epochs = np.arange(1, len(values) + 1)
            learned = [k for k, v in enumerate(values) if name not in losses or v]
            color = COLORS["LM"] if label == labels[0] else OTHERS[(labels.index(label) - 1) % len(OTHERS)]
            a.plot(epochs[learned], np.array(values)[learned], color=color, linewidth=2, label=label,
                   marker="o" if len(learned) == 1 else None)
        if switch:
            a.axvline(switch + 0.5, color="black", linestyle="--", linewidth=1)
        if name == "ali":
            a.set_ylim(0, None)                              # 0 would be perfect imitation
        a.set(title=panels[name], xlabel="epoch", xlim=(1, max(len(run.rows) for run in runs)))
        a.title.set_fontsize(10)
        a.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        a.grid(alpha=0.3)
    if switch:
        a = axes["accuracy"]
        a.text(switch + 0.7, 0.03, "switch: ALI → LM", fontsize=9, transform=a.get_xaxis_transform())
    handles = axes["accuracy"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("The curriculum, epoch by epoch", fontsize=12)
    cikd.save(path, figure)
    return drawn


def locality_gif(run: Run, path: Path) -> list[int]:
    """The kernels epoch by epoch, from what --snapshot-every kept. Returns the epochs. Raises CIKDError."""
    from PIL import Image
    files = {epoch: run.folder / "kernels" / f"epoch_{epoch:04}.pt" for epoch in range(len(run.rows) + 1)}
    epochs = [epoch for epoch, file in files.items() if file.exists()]
    if not epochs:
        raise CIKDError(f"{run.folder}: holds no snapshots for --gif; train with --snapshot-every 1")
    frames = [cikd.load(files[epoch])["kernels"].float() for epoch in epochs]   # each [blocks, H, 2g-1, 2g-1]
    top, pictures = max(float(frame.max()) for frame in frames), []
    blocks, heads = frames[0].shape[:2]
    for epoch, frame in zip(epochs, frames):
        stage = "before training" if epoch == 0 else run.rows[epoch - 1]["stage"]
        figure = Figure(figsize=(0.75 * heads + 1.9, 0.75 * blocks + 1.1), layout="constrained", dpi=80)
        draw_kernels(figure, {f"epoch {epoch}: {stage}": frame}, top)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[400] * (len(pictures) - 1) + [2500])
    cikd.save(path, buffer.getvalue())
    return epochs


# %% 4. Command line
def parse_query(text: str | None, grid: int) -> tuple[int, int]:
    """--query ROW,COL, in patches from 0; by default a patch left of the middle. Raises CIKDError."""
    parts = text.split(",") if text else [str(grid // 2), str(grid // 4)]
    if len(parts) != 2 or not all(p.strip().isdecimal() and len(p) < 9 and int(p) < grid for p in parts):
        raise CIKDError(f"--query: {text!r} is not ROW,COL with both from 0 to {grid - 1}")
    return int(parts[0]), int(parts[1])


def visualize(args: argparse.Namespace) -> Path:
    """All figures of the runs named. Returns their folder. Raises CIKDError."""
    runs = [load_run(folder) for folder in args.runs or [newest_run()]]
    runs.sort(key=lambda run: run.cfg.method != "cikd")          # a cikd run, if any, comes first
    first = runs[0]
    for run in runs[1:]:
        for name in ("dataset", "image_size", "patch_size", "student", "heads"):
            if getattr(run.cfg, name) != getattr(first.cfg, name):
                raise CIKDError(f"{run.folder}: has another {name} than {first.folder}; show them one by one")
        if run.fingerprint != first.fingerprint:
            raise CIKDError(f"{run.folder}: learned other images than {first.folder}; show them one by one")
    blocks = len(next(iter(first.students.values())).blocks)
    block = cikd.parse_pairs(first.cfg)[-1][0] if args.block is None else args.block
    if not 0 <= block < blocks:
        raise CIKDError(f"--block: {block} is not a block from 0 to {blocks - 1}")
    if args.head is not None and not 0 <= args.head < first.cfg.heads:
        raise CIKDError(f"--head: {args.head} is not a head from 0 to {first.cfg.heads - 1}")
    query = parse_query(args.query, first.grid)
    images, labels = run_images(first, args.image, args.data_dir)
    index = args.index
    if not index:                                                # one image of each of the first four classes
        index = [0] if labels is None else [int((labels == k).nonzero()[0]) for k in labels.unique()[:4]]
    if len(index) > 40:
        raise CIKDError(f"--index: {len(index)} images are too many for one figure; name 40 at most")
    for i in index:
        if not 0 <= i < len(images):
            raise CIKDError(f"--index: {i} is not an image from 0 to {len(images) - 1}")
    chosen, truth = images[index], None if labels is None else labels[index]
    averaged = cikd.probe(images)
    out = Path(args.output_dir or first.folder / "figures")

    references = {"uniform": torch.full((1, first.grid ** 2, first.grid ** 2), first.grid ** -2)}
    if first.teacher is not None:
        for stage in sorted({stage for _, stage in cikd.parse_pairs(first.cfg)}):
            references[f"surrogate, layer{stage + 1}"] = surrogate_maps(first, averaged, stage)
    measured = measure(runs, averaged)
    print_table(measured, references)
    heatmaps(runs, chosen, truth, out / "heatmaps.png", query, block, args.head)
    distances(first.cfg.patch_size, measured, references, out / "distance.png")
    kernels(runs, averaged, out / "kernels.png")
    cls_attention(first, chosen, truth, out / "cls.png", block)
    curriculum(runs, out / "curriculum.png")
    if args.gif:
        locality_gif(first, out / "locality.gif")
    print(f"see {', '.join(sorted(p.name for p in out.iterdir() if p.suffix in ('.png', '.gif')))} in {out}")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = cikd.Parser(prog="visualize_attention.py", allow_abbrev=False, description=__doc__.split(":")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs [the newest under runs/]")
    parser.add_argument("--image", metavar="FILE", help="draw everything, averages too, from this picture "
                        "instead of test images")
    parser.add_argument("--index", type=int, nargs="+", metavar="I", help="test images [one of four classes]")
    parser.add_argument("--query", metavar="ROW,COL", help="query patch of the heatmaps [left of the middle]")
    parser.add_argument("--block", type=int, help="block of heatmaps and CLS maps [the last that ALI taught]")
    parser.add_argument("--head", type=int, help="head of the heatmaps, from 0 [mean of all]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the run's data set lies now [where it lay]")
    parser.add_argument("--output-dir", metavar="DIR", help="where the figures go [RUN/figures]")
    parser.add_argument("--gif", action="store_true", help="also locality.gif; needs --snapshot-every")
    return cikd.run_command("visualize_attention", lambda: visualize(parser.parse_args(argv)))


if __name__ == "__main__":
    if hasattr(sys, "ps1"):                  # cells run one by one; sys.argv is the session's
        print('try: runs = [load_run(newest_run())], or main(["RUN"])')
    else:
        sys.exit(main())

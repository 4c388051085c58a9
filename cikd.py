"""CIKD, Curriculum Information Knowledge Distillation, in one file.

A light Vision Transformer (ViT) trained on few images is slow to learn what a CNN has built in: to look at
neighbouring pixels first. CIKD lets a trained CNN, here a ResNet, teach it in two stages, the easy one first:

  1. ALI, Attention Locality Imitation: the student's self-attention imitates attention maps made from the
     teacher's low-level feature maps. No labels.
  2. LM, Logit Mimicking: the student learns the labels and the teacher's logits.

    python cikd.py                               # generated shapes, no download: minutes on two CPU cores
    python cikd.py --dataset cifar10             # ViT-Tiny taught by ResNet-18: wants a GPU
    python cikd.py --compare --seeds 0 1 2       # scratch, kd, joint and cikd side by side
    python cikd.py --help                        # every setting, its default and where it comes from

Paper: "Patient teacher can impart locality to improve lightweight vision transformer on small dataset",
Pattern Recognition, 2025. Its public code distils a ViT-B. A ResNet has no queries and keys, so our teacher's
attention map is a *surrogate* (section 5). In the help, "paper" means its abstract or its public code,
"ablation" that no other value tried did better by more than chance (README, "Which settings?").

Read from top to bottom; sections 3 to 7 are the method. Symbols in the shape comments:
  B batch, S image side (pixels), N patches (a g x g grid), D width, H heads, d = D/H, C channels, K classes,
  T temperature
"""

# %% 1. Settings
from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import socket
import statistics
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth

TIMEOUT = 20                    # seconds without an answer before a download is given up


class CIKDError(Exception):
    """Something the user can mend. `main` prints it as one line and exits with code 2."""


class DataRow(NamedTuple):
    """Defaults of a data set and, if it is downloaded, what torchvision needs and what a whole copy holds."""
    image_size: int             # S, pixels; photographs are cropped to the middle square
    patch_size: int             # pixels
    student: str
    teacher_epochs: int
    ali_epochs: int
    epochs: int                 # both stages together
    batch_size: int
    crop: str
    source: str = ""            # class in torchvision.datasets
    splits: tuple = ()          # its arguments for training (several splits are joined) and for testing
    counts: tuple = ()          # training and test images; a half-extracted copy has fewer
    archive: str = ""           # for those without a network: what to get
    folder: str = ""            # ... and where below --data-dir it belongs


SMALL = (32, 4, "vit_tiny", 60, 100, 300, 128, "pad")
PHOTO = (224, 16, "vit_tiny", 100, 100, 300, 128, "resized")
TRAIN_TEST = ([dict(train=True)], [dict(train=False)])
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
DATASETS = {
    "shapes": DataRow(32, 4, "vit_micro", 4, 5, 16, 32, "none"),
    "folder": DataRow(*PHOTO),
    "cifar10": DataRow(*SMALL, "CIFAR10", TRAIN_TEST, (50000, 10000),
                       "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": DataRow(*SMALL, "CIFAR100", TRAIN_TEST, (50000, 10000),
                        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "fashion_mnist": DataRow(*SMALL, "FashionMNIST", TRAIN_TEST, (60000, 10000),
                             "the four .gz files of https://github.com/zalandoresearch/fashion-mnist",
                             "FashionMNIST/raw"),
    "stl10": DataRow(96, 8, "vit_tiny", 100, 100, 300, 128, "resized",
                     "STL10", ([dict(split="train")], [dict(split="test")]), (5000, 8000),
                     "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
    "pets": DataRow(*PHOTO, "OxfordIIITPet", ([dict(split="trainval")], [dict(split="test")]), (3680, 3669),
                    f"images.tar.gz and annotations.tar.gz from {OXFORD}pets/", "oxford-iiit-pet"),
    "aircraft": DataRow(*PHOTO, "FGVCAircraft", ([dict(split="trainval")], [dict(split="test")]),
                        (6667, 3333), f"{OXFORD}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),
    "dtd": DataRow(*PHOTO, "DTD", ([dict(split="train"), dict(split="val")], [dict(split="test")]),
                   (3760, 1880), f"{OXFORD}dtd/download/dtd-r1.0.1.tar.gz", "dtd"),
    "imagenette": DataRow(*PHOTO, "Imagenette", ([dict(size="320px")], [dict(size="320px", split="val")]),
                          (9469, 3925), "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"),
}
STUDENTS = {"vit_tiny": dict(depth=12, width=192, heads=3), "vit_micro": dict(depth=6, width=64, heads=4)}
TEACHERS = {  # blocks in each stage, channels of the first stage (each later stage doubles them)
    "resnet20": ((3, 3, 3), 16), "resnet56": ((9, 9, 9), 16),                 # He 2016, section 4.2
    "resnet18": ((2, 2, 2, 2), 64), "resnet34": ((3, 4, 6, 3), 64),           # He 2016, table 1
}


def setting(default, help: str, low=None, high=10**7, choices=()):
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=tuple(choices)))


@dataclass
class Config:
    """Every setting. None means: from the data set's row in DATASETS, or as its help says in brackets."""
    # what to run
    dataset: str = setting("shapes", "images to learn from", choices=DATASETS)
    method: str = setting("cikd", "cikd (paper), or a baseline: scratch (labels only), kd (LM from the first "
                          "epoch), joint (ALI and LM together)", choices=("scratch", "kd", "joint", "cikd"))
    compare: bool = setting(False, "run all four methods; table, comparison.csv, comparison.png")
    seed: int = setting(0, "of the student, the order of images and the crops", 0)
    seeds: tuple[int, ...] | None = setting(None, "repeat with each of these seeds; mean and spread", 0)
    # data
    data_dir: str = setting("data", "where data sets lie or are downloaded to; for folder: "
                            "DIR/{train,test|val}/CLASS/*.png, .jpg, ...")
    train_size: int | None = setting(None, "use only so many training images, class-balanced", 2)
    holdout: int | None = setting(None, "test on so many training images, class-balanced and not trained "
                                  "on, instead of the test set: for choosing settings", 2)
    data_seed: int = setting(0, "of shapes, of both subsets and of the teacher: what runs share", 0)
    image_size: int | None = setting(None, "side of the square images, pixels", 16, 1024)
    patch_size: int | None = setting(None, "side of a patch, pixels", 1)
    crop: str | None = setting(None, "in training, the teacher's too: pad (shift by up to 1/8 of the side; "
                               "our choice), resized (random area and aspect; paper, whose LM adds "
                               "TrivialAugment), both with flips, or none",
                               choices=("pad", "resized", "none"))
    crop_scale: float = setting(0.2, "smallest area of a resized crop, a share (paper's ALI: 0.2)", 0.01, 1)
    jitter: float = setting(0.4, "brightness, contrast, saturation, student's copy in ALI only (paper)", 0, 1)
    # student
    student: str | None = setting(None, "vit_tiny: 12 blocks, width 192 (paper); vit_micro: 6, 64",
                                  choices=STUDENTS)
    heads: int | None = setting(None, "attention heads of each block (our choice; paper: 12, 6, 12) "
                                "[3 in vit_tiny, 4 in vit_micro]", 1)
    drop_path: float = setting(0.1, "stochastic depth of the last block, rising from 0 in the first (our "
                               "choice; paper: 0.1 in the middle blocks)", 0, 0.9)
    # teacher
    teacher: str | None = setting(None, "ResNet (our choice) [resnet18 for vit_tiny, resnet20 for vit_micro]",
                                  choices=TEACHERS)
    teacher_epochs: int | None = setting(None, "epochs of the teacher's own training (our choice)", 1)
    teacher_lr: float = setting(0.1, "its peak learning rate, SGD with Nesterov momentum (our choice)", 1e-9)
    teacher_checkpoint: str | None = setting(None, "your own trained teacher: a state dict for --teacher, of "
                                            "images in [-1, 1] and classes in the same order")
    pretrained_teacher: bool = setting(False, "start resnet18/34 from ImageNet weights: extra data")
    # stage 1, ALI
    ali_epochs: int | None = setting(None, "epochs of stage 1; then comes the switch (paper: 300, half; "
                                     "ours, a third: ablation)", 1)
    tau: float = setting(0.2, "temperature of the teacher's attention surrogate (ablation)", 1e-3, 100)
    teacher_maps: str = setting("per_head", "a teacher map per head, from groups of channels, or one shared "
                                "by all heads (ablation)", choices=("per_head", "shared"))
    relations: str = setting("qk+vv", "student relations that imitate it (paper, ablation)",
                             choices=("qk", "vv", "qk+vv"))
    pairs: str = setting("0:1,last:2", "student block:teacher stage, blocks from 0, stages from 1 (paper: "
                         "first and last block, low and middle layer; ablation)")
    # stage 2, LM
    dkd_alpha: float = setting(1.0, "weight of TCKD, the label against the rest (paper)", 0)
    dkd_beta: float = setting(4.0, "weight of NCKD, the other classes among themselves (paper)", 0)
    dkd_temperature: float = setting(1.0, "softens both sets of logits in DKD (paper)", 0.01, 100)
    ramp_epochs: int = setting(5, "epochs of LM in which the weight of DKD rises from 0 to 1 (paper)", 0)
    label_smoothing: float = setting(0.1, "cross-entropy's, of student (paper) and teacher", 0, 0.99)
    # training
    epochs: int | None = setting(None, "epochs of the student, both stages together (paper: 600)", 1)
    batch_size: int | None = setting(None, "images per step, the teacher's too (paper: 256 in ALI, 512 in "
                                     "LM)", 1)
    lr: float | None = setting(None, "student's peak learning rate, AdamW [vit_tiny: 1e-3, paper; "
                              "vit_micro: 2e-3, ablation of scratch and kd]", 1e-9)
    min_lr: float = setting(1e-6, "learning rate at the end of a stage (paper's LM) and of the teacher", 0)
    warmup: float = setting(0.1, "share of a stage, and of the teacher's epochs, in which the learning rate "
                            "rises (paper: 0.05)", 0, 1)
    weight_decay: float = setting(0.05, "0.05: paper; not on biases, norms, CLS, positions: our choice", 0)
    layer_decay: float = setting(1.0, "in LM, learning rate factor from each block to the one below (paper: "
                                 "0.75; our choice: off)", 0.01, 1)
    # where and how
    output_dir: str = setting("runs", "where runs are kept")
    run_name: str | None = setting(None, "folder of the run [made from the settings given]")
    snapshot_every: int = setting(0, "every so many epochs, keep what visualize_attention.py --gif needs; "
                                  "0 is never", 0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices=("auto", "on", "off"))
    resume: str | None = setting(None, "go on with the unfinished run in this folder, with its settings")
    overwrite: bool = setting(False, "start again where a run of this name lies")


RESULT_FIELDS = [f.name for f in fields(Config) if f.name not in {          # those that can change the result
    "compare", "seeds", "data_dir", "output_dir", "run_name", "snapshot_every", "device", "compile", "resume",
    "overwrite"}]


KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool}


def kind_of(f) -> str:
    """A field's type as a key of KINDS: "int | None" and "tuple[int, ...] | None" are "int"."""
    return f.type.removeprefix("tuple[").split(" ")[0].rstrip(",")


def resolve(cfg: Config) -> Config:
    """A checked copy with every None filled in. Raises CIKDError that names the setting."""
    for f in fields(cfg):
        value, low, high, choices = getattr(cfg, f.name), *(f.metadata[k] for k in ("low", "high", "choices"))
        several = isinstance(value, (tuple, list)) and f.type.startswith("tuple")
        for v in value if several else () if value is None and f.default is None else (value,):
            kind = KINDS[kind_of(f)]
            if not isinstance(v, kind) or v == "" or choices and v not in choices or \
                    isinstance(v, bool) and kind is not bool or \
                    low is not None and not low <= v <= high:       # refuses nan too
                allowed = f"one of {', '.join(choices)}" if choices else kind_of(f) if low is None else \
                    f"{kind_of(f)} from {low} to {high}"
                raise CIKDError(f"--{f.name.replace('_', '-')}: {v!r} is not allowed; it must be {allowed}")
    row, named, many = DATASETS[cfg.dataset], cfg.run_name, cfg.compare or cfg.seeds
    cfg = replace(cfg, run_name=named or default_name(cfg))      # named before the None are filled in
    if cfg.epochs and cfg.ali_epochs is None:    # only the total is given: ALI keeps its share of the row
        cfg.ali_epochs = max(1, round(cfg.epochs * row.ali_epochs / row.epochs))
    for name in set(row._fields) & set(RESULT_FIELDS):
        if getattr(cfg, name) is None:
            setattr(cfg, name, getattr(row, name))
    cfg.heads = cfg.heads or STUDENTS[cfg.student]["heads"]
    cfg.teacher = cfg.teacher or {"vit_tiny": "resnet18", "vit_micro": "resnet20"}[cfg.student]
    cfg.lr = cfg.lr or {"vit_tiny": 1e-3, "vit_micro": 2e-3}[cfg.student]
    side, patch, width = cfg.image_size, cfg.patch_size, STUDENTS[cfg.student]["width"]
    for wrong, message in [
        (side % patch or side == patch,
         f"--patch-size: {patch} does not cut --image-size {side} into 2 x 2 patches or more, without rest"),
        (width % cfg.heads, f"--heads: {cfg.heads} does not divide {cfg.student}'s width, {width}"),
        (cfg.ali_epochs >= cfg.epochs and (cfg.method == "cikd" or cfg.compare),
         f"--epochs: {cfg.epochs} must be above --ali-epochs, {cfg.ali_epochs}, to leave an epoch for LM"),
        (cfg.teacher_checkpoint and not Path(cfg.teacher_checkpoint).is_file(),
         f"--teacher-checkpoint: there is no file {cfg.teacher_checkpoint}"),
        (cfg.pretrained_teacher and cfg.teacher_checkpoint,
         "--pretrained-teacher: contradicts --teacher-checkpoint; give one of them"),
        (cfg.pretrained_teacher and (cfg.teacher not in ("resnet18", "resnet34") or side <= 64),
         "--pretrained-teacher: fits --teacher resnet18 or resnet34 and --image-size above 64 only"),
        (cfg.resume and many, "--resume: goes on with one run; --compare and --seeds go on by themselves"),
        (named and many, "--run-name: names one run, but --compare and --seeds make several"),
        (cfg.resume and cfg.overwrite, "--resume: goes on with a run; --overwrite would remove it"),
        (Path(cfg.run_name).name != cfg.run_name or cfg.run_name in ("..", "teachers"),
         f"--run-name: {cfg.run_name!r} is no plain folder name"),
        (cfg.seeds and len(set(cfg.seeds)) < len(cfg.seeds), "--seeds: names a seed twice"),
        (cfg.device == "cuda" and not torch.cuda.is_available() or
         cfg.device == "mps" and not torch.backends.mps.is_available(),
         f"--device: torch finds no {cfg.device} on this machine; use cpu or auto"),
    ]:
        if wrong:
            raise CIKDError(message)
    parse_pairs(cfg)
    return cfg


def data_name(cfg: Config) -> str:
    return os.path.basename(os.path.abspath(cfg.data_dir)) if cfg.dataset == "folder" else cfg.dataset


def default_name(cfg: Config) -> str:
    """Folder of a run: data set, method, every setting that is not the default, seed."""
    given = [f"{f.name}={getattr(cfg, f.name)}" for f in fields(cfg) if f.name in RESULT_FIELDS
             and f.name not in ("dataset", "method", "seed") and getattr(cfg, f.name) != f.default]
    name = "-".join([data_name(cfg), cfg.method, *given, f"seed{cfg.seed}"]).replace(os.sep, "_")
    long = len(os.fsencode(name)) > 150
    return name[:60] + "-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:8] if long else name


def parse_pairs(cfg: Config) -> list[tuple[int, int]]:
    """--pairs as (student block, teacher stage), both counted from 0. Raises CIKDError."""
    depth, stages, pairs = STUDENTS[cfg.student]["depth"], len(TEACHERS[cfg.teacher][0]), []
    for part in cfg.pairs.split(","):
        block, _, stage = part.strip().replace("last", str(depth - 1)).partition(":")
        numbers = block.isdecimal() and stage.isdecimal() and len(part) < 20
        if not (numbers and int(block) < depth and 1 <= int(stage) <= stages):
            raise CIKDError(f"--pairs: {part!r} is not BLOCK:STAGE; BLOCK must be from 0 to {depth - 1}, or "
                            f"last, STAGE from 1 to {stages}")
        channels = TEACHERS[cfg.teacher][1] * 2 ** (int(stage) - 1)
        if cfg.teacher_maps == "per_head" and cfg.heads > channels:
            raise CIKDError(f"--heads: {cfg.heads} are more than the {channels} channels of {cfg.teacher}'s "
                            f"stage {stage}; use fewer, or --teacher-maps shared")
        pairs.append((int(block), int(stage) - 1))
    return pairs


# %% 2. Data: uint8 tensors on the training device, augmented a whole batch at a time
class Data(NamedTuple):
    """Images are uint8 [n, 3, S, S], labels int64 [n]; `fingerprint` is a hash of all four."""
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]
    fingerprint: str


SHAPES = [fill + form for fill in ("", "hollow ") for form in "disc triangle square star flower".split()]


def make_shapes(n: int, seed: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """n images of the ten SHAPES, uint8 [n, 3, size, size], and labels [n]: a demonstration, not evidence.

    Random colour, place, size and a modest turn, over a coloured, noisy ground and under a thin line.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    labels = torch.arange(n) % len(SHAPES)
    pixels = torch.arange(size) + 0.5
    dx = pixels - size * uniform(0.4, 0.6, 1, 1)                    # [n, 1, S], from the shape's centre
    dy = pixels[:, None] - size * uniform(0.4, 0.6, 1, 1)           # [n, S, 1]
    rho, phi = torch.hypot(dx, dy), torch.atan2(dy, dx) + uniform(-0.3, 0.3, 1, 1)

    def polygon(k):      # radius of a regular k-gon in direction phi, 1 at its corners
        return math.cos(math.pi / k) / torch.cos(phi % (2 * math.pi / k) - math.pi / k)

    star = 1.1 - 0.6 * (2 * (phi * 5 / (2 * math.pi) % 1) - 1).abs()
    forms = torch.ones_like(phi), polygon(3) * 1.2, polygon(4) * 1.1, star, 0.65 + 0.35 * torch.cos(4 * phi)
    outline = torch.stack(forms)[labels % 5, torch.arange(n)] * uniform(0.3, 0.42, 1, 1) * size
    mask = (outline - rho + 0.5).clamp(0, 1)                        # 1 inside, one soft pixel at the edge
    core = (outline * 0.55 - rho + 0.5).clamp(0, 1)
    mask = (mask - core * (labels >= 5)[:, None, None])[:, None]    # [n, 1, S, S]

    ground = F.interpolate(uniform(-0.15, 0.15, 3, 4, 4), size=size, mode="bilinear") + uniform(0, 1, 3, 1, 1)
    colour = (ground.mean((2, 3), keepdim=True) + uniform(0.35, 0.65, 3, 1, 1)) % 1
    images = ground + mask * (colour - ground)                      # [n, 3, S, S]
    angle, offset = uniform(0, math.pi, 1, 1), uniform(-0.4, 0.4, 1, 1) * size
    line = (dx * torch.cos(angle) + dy * torch.sin(angle) - offset).abs() < 0.5
    images = torch.where(line[:, None], uniform(0, 1, 3, 1, 1), images) + uniform(-0.06, 0.06, 3, size, size)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def to_rgb(image: Image.Image, size: int) -> torch.Tensor:
    """Any PIL image -> uint8 [3, size, size]: RGB, alpha over white, middle square, resized."""
    if image.mode == "F" or image.mode.startswith("I"):     # deep grey: Pillow would clip, not scale
        grey = np.asarray(image, np.float64)
        top = 65535 if image.mode != "F" else 1 if grey.max() <= 1 else 255
        image = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)       # [S, S, 3] -> [3, S, S]


def open_image(path: str | Path) -> Image.Image:
    """Read an image file whole and turn it upright (EXIF). Raises CIKDError with its name if that fails."""
    try:
        if not os.path.isfile(path):                 # a pipe would be waited for for ever
            raise OSError("no such file, or no regular one")
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:                       # Pillow raises whatever a broken file leads to
        raise CIKDError(f"{path}: not a readable image ({one_line(error)}); mend or remove it") from None


def decode(dataset, size: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All of a torchvision data set -> uint8 [n, 3, size, size], int64 [n], on all cores, with progress."""
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)

    def one(i):
        image, labels[i] = dataset[i]
        images[i] = to_rgb(image, size)

    pool = ThreadPoolExecutor(os.cpu_count())        # Pillow decodes and resizes outside the interpreter lock
    try:
        for done, _ in enumerate(pool.map(one, range(len(dataset))), 1):
            if done % 100 == 0 or done == len(dataset):
                status(f"reading {name}: {done} of {len(dataset)} images", last=done == len(dataset))
    finally:
        pool.shutdown(cancel_futures=True)
    return images, labels


class Folder(torchvision.datasets.ImageFolder):
    def find_classes(self, directory):               # .ipynb_checkpoints and the like are no classes
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        for base, folders, _ in (step for name in classes for step in os.walk(os.path.join(directory, name))):
            if links := [name for name in folders if os.path.islink(os.path.join(base, name))]:
                raise CIKDError(f"{os.path.join(base, links[0])}: a link to a folder, by which images could "
                                "be met twice; put the images themselves there")
        return classes, {name: i for i, name in enumerate(classes)}


def load_folder(cfg: Config) -> list[tuple]:
    """(images, labels, classes) of the user's DIR/train and of DIR/test or DIR/val, read by ImageFolder."""
    train, test, val = (Path(cfg.data_dir) / name for name in ("train", "test", "val"))
    splits = []
    for path in [train] if cfg.holdout else [train, test if test.is_dir() else val]:
        if not path.is_dir():
            raise CIKDError(f"{path}: no such folder; --dataset folder reads DIR/train/CLASS/ and "
                            "DIR/test/CLASS/ (or DIR/val/CLASS/) of --data-dir DIR")
        try:
            dataset = Folder(str(path), loader=open_image)
        except (FileNotFoundError, ValueError) as error:
            raise CIKDError(f"{path}: {one_line(error)}") from None
        classes = splits[0][2] if splits else dataset.classes
        if unknown := sorted(set(dataset.classes) - set(classes)):
            raise CIKDError(f"{path / unknown[0]}: a class that {train} lacks; add it there or remove this")
        images, labels = decode(dataset, cfg.image_size, str(path))
        numbers = torch.tensor([classes.index(name) for name in dataset.classes])       # those of train
        splits.append((images, numbers[labels], classes))
    return splits


def load_torchvision(cfg: Config) -> list[tuple]:
    """(images, labels, classes) of training and test set, downloaded into --data-dir if not there yet."""
    row, where, splits = DATASETS[cfg.dataset], Path(cfg.data_dir), []
    make = getattr(torchvision.datasets, row.source)
    for name, parts, count in zip(["train", "test"][: 1 if cfg.holdout else 2], row.splits, row.counts):
        try:
            datasets = [open_torchvision(make, where, arguments) for arguments in parts]
        except Exception as error:                   # torchvision raises whatever it meets in a broken copy
            raise CIKDError(
                f"{cfg.dataset}: neither whole in {where} nor downloaded ({type(error).__name__}: "
                f"{one_line(error)}); get {row.archive}, put it into {where / row.folder} and run this "
                "again, or try --dataset shapes, which needs no download") from None
        dataset = torch.utils.data.ConcatDataset(datasets)
        try:
            if len(dataset) != count:
                raise OSError(f"{len(dataset)} images where {count} belong")
            images, labels = decode(dataset, cfg.image_size, f"{cfg.dataset} {name}")
        except (OSError, SyntaxError, ValueError) as error:
            raise CIKDError(f"{cfg.dataset}: the {name} images in {where} are incomplete "
                            f"({one_line(error)}); delete the extracted folder and run this again") from None
        classes = [c if isinstance(c, str) else c[0] for c in datasets[0].classes]      # Imagenette: synonyms
        splits.append((images, labels, classes))
    return splits


@contextlib.contextmanager
def network_timeout():
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(None)


def open_torchvision(make, where: Path, arguments: dict):
    """A torchvision data set; the network is touched only if it is not there, and not waited for for ever."""
    try:
        return make(str(where), **arguments)
    except RuntimeError:
        print(f"downloading {make.__name__} into {where}", flush=True)
    with network_timeout():
        return make(str(where), **arguments, download=True)


def balanced_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded order [n] of all images, every prefix of which is as class-balanced as the data allow."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class, counts = labels[order].argsort(stable=True), labels.bincount()
    rank = torch.empty_like(order)                   # 0 for the first image of its class here, then 1, 2, ...
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[rank.argsort(stable=True)]


def load_dataset(cfg: Config) -> Data:
    """The data of a resolved Config, cut to --holdout and --train-size. Raises CIKDError."""
    if cfg.dataset == "shapes":
        splits = [(*make_shapes(n, 2 * cfg.data_seed + test, cfg.image_size), SHAPES)
                  for test, n in ((0, 3000), (1, 1000))]
    else:
        splits = load_folder(cfg) if cfg.dataset == "folder" else load_torchvision(cfg)
    (images, labels, classes), (test_images, test_labels, _) = splits[0], splits[-1]
    K, n, held = len(classes), len(labels), cfg.holdout or 0
    size = cfg.train_size or n - held
    order = balanced_order(labels, cfg.data_seed)
    test, train = order[:held], order[held:held + size]
    cuts = [test] * bool(held) + [train] * bool(held or cfg.train_size)
    if K < 2 or held + size > n or any(len(labels[cut].unique()) < K for cut in cuts):
        option = "--dataset" if K < 2 else "--train-size" if cfg.train_size else "--holdout"
        raise CIKDError(f"{option}: {n} training images of {K} classes cannot give {size} to train on and "
                        f"{held} to hold out; there must be two classes and, in each part, an image of each")
    if held:
        test_images, test_labels = images[test], labels[test]
    if held or cfg.train_size:
        images, labels = images[train], labels[train]
    digest = hashlib.sha256()
    for part in (images, labels, test_images, test_labels):
        digest.update(part.contiguous().numpy().data)
    return Data(images, labels, test_images, test_labels, classes, digest.hexdigest()[:16])


def draw_crops(n: int, size: int, kind: str, scale: float) -> torch.Tensor | None:
    """Random crop and flip of n images: (width, x, height, y) [n, 4], the whole image being (1, 0, 1, 0) and
    x, y the crop's centre in coordinates from -1 to 1. A negative width is a flip."""
    if kind == "none":
        return None
    flip = torch.randint(0, 2, (n,)) * 2.0 - 1
    if kind == "pad":                                # whole pixels, so nothing is blurred; grey comes in
        wide = high = torch.ones(n)
        shift = torch.randint(-(size // 8), size // 8 + 1, (2, n)) * 2 / size
    else:                                            # torchvision's RandomResizedCrop, without its retries
        area = torch.rand(n) * (1 - scale) + scale
        ratio = torch.exp((torch.rand(n) * 2 - 1) * math.log(4 / 3))
        wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        shift = (torch.rand(2, n) * 2 - 1) * (1 - torch.stack([wide, high]))
    return torch.stack([wide * flip, shift[0], high, shift[1]], 1)


def to_float(images: torch.Tensor, crops: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float in [-1, 1] (mean and deviation 0.5, paper), cropped by `draw_crops`."""
    images = images.float() / 127.5 - 1
    if crops is None:
        return images
    B, _, S, _ = images.shape
    place = (2 * torch.arange(S, device=images.device) + 1) / S - 1         # [S], pixel centres from -1 to 1
    wide, x, high, y = crops[:, :, None].unbind(1)                          # each [B, 1]
    grid = torch.stack([(wide * place + x)[:, None].expand(B, S, S),        # where each pixel comes from
                        (high * place + y)[:, :, None].expand(B, S, S)], 3)     # [B, S, S, 2]
    return F.grid_sample(images, grid, align_corners=False)


def color_jitter(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Brightness, contrast and saturation of each image [B, 3, S, S] in [-1, 1], times 1 ± strength."""
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    images = (images + 1) / 2 * factors[0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, factors[1])
    return torch.lerp(images.mean(1, keepdim=True), images, factors[2]).clamp(0, 1) * 2 - 1


# %% 3. Student: ViT-Tiny, with timm's parameter names
class Attention(nn.Module):
    """Multi-head self-attention in two halves, because ALI wants what lies between them: q, k and v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, N+1, D] -> q, k, v, each [B, H, N+1, d]."""
        B, tokens, D = x.shape
        return self.qkv(x).view(B, tokens, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(q kᵀ / sqrt(d)) v, then heads joined and mixed -> [B, N+1, D]. No map is stored for it."""
        x = F.scaled_dot_product_attention(q, k, v)                     # [B, H, N+1, d]
        return self.proj(x.transpose(1, 2).flatten(2))                  # [B, N+1, H, d] -> [B, N+1, D]


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.attn.project(self.norm1(x))

    def forward(self, x: torch.Tensor, qkv: tuple) -> torch.Tensor:
        x = x + self.drop_path(self.attn(*qkv))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each one: a convolution whose stride is its size."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)      # [B, 3, S, S] -> [B, D, g, g] -> [B, N, D]


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """2-D sine-cosine position embedding (MAE): a quarter of D for each of sin x, cos x, sin y, cos y."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency                     # [g, D/4]
    wave = torch.cat([angle.sin(), angle.cos()], 1)                     # [g, D/2]
    x, y = wave.expand(grid, grid, -1), wave[:, None].expand(grid, grid, -1)    # each [g, g, D/2]
    patches = torch.cat([x, y], 2).flatten(0, 1)                        # [g, g, D] -> [N, D]
    return torch.cat([torch.zeros(1, width), patches])[None]          # [1, N+1, D]; CLS stands nowhere: 0


class VisionTransformer(nn.Module):
    """ViT with a CLS token. The defaults are timm's vit_tiny_patch16_224: same names, shapes and logits."""

    def __init__(self, image_size: int = 224, patch_size: int = 16, num_classes: int = 1000, depth: int = 12,
                 width: int = 192, heads: int = 3, drop_path: float = 0.0):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(sincos_positions(image_size // patch_size, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))       # as one linear layer

    def forward_taps(self, x: torch.Tensor, taps=(), classify=True) -> tuple[torch.Tensor | None, dict]:
        """Images [B, 3, S, S] -> logits [B, K] and {block: (q, k, v)} of the blocks in `taps`.
        Without `classify` it ends at the last tapped block's q, k, v, and the logits are None."""
        tapped = {}
        x = self.patch_embed(x)                                         # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed       # [B, N+1, D]
        for i, block in enumerate(self.blocks):
            qkv = block.qkv(x)
            if i in taps:
                tapped[i] = qkv
            if not classify and i == max(taps):
                return None, tapped
            x = block(x, qkv)
        return self.head(self.norm(x)[:, 0]), tapped                    # [B, N+1, D] -> CLS [B, D] -> [B, K]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> logits [B, K]."""
        return self.forward_taps(x)[0]


def build_student(cfg: Config, num_classes: int) -> VisionTransformer:
    shape = STUDENTS[cfg.student] | dict(heads=cfg.heads, drop_path=cfg.drop_path)
    return VisionTransformer(cfg.image_size, cfg.patch_size, num_classes, **shape)


# %% 4. Teacher: a ResNet from torchvision's blocks, with torchvision's parameter names
class ResNetTeacher(nn.Module):
    """ResNet that also returns the feature map of each stage (layer1, layer2, ...).

    Up to 64 pixels the stem is a 3x3 convolution without max-pool; above it is torchvision's, and resnet18/34
    load its weights strictly. Shortcuts that change shape are 1x1 convolutions, as in torchvision.
    """

    def __init__(self, name: str, num_classes: int, image_size: int):
        super().__init__()
        counts, width = TEACHERS[name]
        small = image_size <= 64
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages, channels = len(counts), width
        for i, count in enumerate(counts):
            out, layer = width * 2 ** i, []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None if channels == out else nn.Sequential(
                    nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                layer.append(BasicBlock(channels, out, stride, shortcut))
                channels = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor, stop: int | None = None) -> tuple[torch.Tensor | None, list]:
        """Images [B, 3, S, S] -> logits [B, K] and each stage's map [B, C, h, w], h x w its own size.
        With `stop`, only so many stages run, and the logits are None."""
        x, maps = self.maxpool(F.relu(self.bn1(self.conv1(x)))), []
        for i in range(stop or self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return (None if stop else self.fc(x.mean((2, 3)))), maps


def freeze(teacher: ResNetTeacher) -> ResNetTeacher:
    """No gradients, evaluation mode for good: BatchNorm uses, and keeps, its running statistics."""
    return teacher.eval().requires_grad_(False)


# %% 5. Stage 1, ALI: attention locality imitation
def teacher_attention(features: torch.Tensor, grid: int, heads: int, tau: float = 0.2,
                      shared: bool = False) -> torch.Tensor:
    """The teacher's attention surrogate: feature map [B, C, h, w] -> [B, H, N, N], rows sum to 1. (Our own.)

    Which patches look alike to the CNN? Bring the map to the patch grid, give each head a group of channels,
    remove what all positions share, and compare every two of them: softmax over keys of cosine / tau. A map
    coarser than the grid is enlarged bilinearly, which makes neighbours alike by construction.
    """
    mode = "area" if features.shape[-1] > grid else "bilinear"          # "area" is average pooling
    features, maps = F.interpolate(features.float(), grid, mode=mode), []       # [B, C, g, g]
    with torch.autocast(features.device.type, enabled=False):               # small tau magnifies rounding
        for group in features.flatten(2).tensor_split(1 if shared else heads, dim=1):
            group = F.normalize(group - group.mean(2, keepdim=True), dim=1)     # [B, ~C/H, N], unit vectors
            maps.append((group.transpose(1, 2) @ group / tau).softmax(-1))  # [B, N, N]
    return torch.stack(maps, 1).expand(-1, heads, -1, -1)                   # [B, H, N, N]


def relation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log softmax(a bᵀ / sqrt(d)) over keys (MiniLMv2's relation): twice [B, H, N, d] -> [B, H, N, N]."""
    return ((a * a.shape[-1] ** -0.5) @ b.transpose(-2, -1)).float().log_softmax(-1)


def ali_loss(qkv: tuple, target: torch.Tensor, relations: str = "qk+vv") -> torch.Tensor:
    """ALI for one (student block, teacher stage) pair: KL(teacher || student), one term per relation, added.

    qkv: the block's q, k, v, each [B, H, N+1, d]; target: the teacher's maps [B, H, N, N]. The KL is summed
    over keys and averaged over images, heads and queries (paper); 0 is perfect imitation. Scalar.
    In the paper q-k imitates the teacher's q-k, v-v its v-v; a ResNet has one surrogate, which both imitate.
    """
    q, k, v = (t[:, :, 1:] for t in qkv)                                # patches only: a ResNet has no CLS
    sides = {"qk": (q, k), "vv": (v, v)}
    entropy = -torch.xlogy(target, target).sum(-1).mean()               # KL is cross-entropy minus this
    return sum(-(target * relation(*sides[name])).sum(-1).mean() - entropy for name in relations.split("+"))


# %% 6. Stage 2, LM: logit mimicking
def dkd_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, alpha: float = 1.0,
             beta: float = 4.0, temperature: float = 1.0) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao 2022): T² (alpha TCKD + beta NCKD), mean over the batch. Scalar.

    logits: [B, K] both; labels [B]. All in log space, so that neither loss nor gradient overflows however
    sure the models are: log p_y is a log-softmax, log(1 - p_y) a logsumexp over the other classes.
    """
    def split(z):        # -> log b [B, 2] = (log p_y, log(1 - p_y)), log r [B, K-1] among the other classes
        z = (z if z.dtype == torch.float64 else z.float()) / temperature
        column = torch.arange(z.shape[1] - 1, device=z.device)
        other = z.gather(1, column + (column >= labels[:, None]))       # [B, K-1]: without the label's column
        both = torch.stack([z.gather(1, labels[:, None])[:, 0], other.logsumexp(1)], 1)
        return both.log_softmax(1), other.log_softmax(1)

    (log_b, log_r), (log_b_teacher, log_r_teacher) = split(logits), split(teacher_logits)
    tckd = F.kl_div(log_b, log_b_teacher, reduction="batchmean", log_target=True)
    nckd = F.kl_div(log_r, log_r_teacher, reduction="batchmean", log_target=True)
    return temperature ** 2 * (alpha * tckd + beta * nckd)


def lm_loss(logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, weight=1.0,
            label_smoothing: float = 0.1, **dkd) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage 2: cross-entropy + weight * DKD (`dkd`: its settings). Returns that total and its two terms.
    Without a teacher's logits DKD is 0: learning from labels alone."""
    ce = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    if teacher_logits is None:
        return ce, ce, torch.zeros_like(ce)
    mimic = dkd_loss(logits, teacher_logits, labels, **dkd)
    return ce + weight * mimic, ce, mimic


# %% 7. Curriculum: which loss in which epoch
class Stage(NamedTuple):
    name: str
    ali: bool        # imitate the teacher's attention surrogate
    labels: bool     # learn the labels
    logits: bool     # learn the teacher's logits (with the labels, always)


class Method(NamedTuple):
    before: Stage    # in epochs 0 ... ali_epochs - 1
    after: Stage     # from epoch ali_epochs on


ALI = Stage("ALI", ali=True, labels=False, logits=False)
LM = Stage("LM", ali=False, labels=True, logits=True)
JOINT = Stage("ALI+LM", ali=True, labels=True, logits=True)
LABELS = Stage("labels", ali=False, labels=True, logits=False)
METHODS = {
    "scratch": Method(LABELS, LABELS),
    "kd": Method(LM, LM),
    "joint": Method(JOINT, JOINT),
    "cikd": Method(ALI, LM),
}


def curriculum(method: str, epoch: int, ali_epochs: int) -> Stage:
    """The switch: what is learned in this epoch, counted from 0. Each stage begins with a fresh optimizer."""
    return METHODS[method].before if epoch < ali_epochs else METHODS[method].after


def student_loss(stage: Stage, cfg: Config, student: VisionTransformer, teacher: ResNetTeacher | None,
                 view: torch.Tensor, labels: torch.Tensor, ramp) -> tuple[torch.Tensor, torch.Tensor]:
    """One step's loss and, for the log, its terms [3]: ALI, CE, DKD. Teacher and student see the same crop.

    view: that crop, float [B, 3, S, S] in [-1, 1]; labels [B], not looked at in ALI; ramp: the weight of DKD.
    """
    pairs, teacher_logits = parse_pairs(cfg), None
    ali = lm = ce = dkd = view.new_zeros(())             # what a stage does not learn stays 0
    if stage.ali or stage.logits:
        with torch.no_grad():                            # ALI needs no stage above the last one it imitates
            teacher_logits, features = teacher(view, None if stage.logits else 1 + max(s for _, s in pairs))
    seen = color_jitter(view, cfg.jitter) if stage.ali and not stage.labels else view       # ALI alone
    logits, qkv = student.forward_taps(seen, [b for b, _ in pairs] if stage.ali else (), stage.labels)

    if stage.ali:
        grid = cfg.image_size // cfg.patch_size
        for block, layer in pairs:
            maps = teacher_attention(features[layer], grid, cfg.heads, cfg.tau, cfg.teacher_maps == "shared")
            ali = ali + ali_loss(qkv[block], maps, cfg.relations)
    if stage.labels:
        lm, ce, dkd = lm_loss(logits, teacher_logits, labels, ramp, cfg.label_smoothing, alpha=cfg.dkd_alpha,
                              beta=cfg.dkd_beta, temperature=cfg.dkd_temperature)
    loss = ali + lm                                      # stage 1: ali; stage 2: lm; both at once: joint
    return loss, torch.stack([ali, ce, dkd]).detach()


# %% 8. Training
def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{seconds:02} min"


def plain(text: str) -> str:
    """A user's text as a figure can show it: no byte that is not UTF-8, no formula between dollar signs."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def status(text: str, last: bool = True) -> None:
    """A line that replaces itself on a terminal; when piped, only the last one is printed."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


def save(path: Path, content) -> None:
    """Write rows (.csv), a dict of values (.json) or tensors (.pt), a Figure (.png) or bytes, as `path` ends.

    First into memory, then beside and onto the disk, then renamed: whatever bears its final name is whole,
    also after a power cut or on a full disk. Raises CIKDError that names the file.
    """
    memory = io.BytesIO(content if isinstance(content, bytes) else b"")
    if path.suffix == ".csv":
        text = io.TextIOWrapper(memory, "utf-8", "surrogateescape", newline="", write_through=True)
        writer = csv.DictWriter(text, list(content[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
        text.detach()
    elif path.suffix == ".json":
        memory.write(json.dumps(content, indent=1).encode())
    elif path.suffix == ".pt":
        torch.save(content, memory)
    elif path.suffix == ".png":
        content.savefig(memory, format="png")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")       # two runs may want the same teacher
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise CIKDError(f"{path}: cannot be written ({one_line(error)}); what was saved before is whole; "
                        "when it can be, run the same command again") from None


def load(path: str | Path) -> dict:
    """Tensors and plain values only: weights_only refuses a pickle that would run code. Raises CIKDError."""
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{part} in it is damaged")         # torch does not look at the checksums
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                       # torch raises whatever a broken file leads to
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if foreign else one_line(error)[:150]
        raise CIKDError(f"{path}: not a readable checkpoint ({reason}); remove or replace it") from None


def load_strictly(model: nn.Module, path: str | Path) -> None:
    """Load a state dict that must fit exactly. Raises CIKDError that names what does not."""
    state = load(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CIKDError(f"{path}: does not fit ({one_line(error)[:250]} ...); check the model's name, "
                        "--image-size, --patch-size and the number of classes") from None
    if not all_finite(state.values()):
        raise CIKDError(f"{path}: holds values that are not finite; train it again")


def file_hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def all_finite(tensors) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def seed_torch(*parts) -> None:
    """Seed torch from (seed, phase, epoch), so that no generator state has to be saved to resume exactly."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big"))


def autocast(device: torch.device):
    """bfloat16 on GPUs that compute in it (older ones only emulate it, slowly), else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16) if native else contextlib.nullcontext()


def choose_device(cfg: Config) -> torch.device:
    return torch.device(cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")


def compiles(cfg: Config, device: torch.device) -> bool:
    return cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"


def batches(data: Data, cfg: Config, device: torch.device):
    """One epoch of (views, float [B, 3, S, S]; labels [B]), the same on every device.

    Order and crops are drawn at once, on the CPU. A last partial batch is dropped unless it is the
    only one, so that all steps have one shape.
    """
    n = len(data.train_labels)
    size = min(cfg.batch_size, n)
    order = torch.randperm(n)[: n // size * size].to(data.train_images.device)
    crops = draw_crops(len(order), cfg.image_size, cfg.crop, cfg.crop_scale)
    parts = [None] * (len(order) // size) if crops is None else crops.to(device).split(size)
    for index, crop in zip(order.split(size), parts):
        yield to_float(data.train_images[index].to(device), crop), data.train_labels[index].to(device)


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device="cpu",
             batch_size: int = 500) -> float:
    """Top-1 accuracy, percent, of a student or teacher in evaluation mode on uint8 images [n, 3, S, S]."""
    training, correct, device = model.training, 0, torch.device(device)
    model.eval()
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        with autocast(device):
            out = model(to_float(x.to(device)))
        logits = out[0] if isinstance(out, tuple) else out          # a teacher also returns its maps
        correct = correct + (logits.argmax(1) == y.to(device)).sum()
    model.train(training)
    return 100 * int(correct) / len(labels)


def attention_distance(maps: torch.Tensor) -> torch.Tensor:
    """Mean attention distance in patches (Raghu 2021): maps [..., N, N] -> [...]. Uniform on 8 x 8: 4.14."""
    grid = math.isqrt(maps.shape[-1])
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).to(maps)      # [N, 2]
    return (maps * torch.cdist(place, place)).sum(-1).mean(-1)


def attention_kernels(maps: torch.Tensor) -> torch.Tensor:
    """Attention by offset from query to key (Cordonnier 2020): maps [..., N, N] -> [..., 2g-1, 2g-1].

    Summed over queries, divided by how many have a key at that offset; the centre is offset (0, 0).
    """
    grid = math.isqrt(maps.shape[-1])
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))            # [N, 2]
    offset = place - place[:, None] + grid - 1                                    # [N, N, 2], key minus query
    offset = (offset @ torch.tensor([2 * grid - 1, 1])).flatten().to(maps.device)   # [N * N], numbered
    total = maps.new_zeros(*maps.shape[:-2], (2 * grid - 1) ** 2).index_add(-1, offset, maps.flatten(-2))
    return (total / offset.bincount()).unflatten(-1, (2 * grid - 1, 2 * grid - 1))


def probe(images: torch.Tensor, n: int = 64) -> torch.Tensor:
    """n images, evenly spaced, on which locality is measured: [m, 3, S, S] -> [n, 3, S, S]."""
    return images[torch.linspace(0, len(images) - 1, min(n, len(images))).long()]


@torch.no_grad()
def student_maps(student: VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """What patches attend to among patches: float images [B, 3, S, S] -> for each block [B, H, N, N]."""
    _, tapped = student.forward_taps(images, range(len(student.blocks)), classify=False)
    return [relation(q[:, :, 1:], k[:, :, 1:]).exp() for q, k, _ in tapped.values()]


def learning_rate(progress: float, peak: float, floor: float, warmup: float) -> float:
    """Linear rise in the first `warmup` of a stage, then half a cosine to floor; progress in (0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (progress - warmup) / max(1e-9, 1 - warmup))) / 2


def adamw(student: VisionTransformer, cfg: Config, stage: Stage) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); no decay on biases, norms, CLS and positions; in LM, lower layers may be slower."""
    groups, top = {}, len(student.blocks) + 1        # layers: 0 embeddings, then blocks, then norm and head
    slower = cfg.layer_decay if stage == LM else 1.0
    for name, p in student.named_parameters():
        part = name.split(".")
        layer = int(part[1]) + 1 if part[0] == "blocks" else top if part[0] in ("norm", "head") else 0
        decay = 0.0 if p.ndim == 1 or part[0] in ("cls_token", "pos_embed") else cfg.weight_decay
        groups.setdefault((cfg.lr * slower ** (top - layer), decay), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=decay, peak=peak)
                              for (peak, decay), params in groups.items()],
                             lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def fit(phase: str, model: nn.Module, data: Data, cfg: Config, folder: Path, device: torch.device, *,
        seed: int, plan: list[Stage], optimizer_of, loss_of, measure) -> None:
    """The training loop of teacher and student; keeps metrics.csv and last.pt in `folder`, goes on from it.

    plan: the stage of each epoch; where it changes, optimizer_of(stage) and its schedule start afresh.
    loss_of(stage, views, labels, epoch of the stage) -> loss, terms [3]; measure(epoch) -> more of the row.
    Raises CIKDError on a loss that is not finite, before anything of that epoch is saved.
    """
    rows, optimizer, began, epochs = [], None, time.monotonic(), len(plan)
    if (folder / "last.pt").exists():
        checkpoint = load(folder / "last.pt")
        try:
            rows = checkpoint["rows"]
            if [row["stage"] for row in rows] != [stage.name for stage in plan[:len(rows)]] or not rows:
                raise ValueError("it has other epochs")
            model.load_state_dict(checkpoint["model"])
            optimizer = optimizer_of(plan[len(rows) - 1])
            names = [set(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(checkpoint["optimizer"])
            kept = [(p, t) for p, state in optimizer.state.items() for t in state.values()]
            if names != [set(group) for group in optimizer.param_groups] or any(
                    t.ndim and t.shape != p.shape for p, t in kept):
                raise ValueError("it has another optimizer")
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise CIKDError(f"{folder / 'last.pt'}: is no checkpoint of this run ({one_line(error)[:150]}); "
                            "remove it, or start again with --overwrite") from None
        print(f"{phase}: going on after epoch {len(rows)} of {epochs}", flush=True)
    first = len(rows)
    for epoch in range(first, epochs):
        stage = plan[epoch]
        length, stage_epoch = plan.count(stage), epoch - plan.index(stage)
        if stage_epoch == 0:
            optimizer = optimizer_of(stage)
        seed_torch(seed, phase, epoch)
        model.train()
        log, start, shown = [], time.monotonic(), 0.0
        steps = max(1, len(data.train_labels) // cfg.batch_size)
        for step, (views, labels) in enumerate(batches(data, cfg, device)):
            progress = (stage_epoch + (step + 1) / steps) / length
            for group in optimizer.param_groups:
                floor = min(cfg.min_lr, group["peak"])
                group["lr"] = learning_rate(progress, group["peak"], floor, cfg.warmup)
            with autocast(device):
                loss, terms = loss_of(stage, views, labels, stage_epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.append(torch.cat([loss.detach().view(1), terms]))   # stays on the device until the epoch ends
            now = time.monotonic()
            if step == 0 and (epoch == first or stage_epoch == 0) and compiles(cfg, device):
                status(f"{stage.name}: compiled, {now - start:.0f} s with the first step")
            if now > shown + 1:
                shown = now
                status(f"{stage.name:7} {epoch + 1:3}/{epochs}  step {step + 1}/{steps}", last=False)
            whole = (now - start) / 3 * steps * (epochs - first)
            if device.type == "cpu" and epoch == first and step == 2 and whole > 600:
                status(f"{phase}: {epochs - first} epochs will take about {duration(whole)} on this CPU"
                       + (f", then come {cfg.epochs} of the student" if phase == "teacher" else "")
                       + "; shorter with --epochs, --teacher-epochs, --train-size or --student vit_micro")
        log = torch.stack(log).cpu().double()        # [steps, 4]; the epoch's only wait for the device
        seconds = time.monotonic() - start
        bad = (~log.isfinite().all(1)).nonzero().flatten().tolist()
        if bad or not all_finite(model.state_dict().values()):
            what = "end: a weight is not finite" if not bad else \
                f"step {bad[0] + 1}: the loss is {log[bad[0], 0]:g}"
            raise CIKDError(f"{stage.name}, epoch {epoch + 1}, {what}; {folder} keeps the epoch before; a "
                            "smaller learning rate usually helps")
        loss, ali, ce, dkd = log.mean(0).tolist()
        row = dict(stage=stage.name, epoch=epoch + 1, loss=loss, ali=ali, ce=ce, dkd=dkd,
                   lr=max(group["lr"] for group in optimizer.param_groups), **measure(epoch), seconds=seconds,
                   images_per_second=len(log) * len(views) / seconds)
        rows.append(row)
        if stage_epoch == length - 1 and epoch < epochs - 1:        # the switch comes next
            save(folder / f"student_{stage.name.lower()}.pt", model.state_dict())
        save(folder / "metrics.csv", rows)
        save(folder / "last.pt", dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rows=rows))
        left = (time.monotonic() - began) / (epoch + 1 - first) * (epochs - epoch - 1)
        status(f"{stage.name:7} {epoch + 1:3}/{epochs}"
               + "".join(f"  {name} {row[name]:.3f}" for name in ("ali", "ce", "dkd") if row[name])
               + f"  lr {row['lr']:.1e}  accuracy {row['accuracy']:.1f} %"
               + (f"  distance {row['attention_distance']:.2f}" if "attention_distance" in row else "")
               + f"  {row['images_per_second']:.0f} images/s  ETA {duration(left)}")


def get_teacher(cfg: Config, data: Data, device: torch.device) -> tuple[ResNetTeacher, Path]:
    """The frozen teacher and the file of its weights: the user's own, one trained before, or trained now."""
    seed_torch(cfg.data_seed, "teacher")
    teacher = ResNetTeacher(cfg.teacher, len(data.classes), cfg.image_size)
    if device.type != "mps":                         # where BatchNorm's gradients are wrong in this layout
        teacher.to(memory_format=torch.channels_last)            # the faster one for convolutions
    path = Path(cfg.teacher_checkpoint or "")
    if not cfg.teacher_checkpoint:                   # its folder is named by all that its training depends on
        facts = {name: getattr(cfg, name) for name in (
            "dataset", "image_size", "teacher", "teacher_epochs", "teacher_lr", "pretrained_teacher",
            "batch_size", "crop", "crop_scale", "label_smoothing", "warmup", "min_lr", "data_seed")}
        facts |= dict(data=data.fingerprint, classes=data.classes)
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        path = Path(cfg.output_dir) / "teachers" / f"{cfg.dataset}-{cfg.teacher}-{key}" / "teacher.pt"
        if not path.exists():
            save(path.with_name("settings.json"), facts)
            train_teacher(teacher.to(device), cfg, data, device, path)
        path.with_name("last.pt").unlink(missing_ok=True)
    load_strictly(teacher, path)
    teacher = freeze(teacher).to(device)
    accuracy = evaluate(teacher, data.test_images, data.test_labels, device, 2 * cfg.batch_size)
    print(f"teacher: {cfg.teacher}, accuracy {accuracy:.1f} %, {path}", flush=True)
    return teacher, path


def train_teacher(teacher: ResNetTeacher, cfg: Config, data: Data, device: torch.device, path: Path) -> None:
    """Train a teacher on the labels and save it to `path`. Raises CIKDError."""
    print(f"teacher: training {cfg.teacher} for {cfg.teacher_epochs} epochs in {path.parent}", flush=True)
    if cfg.pretrained_teacher:
        print("teacher: starts from ImageNet weights, so extra data is used", flush=True)
        load_imagenet(teacher, cfg.teacher)

    forward = torch.compile(teacher, dynamic=False) if compiles(cfg, device) else teacher

    def loss_of(stage, views, labels, stage_epoch):
        ce = F.cross_entropy(forward(views)[0].float(), labels, label_smoothing=cfg.label_smoothing)
        return ce, torch.stack([0 * ce, ce, 0 * ce]).detach()

    test = data.test_images, data.test_labels

    def sgd(stage):
        return torch.optim.SGD([dict(params=list(teacher.parameters()), peak=cfg.teacher_lr)],
                               lr=cfg.teacher_lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    fit("teacher", teacher, data, cfg, path.parent, device, seed=cfg.data_seed,
        plan=[Stage("teacher", ali=False, labels=True, logits=False)] * cfg.teacher_epochs, optimizer_of=sgd,
        loss_of=loss_of,
        measure=lambda epoch: dict(accuracy=evaluate(teacher, *test, device, 2 * cfg.batch_size)))
    if not path.exists():                            # else another run was faster, and all take that one
        save(path, teacher.state_dict())


def load_imagenet(teacher: ResNetTeacher, name: str) -> None:
    """torchvision's ImageNet weights into all but the classifier, whose classes differ. Raises CIKDError."""
    try:
        with network_timeout(), contextlib.redirect_stderr(sys.stdout):         # torch 2.6 announces it there
            weights = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except Exception as error:
        raise CIKDError(f"--pretrained-teacher: the weights of {name} could not be downloaded "
                        f"({one_line(error)}); leave it out, or give --teacher-checkpoint") from None
    teacher.load_state_dict(weights | {f"fc.{k}": v for k, v in teacher.fc.state_dict().items()})


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """settings.json of a run and the rows of metrics.csv (text; none before the first epoch). CIKDError."""
    try:
        facts, rows = json.loads((folder / "settings.json").read_text()), []
        facts["settings"], _ = asdict(Config(**facts["settings"])), facts["data"]       # both must be there
        if (folder / "metrics.csv").exists() or (folder / "student.pt").exists():
            rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
            numbers = [float(row[name]) for row in rows for name in row if name != "stage"]
            if not numbers or not {"stage", "accuracy", "attention_distance", "seconds"} <= set(rows[0]):
                raise ValueError("metrics.csv is empty or of something else")
            if (folder / "student.pt").exists() and str(len(rows)) != str(facts["settings"]["epochs"]):
                raise ValueError(f"metrics.csv holds {len(rows)} of {facts['settings']['epochs']} epochs")
        return facts, rows
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise CIKDError(f"{folder}: holds no whole run ({one_line(error)}); name another, or train it again "
                        "with --overwrite") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CIKDError(f"{folder}: settings.json or metrics.csv is of another version ({one_line(error)}); "
                        "use that version of cikd.py, or train again") from None


def train(cfg: Config, data: Data | None = None) -> dict:
    """Train one student by `cfg`, its teacher first if need be, and keep everything in the run's folder.

    Goes on where an unfinished run of the same name and settings stopped; leaves a finished one as it is.
    Returns dict(accuracy: percent, last epoch; epochs; minutes: of training; folder). Raises CIKDError.
    """
    cfg, began = resolve(cfg), time.monotonic()
    folder = Path(cfg.resume or Path(cfg.output_dir) / cfg.run_name)
    stored = None
    if cfg.resume or not cfg.overwrite and any((folder / f).exists() for f in ("last.pt", "student.pt")):
        stored = read_run(folder)[0]
        changed = [f"{name} {stored['settings'][name]} -> {getattr(cfg, name)}" for name in RESULT_FIELDS
                   if stored["settings"][name] != getattr(cfg, name)]
        if changed:
            raise CIKDError(f"{folder}: was begun with other settings: {', '.join(changed)}; use those, "
                            "another --run-name, or --overwrite to start again")
    data = data or load_dataset(cfg)
    if stored and stored["data"] != data.fingerprint:
        raise CIKDError(f"{folder}: was begun with other images; check --data-dir, or give a --run-name")
    if cfg.teacher_checkpoint:                       # refused before anything is written or removed
        load_strictly(ResNetTeacher(cfg.teacher, len(data.classes), cfg.image_size), cfg.teacher_checkpoint)
        teacher_hash(cfg.teacher_checkpoint, folder, stored or {})
    if cfg.overwrite or not (folder / "student.pt").exists():
        try:
            train_student(cfg, data, folder, stored or {})
        except KeyboardInterrupt:
            resume = f"python cikd.py --resume {shlex.quote(str(folder))}"
            print(f"\nstopped; to go on: {'the same command' if cfg.overwrite else resume}", flush=True)
            raise
    load_strictly(build_student(cfg, len(data.classes)), folder / "student.pt")     # a finished run is whole
    rows = read_run(folder)[1]
    (folder / "last.pt").unlink(missing_ok=True)
    result = dict(accuracy=float(rows[-1]["accuracy"]), epochs=len(rows),
                  minutes=sum(float(row["seconds"]) for row in rows) / 60, folder=str(folder))
    print(f"{cfg.method} on {data_name(cfg)}, seed {cfg.seed}: accuracy {result['accuracy']:.1f} % after "
          f"{len(rows)} epochs ({duration(time.monotonic() - began)}); see {folder}", flush=True)
    return result


def teacher_hash(path: str | Path, folder: Path, stored: dict) -> str:
    """The hash of a teacher's file. Raises CIKDError if the run in `folder` was begun with another one."""
    found = file_hash(path)
    if stored.get("teacher", found) != found:
        raise CIKDError(f"{path}: is not the teacher that {folder} was begun with; bring that back, or "
                        "start again with --overwrite")
    return found


def train_student(cfg: Config, data: Data, folder: Path, stored: dict) -> None:
    """The body of `train`: student, teacher, curriculum; leaves student.pt in `folder`. stored: settings.json
    of the run to go on with, or empty."""
    device = choose_device(cfg)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")   # TF32
        torch.cuda.empty_cache()                     # what an earlier run of --compare left is free again
    seed_torch(cfg.seed, "student")
    student = build_student(cfg, len(data.classes)).to(device)
    facts = dict(settings=asdict(replace(cfg, resume=None, overwrite=False)), classes=data.classes,
                 data=data.fingerprint, extra_data=cfg.pretrained_teacher, torch=torch.__version__,
                 device=torch.cuda.get_device_name() if device.type == "cuda" else device.type)
    facts |= {name: stored[name] for name in ("torch", "device") if name in stored}     # where it was begun

    def begin():
        names = ["*.pt.*.tmp", "*.csv.*.tmp", "*.json.*.tmp", "kernels/*.pt.*.tmp"]     # left by a kill
        if cfg.overwrite:
            names = ["last.pt", "student.pt", "student_*.pt", "metrics.csv", "kernels/*.pt", *names]
        for name in names:
            for path in folder.glob(name):
                if path.is_file():
                    path.unlink()
        cfg.overwrite = False                        # from here on the folder is this run's
        if not (folder / "last.pt").exists():        # nothing is trained yet
            save(folder / "settings.json", facts)
            save(folder / "student_init.pt", student.state_dict())

    late = cfg.overwrite                             # an old run is removed once data and teacher are there
    if not late:
        begin()
    print(f"{folder}: {len(data.train_labels)} training and {len(data.test_labels)} test images, "
          f"{len(data.classes)} classes, {sum(p.numel() for p in student.parameters()):,} parameters, on "
          f"{facts['device']}\n  " + " ".join(f"{k}={getattr(cfg, k)}" for k in RESULT_FIELDS), flush=True)
    tensors = {name: value for name, value in data._asdict().items() if isinstance(value, torch.Tensor)}
    if device.type != "cuda" or sum(t.nbytes for t in tensors.values()) < torch.cuda.mem_get_info()[0] / 2:
        data = data._replace(**{name: t.to(device) for name, t in tensors.items()})     # else: host memory
    teacher = None
    if cfg.method != "scratch":
        teacher, path = get_teacher(cfg, data, device)
        facts |= dict(teacher_file=str(path), teacher=teacher_hash(path, folder, stored))
    if late:
        begin()
    elif teacher:
        save(folder / "settings.json", facts)
    loss_fn = torch.compile(student_loss, dynamic=False) if compiles(cfg, device) else student_loss

    def loss_of(stage, views, labels, stage_epoch):
        ramp = min(1.0, stage_epoch / cfg.ramp_epochs) if cfg.ramp_epochs else 1.0
        ramp = torch.full((), ramp, device=device)   # a tensor: torch.compile need not compile for each value
        return loss_fn(stage, cfg, student, teacher, views, labels, ramp)

    def measure(epoch):
        student.eval()
        parts = [student_maps(student, to_float(x.to(device))) for x in probe(data.test_images).split(16)]
        if cfg.snapshot_every and (epoch + 1) % cfg.snapshot_every == 0:
            kernels = [attention_kernels(torch.cat(maps)).mean(0) for maps in zip(*parts)]
            kernels = dict(kernels=torch.stack(kernels).cpu().half())       # [blocks, H, 2g-1, 2g-1]
            save(folder / "kernels" / f"epoch_{epoch + 1:04}.pt", kernels)
        distance = torch.stack([attention_distance(maps).mean() for part in parts for maps in part]).mean()
        accuracy = evaluate(student, data.test_images, data.test_labels, device, 2 * cfg.batch_size)
        return dict(accuracy=accuracy, attention_distance=float(distance))

    if cfg.snapshot_every and not (folder / "last.pt").exists():
        measure(-1)
    fit("student", student, data, cfg, folder, device, seed=cfg.seed, loss_of=loss_of, measure=measure,
        plan=[curriculum(cfg.method, epoch, cfg.ali_epochs) for epoch in range(cfg.epochs)],
        optimizer_of=lambda stage: adamw(student, cfg, stage))
    save(folder / "student.pt", student.state_dict())


# %% 9. Command line
def train_many(cfg: Config) -> list[dict]:
    """--compare, --seeds: each method with each seed, in one table. What is finished is not run again."""
    results, taught, data = [], {}, load_dataset(resolve(cfg))      # taught: teacher's hash -> a run of its
    methods = list(METHODS) if cfg.compare else [cfg.method]
    for seed in cfg.seeds or [cfg.seed]:
        for method in methods:
            one = replace(cfg, method=method, seed=seed, seeds=None, compare=False)
            try:
                results.append(dict(method=method, seed=seed) | train(one, data))
            except KeyboardInterrupt:
                if not cfg.overwrite:
                    print("or the same command, which then goes on to the table", flush=True)
                raise
            folder = results[-1]["folder"]
            if method != "scratch":
                taught.setdefault(read_run(Path(folder))[0].get("teacher"), folder)
            if len(taught) > 1:
                raise CIKDError(f"{' and '.join(taught.values())}: learned from different teachers, which "
                                "one table must not mix; start again with --overwrite")
    name = default_name(replace(cfg, method="comparison" if cfg.compare else f"{cfg.method}-seeds", seed=0))
    folder = Path(cfg.output_dir) / name.removesuffix("-seed0")
    save(folder / "comparison.csv", results)
    title = f"{plain(data_name(cfg))}, {results[0]['epochs']} epochs: a dot for each seed, bar: mean"
    plot_comparison(results, methods, folder / "comparison.png", title)
    print(f"\n{'method':8}  accuracy (%)  seeds  minutes")
    for method in methods:
        values = [r["accuracy"] for r in results if r["method"] == method]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        minutes = statistics.mean(r["minutes"] for r in results if r["method"] == method)
        print(f"{method:8}  {f'{statistics.mean(values):.1f}{spread}':12}  {len(values):5}  {minutes:7.1f}")
    print(f"see {folder / 'comparison.csv'} and {folder / 'comparison.png'}", flush=True)
    return results


def plot_comparison(results: list[dict], methods: list[str], path: Path, title: str) -> None:
    """A dot for each run, a bar at each method's mean."""
    from matplotlib.figure import Figure             # only needed here, and slow to import
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        values = [r["accuracy"] for r in results if r["method"] == method]
        axes.plot([i] * len(values), values, "o", color="tab:blue", alpha=0.7)
        axes.hlines(statistics.mean(values), i - 0.25, i + 0.25, color="black")
        axes.annotate(f"{statistics.mean(values):.1f}", (i + 0.28, statistics.mean(values)), va="center")
    axes.set(xticks=range(len(methods)), xticklabels=methods, xlim=(-0.5, len(methods) - 0.2),
             ylabel="accuracy after the last epoch (%)", title=title)
    axes.grid(axis="y", alpha=0.3)
    save(path, figure)


class Parser(argparse.ArgumentParser):
    def error(self, message):                        # one line, not a page of usage
        raise CIKDError(f"{message} (python {self.prog} --help lists all that can be given)")


def make_parser() -> Parser:
    """The command line, generated from Config. It yields only what was given."""
    table = [["", *DataRow._fields[:8]], *([name, *row[:8]] for name, row in DATASETS.items())]
    lines = "\n".join("".join(f"{cell!s:>15}" for cell in row) for row in table)
    parser = Parser(prog="cikd.py", usage="python cikd.py [--SETTING VALUE ...]", allow_abbrev=False,
                    description=__doc__.split("\n")[0], epilog=f"defaults of each data set:\n{lines}",
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind, many = kind_of(f), f.type.startswith("tuple")
        how = dict(action="store_true") if kind == "bool" else dict(
            type=dict(int=int, float=float, str=str)[kind], nargs="+" if many else None,
            metavar="|".join(f.metadata["choices"]) or kind.upper())
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + default, **how)
    return parser


def run_command(prog: str, body) -> int:
    """Run body(); an error the user can mend becomes one line. Returns the exit code: 0, 2, 130: Ctrl-C."""
    sys.stdout = sys.stdout or open(os.devnull, "w")     # closed by whoever started us
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):           # a terminal that cannot print ± must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        body()
    except KeyboardInterrupt:
        return 130
    except (CIKDError, OSError, MemoryError, RuntimeError) as error:
        message = one_line(error)
        if isinstance(error, MemoryError) or "out of memory" in message or "allocate memory" in message:
            message = "out of memory; use a smaller --batch-size, --image-size or --train-size"
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException) or "torch.compile is not" in message:
            message = f"--compile: torch.compile failed ({message[:150]} ...); use --compile off"
        elif isinstance(error, RuntimeError):
            raise                                    # ours to mend: keep the traceback
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)    # an unfinished progress line
        print(f"{prog}: error: {message}", file=sys.stderr)
        return 2
    return 0


def run(argv: list[str] | None) -> None:
    """What the command line asks for: one run, or several compared. Raises CIKDError."""
    given = vars(make_parser().parse_args(argv))
    for one, other in (("compare", "method"), ("seeds", "seed")):
        if one in given and other in given:
            raise CIKDError(f"--{one}: contradicts --{other}; give one of them")
    if "resume" in given:
        folder = Path(given["resume"])               # may have been moved, or be named from elsewhere
        stored = read_run(folder)[0]["settings"]
        given = stored | dict(output_dir=os.path.dirname(os.path.abspath(folder)), overwrite=False) | given
    cfg = Config(**given)
    if cfg.compare or cfg.seeds:
        train_many(cfg)
    else:
        train(cfg)


def main(argv: list[str] | None = None) -> int:
    return run_command("cikd", lambda: run(argv))


if __name__ == "__main__":
    if hasattr(sys, "ps1"):                          # cells run one by one; sys.argv is the session's
        print('try: train(Config(dataset="shapes")), or main(["--dataset", "shapes"])')
    else:
        sys.exit(main())

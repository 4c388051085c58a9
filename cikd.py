"""CIKD, Curriculum Information Knowledge Distillation, in one file.

A light Vision Transformer (ViT) trained on few images is slow to learn what a CNN has built in: to
look at neighbouring pixels first. CIKD lets a trained CNN teach it, the easy lesson first:
  1. ALI, Attention Locality Imitation: the student's self-attention imitates attention maps made
     from the teacher's low-level feature maps. No labels.
  2. LM, Logit Mimicking: the student learns the labels and the teacher's logits.

    python cikd.py                             # generated shapes, no download: minutes on two cores
    python cikd.py --dataset cifar10           # ViT-Tiny taught by ResNet-18: wants a GPU
    python cikd.py --compare --seeds 0 1 2     # scratch, kd, joint and cikd side by side
    torchrun --nproc-per-node 4 cikd.py --dataset cifar10       # one student on four GPUs
    python cikd.py --help                      # every setting, its default and where it comes from

Paper: "Patient teacher can impart locality to improve lightweight vision transformer on small
dataset", Pattern Recognition, 2025. Its public code distils a ViT-B. Our teacher is a ResNet, which
has no queries and keys: its attention map is a *surrogate* (section 3).

Sections 1 to 5 are the method and stand alone: they use nothing below but settings, by name.
Sections 6 to 9 run it: settings, data, training, command line. Symbols in the shape comments:
  B batch, S image side, N patches (a g x g grid), D width, H heads, d = D/H, C channels, K classes
"""
from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import statistics
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

# %% 1. Student: ViT-Tiny, with timm's parameter names ---------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention in two halves, because ALI wants what lies between: q, k and v."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, N+1, D] -> q, k, v, each [B, H, N+1, d]."""
        B, tokens, D = x.shape
        qkv = self.qkv(x).view(B, tokens, 3, self.heads, D // self.heads)   # [B, N+1, 3, H, d]
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)                         # 3 times [B, H, N+1, d]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(q kᵀ / sqrt(d)) v, heads joined and mixed -> [B, N+1, D]. It stores no map."""
        x = F.scaled_dot_product_attention(q, k, v)             # [B, H, N+1, d]
        return self.proj(x.transpose(1, 2).flatten(2))          # [B, N+1, H, d] -> [B, N+1, D]

class Block(nn.Module):
    """Pre-norm transformer block, x [B, N+1, D]. Its caller makes qkv, so that ALI can see it."""
    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: torch.Tensor, qkv: tuple) -> torch.Tensor:
        x = x + self.drop_path(self.attn(*qkv))
        return x + self.drop_path(self.mlp(self.norm2(x)))

def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """2-D sine-cosine positions (MAE): a quarter of D for each of sin x, cos x, sin y, cos y."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency                         # [g, D/4]
    wave = torch.cat([angle.sin(), angle.cos()], 1)                         # [g, D/2]
    x, y = wave.expand(grid, grid, -1), wave[:, None].expand(grid, grid, -1)    # each [g, g, D/2]
    patches = torch.cat([x, y], 2).flatten(0, 1)                            # [g, g, D] -> [N, D]
    return torch.cat([torch.zeros(1, width), patches])[None]                # [1, N+1, D]; CLS: 0

STUDENTS = {"vit_tiny": dict(depth=12, width=192),      # the paper's; for heads see --heads
            "vit_micro": dict(depth=6, width=64)}       # ours, for a CPU

class VisionTransformer(nn.Module):
    """ViT with a CLS token. The defaults are timm's vit_tiny_patch16_224: same names and logits."""
    def __init__(self, image_size: int = 224, patch_size: int = 16, num_classes: int = 1000,
                 depth: int = 12, width: int = 192, heads: int = 3, drop_path: float = 0.0):
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(           # cuts into patches, projects each
            proj=nn.Conv2d(3, width, patch_size, patch_size)))
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
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))   # as if linear

    def forward_taps(self, x: torch.Tensor, taps=(), classify=True) -> tuple:
        """Images [B, 3, S, S] -> logits [B, K] and {block: (q, k, v)} of the blocks in `taps`.
        Without `classify` it ends at the last tapped block's q, k, v, and the logits are None."""
        tapped = {}
        x = self.patch_embed(x).flatten(2).transpose(1, 2)              # [B, D, g, g] -> [B, N, D]
        cls = self.cls_token.expand(x.shape[0], -1, -1)                     # [B, 1, D]
        x = torch.cat([cls, x], 1) + self.pos_embed                         # [B, N+1, D]
        for i, block in enumerate(self.blocks):
            qkv = block.attn.project(block.norm1(x))                        # each [B, H, N+1, d]
            if i in taps:
                tapped[i] = qkv
            if not classify and i == max(taps):
                return None, tapped
            x = block(x, qkv)                                               # [B, N+1, D]
        return self.head(self.norm(x)[:, 0]), tapped                        # CLS [B, D] -> [B, K]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> logits [B, K]."""
        return self.forward_taps(x)[0]

# %% 2. Teacher: a ResNet from torchvision's blocks, with torchvision's parameter names ------------
TEACHERS = {    # blocks of each layer, channels of layer1; each later layer has twice as many
    "resnet20": ((3, 3, 3), 16), "resnet56": ((9, 9, 9), 16),               # He 2016, section 4.2
    "resnet18": ((2, 2, 2, 2), 64), "resnet34": ((3, 4, 6, 3), 64),         # He 2016, table 1
}

class ResNetTeacher(nn.Module):
    """ResNet that also hands out the feature maps of its layers (layer1, layer2, ...). Up to 64
    pixels the stem is a 3x3 convolution without max-pool; above it is torchvision's, whose weights
    resnet18/34 load strictly. Shortcuts that change shape are 1x1 convolutions."""
    def __init__(self, name: str, num_classes: int, image_size: int):
        super().__init__()
        counts, width = TEACHERS[name]
        small = image_size <= 64
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.depth, channels = len(counts), width
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

    def forward_taps(self, x: torch.Tensor, taps=(), classify=True) -> tuple:
        """Images [B, 3, S, S] -> logits [B, K] and {layer: map [B, C, h, w]} of the layers, from 1,
        in `taps`. Without `classify` it ends at the last tapped layer, and the logits are None."""
        tapped, x = {}, self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(1, self.depth + 1 if classify else max(taps) + 1):
            x = self.get_submodule(f"layer{i}")(x)                          # [B, C, h, w]
            if i in taps:
                tapped[i] = x
        return (self.fc(x.mean((2, 3))) if classify else None), tapped      # [B, C] -> [B, K]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_taps(x)[0]

# %% 3. Stage 1, ALI: attention locality imitation -------------------------------------------------
def teacher_attention(features: torch.Tensor, grid: int, heads: int, tau=0.2) -> torch.Tensor:
    """The teacher's attention surrogate (ours): [B, C, h, w] -> [B, H, N, N], rows sum to 1. Which
    patches look alike to the CNN? Bring the map to the patch grid, give each head a group of
    channels, remove what all places share, and compare every two of them: softmax over keys of
    cosine / tau. A map coarser than the grid is enlarged, which makes neighbours alike."""
    mode = "area" if features.shape[-1] > grid else "bilinear"      # "area" is average pooling
    features, maps = F.interpolate(features.float(), grid, mode=mode), []   # [B, C, g, g]
    with torch.autocast(features.device.type, enabled=False):       # small tau magnifies rounding
        for group in features.flatten(2).tensor_split(heads, dim=1):            # [B, ~C/H, N]
            group = F.normalize(group - group.mean(2, keepdim=True), dim=1)     # unit vectors
            maps.append((group.transpose(1, 2) @ group / tau).softmax(-1))      # [B, N, N]
    return torch.stack(maps, 1)                                     # [B, H, N, N]

def relation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log softmax(a bᵀ / sqrt(d)) over keys (MiniLMv2): twice [B, H, N, d] -> [B, H, N, N]."""
    return ((a * a.shape[-1] ** -0.5) @ b.transpose(-2, -1)).float().log_softmax(-1)

def ali_loss(qkv: tuple, target: torch.Tensor, relations: str = "qk+vv") -> torch.Tensor:
    """ALI of a student block, q, k, v each [B, H, N+1, d], and a teacher layer's maps [B, H, N, N]:
    KL(teacher || student), summed over keys and relations, averaged over images, heads and queries,
    as in the paper. There q-k imitates q-k, v-v imitates v-v; here both imitate one surrogate."""
    q, k, v = (t[:, :, 1:] for t in qkv)                            # patches only: no CLS in a CNN
    sides = {"qk": (q, k), "vv": (v, v)}
    entropy = -torch.xlogy(target, target).sum(-1).mean()           # KL is cross-entropy minus this
    return sum(-(target * relation(*sides[name])).sum(-1).mean() - entropy
               for name in relations.split("+"))

def color_jitter(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Brightness, contrast, saturation of images [B, 3, S, S] in [-1, 1], times 1 ± strength."""
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    images = (images + 1) / 2 * factors[0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, factors[1])
    return torch.lerp(images.mean(1, keepdim=True), images, factors[2]).clamp(0, 1) * 2 - 1

# %% 4. Stage 2, LM: logit mimicking ---------------------------------------------------------------
def dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=4.0, temperature=1.0) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao 2022) of logits [B, K], labels [B], batch mean:
    T² (alpha TCKD + beta NCKD). TCKD: the label against the rest; NCKD: the rest among themselves.
    In log space, so that no gradient overflows: log(1 - p_y) is a logsumexp of the rest."""
    def split(z):   # -> log b [B, 2] = (log p_y, log(1 - p_y)), log r [B, K-1] of the other classes
        z = (z if z.dtype == torch.float64 else z.float()) / temperature
        column = torch.arange(z.shape[1] - 1, device=z.device)
        other = z.gather(1, column + (column >= labels[:, None]))   # [B, K-1]: all but the label's
        both = torch.stack([z.gather(1, labels[:, None])[:, 0], other.logsumexp(1)], 1)    # [B, 2]
        return both.log_softmax(1), other.log_softmax(1)

    (log_b, log_r), (log_b_teacher, log_r_teacher) = split(logits), split(teacher_logits)
    tckd = F.kl_div(log_b, log_b_teacher, reduction="batchmean", log_target=True)
    nckd = F.kl_div(log_r, log_r_teacher, reduction="batchmean", log_target=True)
    return temperature ** 2 * (alpha * tckd + beta * nckd)

def lm_loss(logits, teacher_logits, labels, weight=1.0, **dkd) -> tuple[torch.Tensor, ...]:
    """Stage 2: CE + weight * DKD (`dkd`: its settings) -> total, CE, DKD. No teacher: DKD is 0."""
    ce = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)       # 0.1: paper
    if teacher_logits is None:
        return ce, ce, torch.zeros_like(ce)
    mimic = dkd_loss(logits, teacher_logits, labels, **dkd)
    return ce + weight * mimic, ce, mimic

# %% 5. Curriculum: which loss in which epoch ------------------------------------------------------
class Stage(NamedTuple):
    name: str
    ali: bool        # imitate the teacher's attention surrogate
    labels: bool     # learn the labels
    logits: bool     # learn the teacher's logits
    strong: bool     # from strong views, where --augment asks for them

ALI = Stage("ALI", ali=True, labels=False, logits=False, strong=False)
LM = Stage("LM", ali=False, labels=True, logits=True, strong=True)
JOINT = Stage("ALI+LM", ali=True, labels=True, logits=True, strong=True)
LABELS = Stage("labels", ali=False, labels=True, logits=False, strong=True)
TEACHER = LABELS._replace(name="teacher", strong=False)     # the ResNet itself
METHODS = {         # what is learned before epoch ali_epochs, and from it on
    "scratch": (LABELS, LABELS),
    "kd": (LM, LM),
    "joint": (JOINT, JOINT),
    "cikd": (ALI, LM),
    "teacher": (TEACHER, TEACHER),
}

def curriculum(method: str, epoch: int, ali_epochs: int) -> Stage:
    """The switch: what is learned in this epoch, from 0. Each stage has an optimizer of its own."""
    before, after = METHODS[method]
    return before if epoch < ali_epochs else after

def parse_pairs(pairs: str, student: str) -> list[tuple[int, int]]:
    """"0:1,last:2" -> [(0, 1), (5, 2)]: blocks of the student, from 0, and layers of the ResNet."""
    text = pairs.replace("last", str(STUDENTS[student]["depth"] - 1))
    return [(int(block), int(layer)) for block, layer in (p.split(":") for p in text.split(","))]

def step_loss(stage: Stage, cfg: Config, model, teacher, view, labels, stage_epoch) -> tuple:
    """One step's loss and, for the log, its terms [3]: ALI, CE, DKD. `model` is who learns; view:
    float [B, 3, S, S] in [-1, 1], the same crop for model and teacher; labels [B], not looked at in
    ALI; stage_epoch: epochs of this stage before this one, a tensor so that it compiles once."""
    teacher_logits, pairs = None, (parse_pairs(cfg.pairs, cfg.student) if stage.ali else [])
    ali = lm = ce = dkd = view.new_zeros(())            # what a stage does not learn stays 0
    if stage.ali or stage.logits:
        with torch.no_grad():
            teacher_logits, features = teacher.forward_taps(    # in ALI up to the last layer needed
                view, [layer for _, layer in pairs], classify=stage.logits)
    if stage.ali and not stage.labels:                  # stage 1: in other colours than the teacher
        view = color_jitter(view, cfg.jitter)
    logits, qkv = model.forward_taps(view, [block for block, _ in pairs], classify=stage.labels)
    if stage.ali:
        grid = cfg.image_size // cfg.patch_size
        for block, layer in pairs:
            target = teacher_attention(features[layer], grid, cfg.heads, cfg.tau)
            ali = ali + ali_loss(qkv[block], target, cfg.relations)
    if stage.labels:
        ramp = (stage_epoch / cfg.ramp_epochs).clamp(max=1) if cfg.ramp_epochs else 1.0
        lm, ce, dkd = lm_loss(logits, teacher_logits, labels, ramp, alpha=cfg.dkd_alpha,
                              beta=cfg.dkd_beta, temperature=cfg.dkd_temperature)
    loss = ali + lm                                     # stage 1: ali; stage 2: lm; joint: both
    return loss, torch.stack([ali, ce, dkd]).detach()

# %% 6. Settings -----------------------------------------------------------------------------------
class CIKDError(Exception):
    """Something the user can mend. `run_command` prints it as one line; exit code 2."""

def need(condition, message: str) -> None:
    if not condition:
        raise CIKDError(message)

def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

SMALL = dict(image_size=32, patch_size=4, student="vit_tiny", teacher_epochs=60, ali_epochs=100,
             epochs=300, batch_size=128, crop="pad")
PHOTO = SMALL | dict(image_size=224, patch_size=16, teacher_epochs=100, crop="resized")
DATASETS = {
    "shapes": dict(image_size=32, patch_size=4, student="vit_micro", teacher_epochs=3, ali_epochs=5,
                   epochs=9, batch_size=24, crop="none"),
    "cifar10": SMALL, "cifar100": SMALL, "fashion_mnist": SMALL,
    "stl10": PHOTO | dict(image_size=96, patch_size=8),
    "folder": PHOTO, "pets": PHOTO, "aircraft": PHOTO, "dtd": PHOTO, "imagenette": PHOTO,
}
STUDENT_DEFAULTS = {"vit_tiny": dict(heads=3, teacher="resnet18", lr=1e-3),
                    "vit_micro": dict(heads=4, teacher="resnet20", lr=2e-3)}

PATIENT = 200           # epochs of a student from which strong views help (measured)

def setting(default, help: str, low=None, high=math.inf, choices=()):
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

@dataclass
class Config:
    """Every setting. None: from the data set's row, or as the help says in brackets."""
    dataset: str = setting("shapes", "images to learn from", choices=DATASETS)
    method: str = setting("cikd", "scratch: labels only; kd: LM all along; joint: both all along; "
                          "teacher: the ResNet, by --teacher-epochs, --data-seed", choices=METHODS)
    compare: bool = setting(False, "run all but teacher; prints a table, keeps comparison.csv")
    seed: int = setting(0, "of the student, the order of images and the crops", 0, 1e9)
    seeds: tuple = setting(None, "repeat with each of these; mean and standard deviation", 0)
    data_dir: str = setting("data", "of any set; folder: DIR/{train,test|val|valid}/CLASS/*.png")
    train_size: int = setting(None, "use only so many training images, class-balanced", 2)
    holdout: int = setting(None, "test on so many training images, left out: to choose settings", 2)
    data_seed: int = setting(0, "of shapes, both subsets and the teacher: what runs share", 0, 1e9)
    image_size: int = setting(None, "side of the square images, pixels", 16, 1024)
    patch_size: int = setting(None, "side of a patch, pixels", 1)
    crop: str = setting(None, "pad: shifts by up to 1/8 (ours), resized: random area and aspect "
                        "(paper), both with flips", choices=("pad", "resized", "none"))
    augment: str = setting(None, "views for labels and logits; trivial: TrivialAugmentWide (paper) "
                           f"[from {PATIENT} epochs on trivial, else none]",
                           choices=("trivial", "none"))
    jitter: float = setting(0.4, "of brightness, contrast, saturation in ALI (paper)", 0, 1)
    student: str = setting(None, "12 blocks of width 192 (paper), or 6 of 64", choices=STUDENTS)
    heads: int = setting(None, "attention heads (ours; paper: 12, 6, 12) [3; vit_micro 4]", 1)
    drop_path: float = setting(0.1, "stochastic depth of the last block (paper: middle)", 0, 0.9)
    teacher: str = setting(None, "ResNet (ours) [resnet18; vit_micro resnet20]", choices=TEACHERS)
    teacher_epochs: int = setting(None, "epochs of the teacher's own training (ours)", 1)
    teacher_checkpoint: str = setting(None, "your own --teacher, of images in [-1, 1]")
    pretrained_teacher: bool = setting(False, "start resnet18/34 from ImageNet weights: extra data")
    ali_epochs: int = setting(None, "epochs before the switch (paper: half; a third: ablation)", 1)
    tau: float = setting(0.2, "temperature of the teacher's attention surrogate (ablation)", 1e-3)
    relations: str = setting("qk+vv", "what imitates it (paper)", choices=("qk", "vv", "qk+vv"))
    pairs: str = setting("0:1,last:2", "BLOCK:LAYER,... from 0 and from 1 (paper, ablation)")
    dkd_alpha: float = setting(1.0, "weight of TCKD, the label against the rest (paper)", 0)
    dkd_beta: float = setting(4.0, "weight of NCKD, the other classes among themselves (paper)", 0)
    dkd_temperature: float = setting(1.0, "softens both sets of logits in DKD (paper)", 0.01)
    ramp_epochs: int = setting(5, "epochs of LM in which DKD's weight rises from 0 to 1 (paper)", 0)
    epochs: int = setting(None, "of the student, both stages together (paper: 600)", 1)
    batch_size: int = setting(None, "images per step (paper: 256 in ALI, 512 in LM)", 1)
    lr: float = setting(None, "peak [1e-3: paper; vit_micro 2e-3: ablation; teacher 0.1]", 1e-6)
    warmup: float = setting(0.1, "share of a stage in which the rate rises (paper: 0.05)", 0, 1)
    weight_decay: float = setting(0.05, "(paper) not of biases, norms, positions (ours)", 0)
    output_dir: str = setting("runs", "where runs are kept")
    run_name: str = setting(None, "folder of the run [made from the settings given]")
    snapshot_every: int = setting(0, "epochs between copies for --gif, 11 or 0.6 MB each", 0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"))
    overwrite: bool = setting(False, "start again where a run of this name lies")

RUN_SETTINGS = ("compare", "seeds", "data_dir", "output_dir", "run_name", "snapshot_every",
                "device", "compile", "overwrite")       # where and how; the others change results
RESULT_SETTINGS = [f.name for f in fields(Config) if f.name not in RUN_SETTINGS]
TEACHER_SETTINGS = ["dataset", "data_seed", "image_size", "crop", "teacher", "teacher_epochs",
                    "pretrained_teacher", "batch_size", "lr", "warmup"]     # and the teacher

AS_BEFORE = dict(augment="none")        # settings that older runs did not store

def resolve(cfg: Config) -> Config:
    """A checked copy with every None filled in. Raises CIKDError that names the setting."""
    for f in fields(cfg):
        value, (_, low, high, choices) = getattr(cfg, f.name), f.metadata.values()
        option = f"--{f.name.replace('_', '-')}"
        for v in value if isinstance(value, (tuple, list)) else [value]:
            need(v is None or low is None or low <= v <= high,              # refuses nan too
                 f"{option}: {v} must be from {low} to {high}")
            need(v is None or not choices or v in choices, f"{option}: {v} is not in {[*choices]}")
    cfg, teaches = replace(cfg), cfg.method == "teacher"
    for name in ("data_dir", "output_dir", "teacher_checkpoint"):
        setattr(cfg, name, getattr(cfg, name) and os.path.expanduser(getattr(cfg, name)))
    need(re.fullmatch(r"[A-Za-z0-9_=+,-][A-Za-z0-9._=+,-]*", cfg.run_name or "_"),
         f"--run-name: {cfg.run_name!r} must be of letters, digits and ._=+,- alone")
    row = DATASETS[cfg.dataset]
    if cfg.epochs and cfg.ali_epochs is None:   # only the total is given: ALI keeps its share of it
        cfg.ali_epochs = max(1, round(cfg.epochs * row["ali_epochs"] / row["epochs"]))
    row = row | STUDENT_DEFAULTS[cfg.student or row["student"]] | (dict(lr=0.1) if teaches else {})
    for name, value in row.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.augment is None:
        cfg.augment = "trivial" if cfg.epochs >= PATIENT else "none"
    if teaches:
        cfg.seed, cfg.epochs = cfg.data_seed, cfg.teacher_epochs
    side, patch, width = cfg.image_size, cfg.patch_size, STUDENTS[cfg.student]["width"]
    need(side % patch == 0 and side > patch,
         f"--patch-size: {patch} does not cut --image-size {side} evenly, into 2 x 2 or more")
    need(width % cfg.heads == 0 and cfg.heads <= TEACHERS[cfg.teacher][1],
         f"--heads: {cfg.heads} does not divide {width} or is above the teacher's layer1 channels")
    need(cfg.ali_epochs < cfg.epochs or cfg.method != "cikd",
         f"--epochs: {cfg.epochs} must be above --ali-epochs, {cfg.ali_epochs}: LM comes after it")
    fits = cfg.teacher in ("resnet18", "resnet34") and side > 64 and not cfg.teacher_checkpoint
    need(fits or not cfg.pretrained_teacher, "--pretrained-teacher: fits --teacher resnet18 or "
         "resnet34 and --image-size above 64 only, and no --teacher-checkpoint")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    need(there.get(cfg.device, True), f"--device: torch finds no {cfg.device}; use cpu or auto")
    depth, layers = STUDENTS[cfg.student]["depth"], len(TEACHERS[cfg.teacher][0])
    need(re.fullmatch(r"((\d{1,3}|last):\d{1,3},)+", cfg.pairs + ",") and
         all(b < depth and 1 <= t <= layers for b, t in parse_pairs(cfg.pairs, cfg.student)),
         f"--pairs: {cfg.pairs!r} is not BLOCK:LAYER,..., blocks 0 to {depth - 1} or last, layers "
         f"1 to {layers}")
    return cfg

def default_name(cfg: Config) -> str:
    """Folder of a run: data set, method, every setting given, seed; a long one ends in a hash."""
    data = Path(cfg.data_dir).absolute().name if cfg.dataset == "folder" else cfg.dataset
    given = [f"{name}={getattr(cfg, name)}" for name in RESULT_SETTINGS if name not in
             ("dataset", "method", "seed") and getattr(cfg, name) != getattr(Config, name)]
    name = "-".join([data.lstrip("."), cfg.method, *given, f"seed{cfg.seed}"])
    name = name if len(name) <= 150 else f"{name[:60]}-{hash_of(os.fsencode(name))[:8]}"
    return re.sub(r"[^A-Za-z0-9._=+,-]", "_", name)     # what every file system and shell takes

def hash_of(content) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

# %% 7. Data: uint8 tensors on the training device, augmented a whole batch at a time --------------
class Data(NamedTuple):
    """train and test: (images, uint8 [n, 3, S, S]; labels, int64 [n]); images_hash: of all four."""
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: list[str]
    images_hash: str

FORMS = "disc", "triangle", "square", "star", "flower"
SHAPES = [*FORMS, *(f"hollow {form}" for form in FORMS)]
def make_shapes(n: int, seed: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """n images of the ten SHAPES, uint8 [n, 3, size, size], and labels [n]: a demonstration only.
    Random colour, place, size and modest turn, over a coloured, noisy ground, under a thin line."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    labels = torch.arange(n) % len(SHAPES)
    pixels = torch.arange(size) + 0.5
    dx = pixels - size * uniform(0.4, 0.6, 1, 1)            # [n, 1, S], from the shape's centre
    dy = pixels[:, None] - size * uniform(0.4, 0.6, 1, 1)   # [n, S, 1]
    rho, phi = torch.hypot(dx, dy), torch.atan2(dy, dx) + uniform(-0.3, 0.3, 1, 1)

    def polygon(k):      # radius of a regular k-gon in direction phi, 1 at its corners
        return math.cos(math.pi / k) / torch.cos(phi % (2 * math.pi / k) - math.pi / k)

    star = 1.1 - 0.6 * (2 * (phi * 5 / (2 * math.pi) % 1) - 1).abs()
    flower = 0.65 + 0.35 * torch.cos(4 * phi)
    forms = torch.ones_like(phi), polygon(3) * 1.2, polygon(4) * 1.1, star, flower
    outline = torch.stack(forms)[labels % 5, torch.arange(n)] * uniform(0.3, 0.42, 1, 1) * size
    mask = (outline - rho + 0.5).clamp(0, 1)                # 1 inside, one soft pixel at the edge
    core = (outline * 0.55 - rho + 0.5).clamp(0, 1)
    mask = (mask - core * (labels >= 5)[:, None, None])[:, None]    # [n, 1, S, S]
    ground = F.interpolate(uniform(-0.15, 0.15, 3, 4, 4), size=size, mode="bilinear")
    ground = ground + uniform(0, 1, 3, 1, 1)
    colour = (ground.mean((2, 3), keepdim=True) + uniform(0.35, 0.65, 3, 1, 1)) % 1
    images = ground + mask * (colour - ground)                      # [n, 3, S, S]
    angle, offset = uniform(0, math.pi, 1, 1), uniform(-0.4, 0.4, 1, 1) * size
    line = (dx * torch.cos(angle) + dy * torch.sin(angle) - offset).abs() < 0.5
    images = torch.where(line[:, None], uniform(0, 1, 3, 1, 1), images)
    images = images + uniform(-0.06, 0.06, 3, size, size)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels

def to_rgb(image: Image.Image, size: int) -> torch.Tensor:
    """PIL image -> uint8 [3, size, size]: RGB, alpha over white, middle square, resized."""
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torchvision.transforms.functional.pil_to_tensor(image)           # [3, S, S]

def open_image(path: str | Path) -> Image.Image:
    """Read an image file whole and turn it upright (EXIF). Raises CIKDError with its name."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
    except Exception as error:                  # Pillow raises whatever a broken file leads to
        raise CIKDError(f"{path}: not a readable image ({one_line(error)})") from None
    need(image.mode[0] not in "IF", f"{path}: grey of more than 8 bits; convert it, from 16 for "
         "example by Image.fromarray((numpy.asarray(image) / 65535 * 255).astype('uint8'))")
    return image

def prepare(image: Image.Image | str | Path, size: int) -> torch.Tensor:
    """A picture, or its file -> float [1, 3, size, size] in [-1, 1], ready for a model."""
    image = image if isinstance(image, Image.Image) else open_image(image)
    return to_float(to_rgb(image, size)[None])

def decode(get, n: int, size: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """get(i) -> PIL image, label of n -> uint8 [n, 3, size, size], int64 [n]. Raises CIKDError."""
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    labels, broken = torch.empty(n).long(), []

    def one(i):
        try:
            image, labels[i] = get(i)
            images[i] = to_rgb(image, size)
        except Exception as error:
            broken.append(one_line(error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:    # Pillow works outside the interpreter lock
        for done, _ in enumerate(pool.map(one, range(n)), 1):
            if done % 100 == 0 or done == n:
                status(f"reading {name}: {done} of {n} images", last=done == n)
    need(not broken, f"{name}: mend or remove {len(broken)} images: {'; '.join(broken[:10])}")
    return images, labels

def status(text: str, last: bool = True) -> None:
    """A line that replaces itself on a terminal; when piped, only the last one is printed."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)

def read_folder(cfg: Config, test: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(images, labels, classes) of DIR/train, or of DIR/test, val or valid. Raises CIKDError."""
    def class_folders(path):
        return sorted(p.name for p in path.glob("[!.]*") if p.is_dir())
    where, names = Path(cfg.data_dir), ["test", "val", "valid"] if test else ["train"]
    path = next((where / name for name in names if class_folders(where / name)), where / names[0])
    here, classes = class_folders(path), class_folders(where / "train")
    need(here and len(classes) > 1, f"{path}: {len(here)} class folders; --dataset folder reads "
         "two or more train/CLASS/ and test/CLASS/ (or val, valid), or give --holdout")
    found = glob.glob(os.path.join(glob.escape(str(path)), "*", "**", "*"), recursive=True)
    found = [Path(file) for file in found if os.path.isfile(file)]
    endings = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif")
    files = sorted(file for file in found if file.suffix.lower() in endings)
    if len(files) < len(found):
        print(f"{path}: skips {len(found) - len(files)} files, not {' '.join(endings)}", flush=True)
    names = [file.relative_to(path).parts[0] for file in files]
    wrong = set(here) - (set(classes) & set(names))
    need(not wrong, f"{path} or {where / 'train'}: has no images of {', '.join(sorted(wrong))}")
    return *decode(lambda i: (open_image(files[i]), classes.index(names[i])), len(files),
                   cfg.image_size, str(path)), classes

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
TRAIN_TEST = [dict(train=True)], [dict(train=False)]
SPLITS = [dict(split="trainval")], [dict(split="test")]
PUBLISHED = {   # torchvision's class, parts of training and test set, images, archive, its place
    "cifar10": ("CIFAR10", TRAIN_TEST, (50000, 10000),
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", TRAIN_TEST, (50000, 10000),
                 "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "fashion_mnist": ("FashionMNIST", TRAIN_TEST, (60000, 10000),
                      "https://github.com/zalandoresearch/fashion-mnist", "FashionMNIST", "raw"),
    "stl10": ("STL10", ([dict(split="train")], [dict(split="test")]), (5000, 8000),
              "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
    "pets": ("OxfordIIITPet", SPLITS, (3680, 3669),
             f"images.tar.gz and annotations.tar.gz from {OXFORD}pets/", "oxford-iiit-pet"),
    "aircraft": ("FGVCAircraft", SPLITS, (6667, 3333),
                 f"{OXFORD}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),
    "dtd": ("DTD", ([dict(split="train"), dict(split="val")], [dict(split="test")]), (3760, 1880),
            f"{OXFORD}dtd/download/dtd-r1.0.1.tar.gz", "dtd"),
    "imagenette": ("Imagenette", ([dict(size="320px")], [dict(size="320px", split="val")]),
                   (9469, 3925), "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"),
}

def read_published(cfg: Config, test: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(images, labels, classes) of a torchvision data set, downloaded if not there. CIKDError."""
    name, splits, counts, archive, *place = PUBLISHED[cfg.dataset]
    where, make, n = Path(cfg.data_dir), getattr(torchvision.datasets, name), counts[test]
    try:
        parts = [make(str(where), download=True, **arguments) for arguments in splits[test]]
        both = torch.utils.data.ConcatDataset(parts)
        need(len(both) == n, f"{len(both)} images where {n} belong")
        images, labels = decode(both.__getitem__, n, cfg.image_size,
                                f"{cfg.dataset}, {'test' if test else 'train'}")
    except Exception as error:                  # torchvision raises whatever a broken copy leads to
        raise CIKDError(f"{cfg.dataset}: neither whole in {where} nor downloaded: "
                        f"{one_line(error)}; delete what is half extracted, put {archive} into "
                        f"{where.joinpath(*place)} and run again; or --dataset shapes") from None
    names = [c if isinstance(c, str) else c[0] for c in parts[0].classes]   # Imagenette: synonyms
    return images, labels, names

def balanced_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded order [n] of all images, each prefix as class-balanced as the data allow."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = labels[order][:, None]                                          # [n, 1]
    rank = F.one_hot(drawn[:, 0]).cumsum(0).gather(1, drawn)[:, 0]          # in its class, from 1
    return order[rank.argsort(stable=True)]

def load_dataset(cfg: Config) -> Data:
    """The data of a resolved Config, cut to --holdout and --train-size. Raises CIKDError."""
    if cfg.dataset == "shapes":
        train, test = ((*make_shapes(n, 2 * cfg.data_seed + i, cfg.image_size), SHAPES)
                       for i, n in enumerate((3000, 1000)))
    else:
        read = read_folder if cfg.dataset == "folder" else read_published
        train = read(cfg, test=False)
        test = train if cfg.holdout else read(cfg, test=True)
    (images, labels, classes), test, held = train, test[:2], cfg.holdout or 0
    n, size = len(labels), cfg.train_size or len(labels) - held
    order = balanced_order(labels, cfg.data_seed) if size < n else torch.arange(n)
    cuts = [order[:held], order[held:held + size]]
    need(0 < size <= n - held and
         all(len(labels[cut].unique()) == len(classes) for cut in cuts if 0 < len(cut) < n),
         f"--train-size, --holdout: {n} images of {len(classes)} classes cannot give {size} to "
         f"train on and {held} to hold out, with all of them in both parts")
    test = (images[cuts[0]], labels[cuts[0]]) if held else test
    train = (images[cuts[1]], labels[cuts[1]]) if size < n else train[:2]
    hashes = [hash_of(part.contiguous().numpy()) for part in (*train, *test)]
    return Data(train, test, classes, hash_of("".join(hashes).encode()))

def draw_crops(n: int, size: int, kind: str) -> torch.Tensor:
    """Random crop and flip of n images: (width, x, height, y) [n, 4]; x, y: the crop's centre, from
    -1 to 1. The whole image is (1, 0, 1, 0). A negative width is a flip."""
    flip = torch.randint(0, 2, (n,)) * 2.0 - 1
    if kind == "pad":                           # whole pixels, so nothing is blurred; grey comes in
        wide = high = torch.ones(n)
        shift = torch.randint(-(size // 8), size // 8 + 1, (2, n)) * 2 / size
    else:                                       # RandomResizedCrop without its retries
        area = torch.rand(n) * 0.8 + 0.2        # of the image (0.2: paper's ALI; its LM: 0.08)
        ratio = torch.exp((torch.rand(n) * 2 - 1) * math.log(4 / 3))
        wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        shift = (torch.rand(2, n) * 2 - 1) * (1 - torch.stack([wide, high]))
    return torch.stack([wide * flip, shift[0], high, shift[1]], 1)

SHARED = 4              # images of a batch that share one draw of strong_views
def strong_views(images: torch.Tensor) -> torch.Tensor:
    """One random change of shape or colour (TrivialAugmentWide, Müller 2021; the paper's LM):
    uint8 [B, 3, S, S] -> the same shape. Neighbours in a batch share a draw, which costs less."""
    draw = v2.TrivialAugmentWide()
    return torch.cat([draw(part) for part in images.split(SHARED)])

def to_float(images: torch.Tensor, crops: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float in [-1, 1] (mean, deviation 0.5: paper), cropped as drawn."""
    images = images.float() / 127.5 - 1
    if crops is None:
        return images
    B, _, S, _ = images.shape
    place = (2 * torch.arange(S, device=images.device) + 1) / S - 1     # [S], centres of pixels
    wide, x, high, y = crops[:, :, None].unbind(1)                      # each [B, 1]
    grid = torch.stack([(wide * place + x)[:, None].expand(B, S, S),    # where each comes from
                        (high * place + y)[:, :, None].expand(B, S, S)], 3)     # [B, S, S, 2]
    return F.grid_sample(images, grid, align_corners=False)

def batches(data: Data, cfg: Config, world: int = 1, strong: bool = False):
    """One epoch of (view, float [B, 3, S, S]; labels [B]), of `world` processes this one's share.
    Order and crops are drawn at once, on the CPU, alike in all; `strong` views as they come. A last partial batch is dropped
    unless it is the only one: all steps have one shape."""
    images, labels = data.train
    size = min(cfg.batch_size, len(labels))
    order = torch.randperm(len(labels))[: len(labels) // size * size].to(images.device)
    crops = None
    if cfg.crop != "none":
        crops = draw_crops(len(order), cfg.image_size, cfg.crop).to(images.device)
    if RANK:                                    # draws its own views, colours, depths from here on
        torch.manual_seed(torch.initial_seed() + RANK)
    for mine in torch.arange(RANK, len(order), world, device=images.device).split(size // world):
        view = strong_views(images[order[mine]]) if strong else images[order[mine]]
        view = to_float(view, crops if crops is None else crops[mine])
        yield view, labels[order[mine]]

# %% 8. Training: teacher and student take the same path -------------------------------------------
RANK, WORLD = 0, 1                      # this process and their number; several by torchrun only
if dist.is_available() and dist.is_torchelastic_launched():
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def average(tensors: list[torch.Tensor]) -> None:
    """What DistributedDataParallel does: each tensor becomes its mean over the processes."""
    flat = nn.utils.parameters_to_vector(tensors)               # one message instead of many
    dist.all_reduce(flat)                                       # the sum, in every process
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(total.view_as(tensor) / WORLD)             # a copy, so that `flat` is freed

def save(path: Path, content) -> None:
    """Write rows (.csv), values (.json), tensors (.pt) or bytes, as `path` ends: first beside it,
    then renamed, so that what bears its final name is whole. Raises CIKDError."""
    memory, text = io.BytesIO(), io.StringIO()
    if path.suffix == ".csv":
        writer = csv.DictWriter(text, content[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
        content = text.getvalue().encode()
    elif path.suffix == ".json":
        content = json.dumps(content, indent=1).encode()
    elif path.suffix == ".pt":
        torch.save(content, memory)
        content = memory.getbuffer()
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CIKDError(f"{path}: cannot be written ({one_line(error)}); when it can be, run the "
                        "same command again: what was saved before is whole") from None

def load(path: str | Path, model: nn.Module | None = None) -> dict:
    """Tensors and plain values; with `model`, a state dict that must fit it exactly. CIKDError."""
    try:                                        # weights_only: no pickle that would run code
        content = torch.load(path, map_location="cpu", weights_only=True)
        if model is not None:
            model.load_state_dict(content)
        return content
    except Exception as error:                  # torch raises whatever a broken file leads to
        raise CIKDError(f"{path}: missing or not a checkpoint that fits; check the model, image "
                        f"and patch size and the classes ({one_line(error)[:250]})") from None

def seed_torch(*parts) -> None:
    """Seed torch from (seed, model, epoch), so that going on needs no state of a generator."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big"))

def autocast(device: torch.device):
    """bfloat16 on GPUs that compute in it (older ones only emulate it, slowly), else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)

@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size=100) -> float:
    """Top-1 accuracy, percent, in evaluation mode, on uint8 images [n, 3, S, S]."""
    model, correct = model.eval(), 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        with autocast(images.device):
            logits = model(to_float(x))                                     # [B, K]
        correct = correct + (logits.argmax(1) == y).sum()
    return 100 * int(correct) / len(labels)

def attention_distance(maps: torch.Tensor) -> torch.Tensor:
    """Mean distance from query to key in patches (Raghu 2021): maps [..., N, N] -> [...]."""
    grid = math.isqrt(maps.shape[-1])
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).to(maps)       # [N, 2]
    return (maps * torch.cdist(place, place)).sum(-1).mean(-1)

@torch.no_grad()
def student_maps(student: VisionTransformer, images: torch.Tensor):
    """What patches attend to among patches: float [B, 3, S, S] -> [B, H, N, N], block by block."""
    _, tapped = student.forward_taps(images, range(len(student.blocks)), classify=False)
    for q, k, _ in tapped.values():
        yield relation(q[:, :, 1:], k[:, :, 1:]).exp()

def measure(model: nn.Module, cfg: Config, data: Data) -> dict:
    """What an epoch's row says: accuracy and, of a student, attention distance."""
    found = dict(accuracy=evaluate(model, *data.test, 2 * cfg.batch_size))
    if isinstance(model, VisionTransformer):
        distances = [attention_distance(maps).mean() for images in probe(data.test[0])
                     for maps in student_maps(model, to_float(images))]
        found["attention_distance"] = float(torch.stack(distances).mean())
    return found

def probe(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """64 images, evenly spaced, on which locality is measured; 16 at a time, for maps are large."""
    return images[torch.linspace(0, len(images) - 1, min(64, len(images))).long()].split(16)

def learning_rate(progress: float, peak: float, warmup: float, floor: float = 1e-6) -> float:
    """Linear rise, then half a cosine to `floor` (paper's LM); progress in a stage, in (0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    angle = math.pi * (progress - warmup) / max(1e-9, 1 - warmup)
    return floor + (peak - floor) * (1 + math.cos(angle)) / 2

def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """Teacher: SGD. Student: AdamW, without decay on biases, norms, CLS and positions."""
    if isinstance(model, ResNetTeacher):
        return torch.optim.SGD(model.parameters(), cfg.lr, 0.9, nesterov=True, weight_decay=5e-4)
    groups = [dict(params=[], weight_decay=cfg.weight_decay), dict(params=[], weight_decay=0.0)]
    for name, p in model.named_parameters():
        groups[p.ndim == 1 or name in ("cls_token", "pos_embed")]["params"].append(p)
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.95), fused=True)         # betas: paper

def fit(model, teacher, cfg: Config, data: Data, final: Path) -> None:
    """Train student or teacher and write `final`. After each epoch metrics.csv and last.pt beside
    it are whole; the same call goes on there. CIKDError if a loss or weight is not finite."""
    folder, device, rows = final.parent, data.train[0].device, []
    compiled = cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"
    loss_fn = torch.compile(step_loss, dynamic=False) if compiled else step_loss
    plan = [curriculum(cfg.method, epoch, cfg.ali_epochs) for epoch in range(cfg.epochs)]
    steps, optimizer = max(1, len(data.train[1]) // cfg.batch_size), make_optimizer(model, cfg)
    world = 1 if cfg.method == "teacher" else WORLD     # BatchNorm wants the whole batch
    if (folder / "last.pt").exists():
        last = load(folder / "last.pt")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        rows = last["rows"]
        print(f"going on after epoch {len(rows)} of {cfg.epochs}", flush=True)
    for epoch in range(len(rows), cfg.epochs):
        stage = plan[epoch]
        begin, length = plan.index(stage), plan.count(stage)
        if epoch == begin:                      # the switch: a new stage has a new optimizer
            optimizer = make_optimizer(model, cfg)
        seed_torch(cfg.seed, final.stem, epoch)
        model.train()
        stage_epoch, log, start = torch.tensor(epoch - begin, device=device), [], time.monotonic()
        strong = stage.strong and cfg.augment == "trivial"
        for step, (view, labels) in enumerate(batches(data, cfg, world, strong), 1):
            progress = (epoch - begin + step / steps) / length
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, cfg.lr, cfg.warmup)
            with autocast(device):
                loss, terms = loss_fn(stage, cfg, model, teacher, view, labels, stage_epoch)
            log.append(torch.cat([loss.detach().view(1), terms]))   # stays on the device
            optimizer.zero_grad()
            loss.backward()
            if world > 1:                       # in ALI the head has no gradient, in any process
                average([log[-1], *(p.grad for p in model.parameters() if p.grad is not None)])
            optimizer.step()
            status(f"{stage.name:7} {epoch + 1:3}/{cfg.epochs}  step {step}/{steps}", last=False)
        log = torch.stack(log).cpu().double()   # [steps, 4]; the epoch's only wait for the device
        seconds, weights = time.monotonic() - start, model.state_dict()
        need(log.isfinite().all() and all(t.isfinite().all() for t in weights.values()),
             f"{stage.name}, epoch {epoch + 1}: the loss or a weight is not finite; {folder} keeps "
             "the epoch before, if any; try a smaller --lr (for a teacher: --teacher-checkpoint)")
        if RANK:                                # the first process alone measures and writes
            continue
        loss, ali, ce, dkd = log.mean(0).tolist()
        rows.append(dict(stage=stage.name, epoch=epoch + 1, loss=loss, ali=ali, ce=ce, dkd=dkd,
                         lr=group["lr"], **measure(model, cfg, data), seconds=seconds,
                         images_per_second=len(log) * len(view) * world / seconds))
        if epoch + 1 < cfg.epochs and plan[epoch + 1] != stage:     # the switch comes next
            save(folder / f"student_{stage.name.lower()}.pt", weights)
        if cfg.snapshot_every and (epoch + 1) % cfg.snapshot_every == 0:
            save(folder / "snapshots" / f"epoch_{epoch + 1:04}.pt",
                 {name: t.half() for name, t in weights.items()})
        save(folder / "metrics.csv", rows)
        save(folder / "last.pt", dict(model=weights, optimizer=optimizer.state_dict(), rows=rows))
        left = (time.monotonic() - start) * (cfg.epochs - epoch - 1) / 60
        shown = "  ".join(f"{k} {v:.4g}" for k, v in list(rows[-1].items())[2:] if v)
        status(f"{stage.name:7} {epoch + 1:3}/{cfg.epochs}  {shown}  {left:.0f} min left")
    if RANK == 0:
        save(final, model.state_dict())

def build_student(cfg: Config, num_classes: int) -> VisionTransformer:
    return VisionTransformer(cfg.image_size, cfg.patch_size, num_classes, **STUDENTS[cfg.student],
                             heads=cfg.heads, drop_path=cfg.drop_path)

def build_teacher(cfg: Config, num_classes: int, device: torch.device) -> ResNetTeacher:
    teacher = ResNetTeacher(cfg.teacher, num_classes, cfg.image_size)
    if device.type != "mps":                    # where this layout gives wrong gradients
        teacher.to(memory_format=torch.channels_last)           # faster for convolutions
    return teacher.to(device)

def get_teacher(cfg: Config, data: Data) -> tuple[ResNetTeacher, Path]:
    """The frozen teacher and its file: the user's own, one trained before, or trained now."""
    path = cfg.teacher_checkpoint
    if not path:
        own = dict(method="teacher", lr=None, overwrite=False, snapshot_every=0)
        path = Path(train(replace(cfg, **own), data)["folder"]) / "teacher.pt"
    teacher = build_teacher(cfg, len(data.classes), data.train[0].device)
    load(path, teacher)
    if cfg.teacher_checkpoint:
        print(f"teacher: {path}, accuracy {evaluate(teacher, *data.test):.1f} %", flush=True)
    return teacher.eval().requires_grad_(False), Path(path)     # BatchNorm keeps its statistics

def train(cfg: Config, data: Data | None = None) -> dict:
    """Train one model by `cfg`, its teacher first if need be; keep everything in the run's folder.
    Goes on where an unfinished run of this name and these settings stopped, leaves a finished one.
    Returns dict(accuracy: percent, last epoch; epochs; minutes: of training; folder). CIKDError."""
    what, world = ("teacher", 1) if cfg.method == "teacher" else ("student", WORLD)
    cfg = resolve(replace(cfg, run_name=cfg.run_name or default_name(cfg)))
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device, data = str(here) if cfg.device == "auto" else cfg.device, data or load_dataset(cfg)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")          # TF32
    data = data._replace(train=[t.to(device) for t in data.train],
                         test=[t.to(device) for t in data.test])
    size = min(cfg.batch_size, len(data.train[1]))
    need(size % WORLD == 0, f"--batch-size: {WORLD} processes cannot share {size} images evenly")
    taught = any(stage.ali or stage.logits for stage in METHODS[cfg.method])
    teacher, path = get_teacher(cfg, data) if taught else (None, None)
    names = TEACHER_SETTINGS if what == "teacher" else RESULT_SETTINGS
    facts = {name: getattr(cfg, name) for name in names} | dict(
        classes=data.classes, images=data.images_hash,
        teacher_hash=path and hash_of(path.read_bytes()))
    folder = home = Path(cfg.output_dir, cfg.run_name)
    if what == "teacher":                       # home is named by all that its training depends on
        key = hash_of(json.dumps(facts).encode())[:8]
        folder = home = home.with_name("teachers") / f"{cfg.dataset}-{cfg.teacher}-{key}"
        if not home.exists():                   # two jobs may want it: each trains its own, beside
            folder = home.with_name(f"{home.name}.part-{hash_of(cfg.run_name.encode())[:8]}")
    final = folder / f"{what}.pt"
    old = "last.pt", f"{what}*.pt", "metrics.csv", "snapshots/*.pt"
    for file in [f for pattern in old for f in folder.glob(pattern) if cfg.overwrite and not RANK]:
        file.unlink()                           # only now that all else is there
    if final.exists() or (folder / "last.pt").exists():
        stored = AS_BEFORE | json.loads((folder / "settings.json").read_text())
        changed = [f"{k} {stored.get(k)} -> {v}" for k, v in facts.items() if stored.get(k) != v]
        need(not changed, f"{folder}: was begun with other settings: {', '.join(changed)[:300]}; "
             "use those, another --run-name, or --overwrite to start again")
    model = None if final.exists() else begin_run(cfg, data, final, facts | dict(
        data_dir=cfg.data_dir, teacher_file=path and os.path.relpath(path, folder.parent)))
    if world > 1 and RANK == 0:
        dist.barrier()                          # now the others find all this and follow
    if model:
        fit(model, teacher, cfg, data, final)
    if world > 1:
        dist.barrier()                          # until the first process has written all
        dist.destroy_process_group()
    (folder / "last.pt").unlink(missing_ok=True)
    if folder != home:
        with suppress(OSError):                 # if another job was faster, its teacher counts
            folder.rename(home)
    rows = list(csv.DictReader((home / "metrics.csv").read_text().splitlines()))
    if folder != home:
        shutil.rmtree(folder, ignore_errors=True)
    result = dict(accuracy=float(rows[-1]["accuracy"]), epochs=len(rows), folder=str(home),
                  minutes=sum(float(row["seconds"]) for row in rows) / 60)
    print(f"{cfg.method}, seed {cfg.seed}: accuracy {result['accuracy']:.1f} % after {len(rows)} "
          f"epochs ({result['minutes']:.1f} min of training); see {home}", flush=True)
    return result

def begin_run(cfg: Config, data: Data, final: Path, facts: dict) -> nn.Module:
    """The model before training and, unless there is something to go on with, the first files."""
    folder, n, K, device = final.parent, len(data.train[1]), len(data.classes), data.train[0].device
    seed_torch(cfg.seed, final.stem)
    if cfg.method == "teacher":
        model = build_teacher(cfg, K, device)
        if cfg.pretrained_teacher:              # all but the classifier
            state = torchvision.models.get_model_weights(cfg.teacher).DEFAULT.get_state_dict()
            model.load_state_dict(state | {f"fc.{k}": t for k, t in model.fc.state_dict().items()})
    else:
        model = build_student(cfg, K).to(device)
    few = "; under 10 steps an epoch: try a smaller --batch-size" if n < 10 * cfg.batch_size else ""
    status(f"{folder}: {n} training, {len(data.test[1])} test images, {K} classes, {device}{few}")
    if RANK == 0 and not (folder / "last.pt").exists():
        save(folder / "settings.json", facts | dict(torch=torch.__version__, device=device.type))
        save(folder / f"{final.stem}_init.pt", model.state_dict())
    return model

def read_facts(folder: Path) -> dict:
    """What settings.json in a run's folder says. Raises CIKDError, OSError."""
    path = folder / "settings.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:                          # empty, cut or not text
        raise CIKDError(f"{path}: is not whole; train this run again with --overwrite") from None
    return AS_BEFORE | facts


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.csv, one for each epoch. Raises CIKDError, OSError."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        whole = len(rows) > 0 and all(None not in row.values() for row in rows)
    except (ValueError, csv.Error):             # not text
        whole = False
    need(whole, f"{path}: is not whole; train this run again with --overwrite")
    return rows


def load_student(folder: str | Path) -> tuple[VisionTransformer, list[str], Config]:
    """A finished run's student in evaluation mode, its classes, settings. CIKDError, OSError."""
    folder = Path(folder).expanduser()
    facts = read_facts(folder)
    need({*RESULT_SETTINGS, "classes", "teacher_hash"} <= facts.keys(),
         f"{folder}: is of another version of cikd.py or a teacher; name or train a student's run")
    cfg = Config(**{f.name: facts[f.name] for f in fields(Config) if f.name in facts})
    student = build_student(cfg, len(facts["classes"])).eval()
    load(folder / "student.pt", student)
    return student, facts["classes"], cfg

# %% 9. Command line -------------------------------------------------------------------------------
def train_many(cfg: Config) -> list[dict]:
    """--compare, --seeds: each method with each seed, in one table. Finished ones stay."""
    results, data, seeds = [], load_dataset(resolve(cfg)), cfg.seeds or [cfg.seed]
    methods = [name for name in METHODS if name != "teacher"] if cfg.compare else [cfg.method]
    for seed in seeds:
        for method in methods:
            name = cfg.run_name and f"{cfg.run_name}-{method}-seed{seed}"
            one = replace(cfg, method=method, seed=seed, seeds=None, compare=False, run_name=name)
            results.append(dict(method=method, seed=seed) | train(one, data))
    name = default_name(replace(cfg, method="comparison" if cfg.compare else f"{cfg.method}-seeds",
                                seed="_".join(map(str, seeds))))
    path = Path(results[0]["folder"]).parent / (cfg.run_name or name) / "comparison.csv"
    save(path, results)
    print("\nmethod    accuracy (%)  seeds")
    for method in methods:
        values = [r["accuracy"] for r in results if r["method"] == method]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{method:8}  {statistics.mean(values):.1f}{spread:8}  {len(values):5}")
    print(f"see {path}", flush=True)
    return results

def make_parser() -> argparse.ArgumentParser:
    """The command line, generated from Config. It yields only what was given."""
    rows = [["", *SMALL], *([name, *(row[key] for key in SMALL)] for name, row in DATASETS.items())]
    table = "\n".join("".join(f"{cell!s:>15}" for cell in row) for row in rows)
    parser = argparse.ArgumentParser(
        "cikd.py", "python cikd.py [--SETTING VALUE ...]", allow_abbrev=False,
        epilog="paper: its abstract or code; ablation: no other value helped cikd beyond chance"
        f"\n\ndefaults of each data set:\n{table}", argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, f"{message} (python cikd.py --help lists all)")
    for f in fields(Config):
        option, names = "--" + f.name.replace("_", "-"), "|".join(f.metadata["choices"])
        if f.type == "bool":
            parser.add_argument(option, help=f.metadata["help"], action="store_true")
        else:
            help = f.metadata["help"] + ("" if f.default is None else f" [{f.default}]")
            parser.add_argument(option, help=help, type=dict(float=float, str=str).get(f.type, int),
                                metavar=names or "VALUE", nargs="+" if f.type == "tuple" else None)
    return parser

def join_processes(cfg: Config) -> None:
    """By torchrun: meet the others, one for each GPU; wait while the first trains the teacher."""
    need(not (cfg.compare or cfg.seeds or cfg.method == "teacher"), "torchrun shares the batches "
         "of one student: run --compare, --seeds and --method teacher by python")
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else None
    if gpus:
        need(local.index < gpus, f"torchrun: --nproc-per-node is above the {gpus} GPUs here")
        torch.cuda.set_device(local)            # "cuda" is this one from here on
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(weeks=9), device_id=local)
    if RANK:
        sys.stdout = open(os.devnull, "w")
        dist.barrier()          # the first process goes ahead: download, teacher, first files

def run_command(prog: str, body) -> int:
    """Run body(); what the user can mend becomes one line. Returns the exit code: 0, 2 or 130."""
    try:
        body()
    except KeyboardInterrupt:
        print("\nstopped; the same command (without --overwrite) goes on", flush=True)
        return 130
    except (CIKDError, OSError, MemoryError, RuntimeError) as error:
        if WORLD > 1:           # who caused it speaks first; torchrun ends those who wait
            time.sleep(10 * RANK + (10 if isinstance(error, RuntimeError) else 0))
        message = one_line(error)
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", message):
            message = "out of memory; use a smaller --batch-size, --image-size or --train-size"
        elif re.search(r"torch(\._dynamo|\._inductor|\.compile)", type(error).__module__ + message):
            message = f"--compile: torch.compile failed ({message[:150]} ...); use --compile off"
        elif isinstance(error, RuntimeError):
            raise                               # ours to mend: keep the traceback
        status("", last=False)                  # clears an unfinished line
        print(f"{prog}: error: {message}", file=sys.stderr)
        return 2
    return 0

def main(argv: list[str] | None = None) -> int:
    def body():
        given = vars(make_parser().parse_args(argv))
        for one, other in (("compare", "method"), ("seeds", "seed")):
            need(not {one, other} <= given.keys(), f"--{one}: contradicts --{other}; give one")
        cfg = Config(**given)
        need(cfg.method != "teacher" or not cfg.seeds, "--seeds: of a teacher give --data-seed")
        if WORLD > 1:
            join_processes(cfg)
        (train_many if cfg.compare or cfg.seeds else train)(cfg)
        if not given:
            print("next: python visualize_attention.py, and: python cikd.py --compare")
    socket.setdefaulttimeout(20)                # seconds until a silent download is given up
    return run_command("cikd", body)

if __name__ == "__main__" and (not hasattr(sys, "ps1") or sys.argv[0].endswith("cikd.py")):
    sys.exit(main())                            # but not where cells are run one by one

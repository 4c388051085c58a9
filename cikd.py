"""CIKD, Curriculum Information Knowledge Distillation, in one file.

A light Vision Transformer (ViT) trained on few images is slow to learn what a CNN has built in: to
look at neighbouring pixels first. CIKD lets a trained CNN teach it, the easy lesson first:
  1. ALI, Attention Locality Imitation: the student's self-attention imitates attention maps made
     from the teacher's low-level feature maps. No labels.
  2. LM, Logit Mimicking: the student learns the labels and the teacher's logits.

    python cikd.py                             # generated shapes, no download: minutes on two cores
    python cikd.py --dataset cifar10           # ViT-Tiny taught by ResNet-18: wants a GPU
    python cikd.py --compare --seeds 0 1 2     # scratch, kd, joint and cikd side by side
    torchrun --nproc-per-node 4 cikd.py --dataset cifar10       # four GPUs, after --method teacher
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
import pickle
import re
import shlex
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    """Pre-norm transformer block in two halves, x [B, N+1, D]: ALI looks at q, k, v in between."""
    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))
        self.drop_path = StochasticDepth(drop_path, "row")

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.attn.project(self.norm1(x))         # each [B, H, N+1, d]

    def forward(self, x: torch.Tensor, qkv: tuple) -> torch.Tensor:
        x = x + self.drop_path(self.attn(*qkv))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """2-D sine-cosine positions (MAE): a quarter of D for each of sin x, cos x, sin y, cos y."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency                         # [g, D/4]
    wave = torch.cat([angle.sin(), angle.cos()], 1)                         # [g, D/2]
    x = wave.expand(grid, grid, -1)                                         # [g, g, D/2]
    y = wave[:, None].expand(grid, grid, -1)                                # [g, g, D/2]
    patches = torch.cat([x, y], 2).flatten(0, 1)                            # [g, g, D] -> [N, D]
    return torch.cat([torch.zeros(1, width), patches])[None]                # [1, N+1, D]; CLS: 0


STUDENTS = {        # the model's shape; what goes with it, where the user gives no other
    "vit_tiny": dict(depth=12, width=192, heads=3, teacher="resnet18", lr=1e-3),    # paper's shape
    "vit_micro": dict(depth=6, width=64, heads=4, teacher="resnet20", lr=2e-3),     # for a CPU
}


class VisionTransformer(nn.Module):
    """ViT with a CLS token. The defaults are timm's vit_tiny_patch16_224: same names and logits.
    Positions start as sines and cosines and are learned from there, as all other weights."""
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
            qkv = block.qkv(x)                                              # each [B, H, N+1, d]
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
        if image_size <= 64:
            self.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.depth = len(counts)
        channels = width
        for i, count in enumerate(counts):
            out = width * 2 ** i
            layer = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None
                if channels != out:
                    shortcut = nn.Sequential(
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
        tapped = {}
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))                   # [B, C, h, w]
        last = self.depth if classify else max(taps)
        for i in range(1, last + 1):
            x = self.get_submodule(f"layer{i}")(x)                          # [B, C, h, w]
            if i in taps:
                tapped[i] = x
        logits = self.fc(x.mean((2, 3))) if classify else None              # [B, C] -> [B, K]
        return logits, tapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_taps(x)[0]


# %% 3. Stage 1, ALI: attention locality imitation -------------------------------------------------
def teacher_attention(features: torch.Tensor, grid: int, heads: int, tau=0.2) -> torch.Tensor:
    """The teacher's attention surrogate (ours): [B, C, h, w] -> [B, H, N, N], rows sum to 1. Which
    patches look alike to the CNN? Bring the map to the patch grid, give each head a group of
    channels, remove what all places share, and compare every two of them: softmax over keys of
    cosine / tau. A map coarser than the grid is enlarged, which makes neighbours alike.
    Which group of channels a head gets is arbitrary: neither channels nor heads have an order, and
    before training all heads are alike, so each may take up what its group shows."""
    mode = "area" if features.shape[-1] > grid else "bilinear"      # "area" is average pooling
    features = F.interpolate(features.float(), grid, mode=mode)             # [B, C, g, g]
    maps = []
    with torch.autocast(features.device.type, enabled=False):       # small tau magnifies rounding
        for group in features.flatten(2).tensor_split(heads, dim=1):            # [B, ~C/H, N]
            group = group - group.mean(2, keepdim=True)     # without what all places share
            unit = F.normalize(group, dim=1)                # each place's vector has length 1
            cosine = unit.transpose(1, 2) @ unit                                # [B, N, N]
            maps.append((cosine / tau).softmax(-1))                             # over keys
    return torch.stack(maps, 1)                                     # [B, H, N, N]


def relation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log softmax(a bᵀ / sqrt(d)) over keys (MiniLMv2): twice [B, H, N, d] -> [B, H, N, N]."""
    scale = a.shape[-1] ** -0.5                             # 1 / sqrt(d)
    scores = (a * scale) @ b.transpose(-2, -1)              # [B, H, N, N]
    return scores.float().log_softmax(-1)


def ali_loss(qkv: tuple, target: torch.Tensor, relations: str = "qk+vv") -> torch.Tensor:
    """ALI of a student block, q, k, v each [B, H, N+1, d], and a teacher layer's maps [B, H, N, N]:
    KL(teacher || student), summed over keys and relations, averaged over images, heads and queries,
    as in the paper. There q-k imitates q-k, v-v imitates v-v; here both imitate one surrogate."""
    q, k, v = (t[:, :, 1:] for t in qkv)                            # patches only: no CLS in a CNN
    sides = {"qk": (q, k), "vv": (v, v)}
    entropy = -torch.xlogy(target, target).sum(-1).mean()           # KL is cross-entropy minus this
    loss = 0
    for name in relations.split("+"):
        a, b = sides[name]
        cross_entropy = -(target * relation(a, b)).sum(-1).mean()
        loss = loss + (cross_entropy - entropy)
    return loss


def color_jitter(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Brightness, contrast, saturation of images [B, 3, S, S] in [-1, 1], each times a random
    factor between 1 - strength and 1 + strength, one for each image."""
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    brightness, contrast, saturation = factors              # each [B, 1, 1, 1]
    images = (images + 1) / 2 * brightness
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    return images.clamp(0, 1) * 2 - 1


# %% 4. Stage 2, LM: logit mimicking, beside the cross-entropy with the labels ---------------------
def dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=4.0, temperature=1.0) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao 2022) of logits [B, K], labels [B], batch mean:
    T² (alpha TCKD + beta NCKD). TCKD: the label against the rest; NCKD: the rest among themselves.
    In log space, so that no gradient overflows: the rest counts as one class, whose logit is the
    logsumexp of theirs."""
    def split(z):   # -> log b [B, 2] = (log p_y, log(1 - p_y)), log r [B, K-1] of the other classes
        if z.dtype != torch.float64:
            z = z.float()
        z = z / temperature
        column = torch.arange(z.shape[1] - 1, device=z.device)      # [K-1]: 0, 1, ..., K-2
        rest = column + (column >= labels[:, None])     # [B, K-1]: all classes but the label
        other = z.gather(1, rest)                                   # [B, K-1]: their logits
        label = z.gather(1, labels[:, None])[:, 0]                  # [B]
        both = torch.stack([label, other.logsumexp(1)], 1)          # [B, 2]: label, rest
        return both.log_softmax(1), other.log_softmax(1)

    log_b, log_r = split(logits)
    log_b_teacher, log_r_teacher = split(teacher_logits)
    tckd = F.kl_div(log_b, log_b_teacher, reduction="batchmean", log_target=True)
    nckd = F.kl_div(log_r, log_r_teacher, reduction="batchmean", log_target=True)
    return temperature ** 2 * (alpha * tckd + beta * nckd)


# %% 5. Curriculum: which loss in which epoch ------------------------------------------------------
class Stage(NamedTuple):
    """What is learned at once: at least one of ali, labels and logits."""
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
    """"0:1,last:2" -> [(0, 1), (5, 2)] for vit_micro, whose last block is 5: blocks of the student,
    from 0, and layers of the ResNet, from 1."""
    text = pairs.replace("last", str(STUDENTS[student]["depth"] - 1))
    parsed = []
    for pair in text.split(","):
        block, layer = pair.split(":")
        parsed.append((int(block), int(layer)))
    return parsed


def step_loss(stage: Stage, cfg: Config, model, teacher, view, labels, stage_epoch) -> tuple:
    """One step's loss and, for the log, its terms [3]: ALI, CE, DKD. `model`: who learns.
    view: float [B, 3, S, S] in [-1, 1]; teacher and model see the same one, but in stage 1 the
    model sees it in other colours. labels: [B]; ALI does not look at them. stage_epoch: how many
    epochs of this stage are over; a tensor, so that step_loss compiles once."""
    pairs = parse_pairs(cfg.pairs, cfg.student) if stage.ali else []
    blocks = [block for block, _ in pairs]
    layers = [layer for _, layer in pairs]
    grid = cfg.image_size // cfg.patch_size
    classify = stage.labels or stage.logits
    if stage.ali or stage.logits:
        with torch.no_grad():       # without stage.logits the teacher ends at the last of `layers`
            teacher_logits, features = teacher.forward_taps(view, layers, classify=stage.logits)
    if stage.ali and not classify:  # stage 1: in other colours than the teacher
        view = color_jitter(view, cfg.jitter)
    logits, qkv = model.forward_taps(view, blocks, classify=classify)
    ali = ce = dkd = view.new_zeros(())                 # what a stage does not learn stays 0
    for block, layer in pairs:
        target = teacher_attention(features[layer], grid, cfg.heads, cfg.tau)
        ali = ali + ali_loss(qkv[block], target, cfg.relations)
    if stage.labels:
        ce = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)       # 0.1: paper
    lm = ce
    if stage.logits:
        dkd = dkd_loss(logits, teacher_logits, labels,
                       cfg.dkd_alpha, cfg.dkd_beta, cfg.dkd_temperature)
        weight = 1.0
        if cfg.ramp_epochs:
            weight = (stage_epoch / cfg.ramp_epochs).clamp(max=1)
        lm = ce + weight * dkd
    loss = ali + lm                                     # stage 1: ali; stage 2: lm; joint: both
    return loss, torch.stack([ali, ce, dkd]).detach()


# %% 6. Settings -----------------------------------------------------------------------------------
class CIKDError(Exception):
    """Something the user can mend. `run_command` prints it as one line; exit code 2."""


def need(condition, message: str) -> None:
    if not condition:
        raise CIKDError(message)


def one_line(error: BaseException) -> str:
    text = re.sub(r"\033\[[0-9;]*m", "", str(error))        # torch colours some of its messages
    return " ".join(text.split()) or type(error).__name__


SMALL = dict(image_size=32, patch_size=4, student="vit_tiny", teacher_epochs=60, ali_epochs=100,
             epochs=300, batch_size=128, crop="pad")
PHOTO = SMALL | dict(image_size=224, patch_size=16, teacher_epochs=100, crop="resized")
DATASETS = {            # what each has where the user gives no other
    "shapes": dict(image_size=24, patch_size=4, student="vit_micro", teacher_epochs=4, ali_epochs=4,
                   epochs=20, batch_size=32, crop="none"),
    "cifar10": SMALL,
    "cifar100": SMALL,
    "fashion_mnist": SMALL,
    "stl10": PHOTO | dict(image_size=96, patch_size=8),
    "folder": PHOTO,
    "pets": PHOTO,
    "aircraft": PHOTO,
    "dtd": PHOTO,
    "imagenette": PHOTO,
}
PATIENT = 100           # from so many epochs on strong views are the default (measured)
TEACHER_LR = 0.1        # of a fresh teacher
FINE_TUNING_LR = 0.01   # of one that starts from ImageNet weights


def setting(default, help: str, low=None, high=math.inf, choices=()):
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    """Every setting. None: from the data set's row, or as the help says in brackets; where neither
    has a value (train_size, seeds, ...), nothing is asked for."""
    dataset: str = setting("shapes", "images to learn from", choices=DATASETS)
    data_dir: str = setting(None, "where images are, or are downloaded to; folder: "
                            "DIR/{train,test|val|valid}/CLASS/*.png [data]")
    train_size: int = setting(None, "number of training images to use, class-balanced", 2)
    holdout: int = setting(None, "number of training images to test on instead, to choose by", 2)
    data_seed: int = setting(0, "seed of what runs share: shapes, subsets and teacher", 0, 1e9)
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
    method: str = setting("cikd", "scratch: labels only; kd: LM all along; joint: both all along; "
                          "teacher: the ResNet, by --teacher-epochs, --data-seed", choices=METHODS)
    compare: bool = setting(False, "run all but teacher; prints a table, keeps comparison.csv")
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
    lr: float = setting(None, "peak [1e-3: paper; vit_micro 2e-3: ablation; teacher 0.1, "
                        "from ImageNet weights 0.01]", 1e-6)
    warmup: float = setting(0.1, "share of a stage in which the rate rises (paper: 0.05)", 0, 1)
    weight_decay: float = setting(0.05, "(paper) not of biases, norms, positions (ours)", 0)
    seed: int = setting(0, "seed of the student, the order of images, the views", 0, 1e9)
    seeds: tuple = setting(None, "repeat with each of these; mean and standard deviation", 0, 1e9)
    output_dir: str = setting("runs", "where runs are kept")
    run_name: str = setting(None, "folder of the run [made from the settings given]")
    snapshot_every: int = setting(0, "epochs between copies for --gif, 11 or 0.6 MB each", 0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"))
    overwrite: bool = setting(False, "start again where a run of this name lies")


GROUPS = {              # the first setting of each group of --help
    "dataset": "data", "student": "models", "method": "method", "epochs": "training",
    "output_dir": "where and how"}
RUN_SETTINGS = ("data_dir", "compare", "seeds", "output_dir", "run_name", "snapshot_every",
                "device", "compile", "overwrite")       # where and how; the others change results
RESULT_SETTINGS = [f.name for f in fields(Config) if f.name not in RUN_SETTINGS]
TEACHER_SETTINGS = ["dataset", "data_seed", "image_size", "crop", "teacher", "teacher_epochs",
                    "pretrained_teacher", "batch_size", "lr", "warmup"]     # of these, a teacher's
AS_BEFORE = dict(augment="none")        # settings that runs of earlier versions did not store


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(cfg: Config) -> Config:
    """A checked copy, filled in by `fill`. Raises CIKDError that names the setting."""
    cfg = replace(cfg)
    check_each(cfg)
    fill(cfg)
    check_together(cfg)
    return cfg


def check_each(cfg: Config) -> None:
    """Each value given is a choice, within its bounds and of its form."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        low = f.metadata["low"]
        high = f.metadata["high"]
        choices = f.metadata["choices"]
        for v in value if isinstance(value, (tuple, list)) else [value]:
            if v is None:
                continue
            need(low is None or low <= v <= high,           # refuses nan too
                 f"{option(f.name)}: {v} must be from {low} to {high}")
            need(not choices or v in choices, f"{option(f.name)}: {v} is not in {[*choices]}")
    need(re.fullmatch(r"[A-Za-z0-9_=+,-][A-Za-z0-9._=+,-]*", cfg.run_name or "_"),
         f"--run-name: {cfg.run_name!r} must be of letters, digits and ._=+,- alone")
    need(re.fullmatch(r"((\d{1,3}|last):\d{1,3},)+", cfg.pairs + ","),
         f"--pairs: {cfg.pairs!r} is not BLOCK:LAYER,BLOCK:LAYER,...")


def fill(cfg: Config) -> None:
    """Replace None in `cfg` by what its data set, student or method has, where one of them has it,
    and a leading ~ in a path by the home folder."""
    row = DATASETS[cfg.dataset]
    if cfg.epochs and cfg.ali_epochs is None:   # only the total is given: ALI keeps its share of it
        cfg.ali_epochs = max(1, round(cfg.epochs * row["ali_epochs"] / row["epochs"]))
    defaults = row | STUDENTS[cfg.student or row["student"]]
    if cfg.method == "teacher":
        defaults["lr"] = FINE_TUNING_LR if cfg.pretrained_teacher else TEACHER_LR
    if cfg.dataset != "shapes":
        defaults["data_dir"] = "data"
    for f in fields(cfg):                       # not all of `defaults`: a depth is no setting
        if getattr(cfg, f.name) is None:
            setattr(cfg, f.name, defaults.get(f.name))
    if cfg.method == "teacher":
        cfg.seed = cfg.data_seed
        cfg.epochs = cfg.teacher_epochs
    if cfg.augment is None:
        cfg.augment = "trivial" if cfg.epochs >= PATIENT else "none"
    for name in ("data_dir", "output_dir", "teacher_checkpoint"):
        if getattr(cfg, name):
            setattr(cfg, name, os.path.expanduser(getattr(cfg, name)))


def check_together(cfg: Config) -> None:
    """What is given fits together, and is there."""
    need(cfg.dataset != "shapes" or not cfg.data_dir,
         "--data-dir: shapes are generated, not read; for images of your own add --dataset folder")
    need(cfg.image_size % cfg.patch_size == 0 and cfg.image_size > cfg.patch_size,
         f"--patch-size: {cfg.patch_size} does not cut --image-size {cfg.image_size} evenly, into "
         "2 x 2 or more")
    student = STUDENTS[cfg.student]
    counts, channels = TEACHERS[cfg.teacher]
    need(student["width"] % cfg.heads == 0 and cfg.heads <= channels,
         f"--heads: {cfg.heads} does not divide {student['width']} or is above the channels of the "
         "teacher's layer1")
    for block, layer in parse_pairs(cfg.pairs, cfg.student):
        need(block < student["depth"] and 1 <= layer <= len(counts),
             f"--pairs: {block}:{layer} is not BLOCK:LAYER, blocks 0 to {student['depth'] - 1} or "
             f"last, layers 1 to {len(counts)}")
    before, after = METHODS[cfg.method]
    need(before == after or cfg.ali_epochs < cfg.epochs,
         f"--epochs: {cfg.epochs} must be above --ali-epochs, {cfg.ali_epochs}: {after.name} comes "
         "after it")
    if cfg.pretrained_teacher:
        need(cfg.teacher in torchvision.models.list_models() and cfg.image_size > 64
             and not cfg.teacher_checkpoint,
             "--pretrained-teacher: fits --teacher resnet18 or resnet34 and --image-size above 64 "
             "only, and no --teacher-checkpoint")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    need(there.get(cfg.device, True), f"--device: torch finds no {cfg.device}; use cpu or auto")


def default_name(cfg: Config) -> str:
    """Folder of a run: data set, method, every setting given, seed; a long one ends in a hash."""
    data = cfg.dataset
    if data == "folder":
        data = os.path.basename(os.path.abspath(cfg.data_dir or "data")).lstrip(".")
    given = []
    for setting_name in RESULT_SETTINGS:
        value = getattr(cfg, setting_name)
        named_anyway = setting_name in ("dataset", "method", "seed")
        if value != getattr(Config, setting_name) and not named_anyway:
            given.append(f"{setting_name}={value}")
    name = "-".join([data, cfg.method, *given, f"seed{cfg.seed}"])
    if len(name) > 150:
        name = f"{name[:60]}-{hash_of(os.fsencode(name))[:8]}"
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


class Source(NamedTuple):
    """Images before they are read, so that only those chosen are. labels: int64 [n];
    read(indices [m]) -> uint8 [m, 3, S, S]."""
    labels: torch.Tensor
    classes: list[str]
    read: Callable


FORMS = ["disc", "triangle", "square", "star", "flower"]
SHAPES = FORMS + [f"hollow {form}" for form in FORMS]


def make_shapes(n: int, seed: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """n images of the ten SHAPES, uint8 [n, 3, size, size], and labels [n]: a demonstration only.
    Random colour, place, size and modest turn, over a coloured, noisy ground, under a thin line."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    def polygon(k, phi):    # radius of a regular k-gon in direction phi, 1 at its corners
        return math.cos(math.pi / k) / torch.cos(phi % (2 * math.pi / k) - math.pi / k)

    labels = torch.arange(n) % len(SHAPES)
    pixels = torch.arange(size) + 0.5
    dx = pixels - size * uniform(0.4, 0.6, 1, 1)            # [n, 1, S], from the shape's centre
    dy = pixels[:, None] - size * uniform(0.4, 0.6, 1, 1)   # [n, S, 1]
    rho = torch.hypot(dx, dy)                               # [n, S, S]
    phi = torch.atan2(dy, dx) + uniform(-0.3, 0.3, 1, 1)    # [n, S, S]
    disc = torch.ones_like(phi)
    star = 1.1 - 0.6 * (2 * (phi * 5 / (2 * math.pi) % 1) - 1).abs()
    flower = 0.65 + 0.35 * torch.cos(4 * phi)
    forms = torch.stack([disc, polygon(3, phi) * 1.2, polygon(4, phi) * 1.1, star, flower])
    radius = uniform(0.3, 0.42, 1, 1)
    outline = forms[labels % len(FORMS), torch.arange(n)] * radius * size   # [n, S, S]
    mask = (outline - rho + 0.5).clamp(0, 1)                # 1 inside, one soft pixel at the edge
    core = (outline * 0.55 - rho + 0.5).clamp(0, 1)
    hollow = (labels >= len(FORMS))[:, None, None]
    mask = (mask - core * hollow)[:, None]                  # [n, 1, S, S]
    ground = F.interpolate(uniform(-0.15, 0.15, 3, 4, 4), size=size, mode="bilinear")
    ground = ground + uniform(0, 1, 3, 1, 1)
    colour = (ground.mean((2, 3), keepdim=True) + uniform(0.35, 0.65, 3, 1, 1)) % 1
    images = ground + mask * (colour - ground)              # [n, 3, S, S]
    angle = uniform(0, math.pi, 1, 1)
    offset = uniform(-0.4, 0.4, 1, 1) * size
    line = (dx * torch.cos(angle) + dy * torch.sin(angle) - offset).abs() < 0.5     # [n, S, S]
    images = torch.where(line[:, None], uniform(0, 1, 3, 1, 1), images)
    images = images + uniform(-0.06, 0.06, 3, size, size)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def shapes_source(cfg: Config, test: bool) -> Source:
    images, labels = make_shapes(1000 if test else 3000, 2 * cfg.data_seed + test, cfg.image_size)
    return Source(labels, SHAPES, lambda chosen: images[chosen])


def upright(image: Image.Image, name="image") -> Image.Image:
    """Decoded and turned as the camera's EXIF block says; where that is broken, as it was decoded.
    Raises CIKDError for grey of more than 8 bits, whose range nobody knows."""
    image.load()                                # a broken image is no matter of EXIF
    need(image.mode[0] not in "IF", f"{name}: grey of more than 8 bits; convert it, from 16 for "
         "example by Image.fromarray((numpy.asarray(image) / 65535 * 255).astype('uint8'))")
    try:
        return ImageOps.exif_transpose(image)
    except Exception:                           # Pillow raises whatever a broken block leads to
        return image.copy()


def open_image(path: str | Path) -> Image.Image:
    """Read an image file whole and turn it upright. Raises CIKDError with its name."""
    try:
        with Image.open(path) as image:
            return upright(image, path)
    except (CIKDError, MemoryError):
        raise
    except Exception as error:                  # Pillow raises whatever a broken file leads to
        raise CIKDError(f"{path}: not a readable image ({one_line(error)})") from None


def to_rgb(image: Image.Image, size: int) -> torch.Tensor:
    """PIL image -> uint8 [3, size, size]: RGB, alpha over white, middle square, resized."""
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.BICUBIC)
    return torchvision.transforms.functional.pil_to_tensor(image)           # [3, S, S]


def prepare(image: Image.Image | str | Path, size: int) -> torch.Tensor:
    """A picture, or its file, turned upright -> float [1, 3, size, size] in [-1, 1], ready for a
    model. Raises CIKDError for a file that is none, and for grey of more than 8 bits."""
    image = upright(image) if isinstance(image, Image.Image) else open_image(image)
    return to_float(to_rgb(image, size)[None])


def decode(get: Callable, chosen: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """get(i) -> PIL image, for each i of chosen [m] -> uint8 [m, 3, size, size]. CIKDError."""
    try:
        images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(one_line(error)) from None
    broken = []

    def read(place):
        try:
            images[place] = to_rgb(get(int(chosen[place])), size)
        except MemoryError:
            raise
        except Exception as error:
            broken.append(one_line(error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:    # Pillow works outside the interpreter lock
        for done, _ in enumerate(pool.map(read, range(len(chosen))), 1):
            if done % 100 == 0 or done == len(chosen):
                status(f"reading {name}: {done} of {len(chosen)} images", done == len(chosen))
    need(not broken, f"{name}: mend or remove {len(broken)} images: {'; '.join(broken[:10])}")
    return images


def status(text: str, last: bool = True) -> None:
    """A line that replaces itself on a terminal; when piped, only the last one is printed."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


def class_folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.glob("[!.]*") if p.is_dir())


def folder_source(cfg: Config, test: bool) -> Source:
    """DIR/train, or the first of DIR/test, val and valid that has class folders. CIKDError."""
    home = Path(cfg.data_dir)
    classes = class_folders(home / "train")
    parts = ["test", "val", "valid"] if test else ["train"]
    path = next((home / part for part in parts if class_folders(home / part)), home / parts[0])
    there = class_folders(path)
    or_else = "; or give --holdout" if test else ""
    need(there and len(classes) > 1, f"{path}: {len(there)} class folders; --dataset folder reads "
         f"two or more train/CLASS/ and test/CLASS/ (or val, valid) in --data-dir{or_else}")
    found = glob.glob(os.path.join(glob.escape(str(path)), "*", "**", "*"), recursive=True)
    found = [Path(file) for file in found if os.path.isfile(file)]
    endings = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif")
    files = sorted(file for file in found if file.suffix.lower() in endings)
    if len(files) < len(found):
        print(f"{path}: skips {len(found) - len(files)} files, not {' '.join(endings)}", flush=True)
    class_of = [file.relative_to(path).parts[0] for file in files]
    wrong = set(there) - (set(classes) & set(class_of))
    need(not wrong, f"{path} or {home / 'train'}: has no images of {', '.join(sorted(wrong))}")
    labels = torch.tensor([classes.index(name) for name in class_of])
    return Source(labels, classes, lambda chosen: decode(
        lambda i: open_image(files[i]), chosen, cfg.image_size, str(path)))


class Published(NamedTuple):
    """How to get a data set from torchvision."""
    maker: str                      # torchvision's class
    labels: str                     # its attribute that holds the labels
    train: list[dict]               # arguments of each part of the training set
    test: list[dict]                # and of the test set
    counts: tuple[int, int]         # images of both
    archive: str                    # what to download by hand
    place: tuple = ()               # folders under --data-dir that it belongs into


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
PUBLISHED = {
    "cifar10": Published(
        "CIFAR10", "targets", [dict(train=True)], [dict(train=False)], (50000, 10000),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": Published(
        "CIFAR100", "targets", [dict(train=True)], [dict(train=False)], (50000, 10000),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "fashion_mnist": Published(
        "FashionMNIST", "targets", [dict(train=True)], [dict(train=False)], (60000, 10000),
        "https://github.com/zalandoresearch/fashion-mnist", ("FashionMNIST", "raw")),
    "stl10": Published(
        "STL10", "labels", [dict(split="train")], [dict(split="test")], (5000, 8000),
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
    "pets": Published(
        "OxfordIIITPet", "_labels", [dict(split="trainval")], [dict(split="test")], (3680, 3669),
        f"images.tar.gz and annotations.tar.gz from {OXFORD}pets/", ("oxford-iiit-pet",)),
    "aircraft": Published(
        "FGVCAircraft", "_labels", [dict(split="trainval")], [dict(split="test")], (6667, 3333),
        f"{OXFORD}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),
    "dtd": Published(
        "DTD", "_labels", [dict(split="train"), dict(split="val")], [dict(split="test")],
        (3760, 1880), f"{OXFORD}dtd/download/dtd-r1.0.1.tar.gz", ("dtd",)),
    "imagenette": Published(
        "Imagenette", "_samples", [dict(size="320px")], [dict(size="320px", split="val")],
        (9469, 3925), "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"),
}


@contextmanager
def naming_the_archive(cfg: Config):
    """Whatever goes wrong with a published set becomes a CIKDError that says what to get."""
    published = PUBLISHED[cfg.dataset]
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:                  # torchvision raises whatever a broken copy leads to
        place = Path(cfg.data_dir, *published.place)
        raise CIKDError(f"{cfg.dataset}: neither whole in {cfg.data_dir} nor downloaded: "
                        f"{one_line(error)}; delete what is half extracted, put "
                        f"{published.archive} into {place} and run again; or --dataset shapes"
                        ) from None


def published_source(cfg: Config, test: bool) -> Source:
    """A torchvision data set, downloaded if it is not there. Raises CIKDError."""
    published = PUBLISHED[cfg.dataset]
    maker = getattr(torchvision.datasets, published.maker)
    name = f"{cfg.dataset}, {'test' if test else 'train'}"
    with naming_the_archive(cfg):
        parts = [maker(cfg.data_dir, download=True, **arguments)
                 for arguments in (published.test if test else published.train)]
        images = torch.utils.data.ConcatDataset(parts)
        count = published.counts[1 if test else 0]
        need(len(images) == count, f"{len(images)} images where {count} belong")
        labels = [label for part in parts for label in getattr(part, published.labels)]
        if published.labels == "_samples":      # of (path, label)
            labels = [label for _, label in labels]
        classes = [c if isinstance(c, str) else c[0] for c in parts[0].classes]     # or synonyms

    def read(chosen):
        with naming_the_archive(cfg):
            return decode(lambda i: images[i][0], chosen, cfg.image_size, name)

    return Source(torch.tensor([int(label) for label in labels]), classes, read)


def balanced_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded order [n] of all images, each prefix as class-balanced as the data allow."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = labels[order]                                   # [n]
    so_far = F.one_hot(drawn).cumsum(0)                     # [n, K], how many of each class
    rank = so_far.gather(1, drawn[:, None])[:, 0]           # [n], in its class, from 1
    return order[rank.argsort(stable=True)]


def choose(cfg: Config, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images to train on, and which to hold out: indices of both. CIKDError where a part
    would lack a class."""
    labels = source.labels
    n = len(labels)
    K = len(source.classes)
    held = cfg.holdout or 0
    count = cfg.train_size or max(n - held, 0)
    if count == n and not held:
        return torch.arange(n), torch.arange(0)
    need(0 < count <= n - held, f"--train-size, --holdout: {n} images cannot give {count} to train "
         f"on and {held} to hold out")
    order = balanced_order(labels, cfg.data_seed)
    last_place = [int((labels[order] == k).nonzero()[-1]) for k in range(K)]    # of each class
    most = min(last_place)
    rare = last_place.index(most)
    need(held <= most, f"--holdout: {source.classes[rare]} has {int((labels == rare).sum())} "
         f"images, and one must be left to train on; hold out {most} at most")
    kept = order[held:held + count]
    held_out = order[:held]
    for name, part in (("--train-size", kept), ("--holdout", held_out)):
        need(len(part) == 0 or len(labels[part].unique()) == K,
             f"{name}: {len(part)} images cannot hold all {K} classes")
    return kept, held_out


def load_dataset(cfg: Config) -> Data:
    """The data of a resolved Config, cut to --holdout and --train-size. Raises CIKDError."""
    sources = dict(shapes=shapes_source, folder=folder_source)
    open_source = sources.get(cfg.dataset, published_source)
    source = open_source(cfg, test=False)
    kept, held = choose(cfg, source)
    test_source = source
    if not cfg.holdout:
        test_source = open_source(cfg, test=True)
        held = torch.arange(len(test_source.labels))
    train = source.read(kept), source.labels[kept]
    test = test_source.read(held), test_source.labels[held]
    hashes = [hash_of(part.contiguous().numpy()) for part in (*train, *test)]
    return Data(train, test, source.classes, hash_of("".join(hashes).encode()))


def draw_crops(n: int, size: int, kind: str) -> torch.Tensor:
    """Random crop and flip of n images: (width, x, height, y) [n, 4]; x, y: the crop's centre, from
    -1 to 1. The whole image is (1, 0, 1, 0). A negative width is a flip."""
    flip = torch.randint(0, 2, (n,)) * 2.0 - 1
    if kind == "pad":                           # whole pixels, so nothing is blurred; grey comes in
        wide = torch.ones(n)
        high = torch.ones(n)
        shift = torch.randint(-(size // 8), size // 8 + 1, (2, n)) * 2 / size
    else:                                       # RandomResizedCrop without its retries
        area = torch.rand(n) * 0.8 + 0.2        # of the image (0.2: paper's ALI; its LM: 0.08)
        ratio = torch.exp((torch.rand(n) * 2 - 1) * math.log(4 / 3))
        wide = (area * ratio).sqrt().clamp(max=1)
        high = (area / ratio).sqrt().clamp(max=1)
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
    column = (wide * place + x)[:, None].expand(B, S, S)                # where each comes from
    row = (high * place + y)[:, :, None].expand(B, S, S)
    return F.grid_sample(images, torch.stack([column, row], 3), align_corners=False)


RANK = 0                # this process
WORLD = 1               # and how many there are; several by torchrun only
if dist.is_available() and dist.is_torchelastic_launched():
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])


def batches(data: Data, cfg: Config, strong: bool = False):
    """One epoch of (view, float [B, 3, S, S]; labels [B]), of several processes this one's share.
    Order and crops are drawn at once, on the CPU, alike in all; `strong` views as they come. A last
    partial batch is dropped unless it is the only one: all steps have one shape."""
    images, labels = data.train
    batch = min(cfg.batch_size, len(labels))
    order = torch.randperm(len(labels))[: len(labels) // batch * batch].to(images.device)
    crops = None
    if cfg.crop != "none":
        crops = draw_crops(len(order), cfg.image_size, cfg.crop).to(images.device)
    if RANK:                                    # draws its own views, colours, depths from here on
        torch.manual_seed(torch.initial_seed() + RANK)
    share = torch.arange(RANK, len(order), WORLD, device=images.device)
    for mine in share.split(batch // WORLD):
        chosen = order[mine]
        view = images[chosen]
        if strong:
            view = strong_views(view)
        crop = None if crops is None else crops[mine]
        yield to_float(view, crop), labels[chosen]


# %% 8. Training: teacher and student take the same path -------------------------------------------
def save(path: Path, content, unless: Path | None = None) -> None:
    """Write rows (.csv), values (.json), tensors (.pt) or bytes, as `path` ends: first beside it,
    in a folder of its own, then renamed, so that what bears its final name is whole. Of several
    processes the first alone writes. Not if `unless` is there by then. Raises CIKDError."""
    if RANK:
        return
    memory = io.BytesIO()
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, content[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
        memory.write(text.getvalue().encode())
    elif path.suffix == ".json":
        memory.write(json.dumps(content, indent=1).encode())
    elif path.suffix == ".pt":
        torch.save(content, memory)
    else:
        memory.write(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", ".", path.parent) as folder:
            beside = Path(folder, path.name)
            beside.write_bytes(memory.getbuffer())
            if unless is None or not unless.exists():
                os.replace(beside, path)
    except OSError as error:
        if unless and unless.exists():          # another job has finished the run and tidied up
            return
        raise CIKDError(f"{path}: cannot be written ({one_line(error)}); when it can be, run the "
                        "same command again: what was saved before is whole; or give another "
                        "--output-dir") from None


def load(path: str | Path, model: nn.Module | None = None) -> dict:
    """What a file holds: tensors and plain values. With `model`: a state dict, which must fit it
    exactly and is loaded into it. Raises CIKDError."""
    try:
        file = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise CIKDError(f"{path}: cannot be read ({one_line(error)})") from None
    try:                                        # weights_only: no pickle that would run code
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CIKDError(f"{path}: not a checkpoint of plain tensors; if it holds a whole model, "
                        "save its state_dict() instead") from None
    except Exception:                           # torch raises whatever a broken file leads to
        raise CIKDError(f"{path}: not a checkpoint, or empty or cut") from None
    if model is None:
        return content
    need(isinstance(content, dict), f"{path}: not a checkpoint: no state dict")
    for key, value in content.items():
        need(not isinstance(value, dict), f"{path}: holds the weights under the key {key!r}; save "
             "what stands there as a file of its own")
    try:
        model.load_state_dict(content)
    except Exception as error:
        raise CIKDError(f"{path}: not a checkpoint that fits; check the model, image and patch size"
                        f" and the classes ({one_line(error)[:250]})") from None
    return content


AGAIN = "start again with --overwrite; if it is a teacher's, delete its folder"


def read_rows(path: Path, epochs: int) -> list[dict]:
    """The rows of a finished run's metrics.csv, one for each epoch. Raises CIKDError where it is
    cut, OSError."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = list(csv.DictReader(text.splitlines()))
    # DictReader gives a row that is too short None as a value, one that is too long None as a key.
    odd = any(None in row or None in row.values() for row in rows)
    whole = text.endswith("\n") and not odd
    need(rows and whole and "accuracy" in rows[0], f"{path}: is empty or cut; {AGAIN}")
    need(len(rows) == epochs, f"{path}: has {len(rows)} of {epochs} epochs; {AGAIN}")
    return rows


def read_facts(folder: Path) -> dict:
    """What a run's settings.json says. Raises CIKDError where it is missing or cut, OSError."""
    path = folder / "settings.json"
    need(path.exists(), f"{folder}: holds no run: there is no settings.json")
    try:
        return AS_BEFORE | json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        raise CIKDError(f"{path}: is empty or cut; {AGAIN}") from None


def seed_torch(*parts) -> None:
    """Seed torch from (seed, model, epoch), so that going on needs no state of a generator."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big"))


def autocast(device: torch.device):
    """bfloat16 on GPUs that compute in it (older ones only emulate it, slowly), else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, batch_size=100) -> torch.Tensor:
    """The class of each of uint8 images [n, 3, S, S], in evaluation mode: int64 [n]."""
    model.eval()
    answers = []
    for part in images.split(batch_size):
        with autocast(images.device):
            answers.append(model(to_float(part)).argmax(1))                 # [B, K] -> [B]
    return torch.cat(answers)


def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size=100) -> float:
    """Top-1 accuracy, percent, of uint8 images [n, 3, S, S] with labels [n]."""
    right = predict(model, images, batch_size) == labels
    return 100 * int(right.sum()) / len(labels)


def worst_classes(model: nn.Module, data: Data, batch_size: int) -> str:
    """The three classes with the lowest accuracy on the test images, each with the class that it
    is most often taken for."""
    images, labels = data.test
    K = len(data.classes)
    answers = predict(model, images, batch_size)
    taken = torch.bincount(labels * K + answers, minlength=K * K).view(K, K)    # [true, answer]
    right = 100 * taken.diag() / taken.sum(1)                   # nan: not among the test images
    right = right.nan_to_num(100).tolist()
    said = []
    for k in sorted(range(K), key=lambda k: right[k]):
        if right[k] < 100 and len(said) < 3:
            wrong = taken[k].clone()
            wrong[k] = 0
            said.append(f"{data.classes[k]} {right[k]:.0f} % (taken for "
                        f"{data.classes[int(wrong.argmax())]})")
    rough = ""
    if len(labels) <= 10 * K:
        rough = f"; with {len(labels)} test images of {K} classes all accuracies are rough"
    return f"worst classes: {', '.join(said) or 'none'}{rough}"


def distance_by_query(maps: torch.Tensor) -> torch.Tensor:
    """How far each query looks on average, in patches: maps [..., N, N] -> [..., N]."""
    grid = math.isqrt(maps.shape[-1])
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).to(maps)       # [N, 2]
    return (maps * torch.cdist(place, place)).sum(-1)


def attention_distance(maps: torch.Tensor) -> torch.Tensor:
    """Mean distance from query to key in patches (Raghu 2021): maps [..., N, N] -> [...]."""
    return distance_by_query(maps).mean(-1)


@torch.no_grad()
def student_maps(student: VisionTransformer, images: torch.Tensor):
    """What patches attend to among patches, in evaluation mode: float [B, 3, S, S] -> [B, H, N, N],
    block by block."""
    student.eval()
    _, tapped = student.forward_taps(images, range(len(student.blocks)), classify=False)
    for q, k, _ in tapped.values():
        yield relation(q[:, :, 1:], k[:, :, 1:]).exp()


def probe(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """64 images, evenly spaced, on which locality is measured; 16 at a time, for maps are large."""
    return images[torch.linspace(0, len(images) - 1, min(64, len(images))).long()].split(16)


def mean_distance(student: VisionTransformer, images: torch.Tensor) -> float:
    """Attention distance in patches, mean of the probe's images, all heads and blocks."""
    total = []
    for part in probe(images):
        for maps in student_maps(student, to_float(part)):
            total.append(attention_distance(maps).mean(1))      # [B, H] -> [B]
    return float(torch.cat(total).mean())


def measure(model: nn.Module, cfg: Config, data: Data) -> dict:
    """What an epoch's row says: accuracy and, of a student, attention distance."""
    found = dict(accuracy=evaluate(model, *data.test, 2 * cfg.batch_size))
    if isinstance(model, VisionTransformer):
        found["attention_distance"] = mean_distance(model, data.test[0])
    return found


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
    decayed = []
    free = []
    for name, p in model.named_parameters():
        if p.ndim == 1 or name in ("cls_token", "pos_embed"):
            free.append(p)
        else:
            decayed.append(p)
    groups = [dict(params=decayed, weight_decay=cfg.weight_decay),
              dict(params=free, weight_decay=0.0)]
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.95), fused=True)         # betas: paper


def average(tensors: list[torch.Tensor]) -> None:
    """What DistributedDataParallel does: each tensor becomes its mean over the processes."""
    flat = nn.utils.parameters_to_vector(tensors)               # one message instead of many
    dist.all_reduce(flat)                                       # the sum, in every process
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(total.view_as(tensor) / WORLD)             # a copy, so that `flat` is freed


def train_epoch(model, teacher, optimizer, loss_fn, cfg: Config, data: Data, plan: list[Stage],
                epoch: int) -> dict:
    """Train one epoch, from 0, of `plan`. Returns its row of metrics.csv. CIKDError if a loss or a
    weight is not finite."""
    stage = plan[epoch]
    begin = plan.index(stage)
    length = plan.count(stage)
    device = data.train[0].device
    steps = max(1, len(data.train[1]) // cfg.batch_size)
    start = time.monotonic()
    model.train()
    stage_epoch = torch.tensor(epoch - begin, device=device)
    strong = stage.strong and cfg.augment == "trivial"
    terms_of_steps = []
    seen = 0
    for step, (view, labels) in enumerate(batches(data, cfg, strong), 1):
        progress = (epoch - begin + step / steps) / length      # in this stage, (0, 1]
        rate = learning_rate(progress, cfg.lr, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(device):
            loss, terms = loss_fn(stage, cfg, model, teacher, view, labels, stage_epoch)
        terms_of_steps.append(torch.cat([loss.detach().view(1), terms]))    # stay on the device
        optimizer.zero_grad()
        loss.backward()
        if WORLD > 1:                           # in ALI the head has no gradient, in any process
            average([terms_of_steps[-1], *(p.grad for p in model.parameters()
                                           if p.grad is not None)])
        optimizer.step()
        seen += len(view) * WORLD
        status(f"{stage.name:7} {epoch + 1:3}/{cfg.epochs}  step {step}/{steps}", last=False)
    log = torch.stack(terms_of_steps).cpu().double()    # [steps, 4]; the only wait for the device
    seconds = time.monotonic() - start
    finite = log.isfinite().all() and all(t.isfinite().all() for t in model.state_dict().values())
    need(finite or RANK,                        # the first process speaks for all
         f"{stage.name}, epoch {epoch + 1}: the loss or a weight is not finite; the run's folder "
         "keeps the epoch before, if any; try a smaller --lr (for a teacher: --teacher-checkpoint)")
    loss, ali, ce, dkd = log.mean(0).tolist()
    return dict(stage=stage.name, epoch=epoch + 1, loss=loss, ali=ali, ce=ce, dkd=dkd,
                lr=optimizer.param_groups[0]["lr"], **measure(model, cfg, data), seconds=seconds,
                images_per_second=seen / seconds)


def fit(model, teacher, cfg: Config, data: Data, final: Path) -> None:
    """Train student or teacher and write `final`. After each epoch metrics.csv and last.pt beside
    it are whole; the same call goes on there. If another job writes `final` first, that one counts
    and this one ends. CIKDError."""
    folder = final.parent
    device = data.train[0].device
    loss_fn = step_loss
    if cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda":
        loss_fn = torch.compile(step_loss, dynamic=False)
    plan = [curriculum(cfg.method, epoch, cfg.ali_epochs) for epoch in range(cfg.epochs)]
    rows = []
    if (folder / "last.pt").exists():
        optimizer = make_optimizer(model, cfg)
        rows = go_on(folder / "last.pt", model, optimizer)
        print(f"going on after epoch {len(rows)} of {cfg.epochs}", flush=True)
    for epoch in range(len(rows), cfg.epochs):
        stage = plan[epoch]
        start = time.monotonic()
        if epoch == plan.index(stage):          # the switch: a new stage has a new optimizer
            optimizer = make_optimizer(model, cfg)
        seed_torch(cfg.seed, final.stem, epoch)
        rows.append(train_epoch(model, teacher, optimizer, loss_fn, cfg, data, plan, epoch))
        if WORLD == 1 and final.exists():
            print(f"{final}: another job was faster; its result counts", flush=True)
            return
        weights = model.state_dict()
        if epoch + 1 < cfg.epochs and plan[epoch + 1] != stage:     # the switch comes next
            save(folder / f"student_{stage.name.lower()}.pt", weights, final)
        if cfg.snapshot_every and (epoch + 1) % cfg.snapshot_every == 0:
            half = {name: t.half() for name, t in weights.items()}
            save(folder / "snapshots" / f"epoch_{epoch + 1:04}.pt", half, final)
        save(folder / "metrics.csv", rows, final)
        save(folder / "last.pt", dict(model=weights, optimizer=optimizer.state_dict(), rows=rows),
             final)
        left = (time.monotonic() - start) * (cfg.epochs - epoch - 1) / 60
        shown = "  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()
                          if name not in ("stage", "epoch") and (value or name == "accuracy"))
        status(f"{stage.name:7} {epoch + 1:3}/{cfg.epochs}  {shown}  {left:.0f} min left")
    save(final, model.state_dict(), final)
    save(folder / "metrics.csv", rows)          # a slower job may have put its own there just now
    print(worst_classes(model, data, 2 * cfg.batch_size), flush=True)


def go_on(path: Path, model, optimizer) -> list[dict]:
    """Bring model and optimizer to where last.pt left them. Returns the rows so far. CIKDError."""
    try:
        last = load(path)
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        return last["rows"]
    except (CIKDError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CIKDError(f"{path}: nothing to go on from ({one_line(error)[:150]}); {AGAIN}"
                        ) from None


def build_student(cfg: Config, num_classes: int) -> VisionTransformer:
    row = STUDENTS[cfg.student]
    return VisionTransformer(cfg.image_size, cfg.patch_size, num_classes, row["depth"],
                             row["width"], cfg.heads, cfg.drop_path)


def build_teacher(cfg: Config, num_classes: int, device: torch.device) -> ResNetTeacher:
    teacher = ResNetTeacher(cfg.teacher, num_classes, cfg.image_size)
    if device.type != "mps":                    # where this layout gives wrong gradients
        teacher.to(memory_format=torch.channels_last)           # faster for convolutions
    return teacher.to(device)


def build_model(cfg: Config, data: Data) -> nn.Module:
    """Who learns in this run, as before training."""
    K = len(data.classes)
    device = data.train[0].device
    if cfg.method != "teacher":
        return build_student(cfg, K).to(device)
    teacher = build_teacher(cfg, K, device)
    if cfg.pretrained_teacher:                  # all but the classifier
        weights = torchvision.models.get_model_weights(cfg.teacher).DEFAULT.get_state_dict()
        own = {f"fc.{name}": t for name, t in teacher.fc.state_dict().items()}
        teacher.load_state_dict(weights | own)
    return teacher


def facts_of(cfg: Config, data: Data) -> dict:
    """All that a run's result depends on, but for its teacher's weights."""
    names = TEACHER_SETTINGS if cfg.method == "teacher" else RESULT_SETTINGS
    facts = {name: getattr(cfg, name) for name in names}
    return facts | dict(classes=data.classes, images=data.images_hash)


def final_file(cfg: Config, data: Data) -> Path:
    """Where the trained model will lie. A teacher's folder is named by all that its training
    depends on: students with other settings share it."""
    if cfg.method != "teacher":
        return Path(cfg.output_dir, cfg.run_name, "student.pt")
    facts = facts_of(cfg, data) | dict(teacher_hash=None)
    key = hash_of(json.dumps(facts).encode())[:8]
    return Path(cfg.output_dir, "teachers", f"{cfg.dataset}-{cfg.teacher}-{key}", "teacher.pt")


def teacher_config(cfg: Config) -> Config:
    """The settings of the run that trains the teacher of this one."""
    return resolve(replace(cfg, method="teacher", lr=None, overwrite=False, snapshot_every=0))


def teacher_command(cfg: Config) -> str:
    """The command line that trains the teacher of `cfg`."""
    words = ["python", "cikd.py", "--method", "teacher"]
    for name in [*TEACHER_SETTINGS, "data_dir", "train_size", "holdout", "patch_size",
                 "output_dir"]:
        value = getattr(cfg, name)
        if value != getattr(Config, name) and name != "lr":
            words.append(option(name))
            if value is not True:
                words.append(str(value))
    return shlex.join(words)


def get_teacher(cfg: Config, data: Data, path: Path) -> ResNetTeacher:
    """The frozen teacher at `path`: the user's own, one trained before, or trained now. CIKDError,
    by torchrun also where it is missing."""
    if not cfg.teacher_checkpoint:
        need(WORLD == 1 or path.exists(), "torchrun shares the training of a student; train its "
             f"teacher first: {teacher_command(cfg)}")
        if WORLD == 1:
            train(teacher_config(cfg), data)    # or report the one that is there
    teacher = build_teacher(cfg, len(data.classes), data.train[0].device)
    load(path, teacher)
    if cfg.teacher_checkpoint:
        print(f"teacher: {path}, accuracy {evaluate(teacher, *data.test):.1f} %", flush=True)
    return teacher.eval().requires_grad_(False)         # BatchNorm keeps its statistics


OLD_FILES = (           # what --overwrite removes: the results first, what they are results of last
    "student*.pt", "teacher*.pt", "last.pt", "metrics.csv", "snapshots/*.pt", "figures*/*.png",
    "figures*/*.pdf", "figures*/*.svg", "figures*/explorer.html", "figures*/locality.gif",
    "settings.json")


def refuse_changes(final: Path, facts: dict) -> None:
    """A run goes on with what it was begun with. Raises CIKDError that names what changed."""
    folder = final.parent
    if not (folder / "settings.json").exists():
        need(not final.exists(), f"{folder}: has no settings.json; {AGAIN}")
        return
    stored = read_facts(folder)
    changed = [f"{name} {stored.get(name)} -> {value}" for name, value in facts.items()
               if stored.get(name) != value and name != "teacher_checkpoint"]   # its hash counts
    need(not changed, f"{folder}: was begun with other settings: {', '.join(changed)[:300]}; use "
         "those, another --run-name, or --overwrite to start again")


def open_run(cfg: Config, final: Path, facts: dict, teacher_file: Path | None) -> None:
    """Make the run's folder ready: --overwrite empties it; one that was begun with other facts is
    refused; a new one gets its first file. Raises CIKDError."""
    folder = final.parent
    if cfg.overwrite and RANK == 0:
        for file in [file for pattern in OLD_FILES for file in folder.glob(pattern)]:
            file.unlink()
    if not teacher_file:
        facts = facts | dict(teacher_hash=None)
    elif teacher_file.exists():                 # a finished run can do without
        facts = facts | dict(teacher_hash=hash_of(teacher_file.read_bytes()))
    refuse_changes(final, facts)
    if not (folder / "settings.json").exists():
        place = None
        if teacher_file and cfg.teacher_checkpoint:
            place = os.path.abspath(teacher_file)
        elif teacher_file:                      # one trained here moves with the run
            place = os.path.relpath(teacher_file, folder.parent)
        where = dict(data_dir=cfg.data_dir, teacher_file=place, torch=torch.__version__,
                     device=cfg.device)
        save(folder / "settings.json", facts | where)


def barrier() -> None:
    """By torchrun: wait here until all processes are here."""
    if WORLD > 1:
        dist.barrier()


def warn_if_slow(cfg: Config, n: int) -> None:
    """Say so before a student trains for days. A rough guess: a CPU does 30 billion operations a
    second, and there are six for each weight, token and image."""
    student = STUDENTS[cfg.student]
    weights = 12 * student["depth"] * student["width"] ** 2
    tokens = (cfg.image_size // cfg.patch_size) ** 2 + 1
    days = 6 * weights * tokens * n * cfg.epochs / 30e9 / 86400
    if cfg.device == "cpu" and cfg.method != "teacher" and days > 1:
        fewer = "--train-size 5000 " if n > 5000 else ""
        print(f"settings for a GPU: on a CPU they take about {days:.0f} days. The README's for a "
              f"CPU: {fewer}--image-size 32 --patch-size 4 --student vit_micro --epochs 60 "
              "--batch-size 64", flush=True)


def begin_run(model, cfg: Config, data: Data, final: Path) -> None:
    """Say what a run learns from, and keep the model as it is before its first epoch."""
    folder = final.parent
    n = len(data.train[1])
    few = ""
    if n < 10 * cfg.batch_size:
        few = "; under 10 steps an epoch: try a smaller --batch-size"
    status(f"{folder}: {n} training, {len(data.test[1])} test images, {len(data.classes)} classes, "
           f"{data.train[0].device}{few}")
    if not (folder / "last.pt").exists():
        save(folder / f"{final.stem}_init.pt", model.state_dict())


def report(cfg: Config, final: Path) -> dict:
    """Tidy up a finished run's folder and say what came out. Raises CIKDError."""
    folder = final.parent
    (folder / "last.pt").unlink(missing_ok=True)
    for left_by_a_kill in folder.glob(".*.tmp"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    rows = read_rows(folder / "metrics.csv", cfg.epochs)
    accuracy = float(rows[-1]["accuracy"])
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    print(f"{cfg.method}, seed {cfg.seed}: accuracy {accuracy:.1f} % after {len(rows)} epochs "
          f"({minutes:.1f} min of training); see {folder}", flush=True)
    return dict(accuracy=accuracy, epochs=len(rows), folder=str(folder), minutes=minutes)


def train(cfg: Config, data: Data | None = None) -> dict:
    """Train one model by `cfg`, its teacher first if need be; keep everything in the run's folder.
    Goes on where an unfinished run of this name and these settings stopped, leaves a finished one.
    Returns dict(accuracy: percent, last epoch; epochs; folder; minutes: of training). CIKDError."""
    need(not cfg.compare and not cfg.seeds, "--compare, --seeds: train_many runs several")
    cfg = resolve(replace(cfg, run_name=cfg.run_name or default_name(cfg)))
    if RANK > 0:
        barrier()                               # the first process goes ahead: download, files
    data = data or load_dataset(cfg)
    if cfg.device == "auto":
        cfg.device = "cpu"
        if torch.cuda.is_available():
            cfg.device = "cuda"
        elif torch.backends.mps.is_available():
            cfg.device = "mps"
    if cfg.device == "cuda":
        torch.set_float32_matmul_precision("high")          # TF32
    data = data._replace(train=[t.to(cfg.device) for t in data.train],
                         test=[t.to(cfg.device) for t in data.test])
    n = len(data.train[1])
    batch = min(cfg.batch_size, n)
    need(batch % WORLD == 0, f"--batch-size: {WORLD} processes cannot share {batch} images evenly")
    final = final_file(cfg, data)
    finished = final.exists() and not cfg.overwrite
    facts = facts_of(cfg, data)
    if not cfg.overwrite:
        refuse_changes(final, facts)            # before a teacher is trained
    if not finished:
        warn_if_slow(cfg, n)
    teacher = None
    teacher_file = None
    if any(stage.ali or stage.logits for stage in METHODS[cfg.method]):
        teacher_file = Path(cfg.teacher_checkpoint or final_file(teacher_config(cfg), data))
        if not finished or cfg.teacher_checkpoint:          # what is named must be there
            teacher = get_teacher(cfg, data, teacher_file)
    open_run(cfg, final, facts, teacher_file)
    if not finished:
        seed_torch(cfg.seed, final.stem)
        model = build_model(cfg, data)
        begin_run(model, cfg, data, final)
    if RANK == 0:
        barrier()                               # now the others find all this and follow
    if not finished:
        fit(model, teacher, cfg, data, final)
    barrier()                                   # until the first process has written all
    return report(cfg, final)


def load_student(folder: str | Path) -> tuple[VisionTransformer, list[str], Config]:
    """A finished run's student in evaluation mode, its classes, settings. CIKDError, OSError."""
    folder = Path(os.path.expanduser(folder))
    facts = read_facts(folder)
    need({*RESULT_SETTINGS, "classes", "teacher_hash"} <= facts.keys(),
         f"{folder}: holds a teacher, or a run of another version of cikd.py; name a student's run")
    cfg = Config(**{f.name: facts[f.name] for f in fields(Config) if f.name in facts})
    student = build_student(cfg, len(facts["classes"])).eval()
    load(folder / "student.pt", student)
    return student, facts["classes"], cfg


# %% 9. Command line -------------------------------------------------------------------------------
def train_many(cfg: Config) -> list[dict]:
    """--compare, --seeds: each method with each seed, in one table. Finished ones stay."""
    data = load_dataset(resolve(cfg))
    seeds = cfg.seeds or [cfg.seed]
    need(len(set(seeds)) == len(seeds), "--seeds: one of them is given twice")
    methods = [cfg.method]
    if cfg.compare:
        methods = [name for name in METHODS if name != "teacher"]
    results = []
    for seed in seeds:
        for method in methods:
            name = cfg.run_name and f"{cfg.run_name}-{method}-seed{seed}"
            run = replace(cfg, method=method, seed=seed, seeds=None, compare=False, run_name=name)
            results.append(dict(method=method, seed=seed) | train(run, data))
    what = "comparison" if cfg.compare else f"{cfg.method}-seeds"
    name = default_name(replace(cfg, method=what, seed="_".join(map(str, seeds))))
    path = Path(results[0]["folder"]).parent / (cfg.run_name or name) / "comparison.csv"
    save(path, results)
    print("\nmethod    accuracy (%)  seeds")
    for method in methods:
        values = [result["accuracy"] for result in results if result["method"] == method]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{method:8}  {statistics.mean(values):.1f}{spread:8}  {len(values):5}")
    print(f"see {path}", flush=True)
    return results


def make_parser() -> argparse.ArgumentParser:
    """The command line, generated from Config. It yields only what was given."""
    table = "".join(f"{cell:>15}" for cell in ["", *SMALL])
    for name, row in DATASETS.items():
        table += "\n" + "".join(f"{cell!s:>15}" for cell in [name, *(row[key] for key in SMALL)])
    parser = argparse.ArgumentParser(
        "cikd.py", "python cikd.py [--SETTING VALUE ...]", allow_abbrev=False,
        epilog="paper: its abstract or code; ablation: no other value helped cikd beyond chance"
        f"\n\ndefaults of each data set:\n{table}", argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, f"{message} (python cikd.py --help lists all)")
    types = dict(int=int, float=float, str=str, tuple=int)
    group = parser
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.type == "bool":
            group.add_argument(option(f.name), help=f.metadata["help"], action="store_true")
            continue
        default = "" if f.default is None else f" [{f.default}]"
        group.add_argument(option(f.name), help=f.metadata["help"] + default, type=types[f.type],
                           metavar="|".join(f.metadata["choices"]) or "VALUE",
                           nargs="+" if f.type == "tuple" else None)
    return parser


def refuse_contradictions(given: dict) -> None:
    """What was typed, but would be ignored beside something else that was. Raises CIKDError."""
    need(not {"compare", "method"} <= given.keys(), "--compare: contradicts --method; give one")
    need(not {"seeds", "seed"} <= given.keys(), "--seeds: contradicts --seed; give one")
    if given.get("method") == "teacher":
        ours = {*TEACHER_SETTINGS, *RUN_SETTINGS, "method", "train_size", "holdout", "student",
                "patch_size"} - {"seeds", "run_name"}
        for name in given:
            need(name in ours, f"{option(name)}: not for --method teacher, which takes "
                 "--teacher-epochs and --data-seed; its folder is named by its settings")


def join_processes(cfg: Config) -> None:
    """By torchrun: meet the others, one for each GPU."""
    need(not (cfg.compare or cfg.seeds or cfg.method == "teacher"), "torchrun shares the batches "
         "of one student: run --compare, --seeds and --method teacher by python")
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    backend = "gloo"
    local = None
    if gpus:
        backend = "nccl"
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        need(local.index < gpus, f"torchrun: --nproc-per-node is above the {gpus} GPUs here")
        torch.cuda.set_device(local)            # "cuda" is this one from here on
    hours = timedelta(hours=3)                  # for a download by the first process
    dist.init_process_group(backend, timeout=hours, device_id=local)
    if RANK:
        sys.stdout = open(os.devnull, "w")


NO_MEMORY = "out of memory; use a smaller --batch-size, --image-size or --train-size"
NO_COMPILER = "--compile: torch.compile failed; use --compile off"
MENDS = {               # part of what Python or torch says, or of where that comes from: what to do
    "MemoryError": NO_MEMORY,
    "out of memory": NO_MEMORY,
    "allocate memory": NO_MEMORY,
    "torch._dynamo": NO_COMPILER,
    "torch._inductor": NO_COMPILER,
    "torch.compile": NO_COMPILER,
}


def run_command(prog: str, body: Callable) -> int:
    """Run body(); what the user can mend becomes one line. Returns the exit code: 0, 2 or 130."""
    socket.setdefaulttimeout(20)                # seconds until a silent download is given up
    for stream in (sys.stdout, sys.stderr):     # what a terminal cannot show must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        body()
    except KeyboardInterrupt:
        goes_on = "; the same command (without --overwrite) goes on" if prog == "cikd" else ""
        print(f"\nstopped{goes_on}", flush=True)
        return 130
    except (CIKDError, OSError, MemoryError, RuntimeError) as error:
        message = one_line(error)
        if not isinstance(error, CIKDError):
            said = f"{type(error).__module__}.{type(error).__name__}: {message}"
            mends = [mend for part, mend in MENDS.items() if part in said]
            if isinstance(error, RuntimeError) and not mends:
                raise                           # ours to mend: keep the traceback
            message = f"{mends[0]} ({message[:150]})" if mends else message
        status("", last=False)                  # clears an unfinished line
        print(f"{prog}: error: {message}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    def body():
        given = vars(make_parser().parse_args(argv))
        refuse_contradictions(given)
        cfg = Config(**given)
        if WORLD > 1:
            join_processes(cfg)
        if cfg.compare or cfg.seeds:
            train_many(cfg)
        else:
            train(cfg)
        if not given:
            print("next: python visualize_attention.py, and: python cikd.py --compare")
        if WORLD > 1:
            dist.destroy_process_group()

    return run_command("cikd", body)


if __name__ == "__main__" and (not hasattr(sys, "ps1") or sys.argv[0].endswith("cikd.py")):
    sys.exit(main())                            # but not where cells are run one by one

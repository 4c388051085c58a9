"""Tests of cikd.py: `python -m pytest`, offline, minutes on two cores. The order is the file's."""
import base64
import csv
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
from dataclasses import fields, replace
from pathlib import Path

if __name__ != "__main__":      # tiny runs are fastest on one thread, and two share two cores
    os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._inductor.exc import InvalidCxxCompiler

import cikd
import visualize_attention as va

HERE = Path(cikd.__file__).resolve().parent
TINY = dict(train_size=60, holdout=40, epochs=2, ali_epochs=1, teacher_epochs=1, device="cpu")
ARGS = "--train-size 60 --holdout 40 --epochs 2 --ali-epochs 1 --teacher-epochs 1".split()

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may reach the network, on any machine."""
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)

@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of seconds in a folder of its own."""
    return cikd.Config(output_dir=str(tmp_path / "runs"), **TINY)

def fails(capsys, *argv) -> str:
    """Run the command line, demand one plain line on stderr and exit code 2; return the line."""
    assert cikd.main([str(a) for a in argv]) == 2
    out = capsys.readouterr()
    assert re.fullmatch(r"cikd: error: [^\n]+\n", out.err) and "Traceback" not in out.out + out.err
    return out.err

def run_cli(cwd, *argv, script="cikd.py", **kwargs):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, **kwargs)

def small_student(**kwargs):
    torch.manual_seed(0)
    shape = dict(image_size=32, patch_size=4, num_classes=10, depth=3, width=64, heads=4)
    return cikd.VisionTransformer(**shape | kwargs)

def read_metrics(run) -> list[dict]:
    with open(Path(run) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))

def read_facts(run) -> dict:
    return json.loads((Path(run) / "settings.json").read_text())

def teacher_of(run) -> Path:
    return Path(run).parent / read_facts(run)["teacher_file"]

def equal(one: dict, two: dict) -> bool:
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)

# ---- 1. student

def timm_shapes(image=224, patch=16, classes=1000, depth=12, D=192):
    """Names and shapes of timm's vit_tiny_patch16_224, written down by hand."""
    yield from {"cls_token": (1, 1, D), "pos_embed": (1, (image // patch) ** 2 + 1, D),
                "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
                "norm.weight": (D,), "norm.bias": (D,), "head.weight": (classes, D),
                "head.bias": (classes,)}.items()
    for i in range(depth):
        for name, (out, into) in {"attn.qkv": (3 * D, D), "attn.proj": (D, D),
                                  "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}.items():
            yield f"blocks.{i}.{name}.weight", (out, into)
            yield f"blocks.{i}.{name}.bias", (out,)
        for name in ("norm1", "norm2"):
            yield f"blocks.{i}.{name}.weight", (D,)
            yield f"blocks.{i}.{name}.bias", (D,)

def test_student_has_timms_names_and_shapes():
    student = cikd.VisionTransformer()
    assert {n: tuple(p.shape) for n, p in student.state_dict().items()} == dict(timm_shapes())
    assert sum(p.numel() for p in student.parameters()) == 5_717_416

def to_torchvision(state: dict) -> dict:
    """Our (timm's) parameter names as torchvision.models.VisionTransformer's."""
    rules = [("patch_embed.proj", "conv_proj"), ("cls_token", "class_token"),
             ("pos_embed", "encoder.pos_embedding"), (r"\.norm(\d)", r".ln_\1"),
             (r"blocks\.(\d+)", r"encoder.layers.encoder_layer_\1"), (r"mlp\.fc2", "mlp.3"),
             (r"attn\.qkv\.", "self_attention.in_proj_"), (r"mlp\.fc1", "mlp.0"),
             (r"attn\.proj", "self_attention.out_proj"), (r"^norm", "encoder.ln"),
             ("^head", "heads.head")]
    for old, new in rules:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state

@pytest.mark.parametrize("depth,heads", [(2, 1), (3, 2), (4, 8)])
def test_student_gives_torchvisions_logits(depth, heads):
    student = small_student(depth=depth, heads=heads).double().eval()
    for p in student.parameters():              # away from zeros and ones, so that each one matters
        p.data.normal_(std=0.2)
    theirs = torchvision.models.VisionTransformer(32, 4, depth, heads, 64, 256, num_classes=10)
    theirs.double().eval().load_state_dict(to_torchvision(student.state_dict()), strict=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert (student(x) - theirs(x)).abs().max() < 1e-9

def test_the_qk_relation_is_the_attention_that_the_student_uses():
    attention = cikd.Attention(64, 4).double()
    x = torch.randn(2, 17, 64, dtype=torch.float64)
    q, k, v = attention.project(x)
    maps = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    explicit = attention.proj((maps @ v).transpose(1, 2).reshape(2, 17, 64))
    assert (attention(q, k, v) - explicit).abs().max() < 1e-12
    assert (cikd.relation(q, k).exp() - maps).abs().max() < 1e-6         # computed in float32

def test_taps_stop_early_and_do_not_change_the_logits():
    student, calls = small_student(drop_path=0.2).eval(), []
    assert [b.drop_path.p for b in student.blocks] == pytest.approx([0, 0.1, 0.2])
    for i, block in enumerate(student.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
    x = torch.randn(2, 3, 32, 32)
    logits, tapped = student.forward_taps(x, (0, 2))
    assert torch.equal(logits, student(x)) and list(tapped) == [0, 2]
    assert not torch.equal(student.train()(x), logits) and torch.equal(student.eval()(x), logits)
    assert tapped[2][0].shape == (2, 4, 65, 16)
    calls.clear()
    none, early = student.forward_taps(x, (0, 1), classify=False)
    assert none is None and calls == [0] and torch.equal(early[0][2], tapped[0][2])

# ---- 2. teacher

@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_teacher_gives_torchvisions_logits(name):
    ours, theirs = cikd.ResNetTeacher(name, 1000, 224), getattr(torchvision.models, name)()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    assert (ours.eval()(x) - theirs.eval()(x)).abs().max() < 1e-4

@pytest.mark.parametrize("name,size,shapes", [
    ("resnet20", 32, [(16, 32), (32, 16), (64, 8)]),
    ("resnet56", 32, [(16, 32), (32, 16), (64, 8)]),
    ("resnet18", 32, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    ("resnet34", 224, [(64, 56), (128, 28), (256, 14), (512, 7)])])
def test_teacher_maps(name, size, shapes):
    teacher = cikd.ResNetTeacher(name, 10, size).eval()
    x = torch.randn(1, 3, size, size)
    logits, maps = teacher.forward_taps(x, range(1, len(shapes) + 1))
    assert torch.equal(logits, teacher(x)) and logits.shape == (1, 10)
    assert {i: (m.shape[1], m.shape[2]) for i, m in maps.items()} == dict(enumerate(shapes, 1))

def test_teacher_is_untouched_by_student_training(tiny, monkeypatch):
    """Bit by bit, BatchNorm's running statistics included, through ALI and LM."""
    kept, get = [], cikd.get_teacher
    monkeypatch.setattr(cikd, "get_teacher", lambda *a: kept.append(get(*a)) or kept[-1])
    cikd.train(tiny)
    teacher, path = kept[0]
    assert equal(cikd.load(path), teacher.state_dict())
    trained = [t for name, t in teacher.state_dict().items() if "running_var" in name]
    assert not any(torch.equal(t, torch.ones_like(t)) for t in trained)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())

# ---- 3. ALI

@pytest.mark.parametrize("shape,grid,heads", [
    ((2, 16, 32, 32), 8, 4), ((2, 64, 32, 32), 8, 3), ((1, 32, 8, 8), 8, 5),
    ((2, 128, 7, 7), 14, 3)])
def test_surrogate_rows_sum_to_one(shape, grid, heads):
    torch.manual_seed(0)
    maps = cikd.teacher_attention(torch.randn(shape).relu(), grid, heads, 0.2)
    assert maps.shape == (shape[0], heads, grid ** 2, grid ** 2) and (maps >= 0).all()
    assert torch.allclose(maps.sum(-1), torch.ones(1), atol=1e-5)
    assert (maps.argmax(-1) == torch.arange(grid ** 2)).float().mean() > 0.95   # itself
    assert not torch.equal(maps[:, 0], maps[:, 1])      # each head has channels of its own
    constant = cikd.teacher_attention(torch.ones(shape), grid, heads)
    assert torch.allclose(constant, torch.tensor(1 / grid ** 2))        # uniform, not NaN

def test_surrogate_against_plain_loops():
    torch.manual_seed(1)
    features = torch.randn(1, 6, 4, 4)
    maps = cikd.teacher_attention(features, 4, 2, 0.3)
    for head, channels in enumerate((slice(0, 3), slice(3, 6))):
        vectors = features[0, channels].flatten(1).T.double()
        vectors = vectors - vectors.mean(0)
        for i in range(16):
            scores = F.cosine_similarity(vectors[i], vectors, dim=1) / 0.3
            want = scores.exp() / scores.exp().sum()
            assert torch.allclose(maps[0, head, i].double(), want, atol=1e-6)

@pytest.mark.parametrize("B,H,N,d", [(2, 3, 16, 8), (1, 1, 4, 4), (3, 4, 9, 5), (2, 2, 25, 16)])
def test_ali_loss_is_the_kl_of_torch_distributions(B, H, N, d):
    torch.manual_seed(N)
    q, k, v = torch.randn(3, B, H, N + 1, d).unbind(0)
    target = torch.randn(B, H, N, N).mul(2).softmax(-1)
    want, teacher = [], torch.distributions.Categorical(probs=target)
    for a, b in ((q, k), (v, v)):
        logits = a[:, :, 1:] @ b[:, :, 1:].transpose(2, 3) / d ** 0.5
        student = torch.distributions.Categorical(logits=logits)
        want.append(float(torch.distributions.kl_divergence(teacher, student).mean()))
    assert float(cikd.ali_loss((q, k, v), target)) == pytest.approx(sum(want), rel=1e-4)
    for relation, part in zip(("qk", "vv"), want):
        assert float(cikd.ali_loss((q, k, v), target, relation)) == pytest.approx(part, rel=1e-4)
    moved = torch.cat([torch.randn(B, H, 1, d), q[:, :, 1:]], 2)        # CLS is not asked
    assert float(cikd.ali_loss((moved, k, v), target)) == pytest.approx(sum(want), rel=1e-4)

# ---- 4. LM

def plain_dkd(student, teacher, labels, alpha, beta, T):
    """DKD as its paper writes it, one sample at a time, in float64, with probabilities."""
    def kl(p, q):
        return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))
    total = 0.0
    students, teachers = (student.double() / T).softmax(1), (teacher.double() / T).softmax(1)
    for s, t, y in zip(students, teachers, labels.tolist()):
        rest = [c for c in range(len(s)) if c != y]
        tckd = kl([t[y], t[rest].sum()], [s[y], s[rest].sum()])
        nckd = kl(t[rest] / t[rest].sum(), s[rest] / s[rest].sum())
        total += alpha * tckd + beta * nckd
    return T * T * total / len(labels)

@pytest.mark.parametrize("K,T", [(2, 1.0), (10, 1.0), (10, 4.0), (1000, 2.0)])
def test_dkd_is_the_papers_formula(K, T):
    torch.manual_seed(K)
    student, teacher = torch.randn(2, 5, K).mul(3).unbind(0)
    labels = torch.randint(0, K, (5,))
    got = cikd.dkd_loss(student.double(), teacher.double(), labels, 1.3, 4.2, T)
    want = plain_dkd(student, teacher, labels, 1.3, 4.2, T)
    assert float(got) == pytest.approx(want, rel=1e-9)

@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("dtype,gap", [(torch.float32, 1e4), (torch.bfloat16, 1e3)])
def test_lm_is_finite_when_models_are_sure(K, dtype, gap):
    for student_at, teacher_at in ((0, 0), (1, 0), (0, 1), (1, 1)):     # the label is 0
        student, teacher = torch.zeros(2, 3, K, dtype=dtype).unbind(0)
        student, teacher = student.clone(), teacher.clone()
        student[:, student_at] = teacher[:, teacher_at] = gap
        student.requires_grad_()
        loss, ce, dkd = cikd.lm_loss(student, teacher, torch.zeros(3, dtype=torch.long))
        loss.backward()
        assert torch.stack([loss, ce, dkd]).isfinite().all() and student.grad.isfinite().all()
        if student_at == teacher_at:
            assert float(dkd.detach()) == pytest.approx(0, abs=1e-4)

def test_lm_is_cross_entropy_plus_weighted_dkd():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)
    loss, ce, dkd = cikd.lm_loss(student, teacher, labels, 0.7, beta=2.0)
    smooth = F.one_hot(labels, 10) * 0.9 + 0.01
    want = float(-(smooth * student.log_softmax(1)).sum(1).mean())
    assert float(ce) == pytest.approx(want, rel=1e-5)
    assert float(dkd) == pytest.approx(plain_dkd(student, teacher, labels, 1, 2.0, 1.0), rel=1e-5)
    assert float(loss) == pytest.approx(float(ce + 0.7 * dkd), rel=1e-6)

# ---- 5. curriculum

STAGES = [cikd.ALI, cikd.LM, cikd.JOINT, cikd.LABELS]

def models(**kwargs):
    cfg = cikd.resolve(cikd.Config(**kwargs))
    torch.manual_seed(0)
    student = cikd.build_student(cfg, 10)
    teacher = cikd.ResNetTeacher(cfg.teacher, 10, cfg.image_size).eval().requires_grad_(False)
    return cfg, student, teacher

def step(stage, labels, stage_epoch=2, **kwargs):
    """loss, terms and gradients of one step; DKD's weight is 0.4 by default."""
    cfg, student, teacher = models(**kwargs)
    torch.manual_seed(0)
    view = torch.rand(12, 3, 32, 32) * 2 - 1
    epoch = torch.tensor(stage_epoch)
    loss, terms = cikd.step_loss(stage, cfg, student.train(), teacher, view, labels, epoch)
    loss.backward()
    return loss.detach(), terms, {n: p.grad for n, p in student.named_parameters()}

def test_curriculum_switches_once_at_ali_epochs():
    names = [cikd.curriculum("cikd", epoch, 3).name for epoch in range(6)]
    assert names == ["ALI", "ALI", "ALI", "LM", "LM", "LM"]
    for method, stage in (("scratch", cikd.LABELS), ("kd", cikd.LM), ("joint", cikd.JOINT)):
        assert {cikd.curriculum(method, epoch, 3) for epoch in range(6)} == {stage}

@pytest.mark.parametrize("stage,learned", [(cikd.ALI, [1, 0, 0]), (cikd.LM, [0, 1, 1]),
                                           (cikd.JOINT, [1, 1, 1]), (cikd.LABELS, [0, 1, 0])])
def test_the_loss_is_made_of_what_the_stage_learns(stage, learned):
    loss, terms, _ = step(stage, torch.arange(12) % 10)
    assert not terms.requires_grad              # kept until the epoch ends: must not hold graphs
    assert (terms > 0).int().tolist() == learned
    assert float(loss) == pytest.approx(float(terms[0] + terms[1] + 0.4 * terms[2]), rel=1e-5)

def test_dkds_weight_rises_from_0_to_1_over_ramp_epochs():
    labels = torch.arange(12) % 10
    for epoch, ramp, weight in ((0, 5, 0), (1, 5, 0.2), (5, 5, 1), (40, 5, 1), (0, 0, 1)):
        loss, terms, _ = step(cikd.LM, labels, epoch, ramp_epochs=ramp)
        assert float(loss) == pytest.approx(float(terms[1] + weight * terms[2]), rel=1e-5)

def test_ali_never_uses_the_labels():
    labels = torch.arange(12) % 10
    loss, _, grads = step(cikd.ALI, labels)
    for other in (labels.flip(0), torch.zeros_like(labels)):
        again, _, same = step(cikd.ALI, other)
        assert torch.equal(loss, again)
        assert all(torch.equal(g, same[n]) for n, g in grads.items() if g is not None)
    assert sum(g is not None for g in grads.values()) > 60 and grads["head.weight"] is None
    lm, flipped = step(cikd.LM, labels)[2], step(cikd.LM, labels.flip(0))[2]
    assert not torch.equal(lm["head.weight"], flipped["head.weight"])   # LM does

def test_ali_stops_both_models_as_early_as_it_can():
    cfg, student, teacher = models(pairs="0:1,2:2")
    calls = []
    teacher.layer3.register_forward_hook(lambda *_: calls.append("layer3"))
    for i, block in enumerate(student.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: calls.append(i))
    cikd.step_loss(cikd.ALI, cfg, student, teacher, torch.rand(2, 3, 32, 32),
                   torch.zeros(2).long(), torch.tensor(0))
    assert calls == [0, 1, 2]

def test_each_pair_imitates_its_own_layer():
    """The loss of two pairs is the sum of both alone, and exchanging the layers changes it."""
    ali = [float(step(cikd.ALI, torch.zeros(12).long(), pairs=pairs, jitter=0, drop_path=0)[0])
           for pairs in ("0:1", "last:2", "0:1,last:2", "0:2,last:1")]
    assert ali[2] == pytest.approx(ali[0] + ali[1], rel=1e-5) and abs(ali[3] - ali[2]) > 1e-5

@pytest.mark.parametrize("stage", STAGES[:3])
def test_teacher_and_student_see_the_same_crop(stage):
    cfg, student, teacher = models(jitter=0.3)
    seen = {}
    teacher.conv1.register_forward_pre_hook(lambda _, x: seen.update(teacher=x[0]))
    student.patch_embed.register_forward_pre_hook(lambda _, x: seen.update(student=x[0]))
    view = torch.rand(4, 3, 32, 32) * 2 - 1
    cikd.step_loss(stage, cfg, student, teacher, view, torch.zeros(4).long(), torch.tensor(0))
    assert torch.equal(seen["teacher"], view)
    assert torch.equal(seen["student"], view) == (stage != cikd.ALI)
    grey = [x.mean(1).flatten(1) - x.mean((1, 2, 3))[:, None] for x in (seen["student"], view)]
    assert (F.cosine_similarity(*grey) > 0.95).all()    # the same places, in other colours
    assert torch.allclose(cikd.color_jitter(view, 0.0), view, atol=1e-6)
    same_image = cikd.color_jitter(view[:1].expand(8, -1, -1, -1), 0.4)
    assert len(same_image.mean((1, 2, 3)).unique()) == 8

# ---- 6. settings

BAD = """--dataset mnist|--dataset  --method dino|--method  --student vit_huge|--student
--crop five|--crop  --relations kk|--relations  --device tpu|--device  --seed 1.5|--seed
--seeds 0 -3|--seeds  --train-size 5|10 classes  --train-size 3001|3000 images
--holdout 3000|--holdout  --image-size 30|evenly  --patch-size 32|2 x 2  --jitter -0.1|--jitter
--heads 5|does not divide  --heads 32|channels  --pairs 0:1,|--pairs  --drop-path 1|--drop-path
--teacher-epochs 0|--teacher-epochs  --ali-epochs 16|LM comes after  --epochs 1|LM comes after
--tau 0|--tau  --tau nan|--tau  --method teacher --seeds 0 1|--data-seed  --pairs 0:4|--pairs
--pairs 6:1|--pairs  --pairs first:1|--pairs  --pairs 0:1;1:2|--pairs  --dkd-beta -1|--dkd-beta
--dkd-temperature 0|--dkd-temperature  --epochs ten|--epochs  --batch-size 0|--batch-size
--lr 0|--lr  --warmup 2|--warmup  --run-name a/b|--run-name  --run-name ..|--run-name
--run-name a:b|--run-name  --pretrained-teacher|above 64 only
--teacher-checkpoint missing.pt|missing.pt  --epoch 3|--epoch  --compare --method kd|contradicts
--seeds 1 2 --seed 3|contradicts  extra|extra"""

@pytest.mark.parametrize("case", re.split(r"  |\n", BAD))
def test_bad_arguments(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, says = case.split("|")
    assert says in fails(capsys, *arguments.split())
    assert not list(tmp_path.iterdir())         # nothing was written

def test_help_shows_every_setting_and_default(capsys):
    with pytest.raises(SystemExit):
        cikd.main(["--help"])
    text = capsys.readouterr().out
    for f in fields(cikd.Config):
        option = f"--{f.name.replace('_', '-')}"
        said = re.search(rf"\n  {option}\b(.*?)(?=\n  --|\n\n)", text, re.S)[1]
        assert f.metadata["help"], f.name
        assert f.default is None or f.default is False or f"[{f.default}]" in said, f.name
    assert all(f"\n{name:>15} " in text for name in cikd.DATASETS)

def test_rows_fill_what_is_not_given():
    cfg = cikd.resolve(cikd.Config(dataset="cifar10"))
    assert (cfg.image_size, cfg.patch_size, cfg.student, cfg.heads) == (32, 4, "vit_tiny", 3)
    assert (cfg.teacher, cfg.lr, cfg.epochs, cfg.ali_epochs) == ("resnet18", 1e-3, 300, 100)
    cfg = cikd.resolve(cikd.Config(dataset="cifar10", epochs=30, student="vit_micro"))
    assert (cfg.ali_epochs, cfg.heads, cfg.teacher, cfg.lr) == (10, 4, "resnet20", 2e-3)
    assert cikd.resolve(cikd.Config(epochs=30, ali_epochs=7)).ali_epochs == 7
    assert cikd.resolve(cfg) == cfg             # a resolved one stays as it is
    home = cikd.resolve(cikd.Config(output_dir="~/runs", data_dir="~"))
    assert home.output_dir == str(Path.home() / "runs") and home.data_dir == str(Path.home())
    teacher = cikd.resolve(cikd.Config(method="teacher", data_seed=3, teacher_epochs=9))
    assert (teacher.lr, teacher.seed, teacher.epochs) == (0.1, 3, 9)

def test_pairs_count_blocks_from_0_and_layers_from_1():
    assert cikd.parse_pairs("0:1,last:2", "vit_micro") == [(0, 1), (5, 2)]
    assert cikd.parse_pairs("2:3,last:1", "vit_tiny") == [(2, 3), (11, 1)]

def test_run_names_tell_runs_apart_and_suit_every_file_system():
    settings = {}, dict(seed=1), dict(method="kd"), dict(tau=0.1), dict(train_size=100)
    names = {cikd.default_name(cikd.Config(**given)) for given in settings}
    assert len(names) == 5 and "shapes-cikd-seed0" in names
    odd = cikd.Config(dataset="folder", data_dir="/x/.ä b:c$", teacher_checkpoint="y" * 500)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=+,-]{9,90}", cikd.default_name(odd))

# ---- 7. data

def test_shapes_are_deterministic_and_disjoint():
    images, labels = cikd.make_shapes(200, 0)
    again, _ = cikd.make_shapes(200, 0)
    other, _ = cikd.make_shapes(200, 1)
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32)
    assert torch.equal(images, again) and labels.bincount().tolist() == [20] * 10
    assert len({x.numpy().tobytes() for x in torch.cat([images, other])}) == 400

def make_folder(root: Path, classes=("cat", "dog"), train=8, test=4, size=40, test_name="test"):
    rng = np.random.default_rng(0)
    for split, n in (("train", train), (test_name, test)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size + 6, 3), dtype=np.uint8)
                pixels[..., k % 3] = 255
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root

def folder_config(root, **kwargs):
    settings = dict(dataset="folder", data_dir=str(root), image_size=32, patch_size=8, device="cpu",
                    student="vit_micro")
    return cikd.resolve(cikd.Config(**settings | kwargs))

def test_folder_reads_every_kind_of_image(tmp_path):
    here, side = make_folder(tmp_path) / "train" / "cat", 32
    gray = np.tile(np.linspace(0, 255, side, dtype=np.uint8), (side, 1))
    rgb, clear = np.stack([gray, gray[:, ::-1], gray.T], 2), np.zeros_like(gray)
    image, turned = Image.fromarray(rgb), Image.Exif()
    turned[0x0112] = 6                          # the camera was turned: show it rotated by 90°
    kinds = {                                   # name: what is saved, what is read, mean error
        "grey.png": (Image.fromarray(gray), np.dstack([gray] * 3), 0.1),
        "palette.png": (image.quantize(16), rgb, 25), "cmyk.jfif": (image.convert("CMYK"), rgb, 6),
        "bilevel.png": (Image.fromarray(gray > 127), np.dstack([gray > 127] * 3) * 255, 0.1),
        "clear.png": (Image.fromarray(np.dstack([rgb, clear])), np.full_like(rgb, 255), 0.1),
        "clear_grey.png": (Image.fromarray(np.dstack([gray, clear])), np.full_like(rgb, 255), 0.1),
        "turned.jpg": (image, np.rot90(rgb, -1), 6)}
    for name, (image, _, _) in kinds.items():
        exif = turned.tobytes() if name == "turned.jpg" else b""
        image.save(here / name, format="PNG" if "png" in name else "JPEG", quality=95, exif=exif)
    data = cikd.load_dataset(folder_config(tmp_path))
    images = dict(zip(sorted(p.name for p in here.iterdir()), data.train[0][data.train[1] == 0]))
    for name, (_, want, error) in kinds.items():
        apart = images[name].permute(1, 2, 0).numpy().astype(float) - want
        assert np.abs(apart).mean() < error, name

@pytest.mark.parametrize("image", [
    Image.fromarray(np.full((9, 9), 4000, np.uint16)), Image.fromarray(np.ones((9, 9), np.int32)),
    Image.fromarray(np.full((9, 9), 0.5, np.float32))], ids=["I;16", "I", "F"])
def test_deep_grey_is_refused_by_name(image, tmp_path):
    image.save(make_folder(tmp_path) / "train" / "cat" / "deep.tiff")
    with pytest.raises(cikd.CIKDError, match=r"deep.tiff: grey of more than 8 bits; convert it"):
        cikd.load_dataset(folder_config(tmp_path))

def test_hidden_and_other_files_are_passed_over(tmp_path, capsys):
    here = make_folder(tmp_path) / "train"
    for name in (".ipynb_checkpoints/x.png", "cat/.thumbnails/0.png", "cat/._0.png", "cat/a.heic"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(b"no image")
    data = cikd.load_dataset(folder_config(tmp_path))
    assert data.classes == ["cat", "dog"] and len(data.train[1]) == 16
    assert f"{here}: skips 1 files" in capsys.readouterr().out

@pytest.mark.parametrize("name", ["val", "valid"])
def test_val_serves_as_test_and_labels_are_those_of_train(name, tmp_path, capsys):
    root = make_folder(tmp_path, classes=("ant", "bee", "cat"), test_name=name)
    for path in (root / name / "ant").iterdir():
        path.unlink()
    (root / name / "ant").rmdir()
    (root / "test").mkdir()                     # without class folders
    (root / "test" / "0.png").touch()
    data = cikd.load_dataset(folder_config(root))
    assert data.classes == ["ant", "bee", "cat"] and data.test[1].unique().tolist() == [1, 2]
    assert f"reading {root / name}: 8 of 8 images" in capsys.readouterr().out

def broken(root, n=3):
    make_folder(root)
    for i in range(n):
        path = root / "train" / "cat" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:700 * i])

FAULTS = {
    "no folder": (lambda r: None, "train: 0 class folders"),
    "no test": (lambda r: (make_folder(r) / "test").rename(r / "testing"), "give --holdout"),
    "one class": (lambda r: make_folder(r, classes=("cat",)), "train: 1 class folders"),
    "empty class": (lambda r: (make_folder(r) / "train" / "eel").mkdir(), "no images of eel"),
    "only in test": (lambda r: (make_folder(r, "abc") / "train/c").rename(r / "d"), "images of c"),
    "broken": (broken, "remove 3 images: ")}

@pytest.mark.parametrize("fault", FAULTS)
def test_folder_faults(fault, tmp_path, capsys):
    make, says = FAULTS[fault]
    make(tmp_path / "data")
    line = fails(capsys, "--dataset", "folder", "--data-dir", tmp_path / "data", "--image-size", 32,
                 "--patch-size", 8, "--output-dir", tmp_path / "runs")
    assert says in line and not (tmp_path / "runs").exists()
    if fault == "broken":                       # all are named at once
        assert all(f"{i}.png: not a readable image" in line for i in range(3))

def tar(path: Path, files: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

def jpeg(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (i * 40 % 256, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()

def md5(content: bytes | Path) -> str:
    return hashlib.md5(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()

def mini_cifar(root, patch, cls, train, test, key):
    rng, files = np.random.default_rng(0), {}
    for name in train + test:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, key: [0, 1, 1, 0]})
    files[cls.meta["filename"]] = pickle.dumps({cls.meta["key"]: ["plane", "car"]})
    tar(root / cls.filename, {f"{cls.base_folder}/{n}": c for n, c in files.items()})
    patch(cls, "tgz_md5", md5(root / cls.filename))
    patch(cls, "train_list", [[n, md5(files[n])] for n in train])
    patch(cls, "test_list", [[n, md5(files[n])] for n in test])
    patch(cls, "meta", cls.meta | {"md5": md5(files[cls.meta["filename"]])})
    return (4 * len(train), 4), root / cls.base_folder / train[0]

def mini_cifar10(root, patch):
    return mini_cifar(root, patch, torchvision.datasets.CIFAR10,
                      [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "labels")

def mini_cifar100(root, patch):
    cls = torchvision.datasets.CIFAR100
    return mini_cifar(root, patch, cls, ["train"], ["test"], "fine_labels")

def mini_fashion_mnist(root, patch):
    resources = []
    for name, n in (("train", 12), ("t10k", 3)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for kind, header, body in (("images-idx3", [2051, n, 28, 28], pixels),
                                   ("labels-idx1", [2049, n], np.arange(n) % 2)):
            raw = np.array(header, ">i4").tobytes() + body.astype(np.uint8).tobytes()
            path = root / f"{name}-{kind}-ubyte.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(raw))
            resources.append((path.name, md5(path)))
    patch(torchvision.datasets.FashionMNIST, "resources", resources)
    return (12, 3), root / "train-images-idx3-ubyte"

def mini_stl10(root, patch):
    cls, rng = torchvision.datasets.STL10, np.random.default_rng(0)
    files = {"class_names.txt": b"\n".join(b"class%d" % i for i in range(10)),
             "fold_indices.txt": b"0 1\n", "unlabeled_X.bin": rng.bytes(96 * 96 * 3)}
    for split, n in (("train", 12), ("test", 4)):
        files[f"{split}_X.bin"] = rng.bytes(n * 96 * 96 * 3)
        files[f"{split}_y.bin"] = bytes(1 + i % 2 for i in range(n))
    tar(root / cls.filename, {f"{cls.base_folder}/{n}": c for n, c in files.items()})
    patch(cls, "tgz_md5", md5(root / cls.filename))
    for which in ("train_list", "test_list"):
        patch(cls, which, [[n, md5(files[n])] for n, _ in getattr(cls, which)])
    return (12, 4), root / cls.base_folder / "train_X.bin"

def mini_pets(root, patch):
    cls, names = torchvision.datasets.OxfordIIITPet, dict(
        trainval=["Abyssinian_1", "beagle_1", "beagle_2"], test=["Abyssinian_2", "beagle_3"])
    tar(root / "images.tar.gz", {f"images/{name}.jpg": jpeg(3) for name in sum(names.values(), [])})
    tar(root / "annotations.tar.gz", {f"annotations/{split}.txt": "".join(
        f"{n} {1 + (n[0] == 'b')} 1 1\n" for n in some).encode() for split, some in names.items()})
    urls = [url for url, _ in cls._RESOURCES]
    patch(cls, "_RESOURCES", tuple((url, md5(root / url.rsplit("/")[-1])) for url in urls))
    return (3, 2), root / "images" / "beagle_1.jpg"

def mini_aircraft(root, patch):
    top = "fgvc-aircraft-2013b/data/"
    files = {top + f"images/{i:07}.jpg": jpeg(i) for i in range(5)}
    files[top + "variants.txt"] = b"707-320\nA340-300\n"
    files[top + "images_variant_trainval.txt"] = (
        b"0000000 707-320\n0000001 A340-300\n0000002 707-320\n")
    files[top + "images_variant_test.txt"] = b"0000003 A340-300\n0000004 707-320\n"
    tar(root / "fgvc-aircraft-2013b.tar.gz", files)
    return (3, 2), root / top / "images" / "0000001.jpg"

def mini_dtd(root, patch):
    files = {}
    for j, split in enumerate(("train", "val", "test")):
        files[f"dtd/labels/{split}1.txt"] = f"banded/banded_{j}.jpg\nwoven/woven_{j}.jpg\n".encode()
        files |= {f"dtd/images/{k}/{k}_{j}.jpg": jpeg(j) for k in ("banded", "woven")}
    tar(root / "dtd-r1.0.1.tar.gz", files)
    patch(torchvision.datasets.DTD, "_MD5", md5(root / "dtd-r1.0.1.tar.gz"))
    return (4, 2), root / "dtd" / "images" / "woven" / "woven_1.jpg"

def mini_imagenette(root, patch):
    cls, top = torchvision.datasets.Imagenette, "imagenette2-320"
    tar(root / f"{top}.tgz", {f"{top}/{split}/{k}/{i}.JPEG": jpeg(i) for k in (
        "n01440764", "n02102040") for split, n in (("train", 3), ("val", 2)) for i in range(n)})
    archive = cls._ARCHIVES["320px"][0], md5(root / f"{top}.tgz")
    patch(cls, "_ARCHIVES", cls._ARCHIVES | {"320px": archive})
    return (6, 4), root / top / "train" / "n02102040" / "1.JPEG"

@pytest.mark.parametrize("name", cikd.PUBLISHED)
def test_published_sets(name, tmp_path, monkeypatch):
    """From a miniature archive where the message says; a half-extracted copy is refused."""
    make, splits, _, archive, *place = cikd.PUBLISHED[name]
    mini = globals()[f"mini_{name}"]
    counts, victim = mini(tmp_path.joinpath(*place), monkeypatch.setattr)
    monkeypatch.setitem(cikd.PUBLISHED, name, (make, splits, counts, archive, *place))
    cfg = cikd.resolve(cikd.Config(dataset=name, data_dir=str(tmp_path)))
    data = cikd.load_dataset(cfg)
    assert data.train[0].shape == (counts[0], 3, cfg.image_size, cfg.image_size)
    assert len(data.test[1]) == counts[1] and len(data.train[1].unique()) == 2
    if name == "dtd":                           # its training set has two parts
        assert data.classes == ["banded", "woven"] and data.train[1].tolist() == [0, 1, 0, 1]
    assert cikd.load_dataset(cfg).images_hash == data.images_hash
    for path in tmp_path.joinpath(*place).glob("*.*gz"):
        path.unlink()
    victim.unlink()
    with pytest.raises(cikd.CIKDError, match=f"{name}: neither whole"):
        cikd.load_dataset(cfg)

@pytest.mark.parametrize("name", cikd.PUBLISHED)
def test_without_network_the_message_says_what_to_get(name, tmp_path, capsys):
    line = fails(capsys, "--dataset", name, "--data-dir", tmp_path / "data", "--output-dir",
                 tmp_path / "runs")
    *_, archive, = [part for part in cikd.PUBLISHED[name] if "http" in part]
    assert archive in line and "--dataset shapes" in line and not (tmp_path / "runs").exists()
    assert str(tmp_path.joinpath("data", *cikd.PUBLISHED[name][4:])) in line

def test_a_silent_server_does_not_hang(capsys, monkeypatch):
    monkeypatch.setattr(cikd, "load_dataset", lambda _: cikd.need(0, socket.getdefaulttimeout()))
    assert "error: 20" in fails(capsys)         # seconds, for every download of this command

def test_subsets_are_balanced_seeded_and_disjoint():
    base = cikd.Config(train_size=207, holdout=103)
    data = cikd.load_dataset(cikd.resolve(base))
    for (images, labels), n in ((data.train, 207), (data.test, 103)):
        counts = labels.bincount(minlength=10)
        assert len(images) == n and counts.max() - counts.min() <= 1
    train, test = ({x.numpy().tobytes() for x in images} for images, _ in (data.train, data.test))
    assert len(train) == 207 and len(test) == 103 and not train & test
    assert train | test <= {x.numpy().tobytes() for x in cikd.make_shapes(3000, 0)[0]}
    again = [cikd.load_dataset(cikd.resolve(replace(base, **other))).images_hash
             for other in ({}, dict(seed=1), dict(data_seed=1))]
    assert [h == data.images_hash for h in again] == [True, True, False]

def test_pad_crop_shifts_by_whole_pixels_and_flips():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    crops = cikd.draw_crops(64, 32, "pad")
    out, seen = cikd.to_float(images, crops), set()
    padded = F.pad(images.float() / 127.5 - 1, (4, 4, 4, 4))
    for i, (wide, x, _, y) in enumerate(crops.tolist()):
        flip, dx, dy = wide < 0, round(x * 16), round(y * 16)
        want = padded[i, :, 4 + dy:36 + dy, 4 + dx:36 + dx]
        assert (out[i] - (want.flip(2) if flip else want)).abs().max() < 1e-4
        seen.add((flip, dx, dy))
    assert len(seen) > 50 and {s[0] for s in seen} == {True, False} and max(s[1] for s in seen) == 4

def test_resized_crop_agrees_with_torchvision():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    for top, left, h, w in ((0, 0, 32, 32), (4, 8, 16, 20), (10, 2, 8, 30), (0, 20, 12, 12)):
        crop = torch.tensor([w / 32, (2 * left + w) / 32 - 1, h / 32, (2 * top + h) / 32 - 1])
        theirs = torchvision.transforms.functional.resized_crop(
            images.float() / 127.5 - 1, top, left, h, w, [32, 32], antialias=False)
        apart = cikd.to_float(images, crop.expand(6, 4)) - theirs
        assert apart[..., 4:-4, 4:-4].abs().max() < 1e-4        # its edge still sees neighbours

def test_batches_cover_the_epoch_and_keep_one_shape():
    cfg = cikd.resolve(cikd.Config(train_size=50, holdout=20, batch_size=16, crop="pad"))
    data = cikd.load_dataset(cfg)
    epoch = list(cikd.batches(data, cfg))
    assert [x.shape[0] for x, _ in epoch] == [16] * 3 and epoch[0][0].dtype == torch.float32
    (_, labels), = cikd.batches(data, replace(cfg, batch_size=500))
    assert sorted(labels.tolist()) == sorted(data.train[1].tolist())

@pytest.mark.parametrize("crop", ["none", "pad"])
def test_processes_share_each_batch_and_draw_their_own_colours(crop, monkeypatch):
    cfg = cikd.resolve(cikd.Config(train_size=50, holdout=20, batch_size=16, crop=crop))
    data = cikd.load_dataset(cfg)
    def epoch(rank, world):
        monkeypatch.setattr(cikd, "RANK", rank)
        cikd.seed_torch(0)
        return [*cikd.batches(data, cfg, world)], torch.rand(1)
    (whole, _), (even, a), (odd, b) = epoch(0, 1), epoch(0, 2), epoch(1, 2)
    assert len(whole) == len(even) == len(odd) == 3 and a != b
    for all_of_it, *parts in zip(whole, even, odd):
        for part, want in zip(zip(*parts), all_of_it):
            assert torch.equal(torch.stack(part, 1).flatten(0, 1), want)

def test_one_picture_is_prepared_in_one_call(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "0.png")
    x, TF = cikd.prepare(tmp_path / "0.png", 32), torchvision.transforms.functional
    assert x.shape == (1, 3, 32, 32) and torch.equal(x, cikd.prepare(image, 32))
    theirs = TF.resize(TF.center_crop(image, 40), 32, TF.InterpolationMode.BICUBIC)
    apart = x[0] - (TF.to_tensor(theirs) * 2 - 1)
    assert apart[..., 4:-4].abs().max() < 0.01  # at the crop's edge ours still sees neighbours

# ---- 8. training

def test_one_seed_gives_one_result(tiny):
    runs = [cikd.train(replace(tiny, output_dir=tiny.output_dir + x, crop="resized"))["folder"]
            for x in "12"]
    same(*runs)
    runs.append(cikd.train(replace(tiny, seed=1, crop="resized"))["folder"])
    one, other = (cikd.load(Path(run) / "student.pt") for run in runs[1:])
    assert not any(torch.equal(v, other[k]) for k, v in one.items() if v.ndim > 1)

def test_learning_rate_rises_then_falls():
    rates = [cikd.learning_rate((i + 1) / 100, 1.0, 0.1, 0.01) for i in range(100)]
    assert rates[4] == pytest.approx(0.5) and max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    assert cikd.learning_rate(1.0, 1.0, 0.0) == pytest.approx(1e-6)     # without a warm-up

def test_optimizers():
    cfg, student, teacher = models(weight_decay=0.03)
    groups = cikd.make_optimizer(student, cfg).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(groups) == 2 and len(decay) == len(list(student.parameters()))
    for name, p in student.named_parameters():
        free = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert decay[id(p)] == (0 if free else 0.03), name
    assert groups[0]["betas"] == (0.9, 0.95)
    assert isinstance(cikd.make_optimizer(teacher, cfg), torch.optim.SGD)

def test_evaluate_counts_right_answers_in_evaluation_mode():
    student = small_student(drop_path=0.5)
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    answers = student.eval()(cikd.to_float(images)).argmax(1)
    labels = torch.where(torch.arange(30) < 12, answers, (answers + 1) % 10)
    assert cikd.evaluate(student.train(), images, labels, batch_size=7) == pytest.approx(40.0)

def test_attention_distance():
    torch.manual_seed(0)
    maps = torch.rand(2, 25, 25).softmax(-1)
    want = sum(float(maps[1, i, j]) * math.hypot(i // 5 - j // 5, i % 5 - j % 5) / 25
               for i in range(25) for j in range(25))
    assert float(cikd.attention_distance(maps)[1]) == pytest.approx(want, rel=1e-5)

COLUMNS = ("stage", "epoch", "loss", "ali", "ce", "dkd", "lr", "accuracy", "attention_distance",
           "seconds", "images_per_second")

def test_a_run_leaves_what_the_readme_says(tiny):
    result = cikd.train(replace(tiny, snapshot_every=2))
    run = Path(result["folder"])
    assert {p.name for p in run.iterdir()} == {"settings.json", "metrics.csv", "student_init.pt",
                                               "student_ali.pt", "student.pt", "snapshots"}
    rows = read_metrics(run)
    assert tuple(rows[0]) == COLUMNS and [r["stage"] for r in rows] == ["ALI", "LM"]
    assert float(rows[-1]["accuracy"]) == result["accuracy"] and result["epochs"] == 2
    init, ali, last = (cikd.load(run / f"student{x}.pt") for x in ("_init", "_ali", ""))
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(init[name], ali[name])
    assert torch.equal(init["head.weight"], ali["head.weight"])
    assert not torch.equal(ali["head.weight"], last["head.weight"])
    kept = cikd.load(run / "snapshots" / "epoch_0002.pt")
    assert equal(kept, {name: value.half() for name, value in last.items()})
    student, classes, cfg = cikd.load_student(run)          # what a reader needs, and no more
    data = cikd.load_dataset(cfg)
    assert cikd.evaluate(student, *data.test) == result["accuracy"] and classes == data.classes

def test_the_last_epochs_accuracy_counts_not_the_best_ones(tiny, monkeypatch, capsys):
    accuracies = iter([90.0, 70.0, 80.0])
    monkeypatch.setattr(cikd, "evaluate", lambda *_: next(accuracies))
    result = cikd.train(replace(tiny, method="scratch", epochs=3))
    assert result["accuracy"] == 80
    assert "accuracy 80.0 % after 3 epochs" in capsys.readouterr().out

def test_at_the_switch_optimizer_schedule_and_ramp_start_afresh(tiny, monkeypatch):
    made, epochs, loss, make = [], [], cikd.step_loss, cikd.make_optimizer
    monkeypatch.setattr(cikd, "make_optimizer", lambda m, c: made.append(len(epochs)) or make(m, c))
    monkeypatch.setattr(cikd, "step_loss", lambda stage, *a: epochs.append(
        (stage.name, int(a[-1]))) or loss(stage, *a))
    result = cikd.train(replace(tiny, epochs=5, ali_epochs=2, batch_size=60))
    assert epochs[1:] == [("ALI", 0), ("ALI", 1), ("LM", 0), ("LM", 1), ("LM", 2)]
    assert made[-2:] == [1, 3]                  # steps done, one of them the teacher's
    rates = [float(r["lr"]) for r in read_metrics(result["folder"])]
    assert rates[1] == pytest.approx(1e-6) and rates[4] == pytest.approx(1e-6) and rates[2] > 5e-4

def same(run, other):
    """Every tensor and every column but the timings is bit-identical."""
    for name in ("student_init.pt", "student_ali.pt", "student.pt"):
        assert equal(cikd.load(Path(run) / name), cikd.load(Path(other) / name)), name
    for a, b in zip(read_metrics(run), read_metrics(other), strict=True):
        assert all(a[k] == b[k] for k in COLUMNS[:-2])

class Killed(BaseException):
    """Unlike an Exception, nothing in cikd.py may catch it or clean up after it."""

def test_kills_at_any_moment_change_nothing_and_lose_one_epoch_at_most(tmp_path, monkeypatch,
                                                                           capsys):
    """Killed half-way through writing a file, around its renaming, at a step, again and again."""
    args = [*ARGS, *("--epochs 4 --ali-epochs 2 --teacher-epochs 2 --batch-size 20 --crop pad "
                     "--run-name run --device cpu --output-dir").split()]
    rng, left, places, begun = random.Random(1), [0], set(), []
    write, rename, batches, seed = Path.write_bytes, os.replace, cikd.batches, cikd.seed_torch

    def moment(place):
        left[0] -= 1
        if not left[0]:
            places.add(place)
            raise Killed

    def slowly(path, content):
        write(path, content[:len(content) // 2])
        moment("half-written")
        write(path, content)

    def renamed(*paths):
        moment("before renaming")
        rename(*paths)
        moment("after renaming")

    monkeypatch.setattr(Path, "write_bytes", slowly)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(cikd, "batches", lambda *a: (moment("at a step") or b for b in batches(*a)))
    monkeypatch.setattr(cikd, "seed_torch", lambda *parts: begun.append(parts[1:]) or seed(*parts))
    with monkeypatch.context() as patch:        # Ctrl-C says how to go on
        patch.setattr(cikd, "batches", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cikd.main([*args, str(tmp_path / "b")]) == 130
    assert "the same command (without --overwrite) goes on" in capsys.readouterr().out
    for _ in range(10):
        left[0] = rng.randint(4, 18)
        with pytest.raises(Killed):
            cikd.main([*args, str(tmp_path / "b")])
    left[0] = 0                                 # no more kills
    assert cikd.main([*args, str(tmp_path / "b")]) == 0
    assert places == {"half-written", "at a step", "before renaming", "after renaming"}
    epochs = [(part[0] == "student", part[1]) for part in begun if len(part) == 2]
    assert epochs == sorted(epochs) and len(set(epochs)) == 2 + 4
    monkeypatch.undo()
    assert cikd.main([*args, str(tmp_path / "a")]) == 0
    same(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert not [*(tmp_path / "b" / "run").rglob("*.tmp"), *(tmp_path / "b").rglob("last.pt")]

def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """No file may grow beyond 2 MB: student_init.pt fits, last.pt does not."""
    resource = pytest.importorskip("resource")
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000,) * 2))
    args = [*ARGS, "--method", "scratch", "--run-name", "run", "--output-dir", "b"]
    full = run_cli(tmp_path, *args, **limit)
    message = r"cikd: error: b/run/last.pt: cannot be written \([^\n]+too large\)[^\n]+\n"
    assert full.returncode == 2 and re.fullmatch(message, full.stderr)
    assert not list((tmp_path / "b" / "run").glob("*.tmp"))
    assert not (tmp_path / "b" / "run" / "last.pt").exists()
    monkeypatch.chdir(tmp_path)
    assert cikd.main(args) == 0

def test_of_two_teachers_trained_at_once_the_first_to_be_whole_counts(tiny, monkeypatch):
    fit, home, times = cikd.fit, Path(tiny.output_dir) / "teachers", {}
    def slow(model, teacher, cfg, data, final):         # meanwhile another job does the same
        if final.stem == "teacher" and cfg.run_name == "slow":
            with torch.random.fork_rng():
                fast = cikd.train(replace(tiny, method="kd", run_name="fast"))["folder"]
            times.update((p, p.stat().st_mtime_ns) for p in teacher_of(fast).parent.iterdir())
        fit(model, teacher, cfg, data, final)
    monkeypatch.setattr(cikd, "fit", slow)
    runs = [cikd.train(replace(tiny, run_name="slow"))["folder"], home.parent / "fast"]
    teacher, = home.iterdir()                           # and the other one's folder is gone
    assert len(times) == 4 and times == {p: p.stat().st_mtime_ns for p in teacher.iterdir()}
    assert [teacher_of(run) for run in runs] == [teacher / "teacher.pt"] * 2
    assert {read_facts(run)["teacher_hash"] for run in runs} == {
        cikd.hash_of((teacher / "teacher.pt").read_bytes())}

SHARED = """--train-size 160 --holdout 40 --epochs 4 --ali-epochs 2 --teacher-epochs 1 --jitter 0
--drop-path 0 --device cpu --run-name run --output-dir""".split()

def torchrun(cwd, *argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", str(HERE / "cikd.py"), *argv], cwd=cwd,
                          capture_output=True, text=True, timeout=300)

def test_an_average_keeps_nothing_but_itself(monkeypatch):
    """A view of all gradients, kept in an epoch's log, would fill the GPU."""
    monkeypatch.setattr(cikd, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(3))
    row, gradient = torch.ones(4), torch.ones(1000, 10)
    cikd.average([row, gradient])
    assert row.tolist() == [1.5] * 4 and (gradient == 1.5).all()
    assert row.untyped_storage().nbytes() == 16

def together(cwd, *argv, first=""):
    """The command line in two processes with what torchrun sets; `first`: code that runs before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = os.environ | dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                                MASTER_PORT=str(free.getsockname()[1]))
    code = f"import os, sys; sys.path[:0] = [{str(HERE)!r}]; import cikd\n{first}\ncikd.main()"
    jobs = [subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=cwd, env=env | dict(RANK=rank, LOCAL_RANK=rank),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in "01"]
    return [(job.communicate(timeout=300)[1], job.returncode) for job in jobs]

def test_two_processes_give_what_one_gives_even_after_a_kill(tmp_path, monkeypatch):
    done = torchrun(tmp_path, *SHARED, "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher, seed") == 1 == done.stdout.count("LM        4/4")
    monkeypatch.chdir(tmp_path)
    assert cikd.main([*SHARED, "one"]) == 0
    assert equal(*(cikd.load(teacher_of(Path(n, "run"))) for n in ("one", "two")))  # BatchNorm
    for a, b in zip(read_metrics("one/run"), read_metrics("two/run"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)
        assert float(a["attention_distance"]) == pytest.approx(float(b["attention_distance"]), 1e-3)
    still = [cikd.load(f"two/run/student_{name}.pt")["head.weight"] for name in ("init", "ali")]
    assert torch.equal(*still)                          # ALI moves no head
    kill = """save = cikd.save
def killed(path, content):
    save(path, content)
    if path.name == "last.pt" and len(content["rows"]) == 3:
        os.kill(os.getpid(), 9)
cikd.save = killed"""
    (_, first), (_, second) = together(tmp_path, *SHARED, "three", first=kill)
    assert first == -9 and second                       # and the other one does not wait
    assert len(read_metrics("three/run")) == 3
    assert together(tmp_path, *SHARED, "three") == [("", 0)] * 2
    same("two/run", "three/run")

def test_by_torchrun_an_error_is_one_line_and_ends_all(tmp_path):
    done = torchrun(tmp_path, *SHARED, "runs", "--method", "scratch", "--lr", "1e38")
    assert done.returncode and done.stderr.count("cikd: error: ") == 1
    assert "labels, epoch 1: the loss or a weight is not finite" in done.stderr
    assert not [*tmp_path.rglob("student.pt"), *tmp_path.rglob("last.pt")]

@pytest.mark.parametrize("argv, says", [
    ("--compare", "run --compare, --seeds"), ("--method teacher", "by python"),
    ("--batch-size 33", "cannot share 33"), ("--train-size 61 --batch-size 64", "cannot share 61")])
def test_what_processes_cannot_share_is_said_first(argv, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cikd, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    assert says in fails(capsys, *ARGS, *argv.split(), "--output-dir", tmp_path)
    assert not list(tmp_path.iterdir())

def test_other_settings_images_or_teachers_do_not_go_on(tiny, capsys, monkeypatch):
    run = Path(cikd.train(replace(tiny, run_name="mine"))["folder"])
    there = [*ARGS, "--output-dir", tiny.output_dir, "--run-name", "mine"]
    line = fails(capsys, *there, "--tau", 0.5, "--lr", 0.01)
    assert "tau 0.2 -> 0.5" in line and "lr 0.002 -> 0.01" in line and "--overwrite" in line
    before = {p: p.read_bytes() for p in run.iterdir()}
    assert cikd.main(there) == 0                # finished: reported again, not run again
    assert before == {p: p.read_bytes() for p in run.iterdir()}
    path = teacher_of(run)
    weights = cikd.load(path)
    cikd.save(path, weights | {"fc.bias": weights["fc.bias"] + 1})
    assert "teacher_hash" in fails(capsys, *there)
    with pytest.raises(cikd.CIKDError, match="teacher.pt: missing or not a checkpoint"):
        path.write_bytes(b"junk")
        cikd.train(replace(tiny, run_name="mine", overwrite=True))      # nothing is removed yet
    cikd.save(path, weights)
    first = cikd.load(run / "student.pt")
    (run / "student.pt").write_bytes(b"")
    cikd.train(replace(tiny, run_name="mine", overwrite=True))
    assert equal(first, cikd.load(run / "student.pt"))      # the same seed gives the same bits
    facts = (run / "settings.json").read_text()
    (run / "settings.json").write_text('{"settings": {}, "data": "0"}')     # of an older version
    assert "dataset None -> shapes" in fails(capsys, *there)
    with pytest.raises(cikd.CIKDError, match="another version"):
        cikd.load_student(run)
    (run / "settings.json").write_text(facts)
    shapes = cikd.make_shapes
    monkeypatch.setattr(cikd, "make_shapes", lambda n, seed, size: shapes(n, seed + 77, size))
    assert "images " in fails(capsys, *there)

def test_a_teacher_is_kept_for_exactly_what_it_depends_on(tiny, monkeypatch):
    """Each fact has a folder of its own; what a teacher does not depend on trains no other."""
    monkeypatch.setattr(cikd, "fit", lambda model, teacher, cfg, data, final: (cikd.save(
        final, model.state_dict()), cikd.save(final.parent / "metrics.csv", [
            dict(accuracy=0, seconds=0)])))
    def folders(**kwargs):
        cikd.train(replace(tiny, method="kd", **kwargs))
        return len(list(Path(tiny.output_dir, "teachers").iterdir()))
    assert folders() == 1 == folders(seed=5, tau=0.7, lr=0.1, student="vit_micro")
    changes = [dict(teacher="resnet56"), dict(teacher_epochs=2), dict(batch_size=7),
               dict(crop="pad"), dict(warmup=0.2), dict(data_seed=1), dict(train_size=70)]
    assert [folders(**change) for change in changes] == list(range(2, len(changes) + 2))

def test_the_teacher_is_a_run_like_any_other(tiny):
    """It learns smoothed labels at 0.1, by SGD; --lr makes another; students take it up."""
    alone = cikd.train(replace(tiny, method="teacher", teacher_epochs=2, lr=None))
    rows = read_metrics(alone["folder"])
    assert [(r["stage"], r["epoch"]) for r in rows] == [("teacher", "1"), ("teacher", "2")]
    assert 0.05 < float(rows[0]["lr"]) < 0.1 and rows[0]["loss"] == rows[0]["ce"]
    facts = read_facts(cikd.train(replace(tiny, teacher_epochs=2))["folder"])
    assert facts["teacher_file"] == f"teachers/{Path(alone['folder']).name}/teacher.pt"
    other = cikd.train(replace(tiny, method="teacher", teacher_epochs=2, lr=0.01))
    assert other["folder"] != alone["folder"]

def test_what_is_not_finite_stops_the_run_and_is_not_saved(tiny, monkeypatch):
    loss, steps = cikd.step_loss, []
    def poisoned(stage, cfg, model, *rest):
        steps.append(stage)
        if len(steps) == 8:                     # the loss itself is fine: an epoch's last step
            model.blocks[0].attn.qkv.weight.register_hook(lambda g: g * math.nan)
        return loss(stage, cfg, model, *rest)
    monkeypatch.setattr(cikd, "step_loss", poisoned)
    cfg = replace(tiny, epochs=3, ali_epochs=2, batch_size=20, run_name="run")
    with pytest.raises(cikd.CIKDError, match="ALI, epoch 2: the loss or a weight is not finite"):
        cikd.train(cfg)
    run = Path(tiny.output_dir) / "run"
    assert not (run / "student_ali.pt").exists() and len(read_metrics(run)) == 1
    monkeypatch.setattr(cikd, "step_loss", loss)
    assert cikd.train(cfg)["epochs"] == 3

class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["CIKD_EVIL"],)

def test_own_teacher_and_its_refusals(tiny, tmp_path, capsys, monkeypatch):
    run = Path(cikd.train(tiny)["folder"])
    mine, state = tmp_path / "mine.pt", cikd.load(teacher_of(run))
    cikd.save(mine, state)
    own = cikd.train(replace(tiny, teacher_checkpoint=str(mine), run_name="own"))["folder"]
    assert equal(cikd.load(run / "student.pt"), cikd.load(Path(own) / "student.pt"))
    args = ["--output-dir", tmp_path / "r", *ARGS, "--teacher-checkpoint"]
    assert "Missing key" in fails(capsys, *args, mine, "--teacher", "resnet56")
    monkeypatch.setenv("CIKD_EVIL", str(tmp_path / "owned"))
    for content, says in (({"fc.weight": Evil()}, "not a checkpoint"), ([1, 2], "not a checkpoint"),
                          (state | {"aux.weight": torch.zeros(1)}, "aux.weight"),
                          (state | {"fc.weight": torch.zeros(7, 64)}, "size mismatch for fc")):
        torch.save(content, tmp_path / "other.pt")
        assert says in fails(capsys, *args, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(mine.read_bytes()[:5000])
    assert "cut.pt: missing or not a checkpoint" in fails(capsys, *args, tmp_path / "cut.pt")
    assert not (tmp_path / "r").exists() and not (tmp_path / "owned").exists()

def test_pretrained_weights_go_everywhere_but_the_classifier(tmp_path, monkeypatch):
    theirs, x = torchvision.models.resnet18().state_dict(), (torch.zeros(1), torch.zeros(1))
    weights = type("", (), dict(DEFAULT=type("", (), dict(get_state_dict=lambda: theirs))))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    cfg = cikd.resolve(cikd.Config("dtd", "teacher", pretrained_teacher=True))
    teacher = cikd.begin_run(cfg, cikd.Data(x, x, ["a", "b"], ""), tmp_path / "teacher.pt", {})
    assert torch.equal(teacher.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])
    assert teacher.fc.weight.shape == (2, 512)

def test_each_stage_is_compiled_once(tiny, monkeypatch):
    """Teacher, ALI, LM: three graphs without a break, whatever epoch and learning rate are."""
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(
        f, backend=counter, fullgraph=True, dynamic=dynamic))
    cfg = replace(tiny, epochs=5, ali_epochs=2, teacher_epochs=2, ramp_epochs=2, batch_size=20)
    result = cikd.train(replace(cfg, compile="on", run_name="compiled"))
    assert counter.frame_count == 3
    plain = cikd.train(replace(cfg, run_name="plain"))
    for a, b in zip(read_metrics(result["folder"]), read_metrics(plain["folder"]), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)

def test_measuring_and_figures_stay_below_2_gb(tmp_path):
    pytest.importorskip("resource")
    code = ("import resource, sys; sys.path[:0] = [sys.argv[1]]; import cikd, visualize_attention "
            "as va; assert cikd.main(sys.argv[2:]) == 0; assert va.main(['runs/r']) == 0; "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    args = ("--image-size 48 --patch-size 2 --method scratch --train-size 10 --holdout 64 "
            "--epochs 1 --device cpu --run-name r").split()
    done = subprocess.run([sys.executable, "-c", code, HERE, *args], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    unit = 1 if sys.platform == "darwin" else 1024
    assert done.returncode == 0 and int(done.stdout.split()[-1]) * unit < 2e9, done.stderr

# ---- 9. command line

def test_end_to_end(tmp_path):
    done = run_cli(tmp_path, *ARGS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    run, = (tmp_path / "runs").glob("shapes-cikd*")
    accuracy = float(read_metrics(run)[-1]["accuracy"])
    last = f"cikd, seed 0: accuracy {accuracy:.1f} % after 2 epochs"
    assert done.stdout.splitlines()[-1].startswith(last) and "\r" not in done.stdout

def test_what_is_typed_in_ipython_is_obeyed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    program = compile((HERE / "cikd.py").read_text(), "cikd.py", "exec")
    monkeypatch.setattr(sys, "argv", ["/my/cikd.py", "--tau", "-1"])
    with pytest.raises(SystemExit, match="2"):          # %run cikd.py --tau -1
        exec(program, dict(__name__="__main__"))
    assert "--tau: -1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    exec(program, dict(__name__="__main__"))            # as cells: it defines and runs nothing
    assert not any(capsys.readouterr())

def test_compare_makes_a_table_and_runs_nothing_twice(tmp_path, capsys):
    args = ["--compare", "--seeds", "0", "1", *ARGS, "--output-dir", str(tmp_path)]
    assert cikd.main(args) == 0
    out = capsys.readouterr().out
    table, = tmp_path.rglob("*-seed0_1/comparison.csv")     # other seeds, another table
    rows, methods = list(csv.DictReader(table.open())), ["scratch", "kd", "joint", "cikd"]
    assert [(r["method"], r["seed"]) for r in rows] == [(m, s) for s in "01" for m in methods]
    for method in methods:
        values = [float(r["accuracy"]) for r in rows if r["method"] == method]
        mean = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
        assert re.search(rf"^{method}\s+{mean}\s+2$", out, re.M)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    assert cikd.main(args) == 0
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    settings = TINY | dict(output_dir=str(tmp_path / "alone"), method="joint", seed=1)
    alone = cikd.train(cikd.Config(**settings))["folder"]
    row, = (r for r in rows if (r["method"], r["seed"]) == ("joint", "1"))
    assert equal(*(cikd.load(Path(folder) / "student.pt") for folder in (row["folder"], alone)))
    starts = [cikd.load(Path(r["folder"]) / "student_init.pt") for r in rows if r["seed"] == "0"]
    assert all(equal(start, starts[0]) for start in starts)
    assert len(list((tmp_path / "teachers").iterdir())) == 1        # trained once, for all

def test_what_the_machine_lacks_is_said_plainly(monkeypatch, capsys):
    for error, says in ((MemoryError(), "--batch-size"), (OSError("no route"), "no route"),
                        (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
                        (RuntimeError("[enforce] can't allocate memory"), "--batch-size"),
                        (RuntimeError("torch.compile is not supported"), "use --compile off"),
                        (InvalidCxxCompiler(), "--compile off")):
        monkeypatch.setattr(cikd, "train", lambda *_, e=error: (_ for _ in ()).throw(e))
        assert says in fails(capsys)
    monkeypatch.setattr(cikd, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError):           # what only we can mend keeps its traceback
        cikd.main([])

# ---- visualize_attention.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished tiny runs of cikd and scratch, with snapshots."""
    folder = str(tmp_path_factory.mktemp("runs"))
    cfg = cikd.Config(**TINY | dict(epochs=3, output_dir=folder, snapshot_every=1))
    finished = {}
    for method in ("scratch", "cikd"):          # cikd is the newest run
        result = cikd.train(replace(cfg, method=method))
        finished[method] = Path(result["folder"])
    return finished


@pytest.fixture(scope="module")
def figures(runs, tmp_path_factory):
    """All figures of both runs, scratch named first."""
    folder = tmp_path_factory.mktemp("figures")
    argv = [runs["scratch"], runs["cikd"], "--output-dir", folder, "--gif", "--html"]
    assert va.main([str(a) for a in argv]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(runs):
    return [va.load_run(runs["cikd"]), va.load_run(runs["scratch"])]


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the cikd run, with its teacher, to be spoiled."""
    shutil.copytree(runs["cikd"].parent, tmp_path / "runs")
    return tmp_path / "runs" / runs["cikd"].name


@pytest.fixture
def photos(tmp_path):
    """Six picture files, from black to white."""
    files = []
    for i in range(6):
        file = tmp_path / f"photo{i}.jpg"
        Image.new("RGB", (70, 50), (50 * i, 50 * i, 50 * i)).save(file)
        files.append(str(file))
    return files


def entries_of(loaded):
    return va.entries_of(va.lines_of(loaded))


def visualizer_fails(capsys, *argv) -> str:
    """Run the visualizer, demand one plain line on stderr and exit code 2; return the line."""
    assert va.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"visualize_attention: error: [^\n]+\n", error)
    return error


def test_kernels_of_maps_with_a_known_answer():
    uniform = va.attention_kernels(torch.full((2, 3, 25, 25), 1 / 25))
    assert torch.allclose(uniform, torch.full((2, 3, 9, 9), 1 / 25))
    shift = torch.zeros(25, 25)                 # each patch looks one to the right, if there is one
    for i in range(25):
        if i % 5 < 4:
            shift[i, i + 1] = 1
    kernel = va.attention_kernels(shift)
    assert kernel[4, 5] == 1 and kernel.sum() == 1          # one below the middle would be [5, 4]


def test_every_figure_is_drawn(figures):
    frames = dict(summary=1, heatmaps=1, distance=1, kernels=1, curriculum=1, locality=4)
    for name, n in frames.items():
        picture = Image.open(next(figures.glob(f"{name}.*")))
        assert getattr(picture, "n_frames", 1) == n
        assert np.asarray(picture.convert("L")).std() > 10, name            # not blank


def test_the_table_has_a_row_for_each_stage_run_and_surrogate(loaded, runs, capsys):
    images, _ = va.run_images(loaded[0])
    students = va.measure_students(entries_of(loaded), images)
    surrogates = va.measure_surrogates(loaded[0], images)
    labels = [row.label for row in students]
    assert labels == ["before training", "after ALI", "after LM", "scratch"]
    assert [row.label for row in surrogates] == ["surrogate, layer1", "surrogate, layer2"]
    rows = read_metrics(runs["cikd"])
    accuracies = [float(rows[0]["accuracy"]), float(rows[2]["accuracy"])]
    assert [row.accuracy for row in students[:3]] == [None, *accuracies]
    far = float(rows[2]["attention_distance"])
    assert float(students[2].distance.mean()) == pytest.approx(far, abs=1e-4)
    va.print_table(surrogates + students)
    table = capsys.readouterr().out
    assert re.search(r"before training +4\.1", table)
    assert re.search(rf"after LM +{accuracies[1]:.1f} % +{far:.2f}", table)


def test_heatmaps_show_where_the_chosen_patch_looks(loaded, tmp_path):
    images, _ = va.run_images(loaded[0])
    images = images[:3]
    query = 2 * 8 + 5
    looked = va.looks(loaded[0], entries_of(loaded), images, query)
    columns = va.heatmaps(loaded[0], looked, ["a", "b", "c"], tmp_path / "x.png")
    assert list(columns) == ["surrogate, layer2", "after ALI", "after LM", "scratch"]
    for maps in columns.values():
        assert torch.allclose(maps.sum((1, 2)), torch.ones(3), atol=1e-4)
    floats = cikd.to_float(images)
    blocks = list(cikd.student_maps(loaded[0].moments[-1].student, floats))
    assert torch.allclose(columns["after LM"].flatten(1), blocks[5].mean(1)[:, query])
    want = va.surrogate_maps(loaded[0], floats, 2).mean(1)                  # [3, N, N]
    assert torch.allclose(columns["surrogate, layer2"].flatten(1), want[:, query])


def test_without_a_query_the_most_selective_inner_patch_is_shown(loaded):
    images, _ = va.run_images(loaded[0])
    looked = va.looks(loaded[0], [], images[:8], None)
    maps = va.surrogate_maps(loaded[0], cikd.to_float(images[:8]), 2).mean(1)
    entropy = torch.distributions.Categorical(maps).entropy().view(8, 8, 8)
    inner = entropy[:, 1:-1, 1:-1].flatten(1).argmin(1)                     # of 6 x 6 patches
    want = [(i // 6 + 1) * 8 + i % 6 + 1 for i in inner.tolist()]
    assert looked.queries.tolist() == want
    assert want != entropy.flatten(1).argmin(1).tolist()    # some would lie at the border
    alone = va.looks(loaded[1], entries_of(loaded), images[:3], None)
    assert alone.queries.tolist() == [34] * 3               # there is no teacher
    maps = torch.full((1, 9, 9), 1 / 9)
    maps[0, 0] = F.one_hot(torch.tensor(0), 9)              # the corner looks at itself alone
    assert va.selective_patches(maps).tolist() == [4]
    maps = torch.full((1, 4, 4), 1 / 4)                     # 2 x 2 patches: none is an inner one
    maps[0, 3] = F.one_hot(torch.tensor(0), 4)
    assert va.selective_patches(maps).tolist() == [3]


def test_the_curves_are_metrics_csv(loaded, runs, tmp_path):
    drawn = va.curriculum(va.lines_of(loaded), tmp_path / "x.png")
    for method, folder in runs.items():
        for name, values in drawn.items():
            assert values[method] == [float(row[name]) for row in read_metrics(folder)]


def test_runs_of_one_method_are_told_apart(loaded):
    entries = entries_of([loaded[0]] * 3)
    assert len({entry.label for entry in entries}) == 5     # three stages, two other runs
    assert len({entry.color for entry in entries}) == 5


def test_the_gif_holds_the_kernels_of_the_snapshots(loaded, tmp_path):
    images, _ = va.run_images(loaded[0])
    found = va.locality_gif(loaded[0], images, tmp_path / "x.gif")
    assert list(found) == [0, 1, 2, 3]
    last = va.measure_students(entries_of(loaded), images)[2]
    assert torch.allclose(found[3], last.kernels, atol=2e-3)    # snapshots are fp16


def test_the_explorer_holds_the_maps_and_distances_of_the_models(loaded, figures, tmp_path):
    images, _ = va.run_images(loaded[0])
    images = images[:4]
    path = tmp_path / "explorer.html"
    va.explorer(loaded[0], entries_of(loaded), images, list("abcd"), path)
    assert path.stat().st_size < 1e6 and (figures / "explorer.html").stat().st_size < 1e6
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])
    maps = torch.frombuffer(bytearray(base64.b64decode(data["maps"])), dtype=torch.uint8)
    maps = maps.view(*data["shape"], 64) / 255              # [n, blocks, panels, H, N, N]
    distances = torch.tensor(data["distances"]).view(data["shape"])
    assert data["shape"] == [4, 2, 5, 4, 64]                # surrogate, 3 stages, scratch
    floats = cikd.to_float(images)
    surrogate = va.surrogate_maps(loaded[0], floats, 2)
    student = next(cikd.student_maps(loaded[0].moments[-1].student, floats))
    for panel, block, want in ((0, 1, surrogate), (3, 0, student)):
        shown = maps[:, block, panel]
        top = want.amax(-1, keepdim=True)
        assert ((shown - want / top).abs() <= 0.5 / 255 + 1e-5).all()
        far = cikd.attention_distance(want)                 # [n, H], mean of all patches
        assert torch.allclose(distances[:, block, panel].mean(-1), far, atol=1e-3)
    picture = Image.open(io.BytesIO(base64.b64decode(data["images"][2])))
    assert torch.equal(cikd.to_rgb(picture, 32), images[2])


LOGITS = {"cikd": "3.0272 -.86584 1.2145 -.51038 -.10718 -1.2229 -.39582 -1.3515 -.01182 -1.1812",
          "scratch": "3.6865 -.7617 1.3752 -.76905 -1.1845 -1.6467 -1.0436 -1.1973 .2081 -1.0072"}


@pytest.mark.parametrize("name", LOGITS)
def test_the_stored_weights_give_the_logits_that_they_gave(name):
    run = va.load_run(HERE / "figures" / "runs" / name)         # strict, the teacher too
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    logits = run.moments[-1].student(x)[0]
    assert logits.tolist() == pytest.approx([float(x) for x in LOGITS[name].split()], abs=1e-4)


def test_a_row_in_methods_and_teachers_is_all_that_a_reader_adds(tiny, runs, monkeypatch, capsys):
    monkeypatch.setitem(cikd.METHODS, "mine", (cikd.JOINT, cikd.LM))
    monkeypatch.setitem(cikd.TEACHERS, "resnet8", ((1, 1, 1), 16))
    folder = cikd.train(replace(tiny, method="mine", teacher="resnet8"))["folder"]
    monkeypatch.delitem(cikd.METHODS, "mine")   # as for one who changed METHODS for that run only
    run = va.load_run(folder)
    assert [span.stage for span in run.spans] == ["ALI+LM", "LM"]
    labels = [moment.label for moment in run.moments]
    assert labels == ["before training", "after ALI+LM", "after LM"]
    switched = cikd.build_student(run.cfg, len(run.classes))
    cikd.load(Path(folder) / "student_ali+lm.pt", switched)
    assert equal(switched.state_dict(), run.moments[1].student.state_dict())
    lines = va.lines_of([run, va.load_run(runs["cikd"])])
    assert lines[0].color != lines[1].color
    assert va.main([folder, "--html"]) == 0
    assert re.search(r"after ALI\+LM +\d", capsys.readouterr().out)


def test_own_pictures_are_classified_and_the_first_four_drawn(copied, photos, tmp_path):
    argv = ["--image", *photos, "--format", "svg", "--html"]
    done = run_cli(tmp_path, *argv, script="visualize_attention.py",        # of the newest run
                   env=os.environ | {"MPLBACKEND": "nowhere"})      # as a notebook may name it
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/figures/*.svg"))) == 5
    student, classes, _ = cikd.load_student(copied)
    for photo in photos:
        p = student(cikd.prepare(photo, 32)).softmax(1)[0]
        best = [f"{classes[i]} {100 * p[i]:.1f} %" for i in p.argsort(descending=True)[:3]]
        assert f"\n{photo}: {', '.join(best)}\n" in done.stdout
    page = (copied / "figures" / "explorer.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["images"]) == 4


def test_who_imports_the_visualizer_keeps_the_backend(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "svg")
    runpy.run_path(va.__file__, run_name="imported")
    assert os.environ["MPLBACKEND"] == "svg"


def test_settings_of_matplotlib_change_no_figure_but_fonts_stay(figures, runs, tmp_path):
    theirs = {
        "image.origin": "lower", "image.cmap": "gray", "image.interpolation": "bilinear",
        "text.usetex": True, "font.size": 30, "figure.dpi": 40, "savefig.bbox": "tight",
        "savefig.facecolor": "black", "axes.grid": True, "axes.facecolor": "red",
        "lines.linestyle": ":", "xtick.labelsize": 30, "legend.frameon": False,
    }
    argv = [str(runs["scratch"]), str(runs["cikd"]), "--output-dir", str(tmp_path), "--gif"]
    with matplotlib.rc_context(theirs):
        assert va.main(argv) == 0
        assert matplotlib.rcParams["image.origin"] == "lower"       # for their own figures
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (figures / file.name).read_bytes(), file.name
    with matplotlib.rc_context({"font.family": ["serif"]}), va.our_settings():
        assert matplotlib.rcParams["font.family"] == ["serif"]


def test_long_class_names_are_shortened_and_no_name_is_a_formula(loaded, tmp_path):
    name = r"$\a$ very long name of a class that no page has any room for 2"
    run = loaded[0]._replace(classes=[f"{name}{i}" for i in range(10)])
    images, truth = va.run_images(run)
    captions = va.captions_of(run, va.chances_of(run, images[:2]), truth[:2])
    assert captions[1].splitlines()[0] == rf"true: $\a$ very long…om for 2{int(truth[1])}"
    assert all(len(text) < 40 for caption in captions for text in caption.splitlines())
    for entries in ([], entries_of(loaded)):                # one column and four
        looked = va.looks(run, entries, images[:2], None)
        va.heatmaps(run, looked, captions, tmp_path / "heatmaps.png")
        picture = np.asarray(Image.open(tmp_path / "heatmaps.png").convert("L"))
        assert picture[:, :2].min() == 255                  # no caption is cut off


@pytest.mark.parametrize("argv,says", [
    ("--index 99", "--index"), ("--query 8 0", "--query"), ("--colour red", "--colour"),
    ("--image nowhere.png", "nowhere.png"), ("--image .", "before --image")])
def test_visualizer_refuses_what_cannot_be(argv, says, copied, capsys):
    assert says in visualizer_fails(capsys, copied, *argv.split())


@pytest.mark.parametrize("file,content,says", [
    ("student.pt", "{}", "not a checkpoint"), ("settings.json", "{}", "another version"),
    ("settings.json", "", "--overwrite"), ("settings.json", '{"dataset": "sha', "--overwrite"),
    ("metrics.csv", "", "--overwrite"), ("metrics.csv", "stage,epoch,lo", "--overwrite"),
    ("metrics.csv", "stage,epoch,accuracy\nALI,1,9\nLM,2,9\n", "2 of 3 epochs")])
def test_a_spoiled_file_of_a_run_is_named(file, content, says, copied, capsys):
    (copied / file).write_text(content)
    error = visualizer_fails(capsys, copied)
    assert says in error and str(copied) in error
    assert file in error or content == "{}"


def test_an_unreadable_picture_among_others_is_named(copied, photos, capsys):
    Path(photos[2]).write_bytes(b"no picture")
    assert photos[2] in visualizer_fails(capsys, copied, "--image", *photos)


def test_a_run_that_is_not_there_or_does_not_fit_is_named(copied, tiny, tmp_path, capsys):
    assert "No such" in visualizer_fails(capsys, tmp_path / "nowhere")
    shutil.rmtree(copied / "snapshots")
    assert "no snapshots" in visualizer_fails(capsys, copied, "--gif")
    other = cikd.train(replace(tiny, method="scratch", data_seed=1))["folder"]
    assert "other images" in visualizer_fails(capsys, copied, other)
    facts = read_facts(copied)
    (copied / "settings.json").write_text(json.dumps(facts | dict(teacher_hash="0")))
    assert "is not the teacher" in visualizer_fails(capsys, copied)


def test_images_that_moved_or_changed_are_asked_for_by_the_visualizers_own_options(
        tmp_path, monkeypatch, capsys):
    pictures, labels = cikd.make_shapes(80, 0)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        file = tmp_path / "set" / ("train" if i < 60 else "test") / f"class{label}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
    monkeypatch.chdir(tmp_path)
    cfg = cikd.Config(dataset="folder", data_dir="set", method="scratch", image_size=32,
                      patch_size=4, student="vit_micro", crop="none", epochs=1, holdout=30)
    run = cikd.train(cfg)["folder"]
    (tmp_path / "set").rename("moved")
    error = visualizer_fails(capsys, run)
    assert "--data-dir" in error and "--image" in error and "--holdout" not in error
    assert va.main([run, "--data-dir", "moved"]) == 0
    capsys.readouterr()
    first = tmp_path / "moved" / "train" / "class0" / "00.png"
    first.unlink()
    assert "other images" in visualizer_fails(capsys, run, "--data-dir", "moved")
    first.write_bytes(b"no picture")
    error = visualizer_fails(capsys, run, "--data-dir", "moved")
    assert "00.png" in error and "--image" in error and "--holdout" not in error
    for other in (tmp_path / "moved" / "train").glob("class0/*"):
        other.unlink()
    error = visualizer_fails(capsys, run, "--data-dir", "moved")
    assert "--data-dir" in error and "--image" in error and "--holdout" not in error


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(copied, capsys):
    (copied / "figures").write_text("a file")
    assert "--output-dir" in visualizer_fails(capsys, copied)
    out = copied / "figures" / "below"
    assert "--output-dir" in visualizer_fails(capsys, copied, "--output-dir", out)


# ---- the README

README, NOTEBOOK = [(HERE / name).read_text() for name in ("README.md", "figures/README.md")]

def test_every_option_file_and_link_on_the_pages_exists():
    known = {"help", "image", "index", "query", "gif", "html", "format",
             *(f.name for f in fields(cikd.Config))}
    options = re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README + NOTEBOOK)
    gone = {"crop_scale", "teacher_maps", "layer_decay",    # rows of results.csv name them
            "nproc_per_node", "gpus", "array", "wrap"}      # torchrun's and Slurm's
    assert {option.replace("-", "_") for option in options} - known == gone
    for page, folder in ((README, HERE), (NOTEBOOK, HERE / "figures")):
        links = [link.split("#") for link in re.findall(r"\]\(([^):]+)\)", page)]
        assert all((folder / file).exists() for file, *_ in links), links
        for file, *anchor in links:             # GitHub's names of headings
            target = page if not file else (folder / file).read_text() if anchor else ""
            heads = [re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-")
                     for head in re.findall(r"^#+ (.*)$", target, re.M)]
            assert not anchor or anchor[0] in heads, anchor
    for name in (*COLUMNS, "settings.json", "student_init.pt", "student_ali.pt"):
        assert f"`{name}`" in README, name

def test_the_code_in_the_readme_is_the_code():
    """Every line of a snippet that quotes cikd.py stands there, comments and indentation aside."""
    def bare(text):
        return {re.sub(r"\s*#.*", "", line).strip().rstrip(",") for line in text.splitlines()}
    code = bare((HERE / "cikd.py").read_text())
    quotes = [q for q in re.findall(r"```python\n(.*?)```", README, re.S) if "student" not in q]
    assert len(quotes) == 4 and not [bare(q) - code for q in quotes if bare(q) - code]

def test_the_programs_in_the_readme_run_and_print_what_it_says(tmp_path, monkeypatch, capsys):
    shapes, use = [q for q in re.findall(r"```python\n(.*?)```", README, re.S) if "import" in q]
    exec(shapes, {})
    assert capsys.readouterr().out in README and "surrogate         [8, 4, 64, 64]" in README
    shutil.copytree(HERE / "figures" / "runs", tmp_path / "figures" / "runs")
    Image.fromarray(np.full((50, 70, 3), 99, np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(use, names)
    label, p = capsys.readouterr().out.split()[-2:]
    assert label in cikd.load_student("figures/runs/cikd")[1] and 0.1 < float(p) <= 1
    exported, x = torch.export.load("student.pt2").module(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(exported(x), names["student"](x), atol=1e-5)

def test_the_tables_of_the_notebook_are_results_csv():
    """Every measured accuracy stands in a table of the notebook, the losing ones too, and no other;
    seeds as mean ± deviation, but one by one on held-out images."""
    seeds, shown = {}, []
    with open(HERE / "figures" / "results.csv", newline="") as file:
        for row in csv.DictReader(file):
            held = "--holdout" in row["command"]
            command = row["command"] if held else re.sub(r" --seed \d+", "", row["command"])
            setting = row["method"], command, row["hardware"]
            seeds.setdefault(setting, []).append(float(row["accuracy"]))
    def mean(values):
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"
    measured = [(method, mean(values)) for (method, _, _), values in seeds.items()]
    rows = r"^\| (scratch|kd|joint|cikd)\b[^|]*\|(.*)\|$"
    for method, cells in re.findall(rows, NOTEBOOK.replace("**", ""), re.M):
        shown += [(method, cell.strip()) for cell in cells.split("|")
                  if re.match(r"\d+\.\d( ±|$)", cell.strip())]
    assert sorted(shown) == sorted(measured) and len(shown) >= 30
    for each, over_teachers in re.findall(r"^\| of \w+ \| (.*) \| (.*) \|$", NOTEBOOK, re.M):
        assert {*each.split(", ")} <= {cell[:4] for _, cell in shown}
        assert over_teachers == mean([float(value) for value in each.split(", ")])
        shown.append(("over teachers", over_teachers))
    page = [cells for _, cells in re.findall(rows, README.replace("**", ""), re.M)]
    assert set(re.findall(r"\d+\.\d(?: ± \d\.\d)?", str(page))) <= {cell for _, cell in shown}

# ---- speed: `python test_cikd.py [vit_tiny | vit_micro] [auto | on | off]`

def speed(student: str = "vit_tiny", compile: str = "auto") -> None:
    """Images/s of each stage as `train` reports it, on random 32-pixel images; of two epochs the
    first is a warm-up."""
    cfg = cikd.resolve(cikd.Config(dataset="cifar10", student=student, compile=compile))
    n = cfg.batch_size * (200 if torch.cuda.is_available() else 6)
    images, labels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10
    data = cikd.Data((images, labels), (images[:100], labels[:100]), list("0123456789"), "speed")
    with tempfile.TemporaryDirectory() as folder:
        for method, epochs in (("scratch", 2), ("kd", 2), ("joint", 2), ("cikd", 3)):
            cikd.train(replace(cfg, method=method, epochs=epochs, ali_epochs=2, teacher_epochs=2,
                               output_dir=folder, run_name=method), data)
        rates = {row["stage"]: float(row["images_per_second"])
                 for path in Path(folder).rglob("metrics.csv")
                 for row in read_metrics(path.parent) if row["epoch"] == "2"}
    print(f"\n{cfg.student}, {cfg.teacher}, batch {cfg.batch_size}, compile {compile}, "
          f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}: images/s")
    print("  ".join(f"{stage} {rate:,.0f}" for stage, rate in rates.items()))

if __name__ == "__main__":
    speed(*sys.argv[1:])

"""Tunes a pre-trained ViT on a data set: `python train.py --data cub --gpu 0`, or `--help` for the settings.

A run writes into its folder: metrics.csv (a row per epoch), best.pt (what was trained, of the epoch
that did best on validation data), last.pt (everything needed to go on), and result.json.
"""

import argparse
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import data
import sa2vp
from vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, load_vit

# AdamW's peak learning rate for each method: the paper's for sa2vp; vpt's and linear's were searched on
# validation data, full's is a customary one. A data set may have its own.
LEARNING_RATE = {"sa2vp": 1e-3, "vpt": 1e-3, "linear": 1e-2, "full": 1e-4}
SA2VP_SETTINGS = "inner_dim scale dropout window prompt_grid distill_layers fusion_layers freeze_adapters".split()

# The paper's ablations: what each changes of the full method.
ABLATIONS = {
    "full-method": {},
    "linear-probe": {"method": "linear"},  # no prompts
    "window-none": {"window": None},  # not aligned
    "window-1": {"window": 1},
    "window-5": {"window": 5},
    "no-distillation": {"distill_layers": ()},  # and so no fusion: every layer prompts
    "no-fusion": {"fusion_layers": ()},
    "half-size-map": {"prompt_grid": "half"},
    "adapters-frozen": {"freeze_adapters": True},
}

# The backbone of the drawn pictures: small, pre-trained here on what shape and colour a thing has.
SMALL_VIT = dict(image_size=data.SIDE, patch_size=8, dim=64, depth=6, heads=4)
SMALL_VIT_FILE = Path("runs/shapes-vit/vit.pt")
PRETRAINING = dict(
    data="shapes-source", method="full", weights=None, epochs=6, batch_size=64, lr=2e-3, weight_decay=1e-4,
    warmup_epochs=1, seed=42,
)  # fmt: skip

# What can be asked for instead of training, and the flags that have a part in it, beside the device's.
PARTS = {
    "list": (),
    "bench": ("weights", "batch_size", "compile"),
    "eval": ("data", "root", "weights", "workers", "compile", "show"),
    "predict": ("weights", "json"),
}

BAD_INPUT = (ValueError, OSError, torch.OutOfMemoryError, BrokenProcessPool)  # ends in one sentence and exit code 2


def main(argv=None):
    """The command line. Exits with 2 and one sentence on bad input, with 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    out = None
    try:
        given = vars(command_line().parse_args(argv))  # just the settings that were given
        check_parts(given)
        if given.pop("list", False):
            return print_rows()
        place = dict(
            root=given.pop("root", None),
            workers=given.pop("workers", None),
            device=choose_device(given.pop("gpu", None), given.pop("cpu", False)),
            compiled=given.pop("compile", False),
        )
        if "eval" in given:
            return evaluate_checkpoint(given.pop("eval"), given, **place)
        if "predict" in given:
            return predict(*given.pop("predict"), given=given, device=place["device"])
        if given.pop("bench", False):
            return bench(given, **place)

        resume, out, seeds = given.pop("resume", False), given.pop("out", None), given.pop("seeds", None)
        asked, ablate = given.get("data", "shapes"), given.pop("ablate", False)
        name = asked if asked in data.GROUPS else data.find(asked).name
        if out is None:
            kind = "ablation" if ablate else given.get("method", "sa2vp")
            out = default_out(f"{name.replace('/', '-')}-{kind}", taken=resume)
        out, holds = from_first_process((out, holds_run(out)))
        if holds and not resume:
            raise ValueError(f"{out} already holds a run: give another --out, or --resume to go on with it")
        if resume and not holds:
            raise ValueError(f"{out} holds no run to resume")
        if (ablate or seeds or asked in data.GROUPS) and (out / "last.pt").exists():
            raise ValueError(f"{out} holds a single run: give the --out of the runs to go on with")
        if ablate:
            run_all(list_jobs(ablations(given), seeds), out, ablation_table, "ablation.csv", **place)
        elif asked in data.GROUPS or seeds:
            members = {member: given | {"data": member} for member in data.GROUPS.get(asked, [])} or {name: given}
            run_all(list_jobs(members, seeds), out, group_table, "results.csv", **place)
        elif resume:
            settings, place["root"] = resumed_run(out, given, place["root"])
            run(settings, out, **place)
        else:
            run(settle(given), out, **place)
    except KeyboardInterrupt:
        if out and holds_run(out):
            argv += [flag for flag in ("--resume",) if flag not in argv]
            argv += [] if any(flag.startswith("--out") for flag in argv) else ["--out", str(out)]
        print(f"\ninterrupted; to go on: python train.py {shlex.join(argv)}", file=sys.stderr)
        sys.exit(130)
    except BAD_INPUT as error:
        print(f"train.py: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------- the loop


def fit(settings, out, root, workers, device, compiled):
    """Trains by `settings`, from where out/last.pt stands if there is one; returns the chosen epoch's model.

    Everything random in an epoch follows from (seed, epoch), so that a run that is interrupted and
    resumed after any whole epoch ends with the numbers of one that never was.
    """
    row, root = data.find(settings["data"]), Path(root or "data")
    if rank() > 0:  # the first process downloads, if need be
        dist.barrier()
    splits = data.load(row, root, settings["seed"], settings.get("tune", False))
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    if not row.vtab and not (splits.val and splits.test):
        raise ValueError(f"{row.name} has no {'validation' if splits.test else 'test'} pictures")
    if len(splits.train) < settings["batch_size"]:
        raise ValueError(f"{len(splits.train)} training pictures make no batch of {settings['batch_size']}")
    if settings["batch_size"] % world_size():
        raise ValueError(f"{world_size()} processes cannot share a batch of {settings['batch_size']} evenly")
    model, meta = build(settings, row, splits.classes)
    meta["root"] = str(root.resolve())
    model.to(device)
    network = torch.compile(model, dynamic=False) if compiled else model  # the same parameters, run faster
    optimizer = make_optimizer(model, settings["weight_decay"])
    train = loader_for(splits.train, row, meta, workers, shuffle_seed=settings["seed"])
    val = loader_for(splits.val, row, meta, workers)

    say(f"{row.name}: {len(splits.train)} training, {len(splits.val)} validation, {len(splits.test)} test pictures "
        f"of {len(splits.classes)} classes ({splits.origin})")  # fmt: skip
    say(f"{settings['method']}: {sa2vp.count_trained(model):,} trained parameters without the head, on {device}, "
        f"to {out}")  # fmt: skip

    history = []  # a row per epoch
    if from_first_process((out / "last.pt").exists()):
        last = read_last(out)
        if last["fingerprint"] != meta["fingerprint"]:
            raise ValueError(f"{out} was begun on another backbone than {meta['weights']} holds now")
        sa2vp.load_trained(model, last["trained"])
        optimizer.load_state_dict(last["optimizer"])
        history = last["history"]
    else:
        (out / "result.json").unlink(missing_ok=True)
        save_checkpoint(out / "last.pt", model, meta, optimizer=optimizer.state_dict(), history=history)

    shared = DistributedDataParallel(network) if dist.is_initialized() else network  # averages the gradients
    for epoch in range(len(history), settings["epochs"]):
        start = time.perf_counter()
        seed_dropout(settings["seed"], epoch, rank())
        train.sampler.epoch = epoch
        loss, lr, speed, waited = train_epoch(shared, train, optimizer, settings, epoch, device)
        val_accuracy, val_prompt_accuracy = evaluate(network, val, device, fill=compiled)
        history.append({
            "epoch": epoch + 1,
            "loss": loss,
            "lr": lr,
            "val_accuracy": val_accuracy,
            "val_prompt_accuracy": val_prompt_accuracy,
            "images_per_second": speed,
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        say(f"epoch {epoch + 1:3d}  loss {loss:.4f}  lr {lr:.1e}  {speed:.0f} images/s  "
            f"validation {percent(val_accuracy, val_prompt_accuracy)}"
            + (f"  ({waited:.0%} waiting for data)" if waited > 0.05 else ""))  # fmt: skip
        if chosen(history) is history[-1]:
            save_checkpoint(out / "best.pt", model, meta, **history[-1])
        save_table(out / "metrics.csv", history)
        save_checkpoint(out / "last.pt", model, meta, optimizer=optimizer.state_dict(), history=history)

    # The test data is used here, once, with the epoch that validation chose.
    best = chosen(history)
    sa2vp.load_trained(model, sa2vp.read_checkpoint(out / "best.pt")["trained"])
    if not from_first_process((out / "result.json").exists()):
        test = loader_for(splits.test, row, meta, workers)
        accuracy, prompt_accuracy = evaluate(network, test, device, fill=compiled)
        result = {
            "method": settings["method"],
            "data": row.name,
            "accuracy": accuracy,
            "prompt_accuracy": prompt_accuracy,
            "val_accuracy": best["val_accuracy"],
            "best_epoch": best["epoch"],
            "trainable": sa2vp.count_trained(model),
            "images_per_second": statistics.median(epoch["images_per_second"] for epoch in history),
            "seconds": sum(epoch["seconds"] for epoch in history),
            "seed": settings["seed"],
        }
        save_whole(out / "result.json", lambda file: file.write(json.dumps(result, indent=2).encode()))
    result = json.loads((out / "result.json").read_text())
    say(f"test {percent(result['accuracy'], result['prompt_accuracy'])} with epoch {result['best_epoch']}, "
        f"trained for {result['seconds']:.0f} s")  # fmt: skip
    return model


def train_epoch(model, loader, optimizer, settings, epoch, device):
    """One pass over the training data: (mean loss, last learning rate, images per second, share of time waiting)."""
    warmup_steps, total_steps = settings["warmup_epochs"] * len(loader), settings["epochs"] * len(loader)
    model.train()
    losses, waited, start = [], 0.0, time.perf_counter()
    hidden = None if rank() == 0 else True  # None: shown on a terminal
    bar = tqdm(loader, f"epoch {epoch + 1}/{settings['epochs']}", unit="batch", leave=False, disable=hidden)
    asked = time.perf_counter()
    for step, (images, labels) in enumerate(bar, start=epoch * len(loader)):
        waited += time.perf_counter() - asked
        lr = learning_rate(step, warmup_steps, total_steps, settings["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device):
            loss = sa2vp.two_pathway_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 10 == 0 or len(losses) == len(loader):  # reading the loss makes a GPU wait: not in every step
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr than {settings['lr']}")
            seconds = time.perf_counter() - start
            speed = len(losses) * settings["batch_size"] / seconds
            bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.1e}, {speed:.0f} images/s")
        asked = time.perf_counter()
    return summed(torch.stack(losses).mean()).item() / world_size(), lr, speed, waited / seconds


def make_optimizer(model, weight_decay):
    """AdamW, eps 1e-8; weight decay on matrices and prompt maps, none on biases, norms and other vectors."""
    trained = sa2vp.trained_parameters(model).values()
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-7):
    """Linear warm-up from 0 to the peak, then a cosine down to the floor; steps count from 0."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


@torch.inference_mode()
def evaluate(model, loader, device, fill=False):
    """Accuracy in percent of each pathway, (base, prompt); None for one that the method has not, or for no pictures.

    `fill` fills the last batch up, because a compiled model is compiled for one size.
    """
    if not len(loader.dataset):
        return None, None
    model.eval()
    correct, logits = torch.zeros(2, dtype=torch.long, device=device), ()
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if fill:
            images = F.pad(images, (0, 0) * 3 + (0, loader.batch_size - len(labels)))
        with autocast(device):
            logits = model(images)
        for pathway, scores in enumerate(logits):
            correct[pathway] += (scores[: len(labels)].argmax(dim=1) == labels).sum()
    base, prompt = (100 * n / len(loader.dataset) for n in summed(correct).tolist())
    return base, prompt if len(logits) == 2 else None


def seed_dropout(*key):
    """Seeds PyTorch's generator by several numbers, so that no two keys share a stream."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def autocast(device):
    """bfloat16 where matrix products are faster in it: on CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def chosen(history):
    """The epoch that is kept: the first of highest validation accuracy, base pathway; without validation, the last."""
    if history[-1]["val_accuracy"] is None:
        return history[-1]
    return max(history, key=lambda epoch: epoch["val_accuracy"])


def percent(base, prompt):
    """Both pathways' accuracies in words; "-" where there is none."""
    return "-" if base is None else f"{base:.2f} %" + ("" if prompt is None else f" (prompt pathway {prompt:.2f} %)")


# ---------------------------------------------------------------------- several processes (torchrun)


def rank():
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor):
    """The tensor, summed over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def say(text=""):
    """Prints, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def from_first_process(content):
    """What the first process has there, so that all agree on it."""
    contents = [content]
    if dist.is_initialized():
        dist.broadcast_object_list(contents)
    return contents[0]


# ---------------------------------------------------------------------- several runs


def ablations(given):
    """{variant: what is given for it}, as `ABLATIONS` has it.

    The linear probe has no part in SA2VP's own settings, and keeps the learning rate that suits it.
    """
    for name in given.keys() & set().union(*ABLATIONS.values()):
        raise ValueError(f"--{name.replace('_', '-')} has no part in --ablate, which changes it itself")
    if given.get("data") in data.GROUPS:
        raise ValueError(f"--ablate takes one data set, not the group {given['data']}")
    probe = {name: value for name, value in given.items() if name not in (*SA2VP_SETTINGS, "lr")}
    return {name: (probe if "method" in change else given) | change for name, change in ABLATIONS.items()}


def list_jobs(variants, seeds):
    """{variant: what is given for it} -> {folder: (variant, settings)}, a run for each of the seeds."""
    jobs = {}
    for name, given in variants.items():
        for seed in seeds or [None]:
            settings = settle(given | ({} if seed is None else {"seed": seed}))
            jobs[name.replace("/", "-") + ("" if seed is None else f"-seed{seed}")] = name, settings
    return jobs


def run_all(jobs, out, tabulate, file, **place):
    """Runs a list of settings one after another, each in its folder below `out`; `tabulate` makes a table of all.

    What is finished is kept, what was interrupted goes on; one that cannot run is named, and the rest still runs.
    """
    for folder, (_, settings) in jobs.items():
        if (out / folder / "last.pt").exists() and read_last(out / folder)["settings"] != settings:
            raise ValueError(f"{out / folder} was run with other settings: give the same ones, or another --out")
    results, failures = {name: [] for name, _ in jobs.values()}, {}
    for number, (folder, (name, settings)) in enumerate(jobs.items(), 1):
        say(f"\n[{number}/{len(jobs)}] {folder}")
        try:
            run(settings, out / folder, **place)
            results[name].append(json.loads((out / folder / "result.json").read_text()))
        except BAD_INPUT as error:
            if dist.is_initialized():  # the other processes are still in there
                raise
            failures[folder] = sentence(error)
    for folder, failure in failures.items():
        print(f"train.py: {folder} could not run: {failure}", file=sys.stderr)
    if not any(results.values()):
        raise ValueError("none of these could run")
    rows = tabulate(results)
    save_table(out / file, rows)
    print_table(rows)
    if failures:
        sys.exit(2)


def accuracies(runs):
    """{seed: accuracy} of some result.json; what --tune leaves untested counts by validation."""
    return {run["seed"]: run["val_accuracy"] if run["accuracy"] is None else run["accuracy"] for run in runs}


def spread(values):
    """Mean and standard deviation over seeds, for a row of a table."""
    values = list(values)
    return {
        "accuracy": statistics.mean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def ablation_table(results):
    """{variant: its result.json for each seed} -> rows: accuracy, and its change from the full method's."""
    rows, full = [], accuracies(results["full-method"])
    for name, runs in results.items():
        found = accuracies(runs)
        changes = [found[seed] - full[seed] for seed in found.keys() & full.keys()]
        trainable = runs[0]["trainable"] if runs else None
        change = statistics.mean(changes) if changes else None
        rows.append({"variant": name, **spread(found.values()), "change": change, "trainable": trainable})
    return rows


def group_table(results):
    """{data set: its result.json for each seed} -> rows: of each data set, then the means of whole groups."""
    seeds = {run["seed"] for runs in results.values() for run in runs}
    first = next(runs[0] for runs in results.values() if runs)
    published = {} if first["accuracy"] is None else data.PUBLISHED[first["method"]]
    scores, rows = {}, []

    def add(name, found, trainable=None):
        scores[name] = found  # {seed: accuracy}
        rows.append({"data": name, **spread(found.values()), "published": published.get(name), "trainable": trainable})

    for name, runs in results.items():
        add(name, accuracies(runs), runs[0]["trainable"] if runs else None)
    for group, members in data.GROUPS.items():
        if set(members) <= results.keys():
            parts = [part for part in data.GROUPS if part.startswith(f"{group}/")] or members  # VTAB: mean of its three
            columns = [scores[part] for part in parts]
            whole = all(column.keys() == seeds for column in columns)  # of a group, every member and seed or nothing
            add(group, {seed: statistics.mean(column[seed] for column in columns) for seed in seeds} if whole else {})
    return rows


def print_table(rows):
    """Rows (dicts of the same keys) in columns as wide as they need."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    say()
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value):
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value}"


def print_rows():
    """--list: a line per data set, with SA2VP's settings for it."""
    print_table([
        {
            "data": row.name,
            "classes": row.classes,
            "transforms": "crop, flip" if row.crop else "resize",
            "r": row.inner_dim,
            "s": f"{row.scale:g}",
            "batch": row.batch_size,
            "lr": f"{(LEARNING_RATE | row.lr)['sa2vp']:g}",
            "F": "default" if row.fusion_layers is None else ",".join(map(str, row.fusion_layers)),
            "from": row.source,
        }
        for row in data.ROWS
    ])  # fmt: skip


# ---------------------------------------------------------------------- what a run starts from


def settle(given):
    """Every setting of a run: what was given, else the data set's own, else the recipe's."""
    row = data.find(given.get("data", "shapes"))
    method, epochs = given.get("method", "sa2vp"), given.get("epochs", row.epochs)
    settings = dict(
        data=row.name,
        method=method,
        weights=str(SMALL_VIT_FILE) if row.drawn else "imagenet21k",
        epochs=epochs,
        batch_size=row.batch_size,
        lr=(LEARNING_RATE | row.lr)[method],
        weight_decay=1e-4,
        warmup_epochs=round(epochs / 10),  # the recipe's 10 of 100
        seed=42,
    )
    if row.vtab:
        settings["tune"] = False
    elif "tune" in given:
        raise ValueError(f"--tune is for VTAB-1k: {row.name} has validation pictures of its own")
    if method == "sa2vp":
        settings |= dict(inner_dim=row.inner_dim, scale=row.scale, dropout=row.dropout, window=3)
        settings |= dict(prompt_grid=None, distill_layers=None, freeze_adapters=False)
        settings["fusion_layers"] = None if "distill_layers" in given else row.fusion_layers
    for name in given:
        if name not in settings:
            raise ValueError(f"--{name.replace('_', '-')} is a setting of --method sa2vp, not of {method}")
    settings |= given
    if settings["data"] not in data.TABLE:
        settings["data"] = str(Path(given["data"]).resolve())
    if settings["weights"] != "imagenet21k":
        settings["weights"] = str(Path(settings["weights"]).resolve())
    if settings["epochs"] <= settings["warmup_epochs"]:
        raise ValueError(f"--epochs {epochs} must be above --warmup-epochs {settings['warmup_epochs']}")
    return settings


def run(settings, out, **place):
    """One run by complete settings; for the drawn pictures' own backbone, that first."""
    if settings["weights"] == str(SMALL_VIT_FILE.resolve()):
        pretrain_small_vit(**place)
    fit(settings, out, **place)


def build(settings, row, classes):
    """The model, seeded, and `meta`: what its checkpoints say beside the trained parameters."""
    torch.manual_seed(settings["seed"])
    image_size, weights = (row.image_size, row.image_size), settings["weights"]
    if weights is None:  # pre-training starts from nothing
        vit = VisionTransformer(**SMALL_VIT)
        vit.mean, vit.std = IMAGENET_MEAN, IMAGENET_STD
    else:
        own = Path(weights).match(str(SMALL_VIT_FILE))  # whose number of heads its file does not tell
        vit = load_vit(weights, image_size, heads=SMALL_VIT["heads"] if own else None)
    options = {name: settings[name] for name in SA2VP_SETTINGS if name in settings}
    if options.get("prompt_grid") == "half":
        options["prompt_grid"] = tuple(max(1, side // 2) for side in vit.grid)
    meta = dict(
        method=settings["method"],
        options=options,
        classes=list(classes),
        settings=settings,
        weights=weights,
        fingerprint=vit.fingerprint(),
        heads=vit.blocks[0].attn.heads,
        image_size=image_size,
        crop=row.crop,
        mean=vit.mean,
        std=vit.std,
    )
    return sa2vp.METHODS[settings["method"]](vit, len(classes), **meta["options"]), meta


def pretrain_small_vit(**place):
    """Trains the drawn pictures' backbone by the same loop, once, and writes its weights under timm's names."""
    if not SMALL_VIT_FILE.exists():
        say(f"pre-training a small ViT on single shapes (once; kept as {SMALL_VIT_FILE})")
        model = fit(PRETRAINING, SMALL_VIT_FILE.parent, **place)
        save_whole(SMALL_VIT_FILE, partial(torch.save, {"model": model.vit.cpu().state_dict()}))
        say()


def transform_for(meta, training=False):
    """The way from a PIL picture to what the model of these `meta` takes."""
    return data.transform(meta["crop"], training, meta["image_size"], meta["mean"], meta["std"])


def loader_for(samples, row, meta, workers, shuffle_seed=None):
    """The samples as the model takes them, in batches; shuffled and augmented if there is a `shuffle_seed`."""
    show = transform_for(meta, training=shuffle_seed is not None)
    if workers is None:
        workers = 0 if row.drawn else min(8, max(1, os.cpu_count() // world_size()))
    batch_size, share = max(meta["settings"]["batch_size"], world_size()), (rank(), world_size())
    return data.make_loader(samples, show, batch_size, workers, shuffle_seed, share)


def default_out(name, taken=False):
    """runs/<name>, with the next free number; or, of those, the last that is `taken`."""
    last = free = Path("runs", name)
    for number in itertools.count(2):
        if not free.exists():
            return last if taken else free
        last, free = free, Path("runs", f"{name}-{number}")


def holds_run(out):
    """Is there anything of a run, or of several, in this folder?"""
    return any(any(out.rglob(name)) for name in ("last.pt", "best.pt", "result.json"))


def read_last(out):
    """What last.pt holds; ValueError if a run cannot go on from it."""
    last = sa2vp.read_checkpoint(out / "last.pt")
    if not {"optimizer", "history"} <= last.keys():
        raise ValueError(f"{out / 'last.pt'} is not what a run goes on from")
    return last


def resumed_run(out, given, root):
    """The settings and the root of the run in `out`; ValueError if a setting that is given now is another."""
    if not (out / "last.pt").exists():
        raise ValueError(f"{out} holds no run to resume (several runs are resumed with the flags that began them)")
    last = read_last(out)
    own = last["settings"]
    now = settle({name: own[name] for name in ("data", "method", "epochs")} | given)
    for name in given:
        if now[name] != own.get(name):
            raise ValueError(f"{out} was run with {name} {own.get(name)}, not {now[name]}: leave it out")
    return own, root or last["root"]


def evaluate_checkpoint(path, given, root, workers, device, compiled):
    """--eval: prints the test accuracy of a checkpoint again; --show draws what it looks at."""
    model, meta = sa2vp.load(path, given.get("weights"))
    network = torch.compile(model.to(device), dynamic=False) if compiled else model.to(device)
    row = data.find(given.get("data", meta["settings"]["data"]))
    splits = data.load(row, root or meta["root"], meta["settings"]["seed"])
    if not splits.test:
        raise ValueError(f"{row.name} has no test pictures")
    if splits.classes != meta["classes"]:
        raise ValueError(f"{path} was trained on other classes than {row.name} has")
    test = loader_for(splits.test, row, meta, workers)
    accuracy, prompt_accuracy = evaluate(network, test, device, fill=compiled)
    say(f"test {accuracy} %" + ("" if prompt_accuracy is None else f" (prompt pathway {prompt_accuracy} %)"))
    if "show" in given:
        some = np.linspace(0, len(splits.test) - 1, min(given["show"], len(splits.test))).round().astype(int)
        plain, weights = model.vit, given.get("weights") or meta["weights"]
        if meta["method"] == "full":  # which has tuned its own
            plain = load_vit(weights, meta["image_size"], meta["heads"]).to(device).eval()
        page = draw_page(model, plain, meta, [splits.test[i] for i in some])
        save_whole(path.with_name("show.png"), partial(page.save, format="png"))
        say(f"wrote {path.with_name('show.png')}")


def predict(path, *pictures, given, device):
    """--predict: prints the five likeliest classes of each picture, in the order given; of a folder, by name.

    One that cannot be read is named on stderr, the rest still comes, and the exit code is 2.
    """
    if not pictures:
        raise ValueError("--predict takes a checkpoint and then pictures or folders of them")
    model, meta = sa2vp.load(path, given.get("weights"))
    model.to(device)
    show = transform_for(meta)
    failures = 0
    for picture in data.find_pictures(pictures):
        try:
            image = show(data.open_picture(picture))[None].to(device)
        except ValueError as error:
            print(f"train.py: {sentence(error)}", file=sys.stderr)
            failures += 1
            continue
        top = likeliest(model, image, meta["classes"], 5)[0]
        if "json" in given:
            entries = [{"class": name, "probability": probability} for name, probability in top]
            say(json.dumps({"picture": str(picture), "top": entries}))
        else:
            say("\n".join([str(picture), *(f"  {probability:7.2%}  {name}" for name, probability in top)]))
    if failures:
        sys.exit(2)


@torch.inference_mode()
def likeliest(model, images, classes, count):
    """For each image its `count` likeliest classes as (name, probability), the likeliest first."""
    with autocast(images.device):
        probabilities = model.predict(images).float().softmax(dim=1)
    top = probabilities.topk(min(count, len(classes)))
    return [[(classes[i], p) for p, i in zip(*row)] for row in zip(top.values.tolist(), top.indices.tolist())]


def sentence(error):
    """What an error says, on one line; from a loader's worker it comes below that process's traceback."""
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return " ".join(text.split())


# ---------------------------------------------------------------------- what a tuned model looks at

PAGE, HEAD, GAP = 1200, 56, 12  # pixels: the page's width, the height of its titles, what is between columns
DARK_TO_BRIGHT = np.array([(10, 8, 40), (95, 20, 110), (190, 55, 85), (245, 140, 30), (252, 250, 170)])


def draw_page(model, plain, meta, samples):
    """--show: a PIL picture 1200 pixels wide, a row for each sample: what it is, what the model looks at, its class."""
    pictures = [data.open_picture(picture) for picture, _ in samples]
    show = transform_for(meta)
    images = torch.stack([show(picture) for picture in pictures]).to(next(model.parameters()).device)
    mean, std = (torch.tensor(values)[:, None, None] for values in (meta["mean"], meta["std"]))
    overlays = look(model, plain, meta["method"], images)
    titles = ["picture", *overlays, "predicted and true class"]
    side = (PAGE - GAP) // len(titles) - GAP

    tiles, predictions = [], likeliest(model, images, meta["classes"], 1)
    for i, (picture, (_, label), ((predicted, probability),)) in enumerate(zip(pictures, samples, predictions)):
        seen = to_pil_image((images[i].cpu() * std + mean).clamp(0, 1))
        proportions = seen.size if meta["crop"] else picture.size  # squeezed for the model, but not for the eye
        size = [max(1, round(side * pixels / max(proportions))) for pixels in proportions]
        seen = seen.resize(size)
        tiles.append(seen)
        for colours, share in overlays.values():
            colours = Image.fromarray(colours[i]).resize(size, Image.Resampling.NEAREST)  # patches stay squares
            tiles.append(Image.blend(seen.convert("L").convert("RGB"), colours, share))
        true = meta["classes"][label]
        verdict = (predicted, "forestgreen" if predicted == true else "firebrick")
        tiles.append(words(side, {f"predicted, {probability:.0%}": verdict, "true": (true, "black")}))

    squares = [pil_to_tensor(ImageOps.pad(tile, (side, side), color="white")) for tile in tiles]
    grid = to_pil_image(make_grid(squares, nrow=len(titles), padding=GAP, pad_value=255))
    page = Image.new("RGB", (PAGE, HEAD + grid.height), "white")
    page.paste(grid, (0, HEAD))
    for column, title in enumerate(titles):
        place, text = (GAP + column * (side + GAP) + side / 2, HEAD), textwrap.fill(title, side // 9)
        ImageDraw.Draw(page).text(place, text, "black", ImageFont.load_default(17), anchor="md", align="center")
    return page


def look(model, plain, method, images):
    """{title: (colours (B, h, w, 3), their share over the picture)}: what there is to see of a method.

    That is what the class token attends to in the last layer, in the `plain` backbone and in the tuned
    model, dark to bright by its square root, on one scale; and for SA2VP how much the prompts change
    each patch, from the least to the most, and the prompt map, its principal components as colours.
    """
    states = {"linear": [""], "full": [" before tuning", " after tuning"]}
    states = states.get(method, [" without prompts", " with prompts"])
    attention = torch.stack([sa2vp.class_attention(network, images) for _, network in zip(states, (plain, model))])
    attention = attention / attention.amax((0, 2, 3))[:, None, None].clamp(min=1e-12)
    overlays = {f"attention{state}": (heat(values.sqrt()), 0.6) for state, values in zip(states, attention)}
    if method == "sa2vp":
        strength = sa2vp.prompting_strength(model, images)
        strength = strength - strength.amin((1, 2), keepdim=True)
        overlays["change by the prompts"] = heat(strength / strength.amax((1, 2), keepdim=True).clamp(min=1e-12)), 0.6
        colours = principal_colours(model.prompt_map()[0, 1:]).reshape(1, *model.prompt_grid, 3)
        overlays["prompt map, the same for all"] = colours.repeat(len(images), axis=0), 1.0
    return overlays


def heat(values):
    """Numbers from 0 to 1, of any shape, as colours from dark to bright: (..., 3), uint8."""
    anchors = np.linspace(0, 1, len(DARK_TO_BRIGHT))
    channels = [np.interp(values.cpu(), anchors, channel) for channel in DARK_TO_BRIGHT.T]
    return np.stack(channels, axis=-1).astype(np.uint8)


@torch.no_grad()
def principal_colours(tokens):
    """(N, d) -> (N, 3), uint8: the first three principal components, each from its least to its most."""
    u, s, _ = torch.linalg.svd((tokens - tokens.mean(dim=0)).cpu(), full_matrices=False)
    components = F.pad(u * s, (0, 3))[:, :3]
    components -= components.amin(dim=0)
    spans = components.amax(dim=0)
    components = components / spans.clamp(min=1e-3 * spans.max() + 1e-12)  # what is next to nothing stays dark
    return (255 * components).round().byte().numpy()


def words(side, entries):
    """A square of text: {what it is: (a name, its colour)}."""
    tile = Image.new("RGB", (side, side), "white")
    pen, y = ImageDraw.Draw(tile), 8
    for what, (name, colour) in entries.items():
        lines = textwrap.wrap(name.replace("_", " "), side // 10, max_lines=3, placeholder="...")
        for line, ink, size in [(what, "grey", 14), *((line, colour, 18) for line in lines)]:
            pen.text((4, y), line, ink, ImageFont.load_default(size))
            y += size + 4
        y += 14
    return tile


# ---------------------------------------------------------------------- what a step costs

BENCH_METHODS = {  # row of the table: (method, its options)
    "linear": ("linear", {}),
    "VPT-deep, 50 prompts": ("vpt", {}),
    "full fine-tuning": ("full", {}),
    "SA2VP": ("sa2vp", {"dropout": 0.0}),
    "SA2VP, 7x7 prompt map": ("sa2vp", {"dropout": 0.0, "prompt_grid": (7, 7)}),
    "SA2VP, dropout 0.1": ("sa2vp", {"dropout": 0.1}),
}
TRAINING, PREDICTION = "train: ", "predict: "
BENCH_ROWS = [f"{TRAINING}{name}" for name in ("frozen encoder", *BENCH_METHODS)]
BENCH_ROWS += [f"{PREDICTION}{name}" for name in ("plain encoder", "SA2VP", "SA2VP, 7x7 prompt map")]


def bench_step(name, weights, batch_size, device, compiled):
    """A function that takes one step of a row of the table, on random images."""
    torch.manual_seed(0)
    vit = (load_vit(weights) if weights else VisionTransformer()).to(device).requires_grad_(False)
    images = torch.randn(batch_size, 3, *vit.image_size, device=device)
    labels = torch.randint(200, (batch_size,), device=device)
    method, options = BENCH_METHODS.get(name.split(": ")[1], (None, {}))
    model = sa2vp.METHODS[method](vit, 200, **options).to(device) if method else vit
    wrap = partial(torch.compile, dynamic=False) if compiled else lambda function: function
    model.train(name.startswith(TRAINING))

    if name.startswith(PREDICTION):
        predict = wrap(model.predict if method else model)

        @torch.inference_mode()
        def step():
            with autocast(device):
                predict(images)

    elif method is None:  # forward, and backward to the input of the first layer

        @wrap
        def encode(tokens):
            for block in vit.blocks:
                tokens = block(tokens)
            return vit.norm(tokens[:, 0])

        def step():
            with autocast(device):
                encode(vit.embed(images).requires_grad_()).sum().backward()

    else:
        network, optimizer = wrap(model), make_optimizer(model, 1e-4)

        def step():
            with autocast(device):
                loss = sa2vp.two_pathway_loss(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def bench_memory(*row):
    """The peak memory of two steps of a row, in MB: the allocator's on CUDA, else this process's own."""
    step, device = bench_step(*row), row[3]
    step(), step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def bench(given, root, workers, device, compiled, rounds=7):
    """--bench: time per image and peak memory of a step, ViT-B/16 at 224, each beside the frozen encoder's.

    The rows take turns, so that a noisy machine is noisy for all of them: a row's ratio is the median of
    its ratios to the first row in the same round.
    """
    batch_size = given.get("batch_size", 64 if device.type == "cuda" else 8)
    common = (given.get("weights"), batch_size, device, compiled)
    vit = load_vit(given["weights"]) if "weights" in given else VisionTransformer()  # says so if it cannot be read
    peaks = {}
    for name in BENCH_ROWS:  # each in a process of its own, whose peak is the row's
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks[name] = process.submit(bench_memory, name, *common).result()

    times = {name: [] for name in BENCH_ROWS}
    steps = {name: bench_step(name, *common) for name in BENCH_ROWS}
    for number in tqdm(range(1 + rounds), "rounds", leave=False, disable=None):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name] += [time.perf_counter() - start] if number else []  # the first round warms up

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    precision = ("bfloat16" if device.type == "cuda" else "float32") + (", compiled" if compiled else "")
    say(f"ViT of width {vit.dim} and {len(vit.blocks)} layers at {vit.image_size[0]}, batch {batch_size}, {kind}, "
        f"{precision}, PyTorch {torch.__version__}; medians of {rounds} rounds")  # fmt: skip
    rows = []
    for name in BENCH_ROWS:
        first = next(row for row in BENCH_ROWS if row.split(":")[0] == name.split(":")[0])
        rows.append({
            "step": name,
            "ms per image": 1000 * statistics.median(times[name]) / batch_size,
            "time ratio": statistics.median(mine / firsts for mine, firsts in zip(times[name], times[first])),
            "peak MB": round(peaks[name]),
            "memory ratio": peaks[name] / peaks[first],
        })  # fmt: skip
    print_table(rows)


# ---------------------------------------------------------------------- files


def save_whole(path, write):
    """Has `write(file)` fill a file that is there whole or, whatever happens meanwhile, as it was before.

    Of several processes the first writes, and the others wait for it.
    """
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    if dist.is_initialized():
        dist.barrier()


def save_checkpoint(path, model, meta, **more):
    """Writes a best.pt or last.pt: `meta`, `more`, and what tells the model from its backbone."""
    trained = {name: tensor.detach().cpu() for name, tensor in sa2vp.saved_parameters(model).items()}
    save_whole(path, partial(torch.save, {**meta, **more, "trained": trained}))


def save_table(path, rows):
    """Writes rows (dicts of the same keys) as CSV."""

    def write(file):
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text.detach()  # flushes

    save_whole(path, write)


# ---------------------------------------------------------------------- the command line


def check_parts(given):
    """ValueError for a flag that has no part in what is asked for."""
    for asked, parts in PARTS.items():
        for name in given.keys() - {asked, "gpu", "cpu", *parts} if asked in given else ():
            raise ValueError(f"--{name.replace('_', '-')} has no part in --{asked}")
    for name, asked in ("show", "eval"), ("json", "predict"):
        if name in given and asked not in given:
            raise ValueError(f"--{name} goes with --{asked}")


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as for every other bad input, without the usage."""

    def error(self, message):
        """Raises ValueError."""
        raise ValueError(message)


def value(read, what, fits):
    """A type for argparse: how a text is `read`, and if that `fits`; else the message says `what` it has to be."""

    def parse(text):
        try:
            if fits(found := read(text)):
                return found
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is not {what}")

    return parse


def numbers(text, between):
    """Whole numbers, and what stands `between` them; "none" is no number."""
    return () if text == "none" else tuple(map(int, text.split(between)))


def command_line():
    """The parser. Settings that are not given stay away, for the data set's row and the recipe to fill in."""
    count = value(int, "a whole number from 1 to 10000", lambda n: 1 <= n <= 10_000)
    few = value(int, "a whole number from 1 to 100", lambda n: 1 <= n <= 100)
    workers = value(int, "a whole number from 0 to 100", lambda n: 0 <= n <= 100)
    natural = value(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
    positive = value(float, "a number above 0", lambda x: 0 < x < math.inf)
    weight = value(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
    share = value(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
    layers = value(partial(numbers, between=","), "a list of layers such as 0,4,8, or none",
                   lambda found: all(i >= 0 for i in found))  # fmt: skip
    grid = value(lambda text: text if text == "half" else numbers(text, "x"), "a height and width such as 7x7, or half",
                 lambda found: found == "half" or len(found) == 2 and 0 < min(found) <= max(found) < 100)  # fmt: skip
    window = value(lambda text: None if text == "none" else int(text), "an odd number such as 3, or none",
                   lambda side: side is None or 0 < side < 10_000 and side % 2)  # fmt: skip

    line = CommandLine(
        prog="train.py", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add = line.add_argument
    groups = ", ".join(data.GROUPS)
    add("--data", metavar="NAME|PATH", help=f"a name from --list, a group ({groups}), or a folder; default shapes")
    add("--root", metavar="PATH", type=Path, help="where data sets are kept; default data")
    add("--weights", metavar="imagenet21k|PATH", help="the backbone's; default imagenet21k, for shapes its own")
    device = line.add_mutually_exclusive_group()
    device.add_argument("--gpu", type=natural, metavar="N", help="this GPU; default the best device there is")
    device.add_argument("--cpu", action="store_true")
    add("--method", choices=list(sa2vp.METHODS), help="default sa2vp")
    add("--epochs", type=count)
    add("--batch-size", type=count)
    add("--lr", type=positive, help="peak learning rate; each method has its own default")
    add("--weight-decay", type=weight)
    add("--warmup-epochs", type=natural, help="default a tenth of the epochs")
    add("--inner-dim", type=count, help="r, of prompt maps and adapters")
    add("--scale", type=weight, help="s, the weight of a prompting message")
    add("--dropout", type=share)
    add("--window", type=window, metavar="3|none", help="side of the aligned neighbourhood")
    add("--prompt-grid", type=grid, metavar="7x7|half", help="size of the prompt map; default the image's grid")
    add("--distill-layers", type=layers, metavar="0,4,8|none", help="D; default every fourth")
    add("--fusion-layers", type=layers, metavar="4,8|none", help="F, a subset of D; default D without 0")
    add("--freeze-adapters", action="store_true", help="leave the adapters as they were drawn")
    seed = line.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=natural, help="default 42")
    seed.add_argument("--seeds", type=natural, nargs="+", metavar="N", help="repeat with each: mean and deviation")
    add("--tune", action="store_true", help="VTAB-1k: train on train800, report val200, leave the test data alone")
    add("--workers", type=workers, help="processes that load pictures")
    add("--out", type=Path, metavar="PATH", help="the run's folder; default the next free runs/<data>-<method>")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--resume", action="store_true", help="go on with the run in --out from its last whole epoch")
    add = line.add_argument_group("instead of one run").add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="print the data sets and their settings")
    add("--ablate", action="store_true", help="run the paper's ablations, one after another, and print their table")
    add("--bench", action="store_true", help="print what a step costs beside the frozen encoder; writes nothing")
    add("--eval", type=Path, metavar="CHECKPOINT", help="print the test accuracy of a best.pt again")
    add("--predict", type=Path, nargs="+", metavar=("CHECKPOINT", "PICTURE"),
        help="print the five likeliest classes of each picture; of a folder, of all pictures in it")  # fmt: skip
    add = line.add_argument_group("with those").add_argument
    add("--show", type=few, metavar="N", help="with --eval: draw what the model sees in N test pictures, show.png")
    add("--json", action="store_true", help="with --predict: print a JSON object per picture")
    return line


def choose_device(gpu, cpu):
    """This process's device. Under torchrun, every process takes its own GPU, and they are connected here."""
    gpus = 0 if cpu else torch.cuda.device_count()
    if "LOCAL_RANK" in os.environ:
        if gpu is not None:
            raise ValueError("torchrun gives every process its own GPU: leave out --gpu")
        gpu = int(os.environ["LOCAL_RANK"]) if gpus else None
    if gpu is not None and gpu >= gpus:
        raise ValueError(f"there is no GPU {gpu}: PyTorch sees {gpus}; leave out --gpu, or take --cpu")
    if gpus:
        torch.cuda.set_device(gpu or 0)
    if "LOCAL_RANK" in os.environ:
        # The others wait while the first process downloads: longer than the default ten minutes.
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(hours=12))
    if gpus:
        return torch.device("cuda", gpu or 0)
    return torch.device("mps" if torch.backends.mps.is_available() and not cpu else "cpu")


if __name__ == "__main__":
    main()

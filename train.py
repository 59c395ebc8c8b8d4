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
import re
import shlex
import statistics
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import sa2vp
from vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, load_vit

# AdamW's peak learning rate for each method: the paper's for sa2vp; the baselines' were searched on
# validation data. A data set may have its own.
LEARNING_RATE = {"sa2vp": 1e-3, "vpt": 1e-3, "linear": 1e-2, "full": 1e-4}
SA2VP_SETTINGS = "inner_dim scale dropout window prompt_grid distill_layers fusion_layers".split()

# The backbone of the drawn pictures: small, pre-trained here on what shape and colour a thing has.
SMALL_VIT = dict(image_size=data.SIDE, patch_size=8, dim=64, depth=6, heads=4)
SMALL_VIT_FILE = Path("runs/shapes-vit/vit.pt")
PRETRAINING = dict(
    data="shapes-source", method="full", weights=None, epochs=6, batch_size=64, lr=2e-3, weight_decay=1e-4,
    warmup_epochs=1, seed=42,
)  # fmt: skip

BAD_INPUT = (ValueError, OSError, torch.OutOfMemoryError)  # what ends in one sentence and exit code 2


def main(argv=None):
    """The command line. Exits with 2 and one sentence on bad input, with 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    out = None
    try:
        given = vars(command_line().parse_args(argv))  # just the settings that were given
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
        if given.pop("bench", False):
            return bench(given, **place)

        resume, out, seeds = given.pop("resume", False), given.pop("out", None), given.pop("seeds", None)
        asked = given.get("data", "shapes")
        if out is None:
            name = asked if asked in data.GROUPS else data.find(asked).name
            out = default_out(f"{name.replace('/', '-')}-{given.get('method', 'sa2vp')}", taken=resume)
        out, holds = from_first_process((out, holds_run(out)))
        if holds and not resume:
            raise ValueError(f"{out} already holds a run: give another --out, or --resume to go on with it")
        if asked in data.GROUPS or seeds:
            run_all(list_jobs(given, asked, seeds or [None]), out, **place)
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
        last = sa2vp.read_checkpoint(out / "last.pt")
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
        save_whole(out / "result.json", json.dumps(result, indent=2).encode())
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
    return "-" if base is None else f"{base:.2f} %" + ("" if prompt is None else f" (prompt pathway {prompt:.2f} %)")


# ---------------------------------------------------------------------- several processes (torchrun)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor):
    """Of all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def say(text=""):
    if rank() == 0:
        print(text, flush=True)


def from_first_process(content):
    """What the first process has there, so that all agree on it."""
    contents = [content]
    if dist.is_initialized():
        dist.broadcast_object_list(contents)
    return contents[0]


# ---------------------------------------------------------------------- several runs


def list_jobs(given, asked, seeds):
    """{folder: settings} of each run: one for each member of a group and each seed (None: the default one)."""
    jobs = {}
    for member in data.GROUPS.get(asked, [asked]):
        for seed in seeds:
            settings = settle(given | {"data": member} | ({} if seed is None else {"seed": seed}))
            folder = data.find(member).name.replace("/", "-") + ("" if seed is None else f"-seed{seed}")
            jobs[folder] = settings
    return jobs


def run_all(jobs, out, **place):
    """Runs a list of settings one after another, each in its folder below `out`, and ends with a table of all.

    What is finished is kept, what was interrupted goes on; one that cannot run is named, and the rest still runs.
    """
    for folder, settings in jobs.items():
        last = out / folder / "last.pt"
        if last.exists() and sa2vp.read_checkpoint(last)["settings"] != settings:
            raise ValueError(f"{out / folder} was run with other settings: give the same ones, or another --out")
    results, failures = {}, {}
    for number, (folder, settings) in enumerate(jobs.items(), 1):
        say(f"\n[{number}/{len(jobs)}] {folder}")
        try:
            run(settings, out / folder, **place)
            result = json.loads((out / folder / "result.json").read_text())
            results.setdefault(result["data"], []).append(result)
        except BAD_INPUT as error:
            if dist.is_initialized():  # the other processes are still in there
                raise
            failures[folder] = sentence(error)
    for folder, failure in failures.items():
        print(f"train.py: {folder} could not run: {failure}", file=sys.stderr)
    if not results:
        raise ValueError("none of these could run")
    rows = summary(results, [data.find(settings["data"]).name for settings in jobs.values()])
    save_table(out / "results.csv", rows)
    print_table(rows)


def summary(results, names):
    """Rows of the table: a data set's mean and standard deviation over seeds, then the means of whole groups.

    `results`: {data set: its result.json for each seed}. What --tune leaves untested counts by validation.
    """
    names = list(dict.fromkeys(names))
    seeds = max(map(len, results.values()))
    first = next(iter(results.values()))[0]
    published = {} if first["accuracy"] is None else data.PUBLISHED[first["method"]]
    scores, rows = {}, []

    def add(name, values, trainable=None):
        scores[name] = values if len(values) == seeds else []  # of a group, every member and seed or nothing
        rows.append({
            "data": name,
            "accuracy": statistics.mean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "published": published.get(name),
            "trainable": trainable,
        })  # fmt: skip

    for name in names:
        runs = results.get(name, [])
        values = [r["val_accuracy"] if r["accuracy"] is None else r["accuracy"] for r in runs]
        add(name, values, runs[0]["trainable"] if runs else None)
    for group, members in data.GROUPS.items():
        if set(members) <= set(names):
            parts = [part for part in data.GROUPS if part.startswith(f"{group}/")] or members  # VTAB: mean of its three
            columns = [scores[part] for part in parts]
            add(group, [statistics.mean(seed) for seed in zip(*columns)] if all(columns) else [])
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
    """--list: the paper's setup, a line per data set."""
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
        settings |= dict(prompt_grid=None, distill_layers=None)
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
    meta = dict(
        method=settings["method"],
        options={name: settings[name] for name in SA2VP_SETTINGS if name in settings},
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
        save_whole(SMALL_VIT_FILE, torch_bytes({"model": model.vit.cpu().state_dict()}))
        say()


def loader_for(samples, row, meta, workers, shuffle_seed=None):
    """The samples as the model takes them, in batches; shuffled and augmented if there is a `shuffle_seed`."""
    show = data.transform(row.crop, shuffle_seed is not None, meta["image_size"], meta["mean"], meta["std"])
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
    return any(any(out.rglob(name)) for name in ("last.pt", "best.pt", "result.json"))


def resumed_run(out, given, root):
    """The settings and the root of the run in `out`; ValueError if a setting that is given now is another."""
    if not (out / "last.pt").exists():
        raise ValueError(f"{out} holds no run to resume (a group is resumed with its --data and --seeds)")
    last = sa2vp.read_checkpoint(out / "last.pt")
    if not {"optimizer", "history"} <= last.keys():
        raise ValueError(f"{out / 'last.pt'} is not what a run goes on from")
    own = last["settings"]
    now = settle({name: own[name] for name in ("data", "method", "epochs")} | given)
    for name in given:
        if now[name] != own.get(name):
            raise ValueError(f"{out} was run with {name} {own.get(name)}, not {now[name]}: leave it out")
    return own, root or last["root"]


def evaluate_checkpoint(path, given, root, workers, device, compiled):
    """--eval: prints the test accuracy of a checkpoint again."""
    for name in given.keys() - {"data", "weights"}:
        raise ValueError(f"--{name.replace('_', '-')} has no part in --eval")
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


def sentence(error):
    """What an error says, on one line; from a loader's worker it comes below that process's traceback."""
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return " ".join(text.split())


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


def bench_memory(report, *row):
    """Sends the peak memory of two steps of a row, in MB: the allocator's on CUDA, else this process's own."""
    device = row[3]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = bench_step(*row)
    step(), step()
    if device.type == "cuda":
        report(torch.cuda.max_memory_allocated(device) / 2**20)
    else:
        import resource  # not there on Windows

        report(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def bench(given, root, workers, device, compiled, rounds=7):
    """--bench: time per image and peak memory of a step, ViT-B/16 at 224, each beside the frozen encoder's.

    The rows take turns, so that a noisy machine is noisy for all of them: a row's ratio is the median of
    its ratios to the first row in the same round.
    """
    for name in given.keys() - {"weights", "batch_size"}:
        raise ValueError(f"--{name.replace('_', '-')} has no part in --bench")
    batch_size = given.get("batch_size", 64 if device.type == "cuda" else 8)
    common = (given.get("weights"), batch_size, device, compiled)
    vit = load_vit(given["weights"]) if "weights" in given else VisionTransformer()  # says so if it cannot be read
    peaks = {}
    for name in BENCH_ROWS:
        if device.type == "cuda":
            bench_memory(partial(peaks.__setitem__, name), name, *common)
            torch.cuda.empty_cache()
        else:  # a process of its own, whose peak is the row's
            receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=bench_memory, args=(send.send, name, *common))
            process.start()
            send.close()  # so that a child that dies ends the waiting
            peaks[name] = receive.recv()
            process.join()

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


def save_whole(path, content):
    """Writes bytes so that the file is there whole or, whatever happens meanwhile, as it was before.

    Of several processes the first writes, and the others wait for it.
    """
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    if dist.is_initialized():
        dist.barrier()


def torch_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_checkpoint(path, model, meta, **more):
    trained = {name: tensor.detach().cpu() for name, tensor in sa2vp.trained_parameters(model).items()}
    save_whole(path, torch_bytes({**meta, **more, "trained": trained}))


def save_table(path, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    save_whole(path, text.getvalue().encode())


# ---------------------------------------------------------------------- the command line


class CommandLine(argparse.ArgumentParser):
    def error(self, message):  # one sentence, as for every other bad input, without the usage
        raise ValueError(message)


def number(kind, what, fits):
    """A type for argparse: a number that `fits`; else the message says `what` it has to be."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


def written(pattern, what, read):
    """A type for argparse: a text of that pattern, and how it is `read`."""

    def parse(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return read(text)

    return parse


def command_line():
    count = number(int, "a whole number from 1 to 10000", lambda n: 1 <= n <= 10_000)
    natural = number(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
    positive = number(float, "a number above 0", lambda x: 0 < x < math.inf)
    weight = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
    share = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
    layers = written(
        r"none|\d{1,4}(,\d{1,4})*", "a list of layers such as 0,4,8, or none",
        lambda text: () if text == "none" else tuple(map(int, text.split(","))),
    )  # fmt: skip
    grid = written(
        r"[1-9]\d?x[1-9]\d?", "a height and width such as 7x7", lambda text: tuple(map(int, text.split("x")))
    )
    window = written(
        r"none|\d{0,3}[13579]", "an odd number such as 3, or none", lambda text: None if text == "none" else int(text)
    )

    # Settings that are not given stay away, so that the data set's row and the recipe can fill them in.
    line = CommandLine(
        prog="train.py", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add = line.add_argument
    groups = ", ".join(data.GROUPS)
    add("--data", metavar="NAME|PATH", help=f"a name from --list, a group ({groups}), or a folder; default shapes")
    add("--list", action="store_true", help="print the data sets and their settings")
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
    add("--prompt-grid", type=grid, metavar="7x7", help="size of the prompt map; default the image's grid")
    add("--distill-layers", type=layers, metavar="0,4,8|none", help="D; default every fourth")
    add("--fusion-layers", type=layers, metavar="4,8|none", help="F, a subset of D; default D without 0")
    seed = line.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=natural, help="default 42")
    seed.add_argument("--seeds", type=natural, nargs="+", metavar="N", help="repeat with each: mean and deviation")
    add("--tune", action="store_true", help="VTAB-1k: train on train800, report val200, leave the test data alone")
    add("--workers", type=natural, help="processes that load pictures")
    add("--out", type=Path, metavar="PATH", help="the run's folder; default runs/<data>-<method>")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--bench", action="store_true", help="print what a step costs beside the frozen encoder; writes nothing")
    add("--eval", type=Path, metavar="CHECKPOINT", help="print the test accuracy of a best.pt again")
    add("--resume", action="store_true", help="go on with the run in --out from its last whole epoch")
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

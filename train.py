"""Tunes a pre-trained ViT on a data set: `python train.py --data cub --gpu 0`, or `--help` for all settings.

A run reads its data, puts a method on a frozen backbone, trains it for some epochs, keeps the epoch of
highest validation accuracy (without validation data, as in VTAB-1k, the last), and evaluates it once on the
test data. Its folder holds metrics.csv (a row per epoch), best.pt (the kept epoch), last.pt (the last whole
epoch, from which the same command goes on after an interruption) and result.json.

Any setting may be given several values. A training command is a list of runs; several end with a table.
"""

import argparse
import csv
import inspect
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

import data
import sa2vp
import vit

# Settings that are the same for all data sets and methods.
RECIPE = dict(
    seed=42, weight_decay=1e-4, heads=None, normalize=None,
    tune=False,  # VTAB-1k alone: train800 and val200, without test
)  # fmt: skip
# Peak learning rates of AdamW: sa2vp's is the paper's; vpt's and linear's were searched on validation data;
# adapter's is sa2vp's and full's a customary one. A data set may have its own.
LEARNING_RATE = {"sa2vp": 1e-3, "vpt": 1e-3, "adapter": 1e-3, "linear": 1e-2, "full": 1e-4}

# torchrun's processes: which one this is, how many there are, and the same on this machine.
RANK, WORLD = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(os.getenv("LOCAL_RANK", 0)), int(os.getenv("LOCAL_WORLD_SIZE", 1))

BAD_INPUT = (ValueError, OSError, torch.OutOfMemoryError)  # ends in one sentence and exit code 2


class Machine(NamedTuple):
    """What a run computes on. None of it is a setting of the method."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    workers: int  # processes that load pictures
    compile: bool
    root: Path  # where data sets are kept


# ---------------------------------------------------------------------- the loop


def fit(settings, out, machine, state, test=True):
    """Trains by `settings`, going on from `state` (what out/last.pt holds, if anything); returns the result, a dict.

    Everything random in an epoch follows from (seed, epoch), so that a run that was interrupted ends with the
    numbers of one that was not, if it has the same number of workers and processes. Without `test` it is not tested.
    """
    splits, backbone = read_inputs(settings, machine)
    model, meta = build_model(settings, backbone, splits.classes, machine)
    optimizer = make_optimizer(model, settings["weight_decay"])
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    history = restore(state, meta, model, optimizer, scaler)  # a dict for each epoch
    network = wrap(model, machine)
    loader = partial(make_loader, meta=meta, machine=machine)
    log(f"{settings['method']}: {sa2vp.count_trained(model):,} trained parameters without the head, on "
        f"{machine.device} in {text(machine.dtype)}, to {out}")  # fmt: skip

    for epoch in range(len(history), settings["epochs"]):
        start = time.perf_counter()
        torch.manual_seed(seed_from(settings["seed"], epoch, RANK))  # of dropout, crops and flips
        batches = loader(splits.train, shuffle_seed=seed_from(settings["seed"], epoch))
        loss, lr, speed = train_epoch(network, batches, optimizer, scaler, settings, epoch, machine)
        accuracy, prompt_accuracy = evaluate(network, loader(splits.val), machine)
        history.append(dict(epoch=epoch + 1, loss=loss, lr=lr, val_accuracy=accuracy, val_prompt_accuracy=prompt_accuracy,
                            images_per_second=speed, seconds=time.perf_counter() - start))  # fmt: skip
        log(f"epoch {epoch + 1:3d}  loss {loss:.4f}  lr {lr:.1e}  {speed:.0f} images/s  "
            f"validation {percent(accuracy, prompt_accuracy)}")  # fmt: skip
        checkpoint = meta | {"trained": sa2vp.trained_parameters(model), "history": history}
        # The first epoch of highest validation accuracy is kept; without validation, the last.
        if accuracy is None or all(accuracy > earlier["val_accuracy"] for earlier in history[:-1]):
            save(out / "best.pt", checkpoint)
        save(out / "metrics.csv", history)
        save(out / "last.pt", checkpoint | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})

    # The test data is used only here, once, with the epoch that was kept.
    kept = sa2vp.read_checkpoint(out / "best.pt")
    best = kept["history"][-1]
    sa2vp.load_trained(model, kept["trained"])
    accuracy, prompt_accuracy = evaluate(network, loader(splits.test if test else []), machine)
    result = dict(
        method=settings["method"], data=data.find(settings["data"]).name, seed=settings["seed"],
        accuracy=accuracy, prompt_accuracy=prompt_accuracy, val_accuracy=best["val_accuracy"], best_epoch=best["epoch"],
        trainable=sa2vp.count_trained(model), seconds=sum(epoch["seconds"] for epoch in history),
        images_per_second=statistics.median(epoch["images_per_second"] for epoch in history),
    )  # fmt: skip
    save(out / "result.json", result)
    return result


def train_epoch(model, batches, optimizer, scaler, settings, epoch, machine):
    """One pass over the training data: (mean loss, last learning rate, images per second)."""
    model.train()
    warmup_steps, total_steps = settings["warmup_epochs"] * len(batches), settings["epochs"] * len(batches)
    total, start = torch.zeros((), device=machine.device), time.perf_counter()
    bar = progress(batches, f"epoch {epoch + 1}/{settings['epochs']}")
    for step, (images, labels) in enumerate(bar, start=epoch * len(batches)):
        lr = learning_rate(step, warmup_steps, total_steps, settings["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = (tensor.to(machine.device, non_blocking=True) for tensor in (images, labels))
        optimizer.zero_grad()
        with autocast(machine):
            loss = sa2vp.two_pathway_loss(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
    loss = summed(total).item() / len(batches) / WORLD
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr than {settings['lr']}")
    return loss, lr, len(batches) * settings["batch_size"] / (time.perf_counter() - start)


@torch.inference_mode()
def evaluate(model, batches, machine):
    """Accuracy in percent of each pathway, (base, prompt); None for one that does not exist, or without pictures."""
    model.eval()
    totals, logits = torch.zeros(3, device=machine.device), ()  # correct by base, correct by prompt, pictures
    for images, labels in batches:
        images, labels = (tensor.to(machine.device, non_blocking=True) for tensor in (images, labels))
        with autocast(machine):
            logits = model(images)
        for pathway, scores in enumerate(logits):
            totals[pathway] += (scores.argmax(dim=1) == labels).sum()
        totals[2] += len(labels)
    base, prompt, count = summed(totals).tolist()
    return 100 * base / count if count else None, 100 * prompt / count if len(logits) == 2 else None


def make_optimizer(model, weight_decay):
    """AdamW; weight decay on all that has more than one dimension (matrices, prompt maps, gates), not on the rest."""
    trained = sa2vp.trained_parameters(model).values()
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)  # its defaults: betas (0.9, 0.999), eps 1e-8


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-7):
    """Linear warm-up from 0 to the peak, then a cosine down to the floor; steps count from 0."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - 1)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def autocast(machine):
    """Matrix products in the machine's dtype."""
    return torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)


def seed_from(*numbers):
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---------------------------------------------------------------------- what a run starts from


def complete_settings(given):
    """All settings of a run: those that were given, else the data set's own, else the method's, else the recipe's."""
    row, method = data.find(given["data"]), given["method"]
    settings = RECIPE | {name: getattr(row, name) for name in ("weights", "image_size", "batch_size", "epochs")}
    for option in inspect.signature(sa2vp.METHODS[method]).parameters.values():
        if option.default is not option.empty:
            settings[option.name] = getattr(row, option.name, option.default)
    settings |= {"lr": (LEARNING_RATE | row.lr)[method]} | given
    settings.setdefault("warmup_epochs", round(settings["epochs"] / 10))  # the recipe's 10 of 100
    for name, known in (("data", data.TABLE), ("weights", vit.BACKBONES)):
        if settings[name] not in (None, *known):  # a path
            settings[name] = str(Path(settings[name]).resolve())
    if settings["epochs"] <= settings["warmup_epochs"]:
        raise ValueError(f"--epochs {settings['epochs']} must be above --warmup-epochs {settings['warmup_epochs']}")
    return settings


def read_inputs(settings, machine):
    """The pictures and the backbone of a run. The first process of each machine downloads what is not there."""
    row, batch_size, weights = data.find(settings["data"]), settings["batch_size"], settings["weights"]
    torch.manual_seed(settings["seed"])  # of the small ViT, which is not read but drawn

    with first_on_each_machine():
        if weights:
            backbone = vit.load_vit(weights, settings["image_size"], settings["heads"], settings["normalize"])
        else:
            backbone = vit.VisionTransformer(settings["image_size"], **SMALL_VIT)
        splits = data.load(row, machine.root, settings["tune"])
    if not (row.vtab or splits.val and splits.test):
        raise ValueError(f"{row.name} has no {'validation' if splits.test else 'test'} pictures")
    if len(splits.train) < batch_size or batch_size % WORLD:
        raise ValueError(f"{len(splits.train)} training pictures and {WORLD} processes make no batches of {batch_size}: "
                         f"try another --batch-size")  # fmt: skip
    log(f"{row.name}: {len(splits.train)} training, {len(splits.val)} validation, {len(splits.test)} test pictures "
        f"of {len(splits.classes)} classes ({splits.origin})")  # fmt: skip
    guessed = not settings["heads"] and Path(weights or "").suffix not in ("", ".npz")
    log(f"{weights or 'from scratch'}: width {backbone.dim}, {len(backbone.blocks)} layers, "
        f"{backbone.blocks[0].attn.heads} heads{' (taken as width / 64)' if guessed else ''}, patch "
        f"{backbone.patch_size[0]}, image {backbone.image_size[0]}, normalization {backbone.normalize}")  # fmt: skip
    return splits, backbone


def build_model(settings, backbone, classes, machine):
    """The method on its backbone, drawn by the run's seed, and `meta`: what its checkpoints say beside the weights."""
    torch.manual_seed(settings["seed"])
    size, (mean, std) = backbone.image_size, vit.NORMALIZE[backbone.normalize]
    meta = {
        "settings": settings,
        "classes": list(classes),
        "backbone": {"image_size": size, "heads": backbone.blocks[0].attn.heads, "normalize": backbone.normalize},
        "fingerprint": vit.fingerprint(backbone),
        "input": {"crop": data.find(settings["data"]).crop, "image_size": size, "mean": mean, "std": std},
        "root": str(machine.root.resolve()),
    }
    return sa2vp.build(backbone, len(classes), settings).to(machine.device), meta


def restore(state, meta, model, optimizer, scaler):
    """Puts the last whole epoch's state, if any, into model, optimizer and scaler; returns the history of the epochs."""
    if not state:
        return []
    if (state["fingerprint"], state["classes"]) != (meta["fingerprint"], meta["classes"]):
        raise ValueError("the run was begun on another backbone or on other classes: give another --out")
    sa2vp.load_trained(model, state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the run was begun without one
        scaler.load_state_dict(state["scaler"])
    return state["history"]


def wrap(model, machine):
    """The model, compiled or shared by processes if need be, with the same parameters."""
    if machine.compile:
        torch.compiler.reset()  # PyTorch compiles the same code only a few times in a process
        model = torch.compile(model, dynamic=False)
    if WORLD > 1:
        model = DistributedDataParallel(model)  # averages the gradients
        model.broadcast_buffers = False  # the masks never change; and evaluation then needs no other process
    return model


def make_loader(samples, meta, machine, shuffle_seed=None):
    """The samples as the model takes them, in batches; shuffled and augmented if there is a `shuffle_seed`."""
    batch_size, pin_memory = max(meta["settings"]["batch_size"], WORLD), machine.device.type == "cuda"
    return data.make_loader(samples, meta["input"], batch_size, machine.workers, pin_memory, shuffle_seed, RANK, WORLD)


# ---------------------------------------------------------------------- several runs

ABLATIONS = {  # what each variant changes of the full method
    "full-method": {},
    "linear-probe": {"method": "linear"},
    "no-prompts": {"method": "adapter"},
    "window-none": {"window": None},  # not aligned
    "window-1": {"window": 1},
    "window-5": {"window": 5},
    "no-distillation": {"distill_layers": (), "fusion_layers": ()},  # every layer prompts
    "no-fusion": {"fusion_layers": ()},
    "half-size-map": {"prompt_grid": "half"},
}

# The backbone of the drawn pictures: small, pre-trained here on what shape and colour a thing has.
SMALL_VIT = dict(patch_size=8, dim=64, depth=6, heads=1, normalize="imagenet")
PRETRAINED = Path(data.TABLE["shapes"].settings["weights"])
PRETRAINING = dict(data="shapes-source", method="full", epochs=8, batch_size=32, lr=2e-3)

# Several values of these are no search: each is tested. The values are the defaults.
REPEATED = {"data": ["shapes"], "method": ["sa2vp"], "seed": [RECIPE["seed"]]}


def train(flags, machine):
    """Every run that was asked for, one after another; several end with a table. Returns whether one could not run.

    If a setting other than data, method and seed has several values, a search comes first: each combination
    is trained with the first seed, without test data. Only the one of highest validation accuracy is then
    trained with every seed and tested.
    """
    given = {name: flags[name] for name in SETTINGS if name in flags}
    ablate = "ablate" in flags
    kind = "variant" if ablate else "method"
    combinations = list_combinations(given, ablate)
    seeds = (REPEATED | given)["seed"]
    varied = [name for name in given if len(given[name]) > 1]
    several = varied or len(combinations) > 1
    out = flags.get("out", Path("runs", run_name(given, "ablation" if ablate else None)))
    rows, scores, failures = [], {}, []

    def attempt(variant, settings, test=True):
        """The result of one of the runs; {} if it could not run."""
        own = {name: [settings[name]] for name in ("data", *varied) if name in settings}
        folder = out / (run_name(own, variant) + "-tune" * settings["tune"]) if several else out
        try:
            return run(settings, folder, machine, test)
        except BAD_INPUT as error:
            if WORLD > 1:  # the others would still be in there
                raise
            failures.append(folder)
            print(f"train.py: {folder} could not run: {one_line(error)}", file=sys.stderr)
            return {}

    for (member, variant), choices in combinations.items():
        row, best, searched, tested = data.find(member), choices[0], [], []
        if len(choices) > 1:
            searched = [attempt(variant, settings | {"tune": row.vtab}, test=False) for settings in choices]
            best = max(zip(searched, choices), key=lambda pair: pair[0].get("val_accuracy", -1))[1]
        if any(searched) or not searched:
            # The chosen run of the first seed is there and is only tested; VTAB-1k's is trained anew, on val200 too.
            tested = [attempt(variant, best | {"seed": seed}) for seed in seeds]
        scores[member, variant] = [result.get("accuracy") for result in tested]
        for settings, results in zip(choices, [[result] for result in searched] if searched else [tested]):
            found = {"data": row.name, kind: variant, "trainable": results[0].get("trainable")}
            found["val_accuracy"] = mean(result.get("val_accuracy") for result in results)
            if settings is best:
                found |= mean_and_std(scores[member, variant])
            rows.append({name: text(value) for name, value in settings.items()} | found)
    rows += group_rows(scores, kind)
    columns = ["data", kind, *(name for name in varied if name not in REPEATED)]
    columns += ["val_accuracy", "accuracy", "std", "published", "trainable"]
    rows = [{column: row.get(column) for column in columns} for row in rows]
    if several:
        save(out / "results.csv", rows)
        print_table(rows)
    return bool(failures)


def list_combinations(given, ablate=False):
    """{setting: values} -> {(data set, variant): [the settings of each combination, with the first seed]}.

    Data sets, methods and seeds are repetitions; whatever else has several values makes combinations. A
    setting is for the methods that have it.
    """
    values = REPEATED | given
    variants = ABLATIONS if ablate else {method: {"method": method} for method in values["method"]}
    combinations, used = {}, set(REPEATED)
    for member, (variant, change) in itertools.product(data.members(values["data"]), variants.items()):
        fixed = {"data": member, "method": "sa2vp", "seed": values["seed"][0]} | change
        options = complete_settings(fixed).keys() - REPEATED
        own = [name for name in given if name in options]
        used |= set(own)
        choices = itertools.product(*(given[name] for name in own))
        combinations[member, variant] = [complete_settings(fixed | dict(zip(own, choice))) for choice in choices]
    if unused := given.keys() - used:
        raise ValueError(f"{flag(min(unused))} is no setting of {' or '.join(variants)}")
    return combinations


def run(settings, out, machine, test=True):
    """One run, in its folder. An interrupted one is resumed; a finished one is kept, and its result returned again.

    Raises ValueError if the folder holds a run of other settings.
    """
    state, file = {}, out / "result.json"
    if (out / "last.pt").exists():
        state = sa2vp.read_checkpoint(out / "last.pt")
        for name, now in settings.items():
            then = state["settings"].get(name)
            if then != now:
                raise ValueError(f"{out} holds a run with {name} {text(then)}, not {text(now)}: give another --out")
    else:
        file.unlink(missing_ok=True)  # of a run whose last.pt was taken away
    result = json.loads(file.read_text()) if file.exists() else {}
    if not result or test and result["accuracy"] is None:
        if settings["weights"] == str(PRETRAINED.resolve()) and not PRETRAINED.with_name("result.json").exists():
            log(f"pre-training a small ViT on single shapes (once; kept as {PRETRAINED})")
            run(complete_settings(PRETRAINING), PRETRAINED.parent, machine)
            log()
        result = fit(settings, out, machine, state, test)
    log(f"test {percent(result['accuracy'], result['prompt_accuracy'])}, validation "
        f"{percent(result['val_accuracy'], None)} with epoch {result['best_epoch']}, "
        f"trained for {result['seconds']:.0f} s")  # fmt: skip
    return result


def group_rows(scores, kind):
    """Rows for the means of whole groups; `scores` is {(data set, variant): accuracies, one for each seed}.

    A group has a mean only if every member has every seed.
    """
    rows, scores = [], dict(scores)
    variants = dict.fromkeys(variant for _, variant in scores)
    for (group, parts), variant in itertools.product(data.GROUPS.items(), variants):
        members = [scores[part, variant] for part in parts if (part, variant) in scores]
        if len(members) == len(parts):
            scores[group, variant] = [mean(accuracies) for accuracies in zip(*members)]
            published = data.PUBLISHED.get(variant, {}).get(group)
            rows.append({"data": group, kind: variant, "published": published} | mean_and_std(scores[group, variant]))
    return rows


def mean(values):
    """Their mean; None if there are none, or one is None."""
    values = list(values)
    return statistics.mean(values) if values and None not in values else None


def mean_and_std(accuracies):
    """Mean and standard deviation over the seeds, for a row of a table."""
    accuracy = mean(accuracies)
    several = accuracy is not None and len(accuracies) > 1
    return {"accuracy": accuracy, "std": statistics.stdev(accuracies) if several else None}


def run_name(given, variant=None):
    """A folder's name: data set, method (or variant) and whatever else was given, such as cub-sa2vp-lr0.005."""
    values = REPEATED | given
    names = [name if name in data.GROUPS else data.find(name).name for name in values["data"]]
    parts = ["+".join(names), variant or "+".join(values["method"])]
    parts += [name + "+".join(map(text, given[name])) for name in given if name not in ("data", "method")]
    return "-".join(parts).replace("/", "-")


# ---------------------------------------------------------------------- with a tuned model


def evaluate_again(flags, machine):
    """--eval: prints the test accuracy of a checkpoint. With --show, draws what it looks at."""
    model, meta = sa2vp.load(flags["eval"], flags.get("weights"))
    row = data.find(flags.get("data", meta["settings"]["data"]))
    splits = data.load(row, flags.get("root", meta["root"]))
    if splits.classes != meta["classes"] or not splits.test:
        raise ValueError(f"{row.name} has no test pictures of the classes that {flags['eval']} knows")
    model.to(machine.device)
    log(f"test {percent(*evaluate(model, make_loader(splits.test, meta, machine), machine))}")
    if "show" in flags:
        show(flags["eval"], model, meta, splits.test, flags["show"])


def predict(flags, machine):
    """--predict: prints the five likeliest classes of each picture. With --show, draws what the model looks at.

    Returns whether a picture could not be read.
    """
    path, *pictures = flags["predict"]
    if not pictures:
        raise ValueError("--predict takes a checkpoint and then pictures or folders of them")
    model, meta = sa2vp.load(path, flags.get("weights"))
    model.to(machine.device)
    samples, failed, transform = [], False, data.transform(**meta["input"])
    for picture in data.find_pictures(pictures):
        try:
            image = transform(data.open_picture(picture)).to(machine.device)
        except ValueError as error:
            failed = True
            print(f"train.py: {one_line(error)}", file=sys.stderr)
            continue
        with torch.inference_mode(), autocast(machine):
            probabilities = model(image[None])[0][0].float().softmax(dim=0)
        log(picture)
        for label in probabilities.argsort(descending=True)[:5].tolist():
            log(f"  {probabilities[label]:7.2%}  {meta['classes'][label]}")
        samples.append((picture, None))
    if "show" in flags and samples:
        show(path, model, meta, samples, flags["show"])
    return failed


TILE, CAPTION = 200, 44  # pixels


@torch.inference_mode()
def show(path, model, meta, samples, count):
    """--show: writes show.png beside the checkpoint, with a row for each of up to `count` samples, evenly spaced.

    A sample is (picture, label or None). Attention and change are orange over the picture, the brighter the more;
    attentions are on one scale.
    """
    count = min(count, len(samples))
    samples = [samples[i * len(samples) // count] for i in range(count)]
    transform = data.transform(**meta["input"])
    images = torch.stack([transform(data.open_picture(picture)) for picture, _ in samples]).to(model.head.weight.device)
    mean, std = (images.new_tensor(meta["input"][name])[:, None, None] for name in ("mean", "std"))
    seen = images * std + mean
    attention = torch.stack([sa2vp.class_attention(network, images) for network in (model.vit, model)])
    attention = (attention / attention.amax((0, 2, 3), keepdim=True)).sqrt()  # a few patches have most of it
    columns = {
        "class token's attention\n(orange), encoder alone": overlay(seen, attention[0]),
        "class token's attention\n(orange), whole model": overlay(seen, attention[1]),
    }
    if isinstance(model, sa2vp.SA2VP):
        strength = sa2vp.prompting_strength(model, images)
        strength = strength / strength.amax((1, 2), keepdim=True).clamp(min=1e-12)
        columns["change by the prompts\n(orange)"] = overlay(seen, strength)
        columns["prompt map, like prompts\nin like colours"] = principal_colours(model).expand(len(images), -1, -1, -1)

    tiles = []
    for i, guess in enumerate(model(images)[0].argmax(dim=1).tolist()):
        label = samples[i][1]
        true = "" if label is None else f"\ntrue: {meta['classes'][label]}"
        tiles.append(tile(seen[i], f"predicted: {meta['classes'][guess]}{true}"))
        tiles += [tile(column[i], title) for title, column in columns.items()]
    save(path.with_name("show.png"), to_pil_image(make_grid(tiles, 1 + len(columns), pad_value=1)))
    log(f"wrote {path.with_name('show.png')}")


def tile(pixels, caption):
    """A picture (3, height, width), from 0 to 1, below a caption of two lines: (3, CAPTION + TILE, TILE)."""
    image = Image.new("RGB", (TILE, CAPTION + TILE), "white")
    image.paste(to_pil_image(pixels).resize((TILE, TILE), Image.Resampling.NEAREST), (0, CAPTION))
    ImageDraw.Draw(image).text((4, 4), caption, "black", ImageFont.load_default(15))
    return to_tensor(image)


def overlay(pictures, values):
    """Pictures (batch, 3, height, width) under orange, the brighter the higher the values (batch, h, w), from 0 to 1."""
    orange = pictures.new_tensor([1.0, 0.65, 0.1])[:, None, None]
    return 0.3 * pictures + 0.7 * orange * F.interpolate(values[:, None], pictures.shape[-2:])


def principal_colours(model):
    """The first three principal components of the prompt map as red, green and blue, on one scale: (3, h', w')."""
    tokens = model.prompt_map()[0, 1:]  # (h' w', d)
    tokens = tokens - tokens.mean(dim=0)
    components = tokens @ torch.linalg.svd(tokens).Vh[:3].T  # (h' w', 3)
    components = components - components.amin(dim=0)
    return (components / components.max().clamp(min=1e-12)).T.unflatten(1, model.prompt_grid)


# ---------------------------------------------------------------------- what a step costs

BENCH = {  # row of the table: method and options, dropout 0 if not named; the frozen encoder has a linear head
    "frozen encoder": {"method": "linear"},
    "linear probe": {"method": "linear"},
    "adapter": {"method": "adapter"},
    "VPT-deep, 50 prompts": {"method": "vpt"},
    "full fine-tuning": {"method": "full"},
    "SA2VP": {"method": "sa2vp"},
    "SA2VP, 7x7 prompt map": {"method": "sa2vp", "prompt_grid": (7, 7)},
    "SA2VP, dropout 0.1": {"method": "sa2vp", "dropout": 0.1},
}


def bench(flags, machine, rounds=7):
    """--bench: time per image of training and prediction beside the frozen encoder's; on CUDA, memory for training.

    The rows take turns, so that a noisy machine is noisy for all of them: a row's ratio is the median of
    its ratios to the encoder's in the same round.
    """
    cuda, weights, scaler = machine.device.type == "cuda", flags.get("weights"), torch.amp.GradScaler(enabled=False)
    batch_size, repeats = flags.get("batch_size", 64 if cuda else 8), 10 if cuda else 1  # a GPU's step is short
    settings = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-4, "batch_size": batch_size}
    models, memory, seconds = [], {}, np.empty((2 + rounds, len(BENCH), 2))
    torch._dynamo.config.recompile_limit = 2 * len(BENCH)  # with --compile: for training and for prediction
    for name, options in BENCH.items():
        backbone = vit.load_vit(weights) if weights else vit.VisionTransformer()
        model = sa2vp.build(backbone, 200, {"dropout": 0.0} | options).to(machine.device)
        if name == "frozen encoder":
            backbone.pos_embed.requires_grad_()  # backward reaches the first layer's input
        models.append((wrap(model, machine), make_optimizer(model, 1e-4)))
    images = torch.randn(batch_size, 3, *backbone.image_size, device=machine.device)
    batches = [(images, torch.zeros(batch_size, dtype=torch.long, device=machine.device))] * repeats
    for times in progress(seconds, "rounds"):
        for row, (network, optimizer) in enumerate(models):
            before = torch.cuda.memory_allocated()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            train_epoch(network, batches, optimizer, scaler, settings, 0, machine)
            trained = time.perf_counter()
            evaluate(network, batches, machine)
            times[row] = trained - start, time.perf_counter() - trained
            memory.setdefault(row, (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None)

    seconds = seconds[2:]  # the first two rounds warm up
    milliseconds = 1000 * np.median(seconds, axis=0) / batch_size / repeats
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    kind = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    log(f"batch {batch_size}, {kind}, {text(machine.dtype)}{', compiled' if machine.compile else ''}, PyTorch "
        f"{torch.__version__}; medians of {rounds} rounds")  # fmt: skip
    print_table([
        {"per image": name, "training ms": milliseconds[row, 0], "ratio": ratios[row, 0],
         "prediction ms": milliseconds[row, 1], "its ratio": ratios[row, 1], "MiB": memory[row]}
        for row, name in enumerate(BENCH)
    ])  # fmt: skip


# ---------------------------------------------------------------------- files and what is printed


def save(path, content):
    """Writes a .pt, .png, .json or .csv file atomically: whatever happens, it is there whole or as it was before.

    Of several processes the first writes, and the others wait for it.
    """
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_stem(f"{path.stem}.part")
        if path.suffix == ".pt":
            torch.save(content, part)
        elif path.suffix == ".png":
            content.save(part)
        elif path.suffix == ".json":
            part.write_text(json.dumps(content, indent=2))
        else:
            with open(part, "w", newline="") as file:
                writer = csv.DictWriter(file, content[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(content)
        part.replace(path)
    if WORLD > 1:
        dist.barrier()


def print_table(rows):
    """Prints rows (dicts of the same keys) in columns as wide as they need; "-" where there is nothing."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append(["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else text(cell)
                      for cell in row.values()])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    log()
    for line in cells:
        log("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_known(flags, machine):
    """--list: the data sets with SA2VP's settings for them, and the backbones."""
    columns = ("name", "classes", "crop", "inner_dim", "scale", "batch_size", "fusion_layers", "source")
    print_table([{column: getattr(row, column) for column in columns} for row in data.ROWS])
    print_table([{"weights": name, "normalize": known[-1], "source": known[0]} for name, known in vit.BACKBONES.items()])


def text(value):
    """A value as tables, messages and folder names have it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")


def percent(base, prompt):
    """Both pathways' accuracies in words; "-" where there is none."""
    return "-" if base is None else f"{base:.2f} %" + ("" if prompt is None else f" (prompt pathway {prompt:.2f} %)")


def progress(items, description):
    """A progress bar, on a terminal, of the first process."""
    return tqdm(items, description, leave=False, disable=True if RANK else None)


def log(message=""):
    """Prints, once for all processes."""
    if RANK == 0:
        print(message, flush=True)


def one_line(error):
    """What an error says, on one line. One from a DataLoader's worker carries a traceback: its last line is taken."""
    message = str(error) or type(error).__name__
    if message.startswith("Caught "):
        message = message.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return " ".join(message.split())[:400]


# ---------------------------------------------------------------------- devices and processes


def choose_machine(flags):
    """The machine that the flags ask for; under torchrun the processes are connected here."""
    gpu, gpus = flags.get("gpu", LOCAL_RANK), 0 if "cpu" in flags else torch.cuda.device_count()
    if WORLD > 1 and "gpu" in flags:
        raise ValueError("torchrun gives every process its own GPU: leave out --gpu")
    if gpu >= gpus and (gpus or "gpu" in flags):
        raise ValueError(f"there is no GPU {gpu}: PyTorch sees {gpus}; leave out --gpu, or take --cpu")
    device, dtype = torch.device("cpu"), torch.float32
    if gpus:
        device = torch.device("cuda", gpu)
        torch.cuda.set_device(device)
        # Older GPUs only emulate bfloat16, many times slower.
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if WORLD > 1:
        dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = flags.get("workers", min(16, max(1, cpus // LOCAL_WORLD)))
    return Machine(device, dtype, workers, "compile" in flags, flags.get("root", Path("data")))


@contextmanager
def first_on_each_machine():
    """In a `with` block: the first process of each machine goes through it before the others, so that it downloads."""
    if WORLD > 1:
        waiting = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # a download takes longer than a step
    if LOCAL_RANK > 0:
        dist.barrier(waiting)
    yield
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier(waiting)


def summed(tensor):
    """The tensor, summed over all processes."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------- the command line


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as for every other bad input, without the usage."""

    def error(self, message):
        """Raises ValueError."""
        raise ValueError(message)


def number(kind, low, high=math.inf):
    """A type for argparse: a number from `low` to below `high`."""

    def number(value):
        if not low <= kind(value) < high:
            raise argparse.ArgumentTypeError(f"{value} must be at least {low} and below {high}")
        return kind(value)

    return number


def layers(value):
    """A type for argparse: "0,4,8" or "none"."""
    return () if value == "none" else tuple(map(int, value.split(",")))


def grid(value):
    """A type for argparse: "7x7" or "half"."""
    if value == "half":
        return value
    height, width = map(number(int, 1, 100), value.split("x"))
    return height, width


def window(value):
    """A type for argparse: "3" or "none"."""
    return None if value == "none" else int(value)


COUNT, NATURAL = number(int, 1, 10_001), number(int, 0, 2**32)
SETTINGS = {  # flags that are settings of a run: (type, what --help says); the defaults are in `complete_settings`
    "data": (str, f"names from --list, groups ({', '.join(data.GROUPS)}) or folders; default shapes"),
    "method": (str, f"{', '.join(sa2vp.METHODS)}; default sa2vp"),
    "seed": (NATURAL, "default 42"),
    "weights": (str, f"the backbone: a file, or {', '.join(vit.BACKBONES)}; default the data set's"),
    "heads": (COUNT, "of the backbone; default as the file says, else width / 64"),
    "normalize": (str, f"of the backbone's input: {', '.join(vit.NORMALIZE)}; default as the backbone's kind expects"),
    "image_size": (COUNT, "pixels, a multiple of the patch size; default the data set's"),
    "epochs": (COUNT, "default the data set's"),
    "warmup_epochs": (NATURAL, "default a tenth of the epochs"),
    "batch_size": (COUNT, "default the data set's"),
    "lr": (number(float, 1e-12), "peak learning rate; default the method's"),
    "weight_decay": (number(float, 0), "default 1e-4"),
    "inner_dim": (COUNT, "r, of prompt maps and adapters; default the data set's"),
    "scale": (number(float, 0), "s, the weight of a message; default the data set's"),
    "dropout": (number(float, 0, 1), "default the data set's"),
    "window": (window, "side of the aligned neighbourhood, odd, or none; default 3"),
    "prompt_grid": (grid, "size of the prompt map such as 7x7, or half; default the image's grid"),
    "distill_layers": (layers, "D such as 0,4,8, or none; default every fourth layer"),
    "fusion_layers": (layers, "F, a subset of D, or none; default D without 0"),
}
CHOICES = {"method": list(sa2vp.METHODS), "normalize": list(vit.NORMALIZE)}
MACHINE = {
    "gpu": (NATURAL, "this GPU; default the first, else the CPU"),
    "cpu": (bool, "no GPU"),
    "workers": (number(int, 0, 101), "processes that load pictures; default one per CPU, at most 16"),
    "compile": (bool, "run the model through torch.compile"),
    "root": (Path, "where data sets are kept; default data"),
}
OTHERS = {
    "out": (Path, "a run's folder, or that of several; default runs/<what was given>"),
    "ablate": (bool, "train SA2VP and its ablations"),
    "list": (bool, "print the data sets and the backbones that are known by name"),
    "bench": (bool, "print what a step costs beside the frozen encoder's; writes nothing"),
    "eval": (Path, "a best.pt: print its test accuracy again"),
    "predict": (Path, "a best.pt, and pictures or folders: print their classes"),
    "show": (number(int, 1, 101), "with --eval, --predict: draw what the model looks at, show.png"),
}
JOBS = {  # flag: (what it does, the other flags that it takes)
    "list": (print_known, ()),
    "bench": (bench, ("weights", "batch_size")),
    "eval": (evaluate_again, ("data", "weights", "show")),
    "predict": (predict, ("weights", "show")),
    "ablate": (train, {*SETTINGS, "out"}.difference(*ABLATIONS.values())),  # what the variants change is not given
    "training": (train, (*SETTINGS, "out")),
}


def flag(name):
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def command_line():
    """The parser. A flag that is not given is absent from its result."""
    parser = CommandLine(description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    groups = {"settings, each with one value or several": SETTINGS, "machine": MACHINE, "what is done": OTHERS}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (kind, description) in flags.items():
            several = "+" if flags is SETTINGS or name == "predict" else None
            values = dict(type=kind, nargs=several, choices=CHOICES.get(name), metavar="X")
            group.add_argument(flag(name), help=description, **{"action": "store_true"} if kind is bool else values)
    return parser


def main(argv):
    """The command line. Exits with 2 and one sentence on bad input, with 130 when interrupted."""
    try:
        flags = vars(command_line().parse_args(argv))
        job = next((name for name in JOBS if name in flags), "training")
        function, own = JOBS[job]
        for name in sorted(flags.keys() - {job, *MACHINE}):
            if name not in own:
                raise ValueError(f"{flag(name)} has no part in {job if job == 'training' else flag(job)}")
            if name in SETTINGS and function is not train:
                flags[name], *more = flags[name]
                if more:
                    raise ValueError(f"{flag(name)} takes one value here")
        code = 2 if function(flags, choose_machine(flags)) else 0
        if WORLD > 1:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        code = 130
        if RANK == 0:
            print("interrupted; run the same command again to go on", file=sys.stderr)
    except BAD_INPUT as error:
        code = 2
        print(f"train.py: {one_line(error)}", file=sys.stderr)
    except Exception:
        code = 1
        traceback.print_exc()
    if code and WORLD > 1:
        os._exit(code)  # at once, without waiting for the others: torchrun ends them
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Tunes a pre-trained ViT on a data set: `python train.py --data cub --gpu 0`; `--help` lists the settings.

A run reads its data, puts a method on a frozen backbone, trains it, keeps the epoch of highest validation accuracy
(for VTAB-1k the last epoch) and evaluates that epoch once on the test data. Its folder holds metrics.csv (one row per
epoch), best.pt (the kept epoch), last.pt (the last completed epoch, to resume from) and result.json.

Any setting may be given several values: several data sets, methods or seeds are several runs, several values of
anything else are a search. Several runs end with a table.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import data
import sa2vp
import vit

# Every setting of a run. A data set's row in data.py overrides these, and the command line overrides both.
DEFAULTS = dict(
    data="shapes", method="sa2vp",
    weights="imagenet21k", image_size=224, heads=None, normalize=None,  # None: as the weights file says
    epochs=100, warmup_epochs=None,  # None: a tenth of the epochs
    batch_size=64, lr=None, weight_decay=1e-4,  # None: the method's LEARNING_RATE
    inner_dim=16, scale=0.1, dropout=0.1,  # r, the rank of the prompt map; s, the weight of a message
    window=3, prompt_grid=None, distill_layers=None, fusion_layers=None,  # sa2vp.SA2VP says what None means
    prompts=50, seed=42,  # prompts: of vpt
    search=False,  # not a flag: in a search VTAB-1k is trained on 800 of its 1,000 images, validated on the others
)  # fmt: skip
# Peak learning rates of AdamW: sa2vp's is the paper's, vpt's and linear's were searched on validation data.
LEARNING_RATE = {"sa2vp": 1e-3, "vpt": 1e-3, "adapter": 1e-3, "linear": 1e-2, "full": 1e-4}


class Machine(NamedTuple):
    """What a run computes on. None of it is a setting of the method."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    workers: int  # processes that load images
    compile: bool  # run the model through torch.compile
    root: str  # the folder of the data sets


# ---------------------------------------------------------------------- the loop


def fit(settings, out, machine, test=True):
    """Trains a run, or resumes it from out/last.pt, and returns its result. With test=False no test images are read."""
    splits, model, meta = prepare(settings, machine)
    optimizer = make_optimizer(model, settings["weight_decay"])
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    history = resume(out, meta, model, optimizer, scaler)  # one dict per completed epoch
    on_gpu = machine.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    # The loaders are made once, because starting their workers takes seconds.
    loader = partial(data.make_loader, input=meta["input"], batch_size=settings["batch_size"], workers=machine.workers)
    train_batches, val_batches = loader(splits.train, shuffle_seed=settings["seed"]), loader(splits.val)
    steps = settings["epochs"] * len(train_batches)
    few = ", perhaps too few: try a smaller --batch-size or more --epochs" if steps < 200 else ""
    print(f"{settings['method']}: {sa2vp.count_trained(model):,} trained parameters without the head, on "
          f"{machine.device} in {machine.dtype}, to {out}, in {steps} steps{few}")  # fmt: skip

    for epoch in range(len(history), settings["epochs"]):
        start = time.perf_counter()
        # Each epoch is seeded by (seed, epoch), so a resumed run gives the numbers of an uninterrupted one.
        torch.manual_seed(10_007 * settings["seed"] + epoch)  # for dropout; each epoch below 10,007 has its own
        train_batches.sampler.epoch = epoch  # the sampler seeds order, crops and flips
        loss, lr = train_epoch(model, train_batches, optimizer, scaler, settings, epoch, machine)
        accuracy, prompt_accuracy = evaluate(model, val_batches, machine)
        history.append(dict(epoch=epoch + 1, loss=loss, lr=lr, val_accuracy=accuracy,
                            val_prompt_accuracy=prompt_accuracy, seconds=time.perf_counter() - start,
                            peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None))  # fmt: skip
        print(f"epoch {epoch + 1:3d}  loss {loss:.4f}  lr {lr:.1e}  validation {shown(accuracy)} %  "
              f"{history[-1]['seconds']:.1f} s")  # fmt: skip

        checkpoint = meta | {"trained": sa2vp.trained_parameters(model), "history": history}
        # The epoch of highest validation accuracy is kept; ties go to the later one. For VTAB-1k it is the last.
        if data.find(settings["data"]).vtab or all(accuracy >= earlier["val_accuracy"] for earlier in history):
            save(out / "best.pt", checkpoint)
        save(out / "metrics.csv", history)
        save(out / "last.pt", checkpoint | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})

    # The test images are read only here, once, with the kept epoch.
    kept = sa2vp.read_checkpoint(out / "best.pt")
    sa2vp.load_trained(model, kept["trained"])
    accuracy, prompt_accuracy = evaluate(model, loader(splits.test), machine) if test else (None, None)
    best = kept["history"][-1]
    result = dict(accuracy=accuracy, prompt_accuracy=prompt_accuracy, val_accuracy=best["val_accuracy"],
                  best_epoch=best["epoch"], trainable=sa2vp.count_trained(model),
                  seconds=sum(row["seconds"] for row in history), peak_memory_mib=best["peak_memory_mib"],
                  settings=settings)  # fmt: skip
    save(out / "result.json", result)
    return result


def forward(model, images, machine):
    """The logits of each pathway, computed on the machine with matrix products in its dtype."""
    images = images.to(machine.device, non_blocking=True)
    with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
        return model(images)


def train_epoch(model, batches, optimizer, scaler, settings, epoch, machine):
    """One pass over the training data: (mean loss, last learning rate)."""
    model.train()
    warmup_steps, total_steps = settings["warmup_epochs"] * len(batches), settings["epochs"] * len(batches)
    total = 0  # becomes a tensor that stays on the device, so that no step waits for a transfer
    bar = tqdm(batches, f"epoch {epoch + 1}/{settings['epochs']}", leave=False, disable=None)
    for step, (images, labels) in enumerate(bar, start=epoch * len(batches)):
        lr = learning_rate(step, warmup_steps, total_steps, settings["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = sa2vp.two_pathway_loss(forward(model, images, machine), labels.to(machine.device, non_blocking=True))
        # In float16 small gradients vanish, so the scaler multiplies the loss and divides gradients; else it is off.
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
    loss = total.item() / len(batches)
    if not math.isfinite(loss):
        raise vit.InputError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr than {settings['lr']}")
    return loss, lr


@torch.inference_mode()
def evaluate(model, batches, machine):
    """Accuracy in percent of each pathway, (base, prompt); None for a missing pathway or without images."""
    model.eval()
    correct, count = 0, 0
    for images, labels in batches:
        logits = torch.stack(forward(model, images, machine))  # (pathways, batch, classes)
        correct += (logits.argmax(dim=2) == labels.to(machine.device)).sum(dim=1)  # (pathways,)
        count += len(labels)
    if count == 0:
        return None, None
    base, *prompt = (100 * number / count for number in correct.tolist())
    return base, prompt[0] if prompt else None


def make_optimizer(model, weight_decay):
    """AdamW, betas (0.9, 0.999); weight decay on matrices, prompt maps and gates, not on biases and norms."""
    trained = sa2vp.trained_parameters(model).values()
    decayed, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=weight_decay)


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-7):
    """Linear warm-up from 0 to the peak, then a cosine down to the floor; steps count from 0."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - 1)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


# ---------------------------------------------------------------------- what a run starts from

# The backbone of the generated images: small, pre-trained here to tell the shape and colour of a thing.
SMALL_VIT = dict(patch_size=8, dim=64, depth=6, heads=1, normalize="imagenet")
PRETRAINED = Path(data.TABLE["shapes"].settings["weights"])
PRETRAINING = dict(data="shapes-source", method="full", epochs=8, batch_size=32, lr=2e-3)


def complete_settings(given):
    """All settings of a run, from what was given: {setting: value}, without the options of other methods."""
    row, method = data.find(given["data"]), given["method"]
    settings = DEFAULTS | row.settings | given
    if_none = {"lr": (LEARNING_RATE | row.lr)[method], "warmup_epochs": round(settings["epochs"] / 10)}
    settings |= {name: if_none[name] for name in if_none if settings[name] is None}
    for name, known in (("data", data.TABLE), ("weights", vit.BACKBONES)):
        if settings[name] not in (None, *known):  # a path: the same from every working directory
            settings[name] = os.path.abspath(os.path.expanduser(settings[name]))
    others = set().union(*map(sa2vp.options, sa2vp.METHODS)) - sa2vp.options(method)
    return {name: value for name, value in settings.items() if name not in others}


def prepare(settings, machine):
    """The data, the method on its backbone, and `meta`: what a run's checkpoints store besides weights."""
    if settings["epochs"] <= settings["warmup_epochs"]:
        raise vit.InputError(f"--epochs {settings['epochs']} must be above --warmup-epochs {settings['warmup_epochs']}")
    row, weights = data.find(settings["data"]), settings["weights"]
    if weights == os.path.abspath(PRETRAINED) and not PRETRAINED.with_name("result.json").exists():
        print(f"pre-training a small ViT on single shapes (once; kept as {PRETRAINED})")
        fit(complete_settings(PRETRAINING), PRETRAINED.parent, machine)
    torch.manual_seed(settings["seed"])  # the small ViT is initialised at random
    if weights:
        backbone = vit.load_vit(weights, settings["image_size"], settings["heads"], settings["normalize"])
    else:
        backbone = vit.VisionTransformer(settings["image_size"], **SMALL_VIT)
    splits = data.load(row, machine.root, settings["search"])
    print(f"{row.name}: {splits.describe()}", *splits.notes, sep="\n")
    print(f"{weights or 'from scratch'}: {backbone.describe()}", *backbone.notes, sep="\n")
    print("settings:", ", ".join(f"{name}={value}" for name, value in settings.items()))
    mean, std = vit.NORMALIZE[backbone.normalize]
    meta = {
        "settings": settings,
        "classes": list(splits.classes),
        "backbone": {"image_size": backbone.image_size, "heads": backbone.blocks[0].attn.heads,
                     "normalize": backbone.normalize},
        "fingerprint": vit.fingerprint(backbone),
        "digest": data.digest(splits),
        "input": {"crop": row.crop, "image_size": backbone.image_size, "mean": mean, "std": std},
        "root": os.path.abspath(machine.root),
    }  # fmt: skip
    torch.manual_seed(settings["seed"])  # the method starts the same, whatever was drawn before
    model = sa2vp.build(backbone, len(splits.classes), settings).to(machine.device)
    for module in model.modules():
        # Otherwise autocast casts the frozen weights anew at every use, and keeps the copies until backward.
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(machine.dtype)
    if machine.compile:
        torch.compiler.reset()  # PyTorch compiles the same code only a few times in a process
        model.compile(dynamic=False)
    return splits, model, meta


def resume(out, meta, model, optimizer, scaler):
    """Loads the last completed epoch, if there is one. Returns the history, a dict for each completed epoch."""
    state = read_run(out / "last.pt", meta["settings"] | {name: meta[name] for name in ("fingerprint", "digest")})
    if not state:
        return []
    sa2vp.load_trained(model, state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty if the run was begun in another dtype than float16
        scaler.load_state_dict(state["scaler"])
    print(f"resuming after epoch {len(state['history'])}")
    return state["history"]


def read_run(path, now):
    """A run's last.pt or result.json, a dict; empty if there is none. InputError if damaged or of another run.

    `now` is the run's settings, with the backbone's `fingerprint` and the `digest` of images and classes where known.
    """
    if not path.exists():
        return {}
    try:
        content = sa2vp.read_checkpoint(path) if path.suffix == ".pt" else json.loads(path.read_bytes())
        then = content | content["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise vit.InputError(f"{path} is damaged or of another version: delete it to run again") from None
    # Settings can differ if DEFAULTS have changed since, or if two paths end alike, as a name has only their ends.
    for name, value in now.items():
        if json.dumps(then.get(name)) != json.dumps(value):  # JSON has lists for tuples
            other = f"{name} {then.get(name)}, not {value}"
            what = {"fingerprint": "another backbone", "digest": "other images or classes"}.get(name, other)
            raise vit.InputError(f"{path} belongs to a run with {what}: give another --out")
    return content


# ---------------------------------------------------------------------- several runs

ABLATIONS = {  # --ablate: what each variant changes in sa2vp
    "full-method": {}, "linear-probe": {"method": "linear"}, "no-prompts": {"method": "adapter"},
    "window-none": {"window": None}, "window-1": {"window": 1}, "window-5": {"window": 5},  # none: not aligned
    "no-distillation": {"distill_layers": (), "fusion_layers": ()}, "no-fusion": {"fusion_layers": ()},
    "half-size-map": {"prompt_grid": "half"},
}  # fmt: skip
REPEATED = ("data", "method", "seed")  # several values of these are several runs; of any other setting, a search


def train(given, out, machine):
    """Every run that was asked for, one after another; several end with a table. Returns the exit code.

    `given` is {setting: values}. Each data set is run with each method and each seed, and tested. Several values of any
    other setting are a search: each combination is trained with the first seed and not tested. The one of highest
    validation accuracy (of equals the first) is then trained with every seed and tested.
    """
    if (out / "last.pt").exists():
        raise vit.InputError(f"{out} is the folder of one run: --out is the folder that holds those of all runs")
    given = {name: [DEFAULTS[name]] for name in REPEATED} | given
    varied = [name for name in given if len(given[name]) > 1 and name not in REPEATED]
    rows, scores, codes = [], {}, []

    def trial(name, variant, settings, seeds, test=True):
        """Runs these settings with each seed. Adds a row to the table and returns it."""
        results = []
        for seed in seeds:
            settings = settings | {"seed": seed}
            folder = out / run_name(settings)
            print()
            try:
                result = read_run(folder / "result.json", settings)
                if result and (result["accuracy"] is not None or not test):
                    print(f"{folder} holds this run, finished, and is kept: delete it to train anew")
                else:
                    result = fit(settings, folder, machine, test)
                found = ", ".join(f"{key} {shown(result[key])}" for key in result if key != "settings")
                print(f"{folder}: test {found}")
                results.append(result)
            except Exception as error:  # the other runs go on
                codes.append(report(error, f"{folder} could not run: "))
        row = {"data": text(name), "method": variant}
        row |= {setting: text(settings[setting]) for setting in varied if setting in settings}
        if len(results) == len(seeds):
            validated = [result["val_accuracy"] for result in results]
            row["val_accuracy"] = None if None in validated else statistics.mean(validated)
            row["trainable"] = results[0]["trainable"]
            if test:
                scores[name, variant] = [result["accuracy"] for result in results]
                row |= mean_and_std(scores[name, variant])
        rows.append(row)
        return row

    for (name, variant), choices in list_combinations(given).items():
        choice = choices[0]
        if len(choices) > 1:
            # VTAB-1k has validation images only in a search, where it is trained on 800 of its 1,000.
            search = {"search": data.find(name).vtab}
            found = [trial(name, variant, settings | search, given["seed"][:1], test=False) for settings in choices]
            best = max(found, key=lambda row: row.get("val_accuracy", -1))
            if "val_accuracy" not in best:
                continue
            choice = choices[found.index(best)]
            chosen = ", ".join(f"{setting} {best[setting]}" for setting in varied if setting in best)
            print(f"\nchosen: {chosen} (if that is the first or last value tried, try beyond it)")
        trial(name, variant, choice, given["seed"])

    if len(rows) > 1 or len(given["seed"]) > 1:
        columns = ["data", "method", *varied, "val_accuracy", "accuracy", "std", "seeds", "trainable"]
        rows = [{column: row.get(column) for column in columns} for row in rows + group_rows(scores)]
        path = out / f"{file_name(given)}.csv"
        print_table(rows)
        save(path, rows)
        print(f"wrote {path}")
    return min(codes, default=0)  # a bug, 1, before what the user can fix, 2


def list_combinations(given):
    """{setting: values} -> {(data set, variant): settings of each combination, with the first seed}.

    A setting is only for the methods that have it. InputError if none of them does.
    """
    variants = [variant for method in given["method"] for variant in (ABLATIONS if method == "ablation" else [method])]
    combinations, unused = {}, set(given) - set(REPEATED)
    for name, variant in itertools.product(data.members(given["data"]), variants):
        change = ABLATIONS.get(variant, {"method": variant})
        fixed = {"data": name, "method": "sa2vp", "seed": given["seed"][0]} | change
        free = [setting for setting in complete_settings(fixed) if setting in given and setting not in fixed]
        unused -= set(free)
        values = itertools.product(*(given[setting] for setting in free))
        combinations[name, variant] = [complete_settings(fixed | dict(zip(free, choice))) for choice in values]
    if unused:
        raise vit.InputError(f"{', '.join(unused)} is not a setting of {' or '.join(variants)}")
    return combinations


def group_rows(scores):
    """Rows for the means of complete groups; `scores` is {(data set, variant): accuracies by seed}."""
    rows, scores = [], dict(scores)
    for group, variant in itertools.product(data.GROUPS, dict.fromkeys(variant for _, variant in scores)):
        members = [scores.get((part, variant)) for part in data.GROUPS[group]]
        if all(members):
            scores[group, variant] = list(map(statistics.mean, zip(*members)))
            rows.append({"data": group, "method": variant} | mean_and_std(scores[group, variant]))
    return rows


def mean_and_std(accuracies):
    """Mean and standard deviation over the seeds, for a row of a table."""
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {"accuracy": statistics.mean(accuracies), "std": std, "seeds": len(accuracies)}


def run_name(settings):
    """The name of a run's folder: data set, method and the settings that differ from their defaults for these."""
    different = {}
    for name, value in settings.items():
        others = {other: settings[other] for other in settings if other != name}
        if name in ("data", "method") or complete_settings(others)[name] != value:
            different[name] = [value]
    return file_name(different)


def file_name(values):
    """A file's name from {setting: values}, such as cub+dogs-vpt-seed0+1; a long one is cut and ends in a hash."""
    parts = [(name if name not in ("data", "method") else "") + "+".join(map(text, values[name])) for name in values]
    name = re.sub(r"(\.\.)?[/\\:]+", "-", "-".join(parts)).strip("-")
    return name if len(name) <= 100 else f"{name[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------- with a tuned model

TILE, TITLE = 200, 24  # pixels


@torch.inference_mode()
def show(path, samples, model, meta, machine):
    """--show: draws a row for each sample, the image and then measures in orange, brightest at a column's maximum."""
    transform = data.transform(**meta["input"])
    images = torch.stack([transform(data.open_picture(image)) for image, _ in samples]).to(machine.device)
    # The square root of attention, because a few patches have most of it.
    columns = {"attention, encoder alone": sa2vp.class_attention(model.vit, images).sqrt(),
               "attention, whole model": sa2vp.class_attention(model, images).sqrt()}  # fmt: skip
    if isinstance(model, sa2vp.SA2VP):
        columns["change by the prompts"] = sa2vp.prompting_strength(model, images)
    mean, std, orange = (images.new_tensor(values)[:, None, None]
                         for values in (meta["input"]["mean"], meta["input"]["std"], (1.0, 0.65, 0.1)))  # fmt: skip
    tiles = [F.interpolate(images * std + mean, (TILE, TILE))]
    for values in columns.values():
        brightness = F.interpolate((values / values.amax())[:, None], (TILE, TILE))
        tiles.append(0.3 * tiles[0] + 0.7 * orange * brightness)
    grid = make_grid(torch.stack(tiles, dim=1).flatten(0, 1), len(tiles), pad_value=1)
    page = to_pil_image(F.pad(grid, (0, 0, TITLE, 0), value=1))
    for i, title in enumerate(["image", *columns]):
        ImageDraw.Draw(page).text((4 + i * (TILE + 2), 4), title, "black", font_size=15)
    save(path, page)
    print(f"wrote {path}")


# ---------------------------------------------------------------------- files and what is printed


def save(path, content):
    """Writes a .pt, .png, .json or .csv file, whole or not at all. InputError if it cannot be written."""
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(content, buffer)
    elif path.suffix == ".png":
        content.save(buffer, "png")
    elif path.suffix == ".json":
        buffer.write(json.dumps(content, indent=2).encode())
    else:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([content[0].keys(), *(row.values() for row in content)])
        buffer.write(lines.getvalue().encode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # this process's own
            part = Path(folder, path.name)
            part.write_bytes(buffer.getbuffer())
            part.replace(path)
    except OSError as error:
        raise vit.InputError(f"cannot write {path}: {error.strerror}") from None


def print_table(rows):
    """Prints rows (dicts of the same keys) in columns."""
    lines = [[shown(cell) for cell in line] for line in (rows[0].keys(), *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)))


def shown(value):
    """A result as tables and messages show it: a number with two decimals, "-" if there is none."""
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def text(value):
    """A setting's value as tables, messages and names of files show it; a path by its last two parts."""
    if isinstance(value, str):
        return "/".join(Path(value).parts[-2:])
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def report(error, what=""):
    """Prints an error. Returns the exit code: 2 for what the user can fix, one sentence; 1 for a bug, its traceback."""
    if isinstance(error, torch.OutOfMemoryError):
        error = vit.InputError("not enough GPU memory: use a smaller --batch-size")
    is_bug = not isinstance(error, (vit.InputError, data.DataError))
    if is_bug:
        traceback.print_exception(error)
    message = str(error).rpartition("DataError: ")[2]  # without the traceback that a DataLoader's worker adds
    print(f"train.py: {what}{' '.join(message.split())}", file=sys.stderr)
    return 1 if is_bug else 2


# ---------------------------------------------------------------------- the command line


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
    height, _, width = value.partition("x")
    return value if value == "half" else tuple(map(number(int, 1, 100), (height, width)))


def window(value):
    """A type for argparse: "3" or "none"."""
    return None if value == "none" else int(value)


def make_parser():
    """The command line. A setting that is not given is absent from its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, natural, positive = number(int, 1), number(int, 0), number(float, 1e-12)
    add = parser.add_argument_group("settings, each with one value or several").add_argument
    add = partial(add, nargs="+", metavar="X", default=argparse.SUPPRESS)
    add("--data", help=f"a folder, {', '.join((*data.GROUPS, *data.TABLE))}; default shapes")
    add("--method", action="extend", choices=sa2vp.METHODS, help=f"{', '.join(sa2vp.METHODS)}; default sa2vp")
    add("--weights", help=f"the backbone: a file, or {', '.join(vit.BACKBONES)}; default imagenet21k")
    add("--image-size", type=count, help="pixels, a multiple of the patch size; default 224")
    add("--heads", type=count, help="of the backbone; default as the file says, else assumed")
    add("--normalize", choices=vit.NORMALIZE, help="half (mean and std 0.5) or imagenet; default as the weights expect")
    add("--epochs", type=count, help="default 100; a folder 20, shapes 30")
    add("--warmup-epochs", type=natural, help="default a tenth of the epochs")
    add("--batch-size", type=count, help="default 64; most of VTAB-1k 40, shapes 32, a folder 4 to 64")
    add("--lr", type=positive, help="peak; default 1e-3, linear 1e-2, full 1e-4; a folder 3e-3, shapes 1e-2, full 1e-3")
    add("--weight-decay", type=number(float, 0), help="default 1e-4")
    add("--inner-dim", type=count, help="r, the rank of the prompt map; default 16, benchmarks 8 to 64")
    add("--scale", type=number(float, 0), help="s, the weight of a message; default 0.1, benchmarks 0.1 to 1.5")
    add("--dropout", type=number(float, 0, 1), help="of sa2vp and adapter; default 0.1; a folder and shapes 0")
    add("--window", type=window, help="side of the aligned neighbourhood, odd, or none; default 3")
    add("--prompt-grid", type=grid, help="size of the prompt map such as 7x7, or half; default the image's grid")
    add("--distill-layers", type=layers, help="D such as 0,4,8, or none; default every fourth layer")
    add("--fusion-layers", type=layers, help="F, a subset of D, or none; default D without 0")
    add("--prompts", type=count, help="prompt tokens of vpt in each layer; default 50")
    add("--seed", type=number(int, 0, 2**32), help="default 42")

    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=natural, help="this GPU; default the first, else the CPU")
    add("--cpu", action="store_true", help="no GPU")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=natural, default=min(16, cpus), help="processes that load images; default %(default)s")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--root", help="the folder of the data sets; default data")
    add("--out", type=Path, default="runs", help="the folder of all runs; default runs")

    add = parser.add_argument_group("instead of training a method").add_mutually_exclusive_group().add_argument
    add("--ablate", dest="method", action="append_const", const="ablation", default=argparse.SUPPRESS,
        help="train SA2VP and its ablations")  # fmt: skip
    add("--eval", type=Path, help="print the test accuracy of a run, given by its folder or best.pt")
    add("--predict", type=Path, nargs="+", help="a run, then images or folders: print their classes")
    parser.add_argument("--show", type=count, default=0, help="with --eval or --predict: draw this many of the images")
    return parser


def choose_machine(args):
    """The machine that the command line asks for."""
    # A GPU may be listed although its driver is missing or too old.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and not args.cpu else 0
    if args.gpu is not None and args.gpu >= gpus:
        raise vit.InputError(f"there is no GPU {args.gpu}, PyTorch finds {gpus}, from 0 on: leave out --gpu")
    device, dtype = torch.device("cpu"), torch.float32
    if gpus:
        device = torch.device("cuda", args.gpu or 0)
        torch.cuda.set_device(device)
        # Older GPUs only emulate bfloat16, many times slower.
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        # cuDNN's attention is reported to give NaN or wrong gradients on recent GPUs.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return Machine(device, dtype, args.workers, args.compile, args.root or "data")


@torch.inference_mode()
def use_tuned(args, given, machine):
    """--eval prints the test accuracy, --predict the likeliest classes of images; so does --show, of what it draws."""
    path, *images = args.predict or [args.eval]
    model, meta = sa2vp.load(path, *given.get("weights", []))
    model.to(machine.device)
    if args.predict:
        samples = [(image, None) for image in data.find_images(images)]
    else:
        splits = data.load(data.find(*given.get("data", [meta["settings"]["data"]])), args.root or meta["root"])
        if list(splits.classes) != meta["classes"]:
            raise vit.InputError(f"the data set has other classes than {path}")
        samples = splits.test
        batches = data.make_loader(samples, meta["input"], meta["settings"]["batch_size"], machine.workers)
        accuracy, prompt_accuracy = evaluate(model, batches, machine)
        print(f"test {shown(accuracy)} % (prompt pathway {shown(prompt_accuracy)} %)")
    drawn = samples[:: max(1, len(samples) // max(1, args.show))][: args.show]
    transform = data.transform(**meta["input"])
    for image, label in samples if args.predict else drawn:
        pixels = transform(data.open_picture(image))
        probabilities = forward(model, pixels[None], machine)[0][0].softmax(dim=0)
        true = "" if label is None else f" (true class: {meta['classes'][label]})"
        print(f"{image if isinstance(image, Path) else 'a test image'}{true}")
        for guess in probabilities.argsort(descending=True)[:5].tolist():
            print(f"  {probabilities[guess]:7.2%}  {meta['classes'][guess]}")
    if drawn:
        show((path if path.is_dir() else path.parent) / "show.png", drawn, model, meta, machine)


def main(argv=None):
    """The command line. Exits with 2 and one sentence on bad input, 1 and a traceback on a bug, 130 on Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {name: [*dict.fromkeys(getattr(args, name))] for name in DEFAULTS if hasattr(args, name)}  # each value once
    tuned = args.eval or args.predict
    if tuned and any(name not in ("data", "weights") or len(given[name]) > 1 for name in given):
        parser.error("with --eval and --predict the only settings are --data and --weights, with one value each")
    if args.show and not tuned:
        parser.error("--show draws with --eval or --predict")
    try:
        machine = choose_machine(args)
        code = use_tuned(args, given, machine) if tuned else train(given, args.out, machine)
    except KeyboardInterrupt:
        code = 130
        print("interrupted: a run resumes after its last completed epoch if the command is repeated", file=sys.stderr)
    except Exception as error:
        code = report(error)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # each line is seen at once, also in a log file
    main()

"""Fine-tunes a pre-trained ViT on a data set.

    python train.py                                  a default run, which needs no data and no weights
    python train.py --data cub --gpu 0               train SA2VP on CUB-200-2011 and test it
    python train.py --eval runs/cub-sa2vp            test a finished run again, class by class
    python train.py --predict runs/cub-sa2vp new/    classify images
    python train.py --list                           a table of all finished runs

A run reads its data, adds a tuning method to the backbone, trains it, keeps the epoch of highest validation accuracy
(for VTAB-1k the last epoch) and evaluates that epoch once on the test data. The run's folder holds settings.json,
metrics.csv (one row per epoch), last.pt (to resume from) and, at the end, best.pt (the kept epoch) and result.json.

Each setting takes one or more values. Several data sets, methods or seeds give one run each. Several values of another
setting start a search: the combination of highest validation accuracy is chosen, and then tested.
"""

import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import sa2vp
import vit
from vit import InputError

# The settings of every run. The options of a method are the arguments of its class in sa2vp.py. A data set's row in
# data.py overrides the defaults of both, and the command line overrides all. A new setting is a line here, one in
# HELP_TEXTS, and one in MINIMUM, PARSERS or CHOICES if it needs them.
DEFAULTS = {
    "data": "shapes",
    "method": "sa2vp",
    "weights": "imagenet21k",  # or "scratch": the small ViT below, with random weights
    "image_size": 224,
    "heads": None,  # None: read from the weights
    "normalize": None,  # None: read from the weights
    "transform": "resize",
    "epochs": 100,
    "warmup": 0.1,  # a share of the epochs
    "batch_size": 64,  # None in the row of a folder: see `data.default_batch_size`
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "keep": "best",
    "seed": 42,
    "search": False,  # set by the program: in a search VTAB-1k is trained on 800 of its 1,000 images, validated on 200
}
LEARNING_RATE = {"linear": 1e-2, "full": 1e-4}  # of methods that need another than the default
MINIMUM = {"image_size": 1, "heads": 1, "epochs": 1, "batch_size": 1, "lr": 1e-7, "weight_decay": 0, "seed": 0}

# The small ViT for the generated images. This program pre-trains it to tell the shape and colour of an object.
SMALL_VIT = {"patch_size": 8, "dim": 64, "depth": 6, "heads": 1, "normalize": "imagenet"}
PRETRAINED = data.TABLE["shapes"].settings["weights"]  # a path below the working directory, whatever --out is
PRETRAINING = {"data": "shapes-source", "method": "full", "epochs": 16, "batch_size": 32, "lr": 2e-3}


def complete_settings(given):
    """All settings of a run from those given, {name: value}: fills in the defaults, drops options of other methods.

    `given` has at least data and method. InputError for a name that is neither a setting nor an option of any method,
    and for a value out of range.
    """
    row = data.find(given["data"])
    method = given["method"]
    settings = defaults_of(method)
    for changes in (row.settings, row.by_method.get(method, {}), given):
        for name, value in changes.items():
            if hasattr(value, "item"):  # a number of NumPy, which could not be read from a checkpoint
                value = value.item()
            if name in settings:
                settings[name] = value
            elif name not in all_options():
                raise InputError(f"{name}: not an option of any method")
    for name, minimum in MINIMUM.items():
        if settings[name] is not None:
            sa2vp.check(name, settings[name], minimum)
    sa2vp.check("warmup", settings["warmup"], 0, 1)
    for name, names in (("data", data.TABLE), ("weights", ("scratch", PRETRAINED, *vit.BACKBONES))):
        if settings[name] not in names:  # a path; made absolute, it means the same from every working directory
            settings[name] = os.path.abspath(os.path.expanduser(settings[name]))
    return settings


def defaults_of(method):
    """The default of every setting and of every option of the method, {name: value}."""
    defaults = DEFAULTS | sa2vp.options(method)
    defaults["lr"] = LEARNING_RATE.get(method, defaults["lr"])
    return defaults


def all_options():
    """The settings and the options of all methods, {name: default}. A shared option has its first method's default."""
    options = dict(DEFAULTS)
    for method in sa2vp.METHODS:
        for name, default in sa2vp.options(method).items():
            options.setdefault(name, default)
    return options


class Machine(NamedTuple):
    """Hardware and paths. They are not part of a run's settings."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    workers: int  # processes that load images
    compile: bool  # run the model through torch.compile
    root: Path  # the folder of the data sets


# ---------------------------------------------------------------------- the loop


def fit(settings, out, machine, test=True, splits=None):
    """Trains or resumes a run, unless it is finished. Returns its result, the content of out/result.json.

    `settings` are all settings of the run (`complete_settings`), `out` is its folder. With test=False, as in a search,
    the model sees no test image. `splits` are the images, if they are read already.
    """
    splits = splits or read_data(settings["data"], machine.root, settings["search"])
    backbone = load_backbone(settings)
    meta = describe_run(settings, splits, backbone, machine)
    result = read_result(out, meta)
    needed = "accuracy" if test else "val_accuracy"  # a search does not test; its winner is tested without new epochs
    if result and result[needed] is not None and vit.is_file(out / "best.pt"):
        print(f"{out} is already finished; to train it again, delete its folder")
        return result
    model = build_model(backbone, meta, machine)
    optimizer = make_optimizer(model, settings["weight_decay"])
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    history, kept = resume(out, meta, model, optimizer, scaler)
    # The loaders are made once, because starting their workers takes seconds.
    loading = {"preprocessing": meta["input"], "batch_size": meta["batch_size"], "workers": machine.workers}
    train_batches = data.make_loader(splits.train, **loading, shuffle_seed=settings["seed"])
    val_batches = data.make_loader(splits.val, **loading)
    check_before_training(settings, splits, test)
    save(out / "settings.json", settings)  # shows now, before the first epoch, whether the folder can be written
    announce(settings, out, machine, model, len(train_batches), len(history))

    for epoch in range(len(history), settings["epochs"]):
        start = time.perf_counter()
        # Each epoch is seeded by (seed, epoch), so a resumed run reproduces an uninterrupted one, on a GPU to rounding.
        torch.manual_seed(10_007 * settings["seed"] + epoch)  # for dropout; another seed for every (seed, epoch)
        train_batches.sampler.epoch = epoch  # the sampler derives the seeds of the order, crops and flips
        loss, lr = train_epoch(model, train_batches, optimizer, scaler, settings, epoch, machine)
        row = {"epoch": epoch + 1, "loss": loss, "lr": lr}
        for name, accuracy in evaluate(model, val_batches, machine).items():
            row[f"val_{name}"] = accuracy
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        print_epoch(row, settings["epochs"])
        trained = {name: tensor.detach().cpu().clone() for name, tensor in sa2vp.trained_state(model).items()}
        if settings["keep"] == "last" or is_best(history):
            kept = {"epoch": epoch + 1, "trained": trained}
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_metrics(out, history)
        save(out / "last.pt", dict(meta, history=history, trained=trained, kept=kept, **state))

    # The model sees the test images only here, once, with the kept epoch.
    save(out / "best.pt", dict(meta, history=history[: kept["epoch"]], trained=kept["trained"]))
    sa2vp.load_trained(model, kept["trained"])
    result = dict(meta, best_epoch=kept["epoch"], val_accuracy=history[kept["epoch"] - 1]["val_accuracy"])
    if not test:
        splits = splits._replace(test=[])  # without images, the test accuracy is None
    result.update(evaluate(model, data.make_loader(splits.test, **loading), machine))
    result.update(trainable=sa2vp.count_trained(model), seconds=sum(row["seconds"] for row in history))
    save(out / "result.json", result)
    return result


def read_data(name, root, search=False):
    """The images of a data set or folder, `data.Splits`; prints what they are."""
    row = data.find(name)
    splits = data.load(row, root, search)
    print_description(row.name, splits)
    return splits


def load_backbone(settings):
    """The backbone of a run; prints what it is."""
    if settings["weights"] == "scratch":
        if settings["method"] != "full" or settings["heads"] or settings["normalize"]:
            raise InputError("scratch is for --method full alone, without --heads and --normalize: choose --weights")
        torch.manual_seed(settings["seed"])
        backbone = vit.VisionTransformer(settings["image_size"], **SMALL_VIT)
    else:
        backbone = vit.load_vit(settings["weights"], settings["image_size"], settings["heads"], settings["normalize"])
    print_description(settings["weights"], backbone)
    return backbone


def print_description(name, described):
    """Prints what the images or the backbone of that name are, and notes on them."""
    print(f"{name}: {described.describe()}")
    for note in described.notes:
        print(note)


def describe_run(settings, splits, backbone, machine):
    """The description of a run, a dict. It is part of best.pt, last.pt and result.json."""
    meta = {"version": sa2vp.VERSION, "settings": settings}
    meta["classes"] = list(map(str, splits.classes))
    meta["images"] = list(map(len, splits[:3]))
    meta["digest"] = data.digest(splits)
    meta["batch_size"] = settings["batch_size"] or data.default_batch_size(len(splits.train))
    meta["fingerprint"] = vit.fingerprint(backbone)
    meta["backbone"] = {
        "image_size": backbone.image_size,
        "heads": backbone.blocks[0].attn.heads,
        "normalize": backbone.normalize,
    }
    mean, std = vit.mean_and_std(backbone.normalize)
    meta["input"] = {"kind": settings["transform"], "image_size": backbone.image_size, "mean": mean, "std": std}
    meta["root"] = os.path.abspath(machine.root)
    meta["date"] = time.strftime("%Y-%m-%d %H:%M")
    meta["device"] = str(machine.device)
    meta["dtype"] = str(machine.dtype)
    meta["torch"] = str(torch.__version__)
    return meta


COMPARED = {  # entries of the description that must stay the same, and words for a change
    "images": "{} training, validation and test images, now {}",
    "digest": "different images or classes",
    "batch_size": "batch size {}, now {}",
    "backbone": "a backbone with {}, now {}",
    "fingerprint": "a different backbone",
}
# Settings that are not compared: paths may change, and the entries above identify the images and the backbone.
UNCOMPARED = {"data", "weights", "heads", "normalize", "batch_size"}


def check_same(path, before, meta):
    """InputError unless the run in `path`, whose content is `before`, is the one that `meta` describes."""
    settings = meta["settings"]
    differences = []
    for key, words in COMPARED.items():
        if key in before and not same(before[key], meta[key]):
            differences.append(words.format(before[key], meta[key]))
    # A setting that was added after the run was saved takes its default.
    earlier = complete_settings({"data": settings["data"], "method": settings["method"]}) | before["settings"]
    for name in sorted(settings.keys() - UNCOMPARED):
        if not same(earlier[name], settings[name]):
            differences.append(f"{name} {text(earlier[name])}, now {text(settings[name])}")
    if differences:
        raise InputError(f"{path} is of a run with {differences[0]}; choose another --out, or delete the run's folder")


def read_result(out, meta=None):
    """The result.json in a run's folder, a dict, or None if there is none.

    InputError if it is damaged or, with `meta`, of a different run.
    """
    path = out / "result.json"
    if not vit.is_file(path):
        return None
    try:
        result = json.loads(path.read_bytes())
        sa2vp.upgrade(result)
        if "digest" not in result and vit.is_file(out / "best.pt"):  # version 1 has it in best.pt alone
            result = sa2vp.read_checkpoint(out / "best.pt") | result
        result["accuracy"], result["val_accuracy"]  # a KeyError if one is missing
    except Exception as error:  # damaged JSON, or that of another program, raises many kinds of errors
        raise InputError(f"cannot read {path} ({error}); choose another --out, or delete the run") from None
    if meta:
        check_same(path, result, meta)
    return result


def build_model(backbone, meta, machine):
    """The run's method on its backbone, on the machine."""
    settings = meta["settings"]
    torch.manual_seed(settings["seed"])  # the initialisation does not depend on random numbers used above
    model = sa2vp.build(backbone, len(meta["classes"]), settings).to(machine.device)
    cast_frozen(model, machine.dtype)  # the backbone's fingerprint is that of its float32 weights
    if machine.compile:
        torch.compiler.reset()  # PyTorch compiles the same code only a few times in a process
        model.compile(dynamic=False)
    return model


def cast_frozen(model, dtype):
    """Casts frozen weights and biases of matrix products once. Otherwise autocast would cast them in every step."""
    for module in model.modules():
        is_product = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        if not is_product or isinstance(module, sa2vp.FullPrecisionLinear):
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def make_optimizer(model, weight_decay):
    """AdamW, betas (0.9, 0.999); weight decay on matrices, embeddings, prompts and gates, not on biases and norms."""
    decayed = []
    others = []
    for parameter in sa2vp.trained_parameters(model).values():
        if parameter.ndim > 1:
            decayed.append(parameter)
        else:
            others.append(parameter)
    # `train_epoch` sets the learning rate.
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=weight_decay)


def resume(out, meta, model, optimizer, scaler):
    """Loads the last completed epoch. Returns (history, kept), which are ([], None) if there is no checkpoint."""
    path = out / "last.pt"
    if not vit.is_file(path):
        return [], None
    try:
        state = sa2vp.read_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}; to start over, delete the run's folder") from None
    check_same(path, state, meta)
    sa2vp.load_trained(model, state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty if the run was begun in another dtype than float16
        scaler.load_state_dict(state["scaler"])
    if "kept" not in state:  # version 1 has the kept epoch in best.pt alone
        best = sa2vp.read_checkpoint(out / "best.pt")
        state["kept"] = {"epoch": len(best["history"]), "trained": best["trained"]}
    return state["history"], state["kept"]


def check_before_training(settings, splits, test):
    """InputError for what would otherwise end the run later: no validation images to choose by, damaged images."""
    if not splits.val and (settings["keep"] == "best" or not test):
        raise InputError("there are no validation images to choose by: add some, or give --keep last and no search")
    if settings["data"] not in data.TABLE:
        # Damaged training images end the first epoch.
        failed = data.unreadable(image for image, _ in splits.val + splits.test)
        if failed:
            raise InputError(f"{len(failed)} images cannot be read: {data.shorten(list(failed.values()), 5)}")


def announce(settings, out, machine, model, steps_per_epoch, epochs_done):
    """Prints what is about to run."""
    print("settings:", ", ".join(f"{name}={value}" for name, value in settings.items()))
    print(
        f"{settings['method']}: {sa2vp.count_trained(model):,} trained parameters without the head, "
        f"on {machine.device} in {machine.dtype}, to {out}, in {settings['epochs'] * steps_per_epoch} steps"
    )
    if epochs_done:
        print(f"resuming after epoch {epochs_done}")


def train_epoch(model, batches, optimizer, scaler, settings, epoch, machine):
    """One pass over the training data: (mean loss, last learning rate)."""
    model.train()
    total_steps = settings["epochs"] * len(batches)
    warmup_steps = round(settings["warmup"] * settings["epochs"]) * len(batches)
    total = torch.zeros((), device=machine.device)  # stays on the device, so that no step waits for a transfer
    bar = tqdm(batches, f"epoch {epoch + 1}/{settings['epochs']}", leave=False, disable=None)
    for step, (images, labels) in enumerate(bar, start=epoch * len(batches)):
        lr = learning_rate(step, warmup_steps, total_steps, settings["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        labels = labels.to(machine.device, non_blocking=True)
        loss = sa2vp.two_pathway_loss(forward(model, images, machine), labels)
        # Small float16 gradients underflow to zero, so the scaler multiplies the loss and divides the gradients again.
        # In other dtypes it does nothing.
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
    loss = total.item() / len(batches)
    if not math.isfinite(loss):
        raise InputError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr than {settings['lr']}")
    return loss, lr


def forward(model, images, machine):
    """The logits of each pathway in float32. Matrix products are computed in the machine's dtype."""
    images = images.to(machine.device, non_blocking=True)
    with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
        logits = model(images)
    return [scores.float() for scores in logits]


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-7):
    """Linear warm-up from 0 to the peak, then cosine decay to the floor. Steps count from 0."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - 1)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


@torch.inference_mode()
def predict(model, batches, machine):
    """The logits of all images of a loader, in their order, on the CPU: (images, pathways, classes).

    The base pathway comes first. Its largest logit is the prediction.
    """
    model.eval()
    logits = []
    for images, _ in batches:
        logits.append(torch.stack(forward(model, images, machine), dim=1).cpu())  # (batch, pathways, classes)
    return torch.cat(logits)


def evaluate(model, batches, machine):
    """Accuracy in percent of each pathway: {"accuracy", "prompt_accuracy"}.

    None for a pathway that the method does not have, and for both if there are no images.
    """
    accuracies = {"accuracy": None, "prompt_accuracy": None}
    if len(batches):
        logits = predict(model, batches, machine)
        _, labels = zip(*batches.dataset.samples)
        correct = (logits.argmax(dim=2) == torch.tensor(labels)[:, None]).sum(dim=0)  # (pathways,)
        for name, count in zip(accuracies, correct.tolist()):
            accuracies[name] = 100 * count / len(labels)
    return accuracies


def print_epoch(row, epochs):
    """Prints an epoch, and after the first about how long all of them take."""
    line = f"epoch {row['epoch']:3d}  loss {row['loss']:.4f}  lr {row['lr']:.1e}"
    if row["val_accuracy"] is not None:
        line += f"  validation {row['val_accuracy']:.2f} %"
    print(f"{line}  {row['seconds']:.1f} s")
    if row["epoch"] == 1:
        print(f"all {epochs} epochs take about {epochs * row['seconds'] / 60:.1f} minutes")


def is_best(history):
    """Whether the last epoch has the highest validation accuracy. On ties the later epoch is the best.

    The released code keeps the earlier one.
    """
    return history[-1]["val_accuracy"] == max(row["val_accuracy"] for row in history)


# ---------------------------------------------------------------------- several runs

REPEATED = ("data", "method", "seed")  # several values of these are several runs; of any other option, a search


class Sweep:
    """The runs of one command, one after another.

    `given` is {option: values}. Each data set is run with each method and each seed, and tested. Several values of any
    other option are a search: each combination is trained with the first seed and not tested. The one of highest
    validation accuracy (the first on ties) is then trained with every seed and tested.
    """

    def __init__(self, given, out, machine):
        self.given = {name: [DEFAULTS[name]] for name in REPEATED} | given
        self.out = out
        self.machine = machine
        self.exit_codes = []  # of runs that failed
        # One command reads a data set once. Nothing is cached between commands.
        self.read = functools.cache(functools.partial(read_data, root=machine.root))

    def run(self):
        """Trains and tests everything. If that is several runs, prints the table of --list. Returns the exit code."""
        plan = list_combinations(self.given)
        try:
            for choices in plan:
                self.search_and_test(choices)
        finally:  # also after Ctrl-C
            if len(plan) > 1 or len(plan[0]) > 1 or len(self.given["seed"]) > 1:
                list_runs(self.out)
        return min(self.exit_codes, default=0)  # 1, a bug, takes precedence over 2, an error of the user

    def search_and_test(self, choices):
        """Chooses among the settings, if there are several, and tests the chosen ones with every seed."""
        chosen = choices[0]
        if len(choices) > 1:
            chosen = self.search(choices)
        if chosen:
            for seed in self.given["seed"]:
                self.attempt(dict(chosen, seed=seed))

    def search(self, choices):
        """The settings of highest validation accuracy among the choices. None if all failed."""
        accuracies = []
        for settings in choices:
            # VTAB-1k has validation images only in a search, where it is trained on 800 of its 1,000 images.
            result = self.attempt(dict(settings, search=settings["data"].startswith("vtab/")), test=False)
            accuracies.append(result["val_accuracy"] if result else -1.0)
        best = max(accuracies)
        if best < 0:
            return None
        chosen = choices[accuracies.index(best)]
        values = [f"{name} {text(chosen[name])}" for name in self.given if name in chosen and name not in REPEATED]
        print(f"\nchosen: {', '.join(values)}, with validation accuracy {best:.2f} %, the first on ties")
        print(f"{accuracies.count(best)} of {len(choices)} combinations reach it, {accuracies.count(-1.0)} failed")
        return chosen

    def attempt(self, settings, test=True):
        """One run and its result. None if it fails; the other runs go on."""
        folder = self.out / run_name(settings)
        print()
        try:
            if settings["weights"] == PRETRAINED:
                pretrain(self.machine)
            splits = self.read(settings["data"], search=settings["search"])
            result = fit(settings, folder, self.machine, test, splits)
            print_result(folder, result)
            return result
        except Exception as error:
            self.exit_codes.append(report(error, f"{folder} failed: "))
            return None


def list_combinations(given):
    """{option: values} -> for each data set and method the settings of each combination, with the first seed.

    InputError for an option that none of the methods has.
    """
    for seed in given["seed"]:
        sa2vp.check("seed", seed, 0, 4_294_967_296)
    plan = []
    unused = set(given) - set(REPEATED)
    for name, method in itertools.product(data.members(given["data"]), given["method"]):
        fixed = {"data": name, "method": method, "seed": given["seed"][0]}
        options = [option for option in defaults_of(method) if option in given and option not in fixed]
        unused -= set(options)
        choices = []
        for values in itertools.product(*map(given.get, options)):
            choices.append(complete_settings(fixed | dict(zip(options, values))))
        plan.append(choices)
    if unused:
        raise InputError(f"{', '.join(sorted(unused))}: not an option of {' or '.join(given['method'])}")
    return plan


def pretrain(machine):
    """Trains the small ViT of the generated images, unless it is there already with the current settings.

    It is trained in a temporary folder, which is renamed when it is complete. If two processes do so at once, the
    weights of the first to finish are kept, and those of the other are thrown away.
    """
    folder = Path(PRETRAINED).parent
    if is_pretrained(folder):
        return
    print(f"pre-training a small ViT on single objects (once; kept as {PRETRAINED})")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pretraining-") as temporary:
            fit(complete_settings(PRETRAINING), Path(temporary, "new"), machine)
            if folder.exists() and not is_pretrained(folder):
                folder.rename(Path(temporary, "old"))  # of other settings
            Path(temporary, "new").rename(folder)
    except OSError as error:
        if not is_pretrained(folder):
            raise InputError(f"cannot make {folder}: {error}; run in a folder that can be written") from error


def is_pretrained(folder):
    """Whether the folder holds a finished pre-training with the current settings."""
    result = read_result(folder)
    if not result or not vit.is_file(folder / "best.pt"):
        return False
    settings = complete_settings(PRETRAINING)
    return same(settings | result["settings"], settings)  # a setting that was added later takes its default


def print_result(folder, result):
    """Prints the last line of a run."""
    line = f"{folder}: epoch {result['best_epoch']}"
    if result["val_accuracy"] is not None:
        line += f", validation accuracy {result['val_accuracy']:.2f} %"
    if result["accuracy"] is not None:
        line += f", test accuracy {result['accuracy']:.2f} %"
    print(line)


def changed_settings(settings):
    """The settings that differ from their defaults for this data set and method, {name: value}."""
    defaults = complete_settings({"data": settings["data"], "method": settings["method"]})
    changed = {}
    for name in sorted(defaults, key=lambda name: name in ("seed", "search")):  # these two come last
        value = settings.get(name, defaults[name])
        if not same(value, defaults[name]):
            changed[name] = value
    return changed


def run_name(settings):
    """The name of a run's folder, such as cub-sa2vp-lr0.005-seed1: data set, method and what differs from the defaults.

    A long name is cut and ends in a hash.
    """
    parts = [text(settings["data"]), settings["method"]]
    for name, value in changed_settings(settings).items():
        parts.append(name + text(value))
    name = re.sub(r"(\.\.)?[/\\:]+", "-", "-".join(parts)).strip("-")
    encoded = os.fsencode(name)
    if len(encoded) > 100:
        name = encoded[:91].decode(errors="ignore") + "-" + hashlib.sha256(encoded).hexdigest()[:8]
    return name


def list_runs(out):
    """--list: prints and writes to list.csv a row for the runs of one folder that differ in the seed alone."""
    groups = {}
    for path in sorted(out.glob("**/result.json")):
        try:
            result = read_result(path.parent)
            name = run_name(dict(result["settings"], seed=DEFAULTS["seed"]))
        except (InputError, data.DataError, TypeError) as error:  # it is damaged, or its method is unknown here
            print(f"{path.parent} is left out: {error}")
            continue
        key = json.dumps([str(path.parent.parent), name, [result.get(entry) for entry in COMPARED]])
        groups.setdefault(key, {})[result["settings"]["seed"]] = result
    if not groups:
        print(f"there is no finished run below {out}")
        return 2
    rows = []
    for group in groups.values():
        rows.append(summarise(list(group.values())))
    print_table(rows)
    write_table(out / "list.csv", rows)
    return 0


def summarise(results):
    """A row of the table, for results that differ in the seed alone. Accuracies are means over the seeds."""
    settings = results[0]["settings"]
    changed = changed_settings(settings)
    changed.pop("seed", None)
    validated = values_of(results, "val_accuracy")
    tested = values_of(results, "accuracy")
    row = {"date": results[-1].get("date"), "data": text(settings["data"]), "images": sum(results[0].get("images", []))}
    row["method"] = settings["method"]
    row["settings"] = ", ".join(f"{name} {text(value)}" for name, value in changed.items())
    row["validation"] = statistics.mean(validated) if validated else None
    row["test"] = statistics.mean(tested) if tested else None
    row["std"] = statistics.stdev(tested) if len(tested) > 1 else None
    row["seeds"] = len(tested)
    return row


def values_of(results, name):
    """The values of that name in the results that have one, a list."""
    return [result[name] for result in results if result[name] is not None]


def print_table(rows):
    """Prints rows, dicts with the same keys, in columns."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell or "-") for cell in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)))


# ---------------------------------------------------------------------- a tuned model


def test_again(args, given, machine):
    """--eval: tests a finished run on its own images, here or in another folder. `given` is {option: value}.

    InputError if the images have changed since the run, because its training images could be among the test images.
    """
    model, meta = sa2vp.load(args.eval, given.get("weights"))
    root = args.root or meta["root"]
    if not os.path.isdir(root):  # it has moved
        root = machine.root
    name = given.get("data", meta["settings"]["data"])
    splits = read_data(name, root, meta["settings"]["search"])
    if data.digest(splits) != meta["digest"]:
        raise InputError(f"the images of {name} are not those of the run, and a run can only be tested on its own")
    if not splits.test:
        raise InputError(f"{name} has no test images")
    rows = classify(model, meta, splits.test, given, machine)
    print_test(rows)
    folder = args.eval
    if not folder.is_dir():  # it is best.pt
        folder = folder.parent
    write_table((args.out or folder) / "test.csv", rows)
    return 0


def predict_images(args, given, machine):
    """--predict: classifies files and folders. `given` is {option: value}. Returns 2 if an image cannot be read."""
    run, *paths = args.predict
    model, meta = sa2vp.load(run, given.get("weights"))
    images, skipped = data.find_images(paths)
    failed = data.unreadable(images)
    print(f"{len(images)} images, {len(failed)} of them unreadable")
    if skipped:
        print(f"{len(skipped)} other files are left out: {data.shorten(skipped, 5)}")
    for reason in failed.values():
        print(f"  {reason}")
    samples = [(image, -1) for image in images if image not in failed]  # -1: the class is unknown
    if not samples:
        raise InputError("there is no image to classify: give images or folders, JPEG or PNG")
    rows = classify(model, meta, samples, given, machine)
    if len(rows) <= 20:
        print_table(rows)
    write_table((args.out or Path()) / "predictions.csv", rows)
    return 2 if failed else 0


def classify(model, meta, samples, given, machine):
    """A row for each image: its file, its true class if it is known, the predicted class and its probability."""
    batch_size = given.get("batch_size", meta["batch_size"])
    sa2vp.check("batch_size", batch_size, 1)
    batches = data.make_loader(samples, meta["input"], batch_size, machine.workers)
    logits = predict(model.to(machine.device), tqdm(batches, leave=False, disable=None), machine)
    largest, guesses = logits[:, 0].softmax(dim=1).max(dim=1)
    rows = []
    for i, (image, label) in enumerate(samples):
        row = {"file": image if isinstance(image, Path) else i}
        if label >= 0:
            row["true class"] = meta["classes"][label]
        row["predicted class"] = meta["classes"][guesses[i]]
        row["probability"] = largest[i].item()
        rows.append(row)
    return rows


def print_test(rows):
    """Prints the accuracy, that of the worst classes, and the most frequent confusions."""
    counts = Counter()
    correct = Counter()
    confused = Counter()
    for row in rows:
        true, predicted = row["true class"], row["predicted class"]
        counts[true] += 1
        if true == predicted:
            correct[true] += 1
        else:
            confused[f"{true} predicted as {predicted}"] += 1
    accuracies = {name: 100 * correct[name] / counts[name] for name in counts}
    print(f"test accuracy {100 * correct.total() / len(rows):.2f} % of {len(rows)} images")
    print(f"mean over {len(counts)} classes {statistics.mean(accuracies.values()):.2f} %; the worst, at most thirty:")
    for name in sorted(accuracies, key=accuracies.get)[:30]:
        print(f"  {accuracies[name]:6.2f} %  {name}, {counts[name]} images")
    for names, count in confused.most_common(10):
        print(f"  {count} of {names}")


# ---------------------------------------------------------------------- files and what is printed


def save(path, content, encoding="utf-8"):
    """Writes a .pt, .json or .csv file, whole or not at all. InputError if it cannot be written.

    The content of a .csv file is a list of dicts, whose keys are the columns.
    """
    try:
        with vit.arriving(path) as temporary:
            if path.suffix == ".pt":
                torch.save(content, temporary)
            elif path.suffix == ".json":
                temporary.write_text(json.dumps(content, indent=2))
            else:
                write_csv(temporary, content, encoding)
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's on a full disk
        raise InputError(f"cannot write {path}: {error}; close it elsewhere, free the disk, or change --out") from None


def write_csv(path, rows, encoding):
    """Writes a list of dicts as a table, whose columns are the keys of all rows."""
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    with path.open("w", newline="", encoding=encoding, errors="backslashreplace") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def write_table(path, rows):
    """Writes a .csv file for a spreadsheet, and prints its name."""
    save(path, rows, encoding="utf-8-sig")  # with a byte-order mark, so that Excel reads UTF-8
    print(f"wrote {path}")


def save_metrics(out, history):
    """Writes metrics.csv. It is only a warning if it cannot be written, such as while a spreadsheet has it open."""
    try:
        save(out / "metrics.csv", history)
    except InputError as error:
        print(f"warning: {error}")


def same(a, b):
    """Whether two values are equal in JSON, which turns tuples into lists."""
    return json.dumps(a) == json.dumps(b)


def text(value):
    """A setting's value as tables, messages and names of files show it. A path is shown by its last two parts."""
    if value in (None, (), []):  # a list if it was read from JSON
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(map(text, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    return "/".join(Path(str(value)).parts[-2:])


def report(error, what=""):
    """Prints an error, of a bug with its traceback. Returns the exit code: 1 for a bug, 2 for what the user can fix."""
    if isinstance(error, torch.OutOfMemoryError):
        error = InputError("not enough GPU memory: use a smaller --batch-size")
    is_bug = not isinstance(error, (InputError, data.DataError))
    if is_bug:
        traceback.print_exception(error)
    message = str(error).rpartition("DataError: ")[2]  # an error of a DataLoader's worker begins with its traceback
    print(f"train.py: {what}{' '.join(message.split())}", file=sys.stderr)
    return 1 if is_bug else 2


# ---------------------------------------------------------------------- the command line

HELP_TEXTS = f"""
    data            a folder of images, {', '.join(data.GROUPS)}, {', '.join(data.TABLE)}
    method          {', '.join(sa2vp.METHODS)}
    weights         the backbone: a file, {', '.join(vit.BACKBONES)}, or, for full, scratch (a small ViT, untrained)
    image_size      pixels, a multiple of the patch size
    heads           of the backbone, if the weights do not say it
    normalize       half, imagenet, or mean and std as six numbers with commas, if the weights do not say it
    transform       crop-flip, crop (random crop, no flip) or resize (the whole image)
    epochs          passes over the training images
    warmup          share of the epochs in which the learning rate rises
    batch_size      for a folder of your own by default 1/16 of the training images, between 4 and 64
    lr              peak of the learning rate ({', '.join(f'{name} {lr}' for name, lr in LEARNING_RATE.items())})
    weight_decay    of AdamW
    keep            the epoch to test: best (on validation data) or last
    inner_dim       r, the rank of the prompt map and the hidden width of the adapters
    scale           s, the weight of what one pathway sends to the other
    dropout         of the encoder, the cross-attention and the adapters
    window          side of the aligned neighbourhood, odd, or none: every token attends to all
    prompt_grid     size of a scaled prompt map, such as 7x7 or half
    distill_layers  D such as 0,4,8, or none; by default every fourth layer
    fusion_layers   F, a subset of D, or none; by default D without 0
    prompts         prompt tokens in each layer
    seed            of the initialisation, the order, crops and flips of images, and dropout
"""
HELP = dict(line.split(maxsplit=1) for line in HELP_TEXTS.strip().splitlines())
CHOICES = {"method": sa2vp.METHODS, "transform": data.TRANSFORMS, "keep": ("best", "last")}


def nonempty(value):
    """A parser for argparse: a text. Rejects an empty one, such as an unset variable of the shell."""
    if not value:
        raise argparse.ArgumentTypeError("the value is empty")
    return value


def switch(value):
    """A parser for argparse: "on" or "off"."""
    return bool(("off", "on").index(value))


def integers(value):
    """A parser for argparse: "0,4,8", "7x7", "none" or "half"."""
    if value == "none":
        return ()
    if value == "half":
        return value
    return tuple(map(int, re.split("[x,]", value)))


def window(value):
    """A parser for argparse: "3" or "none"."""
    if value == "none":
        return None
    return int(value)


def normalization(value):
    """A parser for argparse: a name, or six numbers with commas."""
    if value in vit.NORMALIZE:
        return value
    return tuple(map(float, value.split(",")))


PARSERS = {  # by the type of an option's default or, where that does not tell, by its name
    "heads": int,
    "normalize": normalization,
    "window": window,
    "prompt_grid": integers,
    "distill_layers": integers,
    "fusion_layers": integers,
    bool: switch,
    str: nonempty,
    int: int,
    float: float,
}


def add_options(parser):
    """Adds a flag for every setting but `search`, and every option of a method. One not given is absent from args."""
    for name, default in all_options().items():
        if name == "search":
            continue
        parse = PARSERS.get(name) or PARSERS.get(type(default))
        if not parse:
            raise InputError(f"option {name} with default {default} needs a row in train.PARSERS")
        help_text = HELP.get(name, "an option of a method")
        if default is not None:
            help_text += f"; default {text(default)}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            action="extend",
            metavar="X",
            default=argparse.SUPPRESS,
            type=parse,
            choices=CHOICES.get(name),
            help=help_text,
        )


def user_path(value):
    """A parser for argparse: a path, whose ~ is the user's home."""
    return Path(os.path.expanduser(nonempty(value)))


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser.add_argument_group("options, each with one value or several; a data set overrides defaults"))

    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=int, help="index of the GPU; default 0, or the CPU if there is none")
    add("--cpu", action="store_true", help="use no GPU")
    add("--workers", type=int, default=min(16, os.cpu_count()), help="processes that load images; default %(default)s")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--root", type=user_path, help="the folder of the data sets; default data")
    add("--out", type=user_path, help="the folder of all runs; default runs. Of --eval, --predict: for the table")

    tools = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    tools.add_argument("--eval", type=user_path, metavar="RUN", help="test a finished run again, class by class")
    tools.add_argument("--predict", type=user_path, nargs="+", metavar=("RUN", "IMAGE"), help="classify images")
    tools.add_argument("--list", action="store_true", help="a table of all finished runs below --out")
    return parser


def choose_machine(args):
    """The machine that the command line asks for."""
    sa2vp.check("workers", args.workers, 0)
    if args.cpu and args.gpu is not None:
        raise InputError("--cpu and --gpu contradict one another: give one of them")
    # A GPU may be listed although its driver is missing or too old.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and not args.cpu else 0
    if args.gpu is not None and not 0 <= args.gpu < gpus:
        raise InputError(f"no GPU {args.gpu}: PyTorch sees {gpus} GPUs, numbered from 0")
    device = torch.device("cpu")
    dtype = torch.float32
    if gpus:
        device = torch.device("cuda", args.gpu or 0)
        torch.cuda.set_device(device)
        # Older GPUs only emulate bfloat16, many times slower. The released code has float16 with a scaler on all GPUs.
        dtype = torch.float16
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = torch.bfloat16
        # cuDNN's attention is reported to give NaN or wrong gradients on recent GPUs.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return Machine(device, dtype, args.workers, args.compile, args.root or Path("data"))


def run_command(argv):
    """Does what the command line asks for. Returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {}
    for name in all_options():
        if hasattr(args, name):
            given[name] = list(dict.fromkeys(getattr(args, name)))  # each value once
    socket.setdefaulttimeout(60)  # seconds; without it a download would wait forever for a silent server
    machine = choose_machine(args)
    if args.list:
        return list_runs(args.out or Path("runs"))
    if not args.eval and not args.predict:
        return Sweep(given, args.out or Path("runs"), machine).run()
    first = {}
    for name, values in given.items():
        first[name], *others = values
        if others or name not in ("data", "weights", "batch_size"):
            parser.error("--eval and --predict take only --data, --weights and --batch-size, with one value each")
    if args.eval:
        return test_again(args, first, machine)
    return predict_images(args, first, machine)


def main(argv=None):
    """The command line. Exits with 2 and one sentence on bad input, 1 and a traceback on a bug, 130 on Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        # Each line is seen at once, also in a log file. Names may have characters that the terminal cannot encode.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = run_command(argv)
    except KeyboardInterrupt:
        code = 130
        print("interrupted; the same command resumes a run after its last completed epoch", file=sys.stderr)
    except Exception as error:
        code = report(error)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()

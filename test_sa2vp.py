"""Each test's name is the claim that it proves. No network and no data: everything is made on the spot.

The equations come first, then baselines, the backbone's weights, training, data, several runs, a tuned model, the
command line. `literal` is the method token by token, as the equations have it.
"""

import ast
import copy
import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
import sa2vp
import train
import vit

# ---------------------------------------------------------------------- small things to work on

PRODUCTS = (torch.nn.Linear, torch.nn.Conv2d)
CPU = train.Machine(torch.device("cpu"), torch.float32, workers=0, compile=False, root=Path("data"))


def small_vit(image_size=32, patch_size=16, dim=16, depth=5, heads=2):
    """A backbone with no zero in it, so that nothing vanishes by chance."""
    torch.manual_seed(0)
    backbone = vit.VisionTransformer(image_size, patch_size, dim, depth, heads)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone


def small_model(**options):
    model = sa2vp.SA2VP(small_vit((48, 64)), 3, 4, 0.5, **options)
    for parameter in sa2vp.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def noise_images():
    """Two images for the small model, whose grid is 3 x 4."""
    return torch.randn(2, 3, 48, 64, dtype=torch.double)


def write(root, files):
    """{path: text, bytes, dict or list (as JSON) or None (a picture of noise)}: every file below root."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(root / path)
        else:
            content = json.dumps(content) if isinstance(content, (dict, list)) else content
            (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def pictures(*places, count=10):
    return {f"{place}/{i}.png": None for place in places for i in range(count)}


def make_folder(folder):
    write(folder, pictures("train/ant", "train/bee", count=6) | pictures("test/ant", "test/bee", count=4))
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of pictures and a file of weights for 224 x 224 images, both small."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save(vit.VisionTransformer(224, 32, 64, 5, 1).state_dict(), folder / "vit.pth")
    make_folder(folder / "insects")
    return folder


@pytest.fixture
def workplace(files, tmp_path, monkeypatch):
    """A folder with insects/ and vit.pth that a test may change; the working directory is an empty one in it."""
    folder = tmp_path / "lab"
    shutil.copytree(files / "insects", folder / "insects")
    shutil.copy(files / "vit.pth", folder)
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    return folder


def rename(tensors, patterns):
    """The tensors with every pattern in their names replaced, in this order."""
    for pattern, replacement in patterns.items():
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


SMALL = {"--data": "../insects", "--weights": "../vit.pth", "--epochs": 1, "--batch-size": 4, "--workers": 0}


def complete(flags):
    """The flags of a command on the small data and the CPU, as far as others are not given."""
    defaults = [part for flag, value in SMALL.items() if flag not in flags for part in (flag, value)]
    return [*flags, *defaults, *([] if "--gpu" in flags else ["--cpu"])]


def exit_code(*flags):
    """Runs the command line. Returns its exit code."""
    try:
        train.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def train_run(*flags, out="runs"):
    """Trains on the small data. Returns the folder of the run, of several runs the folder of all."""
    assert exit_code(*complete(flags), "--out", out) == 0
    folders = [path.parent for path in Path(out).glob("*/result.json")]
    return folders[0] if len(folders) == 1 else Path(out)


def settings_of(folder, **given):
    """The complete settings of a run on the small data in a folder."""
    own = {"data": str(folder / "insects"), "weights": str(folder / "vit.pth"), "epochs": 2, "batch_size": 4}
    return train.complete_settings({"method": "sa2vp", "dropout": 0.2} | own | given)


@pytest.fixture(scope="session")
def session_run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.fit(settings_of(files), out, CPU)
    return out


@pytest.fixture
def finished(session_run, workplace):
    """The folder of a finished run in the workplace, with its settings_of(workplace)."""
    return shutil.copytree(session_run, workplace / "work/finished")


@pytest.fixture
def refusal(capsys):
    """A function that gives the one sentence with which the command line refuses its input."""

    def refusal(*flags):
        capsys.readouterr()
        assert exit_code(*flags) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        if lines[0].startswith("usage:"):  # argparse's own message, below the usage
            lines = lines[-1:]
        assert len(lines) == 1, lines
        return lines[0]

    return refusal


def interrupt(monkeypatch, after=1):
    """Has evaluation number `after` (from 0) end in Ctrl-C, once. A run evaluates after each epoch and at its end."""
    evaluate = train.evaluate
    calls = itertools.count()

    def interrupted(*arguments):
        if next(calls) == after:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)


def fit_one_epoch(settings, out, machine=CPU):
    """Trains until Ctrl-C in the second epoch."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch)
        train.fit(settings, out, machine)


def read_table(path):
    return list(csv.DictReader(path.open(encoding="utf-8-sig")))


def read_json(path):
    return json.loads(path.read_text())


def read_pt(path):
    return torch.load(path, weights_only=True)


def outcome(out):
    """Everything a run leaves but its times and version; a checksum of each tensor."""
    rows = [read_json(out / "result.json"), *read_table(out / "metrics.csv")]
    rows[0] = {name: rows[0][name] for name in ("accuracy", "val_accuracy", "best_epoch", "trainable")}
    for row in rows[1:]:
        row.pop("seconds")
    tensors = {}
    for name in ("best.pt", "last.pt"):
        for key, tensor in read_pt(out / name)["trained"].items():
            tensors[name, key] = zlib.crc32(tensor.detach().numpy())
    return rows, tensors


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server on 127.0.0.1 for the folder `server.folder`."""
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder, server.url = tmp_path / "server", f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class LowRankLinear(torch.nn.Linear):
    """A frozen linear layer with a trained matrix of low rank beside it."""

    def __init__(self, linear, rank):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(rank, self.in_features) / 10)
        self.up = torch.nn.Parameter(torch.randn(self.out_features, rank) / 10)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class NewMethod(sa2vp.ViTClassifier):
    """A method as somebody may add it: of low rank, with trained biases, a BatchNorm and a random buffer."""

    def __init__(self, vit, num_classes, rank=4, gated=False, inner_dim=5):
        super().__init__(sa2vp.freeze(vit), num_classes)
        for block in vit.blocks:
            block.attn.qkv = LowRankLinear(block.attn.qkv, rank)
            block.mlp.fc1.bias.requires_grad_(True)
        self.batch_norm = torch.nn.BatchNorm1d(vit.dim)
        self.register_buffer("noise", torch.randn(vit.dim))
        self.gated = gated

    def layer(self, i, x):
        return super().layer(i, x) + self.noise * self.batch_norm(x.mT).mT


@pytest.fixture
def new_method(monkeypatch):
    """A row of METHODS that is not part of the project: its name."""
    monkeypatch.setitem(sa2vp.METHODS, "new", NewMethod)
    return "new"


# ---------------------------------------------------------------------- the equations


def draw(name, shape, mean=0.0, std=0.03):
    """Normal numbers that depend on nothing but the name: the recipe behind the golden numbers."""
    rng = np.random.RandomState(zlib.crc32(f"0:{name}".encode()))
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))


OUTSIDE = "vit_base.transformer.embeddings."
ENCODER = "vit_base.transformer.encoder."
OFFICIAL_NAMES = {  # what to replace in our names to get those of the authors' released code
    r"^head": "class_head", r"^vit\.cls_token": f"{OUTSIDE}cls_token",
    r"^vit\.pos_embed": f"{OUTSIDE}position_embeddings", r"^vit\.patch_embed\.proj": f"{OUTSIDE}patch_embeddings",
    r"^prompt_map\.tokens": f"{OUTSIDE}ppt", r"^prompt_map\.proj": f"{OUTSIDE}ppt_proj",
    r"^vit\.norm": f"{ENCODER}encoder_norm", r"^vit\.blocks": f"{ENCODER}layer",
    r"^interactions\.[48]\.fusion\.gate": f"{ENCODER}cross_conv",  # of both
    r"^interactions\.[48]\.fusion\.prompt_map\.tokens": f"{ENCODER}deep_ppt",  # of both
    r"^interactions\.4\.fusion\.prompt_map\.proj": f"{ENCODER}deep_proj.0",
    r"^interactions\.8\.fusion\.prompt_map\.proj": f"{ENCODER}deep_proj.1",
    r"^interactions\.(\d+)\.adapter": rf"{ENCODER}cross_attn.\1", r"norm1": "attention_norm",
    r"norm2|(?<=\d\.)norm": "ffn_norm", r"mlp": "ffn", r"down": "ffn.fc1", r"up\.": "ffn.fc2.",
    r"attn\.proj": "attn.out",
}  # fmt: skip


def golden_tensor(name, shape):
    """The tensor of one of our names, as the released code's checkpoint of the golden numbers has it."""
    (official,) = rename({name: None}, OFFICIAL_NAMES)
    if "qkv" in name:
        third = (shape[0] // 3, *shape[1:])
        return torch.cat([draw(official.replace("qkv", kind), third) for kind in ("query", "key", "value")])
    std = 0.2 if name.endswith("tokens") else 0.03
    if name.endswith(("fusion.gate", "fusion.prompt_map.tokens")):  # the two of layers 4 and 8 are one tensor
        both = draw(official, (2, shape[-1]) if name.endswith("gate") else (2, *shape), std=std)
        return both[int(name.startswith("interactions.8"))].view(shape)
    if re.search(r"norm\d?\.weight", name):
        return draw(official, shape, mean=1.0, std=0.05)
    return draw(official, shape, std=std)


# What the authors' released code (its exact, per-token variant) computed for these weights in float32.
GOLDEN_LOGITS = [  # of the base pathway and of the prompt pathway
    [[0.3106474, 0.7494106, -0.7767359, -1.8029952], [0.69048494, 0.74388146, 0.3233544, -1.7496935]],
    [[0.12830934, -0.9989903, -0.7256002, -1.7632062], [0.12550925, -1.0010186, -0.7275145, -1.7674283]],
]
GOLDEN_LOSS = 6.708690166
GOLDEN_SQUARED_GRADIENTS = {
    "prompt_map.tokens": 0.00245926411843631,
    "prompt_map.proj.bias": 16.267122676392383,
    "interactions.0.adapter.down.weight": 8.463537157450572e-05,
    "interactions.5.adapter.norm.weight": 8.879481089023413e-07,
    "interactions.8.fusion.prompt_map.proj.weight": 2.4314366495237537e-05,
    "interactions.11.adapter.up.bias": 0.00018906372348329124,
    "head.weight": 313.60015402911074,
}


def test_equals_the_released_code_forward_and_backward():
    model = sa2vp.SA2VP(vit.VisionTransformer(), 200).eval()
    state = model.state_dict()
    model.load_state_dict({name: golden_tensor(name, tuple(state[name].shape)) for name in state})
    logits = model(draw("images", (2, 3, 224, 224), std=1.0))
    loss = sa2vp.two_pathway_loss(logits, torch.tensor([3, 7]))
    loss.backward()

    tolerance = 1e-5 * logits[0].abs().max().item()
    torch.testing.assert_close(torch.stack(logits)[..., :4], torch.tensor(GOLDEN_LOGITS), rtol=0, atol=tolerance)
    assert loss.item() == pytest.approx(GOLDEN_LOSS, rel=1e-5)
    for name, golden in GOLDEN_SQUARED_GRADIENTS.items():
        square = model.get_parameter(name).grad.double().square().sum().item()
        assert square == pytest.approx(golden, rel=2e-5), name  # a square: twice 1e-5


def gradients(model, logits):
    """Those of the loss, by name, for two images of the classes 0 and 2."""
    trained = sa2vp.trained_parameters(model)
    loss = sa2vp.two_pathway_loss(logits, torch.tensor([0, 2]))
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)))


def literal(model, image, window, distill_layers, fusion_layers, scale=0.5):
    """Equations (1) to (7) for one image, token by token and head by head: (base, prompt) class tokens."""
    backbone = model.vit
    heads = backbone.blocks[0].attn.heads

    def near(place, n, place2, n2):  # distance of the centres, against half a window of the larger cells
        distance = abs((place + 0.5) / n - (place2 + 0.5) / n2)
        return distance < window / 2 * max(1 / n, 1 / n2) - 1e-9

    def neighbours(t, grid, other):
        (h, w), (h2, w2) = grid, other
        if t == 0 or window is None:
            return list(range(1 + h2 * w2))
        y, x = divmod(t - 1, w)
        return [1 + y2 * w2 + x2 for y2 in range(h2) for x2 in range(w2) if near(y, h, y2, h2) and near(x, w, x2, w2)]

    def message(i, x, y, grid, other):
        block = backbone.blocks[i]
        q, _, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
        _, k, v = block.attn.qkv(block.norm1(y)).chunk(3, dim=1)
        heard = []
        for t in range(len(x)):
            us = neighbours(t, grid, other)
            o = []
            for head in torch.arange(q.size(1)).chunk(heads):
                weights = (k[us][:, head] @ q[t, head] / math.sqrt(len(head))).softmax(dim=0)
                o.append(weights @ v[us][:, head])
            heard.append(block.attn.proj(torch.cat(o)))
        z = x + torch.stack(heard)
        adapter = model.interactions[i].adapter
        return scale * adapter.up(F.gelu(adapter.down(adapter.norm(z))))

    positions = vit.interpolate_positions(backbone.pos_embed, backbone.grid, model.prompt_grid)[0]
    base = torch.cat([backbone.cls_token[0], backbone.patch_embed(image[None])[0].T]) + backbone.pos_embed[0]
    prompt = model.prompt_map.tokens[0] @ model.prompt_map.proj.weight.T + model.prompt_map.proj.bias + positions
    for i, block in enumerate(backbone.blocks):
        next_base = block(base[None])[0]
        next_prompt = block(prompt[None])[0]
        if i in fusion_layers:
            fusion = model.interactions[i].fusion
            next_prompt = next_prompt + fusion.gate * block(fusion.prompt_map())[0]
        if i in distill_layers:
            next_prompt = next_prompt + message(i, prompt, base, model.prompt_grid, backbone.grid)
        else:
            next_base = next_base + message(i, base, prompt, backbone.grid, model.prompt_grid)
        base, prompt = next_base, next_prompt
    return model.head(backbone.norm(base[0])), model.head(backbone.norm(prompt[0]))


@pytest.mark.parametrize("prompt_grid, window, distill, fusion", [
    (None, 3, (0, 4), (4,)),  # the paper's
    (None, 5, (), ()),  # every layer prompts
    (None, None, (1, 2), (2,)),  # no alignment
    ((2, 2), 3, (0, 4), (0, 4)),  # a smaller map, not in proportion
    ((5, 7), 3, (0, 1, 2, 3, 4), (1,)),  # a larger one; every layer distils
    ((6, 8), 1, (2,), ()),
])  # fmt: skip
def test_equals_the_equations_taken_literally_token_by_token(prompt_grid, window, distill, fusion):
    model = small_model(prompt_grid=prompt_grid, window=window, distill_layers=distill, fusion_layers=fusion)
    images = noise_images()
    pairs = [literal(model, image, window, distill, fusion) for image in images]
    expected = [torch.stack(logits) for logits in zip(*pairs)]
    logits = list(model(images))

    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(model, logits), gradients(model, expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("count, method, options", [
    (85_798_656, "full", {}),
    (372_912, "sa2vp", {"inner_dim": 16}),
    (365_856, "sa2vp", {"inner_dim": 16, "prompt_grid": (7, 7)}),
    (1_333_888, "sa2vp", {"inner_dim": 64, "fusion_layers": (4,)}),  # cars
    (322_752, "adapter", {"inner_dim": 16}),
    (460_800, "vpt", {}),
])  # fmt: skip
def test_trained_parameters_are_as_many_as_the_paper_says(count, method, options):
    with torch.device("meta"):
        backbone = vit.VisionTransformer()
    assert sa2vp.count_trained(sa2vp.METHODS[method](backbone, 10, **options)) == count


def test_what_does_not_depend_on_the_image_is_computed_for_a_batch_of_one():
    model = small_model()
    sizes = []
    for block in model.vit.blocks:
        block.norm2.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:2]))
    model(noise_images())

    base, prompt, fusion, class_only = (2, 13), (2, 13), (1, 13), (2, 1)
    #       layer 0            1             2             3             4
    assert sizes == [base, fusion, base, prompt, base, prompt, base, prompt, class_only, class_only, fusion]


def test_dropout_of_one_rate_is_on_both_pathways_the_encoder_and_the_adapters():
    model = small_model(dropout=0.5).train()
    pathways = []
    rates = []
    (drop,) = (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    drop.register_forward_hook(lambda *_: rates.append(drop.p))
    model.interactions[0].register_forward_pre_hook(lambda _, inputs: pathways.extend(inputs[1:]))
    model(noise_images())

    assert rates == [0.5] * (2 + 11 * 2 + 5 + 5 * 2)  # B_0 and P_0; each MLP, in 5 + 5 + 1 layers; C_i; A_i
    for tokens in pathways:  # B_0 and P_0
        assert 0.3 < (tokens == 0).double().mean() < 0.7


def test_dropout_acts_where_the_equations_have_it():
    def twice(x):
        return 2 * x

    block = small_vit().blocks[0]
    adapter = sa2vp.PromptAdapter(16, 4, twice)
    z = torch.randn(2, 5, 16)
    q, k, v = block.start(z)
    c = sa2vp.SpatiallyAlignedCrossAttention(None, twice)(block, z, q, k, v)

    torch.testing.assert_close(c, z + 2 * block.attn.attend(q, k, v))
    torch.testing.assert_close(adapter(z), 2 * adapter.up(2 * F.gelu(adapter.down(adapter.norm(z)))))
    assert [type(layer).__name__ for layer in block.mlp] == ["Linear", "GELU", "Dropout", "Linear", "Dropout"]


@pytest.mark.parametrize("method", [*sa2vp.METHODS, "new"])
def test_in_bfloat16_only_the_inputs_of_matrix_products_are_rounded(new_method, method):
    model = sa2vp.build(small_vit(), 3, {"method": method, "dropout": 0.0})
    images = torch.randn(2, 3, 32, 32)
    expected = gradients(model, model(images))
    streams = set()
    products = set()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):  # what it is given is a residual stream
            module.register_forward_pre_hook(lambda _, inputs: streams.add(inputs[0].dtype))
        elif isinstance(module, PRODUCTS) and not isinstance(module, sa2vp.FullPrecisionLinear):
            module.register_forward_hook(lambda module, _, output: products.add(output.dtype))
    train.cast_frozen(model, torch.bfloat16)
    logits = train.forward(model, images, CPU._replace(dtype=torch.bfloat16))

    assert streams | {scores.dtype for scores in logits} == {torch.float32} and products == {torch.bfloat16}
    assert model.head(torch.ones(1, model.vit.dim, dtype=torch.bfloat16)).dtype == torch.float32
    for name, gradient in gradients(model, logits).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm(), name


def test_initialisation_is_the_methods():
    model = sa2vp.SA2VP(vit.VisionTransformer(64, 16, 256, 5, 4), 50, inner_dim=16)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.4.mlp.fc2.weight", "pos_embed"):
        assert model.vit.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1), name
    for name, tensor in sa2vp.trained_parameters(model).items():
        std = tensor.std().item()
        if name.endswith(("tokens", "gate", "head.weight")):
            assert std == pytest.approx(0.02, rel=0.2), name
        elif name.endswith(("proj.weight", "down.weight", "up.weight")):
            assert std == pytest.approx(math.sqrt(2 / (256 + 16)), rel=0.1), name  # Xavier
        elif name.endswith(("norm.weight", "norm.bias")):
            assert (tensor == name.endswith("weight")).all()
        elif name != "head.bias":
            assert std < 1e-5, name


def test_half_a_prompt_map_is_rounded_down_and_new_ones_enter_all_layers_of_d_but_0():
    model = sa2vp.SA2VP(small_vit((48, 80)), 3, prompt_grid="half", distill_layers=(1, 3))

    assert model.prompt_grid == (1, 2)
    assert [i for i, interaction in enumerate(model.interactions) if interaction.fusion] == [1, 3]


# ---------------------------------------------------------------------- baselines and looking inside


def test_vpts_prompts_are_drawn_as_vpt_draws_them_and_new_ones_enter_every_layer():
    model = sa2vp.VPTDeep(small_vit(), 3, prompts=20)
    images = torch.randn(2, 3, 32, 32)
    x = model.vit.embed(images)
    for block, prompts in zip(model.vit.blocks, model.prompts, strict=True):
        x = block(torch.cat([x, prompts.expand(2, 20, 16)], dim=1))[:, :5]

    bound = math.sqrt(6 / (3 * 16 * 16 + 16))
    assert 0.95 * bound < model.prompts.abs().max() <= bound
    torch.testing.assert_close(model(images)[0], model.head(model.vit.norm(x[:, 0])))


def test_adapter_tuning_adds_the_adapters_message_to_every_layer():
    model = sa2vp.AdapterTuning(small_vit(), 3, 4, scale=0.5, dropout=0.2).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.vit.embed(images)
    for block, adapter in zip(model.vit.blocks, model.adapters):
        assert adapter.drop.p == 0.2
        x = block(x) + 0.5 * adapter(x)

    torch.testing.assert_close(model(images)[0], model.head(model.vit.norm(x[:, 0])))


def test_the_loss_of_one_pathway_is_plain_cross_entropy_and_a_third_is_an_error():
    logits = torch.randn(2, 3)
    labels = torch.tensor([0, 2])

    assert sa2vp.two_pathway_loss((logits,), labels) == F.cross_entropy(logits, labels)
    with pytest.raises(ValueError):
        sa2vp.two_pathway_loss((logits,) * 3, labels)


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_a_model_is_exported_for_batches_of_any_size(method):
    model = sa2vp.build(small_vit(), 3, {"method": method}).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=dynamic).module()

    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(exported(images), model(images))


# ---------------------------------------------------------------------- the backbone and its weights

STATE = small_vit().state_dict()


def file_content(content, **options):
    """The bytes of a file: those given, or what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return content if isinstance(content, bytes) else buffer.getvalue()


def refused_weights(path, content, **options):
    """The sentence with which load_vit refuses a file of this content."""
    path.write_bytes(file_content(content))
    with pytest.raises(vit.InputError) as refused:
        vit.load_vit(path, 32, **options)
    sentence = str(refused.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


def split_qkv(tensors):
    """attn.query, attn.key and attn.value in place of each attn.qkv."""
    split = {}
    for name, tensor in tensors.items():
        kinds = ("query", "key", "value") if "qkv" in name else ("qkv",)
        for kind, piece in zip(kinds, tensor.chunk(len(kinds))):
            split[name.replace("qkv", kind)] = piece
    return split


GOOGLE = {  # timm's names -> Google's, by the layout its documentation gives
    r"cls_token": "cls", r"pos_embed": "Transformer/posembed_input/pos_embedding",
    r"patch_embed\.proj\.": "embedding/", r"(norm.?\.)weight": r"\1scale", r"^norm\.": "Transformer/encoder_norm/",
    r"blocks\.(\d+)\.": r"Transformer/encoderblock_\1/", r"norm1\.": "LayerNorm_0/", r"norm2\.": "LayerNorm_2/",
    r"mlp\.fc1\.": "MlpBlock_3/Dense_0/", r"mlp\.fc2\.": "MlpBlock_3/Dense_1/",
    r"attn\.proj\.": "MultiHeadDotProductAttention_1/out/", r"attn\.(\w+)\.": r"MultiHeadDotProductAttention_1/\1/",
    r"weight": "kernel",
}  # fmt: skip


def google(tensors):
    """The content of Google's .npz: inputs come first, heads have a dimension of their own."""
    arrays = {"pre_logits/bias": np.zeros(9)}
    for name, tensor in rename(split_qkv(tensors), GOOGLE).items():
        if re.search("query|key|value", name):
            tensor = tensor.unflatten(0, (2, -1))
        if name.endswith("kernel"):
            tensor = tensor.permute(2, 3, 1, 0) if name == "embedding/kernel" else tensor.movedim(-1, 0)
        arrays[name] = tensor.unflatten(0, (2, -1)) if name.endswith("out/kernel") else tensor
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def safetensors(tensors, code="F32", dtype=torch.float32):
    """The content of a .safetensors file."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        begin, blob = len(blob), blob + tensor.to(dtype).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, len(blob)]}
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + blob


def pytorch(prefix="", **others):
    """A function that gives a state dict other names, with something in front of them, beside other tensors."""
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()} | others


def hugging_face(block, names):
    """A function that gives a state dict the names of HuggingFace's transformers."""
    table = {r"^(cls_token|pos_embed)": r"embeddings.\1", "pos_embed": "position_embeddings",
             r"^patch_embed\.proj": "embeddings.patch_embeddings.projection", r"^norm\.": "layernorm.",
             r"^blocks\.": block, "attn.": "attention."}  # fmt: skip
    others = {"pooler.dense.bias": torch.ones(16), "embeddings.mask_token": torch.ones(1, 16)}
    return lambda state: rename(split_qkv(state), table | names) | others


DENSE = {r"attention\.(query|key|value)": r"attention.attention.\1", r"attention\.proj": "attention.output.dense"}
SHORT = {f"attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
NORMS = {r"norm1\.": "layernorm_before.", r"norm2\.": "layernorm_after."}
KINDS = {  # of files that hold the same backbone: functions from its state dict to their content
    "google": google,
    "float32": safetensors,
    "float16": lambda state: safetensors(state, "F16", torch.float16),
    "bfloat16": lambda state: safetensors(state, "BF16", torch.bfloat16),
    "lightning": lambda state: {"state_dict": pytorch("model.backbone.", **{"criterion.weight": torch.ones(2)})(state)},
    "moco": lambda state: {"state_dict": pytorch("module.base_encoder.")(state)
                           | pytorch("module.momentum_encoder.")({name: -t for name, t in state.items()})
                           | {"module.predictor.0.weight": torch.ones(2)}},
    "dino": lambda state: {"student": pytorch("module.backbone.")({name: -t for name, t in state.items()}),
                           "teacher": pytorch("backbone.")(state)},
    "dinov2's training": lambda state: {"teacher": pytorch("backbone.")(rename(state, {
        r"blocks\.([01])\.": r"blocks.0.\1.", r"blocks\.([234])\.": r"blocks.1.\1."}))},
    "transformers": lambda state: pytorch("vit.", **{"classifier.weight": torch.ones(2)})(hugging_face(
        "encoder.layer.", DENSE | NORMS | {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"})(state)),
    "transformers 5": hugging_face("layers.", SHORT | NORMS | {r"attention\.proj": "attention.o_proj"}),
}  # fmt: skip
READ = {"moco": "state_dict.module.base_encoder", "dino": "teacher.backbone"}


def test_vit_equals_torchvision_with_the_same_weights(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(64, 16, 3, 2, 128, 256)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    theirs.heads = torch.nn.Identity()
    pictures = torch.randn(2, 3, 64, 64)
    ours = vit.load_vit(tmp_path / "vit.pth", 64)

    torch.testing.assert_close(ours(pictures), theirs(pictures), rtol=1e-5, atol=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(vit.InputError, match="33, 33"):
        small_vit()(torch.zeros(1, 3, 33, 33))


def test_every_published_backbone_has_its_own_address_and_normalization():
    assert len({url for url, _ in vit.BACKBONES.values()}) == len(vit.BACKBONES)
    normalize = {name: known for name, (_, known) in vit.BACKBONES.items()}
    assert normalize == dict.fromkeys(vit.BACKBONES, "imagenet") | {"imagenet21k": "half"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_is_found_in_every_kind_of_file_under_every_publishers_names_behind_any_others(tmp_path, kind):
    state = small_vit().bfloat16().float().state_dict()
    others = dict.fromkeys(("head.weight", "fc_norm.bias", "mask_token", "decoder_pos_embed"), torch.zeros(1))
    path = tmp_path / "2fb4"  # its first bytes tell a file's kind
    path.write_bytes(file_content(KINDS[kind](state | others)))
    options = {} if kind == "google" else {"heads": 2, "normalize": "half"}
    loaded = vit.load_vit(path, image_size=32, **options)

    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)
    assert loaded.blocks[0].attn.heads == 2 and loaded.normalize == "half"
    assert loaded.notes == ([f"{READ[kind]} read, one of 2 encoders in the file"] if kind in READ else [])


@pytest.mark.parametrize("names, gains", [
    (dict, "blocks.{}.ls{}.gamma"), (hugging_face("encoder.layer.", DENSE), "encoder.layer.{}.layer_scale{}.lambda1"),
])  # fmt: skip
def test_layer_scale_is_folded_into_the_layers_before_it(tmp_path, names, gains):
    backbone = small_vit()
    pictures = torch.randn(2, 3, 32, 32)
    state = names(backbone.state_dict())
    for i, block in enumerate(backbone.blocks):
        for j, layer in enumerate((block.attn.proj, block.mlp.fc2), start=1):
            layer.gain = state[gains.format(i, j)] = torch.randn(16)
            layer.register_forward_hook(lambda layer, _, output: layer.gain * output)
    torch.save(state, tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", 32, heads=2)

    torch.testing.assert_close(loaded(pictures), backbone(pictures), rtol=1e-4, atol=1e-5)


def test_the_usual_heads_are_those_of_the_published_models():
    heads = {dim: vit.usual_heads(dim, "") for dim in (64, 192, 384, 768, 1024, 1280, 1408, 1664, 100)}
    assert heads == {64: 1, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 100: None}


@pytest.mark.parametrize("prefix, dim, heads", [("", 1280, 16), ("", 384, 6), ("module.base_encoder.", 384, 12)])
def test_heads_and_normalization_are_assumed_as_published_and_that_is_noted(tmp_path, prefix, dim, heads):
    state = vit.VisionTransformer(4, 4, dim, 1, 1, mlp_ratio=4 / dim).state_dict()
    torch.save(pytorch(prefix)(state), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", 4)

    assert loaded.blocks[0].attn.heads == heads and loaded.normalize == "imagenet"
    assert loaded.notes == [f"heads {heads} assumed (--heads overrides it)",
                            "normalize imagenet assumed (--normalize overrides it)"]  # fmt: skip


def test_a_width_without_usual_heads_asks_for_their_number(tmp_path):
    assert "width 16 is not a multiple of 64: give the number of heads" in refused_weights(tmp_path / "vit.pth", STATE)


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def beside(tmp_path):
    """A function that loads a link to a file of weights (width 16, 5 layers) with these configurations beside it."""
    torch.save(small_vit().state_dict(), tmp_path / "2fb4")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model").symlink_to("../2fb4")

    def beside(configs, **options):
        write(tmp_path / "snapshot", configs)
        return vit.load_vit(tmp_path / "snapshot/model", 32, **options)

    return beside


@pytest.mark.parametrize("normalize, configs", [
    ("half", {"config.json": {"num_attention_heads": 4, "num_features": 16, "pretrained_cfg": HALF}}),  # timm's
    ((0.7, 0.5, 0.7, 0.2, 0.25, 0.2), {  # HuggingFace's
        "config.json": {"num_attention_heads": 4, "hidden_size": 16, "num_hidden_layers": 5, "hidden_act": "gelu"},
        "preprocessor_config.json": {"image_mean": [0.7, 0.5, 0.7], "image_std": [0.2, 0.25, 0.2]}}),
])  # fmt: skip
def test_heads_and_normalization_are_those_of_the_configuration_beside_the_file(beside, normalize, configs):
    loaded = beside(configs)

    assert loaded.blocks[0].attn.heads == 4 and loaded.normalize == normalize
    assert f"normalization {normalize}" in loaded.describe()
    assert loaded.notes == ["heads 4 read from config.json (--heads overrides it)",
                            f"normalize {normalize} read from {[*configs][-1]} (--normalize overrides it)"]  # fmt: skip


@pytest.mark.parametrize("key, value", [("hidden_size", 768), ("num_features", 32), ("num_hidden_layers", 12)])
def test_the_configuration_of_another_model_is_ignored_and_that_is_noted(beside, key, value):
    loaded = beside({"config.json": {key: value, "num_attention_heads": 4} | HALF}, heads=2)
    assert loaded.normalize == "imagenet" and len(loaded.notes) == 2
    assert "config.json ignored" in loaded.notes[0] and f"{key} is {value}" in loaded.notes[0]


@pytest.mark.parametrize("config, key", [
    *(({"num_attention_heads": heads}, "num_attention_heads") for heads in ([4], "6x", -2, 0, True, 2.0)),
    ({"hidden_act": "quick_gelu"}, "hidden_act is quick_gelu"),
    *(({"mean": mean, "std": [0.5] * 3}, "mean") for mean in (0.5, [0.5] * 2, [0.5] * 4, None, "abc")),
    ({"mean": [0.5] * 2, "std": [0.5] * 4}, "mean"), ({"mean": 0.5, "std": 0.5}, "mean"),
    ({"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]}, "std > 0"),
    ({"pretrained_cfg": [1]}, "mapping"), ([1], "config.json"), ("{", "config.json"),
])  # fmt: skip
def test_a_wrong_value_in_a_configuration_is_refused_by_file_and_key(beside, config, key):
    with pytest.raises(vit.InputError) as refused:
        beside({"config.json": config})
    assert "snapshot/config.json" in str(refused.value) and key in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_normalization_is_a_name_or_six_numbers():
    numbers = (0.1, 0.2, 0.3, 1, 2.0, 3.0)

    assert vit.mean_and_std("imagenet") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert vit.mean_and_std(list(numbers)) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert vit.VisionTransformer(32, 16, 16, 1, 2, normalize=numbers).normalize == numbers
    assert vit.VisionTransformer(32, 16, 16, 1, 2, normalize=[0.5] * 6).normalize == "half"
    assert vit.canonical_normalize([0.5] * 3 + [0.25] * 3) == (0.5,) * 3 + (0.25,) * 3


@pytest.mark.parametrize("normalize", ["nothing", "", None, 0.5, [], [0.5] * 5, [0.5] * 7, {"mean": 0.5},
                                       [0.5] * 5 + [0], [math.nan] + [0.5] * 5, [0.5] * 5 + [math.inf]])  # fmt: skip
def test_any_other_normalization_is_refused(normalize):
    with pytest.raises(vit.InputError, match="six numbers"):
        vit.mean_and_std(normalize)


def test_position_embeddings_are_interpolated_to_another_grid_and_that_is_noted(tmp_path):
    backbone = small_vit(image_size=64)
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    positions = backbone.pos_embed[0, 1:].T.reshape(1, 16, 4, 4)
    loaded = vit.load_vit(tmp_path / "vit.pth", image_size=(32, 96), heads=2, normalize="half")

    assert torch.equal(loaded.pos_embed[:, 0], backbone.pos_embed[:, 0])
    expected = F.interpolate(positions, (2, 6), mode="bicubic").reshape(16, 12).T
    torch.testing.assert_close(loaded.pos_embed[0, 1:], expected)
    assert loaded.notes == ["position embeddings resampled from 4 x 4 to 2 x 6 patches"]
    with pytest.raises(vit.InputError, match="pos_embed may be a grid of 4 x 4 or"):
        vit.load_vit(tmp_path / "vit.pth", image_size=(32, 128), heads=2)


WHOLE = safetensors({"a": torch.ones(2), "b": torch.arange(1.0, 4.0)})  # in float32 3.0 is 00@@
OLD = file_content({"a": torch.ones(99), "b": [1, 2]}, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("content", [
    b"", WHOLE[:-1], WHOLE[:40], WHOLE[:9], OLD[:-1], OLD[:-99], OLD[:60],
    OLD[:3], file_content({"a": torch.ones(99)})[:-9], google(STATE)[:-99],
])  # fmt: skip
def test_a_file_that_ends_too_early_is_to_be_deleted(tmp_path, content):
    assert "cut short: delete it" in refused_weights(tmp_path / "vit.pth", content)


@pytest.mark.parametrize("content", [
    WHOLE.replace(b"F32", b"F64"), WHOLE.replace(b"[3]", b"[4]"),
    torch.nn.Linear(2, 2), torch.ones(3), file_content(torch.ones(3), _use_new_zipfile_serialization=False),
    b'{"metadata": {"total_size": 9}, "weight_map": {}}', b"model.safetensors".ljust(999, b"\0"), b"<!DOCTYPE html><a>",
])  # fmt: skip
def test_what_is_no_state_dict_asks_for_one_and_not_to_be_deleted(tmp_path, content):
    says = refused_weights(tmp_path / "vit.pth", content)
    assert "save model.state_dict() and give that file" in says and "delete" not in says
    assert "begins with b'<!DOCTYPE html>" in says or content != b"<!DOCTYPE html><a>"


@pytest.mark.parametrize("says, content", [
    ("0 patch_embed.proj.weight, in ['net.conv1.weight']", {"net": {"conv1.weight": torch.ones(2)}}),
    ("0 patch_embed.proj.weight, in ['1']", {1: torch.ones(2)}),
    ("2 patch_embed.proj.weight, in ['model.', 'ema.']", {"model": STATE, "ema": STATE}),
    ("two of its tensors mean blocks.0.attn.qkv.bias", STATE | {"blocks.0.attn.query.bias": torch.ones(3)}),
    ("two of its tensors mean blocks.0.norm1.bias", STATE | {"blocks.1.0.norm1.bias": torch.ones(16)}),
    *((name, {key: STATE[key] for key in STATE if key != name})
      for name in ("blocks.1.mlp.fc2.bias", "patch_embed.proj.weight", "pos_embed", "cls_token")),
    *((name, STATE | {name: torch.ones(3)}) for name in (
        "norm.bias", "surplus", "class_token", "blocks.0.gamma_1", "reg_token", "register_tokens", "dist_token")),
    ("patch_embed.proj.weight is", STATE | {"patch_embed.proj.weight": torch.ones(16, 3, 2, 16, 16)}),  # of video
    *((f"{name} is torch.float32 of shape ()", STATE | {name: torch.tensor(1.0)}) for name in ("cls_token", "scale")),
    ("blocks.0.mlp.fc1.weight is torch.int8", STATE | {"blocks.0.mlp.fc1.weight": torch.ones(64, 16).char()}),
    *(("norm.bias has values that are NaN or infinite", STATE | {"norm.bias": torch.full((16,), value).double() * 10})
      for value in (math.nan, math.inf, 1e38)),
])  # fmt: skip
def test_what_holds_no_plain_vit_is_refused_with_the_reason(tmp_path, says, content):
    assert says in refused_weights(tmp_path / "vit.pth", content, heads=2)


def test_a_fingerprint_tells_backbones_apart_by_any_tensor():
    backbone = small_vit()
    seen = {vit.fingerprint(backbone)}
    for parameter in backbone.parameters():
        parameter.data += 1e-3
        seen.add(vit.fingerprint(backbone))

    assert len(seen) == 1 + len(list(backbone.parameters()))
    backbone.pos_embed.data[:, 1:] += 1e-3  # interpolated ones differ between machines
    assert vit.fingerprint(backbone) in seen


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.npz"])
def test_a_weights_file_executes_nothing(tmp_path, monkeypatch, name):
    class Bomb:
        def __reduce__(self):
            return Path("went-off").touch, ()
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    np.savez("bomb.npz", cls=np.array([Bomb()], dtype=object))

    with pytest.raises(vit.InputError, match=name):
        vit.load_vit(name)
    assert not Path("went-off").exists()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """PyTorch's cache, an empty folder. The weights of deit-tiny are to come from the server."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path / "cache")
    monkeypatch.setitem(vit.BACKBONES, "deit-tiny", (f"{server.url}/tiny.pth", "half"))
    return tmp_path / "cache"


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(cache):
    with pytest.raises(vit.InputError) as refused:
        vit.load_vit("deit-tiny")

    assert f"save it as deit-tiny.pth in {cache}/checkpoints, or give --weights PATH" in str(refused.value)
    assert os.listdir(cache / "checkpoints") == []


def test_weights_by_name_are_downloaded_once(server, files, cache):
    write(server.folder, {"tiny.pth": (files / "vit.pth").read_bytes()})
    vit.load_vit("deit-tiny")
    (server.folder / "tiny.pth").unlink()
    loaded = vit.load_vit("deit-tiny")

    assert (loaded.dim, loaded.normalize, loaded.notes) == (64, "half", [])
    assert os.listdir(cache / "checkpoints") == ["deit-tiny.pth"]


# ---------------------------------------------------------------------- training


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [train.learning_rate(step, 10, 100, 1e-3) for step in range(100)]

    expected = [0, 1e-3 * 4 / 9, 1e-3, 1e-3, 1e-7 + (1e-3 - 1e-7) / 2]
    assert [rates[step] for step in (0, 4, 9, 10, 55)] == pytest.approx(expected) and 1e-7 < rates[99] < 1e-6
    assert train.learning_rate(0, 0, 10, 1e-3) == 1e-3 and train.learning_rate(0, 1, 10, 1e-3) == 0


def test_the_warm_up_is_a_share_of_the_epochs(workplace):
    out = train_run("--epochs", 4, "--warmup", 0.3, "--lr", 0.01)
    rates = [float(row["lr"]) for row in read_table(out / "metrics.csv")]
    assert rates == [0.01] + [train.learning_rate(step, 2, 8, 0.01) for step in (3, 5, 7)]  # an epoch has 2 steps


def test_weight_decay_is_on_matrices_prompt_maps_and_gates_alone():
    model = small_model()
    optimizer = train.make_optimizer(model, 0.1)
    groups = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.9, 0.999)

    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in sa2vp.trained_parameters(model).items():
        decayed = name.endswith(("weight", "tokens", "gate")) and "norm" not in name
        assert decay.pop(parameter) == (0.1 if decayed else 0), name
    assert not decay


def test_a_seed_draws_its_own_initialisation_and_its_own_small_vit():
    weights = []
    for seed in (1, 1, 2):
        backbone = train.load_backbone(train.complete_settings(train.PRETRAINING | {"seed": seed}))
        model = train.build_model(small_vit(), {"settings": {"method": "linear", "seed": seed}, "classes": "ab"}, CPU)
        weights.append((vit.fingerprint(backbone), model.head.weight.tolist()))

    first, same, other = weights
    assert first == same and first[0] != other[0] and first[1] != other[1]


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps(workplace, monkeypatch):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(sa2vp, "two_pathway_loss", lambda logits, _: 0 * logits[0].sum() + next(losses))
    assert read_table(train_run("--method", "linear") / "metrics.csv")[0]["loss"] == "1.5"


@pytest.fixture(scope="module", params=[*sa2vp.METHODS, "new"])
def method_run(request, files, tmp_path_factory):
    """A finished run of each method, and of one that is new: (its folder, the model that was tested)."""
    models = []
    build = sa2vp.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sa2vp.METHODS, "new", NewMethod)
        patch.setattr(sa2vp, "build", lambda *given: models.append(build(*given)) or models[-1])
        out = tmp_path_factory.mktemp(request.param)
        train.fit(settings_of(files, method=request.param), out, CPU)
    return out, models[0]


def test_a_run_leaves_five_files_with_the_columns_of_metrics_by_name(method_run):
    out, _ = method_run

    rows = read_table(out / "metrics.csv")
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "metrics.csv", "result.json", "settings.json"]
    assert list(rows[0]) == ["epoch", "loss", "lr", "val_accuracy", "val_prompt_accuracy", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2"]


def test_a_checkpoint_holds_all_but_frozen_parameters(method_run):
    out, model = method_run
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert read_pt(out / "best.pt")["trained"].keys() == model.state_dict().keys() - frozen


def test_frozen_weights_stay_bit_for_bit(method_run, files):
    _, model = method_run
    original = vit.load_vit(files / "vit.pth").state_dict()
    for name, parameter in model.vit.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, original[name]), name


def test_a_loaded_model_is_bit_for_bit_the_one_that_was_tested(method_run, new_method):
    out, model = method_run
    images = torch.randn(2, 3, 224, 224)
    loaded, _ = sa2vp.load(out)

    assert not loaded.training
    for loaded_logits, logits in zip(loaded(images), model(images), strict=True):
        assert torch.equal(loaded_logits, logits)


def test_a_result_has_the_numbers_of_each_pathway(method_run):
    out, model = method_run
    result = read_json(out / "result.json")

    pathways = len(model(torch.randn(2, 3, 224, 224)))
    assert result["trainable"] == sa2vp.count_trained(model)
    assert result["accuracy"] is not None and (result["prompt_accuracy"] is None) == (pathways == 1)


def test_a_resumed_run_has_the_numbers_of_a_whole_one_with_any_workers(method_run, new_method, workplace, capsys):
    whole, _ = method_run
    settings = settings_of(workplace, method=read_json(whole / "result.json")["settings"]["method"])
    fit_one_epoch(settings, Path("broken"))
    train.fit(settings, Path("broken"), CPU._replace(workers=2))

    assert outcome(Path("broken")) == outcome(whole)
    assert "resuming after epoch 1" in capsys.readouterr().out


def test_last_pt_alone_is_enough_to_end_a_run(finished, workplace):
    before = outcome(finished)
    for name in ("best.pt", "result.json", "metrics.csv"):
        (finished / name).unlink()
    train.fit(settings_of(workplace), finished, CPU)

    history = read_pt(finished / "last.pt")["history"]
    train.save(finished / "metrics.csv", history)
    assert outcome(finished) == before


def test_dropout_is_on_in_training_alone(finished, workplace):
    settings = settings_of(workplace)
    model, meta = sa2vp.load(finished)
    samples = train.read_data(settings["data"], CPU.root).train
    batches = data.make_loader(samples, meta["input"], 4, workers=0, shuffle_seed=0)
    optimizer = train.make_optimizer(model, 0.0)
    train.train_epoch(model, batches, optimizer, torch.amp.GradScaler(enabled=False), settings, 0, CPU)
    assert model.training

    first = train.predict(model, batches, CPU)
    second = train.predict(model, batches, CPU)
    assert not model.training and torch.equal(first, second)


def test_predictions_are_the_logits_of_all_pathways_in_the_order_of_images_and_accuracies_theirs(finished, workplace):
    model, meta = sa2vp.load(finished)
    samples = train.read_data(str(workplace / "insects"), CPU.root).test
    batches = data.make_loader(samples, meta["input"], 3, workers=0)
    images, labels = zip(*batches)
    logits = train.predict(model, batches, CPU)

    with torch.no_grad():
        expected = torch.stack(model(torch.cat(images)), dim=1)
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad
    right = (logits.argmax(dim=2) == torch.cat(labels)[:, None]).double().mean(dim=0)
    assert train.evaluate(model, batches, CPU) == dict(zip(("accuracy", "prompt_accuracy"), (100 * right).tolist()))
    assert train.evaluate(model, [], CPU) == {"accuracy": None, "prompt_accuracy": None}
    relabelled = [(image, guess) for (image, _), guess in zip(samples, logits[:, 0].argmax(dim=1).tolist())]
    batches = data.make_loader(relabelled, meta["input"], 3, workers=0)
    assert train.evaluate(model, batches, CPU)["accuracy"] == 100


def test_predicting_many_batches_keeps_no_file_open(finished):
    resource = pytest.importorskip("resource", reason="limits of Unix")
    model, meta = sa2vp.load(finished)
    batches = data.make_loader([(np.zeros((48, 48, 3), np.uint8), 0)] * 140, meta["input"], 1, workers=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # a tensor that a worker sent keeps a file open
    try:
        assert len(train.predict(model, batches, CPU)) == 140
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("method", [*sa2vp.METHODS, "new"])
def test_only_frozen_weights_of_matrix_products_are_cast(new_method, method):
    model = sa2vp.build(small_vit(), 3, {"method": method})
    products = {}
    for name, module in model.named_modules():
        if isinstance(module, PRODUCTS) and name != "head":
            products |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    train.cast_frozen(model, torch.bfloat16)

    for name, tensor in model.state_dict(keep_vars=True).items():
        is_cast = name in products and not tensor.requires_grad
        assert tensor.dtype in ((torch.bfloat16,) if is_cast else (torch.float32, torch.long)), name


@pytest.mark.parametrize("begun, steps", [(torch.float16, 4), (torch.bfloat16, 2)])
def test_float16_has_a_scaler_which_resumes_if_the_run_was_begun_with_one(workplace, begun, steps):
    fit_one_epoch(settings_of(workplace), Path("run"), CPU._replace(dtype=begun))
    train.fit(settings_of(workplace), Path("run"), CPU._replace(dtype=torch.float16))

    assert read_pt(Path("run/last.pt"))["scaler"]["_growth_tracker"] == steps  # an epoch has 2


@pytest.mark.parametrize("keep, epoch", [("best", 3), ("last", 4)])
def test_the_last_of_the_best_epochs_or_just_the_last_is_tested_and_stored(workplace, monkeypatch, keep, epoch):
    accuracies = iter([10.0, 30.0, 30.0, 20.0, 5.0])  # of four epochs, and of the test
    heads = []
    def pretended(model, *_):
        heads.append(model.head.weight.clone())
        return {"accuracy": next(accuracies), "prompt_accuracy": None}
    monkeypatch.setattr(train, "evaluate", pretended)
    result = train.fit(settings_of(workplace, epochs=4, keep=keep), Path("run"), CPU)

    best = read_pt(Path("run/best.pt"))
    assert (result["best_epoch"], result["accuracy"], len(best["history"])) == (epoch, 5.0, epoch)
    assert result["val_accuracy"] == {3: 30.0, 4: 20.0}[epoch]
    assert torch.equal(heads[epoch - 1], heads[4]) and torch.equal(best["trained"]["head.weight"], heads[4])


def test_every_epoch_has_its_own_order_seeds_of_crops_and_dropout(workplace, monkeypatch):
    seeds = []
    def record(model, batches, *_):
        order, crops = zip(*batches.sampler)
        seeds.append((order, crops, torch.rand(1).item()))  # the last is that of dropout
        return 0.0, 0.0
    monkeypatch.setattr(train, "train_epoch", record)
    for seed in (1, 1, 2):
        train.fit(settings_of(workplace, seed=seed), Path(f"{len(seeds)}"), CPU)

    assert seeds[:2] == seeds[2:4] and [len(set(part)) for part in zip(*seeds)] == [4, 4, 4]
    assert all(sorted(order) == list(range(10)) for order, *_ in seeds)


def choose_machine(*flags):
    return train.choose_machine(train.make_parser().parse_args(flags))


@pytest.mark.parametrize("works, real, device, dtype", [
    (True, True, "cuda:0", torch.bfloat16), (True, False, "cuda:0", torch.float16), (False, True, "cpu", torch.float32),
])  # fmt: skip
def test_a_gpu_that_emulates_bfloat16_takes_float16_and_a_broken_one_is_none(monkeypatch, works, real, device, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: real or including_emulation)
    torch.backends.cuda.enable_cudnn_sdp(True)
    machine = choose_machine()

    assert (str(machine.device), machine.dtype) == (device, dtype)
    assert torch.backends.cuda.cudnn_sdp_enabled() == (not works)


@pytest.mark.parametrize("flags, device", [(["--gpu", "1"], "cuda:1"), ([], "cuda:0"), (["--cpu"], "cpu")])
def test_the_gpu_is_the_one_asked_for(monkeypatch, flags, device):
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append(str(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    assert str(choose_machine(*flags).device) == device and used == [device] * (device != "cpu")
    for index in ("2", "-1"):
        with pytest.raises(vit.InputError, match=f"no GPU {index}"):
            choose_machine("--gpu", index)


def test_memory_is_not_pinned_while_no_gpu_is_in_use(finished, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not data.make_loader([], sa2vp.load(finished)[1]["input"], 1, 0).pin_memory


@pytest.mark.parametrize("cpus, workers", [(48, 16), (3, 3)])
def test_workers_are_as_many_as_cpus_and_at_most_16(monkeypatch, cpus, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert choose_machine().workers == workers


def test_workers_are_started_once_for_a_run(workplace, monkeypatch):
    started = []
    make = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    iterator = lambda loader: started.append(len(loader.dataset.samples)) or make(loader)  # noqa: E731
    monkeypatch.setattr(torch.utils.data.dataloader, "_MultiProcessingDataLoaderIter", iterator)
    train.fit(settings_of(workplace), Path("run"), CPU._replace(workers=1))

    assert started == [10, 2, 8]  # training, validation and test images


def other_weights(folder):
    state = read_pt(folder / "vit.pth")
    torch.save(state | {"norm.bias": state["norm.bias"] + 1e-3}, folder / "vit.pth")


CHANGES = [
    (lambda folder: (folder / "insects/train/bee/1.png").unlink(),
     "[10, 2, 8] training, validation and test images, now [9, 2, 8]"),
    (lambda folder: write(folder, {"insects/test/ant/1.png": (folder / "insects/test/bee/1.png").read_bytes() + b" "}),
     "different images or classes"),
    (other_weights, "a different backbone"),
]


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("change, says", CHANGES, ids=range(len(CHANGES)))
def test_a_run_of_other_images_or_weights_is_refused_with_what_changed(finished, workplace, is_finished, change, says):
    if not is_finished:
        (finished / "result.json").unlink()
    change(workplace)
    with pytest.raises(vit.InputError) as refused:
        train.fit(settings_of(workplace), finished, CPU)

    name = "result.json" if is_finished else "last.pt"
    assert f"{finished / name} is of a run with" in str(refused.value) and says in str(refused.value)
    assert "choose another --out, or delete the run" in str(refused.value)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("given, says", [
    ({"window": None}, "window 3, now none"), ({"transform": "resize"}, "transform crop-flip, now resize"),
    ({"heads": 2}, "'heads': 2"), ({"normalize": "half"}, "'normalize': 'half'"),
    ({"batch_size": 2}, "batch size 4, now 2"), ({"lr": 0.1}, "lr 0.003, now 0.1"), ({"seed": 1}, "seed 42, now 1"),
])  # fmt: skip
def test_a_run_of_other_settings_is_refused_with_the_setting(finished, workplace, is_finished, given, says):
    if not is_finished:
        (finished / "result.json").unlink()
    with pytest.raises(vit.InputError) as refused:
        train.fit(settings_of(workplace, **given), finished, CPU)
    assert says in str(refused.value)


def test_a_finished_run_without_best_pt_gets_one(finished, workplace):
    (finished / "best.pt").unlink()
    train.fit(settings_of(workplace), finished, CPU)
    sa2vp.load(finished)


@pytest.mark.parametrize("name, content", [*(("result.json", raw) for raw in (b"{", b"[]", b"{}")), ("last.pt", b"PK")])
def test_a_damaged_file_of_a_run_is_refused_by_its_name(finished, workplace, name, content):
    (finished / "result.json").unlink()
    (finished / name).write_bytes(content)
    with pytest.raises(vit.InputError, match=f"cannot read {finished / name}"):
        train.fit(settings_of(workplace), finished, CPU)


@pytest.mark.parametrize("fit, says", [(train.fit, "is already finished"), (fit_one_epoch, "resuming after epoch 1")])
def test_a_run_that_is_moved_with_its_data_and_weights_is_known(workplace, session_run, capsys, fit, says):
    shutil.copytree(workplace / "insects", "project/insects")
    shutil.copy(workplace / "vit.pth", "project")
    fit(settings_of(Path("project")), Path("project/out"), CPU)
    Path("project").rename("moved")
    train.fit(settings_of(Path("moved")), Path("moved/out"), CPU)

    assert outcome(Path("moved/out")) == outcome(session_run)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["transform", "keep", "window"])
@pytest.mark.parametrize("name, read", [("result.json", read_json), ("last.pt", read_pt)])
def test_a_setting_that_is_newer_than_a_run_counts_as_its_default(finished, workplace, setting, name, read):
    before = outcome(finished)
    content = read(finished / name)
    content["settings"].pop(setting)
    (finished / "result.json").unlink()
    train.save(finished / name, content)
    train.fit(settings_of(workplace), finished, CPU)

    assert outcome(finished) == before


def as_version_1(content):
    """The content of a checkpoint as version 1 of this project wrote it."""
    newer = ("version", "images", "batch_size", "kept", "date", "device", "dtype", "torch")
    old = {name: value for name, value in copy.deepcopy(content).items() if name not in newer}
    settings = old["settings"]
    settings["warmup_epochs"] = round(settings.pop("warmup") * settings["epochs"])
    del settings["transform"], settings["keep"]
    old["input"]["crop"] = old["input"].pop("kind") == "crop-flip"
    return old


def make_version_1(out):
    """Rewrites the files of a run. Version 1 wrote best.pt after every best epoch."""
    last = read_pt(out / "last.pt")
    torch.save(as_version_1(last), out / "last.pt")
    best = dict(last, trained=last["kept"]["trained"], history=last["history"][: last["kept"]["epoch"]])
    torch.save(as_version_1(best), out / "best.pt")
    if (out / "result.json").exists():
        result = read_json(out / "result.json")
        known = ("accuracy", "prompt_accuracy", "val_accuracy", "best_epoch", "trainable")
        old = {name: result[name] for name in known}
        write(out, {"result.json": old | {"settings": as_version_1(result)["settings"]}})


def test_a_finished_run_of_version_1_is_loaded_and_kept(finished, workplace, capsys):
    before = outcome(finished)
    images = torch.randn(2, 3, 224, 224)
    logits = sa2vp.load(finished)[0](images)
    make_version_1(finished)
    model, meta = sa2vp.load(finished)
    train.fit(settings_of(workplace), finished, CPU)

    assert torch.equal(model(images)[0], logits[0]) and meta["input"]["kind"] == "crop-flip"
    assert outcome(finished) == before and "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("change, says", CHANGES[1:], ids=range(1, len(CHANGES)))
def test_a_finished_run_of_version_1_whose_images_or_weights_have_changed_is_refused(finished, workplace, change, says):
    make_version_1(finished)
    change(workplace)
    with pytest.raises(vit.InputError, match=re.escape(says)):
        train.fit(settings_of(workplace), finished, CPU)


def test_an_interrupted_run_of_version_1_resumes_to_the_same_numbers(finished, workplace):
    fit_one_epoch(settings_of(workplace), Path("broken"))
    make_version_1(Path("broken"))
    train.fit(settings_of(workplace), Path("broken"), CPU)

    assert outcome(Path("broken")) == outcome(finished)


@pytest.mark.parametrize("epochs, warmup_epochs, share", [(100, 10, 0.1), (3, 0, 0.1), (20, 3, 0.15), (20, 0, 0)])
def test_what_version_1_says_of_warm_up_and_crops_is_converted(epochs, warmup_epochs, share):
    run = {"settings": {"epochs": epochs, "warmup_epochs": warmup_epochs, "batch_size": 4}, "input": {"crop": False}}
    sa2vp.upgrade(run)
    assert run["settings"] == {"epochs": epochs, "warmup": share, "batch_size": 4}
    assert run["input"] == {"kind": "resize"}


def test_a_run_of_a_newer_version_is_refused_with_that_version(finished, workplace):
    for name in ("best.pt", "last.pt"):
        torch.save(read_pt(finished / name) | {"version": 3}, finished / name)
    (finished / "result.json").unlink()

    with pytest.raises(vit.InputError, match="newer version of this project, version 3"):
        sa2vp.load(finished)
    with pytest.raises(vit.InputError, match="newer version of this project, version 3"):
        train.fit(settings_of(workplace), finished, CPU)


def test_settings_are_stored_as_asked_beside_what_they_became(workplace):
    settings = settings_of(workplace, epochs=1, batch_size=None, lr=np.float64(1e-3))  # which no .pt file may hold
    result = train.fit(settings, Path("run"), CPU)

    for stored in (read_json(Path("run/result.json")), read_pt(Path("run/best.pt"))):
        assert [stored["settings"][name] for name in ("heads", "normalize", "batch_size")] == [None] * 3
        assert (stored["backbone"]["heads"], stored["backbone"]["normalize"]) == (1, "imagenet")
        assert stored["batch_size"] == 4
    assert read_json(Path("run/result.json")) == json.loads(json.dumps(result))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_damaged_image_that_is_not_trained_on_is_named_before_the_first_epoch(workplace, split):
    path, _ = getattr(data.class_folders(workplace / "insects"), split)[0]
    path.write_bytes(path.read_bytes()[:-30])  # its header is sound
    with pytest.raises(vit.InputError, match=f"1 images cannot be read: cannot read the image {path}"):
        train.fit(settings_of(workplace), Path("run"), CPU)

    assert not Path("run").exists()


def test_metrics_that_cannot_be_replaced_are_a_warning(workplace, finished, capsys):
    write(workplace / "work/run/metrics.csv", {"open.txt": "in a spreadsheet"})
    train.fit(settings_of(workplace), Path("run"), CPU)

    assert "warning: cannot write run/metrics.csv" in capsys.readouterr().out
    assert torch.equal(*(read_pt(out / "best.pt")["trained"]["head.weight"] for out in (Path("run"), finished)))


@torch._dynamo.config.patch(recompile_limit=4)  # 8 by default: the sixth run was too much
def test_compiling_changes_no_more_than_rounding_and_happens_in_every_run(workplace, monkeypatch):
    graphs = []
    compile_graph = torch.compile
    backend = lambda graph, inputs: graphs.append(1) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_graph(model, backend=backend, **options))
    torch.save(vit.VisionTransformer(64, 32, 64, 1, 1).state_dict(), workplace / "vit.pth")
    counts = []
    losses = []
    for i in range(3):
        settings = settings_of(workplace, dropout=0.0, image_size=64, epochs=1)
        train.fit(settings, Path(f"{i}"), CPU._replace(compile=i > 0))
        counts.append(len(graphs))
        losses.append(float(read_table(Path(f"{i}/metrics.csv"))[0]["loss"]))

    assert counts[0] == 0 < counts[1] and counts[2] == 2 * counts[1]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


# ---------------------------------------------------------------------- data


def read_folder(folder, files):
    write(folder, files)
    return data.load(data.find(str(folder)), folder)


def sizes(splits):
    return [len(splits.train), len(splits.val), len(splits.test)]


def listed(folder, lists, form, name="{n}/{split}{i}{n}.jpg", counts={"train": 8, "val": 2, "test": 4}):
    """A small data set with a list for each split: {path: content}. `form` makes the list of [(name, label)]."""
    files = {}
    for split, count in counts.items():
        pairs = [(name.format(split=split, i=i, n=n), n) for n in (1, 0) for i in range(count)]
        files |= {folder + path: None for path, _ in pairs}
        files[lists.format(split)] = form(pairs)
    return files


def ids(pairs):
    return {name: (295, 1010)[label] for name, label in pairs}


def by_class(pairs):
    return {n: [name.removesuffix(".jpg") for name, label in pairs if label == n] for n in (0, 1)}


def cifar(folder, batches, labels, **meta):
    entries = {file: {"data": np.zeros((n, 3072), np.uint8), labels: [0, 1] * (n // 2)} for file, n in batches.items()}
    return {f"{folder}/{file}": pickle.dumps(content) for file, content in (entries | meta).items()}


VTAB = "vtab-1k/clevr_count/"
CLEVR = listed(VTAB, VTAB + "{}.txt", lambda pairs: "\n".join(f"{name} {label}" for name, label in pairs),
               counts={"train800": 8, "val200": 2, "train800val200": 10, "test": 4})  # fmt: skip
CARS = listed("stanford_cars/", "stanford_cars/{}.json", ids, "cars_{split}/cars_{split}/{split}{i}{n}.jpg")
CARS = json.loads(json.dumps(CARS).replace("cars_val", "cars_train"))  # validation images are training images
BATCHES = dict.fromkeys([f"data_batch_{i}" for i in range(1, 6)], 4) | {"test_batch": 8}
LAYOUTS = {  # name: a small copy, of 16 pictures for training, 4 for validation and 8 for testing
    "cub": listed("CUB_200_2011/images/", "CUB_200_2011/{}.json", ids),
    "nabirds": listed("nabirds/images/", "nabirds/{}.json", ids),
    "flowers": listed("flowers-102/", "flowers-102/{}.json", ids, "jpg/{split}{i}{n}.jpg"),
    "dogs": listed("dogs/Images/", "dogs/{}.json", ids),
    "cars": CARS,
    "cars, flat": {path.replace("cars_train/cars_train", "cars_train"): content for path, content in CARS.items()},
    "vtab/clevr_count": CLEVR,
    "hta/cifar10": cifar("cifar-10-batches-py", BATCHES, "labels", **{"batches.meta": {"label_names": "ab"}}),
    "hta/cifar100": cifar("cifar-100-python", {"train": 20, "test": 8}, "fine_labels", meta={"fine_label_names": "ab"}),
    "hta/dtd": listed("dtd/dtd/images/", "dtd/dtd/labels/{}1.txt", lambda pairs: "\n".join(name for name, _ in pairs)),
    "hta/food101": listed("food-101/images/", "food-101/meta/{}.json", by_class, counts={"train": 10, "test": 4}),
    "hta/gtsrb": {
        **{f"gtsrb/GTSRB/Training/{n:05d}/{i}{n}.ppm": None for n in (0, 1) for i in range(10)},
        **{f"gtsrb/GTSRB/Final_Test/Images/{i}.ppm": None for i in range(8)},
        "gtsrb/GT-final_test.csv": "\n".join(["Filename;ClassId", *(f"{i}.ppm;{i % 2}" for i in range(8))]),
    },
    "hta/svhn": {
        f"{split}_32x32.mat": pickle.dumps({"X": np.zeros((32, 32, 3, 2 * n), np.uint8), "y": np.repeat([10, 1], n)})
        for split, n in (("train", 10), ("test", 4))
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path, monkeypatch, layout):
    # torchvision is to read small copies: with other checksums, and without scipy.
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    scipy = types.SimpleNamespace(loadmat=lambda path: pickle.loads(Path(path).read_bytes()))
    scipy.io = scipy
    monkeypatch.setitem(sys.modules, "scipy", scipy)
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    write(tmp_path, LAYOUTS[layout])
    name = layout.split(", ")[0]
    row = data.find(name)
    if name in ("hta/gtsrb", "hta/svhn"):  # two of their classes
        row = row._replace(read=functools.partial(data.read_torchvision, row.read.args[0], 2))
    splits = data.load(row, tmp_path)

    parts = [splits.train, splits.val, splits.test]
    counts = [np.bincount([label for _, label in part], minlength=2).tolist() for part in parts]
    assert counts == ([[10, 10], [0, 0], [4, 4]] if name.startswith("vtab") else [[8, 8], [2, 2], [4, 4]])
    for picture, label in sum(parts, []):
        assert data.open_picture(picture).mode == "RGB"
        assert isinstance(picture, np.ndarray) or label == int(picture.stem[-1])
    if name in data.GROUPS["fgvc"]:
        assert splits.classes == (["class 295", "class 1010"] if name in ("flowers", "cars") else ["0", "1"])
        assert name == "cars" or data.load(data.find(f"hta/{name}"), tmp_path) == splits


@pytest.mark.parametrize("name, changed, says", [
    ("nabirds", {}, "{root}/nabirds/images .*{source}"),
    ("cars", {}, "{root}/stanford_cars/cars_train .*{source}"),
    ("cub", {"images/0/train00.jpg": None}, "cannot read an image that is listed: .*train00.jpg"),
    *(("cub", {"val.json": content}, "cannot read the list .*val.json .delete it if it is damaged; .* https://raw")
      for content in ("[]", "{", '{"0/1.jpg": null}', '{"0/1.jpg": "ant"}', b"\xff")),
    *(("vtab/clevr_count", {"test.txt": f"0.jpg 1\n{line}\n"}, "test.txt .* a label below 8; delete vtab-1k/")
      for line in ("images/1.jpg", "images/1.jpg,1", "images/1.jpg one", "images/1.jpg 8", "1.jpg -1")),
    ("vtab/clevr_count", {"test.txt": ""}, "vtab/clevr_count below {root} has no test images: .*{source}"),
    ("vtab/clevr_count", {"test.txt": None}, "clevr_count/test.txt .* delete vtab-1k/"),
    ("hta/dtd", {"labels/test1.txt": ""}, "hta/dtd below {root} has no test images"),
    ("hta/gtsrb", {"00000/00.ppm": None}, "some classes have no training images; lay it out as torchvision .*{source}"),
])  # fmt: skip
def test_what_is_missing_or_damaged_is_named_with_where_it_comes_from_and_belongs(tmp_path, name, changed, says):
    folders = {"cub": "CUB_200_2011", "hta/dtd": "dtd/dtd", "hta/gtsrb": "gtsrb/GTSRB/Training"}
    folder = Path(tmp_path, folders.get(name, VTAB))
    for path, content in changed.items():
        write(tmp_path, LAYOUTS[name])
        (folder / path).unlink() if content is None else write(folder, {path: content})
    with pytest.raises(data.DataError, match=says.format(root=tmp_path, source=data.find(name).source)):
        data.digest(data.load(data.find(name), tmp_path))


@pytest.fixture
def packed(server, monkeypatch, tmp_path):
    """Serves a small CUB-200-2011 in its true layout, with its checksums. Returns its row."""
    archive = server.folder / "files/CUB_200_2011.tgz"
    write(tmp_path / "packed", LAYOUTS["cub"] | {"attributes.txt": ""})
    server.folder.mkdir()
    (tmp_path / "packed/CUB_200_2011").rename(server.folder / "cub")
    shutil.copytree(server.folder / "cub/images", tmp_path / "packed/CUB_200_2011/images")
    shutil.make_archive(archive.with_suffix(""), "gztar", tmp_path / "packed")
    archive.with_suffix(".tar.gz").rename(archive)
    for path in (archive, *(server.folder / "cub").glob("*.json")):
        key = f"{path.parent.name}/{path.name}"
        monkeypatch.setitem(data.CHECKSUMS, key, hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "FGVC_SPLITS", server.url)
    return data.find("cub")._replace(source=f"{server.url}/files/{archive.name}")


def test_a_data_set_is_downloaded_and_unpacked_once(packed, server, tmp_path):
    assert sizes(data.load(packed, tmp_path)) == [16, 4, 8]
    shutil.rmtree(server.folder)
    assert sizes(data.load(packed, tmp_path)) == [16, 4, 8]


@pytest.mark.parametrize("name", ["files/CUB_200_2011.tgz", "cub/val.json"])
def test_a_download_of_another_checksum_is_not_used(packed, monkeypatch, tmp_path, name):
    right = data.CHECKSUMS[name]
    monkeypatch.setitem(data.CHECKSUMS, name, "97eceeb196236b17998738112f37df78")
    with pytest.raises(data.DataError, match="cannot be downloaded .*: delete .*, or get it from .* put it there"):
        data.load(packed, tmp_path)
    monkeypatch.setitem(data.CHECKSUMS, name, right)
    assert sizes(data.load(packed, tmp_path)) == [16, 4, 8]


def test_every_list_of_fgvc_has_a_checksum():
    for *_, lists, _, _ in data.read_rows(data.FGVC):
        assert {f"{lists}/{split}.json" for split in ("train", "val", "test")} <= data.CHECKSUMS.keys()


@pytest.mark.parametrize("member, kind", [("../out", b"0"), ("link", b"2")])
def test_no_archive_writes_outside_its_folder(server, tmp_path, member, kind):
    server.folder.mkdir()
    with tarfile.open(server.folder / "birds.tar", "w") as archive:
        info = tarfile.TarInfo(member)
        info.type, info.linkname = kind, "../../out"
        archive.addfile(info)
    with pytest.raises(data.DataError, match="outside"):
        data.fetch(tmp_path / "root/birds/images", f"{server.url}/birds.tar", tmp_path / "root/birds")

    assert os.listdir(tmp_path / "root") == ["birds"] and os.listdir(tmp_path / "root/birds") == ["birds.tar"]


def test_the_table_has_the_papers_settings():
    columns = [
        """cub nabirds flowers dogs cars  caltech101 cifar dtd oxford_flowers102 oxford_iiit_pet svhn sun397
        patch_camelyon eurosat resisc45 diabetic_retinopathy  clevr_count clevr_dist dmlab kitti dsprites_loc
        dsprites_ori smallnorb_azi smallnorb_ele  cub nabirds flowers dogs cifar10 cifar100 dtd food101 gtsrb svhn""",
        "16 32 8 32 64  8 8 8 8 8 16 8  16 16 16 16  32 32 32 32 32 16 32 32" + 10 * " 64",
        ".1 .1 .1 .1 1.5  .1 .1 .1 .1 .1 .5 .1  1.5 1.5 .5 1.5  1.5 1.5 1.5 1.5 1.5 .1 1.5 .5" + 10 * " .1",
    ]
    expected = zip(*(column.split() for column in columns))
    for row, (name, inner_dim, scale) in zip(list(data.TABLE.values())[:34], expected, strict=True):
        group = [group for group, members in data.GROUPS.items() if row.name in members][0]
        assert row.name.split("/")[-1] == name
        for method in ("sa2vp", "adapter"):
            options = {"inner_dim": 16, "scale": 0.1} | row.by_method.get(method, {})
            slow = name in ("oxford_iiit_pet", "clevr_count")
            rate = {"lr": 5e-4 if slow else 1e-3} if method == "sa2vp" and "vtab" in group else {}
            layers = {"fusion_layers": (4,)} if method == "sa2vp" and name == "cars" else {}
            assert options == {"inner_dim": int(inner_dim), "scale": float(scale)} | rate | layers, row.name
        settings = {"keep": "last", "batch_size": 40} if "vtab" in group else {}
        settings |= {"batch_size": 64} if row.name in data.GROUPS["vtab/natural"] else {}
        settings |= {"transform": "crop-flip"} if group == "fgvc" else {}
        assert row.settings == settings, row.name
        assert set(row.by_method) <= {"sa2vp", "adapter"}


def test_every_vtab_task_has_its_number_of_classes(tmp_path):
    expected = [102, 100, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    for name, classes in zip(data.members(["vtab"]), expected, strict=True):
        folder = name.replace("vtab", "vtab-1k")
        write(tmp_path, {f"{folder}/{part}.txt": f"1.png {classes - 1}" for part in ("train800val200", "test")})
        assert len(data.load(data.find(name), tmp_path).classes) == classes


def test_a_folder_has_settings_for_few_images_and_is_not_opened(tmp_path):
    write(tmp_path / "me/pets", {"ant/1.png": "damaged"})
    row = data.find(str(tmp_path / "me/pets"))

    options = {"dropout": 0.0, "lr": 3e-3}
    assert row.by_method == {"sa2vp": options, "adapter": options, "vpt": {"lr": 3e-3}, "linear": {"lr": 3e-2}}
    assert row.settings == {"batch_size": None, "epochs": 20, "transform": "crop-flip"}
    assert (row.name, row.source) == ("me/pets", str(tmp_path / "me/pets"))
    assert [data.default_batch_size(count) for count in (20, 200, 5000)] == [4, 12, 64]


def test_a_folder_is_named_by_the_last_two_parts_of_its_path_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("flowers").mkdir()
    Path("other").symlink_to("flowers")

    for path in ("~/other", "./x/../other", str(tmp_path / "other")):
        row = data.find(path)
        assert (row.name, row.source) == (f"{tmp_path.name}/other", str(tmp_path / "other"))


def test_of_each_class_the_first_images_by_the_hash_of_their_path_are_held_out(tmp_path):
    splits = read_folder(tmp_path, pictures("ant", "bee"))
    ranked = sorted([f"{i}.png" for i in range(10)], key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for samples, expected in ((splits.test, ranked[:2]), (splits.val, ranked[2:3])):
        held_out = sorted((image.name, label) for image, label in samples)
        assert held_out == sorted((name, label) for name in expected for label in (0, 1))


def test_the_hash_is_of_the_path_inside_the_class_folder_in_any_unicode_form(tmp_path):
    held_out = []
    for folder, form in (("a", "e\u0301"), ("b", "\u00e9")):
        splits = read_folder(tmp_path / folder, pictures(f"ant/{form}", "ant/q", f"bee/{form}", "bee/q", count=5))
        held_out.append(sorted((image.parts[-2] == "q", image.name, label) for image, label in splits.test))
    names = [f"{part}/{i}.png" for part in ("\u00e9", "q") for i in range(5)]
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())

    expected = [(name[0] == "q", name[2:], label) for name in ranked[:2] for label in (0, 1)]
    assert held_out == [sorted(expected)] * 2


def test_the_images_held_out_of_a_benchmark_are_always_the_same():
    _, held_out = data.hold_out([(i, i % 2) for i in range(20)], share=0.2)
    assert held_out == [(5, 1), (8, 0), (12, 0), (19, 1)]


def test_a_share_is_rounded_and_the_only_image_of_a_class_is_not_held_out(tmp_path):
    counts = [len(data.hold_out([(i, 0) for i in range(count)], 0.2)[1]) for count in (1, 2, 9, 12)]
    assert counts == [0, 1, 2, 2]
    assert sizes(read_folder(tmp_path, pictures("ant", "bee", count=30))) == [44, 4, 12]


@pytest.mark.parametrize("layout, counts", [
    ("{}", [14, 2, 4]),
    ("train/{} test/{}", [18, 2, 20]),
    ("train/{} valid/{}", [16, 20, 4]),
    ("train/{} validation/{} test/{}", [20, 20, 20]),
    ("Training/{} VAL/{} Testing/{}", [20, 20, 20]),
])  # fmt: skip
def test_any_folder_of_class_folders_is_read_and_what_is_missing_held_out(tmp_path, layout, counts):
    places = [place.format(name) for place in layout.split() for name in ("ant", "train")]  # a train is a class, too
    splits = read_folder(tmp_path, pictures(*places))

    assert sizes(splits) == counts and splits.classes == ["ant", "train"]
    for samples in (splits.train, splits.val, splits.test):
        assert sum(label for _, label in samples) == len(samples) / 2
    assert len(set(splits.train + splits.val + splits.test)) == 10 * len(places)


TRAIN = pictures("train/ant", "train/bee")


@pytest.mark.parametrize("files, says", [
    (pictures("photos/ant", "photos/bee"), "two or more <class>.* photos/"),  # one folder too high
    (pictures("test/ant", "test/bee"), "no training images in <class>/"),
    (pictures("ant", "bee", "val/ant"), "has splits, but also images in ant, bee: move them"),
    (pictures("ant", "bee", "test"), "has splits, but also images in ant, bee: move them"),  # not a class "test"
    ({"1.png": None}, "no training images in <class>/"),
    (TRAIN | pictures("test/cow"), "no training images of the classes cow"),
    (TRAIN | pictures("val"), "val has no class folders with images"),  # ImageNet's
    (TRAIN | pictures("val/ant", "valid/ant"), "two names of one split .*val, valid"),
    (TRAIN | pictures("test1"), "images in test1: move"),
    (pictures("ant", "bee", count=1), "too few images to hold out"),
    (pictures("Cat", "cat"), "'Cat' and 'cat'"),
    (pictures("dog", "dog "), "'dog' and 'dog '"),
    (pictures("\u00e9", "e\u0301"), "Unicode form"),
    (TRAIN | pictures("test/Ant"), "'ant' and 'Ant'"),
    (pictures("ant", "bee") | {"bee/x.jpg": "no image"}, "cannot read the image .*x.jpg"),
    (pictures("ant", "bee") | {"bee/x.pgm": "P5 20000 20000 255\n"}, "x.pgm: .*exceeds limit"),
    ({"ant/1.heic": "", "bee/2.heic": ""}, "ant/1.heic, bee/2.heic.*convert to JPEG or PNG"),
    ({"pets.tar": ""}, "pets.tar.*unpack archives"),
    ({}, "no images"),
])  # fmt: skip
def test_a_folder_that_cannot_be_read_in_just_one_way_is_refused_with_the_reason(tmp_path, files, says):
    with pytest.raises(data.DataError, match=says):
        read_folder(tmp_path, files)


def test_what_is_left_out_is_told_by_reason_with_up_to_five_names(tmp_path):
    folder = tmp_path / ".cache" / "pets"  # above the data set any name will do
    hidden = pictures("train/.ipynb_checkpoints", "train/ant/.ipynb_checkpoints", "__MACOSX/train/ant", count=2)
    others = {"train/ant/._0.png": b"", "train/cow/1.jfif": b"", "test/bee/1.heic": b"", "run/best.pt": b""}
    outside = {"test/1.png": b"", "2.png": b"", "run/show.png": b""}
    splits = read_folder(folder, TRAIN | pictures("test/ant") | hidden | others | outside)

    assert splits.classes == ["ant", "bee"] and sizes(splits) == [18, 2, 10]
    left_out = [note for note in splits.notes if note.startswith("left out")]
    assert left_out == [
        "left out 4 hidden or system files: __MACOSX, train/.ipynb_checkpoints, train/ant/._0.png, "
        "train/ant/.ipynb_checkpoints",
        "left out 3 files without an image extension: run/best.pt, test/bee/1.heic, train/cow/1.jfif",
        "left out 1 images in a folder of runs (with a best.pt): run/show.png",
        "left out 2 images outside class folders: 2.png, test/1.png",
    ]


def test_few_images_and_those_in_sub_folders_are_told_with_their_number(tmp_path):
    files = pictures("train/ant", "train/bee", count=4) | pictures("val/ant", "val/bee", count=14)
    splits = read_folder(tmp_path, files | pictures("test/ant/more", "test/bee", count=15))
    assert splits.notes == [
        "images of each class: ant 33, bee 33",
        "images in sub-folders count for the class above: test/ant/more 15",
        "28 validation images are few: one is 3.6 points of accuracy",
    ]


def test_a_split_may_lack_a_class_and_have_a_folder_of_a_run(tmp_path):
    run = {"train/run/best.pt": b"", "train/run/show.png": None}
    splits = read_folder(tmp_path, TRAIN | pictures("test/bee") | run)
    assert splits.classes == ["ant", "bee"] and {label for _, label in splits.test} == {1}


def test_linked_folders_are_read_once_and_under_their_own_name(tmp_path):
    write(tmp_path, pictures("pets/bee", "elsewhere"))
    for link, target in (("ant", "bee"), ("cow", "../elsewhere"), ("dog", "../elsewhere")):
        (tmp_path / "pets" / link).symlink_to(target)
    images, _ = data.images_below(tmp_path / "pets")
    assert sorted(parts[0] for parts in images.values()) == ["bee"] * 10 + ["cow"] * 10


def test_images_are_found_once_below_folders_and_what_is_named_is_wanted(tmp_path):
    files = pictures("ant", "bee/more", "__MACOSX/ant", "ant/@eaDir")
    write(tmp_path, files | {"ant/._0.png": b"", "bee/IMG_1.JPG": None})
    (tmp_path / "bee/above").symlink_to(tmp_path)
    images, _ = data.find_images([tmp_path, str(tmp_path / "ant/._0.png")])
    assert len(images) == 22 and images[-1] == tmp_path / "ant/._0.png"


def test_a_digest_changes_with_files_labels_splits_and_classes_and_not_with_place(tmp_path):
    splits = read_folder(tmp_path / "a", pictures("ant", "bee"))
    before = data.digest(splits)
    assert data.digest(read_folder(tmp_path / "b", pictures("ant", "bee"))) == before
    *rest, (image, label) = splits.train
    grey = np.full((4, 4, 3), 128, np.uint8)
    others = [
        splits._replace(classes=["bee", "ant"]),
        splits._replace(train=[*rest, (image, 1 - label)]),
        splits._replace(train=rest, val=[(image, label), *splits.val]),
        data.Splits([(grey, 0)], [], [], ["a"], ""),
        data.Splits([(grey + 1, 0)], [], [], ["a"], ""),
    ]
    assert len({before, *map(data.digest, others)}) == 6

    image.write_bytes(image.read_bytes() + b" ")
    assert data.digest(splits) != before


def test_a_digest_is_what_it_was_when_runs_were_stored(tmp_path):
    write(tmp_path, {"a/1.png": b"123", "b/2.png": b"4567"})
    grey = np.full((1, 1, 3), 128, np.uint8)
    splits = data.Splits([(tmp_path / "a/1.png", 0)], [(grey, 1)], [(tmp_path / "b/2.png", 1)], ["a", "b"], "")
    assert data.digest(splits) == "b90894ad341cc04ca6f697562195e90358256b51b2a514f6871aeb285f9d689a"


def test_no_drawn_picture_is_in_two_splits(drawn):
    splits = data.load(data.find("shapes"), ".")
    assert len({image.tobytes() for image, _ in splits.train + splits.val + splits.test}) == 32 + 12 + 8


def test_the_target_task_of_the_drawn_pictures_is_the_direction_from_red_to_blue():
    rng = np.random.default_rng(5)
    for label in list(range(8)) * 10:
        picture = data.where_is_blue(rng, label).astype(int)
        redness = picture[..., 0] - picture[..., 2]
        red, blue = (np.mean(np.nonzero(pixels), axis=1) for pixels in (redness > 100, redness < -100))
        dy, dx = blue - red
        angle = math.radians(45 * label)
        assert math.cos(angle) * dx + math.sin(angle) * dy > 0.85 * math.hypot(dx, dy), data.DIRECTIONS[label]


@pytest.mark.parametrize("draw_one, begins", [
    (data.where_is_blue, "1be8f161be62bf51"), (data.what_and_which_colour, "4053466ef502cdfa"),
])  # fmt: skip
def test_drawn_pictures_are_bit_for_bit_those_that_were_published(draw_one, begins):
    pixels = draw_one(np.random.default_rng(0), 3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith(begins)


@pytest.mark.parametrize("kind, training, expected", [
    ("resize", True, [("Resize", (224, 208))]),  # squeezed
    ("resize", False, [("Resize", (224, 208))]),
    ("crop-flip", True, [("Resize", 256), ("RandomCrop", (224, 208)), ("RandomHorizontalFlip", None)]),
    ("crop-flip", False, [("Resize", 256), ("CenterCrop", (224, 208))]),  # 224 * 256 / 224, so that no crop is padded
    ("crop", True, [("Resize", 256), ("RandomCrop", (224, 208))]),
    ("crop", False, [("Resize", 256), ("CenterCrop", (224, 208))]),
])  # fmt: skip
def test_transforms_are_the_papers(kind, training, expected):
    transform = data.transform(kind, (224, 208), mean=(0.5, 0.75, 1.0), std=(0.5, 0.25, 0.1), training=training)

    assert transform.transforms[0].interpolation.value == "bilinear"
    steps = [(type(step).__name__, getattr(step, "size", None)) for step in transform.transforms]
    assert steps == [*expected, ("ToTensor", None), ("Normalize", None)]
    white = transform(Image.new("RGB", (300, 400), "white"))
    assert white.flatten(1).unique(dim=1).tolist() == [[1], [1], [0]]  # every pixel


def test_the_short_side_for_crops_is_rounded():
    assert data.transform("crop", (48, 48), (0.5,) * 3, (0.5,) * 3).transforms[0].size == 55


def saved(path, pixels, **options):
    """An image file, read again: its upright RGB pixels."""
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return np.asarray(data.open_picture(path))


@pytest.mark.parametrize("mode, hole, kind", [
    ("CMYK", (0, 0, 0, 0), "tiff"), ("RGBA", (0, 0, 0, 0), "tiff"), ("LA", (0, 0), "tiff"), ("L", 0, "png"),
    ("P", 0, "png"), ("RGB", (2, 2, 2), "png"),
])  # fmt: skip
def test_every_kind_of_image_becomes_rgb_of_the_same_brightness_and_white_where_transparent(tmp_path, mode, hole, kind):
    image = Image.new("RGB", (9, 7), (204,) * 3).convert(mode)
    image.putpixel((0, 0), hole)
    pixels = saved(tmp_path / f"image.{kind}", image, transparency=hole)  # a value that a TIFF does not have
    assert pixels.shape == (7, 9, 3) and (pixels[0, 0] == 255).all() and np.abs(pixels[1:] - 204.0).max() < 2


def test_16_bits_are_divided_by_257(tmp_path):
    deep = np.array([[0, 257, 201 * 257 - 1, 65535]], np.uint16)  # the third divided by 256 is 201
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())

    for pixels in (np.asarray(data.open_picture(tmp_path / "deep.pgm")), saved(tmp_path / "deep.png", deep)):
        assert pixels[0].tolist() == [[0] * 3, [1] * 3, [200] * 3, [255] * 3]
    assert saved(tmp_path / "hole.png", deep, transparency=257)[0, :, 0].tolist() == [0, 255, 200, 255]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_pixels_that_have_no_agreed_scale_are_refused(tmp_path, kind):
    with pytest.raises(data.DataError, match="deep.tiff: pixels of mode (I|F|I;16) .* have no agreed scale"):
        saved(tmp_path / "deep.tiff", np.zeros((1, 4), kind))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_an_image_of_extreme_shape_is_refused_before_it_is_resized(tmp_path, size):
    with pytest.raises(data.DataError, match="1.png: .*over 100 times the other.* or omit it"):
        saved(tmp_path / "1.png", Image.new("RGB", size))


@pytest.mark.parametrize("image", [
    np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint16), np.zeros((4, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8),
    np.zeros(4, np.uint8), np.zeros((4, 4), bool), torch.zeros(3, 4, 4), None, Image.new("F", (4, 4)),
], ids=lambda image: f"{type(image).__name__}{getattr(image, 'shape', '')}")  # fmt: skip
def test_anything_else_is_no_picture(image):
    with pytest.raises(data.DataError, match="a path, a PIL image or a uint8 array"):
        data.open_picture(image)


def test_an_image_in_memory_is_not_changed(tmp_path):
    Image.new("RGB", (9, 7)).save(tmp_path / "1.png", exif=orientation(6))  # on its side
    image = Image.open(tmp_path / "1.png")
    assert data.open_picture(image).size == (7, 9) and image.size == (9, 7)


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


FIELDS = b"\x12\1\3\0\1\0\0\0\6\0\0\0" + b"\x1a\1\x0a\0\1\0\0\0\x26\0\0\0"  # orientation 6, -1 / 0 pixels per inch
DAMAGED = b"Exif\0\0II*\0\x08\0\0\0\2\0" + FIELDS + b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0"


@pytest.mark.parametrize("kind, turns, exif", [
    *((kind, turns, orientation(value))
      for kind in ("jpeg", "png", "webp", "tiff") for value, turns in ((3, 2), (6, 1), (8, 3))),
    *((kind, 1, DAMAGED) for kind in ("jpeg", "webp")),
    *((kind, 0, b"Exif\0\0garbage") for kind in ("jpeg", "png", "webp")),
])  # fmt: skip
def test_images_are_upright_however_damaged_their_other_metadata_are(tmp_path, kind, turns, exif):
    upright = np.zeros((32, 64), np.uint8)
    upright[:16, :16] = 255
    pixels = saved(tmp_path / f"turned.{kind}", np.ascontiguousarray(np.rot90(upright, turns)), exif=exif)

    assert np.array_equal(pixels[..., 0] > 128, upright > 128)


def epoch_of_noise(number, seed=5, workers=0):
    """The images and labels of an epoch, for ten pictures of noise in batches of four."""
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 256, (20, 30, 3), np.uint8), label) for label in range(10)]
    preprocessing = {"kind": "crop-flip", "image_size": (16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    loader = data.make_loader(samples, preprocessing, 4, workers, shuffle_seed=seed)
    loader.sampler.epoch = number
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels).tolist()


def test_order_crops_and_flips_depend_on_seed_and_epoch_alone_and_dropout_is_not_disturbed():
    state = torch.get_rng_state()
    images, labels = epoch_of_noise(0)
    again, same_labels = epoch_of_noise(0, workers=1)

    assert torch.equal(images, again) and labels == same_labels and len(set(labels)) == 8
    assert epoch_of_noise(1)[1] != labels and epoch_of_noise(0, seed=6)[1] != labels
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_those_of_earlier_versions():
    images, labels = epoch_of_noise(3)
    assert labels == [9, 1, 0, 3, 4, 2, 7, 8]
    assert images.double().sum().item() == pytest.approx(21.851134061813354, abs=1e-6)


# ---------------------------------------------------------------------- several runs


def test_every_option_of_every_method_has_a_flag(new_method):
    flags = train.make_parser().format_help()
    for method in sa2vp.METHODS:
        for name in sa2vp.options(method):
            assert f"--{name.replace('_', '-')} X" in flags


def test_a_search_over_an_option_of_a_new_method_stores_its_values(workplace, new_method):
    train_run("--method", new_method, "--rank", 8, 2, "--gated", "on")

    results = {path.parent.name: read_json(path) for path in Path("runs").glob("*/result.json")}
    assert sorted(results) == [f"lab-insects-new-weightslab-vit.pth-epochs1-batch_size4-rank{rank}-gatedTrue"
                               for rank in (2, 8)]  # fmt: skip
    for name, result in results.items():
        settings = result["settings"]
        assert (f"rank{settings['rank']}" in name, settings["gated"], settings["lr"]) == (True, True, 1e-3)
        down = sa2vp.load(Path("runs", name))[0].vit.blocks[0].attn.qkv.down
        assert down.shape == (settings["rank"], 64)


def test_options_of_other_methods_are_dropped_whether_given_or_a_data_sets(new_method):
    given = {"data": "cub", "method": new_method, "lr": 2.0}
    own = {"transform": "crop-flip", "rank": 4, "gated": False, "inner_dim": 5}  # the last is 16 for sa2vp
    assert train.complete_settings(given | {"window": 5}) == train.DEFAULTS | given | own


def test_the_defaults_are_the_recipes():
    recipe = {"weights": "imagenet21k", "image_size": 224, "transform": "resize", "epochs": 100, "warmup": 0.1,
              "batch_size": 64, "lr": 1e-3, "weight_decay": 1e-4, "keep": "best", "seed": 42}  # fmt: skip
    assert train.DEFAULTS == train.DEFAULTS | recipe
    rates = {method: train.defaults_of(method)["lr"] for method in sa2vp.METHODS}
    assert rates == dict.fromkeys(sa2vp.METHODS, 1e-3) | {"linear": 1e-2, "full": 1e-4}
    for method in ("sa2vp", "adapter"):
        options = sa2vp.options(method)
        assert (options["inner_dim"], options["scale"], options["dropout"]) == (16, 0.1, 0.1)


def test_a_negative_seed_and_a_name_that_is_no_option_of_any_method_are_refused(monkeypatch):
    with pytest.raises(vit.InputError, match="ranck: not an option of any method"):
        train.complete_settings({"data": "cub", "method": "sa2vp", "ranck": 5})
    with pytest.raises(vit.InputError, match="seed is -1"):
        train.complete_settings({"data": "cub", "method": "sa2vp", "seed": -1})
    monkeypatch.setitem(data.TABLE, "cub", data.find("cub")._replace(by_method={"sa2vp": {"ranck": 5}}))
    with pytest.raises(vit.InputError, match="ranck: not an option of any method"):
        train.complete_settings({"data": "cub", "method": "sa2vp"})


def test_a_parameter_of_a_method_without_a_default_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sa2vp.METHODS, "new", lambda vit, num_classes, rank: None)
    with pytest.raises(vit.InputError, match="option rank of method new needs a default"):
        sa2vp.options("new")


@pytest.mark.parametrize("given, name", [
    ({"data": "cub", "method": "sa2vp", "seed": 1, "lr": 5e-3}, "cub-sa2vp-lr0.005-seed1"),
    ({"data": "cub", "method": "linear", "lr": 1e-2, "batch_size": 64, "warmup": 0.1}, "cub-linear"),
    ({"data": "vtab/dmlab", "method": "sa2vp", "scale": 1.5, "batch_size": 64}, "vtab-dmlab-sa2vp-batch_size64"),
    ({"data": "cub", "method": "full", "epochs": 20, "warmup": 0.15}, "cub-full-epochs20-warmup0.15"),
    ({"data": "cub", "method": "vpt", "weights": "x/a:b/c.pth"}, "cub-vpt-weightsa-b-c.pth"),
    ({"data": "cub", "method": "sa2vp", "window": None, "prompt_grid": (7, 7)}, "cub-sa2vp-windownone-prompt_grid7,7"),
])  # fmt: skip
def test_a_folder_is_named_after_what_differs_from_the_defaults_of_data_set_and_method(given, name):
    assert train.run_name(train.complete_settings(given)) == name


def test_a_long_name_is_cut_by_bytes_and_still_its_own(tmp_path):
    names = set()
    for end in "ab":
        (tmp_path / f"{'é' * 60}{end}").mkdir()
        settings = train.complete_settings({"data": str(tmp_path / f"{'é' * 60}{end}"), "method": "vpt"})
        names.add(train.run_name(settings))
    assert len(names) == 2 and all(len(name.encode()) <= 100 for name in names)


def test_several_runs_end_with_a_table_of_means_over_the_seeds(workplace, capsys):
    train_run("--method", "linear", "vpt", "--seed", 0, "--seed", 1, "--seed", 0)  # each value counts once

    rows = read_table(Path("runs/list.csv"))
    assert list(rows[0]) == ["date", "data", "images", "method", "settings", "validation", "test", "std", "seeds"]
    for row in rows:
        results = [read_json(path) for path in Path("runs").glob(f"*-{row['method']}-*/result.json")]
        for column, name in (("test", "accuracy"), ("validation", "val_accuracy")):
            assert float(row[column]) == np.mean([result[name] for result in results])
        assert float(row["std"]) == pytest.approx(np.std([result["accuracy"] for result in results], ddof=1))
        assert (row["images"], row["seeds"]) == ("20", "2") and "epochs 1, batch_size 4" in row["settings"]
    printed = capsys.readouterr().out
    assert re.search(r"\ndate +data +images +method", printed) and printed.endswith("wrote runs/list.csv\n")


def test_a_seed_that_fails_leaves_the_mean_of_the_others(workplace, capsys):
    name = train_run("--method", "linear", "--seed", 1, out="elsewhere").name
    write(Path("runs"), {name: "a file where its folder would be"})
    assert exit_code(*complete(["--method", "linear", "--seed", 0, 1, 2])) == 2

    (row,) = read_table(Path("runs/list.csv"))
    accuracies = [read_json(path)["accuracy"] for path in Path("runs").glob("*/result.json")]
    assert (row["seeds"], float(row["test"])) == ("2", np.mean(accuracies))
    assert f"{name} failed: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("failures, code", [([vit.InputError(), OSError(), None], 1), ([vit.InputError()], 2)])
def test_the_exit_code_of_several_runs_is_1_if_any_has_a_bug(workplace, monkeypatch, failures, code):
    fit = train.fit
    def failing(*arguments):
        error = failures.pop() if failures else None
        if error:
            raise error
        return fit(*arguments)
    monkeypatch.setattr(train, "fit", failing)

    assert exit_code(*complete(["--method", "linear", "--seed", 0, 1, 2, 3])) == code


@pytest.mark.parametrize("error, code, says", [
    (vit.InputError("give another file"), 2, "give another file"), (OSError("bug"), 1, "bug"),
    (data.DataError("give another\nfile"), 2, "give another file"),
    (torch.OutOfMemoryError("much"), 2, "not enough GPU memory: use a smaller --batch-size"),
])  # fmt: skip
def test_what_the_user_can_fix_is_one_sentence_and_a_bug_keeps_its_traceback(capsys, error, code, says):
    assert train.report(error, "runs/a: ") == code

    printed = capsys.readouterr().err
    assert printed.endswith(f"train.py: runs/a: {says}\n")
    assert printed.count("\n") == 1 if code == 2 else "OSError" in printed


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_list_of_runs_ends_with_the_table_of_the_finished(workplace, monkeypatch, capsys, finished):
    interrupt(monkeypatch, after=2 * finished)  # a run of one epoch evaluates twice
    assert exit_code(*complete(["--method", "linear", "--seed", 0, 1])) == 130

    tables = [read_table(path)[0]["seeds"] for path in Path("runs").glob("list.csv")]
    assert tables == ["1"] * finished and "the same command resumes a run" in capsys.readouterr().err


def test_a_search_tests_the_first_of_the_best_with_every_seed_alone(workplace, capsys):
    train_run("--method", "linear", "--weight-decay", 1e-9, 0, "--seed", 3, 4)  # both are equal to rounding

    tested = {}
    for path in Path("runs").glob("*/result.json"):
        result = read_json(path)
        tested[result["settings"]["weight_decay"], result["settings"]["seed"]] = result["accuracy"] is not None
    assert tested == {(1e-9, 3): True, (1e-9, 4): True, (0.0, 3): False}
    assert "weight_decay 1e-09, with validation accuracy" in capsys.readouterr().out


def test_a_search_chooses_the_highest_validation_accuracy(workplace, monkeypatch):
    rates = []

    def pretended(settings, *_):
        rates.append(settings["lr"])
        return {"best_epoch": 1, "val_accuracy": 100 * settings["lr"], "accuracy": None}

    monkeypatch.setattr(train, "fit", pretended)
    exit_code(*complete(["--method", "linear", "--lr", 0.01, 0.03, 0.02]))
    assert rates == [0.01, 0.03, 0.02, 0.03]


def test_without_validation_images_a_run_that_needs_them_is_refused_before_training(workplace, refusal):
    write(Path("root"), CLEVR)
    flags = ["--data", "vtab/clevr_count", "--root", "root", "--method", "linear", "--keep", "best"]
    assert "no validation images to choose by" in refusal(*complete(flags))


def test_a_search_says_how_many_combinations_failed(workplace, capsys):
    assert exit_code(*complete(["--lr", 1e30, 1e-3, 1e29])) == 2

    printed = capsys.readouterr()
    assert "1 of 3 combinations reach it, 2 failed" in printed.out
    assert "lr 0.001, with validation accuracy" in printed.out
    assert printed.err.count("failed: the loss is not finite in epoch 1: try a lower --lr than 1e+") == 2
    assert len(list(Path("runs").glob("*/last.pt"))) == 1


def test_each_method_of_a_search_has_just_its_own_options():
    plan = train.list_combinations({"data": ["cub"], "method": ["sa2vp", "linear"], "seed": [3, 4],
                                    "lr": [1e-3, 1e-2], "scale": [0.1, 0.5]})  # fmt: skip
    chosen = [[(choice["lr"], choice.get("scale"), choice["seed"]) for choice in choices] for choices in plan]
    assert chosen == [[(lr, scale, 3) for lr in (1e-3, 1e-2) for scale in (0.1, 0.5)],
                      [(lr, None, 3) for lr in (1e-3, 1e-2)]]  # fmt: skip


def test_vtab_is_searched_without_test_data_and_its_last_epoch_counts(workplace):
    write(Path("root"), CLEVR)
    lists = Path("root", VTAB)
    flags = ["--data", "vtab/clevr_count", "--root", "root", "--method", "linear", "--epochs", 2, "--lr", 1e-3, 1e-2]
    (lists / "test.txt").rename("hidden.txt")
    assert exit_code(*complete(flags)) == 2
    searched = [read_json(path) for path in Path("runs").glob("*/result.json")]
    Path("hidden.txt").rename(lists / "test.txt")
    train_run(*flags)

    (tested,) = (read_json(path) for path in Path("runs").glob("*/result.json") if "searchTrue" not in str(path))
    assert [result["images"] for result in searched + [tested]] == [[16, 4, 0]] * 2 + [[20, 0, 8]]
    assert [(result["accuracy"], result["val_accuracy"] is None, result["best_epoch"]) for result in searched] == [
        (None, False, 2)] * 2  # fmt: skip
    assert (tested["accuracy"] is None, tested["val_accuracy"], tested["best_epoch"]) == (False, None, 2)


def test_list_is_a_table_of_all_finished_runs_below_a_folder(finished):
    result = read_json(finished / "result.json")
    result["settings"].update(distill_layers=[], fusion_layers=[])
    write(finished, {"result.json": result})
    shutil.copytree(finished, "other/deep/copy")
    write(Path("other/unfinished"), {"last.pt": b""})
    subprocess.run([sys.executable, train.__file__, "--list", "--out", "other"], check=True)

    (row,) = read_table(Path("other/list.csv"))
    assert (row["method"], row["seeds"], row["images"]) == ("sa2vp", "1", "20")
    assert "distill_layers none, fusion_layers none" in row["settings"]


def test_runs_that_differ_in_the_seed_alone_are_one_row(workplace):
    for flag, value in (("--seed", 1), ("--seed", 2), ("--lr", 1)):
        train_run("--method", "linear", flag, value)
    write(workplace, {"insects/test/ant/new.png": None})
    train_run("--method", "linear", "--seed", 1, out="runs/later")
    shutil.copytree("runs/later", "runs/on_a_gpu")
    assert exit_code("--list") == 0

    rows = read_table(Path("runs/list.csv"))
    assert [(row["images"], row["seeds"]) for row in rows] == [("20", "1"), ("20", "2"), ("21", "1"), ("21", "1")]


def test_runs_of_one_name_on_two_backbones_are_two_rows(workplace):
    train_run("--method", "linear", out="runs/a")
    other_weights(workplace)
    later = train_run("--method", "linear", out="elsewhere")
    later.rename(Path("runs/a/later"))
    assert exit_code("--list") == 0 and len(read_table(Path("runs/list.csv"))) == 2


def test_an_accuracy_of_0_counts():
    assert train.values_of([{"accuracy": 0.0}, {"accuracy": None}], "accuracy") == [0.0]


def test_splits_epochs_and_results_are_printed_under_their_names(capsys):
    splits = data.Splits([0] * 3, [0] * 2, [0], ["a", "b"], "here")
    row = {"epoch": 1, "loss": 0.5, "lr": 1e-3, "val_accuracy": 10.0, "val_prompt_accuracy": 20.0, "seconds": 30.0}
    train.print_epoch(row, 4)
    train.print_result(Path("run"), {"best_epoch": 3, "val_accuracy": 10.0, "accuracy": 20.0})

    assert splits.describe() == "3 training, 2 validation, 1 test images of 2 classes (here)"
    printed = capsys.readouterr().out
    assert "validation 10.00 %  30.0 s\nall 4 epochs take about 2.0 minutes\n" in printed
    assert printed.endswith("run: epoch 3, validation accuracy 10.00 %, test accuracy 20.00 %\n")


def test_notes_and_steps_are_printed_before_training(workplace, capsys):
    train_run("--method", "linear", "--epochs", 2)
    printed = capsys.readouterr().out
    assert "2 validation images are few" in printed and "heads 1 assumed" in printed and "in 4 steps" in printed


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Small copies of the data sets that are drawn, with a short pre-training, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRETRAINING, "epochs", 1)
    for name in ("shapes", "shapes-source"):
        draw_one, classes, _ = data.TABLE[name].read.args
        read = functools.partial(data.read_drawn, draw_one, classes, (32, 12, 8))
        monkeypatch.setitem(data.TABLE, name, data.TABLE[name]._replace(read=read))


DRAWN_FLAGS = ["--cpu", "--workers", 0, "--epochs", 1]


def test_the_default_run_has_the_settings_of_the_readmes_results():
    settings = train.complete_settings({"data": "shapes", "method": "sa2vp"})
    tuned = {"transform": "crop", "batch_size": 32, "epochs": 60, "lr": 2e-3, "weights": "runs/shapes-vit/best.pt"}
    assert settings == settings | tuned | {"inner_dim": 64, "scale": 2.0, "dropout": 0.0}
    assert [train.PRETRAINING[name] for name in ("epochs", "lr", "batch_size")] == [16, 2e-3, 32]
    assert train.SMALL_VIT == {"patch_size": 8, "dim": 64, "depth": 6, "heads": 1, "normalize": "imagenet"}
    rates = {method: train.complete_settings({"data": "shapes", "method": method})["lr"] for method in sa2vp.METHODS}
    assert rates == {"sa2vp": 2e-3, "vpt": 1e-2, "adapter": 2e-3, "linear": 1e-1, "full": 1e-3}
    counts = [data.TABLE[name].read.args[2] for name in ("shapes", "shapes-source")]
    assert counts == [(1000, 400, 1000), (7200, 360, 360)]


def test_the_default_run_pretrains_its_backbone_once(drawn, capsys):
    assert exit_code(*DRAWN_FLAGS) == 0
    assert exit_code(*DRAWN_FLAGS, "--method", "linear", "--out", "elsewhere") == 0

    assert capsys.readouterr().out.count("pre-training") == 1
    assert sorted(os.listdir("runs")) == ["shapes-sa2vp-epochs1", "shapes-vit"]


def test_an_interrupted_pretraining_leaves_nothing(drawn, monkeypatch):
    interrupt(monkeypatch)
    assert exit_code(*DRAWN_FLAGS) == 130
    assert os.listdir("runs") == []


def test_a_pretraining_that_cannot_be_written_is_refused(drawn, refusal):
    Path("runs").touch()
    assert "failed: cannot make runs/shapes-vit" in refusal(*DRAWN_FLAGS)


def test_of_two_pretrainings_at_once_the_first_to_finish_wins(drawn, monkeypatch):
    fit = train.fit
    inodes = []
    def slower(settings, out, machine):
        monkeypatch.setattr(train, "fit", fit)
        result = fit(settings, out, machine)
        train.pretrain(machine)  # as another process would, in the meantime
        inodes.append(os.stat(train.PRETRAINED).st_ino)
        return result
    monkeypatch.setattr(train, "fit", slower)
    train.pretrain(CPU)

    assert inodes == [os.stat(train.PRETRAINED).st_ino]
    assert os.listdir("runs") == ["shapes-vit"]


def test_a_pretraining_with_other_settings_is_made_anew(drawn, monkeypatch):
    train.pretrain(CPU)
    monkeypatch.setitem(train.PRETRAINING, "epochs", 2)
    train.pretrain(CPU)

    assert read_json(Path("runs/shapes-vit/result.json"))["settings"]["epochs"] == 2
    assert os.listdir("runs") == ["shapes-vit"]


# ---------------------------------------------------------------------- a tuned model


def test_eval_has_the_accuracy_of_the_run_for_every_method(method_run, new_method, workplace, capsys):
    out = shutil.copytree(method_run[0], Path("run"))
    assert exit_code("--eval", out, "--cpu", "--workers", 0) == 0

    rows = read_table(Path("run/test.csv"))
    right = [row["true class"] == row["predicted class"] for row in rows]
    accuracy = read_json(Path("run/result.json"))["accuracy"]
    assert list(rows[0]) == ["file", "true class", "predicted class", "probability"]
    assert len(rows) == 8 and 100 * np.mean(right) == accuracy
    printed = capsys.readouterr().out
    assert f"accuracy {accuracy:.2f} %" in printed
    for name in ("ant", "bee"):
        share = 100 * np.mean([correct for row, correct in zip(rows, right) if row["true class"] == name])
        assert f"{share:.2f} %  {name}, 4 images\n" in printed
    for pair in (("ant", "bee"), ("bee", "ant")):
        count = sum((row["true class"], row["predicted class"]) == pair for row in rows)
        assert (f"  {count} of {pair[0]} predicted as {pair[1]}\n" in printed) == (count > 0)


def test_eval_prints_the_accuracy_the_mean_over_classes_and_the_worst_class_first(capsys):
    train.print_test([{"true class": true, "predicted class": "ant"} for true in ("ant", "ant", "ant", "bee")])
    assert re.findall(r"[\d.]+ %", capsys.readouterr().out) == ["75.00 %", "50.00 %", "0.00 %", "100.00 %"]


def test_eval_finds_the_runs_images_in_another_folder(finished, workplace):
    (workplace / "insects").rename(workplace / "moved")
    assert exit_code("--eval", finished, "--data", "../moved", "--out", "report", "--cpu", "--workers", 0) == 0
    assert len(read_table(Path("report/test.csv"))) == 8


def test_eval_on_other_images_is_refused(workplace, finished, refusal):
    write(workplace, {"insects/test/ant/new.png": None})
    assert "a run can only be tested on its own" in refusal("--eval", finished, "--data", "../insects", "--cpu")


def test_a_run_remembers_the_folder_of_the_data_sets(workplace, monkeypatch):
    write(Path("root"), LAYOUTS["cub"])
    out = train_run("--data", "cub", "--root", "root").absolute()
    monkeypatch.chdir(workplace)

    assert exit_code("--eval", out, "--cpu") == 0
    Path(out.parents[1], "root").rename("data")  # a moved project with its data
    assert exit_code("--eval", out, "--cpu") == 0
    Path(out.parents[1], "root").mkdir()
    assert exit_code("--eval", out, "--cpu", "--root", "data") == 0


def test_predict_writes_a_class_with_its_probability_for_every_image(finished, workplace):
    bee = workplace / "insects/test/bee/1.png"
    model, meta = sa2vp.load(finished)
    images = [bee, *sorted((workplace / "insects/train").rglob("*.png"))]
    preprocess = data.transform(**meta["input"])
    with torch.inference_mode():
        logits, _ = model(torch.stack([preprocess(data.open_picture(image)) for image in images]))
    probabilities, labels = logits.softmax(dim=1).max(dim=1)
    assert exit_code("--predict", finished, bee, workplace / "insects/train", "--cpu", "--batch-size", 5) == 0

    rows = read_table(Path("predictions.csv"))
    assert Path("predictions.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # the mark that Excel needs
    assert [row["file"] for row in rows] == list(map(str, images))
    assert [row["predicted class"] for row in rows] == [meta["classes"][label] for label in labels]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.tolist(), rel=1e-4)


def test_predict_names_unreadable_images_classifies_the_others_and_exits_with_2(finished, workplace, capsys):
    write(Path(), {"new/damaged.jpg": b"\xff\xd8 no image", "new/good.png": None})
    assert exit_code("--predict", finished, "new", "absent.jpg", "--out", "report", "--cpu", "--workers", 0) == 2

    assert [row["file"] for row in read_table(Path("report/predictions.csv"))] == ["new/good.png"]
    printed = capsys.readouterr().out
    assert "3 images, 2 of them unreadable" in printed
    assert "the image new/damaged.jpg" in printed and "the image absent.jpg" in printed


@pytest.mark.parametrize("paths", [[], ["empty"], ["x.jpg", "x.jpg"]])
def test_predict_without_a_readable_image_is_refused(finished, refusal, paths):
    write(Path(), {"empty/a.txt": ""})
    assert "there is no image to classify" in refusal("--predict", finished, *paths, "--cpu", "--workers", 0)


def test_a_checkpoint_has_its_own_sizes_and_transforms(workplace):
    out = train_run("--image-size", 96, "--prompt-grid", "3x4", "--heads", 2, "--normalize", "half")
    model, meta = sa2vp.load(out / "best.pt")

    assert model.vit.blocks[0].attn.heads == 2 and model.vit.grid == (3, 3) and model.prompt_grid == (3, 4)
    assert meta["input"] == {"kind": "crop-flip", "image_size": (96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def test_a_tuned_model_is_loaded_with_weights_where_they_were_or_given(workplace):
    out = train_run()
    sa2vp.load(out)
    shutil.move(workplace / "vit.pth", "other.pth")
    sa2vp.load(str(out / "best.pt"), weights="other.pth")

    with pytest.raises(vit.InputError, match=r"vit.pth is not a file: give --weights \(weights=\)"):
        sa2vp.load(out)


def test_a_tuned_model_on_another_backbone_is_refused(finished, workplace):
    other_weights(workplace)
    with pytest.raises(vit.InputError, match="another backbone than .*vit.pth: give --weights"):
        sa2vp.load(finished, workplace / "vit.pth")


def test_a_fully_tuned_model_needs_no_backbone_and_is_one(workplace):
    out = train_run("--method", "full", "--heads", 2, "--normalize", "half")
    (workplace / "vit.pth").unlink()
    images = torch.randn(2, 3, 224, 224)
    model, _ = sa2vp.load(out)
    backbone = vit.load_vit(out / "best.pt")

    assert torch.equal(backbone(images), model.vit(images))
    assert (backbone.normalize, backbone.blocks[0].attn.heads, backbone.notes) == ("half", 2, [])


@pytest.mark.parametrize("part, changed, says", [
    ("trained", {"prompt_map.tokens": torch.ones(1)}, "prompt_map.tokens is"),
    ("trained", {"x": torch.ones(1)}, "x is"), ("settings", {"method": "x"}, "no method x"),
    ("settings", {"weights": None}, "None is not a file"), ("backbone", {"patches": 3}, "patches"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_named_in_one_sentence(finished, part, changed, says):
    content = read_pt(finished / "best.pt")
    torch.save(content | {part: content[part] | changed}, finished / "best.pt")
    with pytest.raises(vit.InputError, match=says) as refused:
        sa2vp.load(finished)

    assert str(finished / "best.pt") in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_lacks_a_part_is_no_checkpoint(tmp_path):
    torch.save({"trained": {}, "settings": {}}, tmp_path / "best.pt")
    with pytest.raises(vit.InputError, match="best.pt is not a checkpoint of this project: it has no classes"):
        sa2vp.load(tmp_path)


# ---------------------------------------------------------------------- the command line, files, README


@pytest.mark.parametrize("flags, part", [
    ("--data nonsense", "a folder"),
    ("--data cut --workers 1", "failed: cannot read the image"),  # found by a worker, in the first epoch
    ("--batch-size 1000", "fewer than one batch of 1000"), ("--dropout 1", "dropout is 1.0"),
    ("--weight-decay -1", "weight_decay is -1.0"), ("--seed 0 -1", "seed is -1"), ("--warmup 1", "warmup is 1.0"),
    ("--lr nan", "lr is nan"), ("--lr 0", "lr is 0.0"), ("--epochs 0", "epochs is 0"), ("--inner-dim -1", "inner_dim"),
    ("--method adapter --inner-dim 0", "inner_dim is 0"), ("--prompt-grid 0x7", "prompt grid (0, 7)"),
    ("--method linear --window 3", "window: not an option of linear"),
    ("--method sa2vp vpt --gated on", "--gated"), ("--method magic", "invalid choice: 'magic'"),
    ("--image-size 100", "not a multiple of patch size"), ("--heads 3", "3 heads"),
    ("--window -1", "window -1"), ("--window 2", "must be odd"),
    ("--window 1 --prompt-grid 2x2", "window 1"),  # and not NaN
    ("--distill-layers 0 --fusion-layers 4", "fusion layers"), ("--distill-layers 0,5", "fusion layers"),
    ("--normalize 0.5,0.5", "normaliz"), ("--keep first", "invalid choice"), ("--gpu 99", "no GPU 99"),
    ("--weights absent.pth", "absent.pth is not a file: give --weights"), ("--nonsense", "--nonsense"),
    ("--weights scratch", "scratch is for --method full"), ("--weights scratch --method full --heads 2", "scratch is"),
])  # fmt: skip
def test_bad_input_gets_one_sentence_before_anything_is_trained(workplace, refusal, flags, part):
    cut = make_folder(Path("cut")) / "train/bee/1.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    assert part in refusal(*complete(flags.split()))

    assert not list(Path().glob("runs/*/last.pt"))


@pytest.mark.parametrize("flags, part", [
    (["--cpu", "--gpu", "0"], "--cpu and --gpu contradict"),
    *(([flag, ""], "the value is empty") for flag in ("--data", "--out", "--eval")),
    (["--eval", "absent.pt"], "absent.pt"),
    (["--eval", "some.pt", "--lr", "1"], "only --data, --weights and --batch-size"),
    (["--eval", "some.pt", "--list"], "not allowed with argument"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(workplace, refusal, flags, part):
    assert part in refusal(*flags)


def test_an_out_that_cannot_be_written_is_refused_before_the_first_epoch(workplace, refusal):
    write(Path(), {"blocked": "a file"})
    says = refusal(*complete(["--out", "blocked"]))
    assert re.search(r"cannot write blocked/\S*/settings.json", says)  # it is written before the first epoch


def test_a_command_gives_up_on_a_silent_server(workplace):
    assert exit_code("--list") == 2
    assert socket.getdefaulttimeout() == 60


def test_the_home_folder_of_out_and_weights_is_the_users(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace / "home"))
    train_run("--method", "linear", out="~/x")
    settings = train.complete_settings({"data": "cub", "method": "full", "weights": "~/vit.pth"})

    assert len(list((workplace / "home/x").glob("*/result.json"))) == 1
    assert settings["weights"] == str(workplace / "home/vit.pth")


def test_a_file_that_is_written_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "best.pt"
    train.save(path, torch.ones(9))
    before = path.read_bytes()
    with pytest.raises(Exception):
        train.save(path, lambda: 0)  # what PyTorch notices when it has written a part

    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_full_disk_is_no_bug(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(vit.InputError, match="cannot write .*free the disk, or change --out"):
        train.save(tmp_path / "best.pt", {})


README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_readmes_program_predicts_and_exports_a_model_that_runs_without_this_project(workplace, capsys):
    (program,) = re.findall(r"```python\n(from pathlib import Path\n.*?)```", README, re.S)
    (named,) = re.findall(r'sa2vp.load\("(.*?)"\)', program)
    write(Path(), {"new.jpg": None})
    variables = {}
    exec(program.replace(named, str(train_run())), variables)

    assert capsys.readouterr().out.splitlines()[-1] in ("ant", "bee")
    images = torch.cat([variables["image"], torch.randn(2, 3, 224, 224)])
    exported = torch.export.load("model.pt2").module()
    torch.testing.assert_close(exported(images), variables["model"](images))


def test_the_readmes_picture_has_a_map_below_each_image(workplace):
    (program,) = re.findall(r"```python\n([^`]*?make_grid.*?)```", README, re.S)
    exec(program.replace("runs/shapes-sa2vp", str(train_run())), {})

    page = np.asarray(Image.open("show.png"))
    tiles = page[2:, 2:].reshape(2, 152, 6, 152, 3)[:, :-2, :, :-2]
    assert tiles.std(axis=(1, 3, 4)).all()


def test_the_readmes_measurement_compares_every_method_with_the_frozen_encoder(monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(from statistics import median\n.*?)```", README, re.S)
    monkeypatch.setattr(vit, "VisionTransformer", functools.partial(vit.VisionTransformer, 32, 16, 16, 5, 2))
    variables = {}
    exec(program, variables)

    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == 2 * list(variables["models"])
    assert [row[2] for row in rows[:: len(variables["models"])]] == 2 * ["ratio 1.00"]


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", README))

    assert links and links <= anchors


@pytest.mark.parametrize("module", [vit, sa2vp, data, train])
def test_every_public_class_function_and_method_has_a_docstring(module):
    tree = ast.parse(Path(module.__file__).read_text())
    scopes = [tree, *(part for part in tree.body if isinstance(part, ast.ClassDef))]
    parts = [part for scope in scopes for part in scope.body if isinstance(part, ast.ClassDef | ast.FunctionDef)]
    without = {part.name for part in parts if not ast.get_docstring(part)}

    assert len(parts) > 10 and without <= {"__init__", "forward", "__len__", "__getitem__", "__iter__"}


# ---------------------------------------------------------------------- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [
    *({"method": name} for name in sa2vp.METHODS), {"prompt_grid": (7, 7)}, {"distill_layers": ()},
])  # fmt: skip
def test_a_step_on_cuda_has_nearly_the_loss_of_float32_on_the_cpu(workplace, options, compiled):
    settings = settings_of(workplace, epochs=1, warmup=0, **{"dropout": 0.0} | options)
    losses = []
    for machine in (CPU, choose_machine("--workers", "0", *(["--compile"] if compiled else []))):
        train.fit(settings, Path(f"{machine.device}"), machine)
        losses.append(float(read_table(Path(f"{machine.device}/metrics.csv"))[0]["loss"]))

    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@needs_cuda
def test_a_run_on_cuda_resumes_and_predicts(workplace, monkeypatch):
    flags = complete(["--epochs", 3, "--gpu", 0])
    interrupt(monkeypatch)
    assert exit_code(*flags) == 130
    assert exit_code(*flags) == 0

    (out,) = Path("runs").glob("*/")
    assert [row["epoch"] for row in read_table(out / "metrics.csv")] == ["1", "2", "3"]
    for job in (["--eval", out], ["--predict", out, workplace / "insects/test"]):
        assert exit_code(*job, "--gpu", 0) == 0

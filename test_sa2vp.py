"""Each test's name is the claim that it proves. No network and no data: everything is made on the spot.

The equations come first, then baselines, the backbone's weights, training, several processes, data, several
runs, use, the command line and files. `literal` is the method token by token, as the equations have it.
"""

import argparse
import ast
import csv
import dataclasses
import functools
import hashlib
import http.server
import inspect
import json
import math
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
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


def small_vit(image_size=32, patch_size=16, dim=16, depth=5, heads=2):
    """A backbone with no zero in it, so that nothing vanishes by chance."""
    torch.manual_seed(0)
    backbone = vit.VisionTransformer(image_size, patch_size, dim, depth, heads)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone


def small_model(image_size=(48, 64), **options):
    model = sa2vp.SA2VP(small_vit(image_size), 3, 4, 0.5, **options)
    for parameter in sa2vp.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def small_images(*size):
    return torch.randn(2, 3, *(size or (48, 64)), dtype=torch.float64)


def write(root, files):
    """{path: text, bytes, dict (as JSON) or None (a picture of noise)}: every file below root."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (40, 50, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / path)
        else:
            content = json.dumps(content) if isinstance(content, dict) else content
            (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def make_folder(folder, splits={"train": 6, "test": 4}, classes=("ant", "bee")):
    names = (f"{split}/{name}/{i}.png" for split, count in splits.items() for name in classes for i in range(count))
    write(folder, dict.fromkeys(names))
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of pictures and a file of weights for 224 x 224 images, both small."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save(vit.VisionTransformer(224, 32, 64, 5, 1).state_dict(), folder / "vit.pth")
    make_folder(folder / "insects")
    return folder


CPU = train.Machine(torch.device("cpu"), torch.float32, workers=0, compile=False, root=Path("data"))


@pytest.fixture
def command(files, tmp_path, monkeypatch):
    """A function that completes flags to a command on the small data, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*flags):
        defaults = {"--data": files / "insects", "--weights": files / "vit.pth", "--epochs": 1, "--batch-size": 4,
                    "--workers": 0}  # fmt: skip
        missing = [part for flag in defaults.items() if flag[0] not in flags for part in flag]
        return list(map(str, [*flags, *missing, "--cpu"]))

    return command


@pytest.fixture
def run(command):
    """A function that runs such a command and returns the run's folder."""

    def run(*flags, out="run"):
        train.main(command(*flags, "--out", out))
        return Path(out)

    return run


@pytest.fixture
def settings(files):
    """A function that gives the complete settings of a run on the small data."""

    def settings(**given):
        own = {"data": str(files / "insects"), "weights": files / "vit.pth", "epochs": 1, "batch_size": 4}
        return train.complete_settings({"method": "sa2vp"} | own | given)

    return settings


def fail(arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, arguments)))
    return stop.value.code


def refusal(capsys, arguments):
    """The one sentence with which the command line refuses bad input."""
    capsys.readouterr()
    assert fail(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # no progress bars
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


def table(path):
    return list(csv.DictReader(path.open()))


def result(out):
    return json.loads((out / "result.json").read_text())


def checkpoint(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------- the equations


def draw(name, shape, mean=0.0, std=0.03):
    """Normal numbers that depend on nothing but the name: the recipe behind the golden numbers."""
    rng = np.random.RandomState(zlib.crc32(f"0:{name}".encode()))
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))


def official_checkpoint(dim=64, depth=12, tokens=5, inner=8, classes=3, patch=4, maps=2):
    """A checkpoint in the layout of the authors' released code."""
    embeddings, encoder = "vit_base.transformer.embeddings", "vit_base.transformer.encoder"
    maps = {f"{embeddings}.ppt": (1, tokens, inner), f"{encoder}.deep_ppt": (maps, 1, tokens, inner)}
    others = {
        f"{embeddings}.position_embeddings": (1, tokens, dim), f"{embeddings}.cls_token": (1, 1, dim),
        f"{embeddings}.patch_embeddings.weight": (dim, 3, patch, patch), f"{embeddings}.patch_embeddings.bias": (dim,),
        f"{encoder}.cross_conv": (2, dim),
    }  # fmt: skip
    linear = {f"{embeddings}.ppt_proj": (dim, inner), "class_head": (classes, dim)}
    linear |= {f"{encoder}.deep_proj.{i}": (dim, inner) for i in range(2)}
    norms, copies = [f"{encoder}.encoder_norm"], {}
    for i in range(depth):
        layer, cross = f"{encoder}.layer.{i}", f"{encoder}.cross_attn.{i}"
        norms += [f"{layer}.attention_norm", f"{layer}.ffn_norm", f"{cross}.ffn_norm"]
        linear |= {f"{layer}.ffn.fc1": (4 * dim, dim), f"{layer}.ffn.fc2": (dim, 4 * dim)}
        linear |= {f"{cross}.ffn.fc1": (inner, dim), f"{cross}.ffn.fc2": (dim, inner)}
        copies[f"{cross}.attention_norm"] = f"{layer}.attention_norm"
        for theirs, kind in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "out")):
            linear[f"{layer}.attn.{kind}"] = dim, dim
            copies[f"{cross}.attn.{theirs}"] = f"{layer}.attn.{kind}"
    state = {name: draw(name, shape, std=0.2) for name, shape in maps.items()}
    state |= {name: draw(name, shape) for name, shape in others.items()}
    for name, shape in linear.items():
        state |= {f"{name}.weight": draw(f"{name}.weight", shape), f"{name}.bias": draw(f"{name}.bias", shape[:1])}
    for name in norms:
        state |= {f"{name}.weight": draw(f"{name}.weight", dim, 1.0, 0.05), f"{name}.bias": draw(f"{name}.bias", dim)}
    return state | {f"{copy}.{part}": state[f"{of}.{part}"] for copy, of in copies.items() for part in ("weight", "bias")}


OFFICIAL_NAMES = {  # the released code's names -> ours; its copies of layer i's own weights are taken out below
    r"^vit_base\.transformer\.(embeddings|encoder)\.": "",
    r"^(cls_token)$": r"vit.\1",
    r"^position_embeddings$": "vit.pos_embed",
    r"^patch_embeddings\.": "vit.patch_embed.proj.",
    r"^encoder_norm\.": "vit.norm.",
    r"^layer\.(\d+)\.attention_norm\.": r"vit.blocks.\1.norm1.",
    r"^layer\.(\d+)\.ffn_norm\.": r"vit.blocks.\1.norm2.",
    r"^layer\.(\d+)\.ffn\.": r"vit.blocks.\1.mlp.",
    r"^layer\.(\d+)\.attn\.out\.": r"vit.blocks.\1.attn.proj.",
    r"^layer\.(\d+)\.attn\.": r"vit.blocks.\1.attn.",
    r"^cross_attn\.(\d+)\.attention_norm\.": r"copy of vit.blocks.\1.norm1.",
    r"^cross_attn\.(\d+)\.attn\.to_out\.": r"copy of vit.blocks.\1.attn.proj.",
    r"^cross_attn\.(\d+)\.attn\.to_q\.": r"copy of vit.blocks.\1.attn.query.",
    r"^cross_attn\.(\d+)\.attn\.to_k\.": r"copy of vit.blocks.\1.attn.key.",
    r"^cross_attn\.(\d+)\.attn\.to_v\.": r"copy of vit.blocks.\1.attn.value.",
    r"^cross_attn\.(\d+)\.ffn_norm\.": r"interactions.\1.adapter.norm.",
    r"^cross_attn\.(\d+)\.ffn\.fc1\.": r"interactions.\1.adapter.down.",
    r"^cross_attn\.(\d+)\.ffn\.fc2\.": r"interactions.\1.adapter.up.",
    r"^ppt$": "prompt_map.tokens",
    r"^ppt_proj\.": "prompt_map.proj.",
    r"^deep_proj\.0\.": "interactions.4.fusion.prompt_map.proj.",
    r"^deep_proj\.1\.": "interactions.8.fusion.prompt_map.proj.",
    r"^class_head\.": "head.",
}


def load_official(path, scale=0.1, heads=None):
    """A checkpoint of the authors' released code as an SA2VP. `scale` and `heads` are not in the file.

    With one new prompt map in place of two (cars) it enters at layer 4. ValueError names what does not fit.
    """
    try:
        tensors = vit.rename(vit.read_tensors(Path(path)), OFFICIAL_NAMES)
        for name in [name for name in tensors if name.startswith("copy of ")]:
            if not torch.equal(tensors.pop(name), tensors[name.removeprefix("copy of ")]):
                raise ValueError(f"{name} is none")
        new_maps, gates = tensors.pop("deep_ppt"), tensors.pop("cross_conv")  # stacked
        if len(new_maps) > 2 or len(gates) not in (len(new_maps), 2):
            raise ValueError(f"deep_ppt has {len(new_maps)} prompt maps and cross_conv {len(gates)} gates")
        fusion_layers = (4, 8)[: len(new_maps)]
        for i, new_map, gate in zip(fusion_layers, new_maps, gates):
            tensors |= {f"interactions.{i}.fusion.prompt_map.tokens": new_map, f"interactions.{i}.fusion.gate": gate[None]}
        if len(new_maps) == 1:  # the second projection is there, and nothing uses it
            tensors = {name: tensor for name, tensor in tensors.items() if "interactions.8.fusion." not in name}
        tensors = vit.join_qkv(tensors)
        names = [name for name in tensors if name.startswith("vit.")]
        backbone = vit.vit_from_tensors({name.removeprefix("vit."): tensors.pop(name) for name in names}, heads=heads)
        inner_dim = tensors["prompt_map.tokens"].size(-1)
        model = sa2vp.SA2VP(backbone, len(tensors["head.bias"]), inner_dim, scale, fusion_layers=fusion_layers)
        sa2vp.load_trained(model, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of the released SA2VP: {error}") from None
    return model.eval()


# What the authors' released code (its exact, per-token variant) computed for that checkpoint in float32.
GOLDEN_BASE = [[0.3106474, 0.7494106, -0.7767359, -1.8029952], [0.69048494, 0.74388146, 0.3233544, -1.7496935]]
GOLDEN_PROMPT = [[0.12830934, -0.9989903, -0.7256002, -1.7632062], [0.12550925, -1.0010186, -0.7275145, -1.7674283]]
GOLDEN_LOSS, GOLDEN_GRADIENT = 6.708690166, 18.182636429
GOLDEN_SQUARED_GRADIENTS = {
    "prompt_map.tokens": 0.00245926411843631,
    "prompt_map.proj.bias": 16.267122676392383,
    "interactions.0.adapter.down.weight": 8.463537157450572e-05,
    "interactions.5.adapter.norm.weight": 8.879481089023413e-07,
    "interactions.8.fusion.prompt_map.proj.weight": 2.4314366495237537e-05,
    "interactions.11.adapter.up.bias": 0.00018906372348329124,
    "head.weight": 313.60015402911074,
}


def test_equals_the_released_code_forward_and_backward(tmp_path):
    state = official_checkpoint(dim=768, depth=12, tokens=197, inner=16, classes=200, patch=16)
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, tmp_path / "official.pth")
    model = load_official(tmp_path / "official.pth")
    assert sa2vp.count_trained(model) == 372_912

    images, labels = draw("images", (2, 3, 224, 224), std=1.0), torch.tensor([3, 7])
    base, prompt = model(images)
    loss = sa2vp.two_pathway_loss((base, prompt), labels)
    loss.backward()
    gradients = {name: tensor.grad.double() for name, tensor in sa2vp.trained_parameters(model).items()}
    scale = base.abs().max().item()
    torch.testing.assert_close(base[:, :4], torch.tensor(GOLDEN_BASE), rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(prompt[:, :4], torch.tensor(GOLDEN_PROMPT), rtol=0, atol=1e-5 * scale)
    assert loss.item() == pytest.approx(GOLDEN_LOSS, rel=1e-5)
    assert math.sqrt(sum(g.square().sum() for g in gradients.values())) == pytest.approx(GOLDEN_GRADIENT, rel=1e-5)
    for name, golden in GOLDEN_SQUARED_GRADIENTS.items():
        assert gradients[name].square().sum().item() == pytest.approx(golden, rel=2e-5), name  # a square: twice 1e-5


def test_an_official_checkpoint_with_one_new_prompt_map_has_fusion_in_layer_4_alone(tmp_path):
    torch.save({"model": official_checkpoint(maps=1)}, tmp_path / "cars.pth")
    model = load_official(tmp_path / "cars.pth", scale=1.5)
    assert [i for i, interaction in enumerate(model.interactions) if interaction.fusion] == [4]
    assert model.interactions[0].scale == 1.5 and model.vit.image_size == (8, 8)


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("encoder.cross_attn.1.attn.to_q.weight", torch.zeros(64, 64), "blocks.1.attn.query.weight"),  # no copy
        ("encoder.deep_ppt", torch.zeros(2, 1, 6, 8), "fusion.prompt_map.tokens"),
        ("encoder.deep_ppt", torch.zeros(3, 1, 5, 8), "deep_ppt"),
        ("encoder.cross_conv", torch.zeros(3, 64), "cross_conv"),
        ("surplus", torch.zeros(1), "surplus"),
    ],
)
def test_an_official_checkpoint_that_is_amiss_is_refused_by_name(tmp_path, name, value, named):
    torch.save(official_checkpoint() | {f"vit_base.transformer.{name}": value}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=named):
        load_official(tmp_path / "official.pth")


def literal(model, window, distill_layers, fusion_layers, scale, image):
    """Equations (1) to (7) for one image, token by token and head by head: (base, prompt) class tokens."""
    backbone = model.vit
    heads = backbone.blocks[0].attn.heads
    grids = {"B": backbone.grid, "P": model.prompt_grid}

    def neighbours(t, to, of):
        (h, w), (h2, w2) = grids[to], grids[of]
        if t == 0 or window is None:
            return list(range(1 + h2 * w2))
        y, x = divmod(t - 1, w)

        def near(place, n, place2, n2):  # distance of the centres, against half a window of the larger cells
            distance = abs((2 * place + 1) / (2 * n) - (2 * place2 + 1) / (2 * n2))
            return distance < window / 2 * max(1 / n, 1 / n2) - 1e-9

        return [1 + y2 * w2 + x2 for y2 in range(h2) for x2 in range(w2) if near(y, h, y2, h2) and near(x, w, x2, w2)]

    def message(i, x, y, to, of):
        block = backbone.blocks[i]
        (wq, wk, wv), (bq, bk, bv) = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        heard = []
        for t in range(len(x)):
            q = wq @ block.norm1(x[t]) + bq
            o = []
            for head in torch.arange(len(q)).chunk(heads):
                us = neighbours(t, to, of)
                keys = torch.stack([(wk @ block.norm1(y[u]) + bk)[head] for u in us])
                values = torch.stack([(wv @ block.norm1(y[u]) + bv)[head] for u in us])
                o.append((keys @ q[head] / math.sqrt(len(head))).softmax(dim=0) @ values)
            heard.append(block.attn.proj(torch.cat(o)))
        z = x + torch.stack(heard)
        adapter = model.interactions[i].adapter
        return scale * adapter.up(F.gelu(adapter.down(adapter.norm(z))))

    positions = vit.interpolate_positions(backbone.pos_embed, grids["B"], grids["P"])[0]
    base = torch.cat([backbone.cls_token[0], backbone.patch_embed(image[None])[0]]) + backbone.pos_embed[0]
    prompt = model.prompt_map.tokens[0] @ model.prompt_map.proj.weight.T + model.prompt_map.proj.bias + positions
    for i, block in enumerate(backbone.blocks):
        next_base, next_prompt = block(base[None])[0], block(prompt[None])[0]
        if i in fusion_layers:
            fusion = model.interactions[i].fusion
            next_prompt = next_prompt + fusion.gate * block(fusion.prompt_map())[0]
        if i in distill_layers:
            next_prompt = next_prompt + message(i, prompt, base, "P", "B")
        else:
            next_base = next_base + message(i, base, prompt, "B", "P")
        base, prompt = next_base, next_prompt
    return model.head(backbone.norm(base[0])), model.head(backbone.norm(prompt[0]))


@pytest.mark.parametrize(
    "prompt_grid, window, distill_layers, fusion_layers",
    [
        (None, 3, None, None),  # the paper's: D = {0, 4}, F = {4} of 5 layers
        (None, 5, (), ()),  # every layer prompts
        (None, None, (1, 2), (2,)),  # no alignment
        ((2, 2), 3, (0, 4), (0, 4)),  # a smaller map, not in proportion
        ((5, 7), 3, (0, 1, 2, 3, 4), (1,)),  # a larger one; every layer distils
        ((6, 8), 1, (2,), ()),
    ],
)
def test_equals_the_equations_taken_literally_token_by_token(prompt_grid, window, distill_layers, fusion_layers):
    model = small_model(
        prompt_grid=prompt_grid, window=window, distill_layers=distill_layers, fusion_layers=fusion_layers
    )
    images = small_images()  # a grid of 3 x 4
    d = (0, 4) if distill_layers is None else distill_layers
    f = (4,) if fusion_layers is None else fusion_layers
    pairs = [literal(model, window, d, f, 0.5, image) for image in images]
    expected = [torch.stack(logits) for logits in zip(*pairs)]
    ours, trained = model(images), sa2vp.trained_parameters(model)
    torch.testing.assert_close(list(ours), expected, rtol=1e-9, atol=1e-9)

    def gradients(logits):
        loss = sa2vp.two_pathway_loss(logits, torch.tensor([0, 2]))
        return torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

    for name, grad, right in zip(trained, gradients(ours), gradients(expected)):
        assert (grad is None) == (right is None), name
        if grad is not None:
            torch.testing.assert_close(grad, right, rtol=1e-7, atol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("window", [1, 3, 5, None])
def test_in_one_interaction_a_prompt_token_reaches_just_its_neighbourhood(window):
    model = small_model((80, 80), window=window)  # 5 x 5
    base, prompt = torch.randn(2, 1, 26, 16, dtype=torch.double, requires_grad=True)
    next_base, _ = model.interactions[1](model.vit.blocks[1], base, prompt)
    for t in range(26):
        (grad,) = torch.autograd.grad(next_base[0, t].sum(), prompt, retain_graph=True)
        reached = set(grad[0].abs().sum(dim=1).nonzero().flatten().tolist())
        y, x = divmod(t - 1, 5)
        near = {1 + 5 * a + b for a in range(5) for b in range(5) if max(abs(a - y), abs(b - x)) <= (window or 0) // 2}
        assert reached == (set(range(26)) if t == 0 or window is None else near)


@pytest.mark.parametrize(
    "grid, other, corner, inner",
    [((14, 14), (14, 14), 4, 9), ((14, 14), (7, 7), 4, 9), ((7, 7), (14, 14), 16, 36)],
)
def test_neighbourhoods_have_the_sizes_the_method_gives(grid, other, corner, inner):
    mask = sa2vp.aligned_neighbourhood(grid, other, window=3)
    sizes = mask.sum(dim=1)
    h, w = grid
    assert sizes[0] == 1 + other[0] * other[1] and not mask[1:, 0].any()
    assert sizes[1] == corner and sizes[1 + h // 2 * w + w // 2] == inner


@pytest.mark.parametrize(
    "options, says",
    [
        ({"window": 0}, "odd and positive"),
        ({"window": 2}, "odd and positive"),
        ({"window": 1, "prompt_grid": (2, 2)}, "nothing to attend to"),  # and not NaN
        ({"distill_layers": (0,), "fusion_layers": (4,)}, "must be a subset"),
        ({"distill_layers": (0, 5)}, "must be a subset"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        small_model(**options)


def test_trained_parameters_are_as_many_as_the_paper_says():
    backbone = vit.VisionTransformer()
    encoder = sum(parameter.numel() for parameter in backbone.parameters())
    for method, options, count in (
        ("sa2vp", dict(inner_dim=8), 202_200),
        ("sa2vp", dict(inner_dim=16), 372_912),
        ("sa2vp", dict(inner_dim=32), 714_336),
        ("sa2vp", dict(inner_dim=64), 1_397_184),
        ("sa2vp", dict(inner_dim=16, prompt_grid=(7, 7)), 365_856),
        ("sa2vp", dict(inner_dim=64, fusion_layers=(4,)), 1_333_888),  # cars
        ("linear", {}, 0),
        ("adapter", dict(inner_dim=16), 12 * (2 * 768 + 2 * 768 * 16 + 768 + 16)),
        ("vpt", {}, 12 * 50 * 768),
        ("full", {}, encoder),
    ):
        assert sa2vp.count_trained(sa2vp.METHODS[method](backbone, 10, **options)) == count, method


def test_what_does_not_depend_on_the_image_is_computed_for_a_batch_of_one():
    model, sizes = small_model(), []
    for block in model.vit.blocks:
        block.norm2.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:2]))
    model(small_images())
    base, prompt, fusion, class_only = (2, 13), (2, 13), (1, 13), (2, 1)
    #       layer 0            1             2             3             4
    assert sizes == [base, fusion, base, prompt, base, prompt, base, prompt, class_only, class_only, fusion]


def test_dropout_of_one_rate_is_on_both_pathways_the_encoder_and_the_adapters():
    model = small_model(dropout=0.5)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    images, seen = small_images(), []
    model.interactions[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1:]))
    assert torch.equal(model(images)[0], model(images)[0])
    assert all((tokens != 0).all() for tokens in seen)
    model.train()
    assert not torch.equal(model(images)[0], model(images)[0])
    for tokens in seen[-2:]:  # B_0 and P_0
        assert 0.3 < (tokens == 0).double().mean() < 0.7


def test_initialisation_is_the_methods():
    model = sa2vp.SA2VP(vit.VisionTransformer(64, 16, 256, 5, 4), 50, inner_dim=16)
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


def test_the_loss_weighs_the_pathways_8_to_2():
    base, prompt, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = 0.8 * F.cross_entropy(base, labels) + 0.2 * F.cross_entropy(prompt, labels)
    torch.testing.assert_close(sa2vp.two_pathway_loss((base, prompt), labels), expected)
    torch.testing.assert_close(sa2vp.two_pathway_loss((base,), labels), F.cross_entropy(base, labels))


# ---------------------------------------------------------------------- baselines and looking inside


def test_vpt_prompts_are_drawn_as_vpt_draws_them_and_take_part_in_every_layer():
    model = sa2vp.VPTDeep(small_vit(), 3, prompts=20)
    bound = math.sqrt(6 / (3 * 16 * 16 + 16))
    assert 0.95 * bound < model.prompts.abs().max() <= bound
    (logits,) = model(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert model.prompts.grad.abs().sum(dim=(1, 2)).all()


def test_adapter_tuning_adds_the_adapters_message_to_every_layer():
    model, images = sa2vp.AdapterTuning(small_vit(), 3, 4, scale=0.5).eval(), torch.randn(2, 3, 32, 32)
    x = model.vit.embed(images)
    for block, adapter in zip(model.vit.blocks, model.adapters):
        x = block(x) + 0.5 * adapter.up(F.gelu(adapter.down(adapter.norm(x))))
    torch.testing.assert_close(model(images)[0], model.head(model.vit.norm(x[:, 0])))


def test_the_attention_that_is_shown_is_the_base_pathways_in_the_last_layer():
    images, model = small_images(), small_model()
    *first, last = model.vit.blocks
    with torch.no_grad():
        x = base = model.vit.embed(images)
        prompt = model.embed_prompts()
        for layer, interaction in zip(first, model.interactions):
            x = layer(x)
            base, prompt = interaction(layer, base, prompt)
        for network, tokens in ((model.vit, x), (model, base)):
            q, k, _ = last.attn.qkv(last.norm1(tokens)).unflatten(-1, (3, last.attn.heads, -1)).unbind(2)
            scores = torch.einsum("bhc,bthc->bht", q[:, 0], k) / math.sqrt(q.size(-1))
            expected = scores.softmax(dim=-1).mean(dim=1)[:, 1:].view(2, 3, 4)
            torch.testing.assert_close(sa2vp.class_attention(network, images), expected)


@pytest.mark.parametrize("distill_layers", [(0, 4), (1,), range(5)])
def test_the_prompting_strength_is_the_norm_of_the_messages_to_each_image_token(distill_layers):
    model, images, norms = small_model(distill_layers=distill_layers), small_images(), []
    for i, interaction in enumerate(model.interactions[:-1]):  # the last layer's image tokens go nowhere
        if i not in distill_layers:
            hook = lambda _, inputs, message: norms.append(0.5 * message[:, 1:].norm(dim=-1))  # noqa: E731
            interaction.adapter.register_forward_hook(hook)
    strength = sa2vp.prompting_strength(model, images)
    torch.testing.assert_close(strength, sum(norms, torch.zeros(2, 12)).view(2, 3, 4).double())


# ---------------------------------------------------------------------- the backbone and its weights


def test_vit_equals_torchvision_with_the_same_weights(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(64, 16, 3, 2, 128, 256).eval()
    for parameter in theirs.parameters():
        if not parameter.any():  # class token and biases start as zeros, which would hide a mistake
            torch.nn.init.normal_(parameter, std=0.02)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = vit.load_vit(tmp_path / "vit.pth", 64).eval()
    assert ours.normalize == "imagenet"
    theirs.heads, images = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def google_arrays(backbone):
    """The arrays of Google's .npz for a backbone, by the layout its documentation gives."""
    state = {name: tensor.numpy() for name, tensor in backbone.state_dict().items()}
    dim, heads = backbone.dim, backbone.blocks[0].attn.heads
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((dim, 9)),
        "pre_logits/bias": np.zeros(dim),
    }
    for i in range(len(backbone.blocks)):
        to, of = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for google, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays[f"{to}/{google}/scale"] = state[f"{of}.{name}.weight"]
            arrays[f"{to}/{google}/bias"] = state[f"{of}.{name}.bias"]
        for google, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            arrays[f"{to}/MlpBlock_3/{google}/kernel"] = state[f"{of}.mlp.{name}.weight"].T
            arrays[f"{to}/MlpBlock_3/{google}/bias"] = state[f"{of}.mlp.{name}.bias"]
        to += "/MultiHeadDotProductAttention_1"
        for j, name in enumerate(("query", "key", "value")):
            rows = slice(j * dim, (j + 1) * dim)
            arrays[f"{to}/{name}/kernel"] = state[f"{of}.attn.qkv.weight"][rows].T.reshape(dim, heads, -1)
            arrays[f"{to}/{name}/bias"] = state[f"{of}.attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[f"{to}/out/kernel"] = state[f"{of}.attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[f"{to}/out/bias"] = state[f"{of}.attn.proj.bias"]
    return arrays


def test_google_npz_gives_weights_heads_and_normalization(tmp_path):
    backbone, images = small_vit(heads=4), torch.randn(2, 3, 32, 32)
    np.savez(tmp_path / "vit.npz", **google_arrays(backbone))
    loaded = vit.load_vit(tmp_path / "vit.npz", image_size=32)
    assert loaded.blocks[0].attn.heads == 4 and loaded.normalize == "half"
    assert sa2vp.fingerprint(loaded) == sa2vp.fingerprint(backbone) and torch.equal(loaded(images), backbone(images))
    with pytest.raises(ValueError, match="it has 4 heads, not 2"):
        vit.load_vit(tmp_path / "vit.npz", image_size=32, heads=2)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
                                  lambda state: {"state_dict": state}])  # fmt: skip
def test_timm_names_load_bare_or_wrapped_and_heads_are_left_out(tmp_path, wrap):
    backbone = small_vit()
    extra = {name: torch.zeros(1) for name in ("head.weight", "fc_norm.bias", "mask_token", "decoder_pos_embed")}
    torch.save(wrap(backbone.state_dict() | extra), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", image_size=32, heads=2, normalize="half")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), backbone.state_dict().values()))
    assert loaded.normalize == "half"


def test_position_embeddings_are_interpolated_to_another_grid(tmp_path):
    backbone = small_vit(image_size=64)
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", image_size=(32, 96), heads=2)
    assert loaded.grid == (2, 6) and torch.equal(loaded.pos_embed[:, 0], backbone.pos_embed[:, 0])
    positions = backbone.pos_embed[0, 1:].T.reshape(1, 16, 4, 4)
    expected = F.interpolate(positions, size=(2, 6), mode="bicubic", align_corners=False).reshape(16, 12).T
    torch.testing.assert_close(loaded.pos_embed[0, 1:], expected)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("blocks.1.mlp.fc2.bias", None, "blocks.1.mlp.fc2.bias"),  # missing
        ("patch_embed.proj.weight", None, "patch_embed.proj.weight"),
        ("surplus", torch.ones(1), "surplus"),
        ("norm.bias", torch.ones(3), "norm.bias"),
        ("patch_embed.proj.weight", torch.ones(16, 3, 2, 16, 16), "patch_embed.proj"),
        ("pos_embed", torch.ones(5), "pos_embed"),
        ("blocks.0.ls1.gamma", torch.ones(16), "blocks.0.ls1.gamma .*another architecture"),
        ("blocks.0.gamma_1", torch.ones(16), "blocks.0.gamma_1 .*another architecture"),
        ("reg_token", torch.ones(16), "reg_token .*another architecture"),
        ("register_tokens", torch.ones(16), "register_tokens .*another architecture"),
        ("dist_token", torch.ones(16), "dist_token .*another architecture"),
    ],
)
def test_a_missing_left_over_or_misshapen_tensor_is_named(tmp_path, name, value, says):
    state = small_vit().state_dict() | {name: value}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=says):
        vit.load_vit(tmp_path / "vit.pth", image_size=32, heads=2)


def test_a_width_that_is_no_multiple_of_64_asks_for_the_heads(tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="--heads"):
        vit.load_vit(tmp_path / "vit.pth", image_size=32)


def safetensors(tensors, change=None):
    """The content of a .safetensors file; `change` damages its header."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(blob), len(blob) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        blob += raw
    if change:
        change(header)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + blob


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_give_the_features_of_the_same_weights_as_pth(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in small_vit().state_dict().items()}
    torch.save(state, tmp_path / "vit.pth")
    (tmp_path / "vit.safetensors").write_bytes(safetensors(state))
    images = torch.randn(2, 3, 32, 32)
    features = [vit.load_vit(path, 32, heads=2)(images) for path in sorted(tmp_path.iterdir())]
    assert torch.equal(*features)


TWO = {"a": torch.ones(2), "b": torch.ones(3)}


@pytest.mark.parametrize(
    "content, says",
    [
        (safetensors(TWO)[:-1], "b overlaps .* or is cut off"),
        (safetensors(TWO) + b"0", "1 bytes too many"),
        (safetensors({"a": torch.ones(2).long()}), "a is of type I64"),
        ((10**9).to_bytes(8, "little") + b"{}", "header is longer than the file"),
        ((2).to_bytes(8, "little") + b"{x", "Expecting property name"),
        (safetensors(TWO, lambda header: header["b"].update(data_offsets=[4, 16])), "b overlaps"),
        (safetensors(TWO, lambda header: header["b"].update(shape=[4])), "b overlaps"),
        (safetensors(TWO, lambda header: header["b"].pop("dtype")), "header is not"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_in_one_sentence(tmp_path, content, says):
    (tmp_path / "vit.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        vit.load_vit(tmp_path / "vit.safetensors")


def test_a_fingerprint_tells_backbones_apart_by_any_tensor_that_is_not_interpolated():
    backbone = small_vit()
    seen = {sa2vp.fingerprint(backbone)}
    for parameter in backbone.parameters():
        parameter.data += 1e-3
        seen.add(sa2vp.fingerprint(backbone))
    assert len(seen) == len(list(backbone.parameters()))


class Bomb:
    def __reduce__(self):
        return Path("went-off").touch, ()


def test_a_weights_file_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    np.savez("bomb.npz", cls=np.array([Bomb()], dtype=object))
    for name in ("bomb.pth", "bomb.npz"):
        for load in (vit.load_vit, load_official, sa2vp.load):
            with pytest.raises(ValueError, match=name):
                load(name)
    assert not Path("went-off").exists()


@pytest.fixture
def server(tmp_path):
    """An HTTP server on 127.0.0.1 for the folder `server.folder`; what is in `server.cut` breaks off half way."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path not in server.cut:
                return super().do_GET()
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

        def log_message(self, *_):
            pass

    folder = tmp_path / "server"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.folder, server.asked, server.cut = folder, [], set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("damage", ["wrong checksum", "breaks off"])
def test_weights_by_name_are_downloaded_once_and_a_damaged_file_is_not_kept(
    server, run, command, files, tmp_path, monkeypatch, capsys, damage
):
    cache, source = tmp_path / "cache", server.folder / "tiny.pth"
    shutil.copy(files / "vit.pth", source)
    digits = "00000000" if damage == "wrong checksum" else None
    if damage == "breaks off":
        server.cut.add("/tiny.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache))
    monkeypatch.setitem(vit.BACKBONES, "deit-tiny", (f"{server.url}/tiny.pth", digits, "half"))
    assert "fetch it and give --weights PATH" in refusal(capsys, command("--weights", "deit-tiny"))
    assert not list(cache.rglob("*.*"))
    server.cut.clear()
    digits = digits and hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(vit.BACKBONES, "deit-tiny", (f"{server.url}/tiny.pth", digits, "half"))
    out = run("--weights", "deit-tiny")
    assert "deit-tiny: width 64, 5 layers, 1 heads, patch 32, image 224, normalization half" in capsys.readouterr().out
    asked = len(server.asked)
    assert sa2vp.load(out / "best.pt")[1]["backbone"]["normalize"] == "half"
    assert len(server.asked) == asked and [path.name for path in cache.rglob("*.*")] == ["deit-tiny.pth"]


def test_heads_image_size_and_normalization_are_kept_in_the_checkpoint(run, tmp_path, capsys):
    torch.save(vit.VisionTransformer(64, 16, 160, 2, 2).state_dict(), tmp_path / "wide.pth")
    out = run("--weights", tmp_path / "wide.pth", "--image-size", 48, "--normalize", "half", "--heads", 2)
    assert "2 heads, patch 16, image 48, normalization half" in capsys.readouterr().out
    model, meta = sa2vp.load(out / "best.pt")
    assert model.vit.blocks[0].attn.heads == 2 and model.vit.grid == (3, 3)
    assert meta["input"] == {"crop": True, "image_size": (48, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    train.main(["--eval", str(out / "best.pt"), "--cpu"])
    assert "test" in capsys.readouterr().out
    run(out="other")
    assert "1 heads (taken as width / 64)" in capsys.readouterr().out


# ---------------------------------------------------------------------- training


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [train.learning_rate(step, 10, 100, 1e-3) for step in range(100)]
    assert rates[0] == 0 and rates[9] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[4] == pytest.approx(1e-3 * 4 / 9)
    assert rates[55] == pytest.approx(1e-7 + (1e-3 - 1e-7) / 2)
    assert 1e-7 < rates[99] < 1e-6
    assert train.learning_rate(0, 0, 10, 1e-3) == 1e-3 and train.learning_rate(0, 1, 10, 1e-3) == 0


def test_weight_decay_is_on_matrices_prompt_maps_and_gates_alone():
    model = small_model()
    decayed, rest = train.make_optimizer(model, 0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} == {"weight", "tokens", "gate"}
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert {names[id(p)].split(".")[-1] for p in rest["params"]} == {"weight", "bias"}
    assert len(decayed["params"]) + len(rest["params"]) == len(sa2vp.trained_parameters(model))


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_a_run_from_the_command_line_writes_what_it_promises(run, capsys, method):
    out = run("--method", method, "--epochs", 2)
    found, rows, best = result(out), table(out / "metrics.csv"), checkpoint(out / "best.pt")
    assert (found["method"], found["data"], found["seed"]) == (method, "insects", 42)
    assert (found["prompt_accuracy"] is None) == (method != "sa2vp")
    assert 0 <= found["accuracy"] <= 100 and found["images_per_second"] > 0 and found["seconds"] > 0
    assert [row["epoch"] for row in rows] == ["1", "2"] and best["classes"] == ["ant", "bee"]
    assert any(name.startswith("vit.") for name in best["trained"]) == (method == "full")
    assert found["trainable"] == sum(t.numel() for n, t in best["trained"].items() if not n.startswith("head."))
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "metrics.csv", "result.json"]
    capsys.readouterr()
    train.main(["--eval", str(out / "best.pt"), "--cpu"])
    assert f"test {found['accuracy']:.2f} %" in capsys.readouterr().out


def test_the_chosen_epoch_is_tested_and_reported(run, monkeypatch):
    evaluate, accuracies, tested = train.evaluate, iter([10.0, 30.0, 20.0]), []

    def pretended(model, batches, machine):
        tested.append(model.head.weight.clone())
        return (next(accuracies), None) if len(tested) < 4 else evaluate(model, batches, machine)

    monkeypatch.setattr(train, "evaluate", pretended)
    out = run("--lr", 0.01, "--epochs", 3)
    assert (result(out)["val_accuracy"], result(out)["best_epoch"]) == (30.0, 2)
    best, last = (checkpoint(out / name)["trained"]["head.weight"] for name in ("best.pt", "last.pt"))
    assert torch.equal(tested[3], best) and torch.equal(tested[1], best) and not torch.equal(best, last)


def test_every_epoch_has_its_own_order_and_dropout_and_every_run_of_a_seed_the_same(settings, tmp_path, monkeypatch):
    seen = []

    def record(model, batches, *_):
        seen.append((tuple(batches.sampler), torch.rand(1).item()))
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(train, "train_epoch", record)
    monkeypatch.setattr(train, "evaluate", lambda *_: (0.0, None))
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.fit(settings(seed=seed, epochs=3), tmp_path / out, CPU, {})
    orders, dropout = zip(*seen)
    assert orders[:3] == orders[3:6] and dropout[:3] == dropout[3:6]
    assert len(set(orders)) == len(set(dropout)) == 6
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_matrix_products_are_in_the_machines_dtype_and_float16_has_a_scaler(settings, tmp_path, monkeypatch):
    seen, forward = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda module, x: seen.append(forward(module, x)) or seen[-1])
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        seen.clear()
        found = train.fit(settings(), tmp_path / str(dtype), CPU._replace(dtype=dtype), {})
        scaler = checkpoint(tmp_path / str(dtype) / "last.pt")["scaler"]
        assert {x.dtype for x in seen} == {dtype} and 0 <= found["accuracy"] <= 100
        assert bool(scaler) == (dtype == torch.float16)
    assert scaler["_growth_tracker"] > 0 or scaler["scale"] < 65536  # it took part
    unscaled = tmp_path / "torch.bfloat16"  # goes on with one
    assert train.fit(settings(epochs=2), unscaled, CPU._replace(dtype=dtype), checkpoint(unscaled / "last.pt"))


@pytest.mark.parametrize("hardware, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_in_hardware_takes_float16(monkeypatch, hardware, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware or including_emulation)
    assert train.choose_machine({})[:2] == (torch.device("cuda", 0), dtype)


def test_the_backbone_is_bit_for_bit_unchanged_by_training(files, settings, tmp_path, monkeypatch):
    before, models, build = vit.load_vit(files / "vit.pth").state_dict(), [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *given: models.append(build(*given)) or models[-1])
    for method in sa2vp.METHODS:
        train.fit(settings(method=method), tmp_path / method, CPU, {})
        after = models[-1][0].vit.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before) == (method != "full")


def outcome(out):
    """Everything a run leaves but its times."""
    rows = [result(out), *table(out / "metrics.csv")]
    for row in rows:
        row.pop("seconds"), row.pop("images_per_second")
    return rows, [checkpoint(out / name)["trained"] for name in ("best.pt", "last.pt")]


def same(a, b):
    assert a[0] == b[0]
    for ours, theirs in zip(a[1], b[1]):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupt(patch, name, after):
    """Has the call of train.<name> number `after` (from 0) end in Ctrl-C."""
    function, calls = getattr(train, name), iter(range(after))

    def interrupted(*arguments, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    patch.setattr(train, name, interrupted)


@pytest.mark.parametrize("killed_in", [0, 2])
def test_an_interrupted_run_goes_on_to_the_numbers_of_one_that_was_not(run, command, monkeypatch, capsys, killed_in):
    flags = ["--dropout", 0.2, "--workers", 2, "--epochs", 4]
    whole = outcome(run(*flags, out="whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", killed_in)
        assert fail(command(*flags, "--out", "broken")) == 130
    assert "interrupted; the same command goes on: python train.py --dropout 0.2" in capsys.readouterr().err
    same(whole, outcome(run(*flags, out="broken")))
    before = Path("broken/best.pt").stat().st_mtime_ns
    capsys.readouterr()
    run(*flags, out="broken")  # a finished run is kept, and its result printed again
    assert Path("broken/best.pt").stat().st_mtime_ns == before
    assert re.fullmatch(r"test .* with epoch \d, trained for \d+ s\n", capsys.readouterr().out)


def test_a_run_of_other_settings_or_another_backbone_is_refused(run, command, files, capsys):
    shutil.copy(files / "vit.pth", "vit.pth")
    out, flags = run("--lr", 0.01, "--weights", "vit.pth"), ["--out", "run", "--weights", "vit.pth", "--lr"]
    before = outcome(out)
    assert "holds a run with lr 0.01, not 0.02" in refusal(capsys, command(*flags, 0.02))
    (out / "result.json").unlink()
    torch.save(vit.VisionTransformer(224, 32, 64, 5, 1).state_dict(), "vit.pth")
    assert "another backbone or on other classes" in refusal(capsys, command(*flags, 0.01))
    (out / "last.pt").write_bytes(b"something else")
    assert "no checkpoint of this project" in refusal(capsys, command(*flags, 0.01))
    (out / "last.pt").unlink()
    shutil.copy(files / "vit.pth", "vit.pth")
    write(out, {"result.json": {"accuracy": 99.0}})  # of the run whose last.pt was taken away: no result of this one
    same(before, outcome(run("--lr", 0.01, "--weights", "vit.pth")))
    make_folder(Path("pictures"))
    run("--data", "pictures", out="pictures-run")
    (Path("pictures-run") / "result.json").unlink()
    Path("pictures/train/bee").rename("pictures/train/cow"), Path("pictures/test/bee").rename("pictures/test/cow")
    assert "other classes" in refusal(capsys, command("--data", "pictures", "--out", "pictures-run"))


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(command, capsys):
    error = refusal(capsys, command("--lr", "1e30", "--epochs", 3, "--out", "run"))
    assert "loss is not finite in epoch" in error
    last = Path("run/last.pt")
    assert not last.exists() or all(tensor.isfinite().all() for tensor in checkpoint(last)["trained"].values())


def test_compiling_changes_no_more_than_rounding_and_happens_in_every_run(settings, tmp_path, monkeypatch):
    compiled, real, counts = [], torch.compile, []
    backend = lambda graph, inputs: compiled.append(1) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=backend, **options))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)  # 8 by default: the sixth run was too much
    torch.save(vit.VisionTransformer(64, 32, 64, 1, 1).state_dict(), tmp_path / "vit.pth")
    one = settings(dropout=0.0, weights=str(tmp_path / "vit.pth"), image_size=64)
    train.fit(one, tmp_path / "plain", CPU, {})
    for i in range(2):
        compiled.clear()
        train.fit(one, tmp_path / f"{i}", CPU._replace(compile=True), {})
        counts.append(len(compiled))
    assert counts[0] > 0 and len(set(counts)) == 1
    plain, fast = (table(tmp_path / name / "metrics.csv")[0] for name in ("plain", "1"))
    assert float(plain["loss"]) == pytest.approx(float(fast["loss"]), rel=1e-5)


# ---------------------------------------------------------------------- several processes


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(command, **environment):
    """Two processes of one job, as torchrun would start them; `command` is a function of the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    jobs = []
    for rank in "01":
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
        process = [sys.executable, *map(str, command(rank))]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        jobs.append(subprocess.Popen(process, env=ENVIRONMENT | own, **pipes))
    return jobs


def test_two_processes_train_and_test_as_one_does(run, command, monkeypatch, capsys):
    for split, count in {"train": 27, "val": 15, "test": 9}.items():  # none is a multiple of four
        names = {f"{i % 3}/{split}{i}.jpg": i % 3 for i in range(count)}
        write(Path("data/dogs"), {f"Images/{name}": None for name in names} | {f"{split}.json": names})
    flags = ["--data", "hta/dogs", "--dropout", 0, "--epochs", 2]  # without random crops
    jobs = launch(lambda rank: [train.__file__, *command(*flags, "--out", "two")])
    rows, _ = outcome(run(*flags, out="one"))
    (output, errors), (silent, _) = (job.communicate(timeout=60) for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert output.count("validation") == 3 and silent == ""  # one process prints: the data, and a line per epoch
    for ours, theirs in zip(rows, outcome(Path("two"))[0]):
        assert float(ours.pop("loss", 0)) == pytest.approx(float(theirs.pop("loss", 0)), rel=1e-4) and ours == theirs
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "choose_machine", lambda flags: CPU)
    monkeypatch.setattr(train, "first_on_each_machine", lambda read: read())
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert "2 processes make no batches of 5" in refusal(capsys, command(*flags, "--out", "odd", "--batch-size", 5))


def test_a_process_that_fails_ends_all(command, tmp_path):
    folder = make_folder(tmp_path / "pictures", {"train": 8, "test": 4})
    (folder / "train" / "bee" / "0.png").write_bytes(b"no picture")  # in the share of one of the two
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    flags = command("--data", folder, "--batch-size", 2, "--epochs", 9)
    job = subprocess.run([*torchrun, *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert job.returncode != 0
    assert re.search(r"^train\.py: cannot read the picture .*bee/0\.png: UnidentifiedImageError$", job.stderr, re.M)


def test_the_first_process_of_each_machine_downloads(command):
    """Two processes pretend to be two machines: each has its own data."""
    code = ("import sys; from pathlib import Path; sys.path.insert(0, sys.argv.pop(1)); import data, train; load = data.load\n"
            "data.load = lambda row, root, *more: (root / 'asked').touch() or load(row, root, *more)\ntrain.main()")  # fmt: skip
    for rank in "01":
        Path(f"machine{rank}").mkdir()
    call = ["-c", code, Path(train.__file__).parent]
    jobs = launch(lambda rank: call + command("--root", f"machine{rank}", "--out", "out"), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    outputs = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert all(Path(f"machine{rank}/asked").exists() for rank in range(2)) and result(Path("out"))["best_epoch"] == 1


def test_after_ctrl_c_under_torchrun_one_process_says_how_to_go_on(monkeypatch, capsys):
    for name in ("WORLD", "LOCAL_WORLD"):
        monkeypatch.setattr(train, name, 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for rank, says in ((0, "interrupted; the same command goes on: torchrun --nproc_per_node=2 train.py --lr 1\n"), (1, "")):
        monkeypatch.setattr(train, "RANK", rank)
        with monkeypatch.context() as patch:
            interrupt(patch, "choose_machine", 0)
            assert fail(["--lr", 1]) == 130
        assert capsys.readouterr().err == says


def test_every_picture_is_counted_once_by_however_many_processes():
    samples = list(range(11))
    (whole,) = data.make_loader(samples, None, 6, 0, shuffle_seed=3).batch_sampler
    for world in (1, 2, 3):
        loaders = [data.make_loader(samples, None, 6, 0, rank=rank, world=world) for rank in range(world)]
        assert sorted(sum((loader.dataset.samples for loader in loaders), [])) == samples
        loaders = [data.make_loader(samples, None, 6, 0, shuffle_seed=3, rank=rank, world=world) for rank in range(world)]
        shares = [list(loader.batch_sampler) for loader in loaders]
        assert {len(share) for share in shares} == {1} and sorted(sum((share[0] for share in shares), [])) == sorted(whole)


def test_workers_are_the_cpus_of_this_process_shared_by_the_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)), raising=False)
    for processes, workers in ((1, 16), (4, 12), (100, 1)):
        monkeypatch.setattr(train, "LOCAL_WORLD", processes)
        assert train.choose_machine({"cpu": True}).workers == workers


# ---------------------------------------------------------------------- data


JSON_SETS = {  # name: (the data set's folder, its pictures, where its paths begin, an id of each class)
    "cub": ("CUB_200_2011", "images", "images", ("001", "200")),
    "nabirds": ("nabirds", "images", "images", (295, 1010)),
    "flowers": ("flowers-102", "jpg", "", (1, 2)),
    "dogs": ("dogs", "Images", "Images", (1, 2)),
    "cars": ("stanford_cars", "cars_train", "", (1, 2)),
}


def json_set(name):
    """A small copy of one of FGVC's sets, its three json files included: {path: content}."""
    folder, _, below, ids = JSON_SETS[name]
    found = {}
    for split, count in {"train": 8, "val": 2, "test": 4}.items():
        prefix = {"flowers": "jpg/", "cars": f"cars_{'test' if split == 'test' else 'train'}/"}.get(name, "")
        classes = [""] * 2 if name in ("flowers", "cars") else ["a/", "b/"]
        listed = {f"{prefix}{classes[n]}{split}{i}{n}.jpg": ids[n] for n in (1, 0) for i in range(count)}
        found |= {str(Path(folder, below, path)): None for path in listed}
        if name == "cars":
            listed = {path.split("/")[0] + "/" + path: class_id for path, class_id in listed.items()}
        found[f"{folder}/{split}.json"] = listed
    return found


def cifar_set(folder, coarse, batches, meta, names):
    entry = {"data": np.zeros((20, 3072), dtype=np.uint8), "fine_labels" if coarse else "labels": [0, 1] * 10}
    files = {file: entry for file in (*batches, "test" if coarse else "test_batch")} | {meta: {names: ["cat", "dog"]}}
    return {f"{folder}/{file}": pickle.dumps(content) for file, content in files.items()}


def dtd_set():
    found = {}
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        paths = [f"{name}/{name}_{split}{i}.jpg" for name in ("dotted", "lined") for i in range(count)]
        found |= {f"dtd/dtd/images/{path}": None for path in paths} | {f"dtd/dtd/labels/{split}1.txt": "\n".join(paths)}
    return found


def food_set():
    found = {}
    for split, count in (("train", 20), ("test", 4)):
        listed = {name: [f"{name}/{split}{i}" for i in range(count)] for name in ("pho", "sushi")}
        found |= {f"food-101/images/{path}.jpg": None for path in sum(listed.values(), [])}
        found[f"food-101/meta/{split}.json"] = listed
    return found


def gtsrb_set():
    found = {f"gtsrb/GTSRB/Training/{i % 2:05d}/{i:05d}.ppm": None for i in range(40)}
    found |= {f"gtsrb/GTSRB/Final_Test/Images/{i:05d}.ppm": None for i in range(8)}
    return found | {"gtsrb/GT-final_test.csv": "\n".join(["Filename;ClassId", *(f"{i:05d}.ppm;{i % 2}" for i in range(8))])}


class FakeScipy:
    """Stands for scipy.io, so that the tests need no scipy: .mat files hold pickles here."""

    @staticmethod
    def loadmat(path):
        return pickle.loads(Path(path).read_bytes())


def svhn_set():
    def mat(count):
        labels = np.array([[10 if i % 2 else 1] for i in range(count)])
        return pickle.dumps({"X": np.zeros((32, 32, 3, count), dtype=np.uint8), "y": labels})

    return {"train_32x32.mat": mat(40), "test_32x32.mat": mat(8)}


def vtab_set(name="clevr_count"):
    lists = {split: [f"images/{split}/{i:06d}.png {i % 8}" for i in range(count)]
             for split, count in {"train800": 16, "val200": 4, "test": 8}.items()}  # fmt: skip
    found = {line.split()[0]: None for lines in lists.values() for line in lines}
    lists["train800val200"] = lists["train800"] + lists["val200"]
    found |= {f"{split}.txt": "\n".join(lines) for split, lines in lists.items()}
    return {f"vtab-1k/{name}/{path}": content for path, content in found.items()}


LAYOUTS = {  # name: (a small copy, sizes of train, val and test)
    **{name: (json_set(name), (16, 4, 8)) for name in JSON_SETS},
    "vtab/clevr_count": (vtab_set(), (20, 0, 8)),
    "hta/cifar10": (
        cifar_set("cifar-10-batches-py", False, [f"data_batch_{i}" for i in range(1, 6)], "batches.meta", "label_names"),
        (80, 20, 20),
    ),
    "hta/cifar100": (cifar_set("cifar-100-python", True, ["train"], "meta", "fine_label_names"), (16, 4, 20)),
    "hta/dtd": (dtd_set(), (16, 4, 8)),
    "hta/food101": (food_set(), (32, 8, 8)),
    "hta/gtsrb": (gtsrb_set(), (32, 8, 8)),
    "hta/svhn": (svhn_set(), (32, 8, 8)),
}


def trust_small_copies(monkeypatch):
    """Small copies have other checksums than those that torchvision pins."""
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(tmp_path, monkeypatch, name):
    copy, sizes = LAYOUTS[name]
    write(tmp_path, copy)
    trust_small_copies(monkeypatch)
    monkeypatch.setattr(data, "find_spec", lambda _: name == "hta/svhn")
    monkeypatch.setitem(sys.modules, "scipy", types.SimpleNamespace(io=FakeScipy) if name == "hta/svhn" else None)
    monkeypatch.setitem(sys.modules, "scipy.io", FakeScipy if name == "hta/svhn" else None)
    splits = data.load(data.find(name), tmp_path)
    assert tuple(map(len, splits[:3])) == sizes
    for part in filter(None, splits[:3]):
        labels = {label for _, label in part}
        assert labels <= set(range(len(splits.classes))) and len(labels) >= 2
        assert all(data.open_picture(picture).mode == "RGB" for picture, _ in part)
    paths = [picture for part in splits[:3] for picture, _ in part if isinstance(picture, Path)]
    assert len(set(paths)) == len(paths)
    if name in JSON_SETS:  # their class ids, in order, became labels from 0; a file's name ends with its class
        assert all(label == int(path.stem[-1]) for part in splits[:3] for path, label in part)
        ids = [f"class {class_id}" for class_id in JSON_SETS[name][-1]]
        assert splits.classes == (ids if name in ("flowers", "cars") else ["a", "b"]) and "json" in splits.origin
        assert name == "cars" or data.load(data.find(f"hta/{name}"), tmp_path) == splits


@pytest.mark.parametrize("name", ["vtab/clevr_count", "hta/cifar100"])
def test_pictures_are_trained_on_as_files_and_as_arrays(run, monkeypatch, capsys, name):
    copy, sizes = LAYOUTS[name]
    write(Path("root"), copy)
    trust_small_copies(monkeypatch)
    out = run("--data", name, "--root", "root", "--epochs", 2)
    assert "{} training, {} validation, {} test pictures".format(*sizes) in capsys.readouterr().out
    assert 0 <= result(out)["accuracy"] <= 100 and (result(out)["val_accuracy"] is None) == name.startswith("vtab")
    assert result(out)["best_epoch"] == 2 or not name.startswith("vtab")  # whose last epoch is tested
    train.main(["--eval", str(out / "best.pt"), "--cpu"])  # a run remembers where its data was
    assert f"test {result(out)['accuracy']:.2f} %" in capsys.readouterr().out


def test_svhn_says_that_it_needs_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda _: None)
    with pytest.raises(data.DataError, match="hta/svhn .*pip install scipy"):
        data.load(data.find("hta/svhn"), tmp_path)


@pytest.mark.parametrize("name", ["nabirds", "cars"])
def test_pictures_without_a_direct_link_say_where_they_are_and_where_to_put_them(tmp_path, name):
    folder, pictures, *_ = JSON_SETS[name]
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / folder / pictures} .*{data.find(name).source}"):
        data.load(data.find(name), tmp_path)


@pytest.fixture
def cub_server(server, tmp_path, monkeypatch):
    """A server of a small CUB-200-2011, to which the table points: its true layout, with the right checksums."""
    write(tmp_path / "packed", json_set("cub") | {"CUB_200_2011/images.txt": "", "attributes.txt": ""})
    (server.folder / "cub").mkdir()
    for split in ("train", "val", "test"):
        shutil.move(tmp_path / "packed" / "CUB_200_2011" / f"{split}.json", server.folder / "cub")
    archive = Path(shutil.make_archive(server.folder / "CUB_200_2011", "gztar", tmp_path / "packed"))
    archive.rename(server.folder / "CUB_200_2011.tgz")

    def md5(path):
        return hashlib.md5((server.folder / path).read_bytes()).hexdigest()

    row = data.TABLE["cub"]
    monkeypatch.setitem(data.FGVC_MD5, "cub", " ".join(md5(f"cub/{split}.json") for split in ("train", "val", "test")))
    load = functools.partial(row.load, archive_md5=md5("CUB_200_2011.tgz"))
    monkeypatch.setitem(data.TABLE, "cub", dataclasses.replace(row, source=f"{server.url}/CUB_200_2011.tgz", load=load))
    monkeypatch.setattr(data, "FGVC_SPLITS", server.url)
    return server


def test_cub_goes_from_nothing_to_its_test_accuracy(cub_server, run, capsys):
    out = run("--data", "cub", "--root", "root")
    assert "16 training, 4 validation, 8 test pictures of 2 classes (VPT's" in capsys.readouterr().out
    assert 0 <= result(out)["accuracy"] <= 100 and os.listdir("root") == ["CUB_200_2011"]
    assert sorted(os.listdir("root/CUB_200_2011")) == ["images", "test.json", "train.json", "val.json"]
    cub_server.asked.clear()
    run("--data", "cub", "--root", "root", out="again")
    assert cub_server.asked == []


@pytest.mark.parametrize("file", ["CUB_200_2011.tgz", "cub/val.json"])
@pytest.mark.parametrize("failure", ["breaks off", "wrong checksum", "404", "gone"])
def test_a_download_that_fails_leaves_nothing_and_the_next_one_succeeds(cub_server, tmp_path, monkeypatch, file, failure):
    path, root = cub_server.folder / file, tmp_path / "root"
    whole = path.read_bytes()
    if failure == "breaks off":
        cub_server.cut.add(f"/{file}")
    elif failure == "wrong checksum":
        path.write_bytes(whole[:-2] + b"\n}")
    elif failure == "404":
        path.unlink()
    with monkeypatch.context() as patch:
        if failure == "gone":
            patch.setattr(data, "FGVC_SPLITS", "http://127.0.0.1:9")
            patch.setitem(data.TABLE, "cub", dataclasses.replace(data.TABLE["cub"], source="http://127.0.0.1:9/gone.tgz"))
        with pytest.raises(FileNotFoundError, match="cannot be downloaded .* and put it there"):
            data.load(data.find("cub"), root)
    left = [path for path in root.rglob("*") if path.suffix not in ("", ".jpg")]
    assert [path.name for path in left] == (["train.json"] if "json" in file and failure != "gone" else [])
    cub_server.cut.clear()
    path.write_bytes(whole)
    assert len(data.load(data.find("cub"), root).test) == 8


def test_an_interrupted_download_leaves_nothing(tmp_path):
    def interrupted(folder):
        (Path(folder) / "CUB_200_2011.tgz").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.fetch(tmp_path / "CUB_200_2011" / "images", "source", interrupted)
    assert list((tmp_path / "CUB_200_2011").iterdir()) == []


def test_the_table_has_the_papers_settings():
    exceptions = {
        "cub": (16, 0.1), "nabirds": (32, 0.1), "flowers": (8, 0.1), "dogs": (32, 0.1), "cars": (64, 1.5),
        "vtab/svhn": (16, 0.5), "vtab/resisc45": (16, 0.5), "vtab/dsprites_ori": (16, 0.1), "vtab/smallnorb_ele": (32, 0.5),
    }  # fmt: skip
    groups = {"fgvc": None, "vtab/natural": (8, 0.1), "vtab/specialized": (16, 1.5), "vtab/structured": (32, 1.5),
              "hta": (64, 0.1)}  # fmt: skip
    for group, usual in groups.items():
        for name in data.members(group):
            row, one = data.TABLE[name], train.complete_settings({"data": name, "method": "sa2vp"})
            assert (row.inner_dim, row.scale) == exceptions.get(name, usual), name
            assert row.batch_size == (40 if group in ("vtab/specialized", "vtab/structured") else 64)
            assert one["lr"] == (5e-4 if name in ("vtab/oxford_iiit_pet", "vtab/clevr_count") else 1e-3)
            assert one["fusion_layers"] == ((4,) if name == "cars" else None)
            assert (one["epochs"], one["warmup_epochs"], one["weight_decay"], one["dropout"]) == (100, 10, 1e-4, 0.1)
            assert (one["window"], one["seed"], row.image_size) == (3, 42, 224)
            assert (row.crop, row.vtab) == (group == "fgvc", group.startswith("vtab"))
    classes = "200 555 102 120 196  102 100 47 102 37 10 397  2 10 45 5  8 6 6 4 16 16 18 9  200 555 102 120 10 100 47 101 43 10"
    assert [row.classes for row in data.ROWS[:34]] == list(map(int, classes.split())) and len(data.members("vtab")) == 19


def test_vtab_is_searched_on_train800_and_val200_without_test_data(run, command):
    write(Path("root"), vtab_set())
    lists, flags = Path("root/vtab-1k/clevr_count"), ["--data", "vtab/clevr_count", "--root", "root", "--lr", 1e-3, 1e-2]
    assert list(map(len, data.load(data.find("vtab/clevr_count"), "root", tune=True)[:3])) == [16, 4, 0]
    (lists / "val200.txt").rename("hidden.txt")
    assert fail(command(*flags, "--out", "unsearched")) == 2  # a search that could not run chooses and tests nothing
    assert not list(Path("unsearched").rglob("*.pt"))
    Path("hidden.txt").rename(lists / "val200.txt")
    (lists / "test.txt").rename("hidden.txt")
    assert fail(command(*flags, "--out", "run")) == 2  # only the run that comes after the search misses it
    rows = table(Path("run/results.csv"))
    assert all(row["val_accuracy"] for row in rows) and not any(row["accuracy"] for row in rows)
    Path("hidden.txt").rename(lists / "test.txt")
    rows = table(run(*flags) / "results.csv")
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert [bool(row["accuracy"]) for row in rows] == [row is best for row in rows]
    assert checkpoint(f"run/vtab-clevr_count-sa2vp-lr{best['lr']}/last.pt")["settings"]["tune"] is False


def test_the_split_is_always_the_same_and_holds_out_a_tenth_or_a_fifth(tmp_path):
    def load(**counts):
        folder = make_folder(tmp_path / str(counts), counts)
        return data.load(data.find(str(folder)), tmp_path)

    splits = load(train=20, test=3)
    assert list(map(len, splits[:3])) == [36, 4, 6] and splits.classes == ["ant", "bee"]
    assert [label for _, label in splits.val] == [0, 0, 1, 1] and not set(splits.train) & set(splits.val)
    np.random.seed(1), torch.manual_seed(1)
    assert splits == load(train=20, test=3)
    assert list(map(len, load(train=20, val=5, test=3)[:3])) == [40, 10, 6]
    assert data.hold_out([("a", 0), ("b", 1), ("c", 1)], 0.1)[0][0] == ("a", 0)  # a class of one stays in train


def test_a_listed_picture_that_is_missing_or_a_damaged_list_is_named(tmp_path):
    write(tmp_path, json_set("cub"))
    (tmp_path / "CUB_200_2011/images/a/train00.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="train00.jpg, which is not there"):
        data.load(data.find("cub"), tmp_path)
    (tmp_path / "CUB_200_2011/val.json").write_text("{")
    with pytest.raises(data.DataError, match="lists of cub cannot"):
        data.load(data.find("cub"), tmp_path)


@pytest.mark.parametrize("name", ["shapes", "shapes-source"])
def test_drawn_pictures_are_always_the_same_and_balanced(name):
    row = data.TABLE[name]
    splits, again = (row.load(row, None, False, counts=(48, 24, 24)) for _ in range(2))
    for ours, theirs in zip(splits[:3], again[:3]):
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(ours, theirs))
        assert len(set(np.bincount([label for _, label in ours], minlength=len(splits.classes)))) == 1
    assert not any(np.array_equal(splits.train[0][0], picture) for picture, _ in splits.test)


def test_the_target_task_of_the_drawn_pictures_is_the_direction_from_red_to_blue():
    def centre(picture, channel):
        hue = picture.astype(int)
        ys, xs = np.nonzero(hue[..., channel] - np.delete(hue, channel, axis=2).max(axis=2) > 100)
        return np.array([xs.mean(), ys.mean()])

    rng = np.random.default_rng(5)
    for label in list(range(8)) * 10:
        picture = data.where_is_blue(rng, label)
        dx, dy = centre(picture, 2) - centre(picture, 0)
        angle = math.radians(45 * label)
        assert math.cos(angle) * dx + math.sin(angle) * dy > 0.85 * math.hypot(dx, dy), data.DIRECTIONS[label]


def test_transforms_are_the_papers():
    """On a picture whose red is x and whose green is y, 0 to 255, side, offset and mirroring can be read off."""
    y, x = np.mgrid[0:400, 0:800]
    picture = Image.fromarray(np.stack([x * 255 / 799, y * 255 / 399, 0 * x], axis=-1).round().astype(np.uint8))
    half = dict(image_size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)

    def span(image):  # (left, top, right, bottom) in pixels of the picture
        red, green = ((image[channel] + 1) / 2 for channel in (0, 1))
        return [scale * edge.item() for i in (0, -1) for scale, edge in ((800, red[0, i]), (400, green[i, 0]))]

    for training in (False, True):  # squeezed, always the same
        assert span(data.transform(False, **half, training=training)(picture)) == pytest.approx([0, 0, 800, 400], abs=6)
    # 400 pixels become 256, of which 224 are 350
    assert span(data.transform(True, **half)(picture)) == pytest.approx([225, 25, 575, 375], abs=6)

    torch.manual_seed(0)
    mirrored, offsets = 0, set()
    for _ in range(40):
        left, top, right, bottom = span(data.transform(True, **half, training=True)(picture))
        mirrored += left > right
        offsets.add((round(min(left, right)), round(top)))
        assert abs(right - left) == pytest.approx(350, abs=6) and bottom - top == pytest.approx(350, abs=6)
    assert 8 < mirrored < 32 and len(offsets) > 30


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg")])
def test_pictures_of_every_kind_become_rgb(tmp_path, mode, suffix):
    Image.new("RGB", (9, 7), (200, 200, 200)).convert(mode).save(tmp_path / f"picture.{suffix}")
    picture = data.open_picture(tmp_path / f"picture.{suffix}")
    assert picture.mode == "RGB" and picture.size == (9, 7) and abs(picture.getpixel((4, 3))[0] - 200) < 6


def test_a_picture_of_16_bits_keeps_its_brightness_and_one_that_was_turned_stands_upright(tmp_path):
    Image.fromarray(np.full((7, 9), 30_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert data.open_picture(tmp_path / "deep.png").getpixel((4, 3)) == (116, 116, 116)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    Image.new("RGB", (9, 7)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.open_picture(tmp_path / "turned.jpg").size == (7, 9)


# ---------------------------------------------------------------------- several runs


def test_runs_are_the_combinations_of_what_was_given():
    assert list(train.list_combinations({"data": ["cub"]})) == [("cub", "sa2vp")]
    names = [name for name, _ in train.list_combinations({"data": ["fgvc", "vtab/dmlab"]})]
    assert names == [*data.GROUPS["fgvc"], "vtab/dmlab"]
    given = {"data": ["cub"], "method": ["linear", "sa2vp"], "lr": [1e-3, 5e-3], "scale": [0.1, 0.5], "seed": [7, 8]}
    found = train.list_combinations(given)
    pairs = {method: [(choice["lr"], choice.get("scale")) for choice in choices] for (_, method), choices in found.items()}
    assert pairs["linear"] == [(1e-3, None), (5e-3, None)]
    assert pairs["sa2vp"] == [(1e-3, 0.1), (1e-3, 0.5), (5e-3, 0.1), (5e-3, 0.5)]
    assert all(choice["seed"] == 7 for choices in found.values() for choice in choices)  # a search is made with the first


def test_settings_come_from_what_was_given_then_the_data_set_then_the_method():
    one = train.complete_settings({"data": "cars", "method": "sa2vp", "dropout": 0.0})
    assert (one["inner_dim"], one["scale"], one["window"], one["dropout"], one["lr"]) == (64, 1.5, 3, 0.0, 1e-3)
    assert one["fusion_layers"] == (4,)
    shapes = train.complete_settings({"data": "shapes", "method": "vpt"})
    assert shapes["image_size"] == 48 and shapes["prompts"] == 50 and "window" not in shapes


def test_an_ablation_changes_just_what_it_names():
    found = train.list_combinations({"data": ["cub"], "scale": [0.5], "lr": [0.02]}, ablate=True)
    full = found["cub", "full-method"][0]
    expected = {
        "full-method": {}, "linear-probe": {"method": "linear"}, "no-prompts": {"method": "adapter"},
        "window-none": {"window": None}, "window-1": {"window": 1}, "window-5": {"window": 5},
        "no-distillation": {"distill_layers": (), "fusion_layers": ()}, "no-fusion": {"fusion_layers": ()},
        "half-size-map": {"prompt_grid": "half"},
    }  # fmt: skip
    assert [variant for _, variant in found] == list(expected) and full["scale"] == 0.5
    for (_, variant), (choice,) in found.items():
        differences = {name: value for name, value in choice.items() if full[name] != value}
        assert differences == expected[variant] and choice["lr"] == 0.02


@pytest.fixture
def small_group(command, monkeypatch):
    """Flags for three small data sets, as the group trio, whose first part is a group too."""
    write(Path("root"), json_set("cub") | json_set("nabirds") | vtab_set("dsprites_loc"))
    monkeypatch.setitem(data.GROUPS, "pair", ["cub", "nabirds"])
    monkeypatch.setitem(data.GROUPS, "trio", ["pair", "vtab/dsprites_loc"])
    monkeypatch.setitem(data.PUBLISHED["sa2vp"], "trio", 90.0)
    return ["--data", "trio", "--root", "root"]


def test_several_runs_end_with_one_table_also_after_an_interruption(run, command, small_group, monkeypatch, capsys):
    flags = [*small_group, "--seed", 0, 1]
    whole = run(*flags, out="whole")
    printed = capsys.readouterr().out.split("data   ")[-1]
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 5)
        assert fail(command(*flags, "--out", "broken")) == 130
    first = Path("broken/cub-sa2vp-seed0/best.pt")
    before = first.stat().st_mtime_ns
    run(*flags, out="broken")
    assert first.stat().st_mtime_ns == before and capsys.readouterr().out.split("data   ")[-1] == printed
    assert Path("broken/results.csv").read_text() == (whole / "results.csv").read_text()

    rows = table(whole / "results.csv")
    assert list(rows[0]) == ["data", "method", "val_accuracy", "accuracy", "std", "published", "trainable"]
    assert [row["data"] for row in rows] == ["cub", "nabirds", "vtab/dsprites_loc", "pair", "trio"]
    cub, nabirds, dsprites, pair, trio = (float(row["accuracy"]) for row in rows)
    assert pair == pytest.approx((cub + nabirds) / 2)
    assert trio == pytest.approx((dsprites + pair) / 2)  # of its parts, not of its members
    assert [row["published"] for row in rows] == ["", "", "", "", "90.0"] and rows[0]["std"]
    assert cub == np.mean([result(whole / f"cub-sa2vp-seed{seed}")["accuracy"] for seed in (0, 1)])


def test_a_group_has_a_mean_only_if_every_member_has_every_seed(monkeypatch):
    monkeypatch.setattr(data, "GROUPS", {"pair": ["a", "b"]})
    for b, mean in ((40.0, 50.0), (None, None)):
        (row,) = train.group_rows({("a", "sa2vp"): 60.0, ("b", "sa2vp"): b}, "method")
        assert (row["data"], row["method"], row["accuracy"]) == ("pair", "sa2vp", mean)
    assert train.group_rows({("a", "sa2vp"): 60.0}, "method") == []


def test_a_search_reads_test_data_once_for_each_seed_of_the_chosen_combination(run, monkeypatch):
    calls, accuracies = [], {(1e-3, 0.1): 40.0, (1e-3, 0.5): 60.0, (1e-2, 0.1): 60.0, (1e-2, 0.5): 10.0}

    def pretended(settings, out, machine, state, test):
        key = settings["lr"], settings.get("scale", 0.1)
        calls.append((settings["method"], *key, settings["seed"], test))
        return {"val_accuracy": accuracies[key], "accuracy": 70.0 + settings["seed"] if test else None,
                "prompt_accuracy": None, "trainable": 5, "best_epoch": 1, "seconds": 0}  # fmt: skip

    monkeypatch.setattr(train, "fit", pretended)
    run("--method", "sa2vp", "linear", "--lr", 1e-3, 1e-2, "--scale", 0.1, 0.5, "--seed", 3, 4)
    search = [("sa2vp", lr, scale, 3, False) for lr, scale in accuracies]
    chosen = [("sa2vp", 1e-3, 0.5, seed, True) for seed in (3, 4)]  # the first of equals
    probe = [("linear", lr, 0.1, 3, False) for lr in (1e-3, 1e-2)] + [("linear", 1e-2, 0.1, seed, True) for seed in (3, 4)]
    assert calls == search + chosen + probe
    lines = Path("run/results.csv").read_text().splitlines()
    assert lines[:3] == [
        "data,method,lr,scale,val_accuracy,accuracy,std,published,trainable",
        "insects,sa2vp,0.001,0.1,40.0,,,,5",
        f"insects,sa2vp,0.001,0.5,60.0,73.5,{math.sqrt(0.5)},,5",
    ]
    assert [line.split(",")[2:6] for line in lines[5:]] == [["0.001", "", "40.0", ""], ["0.01", "", "60.0", "73.5"]]


def test_the_chosen_run_of_a_search_is_tested_as_it_is(run):
    out = run("--method", "linear", "--lr", 1e-3, 1e-1, "--epochs", 2)
    untested = [result(path.parent)["accuracy"] is None for path in sorted(out.rglob("result.json"))]
    assert untested.count(True) == 1
    chosen = max(table(out / "results.csv"), key=lambda row: float(row["val_accuracy"]))
    alone = run("--method", "linear", "--lr", chosen["lr"], "--epochs", 2, out="alone")
    assert float(chosen["accuracy"]) == result(alone)["accuracy"]


def test_a_run_that_cannot_run_is_named_and_the_rest_still_runs(command, small_group, monkeypatch, capsys):
    Path("root/nabirds/images/a/test00.jpg").unlink()
    assert "nabirds-sa2vp could not run: nabirds lists the picture" in refusal(capsys, command(*small_group, "--out", "run"))
    assert [bool(row["accuracy"]) for row in table(Path("run/results.csv"))] == [True, False, True, False, False]
    monkeypatch.setattr(train, "ABLATIONS", {"full-method": {}, "impossible": {"fusion_layers": (1,)}})
    for flags in ([], ["--lr", 1e-2, 1e-3]):  # a search, of which no run could run, tests none
        error = fail(command("--ablate", *flags, "--out", f"ablation{len(flags)}")), capsys.readouterr().err
        assert error[0] == 2 and "could not run: F, [1], must be a subset" in error[1]
        rows = table(Path(f"ablation{len(flags)}/results.csv"))
        assert {row["variant"] for row in rows if row["accuracy"]} == {"full-method"}
        assert len(rows) == (4 if flags else 2)


def test_other_settings_have_another_folder_by_themselves():
    assert train.run_name({"data": ["cub"], "lr": [5e-3]}) == "cub-sa2vp-lr0.005"
    values = {"data": ["vtab/dmlab", "cub"], "method": ["vpt"], "seed": [0, 1], "weights": ["a/deit.pth"]}
    assert train.run_name(values) == "vtab-dmlab+cub-vpt-seed0+1-weightsa-deit.pth"
    values = {"distill_layers": [(0, 4)], "prompt_grid": [(7, 7), "half"], "window": [None]}
    assert train.run_name(values, "ablation") == "shapes-ablation-distill_layers0,4-prompt_grid7,7+half-windownone"


# ---------------------------------------------------------------------- with a tuned model


def test_a_tuned_model_is_loaded_for_prediction_and_a_wrong_backbone_refused(run):
    out = run("--window", "none", "--prompt-grid", "3x4")
    model, meta = sa2vp.load(out / "best.pt")
    assert meta["classes"] == ["ant", "bee"] and meta["input"]["image_size"] == (224, 224) and not model.training
    assert model.prompt_grid == (3, 4) and model(torch.randn(2, 3, 224, 224))[0].shape == (2, 2)
    torch.manual_seed(1)
    torch.save(vit.VisionTransformer(224, 32, 64, 5, 1).state_dict(), "other.pth")
    with pytest.raises(ValueError, match="another backbone"):
        sa2vp.load(out / "best.pt", weights="other.pth")


def test_a_checkpoint_that_lacks_something_is_refused_by_name(run, capsys):
    out = run()
    whole = checkpoint(out / "best.pt")
    for change in ({"settings": None}, {"trained": {}}, {"history": None}, {"settings": whole["settings"] | {"method": "x"}}):
        torch.save({name: value for name, value in (whole | change).items() if value is not None}, out / "damaged.pt")
        assert "damaged.pt" in refusal(capsys, ["--eval", out / "damaged.pt", "--cpu"])


def test_a_checkpoint_is_tested_with_the_transforms_it_was_trained_with(run, monkeypatch):
    out, asked, transform = run(), [], data.transform
    best = checkpoint(out / "best.pt")
    torch.save(best | {"input": best["input"] | {"crop": False}}, out / "squeezed.pt")
    monkeypatch.setattr(data, "transform", lambda crop, **rest: asked.append(crop) or transform(crop, **rest))
    for name in ("best.pt", "squeezed.pt"):
        train.main(["--eval", str(out / name), "--cpu", "--workers", "0"])
    assert asked == [True, False]


def test_predict_prints_the_likeliest_classes_of_pictures_and_folders(run, files, capsys):
    make_folder(Path("seven"), {"train": 3, "test": 1}, classes=list("abcdefg"))
    best, pictures = run("--data", "seven") / "best.pt", [files / "insects/test/bee/1.png", files / "insects/train"]
    model, meta = sa2vp.load(best)
    capsys.readouterr()
    train.main(["--predict", *map(str, [best, *pictures]), "--cpu"])
    expected = []
    for picture in (pictures[0], *sorted(pictures[1].rglob("*.png"))):
        image = data.transform(**meta["input"])(data.open_picture(picture))
        with torch.inference_mode():
            probabilities = model(image[None])[0][0].softmax(dim=0).tolist()
        right = sorted(zip(probabilities, meta["classes"]), reverse=True)[:5]
        expected += [str(picture), *(f"  {probability:7.2%}  {name}" for probability, name in right)]
    assert capsys.readouterr().out.splitlines() == expected


def test_predict_names_what_it_cannot_read_and_goes_on(run, files, capsys):
    out = run()
    write(Path(), {"damaged.jpg": b"\xff\xd8 no picture"})
    capsys.readouterr()
    assert fail(["--predict", out / "best.pt", "damaged.jpg", files / "insects/test/ant", "--cpu"]) == 2
    printed = capsys.readouterr()
    assert "damaged.jpg" in printed.err and len(printed.out.splitlines()) == 4 * 3  # there are just two classes
    Path("empty").mkdir()
    for picture in ("empty", "absent.jpg"):
        assert "there is no picture" in refusal(capsys, ["--predict", out / "best.pt", picture, "--cpu"])
    assert "checkpoint and then pictures" in refusal(capsys, ["--predict", out / "best.pt", "--cpu"])


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_show_writes_a_row_for_each_picture_and_something_in_each_column(run, files, method):
    out, columns = run("--method", method), 6 if method == "sa2vp" else 4
    best, bees = str(out / "best.pt"), str(files / "insects/test/bee")
    for job, rows in ((["--eval", best, "--show", "100"], 8), (["--predict", best, bees, "--show", "2"], 2)):
        train.main([*job, "--cpu"])
        with Image.open(out / "show.png") as page:
            assert page.width // train.TILE == columns and (page.height - train.TITLE) // train.TILE == rows
            for left in range(0, columns * train.TILE, train.TILE):
                for top, bottom in ((0, train.TITLE), (train.TITLE, page.height)):
                    assert len(page.crop((left, top, left + train.TILE, bottom)).getcolors(10**6)) > 1


def test_principal_components_of_the_prompt_map_become_colours():
    model, tokens = small_model(), 1e-5 * torch.randn(1, 13, 16, dtype=torch.double)
    tokens[0, 1:, 2] = torch.arange(12.0)
    model.prompt_map.forward = lambda: tokens
    red, green, blue = train.principal_colours(model).flatten(1)
    ramp = red if red[0] < 0.5 else red.flip(0)  # a component has no sign
    torch.testing.assert_close(ramp, torch.linspace(0, 1, 12, dtype=torch.double), rtol=0, atol=1e-3)
    assert max(green.max(), blue.max()) < 1e-3


def test_the_bench_measures_its_rows_beside_the_encoder(files, capsys, monkeypatch):
    some = ("train: frozen encoder", "train: SA2VP", "predict: frozen encoder", "predict: SA2VP")
    monkeypatch.setattr(train, "BENCH", {name: train.BENCH[name] for name in some})
    train.main(["--bench", "--weights", str(files / "vit.pth"), "--batch-size", "2", "--cpu"])
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.strip().splitlines()[3:]]
    assert [row[0] for row in rows] == list(some)
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows) and rows[0][2] == rows[2][2] == "1.00"


def test_the_default_run_pretrains_its_backbone_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("shapes", "shapes-source"):
        row = data.TABLE[name]
        load = functools.partial(row.load, counts=(64, 16, 16))
        monkeypatch.setitem(data.TABLE, name, dataclasses.replace(row, load=load))
    monkeypatch.setitem(train.PRETRAINING, "epochs", 2)
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 1)
        assert fail(["--cpu", "--epochs", "2"]) == 130
    train.main(["--cpu", "--epochs", "2"])
    assert "pre-training" in capsys.readouterr().out
    train.main(["--cpu", "--epochs", "2", "--method", "linear"])
    assert "pre-training" not in capsys.readouterr().out
    assert sorted(os.listdir("runs")) == ["shapes-linear-epochs2", "shapes-sa2vp-epochs2", "shapes-vit"]
    assert vit.load_vit("runs/shapes-vit/vit.pt", data.SIDE).normalize == "imagenet"
    assert "trained from scratch" in refusal(capsys, ["--eval", "runs/shapes-vit/best.pt", "--cpu"])


# ---------------------------------------------------------------------- the command line, files and words


def test_the_list_has_a_line_for_each_data_set_and_each_backbone(capsys):
    train.main(["--list"])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert lines == ["name", *data.TABLE, "weights", *vit.BACKBONES]


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--data nonsense", "cub, nabirds, flowers"),
        ("--data", "--data"),
        ("--epochs 3 --warmup-epochs 3", "above"),
        ("--batch-size 1000", "no batches of 1000"),
        ("--lr -1", "--lr"),
        ("--dropout 1", "--dropout"),
        ("--prompt-grid 0x7", "--prompt-grid"),
        ("--window 2", "odd and positive"),
        ("--method linear --window 3", "--window is no setting of linear"),
        ("--method magic", "invalid choice: 'magic'"),
        ("--image-size 100", "not a multiple of patch size"),
        ("--heads 3", "does not divide into 3 heads"),
        ("--gpu 99", "no GPU 99"),
        ("--weights absent.pth", "absent.pth"),
        ("--weights empty.pt", "empty.pt"),
        ("--nonsense", "--nonsense"),
        ("--show 3", "--show has no part in training"),
        ("--ablate --window 3", "--window has no part in --ablate"),
        ("--data lacking", "train/<class>/"),
        ("--data untested", "test/<class>/"),
        ("--data other", "'wasp'"),
    ],
)
def test_bad_settings_get_one_sentence_and_exit_code_2(command, capsys, flags, part):
    write(Path(), {"empty.pt": "", "lacking/a.txt": ""})
    make_folder(Path("untested"), {"train": 3})
    make_folder(Path("other"), {"train": 3, "test": 1})
    make_folder(Path("other"), {"test": 1}, classes=("wasp",))
    flags = command(*flags.split())
    assert part in refusal(capsys, [flag for flag in flags if flag != "--cpu"] if "--gpu" in flags else flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--eval absent.pt", "absent.pt"),
        ("--eval some.pt --show 0", "--show"),
        ("--eval some.pt --lr 1", "--lr has no part in --eval"),
        ("--eval some.pt --weights a b", "--weights takes one value here"),
        ("--list --lr 1", "--lr has no part in --list"),
        ("--bench --show 1", "--show has no part in --bench"),
        ("--predict absent.pt a.jpg --data cub", "--data has no part in --predict"),
        ("--predict absent.pt a.jpg --eval some.pt", "not allowed with"),
    ],
)
def test_bad_flags_of_other_jobs_get_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    write(Path(), {"empty.pt": ""})
    assert part in refusal(capsys, [*flags.split(), "--cpu"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named(command, capsys, workers):
    write(make_folder(Path("pictures")), {"train/bee/broken.jpg": b"\xff\xd8 this is no picture"})
    flags = ["--data", "pictures", "--batch-size", 11, "--workers", workers, "--epochs", 9]
    assert "broken.jpg" in refusal(capsys, command(*flags))


@pytest.mark.parametrize("name", ["state.pt", "result.json", "table.csv", "show.png"])
def test_a_file_is_there_whole_or_as_it_was(tmp_path, name):
    content = {".pt": torch.randn(99), ".json": {"a": 1}, ".csv": [{"a": 1}], ".png": Image.effect_noise((99, 99), 9)}
    path = tmp_path / name
    train.save(path, content[path.suffix])
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, limit[1]))  # as if the disk were full
    try:
        with pytest.raises(Exception):
            train.save(path, content[path.suffix])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before


README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_example_in_the_readme_prints_what_it_says(capsys):
    example, printed = re.search(r"```python\n(from sa2vp import aligned.*?)```\n+```\n(.*?)```", README, re.S).groups()
    exec(example, {})
    assert capsys.readouterr().out == printed


def test_every_line_that_the_readme_shows_for_an_equation_is_in_the_code():
    code = Path(vit.__file__).read_text() + Path(sa2vp.__file__).read_text()
    lines = re.findall(r"^\| (?:\(\d\))? ?\|.*\| `([^`]*)` \|$", README, re.MULTILINE)
    assert len(lines) == 9 and [line for line in lines if line not in code] == []


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert links and links <= anchors


@pytest.mark.parametrize("module", [vit, sa2vp, data, train], ids=lambda module: module.__name__)
def test_every_public_class_function_and_method_has_a_docstring(module):
    tree = ast.parse(Path(module.__file__).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for part in (tree, *classes) for node in part.body if isinstance(node, ast.FunctionDef)]
    # A forward without one is described by its class.
    public = [node for node in classes + functions if not node.name.startswith("_") and node.name != "forward"]
    assert len(public) > 10 and [node.name for node in public if not ast.get_docstring(node)] == []


# ---------------------------------------------------------------------- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS = [{}, {"prompt_grid": (7, 7)}, {"distill_layers": ()}, *({"method": name} for name in sa2vp.METHODS if name != "sa2vp")]


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_on_cuda_has_nearly_the_loss_of_float32_on_the_cpu(settings, tmp_path, options, compiled):
    one = settings(warmup_epochs=0, **options)
    if "dropout" in one:
        one["dropout"] = 0.0
    losses = []
    for machine in (CPU, train.choose_machine({"workers": 0} | ({"compile": True} if compiled else {}))):
        train.fit(one, tmp_path / str(machine.device), machine, {})
        losses.append(float(table(tmp_path / str(machine.device) / "metrics.csv")[0]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@needs_cuda
def test_a_run_on_cuda_goes_on_predicts_shows_and_is_measured(command, files, monkeypatch, capsys):
    flags = [flag for flag in command("--epochs", 3, "--gpu", 0, "--out", "run") if flag != "--cpu"]
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 1)
        assert fail(flags) == 130
    train.main(flags)
    assert [row["epoch"] for row in table(Path("run/metrics.csv"))] == ["1", "2", "3"]
    train.main(["--eval", "run/best.pt", "--show", "2", "--gpu", "0"])
    train.main(["--predict", "run/best.pt", str(files / "insects/test"), "--show", "2", "--gpu", "0"])
    assert Path("run/show.png").exists()
    monkeypatch.setattr(train, "BENCH", {name: train.BENCH[name] for name in ("train: frozen encoder", "train: SA2VP")})
    train.bench({"weights": files / "vit.pth"}, train.choose_machine({}), rounds=2)
    assert "MB" in capsys.readouterr().out

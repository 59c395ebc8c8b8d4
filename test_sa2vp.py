"""Each test's name is the claim that it proves. No network and no data: everything is made on the spot.

The equations come first, then baselines, the backbone's weights, training, data, several runs, use, the
command line and files. `literal` is the method token by token, as the equations have it.
"""

import argparse
import ast
import contextlib
import csv
import functools
import hashlib
import http.server
import io
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
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


def small_model(**options):
    model = sa2vp.SA2VP(small_vit((48, 64)), 3, 4, 0.5, **options)
    for parameter in sa2vp.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def small_images():
    return torch.randn(2, 3, 48, 64, dtype=torch.double)


def write(root, files):
    """{path: text, bytes, dict (as JSON) or None (a picture of noise)}: every file below root."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(root / path)
        else:
            content = json.dumps(content) if isinstance(content, dict) else content
            (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def images(*places, count=10):
    return {f"{place}/{i}.png": None for place in places for i in range(count)}


def make_folder(folder, splits={"train": 6, "test": 4}, classes=("ant", "bee")):
    for split, count in splits.items():
        write(folder, images(*(f"{split}/{name}" for name in classes), count=count))
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
        return list(map(str, [*flags, *missing, *(() if "--gpu" in flags else ("--cpu",))]))

    return command


@pytest.fixture
def run(command):
    """A function that runs such a command; returns the folder of its run, of several the folder of all."""

    def run(*flags, out="runs"):
        train.main(command(*flags, "--out", out))
        folders = [path for path in Path(out).iterdir() if path.is_dir()]
        return folders[0] if len(folders) == 1 else Path(out)

    return run


@pytest.fixture
def settings(files):
    """A function that gives the complete settings of a run on the small data."""
    own = {"data": str(files / "insects"), "weights": str(files / "vit.pth"), "epochs": 1, "batch_size": 4}
    return lambda **given: train.complete_settings({"method": "sa2vp"} | own | given)


def fail(arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, arguments)))
    return stop.value.code


def refusal(capsys, arguments):
    """The one sentence with which the command line refuses bad input."""
    capsys.readouterr()
    assert fail(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    if lines[0].startswith("usage:"):  # argparse's own message, below the usage
        lines = lines[-1:]
    assert len(lines) == 1, lines
    return lines[0]


def one(path, pattern):
    """The one path below `path` that matches."""
    (found,) = Path(path).glob(pattern)
    return found


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


def take(tensors, pattern):
    """Takes out the tensors with such a name."""
    return {name: tensors.pop(name) for name in list(tensors) if re.search(pattern, name)}


OFFICIAL_NAMES = {  # how the released code's names begin, and ours; # is the number of a layer
    "class_head.": "head.",
    "vit_base.transformer.embeddings.cls_token": "vit.cls_token",
    "vit_base.transformer.embeddings.position_embeddings": "vit.pos_embed",
    "vit_base.transformer.embeddings.patch_embeddings.": "vit.patch_embed.proj.",
    "vit_base.transformer.embeddings.ppt_proj.": "prompt_map.proj.",
    "vit_base.transformer.embeddings.ppt": "prompt_map.tokens",
    "vit_base.transformer.encoder.encoder_norm.": "vit.norm.",
    "vit_base.transformer.encoder.layer.#.attention_norm.": "vit.blocks.#.norm1.",
    "vit_base.transformer.encoder.layer.#.ffn_norm.": "vit.blocks.#.norm2.",
    "vit_base.transformer.encoder.layer.#.ffn.": "vit.blocks.#.mlp.",
    "vit_base.transformer.encoder.layer.#.attn.out.": "vit.blocks.#.attn.proj.",
    "vit_base.transformer.encoder.layer.#.attn.": "vit.blocks.#.attn.",
    "vit_base.transformer.encoder.cross_attn.#.ffn_norm.": "interactions.#.adapter.norm.",
    "vit_base.transformer.encoder.cross_attn.#.ffn.fc1.": "interactions.#.adapter.down.",
    "vit_base.transformer.encoder.cross_attn.#.ffn.fc2.": "interactions.#.adapter.up.",
    "vit_base.transformer.encoder.deep_proj.0.": "interactions.4.fusion.prompt_map.proj.",
    "vit_base.transformer.encoder.deep_proj.1.": "interactions.8.fusion.prompt_map.proj.",
    "vit_base.transformer.encoder.deep_ppt.0": "interactions.4.fusion.prompt_map.tokens",  # of a stack
    "vit_base.transformer.encoder.deep_ppt.1": "interactions.8.fusion.prompt_map.tokens",
    "vit_base.transformer.encoder.cross_conv.0": "interactions.4.fusion.gate",  # of a stack
    "vit_base.transformer.encoder.cross_conv.1": "interactions.8.fusion.gate",
}
COPIES = {"cross_attn": "layer", "to_q": "query", "to_k": "key", "to_v": "value", "to_out": "out"}  # of layer's weights


def rename_official(tensors, back=False):
    """The tensors with our names in place of the released code's, or the other way round."""
    pairs = [reversed(pair) if back else pair for pair in OFFICIAL_NAMES.items()]
    return vit.rename(tensors, {"^" + old.replace("#", r"(\d+)"): new.replace("#", r"\1") for old, new in pairs})


def split_qkv(tensors):
    """Puts attn.query, attn.key and attn.value in place of each attn.qkv."""
    for name, tensor in take(tensors, "qkv").items():
        for kind, part in zip(("query", "key", "value"), tensor.chunk(3)):
            tensors[name.replace("qkv", kind)] = part
    return tensors


def official_checkpoint(model):
    """A checkpoint in the layout of the authors' released code, of a model as large as this one."""
    tensors = rename_official(split_qkv(model.state_dict()), back=True)
    for name, shape in (("deep_ppt", model.prompt_map.tokens.shape), ("cross_conv", [model.vit.dim])):
        take(tensors, name)
        tensors[f"vit_base.transformer.encoder.{name}"] = torch.empty(2, *shape)
    for name, tensor in tensors.items():
        mean, std = (1.0, 0.05) if name.endswith("norm.weight") else (0.0, 0.2 if name.endswith("ppt") else 0.03)
        tensors[name] = draw(name, tensor.shape, mean, std)
    own = take(dict(tensors), r"layer\.\d+\.att")
    return tensors | vit.rename(own, {ours: theirs for theirs, ours in COPIES.items()})


def load_official(path, scale=0.1, heads=None):
    """A checkpoint of the authors' released code as an SA2VP. `scale` and `heads` are not in the file.

    With one new prompt map in place of two (cars) it enters at layer 4. ValueError names a tensor that does not fit.
    """
    tensors = vit.rename(vit.flatten(vit.read_file(path)), {r"^model\.": ""})
    for name, tensor in vit.rename(take(tensors, r"cross_attn\.\d+\.att"), COPIES).items():
        if not torch.equal(tensor, tensors[name]):
            raise ValueError(f"cross_attn has no copy of {name}")
    for name, stack in take(tensors, "deep_ppt|cross_conv").items():
        tensors |= {f"{name}.{i}": torch.atleast_2d(part) for i, part in enumerate(stack)}
    tensors = rename_official(tensors)
    fusion_layers = [i for i in (4, 8) if f"interactions.{i}.fusion.prompt_map.tokens" in tensors]
    if fusion_layers == [4]:
        take(tensors, r"interactions\.8\.fusion")  # the second projection is there, and nothing uses it
    own = vit.to_timm(vit.rename(take(tensors, r"^vit\."), {r"^vit\.": ""}))
    dim, _, patch_size, _ = own["patch_embed.proj.weight"].shape
    image_size = patch_size * math.isqrt(own["pos_embed"].size(1) - 1)
    backbone = vit.vit_from_tensors(own, heads or dim // 64, image_size)
    inner_dim = tensors["prompt_map.tokens"].size(-1)
    model = sa2vp.SA2VP(backbone, len(tensors["head.bias"]), inner_dim, scale, fusion_layers=fusion_layers)
    sa2vp.load_trained(model, tensors)
    return model.eval()


# What the authors' released code (its exact, per-token variant) computed for that checkpoint in float32.
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


def test_equals_the_released_code_forward_and_backward(tmp_path):
    state = official_checkpoint(sa2vp.SA2VP(vit.VisionTransformer(), 200))
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, tmp_path / "official.pth")
    model = load_official(tmp_path / "official.pth")
    logits = model(draw("images", (2, 3, 224, 224), std=1.0))
    loss = sa2vp.two_pathway_loss(logits, torch.tensor([3, 7]))
    loss.backward()
    trained = sa2vp.trained_parameters(model)
    found, tolerance = torch.stack(logits)[..., :4], 1e-5 * logits[0].abs().max().item()
    torch.testing.assert_close(found, torch.tensor(GOLDEN_LOGITS), rtol=0, atol=tolerance)
    assert loss.item() == pytest.approx(GOLDEN_LOSS, rel=1e-5)
    for name, golden in GOLDEN_SQUARED_GRADIENTS.items():
        square = trained[name].grad.double().square().sum().item()
        assert square == pytest.approx(golden, rel=2e-5), name  # a square: twice 1e-5


def test_an_official_checkpoint_may_have_one_new_prompt_map_in_layer_4_and_what_is_amiss_is_named(tmp_path):
    path, encoder = tmp_path / "official.pth", "vit_base.transformer.encoder."
    official = official_checkpoint(sa2vp.SA2VP(small_vit(8, 4, 64, 12, 1), 3))
    torch.save(official | {f"{encoder}deep_ppt": torch.zeros(1, 1, 5, 16)}, path)
    model = load_official(path, scale=1.5)
    assert [bool(interaction.fusion) for interaction in model.interactions] == [i == 4 for i in range(12)]
    assert model.interactions[0].scale == 1.5
    torch.save(official | {f"{encoder}cross_attn.1.attn.to_q.weight": torch.zeros(64, 64)}, path)
    with pytest.raises(ValueError, match="no copy of .*layer.1.attn.query.weight"):
        load_official(path)


def gradients(model, logits):
    """Those of the loss, by name, for two images of the classes 0 and 2."""
    trained, loss = sa2vp.trained_parameters(model), sa2vp.two_pathway_loss(logits, torch.tensor([0, 2]))
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)))


def literal(model, image, window, distill_layers, fusion_layers, scale=0.5):
    """Equations (1) to (7) for one image, token by token and head by head: (base, prompt) class tokens."""
    backbone = model.vit
    heads = backbone.blocks[0].attn.heads

    def neighbours(t, grid, other):
        (h, w), (h2, w2) = grid, other
        if t == 0 or window is None:
            return list(range(1 + h2 * w2))
        y, x = divmod(t - 1, w)

        def near(place, n, place2, n2):  # distance of the centres, against half a window of the larger cells
            distance = abs((place + 0.5) / n - (place2 + 0.5) / n2)
            return distance < window / 2 * max(1 / n, 1 / n2) - 1e-9

        return [1 + y2 * w2 + x2 for y2 in range(h2) for x2 in range(w2) if near(y, h, y2, h2) and near(x, w, x2, w2)]

    def message(i, x, y, grid, other):
        block = backbone.blocks[i]
        q, _, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
        _, k, v = block.attn.qkv(block.norm1(y)).chunk(3, dim=1)
        heard = []
        for t in range(len(x)):
            o, us = [], neighbours(t, grid, other)
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
        next_base, next_prompt = block(base[None])[0], block(prompt[None])[0]
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
    images = small_images()  # a grid of 3 x 4
    pairs = [literal(model, image, window, distill, fusion) for image in images]
    ours, expected = list(model(images)), [torch.stack(logits) for logits in zip(*pairs)]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(model, ours), gradients(model, expected), rtol=1e-7, atol=1e-9)


def test_trained_parameters_are_as_many_as_the_paper_says():
    backbone = vit.VisionTransformer()
    for count, method, options in (
        (85_798_656, "full", {}),  # the others freeze the backbone
        (372_912, "sa2vp", {"inner_dim": 16}),
        (365_856, "sa2vp", {"inner_dim": 16, "prompt_grid": (7, 7)}),
        (1_333_888, "sa2vp", {"inner_dim": 64, "fusion_layers": (4,)}),  # cars
        (322_752, "adapter", {"inner_dim": 16}),
        (460_800, "vpt", {}),
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
    model, seen, used = small_model(dropout=0.5).train(), [], []
    (drop,) = (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    drop.register_forward_hook(lambda *_: used.append(drop.p))
    model.interactions[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1:]))
    model(small_images())
    assert used == [0.5] * (2 + 11 * 2 + 5 + 5 * 2)  # B_0 and P_0; each MLP, in 5 + 5 + 1 layers; C_i; A_i
    for tokens in seen:  # B_0 and P_0
        assert 0.3 < (tokens == 0).double().mean() < 0.7


@pytest.mark.parametrize("method", ["sa2vp", "vpt", "adapter", "linear"])
def test_with_frozen_weights_in_bfloat16_residual_streams_and_logits_are_float32(method):
    model = sa2vp.build(small_vit(), 3, {"method": method, "dropout": 0.0})
    images, found = torch.randn(2, 3, 32, 32), set()
    expected = gradients(model, model(images))
    for module in model.vit.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.bfloat16()
        elif isinstance(module, torch.nn.LayerNorm):  # what it is given is a residual stream
            module.register_forward_pre_hook(lambda _, inputs: found.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert found | {scores.dtype for scores in logits} == {torch.float32}
    for name, ours in gradients(model, logits).items():
        assert ours.dtype == torch.float32 and (ours - expected[name]).norm() < 0.1 * expected[name].norm()


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


# ---------------------------------------------------------------------- baselines and looking inside


def test_vpt_prompts_are_drawn_as_vpt_draws_them_and_take_part_in_every_layer():
    model = sa2vp.VPTDeep(small_vit(), 3, prompts=20)
    bound = math.sqrt(6 / (3 * 16 * 16 + 16))
    assert 0.95 * bound < model.prompts.abs().max() <= bound
    (logits,) = model(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert model.prompts.grad.abs().sum(dim=(1, 2)).all()


def test_adapter_tuning_adds_the_adapters_message_to_every_layer_and_its_loss_is_plain_cross_entropy():
    model, images = sa2vp.AdapterTuning(small_vit(), 3, 4, scale=0.5).eval(), torch.randn(2, 3, 32, 32)
    x = model.vit.embed(images)
    for block, adapter in zip(model.vit.blocks, model.adapters):
        assert adapter.drop.p == 0.1
        x = block(x) + 0.5 * adapter(x)
    logits, labels, expected = model(images), torch.tensor([0, 2]), model.head(model.vit.norm(x[:, 0]))
    torch.testing.assert_close(logits[0], expected)
    assert sa2vp.two_pathway_loss(logits, labels) == F.cross_entropy(logits[0], labels)


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_a_model_is_exported_for_batches_of_any_size(method):
    model = sa2vp.build(small_vit(), 3, {"method": method}).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=dynamic).module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(exported(images), model(images))


@torch.inference_mode()
def test_the_attention_that_is_shown_is_the_base_pathways_in_the_last_layer():
    model, images, seen = small_model(), small_images(), []
    last = model.vit.blocks[-1]
    reference = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.double)
    reference.in_proj_weight, reference.in_proj_bias = last.attn.qkv.weight, last.attn.qkv.bias
    for network, layer, base in ((model, model.interactions[-1], 1), (model.vit, last, 0)):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[base]))
        shown = sa2vp.class_attention(network, images)
        x = last.norm1(seen.pop())
        torch.testing.assert_close(shown, reference(x, x, x)[1][:, 0, 1:].view(2, 3, 4))


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
    theirs = torchvision.models.VisionTransformer(64, 16, 3, 2, 128, 256)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = vit.load_vit(tmp_path / "vit.pth", 64)
    theirs.heads, images = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


GOOGLE = {  # timm's names -> Google's, by the layout its documentation gives
    r"cls_token": "cls",
    r"pos_embed": "Transformer/posembed_input/pos_embedding",
    r"patch_embed\.proj\.": "embedding/",
    r"(norm.?\.)weight": r"\1scale",
    r"^norm\.": "Transformer/encoder_norm/",
    r"blocks\.(\d+)\.": r"Transformer/encoderblock_\1/",
    r"norm1\.": "LayerNorm_0/",
    r"norm2\.": "LayerNorm_2/",
    r"mlp\.fc1\.": "MlpBlock_3/Dense_0/",
    r"mlp\.fc2\.": "MlpBlock_3/Dense_1/",
    r"attn\.proj\.": "MultiHeadDotProductAttention_1/out/",
    r"attn\.(\w+)\.": r"MultiHeadDotProductAttention_1/\1/",
    r"weight": "kernel",
}


def google(tensors):
    """The content of Google's .npz: inputs come first, heads have a dimension of their own."""
    arrays, file = {"pre_logits/bias": np.zeros(9)}, io.BytesIO()
    for name, tensor in vit.rename(split_qkv(dict(tensors)), GOOGLE).items():
        if re.search("query|key|value", name):
            tensor = tensor.unflatten(0, (2, -1))
        if name.endswith("kernel"):
            tensor = tensor.permute(2, 3, 1, 0) if name == "embedding/kernel" else tensor.movedim(-1, 0)
        arrays[name] = tensor.unflatten(0, (2, -1)) if name.endswith("out/kernel") else tensor
    np.savez(file, **arrays)
    return file.getvalue()


def safetensors(tensors, code="F32", dtype=torch.float32):
    """The content of a .safetensors file."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        start, blob = len(blob), blob + tensor.to(dtype).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, len(blob)]}
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
    return lambda state: vit.rename(split_qkv(dict(state)), table | names) | {
        "pooler.dense.bias": torch.ones(16), "embeddings.mask_token": torch.ones(1, 16)}  # fmt: skip


DENSE = {r"attention\.(query|key|value)": r"attention.attention.\1", r"attention\.proj": "attention.output.dense"}
SHORT = {f"attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
NORMS = {r"norm1\.": "layernorm_before.", r"norm2\.": "layernorm_after."}
STEMS = {  # how files of the same backbone are named, and what they are
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
    "transformers": lambda state: pytorch("vit.", **{"classifier.weight": torch.ones(2)})(hugging_face(
        "encoder.layer.", DENSE | NORMS | {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"})(state)),
    "transformers 5": hugging_face("layers.", SHORT | NORMS | {r"attention\.proj": "attention.o_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEMS)
def test_a_backbone_is_found_in_every_kind_of_file_under_every_publishers_names_behind_any_others(tmp_path, kind):
    state, path = small_vit().bfloat16().float().state_dict(), tmp_path / "2fb4"  # its first bytes tell a file's kind
    others = dict.fromkeys(("head.weight", "fc_norm.bias", "mask_token", "decoder_pos_embed"), torch.zeros(1))
    content = STEMS[kind](state | others)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    given = {} if kind == "google" else {"heads": 2, "normalize": "half"}
    loaded = vit.load_vit(path, image_size=32, **given)
    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)
    assert loaded.blocks[0].attn.heads == 2 and loaded.normalize == "half"
    taken = {"moco": "state_dict.module.base_encoder", "dino": "teacher.backbone"}.get(kind)
    assert loaded.notes == ([f"{taken} of 2 encoders in the file"] if taken else [])


@pytest.mark.parametrize("rename, names", [
    (dict, "blocks.{}.ls{}.gamma"), (hugging_face("encoder.layer.", DENSE), "encoder.layer.{}.layer_scale{}.lambda1"),
])  # fmt: skip
def test_layer_scale_is_folded_into_the_layers_before_it(tmp_path, rename, names):
    backbone, images, gains = small_vit(), torch.randn(2, 3, 32, 32), {}
    state = rename(backbone.state_dict())
    for i, block in enumerate(backbone.blocks):
        for j, layer in enumerate((block.attn.proj, block.mlp.fc2), start=1):
            state[names.format(i, j)] = gains[layer] = torch.randn(16)
            layer.register_forward_hook(lambda layer, _, output: gains[layer] * output)
    torch.save(state, tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", 32, heads=2)
    torch.testing.assert_close(loaded(images), backbone(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix, dim, heads", [("", 1280, 16), ("", 1408, 16), ("", 1664, 16), ("", 384, 6),
                                                ("module.base_encoder.", 384, 12)])  # fmt: skip
def test_heads_and_normalization_are_assumed_as_published_and_that_is_noted(tmp_path, prefix, dim, heads):
    state = vit.VisionTransformer(4, 4, dim, 1, 1, mlp_ratio=4 / dim).state_dict()
    torch.save(pytorch(prefix)(state), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", 4)
    assert loaded.blocks[0].attn.heads == heads and loaded.normalize == "imagenet"
    assert loaded.notes == [f"heads assumed: {heads} (--heads changes it)",
                            "ImageNet normalization assumed (--normalize changes it)"]  # fmt: skip


def test_heads_and_normalization_are_those_of_the_configuration_beside_the_link_to_a_file(tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / "2fb4")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model").symlink_to("../2fb4")
    (mean, std), heads, name = vit.NORMALIZE["half"], {"num_attention_heads": 4}, "preprocessor_config.json"
    for files in (
        {"config.json": heads | {"pretrained_cfg": {"mean": mean, "std": std}}},  # timm's
        {"config.json": heads, name: {"image_mean": mean, "image_std": std}},
    ):
        write(tmp_path / "snapshot", files)
        loaded = vit.load_vit(tmp_path / "snapshot/model", 32)
        assert (loaded.normalize, loaded.blocks[0].attn.heads, loaded.notes) == ("half", 4, [])
    for content, says in (({"image_mean": [0.48], "image_std": [0.26]}, "--normalize"), ("[1]", f"{name} is damaged")):
        write(tmp_path / "snapshot", {name: content})
        with pytest.raises(vit.InputError, match=says):
            vit.load_vit(tmp_path / "snapshot/model", 32)


def test_position_embeddings_are_interpolated_to_another_grid(tmp_path):
    backbone = small_vit(image_size=64)
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", image_size=(32, 96), heads=2)
    assert torch.equal(loaded.pos_embed[:, 0], backbone.pos_embed[:, 0])
    positions = backbone.pos_embed[0, 1:].T.reshape(1, 16, 4, 4)
    expected = F.interpolate(positions, (2, 6), mode="bicubic").reshape(16, 12).T
    torch.testing.assert_close(loaded.pos_embed[0, 1:], expected)
    with pytest.raises(vit.InputError, match="pos_embed may be a grid of 4 x 4 or"):
        vit.load_vit(tmp_path / "vit.pth", image_size=(32, 128), heads=2)


def test_what_holds_no_plain_vit_is_refused_in_one_sentence_with_the_reason(tmp_path):
    path, state = tmp_path / "vit.pth", small_vit().state_dict()
    whole = safetensors({"a": torch.ones(2), "b": torch.arange(1.0, 4.0)})  # in float32 3.0 is 00@@
    damages = (b"@@", b"@"), (b"F32", b"I64"), (b"\0{", b"\1{"), (b"[8, 20]", b"[4, 16]"), (b"[3]", b"[4]")
    missing = ("blocks.1.mlp.fc2.bias", "patch_embed.proj.weight", "pos_embed")
    wrong = ("norm.bias", "surplus", "blocks.0.gamma_1", "reg_token", "register_tokens", "dist_token")
    for content, says in (
        *((whole.replace(*damage), "vit.pth is cut short or damaged") for damage in damages),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>"),
        (b"", "begins with b''"),
        (torch.nn.Linear(2, 2), "save a state_dict"),
        (torch.ones(3), "save a state_dict"),
        ({"net": {"conv1.weight": torch.ones(2)}}, "0 times, in ['net.conv1.weight']"),
        ({1: torch.ones(2)}, "0 times, in ['1']"),
        ({"model": state, "ema": state}, "2 times, in ['model.', 'ema.']"),
        (state | {"class_token": torch.ones(3)}, "two of its tensors mean cls_token"),
        *(({name: state[name] for name in state if name != left_out}, left_out) for left_out in missing),
        *((state | {name: torch.ones(3)}, name) for name in wrong),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(vit.InputError) as refused:
            vit.load_vit(path, 32, heads=2)
        assert all(part in str(refused.value) for part in (str(path), says)) and "\n" not in str(refused.value)
    with pytest.raises(vit.InputError, match="width 16 is not a multiple of 64: .*--heads"):
        vit.load_vit(path, 32)


def test_a_fingerprint_tells_backbones_apart_by_any_tensor():
    backbone = small_vit()
    seen = {vit.fingerprint(backbone)}
    for parameter in backbone.parameters():
        parameter.data += 1e-3
        seen.add(vit.fingerprint(backbone))
    assert len(seen) == 1 + len(list(backbone.parameters()))
    backbone.pos_embed.data[:, 1:] += 1e-3  # interpolated ones differ between machines
    assert vit.fingerprint(backbone) in seen


def test_a_weights_file_executes_nothing(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return Path("went-off").touch, ()

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    np.savez("bomb.npz", cls=np.array([Bomb()], dtype=object))
    for name in ("bomb.pth", "bomb.npz"):
        for load in (vit.load_vit, load_official, sa2vp.load):
            with pytest.raises(ValueError, match=name):
                load(name)
    assert not Path("went-off").exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server on 127.0.0.1 for the folder `server.folder`."""
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder, server.url = tmp_path / "server", f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_weights_by_name_are_downloaded_once_and_never_kept_damaged(server, files, tmp_path, monkeypatch):
    content, cache = (files / "vit.pth").read_bytes(), tmp_path / "cache"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: cache)

    def load(published, digits):
        write(server.folder, {"tiny.pth": published})
        monkeypatch.setitem(vit.BACKBONES, "deit-tiny", (f"{server.url}/tiny.pth", digits, "half"))
        vit.load_vit("deit-tiny")

    for published, digits in ((content, "00000000"), (content[:-99], None)):  # the last is cut short
        with pytest.raises(vit.InputError, match="fetch it and give --weights PATH"):
            load(published, digits)
        assert not list(cache.rglob("*.*"))
    load(content, hashlib.sha256(content).hexdigest()[:8])
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    loaded = vit.load_vit("deit-tiny")
    assert (loaded.dim, loaded.normalize, loaded.notes) == (64, "half", [])
    assert [path.name for path in cache.rglob("*.*")] == ["deit-tiny.pth"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, None])
def test_two_downloads_at_once_do_not_disturb_one_another(files, tmp_path, monkeypatch, error):
    place, parts = tmp_path / "checkpoints/deit-tiny.pth", []

    def fetch(url, part, sha256):
        parts.append(Path(part))
        shutil.copy(files / "vit.pth", part)
        if len(parts) == 1:
            vit.download("deit-tiny")  # as another process would, in the meantime
            if error:
                raise error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(error) if error is KeyboardInterrupt else contextlib.nullcontext():
        assert vit.download("deit-tiny") == place
    assert len(set(parts)) == 2 and os.listdir(place.parent) == [place.name]


# ---------------------------------------------------------------------- training


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [train.learning_rate(step, 10, 100, 1e-3) for step in range(100)]
    expected = [0, 1e-3 * 4 / 9, 1e-3, 1e-3, 1e-7 + (1e-3 - 1e-7) / 2]
    assert [rates[step] for step in (0, 4, 9, 10, 55)] == pytest.approx(expected) and 1e-7 < rates[99] < 1e-6
    assert train.learning_rate(0, 0, 10, 1e-3) == 1e-3 and train.learning_rate(0, 1, 10, 1e-3) == 0


def test_weight_decay_is_on_matrices_prompt_maps_and_gates_alone():
    model = small_model()
    groups = train.make_optimizer(model, 0.1).param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in sa2vp.trained_parameters(model).items():
        decayed = name.endswith(("weight", "tokens", "gate")) and "norm" not in name
        assert decay.pop(parameter) == (0.1 if decayed else 0), name
    assert not decay


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_a_run_writes_what_it_promises_and_leaves_the_backbone_bit_for_bit(run, monkeypatch, capsys, method):
    models, build, images = [], sa2vp.build, torch.randn(2, 3, 224, 224)
    monkeypatch.setattr(sa2vp, "build", lambda *given: models.append(build(*given)) or models[-1])
    out = run("--method", method, "--epochs", 2, "--warmup-epochs", 1, "--lr", 0.01)
    found, best, (model,) = result(out), checkpoint(out / "best.pt"), models
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "metrics.csv", "result.json"]
    assert (found["prompt_accuracy"] is None, found["trainable"]) == (method != "sa2vp", sa2vp.count_trained(model))
    rows = [(row["epoch"], float(row["lr"])) for row in table(out / "metrics.csv")]
    assert rows == [("1", 0.01), ("2", train.learning_rate(3, 2, 4, 0.01))]  # an epoch has 2 steps
    assert any(name.startswith("vit.") for name in best["trained"]) == (method == "full")
    assert (vit.fingerprint(model.vit) == best["fingerprint"]) == (method != "full")
    loaded = sa2vp.load(out)[0]
    assert torch.equal(loaded(images)[0], model(images)[0]) and not loaded.training
    printed = capsys.readouterr().out
    assert "batch_size=4, lr=" in printed and "in 4 steps, perhaps too few" in printed
    assert f"accuracy {found['accuracy']:.2f}, " in printed

    train.main(["--eval", str(out / "best.pt"), "--show", "3", "--cpu"])
    printed = capsys.readouterr().out
    assert f"test {found['accuracy']:.2f} %" in printed
    assert len(re.findall(r"^/.*test/(ant|bee)/\d\.png \(true class: \1\)\n( .*%  (ant|bee)\n){2}", printed, re.M)) == 3
    page = np.asarray(Image.open(out / "show.png"))
    titles, grid = page[: train.TITLE], page[train.TITLE + 2 :, 2:]
    columns = 4 if method == "sa2vp" else 3
    tiles = grid.reshape(3, train.TILE + 2, columns, train.TILE + 2, 3)[:, :-2, :, :-2]
    assert tiles.std(axis=(1, 3, 4)).all()  # something is in each tile
    assert all(part.std() for part in np.array_split(titles, columns, axis=1))


def test_of_epochs_with_equal_validation_accuracy_the_last_is_kept_tested_and_reported(run, monkeypatch):
    accuracies, tested = iter([10.0, 30.0, 30.0, 20.0, 5.0]), []

    def pretended(model, *_):
        tested.append(model.head.weight.clone())
        return next(accuracies), None

    monkeypatch.setattr(train, "evaluate", pretended)
    found = result(run("--lr", 0.01, "--epochs", 4))
    assert (found["val_accuracy"], found["best_epoch"], found["accuracy"]) == (30.0, 3, 5.0)
    assert [torch.equal(weight, tested[4]) for weight in tested] == [False, False, True, False, True]


def test_every_epoch_has_its_own_order_crops_and_dropout_and_runs_of_a_seed_the_same(settings, tmp_path, monkeypatch):
    seen = []

    def record(model, batches, *_):
        seen.append((*zip(*batches.sampler), torch.rand(1).item()))  # order, seeds of crops, dropout
        assert "RandomCrop" in str(batches.dataset.transform)
        return 0.0, 0.0

    monkeypatch.setattr(train, "train_epoch", record)
    monkeypatch.setattr(train, "evaluate", lambda *_: (0.0, None))
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.fit(settings(seed=seed, epochs=3), tmp_path / out, CPU)
    assert seen[:3] == seen[3:6] and [len(set(part)) for part in zip(*seen)] == [6, 6, 6]
    assert all(sorted(order) == list(range(10)) for order, *_ in seen)


def test_dropout_is_on_in_training_alone(run, monkeypatch):
    modes = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training, _: modes.append((training, torch.is_grad_enabled())) or x)
    run("--epochs", 2)
    training, evaluation = (True, True), (False, False)
    assert [mode for mode, _ in itertools.groupby(modes)] == [training, evaluation, training, evaluation]


def test_matrix_products_are_in_the_machines_dtype_and_float16_has_a_scaler(settings, tmp_path, monkeypatch):
    seen, forward = [], torch.nn.Linear.forward

    def record(module, x):
        seen.append((module, forward(module, x)))
        return seen[-1][1]

    monkeypatch.setattr(torch.nn.Linear, "forward", record)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        seen.clear()
        train.fit(settings(), tmp_path / str(dtype), CPU._replace(dtype=dtype))
        scaler = checkpoint(tmp_path / str(dtype) / "last.pt")["scaler"]
        assert {x.dtype for module, x in seen if not isinstance(module, sa2vp.FullPrecisionLinear)} == {dtype}
        assert {module.weight.dtype for module, _ in seen if not module.weight.requires_grad} == {dtype}
        assert scaler.get("_growth_tracker") == (2 if dtype == torch.float16 else None)  # an epoch has 2 steps
    for begun in ("torch.bfloat16", "torch.float16"):  # resumes with a new scaler, and with its own
        state = checkpoint(tmp_path / begun / "last.pt")
        state["settings"]["epochs"] = 2
        torch.save(state, tmp_path / begun / "last.pt")
        train.fit(settings(epochs=2, warmup_epochs=0), tmp_path / begun, CPU._replace(dtype=dtype))
    assert checkpoint(tmp_path / begun / "last.pt")["scaler"]["_growth_tracker"] == 4


def machine(*flags):
    return train.choose_machine(train.make_parser().parse_args(flags))


def test_a_gpu_without_bfloat16_in_hardware_takes_float16_and_one_that_does_not_work_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for works, real, expected in (
        (True, True, (torch.device("cuda", 0), torch.bfloat16)),
        (True, False, (torch.device("cuda", 0), torch.float16)),
        (False, True, (torch.device("cpu"), torch.float32)),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
        supported = lambda including_emulation=True: real or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert machine()[:2] == expected and torch.backends.cuda.cudnn_sdp_enabled() == (not works)


def test_workers_are_the_cpus_of_this_process(monkeypatch):
    for cpus, workers in ((48, 16), (3, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
        assert machine().workers == workers


def outcome(out):
    """Everything a run leaves but its times; a checksum of each tensor."""
    rows = [result(out), *table(out / "metrics.csv")]
    for row in rows:
        row.pop("seconds")
    tensors = [item for name in ("best.pt", "last.pt") for item in checkpoint(out / name)["trained"].items()]
    return rows, [(name, zlib.crc32(tensor.detach().numpy())) for name, tensor in tensors]


def interrupt(patch, name, after):
    """Has the call of train.<name> number `after` (from 0) end in Ctrl-C."""
    function, calls = getattr(train, name), iter(range(after))

    def interrupted(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    patch.setattr(train, name, interrupted)


def test_an_interrupted_run_resumes_to_the_numbers_of_a_whole_one_with_any_workers(run, command, monkeypatch, capsys):
    flags = ["--dropout", 0.2, "--epochs", 3]
    whole = run(*flags, "--workers", 2, out="whole")
    for killed_in in (0, 2):
        broken = f"broken{killed_in}"
        with monkeypatch.context() as patch:
            interrupt(patch, "evaluate", killed_in)
            assert fail(command(*flags, "--out", broken)) == 130
        assert outcome(whole) == outcome(run(*flags, out=broken))
        assert (f"resuming after epoch {killed_in}" in capsys.readouterr().out) == (killed_in > 0)


def test_workers_are_started_once_for_a_run_also_where_they_import_everything_anew(run, monkeypatch):
    started, make = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    iterator = lambda loader: started.append(len(loader.dataset.samples)) or make(loader)  # noqa: E731
    monkeypatch.setattr(torch.utils.data.dataloader, "_MultiProcessingDataLoaderIter", iterator)
    loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context="forkserver")
    monkeypatch.setattr(data, "DataLoader", loader)
    run("--workers", 1, "--epochs", 3)
    assert started == [10, 2, 8]  # training, validation and test images


def test_a_run_of_other_settings_images_classes_or_backbone_is_refused_with_a_sentence(run, command, files, capsys):
    flags = ["--window", "none", "--fusion-layers", "none"]
    out = run(*flags)
    before, last = outcome(out), checkpoint(out / "last.pt")
    assert last["digest"] == data.digest(data.load(data.find(str(files / "insects")), "data"))
    other = last["settings"] | {"fusion_layers": None}
    for content in ("[]", "{", {}):
        write(out, {"result.json": content})
        assert "result.json is damaged or of another version: delete it" in refusal(capsys, command(*flags))
    write(out, {"result.json": {"settings": other}})
    assert "belongs to a run with fusion_layers None, not ()" in refusal(capsys, command(*flags))
    (out / "result.json").unlink()
    for content, says in (
        (last | {"settings": other}, "belongs to a run with fusion_layers None, not ()"),
        (last | {"fingerprint": "another"}, "belongs to a run with another backbone"),
        (last | {"digest": "another"}, "belongs to a run with other images or classes"),
        ({}, "last.pt is damaged or of another version: delete it"),
    ):
        torch.save(content, out / "last.pt")
        assert says in refusal(capsys, command(*flags))
    torch.save(last, out / "last.pt")
    assert outcome(run(*flags)) == before
    assert f"{out} is the folder of one run" in refusal(capsys, command("--out", out))


@torch._dynamo.config.patch(recompile_limit=4)  # 8 by default: the sixth run was too much
def test_compiling_changes_no_more_than_rounding_and_happens_in_every_run(settings, tmp_path, monkeypatch):
    compiled, counts, losses, real = [], [], [], torch.compile
    backend = lambda graph, inputs: compiled.append(1) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=backend, **options))
    torch.save(vit.VisionTransformer(64, 32, 64, 1, 1).state_dict(), tmp_path / "vit.pth")
    one = settings(dropout=0.0, weights=str(tmp_path / "vit.pth"), image_size=64)
    for i in range(3):
        train.fit(one, tmp_path / str(i), CPU._replace(compile=i > 0))
        counts.append(len(compiled))
        losses.append(float(table(tmp_path / str(i) / "metrics.csv")[0]["loss"]))
    assert counts[0] == 0 < counts[1] and counts[2] == 2 * counts[1]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


# ---------------------------------------------------------------------- data


def listed(pictures, lists, form, name="{n}/{split}{i}{n}.jpg", counts={"train": 8, "val": 2, "test": 4}):
    """A small data set with a list for each split: {path: content}. `form` makes the list of [(name, label)]."""
    found = {}
    for split, count in counts.items():
        pairs = [(name.format(split=split, i=i, n=n), n) for n in (1, 0) for i in range(count)]
        found |= {pictures + path: None for path, _ in pairs} | {lists.format(split): form(pairs)}
    return found


def ids(pairs):
    return {name: (295, 1010)[label] for name, label in pairs}


def by_class(pairs):
    return {n: [name.removesuffix(".jpg") for name, label in pairs if label == n] for n in (0, 1)}


def cifar(folder, batches, labels, **names):
    entries = {file: {"data": np.zeros((n, 3072), np.uint8), labels: [0, 1] * (n // 2)} for file, n in batches.items()}
    return {f"{folder}/{file}": pickle.dumps(content) for file, content in (entries | names).items()}


VTAB = "vtab-1k/clevr_count/"
CLEVR = listed(
    VTAB, f"{VTAB}{{}}.txt", lambda pairs: "\n".join(f"{name} {label}" for name, label in pairs),
    counts={"train800": 8, "val200": 2, "train800val200": 10, "test": 4},
)  # fmt: skip
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
    write(tmp_path, LAYOUTS[layout])
    # Small copies have other checksums than those that torchvision pins.
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    if layout == "hta/svhn":  # whose .mat files hold pickles here, so that the tests need no scipy
        scipy = types.SimpleNamespace(loadmat=lambda path: pickle.loads(Path(path).read_bytes()))
        scipy.io = scipy
        monkeypatch.setitem(sys.modules, "scipy", scipy)
        monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    name, *_ = layout.split(", ")
    *parts, classes, _, _ = splits = data.load(data.find(name), tmp_path)
    counts = [np.bincount([label for _, label in part], minlength=2).tolist() for part in parts]
    assert counts == ([[10, 10], [0, 0], [4, 4]] if name.startswith("vtab") else [[8, 8], [2, 2], [4, 4]])
    for picture, label in sum(parts, []):
        assert data.open_picture(picture).mode == "RGB"
        assert isinstance(picture, np.ndarray) or label == int(picture.stem[-1])
    if name in data.GROUPS["fgvc"]:
        assert classes == (["class 295", "class 1010"] if name in ("flowers", "cars") else ["0", "1"])
        assert name == "cars" or data.load(data.find(f"hta/{name}"), tmp_path) == splits


@pytest.mark.parametrize("name, changed, says", [
    ("nabirds", {}, "{root}/nabirds/images .*{source}"),
    ("cars", {}, "{root}/stanford_cars/cars_train .*{source}"),
    ("cub", {"images/0/train00.jpg": None}, "cannot read an image that is listed: .*train00.jpg"),
    *(("cub", {"val.json": content}, "cannot read the list .*val.json, which comes from https://raw")
      for content in ("[]", "{", '{"0/1.jpg": null}', '{"0/1.jpg": "ant"}', b"\xff")),
    *(("vtab/clevr_count", {"test.txt": f"0.jpg 1\n{line}\n"}, "clevr_count/test.txt, .* a label below 8: .*")
      for line in ("images/1.jpg", "images/1.jpg,1", "images/1.jpg one", "images/1.jpg 8", "1.jpg -1")),
    ("vtab/clevr_count", {"test.txt": None}, "clevr_count/test.txt, which comes from https://huggingface.co"),
])  # fmt: skip
def test_what_is_missing_or_damaged_is_named_with_where_it_comes_from_and_belongs(tmp_path, name, changed, says):
    for path, content in changed.items():
        folder = Path(tmp_path, "CUB_200_2011" if name == "cub" else VTAB)
        write(tmp_path, LAYOUTS[name])
        (folder / path).unlink() if content is None else write(folder, {path: content})
    with pytest.raises(data.DataError, match=says.format(root=tmp_path, source=data.find(name).source)):
        data.digest(data.load(data.find(name), tmp_path))


def test_a_damaged_download_leaves_nothing_and_a_whole_one_ends_in_a_test_accuracy(server, run, monkeypatch, capsys):
    """The download is a small CUB-200-2011 in its true layout; what else is in the archive is not kept."""
    write(Path("packed"), LAYOUTS["cub"] | {"CUB_200_2011/images.txt": "", "attributes.txt": ""})
    shutil.copytree("packed/CUB_200_2011", server.folder / "cub")
    lists = [server.folder / f"cub/{split}.json" for split in ("train", "val", "test")]
    archive = Path(shutil.make_archive("CUB_200_2011", "gztar", "packed")).rename(server.folder / "CUB_200_2011.tgz")

    def refused(name, says):
        with pytest.raises(data.DataError, match=f"cannot be downloaded .*{says}.* and put it there"):
            data.load(data.find(name)._replace(source=f"{server.url}/{archive.name}"), "root")
        return sorted(path.name for path in Path("root").glob("*/*"))

    for name, says in (("cub", "its md5 is not 97eceeb1"), ("dogs", "its sha256 is not a443fc2f")):  # as published
        assert refused(name, says) == []
    md5, *md5s = (hashlib.md5(path.read_bytes()).hexdigest() for path in (archive, *lists))
    load = functools.partial(data.fgvc, "CUB_200_2011", ["images"], "cub", " ".join(md5s), md5=md5,
                             sha256=hashlib.sha256(archive.read_bytes()).hexdigest())  # fmt: skip
    source = f"{server.url}/{archive.name}"
    monkeypatch.setitem(data.TABLE, "cub", data.find("cub")._replace(source=source, load=load))
    monkeypatch.setattr(data, "FGVC_SPLITS", server.url)
    content = lists[1].read_bytes()
    lists[1].write_bytes(content[:-2] + b"\n}")  # it can be read, and its checksum is wrong
    assert refused("cub", "") == ["images", "train.json"]
    lists[1].write_bytes(content)

    out = run("--data", "cub", "--root", "root")
    assert "16 training, 4 validation, 8 test images of 2 classes (train.json" in capsys.readouterr().out
    assert sorted(os.listdir("root/CUB_200_2011")) == ["images", "test.json", "train.json", "val.json"]
    shutil.rmtree(server.folder)
    train.main(["--eval", str(out / "best.pt"), "--cpu"])  # a run remembers where its data is
    assert f"test {result(out)['accuracy']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("member, kind", [("../out", "0"), ("link", "2"), ("", None)])
def test_no_archive_writes_outside_its_folder(server, tmp_path, member, kind):
    path = server.folder / f"birds.{'tar' if kind else 'zip'}"
    path.parent.mkdir()
    if kind:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind.encode(), "../../out"
            archive.addfile(info)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../out", ""), archive.writestr(f"{tmp_path}/out", "")
    says = "cannot be downloaded .*outside" if kind else "is not in the archive"
    with pytest.raises(data.DataError, match=says):
        unpack = functools.partial(data.unpack, f"{server.url}/{path.name}")
        data.fetch(tmp_path / "root/images", "source", unpack, "images")
    assert not (tmp_path / "out").exists() and not os.listdir(tmp_path / "root")


@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
def test_of_two_first_downloads_the_slower_uses_what_the_faster_brought_however_it_ends(tmp_path, error):
    def slower(folder):
        data.fetch(tmp_path / "images", "source", lambda other: write(Path(other), {"images/1.png": "faster"}))
        write(Path(folder), {"images/1.png": "slower"})
        if error:
            raise error

    with pytest.raises(error) if error is KeyboardInterrupt else contextlib.nullcontext():
        data.fetch(tmp_path / "images", "source", slower)
    assert os.listdir(tmp_path) == ["images"] and (tmp_path / "images/1.png").read_text() == "faster"


def test_a_bug_in_a_loader_keeps_its_traceback(tmp_path):
    row = data.find("shapes")._replace(load=lambda row, root, search: {}["bug"])
    with pytest.raises(KeyError):
        data.load(row, tmp_path)


def test_the_table_has_the_papers_settings():
    names = """cub nabirds flowers dogs cars  caltech101 cifar dtd oxford_flowers102 oxford_iiit_pet svhn sun397
        patch_camelyon eurosat resisc45 diabetic_retinopathy  clevr_count clevr_dist dmlab kitti dsprites_loc
        dsprites_ori smallnorb_azi smallnorb_ele  cub nabirds flowers dogs cifar10 cifar100 dtd food101 gtsrb svhn"""
    classes = """200 555 102 120 196  102 100 47 102 37 10 397  2 10 45 5  8 6 6 4 16 16 18 9
        200 555 102 120 10 100 47 101 43 10"""
    r = "16 32 8 32 64  8 8 8 8 8 16 8  16 16 16 16  32 32 32 32 32 16 32 32" + 10 * " 64"
    s = ".1 .1 .1 .1 1.5  .1 .1 .1 .1 .1 .5 .1  1.5 1.5 .5 1.5  1.5 1.5 1.5 1.5 1.5 .1 1.5 .5" + 10 * " .1"
    columns = (column.split() for column in (names, classes, r, s))
    for row, name, *numbers in zip(data.ROWS[:34], *columns, strict=True):
        one = train.complete_settings({"data": row.name, "method": "sa2vp"})
        (group,) = (group for group, members in data.GROUPS.items() if row.name in members)
        assert (row.name.split("/")[-1], row.crop, row.vtab) == (name, group == "fgvc", group.startswith("vtab/"))
        assert [row.classes, one["inner_dim"], one["scale"]] == list(map(float, numbers)), row.name
        assert one["batch_size"] == (40 if group in ("vtab/specialized", "vtab/structured") else 64)
        assert one["lr"] == (5e-4 if name in ("oxford_iiit_pet", "clevr_count") else 1e-3)
        assert one["fusion_layers"] == ((4,) if name == "cars" else None)
        assert (one["epochs"], one["warmup_epochs"], one["weight_decay"], one["dropout"]) == (100, 10, 1e-4, 0.1)
        assert (one["window"], one["seed"], one["image_size"]) == (3, 42, 224)
    assert len(data.members(["vtab"])) == 19
    assert train.complete_settings({"data": "shapes", "method": "sa2vp"})["epochs"] == 30


def test_vtab_is_searched_on_train800_and_val200_without_test_data_and_its_last_epoch_counts(run, command, monkeypatch):
    write(Path("root"), CLEVR)
    assert list(map(len, data.load(data.find("vtab/clevr_count"), "root", search=True)[:3])) == [16, 4, 0]
    flags = ["--data", "vtab/clevr_count", "--root", "root", "--method", "linear", "--epochs", 3, "--lr", 1e-3, 1e-2]
    accuracies = iter([90.0, 50.0, 10.0, 20.0, 30.0, 20.0])  # of two runs; the first was better before its last epoch
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: (next(accuracies), None))
        for file, validation in (("val200", ["", ""]), ("test", ["10.0", "20.0", ""])):  # a search needs no test data
            path = Path("root", VTAB, f"{file}.txt")
            path.rename("hidden.txt")
            assert fail(command(*flags, "--out", file)) == 2
            Path("hidden.txt").rename(path)
            rows = table(one(file, "*.csv"))
            assert [(row["val_accuracy"], row["accuracy"]) for row in rows] == [(score, "") for score in validation]
    rows = table(one(run(*flags, out="test"), "*.csv"))
    assert [bool(row["accuracy"]) for row in rows] == [False, False, True]
    found = [result(path) for path in Path("test").glob("vtab-clevr_count-linear-*/")]
    assert sorted(r["settings"]["search"] for r in found) == [False, True, True]
    assert all(r["best_epoch"] == 3 and (r["val_accuracy"] is None) != r["settings"]["search"] for r in found)


def test_a_class_of_one_image_stays_in_training():
    kept, held_out = data.hold_out([("a", 0), ("b", 1), ("c", 1)], share=0.1)
    assert kept[0] == ("a", 0) and len(held_out) == 1


def test_the_images_held_out_are_always_the_same():
    _, held_out = data.hold_out([(i, i % 2) for i in range(20)], share=0.2)
    assert held_out == [(5, 1), (8, 0), (12, 0), (19, 1)]


def test_few_images_are_told_with_their_number(tmp_path):
    write(tmp_path, images("train/ant", "train/bee", count=4) | images("val/ant", "val/bee", count=14)
          | images("test/ant", "test/bee", count=15))  # fmt: skip
    assert data.class_folders(tmp_path).notes == [
        *(f"4 training images of {name} are few: add some" for name in ("ant", "bee")),
        "28 validation images are few, one is 4 points: add some"]  # fmt: skip


def test_a_folder_has_defaults_for_few_images(monkeypatch):
    for count, batch_size in ((20, 4), (200, 12), (5000, 64)):
        monkeypatch.setattr(data, "class_folders", lambda _: data.Splits([None] * count, [], [], [], ""))
        row = data.folder_row.__wrapped__(Path("/home/me/pets"))
        assert row.name == "me/pets" and row.settings == {"batch_size": batch_size, "epochs": 20, "dropout": 0.0}
        rates = {"sa2vp": 3e-3, "vpt": 3e-3, "adapter": 3e-3, "linear": 1e-2, "full": 1e-4}
        assert train.LEARNING_RATE | row.lr == rates


def read_folder(folder, files):
    write(folder, files)
    return data.load(data.find(str(folder)), folder)


@pytest.mark.parametrize("layout, counts", [
    ("{}", [14, 2, 4]),
    ("train/{} test/{}", [18, 2, 20]),
    ("train/{} valid/{}", [16, 20, 4]),
    ("train/{} validation/{} test/{}", [20, 20, 20]),
])  # fmt: skip
def test_any_folder_of_class_folders_is_read_and_what_is_missing_held_out(tmp_path, layout, counts):
    places = [place.format(name) for place in layout.split() for name in ("ant", "train")]  # a train is a class, too
    splits = read_folder(tmp_path, images(*places))
    assert list(map(len, splits[:3])) == counts and splits.classes == ["ant", "train"]
    assert all(sum(label for _, label in part) == len(part) / 2 for part in splits[:3])
    assert len(set(sum(splits[:3], []))) == 10 * len(places)


def test_what_is_left_out_of_a_folder_is_counted_and_system_names_are_neither_classes_nor_images(tmp_path):
    folder = tmp_path / ".cache" / "pets"  # above the data set any name will do
    hidden = ("train/.ipynb_checkpoints", "train/ant/.ipynb_checkpoints", "train/@eaDir", "__MACOSX/train/ant")
    odd = images(*hidden, count=1)
    odd |= {"train/ant/._0.png": b"", "train/cow/1.jfif": b"", "test/bee/1.jfif": b"", "readme": b"", "test/1.png": b""}
    (folder / "train" / "@Recycle").mkdir(parents=True)
    splits = read_folder(folder, images("train/ant", "train/bee", "test/ant") | odd)
    assert splits.classes == ["ant", "bee"] and list(map(len, splits[:3])) == [18, 2, 10]
    assert [note.split(" ")[0] for note in splits.notes if "left out" in note] == ["9"]
    found = data.find_images([folder, folder / "train/ant/._0.png"])  # what is named is wanted
    assert len(found) == 32 and not any("__MACOSX" in str(path) for path in found)


@pytest.mark.parametrize("files, says", [
    (images("photos/ant", "photos/bee"), "in two or more <class>"),  # one folder too high
    (images("test/ant", "test/bee"), "in two or more <class>"),
    (images("train/ant", "train/bee", "test/cow"), "of ant, bee and none of cow"),
    (images("ant", "bee", count=1), "too few images to hold out"),
    (images("ant", "bee") | {"bee/x.jpg": "no image"}, "x.jpg: cannot identify image file"),
    (images("ant", "bee") | {"bee/x.pgm": "P5 20000 20000 255\n"}, "x.pgm: .*exceeds limit"),
])  # fmt: skip
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(tmp_path, files, says):
    with pytest.raises(data.DataError, match=says):
        read_folder(tmp_path, files)


def test_a_name_is_the_benchmark_and_a_path_the_folder_and_both_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "flowers")
    write(tmp_path, {"vtab/cat/1.JPG": None, **images("dogs/Images/chow")})
    for name in ("flowers", "vtab"):
        with pytest.raises(data.DataError, match=f"write ./{name}"):
            data.members(["shapes", name])
        assert data.members([f"./{name}"]) == [f"./{name}"]
    assert data.members(["dogs", "fgvc"])  # the benchmark's own folder below the root
    Path("other").symlink_to("flowers")
    for path in ("~/other", "./x/../other", str(tmp_path / "other")):
        row = data.find(path)
        assert (row.name, row.source) == (f"{tmp_path.name}/other", str(tmp_path / "other"))
    write(tmp_path / "data", CLEVR)
    assert data.load(data.find("vtab/clevr_count"), "~/data").test[0][0].is_relative_to(tmp_path)


def test_a_digest_changes_with_files_labels_splits_and_classes_and_not_with_place_or_seeds(tmp_path):
    splits = read_folder(tmp_path / "a", images("ant", "bee"))
    before = data.digest(splits)
    np.random.seed(1), torch.manual_seed(1)
    assert data.digest(read_folder(tmp_path / "b", images("ant", "bee"))) == before
    (*rest, (image, label)), grey = splits.train, np.full((4, 4, 3), 128, np.uint8)
    others = [splits._replace(classes=["bee", "ant"]), splits._replace(train=[*rest, (image, 1 - label)]),
              splits._replace(train=rest, val=[(image, label), *splits.val]),
              *(data.Splits([(grey + i, 0)], [], [], ["a"], "") for i in (0, 1))]  # fmt: skip
    assert len({before, *map(data.digest, others)}) == 6
    image.write_bytes(image.read_bytes() + b" ")
    assert data.digest(splits) != before


@pytest.mark.parametrize("name", ["shapes", "shapes-source"])
def test_drawn_pictures_are_always_the_same_and_balanced(name):
    row = data.TABLE[name]
    splits, again = (row.load(row, None, False, counts=(48, 24, 24)) for _ in range(2))
    assert data.digest(splits) == data.digest(again)
    for part in splits[:3]:
        assert len(set(np.bincount([label for _, label in part], minlength=len(splits.classes)))) == 1
    assert not any(np.array_equal(splits.train[0][0], picture) for picture, _ in splits.test)


def test_the_target_task_of_the_drawn_pictures_is_the_direction_from_red_to_blue():
    rng = np.random.default_rng(5)
    for label in list(range(8)) * 10:
        picture = data.where_is_blue(rng, label).astype(int)
        redness = picture[..., 0] - picture[..., 2]
        red, blue = (np.mean(np.nonzero(thing), axis=1) for thing in (redness > 100, redness < -100))
        dy, dx = blue - red
        angle = math.radians(45 * label)
        assert math.cos(angle) * dx + math.sin(angle) * dy > 0.85 * math.hypot(dx, dy), data.DIRECTIONS[label]


@pytest.mark.parametrize("crop, training, expected", [
    (False, True, [("Resize", (224, 208))]),  # squeezed
    (False, False, [("Resize", (224, 208))]),
    (True, True, [("Resize", 238), ("RandomCrop", (224, 208)), ("RandomHorizontalFlip", None)]),  # 208 * 256 / 224
    (True, False, [("Resize", 238), ("CenterCrop", (224, 208))]),
])  # fmt: skip
def test_transforms_are_the_papers(crop, training, expected):
    transform = data.transform(crop, (224, 208), mean=(0.5, 0.75, 1.0), std=(0.5, 0.25, 0.1), training=training)
    steps = [(type(step).__name__, getattr(step, "size", None)) for step in transform.transforms]
    assert steps == [*expected, ("ToTensor", None), ("Normalize", None)]
    white = transform(Image.new("RGB", (300, 400), "white"))
    assert white.flatten(1).unique(dim=1).tolist() == [[1], [1], [0]]  # every pixel


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
    found = saved(tmp_path / f"image.{kind}", image, transparency=hole)  # a value that a TIFF does not have
    assert found.shape == (7, 9, 3) and (found[0, 0] == 255).all() and np.abs(found[1:] - 204.0).max() < 2


def test_16_bits_are_divided_by_257_and_what_has_no_agreed_scale_is_refused(tmp_path):
    deep = np.array([[0, 257, 201 * 257 - 1, 65535]], np.uint16)  # the third divided by 256 is 201
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    for pixels in (np.asarray(data.open_picture(tmp_path / "deep.pgm")), saved(tmp_path / "deep.png", deep)):
        assert pixels[0].tolist() == [[0] * 3, [1] * 3, [200] * 3, [255] * 3]
    assert saved(tmp_path / "hole.png", deep, transparency=257)[0, :, 0].tolist() == [0, 255, 200, 255]
    for pixels in (deep, deep.astype(np.int32), deep.astype(np.float32)):
        with pytest.raises(data.DataError, match="deep.tiff: pixels of mode (I|F|I;16) have no agreed scale"):
            saved(tmp_path / "deep.tiff", pixels)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_images_are_upright_however_damaged_their_other_metadata_are(tmp_path, kind):
    upright = np.zeros((32, 64), np.uint8)
    upright[:16, :16] = 255

    def check(turns, exif):
        found = saved(tmp_path / f"turned.{kind}", np.ascontiguousarray(np.rot90(upright, turns)), exif=exif)
        assert np.array_equal(found[..., 0] > 128, upright > 128)

    for orientation, turns in ((3, 2), (6, 1), (8, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        check(turns, exif)
    if kind in ("jpeg", "webp"):  # orientation 6, and -1 / 0 pixels per inch
        fields = b"\x12\1\3\0\1\0\0\0\6\0\0\0" + b"\x1a\1\x0a\0\1\0\0\0\x26\0\0\0"
        check(1, b"Exif\0\0II*\0\x08\0\0\0\2\0" + fields + b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0")
    if kind != "tiff":
        check(0, b"Exif\0\0garbage")


# ---------------------------------------------------------------------- several runs


def test_defaults_are_the_methods_own():
    signature = inspect.signature(sa2vp.SA2VP).parameters
    for name in sa2vp.options("sa2vp"):
        assert train.DEFAULTS[name] == signature[name].default
    assert train.DEFAULTS["prompts"] == inspect.signature(sa2vp.VPTDeep).parameters["prompts"].default


def test_an_ablation_trains_every_variant_which_changes_just_what_it_names(run):
    folders = {
        "full-method": "cub-sa2vp-scale0.5", "linear-probe": "cub-linear", "no-prompts": "cub-adapter-scale0.5",
        "window-none": "cub-sa2vp-scale0.5-windownone", "window-1": "cub-sa2vp-scale0.5-window1",
        "window-5": "cub-sa2vp-scale0.5-window5", "no-fusion": "cub-sa2vp-scale0.5-fusion_layersnone",
        "no-distillation": "cub-sa2vp-scale0.5-distill_layersnone-fusion_layersnone",
        "half-size-map": "cub-sa2vp-scale0.5-prompt_gridhalf",
    }  # fmt: skip
    found = train.list_combinations({"data": ["cub"], "method": ["ablation"], "seed": [42], "scale": [0.5]})
    assert {variant: train.run_name(choice) for (_, variant), (choice,) in found.items()} == folders
    for flags in (["--ablate", "--method", "vpt"], ["--method", "vpt", "--ablate"]):
        assert set(train.make_parser().parse_args(flags).method) == {"vpt", "ablation"}
    run("--ablate")
    rows = table(one("runs", "*-ablation-*.csv"))
    assert {row["method"] for row in rows if row["accuracy"]} == folders.keys()


def test_several_runs_end_with_one_table(run, monkeypatch, capsys):
    write(Path("root"), LAYOUTS["cub"] | LAYOUTS["nabirds"])
    monkeypatch.setitem(data.GROUPS, "pair", ["cub", "nabirds"])
    run("--data", "pair", "--root", "root", "--method", "linear", "--seed", 0, 1, 0)  # each once
    rows = table(one("runs", "pair-linear-*seed0+1-*.csv"))
    assert list(rows[0]) == ["data", "method", "val_accuracy", "accuracy", "std", "seeds", "trainable"]
    found = {name: [result(one("runs", f"{name}-linear-*seed{i}")) for i in (0, 1)] for name in ("cub", "nabirds")}
    expected = {name: np.mean([r["accuracy"] for r in results]) for name, results in found.items()}
    expected["pair"] = np.mean(list(expected.values()))
    assert {row["data"]: float(row["accuracy"]) for row in rows} == expected
    assert float(rows[0]["val_accuracy"]) == np.mean([r["val_accuracy"] for r in found["cub"]])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2].startswith("pair ")


def test_two_commands_share_the_folder_of_runs_and_a_third_only_prints_their_table(command, monkeypatch, capsys):
    flags, start = ["--method", "linear", "--out", "runs", "--seed"], [sys.executable, train.__file__]
    jobs = [subprocess.Popen([*start, *command(*flags, seed)], stderr=subprocess.PIPE) for seed in (0, 1)]
    for job in jobs:
        assert job.wait(timeout=60) == 0, job.stderr.read()
    monkeypatch.setattr(train, "fit", None)  # there is nothing to train
    train.main(command(*flags, 0, 1))
    assert capsys.readouterr().out.count("holds this run, finished, and is kept: delete it to train anew\n") == 2
    assert table(one("runs", "*.csv"))[0]["seeds"] == "2"


def test_a_run_that_fails_does_not_end_the_others_and_a_bug_keeps_its_traceback(run, command, monkeypatch, capsys):
    fit = train.fit
    fail_with = {0: vit.InputError("give another file"), 1: torch.OutOfMemoryError("much"), 2: OSError("bug")}

    def failing(settings, *rest):
        if error := fail_with.get(settings["seed"]):
            raise error
        return fit(settings, *rest)

    monkeypatch.setattr(train, "fit", failing)
    for seeds, code, reason in (((1, 0, 3), 2, "use a smaller --batch-size"), ((2, 0, 3), 1, "OSError: bug")):
        assert fail(command("--seed", *seeds, "--out", f"{seeds}")) == code
        printed = capsys.readouterr()
        assert len(list(Path(f"{seeds}").glob("*seed3/result.json"))) == 1
        assert reason in printed.err and "give another file" in printed.err
        assert ("Traceback" in printed.err) == (code == 1)


def test_a_group_has_mean_and_deviation_of_its_parts_if_every_member_has_every_seed(monkeypatch):
    monkeypatch.setattr(data, "GROUPS", {"pair": ["a", "b"], "trio": ["pair", "c"]})
    scores = {("a", "vpt"): [50.0, 60.0], ("c", "vpt"): [20.0, 30.0]}
    assert train.group_rows(scores) == []
    pair, trio = train.group_rows(scores | {("b", "vpt"): [70.0, 40.0]})
    assert (pair["accuracy"], pair["std"]) == (55.0, pytest.approx(50**0.5))  # of 60 and 50, its means with each seed
    assert (trio["data"], trio["accuracy"]) == ("trio", 40.0)


def test_a_search_reads_test_data_once_for_each_seed_of_the_chosen_combination(run, monkeypatch, capsys):
    calls, accuracies = [], {(1e-3, 0.1): 40.0, (1e-3, 0.5): 60.0, (1e-2, 0.1): 60.0, (1e-2, 0.5): 10.0}

    def pretended(settings, out, machine, test):
        key = settings["lr"], settings.get("scale", 0.1)
        calls.append((settings["method"], *key, settings["seed"], test))
        return {"val_accuracy": accuracies[key], "accuracy": 70.0 + settings["seed"] if test else None,
                "prompt_accuracy": None, "trainable": 5, "best_epoch": 1, "seconds": 0}  # fmt: skip

    monkeypatch.setattr(train, "fit", pretended)
    run("--method", "sa2vp", "linear", "--lr", 1e-3, 1e-2, "--scale", 0.1, 0.5, "--seed", 3, 4)
    search = [("sa2vp", lr, scale, 3, False) for lr, scale in accuracies]
    chosen = [("sa2vp", 1e-3, 0.5, seed, True) for seed in (3, 4)]  # the first of equals
    probe = [("linear", 1e-3, 0.1, 3, False), ("linear", 1e-2, 0.1, 3, False)]
    assert calls == search + chosen + probe + [("linear", 1e-2, 0.1, seed, True) for seed in (3, 4)]
    lines = one("runs", "*.csv").read_text().splitlines()
    assert lines[0] == "data,method,lr,scale,val_accuracy,accuracy,std,seeds,trainable"
    assert [line.split(",")[1:] for line in lines[2:6:3]] == [
        ["sa2vp", "0.001", "0.5", "60.0", "", "", "", "5"],
        ["sa2vp", "0.001", "0.5", "60.0", "73.5", f"{math.sqrt(0.5)}", "2", "5"],
    ]
    assert [line.split(",")[2:6] for line in lines[6:]] == [
        ["0.001", "", "40.0", ""], ["0.01", "", "60.0", ""], ["0.01", "", "60.0", "73.5"]]  # fmt: skip
    printed = capsys.readouterr().out
    assert "chosen: lr 0.001, scale 0.5 (" in printed and "chosen: lr 0.01 (if" in printed


def test_a_search_names_a_run_that_diverges_saves_nothing_of_it_and_tests_the_best_as_it_is(run, command, capsys):
    flags = ["--epochs", 2, "--lr"]
    error = refusal(capsys, command(*flags, 1e30, 1e-3, 1e-2, "--out", "runs"))
    assert "lr1e+30 could not run: the loss is not finite in epoch 1" in error
    assert not list(Path("runs").glob("*lr1e+30*/"))
    rows = table(one("runs", "*.csv"))
    assert [bool(row["val_accuracy"]) for row in rows] == [False, True, True, True]
    (chosen,) = (row for row in rows if row["accuracy"])
    alone = run(*flags, chosen["lr"], out="alone")
    assert float(chosen["accuracy"]) == result(alone)["accuracy"]


def test_a_folder_is_named_after_what_differs_from_the_defaults_of_data_set_and_method():
    for given, name in (
        ({"data": "cub", "method": "sa2vp", "seed": 1, "lr": 5e-3}, "cub-sa2vp-lr0.005-seed1"),
        ({"data": "cub", "method": "linear", "lr": 1e-2, "batch_size": 64, "warmup_epochs": 10}, "cub-linear"),
        ({"data": "vtab/dmlab", "method": "sa2vp", "scale": 1.5, "batch_size": 64}, "vtab-dmlab-sa2vp-batch_size64"),
        ({"data": "cub", "method": "sa2vp", "epochs": 20, "warmup_epochs": 2}, "cub-sa2vp-epochs20"),
        ({"data": "cub", "method": "full", "epochs": 20, "warmup_epochs": 3}, "cub-full-epochs20-warmup_epochs3"),
        ({"data": "cub", "method": "vpt", "weights": "x/a:b/c.pth"}, "cub-vpt-weightsa-b-c.pth"),
    ):
        assert train.run_name(train.complete_settings(given)) == name
    long = [train.file_name({"data": ["cub"], "method": ["vpt"], "lr": [0.1] * n}) for n in (50, 51)]
    assert long[0] != long[1] and long[0][:90] == long[1][:90] and [len(name) for name in long] == [100, 100]
    assert train.file_name({"data": ["../pets"], "method": ["vpt"]}) == "pets-vpt"
    command = {"data": ["vtab", "cub"], "method": ["vpt", "sa2vp"], "seed": [0, 1], "prompt_grid": [(7, 7), "half"]}
    assert train.file_name(command) == "vtab+cub-vpt+sa2vp-seed0+1-prompt_grid7,7+half"


# ---------------------------------------------------------------------- with a tuned model


@pytest.fixture
def tuned(run, files):
    """A function that makes a run of two heads with its backbone's weights in vit.pth, and gives its best.pt."""
    own = ["--weights", shutil.copy(files / "vit.pth", "vit.pth"), "--heads", 2, "--normalize", "half"]
    return lambda *flags: run(*own, *flags) / "best.pt"


def test_a_checkpoint_has_its_own_sizes_and_transforms(tuned, files, monkeypatch):
    best = tuned("--image-size", 96, "--prompt-grid", "3x4")
    model, meta = sa2vp.load(best)
    assert model.vit.blocks[0].attn.heads == 2 and model.vit.grid == (3, 3) and model.prompt_grid == (3, 4)
    assert meta["input"] == {"crop": True, "image_size": (96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    asked, transform = [], data.transform
    monkeypatch.setattr(data, "transform", lambda crop, **rest: asked.append(crop) or transform(crop, **rest))
    torch.save(checkpoint(best) | {"input": meta["input"] | {"crop": False}}, "squeezed.pt")
    for job in (["--eval", "squeezed.pt"], ["--predict", "squeezed.pt", str(files / "insects/test")]):
        train.main([*job, "--cpu", "--workers", "0"])
    assert asked and not any(asked)


def test_predict_prints_the_five_likeliest_classes_and_show_draws_evenly_spaced_images(run, files, monkeypatch, capsys):
    make_folder(Path("seven"), {"train": 3, "test": 1}, classes="abcdefg")
    write(Path(), {"damaged.jpg": b"\xff\xd8 no image", "empty/a.txt": ""})
    out, bee, folder = run("--data", "seven"), files / "insects/test/bee/1.png", files / "insects/train"
    model, meta = sa2vp.load(out / "best.pt")
    images, opened, open_picture = [bee, *sorted(folder.rglob("*.png"))], [], data.open_picture
    monkeypatch.setattr(data, "open_picture", lambda image: opened.append(image) or open_picture(image))
    capsys.readouterr()
    train.main(list(map(str, ["--predict", out, bee, folder, "--show", 2, "--cpu"])))
    assert opened == [*images, images[0], images[6]]  # of 13, what is shown is evenly spaced
    expected = []
    for image in images:
        pixels = data.transform(**meta["input"])(open_picture(image))
        with torch.inference_mode():
            probabilities = model(pixels[None])[0][0].softmax(dim=0).tolist()
        right = sorted(zip(probabilities, meta["classes"]), reverse=True)[:5]
        expected += [str(image), *(f"  {probability:7.2%}  {name}" for probability, name in right)]
    assert capsys.readouterr().out.splitlines() == [*expected, f"wrote {out}/show.png"]
    assert "no image in []" in refusal(capsys, ["--predict", out, "--cpu"])
    for path, says in (("empty", "no image"), ("absent.jpg", "absent.jpg"), ("damaged.jpg", "damaged.jpg")):
        assert says in refusal(capsys, ["--predict", out, path, "--cpu"])


def test_the_default_run_pretrains_its_backbone_once_and_resumes_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("shapes", "shapes-source"):
        load = functools.partial(data.TABLE[name].load, counts=(32, 12, 8))
        monkeypatch.setitem(data.TABLE, name, data.TABLE[name]._replace(load=load))
    monkeypatch.setitem(train.PRETRAINING, "epochs", 2)
    flags = ["--cpu", "--workers", "0", "--epochs", "1"]
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 1)
        assert fail(flags) == 130
    train.main(flags)
    assert capsys.readouterr().out.count("pre-training") == 2  # begun and resumed
    train.main([*flags, "--method", "linear", "--out", "elsewhere"])
    assert "pre-training" not in capsys.readouterr().out
    assert sorted(os.listdir("runs")) == ["shapes-sa2vp-epochs1", "shapes-vit"]


def test_a_tuned_model_is_loaded_with_weights_where_they_were_beside_it_or_given(tuned):
    path, weights = tuned(), Path("vit.pth")
    for place, given in ((weights, None), (path.with_name("vit.pth"), None), (Path("other.pth"), "other.pth")):
        weights = weights.rename(place)
        for file in (path, str(path.parent)):
            sa2vp.load(file, weights=given)
    content = checkpoint(path)
    for name in ("vit.pth", "best.pt"):  # moved elsewhere; the second is called as the run's own
        torch.save(content | {"settings": content["settings"] | {"weights": name}}, path)
        with pytest.raises(vit.InputError, match=rf"{name}: give --weights \(weights=\)"):
            sa2vp.load(path)
    torch.save(small_vit().state_dict(), weights)
    with pytest.raises(vit.InputError, match="another backbone .* give --weights"):
        sa2vp.load(path, weights)


def test_a_fully_tuned_model_needs_no_backbone_and_is_one_with_its_own_heads_and_normalization(tuned):
    path, images = tuned("--method", "full"), torch.randn(2, 3, 224, 224)
    Path("vit.pth").unlink()
    (model, _), backbone = sa2vp.load(path), vit.load_vit(path)
    assert torch.equal(backbone(images), model.vit(images))
    assert backbone.normalize == "half" and backbone.notes == []


def test_a_checkpoint_that_does_not_fit_is_named_in_one_sentence(tuned):
    path = tuned()
    content = checkpoint(path)
    settings = content["settings"]
    for changed, says in (
        (content | {"trained": content["trained"] | {"prompt_map.tokens": torch.ones(1)}}, "prompt_map.tokens is"),
        (content | {"settings": settings | {"method": "x"}}, "no method x"),
        (content | {"settings": settings | {"weights": None}}, "cannot load"),
        (content | {"settings": {}}, "'method'"),
        (content | {"backbone": {"patches": 3}}, "patches"),
        ({name: content[name] for name in content if name != "history"}, "no checkpoint of .* no history"),
    ):
        torch.save(changed, path)
        with pytest.raises(vit.InputError, match=says) as refused:
            sa2vp.load(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------------- the command line, files and words


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--data nonsense", "cub, nabirds, flowers"),
        ("--data cut --workers 1", "could not run: cannot read the image"),  # found by a worker, in the first epoch
        ("--epochs 3 --warmup-epochs 3", "above"),
        ("--batch-size 1000", "fewer than one batch of 1000"),
        ("--dropout 1", "--dropout"),
        ("--lr nan", "--lr"),
        ("--lr 0", "--lr"),
        ("--inner-dim 0", "--inner-dim"),
        ("--prompt-grid 0x7", "--prompt-grid"),
        ("--method linear --window 3", "window is not a setting of linear"),
        ("--method sa2vp --prompts 3", "prompts is not a setting of sa2vp"),
        ("--method magic", "invalid choice: 'magic'"),
        ("--image-size 100", "not a multiple of patch size"),
        ("--heads 3", "3 heads"),
        ("--window -1", "nothing to attend to"),
        ("--window 2", "must be odd"),
        ("--window 1 --prompt-grid 2x2", "nothing to attend to"),  # and not NaN
        ("--distill-layers 0 --fusion-layers 4", "must be"),
        ("--distill-layers 0,5", "must be"),
        ("--gpu 99", "no GPU 99"),
        ("--weights absent.pth", "absent.pth: give --weights"),
        ("--nonsense", "--nonsense"),
        ("--show 3", "--show draws with --eval or --predict"),
        ("--eval absent.pt", "absent.pt"),
        ("--eval some.pt --lr 1", "the only settings are --data and --weights"),
        ("--eval some.pt --weights a b", "with one value each"),
        ("--eval some.pt --ablate", "not allowed with argument"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(command, capsys, flags, part):
    cut = make_folder(Path("cut")) / "train/bee/0.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    given = flags.split()
    assert part in refusal(capsys, [*given, "--cpu"] if "--eval" in given else command(*given))
    assert not Path("runs").exists()


CONTENTS = {"pt": torch.ones(99), "json": {"a": 1}, "csv": [{"a": 1}], "png": Image.effect_noise((99, 99), 9)}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_is_there_whole_or_as_it_was_and_no_two_processes_write_to_the_same(tmp_path, monkeypatch, kind):
    path, parts = tmp_path / f"file.{kind}", [tmp_path / f"file.{kind}"]
    train.save(path, CONTENTS[kind])
    before = path.read_bytes()
    with path.open("rb") as reader:  # who reads the old file reads it to its end
        train.save(path, CONTENTS[kind])
        assert os.fstat(reader.fileno()).st_nlink == 0

    def stop(part, content):
        parts.append(part)
        part.touch()
        raise error

    monkeypatch.setattr(Path, "write_bytes", stop)
    for error in (OSError(28, "disk full"), KeyboardInterrupt("Ctrl-C")):
        with pytest.raises((vit.InputError, KeyboardInterrupt), match=f"cannot write .*file.{kind}: disk full|Ctrl-C"):
            train.save(path, CONTENTS[kind])
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    assert len(set(parts)) == 3


README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_readmes_program_predicts_and_exports_a_model_that_runs_without_this_project(run, capsys):
    (program,) = re.findall(r"```python\n(from pathlib import Path\n.*?)```", README, re.S)
    (named,) = re.findall(r'sa2vp.load\("(.*?)"\)', program)
    write(Path(), {"new.jpg": None})
    known = {}
    exec(program.replace(named, str(run())), known)
    assert capsys.readouterr().out.splitlines()[-1] in ("ant", "bee")
    images = torch.cat([known["image"], torch.randn(2, 3, 224, 224)])
    exported = torch.export.load("model.pt2").module()
    torch.testing.assert_close(exported(images), known["model"](images))


def test_the_readmes_measurement_compares_every_method_with_the_frozen_encoder(monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(from statistics import median\n.*?)```", README, re.S)
    small = functools.partial(vit.VisionTransformer, 32, 16, 16, 5, 2)
    monkeypatch.setattr(vit, "VisionTransformer", small)
    known = {}
    exec(program, known)
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == 2 * list(known["models"])
    assert [row[2] for row in rows[:: len(known["models"])]] == 2 * ["ratio 1.00"]


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert links and links <= anchors


def test_every_public_class_function_and_method_has_a_docstring():
    for module in (vit, sa2vp, data, train):
        tree = ast.parse(Path(module.__file__).read_text())
        scopes = [tree, *(part for part in tree.body if isinstance(part, ast.ClassDef))]
        found = [part for scope in scopes for part in scope.body if isinstance(part, ast.ClassDef | ast.FunctionDef)]
        without = {part.name for part in found if not ast.get_docstring(part)}
        described_by_the_class = {"__init__", "forward", "__len__", "__getitem__", "__iter__"}
        assert len(found) > 10 and without <= described_by_the_class


# ---------------------------------------------------------------------- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS = [{"method": name} for name in sa2vp.METHODS] + [{"prompt_grid": (7, 7)}, {"distill_layers": ()}]


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_on_cuda_has_nearly_the_loss_of_float32_on_the_cpu(settings, tmp_path, options, compiled):
    one, losses = settings(dropout=0.0, warmup_epochs=0, **options), []
    for where in (CPU, machine("--workers", "0", *(["--compile"] if compiled else []))):
        train.fit(one, tmp_path / str(where.device), where)
        losses.append(float(table(tmp_path / str(where.device) / "metrics.csv")[0]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@needs_cuda
def test_a_run_on_cuda_resumes_predicts_and_shows(command, files, monkeypatch):
    flags = command("--epochs", 3, "--gpu", 0)
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 1)
        assert fail(flags) == 130
    train.main(flags)
    out = one("runs", "*/")
    assert [row["epoch"] for row in table(out / "metrics.csv")] == ["1", "2", "3"]
    assert result(out)["peak_memory_mib"] > 0
    train.main(["--eval", str(out), "--show", "2", "--gpu", "0"])
    train.main(["--predict", str(out), str(files / "insects/test"), "--show", "2", "--gpu", "0"])
    assert (out / "show.png").exists()

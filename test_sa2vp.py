"""Each test's name is the claim that it proves. No network, no data: everything is made on the spot."""

import argparse
import csv
import inspect
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
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


def small_model(prompt_grid=None, window=3, image_size=(48, 64), **options):
    model = sa2vp.SA2VP(small_vit(image_size), 3, 4, 0.5, window=window, prompt_grid=prompt_grid, **options)
    for parameter in sa2vp.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def make_folder(folder, splits={"train": 6, "test": 4}, classes=("ant", "bee"), side=40):
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (side, side, 3)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
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
def run(files, tmp_path, monkeypatch):
    """Runs the command line in an empty folder, on the small data; returns the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, out="run", epochs=3):
        flags = [str(flag) for flag in flags]
        defaults = {"--data": files / "insects", "--weights": files / "vit.pth", "--epochs": epochs,
                    "--batch-size": 4, "--workers": 0, "--out": out}  # fmt: skip
        for flag, value in defaults.items():
            if flag not in flags and "--resume" not in flags:
                flags += [flag, str(value)]
        train.main([*flags, "--cpu"])
        return tmp_path / out

    return run


def refusal(capsys, arguments):
    """The one sentence with which the command line refuses bad input."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


# ---------------------------------------------------------------------- the backbone


def test_vit_equals_torchvision_with_the_same_weights(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(64, 16, 3, 2, 128, 256).eval()
    for parameter in theirs.parameters():
        if not parameter.any():  # class token and biases start as zeros, which would hide a mistake
            torch.nn.init.normal_(parameter, std=0.02)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = vit.load_vit(tmp_path / "vit.pth", 64).eval()
    assert (ours.mean, ours.std) == (vit.IMAGENET_MEAN, vit.IMAGENET_STD)
    theirs.heads = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
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
            arrays[f"{to}/{name}/kernel"] = state[f"{of}.attn.qkv.weight"][rows].T.reshape(dim, heads, dim // heads)
            arrays[f"{to}/{name}/bias"] = state[f"{of}.attn.qkv.bias"][rows].reshape(heads, dim // heads)
        arrays[f"{to}/out/kernel"] = state[f"{of}.attn.proj.weight"].T.reshape(heads, dim // heads, dim)
        arrays[f"{to}/out/bias"] = state[f"{of}.attn.proj.bias"]
    return arrays


def test_google_npz_gives_weights_heads_and_normalisation(tmp_path):
    backbone = small_vit(heads=4)
    np.savez(tmp_path / "vit.npz", **google_arrays(backbone))
    loaded = vit.load_vit(tmp_path / "vit.npz", image_size=32)
    assert loaded.blocks[0].attn.heads == 4 and (loaded.mean, loaded.std) == (vit.HALF, vit.HALF)
    assert loaded.fingerprint() == backbone.fingerprint()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), backbone(images))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
                                  lambda state: {"state_dict": state}])  # fmt: skip
def test_timm_names_load_bare_or_wrapped_and_heads_are_left_out(tmp_path, wrap):
    backbone = small_vit()
    extra = {name: torch.zeros(1) for name in ("head.weight", "fc_norm.bias", "mask_token", "decoder_pos_embed")}
    torch.save(wrap(backbone.state_dict() | extra), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", image_size=32, heads=2, mean=(0, 0, 0))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), backbone.state_dict().values()))
    assert (loaded.mean, loaded.std) == ((0, 0, 0), vit.IMAGENET_STD)


def test_position_embeddings_are_interpolated_to_another_grid(tmp_path):
    backbone = small_vit(image_size=64)
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    loaded = vit.load_vit(tmp_path / "vit.pth", image_size=(32, 96), heads=2)
    assert loaded.grid == (2, 6) and torch.equal(loaded.pos_embed[:, 0], backbone.pos_embed[:, 0])
    map_ = backbone.pos_embed[0, 1:].T.reshape(1, 16, 4, 4)
    expected = F.interpolate(map_, size=(2, 6), mode="bicubic", align_corners=False).reshape(16, 12).T
    torch.testing.assert_close(loaded.pos_embed[0, 1:], expected)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda state: state.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias"),
        (lambda state: state.pop("patch_embed.proj.weight"), "patch_embed.proj.weight"),
        (lambda state: state.update({"blocks.0.ls1.gamma": torch.ones(16)}), "blocks.0.ls1.gamma"),
        (lambda state: state.update({"norm.bias": torch.ones(3)}), "norm.bias"),
        (lambda state: state.update({"patch_embed.proj.weight": torch.ones(16, 3, 2, 16, 16)}), "patch_embed.proj"),
        (lambda state: state.update({"pos_embed": torch.ones(5)}), "pos_embed"),
    ],
)
def test_a_missing_left_over_or_misshapen_tensor_is_named(tmp_path, change, named):
    state = dict(small_vit().state_dict())
    change(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=named):
        vit.load_vit(tmp_path / "vit.pth", image_size=32, heads=2)


def test_a_width_that_is_no_multiple_of_64_asks_for_the_heads(tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="number of heads"):
        vit.load_vit(tmp_path / "vit.pth", image_size=32)


def test_a_fingerprint_tells_backbones_apart_by_any_tensor():
    backbone = small_vit()
    seen = {backbone.fingerprint()}
    for parameter in backbone.parameters():
        parameter.data += 1e-3
        seen.add(backbone.fingerprint())
    assert len(seen) == 1 + len(list(backbone.parameters()))


class Bomb:
    def __reduce__(self):
        return Path("went-off").touch, ()


def test_a_weights_file_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    np.savez("bomb.npz", cls=np.array([Bomb()], dtype=object))
    for name in ("bomb.pth", "bomb.npz"):
        with pytest.raises(ValueError, match=name):
            vit.load_vit(name)
        with pytest.raises(ValueError, match=name):
            sa2vp.load_official(name)
        with pytest.raises(ValueError, match=name):
            sa2vp.load(name)
    assert not Path("went-off").exists()


def test_the_papers_weights_are_downloaded_once_checked_and_never_half_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    content, calls = [b"damaged"], []

    def download(url, path):
        calls.append(url)
        Path(path).write_bytes(content[0])
        if not content[0]:
            raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for content[0] in (b"damaged", b""):
        with pytest.raises(OSError, match="--weights PATH"):
            vit.download_imagenet21k()
        assert not list(tmp_path.rglob("*.*"))
    content[0] = b"right"
    monkeypatch.setattr(vit, "IMAGENET21K_MD5", "7c4f29")
    assert vit.download_imagenet21k() == vit.download_imagenet21k() and len(calls) == 3
    assert calls[0].startswith("https://") and vit.download_imagenet21k().read_bytes() == b"right"


# ---------------------------------------------------------------------- the method


def draw(name, shape, mean=0.0, std=0.03):
    """Normal numbers that depend on nothing but the name: the recipe behind the golden numbers."""
    rng = np.random.RandomState(zlib.crc32(f"0:{name}".encode()))
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))


def official_checkpoint(dim, depth, tokens, inner, classes, patch, maps=2):
    """A checkpoint in the layout of the authors' released code."""
    state = {}

    def put(name, *shape, **how):
        state[name] = draw(name, shape, **how)

    def linear(name, outputs, inputs):
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.bias", outputs)

    def norm(name):
        put(f"{name}.weight", dim, mean=1.0, std=0.05)
        put(f"{name}.bias", dim)

    embeddings, encoder = "vit_base.transformer.embeddings", "vit_base.transformer.encoder"
    put(f"{embeddings}.position_embeddings", 1, tokens, dim)
    put(f"{embeddings}.cls_token", 1, 1, dim)
    put(f"{embeddings}.patch_embeddings.weight", dim, 3, patch, patch)
    put(f"{embeddings}.patch_embeddings.bias", dim)
    put(f"{embeddings}.ppt", 1, tokens, inner, std=0.2)
    linear(f"{embeddings}.ppt_proj", dim, inner)
    put(f"{encoder}.cross_conv", 2, dim)
    put(f"{encoder}.deep_ppt", maps, 1, tokens, inner, std=0.2)
    linear(f"{encoder}.deep_proj.0", dim, inner)
    linear(f"{encoder}.deep_proj.1", dim, inner)
    norm(f"{encoder}.encoder_norm")
    for i in range(depth):
        layer, cross = f"{encoder}.layer.{i}", f"{encoder}.cross_attn.{i}"
        norm(f"{layer}.attention_norm")
        norm(f"{layer}.ffn_norm")
        linear(f"{layer}.ffn.fc1", 4 * dim, dim)
        linear(f"{layer}.ffn.fc2", dim, 4 * dim)
        for theirs, kind in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "out")):
            linear(f"{layer}.attn.{kind}", dim, dim)
            for part in ("weight", "bias"):
                state[f"{cross}.attn.{theirs}.{part}"] = state[f"{layer}.attn.{kind}.{part}"]
        for part in ("weight", "bias"):
            state[f"{cross}.attention_norm.{part}"] = state[f"{layer}.attention_norm.{part}"]
        norm(f"{cross}.ffn_norm")
        linear(f"{cross}.ffn.fc1", inner, dim)
        linear(f"{cross}.ffn.fc2", dim, inner)
    linear("class_head", classes, dim)
    return state


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
    model = sa2vp.load_official(tmp_path / "official.pth")
    assert (model.vit.mean, model.vit.std) == (vit.HALF, vit.HALF)
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
    state = official_checkpoint(dim=64, depth=12, tokens=5, inner=8, classes=3, patch=4, maps=1)
    torch.save({"model": state}, tmp_path / "cars.pth")
    model = sa2vp.load_official(tmp_path / "cars.pth", scale=1.5)
    assert [i for i, interaction in enumerate(model.interactions) if interaction.fusion] == [4]
    assert model.interactions[0].scale == 1.5 and model.vit.image_size == (8, 8)


@pytest.mark.parametrize(
    "name, value",
    [
        ("vit_base.transformer.encoder.cross_attn.1.attn.to_q.weight", torch.zeros(64, 64)),  # no copy any more
        ("vit_base.transformer.encoder.deep_ppt", torch.zeros(2, 1, 6, 8)),
        ("vit_base.transformer.encoder.deep_ppt", torch.zeros(3, 1, 5, 8)),
        ("vit_base.transformer.encoder.cross_conv", torch.zeros(3, 64)),
        ("vit_base.transformer.surplus", torch.zeros(1)),
        ("class_head.weight", None),
    ],
)
def test_an_official_checkpoint_that_is_amiss_is_refused_by_name(tmp_path, name, value):
    state = official_checkpoint(dim=64, depth=12, tokens=5, inner=8, classes=3, patch=4) | {name: value}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "official.pth")
    hint = name.split("encoder.")[-1].split("transformer.")[-1].replace("class_head", "head")
    hint = f"fusion.prompt_map.tokens|{hint}"  # deep_ppt is taken apart into these
    with pytest.raises(ValueError, match=hint):
        sa2vp.load_official(tmp_path / "official.pth")


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

    def interact(i, x, y, to, of):
        block = backbone.blocks[i]
        (wq, wk, wv), (bq, bk, bv) = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        messages = []
        for t in range(len(x)):
            q = wq @ block.norm1(x[t]) + bq
            o = []
            for head in torch.arange(len(q)).chunk(heads):
                us = neighbours(t, to, of)
                keys = torch.stack([(wk @ block.norm1(y[u]) + bk)[head] for u in us])
                values = torch.stack([(wv @ block.norm1(y[u]) + bv)[head] for u in us])
                o.append((keys @ q[head] / math.sqrt(len(head))).softmax(dim=0) @ values)
            messages.append(block.attn.proj(torch.cat(o)))
        z = x + torch.stack(messages)
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
            next_prompt = next_prompt + interact(i, prompt, base, "P", "B")
        else:
            next_base = next_base + interact(i, base, prompt, "B", "P")
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
    model = small_model(prompt_grid, window, distill_layers=distill_layers, fusion_layers=fusion_layers)
    images = torch.randn(2, 3, 48, 64, dtype=torch.double)  # a grid of 3 x 4
    d = (0, 4) if distill_layers is None else distill_layers
    f = (4,) if fusion_layers is None else fusion_layers
    pairs = [literal(model, window, d, f, 0.5, image) for image in images]
    expected = [torch.stack(logits) for logits in zip(*pairs)]
    ours = model(images)
    torch.testing.assert_close(list(ours), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.predict(images), expected[0], rtol=1e-9, atol=1e-9)

    def gradients(logits):
        loss = sa2vp.two_pathway_loss(logits, torch.tensor([0, 2]))
        return torch.autograd.grad(loss, list(sa2vp.trained_parameters(model).values()), allow_unused=True)

    for name, grad, right in zip(sa2vp.trained_parameters(model), gradients(ours), gradients(expected)):
        assert (grad is None) == (right is None), name
        if grad is not None:
            torch.testing.assert_close(grad, right, rtol=1e-7, atol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("window", [1, 3, 5, None])
def test_in_one_interaction_a_prompt_token_reaches_just_its_neighbourhood(window):
    model = small_model(image_size=(80, 80), window=window)  # 5 x 5
    base = torch.randn(1, 26, 16, dtype=torch.double)
    prompt = torch.randn(1, 26, 16, dtype=torch.double, requires_grad=True)
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


@pytest.mark.parametrize("window", [0, 2, -1])
def test_a_window_is_odd_and_positive(window):
    with pytest.raises(ValueError, match="odd and positive"):
        small_model(window=window)


def test_an_empty_neighbourhood_is_an_error_and_not_a_nan():
    with pytest.raises(ValueError, match="nothing to attend to"):
        sa2vp.aligned_neighbourhood((3, 3), (2, 2), window=1)


def test_fusion_outside_distillation_is_an_error():
    for layers in ({"distill_layers": (0,), "fusion_layers": (4,)}, {"distill_layers": (0, 5)}):
        with pytest.raises(ValueError, match="must be among"):
            small_model(**layers)


def test_trained_parameters_are_as_many_as_the_paper_says():
    backbone = vit.VisionTransformer()
    for options, count in (
        (dict(inner_dim=8), 202_200),
        (dict(inner_dim=16), 372_912),
        (dict(inner_dim=32), 714_336),
        (dict(inner_dim=64), 1_397_184),
        (dict(inner_dim=16, prompt_grid=(7, 7)), 365_856),
        (dict(inner_dim=64, fusion_layers=(4,)), 1_333_888),  # cars
    ):
        assert sa2vp.count_trained(sa2vp.SA2VP(backbone, 10, **options)) == count
    assert sa2vp.count_trained(sa2vp.LinearProbe(backbone, 10)) == 0
    assert sa2vp.count_trained(sa2vp.VPTDeep(backbone, 10)) == 12 * 50 * 768
    encoder = sum(parameter.numel() for parameter in backbone.parameters())
    assert sa2vp.count_trained(sa2vp.FullFineTuning(backbone, 10)) == encoder


def test_what_does_not_depend_on_the_image_is_computed_for_a_batch_of_one():
    model = small_model()
    sizes = []
    for block in model.vit.blocks:
        block.norm2.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:2]))
    model(torch.randn(3, 3, 48, 64, dtype=torch.double))
    base, prompt, fusion, class_only = (3, 13), (3, 13), (1, 13), (3, 1)
    #       layer 0            1             2             3             4
    assert sizes == [base, fusion, base, prompt, base, prompt, base, prompt, class_only, class_only, fusion]


def test_prediction_leaves_out_the_last_layer_of_the_prompt_pathway():
    model = small_model(distill_layers=(0,))
    calls = []
    model.vit.blocks[-1].mlp.register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, 48, 64, dtype=torch.double)
    base, _ = model(images)
    assert len(calls) == 2
    assert torch.equal(model.predict(images), base) and len(calls) == 3


def test_one_dropout_governs_both_pathways_the_encoder_and_the_adapters():
    model = small_model(dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    images = torch.randn(2, 3, 48, 64, dtype=torch.double)
    assert torch.equal(model(images)[0], model(images)[0])
    model.train()
    assert not torch.equal(model(images)[0], model(images)[0])


def test_initialisation_is_the_methods():
    model = sa2vp.SA2VP(vit.VisionTransformer(64, 16, 256, 5, 4), 50, inner_dim=16)
    parameters = sa2vp.trained_parameters(model)
    for name, tensor in parameters.items():
        std = tensor.std().item()
        if name.endswith(("tokens", "gate", "head.weight")):
            assert std == pytest.approx(0.02, rel=0.2), name
        elif name.endswith(("proj.weight", "down.weight", "up.weight")):
            assert std == pytest.approx(math.sqrt(2 / (256 + 16)), rel=0.1), name  # Xavier
        elif name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones(256))
        elif name.endswith("norm.bias"):
            assert not tensor.any()
        elif name != "head.bias":
            assert std < 1e-5, name


def test_without_prompting_messages_it_predicts_as_a_linear_probe():
    model = small_model()
    probe = sa2vp.LinearProbe(model.vit, 3).double().eval()
    probe.head = model.head
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    assert not torch.allclose(model.predict(images), probe.predict(images))
    for interact in model.interactions:
        interact.scale = 0.0
    torch.testing.assert_close(model.predict(images), probe.predict(images))


def test_without_distillation_the_prompt_pathway_never_sees_the_image():
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    for distill_layers, blind in ((), True), ((4,), False):
        base, prompt = small_model(distill_layers=distill_layers)(images)
        assert torch.equal(prompt[0], prompt[1]) == blind and not torch.allclose(base[0], base[1])


def test_frozen_adapters_stay_as_they_were_drawn_and_come_back_with_the_model(run):
    model, meta = sa2vp.load(run("--freeze-adapters", "--lr", 0.01) / "best.pt")
    fresh, _ = train.build(meta["settings"], data.find(meta["settings"]["data"]), meta["classes"])
    tuned, trained = dict(model.named_parameters()), sa2vp.trained_parameters(model)
    for name, drawn in fresh.named_parameters():
        frozen = ".adapter." in name or name.startswith("vit.")
        assert torch.equal(tuned[name], drawn) == (name not in trained) == frozen, name


# ---------------------------------------------------------------------- looking inside


def last_layer_attention(layer, x):
    """The class token's softmax(q k' / sqrt(d / heads)), head by head, mean over the heads: (B, T)."""
    q, k, _ = layer.attn.qkv(layer.norm1(x)).chunk(3, dim=-1)
    width, rows = x.size(-1) // layer.attn.heads, []
    for start in range(0, x.size(-1), width):
        head = slice(start, start + width)
        scores = torch.einsum("bd,btd->bt", q[:, 0, head], k[:, :, head]) / math.sqrt(width)
        rows.append(scores.exp() / scores.exp().sum(dim=1, keepdim=True))
    return torch.stack(rows).mean(dim=0)


def test_the_attention_that_is_shown_is_the_last_layers_in_each_method():
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    model, vpt = small_model(), sa2vp.VPTDeep(small_vit((48, 64)), 3, prompts=4).double().eval()
    with torch.no_grad():
        x = model.vit.embed(images)
        for layer in model.vit.blocks[:-1]:
            x = layer(x)
        base, prompt = model.vit.embed(images), model.prompt_map() + model.prompt_positions()
        for layer, interact in zip(model.vit.blocks[:-1], model.interactions):
            base, prompt = interact(layer, base, prompt)
        mixed = vpt.vit.embed(images)
        for layer, prompts in zip(vpt.vit.blocks, vpt.prompts):
            mixed = torch.cat([mixed, prompts.expand(2, -1, -1)], dim=1)
            mixed = mixed if layer is vpt.vit.blocks[-1] else layer(mixed)[:, :13]
        for network, tokens in ((model.vit, x), (model, base), (vpt, mixed)):
            expected = last_layer_attention(model.vit.blocks[-1], tokens)[:, 1:13].view(2, 3, 4)
            torch.testing.assert_close(sa2vp.class_attention(network, images), expected)
    assert not torch.allclose(sa2vp.class_attention(model, images), sa2vp.class_attention(model.vit, images))


@pytest.mark.parametrize("distill_layers", [(0, 4), (1,), range(5)])
def test_the_prompting_strength_is_the_norm_of_what_prompts_add_to_each_image_token(distill_layers):
    model, images = small_model(distill_layers=distill_layers), torch.randn(2, 3, 48, 64, dtype=torch.float64)
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        base, prompt = model.vit.embed(images), model.prompt_map() + model.prompt_positions()
        for layer, interact in zip(model.vit.blocks[:-1], model.interactions):  # of the last, patches go nowhere
            unprompted = layer(base)
            base, prompt = interact(layer, base, prompt)
            expected += (base - unprompted)[:, 1:].norm(dim=-1).view(2, 3, 4)
    torch.testing.assert_close(sa2vp.prompting_strength(model, images), expected)


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_show_writes_a_row_for_each_of_some_test_pictures(run, capsys, method):
    out = run("--method", method, epochs=1)
    columns, asked, rows = {"sa2vp": (6, 100, 8), "vpt": (4, 2, 2), "full": (4, 2, 2), "linear": (3, 2, 2)}[method]
    train.main(["--eval", str(out / "best.pt"), "--show", str(asked), "--cpu"])  # there are eight pictures
    assert "show.png" in capsys.readouterr().out
    with Image.open(out / "show.png") as page:
        tile = (train.PAGE - train.GAP) // columns - train.GAP
        assert page.size == (1200, train.HEAD + train.GAP + rows * (tile + train.GAP))
        for column in range(columns):  # something in each of them, its title too
            left = train.GAP + column * (tile + train.GAP)
            for top, height in ((0, train.HEAD), (train.HEAD + train.GAP, tile)):
                assert len(page.crop((left, top, left + tile, top + height)).getcolors(10**6)) > 1


@pytest.mark.parametrize("crop", [False, True])
def test_pictures_are_shown_in_their_own_proportions_or_as_they_were_cropped(tmp_path, crop):
    Image.new("RGB", (90, 30), (200, 0, 0)).save(tmp_path / "wide.png")
    model = sa2vp.LinearProbe(small_vit(), 2).eval()
    meta = dict(method="linear", classes=["a", "b"], crop=crop, image_size=(32, 32), mean=vit.HALF, std=vit.HALF)
    page = np.asarray(train.draw_page(model, model.vit, meta, [(tmp_path / "wide.png", 0)]))
    tile = (train.PAGE - train.GAP) // 3 - train.GAP
    seen = page[train.HEAD + train.GAP :, train.GAP :][:tile, :tile]
    red = (abs(seen.astype(int) - (200, 0, 0)) < 3).all(axis=-1)
    assert red.any(axis=0).sum() == tile and red.any(axis=1).sum() == (tile if crop else round(tile / 3))


def test_principal_components_become_colours_and_noise_does_not():
    torch.manual_seed(0)
    tokens = 1e-5 * torch.randn(6, 5)
    tokens[:, 2] = torch.tensor([0.0, 1, 2, 3, 4, 5])
    colours = train.principal_colours(tokens).astype(int)
    ramp = colours[:, 0] if colours[0, 0] < 100 else colours[::-1, 0]  # a component has no sign
    assert ramp.tolist() == pytest.approx([0, 51, 102, 153, 204, 255], abs=1) and colours[:, 1:].max() < 5
    assert train.principal_colours(torch.ones(1, 5)).tolist() == [[0, 0, 0]]


def test_vpt_prompts_take_part_in_every_layer():
    model = sa2vp.VPTDeep(small_vit(), 3, prompts=2)
    (logits,) = model(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert model.prompts.grad.abs().sum(dim=(1, 2, 3)).all()


def test_the_loss_weighs_the_pathways_8_to_2():
    base, prompt, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = 0.8 * F.cross_entropy(base, labels) + 0.2 * F.cross_entropy(prompt, labels)
    torch.testing.assert_close(sa2vp.two_pathway_loss((base, prompt), labels), expected)
    torch.testing.assert_close(sa2vp.two_pathway_loss((base,), labels), F.cross_entropy(base, labels))


# ---------------------------------------------------------------------- the data


def save_picture(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (50, 40)).save(path)


def make_birds(folder, first_id, per_class=12):
    """cub and nabirds: four text files and a folder per class. Every second picture is of the training set."""
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split", "classes")}
    for label, name in enumerate(classes):
        class_id = first_id + 7 * label
        tables["classes"].append(f"{class_id} {name}")
        for i in range(per_class):
            image = f"0000139e-{label}{i}"
            save_picture(folder / "images" / name / f"{i}.jpg")
            tables["images"].append(f"{image} {name}/{i}.jpg")
            tables["image_class_labels"].append(f"{image} {class_id}")
            tables["train_test_split"].append(f"{image} {i % 2}")
    tables["classes"].append("999 Birds")  # nabirds lists parent classes
    for name, lines in tables.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_json_split(folder, images, first_id):
    """VPT's three files: two classes of 8, 2 and 4 pictures."""
    folder.mkdir()
    for split, count in {"train": 8, "val": 2, "test": 4}.items():
        listed = {f"{name}/{split}{i}.jpg": first_id + n for n, name in enumerate(("a", "b")) for i in range(count)}
        for path in listed:
            save_picture(images / path)
        (folder / f"{split}.json").write_text(json.dumps(listed))


class FakeScipy:
    """Stands for scipy.io, so that the tests need no scipy: .mat files hold .npz here."""

    @staticmethod
    def save(path, **arrays):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def loadmat(path, squeeze_me=False):
        with np.load(path, allow_pickle=True) as arrays:
            return {name: arrays[name] for name in arrays.files}


def cell(strings):
    """What scipy makes of a MATLAB cell array of strings."""
    column = np.empty((len(strings), 1), dtype=object)
    for row, string in zip(column, strings):
        row[0] = np.array([string])
    return column


def make_dogs(root):
    for split, count in (("train", 20), ("test", 4)):
        paths = [f"n0208-{name}/{split}{i}.jpg" for name in ("Pug", "Chow") for i in range(count)]
        for path in paths:
            save_picture(root / "dogs" / "Images" / path)
        labels = np.repeat([[1], [2]], count, axis=0)
        FakeScipy.save(root / "dogs" / f"{split}_list.mat", file_list=cell(paths), labels=labels)


def make_flowers(root):
    folder = root / "flowers-102"
    for i in range(1, 29):
        save_picture(folder / "jpg" / f"image_{i:05d}.jpg")
    FakeScipy.save(folder / "setid.mat", trnid=np.arange(1, 17), valid=np.arange(17, 21), tstid=np.arange(21, 29))
    FakeScipy.save(folder / "imagelabels.mat", labels=1 + np.arange(28) % 2)


def make_cars(root):
    folder = root / "stanford_cars"
    for split, count in (("train", 40), ("test", 8)):
        kinds = [("fname", object), ("class", int)]
        annotations = np.array([(f"{i:05d}.jpg", 1 + i % 2) for i in range(count)], dtype=kinds)
        for name in annotations["fname"]:
            save_picture(folder / f"cars_{split}" / name)
        file = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        FakeScipy.save(folder / file, annotations=annotations)
    FakeScipy.save(folder / "devkit" / "cars_meta.mat", class_names=np.array(["Audi", "BMW"], dtype=object))


def make_cifar(root, folder, coarse, files, names):
    (root / folder).mkdir(parents=True)
    for file in files:
        labels = [i % 2 for i in range(20)]
        entry = {"data": np.zeros((20, 3072), dtype=np.uint8), "fine_labels" if coarse else "labels": labels}
        (root / folder / file).write_bytes(pickle.dumps(entry))
    (root / folder / names[0]).write_bytes(pickle.dumps({names[1]: ["cat", "dog"]}))


def make_dtd(root):
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        paths = [f"{name}/{name}_{split}{i}.jpg" for name in ("dotted", "lined") for i in range(count)]
        for path in paths:
            save_picture(root / "dtd" / "dtd" / "images" / path)
        (root / "dtd" / "dtd" / "labels").mkdir(exist_ok=True)
        (root / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(paths))


def make_food(root):
    (root / "food-101" / "meta").mkdir(parents=True)
    for split, count in (("train", 20), ("test", 4)):
        listed = {name: [f"{name}/{split}{i}" for i in range(count)] for name in ("pho", "sushi")}
        for path in sum(listed.values(), []):
            save_picture(root / "food-101" / "images" / f"{path}.jpg")
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))


def make_gtsrb(root):
    base = root / "gtsrb" / "GTSRB"
    for i in range(40):
        save_picture(base / "Training" / f"{i % 2:05d}" / f"{i:05d}.ppm")
    for i in range(8):
        save_picture(base / "Final_Test" / "Images" / f"{i:05d}.ppm")
    lines = ["Filename;ClassId"] + [f"{i:05d}.ppm;{i % 2}" for i in range(8)]
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines))


def make_svhn(root):
    for split, count in (("train", 40), ("test", 8)):
        pictures = np.zeros((32, 32, 3, count), dtype=np.uint8)
        digits = np.array([[10 if i % 2 else 1] for i in range(count)])
        FakeScipy.save(root / f"{split}_32x32.mat", X=pictures, y=digits)


def make_vtab(root, name="clevr_count"):
    folder = root / "vtab-1k" / name
    lists = {"train800": 16, "val200": 4, "test": 8}
    for split, count in lists.items():
        for i in range(count):
            save_picture(folder / f"images/{split}/{i:06d}.png", mode="RGBA")
        (folder / f"{split}.txt").write_text("\n".join(f"images/{split}/{i:06d}.png {i % 8}" for i in range(count)))
    both = [(folder / f"{split}.txt").read_text() for split in ("train800", "val200")]
    (folder / "train800val200.txt").write_text("\n".join(both))


CIFAR10_FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
LAYOUTS = {  # name: (how to make a small copy below a root, sizes of train, val and test, whether it needs scipy)
    "cub": (lambda root: make_birds(root / "CUB_200_2011", 1), (10, 2, 12), False),
    "nabirds": (lambda root: make_birds(root / "nabirds", 295), (10, 2, 12), False),
    "flowers": (make_flowers, (16, 4, 8), True),
    "dogs": (make_dogs, (36, 4, 8), True),
    "cars": (make_cars, (36, 4, 8), True),
    "vtab/clevr_count": (make_vtab, (20, 0, 8), False),
    "hta/cifar10": (
        lambda root: make_cifar(root, "cifar-10-batches-py", False, CIFAR10_FILES, ("batches.meta", "label_names")),
        (90, 10, 20), False,
    ),
    "hta/cifar100": (
        lambda root: make_cifar(root, "cifar-100-python", True, ("train", "test"), ("meta", "fine_label_names")),
        (18, 2, 20), False,
    ),
    "hta/dtd": (make_dtd, (16, 4, 8), False),
    "hta/food101": (make_food, (36, 4, 8), False),
    "hta/gtsrb": (make_gtsrb, (36, 4, 8), False),
    "hta/svhn": (make_svhn, (36, 4, 8), True),
}  # fmt: skip
JSON_LAYOUTS = {  # name: (the data set's folder, where its pictures are, its first class id)
    "cub": ("CUB_200_2011", "images", 1),
    "nabirds": ("nabirds", "images", 0),
    "flowers": ("flowers-102", "", 1),
    "dogs": ("dogs", "Images", 1),
    "cars": ("stanford_cars", "", 1),
}


@pytest.fixture
def no_checksums(monkeypatch):
    """Small copies have other checksums than those that torchvision pins."""
    for module in ("cifar", "svhn", "flowers102"):
        check_integrity = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check_integrity, lambda path, md5=None: Path(path).exists())


@pytest.fixture
def fake_scipy(monkeypatch):
    package = types.ModuleType("scipy")
    package.io = FakeScipy
    monkeypatch.setitem(sys.modules, "scipy", package)
    monkeypatch.setitem(sys.modules, "scipy.io", FakeScipy)


def check(splits, sizes, num_classes):
    assert tuple(map(len, splits[:3])) == sizes
    assert len(splits.classes) == num_classes
    samples = [sample for part in splits[:3] for sample in part]
    assert {label for _, label in samples} <= set(range(num_classes))
    paths = [str(picture) for picture, _ in samples if isinstance(picture, Path)]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_and_trained_on(run, files, tmp_path, no_checksums, fake_scipy, name):
    make, sizes, _ = LAYOUTS[name]
    make(tmp_path / "root")
    splits = data.load(data.find(name), tmp_path / "root", seed=0)
    check(splits, sizes, len(splits.classes))
    assert len({label for _, label in splits.train}) == (8 if name.startswith("vtab") else 2)
    out = run("--data", name, "--root", tmp_path / "root", epochs=1)
    result = json.loads((out / "result.json").read_text())
    assert 0 <= result["accuracy"] <= 100 and (result["val_accuracy"] is None) == name.startswith("vtab")


@pytest.mark.parametrize("name", JSON_LAYOUTS)
def test_the_json_split_is_taken_where_it_lies_beside_the_images_and_needs_no_scipy(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    folder, images, first_id = JSON_LAYOUTS[name]
    make_json_split(tmp_path / folder, tmp_path / folder / images, first_id)
    for prefix in ("", "hta/") if name != "cars" else ("",):
        splits = data.load(data.find(prefix + name), tmp_path, seed=0)
        check(splits, (16, 4, 8), data.find(name).classes)
        assert "json" in splits.origin and splits.classes[:2] == ["a", "b"]


def test_a_json_split_without_class_folders_names_its_classes_by_number(tmp_path):
    make_json_split(tmp_path / "flowers-102", tmp_path / "flowers-102", 1)
    for split in ("train", "val", "test"):
        (tmp_path / "flowers-102" / f"{split}.json").write_text(json.dumps({"a/test0.jpg": 1, "a/test1.jpg": 2}))
    assert data.load(data.find("flowers"), tmp_path, seed=0).classes[:2] == ["class 0", "class 1"]


def test_an_incomplete_json_split_or_a_damaged_list_is_refused(tmp_path):
    folder = make_birds(tmp_path / "CUB_200_2011", 1)
    (folder / "train.json").write_text("{}")
    with pytest.raises(data.DataError, match="val.json"):
        data.load(data.find("cub"), tmp_path, seed=0)
    (folder / "train.json").unlink()
    (folder / "image_class_labels.txt").write_text("1 1")
    with pytest.raises(data.DataError, match="lists of cub cannot be read"):
        data.load(data.find("cub"), tmp_path, seed=0)


@pytest.mark.parametrize("name", [name for name, (_, _, scipy) in LAYOUTS.items() if scipy])
def test_where_scipy_is_needed_and_absent_the_error_says_so(tmp_path, monkeypatch, no_checksums, name):
    LAYOUTS[name][0](tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match=f"{name} .*pip install scipy"):
        data.load(data.find(name), tmp_path, seed=0)


@pytest.mark.parametrize("name", ["nabirds", "cars"])
def test_what_cannot_be_downloaded_says_where_it_is_and_where_to_put_it(tmp_path, fake_scipy, name):
    with pytest.raises(FileNotFoundError, match=f"{data.find(name).source}.*{tmp_path}"):
        data.load(data.find(name), tmp_path, seed=0)


def test_the_official_split_is_kept_and_labels_are_the_same_everywhere(tmp_path):
    for name, folder, first_id in (("cub", "CUB_200_2011", 1), ("nabirds", "nabirds", 295)):
        make_birds(tmp_path / folder, first_id)
        splits = data.load(data.find(name), tmp_path, seed=0)
        assert splits.classes == ["001.Black_footed_Albatross", "002.Laysan_Albatross"] and "official" in splits.origin
        for path, label in splits.train + splits.val + splits.test:
            assert path.parent.name == splits.classes[label]
            assert (int(path.stem) % 2 == 0) == ((path, label) in splits.test)


def test_the_table_has_the_papers_settings():
    def settings(names):
        return {name: (row.inner_dim, row.scale, row.batch_size) for name in names for row in [data.TABLE[name]]}

    assert [len(data.GROUPS[name]) for name in ("fgvc", "vtab", "hta")] == [5, 19, 10]
    assert settings(data.GROUPS["fgvc"]) == {
        "cub": (16, 0.1, 64), "nabirds": (32, 0.1, 64), "flowers": (8, 0.1, 64), "dogs": (32, 0.1, 64),
        "cars": (64, 1.5, 64),
    }  # fmt: skip
    exceptions = {"svhn": (16, 0.5), "resisc45": (16, 0.5), "dsprites_ori": (16, 0.1), "smallnorb_ele": (32, 0.5)}
    for group, usual in {"natural": (8, 0.1, 64), "specialized": (16, 1.5, 40), "structured": (32, 1.5, 40)}.items():
        for name, found in settings(data.GROUPS[f"vtab/{group}"]).items():
            assert found == (*exceptions.get(name.removeprefix("vtab/"), usual[:2]), usual[2]), name
    assert set(settings(data.GROUPS["hta"]).values()) == {(64, 0.1, 64)}
    for row in data.ROWS[:34]:
        method = train.settle({"data": row.name})
        assert method["lr"] == (5e-4 if row.name in ("vtab/oxford_iiit_pet", "vtab/clevr_count") else 1e-3)
        assert method["fusion_layers"] == ((4,) if row.name == "cars" else None)
        assert (method["epochs"], method["warmup_epochs"], method["weight_decay"]) == (100, 10, 1e-4)
        assert (method["dropout"], method["window"], method["seed"], row.image_size) == (0.1, 3, 42, 224)
        assert row.crop == (row.name in data.GROUPS["fgvc"]) and row.vtab == row.name.startswith("vtab/")
    counts = [200, 555, 102, 120, 196]
    counts += [102, 100, 47, 102, 37, 10, 397] + [2, 10, 45, 5] + [8, 6, 6, 4, 16, 16, 18, 9]
    counts += [200, 555, 102, 120, 10, 100, 47, 101, 43, 10]
    assert [row.classes for row in data.ROWS[:34]] == counts


def test_vtab_is_tuned_on_train800_and_val200_without_a_look_at_the_test_data(run, tmp_path, capsys):
    make_vtab(tmp_path / "root")
    (tmp_path / "root" / "vtab-1k" / "clevr_count" / "test.txt").unlink()
    splits = data.load(data.find("vtab/clevr_count"), tmp_path / "root", seed=0, tune=True)
    assert [len(samples) for samples in splits[:3]] == [16, 4, 0]
    out = run("--data", "vtab/clevr_count", "--root", tmp_path / "root", "--tune")
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy"] is None and 0 <= result["val_accuracy"] <= 100
    assert "--tune" in refusal(capsys, ["--data", "cub", "--tune", "--cpu"])


def test_a_checkpoint_is_tested_with_the_transforms_it_was_trained_with(run, files, capsys, monkeypatch):
    out, asked = run(epochs=1), []
    checkpoint = torch.load(out / "best.pt", weights_only=True) | {"crop": False}
    torch.save(checkpoint, out / "squeezed.pt")
    transform = data.transform
    monkeypatch.setattr(data, "transform", lambda crop, *rest: asked.append(crop) or transform(crop, *rest))
    for name in ("best.pt", "squeezed.pt"):
        train.main(["--eval", str(out / name), "--cpu", "--workers", "0"])
    assert asked == [True, False]


def test_a_checkpoint_that_lacks_something_is_refused_by_name(run, capsys):
    out = run(epochs=1)
    whole = torch.load(out / "best.pt", weights_only=True)
    capsys.readouterr()
    for change in ({"method": "magic"}, {"settings": None}, {"trained": {}}, {"trained": 1}, {"options": {"magic": 1}}):
        damaged = {name: value for name, value in (whole | change).items() if value is not None}
        torch.save(damaged, out / "damaged.pt")
        assert "damaged.pt" in refusal(capsys, ["--eval", out / "damaged.pt", "--cpu"])


def test_a_run_remembers_where_its_data_was(run, tmp_path, capsys):
    make_birds(tmp_path / "elsewhere" / "CUB_200_2011", 1)
    out = run("--data", "cub", "--root", tmp_path / "elsewhere", epochs=1)
    capsys.readouterr()
    for command in (["--eval", str(out / "best.pt"), "--cpu"], ["--resume", "--out", str(out), "--cpu"]):
        train.main(command)
        assert "test" in capsys.readouterr().out


def test_vtab_reports_the_last_epoch(run, tmp_path):
    make_vtab(tmp_path / "root")
    out = run("--data", "vtab/clevr_count", "--root", tmp_path / "root")
    assert json.loads((out / "result.json").read_text())["best_epoch"] == 3
    assert torch.load(out / "best.pt", weights_only=True)["epoch"] == 3


def test_the_list_has_a_line_for_each_data_set(capsys):
    train.main(["--list"])
    lines = capsys.readouterr().out.strip().splitlines()[1:]
    assert [line.split()[0] for line in lines[:34]] == [row.name for row in data.ROWS[:34]]


def small_group(root, monkeypatch):
    for name in ("cub", "nabirds"):
        LAYOUTS[name][0](root)
    make_vtab(root, "dsprites_loc")
    monkeypatch.setitem(data.GROUPS, "trio", ["cub", "vtab/dsprites_loc", "nabirds"])
    monkeypatch.setitem(data.PUBLISHED["sa2vp"], "trio", 90.0)


def test_a_group_killed_and_resumed_ends_with_the_table_of_one_that_was_not(run, tmp_path, monkeypatch, capsys):
    small_group(tmp_path / "root", monkeypatch)
    flags = ["--data", "trio", "--root", tmp_path / "root", "--seeds", 0, 1]
    whole = run(*flags, out="whole", epochs=2)
    table = capsys.readouterr().out.split("data  ")[-1]
    evaluate, calls = train.evaluate, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 7:  # in the third run of six
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train, "evaluate", killed)
    with pytest.raises(SystemExit):
        run(*flags, out="broken", epochs=2)
    command = shlex.split(capsys.readouterr().err.strip().splitlines()[-1].split("python train.py ")[1])
    first = (tmp_path / "broken" / "cub-seed0" / "best.pt").stat().st_mtime_ns
    train.main(command)
    assert (tmp_path / "broken" / "cub-seed0" / "best.pt").stat().st_mtime_ns == first  # what was finished is kept
    assert capsys.readouterr().out.split("data  ")[-1] == table
    assert (tmp_path / "broken/results.csv").read_text() == (whole / "results.csv").read_text()
    rows = list(csv.DictReader((whole / "results.csv").open()))
    assert [row["data"] for row in rows] == ["cub", "vtab/dsprites_loc", "nabirds", "trio"]
    means = [float(row["accuracy"]) for row in rows]
    assert means[3] == pytest.approx(sum(means[:3]) / 3) and rows[3]["published"] == "90.0" and rows[0]["std"]
    assert "other settings" in refusal(capsys, [*command, "--lr", "0.5"])


def test_a_member_of_a_group_whose_data_is_missing_is_named_and_the_rest_still_runs(run, tmp_path, monkeypatch, capsys):
    small_group(tmp_path / "root", monkeypatch)
    (tmp_path / "root" / "nabirds" / "images.txt").unlink()
    with pytest.raises(SystemExit) as stop:
        run("--data", "trio", "--root", tmp_path / "root", epochs=1)
    assert stop.value.code == 2 and "nabirds could not run" in capsys.readouterr().err
    rows = list(csv.DictReader(Path("run/results.csv").open()))
    assert [bool(row["accuracy"]) for row in rows] == [True, True, False, False]


def test_an_ablation_changes_one_thing_a_run_and_goes_on_after_an_interruption(run, monkeypatch, capsys):
    flags = ["--ablate", "--scale", 0.5, "--lr", 0.02, "--seed", 7]
    fit, begun = train.fit, []

    def killed(settings, *arguments, **options):
        begun.append(1)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return fit(settings, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", killed)
        with pytest.raises(SystemExit):
            run(*flags, epochs=2)
    command = shlex.split(capsys.readouterr().err.strip().splitlines()[-1].split("python train.py ")[1])
    train.main(command)
    table = capsys.readouterr().out.split("variant  ")[-1].splitlines()[1:]

    one = dict(inner_dim=16, scale=0.5, dropout=0.1, window=3, prompt_grid=None, distill_layers=None,
               fusion_layers=None, freeze_adapters=False)  # fmt: skip
    changed = {
        "full-method": {}, "linear-probe": None, "window-none": {"window": None}, "window-1": {"window": 1},
        "window-5": {"window": 5}, "no-distillation": {"distill_layers": ()}, "no-fusion": {"fusion_layers": ()},
        "half-size-map": {"prompt_grid": (3, 3)}, "adapters-frozen": {"freeze_adapters": True},
    }  # fmt: skip
    rows = list(csv.DictReader(Path("run/ablation.csv").open()))
    assert [row["variant"] for row in rows] == list(changed) == [line.split()[0] for line in table]
    for row in rows:
        best = torch.load(Path("run", row["variant"], "best.pt"), weights_only=True)
        change = changed[row["variant"]]
        assert best["options"] == ({} if change is None else one | change)
        same_for_all = {name: best["settings"][name] for name in ("seed", "epochs", "batch_size")}
        assert same_for_all == {"seed": 7, "epochs": 2, "batch_size": 4}
        assert best["settings"]["lr"] == (0.02 if change is not None else train.LEARNING_RATE["linear"])
        result = json.loads(Path("run", row["variant"], "result.json").read_text())
        assert float(row["accuracy"]) == result["accuracy"] and int(row["trainable"]) == result["trainable"]
        assert float(row["change"]) == result["accuracy"] - float(rows[0]["accuracy"])
    same(outcome(Path("run/full-method")), outcome(run(*flags[1:], out="alone", epochs=2)))
    refused = {("--window", 3): "changes it itself", ("--method", "vpt"): "changes it itself",
               ("--data", "fgvc"): "one data set"}  # fmt: skip
    for flags, part in refused.items():
        assert part in refusal(capsys, ["--ablate", "--cpu", "--out", "other", *flags])


def test_a_variant_that_cannot_run_is_named_and_the_others_still_run(run, capsys, monkeypatch):
    variants = {"full-method": {}, "impossible": {"fusion_layers": (1,)}, "window-1": {"window": 1}}
    monkeypatch.setattr(train, "ABLATIONS", variants)
    with pytest.raises(SystemExit) as stop:
        run("--ablate", epochs=1)
    assert stop.value.code == 2
    assert "impossible could not run: fusion layers (1,) must be among" in capsys.readouterr().err
    rows = list(csv.DictReader(Path("run/ablation.csv").open()))
    assert [bool(row["accuracy"]) for row in rows] == [True, False, True] and rows[2]["change"]


def made_up(accuracies):
    """Results of runs, {seed: accuracy}."""
    return [dict(method="sa2vp", seed=seed, accuracy=a, val_accuracy=0, trainable=1) for seed, a in accuracies.items()]


def test_a_group_has_a_mean_only_of_the_same_seeds_of_every_member(monkeypatch):
    monkeypatch.setitem(data.GROUPS, "pair", ["a", "b"])
    for b, mean in (({0: 70.0, 1: 40.0}, 55), ({1: 40.0}, None)):
        rows = train.group_table({"a": made_up({0: 50.0, 1: 60.0}), "b": made_up(b)})
        assert rows[-1]["data"] == "pair" and rows[-1]["accuracy"] == mean
    assert train.group_table({"a": made_up({0: 50.0}), "b": made_up({1: 40.0})})[-1]["accuracy"] is None


def test_an_ablations_change_is_from_the_full_method_with_the_same_seed():
    results = {"full-method": made_up({0: 50.0, 1: 90.0}), "other": made_up({1: 80.0}), "none": []}
    rows = train.ablation_table(results)
    assert [row["change"] for row in rows] == [0, -10, None] and [row["accuracy"] for row in rows] == [70, 80, None]


@pytest.mark.parametrize(
    "listed, named", [({"001.x/absent.jpg": 1}, "absent.jpg"), ({"002.Laysan_Albatross/0.jpg": 0}, "0.jpg")]
)
def test_a_listed_picture_that_is_missing_or_a_label_out_of_range_is_named(tmp_path, listed, named):
    folder = make_birds(tmp_path / "CUB_200_2011", 1)
    for split in ("train", "val", "test"):
        (folder / f"{split}.json").write_text(json.dumps(listed))
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        data.load(data.find("cub"), tmp_path, seed=0)


def test_a_folder_is_read_with_its_own_validation_or_with_a_tenth_held_out(tmp_path):
    folder = make_folder(tmp_path / "a", {"train": 20, "test": 3})
    splits = data.load(data.find(str(folder)), tmp_path, seed=1)
    assert [len(samples) for samples in splits[:3]] == [36, 4, 6] and splits.classes == ["ant", "bee"]
    assert [label for _, label in splits.val] == [0, 0, 1, 1]
    assert not {path for path, _ in splits.train} & {path for path, _ in splits.val}
    assert splits == data.load(data.find(str(folder)), tmp_path, seed=1)
    assert splits.val != data.load(data.find(str(folder)), tmp_path, seed=2).val
    make_folder(tmp_path / "b", {"train": 20, "val": 5, "test": 3})
    splits = data.load(data.find(str(tmp_path / "b")), tmp_path, seed=1)
    assert [len(samples) for samples in splits[:3]] == [40, 10, 6]


def test_a_class_of_one_picture_stays_in_train():
    assert data.hold_out([("a", 0), ("b", 1), ("c", 1)], seed=0)[0][0] == ("a", 0)


def test_an_interrupted_download_leaves_nothing_and_says_what_to_fetch(tmp_path, monkeypatch):
    def interrupted(url, part, md5):
        (Path(part) / "CUB_200_2011.tgz").write_bytes(b"half")
        raise stop

    monkeypatch.setattr(data, "download_and_extract_archive", interrupted)
    for stop, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError("no network"), FileNotFoundError)):
        with pytest.raises(seen) as error:
            data.load(data.find("cub"), tmp_path / "root", seed=0)
        assert not list((tmp_path / "root").iterdir())
    assert "https://data.caltech.edu" in str(error.value) and "CUB_200_2011" in str(error.value)


def test_drawn_pictures_are_always_the_same_and_balanced():
    splits, again = (data.load(data.find("shapes"), Path("."), seed=seed) for seed in (1, 2))
    for ours, theirs in zip(splits[:3], again[:3]):
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(ours, theirs))
    assert not any(np.array_equal(splits.train[0][0], picture) for picture, _ in splits.test)
    source = data.drawn(data.what_and_which_colour, data.KINDS, 64, 32, 32)(None, None, 0, False)
    for part, classes in ((splits.val, 8), (source.train, 16)):
        counts = np.bincount([label for _, label in part], minlength=classes)
        assert len(counts) == classes and counts.min() == counts.max()


def test_the_target_task_of_the_drawn_pictures_is_the_direction_from_red_to_blue():
    def centre(picture, channel):
        hue = picture.astype(int)
        ys, xs = np.nonzero(hue[..., channel] - np.delete(hue, channel, axis=2).max(axis=2) > 100)
        return np.array([xs.mean(), ys.mean()])

    for picture, label in data.where_is_blue(np.random.default_rng(5), 80):
        dx, dy = centre(picture, 2) - centre(picture, 0)
        angle = math.radians(45 * label)
        assert math.cos(angle) * dx + math.sin(angle) * dy > 0.85 * math.hypot(dx, dy), data.DIRECTIONS[label]


def test_transforms_are_the_papers():
    picture = Image.new("RGB", (500, 400), (255, 0, 0))
    for training in (True, False):
        for crop in (True, False):
            image = data.transform(crop, training, (224, 224), (0.5,) * 3, (0.5,) * 3)(picture)
            assert image.shape == (3, 224, 224)
            assert torch.equal(image[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg")])
def test_pictures_of_every_kind_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (9, 7), (200, 200, 200)).convert(mode).save(path)
    picture = data.open_picture(path)
    assert picture.mode == "RGB" and picture.size == (9, 7)
    assert abs(picture.getpixel((4, 3))[0] - 200) < 6


def test_a_picture_of_16_bits_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((7, 9), 30_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert data.open_picture(tmp_path / "deep.png").getpixel((4, 3)) == (116, 116, 116)


def test_a_picture_that_the_camera_turned_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (9, 7)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.open_picture(tmp_path / "turned.jpg").size == (7, 9)


def test_augmentation_does_not_depend_on_the_number_of_workers(files):
    splits = data.load(data.find(str(files / "insects")), files, seed=0)
    show = data.transform(True, True, (32, 32), (0.5,) * 3, (0.5,) * 3)
    epochs = []
    for workers in (0, 2):
        loader = data.make_loader(splits.train, show, 4, workers, shuffle_seed=3)
        loader.sampler.epoch = 1
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*epochs)
    loader.sampler.epoch = 2
    assert not torch.equal(epochs[0], torch.cat([images for images, _ in loader]))


# ---------------------------------------------------------------------- training


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [train.learning_rate(step, 10, 100, 1e-3) for step in range(100)]
    assert rates[0] == 0 and rates[9] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[4] == pytest.approx(1e-3 * 4 / 9)
    assert rates[55] == pytest.approx(1e-7 + (1e-3 - 1e-7) / 2)
    assert 1e-7 < rates[99] < 1e-6
    assert train.learning_rate(0, 0, 10, 1e-3) == 1e-3 and train.learning_rate(0, 1, 10, 1e-3) == 0


def test_weight_decay_is_on_matrices_and_prompt_maps_alone():
    model = small_model()
    decayed, rest = train.make_optimizer(model, 0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} == {"weight", "tokens"}
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert {names[id(p)].split(".")[-1] for p in rest["params"]} == {"weight", "bias", "gate"}
    assert len(decayed["params"]) + len(rest["params"]) == len(sa2vp.trained_parameters(model))


def outcome(out):
    """Everything a run leaves but its times."""
    result = json.loads((out / "result.json").read_text())
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    for row in (result, *rows):
        row.pop("seconds", None), row.pop("images_per_second", None)
    tensors = [torch.load(out / name, weights_only=True)["trained"] for name in ("best.pt", "last.pt")]
    return result, rows, tensors


def same(a, b):
    assert a[:2] == b[:2]
    for ours, theirs in zip(a[2], b[2]):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", sa2vp.METHODS)
def test_a_run_from_the_command_line_writes_what_it_promises(run, files, capsys, method):
    out = run("--method", method)
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == method and result["data"] == "insects" and result["seed"] == 42
    assert (result["prompt_accuracy"] is None) == (method != "sa2vp")
    assert 0 <= result["accuracy"] <= 100 and result["images_per_second"] > 0 and result["seconds"] > 0
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    values = [float(row["val_accuracy"]) for row in rows]
    assert result["val_accuracy"] == max(values) and result["best_epoch"] == 1 + values.index(max(values))

    best = torch.load(out / "best.pt", weights_only=True)
    assert best["classes"] == ["ant", "bee"] and best["epoch"] == result["best_epoch"]
    assert any(name.startswith("vit.") for name in best["trained"]) == (method == "full")
    assert result["trainable"] == sum(t.numel() for n, t in best["trained"].items() if not n.startswith("head."))
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "metrics.csv", "result.json"]

    capsys.readouterr()
    train.main(["--eval", str(out / "best.pt"), "--cpu"])
    assert f"test {result['accuracy']} %" in capsys.readouterr().out


def test_the_backbone_is_bit_for_bit_unchanged_by_training(files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = vit.load_vit(files / "vit.pth")
    given = {"data": str(files / "insects"), "weights": files / "vit.pth", "epochs": 2, "batch_size": 4}
    for method, changes in (("sa2vp", False), ("vpt", False), ("linear", False), ("full", True)):
        settings = train.settle(given | {"method": method})
        model = train.fit(settings, Path(method), Path("."), 0, torch.device("cpu"), compiled=False)
        same_bits = [torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.vit.state_dict().values())]
        assert all(same_bits) != changes


@pytest.mark.parametrize("killed_in", [0, 2])
def test_a_resumed_run_ends_with_the_numbers_of_one_never_interrupted(run, monkeypatch, capsys, killed_in):
    whole = outcome(run("--dropout", 0.2, out="whole", epochs=4))
    evaluate, calls = train.evaluate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == killed_in + 1:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("--dropout", 0.2, out="broken", epochs=4)
    assert stop.value.code == 130
    assert capsys.readouterr().err.rstrip().endswith("--out broken --cpu --resume")
    same(whole, outcome(run("--resume", "--out", "broken", out="broken")))
    same(whole, outcome(run("--resume", "--out", "broken", out="broken")))  # a finished run stays as it is


def test_a_resumed_run_refuses_other_settings_than_its_own(run, capsys):
    out = run("--lr", 0.01)
    before = outcome(out)
    assert "lr 0.01" in refusal(capsys, ["--resume", "--out", out, "--lr", 0.02, "--cpu"])
    same(before, outcome(out))


def test_what_is_left_of_a_run_is_never_taken_for_another(run, capsys):
    out = run(epochs=1)
    (out / "last.pt").unlink()
    command = ["--method", "linear", "--out", out, "--cpu"]
    assert "already holds a run" in refusal(capsys, command)
    assert "no run to resume" in refusal(capsys, [*command, "--resume"])
    (out / "last.pt").write_bytes((out / "best.pt").read_bytes())
    assert "not what a run goes on from" in refusal(capsys, [*command, "--resume"])
    several = ["--out", out, "--cpu", "--resume", "--ablate"]
    assert "holds a single run" in refusal(capsys, several)
    assert "no run to resume" in refusal(capsys, [*several, "--out", "elsewhere"])


def test_a_folder_that_holds_a_run_is_refused_and_default_folders_are_numbered(run, capsys, files):
    out = run()
    before = outcome(out)
    common = ["--data", files / "insects", "--weights", files / "vit.pth", "--cpu"]
    assert "already holds a run" in refusal(capsys, [*common, "--out", out])
    same(before, outcome(out))
    for _ in range(2):
        train.main([str(flag) for flag in [*common, "--epochs", 1, "--batch-size", 4, "--workers", 0]])
    assert Path("runs/insects-sa2vp/result.json").exists() and Path("runs/insects-sa2vp-2/result.json").exists()


def torchrun(processes, arguments, folder):
    """Runs train.py in several processes; returns the finished command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [train.__file__, *map(str, arguments), "--cpu"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_two_processes_train_and_test_as_one_does(run, files, tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "pictures", {"train": 9, "val": 5, "test": 3}, classes=("ant", "bee", "cat"))
    flags = ["--data", tmp_path / "pictures", "--weights", files / "vit.pth", "--dropout", 0, "--epochs", 3]
    flags += ["--batch-size", 4, "--workers", 0]
    one = outcome(run(*flags, "--out", "one", out="one"))
    done = torchrun(2, [*flags, "--out", "two"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch") == one[1][-1]["epoch"].count("3") * 3 + 1  # one process speaks
    two = outcome(tmp_path / "two")
    for ours, theirs in zip(one[1], two[1]):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert ours["val_accuracy"] == theirs["val_accuracy"]
    assert one[0] == two[0]
    capsys.readouterr()
    train.main(["--eval", "two/best.pt", "--cpu"])
    assert f"test {two[0]['accuracy']} %" in capsys.readouterr().out
    monkeypatch.setattr(train, "world_size", lambda: 2)
    assert "cannot share a batch of 5 evenly" in refusal(capsys, [*flags, "--out", "odd", "--batch-size", 5, "--cpu"])
    assert not Path("odd").exists()


def test_every_picture_is_counted_once_by_however_many_processes(files):
    samples = list(range(11))
    for world in (1, 2, 3):
        loaders = [data.make_loader(samples, None, 6, 0, share=(rank, world)) for rank in range(world)]
        assert sorted(index for loader in loaders for index, _ in loader.sampler) == samples
        shares = [list(data.Shuffled(11, 6, seed=3, rank=rank, world=world)) for rank in range(world)]
        assert [sorted(sum(shares, []))] == [sorted(data.Shuffled(11, 6, seed=3))]


def test_compiling_changes_results_by_no_more_than_rounding_and_happens_twice(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"data": str(files / "insects"), "weights": files / "vit.pth", "epochs": 2, "batch_size": 4, "dropout": 0.0}
    compiled = []
    real = torch.compile
    backend = lambda graph, inputs: compiled.append(1) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda model, **how: real(model, backend=backend, **how))
    for flag in (False, True):
        train.fit(train.settle(given), Path(f"compiled-{flag}"), Path("."), 0, torch.device("cpu"), compiled=flag)
    assert len(compiled) == 2  # for training and for evaluation; the last batch of the latter is smaller
    plain, fast = (outcome(Path(f"compiled-{flag}")) for flag in (False, True))
    for ours, theirs in zip(plain[1], fast[1]):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)


def test_the_bench_measures_its_rows_beside_the_encoder(files, capsys, monkeypatch):
    some = ["train: frozen encoder", "train: SA2VP"]
    assert set(some) < set(train.BENCH_ROWS)
    monkeypatch.setattr(train, "BENCH_ROWS", some)
    train.main(["--bench", "--weights", str(files / "vit.pth"), "--batch-size", "2", "--cpu"])
    lines = capsys.readouterr().out.strip().splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines if line.startswith("train:")}
    assert list(rows) == some
    assert rows["train: frozen encoder"][-3] == "1.00"
    assert all(float(row[-4]) > 0 and float(row[-2]) > 0 for row in rows.values())


def test_a_tuned_model_is_loaded_for_prediction_and_a_wrong_backbone_refused(run, files, tmp_path):
    out = run("--window", "none", "--prompt-grid", "3x4")
    model, meta = sa2vp.load(out / "best.pt")
    assert meta["classes"] == ["ant", "bee"] and meta["image_size"] == (224, 224) and not model.training
    assert model.prompt_grid == (3, 4) and model.predict(torch.randn(2, 3, 224, 224)).shape == (2, 2)
    torch.manual_seed(1)
    torch.save(vit.VisionTransformer(224, 32, 64, 5, 1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="another backbone"):
        sa2vp.load(out / "best.pt", weights=tmp_path / "other.pth")


def test_predict_prints_the_likeliest_classes_of_pictures_and_folders(run, files, tmp_path, capsys):
    make_folder(tmp_path / "seven", {"train": 3, "test": 1}, classes=list("abcdefg"))
    out = run("--data", tmp_path / "seven", epochs=1)
    pictures = [files / "insects/test/bee/1.png", files / "insects/train"]
    model, meta = sa2vp.load(out / "best.pt")
    show = data.transform(meta["crop"], False, meta["image_size"], meta["mean"], meta["std"])
    capsys.readouterr()
    train.main(["--predict", *map(str, [out / "best.pt", *pictures]), "--json", "--cpu"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    inside = sorted(path for path in pictures[1].rglob("*.png"))
    assert [entry["picture"] for entry in printed] == [str(path) for path in [pictures[0], *inside]]
    for entry in printed:
        with torch.inference_mode():
            (logits,) = model.predict(show(data.open_picture(Path(entry["picture"])))[None])
        right = sorted(zip(logits.softmax(dim=0).tolist(), meta["classes"]), reverse=True)[:5]
        assert [top["class"] for top in entry["top"]] == [name for _, name in right]
        assert [top["probability"] for top in entry["top"]] == pytest.approx([p for p, _ in right], rel=1e-4)
    train.main(["--predict", str(out / "best.pt"), str(pictures[0]), "--cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(pictures[0]) and [line.split()[1] for line in lines[1:]] == [
        top["class"] for top in printed[0]["top"]
    ]


def test_predict_names_what_it_cannot_read_and_goes_on(run, files, tmp_path, capsys):
    out = run(epochs=1)
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8 no picture")
    capsys.readouterr()
    command = ["--predict", out / "best.pt", tmp_path / "damaged.jpg", files / "insects/test/ant", "--json", "--cpu"]
    with pytest.raises(SystemExit) as stop:
        train.main([str(argument) for argument in command])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "damaged.jpg" in printed.err and len(printed.out.splitlines()) == 4
    assert [len(json.loads(line)["top"]) for line in printed.out.splitlines()] == [2] * 4  # there are no more classes
    (tmp_path / "empty").mkdir()
    for picture, part in (("empty", "no pictures in"), ("absent.jpg", "no picture"), ("absent/", "no picture")):
        assert part in refusal(capsys, ["--predict", out / "best.pt", tmp_path / picture, "--cpu"])
    assert "checkpoint and then pictures" in refusal(capsys, ["--predict", out / "best.pt", "--cpu"])


def test_the_default_run_pretrains_its_backbone_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = {"shapes": (data.where_is_blue, data.DIRECTIONS), "shapes-source": (data.what_and_which_colour, data.KINDS)}
    for name, (task, classes) in few.items():
        show = dict(image_size=data.SIDE, drawn=True)
        row = data.DataSet(name, len(classes), data.drawn(task, classes, 64, 16, 16), "drawn", **show)
        monkeypatch.setitem(data.TABLE, name, row)
    monkeypatch.setitem(train.PRETRAINING, "epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as stop:
            train.main(["--cpu", "--epochs", "2"])
    assert stop.value.code == 130 and "to go on: python train.py --cpu --epochs 2" in capsys.readouterr().err
    train.main(["--cpu", "--epochs", "2"])
    assert "pre-training" in capsys.readouterr().out
    train.main(["--cpu", "--epochs", "2", "--method", "linear"])
    assert "pre-training" not in capsys.readouterr().out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["shapes-linear", "shapes-sa2vp", "shapes-vit"]
    assert vit.load_vit("runs/shapes-vit/vit.pt", data.SIDE).mean == vit.IMAGENET_MEAN


# ---------------------------------------------------------------------- what is said in words

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_example_in_the_readme_prints_what_it_says(capsys):
    example, printed = re.search(r"```python\n(from sa2vp import aligned.*?)```\n+```\n(.*?)```", README, re.S).groups()
    exec(example, {})
    assert capsys.readouterr().out == printed


def test_every_line_that_the_readme_shows_for_an_equation_is_in_the_code():
    code = Path(vit.__file__).read_text() + Path(sa2vp.__file__).read_text()
    lines = re.findall(r"^\| (?:\(\d\))? ?\|.*\| `([^`]*)` \|$", README, re.MULTILINE)
    assert len(lines) == 9 and all(line in code for line in lines)


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert len(links) > 10 and links <= anchors


@pytest.mark.parametrize("module", [vit, sa2vp, data, train], ids=lambda module: module.__name__)
def test_every_public_class_function_and_method_has_a_docstring(module):
    own = [part for part in vars(module).values() if getattr(part, "__module__", None) == module.__name__]
    parts = {part.__qualname__: part for part in own if inspect.isclass(part) or inspect.isfunction(part)}
    for name, part in list(parts.items()):
        if inspect.isclass(part):
            parts |= {f"{name}.{method}": f for method, f in vars(part).items() if inspect.isfunction(f)}
    public = {name: part for name, part in parts.items() if not re.search(r"(^|\.)_", name)}
    assert len(public) > 10 and [name for name, part in public.items() if not part.__doc__] == []


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--data", "nonsense"], "cub, nabirds, flowers"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "3", "--warmup-epochs", "3"], "above"),
        (["--batch-size", "1000"], "no batch of 1000"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--dropout", "1"], "--dropout"),
        (["--inner-dim", "0"], "--inner-dim"),
        (["--inner-dim", "x"], "--inner-dim"),
        (["--prompt-grid", "7"], "--prompt-grid"),
        (["--prompt-grid", "0x7"], "--prompt-grid"),
        (["--prompt-grid", "2x2", "--window", "1"], "nothing to attend to"),
        (["--window", "2"], "--window"),
        (["--distill-layers", "0,9"], "must be among"),
        (["--fusion-layers", "1"], "must be among"),
        (["--method", "linear", "--window", "3"], "--window is a setting of --method sa2vp"),
        (["--method", "magic"], "magic"),
        (["--gpu", "99"], "no GPU 99"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--weights", __file__], "test_sa2vp.py"),
        (["--nonsense"], "--nonsense"),
        (["--resume", "--out", "empty"], "no run to resume"),
        (["--eval", "absent.pt"], "absent.pt"),
        (["--eval", __file__], "test_sa2vp.py"),
        (["--lr", "1e30", "--batch-size", "4"], "loss is not finite"),
        (["--show", "3"], "--show goes with --eval"),
        (["--json"], "--json goes with --predict"),
        (["--eval", "some.pt", "--show", "0"], "--show"),
        (["--eval", "some.pt", "--json"], "--json has no part in --eval"),
        (["--predict", "absent.pt", __file__], "absent.pt"),
        (["--predict", "absent.pt", __file__, "--eval", "some.pt"], "not allowed with"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(files, tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    common = [] if "--gpu" in flags else ["--cpu"]
    for flag, value in (("--data", files / "insects"), ("--weights", files / "vit.pth"), ("--batch-size", 4),
                        ("--workers", 0)):  # fmt: skip
        if flag not in flags and not {"--eval", "--predict", "--resume"} & set(flags):
            common += [flag, value]
    assert part in refusal(capsys, [*flags, *common])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named(files, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "pictures")
    (folder / "train" / "bee" / "broken.jpg").write_bytes(b"\xff\xd8 this is no picture")
    flags = ["--data", folder, "--weights", files / "vit.pth", "--batch-size", 11, "--workers", workers, "--cpu"]
    assert "broken.jpg" in refusal(capsys, [*flags, "--epochs", 9])


def test_a_folder_without_classes_or_tests_says_what_it_needs(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", files / "vit.pth", "--cpu", "--data"]
    (tmp_path / "empty").mkdir()
    assert "train/<class>/" in refusal(capsys, [*flags, "empty"])
    make_folder(tmp_path / "untested", {"train": 3})
    assert "test/<class>/" in refusal(capsys, [*flags, "untested"])
    make_folder(tmp_path / "other", {"train": 3, "test": 1})
    make_folder(tmp_path / "other", {"test": 1}, classes=("wasp",))
    assert "'wasp'" in refusal(capsys, [*flags, "other"])


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    train.save_whole(tmp_path / "file", lambda file: file.write(b"before"))

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(train.os, "fsync", full_disk)
    with pytest.raises(OSError):
        train.save_whole(tmp_path / "file", lambda file: file.write(b"after"))
    assert (tmp_path / "file").read_bytes() == b"before"

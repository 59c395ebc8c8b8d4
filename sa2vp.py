"""SA2VP: Spatially Aligned-and-Adapted Visual Prompt (Pei et al., AAAI 2024).

Two pathways run through the same frozen encoder layers T_i. The base pathway B carries the image tokens. The prompt
pathway P carries a learned two-dimensional map of prompt tokens, one for each patch. In every layer one pathway sends
the other a message: a patch token attends only to the tokens around its own place, the class token attends to all.

    (1)  B_0 = [cls ; patches(I)] + E_pos
    (2)  P_0 = p W_p + b_p + E_pos
    (3)  C_i(X, Y)_t = X_t + Drop(Wo o_t),  o_t = sum over u in N(t) of softmax_u(q . k / sqrt(d / heads)) v_u
         q = Wq LN1(X_t),  k = Wk LN1(Y_u),  v = Wv LN1(Y_u)
    (4)  A_i(Z) = Drop(W_up Drop(GELU(W_down LN(Z))))
    (5)  i not in D:  B_{i+1} = T_i(B_i) + s A_i(C_i(B_i, P_i))               P_{i+1} = T_i(P_i)
    (6)  i in D:      P_{i+1} = T_i(P_i) [+ fusion] + s A_i(C_i(P_i, B_i))    B_{i+1} = T_i(B_i)
    (7)  i in F:      fusion = g_i * T_i(p_i W_i + b_i)
    (8)  loss = 0.8 CE(head(LN(B_L)[cls]), y) + 0.2 CE(head(LN(P_L)[cls]), y)

The equation numbers are this project's, not the paper's. N is the number of patches and h x w their grid. h' x w' is
the grid of the prompt map, equal to h x w unless the map is scaled. d is the width of the encoder, r the inner
dimension of the prompt maps and adapters, s the weight of a message. N(t) is the aligned neighbourhood of token t.
D and F are sets of layers. `*` is the element-wise product. During training, dropout also acts on B_0, on P_0 and in
the MLPs of T_i.
"""

import inspect
import math
from pathlib import Path

import torch
from torch import nn

from vit import InputError, fingerprint, interpolate_positions, load_tensors, load_vit, read_file


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast leaves in its own precision, for the logits and the prompts' residual stream."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class PromptMap(nn.Module):
    """The prompt map, Eq. (2) without E_pos: p W + b, (1, 1 + h' w', d). The class token comes first."""

    def __init__(self, grid, inner_dim, dim):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, 1 + math.prod(grid), inner_dim))  # p, of width r
        self.proj = FullPrecisionLinear(inner_dim, dim)  # W and b, r -> d
        nn.init.trunc_normal_(self.tokens, std=0.02)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.normal_(self.proj.bias, std=1e-6)

    def forward(self):
        return self.proj(self.tokens)


def near(cells, other_cells, window):
    """N(t) along one axis: True where centres are less than window / 2 coarser cells apart, (cells, other_cells)."""
    y = torch.arange(cells)[:, None]
    z = torch.arange(other_cells)
    # |(y + 0.5) / cells - (z + 0.5) / other_cells| < (window / 2) / min(cells, other_cells), as the coarser axis has
    # fewer cells. Both sides are multiplied by 2 cells other_cells: integers, so that no rounding decides.
    distance = ((2 * y + 1) * other_cells - (2 * z + 1) * cells).abs()
    return distance < window * max(cells, other_cells)


def aligned_neighbourhood(grid, other_grid, window):
    """The aligned neighbourhood N(t) as a boolean matrix (1 + h w, 1 + h' w'): True where token t attends to token u.

    The class token attends to all tokens. A patch token attends to the patch tokens of the other map whose centre is
    less than window / 2 cells away in y and in x, where each axis counts in cells of its coarser grid. At equal sizes
    and window 3 that is the 3x3 window around its own place, cut off at the border. InputError if a token would have
    nothing to attend to.
    """
    if window % 2 == 0:
        raise InputError(f"window {window} must be odd")
    rows = near(grid[0], other_grid[0], window)
    columns = near(grid[1], other_grid[1], window)
    mask = nn.functional.pad(torch.kron(rows, columns), (1, 0, 1, 0))  # a row and a column of False: the class tokens
    mask[0] = True
    if not mask.any(1).all():
        raise InputError(f"window {window} leaves tokens of the grid {grid} nothing to attend to in {other_grid}")
    return mask


class SpatiallyAlignedCrossAttention(nn.Module):
    """Spatially aligned cross-attention, Eq. (3): X (batch, tokens, d) -> C_i(X, Y). All its weights are layer i's.

    q is from `layer.start(X)`, k and v are from `layer.start(Y)`. T_i uses the same q, k and v: they are computed once.
    `mask` is the aligned neighbourhood N(t), (tokens of X, tokens of Y). None: every token attends to all.
    """

    def __init__(self, mask, drop):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)  # not in the state dict
        self.drop = drop

    def forward(self, layer, x, q, k, v):
        return x + self.drop(layer.attn.attend(q, k, v, self.mask))


class PromptAdapter(nn.Module):
    """The prompt adapter, Eq. (4): A_i(Z), (batch, tokens, d) -> the same, through r dimensions. It has no residual."""

    def __init__(self, dim, inner_dim, drop):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, inner_dim)
        self.up = nn.Linear(inner_dim, dim)
        self.drop = drop
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, z):
        # As in the released code. The paper's figure draws ReLU in place of GELU, and no LayerNorm.
        hidden = self.drop(nn.functional.gelu(self.down(self.norm(z))))
        return self.drop(self.up(hidden))


class InterLayerPromptFusion(nn.Module):
    """Inter-layer prompt fusion, Eq. (7): g_i * T_i(p_i W_i + b_i), a new prompt map through frozen layer i.

    The result does not depend on the image: one, (1, 1 + h' w', d), serves the whole batch. p_i gets no E_pos.
    """

    def __init__(self, grid, inner_dim, dim):
        super().__init__()
        self.prompt_map = PromptMap(grid, inner_dim, dim)
        self.gate = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))  # g_i; two-dimensional, to get weight decay

    def forward(self, layer):
        return self.gate * layer(self.prompt_map())


class BilateralInteraction(nn.Module):
    """Bilateral interaction: takes both pathways through frozen layer i, while one sends the other a message.

    Knowledge prompting P -> B, Eq. (5). Where it `distills`: knowledge distillation B -> P, Eq. (6), and where it
    `fuses`, also inter-layer prompt fusion, Eq. (7). Only the class tokens leave the `last` layer.
    """

    def __init__(self, vit, prompt_grid, inner_dim, scale, window, distills, fuses, last):
        super().__init__()
        mask = None
        if window is not None and not last:  # the only queries of the last layer, the class tokens, attend to all
            grids = (prompt_grid, vit.grid) if distills else (vit.grid, prompt_grid)  # of X and of Y
            mask = aligned_neighbourhood(*grids, window)
        self.cross_attention = SpatiallyAlignedCrossAttention(mask, vit.drop)
        self.adapter = PromptAdapter(vit.dim, inner_dim, vit.drop)
        self.fusion = InterLayerPromptFusion(prompt_grid, inner_dim, vit.dim) if fuses else None
        self.scale = scale
        self.distills = distills
        self.last = last

    def forward(self, layer, base, prompt):
        """B_i (batch, 1 + N, d), P_i (batch or 1, 1 + h' w', d) -> B_{i+1}, P_{i+1}."""
        # Up to the first layer in D, P_i does not depend on the images: it is a batch of one.
        qb, kb, vb = layer.start(base)
        qp, kp, vp = layer.start(prompt)
        if self.last:  # only the class tokens leave the layer, so only they are queries
            base = base[:, :1]
            prompt = prompt[:, :1]
            qb = qb[:, :, :1]
            qp = qp[:, :, :1]

        next_base = layer.finish(base, qb, kb, vb)  # T_i(B_i)
        next_prompt = layer.finish(prompt, qp, kp, vp)  # T_i(P_i)
        if self.fusion:  # Eq. (7)
            next_prompt = next_prompt + self.fusion(layer)[:, : prompt.size(1)]
        if self.distills:  # Eq. (6)
            next_prompt = next_prompt + self.scale * self.adapter(self.cross_attention(layer, prompt, qp, kb, vb))
        else:  # Eq. (5)
            next_base = next_base + self.scale * self.adapter(self.cross_attention(layer, base, qb, kp, vp))
        return next_base, next_prompt


class SA2VP(nn.Module):
    """A frozen ViT, tuned by a spatially aligned-and-adapted prompt map. InputError for options out of range.

    vit             the pre-trained backbone. It is changed in place: frozen, with this `dropout`. It belongs to this
                    model alone, since a second method would change its dropout.
    num_classes     outputs of the head, which both pathways share
    inner_dim       r, the rank of the prompt maps and the hidden width of the adapters
    scale           s, the weight of a message
    dropout         rate of `vit.drop`, which acts on B_0, on P_0, in the MLPs, the cross-attention and the adapters
    window          side of the aligned neighbourhood in cells, odd; None: every token attends to all
    prompt_grid     (h', w') of a scaled prompt map; None: the image's grid; "half": half of it
    distill_layers  D, where B sends P the message; None: every fourth layer from 0; (): no layer
    fusion_layers   F, a subset of D, where a new prompt map enters; None: D without 0

    The masks of the aligned neighbourhoods are not in the state dict, so do not build the model on the meta device.
    Hooks and activation checkpointing belong on `interactions[i]`: `vit.blocks[i]` itself is called for new
    prompt maps only. Where a value is computed once per batch, all images of the batch share one dropout mask; the
    released code draws one for each image.
    """

    def __init__(self, vit, num_classes, inner_dim=16, scale=0.1, dropout=0.1, window=3, prompt_grid=None,
                 distill_layers=None, fusion_layers=None):  # fmt: skip
        super().__init__()
        check("inner_dim", inner_dim, 1)
        check("scale", scale, 0)
        depth = len(vit.blocks)
        # As in the released code the first interaction distils. In the paper's figure it prompts.
        distill = set(range(0, depth, 4) if distill_layers is None else distill_layers)
        fusion = distill - {0} if fusion_layers is None else set(fusion_layers)
        if not fusion <= distill <= set(range(depth)):
            raise InputError(f"fusion layers {fusion} must be among distill layers {distill} among 0 to {depth - 1}")
        grid = prompt_grid or vit.grid
        if prompt_grid == "half":
            grid = (vit.grid[0] // 2, vit.grid[1] // 2)
        if len(grid) != 2 or min(grid) < 1:
            raise InputError(f"prompt grid {grid} must have two sides of at least 1, such as 7x7")
        self.prompt_grid = grid
        self.vit = freeze(vit, dropout)
        self.prompt_map = PromptMap(grid, inner_dim, vit.dim)
        self.interactions = nn.ModuleList()
        for i in range(depth):
            self.interactions.append(
                BilateralInteraction(vit, grid, inner_dim, scale, window, i in distill, i in fusion, i == depth - 1)
            )
        self.head = make_head(vit, num_classes)

    def forward(self, images):
        """Figure 2: images (batch, 3, height, width) -> (base_logits, prompt_logits), each (batch, num_classes)."""
        base = self.vit.embed(images)  # Eq. (1), (batch, 1 + N, d)
        prompt = self.vit.drop(self.embed_prompts())  # Eq. (2), (1, 1 + h' w', d)
        for layer, interaction in zip(self.vit.blocks, self.interactions):
            base, prompt = interaction(layer, base, prompt)  # Eq. (5) or (6)
        base_logits = self.head(self.vit.norm(base[:, 0]))
        prompt_logits = self.head(self.vit.norm(prompt[:, 0]))
        return base_logits, prompt_logits.expand_as(base_logits)  # prompt_logits has one row if D is empty

    def embed_prompts(self):
        """p W_p + b_p + E_pos, (1, 1 + h' w', d). E_pos is the image's, interpolated to the prompt grid."""
        return self.prompt_map() + interpolate_positions(self.vit.pos_embed, self.vit.grid, self.prompt_grid)


def two_pathway_loss(logits, labels):
    """Eq. (8) of (base_logits, prompt_logits), or cross-entropy of a baseline's (logits,). The mean over the batch."""
    losses = [nn.functional.cross_entropy(scores, labels) for scores in logits]
    if len(losses) == 1:
        return losses[0]
    base_loss, prompt_loss = losses
    return 0.8 * base_loss + 0.2 * prompt_loss


def freeze(vit, dropout=0.0):
    """Freezes the backbone in place, and sets the rate of its dropout."""
    check("dropout", dropout, 0, 1)
    vit.drop.p = dropout
    return vit.requires_grad_(False)


def make_head(vit, num_classes):
    """The linear classifier, d -> num_classes."""
    head = FullPrecisionLinear(vit.dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    return head


def check(name, value, low, high=math.inf):
    """InputError unless the option's value is at least `low` and less than `high`."""
    if not low <= value < high:
        raise InputError(f"{name} is {value}, but must be at least {low} and less than {high}")


# ---------------------------------------------------------------------- baselines


class ViTClassifier(nn.Module):
    """A linear head on the class token: images (batch, 3, height, width) -> (logits,), (batch, num_classes).

    As it stands it is full fine-tuning, or on a frozen ViT the linear probe. Other baselines override `layer`.
    """

    def __init__(self, vit, num_classes):
        super().__init__()
        self.vit = vit
        self.head = make_head(vit, num_classes)

    def layer(self, i, x):
        """T_i(x), (batch, 1 + N, d) -> the same."""
        return self.vit.blocks[i](x)

    def forward(self, images):
        x = self.vit.embed(images)
        for i in range(len(self.vit.blocks)):
            x = self.layer(i, x)
        return (self.head(self.vit.norm(x[:, 0])),)


def linear_probe(vit, num_classes):
    """Only the head is trained."""
    return ViTClassifier(freeze(vit), num_classes)


class VPTDeep(ViTClassifier):
    """Visual Prompt Tuning (Jia et al., 2022): `prompts` new prompt tokens in every layer of a frozen ViT."""

    def __init__(self, vit, num_classes, prompts=50):
        super().__init__(freeze(vit), num_classes)
        check("prompts", prompts, 1)
        bound = (6 / (3 * math.prod(vit.patch_size) + vit.dim)) ** 0.5  # as VPT draws them
        self.prompts = nn.Parameter(torch.empty(len(vit.blocks), prompts, vit.dim).uniform_(-bound, bound))

    def layer(self, i, x):
        """T_i([x ; prompts]) without the prompts' outputs. Attention ignores order, so the prompts can come last."""
        prompts = self.prompts[i].expand(x.size(0), -1, -1)
        return super().layer(i, torch.cat([x, prompts], dim=1))[:, : x.size(1)]


class AdapterTuning(ViTClassifier):
    """SA2VP's adapters without prompts, in a frozen ViT: B_{i+1} = T_i(B_i) + s A_i(B_i)."""

    def __init__(self, vit, num_classes, inner_dim=16, scale=0.1, dropout=0.1):
        super().__init__(freeze(vit, dropout), num_classes)
        check("inner_dim", inner_dim, 1)
        check("scale", scale, 0)
        self.scale = scale
        self.adapters = nn.ModuleList(PromptAdapter(vit.dim, inner_dim, vit.drop) for _ in vit.blocks)

    def layer(self, i, x):
        """T_i(x) + s A_i(x)."""
        return super().layer(i, x) + self.scale * self.adapters[i](x)


# A new method is a class, or a function that returns a model, and a row here.
# - It takes a backbone, the number of classes and its options. Options are written out, each with a default, and become
#   flags. None has the name of a setting of every run (DEFAULTS in train.py). A default of another type than number,
#   text or bool needs a row in PARSERS in train.py.
# - Unless it trains the backbone, it freezes it (`freeze`) before it adds modules. The backbone is its `vit`, the
#   classifier its `head` (`make_head`). Its forward returns (logits,), or (base_logits, prompt_logits) as SA2VP's does.
#   The first logits are the prediction.
# - All its state is in trained parameters, in buffers and in the backbone: a frozen tensor of its own is a buffer.
#   Nothing is merged or cached in evaluation mode.
# Settings that a data set has for one method, such as its learning rate, are in `by_method` in data.py. A new method
# has none of them unless a row there names it.
METHODS = {"sa2vp": SA2VP, "vpt": VPTDeep, "adapter": AdapterTuning, "linear": linear_probe, "full": ViTClassifier}


def options(method):
    """A method's options and their defaults, {name: default}, from its signature. InputError for an unknown method."""
    if method not in METHODS:
        raise InputError(f"there is no method {method}: choose one of {', '.join(METHODS)}")
    parameters = list(inspect.signature(METHODS[method]).parameters.values())
    defaults = {}
    for parameter in parameters[2:]:  # after vit and num_classes
        if parameter.default is parameter.empty:
            raise InputError(f"option {parameter.name} of method {method} needs a default")
        defaults[parameter.name] = parameter.default
    return defaults


def build(vit, num_classes, settings):
    """The method settings["method"] on a backbone. Its options are taken from the settings, else they are defaults."""
    method = settings["method"]
    chosen = {name: settings[name] for name in options(method) if name in settings}
    return METHODS[method](vit, num_classes, **chosen)


# ---------------------------------------------------------------------- files

VERSION = 2  # of best.pt, last.pt and result.json


def trained_parameters(model):
    """Name -> parameter of all that is trained: the parameters themselves, not copies."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_state(model):
    """Name -> tensor of the state dict without frozen parameters, which is what a checkpoint holds.

    That is what is trained, and buffers such as a BatchNorm's statistics. The tensors are the model's, not copies.
    """
    tensors = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            tensors.pop(name)
    return tensors


def load_trained(model, tensors):
    """Copies a `trained_state` into a model. InputError names a tensor that is missing, left over or misshapen."""
    load_tensors(trained_state(model), tensors)


def count_trained(model):
    """How many numbers are trained, without the head, as the field counts them."""
    return sum(p.numel() for name, p in trained_parameters(model).items() if not name.startswith("head."))


def read_checkpoint(path):
    """What a best.pt or last.pt holds, a dict. Nothing in it is executed. InputError if it is something else."""
    checkpoint = read_file(path)
    for name in ("trained", "settings", "classes", "backbone", "fingerprint", "digest", "input", "root", "history"):
        if name not in checkpoint:
            raise InputError(f"{path} is not a checkpoint of this project: it has no {name}")
    upgrade(checkpoint)
    return checkpoint


def upgrade(run):
    """Converts the content of a checkpoint or result.json of version 1 to the current form, in place."""
    if run.get("version", 1) > VERSION:
        raise InputError(f"the run was written by a newer version of this project, version {run['version']}")
    settings = run["settings"]
    if "warmup_epochs" in settings:  # was a number of epochs, is now a share of them
        warmup_epochs = settings.pop("warmup_epochs")
        is_default = warmup_epochs == round(settings["epochs"] / 10)
        settings["warmup"] = 0.1 if is_default else warmup_epochs / settings["epochs"]
    run.setdefault("batch_size", settings["batch_size"])
    if "crop" in run.get("input", {}):
        run["input"]["kind"] = "crop-flip" if run["input"].pop("crop") else "resize"


def load(path, weights=None):
    """Reads a tuned model, best.pt or its folder: (model in evaluation mode, meta). InputError if it does not fit.

    meta is the rest of the file: `classes` (names), `input` (arguments of data.transform), `settings` and more. The
    backbone's file is `weights`, by default that of the run. With full fine-tuning the backbone is in best.pt.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    meta = read_checkpoint(path)
    try:
        backbone = load_same_backbone(path, meta, weights)
        model = build(backbone, len(meta["classes"]), meta["settings"])
        load_trained(model, meta.pop("trained"))
    except (KeyError, TypeError, InputError) as error:  # of settings or tensors that do not fit
        raise InputError(f"cannot load {path}: {error}") from error
    return model.eval(), meta


def load_same_backbone(path, meta, weights=None):
    """The backbone of the checkpoint in `path`, whose content is `meta`. InputError if the weights are others."""
    if meta["settings"]["method"] == "full":
        return load_vit(path, **meta["backbone"])
    weights = weights or meta["settings"]["weights"]
    vit = load_vit(weights, **meta["backbone"])
    if fingerprint(vit) != meta["fingerprint"]:
        raise InputError(f"it was tuned on another backbone than {weights}: give --weights (weights=)")
    return vit

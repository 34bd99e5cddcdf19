"""What is trained, and how: recipes, freezing, the two optimizers, the learning rate."""
import math
import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import torch


@dataclass(frozen=True)
class Recipe:
    """How a stage is optimized."""
    steps: int
    batch_size: int                      # over all processes and micro-batches
    lr: float                            # the peak
    warmup: int = 100                    # steps, linear
    schedule: str = "cosine"             # or "linear": from the peak to zero at the end
    weight_decay: float = 0.2            # of tensors with 2 or more axes; gains, biases, scalars: 0
    betas: tuple = (0.9, 0.98)
    eps: float = 1e-6
    grad_clip: float | None = 1.0        # largest norm of the gradient; None: not clipped
    no_decay: tuple = ()                 # patterns of names of matrices that do not decay either
    lr_multipliers: dict = field(default_factory=dict)       # pattern of names -> factor of lr
    layer_decay: float = 1.0             # factor of lr, once for each block of the ViT above
    optimizer: str = "adamw"             # "muon": Muon for the matrices of attention and MLPs
    muon_lr_multiplier: float = 3.0      # Muon's rate in multiples of lr
    muon_weight_decay: float = 0.05

    def __post_init__(self):
        for name in ("betas", "no_decay"):                            # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))


EPOCHS = 30                              # at most, over records of one's own
TUNE = 0.1                               # of the rate, from a start: more makes it forget


def find_recipe(recipes, preset, kinds, changes, records=None, tune=False):
    """The recipe of "PRESET KIND", else of PRESET, else of "", with the user's changes.

    kinds: the name of the data and the losses; changes: {"steps", "batch_size", "lr": number or
    None, "optimizer": name or None}; records: the number of the user's own, or None: the batch is
    then halved to at most a quarter of them, and steps are at most EPOCHS; tune: the rate is TUNE
    times as large. Raises ValueError for numbers that no run can have. The warm-up is at most a
    fifth of the steps.
    """
    keys = [*(f"{preset} {kind}" for kind in kinds), preset, ""]
    recipe = next(recipes[key] for key in keys if key in recipes)
    for name, value in changes.items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be more than 0")
    changes = {name: value for name, value in changes.items() if value is not None}
    if records:
        batch_size = recipe.batch_size
        while batch_size > records / 4 and batch_size % 2 == 0:
            batch_size //= 2
        batch_size = changes.get("batch_size", batch_size)
        steps = min(recipe.steps, max(1, EPOCHS * records // batch_size))
        rate = recipe.lr * (TUNE if tune else 1)
        changes = {"batch_size": batch_size, "steps": steps, "lr": rate} | changes
    recipe = replace(recipe, **changes)
    return replace(recipe, warmup=min(recipe.warmup, recipe.steps // 5))


def freeze(model, patterns):
    """Freeze all parameters but those whose names match a pattern -> the table of what is trained.

    Patterns match whole names: "lm.*" by prefix, "*_gate" by suffix. Frozen parameters get no
    gradient, but it passes through them to trained parts before them; they are not in the
    optimizer, and their modules are in eval mode. Raises ValueError for a
    pattern that matches no name.
    """
    names, table = [name for name, _ in model.named_parameters()], {}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no parameter matches {pattern!r}; their names begin with "
                             + ", ".join(dict.fromkeys(name.split(".")[0] for name in names)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(fnmatch(name, pattern) for pattern in patterns)
        counts = table.setdefault(name.split(".")[0], [0, 0])
        counts[not parameter.requires_grad] += parameter.numel()
    model.train()
    eval_frozen(model)
    return "\n".join(f"  {name:18s} {trained + frozen:>12,d}  "
                     + ("trained" if not frozen else "frozen" if not trained else
                        f"{trained:,d} trained") for name, (trained, frozen) in table.items())


def store_frozen(model, names, dtype):
    """Keep the frozen parameters of the modules `names` in a half-precision dtype."""
    for name in names:
        for p in model.get_submodule(name).parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)


def eval_frozen(model):
    """Put every module without a trained parameter into eval mode; returns the model.

    A model with frozen parts calls it in its `train` method, so that `model.train()` never updates
    the statistics of a frozen BatchNorm.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for part in module.modules():        # a dropout in it has no parameter of its own
                part.training = False
    return model


def vision_depth(name):
    """The place of a parameter in the image encoder: 0 in the embeddings, i + 1 in block i; else
    None."""
    found = re.match(r"vision\.(?:vit\.)?(?:transformer\.blocks\.(\d+)|\w+_(?:embed|token|pre))\b",
                     name)
    return found and int(found[1] or -1) + 1


def parameter_groups(model, recipe):
    """The trained parameters in groups by optimizer, weight decay and learning rate.

    Each group has "muon" and "lr_multiplier". Muon gets the matrices of attention and MLPs, if the
    recipe says so. Of the others matrices decay; gains, biases and scalars do not.
    """
    groups, depths = {}, {name: vision_depth(name) for name, _ in model.named_parameters()}
    top = max((depth for depth in depths.values() if depth is not None), default=0) + 1
    for name, p in model.named_parameters():
        if p.requires_grad:
            muon = recipe.optimizer == "muon" and p.ndim == 2 and any(
                part in name for part in (".attn.", ".cross.", "mlp."))
            decays = p.ndim >= 2 and not any(fnmatch(name, q) for q in recipe.no_decay)
            decay = recipe.muon_weight_decay if muon else recipe.weight_decay
            factor = next((f for q, f in recipe.lr_multipliers.items() if fnmatch(name, q)), 1.0)
            factor *= recipe.muon_lr_multiplier if muon else 1.0
            if depths[name] is not None:
                factor *= recipe.layer_decay ** (top - depths[name])
            groups.setdefault((muon, decay if decays else 0.0, factor), []).append(p)
    return [{"params": groups[key], "muon": key[0], "weight_decay": key[1],
             "lr_multiplier": key[2]} for key in sorted(groups, reverse=True)]


def orthogonalize(matrices, half):
    """Matrices of the same singular vectors whose singular values are all near 1 (0.7 to 1.2).

    float (N, R, C) -> (N, R, C), in bf16 when half. Newton-Schulz: X <- aX + b(XX')X + c(XX')^2 X
    takes every singular value x to ax + bx^3 + cx^5; the numbers are those of Jordan et al. (2024).
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT                             # (N, R, C) with R <= C
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)          # no singular value above 1
    x = x.bfloat16() if half else x
    for _ in range(5):
        gram = x @ x.mT                                               # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x,
                          beta=3.4445)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Updates matrices by their momentum, orthogonalized; each direction learns at the same rate.

    Jordan et al. (2024), kellerjordan.github.io/posts/muon, with updates of the size of AdamW's
    (Liu et al., 2025, 2.2). It does what torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does,
    for all matrices of a shape at once, and in bf16 only when half: without bf16 instructions a
    processor takes 20 times as long for that.
    """

    def __init__(self, groups, lr, half, momentum=0.95):
        super().__init__(groups, {"lr": lr, "half": half, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            lr, momentum, shapes = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if p.grad is not None:
                    if p not in self.state:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    mean = self.state[p]["mean"].lerp_(p.grad, 1 - momentum)
                    update = p.grad.lerp(mean, momentum)              # Nesterov's momentum
                    shapes.setdefault(p.shape, []).append((p, update))
            for shape, pairs in shapes.items():
                size = 0.2 * max(shape) ** 0.5   # the root mean square of an update is 0.2, AdamW's
                updates = orthogonalize(torch.stack([u for _, u in pairs]), group["half"])
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * size)


class Optimizers:
    """Several optimizers that are used as one."""

    def __init__(self, *parts):
        self.parts = parts

    def __str__(self):
        counts = [sum(p.numel() for group in part.param_groups for p in group["params"])
                  for part in self.parts]
        return " and ".join(f"{type(part).__name__} ({count:,d} parameters)"
                            for part, count in zip(self.parts, counts))

    @property
    def param_groups(self):
        """The groups of all."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        """A step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self):
        """No parameter has a gradient after it."""
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        """For `load_state_dict`: {class name: its state dict}."""
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, states):
        """Raises KeyError or ValueError for the states of other optimizers."""
        for part in self.parts:
            part.load_state_dict(states[type(part).__name__])


def make_optimizer(model, recipe, half=False):
    """AdamW, perhaps with Muon, over `parameter_groups`. half: whether the run is in bf16."""
    groups = parameter_groups(model, recipe)
    muon, adamw = ([g for g in groups if g["muon"] == kind] for kind in (True, False))
    parts = [Muon(muon, lr=recipe.lr, half=half)] if muon else []
    if adamw:
        parts.append(torch.optim.AdamW(adamw, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps,
                                       fused=True))
    return Optimizers(*parts)


def learning_rate(recipe, step):
    """Linear from 0 to lr over the warm-up steps, then half a cosine or a line to 0 at the end."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    if recipe.schedule == "linear":
        return recipe.lr * (1 - progress)
    return recipe.lr * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer, recipe, step):
    """Give every group of the optimizer the learning rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step) * group["lr_multiplier"]

"""What is trained, and how: recipes, freezing, parameter groups, the learning rate."""
import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import torch


@dataclass(frozen=True)
class Recipe:
    """How a stage is optimized: AdamW, a linear warm-up, then a cosine to zero."""
    steps: int
    batch_size: int                      # over all processes and micro-batches
    lr: float                            # the peak
    warmup: int = 100                    # steps
    weight_decay: float = 0.2            # of tensors with 2 or more axes; gains, biases, scalars: 0
    betas: tuple = (0.9, 0.98)
    eps: float = 1e-6
    grad_clip: float | None = 1.0        # largest norm of the gradient; None: not clipped
    no_decay: tuple = ()                 # patterns of names of matrices that do not decay either
    lr_multipliers: dict = field(default_factory=dict)       # pattern of names -> factor of lr


def find_recipe(recipes, preset, data, changes):
    """The recipe of "PRESET DATA", else of PRESET, else of "", with the user's changes.

    changes: {"steps", "batch_size", "lr": number or None}. Raises ValueError for numbers that no
    run can have. The warm-up is at most a fifth of the steps.
    """
    recipe = next(recipes[key] for key in (f"{preset} {data}", preset, "") if key in recipes)
    for name, value in changes.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be more than 0")
    recipe = replace(recipe, **{k: v for k, v in changes.items() if v is not None})
    return replace(recipe, warmup=min(recipe.warmup, recipe.steps // 5))


def freeze(model, patterns):
    """Freeze all parameters but those whose names match a pattern -> the table of what is trained.

    Frozen parameters have no gradient and are not in the optimizer; their modules are in eval mode.
    """
    table = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(fnmatch(name, pattern) for pattern in patterns)
        counts = table.setdefault(name.split(".")[0], [0, 0])
        counts[not parameter.requires_grad] += parameter.numel()
    model.train()
    eval_frozen(model)
    return "\n".join(f"  {name:18s} {trained + frozen:>12,d}  "
                     + ("trained" if not frozen else "frozen" if not trained else
                        f"{trained:,d} trained") for name, (trained, frozen) in table.items())


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


def parameter_groups(model, recipe):
    """The trained parameters in groups by weight decay and learning rate, for an optimizer.

    Each group has "lr_multiplier". Matrices decay; gains, biases and scalars do not.
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and not any(fnmatch(name, q) for q in recipe.no_decay)
            factor = next((f for q, f in recipe.lr_multipliers.items() if fnmatch(name, q)), 1.0)
            groups.setdefault((decays, factor), []).append(p)
    return [{"params": groups[key], "weight_decay": recipe.weight_decay if key[0] else 0.0,
             "lr_multiplier": key[1]} for key in sorted(groups, reverse=True)]


def make_optimizer(model, recipe):
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=recipe.betas,
                             eps=recipe.eps, fused=True)


def learning_rate(recipe, step):
    """Linear from 0 to lr over the warm-up steps, then half a cosine towards 0 at the end."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer, recipe, step):
    """Give every group of the optimizer the learning rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step) * group["lr_multiplier"]

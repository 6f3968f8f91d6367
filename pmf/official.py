"""Parameter names: the mapping between the authors' PyTorch checkpoints and ours."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pmf.errors import first_few
from pmf.sizes import height_and_width, size_in_words
from pmf.wrappers import by_plain_names

__all__ = ["describe_state_dict", "from_official", "to_official"]

_GROUPS = ("class", "omega", "t_min", "t_max", "time")
_EMBEDDERS = {"time": "h", "omega": "omega", "t_min": "cfg_t_start", "t_max": "cfg_t_end"}  # ours: theirs
_BLOCK_VECTORS = (
    "attn_scale",
    "mlp_scale",
    "norm1.weight",
    "norm2.weight",
    "attn.q_norm.weight",
    "attn.k_norm.weight",
)
_BLOCK_MATRICES = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.w1", "mlp.w2", "mlp.w3")
_IGNORED = ("rope_freqs",)  # a constant


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' state dict, or ours, to `PixelMeanFlow`'s. Tensors are shared, not copied.

    Prefixes added by DistributedDataParallel and torch.compile are ignored (`pmf.wrappers`). A missing v head
    is allowed: the model can then only sample. Raises ValueError naming unknown or missing keys, or one that
    holds no weights, such as quantized ones: copied as numbers, they would give a network of noise.
    """
    given = {key.removeprefix("net."): tensor for key, tensor in by_plain_names(state_dict).items()}
    given = by_plain_names(given)
    ours = any(key.startswith(("position", "condition.")) for key in given)  # any of them may be missing
    names = {name if ours else theirs: name for name, theirs in _names(given, ours).items()}
    missing = [theirs for theirs in names if theirs not in given]
    left_over = [key for key in given if key not in names and key not in _IGNORED]
    if missing or left_over:
        problems = [
            f"{what} {first_few(keys, 5)}"
            for what, keys in (("unknown", left_over), ("missing", missing))
            if keys
        ]
        raise ValueError(f"state dict: not a complete Pixel MeanFlow checkpoint: {'; '.join(problems)}")
    for key in names:
        x = given[key]
        if not x.is_floating_point() or x.layout != torch.strided or x.dim() == 0:
            raise ValueError(
                f"state dict: {key} is {x.dtype} {list(x.shape)}, {x.layout}: weights must be dense tensors "
                "of a floating-point dtype"
            )
    renamed = {name: given[key] for key, name in names.items()}
    up = renamed["patch_embedding.weight_up"]
    renamed["patch_embedding.weight_up"] = up.flatten(1) if up.dim() > 1 else up  # theirs is a convolution
    return renamed


def to_official(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Convert `PixelMeanFlow`'s state dict to the authors': the inverse of `from_official`, tensors shared.

    prefix is prepended to every key: the authors' module calls the network ``net.``. Their constant
    ``rope_freqs`` is not a weight and is omitted. Raises ValueError like `from_official`.
    """
    ours = from_official(state_dict)
    theirs = {prefix + key: ours[name] for name, key in _names(ours, ours=True).items()}
    up = f"{prefix}x_embedder.proj2.weight"
    theirs[up] = theirs[up][:, :, None, None]  # theirs is a 1 x 1 convolution
    return theirs


def describe_state_dict(
    state_dict: Mapping[str, Tensor], image_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """The fields of `ModelConfig` that the shapes of a state dict with our names determine.

    image_size: required for non-square images, which the weights cannot indicate; ValueError if the number of
    tokens does not match, or is not a square and image_size is missing.
    """
    down = state_dict["patch_embedding.weight_down"]
    counts = tuple(state_dict[f"condition.{group}_tokens"].shape[1] for group in _GROUPS)
    num_tokens, hidden = state_dict["position"].shape[1:]
    patch_size, image_tokens = down.shape[-1], num_tokens - sum(counts)
    if image_size is None:
        image_size = math.isqrt(image_tokens) * patch_size
    if math.prod(side // patch_size for side in height_and_width(image_size)) != image_tokens:
        raise ValueError(
            f"state dict: its {image_tokens} image tokens of {patch_size}x{patch_size} pixels do not match "
            f"{size_in_words(image_size)} images: pass the image_size (height, width) they were trained on"
        )
    head_depth = _depth(state_dict, "u_head")
    return {
        "num_classes": len(state_dict["condition.label_embedder.embedding.weight"]) - 1,
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": down.shape[1],
        "hidden_size": hidden,
        "depth": _depth(state_dict, "shared_blocks") + head_depth,
        "head_depth": head_depth,
        "num_heads": hidden // len(state_dict["u_head.0.attn.q_norm.weight"]),
        "condition_tokens": counts,
        "bottleneck": down.shape[0],
        "mlp_width": len(state_dict["u_head.0.mlp.w1.weight"]),
        "v_head": any(name.startswith("v_") for name in state_dict),
    }


def _names(given: Iterable[str], ours: bool) -> dict[str, str]:
    """Our name -> the authors' key, for every weight of a model with the blocks found in the file.

    ours: whether the file uses our names. If any part of the v head is present, all of it is expected.
    """
    pairs = {
        "position": "pos_embed",
        "condition.label_embedder.embedding.weight": _table("y_embedder.embedding_table"),
    }
    pairs |= {f"condition.{group}_tokens": f"{group}_tokens" for group in _GROUPS}
    for embedder, theirs in _EMBEDDERS.items():
        for linear, index in (("linear1", 0), ("linear2", 2)):
            for part in ("weight", "bias"):
                pairs[f"condition.{embedder}_embedder.{linear}.{part}"] = _linear(
                    f"{theirs}_embedder.mlp.{index}", part
                )
    for part in ("weight", "bias"):
        pairs |= {f"patch_embedding.{part}_down": f"x_embedder.proj1.{part}"}
        pairs |= {f"patch_embedding.{part}_up": f"x_embedder.proj2.{part}"}

    heads = ["u", "v"] if any(key.startswith("v_") for key in given) else ["u"]
    stack_names = {f"{head}_head": f"{head}_heads" for head in heads} | {"shared_blocks": "shared_blocks"}
    head_depth = max(1, _depth(given, "u_head" if ours else "u_heads"))
    for stack, theirs in stack_names.items():
        for i in range(_depth(given, stack) if stack == "shared_blocks" else head_depth):
            pairs |= {f"{stack}.{i}.{vector}": f"{theirs}.{i}.{vector}" for vector in _BLOCK_VECTORS}
            pairs |= {
                f"{stack}.{i}.{matrix}.weight": _linear(f"{theirs}.{i}.{matrix}")
                for matrix in _BLOCK_MATRICES
            }
    for head in heads:
        pairs[f"{head}_final.norm.weight"] = f"{head}_final_layer.norm.weight"
        for part in ("weight", "bias"):
            pairs[f"{head}_final.linear.{part}"] = _linear(f"{head}_final_layer.linear", part)
    return pairs


def _linear(name: str, part: str = "weight") -> str:
    return f"{name}._flax_linear.{part}"


def _table(name: str) -> str:
    return f"{name}._flax_embedding.weight"


def _depth(names: Iterable[str], stack: str) -> int:
    """The number of blocks in a stack: the highest index plus one."""
    return max((int(m[1]) + 1 for name in names if (m := re.match(rf"{stack}\.(\d+)\.", name))), default=0)

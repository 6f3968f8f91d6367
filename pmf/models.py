"""The Pixel MeanFlow network and its presets (arXiv 2601.22158)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import as_plain, check_fields
from .nn import Block, Condition, ConditionTokens, FinalLayer, PatchEmbedding, rotary_tables
from .nn.block import checkpointed
from .nn.mlp import swiglu_width
from .official import describe_state_dict, from_official
from .ops._attention_inputs import MAX_WIDTH
from .sizes import Size, height_and_width, normal_size, size_in_words
from .wrappers import refuse_fsdp1_within, unwrap

__all__ = [
    "CHECKPOINTING",
    "PRECONDITIONERS",
    "PREDICTIONS",
    "CONFIGS",
    "ModelConfig",
    "NetworkOutput",
    "PixelMeanFlow",
    "config_from_state_dict",
    "create_model",
    "network_in",
    "from_official",
]


PREDICTIONS = ("x", "u")
"""Choices for `ModelConfig.prediction`."""
PRECONDITIONERS = ("none", "edm", "scm")
"""Choices for `ModelConfig.preconditioner`."""


@dataclass(frozen=True)
class ModelConfig:
    """The network configuration stored in checkpoints: numbers, strings and tuples of numbers."""

    num_classes: int = 1000
    """Labels are 0 .. num_classes - 1; num_classes itself is the null label."""
    image_size: Size = 256
    """In pixels: a number for squares, or (height, width)."""
    patch_size: int = 16
    channels: int = 3
    hidden_size: int = 768
    depth: int = 16
    """Blocks from the image to either output, of which depth - head_depth are shared."""
    head_depth: int = 8
    num_heads: int = 12
    noise_scale: float = 1.0
    """Standard deviation of the noise at t = 1."""
    condition_tokens: tuple[int, int, int, int, int] = (8, 4, 2, 2, 4)
    """Tokens for class, omega, t_min, t_max and time."""
    bottleneck: int | None = None
    """Width of the patch embedding's bottleneck; default 128, or 256 if hidden_size > 1024."""
    mlp_width: int | None = None
    """Hidden width of the MLP; default 8/3 of hidden_size (see `pmf.nn.mlp.swiglu_width`)."""
    v_head: bool = True
    """Whether the auxiliary v head exists; a model without it can sample, and train the u head only."""
    sample_omega: float = 7.0
    """Default guidance scale of `pmf.sample`."""
    sample_interval: tuple[float, float] = (0.1, 0.7)
    """Default guidance interval [t_min, t_max] of `pmf.sample`."""
    prediction: str = "x"
    """What both heads predict: "x" an image, "u" the average velocity."""
    preconditioner: str = "none"
    """Scalings around the network, c_skip z + c_out net(c_in z): "none", "edm" or "scm" (`pmf.flow`)."""
    sigma_data: float = 0.5
    """Standard deviation of the data, for the preconditioner."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "image_size", normal_size(as_plain(self.image_size)))
        except ValueError as error:
            raise ValueError(f"model: image_size {error}") from error
        check_fields("model", self)
        sizes = "num_classes patch_size channels hidden_size depth head_depth num_heads".split()
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("bottleneck", "mlp_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        if any(side % self.patch_size for side in height_and_width(self.image_size)):
            shown = self.image_size if isinstance(self.image_size, int) else size_in_words(self.image_size)
            raise ValueError(f"model: image_size {shown} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"model: hidden_size / num_heads must be a multiple of 4, got "
                f"{self.hidden_size} / {self.num_heads}"
            )
        if self.hidden_size // self.num_heads > MAX_WIDTH:
            raise ValueError(
                f"model: hidden_size / num_heads must be at most {MAX_WIDTH}, got "
                f"{self.hidden_size} / {self.num_heads}"
            )
        if self.head_depth > self.depth:
            raise ValueError(f"model: head_depth {self.head_depth} exceeds depth {self.depth}")
        if len(self.condition_tokens) != 5 or min(self.condition_tokens) < 1:
            raise ValueError(
                f"model: condition_tokens must be five counts of at least 1, got {self.condition_tokens}"
            )
        if not self.noise_scale > 0:
            raise ValueError(f"model: noise_scale must be positive, got {self.noise_scale}")
        for name, known in (("prediction", PREDICTIONS), ("preconditioner", PRECONDITIONERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"model: {name} must be {_either(known)}, got {getattr(self, name)!r}")
        if not self.sigma_data > 0:
            raise ValueError(f"model: sigma_data must be positive, got {self.sigma_data}")
        if self.prediction == "u" and self.preconditioner != "none":
            raise ValueError(
                f"model: preconditioner {self.preconditioner} turns the network's output into images: "
                "use it with prediction x"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.channels, *height_and_width(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        height, width = height_and_width(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        return sum(self.condition_tokens) + self.num_image_tokens


_B = ModelConfig()
_L = replace(_B, hidden_size=1024, depth=32, num_heads=16)
_H = replace(_B, hidden_size=1280, depth=48, num_heads=16)

CONFIGS: dict[str, ModelConfig] = {
    "pmf-b/16": replace(_B, sample_omega=7.5, sample_interval=(0.1, 0.8)),
    "pmf-b/32": replace(_B, image_size=512, patch_size=32, noise_scale=2.0, sample_omega=6.5),
    "pmf-l/16": replace(_L, sample_omega=7.0, sample_interval=(0.2, 0.7)),
    "pmf-l/32": replace(
        _L, image_size=512, patch_size=32, noise_scale=4.0, sample_omega=7.5, sample_interval=(0.2, 0.6)
    ),
    "pmf-h/16": replace(_H, noise_scale=2.0, sample_omega=7.0, sample_interval=(0.2, 0.6)),
    "pmf-h/32": replace(
        _H, image_size=512, patch_size=32, noise_scale=4.0, sample_omega=5.5, sample_interval=(0.1, 0.6)
    ),
    "pmf-b/64": replace(_B, image_size=1024, patch_size=64, noise_scale=4.0, sample_omega=6.5),  # ours
    "digits": ModelConfig(
        num_classes=10,
        image_size=8,
        patch_size=2,
        channels=1,
        hidden_size=128,
        depth=4,
        head_depth=2,
        num_heads=2,
        condition_tokens=(2, 1, 1, 1, 1),
        bottleneck=32,
        mlp_width=320,
        sample_omega=1.0,
        sample_interval=(0.0, 1.0),
    ),
    "emoji": ModelConfig(
        num_classes=9,
        image_size=32,
        patch_size=4,
        hidden_size=256,
        depth=6,
        head_depth=3,
        num_heads=4,
        condition_tokens=(2, 1, 1, 1, 1),
        mlp_width=704,
        sample_omega=2.0,
        sample_interval=(0.0, 1.0),
    ),
}


CHECKPOINTING = ("none", "blocks")
"""Choices for `PixelMeanFlow.checkpointing`."""


class NetworkOutput(NamedTuple):
    """Images [B, C, H, W] from each requested head, and the u head's tangent [n, C, H, W].

    With as_tokens, the same pixels as [B, N, p p C]: the patches row by row, each (p, p, C).
    """

    u: Tensor | None
    u_t: Tensor | None
    v: Tensor | None


class PixelMeanFlow(nn.Module):
    """Transformer on pixels with two heads: u (average velocity) and v (instantaneous, for training only).

    Tokens are [class | omega | t_min | t_max | time | image], all with learned positions; the heads share
    `depth - head_depth` blocks. The network computes in the dtype of its parameters; its scalar inputs are
    embedded in float32.
    """

    cos: Tensor
    sin: Tensor
    _checkpointing = "none"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, bottleneck = (
            config.hidden_size,
            config.bottleneck or (256 if config.hidden_size > 1024 else 128),
        )
        self.condition = ConditionTokens(config.num_classes, hidden, config.condition_tokens)
        self.patch_embedding = PatchEmbedding(config.channels, config.patch_size, bottleneck, hidden)
        self.position = nn.Parameter(torch.empty(1, config.num_tokens, hidden))
        self.shared_blocks = self._blocks(config.depth - config.head_depth)
        self.u_head = self._blocks(config.head_depth)
        self.u_final = FinalLayer(hidden, config.patch_size, config.channels, config.grid)
        if config.v_head:
            self.v_head = self._blocks(config.head_depth)
            self.v_final = FinalLayer(hidden, config.patch_size, config.channels, config.grid)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._set_rotary_tables()
        self.register_load_state_dict_post_hook(_follow_weights)
        self.reset_parameters()

    @property
    def checkpointing(self) -> str:
        """Activation checkpointing: "none", or "blocks" to keep only the input of each block.

        With "blocks", backward recomputes each block's value (never its tangent): about a quarter more work,
        for D instead of 6 D + 2 W saved numbers per token and block (see `AttentionBranch` and
        `MlpBranch`). It is not stored in checkpoints; set it on the model:
        ``model.checkpointing = "blocks"``.
        """
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        if value not in CHECKPOINTING:
            raise ValueError(f"model: checkpointing must be 'none' or 'blocks', got {value!r}")
        self._checkpointing = value

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the weights as in the paper; both heads then predict 0 for any input."""
        if self.position.is_meta:
            return
        self.condition.reset_parameters(generator)
        self.patch_embedding.reset_parameters(generator)
        self.position.normal_(0.0, 0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, Block):
                module.reset_parameters(generator)
            elif isinstance(module, FinalLayer):
                module.reset_parameters()

    def forward(
        self,
        images: Tensor,
        condition: Condition,
        images_t: Tensor | None = None,
        h_t: Tensor | None = None,
        *,
        heads: str = "u",
        as_tokens: bool = False,
    ) -> NetworkOutput:
        """Predict images from noisy ones.

        images [B, C, H, W], condition [B] each. The tangents images_t [n, C, H, W] and h_t [n] belong to the
        first n samples; they go through the u head only and are constants for autograd. heads: "u"
        (sampling), "v" (guidance) or "uv" (training). as_tokens: return pixels in token order, as
        `pmf.ops.patch_velocity` reads them.
        """
        if heads not in ("u", "v", "uv"):
            raise ValueError(f"model: heads must be 'u', 'v' or 'uv', got {heads!r}")
        if "v" in heads and not self.config.v_head:
            raise RuntimeError(
                "model: this checkpoint has no v head, so it can sample but not be trained (except without "
                "one: Objective(v_head=False))"
            )
        expected = self.config.image_shape
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"model: images must be [B, {', '.join(map(str, expected))}], got {list(images.shape)}"
            )
        if any(len(value) != len(images) for value in condition):
            raise ValueError(f"model: conditions must be [{len(images)}], got {[len(x) for x in condition]}")
        if (images_t is None) != (h_t is None):
            raise ValueError("model: give both tangents, images_t and h_t, or neither")

        dtype = self.position.dtype
        prefix, prefix_t = self.condition(condition, h_t)
        images_t = None if images_t is None else images_t.to(dtype)
        x, x_t = self.patch_embedding(images.to(dtype), self.position, prefix, images_t, prefix_t)
        # Under autocast the embedding has 16 bits; the residual stream must not.
        x, x_t = x.to(dtype), None if x_t is None else x_t.to(dtype)
        for block in self.shared_blocks:
            x, x_t = self._through(block, x, x_t)
        u, u_t, v = None, None, None
        if "v" in heads:
            v, _ = self._head(self.v_head, self.v_final, x, None, as_tokens)
        if "u" in heads:
            u, u_t = self._head(self.u_head, self.u_final, x, x_t, as_tokens)
        return NetworkOutput(u, u_t, v)

    def _head(
        self, blocks: nn.ModuleList, final: FinalLayer, x: Tensor, x_t: Tensor | None, as_tokens: bool
    ) -> tuple[Tensor, Tensor | None]:
        image_tokens = self.config.num_image_tokens
        for block in blocks[:-1]:
            x, x_t = self._through(block, x, x_t)
        # The last block's outputs for the condition tokens are unused.
        x, x_t = self._through(blocks[-1], x, x_t, image_tokens)
        pixels: tuple[Tensor, Tensor | None] = final(x, x_t, as_tokens=as_tokens)
        return pixels

    def _through(
        self, block: nn.Module, x: Tensor, x_t: Tensor | None, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self._checkpointing == "blocks" and torch.is_grad_enabled():
            return checkpointed(block, x, self.cos, self.sin, x_t, keep)
        pair: tuple[Tensor, Tensor | None] = block(x, self.cos, self.sin, x_t, keep)
        return pair

    def _blocks(self, count: int) -> nn.ModuleList:
        c = self.config
        width = c.mlp_width or swiglu_width(c.hidden_size)
        return nn.ModuleList(Block(c.hidden_size, c.num_heads, width) for _ in range(count))

    def _apply(self, fn: Any, recurse: bool = True) -> "PixelMeanFlow":
        super()._apply(fn, recurse)
        # The tables stay float32 in a bfloat16 model and are created when a model leaves the meta device.
        self._set_rotary_tables()
        return self

    def _set_rotary_tables(self) -> None:
        dtype = torch.float64 if self.position.dtype == torch.float64 else torch.float32
        head_dim = self.config.hidden_size // self.config.num_heads
        self.cos, self.sin = rotary_tables(
            self.config.grid, head_dim, device=self.position.device, dtype=dtype
        )


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _follow_weights(model: PixelMeanFlow, _: Any) -> None:
    """Move the tables to the device of loaded weights. (Module-level, because lambdas cannot be pickled.)"""
    model._set_rotary_tables()


def network_in(model: nn.Module, what: str) -> PixelMeanFlow:
    """The network inside wrappers (`pmf.wrappers.unwrap`); `what` begins the sentence of the TypeError."""
    network = unwrap(model) if isinstance(model, nn.Module) else model
    if isinstance(network, PixelMeanFlow):
        refuse_fsdp1_within(network)
        return network
    hint = (
        "give its .module"
        if isinstance(getattr(model, "module", None), PixelMeanFlow)
        else ("pmf.flow.MeanFlow and pmf.flow.sample serve other networks")
    )
    raise TypeError(f"{what}: the model must be a PixelMeanFlow, got {type(network).__name__}: {hint}")


def create_model(preset: str | None = None, **settings: Any) -> PixelMeanFlow:
    """Create a model with random weights from a preset ("pmf-b/16", "digits", ...) and `ModelConfig` fields.

    Without a preset, fields have their defaults. Draws from torch's global generator, on the default device.
    Raises ValueError for an unknown preset and TypeError for an unknown field.
    """
    if preset is not None and preset not in CONFIGS:
        raise ValueError(f"create_model: no preset {preset!r}; there are {', '.join(CONFIGS)}")
    known = [field.name for field in fields(ModelConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(f"create_model: unknown setting {', '.join(unknown)}; there are {', '.join(known)}")
    return PixelMeanFlow(replace(CONFIGS[preset] if preset else ModelConfig(), **settings))


def config_from_state_dict(state_dict: Mapping[str, Tensor], **settings: Any) -> ModelConfig:
    """The configuration matching a state dict (ours, or the authors' converted by `from_official`).

    What the weights do not determine (noise_scale, sampling defaults) comes from the preset of that shape or
    from `settings`. The weights only determine the number of image tokens: images are square unless
    `settings` contains an image_size.
    """
    shown = describe_state_dict(from_official(state_dict), settings.get("image_size"))
    shape = ModelConfig(**shown)
    hidden = (
        "num_classes",
        "v_head",
        "noise_scale",
        "sample_omega",
        "sample_interval",
        "bottleneck",
        "mlp_width",
    )
    for preset in CONFIGS.values():
        if all(
            getattr(preset, f.name) == getattr(shape, f.name) for f in fields(shape) if f.name not in hidden
        ):
            shape = replace(
                shape,
                noise_scale=preset.noise_scale,
                sample_omega=preset.sample_omega,
                sample_interval=preset.sample_interval,
            )
            break
    else:
        if "noise_scale" not in settings:
            raise ValueError(
                "state dict: its shape matches no preset, and weights do not determine the noise scale: give "
                "noise_scale, or a file made by pmf convert --noise-scale"
            )
    return replace(shape, **settings)

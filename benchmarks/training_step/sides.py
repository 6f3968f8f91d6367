"""One training step by pmf and by the plain port, with the same weights and draws."""

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import plain_port
import torch
from torch import Tensor

import pmf
from pmf.flow import Draws, Objective

LEARNING_RATE = 1e-3
COMPILED_ROWS = 4
OURS, PORT = "pmf", "plain port"
CHECKPOINTING, COMPILED, CAREFUL = (
    "pmf, checkpointing",
    "pmf, torch.compile",
    "port, guidance by the v path alone",
)


class Batch(NamedTuple):
    """Images [B, C, S, S] in [-1, 1], labels [B], and every random number of one step."""

    images: Tensor
    labels: Tensor
    draws: Draws

    def given(self) -> dict[str, Any]:
        """The draws that the port takes."""
        return {name: value for name, value in self.draws._asdict().items() if name != "crop"}

    def on(self, device: torch.device) -> "Batch":
        """The same on another device, including every draw."""
        draws = Draws._make(None if x is None else x.to(device) for x in self.draws)
        return Batch(self.images.to(device), self.labels.to(device), draws)

    def to(self, dtype: torch.dtype) -> "Batch":
        def cast(x: Tensor | None) -> Tensor | None:
            return x.to(dtype) if x is not None and x.is_floating_point() else x

        return Batch(self.images.to(dtype), self.labels, Draws._make(map(cast, self.draws)))


DEFAULT = plain_port.Sizes(depth=4, head_depth=2)
"""pMF-B/16 with fewer blocks: the timed model."""
SMALL = plain_port.Sizes(
    num_classes=10,
    image_size=32,
    patch_size=8,
    hidden_size=64,
    depth=4,
    head_depth=2,
    num_heads=2,
    condition_tokens=(2, 1, 1, 2, 3),
    bottleneck=24,
    mlp_width=170,
)
"""The model for agreement checks and for --quick."""


def make_model(sizes: plain_port.Sizes, seed: int = 0) -> pmf.PixelMeanFlow:
    """A model as initialised, except for non-zero gates and final layers.

    Zeros there would hide all blocks from loss and gradients. Gates are N(0, 0.1^2) and final layers N(0,
    1/hidden), so that predicted images have the scale of images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = pmf.create_model(**sizes._asdict())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_scale"):
                    parameter.normal_(0, 0.1)
                elif name.endswith("final.linear.weight"):
                    parameter.normal_(0, sizes.hidden_size**-0.5)
    return model


def draw_batch(sizes: plain_port.Sizes, batch_size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, sizes.channels, sizes.image_size, sizes.image_size)
    images = 2 * torch.rand(shape, generator=generator) - 1
    labels = torch.randint(sizes.num_classes, (batch_size,), generator=generator)
    return Batch(images, labels, Objective().draw(images, labels, generator))


class Side(Protocol):
    """One implementation with its weights and optimizer."""

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """loss_u and loss_v; leaves the gradients of the loss in .grad of the weights that are updated."""
        ...

    def update(self) -> None:
        """Step the optimizer and clear the gradients."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The gradients under pmf's parameter names."""
        ...


class Ours:
    """`pmf.flow.Objective` and `pmf.optim.Muon`, as `pmf.training` runs them.

    In bf16 a bfloat16 copy of the model computes and the float32 weights are stepped; copying the weights
    there and the gradients back is part of `backward`. torch.optim.Muon orthogonalises in bfloat16, and so
    does this optimizer, with torch's settings.

    checkpointing: blocks save only their input for backward. compiled: with torch.compile, full graph, with
    the numbers of samples rounded up so that few graphs serve all draws.
    """

    def __init__(
        self,
        model: pmf.PixelMeanFlow,
        precision: str,
        *,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model)
        if precision == "fp64":
            self.model.double()
        self.computing = self.model
        if precision == "bf16":
            self.computing = copy.deepcopy(self.model).to(torch.bfloat16)
        self.network: Any = self.computing
        row_multiple = 1
        if checkpointing:
            self.computing.checkpointing = "blocks"
        if compiled:
            self.network = torch.compile(self.computing, fullgraph=True)
            row_multiple = COMPILED_ROWS
        self.objective = Objective(noise_scale=model.config.noise_scale, row_multiple=row_multiple)
        self.optimizer = pmf.optim.Muon(
            self.model, lr=LEARNING_RATE, preset="torch", weight_decay=0.0, compute_dtype=torch.bfloat16
        )

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.computing is not self.model:
            with torch.no_grad():
                torch._foreach_copy_(list(self.computing.parameters()), list(self.model.parameters()))
        terms = self.objective(self.network, batch.images, batch.labels, batch.draws)
        terms.loss.backward()
        if self.computing is not self.model:
            for weight, low in zip(self.model.parameters(), self.computing.parameters(), strict=True):
                weight.grad = None if low.grad is None else low.grad.to(weight.dtype)
                low.grad = None
        return terms.loss_u, terms.loss_v

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.model.named_parameters()
        }


class Port:
    """`plain_port`, in bf16 under autocast."""

    def __init__(
        self,
        model: pmf.PixelMeanFlow,
        sizes: plain_port.Sizes,
        precision: str,
        guidance_heads: str = "uv",
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.guidance_heads = guidance_heads
        self.autocast = precision == "bf16"
        with model.position.device:
            self.network = plain_port.Network(sizes)
        if precision == "fp64":
            self.network.double()
        if not model.position.is_meta:
            plain_port.load(self.network, model.state_dict())
        self.optimizers = plain_port.optimizers(self.network, LEARNING_RATE)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = batch.images.device.type
        context = torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            losses = plain_port.objective(
                self.network,
                batch.images,
                batch.labels,
                **batch.given(),
                guidance_heads=self.guidance_heads,
            )
        losses.loss.backward()
        return losses.loss_u, losses.loss_v

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        return plain_port.gradients(self.network, self.names)


def make_side(name: str, model: pmf.PixelMeanFlow, sizes: plain_port.Sizes, precision: str) -> Side:
    """A contestant by its name in the tables, with its own copy of the model's weights."""
    if name in (PORT, CAREFUL):
        return Port(model, sizes, precision, guidance_heads="v" if name == CAREFUL else "uv")
    return Ours(model, precision, checkpointing=name == CHECKPOINTING, compiled=name == COMPILED)

"""Networks as their packages publish them, with random weights, and PyTorch's own attention samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Problem, jvp_math
from helpers.tolerance import assert_close, error
from torch import Tensor

import pmf

EXACT = 1e-10


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


class First(torch.nn.Module):
    """The tensor in the output of a diffusers or transformers network."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *primals: Tensor, **constants: Any) -> Tensor:
        return first(self.network(*primals, **constants))


def timm_vit(load: Callable[[str], Any]) -> Problem:
    network = load("timm").create_model(
        "vit_small_patch16_224", pretrained=False, img_size=32, patch_size=8, depth=2, num_classes=10
    )
    return Problem(network, (double(2, 3, 32, 32),))


def diffusers_dit(load: Callable[[str], Any]) -> Problem:
    network = load("diffusers").DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8,
        norm_num_groups=1, num_embeds_ada_norm=10, patch_size=2, dropout=0.0,
    )  # fmt: skip
    constants = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2]), "return_dict": False}
    return Problem(First(network), (double(2, 4, 8, 8),), constants)


def diffusers_unet(load: Callable[[str], Any]) -> Problem:
    network = load("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    constants = {
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": double(2, 5, 12),
        "return_dict": False,
    }
    return Problem(First(network), (double(2, 4, 8, 8),), constants)


def diffusers_flux(load: Callable[[str], Any]) -> Problem:
    network = load("diffusers").FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    constants = {
        "encoder_hidden_states": double(1, 3, 12),
        "pooled_projections": double(1, 8),
        "timestep": torch.tensor([0.5], dtype=torch.float64),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    return Problem(First(network), (double(1, 6, 4),), constants)


def transformers_llama(load: Callable[[str], Any]) -> Problem:
    package = load("transformers")
    config = package.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    network = First(Embedded(package.LlamaModel(config)))
    return Problem(network, (double(2, 6, 16),), {"use_cache": False})


def transformers_bert(load: Callable[[str], Any]) -> Problem:
    package = load("transformers")
    config = package.BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    network = First(Embedded(package.BertModel(config, add_pooling_layer=False)))
    return Problem(network, (double(2, 6, 16),), {"attention_mask": mask})


class Embedded(torch.nn.Module):
    """A language model on embeddings, which have tangents, unlike tokens."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, embeddings: Tensor, **constants: Any) -> Any:
        return self.network(inputs_embeds=embeddings, **constants)


NETWORKS = (timm_vit, diffusers_dit, diffusers_unet, diffusers_flux, transformers_llama, transformers_bert)


def problem_of(make: Callable[..., Problem], load: Callable[[str], Any]) -> Problem:
    problem = make(load)
    problem.network.double().eval()  # training drops labels
    for weight in problem.network.parameters():  # zero gates would hide everything behind them
        if weight.std() == 0 and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return problem


def gradient(network: torch.nn.Module, out: Tensor) -> Tensor:
    """The gradient of all weights as one vector; for some, such as key biases, it is only rounding."""
    loss = (out * torch.arange(out.numel()).view_as(out).cos()).sum()
    grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", NETWORKS)
def test_replaced_attention_has_the_tangents_of_math_attention(make, load) -> None:
    network, primals, constants = problem = problem_of(make, load)
    tangents = problem.tangents()
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda *x: network(*x, **constants), primals, tangents)
    expected = jvp_math(network, primals, tangents, **constants)
    with pmf.replace_sdpa():
        found = torch.func.jvp(lambda *x: network(*x, **constants), primals, tangents)
    assert expected[1].abs().sum() > 0
    assert_close(found, expected, EXACT)
    found = pmf.Jvp(network)(primals, tangents, **constants)
    limit = 1e-6 if make is transformers_llama else EXACT  # its norms compute in float32
    assert_close(found, expected, limit)

    assert_close(gradient(network, found[0]), gradient(network, expected[0]), limit)


@pytest.mark.filterwarnings("ignore")
def test_compiled_tangents_of_the_first_samples(load) -> None:
    network, primals, constants = problem_of(diffusers_dit, load)
    again = torch.tensor([0, 1, 0, 1, 0])
    primals = tuple(double(5, *x.shape[1:]) for x in primals)
    constants = {k: x[again] if isinstance(x, Tensor) else x for k, x in constants.items()}
    tangents = tuple(torch.randn_like(x[:2]) for x in primals)
    out, out_t = pmf.Jvp(network)(primals, tangents, **constants)
    jvp = torch.compile(pmf.Jvp(network), fullgraph=True, backend="aot_eager")
    found, found_t = jvp(primals, tangents, **constants)
    assert out_t.abs().sum() > 0
    assert_close((found, found_t), (out, out_t), EXACT)
    assert_close(gradient(network, found), gradient(network, out), EXACT)


def test_op_db_samples() -> None:
    """Values of every sample in op_db, gradients, and tangents, against PyTorch's math attention."""
    from torch.testing._internal.common_methods_invocations import op_db

    entry = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    counted = 0
    for sample in entry.sample_inputs("cpu", torch.float64):
        data = (sample.input, *sample.args[:2])
        rest, options = sample.args[2:], sample.kwargs
        tangents = tuple(torch.randn_like(x) for x in data)

        def run(*x, rest=rest, options=options):
            torch.manual_seed(3)
            return F.scaled_dot_product_attention(*x, *rest, **options)

        def gradients(out, leaves):
            return torch.autograd.grad(out.square().sum(), leaves)

        leaves = [x.detach().requires_grad_() for x in data]
        expected = jvp_math(run, data, tangents)
        wanted = gradients(jvp_math(run, leaves, tangents)[0], leaves)
        with pmf.replace_sdpa():
            found = torch.func.jvp(run, data, tangents)
            grads = gradients(run(*leaves), leaves) if not options.get("dropout_p") else wanted
        assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < EXACT, sample.summary()
        assert_close(grads, wanted, 1e-10)
        counted += 1
    assert counted >= 20

"""The objective's work in (layers x batch), at the sizes of a B model. A plain port takes 168."""

import torch

from pmf.flow import Objective
from pmf.flow.plan import make_plan

SHARED, HEAD = 8, 8  # B models


def cost(batch: int = 20_000) -> float:
    """Layer passes per sample in a training step; a backward pass counts as two forward ones."""
    objective = Objective()
    draws = objective.draw(
        torch.zeros(batch, 1, 1, 1), torch.zeros(batch, dtype=torch.long), torch.Generator().manual_seed(0)
    )
    plan = make_plan(draws, objective.guidance, torch.float32)
    guidance = (len(plan.conditional) + len(plan.guided)) / batch * (SHARED + HEAD)
    tangents = plan.num_meanflow / batch * (SHARED + HEAD)
    training = 3 * (SHARED + 2 * HEAD)
    return guidance + tangents + training


def test_a_training_step_costs_98_units() -> None:
    assert abs(cost() - 98) < 0.5


def test_the_order_puts_meanflow_samples_first_and_keeps_each_kind_in_order() -> None:
    objective = Objective()
    draws = objective.draw(torch.zeros(6, 1, 1, 1), torch.zeros(6, dtype=torch.long))
    plan = make_plan(draws, objective.guidance, torch.float32)
    assert plan.order.tolist() == [3, 4, 5, 0, 1, 2]
    assert plan.num_meanflow == 3
    assert torch.equal(plan.scalars.t, draws.t[plan.order])

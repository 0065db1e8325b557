"""Balance losses (ranges, both ends, nothing to balance, padding, process groups), bias balancing, aux, statistics."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import oracle
import processes
import pytest
import torch

import sparse_ffn as sf
from sparse_ffn.routing import Routing, SigmoidRouter, balance_loss

E = 4
LOSSES = ["entropy", "switch", "cv2", "z"]
SHARP = 60.0  # a logit so far above the others that softmax is one-hot
EVERY_K = pytest.mark.parametrize("k", range(1, E + 1))
EVERY_LOSS = pytest.mark.parametrize("balance", LOSSES)
OVER = pytest.mark.parametrize("balance_over", ["batch", "sequence"])


def selector(balance, k=1, *, n_experts=E, router="softmax_topk", weight=1.0, dtype=torch.float64, **options):
    """A layer whose logits are its input: d_model = n_experts and the identity as router weight."""
    options = {"balance": balance, "balance_weight": weight} | options
    layer = sf.MoE(n_experts, n_experts, 2, k, router=router, dtype=dtype, **options)
    oracle.randomise(layer)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(n_experts))
    return layer


def loss_of(logits, balance, k=1, mask=None, **options):
    layer = selector(balance, k, n_experts=logits.shape[-1], **options)
    layer(logits, mask=mask)
    return sf.aux_loss(layer)


def uniform(n_tokens=8):
    return torch.zeros(n_tokens, E, dtype=torch.float64)


def rotating(k=1):
    """Sharp logits: token t likes the k experts from t on alone and equally, so each expert is liked equally often."""
    liked = torch.stack([(torch.arange(E) - t) % E < k for t in range(E)])
    return SHARP * liked.double()


def collapsed(k=1, n_tokens=8):
    """Sharp logits: every token likes the same k experts alone and equally."""
    return SHARP * (torch.arange(E) < k).double().repeat(n_tokens, 1)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- ranges and their ends


@EVERY_K
@OVER
def test_entropy_is_minus_log_n_experts_at_balance_and_0_at_collapse(k, balance_over):
    assert loss_of(uniform(), "entropy", k, balance_over=balance_over).item() == pytest.approx(-math.log(E))
    assert loss_of(rotating(k), "entropy", k, balance_over=balance_over).item() == pytest.approx(-math.log(E))
    assert loss_of(collapsed(), "entropy", k, balance_over=balance_over).item() == pytest.approx(0, abs=1e-12)
    assert loss_of(collapsed(k), "entropy", k).item() == pytest.approx(-math.log(k), abs=1e-6)


@EVERY_K
@OVER
def test_switch_is_k_at_balance_and_n_experts_at_collapse(k, balance_over):
    assert loss_of(rotating(k), "switch", k, balance_over=balance_over).item() == pytest.approx(k)
    assert loss_of(collapsed(), "switch", k, balance_over=balance_over).item() == pytest.approx(E)
    assert loss_of(collapsed(k), "switch", k, balance_over=balance_over).item() == pytest.approx(E)


def test_the_switch_layer_costs_1_at_perfect_balance():
    layer = sf.SwitchMoE(E, E, 2, balance_weight=1.0, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E))
    layer(rotating())
    assert sf.aux_loss(layer).item() == pytest.approx(1)


@EVERY_K
@OVER
def test_cv2_is_0_at_balance_and_n_experts_minus_1_at_collapse(k, balance_over):
    assert loss_of(rotating(k), "cv2", k, balance_over=balance_over).item() == pytest.approx(0, abs=1e-12)
    assert loss_of(collapsed(), "cv2", k, balance_over=balance_over).item() == pytest.approx(E - 1)
    assert loss_of(collapsed(k), "cv2", k, balance_over=balance_over).item() == pytest.approx(E / k - 1, abs=1e-6)


@EVERY_K
@OVER
def test_z_is_the_mean_square_of_the_logsumexp(k, balance_over):
    assert loss_of(uniform(), "z", k, balance_over=balance_over).item() == pytest.approx(math.log(E) ** 2)
    assert loss_of(uniform() - math.log(E), "z", k, balance_over=balance_over).item() == pytest.approx(0, abs=1e-12)
    assert loss_of(uniform() + 3, "z", k, balance_over=balance_over).item() == pytest.approx((3 + math.log(E)) ** 2)


@EVERY_K
@OVER
@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "sinkhorn", "unweighted"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_every_loss_stays_in_its_range(k, balance_over, router, scale):
    ranges = {"entropy": (-math.log(E), 0), "switch": (0, E), "cv2": (0, E - 1), "z": (0, math.inf)}
    for balance, (lowest, highest) in ranges.items():
        value = loss_of(normal(3, 5, E, scale=scale), balance, k, router=router, balance_over=balance_over).item()
        assert lowest - 1e-6 <= value <= highest + 1e-6


@EVERY_K
@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "sinkhorn", "unweighted"])
def test_entropy_sees_the_logits_of_all_experts_whatever_the_gate(k, router):
    """The research code's softmax-after-top-k fed it the selected logits only."""
    logits = normal(9, E)
    p = torch.softmax(logits, -1).mean(0)
    assert loss_of(logits, "entropy", k, router=router).item() == pytest.approx((p * p.log()).sum().item())


def test_one_sequence_collapsing_on_each_expert_is_balanced_over_the_batch_only():
    logits = rotating()[:, None].expand(E, 5, E)
    assert loss_of(logits, "entropy").item() == pytest.approx(-math.log(E))
    assert loss_of(logits, "entropy", balance_over="sequence").item() == pytest.approx(0, abs=1e-12)
    assert loss_of(logits, "switch").item() == pytest.approx(1)
    assert loss_of(logits, "switch", balance_over="sequence").item() == pytest.approx(E)
    assert loss_of(logits, "cv2").item() == pytest.approx(0, abs=1e-12)
    assert loss_of(logits, "cv2", balance_over="sequence").item() == pytest.approx(E - 1)


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_none_and_bias_cost_nothing(balance):
    assert loss_of(normal(5, E), balance).item() == 0


def test_a_tuple_of_losses_is_their_weighted_sum():
    logits = normal(2, 7, E)
    single = [loss_of(logits, balance, 2).item() for balance in LOSSES]
    both = loss_of(logits, tuple(LOSSES), 2, weight=(0.1, 0.2, 0.3, 0.4)).item()
    assert both == pytest.approx(sum(w * value for w, value in zip((0.1, 0.2, 0.3, 0.4), single, strict=True)))


def test_the_weight_scales_the_loss_linearly():
    logits = normal(7, E)
    assert loss_of(logits, "switch", weight=0.25).item() == pytest.approx(loss_of(logits, "switch").item() / 4)
    assert loss_of(logits, "switch", weight=0.0).item() == 0


@EVERY_K
def test_gradient_of_entropy_is_0_at_the_uniform_point(k):
    layer, x = selector("entropy", k), uniform().requires_grad_()
    layer(x)
    sf.aux_loss(layer).backward()
    assert x.grad.abs().max().item() < 1e-15


def test_gradient_of_entropy_leads_away_from_the_busy_expert():
    layer, x = selector("entropy"), (0.1 * collapsed() / SHARP).requires_grad_()
    layer(x)
    sf.aux_loss(layer).backward()
    assert (x.grad[:, 0] > 0).all()
    assert (x.grad[:, 1:] < 0).all()


def test_gradient_of_switch_goes_through_the_softmax_only():
    layer, x = selector("switch", 2), normal(6, E).requires_grad_()
    layer(x)
    sf.aux_loss(layer).backward()
    f = torch.nn.functional.one_hot(x.detach().topk(2).indices, E).double().sum(1).mean(0)
    expected = torch.autograd.grad(E * (f * torch.softmax(x, -1).mean(0)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_defaults_are_the_papers():
    kinds = {
        sf.MoE: ("entropy", 1e-3),
        sf.SigmaMoE: ("entropy", 1e-3),
        sf.SoftmaxMoE: ("entropy", 1e-3),
        sf.SwitchMoE: ("switch", 1e-2),
        sf.SBaseMoE: ("none", 0.0),
    }
    for layer_cls, (balance, weight) in kinds.items():
        layer = layer_cls(E, E, 2, 1, dtype=torch.float64)
        explicit = layer_cls(E, E, 2, 1, balance=balance, balance_weight=weight, dtype=torch.float64)
        explicit.load_state_dict(layer.state_dict())
        x = normal(9, E)
        layer(x), explicit(x)
        assert sf.aux_loss(layer) == sf.aux_loss(explicit)
        assert (sf.aux_loss(layer) != 0) == (balance != "none")


# ---------------------------------------------------------------------------------------- no tokens, padding


@EVERY_LOSS
@OVER
@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "sinkhorn", "noisy_topk", "unweighted"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 3)], ids=str)
def test_no_real_token_costs_exactly_0_and_has_gradient_0(balance, balance_over, router, shape):
    layer = selector(balance, 2, router=router, balance_over=balance_over, dtype=torch.float32)
    x = normal(*shape, E).float().requires_grad_()
    y = layer(x, mask=torch.zeros(shape, dtype=torch.bool))
    aux = sf.aux_loss(layer)
    assert aux.dtype == torch.float32
    assert aux.shape == ()
    assert aux.item() == 0
    (0 * y.sum() + aux).backward()
    for gradient in (x.grad, *(p.grad for p in layer.parameters())):
        assert torch.count_nonzero(gradient) == 0  # NaN would count


def test_a_model_without_such_a_layer_costs_0_in_fp32():
    for model in (torch.nn.Linear(2, 2).double(), torch.nn.Sequential(), sf.DenseFFN(2, 3, dtype=torch.float64)):
        aux = sf.aux_loss(model)
        assert aux.dtype == torch.float32
        assert aux.item() == 0


@EVERY_LOSS
def test_all_gates_0_is_not_nan(balance):
    """Saturated the other way: every gate underflows to 0, so the importance of all experts is 0."""
    layer = selector(balance, router="sigmoid", dtype=torch.float32)
    x = torch.full((3, E), -200.0, requires_grad=True)
    layer(x)
    sf.aux_loss(layer).backward()
    assert sf.aux_loss(layer).isfinite()
    assert x.grad.isfinite().all()


@EVERY_LOSS
@pytest.mark.parametrize("router", ["sigmoid", "softmax", "sinkhorn", "unweighted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_token_whose_gates_are_all_0_is_not_nan_among_others(balance, router, dtype):
    """All its experts are dropped; it has no share in the importance of any expert, and no gradient."""
    layer = selector(balance, router=router, dtype=dtype, expert_dropout=0.8)
    x = normal(3, E).to(dtype).requires_grad_()
    happened = 0
    for seed in range(20):
        torch.manual_seed(seed)
        happened += 0 < torch.count_nonzero(layer.router(x, None).gate_TK) < 3
        torch.manual_seed(seed)
        layer(x)
        aux = sf.aux_loss(layer)
        assert aux.isfinite()
        assert torch.autograd.grad(aux, x)[0].isfinite().all()
    assert happened > 5


@pytest.mark.parametrize(
    ("balance", "scale"),  # the square of z leaves the range of fp32 at 1e19
    [("entropy", 1e3), ("entropy", 1e30), ("switch", 1e3), ("switch", 1e30), ("cv2", 1e3), ("cv2", 1e30), ("z", 1e15)],
)
def test_huge_logits_stay_finite(balance, scale):
    layer = selector(balance, dtype=torch.float32)
    x = normal(5, E, scale=scale).float().requires_grad_()
    layer(x)
    sf.aux_loss(layer).backward()
    assert sf.aux_loss(layer).isfinite()
    assert x.grad.isfinite().all()


@EVERY_LOSS
@EVERY_K
def test_padding_is_as_if_it_were_not_there(balance, k):
    mask = normal(3, 6, seed=5) > 0
    logits = normal(3, 6, E)
    garbage = torch.where(mask[..., None], logits, 1e4 * normal(3, 6, E, seed=6))
    value = loss_of(garbage, balance, k, mask)
    assert value.item() == pytest.approx(loss_of(logits[mask], balance, k).item(), rel=1e-12)


@EVERY_LOSS
def test_padding_gets_no_gradient_from_the_loss(balance):
    layer, mask = selector(balance, 2), normal(3, 6, seed=5) > 0
    x = normal(3, 6, E).requires_grad_()
    layer(x, mask=mask)
    sf.aux_loss(layer).backward()
    assert torch.count_nonzero(x.grad[~mask]) == 0
    assert torch.count_nonzero(x.grad[mask]) > 0


@EVERY_LOSS
def test_sequences_of_padding_do_not_count_in_the_average(balance):
    logits, mask = normal(4, 5, E), torch.ones(4, 5, dtype=torch.bool)
    mask[1], mask[2, 3:] = False, False
    each = [loss_of(logits[i][mask[i]], balance, 2).item() for i in (0, 2, 3)]
    value = loss_of(logits, balance, 2, mask, balance_over="sequence").item()
    assert value == pytest.approx(sum(each) / 3)


BAD = [
    ((), {}, ValueError, r"terms must hold a \(name, weight\) pair or more, got \(\); names are entropy, switch"),
    ([], {}, ValueError, r"terms must hold a \(name, weight\) pair or more, got \[\]"),
    ((("entropie", 1.0),), {}, ValueError, "the name in terms must be one of 'entropy', 'switch'.*got 'entropie'"),
    ((("bias", 1.0),), {}, ValueError, "the name in terms must be one of.*got 'bias'"),
    ((("entropy", 1.0),), {"n_sequences": 3}, ValueError, "n_sequences = 3 must divide the number of tokens, 8"),
    ((("entropy", 1.0),), {"n_sequences": 0}, ValueError, "n_sequences = 0 must divide the number of tokens, 8"),
    ((("entropy", 1.0),), {"n_sequences": -2}, ValueError, "n_sequences must be at least 0, got -2"),
    ((("entropy", 1.0),), {"n_sequences": 2.0}, TypeError, "n_sequences must be an int, got 2.0"),
]


@pytest.mark.parametrize(("terms", "options", "error", "words"), BAD)
def test_bad_arguments_of_a_balance_loss_are_named(terms, options, error, words):
    routed = SigmoidRouter(E, E, 2)(torch.randn(8, E))
    with pytest.raises(error, match=words):
        balance_loss(routed, terms, **options)


# ------------------------------------------------------------------------------------------------ a process group

DISTRIBUTED = [
    {"balance": balance, "balance_weight": weight, "balance_over": over, "router": router, "k": 2}
    for balance, weight in [(b, 0.7) for b in LOSSES] + [(("entropy", "switch", "cv2", "z"), (0.4, 0.3, 0.2, 0.1))]
    for over in ("batch", "sequence")
    for router in ("sigmoid", "softmax_topk")
]


def distributed_batches(rank: int):
    """Two ranks with different numbers of tokens and of real ones."""
    x = normal(3 + rank, 4, E, seed=10 + rank)
    mask = normal(3 + rank, 4, seed=20 + rank) > -0.5
    mask[rank] = False
    return x, mask


def one_step(case, x, mask, **options):
    layer = selector(**(case | {"weight": case["balance_weight"]} | options))
    layer(x, mask=mask)
    aux = sf.aux_loss(layer)
    if aux.requires_grad:
        aux.backward()
    return aux.detach(), layer.router.weight.grad


def worker(rank: int):
    x, mask = distributed_batches(rank)
    results = {}
    for number, case in enumerate(DISTRIBUTED):
        results[number, "synced"] = one_step(case, x, mask, sync_balance=True)
        results[number, "local"] = one_step(case, x, mask)
        results[number, "one empty"] = one_step(case, x, mask & (rank == 0), sync_balance=True)
        results[number, "all empty"] = one_step(case, x, mask & False, sync_balance=True)
        results[number, "inject"] = injected_step(case, x, mask)
    return results


def injected_step(case, x, mask):
    layer = selector(**(case | {"weight": case["balance_weight"]}), sync_balance=True, aux="inject")
    (0 * layer(x, mask=mask).sum()).backward()
    return sf.aux_loss(layer), layer.router.weight.grad


@pytest.fixture(scope="module")
def two_processes():
    """What two gloo processes compute, and the one process that holds both batches."""
    ranks = processes.run(worker, 2)
    (x_0, mask_0), (x_1, mask_1) = distributed_batches(0), distributed_batches(1)
    x, mask = torch.cat([x_0, x_1]), torch.cat([mask_0, mask_1])
    single = [one_step(case, x, mask) for case in DISTRIBUTED]
    first_only = [one_step(case, x_0, mask_0) for case in DISTRIBUTED]
    return ranks, single, first_only


EACH_DISTRIBUTED = pytest.mark.parametrize(
    "number", range(len(DISTRIBUTED)), ids=["{balance}-{balance_over}-{router}".format(**c) for c in DISTRIBUTED]
)


@EACH_DISTRIBUTED
def test_synced_loss_and_averaged_gradient_are_the_single_process_ones(two_processes, number):
    """The research code's was wrong here: the running maximum was reduced without a detach, the loss scaled by 1/W."""
    ranks, single, _ = two_processes
    value, gradient = single[number]
    values, gradients = zip(*(results[number, "synced"] for results in ranks), strict=True)
    assert [v.item() for v in values] == pytest.approx([value.item()] * 2)
    torch.testing.assert_close(sum(gradients) / 2, gradient, rtol=1e-9, atol=1e-12)


@EACH_DISTRIBUTED
def test_injected_gradient_averages_to_the_single_process_one(two_processes, number):
    ranks, single, _ = two_processes
    gradients = [results[number, "inject"][1] for results in ranks]
    torch.testing.assert_close(sum(gradients) / 2, single[number][1], rtol=1e-9, atol=1e-12)
    assert all(results[number, "inject"][0] == 0 for results in ranks)


@EACH_DISTRIBUTED
def test_a_rank_without_real_tokens_changes_nothing(two_processes, number):
    ranks, _, first_only = two_processes
    value, gradient = first_only[number]
    values, gradients = zip(*(results[number, "one empty"] for results in ranks), strict=True)
    assert [v.item() for v in values] == pytest.approx([value.item()] * 2)
    torch.testing.assert_close(sum(gradients) / 2, gradient, rtol=1e-9, atol=1e-12)


@EACH_DISTRIBUTED
def test_no_real_token_anywhere_costs_0(two_processes, number):
    for results in two_processes[0]:
        value, gradient = results[number, "all empty"]
        assert value == 0
        assert gradient is None or torch.count_nonzero(gradient) == 0


@EACH_DISTRIBUTED
def test_a_running_group_does_not_imply_syncing(two_processes, number):
    for rank, results in enumerate(two_processes[0]):
        value, gradient = one_step(DISTRIBUTED[number], *distributed_batches(rank))
        assert results[number, "local"][0].item() == pytest.approx(value.item(), rel=1e-12)
        torch.testing.assert_close(results[number, "local"][1], gradient)


def test_sync_without_a_group_is_an_error_in_training_only():
    layer = selector("entropy", sync_balance=True)
    with pytest.raises(RuntimeError, match="init_process_group"):
        layer(uniform())
    assert layer.eval()(uniform()).isfinite().all()


# ------------------------------------------------------------------------------------------------ balance="bias"

RATE = 1e-3


def biased(k=1, **options):
    return selector("bias", k, router="sigmoid", **options)


def likes(*experts):
    """A batch of one token for each given expert, which that expert wins clearly."""
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(experts), E).double()


def biases(layer):
    return layer.router.bias.double().tolist()


def test_bias_starts_at_0_and_is_a_persistent_buffer():
    layer = biased()
    assert biases(layer) == [0] * E
    assert "router.bias" in layer.state_dict()
    assert "router.bias" not in dict(layer.named_parameters())


def test_each_bias_moves_by_the_rate_towards_the_mean_load():
    layer = biased()
    layer(likes(0, 0, 0, 0, 0, 1, 2, 3))  # loads 5, 1, 1, 1 around the mean 2
    sf.update_router_bias(layer)
    assert biases(layer) == pytest.approx([-RATE, RATE, RATE, RATE])


def test_equal_loads_do_not_move():
    layer = biased()
    layer(likes(0, 1, 2, 3))
    sf.update_router_bias(layer)
    assert biases(layer) == [0] * E
    layer(likes(0, 0, 0, 1, 1, 2, 2, 3))  # loads 3, 2, 2, 1: the two at the mean stay
    sf.update_router_bias(layer)
    assert biases(layer) == pytest.approx([-RATE, 0, 0, RATE])


@pytest.mark.parametrize("load", [2**24 - 1, 1_234_567, 2**40 + 1])
def test_equal_loads_that_fp32_does_not_add_up_do_not_move(load):
    layer = sf.MoE(4, 15, 4, 2, balance="bias")
    layer.router.load.fill_(load)
    sf.update_router_bias(layer)
    assert not layer.router.bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_loads_beside_null_experts_do_not_move(dtype):
    for experts, null in itertools.product(range(1, 12), range(1, 6)):
        layer = sf.MoE(4, experts, 4, 1, null_experts=null, balance="bias", dtype=dtype)
        layer.router.load.fill_(100)
        sf.update_router_bias(layer)
        assert not layer.router.bias.any(), (experts, null)
        layer.router.load.fill_(100)
        layer.router.load[-1] = 99
        sf.update_router_bias(layer)
        assert layer.router.bias[:experts].lt(0).all(), (experts, null)


def test_a_mean_that_is_no_integer():
    layer = biased()
    layer(likes(0, 0, 1, 2, 3))  # loads 2, 1, 1, 1 around 1.25
    sf.update_router_bias(layer)
    assert biases(layer) == pytest.approx([-RATE, RATE, RATE, RATE])


def test_no_tokens_do_not_move():
    layer = biased()
    sf.update_router_bias(layer)
    layer(likes(0)[:0])
    layer(likes(0, 1), mask=torch.zeros(2, dtype=torch.bool))
    sf.update_router_bias(layer)
    assert biases(layer) == [0] * E


@pytest.mark.parametrize(("router", "balance"), [("sigmoid", "bias"), ("relu", "l1")])
def test_a_dry_run_in_inference_mode_leaves_loads_that_count(router, balance):
    with torch.device("meta"):
        layer = sf.MoE(E, E, 2, 1, router=router, balance=balance, dtype=torch.float64)
    layer.to_empty(device="cpu").reset_parameters()
    with torch.inference_mode():
        layer(likes(0))
    layer(likes(0, 1)).sum().backward()
    assert layer.router.load.any()
    sf.update_router_bias(layer)
    assert not layer.router.load.any()


def replica(module):
    """A copy as ``nn.DataParallel`` makes one for each device."""
    copied = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters(recurse=False):
        setattr(copied, name, parameter.view_as(parameter))
    for name, child in module.named_children():
        setattr(copied, name, replica(child))
    return copied


@pytest.mark.parametrize("aux", ["attach", "inject"])
@pytest.mark.parametrize(
    ("balance", "router"), [("entropy", "sigmoid"), (("z", "bias"), "sigmoid"), ("bias", "sigmoid"), ("l1", "relu")]
)
def test_a_balance_is_not_lost_in_the_copies_of_data_parallel(balance, router, aux):
    weight = 1.0 if isinstance(balance, str) else (1.0, 1.0)
    layer = sf.MoE(E, 3, 2, 1, router=router, balance=balance, balance_weight=weight, aux=aux)
    copied, x = replica(layer), torch.randn(6, E)
    with pytest.raises(RuntimeError, match=r"does not work in torch\.nn\.DataParallel.*DistributedDataParallel"):
        copied(x)
    assert not layer.router.load.any()
    torch.testing.assert_close(replica(layer.eval())(x), layer(x))


def test_what_is_not_balanced_trains_in_data_parallel():
    layer, x = sf.SigmaMoE(E, 3, 2, 1, balance="none"), torch.randn(6, E)
    torch.testing.assert_close(replica(layer)(x), layer(x))


def test_loads_add_up_over_training_forwards_and_are_cleared_by_the_update():
    layer = biased()
    layer(likes(0, 1))
    layer(likes(2, 3))  # together balanced
    sf.update_router_bias(layer)
    assert biases(layer) == [0] * E
    layer(likes(0, 0, 1, 2))
    sf.update_router_bias(layer)
    once = biases(layer)
    assert once == pytest.approx([-RATE, 0, 0, RATE])
    sf.update_router_bias(layer)
    assert biases(layer) == once


@pytest.mark.parametrize("balance", ["bias", "l1"])
def test_loads_stay_in_one_tensor_to_which_the_replay_of_a_cuda_graph_can_add(balance):
    layer = selector(balance, router="relu" if balance == "l1" else "sigmoid")
    load = layer.router.load
    layer(likes(0, 1))
    counted = load.tolist()
    assert any(counted)
    sf.update_router_bias(layer)
    assert not load.any()
    for _ in range(2):
        layer(likes(0, 1))
    assert load.tolist() == [2 * count for count in counted]
    layer.reset_parameters()
    assert layer.router.load is load
    assert not load.any()


def test_copies_and_pickles_have_counted_nothing():
    layer = biased()
    layer(likes(0))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "load" not in other.router.__getstate__()  # one that is made for a pickle is gone when that is sent
        sf.update_router_bias(other)
        assert biases(other) == [0] * E
    sf.update_router_bias(layer)
    assert biases(layer) == pytest.approx([-RATE, RATE, RATE, RATE])


def test_loads_are_counted_in_training_only_and_without_padding():
    layer = biased().eval()
    layer(likes(0, 0, 0))
    layer.train()
    layer(likes(0, 1, 2, 3, 0, 0), mask=torch.tensor([True] * 4 + [False] * 2))
    sf.update_router_bias(layer)
    assert biases(layer) == [0] * E


def test_every_slot_counts_when_k_is_not_1():
    layer = biased(2)
    layer(likes(0, 1) + likes(1, 2) + 0.1 * likes(3, 3))  # {0, 1} and {1, 2}: loads 1, 2, 1, 0 around 1
    sf.update_router_bias(layer)
    assert biases(layer) == pytest.approx([0, -RATE, 0, RATE])


def test_the_bias_is_updated_in_every_layer_of_a_model():
    model = torch.nn.Sequential(biased(), torch.nn.Sequential(biased()), selector("entropy"))
    model[0](likes(0))
    model[1][0](likes(1))
    sf.update_router_bias(model)
    assert biases(model[0]) == pytest.approx([-RATE, RATE, RATE, RATE])
    assert biases(model[1][0]) == pytest.approx([RATE, -RATE, RATE, RATE])


def test_a_router_that_layers_share_moves_once_by_the_load_of_all():
    first, second = biased(), biased()
    second.router = first.router
    model = torch.nn.Sequential(first, second)
    first(likes(0, 0))
    second(likes(1, 2))  # together 2, 1, 1, 0 around 1
    sf.update_router_bias(model)
    assert biases(first) == pytest.approx([-RATE, 0, 0, RATE])
    moved = biases(first)
    model.append(sf.MoE(E, E - 1, 2, 1, router=first.router, null_experts=1, balance="bias"))
    first(likes(0, 0))
    with pytest.raises(ValueError, match=r"'2' shares its router with a layer .* that wishes other loads"):
        sf.update_router_bias(model)
    assert biases(first) == moved


def test_the_bias_selects_and_does_not_weigh():
    layer = biased()
    layer.router.bias.copy_(torch.tensor([0, 0, 50.0, 0]))
    logits, index, gate = layer.router(likes(0, 1), None)
    assert index.flatten().tolist() == [2, 2]
    torch.testing.assert_close(gate, torch.full_like(gate, 0.5))
    torch.testing.assert_close(logits, likes(0, 1).to(logits.dtype))


def test_the_bias_gets_no_gradient_and_the_loss_is_0():
    layer = biased()
    layer(likes(0, 0, 1)).sum().backward()
    assert not layer.router.bias.requires_grad
    assert layer.router.bias.grad is None
    assert sf.aux_loss(layer) == 0


def test_repeated_updates_balance_a_collapsed_router():
    layer = selector("bias", 1, router="sigmoid")
    x = normal(64, E, scale=0.01) + torch.tensor([0.05, 0, 0, -0.05], dtype=torch.float64)

    def busiest():
        return max(oracle.load(oracle.Routing(x, layer.router(x, None).index_TK.tolist(), x))) / len(x)

    before = busiest()
    for _ in range(100):
        layer(x)
        sf.update_router_bias(layer)
    assert before > 0.9
    assert busiest() < 0.35


def test_bias_combines_with_a_loss():
    layer = selector(("bias", "z"), weight=(1.0, 0.5))
    layer(likes(0, 0, 1, 2))
    sf.update_router_bias(layer)
    assert biases(layer) == pytest.approx([-RATE, 0, 0, RATE])
    assert sf.aux_loss(layer).item() == pytest.approx(0.5 * math.log(math.exp(3) + 3) ** 2)


# ------------------------------------------------------------------------------------------------ attach and inject


def test_attached_loss_is_of_the_last_training_forward_and_not_appended():
    layer, x, z = selector("z"), normal(4, E), normal(5, E, seed=1)
    layer(z)
    alone = sf.aux_loss(layer)
    layer(x), layer(x), layer(z)
    assert sf.aux_loss(layer) == alone
    assert sf.aux_loss(layer) == alone  # reading does not consume it


def test_eval_forward_clears_the_attached_loss():
    layer = selector("z")
    layer(normal(4, E))
    assert sf.aux_loss(layer) != 0
    layer.eval()(normal(4, E))
    assert sf.aux_loss(layer) == 0


def test_losses_of_layers_add_up_and_a_shared_layer_counts_once():
    a, b = selector("z"), selector("z")
    model = torch.nn.Sequential(a, torch.nn.ModuleDict({"b": b, "a again": a}))
    a(normal(4, E)), b(normal(4, E, seed=1))
    assert sf.aux_loss(model).item() == pytest.approx((sf.aux_loss(a) + sf.aux_loss(b)).item())


def copies(layer):
    yield copy.deepcopy(layer)
    yield copy.copy(layer)
    yield pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("aux", ["attach", "inject"])
def test_copies_and_pickles_drop_the_attached_loss_and_compute_the_same(aux):
    layer, x = selector("z", aux=aux), normal(4, E).requires_grad_()
    y = layer(x)
    for twin in copies(layer):
        assert sf.aux_loss(twin) == 0
        assert torch.equal(twin(x), y)
    assert (sf.aux_loss(layer) != 0) == (aux == "attach")


def test_attached_loss_is_not_in_the_state_dict():
    layer = selector("z")
    before = set(layer.state_dict())
    layer(normal(4, E))
    assert set(layer.state_dict()) == before


def gradients(aux, balance, weight, balance_over):
    layer = selector(balance, 2, router="sigmoid", weight=weight, balance_over=balance_over, aux=aux)
    x = normal(3, 4, E).requires_grad_()
    y = layer(x, mask=normal(3, 4, seed=1) > -1)
    ((y * normal(3, 4, E, seed=2)).sum() + sf.aux_loss(layer)).backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(
    ("balance", "weight"), [(b, 0.5) for b in LOSSES] + [(("entropy", "z"), (0.5, 0.1)), ("none", 0.0)]
)
@OVER
def test_injecting_gives_the_gradients_of_adding_aux_loss(balance, weight, balance_over):
    how = (balance, weight, balance_over)
    for attached, injected in zip(gradients("attach", *how), gradients("inject", *how), strict=True):
        torch.testing.assert_close(injected, attached)


def test_an_injecting_layer_counts_0_in_aux_loss():
    layer = selector("z", aux="inject")
    layer(normal(4, E).requires_grad_())
    assert sf.aux_loss(layer) == 0


def test_injecting_leaves_the_output_alone():
    x = normal(4, E)
    assert torch.equal(selector("z", aux="inject")(x), selector("z")(x))


def test_injecting_does_nothing_without_grad_or_in_eval():
    layer, x = selector("z", aux="inject", router="unweighted", weight=1.0), normal(4, E)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.eval()(x).sum().backward()
    assert torch.count_nonzero(layer.router.weight.grad) == 0
    layer.train()(x).sum().backward()
    assert torch.count_nonzero(layer.router.weight.grad) > 0


def test_a_layer_shared_by_several_blocks_injects_for_each_call():
    layer, x, z = selector("z", aux="inject", router="unweighted"), normal(4, E), normal(4, E, seed=1)
    separate = []
    for batch in (x, z):
        layer.zero_grad()
        layer(batch).sum().backward()
        separate.append(layer.router.weight.grad.clone())
    layer.zero_grad()
    (layer(x).sum() + layer(z).sum()).backward()
    torch.testing.assert_close(layer.router.weight.grad, separate[0] + separate[1])


def test_an_injected_loss_has_weight_1_whatever_scales_the_main_one():
    """A GradScaler divides it too; of parts that are accumulated each adds the whole of its own."""
    layer, x, z = selector("z", aux="inject", router="unweighted"), normal(4, E), normal(4, E, seed=1)

    def gradient(loss):
        layer.zero_grad()
        loss().backward()
        return layer.router.weight.grad.clone()

    whole = gradient(lambda: layer(x).sum())  # an unweighted router learns from its balance loss alone
    assert whole.any()
    assert torch.equal(gradient(lambda: 1024 * layer(x).sum()), whole)  # so that what is divided is a 1024th
    other = gradient(lambda: layer(z).sum())
    torch.testing.assert_close(gradient(lambda: (layer(x).sum() + layer(z).sum()) / 2), whole + other)


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_reaches_no_loss(name):
    """Not even NaN, as uninitialised memory may hold it."""
    logits = normal(6, E)
    logits[5] = math.nan
    routing = Routing(logits, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1))
    mask = torch.arange(6) < 4
    found = balance_loss(routing, ((name, 1.0),), mask_T=mask)
    kept = Routing(*(t[:4] for t in (routing.logits_TE, routing.index_TK, routing.gate_TK)))
    torch.testing.assert_close(found, balance_loss(kept, ((name, 1.0),)))


# ------------------------------------------------------------------------------------------------ routing_stats


def stats(logits, k=1, mask=None, **options):
    layer = selector("none", k, **options)
    layer(logits, mask=mask)
    return sf.routing_stats(layer)[""]


def test_stats_at_balance_and_at_collapse():
    balanced, dead = stats(rotating()), stats(collapsed())
    assert (balanced["entropy"], balanced["busiest"], balanced["dead"]) == pytest.approx((1, 1 / E, 0))
    assert (dead["entropy"], dead["busiest"], dead["dead"]) == pytest.approx((0, 1, (E - 1) / E), abs=1e-7)
    assert balanced["load"].tolist() == pytest.approx([1 / E] * E)
    assert dead["load"].tolist() == pytest.approx([1, 0, 0, 0])


@EVERY_K
def test_load_is_the_share_of_slots(k):
    logits = normal(6, E)
    index = logits.topk(k).indices
    load = torch.bincount(index.flatten(), minlength=E) / index.numel()
    result = stats(logits, k)
    assert result["load"].device.type == "cpu"
    assert result["load"].tolist() == pytest.approx(load.tolist())
    assert result["busiest"] == pytest.approx(load.max().item())
    assert result["entropy"] == pytest.approx(-torch.xlogy(load, load).sum().item() / math.log(E), abs=1e-6)


def test_padding_is_not_in_the_stats():
    mask, logits = normal(3, 6, seed=5) > 0, normal(3, 6, E)
    assert stats(logits, 2, mask)["load"].tolist() == pytest.approx(stats(logits[mask], 2)["load"].tolist())


def test_stats_of_nothing_are_finite():
    for mask, logits in [(None, uniform(0)), (torch.zeros(8, dtype=torch.bool), uniform())]:
        result = stats(logits, 2, mask)
        assert all(math.isfinite(result[name]) for name in ("entropy", "busiest", "dead"))
        assert result["load"].isfinite().all()


def test_stats_are_of_the_last_forward_of_layers_that_have_run_by_module_name():
    model = torch.nn.Sequential(selector("none"), torch.nn.ModuleDict({"ffn": selector("none")}), torch.nn.Identity())
    assert sf.routing_stats(model) == {}
    model[1]["ffn"](collapsed())
    model[1]["ffn"](rotating())
    result = sf.routing_stats(model)
    assert list(result) == ["1.ffn"]
    assert set(result["1.ffn"]) == {"entropy", "busiest", "dead", "load"}
    assert result["1.ffn"]["entropy"] == pytest.approx(1)

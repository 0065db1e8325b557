"""Which hidden units form an expert: balanced clusters of units that belong together.

F hidden units, E experts, G units of an expert, C features of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.convert.init.weights import wide

SHARPNESS = 30  # standard deviation of the scaled similarities: the softmax over clusters is then close to a choice


def balanced_kmeans(features_FC: Tensor, n_clusters: int, n_iters: int = 20) -> Tensor:
    """Clusters of equal size by k-means on the unit sphere (MoEfication, arXiv 2110.01786).

    Only the directions of the features count. After ``n_iters`` rounds, or when no unit moves, it returns the units of
    each cluster [E, G], ascending: the same for the same features.
    """
    point_FC = F.normalize(wide(features_FC), dim=1)
    center_EC = _spread(point_FC, n_clusters)
    cluster_F = torch.full((len(point_FC),), -1, device=point_FC.device)
    for _ in range(n_iters):
        similarity_FE = point_FC @ center_EC.t()
        nearest_F = balanced_assignment(similarity_FE)
        if torch.equal(nearest_F, cluster_F):
            break
        cluster_F = nearest_F
        sum_EC = torch.zeros_like(center_EC).index_add_(0, cluster_F, point_FC)
        center_EC = F.normalize(sum_EC, dim=1)
    return cluster_F.argsort(stable=True).view(n_clusters, -1)


def _spread(point_FC: Tensor, n: int) -> Tensor:
    """Starting centers: the point nearest to the mean, then each time the one farthest from all so far."""
    chosen = [int((point_FC @ point_FC.mean(0)).argmax())]
    nearest_F = point_FC @ point_FC[chosen[0]]
    for _ in range(n - 1):
        chosen.append(int(nearest_F.argmin()))
        nearest_F = torch.maximum(nearest_F, point_FC @ point_FC[chosen[-1]])
    return point_FC[chosen]


def product_grid(keys_FD: Tensor, n: int) -> Tensor:
    """n² units laid out [n, n]: those of a row are alike in the first half of their keys, of a column in the second."""
    first, second = wide(keys_FD).chunk(2, dim=1)
    row_NN = balanced_kmeans(first, n)
    center_NC = second[balanced_kmeans(second, n)].mean(1)
    grid_NN = torch.empty_like(row_NN)
    for i, units in enumerate(row_NN):
        grid_NN[i, balanced_assignment(F.normalize(second[units], dim=1) @ F.normalize(center_NC, dim=1).t())] = units
    return grid_NN


def product_keys(sub_keys_2HNC: Tensor) -> Tensor:
    """The key of each pair of sub-keys, [H, N·N, 2C]: the pairs of a first sub-key follow each other."""
    first, second = sub_keys_2HNC
    n = first.shape[1]
    return torch.cat([first.repeat_interleave(n, 1), second.repeat(1, n, 1)], dim=2)


def balanced_assignment(similarity_FE: Tensor, n_rounds: int = 100) -> Tensor:
    """A cluster for each unit [F], F/E units each, of high total similarity.

    Prices per cluster rise where too many units want in (Sinkhorn's column scaling, ``n_rounds`` times). Deferred
    acceptance settles what is then still uneven: a full cluster keeps those that lose most elsewhere, and the others
    ask the next best.
    """
    n_units, n_clusters = similarity_FE.shape
    size = n_units // n_clusters
    sharp_FE = similarity_FE * (SHARPNESS / similarity_FE.std().clamp_min(1e-12))
    price_E = torch.zeros_like(sharp_FE[0])
    for _ in range(n_rounds):
        wanted_E = torch.softmax(sharp_FE - price_E, dim=1).sum(0)
        price_E = price_E + (wanted_E / size).clamp_min(1e-30).log()
    value_FE = sharp_FE - price_E
    cluster_F = value_FE.new_full((n_units,), -1, dtype=torch.int64)
    open_FE = value_FE.clone()
    while True:
        asking = (cluster_F < 0).nonzero().flatten()
        if not len(asking):
            return cluster_F
        cluster_F[asking] = open_FE[asking].argmax(1)
        for e in (torch.bincount(cluster_F, minlength=n_clusters) > size).nonzero().flatten().tolist():
            members = (cluster_F == e).nonzero().flatten()
            other = open_FE[members].clone()
            other[:, e] = -torch.inf
            loss = value_FE[members, e] - other.max(1).values
            refused = members[loss.argsort(descending=True, stable=True)[size:]]
            cluster_F[refused] = -1
            open_FE[refused, e] = -torch.inf

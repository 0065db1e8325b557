"""Train the demo's byte transformer with its experts split over all processes; save, and go on with another number.

torchrun --nproc-per-node 2 examples/train_parallel.py --steps 40
torchrun --nproc-per-node 4 examples/train_parallel.py --steps 60    # resumes from step 40
python examples/train_parallel.py --steps 80                         # and again, in one process
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparse_ffn as sf

try:
    from examples.language_model.model import ByteTransformer
except ImportError:  # run by its path, as torchrun does
    from language_model.model import ByteTransformer  # type: ignore[no-redef]
from sparse_ffn.parallel import ExpertParallel, clip_grad_norm_, ddp_ignore, plan

D_MODEL, N_LAYERS, CONTEXT, SEQUENCES = 64, 2, 64, 24


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in all, those of earlier runs included")
    parser.add_argument("--experts", type=int, default=12, help="experts of each layer, over all processes")
    parser.add_argument("--out", default="runs/parallel", help="folder of the checkpoint; one that is there is resumed")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is not at least 1")
    return args


def text() -> Tensor:
    """Some of Python's own sources, as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "inspect.py", "pathlib.py", "typing.py", "uuid.py")
    return torch.frombuffer(
        bytearray(b"".join((folder / n).read_bytes() for n in names if (folder / n).exists())), dtype=torch.uint8
    )


def batch(source: Tensor, step: int) -> Tensor:
    """The sequences of a step, those of all processes: they do not depend on how many there are."""
    start = torch.randint(len(source) - CONTEXT, (SEQUENCES,), generator=torch.Generator().manual_seed(step))
    return torch.stack([source[s : s + CONTEXT + 1] for s in start]).long()


def build(experts: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)

    def expert_layer(_: int) -> nn.Module:
        return sf.SigmaMoE(D_MODEL, experts, 32, 2, n_layers=N_LAYERS, sync_balance=True)

    sizes: dict[str, Any] = {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 2, "d_head": 32, "context": CONTEXT}
    return ByteTransformer(**sizes, dropout=0.0, make_ffn=expert_layer).to(device)


def main(argv: Sequence[str] | None = None) -> list[float]:
    arguments = parse(argv)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29511")
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=world)
    rank, world = dist.get_rank(), dist.get_world_size()
    if SEQUENCES % world:
        raise SystemExit(f"{world} processes must divide a batch of {SEQUENCES} sequences")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)

    # the five lines that are not in a training of one process
    mesh = init_device_mesh(kind, (world,), mesh_dim_names=("ep",))
    model = build(arguments.experts, device)
    parallelize_module(model, mesh, plan(model, experts=ExpertParallel()))
    ddp_ignore(model)
    net = DistributedDataParallel(model, device_ids=[device.index] if kind == "cuda" else None)

    split = [p for p in net.parameters() if isinstance(p, DTensor)]  # an optimizer group holds tensors of one kind
    rest = [p for p in net.parameters() if not isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW([{"params": split}, {"params": rest}], lr=3e-3)
    first = resume(net, optimizer, arguments.out)
    if rank == 0:
        held = sum(p.to_local().numel() for p in split) + sum(p.numel() for p in rest)
        print(f"{world} processes, {held:,} of {sum(p.numel() for p in net.parameters()):,} parameters on each")

    if first >= arguments.steps:
        if rank == 0:
            print(f"{arguments.out} has done step {first} already: nothing is left of {arguments.steps}")
        return []
    losses, source = [], text()
    for step in range(first, arguments.steps):
        tokens = batch(source, step).chunk(world)[rank].to(device)
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + sf.aux_loss(model)).backward()
        clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
        if rank == 0 and (step == first or (step + 1) % 10 == 0):
            print(f"step {step + 1:4d}  loss {losses[-1]:.4f}")
    save(net, optimizer, arguments.out, arguments.steps)
    return losses


def state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(net, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.zeros((), dtype=torch.int64)}


def save(net: nn.Module, optimizer: torch.optim.Optimizer, folder: str, step: int) -> None:
    place = Path(folder, f"step-{step}")  # the last one stays whole until this is
    dcp.save({**state(net, optimizer), "step": torch.tensor(step)}, checkpoint_id=place)
    if dist.get_rank() == 0:
        print(f"saved step {step} to {place}")


def resume(net: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> int:
    """Fill model and optimizer from a checkpoint of any number of processes; the step to go on with."""
    whole = [path.parent for path in Path(folder).glob("step-*/.metadata")]  # which is written at the end
    if not whole:
        return 0
    found = state(net, optimizer)
    dcp.load(found, checkpoint_id=max(whole, key=lambda path: int(path.name.removeprefix("step-"))))
    set_state_dict(net, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return int(found["step"])


if __name__ == "__main__":
    main()
    dist.destroy_process_group()

"""The adapters of the libraries in runs/gpu-peers, against those libraries: ``python tests/real_peers.py``.

Their kernels run with the last of the tiles that each would try, not with the best. Where there is no GPU they are
interpreted, in fp32, and what they ask of a GPU gets an answer.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.update(TRITON_INTERPRET="1", TORCH_COMPILE_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

import sparse_ffn as sf  # noqa: E402
from benchmarks.contenders import cvmm, gpu_peers  # noqa: E402
from benchmarks.contenders.moe import Problem  # noqa: E402
from benchmarks.measuring.check import errors  # noqa: E402
from benchmarks.measuring.contender import Contender, NotInstalled  # noqa: E402
from benchmarks.shapes import MoEShape  # noqa: E402

SHAPE = MoEShape(24, 16, 4, 16, 2)


def with_the_last_tile(self: Any, *arguments: Any, **options: Any) -> Any:
    """In place of Triton's autotuner, which needs a device's clock and compiles all that it tries."""
    named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
    for name in self.reset_to_zero:
        named[name].zero_()
    for tile in reversed(self.configs):
        with suppress(OutOfResources):  # as the autotuner does
            return self.fn.run(*arguments, **options, **tile.all_kwargs())
    raise RuntimeError(f"no tile of {self.fn} fits")


def pretend() -> None:
    """Answer for a GPU that is not there."""
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9, minor=0)  # type: ignore[assignment]
    torch.cuda.mem_get_info = lambda device=None: (1 << 34, 1 << 34)


def wrong(contender: Contender, x: torch.Tensor, out: tuple[int, int]) -> list[str]:
    """What is wrong with the output and the gradients."""
    torch.manual_seed(0)  # one oracle answers for all peers of a case
    with sf.backend("auto" if GPU else "reference"):
        found, bad = errors(contender, x, torch.randn(*out, device=x.device).to(x.dtype))
    return [f"{name} {found.get(name, 'missing')}" for name in bad]


def main() -> int:
    """Print a line for each adapter; 1 if one is wrong, or if none could be tried."""
    device = torch.device("cuda" if GPU else "cpu")
    said: dict[str, list[str] | None] = {}
    for dtype in ("fp32", "bf16") if GPU else ("fp32",):
        for glu, peers in ((False, gpu_peers.EXPERTS), (True, gpu_peers.GLU_EXPERTS)):
            for name, (make, _) in peers.items():
                if name == "SonicMoE" and dtype == "fp32":
                    continue  # it computes in bf16 alone
                p, line = Problem(SHAPE, dtype, device, glu=glu), f"{name}, {'GLU' if glu else 'ReLU'}, {dtype}"
                try:
                    said[line] = wrong(p.peer_experts(make), p.x, (SHAPE.T, SHAPE.D))
                except NotInstalled as error:
                    said[f"{line}: {error}"] = None
        for down in (False, True):
            case = cvmm.cvmm_case(SHAPE, dtype, device, down=down, libraries=True)
            for entry in case.entries:
                if entry.name in gpu_peers.EXPERTS:
                    line = f"{entry.name}, {case.group}, {dtype}"
                    try:
                        said[line] = wrong(entry.build(), case.x, case.out)
                    except NotInstalled as error:
                        said[f"{line}: {error}"] = None
    for line, found in said.items():
        print(line, "" if found is None else "right" if not found else f"WRONG: {', '.join(found)}")
    tried = [found for found in said.values() if found is not None]
    return int(not tried or any(tried))


if __name__ == "__main__":
    Autotuner.run = with_the_last_tile
    if not GPU:
        pretend()
    sys.exit(main())

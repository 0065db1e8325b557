"""Where a `with sparse_ffn.backend(...)` block holds: in its thread or task, until it ends, whatever else ends."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.backends.choice import choose, explain
from sparse_ffn.ops.topk_ffn import torch as topk_ffn


def now() -> str:
    """What computes fp64 on a CPU: "torch" unless something is forced."""
    return choose(torch.zeros(1, dtype=torch.float64))


def in_a_thread(call: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


def test_a_block_is_of_its_thread() -> None:
    with sf.backend("reference"):
        assert in_a_thread(now) == "torch"
        assert now() == "reference"


def test_blocks_of_two_threads_do_not_meet() -> None:
    barrier, found = threading.Barrier(2, timeout=10), {}

    def work(name: str) -> None:
        with sf.backend(name):
            barrier.wait()  # both are inside
            found[name] = now()
            barrier.wait()
        found[f"after {name}"] = now()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"reference": "reference", "torch": "torch", "after reference": "torch", "after torch": "torch"}
    assert now() == "torch"


@pytest.mark.parametrize("first", [0, 1])
def test_blocks_end_in_any_order(first: int) -> None:
    stacks = [ExitStack(), ExitStack()]
    stacks[0].enter_context(sf.backend("reference"))
    stacks[1].enter_context(sf.backend("auto"))
    assert now() == "torch"
    stacks[first].close()
    assert now() == ("torch", "reference")[first]  # what is still open
    stacks[1 - first].close()
    assert now() == "torch"
    assert "automatic" in explain()


def generator() -> Iterator[str]:
    with sf.backend("reference"):
        yield now()


def test_a_generator_that_is_dropped_forces_nothing() -> None:
    one, other = generator(), generator()
    assert next(one) == next(other) == "reference"
    del one
    other.close()
    assert now() == "torch"


def test_a_block_that_another_thread_ends_is_over() -> None:
    held = generator()
    next(held)
    assert now() == "reference"
    in_a_thread(held.close)
    assert now() == "torch"


def test_a_block_is_of_its_task() -> None:
    async def task(name: str, turns: int) -> list[str]:
        found = []
        with sf.backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                found.append(now())
        return found

    async def idle() -> list[str]:
        found = []
        for _ in range(4):
            await asyncio.sleep(0)
            found.append(now())
        return found

    async def main() -> list[list[str]]:
        return await asyncio.gather(task("reference", 2), task("torch", 4), idle())

    assert asyncio.run(main()) == [["reference"] * 2, ["torch"] * 4, ["torch"] * 4]
    assert now() == "torch"


def test_a_copied_context_has_the_block_until_it_ends() -> None:
    with sf.backend("reference"):
        context = contextvars.copy_context()
        assert in_a_thread(lambda: context.run(now)) == "reference"
    assert in_a_thread(lambda: context.run(now)) == "torch"


def test_it_decorates_functions() -> None:
    assert sf.backend("reference")(now)() == "reference"
    assert now() == "torch"


def test_a_backward_pass_uses_the_backend_of_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    backward = topk_ffn.backward
    monkeypatch.setattr(topk_ffn, "backward", lambda *a: calls.append(threading.current_thread()) or backward(*a))
    with sf.backend("torch"):
        loss = sf.TopKFFN(8, 16, 4)(torch.randn(5, 8)).sum()
    loss.backward(retain_graph=True)
    with sf.backend("reference"):
        in_a_thread(loss.backward)
    assert len(calls) == 2


def test_autograds_own_threads_have_the_blocks_of_backwards_caller() -> None:
    """They recompute checkpoints on a GPU. Here an empty context stands for such a thread's."""
    seen: list[str] = []
    y = torch.ones(1, requires_grad=True) * 2
    y.register_hook(lambda grad: seen.append(contextvars.Context().run(now)))
    with sf.backend("reference"):
        y.backward()
        assert contextvars.Context().run(now) == "torch"  # which is another's, no backward pass's
    assert seen == ["reference" if torch.__version__ >= (2, 12) else "torch"]  # older ones do not tell of the caller


# --------------------------------------------------------------------------------------------------- torch.compile


def compiled(function: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[list[str]]]:
    """The function compiled to one graph, and the backends of the TopKFFNs in each graph, as they are compiled."""
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        ops = [node for node in graph.graph.nodes if "sparse_ffn.topk_ffn" in str(node.target)]
        graphs.append([node.args[-1] for node in ops])
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=record, fullgraph=True), graphs


def test_compiled_code_follows_the_blocks_around_it() -> None:
    layer, x = sf.TopKFFN(8, 16, 4, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    call, graphs = compiled(layer)
    call(x)
    for _ in range(2):  # compiled once for each
        with sf.backend("reference"):
            call(x)
            in_a_thread(lambda: call(x))
        call(x)
    assert graphs == [["torch"], []]  # the reference is torch's own operators
    assert in_a_thread(lambda: sf.backend("reference")(call)(x)).shape == (5, 8)
    assert len(graphs) == 2


def test_a_block_inside_compiled_code_ends_there() -> None:
    layer, x = sf.TopKFFN(8, 16, 4, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)

    def both(x: Tensor) -> Tensor:
        with sf.backend("reference"):
            y = layer(x)
        return y + layer(x)

    call, graphs = compiled(both)
    torch.testing.assert_close(call(x), 2 * layer(x))
    torch.testing.assert_close(call(x), 2 * layer(x))
    assert graphs == [["torch"]]
    assert now() == "torch"

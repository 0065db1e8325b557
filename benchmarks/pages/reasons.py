"""Why a target is missed, where one is: written by hand, each with the command that shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One reason.

    Attributes:
        where: a regular expression for lines of the targets: group, shape, dtype, pass, what.
        cores: the CPU core's instruction sets that it is known of.
        why: in a sentence or two.
        command: shows the floor or the profile.
    """

    where: str
    cores: tuple[str, ...]
    why: str
    command: str


def find(line: str, facts: Mapping[str, str]) -> Reason | None:
    """The first that says why this line of the targets was missed on the machine of these facts."""
    core = facts.get("CPU core", "")
    return next((reason for reason in REASONS if core in reason.cores and re.match(reason.where, line)), None)


ZEN5, XEON = ("avx512_bf16",), ("avx512",)
STEP = "python -m benchmarks.passes --shapes {}"

REASONS = (
    Reason(
        r"topk(-glu)? T=1 D=576 ",
        ZEN5,
        "Both products of one token take 0.1 ms, and the op that selects and activates between them 0.05 ms, most of "
        "it the call. A step writes both matrices' gradients, 3.5 MB each in fp32, however few units it kept.",
        "python -m benchmarks.bench_topk --tokens 1",
    ),
    Reason(
        r"topk(-glu)? T=32 D=576 ",
        ZEN5,
        "Up to a quarter of the units the forward pass gathers rows, the backward pass up to a tenth in bf16 and a "
        "half in fp32. Beyond, the products are the dense FFN's; activating, selecting and masking 32 rows of 1536 "
        "comes on top of them.",
        "python -m benchmarks.bench_topk --tokens 32",
    ),
    Reason(
        r"moe(-glu)? 1,512,16,128,4 \S+ fwdbwd times faster",
        ZEN5 + XEON,
        "The core's passes are a small part of a step of one token, as the profile shows: the rest is calls, and both "
        "have those. Both write the gradients of all 16 experts, which are zero but for four of them.",
        STEP.format("1,512,16,128,4"),
    ),
    Reason(
        r"moe 1,(512,16|1024,32),128,4 \S+ fwdbwd elements kept",
        ZEN5 + XEON,
        "2·E + 1 numbers are kept for the experts of a call, however few tokens there are.",
        "python -m benchmarks.bench_layers --layers moe --shapes 1,512,16,128,4 --pass fwdbwd",
    ),
    Reason(
        r"moe 1,(512,16|1024,32),128,4 \S+ fwd time",
        ZEN5 + XEON,
        "The core's passes are a small part of the time of one token, as the profile shows: the rest is the call, "
        "which does more in Python than one of nn.Linear.",
        STEP.format("1,512,16,128,4"),
    ),
    Reason(
        r"moe 32,1024,32,128,4 \S+ fwd time",
        ZEN5 + XEON,
        "32 tokens with four experts each reach nearly all 32 experts: eight times the weights of the dense FFN, whose "
        "few stay in a cache. The profile shows the rate at which they are read beside torch.sum's.",
        STEP.format("32,1024,32,128,4"),
    ),
    Reason(
        r"moe 2048,512,16,128,4 bf16 fwdbwd time",
        ZEN5,
        "The bar is an earlier run's ratio, and this row varies: two runs of a day gave 1.31 and 1.42. Beyond the "
        "floor it packs gathered rows and weights and adds up a token's experts.",
        STEP.format("2048,512,16,128,4 --dtype bf16"),
    ),
    Reason(
        r"moe (2048|4096|512),\S+ fp32 fwdbwd time",
        XEON,
        "The steps take 1.3 to 1.4 times the floor of their arithmetic at 2048 and 4096 tokens, and 1.9 at 512: they "
        "pack gathered rows and weights, add up a token's experts and compute the last tile of each expert.",
        "python -m benchmarks.rows --machine intel --part passes --layer fp32",
    ),
    Reason(
        r"pkm-query .* times faster",
        XEON,
        "The query and its scores are products that the peers compute as fast as we do: even at torch.mm's rate they "
        "take 27 of our step's 62 ms.",
        "python -m benchmarks.rows --machine intel --part passes --layer n=128",
    ),
)

"""Tiles that ``python -m sparse_ffn.tune`` tries beside those of the tables: deeper, wider, other warps and stages.

``make gate`` compiles them like the tables (without ``--quick``), so that whatever tuning may choose neither spills
nor takes more shared memory than there is. Their heights are heights of the tables. Triton compiles other tiles for
AMD's cards so rarely well that nothing is tried there beyond the tables' own.
"""

from __future__ import annotations

from sparse_ffn.backends.triton.tile import Table, table

_SM80 = table("""
    one    half   64x256x32/8/3   128x64x32/4/4   128x128x32/8/3  128x128x64/8/3
    two    half   64x64x64/4/3    128x64x32/8/3
    outer  half   128x128x64/8/7
    one    tf32   64x128x32/8/3   128x128x32/8/3
    two    tf32   128x64x16/8/3
    outer  tf32   128x128x32/8/7
""")
_SM90 = table("""
    one    half   64x128x64/4/3   64x256x64/8/3   128x128x64/8/4  128x128x32/8/5
    two    half   64x128x64/8/3   128x64x64/8/4
    outer  half   128x128x32/8/5  128x256x64/8/5
    one    tf32   64x256x32/8/3   128x128x32/8/4
    two    tf32   128x64x32/8/3
    outer  tf32   128x128x32/8/7
""")
TABLES: dict[str, Table] = {"sm_80": _SM80, "sm_90": _SM90}

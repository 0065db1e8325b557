"""The compatibility matrix: features of torch x layers x backends, declared once, tested, and written to docs/.

``python -m tests.matrix`` writes the tables of docs/compatibility.md.
"""

from .cases import CASES as CASES
from .cases import FEATURES as FEATURES
from .cases import Case as Case

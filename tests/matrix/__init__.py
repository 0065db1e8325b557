"""The compatibility matrix: features of torch x layers x backends, declared once, tested, and written to docs/.

``python -m tests.matrix`` writes the tables of docs/compatibility.md.
"""

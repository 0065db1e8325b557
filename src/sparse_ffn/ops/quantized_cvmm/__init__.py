"""CVMM by quantised rows: each row of x times the matrix that its expert's codes stand for."""

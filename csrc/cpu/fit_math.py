"""Fits the polynomials of math.h and prints them: `python csrc/cpu/fit_math.py`.

Each is a least-squares fit at many Chebyshev nodes in float64, weighted to equalise the relevant error.
"""

import math

import numpy as np


def nodes(low, high, count=4000):
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(count) + 0.5) / count)


def fit(x, y, powers, weight):
    """Coefficients of sum c_p x^p, reweighted towards the largest errors (Lawson) until these are level."""
    basis = np.stack([x**p for p in powers], axis=1)
    emphasis = np.ones_like(x)
    for _ in range(60):
        w = np.sqrt(emphasis) * weight
        scale = np.abs(basis * w[:, None]).max(0)
        solution = np.linalg.lstsq(basis * w[:, None] / scale, y * w, rcond=None)[0] / scale
        error = np.abs((basis @ solution - y) * weight)
        emphasis *= error / error.mean() + 1e-3
        emphasis /= emphasis.mean()
    return solution, error.max()


def show(name, coefficients, error):
    numbers = ", ".join(f"{c:.9e}f" for c in coefficients[::-1])
    print(f"// largest error {error:.1e}\nconstexpr float {name}[] = {{{numbers}}};")


def main():
    print("// Coefficients, highest power first, as `python csrc/cpu/fit_math.py` printed them.")
    x = nodes(-0.5, 0.5)
    show("EXP2", *fit(x, np.exp2(x) - 1, range(1, 7), 1 / np.exp2(x)))
    show("EXP2_SHORT", *fit(x, np.exp2(x) - 1, range(1, 5), 1 / np.exp2(x)))

    # For softmax.h: exp(x) = 1 + x + x^2 q(x).
    x = nodes(-math.log(2) / 2, math.log(2) / 2)
    x = x[np.abs(x) > 1e-3]
    show("EXP_SQUARES", *fit(x, (np.exp(x) - 1 - x) / x**2, range(0, 5), x**2 / np.exp(x)))

    # For silu.h, which rounds the exponent down.
    x = nodes(0.0, 1.0)
    show("EXP2_ABOVE", *fit(x, np.exp2(x) - 1, range(1, 7), 1 / np.exp2(x)))
    show("EXP2_ABOVE_SHORT", *fit(x, np.exp2(x) - 1, range(1, 5), 1 / np.exp2(x)))

    x = nodes(math.sqrt(0.5) - 1, math.sqrt(2) - 1)
    x = x[np.abs(x) > 1e-4]
    show("LOG", *fit(x, (np.log1p(x) - x + x * x / 2) / x**3, range(0, 8), np.abs(x**3 / np.log1p(x))))

    x = nodes(-math.pi / 4 * 1.01, math.pi / 4 * 1.01)
    show("SIN", *fit(x**2, (np.sin(x) - x) / x**3, range(0, 3), np.abs(x**3)))
    show("COS", *fit(x**2, (np.cos(x) - 1 + x * x / 2) / x**4, range(0, 3), x**4))

    # Phi(-t) exp(t^2 / 2) in powers of s = 1 / (1 + 0.275 t), with the absolute error of Phi(-t) level, weighted by t as in t Phi(-t).
    t = nodes(0, 6.5)
    tail, bell, s = np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in t]), np.exp(-t * t / 2), 1 / (1 + 0.275 * t)
    show("TAIL", *fit(s, tail / bell, range(1, 7), bell * (1 + t)))


if __name__ == "__main__":
    main()

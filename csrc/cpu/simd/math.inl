// exp, GELU and SiLU on vectors, in the vocabulary of simd/*.h.

#include "cpu/simd/gelu_table.inl"

// exp(x), relative error below 2e-7, for |x| < 88; anything for others, but NaN for NaN.
inline F exp_within(F x) {
  const I whole = to_int(x * set(1.44269504f));
  const F n = to_float(whole);
  F r = x - n * set(0.693359375f);  // ln 2 in two parts (Cody and Waite), so that r keeps its low bits
  r = r + n * set(2.12194440e-4f);
  // e^r = 1 + r + r^2 q(r) on |r| <= ln(2)/2: Chebyshev fit of degree 4, relative error 1e-8
  F q = set(1.393364297e-03f);
  q = q * r + set(8.363175565e-03f);
  q = q * r + set(4.166646498e-02f);
  q = q * r + set(1.666657700e-01f);
  q = q * r + set(5.000000013e-01f);
  const F y = q * (r * r) + (r + set(1.0f));
  return y * from_bits((whole + 127) << 23);
}

// The same for every x: 0 for x < -87.3, and x > 88 is treated as 88.
inline F exp(F x) {
  const F low = set(-87.3f);
  const F result = select(x < low, zero(), exp_within(min(max(x, low), set(88.0f))));
  return select(x != x, x, result);
}

// x * Phi(x) with the error function. With a = |x| / sqrt(2): Phi(-|x|) = erfc(a) / 2, and erfc(a) exp(a^2) = t p(t),
// t = 1 / (1 + a/2), p a Chebyshev fit of degree 8 on a in [0, 10] (relative error 5e-8). Absolute error below
// 3e-7 |x|.
inline F gelu_by_exp(F x) {
  const F a = abs(x) * set(0.70710678f);
  const F t = set(1.0f) / (set(1.0f) + set(0.5f) * a);
  F p = set(-6.010870779e-02f);
  p = p * t + set(2.894461009e-01f);
  p = p * t + set(-4.968295769e-01f);
  p = p * t + set(2.885151463e-01f);
  p = p * t + set(-3.339902023e-02f);
  p = p * t + set(2.053604291e-01f);
  p = p * t + set(2.424793786e-01f);
  p = p * t + set(2.824538421e-01f);
  p = p * t + set(2.820823575e-01f);
  // exp(-a^2) vanishes beyond a = 9.3; the clamp keeps infinities out of 0 * infinity
  const F tail = set(0.5f) * p * t * exp(zero() - min(a * a, set(100.0f)));
  const F negative = max(x, set(-3.0e38f)) * tail;             // x Phi(x) for x < 0; -infinity gives 0
  const F positive = select(x > set(30.0f), x, x - x * tail);  // beyond, and at infinity, Phi is 1
  return select(x != x, x, select(x < zero(), negative, positive));
}

// The same as max(x, 0) - a h(a), a = |x|, with h(a) = 1 - Phi(a) from a table: a quarter of the instructions and no
// division, where a vector can be looked up in registers. Absolute error below 7e-8 |x|.
inline F gelu_by_table(F x) {
  const F limit = set(kGeluLimit), a = min(abs(x), limit);  // the limit where x is NaN
  const F position = a * set(kGeluPieceScale);
  const I piece = to_int(position);
  const F u = position - to_float(piece);
  F h = lookup(kGeluPieces[4], piece);
#pragma GCC unroll 4
  for (int d = 3; d >= 0; --d) h = h * u + lookup(kGeluPieces[d], piece);
  return max(zero(), x) - a * select(a < limit, h, zero());  // max gives its second argument where one is NaN
}

inline F gelu(F x) { return kHasTables ? gelu_by_table(x) : gelu_by_exp(x); }

inline F silu(F x) {
  const F y = x / (set(1.0f) + exp(zero() - x));
  return select(x < set(-1.0e4f), zero(), y);  // -infinity / infinity
}

inline F activate(F x, Activation activation) {
  return activation == Activation::kGelu ? gelu(x) : activation == Activation::kSilu ? silu(x) : x;
}

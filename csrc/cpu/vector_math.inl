// sigmoid, tanh and relu of Vec, within 2 ulp; NaN in gives NaN out, and infinities their limits.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// exp(x) for x in [-104, 40] (float), [-746, 80] (double) or NaN. x = n ln 2 + r, |r| <= ln 2 / 2;
// ln 2 in two parts, the first short enough for n * part to be exact without fma. Coefficients:
// float from SLEEF's expf (1 ulp), double Taylor to r^13 / 13! (remainder 4e-18).
FN VecF exp_clamped(VecF x) {
  const VecF n = round(x * VecF(1.44269504088896340736f));
  VecF r = fma(n, VecF(-0.693145751953125f), x);
  r = fma(n, VecF(-1.428606765330187045e-06f), r);
  VecF q = VecF(0.000198527617612853646278381f);
  q = fma(q, r, VecF(0.00139304355252534151077271f));
  q = fma(q, r, VecF(0.00833336077630519866943359f));
  q = fma(q, r, VecF(0.0416664853692054748535156f));
  q = fma(q, r, VecF(0.166666671633720397949219f));
  q = fma(q, r, VecF(0.5f));
  return scale(VecF(1.0f) + fma(r * r, q, r), n);
}

FN VecD exp_clamped(VecD x) {
  const VecD n = round(x * VecD(1.44269504088896340736));
  VecD r = fma(n, VecD(-0.69314718055966295651160180568695068359375), x);
  r = fma(n, VecD(-0.28235290563031577122588448175013436025525412068e-12), r);
  VecD q = VecD(1.0 / 6227020800.0);
  q = fma(q, r, VecD(1.0 / 479001600.0));
  q = fma(q, r, VecD(1.0 / 39916800.0));
  q = fma(q, r, VecD(1.0 / 3628800.0));
  q = fma(q, r, VecD(1.0 / 362880.0));
  q = fma(q, r, VecD(1.0 / 40320.0));
  q = fma(q, r, VecD(1.0 / 5040.0));
  q = fma(q, r, VecD(1.0 / 720.0));
  q = fma(q, r, VecD(1.0 / 120.0));
  q = fma(q, r, VecD(1.0 / 24.0));
  q = fma(q, r, VecD(1.0 / 6.0));
  q = fma(q, r, VecD(0.5));
  return scale(VecD(1.0) + fma(r * r, q, r), n);
}

// tanh(x) / x - 1 over x^2 for |x| < 0.625 as a function of z = x^2 (Cephes tanhf.c, tanh.c).
FN VecF tanh_small(VecF z) {
  VecF p = VecF(-5.70498872745e-3f);
  p = fma(p, z, VecF(2.06390887954e-2f));
  p = fma(p, z, VecF(-5.37397155531e-2f));
  p = fma(p, z, VecF(1.33314422036e-1f));
  return fma(p, z, VecF(-3.33332819422e-1f));
}
FN VecD tanh_small(VecD z) {
  VecD p = VecD(-9.64399179425052238628e-1);
  p = fma(p, z, VecD(-9.92877231001918586564e1));
  p = fma(p, z, VecD(-1.61468768441708447952e3));
  VecD q = z + VecD(1.12811678491632931402e2);
  q = fma(q, z, VecD(2.23548839060100448583e3));
  q = fma(q, z, VecD(4.84406305325125486048e3));
  return p / q;
}

// Below these exp rounds to zero; above kTanhHigh 1 - 2 / (exp(x) + 1) rounds to one.
FN VecF exp_low(VecF) { return VecF(-104.0f); }
FN VecD exp_low(VecD) { return VecD(-746.0); }
FN VecF tanh_high(VecF) { return VecF(40.0f); }
FN VecD tanh_high(VecD) { return VecD(80.0); }

// With e = exp(-|x|) <= 1: 1 / (1 + e), and e / (1 + e) for negative x keeps all its digits.
template <class T>
FN Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> zero(T(0)), one(T(1));
  const Vec<T> e = exp_clamped(at_least(zero - abs(x), exp_low(x)));
  const Vec<T> s = reciprocal(one + e);
  return if_less(x, zero, e * s, s);
}

// An odd polynomial keeps the relative accuracy near zero, where 1 - 2 / (exp(2x) + 1) cancels.
template <class T>
FN Vec<T> tanh(Vec<T> x) {
  const Vec<T> one(T(1)), two(T(2)), size = abs(x);
  const Vec<T> e = exp_clamped(at_most(size * two, tanh_high(x)));
  const Vec<T> large = one - two * reciprocal(e + one);
  const Vec<T> z = x * x;
  const Vec<T> small = fma(x * z, tanh_small(z), x);
  return if_less(size, Vec<T>(T(0.625)), small, copysign(large, x));
}

template <class T>
FN Vec<T> relu(Vec<T> x) {
  const Vec<T> zero(T(0));
  return if_less(x, zero, zero, x);
}
template <class T>
FN Vec<T> relu_backward(Vec<T> y, Vec<T> dy) {
  const Vec<T> zero(T(0));
  return if_at_most(y, zero, zero, dy);
}

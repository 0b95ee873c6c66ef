// sigmoid, tanh and relu of Vec, within 3 ulp where the result is a normal number; NaN in gives NaN
// out, and infinities their limits.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// With x = sign n ln 2 + r, |r| <= ln 2 / 2: exp(sign x) = 2^n exp(sign r).
template <class T>
struct ExpParts {
  Vec<T> power;  // sign 2^n
  Vec<T> rest;   // sign (exp(sign r) - 1)
};

// (exp(r) - 1 - r) / r^2 in ascending powers of r. float: minimax on |r| <= ln 2 / 2, 1.4e-8 of
// exp(r) - 1; double: Taylor's to r^13 / 13! (4e-18).
template <class T>
struct ExpSeries;
template <>
struct ExpSeries<float> {
  static constexpr float kTerms[] = {0.500000006189f, 0.166665429246f, 0.0416662818507f,
                                     0.00836659804554f, 0.0013946472962f};
  static constexpr float kLog2e = 1.44269504088896340736f;
  // ln 2 in two parts, the first short enough for n * part to be exact without fma.
  static constexpr float kLn2 = 0.693145751953125f, kLn2Rest = 1.428606765330187045e-06f;
  // Added to a whole number of [-126, 127], leaves it with the exponent's bias in the low bits of
  // the mantissa; kSign more, a set sign bit above it.
  static constexpr float kBias = 8388735.0f, kSign = 256.0f;
  static constexpr float kLargest = 87.0f;
};
template <>
struct ExpSeries<double> {
  static constexpr double kTerms[] = {0.5,
                                      1.0 / 6.0,
                                      1.0 / 24.0,
                                      1.0 / 120.0,
                                      1.0 / 720.0,
                                      1.0 / 5040.0,
                                      1.0 / 40320.0,
                                      1.0 / 362880.0,
                                      1.0 / 3628800.0,
                                      1.0 / 39916800.0,
                                      1.0 / 479001600.0,
                                      1.0 / 6227020800.0};
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2 = 0.69314718055966295651160180568695068359375;
  static constexpr double kLn2Rest = 0.28235290563031577122588448175013436025525412068e-12;
  static constexpr double kBias = 4503599627371519.0, kSign = 2048.0;
  static constexpr double kLargest = 708.0;
};

// For |x| <= kLargest or NaN. A sum with kBias is rounded to a whole number.
template <int sign, class T>
FN ExpParts<T> exp_parts(Vec<T> x) {
  using V = Vec<T>;
  using S = ExpSeries<T>;
  constexpr int kLast = sizeof(S::kTerms) / sizeof(T) - 1;
  const V bias(sign < 0 ? S::kBias + S::kSign : S::kBias);
  const V sum = fma(x, V(sign * S::kLog2e), bias), n = sum - bias;
  const V r = fma(n, V(-sign * S::kLn2Rest), fma(n, V(-sign * S::kLn2), x));
  V q(kLast % 2 == 0 ? sign * S::kTerms[kLast] : S::kTerms[kLast]);
#pragma GCC unroll 12
  for (int i = kLast - 1; i >= 0; --i) {
    q = fma(q, r, V(i % 2 == 0 ? sign * S::kTerms[i] : S::kTerms[i]));
  }
  return {mantissa_to_exponent(sum), fma(r * r, q, r)};
}

// 1 / (1 + exp(-x)). Where exp(-x) is large so is the sum, and its quotient keeps all its digits.
template <class T>
FN Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  constexpr T kLargest = ExpSeries<T>::kLargest;
  const ExpParts<T> e = exp_parts<-1>(at_least(at_most(x, V(kLargest)), V(-kLargest)));
  const V s = reciprocal(fma(e.power, e.rest, V(T(1)) - e.power));
  return if_less(x, V(-kLargest), V(T(0)), s);
}

// E / (E + 2) with E = exp(2x) - 1, which keeps its digits near zero: there 2^n is 1.
template <class T>
FN Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V near = at_least(at_most(x, V(T(20))), V(T(-20)));  // beyond, the result is +-1
  const ExpParts<T> e = exp_parts<1>(near + near);
  const V minus_one = fma(e.power, e.rest, e.power - V(T(1)));
  return quotient(minus_one, minus_one + V(T(2)));
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

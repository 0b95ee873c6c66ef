// Vec<float> of 4 lanes and Vec<double> of 2 lanes with the vector extensions of GCC and clang.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr int kMantissa = 23;
};
template <>
struct VecOf<double> {
  typedef double Lanes __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
  static constexpr int kMantissa = 52;
};

template <class T>
struct Vec {
  using Lanes = typename VecOf<T>::Lanes;
  using Bits = typename VecOf<T>::Bits;
  static constexpr int kWidth = 16 / sizeof(T);
  Lanes v;

  FN Vec() = default;
  FN Vec(Lanes x) : v(x) {}
  FN explicit Vec(T x) : v(Lanes{} + x) {}
  FN static Vec load(const T* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, 16);
    return r;
  }
  FN static Vec load(const T* p, int n) {
    if (n == kWidth) return load(p);
    Vec r(T(0));
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  FN void store(T* p) const { __builtin_memcpy(p, &v, 16); }
  FN void store_past(T* p) const { store(p); }
  FN void store(T* p, int n) const {
    if (n == kWidth) return store(p);
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};

constexpr bool kAsksToWrite = false;
constexpr bool kStoresPast = false;  // a vector is less than a line
FN void fence() {}

using VecF = Vec<float>;
using VecD = Vec<double>;

template <class T>
FN Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <class T>
FN Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <class T>
FN Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <class T>
FN Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.v / b.v;
}

// Fused where the baseline has it (aarch64); elsewhere always two roundings.
#if defined(__aarch64__)
FN VecF fma(VecF a, VecF b, VecF c) { return (VecF::Lanes)vfmaq_f32(c.v, a.v, b.v); }
FN VecD fma(VecD a, VecD b, VecD c) { return (VecD::Lanes)vfmaq_f64(c.v, a.v, b.v); }
#else
template <class T>
FN Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.v * b.v + c.v;
}
#endif

template <class T>
FN Vec<T> choose(typename Vec<T>::Bits which, Vec<T> x, Vec<T> y) {
  using V = Vec<T>;
  return (typename V::Lanes)((which & (typename V::Bits)x.v) | (~which & (typename V::Bits)y.v));
}
// a < b ? x : y, lane by lane (y where a or b is NaN).
template <class T>
FN Vec<T> if_less(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
  return choose((typename Vec<T>::Bits)(a.v < b.v), x, y);
}
// a <= b ? x : y, lane by lane (y where a or b is NaN).
template <class T>
FN Vec<T> if_at_most(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
  return choose((typename Vec<T>::Bits)(a.v <= b.v), x, y);
}
// Clamps that let a NaN in x through.
template <class T>
FN Vec<T> at_least(Vec<T> x, Vec<T> low) {
  return if_less(x, low, low, x);
}
template <class T>
FN Vec<T> at_most(Vec<T> x, Vec<T> high) {
  return if_less(high, x, high, x);
}

template <class T>
FN Vec<T> reciprocal(Vec<T> x) {
  return Vec<T>(T(1)) / x;
}
template <class T>
FN Vec<T> quotient(Vec<T> a, Vec<T> x) {
  return a / x;
}

// The low bits of the mantissa become sign and exponent, of a power of two.
template <class T>
FN Vec<T> mantissa_to_exponent(Vec<T> x) {
  using V = Vec<T>;
  return (typename V::Lanes)((typename V::Bits)x.v << VecOf<T>::kMantissa);
}

// r becomes its own transpose: lane j of r[i] and lane i of r[j] change places.
FN void transpose(VecF (&r)[4]) {
  const VecF::Lanes a = __builtin_shufflevector(r[0].v, r[1].v, 0, 4, 1, 5);
  const VecF::Lanes b = __builtin_shufflevector(r[0].v, r[1].v, 2, 6, 3, 7);
  const VecF::Lanes c = __builtin_shufflevector(r[2].v, r[3].v, 0, 4, 1, 5);
  const VecF::Lanes d = __builtin_shufflevector(r[2].v, r[3].v, 2, 6, 3, 7);
  r[0].v = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1].v = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2].v = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3].v = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
FN void transpose(VecD (&r)[2]) {
  const VecD::Lanes a = __builtin_shufflevector(r[0].v, r[1].v, 0, 2);
  const VecD::Lanes b = __builtin_shufflevector(r[0].v, r[1].v, 1, 3);
  r[0].v = a;
  r[1].v = b;
}

FN float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
FN uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
FN float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Scaling by 2^112 rebiases the exponent and normalises denormals exactly.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
}
FN uint16_t float_to_half(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Adding 1/2 leaves the denormal half, rounded to even, in the low mantissa bits.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
  }
  const uint32_t odd = (rest >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + odd) >> 13));
}
// Of two bfloat16 in a lane the first or second in memory, as float32.
constexpr bool kFirstIsLow = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
FN VecF half(VecF x, bool low) {
  const VecF::Bits bits = (VecF::Bits)x.v;
  return low ? (VecF::Lanes)(bits << 16) : (VecF::Lanes)(bits & ~0xffff);
}
FN VecF first_half(VecF x) { return half(x, kFirstIsLow); }
FN VecF second_half(VecF x) { return half(x, !kFirstIsLow); }
FN VecF load_bf16(const uint16_t* p, int n) {
  VecF r(0.0f);
  for (int i = 0; i < n; ++i) r.v[i] = from_bits(static_cast<uint32_t>(p[i]) << 16);
  return r;
}
FN VecF load_f16(const uint16_t* p, int n) {
  VecF r(0.0f);
  for (int i = 0; i < n; ++i) r.v[i] = half_to_float(p[i]);
  return r;
}
FN void store_bf16(VecF x, uint16_t* p, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = to_bits(x.v[i]);
    p[i] = x.v[i] == x.v[i] ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)
                            : static_cast<uint16_t>(0x7fc0u);
  }
}
FN void store_f16(VecF x, uint16_t* p, int n) {
  for (int i = 0; i < n; ++i) p[i] = float_to_half(x.v[i]);
}

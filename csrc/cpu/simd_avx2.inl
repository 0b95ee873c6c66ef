// Vec<float> of 8 lanes and Vec<double> of 4 lanes with AVX2, FMA and F16C.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
struct Vec;

// Lane l of the mask at kMask + 8 - n is all ones where l < n.
alignas(64) const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) const int64_t kMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

template <>
struct Vec<float> {
  static constexpr int kWidth = 8;
  __m256 v;

  FN Vec() = default;
  FN Vec(__m256 x) : v(x) {}
  FN explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  FN static __m256i mask(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
  }
  FN static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  FN static Vec load(const float* p, int n) {
    return n == kWidth ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, mask(n));
  }
  FN void store(float* p) const { _mm256_storeu_ps(p, v); }
  FN void store_past(float* p) const { store(p); }
  // (In pieces: to AMD's Zen a masked store is a microprogram.)
  FN void store(float* p, int n) const {
    if (__builtin_expect(n == kWidth, 1)) return _mm256_storeu_ps(p, v);
    __m128 x = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, x);
      x = _mm256_extractf128_ps(v, 1), p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), x);
      x = _mm_movehl_ps(x, x), p += 2;
    }
    if (n & 1) _mm_store_ss(p, x);
  }
};

template <>
struct Vec<double> {
  static constexpr int kWidth = 4;
  __m256d v;

  FN Vec() = default;
  FN Vec(__m256d x) : v(x) {}
  FN explicit Vec(double x) : v(_mm256_set1_pd(x)) {}
  FN static __m256i mask(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask64 + 4 - n));
  }
  FN static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  FN static Vec load(const double* p, int n) {
    return n == kWidth ? _mm256_loadu_pd(p) : _mm256_maskload_pd(p, mask(n));
  }
  FN void store(double* p) const { _mm256_storeu_pd(p, v); }
  FN void store_past(double* p) const { store(p); }
  FN void store(double* p, int n) const {
    if (__builtin_expect(n == kWidth, 1)) return _mm256_storeu_pd(p, v);
    __m128d x = _mm256_castpd256_pd128(v);
    if (n & 2) {
      _mm_storeu_pd(p, x);
      x = _mm256_extractf128_pd(v, 1), p += 2;
    }
    if (n & 1) _mm_store_sd(p, x);
  }
};

// Whether lines that are written are asked for ahead: stores that miss fill the few places for
// them (on an AMD Zen 3; on a Xeon with AVX-512 asking takes more than it spares).
constexpr bool kAsksToWrite = true;
constexpr bool kStoresPast = false;  // a vector is less than a line
FN void fence() {}

using VecF = Vec<float>;
using VecD = Vec<double>;

FN VecF operator+(VecF a, VecF b) { return _mm256_add_ps(a.v, b.v); }
FN VecF operator-(VecF a, VecF b) { return _mm256_sub_ps(a.v, b.v); }
FN VecF operator*(VecF a, VecF b) { return _mm256_mul_ps(a.v, b.v); }
FN VecF operator/(VecF a, VecF b) { return _mm256_div_ps(a.v, b.v); }
FN VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FN VecD operator+(VecD a, VecD b) { return _mm256_add_pd(a.v, b.v); }
FN VecD operator-(VecD a, VecD b) { return _mm256_sub_pd(a.v, b.v); }
FN VecD operator*(VecD a, VecD b) { return _mm256_mul_pd(a.v, b.v); }
FN VecD operator/(VecD a, VecD b) { return _mm256_div_pd(a.v, b.v); }
FN VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }

// The hardware's max and min return the second operand when either is NaN: x goes second.
FN VecF at_least(VecF x, VecF low) { return _mm256_max_ps(low.v, x.v); }
FN VecF at_most(VecF x, VecF high) { return _mm256_min_ps(high.v, x.v); }
FN VecD at_least(VecD x, VecD low) { return _mm256_max_pd(low.v, x.v); }
FN VecD at_most(VecD x, VecD high) { return _mm256_min_pd(high.v, x.v); }

// a < b ? x : y, lane by lane (y where a or b is NaN).
FN VecF if_less(VecF a, VecF b, VecF x, VecF y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
FN VecD if_less(VecD a, VecD b, VecD x, VecD y) {
  return _mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ));
}
// a <= b ? x : y, lane by lane (y where a or b is NaN).
FN VecF if_at_most(VecF a, VecF b, VecF x, VecF y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ));
}
FN VecD if_at_most(VecD a, VecD b, VecD x, VecD y) {
  return _mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ));
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
FN VecF mantissa_to_exponent(VecF x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23));
}
FN VecD mantissa_to_exponent(VecD x) {
  return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x.v), 52));
}

// r becomes its own transpose: lane j of r[i] and lane i of r[j] change places.
FN void transpose(VecF (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

FN void transpose(VecD (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0].v, r[1].v), b = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d c = _mm256_unpacklo_pd(r[2].v, r[3].v), d = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  r[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  r[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  r[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}

FN __m128i load_u16(const uint16_t* p, int n) {
  if (n == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t part[8] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
}
FN void store_u16(__m128i x, uint16_t* p, int n) {
  if (n == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    return;
  }
  alignas(16) uint16_t part[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), x);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}
// Of two bfloat16 in a lane the first or second in memory, as float32.
FN VecF first_half(VecF x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16));
}
FN VecF second_half(VecF x) {
  return _mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(~0xffff)));
}
FN VecF load_bf16(const uint16_t* p, int n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_u16(p, n)), 16));
}
FN VecF load_f16(const uint16_t* p, int n) { return _mm256_cvtph_ps(load_u16(p, n)); }
FN void store_bf16(VecF x, uint16_t* p, int n) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i up = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  // packus works within 128-bit halves; take the low 64 bits of each.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
  store_u16(_mm256_castsi256_si128(packed), p, n);
}
FN void store_f16(VecF x, uint16_t* p, int n) {
  store_u16(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT), p, n);
}

// Vec<float> of 16 lanes and Vec<double> of 8 lanes with AVX-512 (F, BW, DQ, VL).
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kWidth = 16;
  __m512 v;

  FN Vec() = default;
  FN Vec(__m512 x) : v(x) {}
  FN explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  FN static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  FN static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  FN static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  FN void store(float* p) const { _mm512_storeu_ps(p, v); }
  FN void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  // Past the caches, a whole line; others see it after fence().
  FN void store_past(float* p) const { _mm512_stream_ps(p, v); }
};

template <>
struct Vec<double> {
  static constexpr int kWidth = 8;
  __m512d v;

  FN Vec() = default;
  FN Vec(__m512d x) : v(x) {}
  FN explicit Vec(double x) : v(_mm512_set1_pd(x)) {}
  FN static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  FN static Vec load(const double* p) { return _mm512_loadu_pd(p); }
  FN static Vec load(const double* p, int n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  FN void store(double* p) const { _mm512_storeu_pd(p, v); }
  FN void store(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), v); }
  FN void store_past(double* p) const { _mm512_stream_pd(p, v); }
};

// A vector is a line, which can be written past the caches.
constexpr bool kAsksToWrite = false;
constexpr bool kStoresPast = true;
FN void fence() { _mm_sfence(); }

using VecF = Vec<float>;
using VecD = Vec<double>;

FN VecF operator+(VecF a, VecF b) { return _mm512_add_ps(a.v, b.v); }
FN VecF operator-(VecF a, VecF b) { return _mm512_sub_ps(a.v, b.v); }
FN VecF operator*(VecF a, VecF b) { return _mm512_mul_ps(a.v, b.v); }
FN VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FN VecD operator+(VecD a, VecD b) { return _mm512_add_pd(a.v, b.v); }
FN VecD operator-(VecD a, VecD b) { return _mm512_sub_pd(a.v, b.v); }
FN VecD operator*(VecD a, VecD b) { return _mm512_mul_pd(a.v, b.v); }
FN VecD operator/(VecD a, VecD b) { return _mm512_div_pd(a.v, b.v); }
FN VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }

// The hardware's max and min return the second operand when either is NaN: x goes second.
FN VecF at_least(VecF x, VecF low) { return _mm512_max_ps(low.v, x.v); }
FN VecF at_most(VecF x, VecF high) { return _mm512_min_ps(high.v, x.v); }
FN VecD at_least(VecD x, VecD low) { return _mm512_max_pd(low.v, x.v); }
FN VecD at_most(VecD x, VecD high) { return _mm512_min_pd(high.v, x.v); }

// a < b ? x : y, lane by lane (y where a or b is NaN).
FN VecF if_less(VecF a, VecF b, VecF x, VecF y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}
FN VecD if_less(VecD a, VecD b, VecD x, VecD y) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}
// a <= b ? x : y, lane by lane (y where a or b is NaN).
FN VecF if_at_most(VecF a, VecF b, VecF x, VecF y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ), y.v, x.v);
}
FN VecD if_at_most(VecD a, VecD b, VecD x, VecD y) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ), y.v, x.v);
}

// 1 / x and a / x for x of [2^-10, 2^126] or NaN, within an ulp; a division takes as long as ten
// multiplications.
FN VecF reciprocal(VecF x) {
  const __m512 y = _mm512_rcp14_ps(x.v);
  return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(1.0f)), y);
}
FN VecD reciprocal(VecD x) { return VecD(1.0) / x; }
FN VecF quotient(VecF a, VecF x) {
  const __m512 y = _mm512_rcp14_ps(x.v), q = _mm512_mul_ps(a.v, y);
  return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x.v, q, a.v), q);
}
FN VecD quotient(VecD a, VecD x) { return a / x; }

// The low bits of the mantissa become sign and exponent, of a power of two.
FN VecF mantissa_to_exponent(VecF x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23));
}
FN VecD mantissa_to_exponent(VecD x) {
  return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x.v), 52));
}

// r becomes its own transpose: lane j of r[i] and lane i of r[j] change places.
FN void transpose(VecF (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    // u[4 q + i] holds, in its 128-bit lane l, rows 4q..4q+3 of column 4l + i.
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + i].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + i].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

FN void transpose(VecD (&r)[8]) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    // t[2 q + i] holds, in its 128-bit lane l, rows 2q, 2q+1 of column 2l + i.
    const __m512d a = _mm512_shuffle_f64x2(t[i], t[2 + i], 0x88);
    const __m512d b = _mm512_shuffle_f64x2(t[i], t[2 + i], 0xdd);
    const __m512d c = _mm512_shuffle_f64x2(t[4 + i], t[6 + i], 0x88);
    const __m512d d = _mm512_shuffle_f64x2(t[4 + i], t[6 + i], 0xdd);
    r[i].v = _mm512_shuffle_f64x2(a, c, 0x88);
    r[2 + i].v = _mm512_shuffle_f64x2(b, d, 0x88);
    r[4 + i].v = _mm512_shuffle_f64x2(a, c, 0xdd);
    r[6 + i].v = _mm512_shuffle_f64x2(b, d, 0xdd);
  }
}

// As the general one (rows.inl). Rows l and l + 8 share a register from the load on, which spares a
// quarter of transpose's shuffles.
FN void load_transposed(const char* rows, int64_t bytes, VecF (&r)[16]) {
  const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i odd = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512 z[8], t[8], u[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const auto part = [&](int l) FN_LAMBDA {
        return reinterpret_cast<const float*>(rows + l * bytes) + 8 * half;
      };
      const __m512 first = _mm512_castps256_ps512(_mm256_loadu_ps(part(j)));
      z[j] = _mm512_insertf32x8(first, _mm256_loadu_ps(part(j + 8)), 1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(z[2 * i], z[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(z[2 * i], z[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
      const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
      u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // u[i] holds, in its 128-bit lanes, rows 0..3 of columns i and 4 + i, then rows 8..11 of them;
    // u[4 + i] rows 4..7 and 12..15.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[8 * half + i].v = _mm512_permutex2var_ps(u[i], even, u[4 + i]);
      r[8 * half + 4 + i].v = _mm512_permutex2var_ps(u[i], odd, u[4 + i]);
    }
  }
}

// Of two bfloat16 in a lane the first or second in memory, as float32.
FN VecF first_half(VecF x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16));
}
FN VecF second_half(VecF x) {
  const __m512i high = _mm512_set1_epi32(~0xffff);
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), high));
}
FN VecF load_bf16(const uint16_t* p, int n) {
  const __m256i x = _mm256_maskz_loadu_epi16(VecF::mask(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FN VecF load_f16(const uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(VecF::mask(n), p));
}
FN void store_bf16(VecF x, uint16_t* p, int n) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i up =
      _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(sum, 16), _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, VecF::mask(n), _mm512_cvtepi32_epi16(up));
}
FN void store_f16(VecF x, uint16_t* p, int n) {
  _mm256_mask_storeu_epi16(p, VecF::mask(n), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// Reading and writing rows of any element type, and what the flags say of a row.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Out of line: conversions are rare and would swell every place that loads.
__attribute__((noinline)) VecF load_converted(const void* data, DType dtype, int64_t at, int n) {
  const uint16_t* p = static_cast<const uint16_t*>(data) + at;
  return dtype == DType::kBFloat16 ? load_bf16(p, n) : load_f16(p, n);
}
__attribute__((noinline)) void store_converted(VecF x, void* data, DType dtype, int64_t at, int n) {
  uint16_t* p = static_cast<uint16_t*>(data) + at;
  dtype == DType::kBFloat16 ? store_bf16(x, p, n) : store_f16(x, p, n);
}

// r[i] lane l = element l * stride + i of a matrix: a full square of it, transposed.
template <class T>
FN void load_transposed(const T* rows, int64_t stride, Vec<T> (&r)[Vec<T>::kWidth]) {
#pragma GCC unroll 16
  for (int l = 0; l < Vec<T>::kWidth; ++l) r[l] = Vec<T>::load(rows + l * stride);
  transpose(r);
}

// n elements from element `at` on; the lanes beyond are zero.
template <class T>
FN Vec<T> load(const void* data, DType dtype, int64_t at, int n) {
  if constexpr (sizeof(T) == 4) {
    if (__builtin_expect(dtype != DType::kFloat32, 0)) return load_converted(data, dtype, at, n);
  }
  return Vec<T>::load(static_cast<const T*>(data) + at, n);
}
template <class T>
FN void store(Vec<T> x, void* data, DType dtype, int64_t at, int n) {
  if constexpr (sizeof(T) == 4) {
    if (__builtin_expect(dtype != DType::kFloat32, 0)) {
      return store_converted(x, data, dtype, at, n);
    }
  }
  x.store(static_cast<T*>(data) + at, n);
}

// One row of a tensor: element u of it is at data[at + u].
struct Row {
  void* data;
  DType dtype;
  int64_t at;

  FN Row(const Rows& rows, int64_t t, int64_t b, int64_t s)
      : data(rows.data), dtype(rows.dtype), at(t * rows.step + b * rows.row + s * rows.entry) {}
  FN explicit operator bool() const { return data != nullptr; }
  template <class T>
  FN Vec<T> load(int64_t u, int n) const {
    return ::fused_rnn::cpu::FUSED_RNN_ISA::load<T>(data, dtype, at + u, n);
  }
  template <class T>
  FN Vec<T> load_or_zero(int64_t u, int n) const {
    return data == nullptr ? Vec<T>(T(0)) : load<T>(u, n);
  }
  template <class T>
  FN void store(int64_t u, int n, Vec<T> x) const {
    ::fused_rnn::cpu::FUSED_RNN_ISA::store<T>(x, data, dtype, at + u, n);
  }
};

// Asks for the values of units [u, u + units) of `parts` gates of a row: memory is slower than the
// product that comes before they are used.
FN void ask_for(const Rows& rows, int64_t t, int64_t b, int64_t s, int64_t u, int64_t units,
                int parts, int64_t hidden) {
  if (rows.data == nullptr) return;
  const int64_t size = size_of(rows.dtype);
  const char* at = static_cast<const char*>(rows.data) +
                   (t * rows.step + b * rows.row + s * rows.entry + u) * size;
  for (int part = 0; part < parts; ++part, at += hidden * size) {
    for (int64_t byte = 0; byte < units * size; byte += 64) __builtin_prefetch(at + byte, 0, 2);
  }
}

// target[0, n) = source[0, n), or zeros where the source is absent.
template <class T>
void copy_row(const Row& target, const Row& source, int64_t n) {
  constexpr int kWidth = Vec<T>::kWidth;
  for (int64_t u = 0; u < n; u += kWidth) {
    const int lanes = n - u < kWidth ? static_cast<int>(n - u) : kWidth;
    target.store<T>(u, lanes, source.load_or_zero<T>(u, lanes));
  }
}

// The row has ended before step t: the step is not taken.
FN bool ended(const Layer& layer, int64_t t, int64_t b) {
  return layer.flags != nullptr && (layer.flags[t * layer.batch + b] & 1);
}

// The state that entered step t was zeroed. A forward entry does so at the first step of a segment;
// a reversed one leaves the segment that starts at step t + 1.
FN bool was_reset(const Layer& layer, bool reverse, int64_t t, int64_t b) {
  if (layer.flags == nullptr) return false;
  const int64_t at = t + reverse;
  return at < layer.steps && (layer.flags[at * layer.batch + b] & 3) == 2;
}

// The step whose state entered step t, or -1 where that was the initial state (or zero; ask
// was_reset first).
FN int64_t entered_from(const Layer& layer, bool reverse, int64_t t, int64_t b) {
  if (!reverse) return t - 1;
  return t + 1 == layer.steps || ended(layer, t + 1, b) ? -1 : t + 1;
}

// Reading and writing rows of any element type, and what the flags say of a row.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Of `width` lanes from u on, those of so many units.
FN int lanes_at(int64_t units, int64_t u, int width) {
  return units - u < width ? static_cast<int>(units - u) : width;
}

// n values of kType from element `at` on; the lanes beyond are zero.
template <DType kType, class T>
FN Vec<T> load_as(const void* data, int64_t at, int n) {
  if constexpr (kType == kNative<T>) {
    return Vec<T>::load(static_cast<const T*>(data) + at, n);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(data) + at;
    return kType == DType::kBFloat16 ? load_bf16(p, n) : load_f16(p, n);
  }
}

// run(a type's tag), of the types that values of arithmetic in T may have in memory.
template <DType kType>
struct Tag {
  static constexpr DType kValue = kType;
};
template <class T, class Run>
FN auto by_type(DType dtype, const Run& run) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::kBFloat16) return run(Tag<DType::kBFloat16>());
    if (dtype == DType::kFloat16) return run(Tag<DType::kFloat16>());
  }
  return run(Tag<kNative<T>>());
}

// Out of line: conversions are rare and would swell every place that loads.
__attribute__((noinline)) VecF load_converted(const void* data, DType dtype, int64_t at, int n) {
  return dtype == DType::kBFloat16 ? load_as<DType::kBFloat16, float>(data, at, n)
                                   : load_as<DType::kFloat16, float>(data, at, n);
}
__attribute__((noinline)) void store_converted(VecF x, void* data, DType dtype, int64_t at, int n) {
  uint16_t* p = static_cast<uint16_t*>(data) + at;
  dtype == DType::kBFloat16 ? store_bf16(x, p, n) : store_f16(x, p, n);
}

// r[i] lane l = the i-th value of row l; the rows are so many bytes apart.
template <class T>
FN void load_transposed(const char* rows, int64_t bytes, Vec<T> (&r)[Vec<T>::kWidth]) {
#pragma GCC unroll 16
  for (int l = 0; l < Vec<T>::kWidth; ++l) {
    r[l] = Vec<T>::load(reinterpret_cast<const T*>(rows + l * bytes));
  }
  transpose(r);
}

// Columns of kWidth rows of a matrix of kType: [i] lane l = column i of row l. Of bfloat16 those of
// two columns lie in a lane until they are used, which halves the work of transposing.
template <DType kType, class T>
struct Square {
  static constexpr int kWidth = Vec<T>::kWidth;
  static constexpr bool kPairs = kType == DType::kBFloat16;
  static constexpr int kColumns = kPairs ? 2 * kWidth : kWidth;
  Vec<T> lines[kWidth];

  FN Square(const char* rows, int64_t bytes) {
    if constexpr (kType == kNative<T> || kPairs) {
      load_transposed(rows, bytes, lines);
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) {
        lines[l] = load_as<kType, T>(rows + l * bytes, 0, kWidth);
      }
      transpose(lines);
    }
  }
  FN Vec<T> operator[](int i) const {
    if constexpr (kPairs) return i % 2 ? second_half(lines[i / 2]) : first_half(lines[i / 2]);
    return lines[i];
  }
};

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

// The rows of a tensor at one step of one stack entry, as a local copy: stores of vectors may
// change anything else, and what is elsewhere would be read again after each. kPlain: of dtype T,
// or absent.
template <class T, bool kPlain>
struct LinesOf {
  using V = Vec<T>;
  void* data;
  DType dtype;
  int64_t at, row;

  FN LinesOf(const Rows& rows, int64_t t, int64_t s)
      : data(rows.data),
        dtype(kPlain ? kNative<T> : rows.dtype),
        at(t * rows.step + s * rows.entry),
        row(rows.row) {}
  FN explicit operator bool() const { return data != nullptr; }
  FN V load(int64_t b, int64_t u, int n) const {
    return ::fused_rnn::cpu::FUSED_RNN_ISA::load<T>(data, dtype, at + b * row + u, n);
  }
  FN V load_or_zero(int64_t b, int64_t u, int n) const {
    return data == nullptr ? V(T(0)) : load(b, u, n);
  }
  FN void store(int64_t b, int64_t u, int n, V x) const {
    ::fused_rnn::cpu::FUSED_RNN_ISA::store<T>(x, data, dtype, at + b * row + u, n);
  }
  // As store; `past`: past the caches where that can be.
  FN void store(int64_t b, int64_t u, int n, V x, bool past) const {
    if (kPlain && past && n == V::kWidth) {
      T* to = static_cast<T*>(data) + at + b * row + u;
      if (reinterpret_cast<uintptr_t>(to) % (V::kWidth * sizeof(T)) == 0) return x.store_past(to);
    }
    store(b, u, n, x);
  }
};

// Zeros where `zero`, else x. (As a conditional expression it has an address, for GCC.)
template <class T>
FN Vec<T> zero_if(bool zero, Vec<T> x) {
  if (zero) return Vec<T>(T(0));
  return x;
}

template <class T, class... More>
FN bool all_plain(const Rows& rows, const More&... more) {
  if (rows.data != nullptr && rows.dtype != kNative<T>) return false;
  if constexpr (sizeof...(more) > 0) return all_plain<T>(more...);
  return true;
}

// each(address, bytes) for the values of units [u, u + units) of `parts` gates of a row.
template <class Each>
FN void each_part(const Rows& rows, int64_t t, int64_t b, int64_t s, int64_t u, int64_t units,
                  int parts, int64_t hidden, const Each& each) {
  const int64_t size = size_of(rows.dtype);
  const char* at = static_cast<const char*>(rows.data) +
                   (t * rows.step + b * rows.row + s * rows.entry + u) * size;
  for (int part = 0; part < parts; ++part, at += hidden * size) each(at, units * size);
}

// Asks for such values: memory is slower than the product that comes before they are used.
FN void ask_for(const Rows& rows, int64_t t, int64_t b, int64_t s, int64_t u, int64_t units,
                int parts, int64_t hidden) {
  if (rows.data == nullptr) return;
  const auto ask = [](const char* at, int64_t bytes) FN_LAMBDA {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
  };
  each_part(rows, t, b, s, u, units, parts, hidden, ask);
}

// Asks for the lines of so many bytes that are to be written.
FN void ask_lines_to_write(const void* data, int64_t bytes) {
  const char* at = static_cast<const char*>(data);
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 1, 3);
  __builtin_prefetch(at + bytes - 1, 1, 3);
}

// As ask_for, of values that are to be written: where stores wait for their lines and units do not
// fill lines, so that every other store waits for two. (Else asking takes what it spares.)
FN void ask_to_write(const Rows& rows, int64_t t, int64_t b, int64_t s, int64_t u, int64_t units,
                     int parts, int64_t hidden) {
  if (!kAsksToWrite || rows.data == nullptr || hidden * size_of(rows.dtype) % 64 == 0) return;
  each_part(rows, t, b, s, u, units, parts, hidden,
            [](const char* at, int64_t bytes) FN_LAMBDA { ask_lines_to_write(at, bytes); });
}

// What the flags say of the rows at one step.
struct Marks {
  const uint8_t* now;
  SegmentStarts segment;

  // `starts`: the step at which a segment may start, if it is one.
  FN Marks(const Layer& layer, const Places& places, int64_t t, int64_t starts)
      : now(places.flags(layer, t)), segment(layer, places, starts) {}
  // The row has ended before the step: it is not taken.
  FN bool ended(int64_t b) const { return now[b] & 1; }
  FN bool starts(int64_t b) const { return segment.at(b); }
};
// As Marks where there are no flags.
struct NoMarks {
  FN NoMarks(const Layer&, const Places&, int64_t, int64_t) {}
  FN bool ended(int64_t) const { return false; }
  FN bool starts(int64_t) const { return false; }
};

// The marks of a forward step, whose starts(b) says: the state after step t is zeroed before the
// next step, if there is one.
template <class M>
FN M forward_marks(const Layer& layer, const Places& places, bool reverse, int64_t t) {
  return M(layer, places, t, !reverse ? t + 1 : t > 0 ? t : -1);
}
// The marks of a backward step, whose starts(b) says: the state that entered step t was zeroed. A
// forward entry does so at the first step of a segment; a reversed one leaves the segment that
// starts at step t + 1.
template <class M>
FN M backward_marks(const Layer& layer, const Places& places, bool reverse, int64_t t) {
  return M(layer, places, t, reverse ? t + 1 : t);
}

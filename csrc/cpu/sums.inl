// Sums over the rows of a matrix.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// Rows are added in sixteens, sixteens in sixteens, and so on: the error grows with the logarithm
// of their number. A column is one thread's, whatever the others do.
template <class T>
void run_column_sums(const ColumnSums& p) {
  using V = Vec<T>;
  constexpr int kWidth = V::kWidth;
  constexpr int kVectors = 4, kLevels = 12, kTerms = 16;
  const int64_t step = kVectors * kWidth, blocks = (p.columns + step - 1) / step;
  const double bytes = static_cast<double>(sizeof(T)) * p.rows * p.columns;
  const bool threads = thread_count() > 1 && bytes > kMemoryBytesPerSecond * kSecondsWorthThreads;
  parallel(blocks, threads, [&](int64_t block) {
    V sum[kLevels][kVectors];
    int terms[kLevels] = {};
    for (int level = 0; level < kLevels; ++level) {
      for (int v = 0; v < kVectors; ++v) sum[level][v] = V(T(0));
    }
    const int64_t first = block * step;
    const int vectors = (lanes_at(p.columns, first, static_cast<int>(step)) + kWidth - 1) / kWidth;
    const int last = lanes_at(p.columns, first + (vectors - 1) * kWidth, kWidth);
    const T* row = static_cast<const T*>(p.data) + first;
    for (int64_t r = 0; r < p.rows; ++r, row += p.columns) {
      for (int v = 0; v < vectors; ++v) {
        sum[0][v] = sum[0][v] + V::load(row + v * kWidth, v + 1 == vectors ? last : kWidth);
      }
      for (int level = 0; ++terms[level] == kTerms && level + 1 < kLevels; ++level) {
        terms[level] = 0;
        for (int v = 0; v < vectors; ++v) {
          sum[level + 1][v] = sum[level + 1][v] + sum[level][v];
          sum[level][v] = V(T(0));
        }
      }
    }
    for (int level = 1; level < kLevels; ++level) {
      for (int v = 0; v < vectors; ++v) sum[level][v] = sum[level][v] + sum[level - 1][v];
    }
    T* out = static_cast<T*>(p.out) + first;
    for (int v = 0; v < vectors; ++v) {
      sum[kLevels - 1][v].store(out + v * kWidth, v + 1 == vectors ? last : kWidth);
    }
  });
}

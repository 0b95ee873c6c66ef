// What the CPU's operators hand to its kernels besides waist/calls.h, and one table of functions
// per instruction set. Nothing here depends on torch or on the instruction set.
#pragma once

#include "waist/calls.h"

namespace fused_rnn::cpu {

// One operand of the matrix product, [N, rows, columns] with any strides (in elements).
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, row = 0, column = 0;
};

// What a left operand is multiplied by, and where the result goes.
struct Right {
  int64_t l = 0;
  Matrix b, bias;       // [N, K, L], and [N, L] in bias.batch, bias.column (may be null)
  void* out = nullptr;  // [N, M, L] contiguous, acc
  bool adds = false;    // to what `out` has
};

struct Matmul {
  int64_t n = 0, m = 0, k = 0;
  Matrix a;           // [N, M, K]
  Right right[2];     // the second may have no columns
  int64_t least = 1;  // rows of any batch whose rows do not end early, at least; 0: they are not
                      // those of a batch. (The tile unit, which has other bits, needs enough.)
};

// out[column] = the sum of a column of data [rows, columns], contiguous, all of the arithmetic's
// dtype.
struct ColumnSums {
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
  void* out = nullptr;
};

// Where the rows of sequences lie: row b of step t of [T, B, S, n] at t steps and b rows; or, where
// `first` is not null, those of rows that have not ended alone. These are then the first of a step,
// for rows come longest first, and those of step t begin first[t] steps from the start, of which
// one is as long as a row.
struct Places {
  const int64_t* first = nullptr;   // [T + 1], of which the last is how many there are
  const int64_t* before = nullptr;  // [B + 1]: those of all rows before a row

  int64_t at(int64_t t) const { return first ? first[t] : t; }
  // Rows from one of these to the next.
  int64_t apart(int64_t batch) const { return first ? 1 : batch; }
  // Rows of a step, of B.
  int64_t live(int64_t t, int64_t batch) const { return first ? first[t + 1] - first[t] : batch; }
  // Rows of all steps.
  int64_t all(const Layer& layer) const {
    return first ? first[layer.steps] : layer.steps * layer.batch;
  }
  // The flags of a step's rows.
  const uint8_t* flags(const Layer& layer, int64_t t) const {
    return layer.flags + at(t) * apart(layer.batch);
  }
  // Where the chunk-th of so many chunks of a batch begins, which have about as much to do.
  int64_t begin(int64_t chunk, int64_t chunks, int64_t batch) const {
    if (first == nullptr || chunk == 0 || chunk == chunks) return batch * chunk / chunks;
    const int64_t wanted = before[batch] * chunk / chunks;
    int64_t row = 0;
    for (int64_t step = batch; step > 0; step = step > 1 ? (step + 1) / 2 : 0) {
      if (row + step <= batch && before[row + step] <= wanted) row += step;
    }
    const bool next = row < batch && before[row + 1] - wanted < wanted - before[row];
    return next ? row + 1 : row;
  }
};

// Where the flags say that segments start at step t, if it is one.
struct SegmentStarts {
  const uint8_t* flags = nullptr;
  int64_t rows = 0;

  SegmentStarts(const Layer& layer, const Places& places, int64_t t) {
    if (layer.flags == nullptr || t < 0 || t >= layer.steps) return;
    flags = places.flags(layer, t), rows = places.live(t, layer.batch);
  }
  bool at(int64_t b) const { return b < rows && (flags[b] & 3) == 2; }
};

// The input of a forward scan that projects it itself: gates_x, which it then does not read, is
// x w_ih^T + bias. Not for a GRU with the reset gate before the product; bias is of the
// arithmetic's dtype. Bits are those of run_matmul.
struct Input {
  int64_t size = 0;    // I, up to kMaxInput; 0: there is none
  Rows x, w_ih, bias;  // [T, B, I] [S, G*H, I] [S, G*H] (may be null)
  Places places;       // of x and all other sequences, whether the scan projects or not
};
constexpr int64_t kMaxInput = 512;  // the chunk of K of the matrix product

// What a backward scan makes of the gates' gradients itself, in place of leaving them (dgates and
// dgates_hn are then not written), and from what. Without projection. The rows of each
// entry go in so many chunks.
struct LayerGradients {
  int64_t chunks = 0;       // 0: nothing
  int64_t size = 0;         // I
  Rows x, w_ih, h0, y;      // [T, B, I] [S, G*H, I] [S, B, H] [T, B, S, H]
  void* dx = nullptr;       // as x, like the others of the arithmetic's dtype; null: not wanted
  void* dx_more = nullptr;  // memory for the other S - 1 entries' parts of dx
  void* dw_ih = nullptr;    // [S, G*H, I]
  void* dw_hh = nullptr;    // [S, G*H, H]
  void* db = nullptr;       // [S, G*H]
  void* db_hn = nullptr;    // [S, H]: of the GRU's third gate inside its recurrence
  Places places;            // of all sequences, whether there are chunks or not
};

// Up to so many rows, weights that are used once are not packed first.
constexpr int64_t kDirectRows = 8;

// The kernels of one instruction set. dtype: the type of all arithmetic, kFloat32 or kFloat64.
struct Kernels {
  void (*lstm_forward)(const LstmForward&, const Input&, DType dtype);
  void (*lstm_backward)(const LstmBackward&, const LayerGradients&, DType dtype);
  void (*gru_forward)(const GruForward&, const Input&, DType dtype);
  void (*gru_backward)(const GruBackward&, const LayerGradients&, DType dtype);
  void (*rnn_forward)(const RnnForward&, const Input&, DType dtype);
  void (*rnn_backward)(const RnnBackward&, const LayerGradients&, DType dtype);
  void (*matmul)(const Matmul&, DType dtype);
  void (*column_sums)(const ColumnSums&, DType dtype);
};

// Whether the compiler knows AMX, which only Linux lets a process ask for.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FUSED_RNN_HAS_AMX 1
#else
#define FUSED_RNN_HAS_AMX 0
#endif

enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Whether kernels may use the tile unit (AMX), which those of AVX-512 know.
bool has_tiles();
// Whether a scan multiplies by weights, of which `depth` are summed, on the tile unit: those of 16
// bits. Not a matter of the batch. (Float32 weights, cut in three, would keep a step of few rows
// waiting for memory longer.)
inline bool scan_by_tiles(int64_t steps, DType weights, int64_t depth) {
  return size_of(weights) == 2 && steps > 1 && depth >= 32 && has_tiles();
}

// The instruction set in use: the best this machine has, or what FUSED_RNN_CPU_ISA names.
Isa chosen_isa();
const Kernels& chosen_kernels();

// What the kernels need of the outside world (runtime.cpp); they include no torch header.

// Threads a parallel_tasks may use now: 1 inside another parallel region.
int64_t thread_count();
// Calls task(context, i) for 0 <= i < count, on PyTorch's threads, in contiguous ranges.
void parallel_tasks(int64_t count, void (*task)(void* context, int64_t i), void* context);
// Calls member(context, rank, members) on as many of PyTorch's threads, at most `wanted`, as are
// found to run at the same time: they may wait for one another.
void run_together(int64_t wanted, void (*member)(void* context, int64_t rank, int64_t members),
                  void* context);
// Where members wait for one another: a count of arrivals, alone in its cache line.
struct alignas(64) Meeting {
  uint64_t arrived = 0;
};
// Waits until `arrived` arrivals have been counted, this one among them; what members wrote before
// is seen after.
void meet(Meeting& meeting, uint64_t arrived);
// bytes of memory aligned to 64, or an exception; released by free_workspace. What stays beyond a
// call is at most twice as large.
void* allocate_workspace(size_t bytes, bool stays = false);
void free_workspace(void* memory);
// Bytes of second-level cache of one core, and the part of it in which weights stay.
int64_t l2_bytes();
constexpr double kCacheFilled = 0.75;

}  // namespace fused_rnn::cpu

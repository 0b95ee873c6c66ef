// The operators fused_rnn::cuda_scan_*: waist/operators.h with the kernels of this folder. Besides
// the waist's arguments they take what fused_rnn/cuda decides: the kernel (0 by steps, 1 a block
// scan, 2 a grid scan, 3 one with blocks of 32 units), the rows of a grid scan's batch tiles, how
// float32 products are taken (a member of PRECISIONS, by its place) and the stream.
#include <atomic>

#include "cuda/launch.h"
#include "cuda/steps.h"
#include "waist/operators.h"

#if defined(FUSED_RNN_EMULATOR)
#include "emulator/emulator.h"
#endif

namespace fused_rnn::cuda {

#if defined(FUSED_RNN_EMULATOR)
constexpr bool kEmulated = true;
// The memory of a call that has ended, by an exception too, is no longer its kernels'.
struct Forgetting {
  ~Forgetting() { emulator::forget(); }
};
void touches(const void* data, size_t bytes, bool written, const char* name) {
  emulator::allow(data, bytes, written, name);
}
#else
constexpr bool kEmulated = false;
struct Forgetting {};
void touches(const void*, size_t, bool, const char*) {}
#endif

namespace {

// The cell a call is of.
template <class Call>
constexpr Cell kCellOf =
    std::is_same_v<Call, LstmForward> || std::is_same_v<Call, LstmBackward> ? Cell::kLstm
    : std::is_same_v<Call, GruForward> || std::is_same_v<Call, GruBackward> ? Cell::kGru
                                                                            : Cell::kRnn;
template <class Call>
constexpr bool kBackward = std::is_same_v<Call, LstmBackward> ||
                           std::is_same_v<Call, GruBackward> || std::is_same_v<Call, RnnBackward>;

// use.operator()<Product>() for the product of a dtype and precision.
template <class Use>
void with_product(DType io, int64_t precision, const Use& use) {
  if (io == DType::kBFloat16) return use.template operator()<Product::kBf16>();
  if (io == DType::kFloat16) return use.template operator()<Product::kF16>();
  if (precision == 1) return use.template operator()<Product::kTf32>();
  if (precision == 2) return use.template operator()<Product::kTf32x3>();
  return use.template operator()<Product::kIeee>();
}

template <Product kProduct, class Call>
BlockNeeds needs_of(const Call& call) {
  return BlockScan<kCellOf<Call>, kProduct>::needs(call.layer.hidden, kBackward<Call>);
}

// The first call that finds a grid scan before it lost says so.
std::atomic<bool> has_lost_one = false;

void complain_of_the_lost() {
  Lost* lost = lost_record();
  if (std::atomic_ref(lost->raised).load(std::memory_order_acquire) == 0) return;
  if (has_lost_one.exchange(true)) return;
  const int32_t number = lost->scan;
  const int64_t step = lost->step;
  const int32_t x = lost->block_x, y = lost->block_y, missing = lost->missing;
  const char* const cells[] = {"lstm", "gru", "rnn"};
  const char* const products[] = {"bfloat16", "float16", "tf32", "tf32x3", "ieee"};
  STD_TORCH_CHECK(
      false, "a grid scan before this call was given up: ", cells[number / 10],
      number % 2 ? " backward, " : " forward, ", products[number / 2 % 5], ", step ", step,
      ": block (", x, ", ", y, ") waited in vain for ", missing,
      " more to come. Its results are NaN. From now on this process runs no grid scans");
}

GridTile tile_of(int64_t kernel, int64_t rows) { return {rows, kernel == 3 ? 32 : 16}; }

struct Run {
  int64_t kernel, rows, precision, stream;
  const Tensor& w_hh;
  MaybeTensor w_hr;

  // Sixteen rows within 2^31 elements of the first; see rows.cuh and grid_scan.cuh.
  static constexpr int64_t kMaxRow = int64_t{1} << 26;

  void check(const Tensor& w) const {
    STD_TORCH_CHECK(kEmulated ? w.is_cpu() : w.is_cuda(), "w_hh must be a ",
                    kEmulated ? "CPU" : "CUDA", " tensor");
    STD_TORCH_CHECK(0 <= kernel && kernel <= 3, "kernel must be 0, 1, 2 or 3, got ", kernel);
    STD_TORCH_CHECK(kernel != 1 || rows == 4 || rows == 8, "rows must be 4 or 8, got ", rows);
    STD_TORCH_CHECK(kernel < 2 || (8 <= rows && rows <= 128 && rows % 8 == 0),
                    "rows must be a multiple of 8 up to 128, got ", rows);
    STD_TORCH_CHECK(0 <= precision && precision <= 2, "precision must be 0, 1 or 2, got ",
                    precision);
  }
  int64_t max_row() const { return kernel == 0 ? INT64_MAX : kMaxRow; }

  template <class Call>
  void operator()(const Call& call, const Arguments& arguments) const {
    const Layer& l = call.layer;
    if (l.batch == 0 || l.stack == 0) return;
    STD_TORCH_CHECK(l.batch < int64_t{8} << 31, "the batch must have less than 2^34 rows");
    [[maybe_unused]] const Forgetting forgetting;
    for (const Memory& m : arguments.memory()) touches(m.data, m.bytes, m.written, m.name);
    void* on = reinterpret_cast<void*>(stream);
    use_device(w_hh.get_device_index());
    complain_of_the_lost();
    if (kernel == 0) {
      run_steps(call, arguments, w_hh, w_hr, on);
    } else {
      keeping_weights(call, arguments, on);
    }
  }

 private:
  template <class Call>
  void keeping_weights(const Call& call, const Arguments& arguments, void* on) const {
    const Layer& l = call.layer;
    const DType io = arguments.io();
    const char* name = kernel == 1 ? "a block scan" : "a grid scan";
    STD_TORCH_CHECK(io != DType::kFloat64 && l.out == l.hidden && !w_hr, name,
                    " has no float64 and no projection; kernel 0 has");
    if constexpr (kCellOf<Call> == Cell::kGru) {
      STD_TORCH_CHECK(call.reset_after, name, " resets after the product; kernel 0 has both");
    }
    STD_TORCH_CHECK(l.stack * l.hidden * 4 <= kMaxRow, name,
                    " takes S * 4 H <= 2^26, got S = ", l.stack, ", H = ", l.hidden);
    STD_TORCH_CHECK(l.steps < int64_t{1} << 28 && l.batch < int64_t{1} << 30, name,
                    " takes less than 2^28 steps and 2^30 rows, got T = ", l.steps,
                    ", B = ", l.batch);
    with_product(io, precision, [&]<Product kProduct>() {
      if (kernel == 1) {
        STD_TORCH_CHECK(needs_of<kProduct>(call).threads > 0,
                        "there is no block scan for H = ", l.hidden, "; kernel 0 has any size");
        BlockScan<kCellOf<Call>, kProduct>::launch(call, rows, on);
      } else {
        grid<kProduct>(call, arguments, on);
      }
    });
  }

  // As many (entry, batch tile) pairs at a time as the GPU runs together.
  template <Product kProduct, class Call>
  void grid(const Call& call, const Arguments& arguments, void* on) const {
    using Scan = GridScan<kCellOf<Call>, kProduct>;
    const Layer& l = call.layer;
    const GridTile tile = tile_of(kernel, rows);
    const GridNeeds needs = Scan::needs(l.hidden, tile, kBackward<Call>);
    STD_TORCH_CHECK(needs.slices > 0, "this scan has no kernel 3; kernel 2 it has");
    const int64_t resident = Scan::resident(l.hidden, tile, kBackward<Call>);
    STD_TORCH_CHECK(needs.slices <= resident, "a grid scan of H = ", l.hidden, " takes ",
                    needs.slices, " blocks at the same time, the GPU runs ", resident,
                    " of them; kernel 0 has any size");
    const int64_t pairs = l.stack * ((l.batch + rows - 1) / rows);
    GridWork work;
    work.pairs = std::min(pairs, resident / needs.slices);
    work.tile = tile;
    // Counts in lines of their own: of the pairs' groups, and of waits given up.
    constexpr int64_t kLine = kCountWords * sizeof(uint32_t);
    const int64_t counts = (work.pairs * needs.groups + 1) * kLine;
    const int64_t bytes = counts + work.pairs * static_cast<int64_t>(needs.exchange_bytes);
    const int64_t zeroed = needs.zeroed ? bytes : counts;
    Tensor memory = torch::stable::new_empty(arguments.like(), {bytes}, ScalarType::Byte);
    auto* at = static_cast<unsigned char*>(memory.mutable_data_ptr());
    work.claimed = reinterpret_cast<uint32_t*>(at);
    work.arrived = reinterpret_cast<uint32_t*>(at + kLine);
    work.exchange = at + counts;
    touches(at, static_cast<size_t>(bytes), false, "exchange");
    touches(at, static_cast<size_t>(zeroed), true, "exchange");
    touches(lost_record(), sizeof(Lost), true, "lost");
    for (; work.first < pairs; work.first += work.pairs) {
      work.pairs = std::min(work.pairs, pairs - work.first);
      fill_zero(at, static_cast<size_t>(zeroed), on);
      Scan::launch(call, work, on);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    const Tensor& gates_x, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& h0,
    const Tensor& c0, const MaybeTensor& flags, std::vector<bool> reverse, bool keep_gates,
    int64_t kernel, int64_t rows, int64_t precision, int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, w_hr};
  LstmOutputs out =
      run_lstm_forward(run, gates_x, w_hh, w_hr, h0, c0, flags, reverse, true, keep_gates);
  return {out.y, out.h_n, out.c_n, out.cells, out.gates};
}

std::tuple<Tensor, Tensor, Tensor> lstm_inference(const Tensor& gates_x, const Tensor& w_hh,
                                                  const MaybeTensor& w_hr, const Tensor& h0,
                                                  const Tensor& c0, const MaybeTensor& flags,
                                                  std::vector<bool> reverse, int64_t kernel,
                                                  int64_t rows, int64_t precision, int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, w_hr};
  LstmOutputs out =
      run_lstm_forward(run, gates_x, w_hh, w_hr, h0, c0, flags, reverse, false, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
    const MaybeTensor& dcells, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& c0,
    const Tensor& cells, const Tensor& gates, const MaybeTensor& flags, std::vector<bool> reverse,
    int64_t kernel, int64_t rows, int64_t precision, int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, w_hr};
  return run_lstm_backward(run, dy, dh_n, dc_n, dcells, w_hh, w_hr, c0, cells, gates, flags,
                           reverse);
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& gates_x, const Tensor& w_hh,
                                               const MaybeTensor& b_hn, const Tensor& h0,
                                               const MaybeTensor& flags, std::vector<bool> reverse,
                                               bool reset_after, bool keep_gates, int64_t kernel,
                                               int64_t rows, int64_t precision, int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, {}};
  GruOutputs out =
      run_gru_forward(run, gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, true, keep_gates);
  return {out.y, out.h_n, out.gates};
}

std::tuple<Tensor, Tensor> gru_inference(const Tensor& gates_x, const Tensor& w_hh,
                                         const MaybeTensor& b_hn, const Tensor& h0,
                                         const MaybeTensor& flags, std::vector<bool> reverse,
                                         bool reset_after, int64_t kernel, int64_t rows,
                                         int64_t precision, int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, {}};
  GruOutputs out =
      run_gru_forward(run, gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, false, false);
  return {out.y, out.h_n};
}

std::tuple<Tensor, Tensor, Tensor> gru_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                                const Tensor& w_hh, const Tensor& h0,
                                                const Tensor& y, const Tensor& gates,
                                                const MaybeTensor& flags, std::vector<bool> reverse,
                                                bool reset_after, int64_t kernel, int64_t rows,
                                                int64_t precision, int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, {}};
  return run_gru_backward(run, dy, dh_n, w_hh, h0, y, gates, flags, reverse, reset_after);
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& gates_x, const Tensor& w_hh, const Tensor& h0,
                                       const MaybeTensor& flags, std::vector<bool> reverse,
                                       bool relu, int64_t kernel, int64_t rows, int64_t precision,
                                       int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, {}};
  return run_rnn_forward(run, gates_x, w_hh, h0, flags, reverse, relu);
}

std::tuple<Tensor, Tensor> rnn_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                        const Tensor& w_hh, const Tensor& y,
                                        const MaybeTensor& flags, std::vector<bool> reverse,
                                        bool relu, int64_t kernel, int64_t rows, int64_t precision,
                                        int64_t stream) {
  const Run run{kernel, rows, precision, stream, w_hh, {}};
  return run_rnn_backward(run, dy, dh_n, w_hh, y, flags, reverse, relu);
}

// use.operator()<Cell, Product>() for the number of a cell (0 LSTM, 1 GRU, 2 RNN) and a product.
template <class Use>
void with_scan(int64_t cell, int64_t product, const Use& use) {
  STD_TORCH_CHECK(0 <= cell && cell <= 2 && 0 <= product && product <= 4, "there is no cell ", cell,
                  " or no product ", product);
  const DType io = product == 0   ? DType::kBFloat16
                   : product == 1 ? DType::kFloat16
                                  : DType::kFloat32;
  with_product(io,
               product == 2   ? 1
               : product == 3 ? 2
                              : 0,
               [&]<Product kProduct>() {
                 if (cell == 0) return use.template operator()<Cell::kLstm, kProduct>();
                 if (cell == 1) return use.template operator()<Cell::kGru, kProduct>();
                 return use.template operator()<Cell::kRnn, kProduct>();
               });
}

// What a block scan needs of a multiprocessor: threads (0: there is none for this H) and bytes of
// shared memory.
std::tuple<int64_t, int64_t> block_needs(int64_t cell, int64_t product, int64_t hidden,
                                         bool backward) {
  BlockNeeds found;
  with_scan(cell, product, [&]<Cell kCell, Product kProduct>() {
    found = BlockScan<kCell, kProduct>::needs(hidden, backward);
  });
  return {found.threads, static_cast<int64_t>(found.shared_bytes)};
}

// What a grid scan, kernel 2 or 3, needs for tiles of so many rows: blocks that run together for
// one entry and tile (0: there is no such kernel), bytes of shared memory of each.
std::tuple<int64_t, int64_t> grid_needs(int64_t cell, int64_t product, int64_t hidden,
                                        int64_t kernel, int64_t rows, bool backward) {
  GridNeeds found;
  with_scan(cell, product, [&]<Cell kCell, Product kProduct>() {
    found = GridScan<kCell, kProduct>::needs(hidden, tile_of(kernel, rows), backward);
  });
  return {found.slices, static_cast<int64_t>(found.shared_bytes)};
}

// How many blocks of such a grid scan the current GPU, or the part of it this process may use, runs
// at the same time.
int64_t grid_resident(int64_t cell, int64_t product, int64_t hidden, int64_t kernel, int64_t rows,
                      bool backward) {
  int64_t found = 0;
  with_scan(cell, product, [&]<Cell kCell, Product kProduct>() {
    found = GridScan<kCell, kProduct>::resident(hidden, tile_of(kernel, rows), backward);
  });
  return found;
}
bool grid_is_lost() { return has_lost_one; }

bool is_emulated() { return kEmulated; }
bool can_run(int64_t index) { return has_code_for(static_cast<int>(index)); }

#if defined(FUSED_RNN_EMULATOR)
void emulate(int64_t seed, int64_t resident) {
  emulator::options().seed = static_cast<uint64_t>(seed);
  emulator::options().resident = static_cast<int>(resident);
}
#endif

}  // namespace
}  // namespace fused_rnn::cuda

#define FUSED_RNN_CHOICE "int kernel, int rows, int precision, int stream)"

STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "cuda_scan_lstm_forward(Tensor gates_x, Tensor w_hh, Tensor? w_hr, Tensor h0, Tensor c0, "
      "Tensor? flags, bool[] reverse, bool keep_gates, " FUSED_RNN_CHOICE
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_scan_lstm_inference(Tensor gates_x, Tensor w_hh, Tensor? w_hr, Tensor h0, Tensor c0, "
      "Tensor? flags, bool[] reverse, " FUSED_RNN_CHOICE " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_scan_lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, "
      "Tensor w_hh, Tensor? w_hr, Tensor c0, Tensor cells, Tensor gates, Tensor? flags, "
      "bool[] reverse, " FUSED_RNN_CHOICE " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_scan_gru_forward(Tensor gates_x, Tensor w_hh, Tensor? b_hn, Tensor h0, Tensor? flags, "
      "bool[] reverse, bool reset_after, bool keep_gates, " FUSED_RNN_CHOICE
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_scan_gru_inference(Tensor gates_x, Tensor w_hh, Tensor? b_hn, Tensor h0, "
      "Tensor? flags, bool[] reverse, bool reset_after, " FUSED_RNN_CHOICE " -> (Tensor, Tensor)");
  m.def(
      "cuda_scan_gru_backward(Tensor? dy, Tensor? dh_n, Tensor w_hh, Tensor h0, Tensor y, "
      "Tensor gates, Tensor? flags, bool[] reverse, bool reset_after, " FUSED_RNN_CHOICE
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_scan_rnn_forward(Tensor gates_x, Tensor w_hh, Tensor h0, Tensor? flags, "
      "bool[] reverse, bool relu, " FUSED_RNN_CHOICE " -> (Tensor, Tensor)");
  m.def(
      "cuda_scan_rnn_backward(Tensor? dy, Tensor? dh_n, Tensor w_hh, Tensor y, Tensor? flags, "
      "bool[] reverse, bool relu, " FUSED_RNN_CHOICE " -> (Tensor, Tensor)");
  m.def("cuda_block_needs(int cell, int product, int hidden, bool backward) -> (int, int)");
  m.def(
      "cuda_grid_needs(int cell, int product, int hidden, int kernel, int rows, bool backward) -> "
      "(int, int)");
  m.def(
      "cuda_grid_resident(int cell, int product, int hidden, int kernel, int rows, bool backward) "
      "-> int");
  m.def("cuda_grid_is_lost() -> bool");
  m.def("cuda_is_emulated() -> bool");
  m.def("cuda_has_code_for(int device) -> bool");
#if defined(FUSED_RNN_EMULATOR)
  m.def("cuda_emulate(int seed, int resident) -> ()");
#endif
}

#if defined(FUSED_RNN_EMULATOR)
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) {
#endif
  m.impl("cuda_scan_lstm_forward", TORCH_BOX(&fused_rnn::cuda::lstm_forward));
  m.impl("cuda_scan_lstm_inference", TORCH_BOX(&fused_rnn::cuda::lstm_inference));
  m.impl("cuda_scan_lstm_backward", TORCH_BOX(&fused_rnn::cuda::lstm_backward));
  m.impl("cuda_scan_gru_forward", TORCH_BOX(&fused_rnn::cuda::gru_forward));
  m.impl("cuda_scan_gru_inference", TORCH_BOX(&fused_rnn::cuda::gru_inference));
  m.impl("cuda_scan_gru_backward", TORCH_BOX(&fused_rnn::cuda::gru_backward));
  m.impl("cuda_scan_rnn_forward", TORCH_BOX(&fused_rnn::cuda::rnn_forward));
  m.impl("cuda_scan_rnn_backward", TORCH_BOX(&fused_rnn::cuda::rnn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CompositeExplicitAutograd, m) {
  m.impl("cuda_block_needs", TORCH_BOX(&fused_rnn::cuda::block_needs));
  m.impl("cuda_grid_needs", TORCH_BOX(&fused_rnn::cuda::grid_needs));
  m.impl("cuda_grid_resident", TORCH_BOX(&fused_rnn::cuda::grid_resident));
  m.impl("cuda_grid_is_lost", TORCH_BOX(&fused_rnn::cuda::grid_is_lost));
  m.impl("cuda_is_emulated", TORCH_BOX(&fused_rnn::cuda::is_emulated));
  m.impl("cuda_has_code_for", TORCH_BOX(&fused_rnn::cuda::can_run));
#if defined(FUSED_RNN_EMULATOR)
  m.impl("cuda_emulate", TORCH_BOX(&fused_rnn::cuda::emulate));
#endif
}

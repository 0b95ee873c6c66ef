// The kernels of one instruction set. Each kernels_<isa>.cpp switches the compiler to its
// instruction set, defines FUSED_RNN_ISA, FUSED_RNN_REGISTERS and, for AMX, FUSED_RNN_HAS_TILES,
// and includes this file once.
//
// Nothing here may use a template or inline function of a library: the linker keeps one copy of
// each, and it could be the copy compiled for instructions the machine does not have.

#define FN inline __attribute__((always_inline))
#define FN_LAMBDA __attribute__((always_inline))

#include "math/gates.h"

namespace fused_rnn::cpu {
namespace FUSED_RNN_ISA {
namespace {

#include FUSED_RNN_SIMD
#include "vector_math.inl"
#include "rows.inl"
#include "gemm.inl"
#if FUSED_RNN_HAS_TILES
#include "tiles.inl"
#else
#include "no_tiles.inl"
#endif
#include "panels.inl"
#include "scan.inl"
#include "gradients.inl"
#include "scan_base.inl"
#include "lstm.inl"
#include "gru.inl"
#include "rnn.inl"
#include "matmul.inl"
#if FUSED_RNN_HAS_TILES
#include "tile_matmul.inl"
#endif
#include "sums.inl"

#define FUSED_RNN_BY_DTYPE(run, Params) \
  [](const Params& p, DType dtype) { dtype == DType::kFloat64 ? run<double>(p) : run<float>(p); }

#define FUSED_RNN_SCAN_BY_DTYPE(run, Params, Own)                        \
  [](const Params& p, const Own& own, DType dtype) {                     \
    dtype == DType::kFloat64 ? run<double>(p, own) : run<float>(p, own); \
  }

}  // namespace
}  // namespace FUSED_RNN_ISA

extern const Kernels FUSED_RNN_TABLE;
const Kernels FUSED_RNN_TABLE = {
    FUSED_RNN_SCAN_BY_DTYPE(FUSED_RNN_ISA::run_lstm_forward, LstmForward, Input),
    FUSED_RNN_SCAN_BY_DTYPE(FUSED_RNN_ISA::run_lstm_backward, LstmBackward, LayerGradients),
    FUSED_RNN_SCAN_BY_DTYPE(FUSED_RNN_ISA::run_gru_forward, GruForward, Input),
    FUSED_RNN_SCAN_BY_DTYPE(FUSED_RNN_ISA::run_gru_backward, GruBackward, LayerGradients),
    FUSED_RNN_SCAN_BY_DTYPE(FUSED_RNN_ISA::run_rnn_forward, RnnForward, Input),
    FUSED_RNN_SCAN_BY_DTYPE(FUSED_RNN_ISA::run_rnn_backward, RnnBackward, LayerGradients),
    FUSED_RNN_BY_DTYPE(FUSED_RNN_ISA::run_matmul, Matmul),
    FUSED_RNN_BY_DTYPE(FUSED_RNN_ISA::run_column_sums, ColumnSums),
};

}  // namespace fused_rnn::cpu

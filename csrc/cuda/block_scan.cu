// The block scans of one cell and product, FUSED_RNN_CELL and FUSED_RNN_PRODUCT: sizes, choice
// among them by H, launches.
#include <type_traits>

#include "cuda/block_scan.cuh"
#include "cuda/launch.cuh"

namespace fused_rnn::cuda {
namespace {

// The sizes a scan's kernels come in, and for each how many steps along k keep their weights in
// registers: as many as the registers of its warps have room for (255 each up to 8 warps, 168 up to
// 12, 128 up to 16) without spilling.
struct Size {
  int max_units, held;
};
struct Sizes {
  Size of[4];
  int count;
};
constexpr Sizes sizes_of(Cell cell, Product product, bool backward) {
  const bool ieee = product == Product::kIeee, wide = !has_16_bits(product);
  switch (cell) {
    case Cell::kLstm:
      if (ieee) return {{{96, 0}}, 1};
      if (product == Product::kTf32x3) {
        return backward ? Sizes{{{64, 2}, {112, 2}}, 2} : Sizes{{{64, 4}, {128, 4}}, 2};
      }
      if (wide) return {{{64, backward ? 7 : 8}, {128, backward ? 6 : 8}}, 2};
      return backward ? Sizes{{{64, 4}, {128, product == Product::kF16 ? 6 : 7}, {176, 2}}, 3}
                      : Sizes{{{64, 4}, {128, 8}, {192, 3}}, 3};
    case Cell::kGru:
      if (ieee) return {{{112, 0}}, 1};
      if (wide) return {{{64, backward ? 6 : 8}, {128, backward ? 7 : 8}}, 2};
      return backward ? Sizes{{{64, 4}, {128, 8}, {192, 5}}, 3}
                      : Sizes{{{64, 4}, {128, 8}, {192, 7}, {208, 2}}, 4};
    default:
      if (ieee) return {{{192, 0}}, 1};
      if (wide) return {{{64, 8}, {192, 20}}, 2};
      return {{{64, 4}, {128, 8}, {256, backward ? 12 : 10}}, 3};
  }
}

// Calls use.operator()<Lane, Traits>() for the smallest size that H fits, or does nothing.
template <Cell kCell, Product kProduct, bool kBackward, int kLaneRows, int kIndex = 0, class Use>
void with_size(int64_t hidden, const Use& use) {
  constexpr Sizes kSizes = sizes_of(kCell, kProduct, kBackward);
  if constexpr (kIndex < kSizes.count) {
    constexpr Size kSize = kSizes.of[kIndex];
    if (hidden > kSize.max_units) {
      return with_size<kCell, kProduct, kBackward, kLaneRows, kIndex + 1>(hidden, use);
    }
    using Both = Lanes<kCell, kProduct, BlockPlace<kLaneRows>>;
    using Lane = std::conditional_t<kBackward, typename Both::Backward, typename Both::Forward>;
    using Traits = ProductTraits<kProduct, Lane::kGates, kSize.max_units, kSize.held,
                                 kBackward ? Lane::kGates : 1, Lane::kParts, kLaneRows>;
    use.template operator()<Lane, Traits>();
  }
}

int threads_of(int64_t hidden) { return static_cast<int>((hidden + kUnits - 1) / kUnits) * 32; }

}  // namespace

template <Cell kCell, Product kProduct>
BlockNeeds BlockScan<kCell, kProduct>::needs(int64_t hidden, bool backward) {
  BlockNeeds found;
  const auto use = [&]<class Lane, class Traits>() {
    found = {threads_of(hidden), block_shared_bytes<Traits>(hidden)};
  };
  if (backward) {
    with_size<kCell, kProduct, true, 2>(hidden, use);
  } else {
    with_size<kCell, kProduct, false, 2>(hidden, use);
  }
  return found;
}

template <Cell kCell, Product kProduct>
template <class Call>
void BlockScan<kCell, kProduct>::launch(const Call& call, int64_t rows, void* stream) {
  const Layer& layer = call.layer;
  constexpr bool kBackward =
      std::is_same_v<Call, typename Lanes<kCell, kProduct, BlockPlace<2>>::Backward::Call>;
  const auto use = [&]<class Lane, class Traits>() {
    const Grid grid{(layer.batch + rows - 1) / rows, 1, threads_of(layer.hidden),
                    block_shared_bytes<Traits>(layer.hidden)};
    Params<Call> params;
    params.call = call;
    if constexpr (kBackward) {
      launch_stack(block_backward<Lane, Traits>, grid, params, params, stream);
    } else {
      launch_stack(block_forward<Lane, Traits>, grid, params, params, stream);
    }
  };
  if (rows == 4) {
    with_size<kCell, kProduct, kBackward, 1>(layer.hidden, use);
  } else {
    with_size<kCell, kProduct, kBackward, 2>(layer.hidden, use);
  }
}

#define FUSED_RNN_INSTANTIATE(cell, product)                                                     \
  template struct BlockScan<Cell::cell, Product::product>;                                       \
  template void BlockScan<Cell::cell, Product::product>::launch(                                 \
      const Lanes<Cell::cell, Product::product, BlockPlace<2>>::Forward::Call&, int64_t, void*); \
  template void BlockScan<Cell::cell, Product::product>::launch(                                 \
      const Lanes<Cell::cell, Product::product, BlockPlace<2>>::Backward::Call&, int64_t, void*);
FUSED_RNN_INSTANTIATE(FUSED_RNN_CELL, FUSED_RNN_PRODUCT)

}  // namespace fused_rnn::cuda

// The grid scans of one cell and product, FUSED_RNN_CELL and FUSED_RNN_PRODUCT: what they need,
// launches.
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "cuda/grid_scan.cuh"
#include "cuda/launch.cuh"

namespace fused_rnn::cuda {
namespace {

// Pieces of a warp's weights that are in registers, 8 for each tile of a piece: as many as 255
// registers have room for without spilling.
constexpr int held_of(Cell cell, Product product, bool backward, int unit_tiles) {
  const bool half = has_16_bits(product);
  if (cell == Cell::kRnn || (backward && half))
    return half && !backward ? 8 : unit_tiles == 1 ? 12 : 4;
  return product == Product::kIeee && !backward ? 2 : 3;
}

// Blocks of 32 units are for what gathers most: gradients of several gates.
template <Cell kCell, Product kProduct, bool kBackward>
constexpr bool kHasWide = kBackward && has_16_bits(kProduct) && kCell != Cell::kRnn;

template <Cell kCell, Product kProduct, bool kBackward, int kUnitTiles>
struct Kernel {
  using Both = Lanes<kCell, kProduct, GridPlace<kUnitTiles>>;
  using Lane = std::conditional_t<kBackward, typename Both::Backward, typename Both::Forward>;
  using Traits = GridTraits<kProduct, Lane::kGates, kBackward, Lane::kParts,
                            held_of(kCell, kProduct, kBackward, kUnitTiles), kUnitTiles>;
  using Call = typename Lane::Call;

  static constexpr auto function() {
    if constexpr (kBackward) {
      return grid_backward<Lane, Traits>;
    } else {
      return grid_forward<Lane, Traits>;
    }
  }
  static GridNeeds needs(int64_t hidden, int64_t rows) {
    const int groups = groups_of(rows);
    constexpr int kBlock = Traits::kBlockUnits;
    return {(hidden + kBlock - 1) / kBlock, grid_shared_bytes<Lane, Traits>(hidden, groups),
            grid_exchange_bytes<Traits>(hidden, groups), groups, !Traits::kScatters};
  }
  static int groups_of(int64_t rows) {
    return static_cast<int>((rows + kGroupRows - 1) / kGroupRows);
  }
  static int64_t resident(int64_t hidden, int64_t rows) {
    const size_t shared = needs(hidden, rows).shared_bytes;
#if defined(FUSED_RNN_EMULATOR)
    return shared > kEmulatedShared ? 0 : kEmulatedBlocks;
#else
    // Asked at every launch, answered once: it takes some microseconds.
    static std::mutex mutex;
    static std::map<std::pair<int, size_t>, int64_t> known;
    const int device = current_device();
    const std::lock_guard<std::mutex> lock(mutex);
    const std::pair key{device, shared};
    if (!known.contains(key)) known[key] = ask_resident(device, shared);
    return known[key];
#endif
  }
#if !defined(FUSED_RNN_EMULATOR)
  static int64_t ask_resident(int device, size_t shared) {
    if (!attribute(device, cudaDevAttrCooperativeLaunch)) return 0;
    if (shared > most_shared(device)) return 0;
    allow_shared(function(), shared);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function(), kGridThreads, shared),
          "the GPU does not say what it can run");
    return int64_t{blocks} * attribute(device, cudaDevAttrMultiProcessorCount);
  }
#endif
  static void launch(const Call& call, const GridWork& work, void* stream) {
    const GridNeeds needs = Kernel::needs(call.layer.hidden, work.tile.rows);
    const Grid grid{needs.slices, work.pairs, kGridThreads, needs.shared_bytes};
    GridParams<Call> argument;
    argument.params.call = call;
    argument.first_pair = work.first;
    argument.tiles = (call.layer.batch + work.tile.rows - 1) / work.tile.rows;
    argument.rows = static_cast<int>(work.tile.rows);
    argument.groups = groups_of(work.tile.rows);
    argument.exchange = work.exchange;
    argument.arrived = work.arrived;
    argument.claimed = work.claimed;
    argument.lost = lost_record();
    argument.patience = kPatience;
    argument.pause = kPause;
    argument.scan = number_of_scan(kCell, kProduct, kBackward);
    const int64_t first = work.first / argument.tiles;
    const int64_t last = (work.first + work.pairs - 1) / argument.tiles;
    set_directions(argument.params, first, last - first + 1);
    cuda::launch(function(), grid, argument, stream, true);
  }

#if defined(FUSED_RNN_EMULATOR)
  static constexpr uint64_t kPatience = 1 << 8, kPause = UINT64_MAX;  // looks at the clock
  static constexpr int64_t kEmulatedBlocks = 96;
  static constexpr size_t kEmulatedShared = 227 * 1024;
#else
  static constexpr uint64_t kPatience = 10'000'000'000, kPause = 100'000'000;  // ns
#endif
};

// Calls use.operator()<Kernel>() for blocks of so many units, or does nothing where there are none.
template <Cell kCell, Product kProduct, bool kBackward, class Use>
void with_units(int64_t units, const Use& use) {
  if (units == kUnits) {
    use.template operator()<Kernel<kCell, kProduct, kBackward, 1>>();
  } else if constexpr (kHasWide<kCell, kProduct, kBackward>) {
    if (units == 2 * kUnits) use.template operator()<Kernel<kCell, kProduct, kBackward, 2>>();
  }
}
template <Cell kCell, Product kProduct, class Use>
void with_kernel(int64_t units, bool backward, const Use& use) {
  if (backward) {
    with_units<kCell, kProduct, true>(units, use);
  } else {
    with_units<kCell, kProduct, false>(units, use);
  }
}

}  // namespace

template <Cell kCell, Product kProduct>
GridNeeds GridScan<kCell, kProduct>::needs(int64_t hidden, const GridTile& tile, bool backward) {
  GridNeeds found;
  with_kernel<kCell, kProduct>(tile.units, backward,
                               [&]<class Kernel>() { found = Kernel::needs(hidden, tile.rows); });
  return found;
}

template <Cell kCell, Product kProduct>
int64_t GridScan<kCell, kProduct>::resident(int64_t hidden, const GridTile& tile, bool backward) {
  int64_t found = 0;
  with_kernel<kCell, kProduct>(
      tile.units, backward, [&]<class Kernel>() { found = Kernel::resident(hidden, tile.rows); });
  return found;
}

template <Cell kCell, Product kProduct>
template <class Call>
void GridScan<kCell, kProduct>::launch(const Call& call, const GridWork& work, void* stream) {
  using Backward = typename Lanes<kCell, kProduct, GridPlace<1>>::Backward::Call;
  with_units<kCell, kProduct, std::is_same_v<Call, Backward>>(
      work.tile.units, [&]<class Kernel>() { Kernel::launch(call, work, stream); });
}

#define FUSED_RNN_INSTANTIATE(cell, product)                                                     \
  template struct GridScan<Cell::cell, Product::product>;                                        \
  template void GridScan<Cell::cell, Product::product>::launch(                                  \
      const Lanes<Cell::cell, Product::product, GridPlace<1>>::Forward::Call&, const GridWork&,  \
      void*);                                                                                    \
  template void GridScan<Cell::cell, Product::product>::launch(                                  \
      const Lanes<Cell::cell, Product::product, GridPlace<1>>::Backward::Call&, const GridWork&, \
      void*);
FUSED_RNN_INSTANTIATE(FUSED_RNN_CELL, FUSED_RNN_PRODUCT)

}  // namespace fused_rnn::cuda

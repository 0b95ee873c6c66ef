// The grid scan: the weights of an entry are spread over the multiprocessors, 16 hidden units to a
// block, and stay there for the whole sequence; between steps the state (backward: the gates'
// gradients) goes through L2 from each block of a batch tile to all others.
//
// grid: slices of 16 units x (entry, batch tile) pairs, all of them resident at the same time. A
// tile's rows are taken in groups of 16, which follow one another through a step: while one group's
// operand is on its way, the next is computed.
//
// Synchronization. arrived[pair][group] counts the operands that blocks have published. A block
// writes an operand, its threads meet, one raises the count by a release; one waits by acquire
// until all blocks of the pair have come as far, then the threads meet and read. (A count all add
// to and one thread a block looks at: words of their own, which all look at, took twice as long to
// come round on an H100, and longer with every block.) Operands lie twice in memory, by the parity
// of the step: what a block overwrites was read by all others before they published the operand it
// has since read.
//
// A wait that lasts too long is given up, and what happened is left for the host to read. The block
// publishes nothing more, so the others give up too; results become NaN.
#pragma once

#include <type_traits>

#include "cuda/cells.cuh"
#include "cuda/grid_products.cuh"
#include "cuda/launch.h"

namespace fused_rnn::cuda {

// A thread's slots: one row of the group at hand, and one unit of each 16 of the block's.
template <int kUnitTiles>
struct GridPlace {
  static constexpr int kSlots = kUnitTiles, kLaneUnits = kUnitTiles, kLaneRows = 1;
  int entry, end, hidden;  // end: of the tile's rows
  int first_row;           // of the group
  int first_unit;          // the first slot's
  bool is[kSlots];

  static FUSED_RNN_DEVICE constexpr int unit_index(int slot) { return slot; }
  static FUSED_RNN_DEVICE constexpr int slot_of_unit(int n) { return n; }
  static FUSED_RNN_DEVICE int tile_row() { return thread_index() / kUnits; }
  FUSED_RNN_DEVICE int row(int) const { return first_row + tile_row(); }
  FUSED_RNN_DEVICE bool row_is(int n) const { return row(n) < end; }
  FUSED_RNN_DEVICE int unit(int slot) const { return first_unit + slot * kUnits; }
  // (In 32 bits what differs between threads, as in rows.cuh: 16 rows lie within reach.)
  FUSED_RNN_DEVICE int64_t at(const Rows& rows, int t) const {
    return times(t, rows.step) + times(first_row, rows.row) + times(entry, rows.entry) +
           (tile_row() * static_cast<int>(rows.row) + first_unit);
  }
  static FUSED_RNN_DEVICE int beyond(const Rows&, int slot) { return slot * kUnits; }
  FUSED_RNN_DEVICE void move_to(int row) {
    first_row = row;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) is[i] = row_is(0) && unit(i) < hidden;
  }
};

// Scattering: the block's own operand, of a group.
template <class Traits>
struct OwnOperand {
  Quad of[kChunks][Traits::kSources][32];
};
template <class Traits>
struct GridShared {
  std::conditional_t<Traits::kScatters, OwnOperand<Traits>, Partial<Traits>> product;
  // grid_weight_quads() of them, then the states: [group][kStates][slot][thread].
  Quad weights[1];
};
// Scattering: what one block leaves for another of a group, [row][unit].
struct Parcel {
  float of[kGroupRows][kUnits];
};

template <class Traits>
FUSED_RNN_HD constexpr int room_of(int64_t hidden) {
  const int most = most_pieces<Traits>(hidden);
  return most > Traits::kHeld ? most - Traits::kHeld : 0;
}
template <class Traits>
FUSED_RNN_HD constexpr size_t grid_weight_quads(int64_t hidden) {
  return static_cast<size_t>(kGridWarps * room_of<Traits>(hidden) * Traits::kTiles * 2 * 32);
}
template <class Lane, class Traits>
constexpr size_t grid_shared_bytes(int64_t hidden, int groups) {
  return sizeof(GridShared<Traits>::product) + grid_weight_quads<Traits>(hidden) * sizeof(Quad) +
         sizeof(float) * kGridThreads * Lane::kStates * Lane::kSlots * groups;
}
// Of one (entry, tile) pair's operands of a group: gathering [chunk] of them, scattering parcels
// [to] [from]; in quads.
template <class Traits>
FUSED_RNN_HD constexpr int64_t group_quads(int64_t hidden) {
  const int64_t blocks = unit_blocks<Traits>(hidden);
  if (Traits::kScatters)
    return blocks * blocks * static_cast<int64_t>(sizeof(Parcel) / sizeof(Quad));
  return int64_t{kChunks} * chunk_quads<Traits>(hidden);
}
template <class Traits>
constexpr size_t grid_exchange_bytes(int64_t hidden, int groups) {
  return sizeof(Quad) * 2 * groups * static_cast<size_t>(group_quads<Traits>(hidden));
}

// What forward and backward scans have in common: a block's part of the work between two of its
// threads' steps.
template <class Lane, class Traits>
class GridBlock {
 public:
  static constexpr Product kProduct = Traits::kProduct;
  using Call = typename Lane::Call;
  using Place = GridPlace<Traits::kUnitTiles>;

  Place place;
  bool backwards;
  int groups;  // of the tile's rows

  FUSED_RNN_DEVICE explicit GridBlock(const GridParams<Call>& params)
      : params_(params), shared_(shared_memory<GridShared<Traits>>()) {
    const Layer& layer = params.params.call.layer;
    const int64_t pair = params.first_pair + block_y();
    place.entry = static_cast<int>(pair / params.tiles);
    place.hidden = static_cast<int>(layer.hidden);
    first_row_ = static_cast<int>(pair % params.tiles * params.rows);
    const int64_t end = int64_t{first_row_} + params.rows;
    place.end = static_cast<int>(end < layer.batch ? end : layer.batch);
    begin_group(0);
    groups = (place.end - first_row_ + kGroupRows - 1) / kGroupRows;
    backwards =
        is_reversed(params.params, place.entry - static_cast<int>(params.params.first_entry));

    const int blocks = unit_blocks<Traits>(layer.hidden), warp = thread_index() / 32;
    const int first = first_of_warp(blocks, warp), end_block = first_of_warp(blocks, warp + 1);
    constexpr int kPieces = Traits::kScatters ? 1 : Traits::kSources;  // of a block of units
    first_piece_ = first * kPieces;
    pieces_ = (end_block - first) * kPieces;
    chunk_quads_ = chunk_quads<Traits>(layer.hidden);
    group_quads_ = static_cast<int>(group_quads<Traits>(layer.hidden));
    exchange_ =
        static_cast<Quad*>(params.exchange) + int64_t{block_y()} * 2 * params.groups * group_quads_;
    arrived_ = params.arrived + int64_t{block_y()} * params.groups * kCountWords;
    // After one that was lost, as of a graph that is replayed, nobody waits again.
    lost_ = barrier_any(thread_index() == 0 && load_system(&params.lost->raised) != 0);
    states_ = reinterpret_cast<float*>(shared_.weights + grid_weight_quads<Traits>(layer.hidden)) +
              thread_index();
  }

  // element(gate, unit, k): the bits of a weight. Gathering the unit is of the block's, scattering
  // k is.
  template <class Element>
  FUSED_RNN_DEVICE void fill(const Element& element) {
    const int first_unit = block_x() * Traits::kBlockUnits;
    const int H = place.hidden;
    weights_.fill(shared_.weights, room_of<Traits>(H), first_piece_, pieces_,
                  [&](int gate, int m, int k) -> uint32_t {
                    const int unit = Traits::kScatters ? m : first_unit + m;
                    if (Traits::kScatters) k += first_unit;
                    return unit < H && k < H ? element(gate, unit, k) : 0;
                  });
  }

  // (The compiler is not told that the unit is always the same, or it would compute addresses ahead
  // of a product, whose weights want all the registers there are. Hence called after one again.)
  FUSED_RNN_DEVICE void begin_group(int group) {
    const int unit = block_x() * Traits::kBlockUnits + thread_index() % kUnits;
    place.first_unit = static_cast<int>(opaque(static_cast<uint32_t>(unit)));
    place.move_to(first_row_ + group * kGroupRows);
  }

  // The carried state of the thread's slots.
  FUSED_RNN_DEVICE void keep(Lane& lane, int group) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kStates; ++i) {
      store(state(group, i), lane.state(i / Place::kSlots, i % Place::kSlots));
    }
  }
  FUSED_RNN_DEVICE void take(Lane& lane, int group) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kStates; ++i) {
      lane.state(i / Place::kSlots, i % Place::kSlots) = load(state(group, i));
    }
  }

  // The product with the group's operand number `number` (0, 1, ...), once all have published it.
  FUSED_RNN_DEVICE ThreadSums<Traits> receive(int number, int group) {
    ThreadSums<Traits> total;
    lost_ = barrier_any(thread_index() == 0 && (lost_ || await(number, group)));
    if (lost_) {
      total.spoil();
      return total;
    }
    const Quad* operand = operand_of(number, group);
    if constexpr (Traits::kScatters) {
      if (Place::tile_row() < 8 * chunks()) collect(total, operand);
    } else {
      WarpSums<Traits> sums;
      operand += first_piece_ * Traits::kParts * 32 + thread_index() % 32;
      if (chunks() == 2) {
        weights_.template multiply<2>(sums, operand, chunk_quads_);
      } else {
        weights_.template multiply<1>(sums, operand, chunk_quads_);
      }
      store_sums(shared_.product, sums, chunks());
      barrier();
      add_sums(total, shared_.product, chunks());
    }
    return total;
  }

  // Writes a slot's number of the operand `number`.
  FUSED_RNN_DEVICE void put(int number, int group, int source, int slot, float value) {
    const int row = Place::tile_row();
    if constexpr (Traits::kScatters) {
      cuda::place<Traits>(&shared_.product.of[row / 8][0][0], source, row % 8,
                          thread_index() % kUnits, place.is[slot] ? value : 0.0f);
    } else if (place.is[slot] && !lost_) {
      Quad* chunk = operand_of(number, group) + row / 8 * chunk_quads_;
      cuda::place<Traits>(chunk, source, row % 8, place.unit(slot), value);
    }
  }
  // All threads have: the others may read it. (And the sums may be overwritten.)
  FUSED_RNN_DEVICE void publish(int number, int group) {
    if constexpr (Traits::kScatters) {
      barrier();
      if (!lost_) scatter(operand_of(number, group));
    }
    barrier();
    if (thread_index() == 0 && !lost_) add_release(count(group), 1);
  }

 private:
  static constexpr int kStates = Lane::kStates * Place::kSlots;
  static constexpr int kLooks = 64;  // between two at the clock
  FUSED_RNN_DEVICE float* state(int group, int i) const {
    return states_ + (group * kStates + i) * kGridThreads;
  }
  FUSED_RNN_DEVICE Quad* operand_of(int number, int group) const {
    return exchange_ + (number % 2 * params_.groups + group) * group_quads_;
  }
  // Of the group at hand, that have rows.
  FUSED_RNN_DEVICE int chunks() const { return place.end - place.first_row > 8 ? 2 : 1; }

  // The parcels for the other blocks, and for this one.
  FUSED_RNN_DEVICE void scatter(Quad* operand) {
    const int g = thread_index() % 32 / 4, q = thread_index() % 4, count = chunks();
    Parcel* parcels = reinterpret_cast<Parcel*>(operand) + block_x();
    const auto leave = [&](int piece, const float(&sums)[kChunks][4]) {
      Parcel* parcel = parcels + static_cast<int64_t>(first_piece_ + piece) * block_count_x();
      FUSED_RNN_UNROLL
      for (int i = 0; i < 4 * kChunks; ++i) {
        if (i / 4 < count) {
          store(&parcel->of[i / 4 * 8 + 2 * q + i % 2][g + i % 4 / 2 * 8], sums[i / 4][i % 4]);
        }
      }
    };
    const Quad* own = &shared_.product.of[0][0][thread_index() % 32];
    constexpr int kDistance = Traits::kSources * 32;
    if (count == 2) {
      weights_.template multiply_each<2>(own, kDistance, leave);
    } else {
      weights_.template multiply_each<1>(own, kDistance, leave);
    }
  }
  // Adds up what all blocks have left for the thread's slot, in their order.
  FUSED_RNN_DEVICE void collect(ThreadSums<Traits>& total, const Quad* operand) const {
    const float* at = &(reinterpret_cast<const Parcel*>(operand) + block_x() * block_count_x())
                           ->of[Place::tile_row()][thread_index() % kUnits];
    constexpr int kTogether = 16, kDistance = sizeof(Parcel) / sizeof(float);
    FUSED_RNN_NO_UNROLL
    for (int first = 0; first < block_count_x(); first += kTogether) {
      float part[kTogether];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        part[i] = first + i < block_count_x() ? load(at + (first + i) * kDistance) : 0.0f;
      }
      FUSED_RNN_UNROLL
      for (int i = 0; i < kTogether; ++i) total.of[0] += part[i];
    }
  }
  FUSED_RNN_DEVICE uint32_t* count(int group) const { return arrived_ + group * kCountWords; }

  // Until all blocks of the pair have published an operand: whether it was in vain. (Blocks publish
  // nothing further before all have come as far, so a count that has gone round is no older one.)
  FUSED_RNN_DEVICE bool await(int number, int group) {
    const uint32_t* at = count(group);
    const uint32_t all = (static_cast<uint32_t>(number) + 1) * block_count_x();
    uint64_t since = 0, last = 0;
    while (true) {
      int missing = 0;
      FUSED_RNN_NO_UNROLL
      for (int look = 0; look < kLooks; ++look) {
        missing = static_cast<int>(all - load_acquire(at));
        if (missing <= 0) return false;
      }
      const uint64_t time = now();
      // Begins, or the GPU did something else meanwhile.
      if (last == 0 || time - last > params_.pause) since = time;
      last = time;
      if (time - since > params_.patience) {
        report(number, missing);
        return true;
      }
    }
  }
  // Leaves word for the host of the first wait that was given up.
  FUSED_RNN_DEVICE void report(int number, int missing) const {
    if (add_relaxed(params_.claimed, 1) != 0) return;
    Lost* lost = params_.lost;
    store(&lost->scan, params_.scan);
    store(&lost->step, int64_t{number});
    store(&lost->block_x, block_x());
    store(&lost->block_y, block_y());
    store(&lost->missing, missing);
    store_release_system(&lost->raised, 1);
  }

  const GridParams<Call>& params_;
  GridShared<Traits>& shared_;
  GridWeights<Traits> weights_;
  int first_row_, first_piece_, pieces_, chunk_quads_, group_quads_;
  bool lost_;  // of all threads alike
  Quad* exchange_;
  uint32_t* arrived_;
  float* states_;
};

template <class Lane, class Traits>
FUSED_RNN_KERNEL(kGridThreads)
grid_forward(FUSED_RNN_PARAMS GridParams<typename Lane::Call> params) {
  constexpr Product kProduct = Traits::kProduct;
  const typename Lane::Call& p = params.params.call;
  const Layer& layer = p.layer;
  GridBlock<Lane, Traits> block(params);
  const auto& place = block.place;
  constexpr int kSlots = Lane::kSlots;
  const bool backwards = block.backwards;
  const int T = static_cast<int>(layer.steps), H = place.hidden;

  // Prologue: weights, the state before the first step, which is the first operand.
  block.fill([&](int gate, int unit, int k) {
    return weight_bits<kProduct>(p.w_hh, place.entry, gate * H + unit, k);
  });
  Lane lane;
  int t = backwards ? T - 1 : 0;
  const int direction = backwards ? -1 : 1;
  for (int group = 0; group < block.groups; ++group) {
    block.begin_group(group);
    int bits[1];
    get_flags(bits, place, layer, t);
    lane.start(p, place);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      if (!backwards && starts_segment(bits[0])) lane.zero(i);
      block.put(0, group, 0, i, lane.h[i]);
    }
    block.keep(lane, group);
    block.publish(0, group);
  }

  // One step of one group: product, gate arithmetic, the operand of the next step; then, while that
  // is on its way, what the step leaves.
  FUSED_RNN_NO_UNROLL
  for (int step = 0; step < T; ++step) {
    const bool more = step + 1 < T;
    FUSED_RNN_NO_UNROLL
    for (int group = 0; group < block.groups; ++group) {
      block.begin_group(group);
      int bits[1], next_bits[1];
      get_flags(bits, place, layer, t);
      get_flags(next_bits, place, layer, t + direction, more);
      lane.read(p, place, t);
      const ThreadSums<Traits> sums = block.receive(step, group);
      block.begin_group(group);
      block.take(lane, group);
      const bool live[1] = {(bits[0] & kEnded) == 0};
      FUSED_RNN_UNROLL
      for (int i = 0; i < kSlots; ++i) lane.compute(p, i, live[0], sums);
      // As in block_scan.cuh: a forward entry starts a segment before its first step, a reversed
      // one leaves it after.
      const bool cut = more && starts_segment(backwards ? bits[0] : next_bits[0]);
      if (more) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kSlots; ++i) block.put(step + 1, group, 0, i, cut ? 0.0f : lane.h[i]);
        block.publish(step + 1, group);
      }
      lane.write(p, place, t, live);
      FUSED_RNN_UNROLL
      for (int i = 0; i < kSlots; ++i) {
        if (cut) lane.zero(i);
      }
      block.keep(lane, group);
    }
    t += direction;
  }

  // Epilogue.
  for (int group = 0; group < block.groups; ++group) {
    block.begin_group(group);
    block.take(lane, group);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      if (place.is[i]) lane.finish(p, place, i);
    }
  }
}

template <class Lane, class Traits>
FUSED_RNN_KERNEL(kGridThreads)
grid_backward(FUSED_RNN_PARAMS GridParams<typename Lane::Call> params) {
  constexpr Product kProduct = Traits::kProduct;
  const typename Lane::Call& p = params.params.call;
  const Layer& layer = p.layer;
  GridBlock<Lane, Traits> block(params);
  const auto& place = block.place;
  constexpr int kSlots = Lane::kSlots;
  const bool backwards = block.backwards;
  const int T = static_cast<int>(layer.steps), H = place.hidden;

  // Prologue: transposed weights, the final state's gradients.
  block.fill([&](int gate, int unit, int k) {
    return weight_bits<kProduct>(p.w_hh, place.entry, gate * H + k, unit);
  });
  Lane lane;
  int t = backwards ? 0 : T - 1;
  const int direction = backwards ? 1 : -1;
  for (int group = 0; group < block.groups; ++group) {
    block.begin_group(group);
    lane.start(p, place);
    block.keep(lane, group);
  }

  // One step of one group, from the last taken by the forward scan to the first. Operand `step` is
  // of that step's gate gradients.
  FUSED_RNN_NO_UNROLL
  for (int step = 0; step < T; ++step) {
    const bool more = step + 1 < T;
    FUSED_RNN_NO_UNROLL
    for (int group = 0; group < block.groups; ++group) {
      block.begin_group(group);
      int bits[1], next_bits[1];
      get_flags(bits, place, layer, t);
      get_flags(next_bits, place, layer, t + direction, more);
      lane.begin(p, place, t);
      lane.read(p, place, t, t + direction, more);
      ThreadSums<Traits> sums;
      if (step > 0) sums = block.receive(step - 1, group);
      block.begin_group(group);
      block.take(lane, group);
      const bool live = (bits[0] & kEnded) == 0;
      const bool cut = backwards ? more && starts_segment(next_bits[0]) : starts_segment(bits[0]);
      const bool initial = !more || (next_bits[0] & kEnded) != 0;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kSlots; ++i) {
        lane.dh[i] += sums.all(i);
        lane.compute(p, place, t, i, live, cut, initial);
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < Traits::kGates; ++gate) {
          block.put(step, group, gate, i, cut ? 0.0f : lane.d[gate][i]);
        }
      }
      block.publish(step, group);
      lane.write(p, place, t);
      block.keep(lane, group);
    }
    t += direction;
  }

  // Epilogue.
  FUSED_RNN_NO_UNROLL
  for (int group = 0; group < block.groups; ++group) {
    block.begin_group(group);
    const ThreadSums<Traits> sums = block.receive(T - 1, group);
    block.take(lane, group);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      lane.dh[i] += sums.all(i);
      if (place.is[i]) lane.finish(p, place, i);
    }
    barrier();
  }
}

}  // namespace fused_rnn::cuda

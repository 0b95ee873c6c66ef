// The block scan: one block runs the whole sequence for eight rows of one stack entry, or four, the
// weights kept in its registers and shared memory. Between steps only the state (backward: the
// gates' gradients) crosses warps, through one of two buffers in shared memory, with one barrier a
// step.
#pragma once

#include "cuda/cells.cuh"

namespace fused_rnn::cuda {

// Steps by which a sequence is brought into L2 ahead of its use: memory takes 0.6 us, a step 0.3.
constexpr int kAhead = 4;

// All of a block's shared memory.
template <class Traits>
struct BlockShared {
  Operand<Traits> operands[2];  // by the parity of the step that reads
  Quad weights[1];              // weight_bytes() of them
};

template <class Traits>
constexpr size_t block_shared_bytes(int64_t hidden) {
  return sizeof(Operand<Traits>) * 2 + weight_bytes<Traits>(hidden);
}

template <class Lane, class Traits>
FUSED_RNN_KERNEL(Traits::kThreads)
block_forward(FUSED_RNN_PARAMS Params<typename Lane::Call> params) {
  // Shared memory and pointers.
  constexpr Product kProduct = Traits::kProduct;
  const typename Lane::Call& p = params.call;
  const Layer& layer = p.layer;
  BlockShared<Traits>& shared = shared_memory<BlockShared<Traits>>();
  using Place = BlockPlace<Traits::kLaneRows>;
  constexpr int kSlots = Place::kSlots, kLaneRows = Place::kLaneRows;
  const Place place(layer, params.first_entry);
  const bool backwards = is_reversed(params, block_y());
  const int T = static_cast<int>(layer.steps), H = place.hidden;

  // Prologue: weights, the state before the first step, the first step's inputs.
  const int steps = steps_of<Traits>(H);
  const int first_unit = thread_index() / 32 * kUnits;
  Weights<Traits> weights;
  weights.fill(shared.weights, steps, [&](int gate, int m, int k) -> uint32_t {
    const int unit = first_unit + m;
    return unit < H && k < H ? weight_bits<kProduct>(p.w_hh, place.entry, gate * H + unit, k) : 0;
  });
  clear(shared.operands);
  Lane lane;
  lane.start(p, place);
  int bits[kLaneRows];
  int t = backwards ? T - 1 : 0;
  const int direction = backwards ? -1 : 1;
  get_flags(bits, place, layer, t);
  lane.read(p, place, t);
  barrier();
  FUSED_RNN_UNROLL
  for (int i = 0; i < kSlots; ++i) {
    if (!backwards && starts_segment(bits[i % kLaneRows])) lane.zero(i);
    cuda::place(shared.operands[0], 0, place.column(i), place.unit(i), lane.h[i]);
  }
  barrier();

  // One step: product, gate arithmetic, the state for the next.
  FUSED_RNN_NO_UNROLL
  for (int step = 0; step < T; ++step) {
    const bool more = step + 1 < T;
    int next_bits[kLaneRows];
    get_flags(next_bits, place, layer, t + direction, more);
    if (step + kAhead < T) Lane::ahead(p, place, t + kAhead * direction);
    Sums<Traits> sums;
    weights.multiply(sums, shared.operands[step % 2]);
    // A forward entry starts a segment before its first step, a reversed one leaves a segment after
    // it; the state after the last step is returned as it is.
    bool live[kLaneRows], cut[kLaneRows];
    FUSED_RNN_UNROLL
    for (int n = 0; n < kLaneRows; ++n) {
      live[n] = (bits[n] & kEnded) == 0;
      cut[n] = more && starts_segment(backwards ? bits[n] : next_bits[n]);
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) lane.compute(p, i, live[i % kLaneRows], sums);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      // (What is computed for a unit that is not there may be NaN, which padded weights of zero
      // would not take away.)
      cuda::place(shared.operands[(step + 1) % 2], 0, place.column(i), place.unit(i),
                  place.is[i] && !cut[i % kLaneRows] ? lane.h[i] : 0.0f);
    }
    lane.write(p, place, t, live);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      if (cut[i % kLaneRows]) lane.zero(i);
    }
    t += direction;
    FUSED_RNN_UNROLL
    for (int n = 0; n < kLaneRows; ++n) bits[n] = next_bits[n];
    if (more) lane.read(p, place, t);
    barrier();
  }

  // Epilogue.
  FUSED_RNN_UNROLL
  for (int i = 0; i < kSlots; ++i) {
    if (place.is[i]) lane.finish(p, place, i);
  }
}

// dh += what the last step's gate gradients pass back through the weights.
template <class Lane, class Traits>
FUSED_RNN_DEVICE void pass_back(Lane& lane, const Weights<Traits>& weights,
                                const Operand<Traits>& operand) {
  Sums<Traits> sums;
  weights.multiply(sums, operand);
  FUSED_RNN_UNROLL
  for (int i = 0; i < Lane::kSlots; ++i) lane.dh[i] += sums.all(i);
}

template <class Lane, class Traits>
FUSED_RNN_KERNEL(Traits::kThreads)
block_backward(FUSED_RNN_PARAMS Params<typename Lane::Call> params) {
  // Shared memory and pointers.
  constexpr Product kProduct = Traits::kProduct;
  const typename Lane::Call& p = params.call;
  const Layer& layer = p.layer;
  BlockShared<Traits>& shared = shared_memory<BlockShared<Traits>>();
  using Place = BlockPlace<Traits::kLaneRows>;
  constexpr int kSlots = Place::kSlots, kLaneRows = Place::kLaneRows;
  const Place place(layer, params.first_entry);
  const bool backwards = is_reversed(params, block_y());
  const int T = static_cast<int>(layer.steps), H = place.hidden;

  // Prologue: transposed weights, the final state's gradients, the last step's tape.
  const int steps = steps_of<Traits>(H);
  const int first_unit = thread_index() / 32 * kUnits;
  Weights<Traits> weights;
  weights.fill(shared.weights, steps, [&](int gate, int m, int k) -> uint32_t {
    const int unit = first_unit + m;
    return unit < H && k < H ? weight_bits<kProduct>(p.w_hh, place.entry, gate * H + k, unit) : 0;
  });
  clear(shared.operands);
  Lane lane;
  int t = backwards ? 0 : T - 1;
  const int direction = backwards ? 1 : -1;
  lane.start(p, place);
  lane.begin(p, place, t);
  int bits[kLaneRows];
  get_flags(bits, place, layer, t);
  lane.read(p, place, t, t + direction, T > 1);
  barrier();

  // One step, from the last taken by the forward scan to the first.
  FUSED_RNN_NO_UNROLL
  for (int step = 0; step < T; ++step) {
    const bool more = step + 1 < T;
    int next_bits[kLaneRows];
    get_flags(next_bits, place, layer, t + direction, more);
    if (step + kAhead < T) Lane::ahead(p, place, t + kAhead * direction);
    // (The operand of the first step is zero.)
    pass_back<Lane, Traits>(lane, weights, shared.operands[step % 2]);
    bool passes[kLaneRows];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      const int now = bits[i % kLaneRows], next = next_bits[i % kLaneRows];
      const bool live = (now & kEnded) == 0;
      const bool cut = backwards ? more && starts_segment(next) : starts_segment(now);
      const bool initial = !more || (next & kEnded) != 0;
      lane.compute(p, place, t, i, live, cut, initial);
      passes[i % kLaneRows] = !cut;
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < Traits::kGates; ++gate) {
        cuda::place(shared.operands[(step + 1) % 2], gate, place.column(i), place.unit(i),
                    place.is[i] && passes[i % kLaneRows] ? lane.d[gate][i] : 0.0f);
      }
    }
    lane.write(p, place, t);
    t += direction;
    FUSED_RNN_UNROLL
    for (int n = 0; n < kLaneRows; ++n) bits[n] = next_bits[n];
    if (more) lane.read(p, place, t, t + direction, step + 2 < T);
    barrier();
  }

  // Epilogue.
  pass_back<Lane, Traits>(lane, weights, shared.operands[T % 2]);
  FUSED_RNN_UNROLL
  for (int i = 0; i < kSlots; ++i) {
    if (place.is[i]) lane.finish(p, place, i);
  }
}

}  // namespace fused_rnn::cuda

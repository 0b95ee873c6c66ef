// Where rows and steps lie in memory, and reading and writing a lane's slots.
//
// A lane's slots are given by a Place: kSlots (unit, row) pairs, of kLaneUnits units and kLaneRows
// rows; unit_index(slot) says of which of the units, is[slot] whether row and unit exist.
#pragma once

#include "cuda/flags.cuh"
#include "cuda/products.cuh"

namespace fused_rnn::cuda {

// Element `at` of a tensor whose dtype is io or float32.
template <Product kProduct>
FUSED_RNN_DEVICE float get(const Rows& rows, int64_t at) {
  if constexpr (has_16_bits(kProduct)) {
    if (rows.dtype != DType::kFloat32) {
      return from_16<kProduct>(load(static_cast<const uint16_t*>(rows.data) + at));
    }
  }
  return load(static_cast<const float*>(rows.data) + at);
}

// Element `at` of a tensor of io.
template <Product kProduct>
FUSED_RNN_DEVICE void put_io(const Rows& rows, int64_t at, float value) {
  if constexpr (has_16_bits(kProduct)) {
    store(static_cast<uint16_t*>(rows.data) + at, to_16<kProduct>(value));
  } else {
    store(static_cast<float*>(rows.data) + at, value);
  }
}
FUSED_RNN_DEVICE void put(const Rows& rows, int64_t at, float value) {
  store(static_cast<float*>(rows.data) + at, value);
}
// Of a tensor of io or float32.
template <Product kProduct>
FUSED_RNN_DEVICE void put_state(const Rows& rows, int64_t at, float value) {
  if (rows.dtype == DType::kFloat32) return put(rows, at, value);
  put_io<kProduct>(rows, at, value);
}

// The bits of weight [row, k] of an entry, for the tensor cores or as float32.
template <Product kProduct>
FUSED_RNN_DEVICE uint32_t weight_bits(const Rows& w, int64_t entry, int64_t row, int64_t k) {
  const int64_t at = entry * w.entry + row * w.row + k;
  if constexpr (has_16_bits(kProduct)) {
    return load(static_cast<const uint16_t*>(w.data) + at);
  } else {
    return bits_of(load(static_cast<const float*>(w.data) + at));
  }
}

// A lane's slots in a block scan; see products.cuh.
struct BlockPlace {
  static constexpr int kSlots = 4, kLaneUnits = 2, kLaneRows = 2;
  int64_t entry, batch, hidden;
  int first_unit;   // the first slot's
  int tile_row;     // the first row's place in the tile
  bool is[kSlots];  // whether a slot's row and unit exist

  FUSED_RNN_DEVICE BlockPlace(const Layer& layer, int64_t first_entry) {
    const int lane = thread_index() % 32;
    entry = first_entry + block_y();
    batch = layer.batch, hidden = layer.hidden;
    tile_row = 2 * (lane % 4);
    first_unit = thread_index() / 32 * kUnits + lane / 4;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) is[i] = row(i % 2) < batch && unit(i) < hidden;
  }
  static FUSED_RNN_DEVICE constexpr int unit_index(int slot) { return slot / 2; }
  static FUSED_RNN_DEVICE constexpr int slot_of_unit(int n) { return 2 * n; }
  static FUSED_RNN_DEVICE int64_t first_row() { return static_cast<int64_t>(block_x()) * kRows; }
  FUSED_RNN_DEVICE int64_t row(int n) const { return first_row() + tile_row + n; }
  FUSED_RNN_DEVICE int unit(int slot) const { return first_unit + slot / 2 * 8; }
  FUSED_RNN_DEVICE int within(const Rows& rows, int slot) const {
    return (tile_row + slot % 2) * static_cast<int>(rows.row) + unit(slot);
  }
  // Where a slot's element lies at step t: what is the same for the whole block in 64 bits, the
  // rest in 32 (the launcher sees to it that eight rows lie within reach), which saves registers.
  FUSED_RNN_DEVICE int64_t at(const Rows& rows, int64_t t, int slot) const {
    return t * rows.step + first_row() * rows.row + entry * rows.entry + within(rows, slot);
  }
};

// What a lane reads of a tensor ahead of its use. As it lies in memory: a conversion would wait
// there and then for what has been asked for.
template <Product kProduct, int kSlots>
struct Ahead {
  uint32_t bits[kSlots];

  // At step t, `offset` elements on; zeros where a slot is not there, or there is nothing to read.
  template <class Place>
  FUSED_RNN_DEVICE void read(const Place& place, const Rows& rows, int64_t t, int64_t offset = 0,
                             bool there = true) {
    there = there && rows.data != nullptr;
    if constexpr (has_16_bits(kProduct)) {
      if (rows.dtype != DType::kFloat32) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kSlots; ++i) {
          bits[i] = 0;
          if (there && place.is[i]) {
            bits[i] = load(static_cast<const uint16_t*>(rows.data) + place.at(rows, t, i) + offset);
          }
        }
        return;
      }
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      bits[i] = 0;
      if (there && place.is[i]) {
        bits[i] = load(static_cast<const uint32_t*>(rows.data) + place.at(rows, t, i) + offset);
      }
    }
  }
  FUSED_RNN_DEVICE float get(const Rows& rows, int slot) const {
    if constexpr (has_16_bits(kProduct)) {
      if (rows.dtype != DType::kFloat32) {
        return from_16<kProduct>(static_cast<uint16_t>(bits[slot]));
      }
    }
    return float_of(bits[slot]);
  }
};

// The values of a lane's slots at step t, zero where a slot is not there or the tensor is absent.
template <Product kProduct, class Place>
FUSED_RNN_DEVICE void get_slots(float (&to)[Place::kSlots], const Place& place, const Rows& rows,
                                int64_t t) {
  Ahead<kProduct, Place::kSlots> ahead;
  ahead.read(place, rows, t);
  FUSED_RNN_UNROLL
  for (int i = 0; i < Place::kSlots; ++i) to[i] = ahead.get(rows, i);
}

// The flags of a lane's rows at step t: nothing where there are none, kEnded beyond the batch,
// so that rows which are not there do nothing.
template <class Place>
FUSED_RNN_DEVICE void get_flags(int (&bits)[Place::kLaneRows], const Place& place,
                                const Layer& layer, int64_t t, bool there = true) {
  FUSED_RNN_UNROLL
  for (int n = 0; n < Place::kLaneRows; ++n) {
    bits[n] = 0;
    if (place.row(n) >= place.batch) {
      bits[n] = kEnded;
    } else if (there && layer.flags != nullptr) {
      bits[n] = load(layer.flags + t * layer.batch + place.row(n));
    }
  }
}

// Brings a tile's rows of `width` elements at step t into L2.
FUSED_RNN_DEVICE void prefetch_rows(const BlockPlace& place, const Rows& rows, int64_t t,
                                    int64_t width) {
  if (rows.data == nullptr) return;
  const int size = rows.dtype == DType::kFloat32 ? 4 : 2;
  // (A row may begin anywhere in its first line; its last byte is asked for besides.)
  const int lines = static_cast<int>(width * size / 128) + 2;
  const int64_t first = static_cast<int64_t>(block_x()) * kRows;
  for (int i = thread_index(); i < kRows * lines; i += thread_count()) {
    const int64_t row = first + i % kRows;
    const int64_t at = i / kRows + 1 == lines ? width - 1 : i / kRows * (128 / size);
    if (row < place.batch && at < width) {
      const int64_t element = t * rows.step + row * rows.row + place.entry * rows.entry + at;
      prefetch(static_cast<const unsigned char*>(rows.data) + element * size);
    }
  }
}

}  // namespace fused_rnn::cuda

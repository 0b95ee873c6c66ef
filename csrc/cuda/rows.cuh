// Where rows and steps lie in memory, and reading and writing a lane's slots.
//
// A lane's slots are given by a Place: kSlots (unit, row) pairs, of kLaneUnits units and kLaneRows
// rows; unit_index(slot) says of which of the units, slot % kLaneRows of which of the rows,
// is[slot] whether row and unit exist.
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

// n strides, n being neither negative nor of more than 31 bits: two instructions instead of four.
FUSED_RNN_DEVICE int64_t times(int n, int64_t stride) {
  return static_cast<int64_t>(static_cast<uint32_t>(n)) * stride;
}

// A lane's slots in a block scan of eight rows, two a lane, or of four; see products.cuh.
template <int kLaneRows_>
struct BlockPlace {
  static constexpr int kLaneUnits = 2, kLaneRows = kLaneRows_, kSlots = kLaneUnits * kLaneRows;
  static constexpr int kBlockRows = 4 * kLaneRows;
  int entry, hidden;
  int first_unit;   // the first slot's
  bool is[kSlots];  // whether a slot's row and unit exist

  FUSED_RNN_DEVICE BlockPlace(const Layer& layer, int64_t first_entry)
      : batch_(static_cast<int>(layer.batch)) {
    const int lane = thread_index() % 32;
    entry = static_cast<int>(first_entry) + block_y();
    hidden = static_cast<int>(layer.hidden);
    first_unit = thread_index() / 32 * kUnits + lane / 4;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) is[i] = row_is(i % kLaneRows) && unit(i) < hidden;
  }
  static FUSED_RNN_DEVICE constexpr int unit_index(int slot) { return slot / kLaneRows; }
  static FUSED_RNN_DEVICE constexpr int slot_of_unit(int n) { return kLaneRows * n; }
  static FUSED_RNN_DEVICE int first_row() { return block_x() * kBlockRows; }
  // The lane's first row in the block, and the columns its rows have in an operand.
  static FUSED_RNN_DEVICE int lane_row() { return thread_index() % 4 * kLaneRows; }
  static FUSED_RNN_DEVICE int column(int slot) { return thread_index() % 4 * 2 + slot % kLaneRows; }
  FUSED_RNN_DEVICE int row(int n) const { return first_row() + lane_row() + n; }
  FUSED_RNN_DEVICE bool row_is(int n) const { return row(n) < batch_; }
  FUSED_RNN_DEVICE int unit(int slot) const { return first_unit + slot / kLaneRows * 8; }
  // Where the first slot's element lies at step t, and how far from there another's: what is the
  // same for the whole block in 64 bits, the rest in 32 (the launcher sees to it that eight rows
  // lie within reach), which saves registers.
  FUSED_RNN_DEVICE int64_t at(const Rows& rows, int t) const {
    return times(t, rows.step) + times(first_row(), rows.row) + times(entry, rows.entry) +
           (lane_row() * static_cast<int>(rows.row) + first_unit);
  }
  static FUSED_RNN_DEVICE int beyond(const Rows& rows, int slot) {
    return slot % kLaneRows * static_cast<int>(rows.row) + slot / kLaneRows * 8;
  }
  FUSED_RNN_DEVICE int batch() const { return batch_; }

 private:
  int batch_;
};

// What a lane reads of a tensor ahead of its use, kCount numbers for each slot, `hidden` elements
// apart. As it lies in memory: a conversion would wait there and then for what has been asked for.
template <Product kProduct, int kSlots, int kCount = 1>
struct Ahead {
  uint32_t bits[kCount][kSlots];

  // At step t; zeros where a slot is not there, or there is nothing to read.
  template <class Place>
  FUSED_RNN_DEVICE void read(const Place& place, const Rows& rows, int t, bool there = true) {
    if (!there || rows.data == nullptr) {
      FUSED_RNN_UNROLL
      for (int n = 0; n < kCount * kSlots; ++n) bits[n / kSlots][n % kSlots] = 0;
      return;
    }
    const int64_t at = place.at(rows, t);
    if constexpr (has_16_bits(kProduct)) {
      if (rows.dtype != DType::kFloat32) {
        return read(place, rows, static_cast<const uint16_t*>(rows.data) + at);
      }
    }
    read(place, rows, static_cast<const uint32_t*>(rows.data) + at);
  }
  FUSED_RNN_DEVICE float get(const Rows& rows, int slot, int n = 0) const {
    if constexpr (has_16_bits(kProduct)) {
      if (rows.dtype != DType::kFloat32) {
        return from_16<kProduct>(static_cast<uint16_t>(bits[n][slot]));
      }
    }
    return float_of(bits[n][slot]);
  }

 private:
  template <class Place, class T>
  FUSED_RNN_DEVICE void read(const Place& place, const Rows& rows, const T* at) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < kCount; ++n) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < kSlots; ++i) {
        bits[n][i] = 0;
        if (place.is[i]) bits[n][i] = load(at + place.beyond(rows, i));
      }
      at += place.hidden;
    }
  }
};

// The values of a lane's slots at step t, zero where a slot is not there or the tensor is absent.
template <Product kProduct, class Place>
FUSED_RNN_DEVICE void get_slots(float (&to)[Place::kSlots], const Place& place, const Rows& rows,
                                int t) {
  Ahead<kProduct, Place::kSlots> ahead;
  ahead.read(place, rows, t);
  FUSED_RNN_UNROLL
  for (int i = 0; i < Place::kSlots; ++i) to[i] = ahead.get(rows, i);
}

// Writes kCount numbers of each slot that is there, `hidden` elements apart, at step t.
template <int kCount, class Place, class Number>
FUSED_RNN_DEVICE void put_slots(const Place& place, const Rows& rows, int t, const Number& number) {
  float* at = static_cast<float*>(rows.data) + place.at(rows, t);
  FUSED_RNN_UNROLL
  for (int n = 0; n < kCount; ++n) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < Place::kSlots; ++i) {
      if (place.is[i]) store(at + place.beyond(rows, i), number(n, i));
    }
    at += place.hidden;
  }
}
// A number of each, of a tensor of io.
template <Product kProduct, class Place, class Number>
FUSED_RNN_DEVICE void put_io_slots(const Place& place, const Rows& rows, int t,
                                   const Number& number) {
  const int64_t at = place.at(rows, t);
  FUSED_RNN_UNROLL
  for (int i = 0; i < Place::kSlots; ++i) {
    if (place.is[i]) put_io<kProduct>(rows, at + place.beyond(rows, i), number(i));
  }
}

// The flags of a lane's rows at step t: nothing where there are none, kEnded beyond the batch,
// so that rows which are not there do nothing.
template <class Place>
FUSED_RNN_DEVICE void get_flags(int (&bits)[Place::kLaneRows], const Place& place,
                                const Layer& layer, int t, bool there = true) {
  FUSED_RNN_UNROLL
  for (int n = 0; n < Place::kLaneRows; ++n) bits[n] = place.row_is(n) ? 0 : kEnded;
  if (layer.flags == nullptr || !there) return;
  const uint8_t* at = layer.flags + times(t, layer.batch) + place.row(0);
  FUSED_RNN_UNROLL
  for (int n = 0; n < Place::kLaneRows; ++n) {
    if (place.row_is(n)) bits[n] = load(at + n);
  }
}

// Brings a tile's rows of `width` elements at step t into L2.
template <int kLaneRows>
FUSED_RNN_DEVICE void prefetch_rows(const BlockPlace<kLaneRows>& place, const Rows& rows, int t,
                                    int width) {
  constexpr int kBlockRows = BlockPlace<kLaneRows>::kBlockRows;
  if (rows.data == nullptr) return;
  const int size = rows.dtype == DType::kFloat32 ? 4 : 2;
  // (A row may begin anywhere in its first line; its last byte is asked for besides.)
  const int lines = width * size / 128 + 2;
  const int64_t first =
      times(t, rows.step) + times(place.first_row(), rows.row) + times(place.entry, rows.entry);
  for (int i = thread_index(); i < kBlockRows * lines; i += thread_count()) {
    const int row = i % kBlockRows, line = i / kBlockRows;
    const int at = line + 1 == lines ? width - 1 : line * (128 / size);
    if (place.first_row() + row < place.batch() && at < width) {
      const int64_t element = first + row * static_cast<int>(rows.row) + at;
      prefetch(static_cast<const unsigned char*>(rows.data) + element * size);
    }
  }
}

}  // namespace fused_rnn::cuda

// Batches of which rows end early, with the rows that live at a step side by side and nothing of
// those that have ended: sequences as types.h's Places has them.
#pragma once

#include <algorithm>
#include <cstring>
#include <list>
#include <numeric>
#include <vector>

#include "layer.h"

namespace fused_rnn::cpu {

// The longest rows first. A row's numbers do not depend on its place.
class LiveRows {
 public:
  LiveRows() = default;
  // flags [T, B]: a row that has ended stays so.
  LiveRows(const uint8_t* flags, int64_t steps, int64_t batch)
      : steps_(steps), batch_(batch), rows_(batch), first_(steps + 1), before_(batch + 1) {
    std::vector<int64_t> lengths(batch, 0);
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t b = 0; b < batch; ++b) {
        const bool live = !(flags[t * batch + b] & 1);
        STD_TORCH_CHECK(!live || lengths[b] == t, "flags: row ", b, " goes on at step ", t,
                        ", but has ended before");
        lengths[b] += live;
      }
    }
    std::iota(rows_.begin(), rows_.end(), 0);
    std::stable_sort(rows_.begin(), rows_.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t k = 0; k < batch; ++k) before_[k + 1] = before_[k] + lengths[rows_[k]];
    int64_t live = batch;
    for (int64_t t = 0; t < steps; ++t) {
      while (live > 0 && lengths[rows_[live - 1]] <= t) --live;
      first_[t + 1] = first_[t] + live;
    }
  }

  int64_t all() const { return before_.back(); }
  bool any_ends() const { return all() < steps_ * batch_; }
  Places places() const { return Places{first_.data(), before_.data()}; }

  // flags [T, B] in this order; null where no segment starts.
  const uint8_t* flags(const uint8_t* flags) {
    flags_.resize(all());
    uint8_t any = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      for (int64_t k = 0; k < live(t); ++k) {
        any |= flags_[first_[t] + k] = flags[t * batch_ + rows_[k]];
      }
    }
    return any ? flags_.data() : nullptr;
  }

  // What a tensor [T, B, S, n] has, in this order.
  Rows sequence(const Rows& from, int64_t stack, int64_t n) {
    if (from.data == nullptr) return from;
    const Rows to = new_sequence(from.dtype, stack, n);
    const int64_t size = size_of(from.dtype), bytes = n * size;
    each_step(stack * bytes, [&](int64_t t) {
      char* place = static_cast<char*>(to.data) + first_[t] * stack * bytes;
      for (int64_t k = 0; k < live(t); ++k) {
        const char* row = start(from) + (t * from.step + rows_[k] * from.row) * size;
        for (int64_t s = 0; s < stack; ++s, place += bytes) {
          std::memcpy(place, row + s * from.entry * size, bytes);
        }
      }
    });
    return to;
  }
  // Memory for a tensor [T, B, S, n] in this order.
  Rows new_sequence(DType dtype, int64_t stack, int64_t n) {
    return Rows{memory(all() * stack * n * size_of(dtype)), dtype, stack * n, stack * n, n};
  }
  // The other way, into [T, B, S * n]; zeros where rows have ended.
  void put_sequence(const Rows& from, void* to) const {
    const int64_t bytes = from.row * size_of(from.dtype);
    if (bytes == 0) return;
    each_step(bytes, [&](int64_t t) {
      const char* place = start(from) + first_[t] * bytes;
      for (int64_t k = 0; k < batch_; ++k, place += bytes) {
        char* row = static_cast<char*>(to) + (t * batch_ + rows_[k]) * bytes;
        k < live(t) ? std::memcpy(row, place, bytes) : std::memset(row, 0, bytes);
      }
    });
  }

  // What a tensor [S, B, n] has, in this order.
  Rows states(const Rows& from, int64_t stack, int64_t n) {
    if (from.data == nullptr) return from;
    const Rows to = new_states(from.dtype, stack, n);
    const int64_t size = size_of(from.dtype);
    char* place = static_cast<char*>(to.data);
    for (int64_t s = 0; s < stack; ++s) {
      for (int64_t k = 0; k < batch_; ++k, place += n * size) {
        std::memcpy(place, start(from) + (s * from.entry + rows_[k] * from.row) * size, n * size);
      }
    }
    return to;
  }
  Rows new_states(DType dtype, int64_t stack, int64_t n) {
    return Rows{memory(stack * batch_ * n * size_of(dtype)), dtype, 0, n, batch_ * n};
  }
  // The other way, into [S, B, n].
  void put_states(const Rows& from, int64_t stack, void* to) const {
    const int64_t bytes = from.row * size_of(from.dtype);
    const char* place = start(from);
    for (int64_t s = 0; s < stack; ++s) {
      for (int64_t k = 0; k < batch_; ++k, place += bytes) {
        std::memcpy(static_cast<char*>(to) + (s * batch_ + rows_[k]) * bytes, place, bytes);
      }
    }
  }

 private:
  static const char* start(const Rows& rows) { return static_cast<const char*>(rows.data); }
  int64_t live(int64_t t) const { return first_[t + 1] - first_[t]; }
  void* memory(int64_t bytes) { return memory_.emplace_back(bytes).at(); }
  // function(t) for every step, on threads where rows of so many bytes make it worth while.
  template <class Function>
  void each_step(int64_t bytes, const Function& function) const {
    constexpr int64_t kWorthThreads = 256 << 10;
    if (all() * bytes < kWorthThreads) {
      for (int64_t t = 0; t < steps_; ++t) function(t);
      return;
    }
    parallel_tasks(
        steps_, [](void* context, int64_t t) { (*static_cast<const Function*>(context))(t); },
        const_cast<Function*>(&function));
  }

  int64_t steps_ = 0, batch_ = 0;
  std::vector<int64_t> rows_, first_, before_;  // rows_: of each place
  std::vector<uint8_t> flags_;
  std::list<Buffer> memory_;
};

}  // namespace fused_rnn::cpu

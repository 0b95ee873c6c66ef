// Batches of which many rows end early, in an order in which the rows that live lie together.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "types.h"

namespace fused_rnn::cpu {

// The longest rows first, dealt to `parts` runs of rows as a scan shares them among threads: at
// every step the rows of a run that live are its first, and each run has as many. A row's numbers
// do not depend on its place.
class RowOrder {
 public:
  // products: multiply-adds of a step of a row, for each number of its input and output.
  RowOrder(const uint8_t* flags, int64_t steps, int64_t batch, double products, int64_t parts)
      : steps_(steps), batch_(batch) {
    std::vector<int64_t> lives(batch, 0), sorted(batch);
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t b = 0; b < batch; ++b) lives[b] += !(flags[t * batch + b] & 1);
    }
    const int64_t all = std::accumulate(lives.begin(), lives.end(), int64_t{0});
    const double ended = 1 - static_cast<double>(all) / (steps * batch);
    if (batch < 2 || ended * products < kWorthwhile) return;
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](int64_t a, int64_t b) { return lives[a] > lives[b]; });
    if (batch < kRowsOfPart * parts) parts = 1;
    const auto begin = [&](int64_t part) { return batch * part / parts; };
    rows_.resize(batch);
    int64_t next = 0;
    for (int64_t round = 0; next < batch; ++round) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t place = begin(part) + round;
        if (place < begin(part + 1)) rows_[place] = sorted[next++];
      }
    }
    flags_.resize(steps * batch);
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t k = 0; k < batch; ++k) flags_[t * batch + k] = flags[t * batch + rows_[k]];
    }
  }

  // Whether another order than the batch's is worth while; without, nothing below is to be called.
  explicit operator bool() const { return !rows_.empty(); }
  const uint8_t* flags() const { return flags_.data(); }

  // to [T, B, bytes], in this order, = from, `step` and `row` bytes apart; zeros where rows ended.
  void gather(const void* from, int64_t step, int64_t row, int64_t bytes, void* to) const {
    each_step([=, this](int64_t t) {
      for (int64_t k = 0; k < batch_; ++k) {
        char* place = static_cast<char*>(to) + (t * batch_ + k) * bytes;
        if (flags_[t * batch_ + k] & 1) {
          std::memset(place, 0, bytes);
        } else {
          std::memcpy(place, static_cast<const char*>(from) + t * step + rows_[k] * row, bytes);
        }
      }
    });
  }
  // The other way, from [T, B, bytes] in this order.
  void scatter(const void* from, int64_t bytes, void* to) const {
    each_step([=, this](int64_t t) {
      for (int64_t k = 0; k < batch_; ++k) {
        char* row = static_cast<char*>(to) + (t * batch_ + rows_[k]) * bytes;
        if (flags_[t * batch_ + k] & 1) {
          std::memset(row, 0, bytes);
        } else {
          std::memcpy(row, static_cast<const char*>(from) + (t * batch_ + k) * bytes, bytes);
        }
      }
    });
  }
  // Rows of states [n, B, bytes], into this order and back.
  void gather_states(const void* from, int64_t n, int64_t bytes, void* to) const {
    states(n, bytes, [&](int64_t place, int64_t row) {
      std::memcpy(static_cast<char*>(to) + place, static_cast<const char*>(from) + row, bytes);
    });
  }
  void scatter_states(const void* from, int64_t n, int64_t bytes, void* to) const {
    states(n, bytes, [&](int64_t place, int64_t row) {
      std::memcpy(static_cast<char*>(to) + row, static_cast<const char*>(from) + place, bytes);
    });
  }

 private:
  // Multiply-adds spared for a number that is copied there or back.
  static constexpr double kWorthwhile = 100;
  static constexpr int64_t kRowsOfPart = 6;  // fewer, and threads share out units, not rows

  template <class Function>
  void states(int64_t n, int64_t bytes, const Function& function) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < batch_; ++k) {
        function((i * batch_ + k) * bytes, (i * batch_ + rows_[k]) * bytes);
      }
    }
  }
  template <class Function>
  void each_step(const Function& function) const {
    parallel_tasks(
        steps_, [](void* context, int64_t t) { (*static_cast<const Function*>(context))(t); },
        const_cast<Function*>(&function));
  }

  int64_t steps_, batch_;
  std::vector<int64_t> rows_;  // of each place
  std::vector<uint8_t> flags_;
};

}  // namespace fused_rnn::cpu

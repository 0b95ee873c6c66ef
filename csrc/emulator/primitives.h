// cuda/primitives.cuh for the CPU; there it says what each name means.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/numbers.h"
#include "emulator/warp.h"

#define FUSED_RNN_DEVICE inline
#define FUSED_RNN_KERNEL(threads) inline void
#define FUSED_RNN_PARAMS const
#define FUSED_RNN_UNROLL
#define FUSED_RNN_NO_UNROLL

namespace fused_rnn::cuda {

FUSED_RNN_DEVICE int thread_index() { return emulator::machine.current->thread; }
FUSED_RNN_DEVICE int thread_count() { return emulator::machine.threads; }
FUSED_RNN_DEVICE int block_x() { return emulator::machine.current->block->x; }
FUSED_RNN_DEVICE int block_y() { return emulator::machine.current->block->y; }
FUSED_RNN_DEVICE int block_count_x() { return emulator::machine.grid_x; }

template <class T>
FUSED_RNN_DEVICE T& shared_memory() {
  return *reinterpret_cast<T*>(emulator::machine.current->block->shared.data());
}

template <class T>
constexpr bool has_access_size =
    sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

// (By memcpy: the same bytes are read and written as different types.)
template <class T>
FUSED_RNN_DEVICE T load(const T* at) {
  static_assert(has_access_size<T>);
  emulator::read(at, sizeof(T));
  T value;
  std::memcpy(static_cast<void*>(&value), at, sizeof(T));
  return value;
}
template <class T>
FUSED_RNN_DEVICE void store(T* at, T value) {
  static_assert(has_access_size<T>);
  emulator::write(at, sizeof(T));
  std::memcpy(static_cast<void*>(at), &value, sizeof(T));
}
FUSED_RNN_DEVICE void prefetch(const void*) {}

FUSED_RNN_DEVICE void barrier() { emulator::barrier(false); }
FUSED_RNN_DEVICE bool barrier_any(bool value) { return emulator::barrier(value); }
FUSED_RNN_DEVICE void warp_barrier() { emulator::warp_barrier(); }

FUSED_RNN_DEVICE float shuffle(float value, int lane) {
  return emulator::shuffle(emulator::Collective::kShuffle, value, lane);
}
FUSED_RNN_DEVICE float shuffle_xor(float value, int mask) {
  return emulator::shuffle(emulator::Collective::kShuffleXor, value, mask);
}

FUSED_RNN_DEVICE bool any(bool value) { return emulator::any(value); }

FUSED_RNN_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  emulator::load_matrix_x4(r, row);
}

FUSED_RNN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Collective::kMmaBf16, d, a, b);
}
FUSED_RNN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Collective::kMmaF16, d, a, b);
}
FUSED_RNN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Collective::kMmaTf32, d, a, b);
}

template <int kBytes>
FUSED_RNN_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::begin_copy(shared, global, kBytes);
}
FUSED_RNN_DEVICE void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
FUSED_RNN_DEVICE void copy_async_wait() {
  emulator::wait_for_copies(kPending);
}

FUSED_RNN_DEVICE uint32_t load_acquire(const uint32_t* at) {
  return emulator::atomic_load(at, true);
}
FUSED_RNN_DEVICE uint32_t load_relaxed(const uint32_t* at) {
  return emulator::atomic_load(at, false);
}
FUSED_RNN_DEVICE void store_release(uint32_t* at, uint32_t value) {
  emulator::atomic_store(at, value, true);
}
FUSED_RNN_DEVICE void store_relaxed(uint32_t* at, uint32_t value) {
  emulator::atomic_store(at, value, false);
}
FUSED_RNN_DEVICE uint32_t add_release(uint32_t* at, uint32_t value) {
  return emulator::atomic_add(at, value, true);
}
FUSED_RNN_DEVICE uint32_t add_relaxed(uint32_t* at, uint32_t value) {
  return emulator::atomic_add(at, value, false);
}
FUSED_RNN_DEVICE void fence() { emulator::fence(); }
FUSED_RNN_DEVICE uint32_t load_system(const uint32_t* at) {
  return emulator::atomic_load(at, false);
}
FUSED_RNN_DEVICE void store_release_system(uint32_t* at, uint32_t value) {
  emulator::atomic_store(at, value, true);
}

FUSED_RNN_DEVICE uint64_t now() { return ++emulator::machine.clock; }

FUSED_RNN_DEVICE uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
FUSED_RNN_DEVICE float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

FUSED_RNN_DEVICE uint32_t opaque(uint32_t bits) { return bits; }

FUSED_RNN_DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
FUSED_RNN_DEVICE double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
FUSED_RNN_DEVICE float exponential(float x) { return std::exp(x); }
FUSED_RNN_DEVICE double exponential(double x) { return std::exp(x); }
// (As far from the value as the hardware's may be, up or down by a bit of the argument.)
FUSED_RNN_DEVICE float exponential_2_fast(float x) {
  return emulator::approximate(std::exp2(x), x);
}
FUSED_RNN_DEVICE float reciprocal_fast(float x) { return emulator::approximate(1.0f / x, x); }
FUSED_RNN_DEVICE float reciprocal(float x) { return 1.0f / x; }
FUSED_RNN_DEVICE double reciprocal(double x) { return 1.0 / x; }
FUSED_RNN_DEVICE float hyperbolic_tangent(float x) { return std::tanh(x); }
FUSED_RNN_DEVICE double hyperbolic_tangent(double x) { return std::tanh(x); }

FUSED_RNN_DEVICE uint16_t to_bf16(float x) { return emulator::bf16_of(x); }
FUSED_RNN_DEVICE float from_bf16(uint16_t bits) { return emulator::float_of_bf16(bits); }
FUSED_RNN_DEVICE uint16_t to_f16(float x) { return emulator::f16_of(x); }
FUSED_RNN_DEVICE float from_f16(uint16_t bits) { return emulator::float_of_f16(bits); }

}  // namespace fused_rnn::cuda

// Every hardware primitive the kernels use, and the only file with inline PTX. Compiled by g++ with
// FUSED_RNN_EMULATOR the same names come from csrc/emulator/primitives.h, which runs them on the
// CPU and checks each access.
//
// Rules for kernels: memory that another thread can see is only touched through load, store,
// prefetch, load_matrix_x4, copy_async and the atomics; all threads of a warp call the warp's
// primitives together.
#pragma once

#include <cstdint>

#if defined(FUSED_RNN_EMULATOR)
#include "emulator/primitives.h"
#else

#define FUSED_RNN_DEVICE __device__ __forceinline__
// A kernel of at most `threads` threads a block; takes one struct by value, as FUSED_RNN_PARAMS.
#define FUSED_RNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSED_RNN_PARAMS const __grid_constant__
#define FUSED_RNN_UNROLL _Pragma("unroll")
#define FUSED_RNN_NO_UNROLL _Pragma("unroll 1")

namespace fused_rnn::cuda {

// Where a thread is. Blocks have one dimension of threads, grids two of blocks.

FUSED_RNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSED_RNN_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
FUSED_RNN_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FUSED_RNN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FUSED_RNN_DEVICE int block_count_x() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory as one struct, aligned to 16 bytes.
template <class T>
FUSED_RNN_DEVICE T& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

// Memory, shared or global. T: any type of 1, 2, 4, 8 or 16 bytes, aligned to its size.

template <class T>
FUSED_RNN_DEVICE T load(const T* at) {
  return *at;
}
template <class T>
FUSED_RNN_DEVICE void store(T* at, T value) {
  *at = value;
}
// Brings the line of a global address into L2; does nothing else, whatever lies there.
FUSED_RNN_DEVICE void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// All threads of the block have come here, and see what all wrote before.
FUSED_RNN_DEVICE void barrier() { __syncthreads(); }
// The same, and whether it is so for any of them.
FUSED_RNN_DEVICE bool barrier_any(bool value) { return __syncthreads_or(value) != 0; }
// As barrier(), of one warp.
FUSED_RNN_DEVICE void warp_barrier() { __syncwarp(); }

// The value of another lane; all 32 lanes take part.
FUSED_RNN_DEVICE float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
FUSED_RNN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether it is so in any lane; all 32 take part.
FUSED_RNN_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value) != 0; }

// Four 8 x 16-byte matrices from shared memory: lane l gives the address of row l % 8 of matrix
// l / 8, and gets of each matrix m, in r[m], the l % 4-th four bytes of row l / 4.
FUSED_RNN_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// d += a b on tensor cores, d [16, 8] in float32. With g = lane / 4 and q = lane % 4, a lane holds
//   d: (g, 2q) (g, 2q+1) (g+8, 2q) (g+8, 2q+1)
//   m16n8k16, 16 bits: a [16, 16]: (g, 2q..) (g+8, 2q..) (g, 2q+8..) (g+8, 2q+8..), two columns
//   each,
//                      the lower in the lower half; b [16, 8]: (2q.., g) (2q+8.., g), two rows each
//   m16n8k8, TF32:     a [16, 8]: (g, q) (g+8, q) (g, q+4) (g+8, q+4); b [8, 8]: (q, g) (q+4, g)
// (volatile, lest the compiler move it to where the lanes of a warp have parted.)
FUSED_RNN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSED_RNN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Reads the upper 19 bits of each operand.
FUSED_RNN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 4, 8 or 16 bytes from global to shared memory some time before the thread's wait for the
// group it was committed in returns; other threads see it after a barrier besides.
template <int kBytes>
FUSED_RNN_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(global), "n"(kBytes)
               : "memory");
}
FUSED_RNN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of the groups committed last are under way.
template <int kPending>
FUSED_RNN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Words other blocks may be using at the same time, at the scope of the GPU.

FUSED_RNN_DEVICE uint32_t load_acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
FUSED_RNN_DEVICE uint32_t load_relaxed(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
FUSED_RNN_DEVICE void store_release(uint32_t* at, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
FUSED_RNN_DEVICE void store_relaxed(uint32_t* at, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// Each gives the value before.
FUSED_RNN_DEVICE uint32_t add_release(uint32_t* at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}
FUSED_RNN_DEVICE uint32_t add_relaxed(uint32_t* at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}
FUSED_RNN_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Words that the host reads and writes meanwhile.
FUSED_RNN_DEVICE uint32_t load_system(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
FUSED_RNN_DEVICE void store_release_system(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Nanoseconds since some time in the past; in emulation a count of the calls.
FUSED_RNN_DEVICE uint64_t now() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// Bits of float32.

FUSED_RNN_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
FUSED_RNN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// The same bits, of which the compiler knows nothing: what follows is computed anew in every turn
// of a loop.
FUSED_RNN_DEVICE uint32_t opaque(uint32_t bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}

// Elementary functions, within an ulp or two.
FUSED_RNN_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FUSED_RNN_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
FUSED_RNN_DEVICE float exponential(float x) { return expf(x); }
FUSED_RNN_DEVICE double exponential(double x) { return exp(x); }
// 2^x and 1 / x of the special function unit, an instruction each: within 2^-22 of the value,
// subnormal numbers being zero.
FUSED_RNN_DEVICE float exponential_2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSED_RNN_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSED_RNN_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
FUSED_RNN_DEVICE double reciprocal(double x) { return 1.0 / x; }
FUSED_RNN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
FUSED_RNN_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

// float32 to 16 bits and back, to nearest even.
FUSED_RNN_DEVICE uint16_t to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
FUSED_RNN_DEVICE float from_bf16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
FUSED_RNN_DEVICE uint16_t to_f16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
FUSED_RNN_DEVICE float from_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace fused_rnn::cuda
#endif

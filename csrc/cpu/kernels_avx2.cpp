// The kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include "types.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSED_RNN_ISA avx2
#define FUSED_RNN_TABLE kKernelsAvx2
#define FUSED_RNN_REGISTERS 16
#define FUSED_RNN_SIMD "simd_avx2.inl"
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

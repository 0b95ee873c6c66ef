// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL), and AMX (bfloat16) where has_tiles() says
// so: no compiler uses it of its own accord.
#if defined(__x86_64__)
#include <immintrin.h>

#include "types.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC 12 finds its own undefined-vector intrinsics uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#if FUSED_RNN_HAS_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16")
#endif
#endif

#define FUSED_RNN_ISA avx512
#define FUSED_RNN_TABLE kKernelsAvx512
#define FUSED_RNN_REGISTERS 32
#define FUSED_RNN_SIMD "simd_avx512.inl"
#define FUSED_RNN_HAS_TILES FUSED_RNN_HAS_AMX
#include "kernels.inl"

#if defined(__clang__)
#if FUSED_RNN_HAS_AMX
#pragma clang attribute pop
#endif
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

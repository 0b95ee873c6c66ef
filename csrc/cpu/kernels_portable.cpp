// The kernels for any machine: 16-byte vectors of GCC's and clang's vector extensions.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "types.h"

#define FUSED_RNN_ISA portable
#define FUSED_RNN_TABLE kKernelsPortable
#if defined(__aarch64__)
#define FUSED_RNN_REGISTERS 32
#else
#define FUSED_RNN_REGISTERS 16
#endif
#define FUSED_RNN_SIMD "simd_portable.inl"
#include "kernels.inl"

// What the lanes of a warp compute together, in the layouts of the PTX ISA.
#pragma once

#include <cstdint>

#include "emulator/machine.h"

namespace fused_rnn::emulator {

// kind: one of the kMma.
void mma(Collective kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrix_x4(uint32_t (&r)[4], const void* row);
// kind: kShuffle, and lane the one whose value it is; kShuffleXor, and lane the mask.
float shuffle(Collective kind, float value, int lane);
bool any(bool value);

}  // namespace fused_rnn::emulator

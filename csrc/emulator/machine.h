// The state of a launch: blocks, warps and lanes, and which lane runs.
//
// A cluster would be a group of blocks that are resident together: its barrier a count beside
// Block::at_barrier, its members' shared memory further arenas for locate() in memory.cpp to look
// in. An mbarrier would be a word of shared memory with its own released knowledge, as the words of
// atomics have.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/fibers.h"
#include "emulator/knowledge.h"
#include "emulator/memory.h"

namespace fused_rnn::emulator {

struct Block;
struct Warp;

enum class Collective : uint8_t {
  kMmaBf16,
  kMmaF16,
  kMmaTf32,
  kLoadMatrix,
  kShuffle,
  kShuffleXor,
  kAny,
  kWarpBarrier,
};
const char* name_of(Collective kind);

// Of one lane's part in a collective.
struct Operands {
  void* out;
  const void* in[2];
  int lane;
};

struct Lane {
  Fiber fiber;
  uint32_t id;  // of all launches until ids run out; ids of a block and of a warp are neighbours
  int thread;
  Block* block;
  Warp* warp;
  bool started, ended;
  // Beyond what the block knows. pending: read by relaxed loads, known after a fence; fenced: what
  // relaxed stores pass on, from the last fence.
  KnowledgePtr extra, pending, fenced;
  CopyQueue copies;

  int number() const { return thread % 32; }
  uint32_t bit() const { return uint32_t{1} << (thread % 32); }
};

struct Warp {
  Block* block;
  int index;
  uint32_t floor;  // accesses of the warp's lanes dated earlier have happened before all of theirs
  // Lanes, a bit each; the one that runs is in none.
  uint32_t ready, yielded, at_collective, at_barrier, ended;
  Collective kind;  // of at_collective
  Operands operands[32];
};

struct Block {
  int x, y;
  bool running;
  uint32_t first_id, time, floor;  // floor: as Warp's, of the block's threads
  uint32_t ready_warps;            // a bit each
  int at_barrier, ended;
  bool any, any_of_last;  // of the values at the barrier, and at the last one passed
  size_t place;           // among the resident
  std::shared_ptr<Knowledge> known;
  SharedMemory shared;
  std::vector<Warp> warps;
  std::vector<Lane> lanes;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
  }
  int below(int n) { return static_cast<int>(static_cast<uint64_t>(next()) * n >> 32); }

 private:
  uint64_t state_;
};

enum class Order { kRandom, kLowest, kHighest, kNext, kFavourite, kVictim };

// How lanes are chosen, drawn for each launch.
struct Policy {
  Order lanes, warps;
  size_t chosen_place;  // kFavourite, kVictim
  int chosen_warp;
  int stay;  // collectives and waits, about, until another warp is chosen
  int run;   // accesses, about, until a lane is interrupted; 0: never
  int keep;  // of 8 atomic accesses, how many let their lane go on
};

struct Machine {
  Lane* current = nullptr;
  Lane* last = nullptr;  // current before the machine's own stack ran
  int budget = 0;        // accesses until tick()
  int threads = 0;
  uint32_t first_id = 0;  // of this launch
  bool check_races = true;
  bool failed = false;
  int stay_left = 0, budget_drawn = 0;
  int64_t idle_steps = 0;
  uint32_t launch_number = 0;
  uint64_t clock = 0;  // of now()
  int grid_x = 0;
  Random random{0};
  Policy policy{};
  Fiber main;
  std::string report;
  std::vector<std::unique_ptr<Block>> blocks;  // places for resident blocks, kept
  size_t resident = 0;                         // of them in this launch
  const Entry* entry = nullptr;
};

extern Machine machine;

inline void make_ready(Warp& warp, uint32_t lanes) {
  if (lanes == 0) return;
  warp.ready |= lanes;
  warp.block->ready_warps |= uint32_t{1} << warp.index;
}

// Ends the launch, from a lane or from the machine itself.
struct Stop {};
[[noreturn]] void fault(const std::string& report);

// "block (0, 0), warp 1, lane 3"
std::string name_of_thread(uint32_t id);

// What every lane that has not ended waits for.
std::string who_waits();

// For a launch that begins.
Policy draw_policy();
void draw_budget();

// Takes the lane to run next from the ready ones; null where there is none.
Lane* choose_lane();

// The current lane waits, already noted as waiting, until it is made ready.
void wait();
// Lets other lanes run where the policy wants it.
void yield();
// The current lane's budget is used up.
void tick();
// Something has happened that no endless loop of waiting does.
inline void progress() { machine.idle_steps = 0; }

// Whether the current lane is the last of its warp to come; otherwise all have come when it
// returns. The last one acts for all and then calls leave().
bool arrive(Collective kind);
void leave();

// Whether any of the block's threads came with true.
bool barrier(bool value);
void warp_barrier();

}  // namespace fused_rnn::emulator

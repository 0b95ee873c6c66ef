// Where lanes wait for one another, and who is missing when they wait in vain.

#include <string>

#include "emulator/machine.h"

namespace fused_rnn::emulator {

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kMmaBf16:
      return "mma_bf16";
    case Collective::kMmaF16:
      return "mma_f16";
    case Collective::kMmaTf32:
      return "mma_tf32";
    case Collective::kLoadMatrix:
      return "load_matrix_x4";
    case Collective::kShuffle:
      return "shuffle";
    case Collective::kShuffleXor:
      return "shuffle_xor";
    case Collective::kAny:
      return "any";
    case Collective::kWarpBarrier:
      return "warp_barrier";
  }
  return "?";
}

std::string name_of_thread(uint32_t id) {
  const uint32_t of_launch = id - machine.first_id;
  const int block = static_cast<int>(of_launch) / machine.threads;
  const int thread = static_cast<int>(of_launch) % machine.threads;
  return "block (" + std::to_string(block % machine.grid_x) + ", " +
         std::to_string(block / machine.grid_x) + ") warp " + std::to_string(thread / 32) +
         " lane " + std::to_string(thread % 32);
}

namespace {

// "lane 3", "lanes 0-4, 7"
std::string name_of_lanes(uint32_t bits) {
  std::string text = std::popcount(bits) == 1 ? "lane " : "lanes ";
  const char* separator = "";
  for (int i = 0; i < 32; ++i) {
    if (!(bits >> i & 1)) continue;
    int end = i;
    while (end + 1 < 32 && (bits >> (end + 1) & 1)) ++end;
    text += separator + std::to_string(i) + (end > i ? "-" + std::to_string(end) : "");
    separator = ", ";
    i = end;
  }
  return text;
}

std::string describe(const Warp& warp) {
  std::string text;
  const auto add = [&](uint32_t lanes, const std::string& what) {
    if (lanes != 0) text += (text.empty() ? "" : ", ") + name_of_lanes(lanes) + " " + what;
  };
  const Block& block = *warp.block;
  add(warp.at_barrier, "at barrier (" + std::to_string(block.at_barrier) + " of " +
                           std::to_string(machine.threads) + " arrived)");
  add(warp.at_collective, std::string("at ") + name_of(warp.kind) + " (" +
                              std::to_string(std::popcount(warp.at_collective)) +
                              " of 32 arrived)");
  add(warp.yielded, "between atomic accesses");
  add(warp.ended, "ended");
  const uint32_t rest = ~(warp.at_barrier | warp.at_collective | warp.yielded | warp.ended);
  add(rest, "not waiting");
  return text;
}

[[noreturn]] void diverged(const char* at) {
  const Lane& lane = *machine.current;
  fault("divergence: " + name_of_thread(lane.id) + " comes to " + at + " while of its warp " +
        describe(*lane.warp));
}

// What each lane has learnt from others, all of these now know.
KnowledgePtr learn_together(Lane* first, int count) {
  KnowledgePtr all;
  for (int i = 0; i < count; ++i) all = join(all, first[i].extra);
  return all;
}

}  // namespace

std::string who_waits() {
  std::string text;
  int lines = 0;
  // The current lane's block first, if there is one.
  const Lane* lane = machine.current;
  const size_t first = lane == nullptr ? 0 : lane->block->place;
  for (size_t i = 0; i < machine.resident; ++i) {
    const Block& block = *machine.blocks[(first + i) % machine.resident];
    if (!block.running) continue;
    for (const Warp& warp : block.warps) {
      if ((warp.at_barrier | warp.at_collective | warp.yielded) == 0) continue;
      if (++lines > 12) return text + "; ...";
      text += (text.empty() ? "" : "; ") + std::string("block (") + std::to_string(block.x) + ", " +
              std::to_string(block.y) + ") warp " + std::to_string(warp.index) + ": " +
              describe(warp);
    }
  }
  return text;
}

bool arrive(Collective kind) {
  Lane& lane = *machine.current;
  Warp& warp = *lane.warp;
  if ((warp.at_barrier | warp.ended) != 0 || (warp.at_collective != 0 && warp.kind != kind)) {
    diverged(name_of(kind));
  }
  warp.kind = kind;
  warp.at_collective |= lane.bit();
  if (warp.at_collective == ~uint32_t{0}) return true;
  wait();
  return false;
}

void leave() {
  Warp& warp = *machine.current->warp;
  warp.at_collective = 0;
  make_ready(warp, ~machine.current->bit());
}

void warp_barrier() {
  if (!arrive(Collective::kWarpBarrier)) return;
  Warp& warp = *machine.current->warp;
  Block& block = *warp.block;
  Lane* lanes = &block.lanes[warp.index * 32];
  if (const KnowledgePtr all = learn_together(lanes, 32)) {
    for (int i = 0; i < 32; ++i) lanes[i].extra = all;
  }
  warp.floor = ++block.time;
  leave();
}

bool barrier(bool value) {
  Lane& lane = *machine.current;
  Warp& warp = *lane.warp;
  Block& block = *lane.block;
  if (warp.at_collective != 0) diverged("barrier");
  if (block.ended != 0) {
    fault("deadlock: " + name_of_thread(lane.id) + " comes to barrier, where " +
          std::to_string(block.ended) + " threads of its block that have ended are missing; " +
          who_waits());
  }
  warp.at_barrier |= lane.bit();
  block.any |= value;
  if (++block.at_barrier < machine.threads) {
    wait();
    return block.any_of_last;
  }
  block.any_of_last = block.any;
  block.any = false;
  if (const KnowledgePtr all = learn_together(block.lanes.data(), machine.threads)) {
    // (Words may hold what the block knew so far.)
    block.known = std::make_shared<Knowledge>(*block.known);
    block.known->join(*all);
    for (Lane& each : block.lanes) each.extra = nullptr;
  }
  block.floor = ++block.time;
  block.at_barrier = 0;
  for (Warp& each : block.warps) {
    each.at_barrier = 0;
    make_ready(each, &each == &warp ? ~lane.bit() : ~uint32_t{0});
  }
  progress();
  return block.any_of_last;
}

}  // namespace fused_rnn::emulator

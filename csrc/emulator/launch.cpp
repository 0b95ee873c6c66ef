// A launch from its beginning to its end or its first fault.

#include <algorithm>
#include <bit>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulator/machine.h"

namespace fused_rnn::emulator {

Machine machine;

Options& options() {
  static Options all;
  return all;
}

void fault(const std::string& report) {
  // The first one is what went wrong.
  if (!machine.failed) machine.report = report;
  machine.failed = true;
  throw Stop{};
}

namespace {

void check_end(Lane& lane) {
  Warp& warp = *lane.warp;
  Block& block = *lane.block;
  if (!lane.copies.copies.empty()) {
    fault("copy never waited for: " + name_of_thread(lane.id) + " ends with " +
          std::to_string(lane.copies.copies.size()) + " copies (copy_async) under way");
  }
  if (warp.at_collective != 0) {
    fault("divergence: " + name_of_thread(lane.id) + " ends while others of its warp wait; " +
          who_waits());
  }
  if (block.at_barrier != 0) {
    fault("deadlock: " + name_of_thread(lane.id) + " ends while others wait at a barrier; " +
          who_waits());
  }
}

void run_lane() {
  Lane& lane = *machine.current;
  try {
    machine.entry->invoke(*machine.entry);
    check_end(lane);
  } catch (const Stop&) {
  } catch (const std::exception& error) {
    if (!machine.failed) machine.report = std::string("exception: ") + error.what();
    machine.failed = true;
  } catch (...) {
    if (!machine.failed) machine.report = "exception: of an unknown type";
    machine.failed = true;
  }
  lane.ended = true;
  lane.warp->ended |= lane.bit();
  progress();
  Lane* next = nullptr;
  if (!machine.failed) {
    machine.last = &lane;
    // (A block that has ended makes room for another, which takes the machine's own stack.)
    if (++lane.block->ended < machine.threads) {
      try {
        next = choose_lane();
      } catch (const Stop&) {
      }
    }
  }
  machine.current = next;
  if (next != nullptr) next->started = true;
  switch_fiber(lane.fiber, next == nullptr ? machine.main : next->fiber);
}

void start_block(Block& block, int index, const Launch& launch) {
  block.x = index % launch.grid_x, block.y = index / launch.grid_x;
  block.running = true;
  block.first_id = machine.first_id + static_cast<uint32_t>(index * launch.threads);
  block.time = 1, block.floor = 0;
  block.at_barrier = block.ended = 0;
  block.any = false;
  block.ready_warps = 0;
  block.known = std::make_shared<Knowledge>();
  block.shared.start(launch.shared_bytes);
  block.warps.assign(static_cast<size_t>(launch.threads / 32), Warp{});
  block.lanes.resize(static_cast<size_t>(launch.threads));
  for (int i = 0; i < launch.threads; ++i) {
    Lane& lane = block.lanes[i];
    lane.id = block.first_id + static_cast<uint32_t>(i);
    lane.thread = i;
    lane.block = &block;
    lane.warp = &block.warps[i / 32];
    lane.started = lane.ended = false;
    lane.extra = lane.pending = lane.fenced = nullptr;
    lane.copies = CopyQueue{};
    prepare_fiber(lane.fiber,
                  block.place * static_cast<size_t>(launch.threads) + static_cast<size_t>(i),
                  run_lane);
  }
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.block = &block, warp.index = static_cast<int>(i);
    make_ready(warp, ~uint32_t{0});
  }
  progress();
}

// Runs `lane` and whatever it chooses, until a block has ended, nothing can run or there is a
// fault.
void run_from(Lane* lane) {
  machine.current = lane;
  lane->started = true;
  switch_fiber(machine.main, lane->fiber);
  machine.current = nullptr;
}

void run_blocks(const Launch& launch) {
  std::vector<int> order(static_cast<size_t>(launch.grid_x) * launch.grid_y);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size() - 1; i > 0; --i) {
    std::swap(order[i], order[machine.random.below(static_cast<int>(i) + 1)]);
  }
  machine.resident = std::min(static_cast<size_t>(std::max(options().resident, 1)), order.size());
  if (launch.together) machine.resident = order.size();
  while (machine.blocks.size() < machine.resident) {
    machine.blocks.push_back(std::make_unique<Block>());
  }
  machine.policy = draw_policy();
  draw_budget();
  size_t begun = 0;
  for (size_t i = 0; i < machine.resident; ++i) {
    machine.blocks[i]->place = i;
    start_block(*machine.blocks[i], order[begun++], launch);
  }
  while (!machine.failed) {
    bool running = false;
    for (size_t i = 0; i < machine.resident; ++i) {
      Block& block = *machine.blocks[i];
      if (block.ended == launch.threads) {
        block.running = false;
        if (begun < order.size()) start_block(block, order[begun++], launch);
      }
      running = running || block.running;
    }
    if (!running) return;
    Lane* next = choose_lane();
    if (next == nullptr) fault("deadlock: " + who_waits());
    run_from(next);
  }
}

// The lanes under way leave their kernel by an exception, so that what they hold is destroyed.
void unwind() {
  for (size_t i = 0; i < machine.resident; ++i) {
    for (Lane& lane : machine.blocks[i]->lanes) {
      if (machine.blocks[i]->running && lane.started && !lane.ended) run_from(&lane);
    }
  }
}

}  // namespace

void run(const Launch& launch, const Entry& entry) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32 != 0 ||
      launch.grid_x < 1 || launch.grid_y < 1) {
    throw std::runtime_error("launch: 32 to 1024 threads, whole warps, and at least one block");
  }
  const uint64_t ids = static_cast<uint64_t>(launch.grid_x) * launch.grid_y * launch.threads;
  static uint32_t next_id = kFirstId;
  if (ids + kFirstId > kIdLimit) throw std::runtime_error("launch: too many threads");
  if (next_id + ids > kIdLimit) {
    forget_ids();
    next_id = kFirstId;
  }
  machine.first_id = next_id;
  next_id += static_cast<uint32_t>(ids);
  ++machine.launch_number;
  machine.random = Random(options().seed);
  machine.threads = launch.threads;
  machine.grid_x = launch.grid_x;
  machine.check_races = options().check_races;
  machine.failed = false;
  machine.report.clear();
  machine.last = machine.current = nullptr;
  machine.idle_steps = 0;
  machine.stay_left = 0;
  machine.entry = &entry;
  start_memory();
  try {
    run_blocks(launch);
  } catch (const Stop&) {
  }
  if (machine.failed) {
    unwind();
    throw std::runtime_error(machine.report);
  }
}

}  // namespace fused_rnn::emulator

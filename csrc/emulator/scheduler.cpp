// Which lane runs next.

#include <algorithm>
#include <bit>

#include "emulator/machine.h"

namespace fused_rnn::emulator {

namespace {

int choose_bit(uint32_t bits, Order order, int last) {
  int turn = 0;
  switch (order) {
    case Order::kLowest:
      return std::countr_zero(bits);
    case Order::kHighest:
      return 31 - std::countl_zero(bits);
    case Order::kNext:
      turn = (last + 1) & 31;
      break;
    default:
      turn = static_cast<int>(machine.random.next() & 31);
  }
  return (std::countr_zero(std::rotr(bits, turn)) + turn) & 31;
}

uint32_t others_ready(const Block& block) {
  const Policy& policy = machine.policy;
  const bool victim = policy.warps == Order::kVictim && block.place == policy.chosen_place;
  return victim ? block.ready_warps & ~(uint32_t{1} << policy.chosen_warp) : block.ready_warps;
}

Warp* choose_warp_of_ready() {
  const Policy& policy = machine.policy;
  const size_t count = machine.resident;
  if (policy.warps == Order::kFavourite) {
    Block& block = *machine.blocks[policy.chosen_place];
    if (block.ready_warps >> policy.chosen_warp & 1) return &block.warps[policy.chosen_warp];
  }
  // Blocks are tried from one on, cyclically; a victim's warp only where there is nothing else.
  size_t first = 0;
  bool down = false;
  int last_warp = 31;
  switch (policy.warps) {
    case Order::kLowest:
      break;
    case Order::kHighest:
      first = count - 1, down = true;
      break;
    case Order::kNext:
      if (machine.last != nullptr) {
        // A block's turn ends with its last warp.
        const Warp& warp = *machine.last->warp;
        const bool more = warp.index < 31 && warp.block->ready_warps >> (warp.index + 1) != 0;
        first = (warp.block->place + (more ? 0 : 1)) % count;
        if (more) last_warp = warp.index;
      }
      break;
    default:
      first = static_cast<size_t>(machine.random.below(static_cast<int>(count)));
  }
  for (const bool all : {false, true}) {
    for (size_t i = 0; i < count; ++i) {
      Block& block = *machine.blocks[down ? first - i : (first + i) % count];
      const uint32_t bits = all ? block.ready_warps : others_ready(block);
      if (bits != 0) return &block.warps[choose_bit(bits, policy.warps, last_warp)];
    }
  }
  return nullptr;
}

// Lanes that gave way run again when no others can.
bool recall_yielded() {
  bool any = false;
  for (size_t i = 0; i < machine.resident; ++i) {
    for (Warp& warp : machine.blocks[i]->warps) {
      any = any || warp.yielded != 0;
      make_ready(warp, warp.yielded);
      warp.yielded = 0;
    }
  }
  return any;
}

int draw_about(int mean) { return mean == 0 ? 0 : 1 + machine.random.below(2 * mean); }

void resume(Lane* next) {
  Lane* me = machine.current;
  machine.last = me;
  if (next != me) {
    machine.current = next;
    if (next != nullptr) next->started = true;
    switch_fiber(me->fiber, next == nullptr ? machine.main : next->fiber);
  }
  if (machine.failed) throw Stop{};
}

}  // namespace

Policy draw_policy() {
  Random& random = machine.random;
  Policy policy{};
  constexpr Order kLanes[] = {Order::kRandom, Order::kLowest, Order::kHighest, Order::kNext};
  constexpr Order kWarps[] = {Order::kRandom, Order::kLowest,    Order::kHighest,
                              Order::kNext,   Order::kFavourite, Order::kVictim};
  constexpr int kStay[] = {0, 8, 64, 1 << 20}, kRun[] = {0, 0, 40, 1000}, kKeep[] = {0, 0, 4, 7};
  policy.lanes = kLanes[random.below(4)];
  policy.warps = kWarps[random.below(6)];
  policy.stay = kStay[random.below(4)];
  policy.run = kRun[random.below(4)];
  policy.keep = kKeep[random.below(4)];
  policy.chosen_place = static_cast<size_t>(random.below(static_cast<int>(machine.resident)));
  policy.chosen_warp = random.below(machine.threads / 32);
  return policy;
}

void draw_budget() {
  // Also without interruptions tick() is to see that something happens.
  constexpr int kMost = 4096;
  machine.budget = machine.policy.run == 0 ? kMost : draw_about(machine.policy.run);
  machine.budget_drawn = machine.budget;
}

Lane* choose_lane() {
  if (++machine.idle_steps > options().step_limit) {
    fault("livelock: " + std::to_string(options().step_limit) +
          " steps without a barrier passed, a word changed or a lane ended; " + who_waits());
  }
  Warp* warp = machine.last == nullptr ? nullptr : machine.last->warp;
  if (warp == nullptr || warp->ready == 0 || --machine.stay_left < 0) {
    machine.stay_left = draw_about(machine.policy.stay);
    warp = choose_warp_of_ready();
    if (warp == nullptr && recall_yielded()) warp = choose_warp_of_ready();
    if (warp == nullptr) return nullptr;
  }
  const int last = machine.last == nullptr ? 31 : machine.last->number();
  const int number = choose_bit(warp->ready, machine.policy.lanes, last);
  warp->ready &= ~(uint32_t{1} << number);
  if (warp->ready == 0) warp->block->ready_warps &= ~(uint32_t{1} << warp->index);
  return &warp->block->lanes[warp->index * 32 + number];
}

void wait() {
  machine.last = machine.current;
  resume(choose_lane());
}

void yield() {
  Lane& me = *machine.current;
  ++machine.idle_steps;
  if (machine.random.below(8) < machine.policy.keep) return;
  me.warp->yielded |= me.bit();
  wait();
}

void tick() {
  machine.idle_steps += machine.budget_drawn / 16;
  draw_budget();
  if (machine.policy.run == 0 && machine.idle_steps <= options().step_limit) return;
  make_ready(*machine.current->warp, machine.current->bit());
  wait();
}

}  // namespace fused_rnn::emulator

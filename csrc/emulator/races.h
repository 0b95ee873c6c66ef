// Whether two accesses are ordered, cell by cell. Used by memory.cpp and races.cpp alone.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/machine.h"

namespace fused_rnn::emulator {

// "shared + 0x10", or the nearest range's name and the distance.
std::string name_of_address(uintptr_t at);

// The cells of a word of global memory.
Cell* locate_word(const uint32_t* at, const char* verb);

// Whether what thread `id` did at `time` has happened before the present of the current lane.
bool happened_before(uint32_t id, uint32_t time);

[[noreturn]] void report_race(uint32_t id, const char* verb, uintptr_t at, uint32_t other,
                              const char* other_verb);

// The parts of checks that are rarely needed. check_writer: `cell` has been written by somebody
// else in this launch, or holds nothing. note_reader: somebody else has read it since.
// check_readers: the cell's readers are forgotten next.
void check_writer(const Cell& cell, uintptr_t at, const char* verb, bool reads);
void check_readers(const Cell& cell, uintptr_t at, const char* verb);
void note_reader(Cell& cell);
// The atomics that have touched the word of a cell; plain accesses conflict with them.
void check_atomics(Cell& cell, uintptr_t at, bool writes);
void forget_atomics(Cell& cell, uintptr_t at);

inline void read_cell(Cell& cell, uintptr_t at) {
  const Lane& me = *machine.current;
  if (cell.writer != me.id && cell.writer != kLongAgo) {
    if (cell.writer & kAtomic) check_atomics(cell, at, false);
    // The most frequent case first: written by the block before its last barrier.
    if (cell.writer - me.block->first_id >= static_cast<uint32_t>(machine.threads) ||
        cell.write_time >= me.block->floor) {
      check_writer(cell, at, "reads", true);
    }
  }
  if (cell.reader == me.id || cell.reader < machine.first_id) {
    cell.reader = me.id, cell.read_time = me.block->time;
  } else {
    note_reader(cell);
  }
}

inline void write_cell(Cell& cell, uintptr_t at) {
  const Lane& me = *machine.current;
  if (cell.writer & kAtomic) {
    check_atomics(cell, at, true);
    forget_atomics(cell, at);
  }
  if (cell.writer >= machine.first_id || cell.writer == kInFlight) {
    if (cell.writer != me.id) check_writer(cell, at, "writes", false);
  }
  if (cell.reader >= machine.first_id && cell.reader != me.id) check_readers(cell, at, "writes");
  cell = Cell{me.id, me.block->time, 0, 0};
}

}  // namespace fused_rnn::emulator

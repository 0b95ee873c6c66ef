#include "emulator/memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "emulator/machine.h"
#include "emulator/races.h"

namespace fused_rnn::emulator {

namespace {

struct Free {
  void operator()(void* at) const { std::free(at); }
};

// [begin, end), disjoint from the others.
struct Range {
  uintptr_t begin, end;
  std::unique_ptr<Cell[], Free> cells;  // of the pairs from begin / 2 on
  std::string name;

  size_t cell_count() const { return (end + 1) / 2 - begin / 2; }
  Cell* cell(uintptr_t at) const { return &cells[at / 2 - begin / 2]; }
};

std::vector<Range> ranges;  // by address
size_t last_range = 0;

Range make_range(uintptr_t begin, uintptr_t end, const char* name) {
  Range range{begin, end, nullptr, name};
  // Pages of zeros, which are cells of memory written long ago.
  range.cells.reset(static_cast<Cell*>(std::calloc(range.cell_count(), sizeof(Cell))));
  if (range.cells == nullptr) throw std::bad_alloc();
  return range;
}

const Range* find_range(uintptr_t at, size_t bytes) {
  if (last_range < ranges.size()) {
    const Range& range = ranges[last_range];
    if (at >= range.begin && at + bytes <= range.end) return &range;
  }
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), at,
                                      [](uintptr_t a, const Range& r) { return a < r.begin; });
  if (after == ranges.begin()) return nullptr;
  last_range = static_cast<size_t>(after - ranges.begin()) - 1;
  const Range& range = ranges[last_range];
  return at + bytes <= range.end ? &range : nullptr;
}

std::string hexadecimal(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

[[noreturn]] void bad_access(const char* kind, const char* verb, uintptr_t at, size_t bytes) {
  fault(std::string(kind) + ": " + name_of_thread(machine.current->id) + " " + verb + " " +
        std::to_string(bytes) + " bytes at " + name_of_address(at));
}

// The cells of an access, which has to lie in shared memory or an allowed range.
Cell* locate(uintptr_t at, size_t bytes, const char* verb) {
  if (at % bytes != 0) bad_access("misaligned", verb, at, bytes);
  SharedMemory& shared = machine.current->block->shared;
  const uintptr_t offset = at - reinterpret_cast<uintptr_t>(shared.data());
  if (offset < shared.bytes() && offset + bytes <= shared.bytes()) {
    return shared.cells() + offset / 2;
  }
  const Range* range = find_range(at, bytes);
  if (range == nullptr) bad_access("out of bounds", verb, at, bytes);
  return range->cell(at);
}

uintptr_t number(const void* at) { return reinterpret_cast<uintptr_t>(at); }

size_t cells_of(size_t bytes) { return (bytes + 1) / 2; }

void count_access() {
  if (--machine.budget <= 0) tick();
}

}  // namespace

std::string name_of_address(uintptr_t at) {
  std::string name;
  uint64_t least = UINT64_MAX;
  const auto consider = [&](uintptr_t begin, uintptr_t end, const std::string& range) {
    const uint64_t distance = at < begin ? begin - at : at >= end ? at - end + 1 : 0;
    if (distance >= least) return;
    least = distance;
    name = at < begin ? range + " - " + hexadecimal(begin - at)
                      : range + " + " + hexadecimal(at - begin);
  };
  if (machine.current != nullptr) {
    const SharedMemory& shared = machine.current->block->shared;
    consider(number(shared.data()), number(shared.data()) + shared.bytes(), "shared");
  }
  for (const Range& range : ranges) consider(range.begin, range.end, range.name);
  return name;
}

void allow(const void* data, size_t bytes, bool written, const char* name) {
  if (data == nullptr || bytes == 0) return;
  if (machine.current != nullptr) throw std::logic_error("memory is allowed before a launch");
  uintptr_t begin = number(data), end = begin + bytes;
  const auto overlaps = [&](const Range& r) { return r.begin < end && begin < r.end; };
  uintptr_t all_begin = begin, all_end = end;
  for (const Range& r : ranges) {
    if (!overlaps(r)) continue;
    all_begin = std::min(all_begin, r.begin), all_end = std::max(all_end, r.end);
  }
  Range all = make_range(all_begin, all_end, name);
  if (!written) {
    for (uintptr_t at = begin / 2 * 2; at < end; at += 2) all.cell(at)->writer = kUnwritten;
  }
  // What earlier calls cover stays as it is, but for what now holds values.
  std::vector<std::pair<uintptr_t, uintptr_t>> covered;
  for (const Range& r : ranges) {
    if (!overlaps(r)) continue;
    covered.emplace_back(r.begin, r.end);
    for (uintptr_t at = r.begin / 2 * 2; at < r.end; at += 2) {
      Cell cell = *r.cell(at);
      if (written && cell.writer == kUnwritten && at + 1 >= begin && at < end) {
        cell.writer = kLongAgo;
      }
      *all.cell(at) = cell;
    }
  }
  if (!written) {
    uintptr_t at = begin;
    for (const auto& [from, to] : covered) {
      if (at < from) std::memset(reinterpret_cast<void*>(at), 0xff, from - at);
      at = std::max(at, to);
    }
    if (at < end) std::memset(reinterpret_cast<void*>(at), 0xff, end - at);
  }
  std::erase_if(ranges, overlaps);
  const auto place = std::lower_bound(ranges.begin(), ranges.end(), all.begin,
                                      [](const Range& r, uintptr_t b) { return r.begin < b; });
  ranges.insert(place, std::move(all));
}

void forget() { ranges.clear(); }

void forget_ids() {
  for (Range& range : ranges) {
    for (size_t i = 0; i < range.cell_count(); ++i) {
      const bool unwritten = range.cells[i].writer == kUnwritten;
      range.cells[i] = Cell{unwritten ? kUnwritten : kLongAgo, 0, 0, 0};
    }
  }
}

void SharedMemory::start(size_t bytes) {
  // (Far from other memory, so that what lies a little beyond is named after it.)
  constexpr size_t kAlignment = 128, kAround = 4096;
  storage_.resize(bytes + kAlignment + 2 * kAround);
  const uintptr_t at = (number(storage_.data()) + kAround) / kAlignment * kAlignment + kAlignment;
  data_ = reinterpret_cast<unsigned char*>(at);
  bytes_ = bytes;
  if (bytes > 0) std::memset(data_, 0xff, bytes);
  cells_.assign(cells_of(bytes), Cell{kUnwritten, 0, 0, 0});
}

void read(const void* at, size_t bytes) {
  count_access();
  Cell* cells = locate(number(at), bytes, "reads");
  for (size_t i = 0; i < cells_of(bytes); ++i) read_cell(cells[i], number(at) + 2 * i);
}

void write(void* at, size_t bytes) {
  count_access();
  Cell* cells = locate(number(at), bytes, "writes");
  for (size_t i = 0; i < cells_of(bytes); ++i) write_cell(cells[i], number(at) + 2 * i);
}

void read_shared(const void* at, size_t bytes) {
  if (!machine.current->block->shared.holds(number(at))) {
    bad_access("out of bounds", "reads from what has to be shared memory", number(at), bytes);
  }
  read(at, bytes);
}

void begin_copy(void* shared, const void* global, int bytes) {
  count_access();
  Lane& lane = *machine.current;
  if (!lane.block->shared.holds(number(shared))) {
    bad_access("out of bounds", "copies to what has to be shared memory", number(shared), bytes);
  }
  if (lane.block->shared.holds(number(global))) {
    bad_access("out of bounds", "copies from what has to be global memory", number(global), bytes);
  }
  Cell* to = locate(number(shared), bytes, "writes");
  Cell* from = locate(number(global), bytes, "reads");
  Copy copy{static_cast<unsigned char*>(shared),
            static_cast<const unsigned char*>(global),
            bytes,
            lane.copies.committed,
            {}};
  for (size_t i = 0; i < cells_of(bytes); ++i) {
    read_cell(from[i], number(global) + 2 * i);
    copy.source[i] = from[i];
    write_cell(to[i], number(shared) + 2 * i);
    to[i].writer = kInFlight, to[i].write_time = lane.id;
  }
  lane.copies.copies.push_back(copy);
}

void commit_copies() { ++machine.current->copies.committed; }

void wait_for_copies(int pending) {
  Lane& lane = *machine.current;
  CopyQueue& queue = lane.copies;
  size_t done = 0;
  for (; done < queue.copies.size(); ++done) {
    const Copy& copy = queue.copies[done];
    if (copy.group + pending >= queue.committed) break;
    Cell* from = locate(number(copy.from), copy.bytes, "reads");
    Cell* to = locate(number(copy.to), copy.bytes, "writes");
    for (size_t i = 0; i < cells_of(copy.bytes); ++i) {
      // An order that puts a write between the copy's beginning and its end is a race all the same.
      if (machine.check_races && (from[i].writer != copy.source[i].writer ||
                                  from[i].write_time != copy.source[i].write_time)) {
        report_race(lane.id, "copies (copy_async)", number(copy.from) + 2 * i,
                    from[i].writer & kIdMask, "written");
      }
      read_cell(from[i], number(copy.from) + 2 * i);
      to[i] = Cell{lane.id, lane.block->time, 0, 0};
    }
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + done);
}

Cell* locate_word(const uint32_t* at, const char* verb) {
  if (machine.current->block->shared.holds(number(at))) {
    bad_access("out of bounds", verb, number(at), 4);
  }
  return locate(number(at), 4, verb);
}

}  // namespace fused_rnn::emulator

#include "emulator/races.h"

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator/memory.h"

namespace fused_rnn::emulator {

namespace {

// Readers of a cell in several warps: single lanes, or several lanes of a warp (kSeveral), each
// with the time of the last. Kept for the cell once it has had one.
struct Readers {
  uint32_t block, last;  // the first id of their block, or 0 for more than one; the latest time
  std::vector<std::pair<uint32_t, uint32_t>> list;
};

std::vector<Readers> sets;
std::vector<uint32_t> free_sets;

// (A set keeps its list's memory for the next cell.)
uint32_t new_set() {
  if (free_sets.empty()) {
    sets.emplace_back();
    sets.back().list.reserve(16);
    return static_cast<uint32_t>(sets.size() - 1);
  }
  const uint32_t index = free_sets.back();
  free_sets.pop_back();
  sets[index].list.clear();
  return index;
}

// A word atomics have touched: what its value passes on, and who has touched it, when.
struct Word {
  struct Times {
    bool reads, writes;
    uint32_t read, write;
  };
  KnowledgePtr released;
  std::unordered_map<uint32_t, Times> threads;
};

std::unordered_map<uintptr_t, Word> words;

uint32_t block_of(uint32_t id) {
  const uint32_t threads = static_cast<uint32_t>(machine.threads);
  return id - (id - machine.first_id) % threads;
}

// Of several lanes of a warp, its first given.
bool warp_happened_before(uint32_t warp, uint32_t time) {
  const Lane& me = *machine.current;
  const uint32_t block = block_of(warp);
  if (block == me.block->first_id) {
    if (time < me.block->floor) return true;
    if (warp == me.id / 32 * 32 && time < me.warp->floor) return true;
  }
  const auto covers = [&](const Knowledge* known) {
    return known != nullptr &&
           (known->covers(Scope::kBlock, block, time) || known->covers(Scope::kWarp, warp, time));
  };
  return covers(me.block->known.get()) || covers(me.extra.get());
}

bool reader_happened_before(uint32_t reader, uint32_t time) {
  const uint32_t id = reader & kIdMask;
  if (!(reader & kSeveral)) return happened_before(id, time);
  return id < machine.first_id || warp_happened_before(id, time);
}

bool is_set(const Cell& cell) { return (cell.reader & kSet) != 0; }

// Some launch's sets are gone when the next begins.
bool is_old_set(const Cell& cell) { return cell.read_time != machine.launch_number; }

// The knowledge a release of the current lane passes on: all it has done and all it knows. What it
// does from now on is dated later.
KnowledgePtr everything_known() {
  Lane& me = *machine.current;
  auto all = std::make_shared<Knowledge>(*me.block->known);
  if (me.extra != nullptr) all->join(*me.extra);
  const uint32_t now = ++me.block->time;
  all->add(Scope::kBlock, me.block->first_id, me.block->floor);
  all->add(Scope::kWarp, me.id / 32 * 32, me.warp->floor);
  all->add(Scope::kThread, me.id, now);
  all->prune(block_of);
  return all;
}

// Checks an atomic access against plain ones, and gives its word's record.
Word::Times& touch(Word& word, Cell* cells, uintptr_t at, const char* verb, bool reads,
                   bool writes) {
  const Lane& me = *machine.current;
  for (int i = 0; i < 2; ++i) {
    Cell& cell = cells[i];

    cell.writer &= ~kAtomic;
    if (reads && cell.writer == kUnwritten) check_writer(cell, at, verb, true);
    if (cell.writer >= machine.first_id && cell.writer != me.id) {
      check_writer(cell, at, verb, false);
    }
    if (writes) {
      if (cell.reader >= machine.first_id && cell.reader != me.id) check_readers(cell, at, verb);
      cell.reader = 0, cell.read_time = 0;
      if (cell.writer == kUnwritten) cell.writer = kLongAgo;
    }
    cell.writer |= kAtomic;
  }
  Word::Times& times = word.threads[me.id];
  if (reads) times.reads = true, times.read = me.block->time;
  if (writes) times.writes = true, times.write = me.block->time;
  return times;
}

void acquire_from(Lane& me, const KnowledgePtr& released) { me.extra = join(me.extra, released); }

}  // namespace

bool happened_before(uint32_t id, uint32_t time) {
  const Lane& me = *machine.current;
  if (id < machine.first_id || id == me.id) return true;
  if (id - me.block->first_id < static_cast<uint32_t>(machine.threads)) {
    if (time < me.block->floor) return true;
    if (id / 32 == me.id / 32 && time < me.warp->floor) return true;
  }
  const uint32_t block = block_of(id), warp = id / 32 * 32;
  const auto covers = [&](const Knowledge* known) {
    return known != nullptr &&
           (known->covers(Scope::kBlock, block, time) || known->covers(Scope::kWarp, warp, time) ||
            known->covers(Scope::kThread, id, time));
  };
  return covers(me.block->known.get()) || covers(me.extra.get());
}

void report_race(uint32_t id, const char* verb, uintptr_t at, uint32_t other,
                 const char* other_verb) {
  const std::string whom =
      other >= machine.first_id ? name_of_thread(other) : std::string("somebody");
  fault("race: " + name_of_thread(id) + " " + verb + " " + name_of_address(at) + ", " + other_verb +
        " by " + whom + " with nothing between that orders them");
}

void check_writer(const Cell& cell, uintptr_t at, const char* verb, bool reads) {
  const uint32_t writer = cell.writer & kIdMask, me = machine.current->id;
  if (writer == kInFlight) {
    fault("copy in flight: " + name_of_thread(me) + " " + verb + " " + name_of_address(at) +
          ", where a copy_async of " + name_of_thread(cell.write_time) + " is under way");
  }
  if (writer == kUnwritten) {
    if (reads) {
      fault("read before written: " + name_of_thread(me) + " " + verb + " " + name_of_address(at));
    }
    return;
  }
  if (machine.check_races && !happened_before(writer, cell.write_time)) {
    report_race(me, verb, at, writer, "written");
  }
}

void check_readers(const Cell& cell, uintptr_t at, const char* verb) {
  if (!machine.check_races) return;
  const uint32_t me = machine.current->id;
  if (is_set(cell)) {
    if (is_old_set(cell)) return;
    const Block& block = *machine.current->block;
    const Readers& set = sets[cell.reader & kIdMask];
    if (set.block != block.first_id || set.last >= block.floor) {
      for (const auto& [reader, time] : set.list) {
        if (!reader_happened_before(reader, time)) {
          report_race(me, verb, at, reader & kIdMask, "read");
        }
      }
    }
    free_sets.push_back(cell.reader & kIdMask);
  } else if (!reader_happened_before(cell.reader, cell.read_time)) {
    report_race(me, verb, at, cell.reader & kIdMask, "read");
  }
}

void note_reader(Cell& cell) {
  if (!machine.check_races) return;
  const Lane& me = *machine.current;
  const uint32_t block = me.block->first_id, now = me.block->time, warp = me.id / 32 * 32;
  const uint32_t floor = std::max(me.block->floor, me.warp->floor);  // for those of the warp
  if (is_set(cell)) {
    if (is_old_set(cell)) {
      cell.reader = me.id, cell.read_time = now;
      return;
    }
    Readers& set = sets[cell.reader & kIdMask];
    if (set.block == block && set.last < me.block->floor) set.list.clear();
    if (set.list.empty()) set.block = block;
    if (set.block != block) set.block = 0;
    set.last = now;
    for (auto& [reader, time] : set.list) {
      if ((reader & kIdMask) / 32 == me.id / 32) {
        if (reader != me.id && (reader != (warp | kSeveral) || time < floor)) {
          reader = reader_happened_before(reader, time) ? me.id : warp | kSeveral;
        }
        time = now;
        return;
      }
    }
    set.list.emplace_back(me.id, now);
    return;
  }
  const uint32_t id = cell.reader & kIdMask;
  const bool same_warp = id / 32 == me.id / 32;
  if (same_warp && (cell.reader & kSeveral) && cell.read_time >= floor) {
    cell.read_time = now;
  } else if (reader_happened_before(cell.reader, cell.read_time)) {
    cell.reader = me.id, cell.read_time = now;
  } else if (same_warp) {
    cell.reader = warp | kSeveral, cell.read_time = now;
  } else {
    const uint32_t other = block_of(id);
    const uint32_t index = new_set();
    sets[index].block = other == block ? block : 0, sets[index].last = now;
    sets[index].list.emplace_back(cell.reader, cell.read_time);
    sets[index].list.emplace_back(me.id, now);
    cell.reader = kSet | index;
    cell.read_time = machine.launch_number;
  }
}

void check_atomics(Cell& cell, uintptr_t at, bool writes) {
  cell.writer &= ~kAtomic;
  const auto word = words.find(at / 4 * 4);
  if (word == words.end()) return;  // of an earlier launch
  cell.writer |= kAtomic;
  const Lane& me = *machine.current;
  for (const auto& [id, times] : word->second.threads) {
    if (!machine.check_races || id == me.id) continue;
    const bool after_writes = !times.writes || happened_before(id, times.write);
    const bool after_reads = !times.reads || happened_before(id, times.read);
    if (!after_writes || (writes && !after_reads)) {
      report_race(me.id, writes ? "writes" : "reads", at, id,
                  after_writes ? "read atomically" : "written atomically");
    }
  }
}

void forget_atomics(Cell& cell, uintptr_t at) {
  cell.writer &= ~kAtomic;
  words.erase(at / 4 * 4);
}

void start_memory() {
  sets.clear(), free_sets.clear();
  words.clear();
}

uint32_t atomic_load(const uint32_t* at, bool acquire) {
  yield();
  Cell* cells = locate_word(at, "reads atomically");
  Word& word = words[reinterpret_cast<uintptr_t>(at)];
  touch(word, cells, reinterpret_cast<uintptr_t>(at), "reads atomically", true, false);
  Lane& me = *machine.current;
  if (acquire) {
    acquire_from(me, word.released);
  } else {
    me.pending = join(me.pending, word.released);
  }
  return *at;
}

void atomic_store(uint32_t* at, uint32_t value, bool release) {
  yield();
  Cell* cells = locate_word(at, "writes atomically");
  Word& word = words[reinterpret_cast<uintptr_t>(at)];
  touch(word, cells, reinterpret_cast<uintptr_t>(at), "writes atomically", false, true);
  // A store begins a new release sequence, or none.
  word.released = release ? everything_known() : machine.current->fenced;
  if (*at != value) progress();
  *at = value;
}

uint32_t atomic_add(uint32_t* at, uint32_t value, bool release) {
  yield();
  Cell* cells = locate_word(at, "adds to");
  Word& word = words[reinterpret_cast<uintptr_t>(at)];
  touch(word, cells, reinterpret_cast<uintptr_t>(at), "adds to", true, true);
  Lane& me = *machine.current;
  me.pending = join(me.pending, word.released);
  word.released = join(word.released, release ? everything_known() : me.fenced);
  const uint32_t before = *at;
  if (value != 0) progress();
  *at = before + value;
  return before;
}

void fence() {
  Lane& me = *machine.current;
  acquire_from(me, me.pending);
  me.pending = nullptr;
  me.fenced = everything_known();
}

}  // namespace fused_rnn::emulator

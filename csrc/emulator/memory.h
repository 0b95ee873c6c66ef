// Memory a kernel may touch: bounds, what has been written, and races by happens-before.
//
// Each two bytes have a cell: who wrote them last, and who has read them since. (A byte written
// alone counts as its pair. Several readers of one warp are known together: who is to be ordered
// after them needs a barrier between, of the warp or the block; a release of each does not do.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fused_rnn::emulator {

// A writer or reader is a thread's id, or one of these. Ids of earlier launches are smaller than
// the present launch's first; what they did has happened before.
constexpr uint32_t kLongAgo = 0;    // so that fresh pages are cells of memory that holds values
constexpr uint32_t kUnwritten = 1;  // a writer
constexpr uint32_t kInFlight = 2;   // a writer: the destination of a copy_async; time is whose
constexpr uint32_t kFirstId = 64;
constexpr uint32_t kIdLimit = 1u << 30;
// Flags above the id: of a writer, that atomics have touched the word since; of a reader, that it
// is several lanes of the warp that begins there, or the index of a set.
constexpr uint32_t kAtomic = 1u << 31;
constexpr uint32_t kSeveral = 1u << 31;
constexpr uint32_t kSet = 1u << 30;
constexpr uint32_t kIdMask = kIdLimit - 1;

struct Cell {
  uint32_t writer, write_time;
  uint32_t reader, read_time;  // (of a set: the launch it belongs to)
};

// A block's shared memory.
class SharedMemory {
 public:
  void start(size_t bytes);
  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Cell* cells() { return cells_.data(); }
  bool holds(uintptr_t at) const { return at - reinterpret_cast<uintptr_t>(data_) < bytes_; }

 private:
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
  std::vector<unsigned char> storage_;
  std::vector<Cell> cells_;
};

// Copies a thread has begun and not waited for.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  uint64_t group;
  Cell source[8];  // as it was when the copy began
};
struct CopyQueue {
  std::vector<Copy> copies;
  uint64_t committed = 0;  // groups
};

// Checks and notes an access of the current lane.
void read(const void* at, size_t bytes);
void write(void* at, size_t bytes);

// The same, and it has to be shared memory.
void read_shared(const void* at, size_t bytes);

void begin_copy(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int pending);

// Atomics on words of global memory. Each also passes on knowledge, as its order says.
uint32_t atomic_load(const uint32_t* at, bool acquire);
void atomic_store(uint32_t* at, uint32_t value, bool release);
uint32_t atomic_add(uint32_t* at, uint32_t value, bool release);
void fence();

// Forgets which atomics and readers there were: for the start of a launch.
void start_memory();
// Forgets every id: they begin anew.
void forget_ids();

}  // namespace fused_rnn::emulator

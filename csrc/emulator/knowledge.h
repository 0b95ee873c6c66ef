// What a thread knows to have happened before: sparse hierarchical vector clocks.
//
// A block has one clock, which ticks at each synchronization of any of its threads; an access is
// dated by it. A bound on a block, a warp or a thread says that all its accesses dated earlier have
// happened. Barriers bound a block or a warp at once, releases carry bounds to other threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace fused_rnn::emulator {

enum class Scope : uint64_t { kBlock, kWarp, kThread };

class Knowledge;
using KnowledgePtr = std::shared_ptr<const Knowledge>;

class Knowledge {
 public:
  // What `whom` is dated earlier than `time` has happened. `whom`: the id of the block's, the
  // warp's first thread or the thread's.
  void add(Scope scope, uint32_t whom, uint32_t time) {
    const uint64_t key = key_of(scope, whom);
    const auto at = find(key);
    if (at != bounds_.end() && at->key == key) {
      at->time = std::max(at->time, time);
    } else {
      bounds_.insert(at, Bound{key, time});
    }
  }
  bool covers(Scope scope, uint32_t whom, uint32_t time) const {
    const uint64_t key = key_of(scope, whom);
    const auto at = const_cast<Knowledge*>(this)->find(key);
    return at != bounds_.end() && at->key == key && at->time > time;
  }
  bool contains(const Knowledge& other) const {
    auto mine = bounds_.begin();
    for (const Bound& theirs : other.bounds_) {
      while (mine != bounds_.end() && mine->key < theirs.key) ++mine;
      if (mine == bounds_.end() || mine->key != theirs.key || mine->time < theirs.time) {
        return false;
      }
    }
    return true;
  }
  void join(const Knowledge& other) {
    std::vector<Bound> all;
    all.reserve(bounds_.size() + other.bounds_.size());
    auto a = bounds_.begin();
    for (const Bound& b : other.bounds_) {
      while (a != bounds_.end() && a->key < b.key) all.push_back(*a++);
      all.push_back(b);
      if (a != bounds_.end() && a->key == b.key) {
        all.back().time = std::max(all.back().time, a->time);
        ++a;
      }
    }
    all.insert(all.end(), a, bounds_.end());
    bounds_ = std::move(all);
  }
  // Drops the bounds that one on their block makes superfluous. block_of: of a thread's id.
  template <class BlockOf>
  void prune(const BlockOf& block_of) {
    std::erase_if(bounds_, [&](const Bound& bound) {
      const auto scope = static_cast<Scope>(bound.key >> 32);
      const uint32_t whom = static_cast<uint32_t>(bound.key);
      return scope != Scope::kBlock && covers(Scope::kBlock, block_of(whom), bound.time - 1);
    });
  }
  bool empty() const { return bounds_.empty(); }

 private:
  struct Bound {
    uint64_t key;
    uint32_t time;
  };
  static uint64_t key_of(Scope scope, uint32_t whom) {
    return static_cast<uint64_t>(scope) << 32 | whom;
  }
  std::vector<Bound>::iterator find(uint64_t key) {
    return std::lower_bound(bounds_.begin(), bounds_.end(), key,
                            [](const Bound& bound, uint64_t k) { return bound.key < k; });
  }

  std::vector<Bound> bounds_;  // by key
};

// Both; either may be null, which is nothing.
inline KnowledgePtr join(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (b == nullptr || a == b) return a;
  if (a == nullptr || b->contains(*a)) return b;
  if (a->contains(*b)) return a;
  auto both = std::make_shared<Knowledge>(*a);
  both->join(*b);
  return both;
}

}  // namespace fused_rnn::emulator

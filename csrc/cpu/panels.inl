// What a scan multiplies: packed weights, and the state kept between steps.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// Buffers of one call, released together.
template <class T>
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    for (int i = 0; i < count_; ++i) free_workspace(taken_[i]);
  }
  T* take(int64_t elements) {
    taken_[count_] = allocate_workspace(static_cast<size_t>(elements) * sizeof(T));
    return static_cast<T*>(taken_[count_++]);
  }

 private:
  void* taken_[8] = {};
  int count_ = 0;
};

// Rows of acc values [S, B, ld]; an alternating state is two of them, by the parity of the step.
template <class T>
struct State {
  T* data = nullptr;
  int64_t ld = 0, batch = 0, size = 0;

  State() = default;
  State(Workspace<T>& memory, const Layer& layer, int64_t width, bool alternating)
      : ld(padded_row<T>(width)), batch(layer.batch), size(layer.stack * layer.batch * ld) {
    data = memory.take(size * (alternating ? 2 : 1));
  }
  FN T* row(int64_t s, int64_t b, int64_t parity = 0) const {
    return data + parity * size + (s * batch + b) * ld;
  }
};

// The packed weights of a phase, of all stack entries; none where depth is 0. For the tile unit
// where this takes them: then so many parts of each.
template <class T>
struct Panels {
  enum Beside { kState, kInput, kVectors };  // what is multiplied by them; the last by no tiles
  Weights weights{};
  int64_t entry = 0;  // stride of the stack in the weights' elements
  Blocks blocks;
  int64_t terms = 0;  // of a block of sums
  int parts = 0;
  T* data = nullptr;  // [S][elements()]

  Panels() = default;
  // Gate g, unit u, column k of entry s is w.data[s * entry + offset + g * gate + u * unit + k *
  // column].
  Panels(Workspace<T>& memory, const Layer& layer, const Rows& w, int64_t offset, int gates,
         int64_t units, int64_t depth, int64_t gate, int64_t unit, int64_t column,
         Beside beside = kState)
      : entry(w.entry),
        blocks(gates, Vec<T>::kWidth, units),
        terms(block_terms(depth, beside == kState ? gates * units : 0)) {
    const char* start = static_cast<const char*>(w.data) + offset * size_of(w.dtype);
    weights = Weights{start, w.dtype, gates, units, depth, gate, unit, column};
    if (kHasTiles && sizeof(T) == 4 && beside != kVectors) {
      parts = scan_parts(layer, weights, entry, beside == kState);
    }
    data = memory.take(layer.stack * elements());
  }
  FN int64_t depth() const { return weights.depth; }
  FN int64_t elements() const {
    if (parts > 0)
      return blocks.count * tile_block_bytes(depth(), parts) / static_cast<int64_t>(sizeof(T));
    return depth() * blocks.row_elements();
  }
  FN int vectors(int64_t block) const { return blocks.depth_vectors(block) * weights.gates; }
  FN T* at(int64_t s, int64_t block) const {
    if (parts > 0) return data + (s * blocks.count + block) * (elements() / blocks.count);
    return data + s * elements() + blocks.row_offset(block) * depth();
  }
  void pack(int64_t s, int64_t block) const {
    if (parts > 0) return pack_tile_block(weights, s * entry, blocks, block, parts, at(s, block));
    pack_panel(weights, s * entry, blocks, block, at(s, block));
  }
};

template <class T>
struct Phase {
  Panels<T> recurrent, projection;  // of a forward scan that projects its input itself: W_ih
  State<T> operand;                 // [S, B, depth]
  bool alternating;                 // the operand is the state of the step's parity

  // Of W_hh or W_ih, for the tile unit; 0: neither is.
  FN int parts() const { return recurrent.parts > 0 ? recurrent.parts : projection.parts; }
  // The longer of its operands.
  FN int64_t depth() const {
    const int64_t own = recurrent.depth(), also = projection.depth();
    return own > also ? own : also;
  }
  // Weights that a step reads, of one entry.
  FN int64_t elements() const { return recurrent.elements() + projection.elements(); }
};

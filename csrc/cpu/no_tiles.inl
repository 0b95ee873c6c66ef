// In place of tiles.inl where there is no tile unit: what scans ask of it.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

constexpr bool kHasTiles = false;
constexpr int64_t kPanelItems = 32;

struct TileUnit {
  explicit TileUnit(bool) {}
};
struct TileOperand {
  char* data = nullptr;
  static int64_t bytes(int64_t, int64_t) { return 0; }
  void take(const void*, DType, int64_t, int64_t, int64_t, int64_t) {}
};
FN int scan_parts(const Layer&, const Weights&, int64_t, bool) { return 0; }
FN int64_t tile_block_bytes(int64_t, int) { return 0; }
FN void pack_tile_block(const Weights&, int64_t, const Blocks&, int64_t, int, void*) {}
FN void multiply_tiles(const TileUnit&, const TileOperand&, int64_t, int, int, int, const void*,
                       const void*, float*) {}
FN double tile_seconds(int64_t, int64_t, double, int) { return 0; }
FN bool multiplied_by_tiles(const Matmul&) { return false; }

// The emulator for tests: primitives on arrays, and the small kernels.

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "emulator/emulator.h"
#include "emulator/small_kernels.h"

namespace py = pybind11;

namespace fused_rnn::small {

namespace {

using emulator::allow, emulator::forget, emulator::Launch, emulator::options, emulator::Options;
using emulator::run;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Primitives of a warp, each lane's operands in a row.

enum class Primitive { kMmaBf16, kMmaF16, kMmaTf32, kLoadMatrix, kShuffle, kShuffleXor };

struct PrimitiveParams {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
  uint32_t* r;
  const unsigned char* image;
  int bytes;
  const int* lanes;
};

template <Primitive kPrimitive>
FUSED_RNN_KERNEL(32)
primitive_kernel(FUSED_RNN_PARAMS PrimitiveParams p) {
  const int lane = thread_index();
  if constexpr (kPrimitive == Primitive::kLoadMatrix) {
    unsigned char* shared = &shared_memory<unsigned char>();
    for (int i = lane; i < p.bytes / 2; i += 32) {
      store(reinterpret_cast<uint16_t*>(shared) + i,
            load(reinterpret_cast<const uint16_t*>(p.image) + i));
    }
    barrier();
    uint32_t r[4];
    load_matrix_x4(r, shared + p.lanes[lane]);
    for (int i = 0; i < 4; ++i) store(p.r + lane * 4 + i, r[i]);
  } else if constexpr (kPrimitive == Primitive::kShuffle) {
    store(p.d + lane, shuffle(load(p.d + lane), p.lanes[lane]));
  } else if constexpr (kPrimitive == Primitive::kShuffleXor) {
    store(p.d + lane, shuffle_xor(load(p.d + lane), p.lanes[lane]));
  } else {
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = load(p.a + lane * 4 + i), d[i] = load(p.d + lane * 4 + i);
    for (int i = 0; i < 2; ++i) b[i] = load(p.b + lane * 2 + i);
    if constexpr (kPrimitive == Primitive::kMmaBf16) mma_bf16(d, a, b);
    if constexpr (kPrimitive == Primitive::kMmaF16) mma_f16(d, a, b);
    if constexpr (kPrimitive == Primitive::kMmaTf32) mma_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) store(p.d + lane * 4 + i, d[i]);
  }
}

template <class T>
Array<T> copy_of(const Array<T>& array) {
  Array<T> copy(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
  std::copy(array.data(), array.data() + array.size(), copy.mutable_data());
  return copy;
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <Primitive kPrimitive>
Array<float> mma_of_arrays(const Array<uint32_t>& a, const Array<uint32_t>& b,
                           const Array<float>& d_before, uint64_t seed) {
  expect(a.size() == 128 && b.size() == 64 && d_before.size() == 128, "a, b, d: 32 lanes'");
  Array<float> d = copy_of(d_before);
  PrimitiveParams params{};
  params.a = a.data(), params.b = b.data(), params.d = d.mutable_data();
  options() = Options{};
  options().seed = seed;
  forget();
  allow(params.a, 128 * 4, true, "a");
  allow(params.b, 64 * 4, true, "b");
  allow(params.d, 128 * 4, true, "d");
  run(primitive_kernel<kPrimitive>, Launch{1, 1, 32, 0}, params);
  forget();
  return d;
}

Array<uint32_t> load_matrix_of_arrays(const Array<uint8_t>& image, const Array<int>& offsets,
                                      uint64_t seed) {
  expect(offsets.size() == 32 && image.size() % 2 == 0, "32 offsets, whole pairs of bytes");
  Array<uint32_t> r({32, 4});
  PrimitiveParams params{};
  params.image = image.data(), params.bytes = static_cast<int>(image.size());
  params.lanes = offsets.data(), params.r = r.mutable_data();
  options() = Options{};
  options().seed = seed;
  forget();
  allow(params.image, static_cast<size_t>(image.size()), true, "image");
  allow(params.r, 128 * 4, false, "r");
  run(primitive_kernel<Primitive::kLoadMatrix>, Launch{1, 1, 32, static_cast<size_t>(image.size())},
      params);
  forget();
  return r;
}

template <Primitive kPrimitive>
Array<float> shuffle_of_arrays(const Array<float>& values, const Array<int>& lanes, uint64_t seed) {
  expect(values.size() == 32 && lanes.size() == 32, "32 lanes");
  Array<float> result = copy_of(values);
  PrimitiveParams params{};
  params.d = result.mutable_data(), params.lanes = lanes.data();
  options() = Options{};
  options().seed = seed;
  forget();
  allow(params.d, 32 * 4, true, "values");
  run(primitive_kernel<kPrimitive>, Launch{1, 1, 32, 0}, params);
  forget();
  return result;
}

// votes: [round, thread], as what comes back.
template <bool kOfBlock>
Array<uint32_t> votes_of_arrays(const Array<uint32_t>& votes, uint64_t seed) {
  expect(votes.ndim() == 2 && votes.shape(1) == kSmallThreads, "votes: [round, thread]");
  Array<uint32_t> results = copy_of(votes);
  options() = Options{};
  options().seed = seed;
  forget();
  allow(votes.data(), static_cast<size_t>(votes.size()) * 4, true, "votes");
  allow(results.data(), static_cast<size_t>(votes.size()) * 4, false, "results");
  run(vote, Launch{1, 1, kSmallThreads, 0},
      VoteParams{votes.data(), results.mutable_data(), static_cast<int>(votes.shape(0)), kOfBlock});
  forget();
  return results;
}

// What now() gives, [thread, count].
Array<uint64_t> times_of_threads(int count, uint64_t seed) {
  Array<uint64_t> times({kSmallThreads, count});
  options() = Options{};
  options().seed = seed;
  forget();
  allow(times.data(), static_cast<size_t>(times.size()) * 8, false, "times");
  run(see_times, Launch{1, 1, kSmallThreads, 0}, ClockParams{times.mutable_data(), count});
  forget();
  return times;
}

// A function of one number, on each of an array.
template <class To, class From>
void def_unary(py::module_& m, const char* name, To (*function)(From)) {
  m.def(name, [function](const Array<From>& in) {
    Array<To> out(in.size());
    To* to = out.mutable_data();
    for (py::ssize_t i = 0; i < in.size(); ++i) to[i] = function(in.data()[i]);
    return out;
  });
}

// Small kernels by name and fault.

struct Small {
  void (*kernel)(const SmallParams);
  Launch launch;
  int in, out, scratch;  // numbers
};

constexpr int kT = kSmallThreads, kR = kSmallRounds;
constexpr size_t kTile = kT * sizeof(SmallQuad);

Small small_reduction(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{3, 1, kT, kT * 4}, 3 * kR * kT, 3 * kR * kT, 0};
}
Small small_rotation(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{3, 1, kT, kT * 4}, 3 * kT, 3 * kT, 0};
}
Small small_tile_copy(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{1, 1, kT, 2 * kTile}, 5 * kT * 4, 5 * kT * 4, 0};
}
Small small_message(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{2, 1, kT, 0}, kR * kT, kR * kT, kT};
}
Small small_arrivals(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{2, 1, kT, 0}, kT, kT, kT};
}
Small small_mixed(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{2, 1, kT, 0}, 1, 1, 1};
}
Small small_counter(void (*kernel)(const SmallParams)) {
  const int rows = kCounterBlocks * kT;
  return Small{kernel, Launch{kCounterBlocks, 1, kT, 0}, rows * kR, rows * kR, rows * 2};
}
Small small_product(void (*kernel)(const SmallParams)) {
  return Small{kernel, Launch{1, 1, 32, 24 * 24 * 2}, 24 * 16, 16 * 8, 0};
}

const std::map<std::pair<std::string, std::string>, Small>& small_kernels() {
  using F = Fault;
  static const std::map<std::pair<std::string, std::string>, Small> all = {
      {{"reduction", "none"}, small_reduction(reduction<F::kNone>)},
      {{"reduction", "no barrier"}, small_reduction(reduction<F::kNoBarrier>)},
      {{"reduction", "no second barrier"}, small_reduction(reduction<F::kNoSecondBarrier>)},
      {{"reduction", "beyond"}, small_reduction(reduction<F::kBeyond>)},
      {{"reduction", "misaligned"}, small_reduction(reduction<F::kMisaligned>)},
      {{"reduction", "unwritten"}, small_reduction(reduction<F::kUnwritten>)},
      {{"reduction", "lane ends"}, small_reduction(reduction<F::kLaneEnds>)},
      {{"reduction", "divergence"}, small_reduction(reduction<F::kDivergence>)},
      {{"rotation", "none"}, small_rotation(rotation<F::kNone>)},
      {{"rotation", "no barrier"}, small_rotation(rotation<F::kNoBarrier>)},
      {{"rotation", "no second barrier"}, small_rotation(rotation<F::kNoSecondBarrier>)},
      {{"rotation", "lane ends"}, small_rotation(rotation<F::kLaneEnds>)},
      {{"rotation", "divergence"}, small_rotation(rotation<F::kDivergence>)},
      {{"tile_copy", "none"}, small_tile_copy(tile_copy<F::kNone>)},
      {{"tile_copy", "no barrier"}, small_tile_copy(tile_copy<F::kNoBarrier>)},
      {{"tile_copy", "no second barrier"}, small_tile_copy(tile_copy<F::kNoSecondBarrier>)},
      {{"tile_copy", "beyond"}, small_tile_copy(tile_copy<F::kBeyond>)},
      {{"tile_copy", "parity"}, small_tile_copy(tile_copy<F::kParity>)},
      {{"tile_copy", "no wait"}, small_tile_copy(tile_copy<F::kNoWait>)},
      {{"tile_copy", "unordered"}, small_tile_copy(tile_copy<F::kUnordered>)},
      {{"tile_copy", "never waited"}, small_tile_copy(tile_copy<F::kNeverWaited>)},
      {{"tile_copy", "source written"}, small_tile_copy(tile_copy<F::kSourceWritten>)},
      {{"message", "none"}, small_message(message<F::kNone>)},
      {{"message", "fences"}, small_message(message<F::kFences>)},
      {{"message", "system"}, small_message(message<F::kSystem>)},
      {{"message", "no barrier"}, small_message(message<F::kNoBarrier>)},
      {{"message", "no second barrier"}, small_message(message<F::kNoSecondBarrier>)},
      {{"message", "no release"}, small_message(message<F::kNoRelease>)},
      {{"message", "no acquire"}, small_message(message<F::kNoAcquire>)},
      {{"message", "no acknowledgement"}, small_message(message<F::kNoAcknowledgement>)},
      {{"message", "plain flag"}, small_message(message<F::kPlainFlag>)},
      {{"message", "never set"}, small_message(message<F::kNeverSet>)},
      {{"arrivals", "none"}, small_arrivals(arrivals<F::kNone>)},
      {{"arrivals", "fences"}, small_arrivals(arrivals<F::kFences>)},
      {{"arrivals", "no release"}, small_arrivals(arrivals<F::kNoRelease>)},
      {{"arrivals", "no acquire"}, small_arrivals(arrivals<F::kNoAcquire>)},
      {{"arrivals", "no acknowledgement"}, small_arrivals(arrivals<F::kNoAcknowledgement>)},
      {{"counter", "none"}, small_counter(counter<F::kNone>)},
      {{"counter", "fences"}, small_counter(counter<F::kFences>)},
      {{"counter", "no barrier"}, small_counter(counter<F::kNoBarrier>)},
      {{"counter", "no second barrier"}, small_counter(counter<F::kNoSecondBarrier>)},
      {{"counter", "no release"}, small_counter(counter<F::kNoRelease>)},
      {{"counter", "no acquire"}, small_counter(counter<F::kNoAcquire>)},
      {{"counter", "parity"}, small_counter(counter<F::kParity>)},
      {{"counter", "early"}, small_counter(counter<F::kEarly>)},
      {{"mixed", "atomic read, write"}, small_mixed(mixed<F::kAtomicReadThenWrite>)},
      {{"mixed", "atomic write, read"}, small_mixed(mixed<F::kAtomicWriteThenRead>)},
      {{"mixed", "read, atomic write"}, small_mixed(mixed<F::kReadThenAtomicWrite>)},
      {{"mixed", "write, atomic read"}, small_mixed(mixed<F::kWriteThenAtomicRead>)},
      {{"product", "none"}, small_product(product<F::kNone>)},
      {{"product", "no barrier"}, small_product(product<F::kNoBarrier>)},
      {{"product", "swapped"}, small_product(product<F::kSwapped>)},
      {{"product", "misaligned"}, small_product(product<F::kMisaligned>)},
      {{"product", "lane ends"}, small_product(product<F::kLaneEnds>)},
      {{"product", "divergence"}, small_product(product<F::kDivergence>)},
  };
  return all;
}

Array<float> run_small(const std::string& name, const std::string& fault, uint64_t seed,
                       const Array<float>& in, int resident, int64_t step_limit, bool check_races) {
  const Small& small = small_kernels().at({name, fault});
  expect(in.size() == small.in, "another count of numbers");
  // Apart from one another, so that what lies a little beyond a range is in no other.
  constexpr size_t kApart = 8192;
  std::vector<unsigned char> memory(
      5 * kApart + 4 * static_cast<size_t>(small.in + small.out + small.scratch + 4 + 64));
  unsigned char* free = memory.data() + kApart;
  const auto take = [&](size_t numbers) {
    unsigned char* at = free + (-reinterpret_cast<uintptr_t>(free) & 63);
    free = at + numbers * 4 + kApart;
    return at;
  };
  float* input = reinterpret_cast<float*>(take(small.in));
  float* out = reinterpret_cast<float*>(take(small.out));
  float* scratch = reinterpret_cast<float*>(take(small.scratch));
  uint32_t* words = reinterpret_cast<uint32_t*>(take(4));
  std::copy(in.data(), in.data() + small.in, input);
  options() = Options{seed, resident, step_limit, check_races};
  forget();
  allow(input, small.in * sizeof(float), true, "in");
  allow(out, small.out * sizeof(float), false, "out");
  allow(words, 4 * sizeof(uint32_t), true, "words");
  allow(scratch, small.scratch * sizeof(float), false, "scratch");
  run(small.kernel, small.launch, SmallParams{input, out, words, scratch});
  forget();
  Array<float> result(small.out);
  std::copy(out, out + small.out, result.mutable_data());
  return result;
}

// operations: [thread of the launch, operation, 2].
void run_program(const Array<int32_t>& operations, int numbers, int shared_numbers, int words,
                 uint64_t seed) {
  expect(operations.ndim() == 3 && operations.shape(0) % kT == 0 && operations.shape(2) == 2,
         "operations: [thread, operation, 2]");
  const int blocks = static_cast<int>(operations.shape(0)) / kT;
  std::vector<uint16_t> all_numbers(static_cast<size_t>(numbers));
  std::vector<uint32_t> all_words(static_cast<size_t>(words));
  options() = Options{seed, blocks, int64_t{200000}, true};
  forget();
  allow(all_numbers.data(), numbers * sizeof(uint16_t), true, "numbers");
  allow(all_words.data(), words * sizeof(uint32_t), true, "words");
  run(program, Launch{blocks, 1, kT, shared_numbers * sizeof(uint16_t)},
      ProgramParams{operations.data(), static_cast<int>(operations.shape(1)), all_numbers.data(),
                    all_words.data(), shared_numbers});
  forget();
}

// Allows ranges (begin, bytes, written) of memory, does accesses (at, bytes, writes), a launch
// each, and gives the memory as it is then.
Array<uint8_t> run_accesses(const Array<uint8_t>& memory, const py::list& ranges,
                            const py::list& accesses) {
  Array<uint8_t> copy = copy_of(memory);
  unsigned char* data = copy.mutable_data();
  options() = Options{};
  forget();
  for (const py::handle range : ranges) {
    const auto [begin, bytes, written] = py::cast<std::tuple<int, int, bool>>(range);
    allow(data + begin, static_cast<size_t>(bytes), written,
          ("range " + std::to_string(begin)).c_str());
  }
  for (const py::handle access : accesses) {
    const auto [at, bytes, writes] = py::cast<std::tuple<int, int, bool>>(access);
    run(one_access, Launch{1, 1, 32, 0}, AccessParams{data + at, bytes, writes});
  }
  forget();
  return copy;
}

py::list names_of_small_kernels() {
  py::list names;
  for (const auto& [key, small] : small_kernels()) {
    names.append(py::make_tuple(key.first, key.second, small.in));
  }
  return names;
}

}  // namespace

}  // namespace fused_rnn::small

PYBIND11_MODULE(emulator, m) {
  namespace small = fused_rnn::small;
  namespace cuda = fused_rnn::cuda;
  using small::Primitive;
  using py::literals::operator""_a;
  m.def("mma_bf16", small::mma_of_arrays<Primitive::kMmaBf16>, "a"_a, "b"_a, "d"_a, "seed"_a = 0);
  m.def("mma_f16", small::mma_of_arrays<Primitive::kMmaF16>, "a"_a, "b"_a, "d"_a, "seed"_a = 0);
  m.def("mma_tf32", small::mma_of_arrays<Primitive::kMmaTf32>, "a"_a, "b"_a, "d"_a, "seed"_a = 0);
  m.def("load_matrix_x4", small::load_matrix_of_arrays, "image"_a, "offsets"_a, "seed"_a = 0);
  m.def("shuffle", small::shuffle_of_arrays<Primitive::kShuffle>, "values"_a, "lanes"_a,
        "seed"_a = 0);
  m.def("shuffle_xor", small::shuffle_of_arrays<Primitive::kShuffleXor>, "values"_a, "masks"_a,
        "seed"_a = 0);
  m.def("any", small::votes_of_arrays<false>, "votes"_a, "seed"_a = 0);
  m.def("barrier_any", small::votes_of_arrays<true>, "votes"_a, "seed"_a = 0);
  m.def("now", small::times_of_threads, "count"_a, "seed"_a = 0);
  small::def_unary<uint16_t, float>(m, "to_bf16", cuda::to_bf16);
  small::def_unary<float, uint16_t>(m, "from_bf16", cuda::from_bf16);
  small::def_unary<uint16_t, float>(m, "to_f16", cuda::to_f16);
  small::def_unary<float, uint16_t>(m, "from_f16", cuda::from_f16);
  small::def_unary<float, float>(m, "exponential", cuda::exponential);
  small::def_unary<double, double>(m, "exponential_double", cuda::exponential);
  small::def_unary<float, float>(m, "reciprocal", cuda::reciprocal);
  small::def_unary<double, double>(m, "reciprocal_double", cuda::reciprocal);
  small::def_unary<float, float>(m, "hyperbolic_tangent", cuda::hyperbolic_tangent);
  small::def_unary<double, double>(m, "hyperbolic_tangent_double", cuda::hyperbolic_tangent);
  m.def("program", small::run_program, "operations"_a, "numbers"_a, "shared_numbers"_a, "words"_a,
        "seed"_a);
  m.def("accesses", small::run_accesses, "memory"_a, "ranges"_a, "accesses"_a);
  m.def("small_kernels", small::names_of_small_kernels);
  m.def("kernel", small::run_small, "name"_a, "fault"_a, "seed"_a, "input"_a, "resident"_a = 4,
        "step_limit"_a = int64_t{200000}, "check_races"_a = true);
}

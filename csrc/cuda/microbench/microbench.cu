// What a step of a scan costs whose blocks exchange state, part by part, on the GPU that is here:
// barriers of a grid and of a cluster, the exchange itself, latencies and rates of instructions.
// A program of its own, no part of the library: python tools/build_microbench.py builds it.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <string>

#include "cuda/microbench/cluster.cuh"
#include "cuda/microbench/grid.cuh"
#include "cuda/microbench/latency.cuh"

#if !defined(FUSED_RNN_MICROBENCH_HASH)
#define FUSED_RNN_MICROBENCH_HASH ""
#endif

namespace fused_rnn::microbench {
namespace {

constexpr const char* kUsage =
    R"(usage: microbench [--quick] [--only TEXT] [--json FILE]

Measures on the first GPU what one step takes of: barriers of 8, 16 ... blocks through L2, the
exchange of a state between them, barriers and st.async of clusters, dependent loads, mma.sync,
__syncthreads and st.release. Prints nanoseconds (the median of the repeats, their quartiles, the
least) and clocks of a multiprocessor, each of a loop of thousands of steps inside a kernel. What is
exchanged is checked at every step.

  --quick      fewer repeats: 7 instead of 31
  --only TEXT  what has TEXT in "benchmark variant": --only exchange, --only "mma_rate m16n8k8"
  --json FILE  write all of it to FILE, too
  --help       this text

exit status: 0; 1 if anything failed, a wrong result or a wait without end among them; 2 where the
arguments make no sense; 3 where there is no GPU
)";

struct WrongArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const auto value = [&] {
      if (i + 1 == count) throw WrongArgument(argument + " needs a value");
      return std::string(arguments[++i]);
    };
    if (argument == "--help" || argument == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--only") {
      options.only = value();
    } else if (argument == "--json") {
      options.json = value();
    } else {
      throw WrongArgument("unknown argument " + argument);
    }
  }
  return options;
}

// Clocks and nanoseconds of a while in which every multiprocessor is busy, and the least by which
// the timer of nanoseconds goes on.
struct ClockArgument {
  Run run;
  uint64_t nanoseconds;
  uint64_t* resolution;
};

FUSED_RNN_KERNEL(kThreads) measure_clock(FUSED_RNN_PARAMS ClockArgument argument) {
  uint64_t least = ~uint64_t{0};
  timed(argument.run, [&](uint32_t) {
    const uint64_t begin = ptx::get_sreg_globaltimer();
    for (uint64_t before = begin, time = begin; time - begin < argument.nanoseconds;) {
      time = ptx::get_sreg_globaltimer();
      if (time != before) least = min(least, time - before);
      before = time;
    }
  });
  if (block_x() == 0 && thread_index() == 0) *argument.resolution = least;
}

struct Clock {
  double megahertz;
  uint64_t resolution;
};

Clock clock_of(Harness& harness, uint64_t nanoseconds) {
  const Case c{"clock", "of all", harness.gpu.multiProcessorCount};
  Launch launch{reinterpret_cast<const void*>(measure_clock)};
  harness.compiled_for(launch.kernel);
  // Half of the time to bring the clock up, half to read it.
  launch.warm_up = launch.steps = 1;
  uint64_t* const resolution = static_cast<uint64_t*>(harness.scratch);
  const Elapsed elapsed = harness.run(c, launch, ClockArgument{{}, nanoseconds / 2, resolution});
  Clock clock{1e3 * elapsed.clocks / elapsed.nanoseconds, 0};
  check(cudaMemcpy(&clock.resolution, resolution, sizeof clock.resolution, cudaMemcpyDeviceToHost),
        "the timer's resolution");
  return clock;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Meta describe(const Harness& harness, const Clock& clock) {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "the runtime's version");
  const cudaDeviceProp& gpu = harness.gpu;
  const int compiled_for = harness.compiled_for(reinterpret_cast<const void*>(measure_clock));
  return {
      {"device", json(std::string(gpu.name))},
      {"compute_capability", json(std::to_string(gpu.major) + "." + std::to_string(gpu.minor))},
      {"compiled_for", json("sm_" + std::to_string(compiled_for))},
      {"multiprocessors", json(gpu.multiProcessorCount)},
      {"l2_bytes", json(gpu.l2CacheSize)},
      {"shared_bytes", json(static_cast<double>(gpu.sharedMemPerBlockOptin))},
      {"driver", json(version_text(driver))},
      {"runtime", json(version_text(runtime))},
      {"sources", json(std::string(FUSED_RNN_MICROBENCH_HASH))},
      {"quick", harness.options.quick ? "true" : "false"},
      {"timer_ns", json(static_cast<double>(clock.resolution))},
      {"sm_clock_mhz", json(clock.megahertz)},
  };
}

void write(const std::string& path, const std::string& text) {
  if (path.empty()) return;
  std::ofstream file(path);
  file << text;
  file.close();
  if (!file) throw Error("cannot write " + path);
}

// Whether there is a GPU; says so if not.
bool has_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return true;
  if (error != cudaSuccess && error != cudaErrorNoDevice && error != cudaErrorInsufficientDriver) {
    check(error, "the number of GPUs");
  }
  std::fprintf(stderr, "microbench: no GPU here: %s\n",
               cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error));
  return false;
}

int run(const Options& options) {
  if (!has_gpu()) return 3;
  write(options.json, "");  // better to know it now that it cannot be written
  Harness harness(options);
  Meta meta;
  try {
    const Clock clock = clock_of(harness, options.quick ? 200'000'000 : 500'000'000);
    meta = describe(harness, clock);
    std::printf("%s, %d multiprocessors at %.0f MHz\n%s\n", harness.gpu.name,
                harness.gpu.multiProcessorCount, clock.megahertz, table_head().c_str());
    grid_benchmarks(harness);
    cluster_benchmarks(harness);
    latency_benchmarks(harness);
    meta.emplace_back("sm_clock_mhz_after", json(clock_of(harness, 20'000'000).megahertz));
  } catch (const Error& error) {
    write(options.json, json(meta, harness.rows, error.what()));
    throw;
  }
  if (harness.rows.empty()) throw WrongArgument("no benchmark has \"" + options.only + "\"");
  write(options.json, json(meta, harness.rows, ""));
  return 0;
}

int guarded(int count, char** arguments) {
  try {
    return run(parse(count, arguments));
  } catch (const WrongArgument& error) {
    std::fprintf(stderr, "microbench: %s\n%s", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "microbench: %s\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace fused_rnn::microbench

int main(int count, char** arguments) {
  const int status = fused_rnn::microbench::guarded(count, arguments);
  std::fflush(nullptr);
  // At once, without waiting for a kernel that may not end.
  std::_Exit(status);
}

// The pointwise kernels' launches, and what the library has to do with devices.
#include <cstring>
#include <new>

#include "cuda/launch.cuh"
#include "cuda/pointwise.cuh"

namespace fused_rnn::cuda {
namespace {

template <class Call>
using Kernel = void (*)(const Pointwise<Call>);

// The kernel of a step's phase.

template <class T>
Kernel<LstmForward> step_kernel(const LstmForward&, bool second) {
  return second ? lstm_project_step<T> : lstm_step<T>;
}
template <class T>
Kernel<LstmBackward> step_kernel(const LstmBackward& call, bool second) {
  return call.w_hr.data != nullptr && !second ? lstm_project_step_back<T> : lstm_step_back<T>;
}
template <class T>
Kernel<GruForward> step_kernel(const GruForward& call, bool second) {
  if (call.reset_after) return gru_after_step<T>;
  return second ? gru_before_candidate_step<T> : gru_before_gates_step<T>;
}
template <class T>
Kernel<GruBackward> step_kernel(const GruBackward& call, bool second) {
  if (call.reset_after) return gru_after_step_back<T>;
  return second ? gru_before_reset_step_back<T> : gru_before_candidate_step_back<T>;
}
template <class T>
Kernel<RnnForward> step_kernel(const RnnForward&, bool) {
  return rnn_step<T>;
}
template <class T>
Kernel<RnnBackward> step_kernel(const RnnBackward&, bool) {
  return rnn_step_back<T>;
}

template <class T, class Call>
Kernel<Call> kernel_of(Phase phase, const Call& call) {
  if (phase == Phase::kStart) return start<T, Call>;
  if (phase == Phase::kFinish) return finish<T, Call>;
  return step_kernel<T>(call, phase == Phase::kSecond);
}

}  // namespace

template <class Call>
void launch_pointwise(Phase phase, DType dtype, const Pointwise<Call>& pointwise, void* stream) {
  const Call& call = pointwise.params.call;
  const int64_t threads = call.layer.batch * pointwise.width;
  const Grid grid{(threads + kPointwiseThreads - 1) / kPointwiseThreads, 1, kPointwiseThreads, 0};
  Pointwise<Call> argument = pointwise;
  const Kernel<Call> kernel =
      dtype == DType::kFloat64 ? kernel_of<double>(phase, call) : kernel_of<float>(phase, call);
  launch_stack(kernel, grid, argument, argument.params, stream);
}

#if defined(FUSED_RNN_EMULATOR)
void use_device(int) {}
bool has_code_for(int) { return true; }
void fill_zero(void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }
Lost* lost_record() {
  static Lost lost;
  return &lost;
}
#else
void use_device(int index) {
  // torch has a CUDA runtime of its own. The driver's context is common, and cheap to set again.
  check(cudaSetDevice(index), "the GPU of the tensors cannot be used");
}
bool has_code_for(int index) {
  use_device(index);
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, rnn_step<float>) == cudaSuccess;
  cudaGetLastError();
  return found;
}
void fill_zero(void* data, size_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)),
        "memory could not be filled with zeros");
}
Lost* lost_record() {
  static Lost* const lost = [] {
    // (A stream that is being captured is not disturbed by it.)
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "CUDA graphs are not to be had");
    void* memory = nullptr;
    const cudaError_t error =
        cudaHostAlloc(&memory, sizeof(Lost), cudaHostAllocPortable | cudaHostAllocMapped);
    check(cudaThreadExchangeStreamCaptureMode(&mode), "CUDA graphs are not to be had");
    check(error, "no memory of the host could be had that GPUs may write");
    return new (memory) Lost;
  }();
  return lost;
}
#endif

template void launch_pointwise(Phase, DType, const Pointwise<LstmForward>&, void*);
template void launch_pointwise(Phase, DType, const Pointwise<LstmBackward>&, void*);
template void launch_pointwise(Phase, DType, const Pointwise<GruForward>&, void*);
template void launch_pointwise(Phase, DType, const Pointwise<GruBackward>&, void*);
template void launch_pointwise(Phase, DType, const Pointwise<RnnForward>&, void*);
template void launch_pointwise(Phase, DType, const Pointwise<RnnBackward>&, void*);

}  // namespace fused_rnn::cuda

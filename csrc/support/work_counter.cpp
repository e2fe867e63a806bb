// SPDX-License-Identifier: BSD-3-Clause
#include "support/work_counter.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "support/cuda_check.h"

namespace fa::support {
namespace {

constexpr size_t kChunkBytes = 64 * 1024;
constexpr size_t kChunkCounters = kChunkBytes / sizeof(WorkCounter);

// While it lives, its thread may allocate and wait, whatever streams are captured meanwhile.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "relax what captures forbid");
  }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A stream that waits for no other, and is in no capture.
class PrivateStream {
 public:
  PrivateStream() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
  }
  ~PrivateStream() { cudaStreamDestroy(stream_); }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;

  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

WorkCounter* allocate_chunk() {
  const RelaxedCapture relaxed;
  const PrivateStream stream;
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, kChunkBytes), "allocate work counters");
  check_cuda(cudaMemsetAsync(memory, 0, kChunkBytes, stream.get()), "clear work counters");
  check_cuda(cudaStreamSynchronize(stream.get()), "clear work counters");
  return static_cast<WorkCounter*>(memory);
}

// The counters of one device. They are never freed: nothing tells when a stream or the last graph
// that was made of a capture is gone, and they are few bytes.
class WorkCounters {
 public:
  // Launches on one stream follow each other, so they share a counter. The key is the stream's id,
  // for the handle of a stream that is gone may come again while its last kernel still runs.
  WorkCounter* of_stream(unsigned long long id) {
    const std::lock_guard lock(mutex_);
    WorkCounter*& counter = of_stream_[id];
    if (counter == nullptr) {
      counter = unused();
    }
    return counter;
  }

  // Replays of a graph follow each other, but may run beside any stream's work, that of the
  // captured one too, and beside other launches of the same graph: each captured launch has a
  // counter of its own for good.
  WorkCounter* of_captured_launch() {
    const std::lock_guard lock(mutex_);
    return unused();
  }

 private:
  WorkCounter* unused() {
    if (left_ == 0) {
      next_ = allocate_chunk();
      left_ = kChunkCounters;
    }
    --left_;
    return next_++;
  }

  std::mutex mutex_;
  std::unordered_map<unsigned long long, WorkCounter*> of_stream_;
  WorkCounter* next_ = nullptr;
  size_t left_ = 0;
};

int count_devices() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "count the devices");
  return count;
}

// A lock for each device: an allocation may wait for work on its device, and that for another
// thread's launch on another device.
WorkCounters& counters_of_current_device() {
  static std::vector<WorkCounters> of_device(count_devices());
  int device = 0;
  check_cuda(cudaGetDevice(&device), "tell the current device");
  return of_device[device];
}

}  // namespace

WorkCounter* work_counter(void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "tell whether a stream is captured");
  check_cuda(status == cudaStreamCaptureStatusInvalidated ? cudaErrorStreamCaptureInvalidated
                                                          : cudaSuccess,
             "capture a launch");
  if (status == cudaStreamCaptureStatusActive) {
    return counters_of_current_device().of_captured_launch();
  }
  unsigned long long id = 0;
  check_cuda(cudaStreamGetId(stream, &id), "tell the id of a stream");
  return counters_of_current_device().of_stream(id);
}

}  // namespace fa::support

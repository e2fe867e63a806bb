// SPDX-License-Identifier: BSD-3-Clause
// Launches that may run at the same time count in different places, and leave them zero: on
// streams, in captures, on threads. Prints a line per check; returns 0 if all hold, 1 if one does
// not, 77 without a GPU.
#include "support/work_counter.h"

#include <set>
#include <thread>
#include <vector>

#include "sm90/fwd_work.cuh"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;
using support::work_counter;

constexpr int kBlocks = 100;
constexpr int kItems = 5000;

// Counts how often each item is taken, in the manner of Hopper's kernels.
__global__ void take_items_kernel(sm90::Schedule schedule, int* g_times) {
  uint32_t item = sm90::take_first_item(schedule);
  while (item < schedule.items) {
    atomicAdd(&g_times[item], 1);
    item = sm90::take_item(schedule);
  }
  sm90::finish_taking(schedule);
}

// No more items than blocks need no counter.
void test_without_counter() {
  constexpr int kFewItems = kBlocks - 1;
  Managed<int> times(kFewItems);
  const sm90::Schedule schedule = {
      .tiles = {}, .items = kFewItems, .head_group = 1, .counter = nullptr};
  run<take_items_kernel>(kBlocks, 1, 0, schedule, times.data);
  expect(
      "without a counter each item is taken once", 1, kFewItems, 0,
      [&](int, int item) { return times[item]; }, [](int, int) { return 1; });
}

void launch(WorkCounter* counter, Managed<int>& times, cudaStream_t stream, bool in_order = false) {
  const sm90::Schedule schedule = {
      .tiles = {}, .items = kItems, .head_group = 1, .counter = counter, .in_order = in_order};
  take_items_kernel<<<kBlocks, 1, 0, stream>>>(schedule, times.data);
  check_cuda(cudaGetLastError(), "launch");
}

struct Stream {
  Stream() {
    check_cuda(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "create a stream");
  }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t handle = nullptr;
};

// What body() launches on the stream, as a graph.
template <typename Body>
cudaGraphExec_t capture(const Stream& stream, Body&& body) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeGlobal), "capture");
  body();
  check_cuda(cudaStreamEndCapture(stream.handle, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "make a graph");
  check_cuda(cudaGraphDestroy(graph), "free a graph");
  return executable;
}

void expect_all_different(const std::string& name, const std::vector<WorkCounter*>& counters) {
  const std::set<WorkCounter*> different(counters.begin(), counters.end());
  const auto count = static_cast<int>(counters.size());
  report(name, count - static_cast<int>(different.size()), count);
}

void expect_zero(const std::string& name, const std::vector<WorkCounter*>& counters) {
  int wrong = 0;
  for (const WorkCounter* counter : counters) {
    WorkCounter value = {1, 1};
    check_cuda(cudaMemcpy(&value, counter, sizeof(value), cudaMemcpyDefault), "copy to the host");
    wrong += value.taken != 0 || value.finished != 0;
  }
  report(name, wrong, static_cast<int>(counters.size()));
}

// Must be the first to ask for a counter.
void test_first_use_within_a_capture() {
  cudaFuncAttributes loaded;  // code is not loaded while a stream is captured
  check_cuda(cudaFuncGetAttributes(&loaded, take_items_kernel), "load a kernel");
  constexpr int kReplays = 200;
  Managed<int> captured_times(kItems);
  Managed<int> eager_times(kItems);
  Managed<int> other_times(kItems);
  const Stream stream;
  const Stream other;
  std::vector<WorkCounter*> counters;
  const cudaGraphExec_t graph = capture(stream, [&] {
    for (int i = 0; i < 2; ++i) {
      counters.push_back(work_counter(stream.handle));
      launch(counters.back(), captured_times, stream.handle);
    }
  });
  counters.push_back(work_counter(stream.handle));
  counters.push_back(work_counter(other.handle));
  expect_all_different("captured launches and streams have counters of their own", counters);

  const Stream replayed;
  for (int i = 0; i < kReplays; ++i) {
    check_cuda(cudaGraphLaunch(graph, replayed.handle), "replay a graph");
    launch(work_counter(stream.handle), eager_times, stream.handle);
    launch(work_counter(other.handle), other_times, other.handle, true);
  }
  check_cuda(cudaDeviceSynchronize(), "run");
  check_cuda(cudaGraphExecDestroy(graph), "free a graph");
  const auto expect_times = [](const std::string& name, Managed<int>& times, int expected) {
    expect(
        name, 1, kItems, 0, [&](int, int item) { return times[item]; },
        [&](int, int) { return expected; });
  };
  expect_times("replays take each item once", captured_times, 2 * kReplays);
  expect_times("launches on the captured stream, too", eager_times, kReplays);
  expect_times("launches in order on another stream, too", other_times, kReplays);
  expect_zero("a kernel leaves its counter zero", counters);
}

void test_streams() {
  const Stream stream;
  report("a stream keeps its counter", work_counter(stream.handle) != work_counter(stream.handle),
         1);
  report("the default stream, too", work_counter(nullptr) != work_counter(nullptr), 1);
  constexpr int kStreams = 100;
  std::vector<WorkCounter*> counters = {work_counter(nullptr), work_counter(stream.handle)};
  for (int i = 0; i < kStreams; ++i) {
    const Stream brief;  // whose handle may be that of the one before
    counters.push_back(work_counter(brief.handle));
  }
  expect_all_different("a stream does not inherit the counter of one that is gone", counters);
}

void test_many_captured_launches() {
  constexpr int kLaunches = 20000;
  const Stream stream;
  std::vector<WorkCounter*> counters;
  const cudaGraphExec_t graph = capture(stream, [&] {
    for (int i = 0; i < kLaunches; ++i) {
      counters.push_back(work_counter(stream.handle));
    }
  });
  check_cuda(cudaGraphExecDestroy(graph), "free a graph");
  expect_all_different("many captured launches have counters of their own", counters);
  expect_zero("all of them zero", counters);
}

void test_threads() {
  constexpr int kCalls = 1000;
  constexpr int kThreads = 8;
  const Stream streams[kThreads];
  std::vector<WorkCounter*> counters(kThreads);
  std::vector<int> wrong(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      counters[i] = work_counter(streams[i].handle);
      for (int call = 0; call < kCalls; ++call) {
        wrong[i] += work_counter(streams[i].handle) != counters[i];
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (int i = 0; i < kThreads; ++i) {
    report("a stream keeps its counter while threads ask for theirs", wrong[i], kCalls);
  }
  expect_all_different("threads with streams of their own have counters of their own", counters);
}

void test_broken_capture() {
  const Stream stream;
  check_cuda(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeGlobal), "capture");
  cudaStreamSynchronize(stream.handle);  // breaks it
  bool refused = false;
  try {
    work_counter(stream.handle);
  } catch (const Error&) {
    refused = true;
  }
  report("a broken capture is an error", !refused, 1);
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream.handle, &graph);
  cudaGetLastError();  // is the one that was made
}

void test_all() {
  test_first_use_within_a_capture();
  test_streams();
  test_many_captured_launches();
  test_threads();
  test_broken_capture();
  test_without_counter();
}

}  // namespace

int main() { return run_tests(test_all); }

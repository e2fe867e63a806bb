// SPDX-License-Identifier: BSD-3-Clause
// What selection must know of a device, and whether its driver can run this build.
#include <cuda_runtime_api.h>

#include <mutex>
#include <unordered_map>

#include "dispatch/registry.h"
#include "support/cuda_check.h"

namespace fa::support {
namespace {

constexpr int major_of(int version) { return version / 1000; }
constexpr int minor_of(int version) { return version % 1000 / 10; }

// A driver runs every toolkit of its own major version and of earlier ones.
void check_driver() {
  int driver_version = 0;
  check_cuda(cudaDriverGetVersion(&driver_version), "tell the version of its driver");
  check(driver_version != 0, ErrorKind::kRuntime,
        "no CUDA driver is loaded on this machine: install an NVIDIA driver that supports CUDA ",
        major_of(CUDART_VERSION), ".", minor_of(CUDART_VERSION), ", or use CPU tensors");
  check(major_of(driver_version) >= major_of(CUDART_VERSION), ErrorKind::kRuntime,
        "the CUDA driver supports CUDA ", major_of(driver_version), ".", minor_of(driver_version),
        ", but this package was built with CUDA ", major_of(CUDART_VERSION), ".",
        minor_of(CUDART_VERSION), ": update the driver, or rebuild with a CUDA ",
        major_of(driver_version), " toolkit");
}

int attribute(cudaDeviceAttr which, int device_index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device_index), "describe device ", device_index);
  return value;
}

CudaDevice describe(int device_index) {
  return {.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device_index) +
                                attribute(cudaDevAttrComputeCapabilityMinor, device_index),
          .smem_opt_in = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index)};
}

CudaDevice query_cuda_device(int device_index) {
  static std::mutex mutex;
  static std::unordered_map<int, CudaDevice> devices;
  const std::lock_guard lock(mutex);
  const auto known = devices.find(device_index);
  if (known != devices.end()) {
    return known->second;
  }
  check_driver();
  return devices.emplace(device_index, describe(device_index)).first->second;
}

const bool g_registered = [] {
  registry().query_cuda_device = query_cuda_device;
  registry().cuda_version = CUDART_VERSION;
  return true;
}();

}  // namespace
}  // namespace fa::support

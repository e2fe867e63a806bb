// SPDX-License-Identifier: BSD-3-Clause
// flash_attn_cuda._C: what this build contains and what it would run. The operators register
// themselves with torch (attention.cpp); nothing here is on a call's path.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "api/launch.h"
#include "api/tensors.h"
#include "common/check.h"
#include "cpu/isa.h"

namespace fa::api {
namespace {

namespace py = pybind11;

Dtype parse_dtype(const std::string& name) {
  for (Dtype dtype :
       {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kTf32}) {
    if (name == name_of(dtype)) {
      return dtype;
    }
  }
  throw Error(ErrorKind::kType,
              concat("dtype: expected bfloat16, float16, float32, tf32 or float64, got ", name));
}

py::dict row_to_dict(int row) {
  const KernelConfig& config = table::kRows[row];
  py::dict fields;
  fields["name"] = config.name();
  fields["family"] = name_of(config.family);
  fields["pass"] = name_of(config.pass);
  fields["dtype"] = name_of(config.dtype);
  fields["head_dim"] = config.head_dim;
  fields["mask"] = name_of(config.mask);
  fields["score"] = name_of(config.score);
  fields["softcap"] = config.has_softcap();
  fields["tile_m"] = config.tile_m;
  fields["tile_n"] = config.tile_n;
  fields["warps"] = config.warps;
  fields["blocks"] = config.blocks;
  fields["smem_bytes"] = config.smem_bytes();
  fields["built"] = registry().kernels[row].present();
  return fields;
}

py::list kernel_table() {
  py::list rows;
  for (int row = 0; row < kNumRows; ++row) {
    rows.append(row_to_dict(row));
  }
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["cuda_version"] = registry().cuda_version;
  info["architectures"] = compiled_architectures();
  info["cpu_isa"] = registry().cpu_isa;
  return info;
}

// The chosen row's name, or the sentence that would be raised, and for each row of the pass why it
// does not run.
py::dict explain(const std::string& pass, const std::string& dtype, int head_dim, int seqlen_q,
                 int seqlen_k, int64_t window_left, int64_t window_right, bool general_scores,
                 bool softcap, bool on_cuda, int compute_capability, int64_t smem_opt_in) {
  const Problem problem{
      .pass = pass == name_of(Pass::kForward) ? Pass::kForward : Pass::kBackward,
      .dtype = parse_dtype(dtype),
      .head_dim = head_dim,
      .full_mask = WindowMask(seqlen_q, seqlen_k, window_left, window_right).is_full(),
      .general_scores = general_scores,
      .softcap = softcap,
      .on_cuda = on_cuda,
      .device = {compute_capability, smem_opt_in}};
  py::dict decision;
  try {
    decision["kernel"] = table::kRows[select_row(problem)].name();
  } catch (const Error& error) {
    decision["kernel"] = py::none();
    decision["error"] = error.sentence();
    decision["exception"] = name_of(error.kind());
  }
  py::dict reasons;
  for (int row = 0; row < kNumRows; ++row) {
    const Verdict verdict = judge(row, problem);
    if (verdict != Verdict::kOtherPass) {
      reasons[py::str(table::kRows[row].name())] = describe(verdict, row, problem);
    }
  }
  decision["reasons"] = reasons;
  return decision;
}

std::optional<std::string> why_copied_of(const std::array<int64_t, 4>& sizes,
                                         const std::array<int64_t, 4>& strides, uint64_t address,
                                         int64_t element_bytes, bool on_cuda) {
  const char* reason = why_copied({sizes, strides, address, element_bytes, on_cuda});
  return reason == nullptr ? std::nullopt : std::optional<std::string>(reason);
}

py::dict kernel_resources() {
  py::dict resources;
  for (int row = 0; row < kNumRows; ++row) {
    const RegisteredKernel& kernel = registry().kernels[row];
    if (kernel.resources != nullptr) {
      const KernelResources used = kernel.resources();
      py::dict fields;
      fields["registers"] = used.registers;
      fields["local_bytes"] = used.local_bytes;
      fields["static_smem_bytes"] = used.static_smem_bytes;
      fields["dynamic_smem_bytes"] = used.dynamic_smem_bytes;
      resources[py::str(table::kRows[row].name())] = fields;
    }
  }
  return resources;
}

PyObject* exception_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kValue:
      return PyExc_ValueError;
    case ErrorKind::kType:
      return PyExc_TypeError;
    case ErrorKind::kNotImplemented:
      return PyExc_NotImplementedError;
    default:
      return PyExc_RuntimeError;
  }
}

void translate_error(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    PyErr_SetString(exception_of(error.kind()), error.sentence().c_str());
  }
}

// For tests: from here on the CUDA rows of other families count as left out of the build. "": none.
void limit_family(const std::string& family) {
  for (int row = 0; row < kNumRows; ++row) {
    const Family of_row = table::kRows[row].family;
    registry().kernels[row].hidden =
        of_row != Family::kCpu && !family.empty() && family != name_of(of_row);
  }
}

py::tuple query_cuda_device(int device_index) {
  const CudaDevice device = cuda_device(device_index);
  return py::make_tuple(device.compute_capability, device.smem_opt_in);
}

}  // namespace
}  // namespace fa::api

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  py::register_local_exception_translator(fa::api::translate_error);
  module.def("build_info", fa::api::build_info);
  module.def("kernel_table", fa::api::kernel_table);
  module.def("kernel_resources", fa::api::kernel_resources);
  module.def("runs_on", fa::runs_on, py::arg("architectures"), py::arg("compute_capability"));
  module.def("query_cuda_device", fa::api::query_cuda_device, py::arg("device_index"));
  module.def("limit_shared_memory", fa::api::limit_shared_memory, py::arg("bytes"));
  module.def("limit_family", fa::api::limit_family, py::arg("family"));
  module.def("select_cpu_isa", fa::cpu::select_isa, py::arg("name"));
  module.def("why_copied", fa::api::why_copied_of, py::kw_only(), py::arg("sizes"),
             py::arg("strides"), py::arg("address"), py::arg("element_bytes"), py::arg("on_cuda"));
  module.def("explain", fa::api::explain, py::kw_only(), py::arg("pass_name"), py::arg("dtype"),
             py::arg("head_dim"), py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("window_left"),
             py::arg("window_right"), py::arg("general_scores"), py::arg("softcap"),
             py::arg("on_cuda"), py::arg("compute_capability"), py::arg("smem_opt_in"));
}

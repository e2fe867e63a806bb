// SPDX-License-Identifier: BSD-3-Clause
// Which vector instructions the CPU kernels use. The best that the machine has is chosen when the
// library is loaded; tests choose others to run every kernel that the machine can.
#pragma once

#include <string>
#include <vector>

namespace fa::cpu {

// Instruction sets of this machine that there are kernels for, best first.
std::vector<std::string> available_isas();

// Installs the kernels of one of them; throws fa::Error for any other. Not while kernels run.
void select_isa(const std::string& name);

}  // namespace fa::cpu
